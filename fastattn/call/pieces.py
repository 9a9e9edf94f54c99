"""Results over pieces of the keys: from what was given to arrays of one dtype, and what they come to together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.advice import said
from fastattn.call.arrays import as_common
from fastattn.call.halves import cast, common_dtype
from fastattn.call.problem import FLOAT32, FLOAT64, Array
from fastattn.call.rounding import saturated

__all__ = ["Merged", "as_pieces"]

BLOCK = 16384  # numbers that are added at once, which stay in a core's own cache


class Merged:
    """The result over the pieces so far, each counted with its share of the sum of weights: an online softmax.

    In float64, whatever the pieces are: there may be many.
    """

    def __init__(self) -> None:
        # m, l and the sums of values: l = Σ exp(lse - m), sums = Σ exp(lse - m) · out
        self.highest: Any = np.float64(-np.inf)
        self.total: Any = np.float64(0.0)
        self.sums: Any = np.float64(0.0)

    def add(self, out: Array, lse: Array) -> None:
        """Count one more piece; one without keys counts for nothing, whatever its result says."""
        if not self.sums.ndim:
            self.sums, self.total, self.highest = np.zeros(out.shape), np.zeros(lse.shape), np.full(lse.shape, -np.inf)
        if (lse == -np.inf).all():
            return
        with np.errstate(all="ignore"):
            highest = np.maximum(self.highest, lse.astype(FLOAT64))
            shift = np.where(highest == -np.inf, 0.0, highest)
            before, here = np.exp(self.highest - shift), np.exp(lse - shift)
            self.total = self.total * before + here
            features = out.shape[-1]
            flat = [array.reshape(-1) for array in (lse, before, here)]
            sums, results = (array.reshape(lse.size, features) for array in (self.sums, out))
            rows = max(1, BLOCK // max(1, features))
            for begin in range(0, lse.size, rows):
                some = slice(begin, begin + rows)
                _add(sums[some], results[some], *(array[some] for array in flat))
            self.highest = highest

    def finish(self, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Return the result and its log-sum-exp, in a dtype: 0 and -inf for a query that sees no key of any piece."""
        with np.errstate(all="ignore"):
            out = np.where(self.total[..., None] == 0, 0.0, self.sums / self.total[..., None])
            shift = np.where(self.highest == -np.inf, 0.0, self.highest)
            return out.astype(dtype), saturated(shift + np.log(self.total), dtype).astype(dtype)


def _add(sums: Array, out: Array, lse: Array, before: Array, here: Array) -> None:
    """Add rows of a piece to sums of values, in place."""
    sums *= before[:, None]
    own = here[:, None] * out
    own[lse == -np.inf] = 0.0  # whatever it holds
    sums += own


def as_pieces(outs: Iterable[ArrayLike], lses: Iterable[ArrayLike]) -> list[tuple[Array, Array]]:
    """Return each result and its log-sum-exp, all of the dtype that they promote to, or that is accumulated in.

    Parameters
    ----------
    outs : iterable of array_like, shape (..., Dv)
        At least one.
    lses : iterable of array_like, shape (...)
        As many.

    Raises
    ------
    TypeError
        If one of the two is no iterable, or an element of it no array of a dtype that has a meaning here.
    ValueError
        If there is none, or not as many of both, or the shapes are not alike. The message names the element.
    """
    results, sums = _listed("outs", outs), _listed("lses", lses)
    if not results:
        raise ValueError("outs: nothing in it; expected at least one result")
    if len(sums) != len(results):
        raise ValueError(f"lses: {len(sums)} in it; expected {len(results)}, one for each of outs")
    named = {f"outs[{i}]": each for i, each in enumerate(results)} | {f"lses[{i}]": each for i, each in enumerate(sums)}
    arrays = as_common(named)
    shape = arrays[0].shape
    if not shape:
        raise ValueError("outs[0]: shape (); expected (..., Lq, Dv)")
    for name, array in zip(named, arrays, strict=True):
        expected, of = (shape, "outs[0]") if name.startswith("outs") else (shape[:-1], "outs[0] less its last axis")
        if array.shape != expected:
            raise ValueError(f"{name}: shape {array.shape}; expected {expected}, the shape of {of}")
    dtype = common_dtype(arrays[0], FLOAT32)
    arrays = [cast(array, dtype) for array in arrays]
    return list(zip(arrays[: len(results)], arrays[len(results) :], strict=True))


def _listed(name: str, given: object) -> list[ArrayLike]:
    try:
        return list(given)  # type: ignore[call-overload, no-any-return]
    except TypeError:
        raise TypeError(f"{name}: {said(given)}; expected an iterable of array_like") from None
