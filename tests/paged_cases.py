"""Keys and values in pages for tests, and the same ones in arrays as `attention` takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

#: More numbers of pages, behind those that a row needs, than any row could have.
BEHIND = 2


@dataclass(frozen=True)
class Cache:
    """Pages, their table and lengths, and the keys and values in them, padded with NaN: (B, Hk, Lk, features)."""

    key_pages: Any
    value_pages: Any
    page_table: Any
    key_lengths: Any
    key: Any
    value: Any

    @property
    def args(self) -> tuple[Any, Any, Any, Any]:
        """What `attention_paged` takes behind the query."""
        return self.key_pages, self.value_pages, self.page_table, self.key_lengths

    def row(self, number: int) -> tuple[Any, Any]:
        """Return the keys and values of a row alone."""
        length = self.key_lengths[number]
        return self.key[number, :, :length], self.value[number, :, :length]


def paged(
    key: Any, value: Any, lengths: Any, page: int, rng: np.random.Generator, how: str = "shuffled", fill: Any = np.nan
) -> Cache:
    """Return keys and values, (B, Hk, Lk, features), in pages of so many keys; where no key is, there is `fill`.

    `how` pages lie: "contiguous", "shuffled", or "heads first", shuffled as well.
    """
    lengths = np.array(lengths, np.int64).reshape(len(key))
    needed = -(-lengths // page)
    count = int(needed.sum()) + 2
    order = np.arange(count) if how == "contiguous" else rng.permutation(count)
    table = np.full((len(key), max(needed, default=0) + BEHIND), -1, np.int32)
    pages = []
    for array in (key, value):
        shape = (count, array.shape[1], page, array.shape[3])
        filled = np.full(shape, fill, array.dtype).swapaxes(1, 2)
        pages.append(filled if how == "heads first" else np.ascontiguousarray(filled))
    at = 0
    for row, length in enumerate(lengths):
        table[row, : needed[row]] = order[at : at + needed[row]]
        at += needed[row]
        for j in range(length):
            for array, own in zip(pages, (key, value), strict=True):
                array[table[row, j // page], j % page] = own[row, :, j]
    return Cache(*pages, table, lengths, key, value)


def cache(
    lengths: Any,
    page: int,
    heads: int = 2,
    dtype: Any = np.float32,
    features: tuple[int, int] = (16, 8),
    how: str = "shuffled",
) -> Cache:
    """Return random keys and values in pages."""
    rng = np.random.default_rng(page)
    shape = (len(lengths), heads, max(lengths, default=0))
    arrays = [rng.standard_normal((*shape, size)).astype(dtype) for size in features]
    for array in arrays:
        for row, length in zip(array, lengths, strict=True):
            row[:, length:] = np.nan
    return paged(*arrays, lengths, page, rng, how)


def queries(*shape: int, dtype: Any = np.float32) -> Any:
    """Return random queries."""
    return np.random.default_rng(shape[0]).standard_normal(shape).astype(dtype)
