"""The metadata of packages whose versions name kernels: without it, Numba is imported to ask for its version."""

from PyInstaller.utils.hooks import copy_metadata

datas = [file for package in ("numba", "llvmlite", "numpy") for file in copy_metadata(package)]
