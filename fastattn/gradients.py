"""The arguments of a backward pass, and the shapes of what it returns.

A backward pass takes the arguments of its forward pass, which `fastattn.problem` checks, and with them what came out of
it and the gradient that arrives there. What it computes has the axes of the operands: where an argument was broadcast,
or shared by a group of heads, its gradient is a sum, which `folded` takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.problem import Array, Problem, Shape, as_upstream, check_flag, seed_from, split_shape

__all__ = ["Upstream", "as_given", "describe_upstream", "folded", "gradient_dtype", "seed_of_forward", "wants_mask"]

Named: TypeAlias = "dict[str, ArrayLike | None]"


class Upstream(NamedTuple):
    """What arrives at a backward pass, in the dtype of the call and with the axes of the operands.

    Attributes
    ----------
    grad_out : ndarray, shape (*batch, Hk, G, Lq, Dv)
    out : ndarray, shape (*batch, Hk, G, Lq, Dv)
    lse : ndarray, shape (*batch, Hk, G, Lq)
    grad_lse : ndarray, shape (*batch, Hk, G, Lq), or None
    """

    grad_out: Array
    out: Array
    lse: Array
    grad_lse: Array | None


def describe_upstream(
    problem: Problem, grad_out: ArrayLike, out: ArrayLike, lse: ArrayLike, grad_lse: ArrayLike | None = None
) -> Upstream:
    """Return what arrives at a backward pass, checked.

    Raises
    ------
    TypeError
        If one is no floating array, or an integer one.
    ValueError
        If one has another shape than the result, or the log-sum-exp, that it belongs to.
    """
    rows = problem.rows_shape

    def view(name: str, given: ArrayLike, of: str, shape: Shape) -> Array:
        array = as_upstream(name, given, problem.dtype)
        if array.shape != shape:
            raise ValueError(f"{name}: shape {array.shape}; expected {shape}, the shape of {of}")
        return array.reshape(*rows, *shape[-2:] if of == "the result" else shape[-1:])

    result, sums = "the result", "the log-sum-exp"
    return Upstream(
        view("grad_out", grad_out, result, problem.out_shape),
        view("out", out, result, problem.out_shape),
        view("lse", lse, sums, problem.lse_shape),
        None if grad_lse is None else view("grad_lse", grad_lse, sums, problem.lse_shape),
    )


def seed_of_forward(rng: object, problem: Problem) -> int:
    """Return the seed that the forward pass drew its dropout from.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.problem.seed_from`, and for None where weights are dropped: which ones, cannot be known.
    """
    if rng is None and problem.dropout_p > 0:
        raise ValueError(
            f"rng: None with dropout_p={problem.dropout_p}; expected what the forward pass was given: an int, or a "
            "numpy.random.Generator in the state that it had then"
        )
    return seed_from(rng, draw=problem.dropout_p > 0)


def wants_mask(grad_mask: object, mask: Array | None) -> bool:
    """Return whether the gradient of the mask is wanted.

    Raises
    ------
    TypeError
        If it is, of a boolean mask, or if `grad_mask` is no flag.
    ValueError
        If there is no mask.
    """
    if not check_flag("grad_mask", grad_mask):
        return False
    if mask is None:
        raise ValueError("grad_mask: True without attn_mask; expected a floating mask to differentiate by")
    if mask.dtype.kind == "b":
        raise TypeError("grad_mask: True for an attn_mask of dtype bool; expected a floating mask")
    return True


def gradient_dtype(given: ArrayLike, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of an argument's gradient: its own, if it is floating, else that of the call."""
    own = given.dtype if isinstance(given, np.ndarray) else np.asarray(given).dtype
    return own.newbyteorder("=") if own.kind == "f" else dtype


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
    split = split_shape(shape, problem, shared)
    split = (1,) * (gradient.ndim - len(split)) + split
    if split == gradient.shape:
        return gradient.reshape(shape)
    axes = tuple(i for i, (own, full) in enumerate(zip(split, gradient.shape, strict=True)) if own == 1 != full)
    return (gradient.sum(axis=axes, keepdims=True) if axes else gradient).reshape(shape)


def as_given(gradient: NDArray[Any], argument: ArrayLike, problem: Problem, shared: bool) -> NDArray[Any]:
    """Return a gradient with the shape and the dtype of the argument."""
    with np.errstate(all="ignore"):
        return folded(gradient, np.shape(argument), problem, shared).astype(
            gradient_dtype(argument, problem.dtype), copy=False
        )
