"""The same attention on NVIDIA GPUs: kernels in Python, compiled by Numba."""
