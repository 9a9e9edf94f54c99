"""How a call gets to a kernel, in ascending order of what has to be told about it.

- Nothing needs to know: the kernel is called directly. PyTorch's dispatcher takes longer to call a Python function than
  a small call takes to compute.
- A derivative may be asked for: the call is an ``autograd.Function``, which ``torch.func`` understands, too. Inside, it
  is the kernel again, or the operator where a transform or a mode has to see it.
- The call is being compiled or traced: it is the operator, with the derivative that is registered for it.

The operator is also what a subclass of ``torch.Tensor`` gets to see, which may do with it whatever it likes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any, TypeAlias

import torch
from torch.autograd import forward_ad

from fastattn.integrations.functions import Functions
from fastattn.integrations.operators import OPERATORS, Operator, refuse, save_nothing
from fastattn.integrations.tensors import PLAIN

__all__ = ["apart", "call"]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed

# These say whether a transform of torch.func, a mode (fake tensors, a counter of operations) or torch.jit's tracer is
# at work, and whether a tensor is one of the vmap inside torch.autograd.grad. They are PyTorch's own affair: where one
# is missing, no kernel is called directly.
_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_moded = getattr(torch._C, "_len_torch_dispatch_stack", lambda: True)
_traced = getattr(torch._C, "_get_tracing_state", lambda: True)
_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: True)


def call(name: str, *args: Any) -> Any:
    """Call the operator of that name, with all of its arguments; the result and its log-sum-exp."""
    if _compiled():
        if torch.compiler.is_compiling() and _has_functions(args):  # from a caller that PyTorch compiles no more
            return apart(call, name, *args)
        return _operate(name, args)
    compute, function, transformed = WAYS[name]
    if _transforming() or forward_ad._current_level >= 0:
        return transformed.apply(*args)
    return function.apply(*args) if _wants_gradient(args) else compute(*args)


@torch.compiler.disable(reason="fastattn compiles functions of scores itself")  # type: ignore[untyped-decorator]
def apart(function: Any, *args: Any, **options: Any) -> Any:
    """Call a function between the parts of a program that PyTorch compiles."""
    return function(*args, **options)


def _has_functions(args: tuple[Any, ...]) -> bool:
    for arg in args:
        if isinstance(arg, Functions):
            return True
    return False


def _compiled() -> bool:
    return torch.compiler.is_compiling() or _traced()


def _wants_gradient(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.requires_grad:
                return True
    return False


# -- kernel or operator ------------------------------------------------------------------------------------------------


def _kernel_or_operator(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls a kernel or, where something has to see the call, the operator of that name."""

    def compute(*args: Any) -> Any:
        return kernel(*args) if _plain(args) else _operate(name, args)

    return compute


def _operate(name: str, args: tuple[Any, ...]) -> Any:
    """Call an operator.

    Raises
    ------
    TypeError
        With the name of the argument, if a subclass of ``torch.Tensor`` does not let it be called.
    NotImplementedError
        If there are functions of the user's, which no operator takes.
    """
    operator = getattr(torch.ops.fastattn, name).default
    try:
        return operator(*args)
    except (TypeError, RuntimeError, AssertionError) as error:
        _blame(operator, args, error)
        raise


def _blame(operator: Any, args: tuple[Any, ...], error: Exception) -> None:
    """Say why an operator could not be called, if it is a subclass of ``torch.Tensor`` that did not let it, or if there
    are functions among the arguments.
    """
    if _has_functions(args):
        raise NotImplementedError(
            "score_mod, mask_mod, block_mask: given with tensors of a subclass, or under vmap, a tracer or a mode of "
            "PyTorch's, which see an operator, and no function; expected plain tensors in memory"
        ) from error
    if _moded():
        return  # what is raised under a mode may be meant for the mode
    for argument, given in zip(operator._schema.arguments, args, strict=False):
        if isinstance(given, torch.Tensor) and _overrides(type(given)):
            raise TypeError(
                f"{argument.name}: a {type(given).__name__}, which fastattn's operator cannot be called with; expected "
                f"a torch.Tensor: {error}"
            ) from error


def _overrides(kind: type) -> bool:
    """Whether a class of tensors has its own idea of what operations are."""
    own = takewhile(lambda base: base not in PLAIN, kind.__mro__)
    return any(name in vars(base) for base in own for name in ("__torch_function__", "__torch_dispatch__"))


def _plain(args: tuple[Any, ...]) -> bool:
    """Whether all tensors are just memory, and nothing but autograd has to see the call."""
    if _transforming() or _moded() or _traced():
        return False
    for arg in args:
        if isinstance(arg, torch.Tensor) and (type(arg) not in PLAIN or _batched(arg)):
            return False
    return True


# -- autograd ----------------------------------------------------------------------------------------------------------
# What torch.func needs, a setup_context apart from forward, makes PyTorch read forward's signature in every call, which
# takes longer than all the rest: hence two for each operator.


def _ways(operator: Operator) -> tuple[Callable[..., Any], Any, Any]:
    """Return what calls an operator's kernel, and two functions with its derivative: the second is for transforms."""
    compute = _kernel_or_operator(operator.name, operator.forward)
    derive = _kernel_or_operator(operator.derivative, operator.backward)

    class Last(torch.autograd.Function):  # type: ignore[misc]
        """The derivative where autograd records it, for a second one: which it refuses."""

        generate_vmap_rule = True
        forward = staticmethod(derive)
        setup_context = staticmethod(save_nothing)
        backward = staticmethod(refuse)

    def differentiate(ctx: Any, *gradients: Tensor | None) -> Any:
        return operator.differentiate(ctx, *gradients, compute=Last.apply if torch.is_grad_enabled() else derive)

    class Function(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = compute(*args)
            operator.save(ctx, args, output)
            return output

        backward = staticmethod(differentiate)

    class Transformed(torch.autograd.Function):  # type: ignore[misc]
        generate_vmap_rule = True
        forward = staticmethod(compute)
        setup_context = staticmethod(operator.save)
        backward = staticmethod(differentiate)

    return compute, Function, Transformed


WAYS = {name: _ways(operator) for name, operator in OPERATORS.items()}
