"""Packed sequences of PyTorch's tensors, checked here, as `fastattn.integrations.torch` checks what is not packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fastattn.call.options import check_causal, check_dropout, check_flag, check_scale
from fastattn.call.score_options import FurtherOptions
from fastattn.call.types import Causal, Number
from fastattn.integrations import eager
from fastattn.integrations.functions import has_functions
from fastattn.integrations.keywords import flattened
from fastattn.integrations.tensors import check_integers, check_operands, draw_seed, in_autocast

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention_varlen"]

Tensor: TypeAlias = torch.Tensor

#: Options that have no meaning for packed sequences, and what is to be said instead.
REFUSED = {
    "key_lengths": "whose lengths cu_seqlens_k says; expected None",
    "block_mask": "of which each has blocks of its own; expected mask_mod",
}


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    **options: Unpack[FurtherOptions],
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences on tensors, and the log-sum-exp: `fastattn.attention_varlen`.

    Differentiable once in query, key, value, alibi_slopes, sinks, and what score_mod captures, through both results.
    What each argument means, and what is promised of the results, is as in `fastattn.attention_varlen`.

    Parameters
    ----------
    query : torch.Tensor, shape (T, Hq, D)
        float16, bfloat16, float32 or float64, on the CPU. The tensor's memory is read where it lies, whatever its
        strides.
    key : torch.Tensor, shape (S, Hk, D)
    value : torch.Tensor, shape (S, Hk, Dv)
    cu_seqlens_q, cu_seqlens_k : torch.Tensor of integers, shape (B + 1,)
        Cumulative lengths, those of the keys unless they are the same.
    dropout_p : float
        Probability that a weight is dropped. Which ones, ``torch.manual_seed`` determines.
    is_causal, scale, enable_gqa
        As in `scaled_dot_product_attention`.
    **options
        window, query_offset, softcap, alibi_slopes, sinks, score_mod and mask_mod, as `fastattn.attention_varlen` takes
        them, on tensors; functions as in `flex_attention`.

    Returns
    -------
    out : torch.Tensor, shape (T, Hq, Dv)
    lse : torch.Tensor, shape (T, Hq)

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `scaled_dot_product_attention`.

    Examples
    --------
    >>> import torch
    >>> from fastattn.integrations.torch import attention_varlen
    >>> query, key, value = (torch.randn(12, 8, 64, requires_grad=True) for _ in range(3))
    >>> out, lse = attention_varlen(query, key, value, torch.tensor([0, 5, 12]), is_causal=True)
    >>> out.sum().backward()
    >>> query.grad.shape
    torch.Size([12, 8, 64])
    """
    if torch.compiler.is_compiling() and has_functions(options):
        given = (query, key, value, cu_seqlens_q, cu_seqlens_k)
        numbers: Any = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        apart: tuple[Tensor, Tensor] = eager.apart(attention_varlen, *given, **numbers, **options)
        return apart
    if torch.is_autocast_enabled("cpu"):
        query, key, value = map(in_autocast, (query, key, value))
    check_operands(query=query, key=key, value=value)
    check_integers("cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_k is not None:
        check_integers("cu_seqlens_k", cu_seqlens_k)
    for name, reason in REFUSED.items():
        if options.get(name) is not None:
            raise TypeError(f"{name}: given for packed sequences, {reason}")
    told = (check_dropout(dropout_p), check_causal(is_causal), check_scale(scale), check_flag("enable_gqa", enable_gqa))
    seed = draw_seed() if told[0] > 0 else None
    further = flattened(options) if options else ()
    given = (query, key, value, cu_seqlens_q, cu_seqlens_k)
    results: tuple[Tensor, Tensor] = eager.call("attention_varlen", *given, *told, seed, *further)
    return results
