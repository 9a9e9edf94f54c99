"""Exact attention for NumPy at the speed of the hardware."""

from fastattn.api.additive import additive_attention
from fastattn.api.attention import attention
from fastattn.api.backward import additive_attention_backward, attention_backward
from fastattn.api.block_mask import BlockMask
from fastattn.api.blocks import attention_blocks
from fastattn.api.cache import KVCache
from fastattn.api.merge import merge
from fastattn.api.paged import attention_paged
from fastattn.api.varlen import attention_varlen, attention_varlen_backward
from fastattn.api.weights import AttentionSummary, attention_summary, attention_weights
from fastattn.cpu.host.threads import get_num_threads, num_threads, set_num_threads
from fastattn.cpu.host.warmup import warmup
from fastattn.layers import BahdanauAttention, LuongAttention, MultiHeadAttention, rotary, sinusoidal_positions

__all__ = [
    "AttentionSummary",
    "BahdanauAttention",
    "BlockMask",
    "KVCache",
    "LuongAttention",
    "MultiHeadAttention",
    "additive_attention",
    "additive_attention_backward",
    "attention",
    "attention_backward",
    "attention_blocks",
    "attention_paged",
    "attention_summary",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_weights",
    "get_num_threads",
    "merge",
    "num_threads",
    "rotary",
    "set_num_threads",
    "sinusoidal_positions",
    "warmup",
]
__version__ = "0.1.0"
