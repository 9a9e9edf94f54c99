"""What attention means, in plain NumPy: read this first.

`fastattn.reference.forward` is the formula itself, `fastattn.reference.backward` its derivative; both take every option
that the fast backends do, which are tested against them.
"""

from fastattn.reference.backward import additive_attention_backward, attention_backward, differentiate
from fastattn.reference.dropout import keep_mask, philox
from fastattn.reference.forward import additive_attention, attention, evaluate
from fastattn.reference.merge import merge
from fastattn.reference.paged import attention_paged
from fastattn.reference.varlen import attention_varlen, attention_varlen_backward
from fastattn.reference.weights import AttentionSummary, attention_summary, attention_weights, summarise

__all__ = [
    "AttentionSummary",
    "additive_attention",
    "additive_attention_backward",
    "attention",
    "attention_backward",
    "attention_paged",
    "attention_summary",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_weights",
    "differentiate",
    "evaluate",
    "keep_mask",
    "merge",
    "philox",
    "summarise",
]
