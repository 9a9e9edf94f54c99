"""float16 and bfloat16: what NumPy has of them, and what it has not.

bfloat16 is the upper half of a float32. NumPy has no such dtype; the package ml_dtypes adds one, which is recognised
here without being imported, and `BITS` stands for it where nobody has imported it. Conversions are of the bits, so that
both are alike: rounded once, to the nearest and to even ones, from whatever dtype; NaN stays NaN, and nothing warns.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastattn.call.broadcasting import once

__all__ = ["BITS", "cast", "common_dtype", "finfo", "is_bfloat16", "is_floating", "name_of", "native", "real_of"]

Array: TypeAlias = NDArray[Any]

#: The bits of bfloat16, in words that NumPy knows.
BITS = np.dtype([("bfloat16", np.uint16)], align=True)

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
PIECE = 1 << 15  # numbers that are rounded together


class Limits(NamedTuple):
    """What there is to know of bfloat16, by the names of `numpy.finfo`."""

    eps: float = 2.0**-7
    max: float = (2.0 - 2.0**-7) * 2.0**127
    tiny: float = 2.0**-126
    smallest_subnormal: float = 2.0**-133

    @property
    def min(self) -> float:
        """The lowest number."""
        return -self.max


def name_of(dtype: np.dtype[Any]) -> str:
    """``dtype.name`` of a plain dtype. NumPy imports a module for it each time, and not when Python is about to end."""
    return "bfloat16" if dtype == BITS else dtype.type.__name__.rstrip("_")  # it was "bool_" before NumPy 2


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is bfloat16, ml_dtypes' or `BITS`."""
    return dtype.kind == "V" and dtype.itemsize == 2 and name_of(dtype) == "bfloat16"


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether this is a real floating dtype, bfloat16 among them."""
    return issubclass(dtype.type, np.floating) or is_bfloat16(dtype)


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return a dtype in this machine's byte order."""
    return dtype if dtype == BITS else dtype.newbyteorder("=")


def real_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return what numbers of a floating dtype are computed with: of half precision, float32."""
    return FLOAT32 if dtype.itemsize == 2 else dtype


def finfo(dtype: np.dtype[Any]) -> Any:
    """Return ``numpy.finfo`` of a dtype, which knows no bfloat16."""
    return Limits() if is_bfloat16(dtype) else np.finfo(dtype)


def common_dtype(*given: Array | np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that arrays and dtypes promote to: that of `numpy.result_type`.

    To integers bfloat16 is what float16 is; together with float16 it is float32.
    """
    kinds = [each.dtype if isinstance(each, np.ndarray) else each for each in given]
    narrow = [kind for kind in kinds if is_bfloat16(kind)]
    if not narrow:
        return np.result_type(*given)
    others = any(kind.kind == "f" for kind in kinds)
    stand_in = FLOAT32 if others else FLOAT16
    found = np.result_type(*(stand_in if is_bfloat16(kind) else each for kind, each in zip(kinds, given, strict=True)))
    return native(narrow[0]) if found == FLOAT16 else found


def cast(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return an array in another floating dtype, rounded once: itself if it is in that already.

    What is broadcast stays so, and is converted once.
    """
    if array.dtype == dtype:
        return array
    core = once(array)
    with np.errstate(all="ignore"):
        if is_bfloat16(array.dtype):
            core = _widened(core)
        found = _rounded(core).view(dtype) if is_bfloat16(dtype) else core.astype(dtype, copy=False)
    return np.broadcast_to(found, array.shape) if found.shape != array.shape else found


def _widened(array: Array) -> Array:
    """Return bfloat16 in float32."""
    bits = array.view(np.uint16)
    if not array.dtype.isnative:
        bits = bits.byteswap()
    words = np.asarray(bits.astype(np.uint32))
    words <<= 16
    return words.view(np.float32)


def _rounded(array: Array) -> Array:
    """Return the bits of the nearest numbers of bfloat16, of two that are as near the even ones.

    In pieces, so that what comes in between stays in the caches.
    """
    if array.size <= PIECE or not array.flags.c_contiguous:
        return _rounded_piece(array)
    found, flat = np.empty(array.size, np.uint16), array.reshape(-1)
    for first in range(0, array.size, PIECE):
        found[first : first + PIECE] = _rounded_piece(flat[first : first + PIECE])
    return found.reshape(array.shape)


def _rounded_piece(array: Array) -> Array:
    numbers = array.astype(np.float32)
    words = numbers.view(np.uint32)
    nan = np.isnan(numbers)
    if array.dtype.itemsize > numbers.itemsize:
        # to the odd one of the two next to it, which no second rounding takes for one half way
        back = numbers.astype(array.dtype)
        words -= np.abs(back) > np.abs(array)
        words |= (back != array) & ~nan
    nearest = np.asarray(words >> 16)
    nearest &= 1
    nearest += 0x7FFF
    nearest += words
    if nan.any():
        np.copyto(nearest, words | 0x400000, where=nan)
    nearest >>= 16
    return nearest.astype(np.uint16)
