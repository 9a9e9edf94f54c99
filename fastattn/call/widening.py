"""Scales that float32 does not hold: such a call is computed in float64, and its results are rounded.

A kernel multiplies queries by the scale, as a number of their dtype. That of float32 has room for scales of any use.
But 1e39 is infinite there, and 1e-60 is 0, where queries of 1e-19 and keys of 1e38 make scores of usual size of them.
In float64 there is room for all finite scales, and for the products of all but the very largest with numbers of
float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.call.problem import FLOAT32, FLOAT64, Problem
from fastattn.call.rounding import saturated

__all__ = ["exceeds_float32", "in_float64", "narrowed", "scale_in_float64"]

Array = NDArray[Any]

#: Magnitudes of a scale that float32 holds with all their digits, and that leave room for queries of up to 1e28.
LEAST, MOST = 2.0**-125, 2.0**32

#: Softcaps from here on to 1 / SOFT are numbers that float32 can divide by, and whose quotients it holds.
SOFT = 2.0**-60

#: From here on every score, or gradient, that is not 0 is beyond float32; what it is made of is still within float64.
BEYOND_ALL = 2.0**700


def exceeds_float32(problem: Problem) -> bool:
    """Whether a call in float32 has a scale, or a softcap, that it cannot be computed with."""
    scale, softcap = abs(problem.scores.scale), problem.scores.softcap
    if problem.real != np.float32:
        return False
    return (scale != 0 and not LEAST <= scale <= MOST) or (softcap is not None and not SOFT <= 1 / softcap <= 1 / SOFT)


def in_float64(*operands: ArrayLike, mask: Any) -> tuple[Any, ...]:
    """Return the arrays of a call in float64; its mask as float32 has it, with no finite number beyond its range."""
    if isinstance(mask, tuple):
        of_float32: Any = (_as_float32_has_it(mask[0]), mask[1])
    else:
        of_float32 = _as_float32_has_it(mask)
    return (*(np.asarray(array).astype(FLOAT64) for array in operands), of_float32)


def _as_float32_has_it(mask: ArrayLike | None) -> Array | None:
    if mask is None:
        return None
    array = np.asarray(mask)
    return array if array.dtype.kind == "b" else saturated(array, FLOAT32)


def scale_in_float64(problem: Problem) -> float:
    """Return the scale of a call in float64, in whose products with numbers of float32 nothing becomes infinite."""
    return min(max(problem.scores.scale, -BEYOND_ALL), BEYOND_ALL)


def narrowed(array: Array, within: bool = False) -> Array:
    """Return a result in float32; `within`: a finite one as a finite one, as log-sum-exps are."""
    with np.errstate(all="ignore"):
        return (saturated(array, FLOAT32) if within else array).astype(FLOAT32)
