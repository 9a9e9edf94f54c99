"""A cache as tensors, for files and for pickle, and back. Rows that share pages share them there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fastattn.call.problem import Array
from fastattn.kv_cache.files import Tensor
from fastattn.kv_cache.formats import BLOCK, Format, joined, parts
from fastattn.kv_cache.pages import PAGE, Page
from fastattn.kv_cache.sequences import Sequences

__all__ = ["restored", "stored"]

NO_PAGE = -1
FLOAT16, INT8, WORD = np.dtype(np.float16), np.dtype(np.int8), np.dtype(np.int64)


def stored(sequences: Sequences) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a cache, and the arguments of one like it."""
    layout = sequences.layout
    numbers: dict[Page, int] = {}
    used: dict[Page, int] = {}
    table = np.full((len(sequences.rows), max(map(len, sequences.rows), default=0)), NO_PAGE, np.int64)
    for row, (pages, length) in enumerate(zip(sequences.rows, sequences.lengths, strict=True)):
        for number, page in enumerate(pages):
            if page is not None:
                table[row, number] = numbers.setdefault(page, len(numbers))
                used[page] = max(used.get(page, 0), min(PAGE, length - number * PAGE))
    tensors = {
        **_tensors("key", layout.key_format, layout.kv_heads, layout.head_dim, used, lambda page: page.keys),
        **_tensors("value", layout.value_format, layout.kv_heads, layout.value_dim, used, lambda page: page.values),
        "page_table": _of_array(table),
        "lengths": _of_array(np.array(sequences.lengths, np.int64)),
    }
    said = {
        "kv_heads": layout.kv_heads,
        "head_dim": layout.head_dim,
        "value_dim": layout.value_dim,
        "dtype": [layout.key_format.name, layout.value_format.name],
    }
    return tensors, said


def _of_array(array: Array) -> Tensor:
    return Tensor(array.dtype, array.shape, array)


def _tensors(
    name: str, kept: Format, heads: int, features: int, used: Mapping[Page, int], rows_of: Callable[[Page], Array]
) -> dict[str, Tensor]:
    """Return the tensors of the keys or the values of some pages, of which so many rows are used; 0 behind them."""

    def contents(part: Callable[[Array], Array]) -> Iterator[Array]:
        for page, count in used.items():
            rows = rows_of(page).copy()
            rows.view(np.uint8)[:, count:] = 0
            yield part(rows)

    shape = (len(used), heads, PAGE)
    if kept.name != "int8":
        return {name + "s": Tensor(kept.dtype, (*shape, features), contents(lambda rows: rows))}
    scales = contents(lambda rows: parts(rows, features)[0])
    numbers = contents(lambda rows: parts(rows, features)[1])
    return {
        name + "s": Tensor(INT8, (*shape, features), numbers),
        name + "_scales": Tensor(FLOAT16, (*shape, -(-features // BLOCK)), scales),
    }


def restored(sequences: Sequences, tensors: Mapping[str, Array]) -> None:
    """Fill the rows of an empty cache.

    Raises
    ------
    ValueError, KeyError
        If the tensors are not those of a cache like it.
    """
    layout, count = sequences.layout, len(sequences.rows)
    table = _found("page_table", tensors, WORD, count, None)
    lengths = _found("lengths", tensors, WORD, count).tolist()
    keys = _rows("key", layout.key_format, layout.kv_heads, layout.head_dim, tensors)
    values = _rows("value", layout.value_format, layout.kv_heads, layout.value_dim, tensors)
    _check(table, lengths, len(keys))
    sequences.memory.reserve(len(keys))
    pages = [sequences.memory.take() for _ in range(len(keys))]
    for page, of_keys, of_values in zip(pages, keys, values, strict=True):
        page.keys[...], page.values[...], page.rows = of_keys, of_values, 0
    rows = [[pages[number] if number != NO_PAGE else None for number in row[: _pages(length)]]
            for row, length in zip(table.tolist(), lengths, strict=True)]  # fmt: skip
    sequences.fill(rows, lengths)


def _pages(length: int) -> int:
    return -(-length // PAGE)


def _found(name: str, tensors: Mapping[str, Array], dtype: np.dtype[Any], *shape: int | None) -> Array:
    """Return a tensor, which has to have this dtype and this shape; None is any size."""
    array = tensors[name]
    sizes = (own if size is None else size for size, own in zip(shape, array.shape, strict=False))
    if array.dtype != dtype or array.ndim != len(shape) or array.shape != tuple(sizes):
        raise ValueError(f"{name} of {array.dtype}, shape {array.shape}; expected {dtype}, shape {shape}")
    return array


def _rows(name: str, kept: Format, heads: int, features: int, tensors: Mapping[str, Array]) -> Array:
    """Return what the pages have of keys or values."""
    shape = None, heads, PAGE
    if kept.name != "int8":
        return _found(name + "s", tensors, kept.dtype, *shape, features)
    scales = _found(name + "_scales", tensors, FLOAT16, *shape, -(-features // BLOCK))
    numbers = _found(name + "s", tensors, INT8, len(scales), heads, PAGE, features)
    return joined(scales, numbers)


def _check(table: Array, lengths: list[int], pages: int) -> None:
    """Refuse a table whose rows have not the pages of so many keys, but for some in front."""
    for row, length in zip(table, lengths, strict=True):
        own = row[: _pages(length)]
        there = own != NO_PAGE
        if length < 0 or len(own) != _pages(length) or (own >= pages).any() or (own < NO_PAGE).any():
            raise ValueError(f"a row of {length} tokens has pages {own.tolist()}, of {pages}")
        if (np.diff(there.astype(np.int8)) < 0).any() or (length % PAGE and not there[-1]):
            raise ValueError("a row lacks a page behind others")
