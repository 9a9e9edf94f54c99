"""The tables that tell kernels of a call where its operands are: what `fastattn.cuda.kernels.plan` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn.call.problem import Array, Problem
from fastattn.call.rounding import saturated
from fastattn.call.scores import HEAD
from fastattn.cuda.kernels.elements import LOG2_E
from fastattn.cuda.kernels.plan import (
    BOUND_FIRST,
    BOUND_KEYS,
    BOUND_LAST,
    BOUND_OFFSET,
    BOUNDS,
    OPERANDS,
    OUT,
    OWN,
    QUERIES,
    QUERY,
    SIZES,
    SLICES,
    VALUE_DIM,
)

#: Scales, by dtype, between which a score comes of a scaled query, in base 2 as well. Others but 0 are *extreme*: then
#: all arithmetic is in float64, whatever the storage, and nothing in base 2.
SCALES = {"float32": (1e-30, 1e30), "float64": (0.0, 1e300)}
#: The same of softcaps, which scores are divided by.
SOFTCAPS = {"float32": (1e-18, 1e18), "float64": (1e-300, 1e300)}


class Table(NamedTuple):
    """What is the same for all calls of the same shapes and strides, as arrays of int64.

    Attributes
    ----------
    offsets : shape (OPERANDS, slices)
        The first element of each slice, counted from the array's lowest address.
    steps : shape (OPERANDS, 2)
        From row to row and from column to column, in elements.
    sizes : shape (SIZES + BOUNDS · slices,)
        See `sizes_of`.
    """

    offsets: NDArray[np.int64]
    steps: NDArray[np.int64]
    sizes: NDArray[np.int64]


def sizes_of(problem: Problem, heads: Array | None = None) -> NDArray[np.int64]:
    """The sizes of a problem, and what its slices look at, in the order of `fastattn.cuda.kernels.plan`.

    CAUSAL_OFFSET is that of the problem; without a causal mask it is Lk, so that no key is beyond it. DROP_BELOW is 0
    without dropout.

    Parameters
    ----------
    problem : Problem
    heads : ndarray of `fastattn.call.scores.HEAD`, or None
        The operand of this name. Where the problem has it, and it is not given yet, the bounds are not to be looked at.
    """
    queries, keys, scores = problem.queries, problem.keys, problem.scores
    causal_offset = keys if scores.right is None else min(max(scores.offset + scores.right, -queries), keys)
    sizes = (queries, keys, problem.head_dim, problem.value_dim, problem.heads, slices_of(problem), causal_offset)
    bounds = bounds_of(problem, heads)
    return np.concatenate([np.array([*sizes, problem.drop_threshold, scores.first_batch], np.int64), bounds.ravel()])


def bounds_of(problem: Problem, heads: Array | None) -> NDArray[np.int64]:
    """The bounds of each slice; but for BOUND_OFFSET they are no more than numbers of queries and keys."""
    scores, queries, keys = problem.scores, problem.queries, problem.keys
    bounds = np.empty((slices_of(problem), BOUNDS), np.int64)
    head = scores.head(keys) if heads is None else heads
    at = head["offset"]
    bounds[:, BOUND_FIRST] = -queries if scores.left is None else np.clip(at - scores.left, -queries, keys)
    bounds[:, BOUND_LAST] = keys if scores.right is None else np.clip(at + scores.right, -queries, keys)
    bounds[:, BOUND_KEYS] = head["keys"]
    bounds[:, BOUND_OFFSET] = at
    return bounds


def own_of(problem: Problem, real: Any, base_2: bool, heads: Array | None = None) -> NDArray[Any]:
    """The table whose columns are `OWN`, in numbers of the type `real`, in whose range all is held.

    `base_2`: whether scores are in base 2. `heads` as in `sizes_of`.
    """
    scores = problem.scores
    head = scores.head(problem.keys) if heads is None else heads
    own = np.empty((slices_of(problem), len(OWN)), real)
    own[:, OWN.index("softcap")] = (scores.softcap or 0.0) * (LOG2_E if base_2 else 1.0)
    for name in HEAD.names or ():
        own[:, OWN.index(name)] = saturated(head[name].astype(np.float64), own.dtype)
    return own


def is_extreme(problem: Problem) -> bool:
    """Say whether the scale, or the softcap, is extreme."""
    (low, high), (least, most) = SCALES[problem.real.name], SOFTCAPS[problem.real.name]
    softcap = problem.scores.softcap
    if softcap is not None and not least <= softcap <= most:
        return True
    return problem.scores.scale != 0 and not low <= abs(problem.scores.scale) <= high


def for_portable_kernels(problem: Problem) -> str | None:
    """Say what there is to the scores of a call that only the portable kernels know of; None if nothing."""
    scores = problem.scores
    if scores.has_functions:
        return "a function of the user's"
    if scores.left is not None:
        return "a window to the left"
    if scores.own:
        return f"what heads have of their own: {', '.join(scores.own)}"
    if scores.softcap is not None:
        return "a softcap"
    return "a pair of masks" if scores.bias and scores.keep else None


def slices_of(problem: Problem) -> int:
    """How many slices there are."""
    return int(np.prod(problem.rows_shape, dtype=np.int64))


def make_table(problem: Problem, views: Sequence[tuple[int, NDArray[Any], int]]) -> Table:
    """Make the tables.

    Parameters
    ----------
    problem : Problem
    views : sequence of (int, ndarray, int)
        The row of the table; a view with the axes of an operand, (*batch, Hk, G, rows, columns), of which only the
        strides matter; and which element from the lowest address on is its first.
    """
    offsets = np.zeros((OPERANDS, slices_of(problem)), np.int64)
    steps = np.zeros((OPERANDS, 2), np.int64)
    for row, view, first in views:
        strides = tuple(stride // view.itemsize for stride in view.strides)
        offsets[row] = first + offsets_of(problem.rows_shape, strides[:-2])
        steps[row] = strides[-2:]
    return Table(offsets, steps, sizes_of(problem))


def copy_table(
    shape: tuple[int, ...], source: tuple[tuple[int, ...], int], target: tuple[tuple[int, ...], int]
) -> Table:
    """Make the tables for a copy from QUERY to OUT of arrays of one shape.

    Parameters
    ----------
    shape : tuple of int
        Of rank 2 or more.
    source, target : (tuple of int, int)
        Strides in elements, and which element from the lowest address on is the first.
    """
    *rows, queries, columns = shape
    offsets = np.zeros((OPERANDS, int(np.prod(rows, dtype=np.int64))), np.int64)
    steps = np.zeros((OPERANDS, 2), np.int64)
    for row, (strides, first) in ((QUERY, source), (OUT, target)):
        offsets[row] = first + offsets_of(tuple(rows), strides[:-2])
        steps[row] = strides[-2:]
    sizes = np.zeros(SIZES, np.int64)
    sizes[[QUERIES, VALUE_DIM, SLICES]] = queries, columns, offsets.shape[1]
    return Table(offsets, steps, sizes)


def offsets_of(rows: tuple[int, ...], strides: tuple[int, ...]) -> NDArray[np.int64]:
    """Where the slices of an array of these leading axes begin, counted from the first, in C order."""
    total = np.zeros(rows, np.int64)
    for axis, (count, stride) in enumerate(zip(rows, strides, strict=True)):
        total += stride * np.arange(count).reshape([-1 if i == axis else 1 for i in range(len(rows))])
    return total.ravel()
