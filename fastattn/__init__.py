"""Exact attention for NumPy at the speed of the hardware."""

from fastattn.api import attention
from fastattn.cpu.kernels import warmup
from fastattn.cpu.pool import get_num_threads, num_threads, set_num_threads
from fastattn.summary import AttentionSummary, attention_summary, attention_weights

__all__ = [
    "AttentionSummary",
    "attention",
    "attention_summary",
    "attention_weights",
    "get_num_threads",
    "num_threads",
    "set_num_threads",
    "warmup",
]
__version__ = "0.1.0"
