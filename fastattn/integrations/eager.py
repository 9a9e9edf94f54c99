"""How a call gets to a kernel, in ascending order of what has to be told about it.

- Nothing needs to know: the kernel is called directly. PyTorch's dispatcher takes longer to call a Python function than
  a small call takes to compute.
- A derivative may be asked for: the call is an ``autograd.Function``, which ``torch.func`` understands, too. Inside, it
  is the kernel again, or the operator where a transform or a mode has to see it.
- The call is being compiled or traced: it is the operator, with the derivative that is registered for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.autograd import forward_ad

from fastattn.integrations import operators

__all__ = ["additive_attention", "attention"]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed

# These say whether a transform of torch.func, a mode (fake tensors, a counter of operations) or torch.jit's tracer is at
# work, and whether a tensor is one of the vmap inside torch.autograd.grad. They are PyTorch's own affair: where one is
# missing, no kernel is called directly.
_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_moded = getattr(torch._C, "_len_torch_dispatch_stack", lambda: True)
_traced = getattr(torch._C, "_get_tracing_state", lambda: True)
_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: True)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Call ``fastattn::attention``."""
    return _call(_Attention, args)


def additive_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Call ``fastattn::additive_attention``."""
    return _call(_AdditiveAttention, args)


def _call(function: Any, args: tuple[Any, ...]) -> Any:
    if torch.compiler.is_compiling() or _traced():
        return function.operator(*args)
    if _transforming() or forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _any_requires_grad(args)):
        return function.apply(*args)
    return function.forward(*args)


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.requires_grad:
            return True
    return False


def _either(kernel: Callable[..., Any], operator: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call the kernel on tensors that are just memory, the operator on all others."""
    if _transforming() or _moded() or _traced():
        return operator(*args)
    for arg in args:
        if isinstance(arg, torch.Tensor) and (type(arg) not in _PLAIN or _batched(arg)):
            return operator(*args)
    return kernel(*args)


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    operator = torch.ops.fastattn.attention.default
    generate_vmap_rule = True
    setup_context = staticmethod(operators.save)

    @staticmethod
    def forward(*args: Any) -> Any:
        return _either(operators.attention, _Attention.operator, args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return operators.differentiate(ctx, *gradients, compute=_AttentionBackward.run)


class _AdditiveAttention(torch.autograd.Function):  # type: ignore[misc]
    operator = torch.ops.fastattn.additive_attention.default
    generate_vmap_rule = True
    setup_context = staticmethod(operators.save_additive)

    @staticmethod
    def forward(*args: Any) -> Any:
        return _either(operators.additive_attention, _AdditiveAttention.operator, args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return operators.differentiate_additive(ctx, *gradients, compute=_AdditiveAttentionBackward.run)


class _Last(torch.autograd.Function):  # type: ignore[misc]
    """A derivative that has none itself, and says so where one is asked for."""

    generate_vmap_rule = True
    setup_context = staticmethod(operators.save_nothing)
    backward = staticmethod(operators.refuse)

    @classmethod
    def run(cls, *args: Any) -> Any:
        # autograd records the backward pass only where a second derivative may follow
        return cls.apply(*args) if torch.is_grad_enabled() else cls.forward(*args)


class _AttentionBackward(_Last):
    @staticmethod
    def forward(*args: Any) -> Any:
        return _either(operators.attention_backward, torch.ops.fastattn.attention_backward.default, args)


class _AdditiveAttentionBackward(_Last):
    @staticmethod
    def forward(*args: Any) -> Any:
        backward = torch.ops.fastattn.additive_attention_backward.default
        return _either(operators.additive_attention_backward, backward, args)
