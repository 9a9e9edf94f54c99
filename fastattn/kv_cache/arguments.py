"""What a user may ask of a cache, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastattn.call.advice import said, to_convert
from fastattn.call.arrays import as_array, as_integers
from fastattn.call.broadcasting import check_broadcasts
from fastattn.call.halves import is_floating
from fastattn.call.problem import Array
from fastattn.kv_cache.pages import PAGE, Layout
from fastattn.kv_cache.sequences import Sequences

__all__ = [
    "as_counts",
    "as_lengths",
    "as_rows",
    "as_tokens",
    "check_dropped",
    "check_query",
    "check_size",
    "check_truncated",
]


def check_size(name: str, given: object, least: int = 1, most: int | None = None) -> int:
    """Return a number of something.

    Raises
    ------
    TypeError
        If it is no integer.
    ValueError
        If it is less than the least there may be, or more than the most.
    """
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)):
        raise TypeError(f"{name}: {said(given)}; expected an int of at least {least}")
    if given < least:
        raise ValueError(f"{name}: {given}; expected an int of at least {least}")
    if most is not None and given > most:
        raise ValueError(f"{name}: {given}; expected an int of at most {most}")
    return int(given)


def as_tokens(name: str, given: object, layout: Layout, rows: int, features: int) -> Array:
    """Return keys or values that are to be appended, as an array.

    Raises
    ------
    TypeError
        If they are not of a floating dtype.
    ValueError
        If they are not of a shape (B, Hk, n, D).
    """
    array = given if type(given) is np.ndarray else as_array(name, given)
    dtype = array.dtype
    if not is_floating(dtype) or dtype.itemsize > 8:
        expected = "expected a floating dtype: float16, bfloat16, float32 or float64"
        raise TypeError(f"{name}: dtype {dtype}; {expected}{to_convert(name, dtype, given)}")
    shape = array.shape
    if len(shape) != 4 or shape[0] != rows or shape[1] != layout.kv_heads or shape[3] != features:
        raise ValueError(
            f"{name}: shape {shape}; expected ({rows}, {layout.kv_heads}, n, {features}), the cache's rows, heads and "
            f"features, and n tokens{_hint(shape, rows, layout.kv_heads, features)}"
        )
    return array


def _hint(shape: tuple[int, ...], rows: int, heads: int, features: int) -> str:
    if len(shape) == 4 and shape[0] == rows and shape[2] == heads and shape[3] == features:
        return ": .swapaxes(1, 2), if its axes are (batch, length, heads, features)"
    return ""


def as_lengths(given: Any, rows: int, most: Sequence[int], of: str, name: str = "lengths") -> list[int]:
    """Return a number for each row, from 0 to the most there may be; `of` says what these are.

    Raises
    ------
    TypeError
        If they are no integers.
    ValueError
        If they are not one for each row, or for all, or out of range.
    """
    lengths = as_integers(name, given, "one for each row")
    if lengths.shape not in ((), (rows,)):
        raise ValueError(f"{name}: shape {lengths.shape}; expected ({rows},), one for each row, or one for all")
    found: list[int] = np.broadcast_to(lengths, (rows,)).tolist()
    for row, (length, limit) in enumerate(zip(found, most, strict=True)):
        if not 0 <= length <= limit:
            raise ValueError(f"{name}: {length} of row {row}; expected 0 to {limit}, {of}")
    return found


def as_counts(given: Any, tokens: int, sequences: Sequences, capacity: int | None) -> list[int]:
    """Return how many tokens are appended to each row.

    Raises
    ------
    TypeError, ValueError
        As `as_lengths`, and if a row would become longer than the capacity.
    """
    rows = len(sequences.rows)
    counts = [tokens] * rows if given is None else as_lengths(given, rows, [tokens] * rows, "the length of key")
    if capacity is not None:
        for row, (length, count) in enumerate(zip(sequences.lengths, counts, strict=True)):
            if length + count > capacity:
                raise ValueError(
                    f"key: {count} tokens for row {row}, which has {length}; expected at most {capacity - length}, as "
                    f"the capacity is {capacity}"
                )
    return counts


def check_truncated(lengths: Sequence[int], sequences: Sequences, left: int | None) -> None:
    """Refuse lengths of rows that a window has passed.

    Raises
    ------
    ValueError
        If a query at the end of a row would look at keys that have been dropped.
    """
    for row, length in enumerate(lengths):
        first = sequences.first_key(row)
        if length and first and left is not None and length - left < first:
            raise ValueError(
                f"lengths: {length} of row {row}; expected 0, or {first + left} to {sequences.lengths[row]}: keys "
                f"before {first} have been dropped, and the window goes back by {left}"
            )


def as_rows(given: Any, rows: int) -> list[int]:
    """Return numbers of rows.

    Raises
    ------
    TypeError
        If they are no integers.
    ValueError
        If there is no such row.
    """
    numbers = as_array("rows", given)
    if numbers.size == 0 and not isinstance(given, np.ndarray):
        numbers = numbers.astype(np.int64)
    if numbers.dtype.kind not in "iu":
        advice = ": np.flatnonzero(rows)" if numbers.dtype.kind == "b" else ""
        raise TypeError(f"rows: dtype {numbers.dtype}; expected integers, the numbers of rows{advice}")
    if numbers.ndim != 1:
        raise ValueError(f"rows: shape {numbers.shape}; expected numbers of rows, on one axis")
    found: list[int] = numbers.tolist()
    for number in found:
        if not 0 <= number < rows:
            raise ValueError(f"rows: {number}; expected 0 to {rows - 1}, the numbers of the cache's rows")
    return found


def check_query(query: Array, layout: Layout, rows: int) -> None:
    """Refuse queries that do not go with a cache.

    Raises
    ------
    ValueError
        If they are not of a shape (B, Hq, Lq, D).
    """
    shape = query.shape
    if len(shape) != 4 or shape[0] != rows or shape[1] % layout.kv_heads or shape[3] != layout.head_dim:
        heads = f"a multiple of {layout.kv_heads} heads"
        raise ValueError(
            f"query: shape {shape}; expected ({rows}, Hq, Lq, {layout.head_dim}), the cache's rows and features, and "
            f"{heads}"
        )


def check_dropped(sequences: Sequences, offset: Any, left: int | None) -> None:
    """Refuse queries that would look at keys that have been dropped.

    `offset`: the position of the first of all rows, or of each; None is 0.

    Raises
    ------
    ValueError
        If one would, or there are not so many positions.
    TypeError
        If these are no integers.
    """
    if not any(sequences.dropped):
        return
    rows, given = len(sequences.rows), 0 if offset is None else offset
    if isinstance(given, int) and not isinstance(given, bool):  # of any size
        at = [given] * rows
    else:
        positions = as_integers("query_offset", given)
        check_broadcasts("query_offset", positions.shape, (rows,), "the batch")
        at = np.broadcast_to(positions, (rows,)).tolist()
    for row, (position, dropped) in enumerate(zip(at, sequences.dropped, strict=True)):
        first = dropped * PAGE
        if first and (left is None or position - left < first):
            raise ValueError(
                f"window: a query of row {row}, at position {position}, looks back "
                f"{'without limit' if left is None else f'by {left}'}; expected no key before {first}, which are those "
                "that the cache's window has dropped"
            )
