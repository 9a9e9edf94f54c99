"""Exact attention for NumPy at the speed of the hardware."""

from fastattn.additive import additive_attention
from fastattn.api import attention
from fastattn.cpu.kernels import warmup
from fastattn.cpu.pool import get_num_threads, num_threads, set_num_threads
from fastattn.layers import BahdanauAttention, LuongAttention, MultiHeadAttention, rotary, sinusoidal_positions

__all__ = [
    "BahdanauAttention",
    "LuongAttention",
    "MultiHeadAttention",
    "additive_attention",
    "attention",
    "get_num_threads",
    "num_threads",
    "rotary",
    "set_num_threads",
    "sinusoidal_positions",
    "warmup",
]
__version__ = "0.1.0"
