"""Calls that no kernel computes as they are: they are computed in a wider type, and their results are rounded.

In float64, where float32 does not hold the scale. A kernel multiplies queries by the scale, as a number of their dtype.
That of float32 has room for scales of any use. But 1e39 is infinite there, and 1e-60 is 0, where queries of 1e-19 and
keys of 1e38 make scores of usual size of them. In float64 there is room for all finite scales, and for the products of
all but the very largest with numbers of float32.

In float32, where arrays are of half precision, and the kernels of the work do not read that as it lies (`READ_HALVES`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.call.halves import cast
from fastattn.call.problem import FLOAT32, FLOAT64, Problem
from fastattn.call.rounding import saturated

__all__ = ["READ_HALVES", "exceeds_float32", "narrowed", "reads_halves", "scale_in_float64", "widened", "wider_type"]

Array = NDArray[Any]

#: The works whose kernels read float16 and bfloat16 as they lie. Of the others a call is one in float32.
READ_HALVES = frozenset({"forward", "weights", "summary", "backward"})

#: Magnitudes of a scale that float32 holds with all their digits, and that leave room for queries of up to 1e28.
LEAST, MOST = 2.0**-125, 2.0**32

#: Softcaps from here on to 1 / SOFT are numbers that float32 can divide by, and whose quotients it holds.
SOFT = 2.0**-60

#: From here on every score, or gradient, that is not 0 is beyond float32; what it is made of is still within float64.
BEYOND_ALL = 2.0**700


def wider_type(problem: Problem, *works: str) -> np.dtype[Any] | None:
    """Return what a call is computed in whose kernels are of these works; None if it is computed as it is."""
    if exceeds_float32(problem):
        return FLOAT64
    return None if reads_halves(problem, *works) else problem.real


def exceeds_float32(problem: Problem) -> bool:
    """Whether a call in float32 has a scale, or a softcap, that it cannot be computed with."""
    scale, softcap = abs(problem.scores.scale), problem.scores.softcap
    if problem.real != np.float32:
        return False
    return (scale != 0 and not LEAST <= scale <= MOST) or (softcap is not None and not SOFT <= 1 / softcap <= 1 / SOFT)


def reads_halves(problem: Problem, *works: str) -> bool:
    """Whether kernels of these works read the arrays of a call as they lie."""
    return problem.storage == problem.real or READ_HALVES.issuperset(works)


def widened(*operands: ArrayLike, mask: Any, to: np.dtype[Any]) -> tuple[Any, ...]:
    """Return the arrays of a call in a wider type, and its mask; what is given twice is one array.

    In float64 the mask is as float32 has it, with no finite number beyond its range.
    """
    made = {id(given): cast(np.asarray(given), to) for given in operands}
    arrays = tuple(made[id(given)] for given in operands)
    if to != FLOAT64:
        return (*arrays, mask)
    return (*arrays, (_held(mask[0]), mask[1]) if isinstance(mask, tuple) else _held(mask))


def _held(mask: ArrayLike | None) -> Array | None:
    if mask is None:
        return None
    array = np.asarray(mask)
    return array if array.dtype.kind == "b" else saturated(array, FLOAT32)


def scale_in_float64(problem: Problem) -> float:
    """Return the scale of a call in float64, in whose products with numbers of float32 nothing becomes infinite."""
    return min(max(problem.scores.scale, -BEYOND_ALL), BEYOND_ALL)


def narrowed(array: Array, to: np.dtype[Any], within: bool = False) -> Array:
    """Return a result in the dtype that it has; `within`: a finite one as a finite one, as log-sum-exps are."""
    return cast(saturated(array, to) if within else array, to)
