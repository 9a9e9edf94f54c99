"""The arguments of a backward pass, and the shapes of what it returns.

A backward pass takes the arguments of its forward pass, which `fastattn.call` checks, and with them what came
out of it and the gradient that arrives there. What it computes has the axes of the operands: where an argument was
broadcast, or shared by a group of heads, its gradient is a sum, which `folded` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.call.advice import said
from fastattn.call.arrays import as_upstream, is_pair
from fastattn.call.halves import cast, is_floating, native
from fastattn.call.options import check_flag
from fastattn.call.problem import FLOAT64, Array, Captures, Mask, Problem, Shape
from fastattn.call.rounding import coarser, unsaturated
from fastattn.call.score_options import FurtherOptions
from fastattn.call.seeds import seed_from
from fastattn.call.shapes import masks_of, split_shape
from fastattn.functions.function import Function, described

__all__ = [
    "OF_HEADS",
    "Names",
    "Upstream",
    "arrived",
    "as_given",
    "bias_of",
    "captured_by_function",
    "captured_sources",
    "check_grads",
    "describe_upstream",
    "folded",
    "own_dtype",
    "seed_of_forward",
    "sources_of",
    "split_upstream",
    "summed_to",
    "wanted_gradients",
]

#: Of the arguments whose gradients are wanted, as a user gives them; None for the usual ones.
Names: TypeAlias = tuple[str, ...] | list[str] | None

SHARED = ("key", "value")  # what a group of query heads has in common
OPERANDS = ("query", "key", "value", "attn_mask")  # what has the axes of operands, or is broadcast to them
OF_HEADS = ("alibi_slopes", "sinks")  # what has a number for each query head


class Upstream(NamedTuple):
    """What arrives at a backward pass, in the dtype of the call and with the axes of the operands.

    Attributes
    ----------
    grad_out : ndarray, shape (*batch, Hk, G, Lq, Dv)
    out : ndarray, shape (*batch, Hk, G, Lq, Dv)
    lse : ndarray, shape (*batch, Hk, G, Lq)
    grad_lse : ndarray, shape (*batch, Hk, G, Lq), or None
    rounded : numpy.dtype
        What `lse` was rounded to, which may be less precise than the call.
    came_in : numpy.dtype
        The same of `grad_out`: all of its numbers are numbers of this dtype.
    """

    grad_out: Array
    out: Array
    lse: Array
    grad_lse: Array | None
    rounded: np.dtype[Any]
    came_in: np.dtype[Any] = FLOAT64


def describe_upstream(
    problem: Problem, grad_out: ArrayLike, out: ArrayLike, lse: ArrayLike, grad_lse: ArrayLike | None = None
) -> Upstream:
    """Return what arrives at a backward pass, checked.

    Raises
    ------
    TypeError, ValueError
        As `arrived`.
    """
    return split_upstream(problem, arrived(problem, grad_out, out, lse, grad_lse))


def split_upstream(problem: Problem, upstream: Upstream) -> Upstream:
    """Return what arrives, which has the axes of the results, with those of the operands."""
    rows = *problem.rows_shape, problem.queries
    grad_lse = upstream.grad_lse
    return upstream._replace(
        grad_out=upstream.grad_out.reshape(*rows, problem.value_dim),
        out=upstream.out.reshape(*rows, problem.value_dim),
        lse=upstream.lse.reshape(rows),
        grad_lse=None if grad_lse is None else grad_lse.reshape(rows),
    )


def arrived(
    problem: Problem, grad_out: ArrayLike, out: ArrayLike, lse: ArrayLike, grad_lse: ArrayLike | None = None
) -> Upstream:
    """Return what arrives at a backward pass, checked, with the axes of the results.

    Raises
    ------
    TypeError
        If one is no floating array, or an integer one.
    ValueError
        If one has another shape than the result, or the log-sum-exp, that it belongs to.
    """

    def result(name: str, given: ArrayLike) -> Array:
        return as_upstream(name, given, problem.real, problem.out_shape)

    def sums(name: str, given: ArrayLike) -> Array:
        return as_upstream(name, given, problem.real, problem.lse_shape, "the log-sum-exp")

    upstream = Upstream(
        result("grad_out", grad_out),
        result("out", out),
        sums("lse", lse),
        None if grad_lse is None else sums("grad_lse", grad_lse),
        coarser(lse, problem.real),
        coarser(grad_out, problem.real),
    )
    return upstream._replace(lse=unsaturated(upstream.lse, upstream.rounded))


def seed_of_forward(rng: object, problem: Problem) -> int:
    """Return the seed that the forward pass drew its dropout from.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.call.seeds.seed_from`, and for None where weights are dropped: which ones, cannot be known.
    """
    if rng is None and problem.dropout_p > 0:
        raise ValueError(
            f"rng: None with dropout_p={problem.dropout_p}; expected what the forward pass was given: an int, or a "
            "numpy.random.Generator in the state that it had then"
        )
    return seed_from(rng, draw=problem.dropout_p > 0)


def wants_mask(grad_mask: object, mask: Mask) -> bool:
    """Return whether the gradient of the mask is wanted, of (bias, keep) that of the bias.

    Raises
    ------
    TypeError
        If it is, of a boolean mask, or if `grad_mask` is no flag.
    ValueError
        If there is no mask.
    """
    if not check_flag("grad_mask", grad_mask):
        return False
    bias, keep = masks_of(mask)
    if bias is None and keep is None:
        raise ValueError("grad_mask: True without attn_mask; expected a floating mask to differentiate by")
    if bias is None:
        raise TypeError("grad_mask: True for an attn_mask of dtype bool; expected a floating mask")
    return True


def wanted_gradients(
    grads: object, sources: Mapping[str, Any], grad_mask: object = False, mask: Mask = None
) -> tuple[str, ...]:
    """Return the names of the gradients that are wanted, in the order in which they are returned.

    Parameters
    ----------
    grads, grad_mask
        As the user gave them.
    sources : mapping of str
        As `sources_of` returns them.
    mask
        What was made of attn_mask.

    Raises
    ------
    TypeError, ValueError
        As `check_grads`; where a mask is boolean; and where both arguments say what is wanted.
    """
    with_mask = wants_mask(grad_mask, mask)
    if grads is None:
        usual = tuple(name for name in ("query", "key", "value", "weight") if name in sources)
        return (*usual, "attn_mask") if with_mask else usual
    if with_mask:
        raise ValueError("grads: given together with grad_mask=True; expected 'attn_mask' among the names instead")
    names = check_grads(grads, sources)
    if "attn_mask" in names and masks_of(mask)[0] is None:
        raise TypeError("grads: 'attn_mask' for an attn_mask of dtype bool; expected a floating mask")
    return names


def check_grads(given: object, sources: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of gradients that a user asks for.

    Parameters
    ----------
    given : sequence of str
        Each is the name of an argument.
    sources : mapping of str
        What gradients may be of, by name; None for what the call has not got.

    Raises
    ------
    TypeError
        If they are no sequence of names.
    ValueError
        If a name is none of these, or stands there twice, or the call has no such argument.
    """
    expected = f"expected some of {', '.join(map(repr, sources))}, as a tuple"
    if not isinstance(given, (tuple, list)) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"grads: {said(given)}; {expected}")
    for name in given:
        if name not in sources:
            raise ValueError(f"grads: {name!r} is among them; {expected}")
        if sources[name] is None:
            raise ValueError(f"grads: {name!r}, but the call has none; expected names of what it was given")
        if given.count(name) > 1:
            raise ValueError(f"grads: {name!r} more than once; {expected}")
    return tuple(given)


def sources_of(
    query: Any, key: Any, value: Any, attn_mask: Any, options: FurtherOptions, weight: Any = None
) -> dict[str, Any]:
    """Return what gradients may be of, as it was given, by name; None for what a call has not got.

    There is a weight in additive attention alone.
    """
    own = {} if weight is None else {"weight": weight}
    of_heads = {"alibi_slopes": options.get("alibi_slopes"), "sinks": options.get("sinks")}
    return {"query": query, "key": key, "value": value, **own, "attn_mask": bias_of(attn_mask), **of_heads}


def captured_sources(problem: Problem, captured: Captures | None) -> dict[str, Any]:
    """Return the floating arrays that the function of scores captures, by name."""
    function = problem.scores.score_mod
    return {} if function is None or captured is None else _floating(function, captured.score)


def captured_by_function(score_mod: Any) -> dict[str, Any]:
    """Return the same, given the function as the user gave it, or None."""
    return {} if score_mod is None else _floating(*described("score_mod", score_mod))


def _floating(function: Function, values: tuple[Any, ...]) -> dict[str, Any]:
    named = zip(function.captured, values, strict=True)
    return {each.name: value for each, value in named if each.axes >= 0 and "float" in each.kind}


def bias_of(attn_mask: Any) -> Any:
    """Return what a gradient by `attn_mask` is of, as it was given."""
    return attn_mask[0] if attn_mask is not None and is_pair(attn_mask) else attn_mask


def own_dtype(gradient: NDArray[Any], argument: ArrayLike, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a gradient in the dtype of its argument, if that is floating, else in that of the call."""
    own = argument.dtype if isinstance(argument, np.ndarray) else np.asarray(argument).dtype
    return cast(gradient, native(own) if is_floating(own) else dtype)


def summed_to(gradient: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """Sum a gradient over the axes along which an array of `shape` was broadcast."""
    padded = (1,) * (gradient.ndim - len(shape)) + shape
    axes = tuple(i for i, (own, full) in enumerate(zip(padded, gradient.shape, strict=True)) if own == 1 != full)
    if axes:
        with np.errstate(all="ignore"):
            gradient = gradient.sum(axis=axes)
    return gradient.reshape(shape)


def folded(gradient: NDArray[Any], shape: Shape, problem: Problem, shared: bool = False) -> NDArray[Any]:
    """Sum the gradient of an operand over the axes along which an array of `shape` was broadcast.

    Parameters
    ----------
    gradient : ndarray
        With the axes of the operand; an axis along which it has been summed already may have length 1.
    shape : tuple of int
        Of the argument.
    problem : Problem
    shared : bool
        Whether a group of query heads has the argument in common: True for key and value.

    Returns
    -------
    ndarray, shape `shape`
    """
    return summed_to(gradient, split_shape(shape, problem, shared)).reshape(shape)


def as_given(
    problem: Problem, names: Sequence[str], gradients: Mapping[str, NDArray[Any] | None], sources: Mapping[str, Any]
) -> tuple[NDArray[Any], ...]:
    """Return the gradients with these names, each with the shape and the dtype of its argument.

    Parameters
    ----------
    problem : Problem
    names : sequence of str
    gradients : mapping of str to ndarray
        With the axes of the operands; of what has a number for each head, (*batch, Hk, G).
    sources : mapping of str
        The arguments, as they were given.
    """
    return tuple(_as_given(problem, name, gradients[name], sources[name]) for name in names)


def _as_given(problem: Problem, name: str, gradient: Any, source: ArrayLike) -> NDArray[Any]:
    shape = np.shape(source)
    if name in OF_HEADS:
        gradient = summed_to(gradient.reshape(*problem.batch, problem.heads), shape)
    elif name in OPERANDS:
        gradient = folded(gradient, shape, problem, name in SHARED)
    return own_dtype(gradient, source, problem.real)
