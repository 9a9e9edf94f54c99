"""How a row of numbers lies in a cache: float32, bfloat16, float16, or int8 in blocks with a scale.

A row is the key, or the value, of one token and one head. In int8 it is, for each block of 32 numbers, one of float16,
the scale, and behind all scales a whole number from -127 to 127 for each number, which stands for itself times the
scale of its block. It is what llama.cpp calls q8_0, but for the scales, which stand in front together, and are rounded
up: so no number is farther from its own than half of a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from fastattn.call.advice import said
from fastattn.call.halves import BITS, cast, is_bfloat16, name_of
from fastattn.call.problem import FLOAT32, FLOAT64, Array
from fastattn.cpu.host.builtin import in_default_mode
from fastattn.cpu.host.convert import converter
from fastattn.machine.tile import BLOCK

__all__ = ["BLOCK", "FORMATS", "Format", "FormatLike", "format_of", "formats_of"]

STEPS = 127  # from 0 to the largest number of a block
FLOAT16 = np.dtype(np.float16)
BYTE = np.dtype(np.uint8)


class Format(NamedTuple):
    """A way to keep rows of numbers.

    Attributes
    ----------
    name : str
    dtype : numpy.dtype
        Of the elements of what rows are kept as: the numbers, or bytes.
    kind : numpy.dtype
        What kernels know such rows as.
    width : function
        From the numbers of a row to its elements.
    encode, decode : function
        From rows of numbers, shape (..., D), to what is kept of them, shape (..., width), and back: of an array and of
        these, the number of features and a dtype.
    """

    name: str
    dtype: np.dtype[Any]
    kind: np.dtype[Any]
    width: Callable[[int], int]
    encode: Callable[[Array], Array]
    decode: Callable[[Array, int, np.dtype[Any]], Array]

    def write(self, rows: Array, to: Array) -> None:
        """Write rows of numbers, (Hk, n, D), to where they are kept, (Hk, n, width)."""
        dtype = rows.dtype
        convert = converter(name_of(dtype), self.name) if dtype.isnative and rows.flags.aligned else None
        if convert is None:
            _write(self, rows, to)
        else:
            convert(rows, to)

    def row_bytes(self, features: int) -> int:
        """Bytes of a row."""
        return self.width(features) * self.dtype.itemsize


@in_default_mode
def _write(kept: Format, rows: Array, to: Array) -> None:
    to[...] = kept.encode(rows)


def blocks_of(features: int) -> int:
    """How many blocks a row of int8 has."""
    return -(-features // BLOCK)


def parts(rows: Array, features: int) -> tuple[Array, Array]:
    """Return views of the scales and the whole numbers of rows of int8."""
    start = blocks_of(features) * FLOAT16.itemsize
    return rows[..., :start].view(FLOAT16), rows[..., start : start + features].view(np.int8)


def joined(scales: Array, numbers: Array) -> Array:
    """Return rows of int8 of what `parts` returns."""
    features = numbers.shape[-1]
    rows = np.zeros((*numbers.shape[:-1], _int8_width(features)), BYTE)
    own_scales, own_numbers = parts(rows, features)
    own_scales[...], own_numbers[...] = scales, numbers
    return rows


def _int8_width(features: int) -> int:
    """Bytes of a row: scales are where float16 may lie."""
    width = blocks_of(features) * FLOAT16.itemsize + features
    return width + width % 2


def _to_int8(array: Array) -> Array:
    """Return rows of int8. Of a block with what is not finite in it all is NaN; what is beyond 127 · 65504 is that."""
    features = array.shape[-1]
    numbers = cast(array, FLOAT64 if array.dtype.itemsize == 8 else FLOAT32)
    blocks = np.zeros((*array.shape[:-1], blocks_of(features) * BLOCK), numbers.dtype)
    blocks[..., :features] = numbers
    blocks = blocks.reshape(*array.shape[:-1], blocks_of(features), BLOCK)
    with np.errstate(all="ignore"):
        largest = np.abs(blocks).max(axis=-1)
        scales = scale_of(largest)
        whole = np.rint(blocks / scales[..., None].astype(numbers.dtype))
        whole = np.where(np.isfinite(whole), np.clip(whole, -STEPS, STEPS), 0.0).astype(np.int8)
    return joined(scales, whole.reshape(*array.shape[:-1], blocks_of(features) * BLOCK)[..., :features])


def scale_of(largest: Array) -> Array:
    """Return the smallest numbers of float16 of which so many steps reach these, or the largest there is; NaN of NaN.

    The smallest above 0 is 2^-24.
    """
    scales = (largest / STEPS).astype(FLOAT16)
    short = scales.astype(largest.dtype) * STEPS < largest  # exact: 11 bits by 7
    scales.view(np.uint16)[...] += short
    scales = np.where(np.isposinf(scales), np.finfo(FLOAT16).max, scales)
    return np.where(np.isfinite(largest), scales, FLOAT16.type(np.nan))


def _from_int8(rows: Array, features: int, dtype: np.dtype[Any]) -> Array:
    scales, numbers = parts(rows, features)
    with np.errstate(all="ignore"):
        spread: Array = np.repeat(scales.astype(dtype), BLOCK, axis=-1)[..., :features]
        return np.multiply(spread, numbers, dtype=dtype)


def _floating(dtype: np.dtype[Any]) -> Format:
    def encode(array: Array) -> Array:
        return cast(array, dtype)

    def decode(rows: Array, features: int, to: np.dtype[Any]) -> Array:
        return rows.view(to) if is_bfloat16(dtype) and is_bfloat16(to) else cast(rows, to)

    return Format(name_of(dtype), dtype, dtype, lambda features: features, encode, decode)


#: What a user may say of one: its name, or a dtype.
FormatLike: TypeAlias = Literal["bfloat16", "float16", "float32", "int8"] | np.dtype[Any] | type[np.generic]

FORMATS = {
    each.name: each
    for each in (
        _floating(FLOAT32),
        _floating(BITS),
        _floating(FLOAT16),
        Format("int8", BYTE, np.dtype(np.int8), _int8_width, _to_int8, _from_int8),
    )
}


def formats_of(given: object) -> tuple[Format, Format]:
    """Return how keys and values are kept, of a cache's `dtype`: one for both, or a pair.

    Raises
    ------
    TypeError, ValueError
        If it is none of `FORMATS`.
    """
    pair = given if isinstance(given, (tuple, list)) else (given, given)
    if len(pair) != 2:
        raise ValueError(f"dtype: {said(given)}; expected one for keys and values, or a pair (keys, values)")
    return format_of(pair[0]), format_of(pair[1])


def format_of(given: Any) -> Format:
    """Return how numbers of a dtype are kept, or of its name.

    Raises
    ------
    TypeError, ValueError
        As `formats_of`.
    """
    expected = f"expected one of {', '.join(FORMATS)}, or a pair of them, for keys and for values"
    if isinstance(given, str):
        name = given
    else:
        try:
            if given is None:
                raise TypeError
            dtype = np.dtype(given)
        except TypeError:
            raise TypeError(f"dtype: {said(given)}; {expected}") from None
        name = "bfloat16" if is_bfloat16(dtype) else dtype.name
    if name not in FORMATS:
        raise ValueError(f"dtype: {given!r}; {expected}")
    return FORMATS[name]
