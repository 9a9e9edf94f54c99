"""The operators ``fastattn::attention`` and ``fastattn::additive_attention``, as PyTorch's dispatcher knows them.

Each comes with what PyTorch asks of an operator: a kernel, which works on the memory of the tensors; a fake kernel,
which knows the shapes and strides of its results without computing them, for ``torch.compile``; its derivative, which
is an operator, too; and a rule for ``vmap``. Arguments have been checked before, in
`fastattn.integrations.torch`.

Whether causality is wanted is one of the words that `fastattn.call.options.check_causal` returns. A seed is a tensor,
not an int, so that a compiled program can draw it. Last come arguments that may be left out: the boolean one of two
masks, and those of `fastattn.integrations.keywords`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

import fastattn
from fastattn.call.problem import Array
from fastattn.call.shapes import shapes_of_results
from fastattn.cpu.host.threads import threads_of_call
from fastattn.integrations import keywords
from fastattn.integrations.tensors import array_of

__all__ = [
    "additive_attention",
    "additive_attention_backward",
    "attention",
    "attention_backward",
    "differentiate",
    "differentiate_additive",
    "refuse",
    "save",
    "save_additive",
    "save_nothing",
]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed

REQUIRED = 5  #: of `OPTIONS`, those after the mask: no call leaves them out

CAUSAL: dict[str, bool | str] = {"no": False, "top-left": True, "bottom-right": "bottom-right"}

OPTIONS = "Tensor? attn_mask, float dropout_p, str causal, float? scale, bool enable_gqa, Tensor? seed"
FURTHER = f"Tensor? keep=None, {keywords.SCHEMA}"
GRADIENTS = "Tensor? grad_out, Tensor? grad_lse"
OPERANDS = "Tensor query, Tensor key, Tensor value"
SCHEMAS = {
    "attention": f"({OPERANDS}, {OPTIONS}, {FURTHER}) -> (Tensor out, Tensor lse)",
    "attention_backward": f"({GRADIENTS}, {OPERANDS}, Tensor out, Tensor lse, {OPTIONS}, bool grad_mask, {FURTHER})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_mask)",
    "additive_attention": f"({OPERANDS}, Tensor weight, Tensor? attn_mask, str causal, {FURTHER})"
    " -> (Tensor out, Tensor lse)",
    "additive_attention_backward": f"(Tensor grad_out, {OPERANDS}, Tensor weight, Tensor out, Tensor lse, "
    f"Tensor? attn_mask, str causal, {FURTHER})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight)",
}


# -- kernels -----------------------------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float | None,
    enable_gqa: bool,
    seed: Tensor | None,
    keep: Tensor | None = None,
    *further: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention and its log-sum-exp."""
    arrays = (*_arrays(query=query, key=key, value=value), _masks(attn_mask, keep))
    options: dict[str, Any] = {"return_lse": True, **keywords.restored(further)}
    if seed is not None:
        options["rng"] = int(seed)
    in_one_piece = query.numel() > 0 and query.is_contiguous()  # which takes less time to find out
    if not in_one_piece and _length_first(query):
        shapes = arrays[0].shape, arrays[1].shape, arrays[2].shape
        *batch, heads, length, features = shapes_of_results(*shapes, None, None, enable_gqa)[0]
        options["out"] = np.empty((*batch, length, heads, features), arrays[0].dtype).swapaxes(-3, -2)
    out, lse = _call(fastattn.attention, *arrays, dropout_p, CAUSAL[causal], scale, enable_gqa, **options)
    return torch.from_numpy(out), torch.from_numpy(lse)


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float | None,
    enable_gqa: bool,
    seed: Tensor | None,
    grad_mask: bool,
    keep: Tensor | None = None,
    *further: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key, value and, if asked for, attn_mask, else an empty tensor for it."""
    upstream = torch.zeros_like(out) if grad_out is None else grad_out
    gradients = _call(
        fastattn.attention_backward,
        *_arrays(grad_out=upstream, query=query, key=key, value=value, out=out, lse=lse),
        _masks(attn_mask, keep),
        dropout_p,
        CAUSAL[causal],
        scale,
        enable_gqa,
        rng=None if seed is None else int(seed),
        grad_lse=None if grad_lse is None else array_of("grad_lse", grad_lse),
        grad_mask=grad_mask,
        **keywords.restored(further),
    )
    grad_query, grad_key, grad_value, *rest = map(_tensor, gradients)
    return grad_query, grad_key, grad_value, rest[0] if grad_mask else query.new_empty(0)


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    causal: str,
    keep: Tensor | None = None,
    *further: Any,
) -> tuple[Tensor, Tensor]:
    """Compute additive attention and its log-sum-exp."""
    arrays = (*_arrays(query=query, key=key, value=value, weight=weight), _masks(attn_mask, keep))
    options = keywords.restored(further)
    out, lse = _call(fastattn.additive_attention, *arrays, CAUSAL[causal], return_lse=True, **options)
    return torch.from_numpy(out), torch.from_numpy(lse)


def additive_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    causal: str,
    keep: Tensor | None = None,
    *further: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key, value and weight."""
    arrays = _arrays(grad_out=grad_out, query=query, key=key, value=value, weight=weight, out=out, lse=lse)
    masks, options = _masks(attn_mask, keep), keywords.restored(further)
    gradients = _call(fastattn.additive_attention_backward, *arrays, masks, CAUSAL[causal], **options)
    grad_query, grad_key, grad_value, grad_weight = map(_tensor, gradients)
    return grad_query, grad_key, grad_value, grad_weight


def _arrays(**tensors: Tensor) -> list[Array]:
    return [array_of(name, tensor) for name, tensor in tensors.items()]


def _masks(attn_mask: Tensor | None, keep: Tensor | None) -> Any:
    """Return a mask as fastattn takes it: a pair, where there are two."""
    mask = None if attn_mask is None else array_of("attn_mask", attn_mask)
    return mask if keep is None else (mask, array_of("attn_mask", keep))


def _tensor(gradient: Array) -> Tensor:
    """Return a gradient as a tensor, in one piece, as the fake kernels promise."""
    return torch.from_numpy(np.ascontiguousarray(gradient).reshape(gradient.shape))


def _call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call with no more threads than PyTorch may use; in a worker of a DataLoader that is one."""
    threads = torch.get_num_threads()
    if threads >= threads_of_call():
        return function(*args, **options)
    with fastattn.num_threads(threads):
        return function(*args, **options)


def _length_first(query: Tensor) -> bool:
    """Whether query lies as (..., L, H, D), seen as (..., H, L, D): a projection, whose heads were split.

    The result then lies likewise, so that merging the heads again needs no copy.
    """
    return bool(query.dim() > 2 and query.size(-3) > 1 and query.size(-2) > 1 and query.stride(-3) < query.stride(-2))


# -- fake kernels ------------------------------------------------------------------------------------------------------


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    shape = _rows(query, key, value)
    features = value.size(-1)
    if _length_first(query):
        *batch, heads, length = shape
        out = query.new_empty((*batch, length, heads, features)).transpose(-3, -2)
    else:
        out = query.new_empty((*shape, features))
    return out, query.new_empty(shape)


def _rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    """Return the shape of the log-sum-exp, (..., Hq, Lq)."""
    batch = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in (query, key, value)))
    heads, *others = (tensor.size(-3) if tensor.dim() > 2 else 1 for tensor in (query, key, value))
    if heads == 1:
        heads = others[1] if others[0] == 1 else others[0]
    head_axis = (heads,) if max(tensor.dim() for tensor in (query, key, value)) > 2 else ()
    return (*batch, *head_axis, query.size(-2))


def _attention_backward_fake(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    grad_mask = options[REQUIRED] and attn_mask is not None
    found = (query, key, value, attn_mask) if grad_mask else (query, key, value)
    gradients = tuple(tensor.new_empty(tensor.shape) for tensor in found if tensor is not None)
    return gradients if grad_mask else (*gradients, query.new_empty(0))


def _additive_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    shape = _rows(query, key, value)
    return query.new_empty((*shape, value.size(-1))), query.new_empty(shape)


def _additive_attention_backward_fake(grad_out: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors[:4])


# -- derivatives -------------------------------------------------------------------------------------------------------


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep for the backward pass what it needs."""
    _save(ctx, inputs, output, operands=3)


def differentiate(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *, compute: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of all arguments of ``fastattn::attention``, by its operator or another way."""
    if grad_out is None and grad_lse is None:
        return _of_inputs(ctx)
    tensors, (attn_mask, *options) = _saved(ctx, operands=3)
    grad_mask = ctx.needs_input_grad[3]
    compute = compute or torch.ops.fastattn.attention_backward.default
    *gradients, of_mask = compute(
        grad_out, grad_lse, *tensors, attn_mask, *options[:REQUIRED], grad_mask, *options[REQUIRED:]
    )
    return _of_inputs(ctx, *gradients, of_mask if grad_mask else None)


def save_additive(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep for the backward pass what it needs."""
    _save(ctx, inputs, output, operands=4)
    ctx.mark_non_differentiable(output[1])


def differentiate_additive(
    ctx: Any, grad_out: Tensor | None, grad_lse: None, *, compute: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of all arguments of ``fastattn::additive_attention``, by its operator or another way."""
    if grad_out is None:
        return _of_inputs(ctx)
    tensors, options = _saved(ctx, operands=4)
    compute = compute or torch.ops.fastattn.additive_attention_backward.default
    return _of_inputs(ctx, *compute(grad_out, *tensors, *options))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor], operands: int) -> None:
    """Keep an operator's operands and results, and what else it was given, tensors as such."""
    options = inputs[operands:]
    tensors = (option if isinstance(option, torch.Tensor) else None for option in options)
    ctx.save_for_backward(*inputs[:operands], *output, *tensors)
    ctx.numbers = tuple(None if isinstance(option, torch.Tensor) else option for option in options)
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _saved(ctx: Any, operands: int) -> tuple[list[Tensor], list[Any]]:
    """Return the operands and results that `_save` kept, and the other arguments."""
    saved = ctx.saved_tensors
    tensors, options = saved[: operands + 2], saved[operands + 2 :]
    return tensors, [number if tensor is None else tensor for tensor, number in zip(options, ctx.numbers, strict=True)]


def _of_inputs(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of an operator's first arguments, and None for all others."""
    return (*gradients, *[None] * (ctx.inputs - len(gradients)))


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep nothing: there is no derivative of a derivative here."""


def refuse(ctx: Any, *gradients: Tensor | None) -> None:
    """Refuse to differentiate a derivative.

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError("fastattn: attention has a first derivative only; expected no backward pass through one")


# -- vmap --------------------------------------------------------------------------------------------------------------


def _one_by_one(name: str, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Call an operator on each sample alone: which weights it drops depends on the sample's seed and nothing else."""
    operator = getattr(torch.ops.fastattn, name).default
    size = info.batch_size

    def sample(arg: Any, axis: int | None, i: int) -> Any:
        if axis is None:
            return arg
        # of no samples the results have a shape nevertheless, which one of zeros tells
        return arg.select(axis, i) if size else arg.new_zeros((*arg.shape[:axis], *arg.shape[axis + 1 :]))

    samples = [
        operator(*(sample(arg, axis, i) for arg, axis in zip(args, in_dims, strict=True))) for i in range(max(1, size))
    ]
    results = tuple(torch.stack(parts)[:size] for parts in zip(*samples, strict=True))
    return results, (0,) * len(results)


# -- registration ------------------------------------------------------------------------------------------------------


def _register() -> None:
    kernels = {
        "attention": (attention, _attention_fake),
        "attention_backward": (attention_backward, _attention_backward_fake),
        "additive_attention": (additive_attention, _additive_attention_fake),
        "additive_attention_backward": (additive_attention_backward, _additive_attention_backward_fake),
    }
    for name, (kernel, fake) in kernels.items():
        torch.library.define(f"fastattn::{name}", SCHEMAS[name])
        torch.library.impl(f"fastattn::{name}", "CPU", kernel)
        torch.library.register_fake(f"fastattn::{name}", fake)
        torch.library.register_vmap(f"fastattn::{name}", partial(_one_by_one, name))
        if name.endswith("_backward"):
            torch.library.register_autograd(f"fastattn::{name}", refuse, setup_context=save_nothing)
    torch.library.register_autograd("fastattn::attention", differentiate, setup_context=save)
    torch.library.register_autograd("fastattn::additive_attention", differentiate_additive, setup_context=save_additive)


_register()
