"""Exact attention for NumPy at the speed of the hardware."""

from fastattn.additive import additive_attention
from fastattn.api import attention
from fastattn.cpu.kernels import warmup
from fastattn.cpu.pool import get_num_threads, num_threads, set_num_threads

__all__ = ["additive_attention", "attention", "get_num_threads", "num_threads", "set_num_threads", "warmup"]
__version__ = "0.1.0"
