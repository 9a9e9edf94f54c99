"""The rows of a cache: sequences of keys and values on pages, some of which several rows have.

A row has the pages of its keys in order, and None for those in front that a window has passed. A page that several rows
have is copied when one of them writes to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fastattn.call.pages import Pages as PagesOfCall
from fastattn.call.problem import Array
from fastattn.kv_cache.pages import PAGE, Layout, Page, Pages
from fastattn.machine.objects import address_of

__all__ = ["Sequences"]


class Sequences:
    """Sequences on pages.

    Attributes
    ----------
    layout : Layout
    lengths : list of int
        How many keys each row has had, those that have been dropped among them.
    dropped : list of int
        How many of its first pages have been.
    anchor : ndarray of uint8
        What `table` counts from.
    table : ndarray of int64, shape (B, at least as many as any row has pages)
        Where the pages of each row are, in bytes from the anchor. Those that have been dropped, and those behind the
        last, are where some other page of the row is, if it has any.
    """

    def __init__(self, layout: Layout, rows: int) -> None:
        self.layout = layout
        self.memory = Pages(layout)
        self.rows: list[list[Page | None]] = [[] for _ in range(rows)]
        self.lengths = [0] * rows
        self.dropped = [0] * rows
        self.anchor = np.zeros(64, np.uint8)
        self.table = np.zeros((rows, 1), np.int64)
        self.views = layout.views(address_of(self.anchor))

    @property
    def nbytes(self) -> int:
        """Bytes of the pages, taken and free, and of their table."""
        return self.memory.nbytes + self.table.nbytes

    @property
    def keys(self) -> int:
        """How many keys the longest row has had."""
        return max(self.lengths, default=0)

    def pages(self) -> PagesOfCall:
        """Return the pages for kernels."""
        return PagesOfCall(*self.views, self.table, np.array(self.lengths, np.int64))

    def append(self, keys: Array, values: Array, counts: Sequence[int], left: int | None) -> None:
        """Append the first so many of some keys and values to each row, of shape (B, Hk, n, features).

        `left`: how many keys before its position a query looks at, if it does not look at all. A query of what is
        appended still finds its keys; what is too far from these is dropped.
        """
        self._reserve(counts)
        for row, count in enumerate(counts):
            if count:
                before = self.lengths[row]
                self._write(row, keys[row], values[row], count)
                if left is not None and before - left >= PAGE:
                    self._drop(row, (before - left) // PAGE)

    def _reserve(self, counts: Sequence[int]) -> None:
        """See to it that there are pages for so many more keys, so that nothing is half done without them."""
        wanted, columns = 0, 0
        for pages, length, count in zip(self.rows, self.lengths, counts, strict=True):
            if count:
                columns = max(columns, -(-(length + count) // PAGE))
                wanted += -(-(length + count) // PAGE) - len(pages)
                if length % PAGE:
                    last = pages[-1]
                    assert last is not None
                    wanted += last.rows > 1
        if wanted:
            self.memory.reserve(wanted)
        if columns > self.table.shape[1]:
            room = max(columns, 2 * self.table.shape[1]) - self.table.shape[1]
            self.table = np.pad(self.table, ((0, 0), (0, room)), mode="edge")

    def _write(self, row: int, keys: Array, values: Array, count: int) -> None:
        layout, length, done = self.layout, self.lengths[row], 0
        while done < count:
            number, at = divmod(length + done, PAGE)
            page = self._writable(row, number)
            end = min(PAGE, at + count - done)
            stop = done + end - at
            layout.key_format.write(keys[:, done:stop], page.keys[:, at:end])
            layout.value_format.write(values[:, done:stop], page.values[:, at:end])
            done = stop
        self.lengths[row] = length + count

    def _writable(self, row: int, number: int) -> Page:
        """Return a page of a row, the last one or one behind it, that no other row has."""
        pages = self.rows[row]
        if number == len(pages):
            page = self.memory.take()
            pages.append(page)
        else:
            old = pages[number]
            assert old is not None
            page = self.memory.own(old)
            if page is old:
                return page
            pages[number] = page
        self.table[row, number:] = self._place(page)
        return page

    def _place(self, page: Page) -> int:
        return page.address - address_of(self.anchor)

    def _drop(self, row: int, count: int) -> None:
        """Drop the first so many pages of a row."""
        pages = self.rows[row]
        for number in range(self.dropped[row], count):
            self._give_back(pages[number])
            pages[number] = None
        self.dropped[row] = count
        self.table[row, :count] = self.table[row, count]

    def _give_back(self, page: Page | None) -> None:
        if page is not None:
            self.memory.give_back(page)

    def first_key(self, row: int) -> int:
        """Return the number of the first key that a row still has."""
        return self.dropped[row] * PAGE

    def truncate(self, lengths: Sequence[int]) -> None:
        """Leave so many keys of each row, no more than it has."""
        for row, length in enumerate(lengths):
            pages, count = self.rows[row], -(-length // PAGE)
            for page in pages[count:]:
                self._give_back(page)
            del pages[count:]
            self.lengths[row] = length
            self.dropped[row] = min(self.dropped[row], count)
            self._note(row)
        self.memory.release()

    def select(self, rows: Sequence[int]) -> None:
        """Have these rows, in this order, which may be some of them more than once."""
        before = self.rows
        self.rows = [list(before[row]) for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        self.dropped = [self.dropped[row] for row in rows]
        self.table = self.table[list(rows)]
        for page in _all_of(self.rows):
            page.rows += 1
        for page in _all_of(before):
            self.memory.give_back(page)
        self.memory.release()

    def fill(self, rows: list[list[Page | None]], lengths: list[int]) -> None:
        """Have these rows, of pages that have been taken and that no row has yet."""
        self.rows, self.lengths = rows, lengths
        self.dropped = [sum(page is None for page in pages) for pages in rows]
        for page in _all_of(rows):
            page.rows += 1
        self.table = np.zeros((len(rows), max(1, *map(len, rows))), np.int64)
        for row in range(len(rows)):
            self._note(row)

    def _note(self, row: int) -> None:
        """Write down where the pages of a row are."""
        there = [self._place(page) for page in self.rows[row] if page is not None] or [0]
        places = self.table[row]
        first = self.dropped[row]
        places[:first], places[first : first + len(there)], places[first + len(there) :] = there[0], there, there[-1]

    def gathered(self, key_dtype: np.dtype[Any], value_dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Return all keys and values in arrays, (B, Hk, L, D), with 0 for what is not there."""
        layout, length = self.layout, self.keys
        shape = (len(self.rows), layout.kv_heads, length)
        keys = np.zeros((*shape, layout.head_dim), key_dtype)
        values = np.zeros((*shape, layout.value_dim), value_dtype)
        for row, pages in enumerate(self.rows):
            for number, page in enumerate(pages):
                first = number * PAGE
                count = min(PAGE, self.lengths[row] - first)
                if page is not None:
                    of_keys, of_values = page.keys[:, :count], page.values[:, :count]
                    there = row, slice(None), slice(first, first + count)
                    keys[there] = layout.key_format.decode(of_keys, layout.head_dim, key_dtype)
                    values[there] = layout.value_format.decode(of_values, layout.value_dim, value_dtype)
        return keys, values


def _all_of(rows: Iterable[Iterable[Page | None]]) -> Iterable[Page]:
    return (page for pages in rows for page in pages if page is not None)
