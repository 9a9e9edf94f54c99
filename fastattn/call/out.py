"""Where a result is written: `out=`, which may overlap the arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.advice import is_masked, said
from fastattn.call.problem import Array, Problem
from fastattn.machine.objects import address_of


def check_out(out: object, problem: Problem) -> Array | None:
    """Return `out` if the result can be written there; it may overlap the inputs, and may have any strides.

    Raises
    ------
    TypeError
        If it is not an ndarray, or neither of the result's dtype nor of that which is computed in.
    ValueError
        If it is not of the result's shape, is read-only, or has elements that share memory with each other.
    """
    if out is None:
        return None
    if not isinstance(out, np.ndarray) or is_masked(out):
        raise TypeError(f"out: {said(out)}; expected None or a numpy.ndarray")
    if out.dtype not in (problem.storage, problem.real):
        sums = "" if problem.real == problem.storage else f", or {problem.real}, that of its sums"
        raise TypeError(f"out: dtype {out.dtype}; expected {problem.storage}, the dtype of the result{sums}")
    if not out.flags.writeable:
        raise ValueError("out: the array is read-only; expected a writeable one")
    check_shape_of_out(out, problem)
    return out


def check_shape_of_out(out: Array, problem: Problem) -> None:
    """Check that `out`, or an array with its shape and strides, has a place for each element of the result.

    Raises
    ------
    ValueError
        If it has another shape, or elements that share memory with each other.
    """
    if out.shape != problem.out_shape:
        raise ValueError(f"out: shape {out.shape}; expected {problem.out_shape}, the shape of the result")
    if not out.flags.c_contiguous and _overlaps_itself(out):
        raise ValueError(
            f"out: shape {out.shape} with strides {out.strides} has elements that share memory; expected an array "
            "with a place of its own for each element"
        )


def _overlaps_itself(array: Array) -> bool:
    """Say whether two different elements share memory.

    If two do, consider the first axis on which they differ. Moved together, which leaves their distance as it is, one
    of them lies at 0 on that axis and the axes before it, the other further on: so it is enough to compare, axis by
    axis, the first slice with the others.
    """
    if array.size == 0:
        return False
    while array.ndim:
        if np.shares_memory(array[:1], array[1:]):
            return True
        array = array[0, ...]
    return False


def target_for(out: NDArray[Any] | None, problem: Problem, arrays: tuple[NDArray[Any] | None, ...]) -> NDArray[Any]:
    """Where to compute the result: in `out`, unless it is None or the arguments are still read there."""
    if out is None or must_be_apart(out, arrays):
        return np.empty(problem.out_shape, problem.storage)
    return out


def delivered(results: Any, target: NDArray[Any], out: NDArray[Any] | None) -> Any:
    """Return results of which the first is `target`, with `out`, if there is one, in its place."""
    if out is None or target is out:
        return results
    np.copyto(out, target)
    return (out, *results[1:]) if isinstance(results, tuple) else out


def must_be_apart(out: NDArray[Any], arrays: tuple[NDArray[Any] | None, ...]) -> bool:
    """Whether the result cannot be written to `out` while the arguments are still read.

    It can if out shares no memory with them, or is the query itself: a block of queries is read before its rows are
    written.
    """
    query, *others = arrays
    assert query is not None
    if any(array is not None and np.may_share_memory(out, array) for array in others):
        return True
    same = address_of(out) == address_of(query) and out.shape == query.shape and out.strides == query.strides
    return not same and np.may_share_memory(out, query)
