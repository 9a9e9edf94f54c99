"""Packed sequences of PyTorch's: the operator ``fastattn::attention_varlen``, its derivative, and a function for both.

What is said in `fastattn.integrations.operators` of operators holds here. Arrays are packed, and there is no mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

import fastattn
from fastattn.call.options import check_causal, check_dropout, check_flag, check_scale
from fastattn.call.score_options import FurtherOptions
from fastattn.cpu.host.threads import threads_of_call
from fastattn.integrations import keywords
from fastattn.integrations.functions import FUNCTIONS
from fastattn.integrations.operators import (
    CAUSAL,
    GRADIENTS_OF_HEADS,
    GRADIENTS_OF_OPERANDS,
    OF_HEADS,
    OPERANDS,
    refuse,
    save_nothing,
)
from fastattn.integrations.tensors import array_of, check_integers, check_operands, in_autocast, sums_dtype, tensor_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention_varlen"]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed

LENGTHS = "Tensor cu_seqlens_q, Tensor? cu_seqlens_k"
OPTIONS = f"float dropout_p, str causal, float? scale, bool enable_gqa, Tensor? seed, {keywords.SCHEMA}"
SUMMED = ("alibi_slopes", "sinks")  # what has a gradient besides operands: one without numbers, where it is not wanted
SCHEMAS = {
    "attention_varlen": f"({OPERANDS}, {LENGTHS}, {OPTIONS}) -> (Tensor out, Tensor lse)",
    "attention_varlen_backward": f"(Tensor grad_out, Tensor grad_lse, {OPERANDS}, Tensor out, Tensor lse, {LENGTHS}, "
    f"{OPTIONS}, {OF_HEADS}) -> ({GRADIENTS_OF_OPERANDS}, {GRADIENTS_OF_HEADS})",
}


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool | str = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Unpack[FurtherOptions],
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences on tensors, and the log-sum-exp: `fastattn.attention_varlen`.

    Differentiable once in query, key, value, alibi_slopes and sinks, through both results. What each argument means,
    and what is promised of the results, is as in `fastattn.attention_varlen`.

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
        window, query_offset, softcap, alibi_slopes and sinks, as `fastattn.attention_varlen` takes them; no functions.

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
    if torch.is_autocast_enabled("cpu"):
        query, key, value = map(in_autocast, (query, key, value))
    check_operands(query=query, key=key, value=value)
    check_integers("cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_k is not None:
        check_integers("cu_seqlens_k", cu_seqlens_k)
    if options.get("key_lengths") is not None:
        raise TypeError("key_lengths: given for packed sequences, whose lengths cu_seqlens_k says; expected None")
    for name in FUNCTIONS:
        if options.get(name) is not None:
            raise NotImplementedError(
                f"{name}: given for packed sequences of tensors; expected None, or a call of fastattn.attention_varlen"
            )
    dropout_p, causal = check_dropout(dropout_p), check_causal(is_causal)
    scale, enable_gqa = check_scale(scale), check_flag("enable_gqa", enable_gqa)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu") if dropout_p > 0 else None
    numbers = (dropout_p, causal, scale, enable_gqa, seed)
    operator = torch.ops.fastattn.attention_varlen.default
    results: tuple[Tensor, Tensor] = operator(
        query, key, value, cu_seqlens_q, cu_seqlens_k, *numbers, *keywords.flattened(options)
    )
    return results


def _call(name: str, args: tuple[Any, ...], **options: Any) -> Any:
    """Call fastattn's function with the arguments of an operator, and no more threads than PyTorch may use."""
    for argument, given in zip(_ARGUMENTS[name], args, strict=False):
        if given is not None:
            options[argument] = array_of(argument, given) if isinstance(given, torch.Tensor) else given
    options["is_causal"] = CAUSAL[options.pop("causal")]
    if "seed" in options:
        options["rng"] = int(options.pop("seed"))
    keywords.restore(options)
    with fastattn.num_threads(min(torch.get_num_threads(), threads_of_call())):
        return getattr(fastattn, name)(**options)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = _call("attention_varlen", args, return_lse=True)
    return tensor_of(out), tensor_of(lse)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    heads = query.size(1)
    if heads == 1:
        heads = value.size(1) if key.size(1) == 1 else key.size(1)
    lse = query.new_empty((query.size(0), heads), dtype=sums_dtype(query.dtype))
    return query.new_empty((query.size(0), heads, value.size(-1))), lse


def _backward(*args: Any) -> tuple[Tensor, ...]:
    given = dict(zip(_ARGUMENTS["attention_varlen_backward"], args, strict=False))
    wanted = [name for name in SUMMED if given.get(f"with_{name}")]
    names = ("query", "key", "value", *wanted)
    rest = args[: len(_ARGUMENTS["attention_varlen_backward"]) - len(SUMMED)]
    found = dict(zip(names, _call("attention_varlen_backward", rest, grads=names), strict=True))
    none = np.empty(0, found["query"].dtype)
    results = (found.get(name, none) for name in ("query", "key", "value", *SUMMED))
    return tuple(tensor_of(np.ascontiguousarray(array).reshape(array.shape)) for array in results)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    given = dict(zip(_ARGUMENTS["attention_varlen_backward"], args, strict=False))
    operands = [given[name] for name in ("query", "key", "value")]
    of_heads = [given[name] if given.get(f"with_{name}") else operands[0].new_empty(0) for name in SUMMED]
    return tuple(tensor.new_empty(tensor.shape) for tensor in (*operands, *of_heads))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep for the backward pass the results, and what the operator was given, tensors as such."""
    ctx.save_for_backward(*output, *(given if isinstance(given, torch.Tensor) else None for given in inputs))
    ctx.others = tuple(None if isinstance(given, torch.Tensor) else given for given in inputs)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    inputs = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
    operator = torch.ops.fastattn.attention_varlen_backward.default
    places = [_ARGUMENTS["attention_varlen"].index(name) for name in SUMMED]
    wanted = [place < len(ctx.needs_input_grad) and ctx.needs_input_grad[place] for place in places]
    further = [*inputs[3:], *[None] * (len(_ARGUMENTS["attention_varlen"]) - len(inputs))]
    found = operator(grad_out, grad_lse, *inputs[:3], out, lse, *further, *wanted)
    gradients: list[Tensor | None] = [*found[:3], *[None] * (len(inputs) - 3)]
    for place, is_wanted, gradient in zip(places, wanted, found[3:], strict=True):
        if is_wanted:
            gradients[place] = gradient
    return tuple(gradients)


for _name, _kernel, _fake in (
    ("attention_varlen", _forward, _forward_fake),
    ("attention_varlen_backward", _backward, _backward_fake),
):
    torch.library.define(f"fastattn::{_name}", SCHEMAS[_name])
    torch.library.impl(f"fastattn::{_name}", "CPU", _kernel)
    torch.library.register_fake(f"fastattn::{_name}", _fake)
torch.library.register_autograd("fastattn::attention_varlen", _differentiate, setup_context=_save)
torch.library.register_autograd("fastattn::attention_varlen_backward", refuse, setup_context=save_nothing)
_ARGUMENTS = {
    name: [argument.name for argument in getattr(torch.ops.fastattn, name).default._schema.arguments]
    for name in SCHEMAS
}
