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

from fastattn.call.problem import FLOAT64, Problem
from fastattn.call.rounding import saturated

__all__ = ["exceeds_float32", "in_float64", "narrowed", "scale_in_float64"]

Array = NDArray[Any]

FLOAT32 = np.dtype(np.float32)

#: Magnitudes of a scale that float32 holds with all their digits, and that leave room for queries of up to 1e28.
LEAST, MOST = 2.0**-125, 2.0**32

#: From here on every score, or gradient, that is not 0 is beyond float32; what it is made of is still within float64.
BEYOND_ALL = 2.0**700


def exceeds_float32(problem: Problem) -> bool:
    """Whether a call in float32 has a scale that it cannot be computed with."""
    return problem.dtype == np.float32 and problem.scale != 0 and not LEAST <= abs(problem.scale) <= MOST


def in_float64(*operands: ArrayLike, mask: ArrayLike | None) -> tuple[Any, ...]:
    """Return the arrays of a call in float64; its mask as float32 has it, with no finite number beyond its range."""
    of_float32 = None if mask is None else np.asarray(mask)
    if of_float32 is not None and of_float32.dtype.kind != "b":
        of_float32 = saturated(of_float32, FLOAT32)
    return (*(np.asarray(array).astype(FLOAT64) for array in operands), of_float32)


def scale_in_float64(problem: Problem) -> float:
    """Return the scale of a call in float64, in whose products with numbers of float32 nothing becomes infinite."""
    return min(max(problem.scale, -BEYOND_ALL), BEYOND_ALL)


def narrowed(array: Array, within: bool = False) -> Array:
    """Return a result in float32; `within`: a finite one as a finite one, as log-sum-exps are."""
    with np.errstate(all="ignore"):
        return (saturated(array, FLOAT32) if within else array).astype(FLOAT32)
