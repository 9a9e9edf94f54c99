"""Memory of a cache: pages of 256 keys and values, which rows take, share and give back.

A page has the keys of all heads, then their values, (Hk, 256, row) each: those of one head lie together. Pages lie in
larger pieces of memory, so that growing copies nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastattn.call.problem import Array, Shape
from fastattn.kv_cache.formats import Format
from fastattn.machine.objects import address_of

__all__ = ["LARGEST", "PAGE", "Layout", "Page", "Pages"]

PAGE = 256  # keys: as many as the kernel of few queries takes at a time
ALIGNMENT = 64
LARGEST = 1 << 24  # heads, and features: the bytes of a page of so many are a number of 64 bits
GROWTH = 4  # of so many pages, one more comes with each piece of memory: there are few pieces, and little to spare


class Layout(NamedTuple):
    """What a page has in it.

    Attributes
    ----------
    kv_heads, head_dim, value_dim : int
    key_format, value_format : Format
    """

    kv_heads: int
    head_dim: int
    value_dim: int
    key_format: Format
    value_format: Format

    @property
    def key_shape(self) -> Shape:
        """(Hk, 256, elements of a row of keys)."""
        return self.kv_heads, PAGE, self.key_format.width(self.head_dim)

    @property
    def value_shape(self) -> Shape:
        """The same of values."""
        return self.kv_heads, PAGE, self.value_format.width(self.value_dim)

    @property
    def values_at(self) -> int:
        """Where the values begin, in bytes."""
        return _aligned(self.kv_heads * PAGE * self.key_format.row_bytes(self.head_dim))

    def views(self, address: int) -> tuple[Array, Array]:
        """Return the keys and values of a page there, (1, 256, Hk, D) and (1, 256, Hk, Dv), as kernels know them.

        The next page is said to be a byte further, so that the number of a page is how many bytes further it is.
        """
        keys = _at(address, self.key_format, self.kv_heads, self.head_dim)
        return keys, _at(address + self.values_at, self.value_format, self.kv_heads, self.value_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.values_at + _aligned(self.kv_heads * PAGE * self.value_format.row_bytes(self.value_dim))


class _Place:
    """What NumPy makes an array of that lies somewhere."""

    def __init__(self, **interface: Any) -> None:
        self.__array_interface__ = interface


def _at(address: int, kept: Format, heads: int, features: int) -> Array:
    row, itemsize = kept.row_bytes(features), kept.kind.itemsize
    strides = 1, row, PAGE * row, itemsize
    words = np.dtype(f"u{itemsize}").str
    place = _Place(data=(address, True), shape=(1, PAGE, heads, features), strides=strides, typestr=words, version=3)
    return np.asarray(place).view(kept.kind)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Piece:
    """A piece of memory that pages lie in: its size, how many pages that is, and how many of them are taken."""

    __slots__ = ("nbytes", "pages", "taken")

    def __init__(self, nbytes: int, pages: int) -> None:
        self.nbytes, self.pages, self.taken = nbytes, pages, 0


class Page:
    """A page: where it lies, views of its keys and values, and how many rows have it."""

    __slots__ = ("address", "keys", "piece", "rows", "values")

    def __init__(self, piece: Piece, memory: Array, layout: Layout) -> None:
        self.piece, self.address, self.rows = piece, address_of(memory), 0
        self.keys = _shaped(memory, 0, layout.key_format, layout.key_shape)
        self.values = _shaped(memory, layout.values_at, layout.value_format, layout.value_shape)


def _shaped(memory: Array, at: int, kept: Format, shape: Shape) -> Array:
    return memory[at : at + math.prod(shape) * kept.dtype.itemsize].view(kept.dtype).reshape(shape)


class Pages:
    """All pages of a cache."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.free: list[Page] = []
        self.count = 0
        self.nbytes = 0

    def reserve(self, count: int) -> None:
        """See to it that so many pages are free."""
        missing = count - len(self.free)
        if missing <= 0:
            return
        count, size = max(missing, self.count // GROWTH), self.layout.page_bytes
        memory = np.empty(count * size + ALIGNMENT, np.uint8)
        piece, first = Piece(memory.nbytes, count), -address_of(memory) % ALIGNMENT
        places = range(first + (count - 1) * size, first - 1, -size)  # they are taken from the end
        self.free += [Page(piece, memory[at : at + size], self.layout) for at in places]
        self.count += count
        self.nbytes += piece.nbytes

    def take(self) -> Page:
        """Return a free page, which one row has from now on."""
        self.reserve(1)
        page = self.free.pop()
        page.rows = 1
        page.piece.taken += 1
        return page

    def give_back(self, page: Page) -> None:
        """A row has a page no longer."""
        page.rows -= 1
        if page.rows == 0:
            page.piece.taken -= 1
            self.free.append(page)

    def own(self, page: Page) -> Page:
        """Return a page with the same in it that no other row has: the page itself, or a copy."""
        if page.rows == 1:
            return page
        copy = self.take()
        copy.keys[...], copy.values[...] = page.keys, page.values
        self.give_back(page)
        return copy

    def release(self) -> None:
        """Let go of memory of which no page is taken."""
        unused = {page.piece for page in self.free if not page.piece.taken}
        self.free = [page for page in self.free if page.piece.taken]
        self.count -= sum(piece.pages for piece in unused)
        self.nbytes -= sum(piece.nbytes for piece in unused)
