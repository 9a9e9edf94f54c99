"""What a log-sum-exp loses when it is rounded, and when that matters.

A weight is exp(score - lse). The lse is a number of the call's dtype, so that this is wrong by a factor of up to
1 ± eps · |lse|: nothing beside the other roundings where scores are of usual size, and everything where a mask has put
a row at -1e9, whose Lk equal weights then come out as 1 instead of 1 / Lk. So where |lse| is at least `PRECISE`, the
sum over the keys is formed once more, and not rounded: the weights are those of the softmax itself.

It need not be the sum that the lse speaks of. That may be one over more keys than these, merged from the pieces of a
long sequence, and then exceeds it: by more than roundings can explain, or else the difference was lost when the lse was
rounded, and cannot be known.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.call.halves import finfo, is_floating

__all__ = ["coarser", "is_of_these_keys", "is_precise", "limit_of", "saturated", "slack", "unsaturated"]

#: Below this magnitude a rounded lse costs half of the error that gradients are promised to have (docs/training.md),
#: or less: half a unit in the last place of the lse, and another where it is converted to base 2.
PRECISE = {"float32": 128.0, "float64": 2048.0}


def coarser(given: ArrayLike, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the less precise one of two dtypes: of what was given, if that has a floating one, and of a call."""
    own = given.dtype if isinstance(given, np.ndarray) else np.asarray(given).dtype
    return own if is_floating(own) and finfo(own).eps > finfo(dtype).eps else dtype


def limit_of(dtype: np.dtype[Any], rounded: np.dtype[Any]) -> float:
    """Return the magnitude below which a log-sum-exp is precise enough for a call, with what it was rounded to."""
    return PRECISE[dtype.type.__name__] if rounded == dtype else 0.0


def is_precise(lse: NDArray[Any], limit: float) -> NDArray[np.bool_]:
    """Say which log-sum-exps can be taken for what they say; infinities and NaN can."""
    precise: NDArray[np.bool_] = (np.abs(lse) < limit) | ~np.isfinite(lse)
    return precise


def slack(dtype: np.dtype[Any], features: int) -> float:
    """Return how far two log-sum-exps of the same keys may be apart, relative to their size.

    They are rounded, and so are the scores, sums of so many products, which grow as the lse does. Roundings of a sum
    add up like the steps of a random walk.
    """
    return 2.0 * float(finfo(dtype).eps) * (1.0 + math.sqrt(features))


def is_of_these_keys(lse: Any, own: Any, slack: float) -> Any:
    """Say which of the given log-sum-exps are sums over no other keys than these, whose own sums are `own`."""
    return np.isfinite(lse) & (own - lse >= -slack * np.abs(lse))


def saturated(values: Any, dtype: np.dtype[Any]) -> Any:
    """Hold finite values within the range of `dtype`, so that none becomes infinite there; infinities stay."""
    limit = finfo(dtype).max
    if finfo(values.dtype).max <= limit:
        return values
    return np.where(np.isinf(values), values, np.clip(values, -limit, limit))


def unsaturated(lse: NDArray[Any], rounded: np.dtype[Any]) -> NDArray[Any]:
    """Return log-sum-exps with the lowest of their own dtype in place of the lowest of what they were `rounded` to.

    Having been saturated, that one may stand for any number below.
    """
    if rounded == lse.dtype:
        return lse
    return np.where(lse == -finfo(rounded).max, -np.finfo(lse.dtype).max, lse)
