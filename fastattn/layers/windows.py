"""Attention of queries that each look at a window of their own: what lies outside is neither read nor computed.

Where windows move with the positions of queries, all at one pace, `fastattn.layers.alignment` has one call for them.

Queries whose windows begin within `REACH` keys of each other are taken together, as a block: their windows lie in one
slab of keys, which is gathered, and holds few keys that a query of the block may not look at. Blocks are then the rows
of a batch of `fastattn.attention`, chunk by chunk, in memory that depends neither on the lengths nor on the batch.

    keys     0 1 2 3 4 5 6 7 8 9 …
    query 4      ▪ ▪ ▪ ▪ ▪              p = 4, window = 2
    query 5        ▪ ▪ ▪ ▪ ▪
    query 6          ▪ ▪ ▪ ▪ ▪
    slab         └───────────┘          one gathered copy for the three

Backward, the same slabs are gathered, and what a call says of their keys is added where they came from, one block after
the other: sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastattn.call.problem import Array, Mask, Shape
from fastattn.call.shapes import masks_of

__all__ = ["Blocks", "Windows", "at_scores", "find_windows", "gathered", "scatter"]

REACH = 32  # the windows of a block begin within so many keys
SIZES = (1, 8, 16, 32)  # a block is padded to the next of these: few calls, and few queries that are computed twice
CHUNK_BYTES = 2 << 20  # gathered keys and values of one call


@dataclass(frozen=True)
class Windows:
    """The keys that each query may look at: those with ``start <= j < stop``.

    Attributes
    ----------
    start, stop : ndarray of int64, shape (*batch, Lq)
    center : ndarray of float64, shape (*batch, Lq)
        The position p of each query.
    """

    start: Array
    stop: Array
    center: Array


def find_windows(center: Array, window: int, begin: Array, end: Array) -> Windows:
    """Find the keys with \\|j - p\\| <= window among those that a query may look at at all.

    Parameters
    ----------
    center : ndarray of float64, shape (*batch, Lq)
        p; where it is NaN, the window is empty.
    window : int
    begin, end : ndarray of int64, shape (*batch, Lq)
        Keys with ``begin <= j < end`` a query may look at.
    """
    with np.errstate(all="ignore"):
        start = np.clip(np.nan_to_num(np.ceil(center - window)), begin, end).astype(np.int64)
        stop = np.clip(np.nan_to_num(np.floor(center + window) + 1), begin, end).astype(np.int64)
    return Windows(start, np.where(np.isnan(center), start, np.maximum(start, stop)), center)


@dataclass(frozen=True)
class Blocks:
    """The blocks of one call of attention, gathered.

    Attributes
    ----------
    rows : tuple of ndarray, shapes (blocks, size)
        Where the queries are: their indices in (*batch, Lq).
    own : ndarray of bool, shape (blocks, size)
        False for a query that only fills its block, and is the one before it.
    element : ndarray, shape (blocks,)
        The number of the sentence in the batch.
    query, key, value : ndarray, shapes (blocks, size, D), (blocks, width, D'), (blocks, width, Dv)
    bias, keep : ndarray, shape (blocks, size, width), or None
        The masks.
    inside : ndarray of bool, shape (blocks, size, width)
        Whether a key is in the window of a query.
    keys : ndarray, shape (blocks, width)
        Positions of the keys, those behind the last key included.
    """

    rows: tuple[Array, ...]
    own: Array
    element: Array
    query: Array
    key: Array
    value: Array
    bias: Array | None
    keep: Array | None
    inside: Array
    keys: Array

    @property
    def visible(self) -> Array:
        """Whether a query may look at a key, as far as a boolean mask and its window say."""
        return self.inside if self.keep is None else self.inside & self.keep

    @property
    def mask(self) -> Array:
        """All of it in one mask."""
        return self.visible if self.bias is None else _where(self.visible, self.bias)

    def biased(self, windows: Windows, deviation: float) -> Array:
        """Return the mask with the logarithm of the Gaussian of the distance from p."""
        exponent = -((self.keys[:, None, :] - windows.center[self.rows][..., None]) ** 2) / (2 * deviation**2)
        return _where(self.visible, exponent.astype(self.query.dtype) if self.bias is None else self.bias + exponent)


def _where(visible: Array, bias: Array) -> Array:
    return np.where(visible, bias, bias.dtype.type(-np.inf))


def gathered(query: Array, key: Array, value: Array, windows: Windows, mask: Mask) -> Iterator[Blocks]:
    """Yield blocks, a chunk at a time; the arrays are those of `Alignment.attend`."""
    (*batch, queries), keys = windows.start.shape, key.shape[-2]
    query, k = (np.broadcast_to(array, (*batch, *array.shape[-2:])) for array in (query, key))
    # a key array that is its value array as well is gathered once
    value = k if value is key else np.broadcast_to(value, (*batch, *value.shape[-2:]))
    key = k
    masks = [None if one is None else np.broadcast_to(one, (*batch, queries, keys)) for one in masks_of(mask)]
    key_bytes = (key.shape[-1] + (value.shape[-1] if value is not key else 0)) * query.dtype.itemsize
    for numbers, first, width in _chunks(windows, queries, key_bytes):
        rows = np.unravel_index(numbers, (*batch, queries))
        start, stop = windows.start[rows], windows.stop[rows]
        j = first[:, None] + np.arange(width)
        existing = np.minimum(j, keys - 1)
        at_key = (*(index[:, :1] for index in rows[:-1]), existing)
        bias, keep = (None if one is None else one[at_scores(rows, existing)] for one in masks)
        slab = key[at_key]
        yield Blocks(
            rows=rows,
            query=query[rows],
            own=np.diff(numbers, axis=1, prepend=-1) != 0,
            element=numbers[:, 0] // queries,
            key=slab,
            value=slab if value is key else value[at_key],
            bias=bias,
            keep=keep,
            inside=(start[..., None] <= j[:, None, :]) & (j[:, None, :] < stop[..., None]),
            keys=j,
        )


def at_scores(rows: tuple[Array, ...], keys: Array) -> tuple[Array, ...]:
    """Return the indices in (*batch, Lq, Lk) of the scores of queries, (blocks, size), and keys, (blocks, width)."""
    return (*(index[..., None] for index in rows), keys[:, None, :])


def scatter(gradient: Array, found: Array, blocks: Blocks, batch: Shape) -> None:
    """Add what slabs have found, (blocks, width, features), to the gradient of what they were gathered from."""
    *lead, keys, features = gradient.shape
    sentences = gradient.reshape(-1, keys, features)
    numbers = np.broadcast_to(np.arange(len(sentences)).reshape(lead), batch).ravel()[blocks.element]
    for sentence, first, slab in zip(numbers.tolist(), blocks.keys[:, 0].tolist(), found, strict=True):
        part = sentences[sentence, first : first + len(slab)]
        part += slab[: len(part)]


def _chunks(windows: Windows, queries: int, key_bytes: int) -> Iterator[tuple[Array, Array, int]]:
    """Yield the blocks of one call each: their queries, (blocks, size), the first key of each, and how many there are.

    A query is given by its number in (*batch, Lq). Which queries are a block depends on their own sentence alone.
    Those without a key are in none.
    """
    start, stop = windows.start.ravel(), windows.stop.ravel()
    rows = np.flatnonzero(start < stop)
    if not rows.size:
        return
    element, stretch = rows // queries, start[rows] // REACH
    order = np.lexsort((start[rows], stretch, element))
    rows, element, stretch = rows[order], element[order], stretch[order]
    # a block ends where the sentence or the stretch does, and when it has the largest size
    begins = np.flatnonzero(np.r_[True, (np.diff(element) != 0) | (np.diff(stretch) != 0)])
    lengths = np.diff(np.r_[begins, len(rows)])
    pieces = -(-lengths // SIZES[-1])
    nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    counts = np.minimum(np.repeat(lengths, pieces) - nth * SIZES[-1], SIZES[-1])
    begins = np.repeat(begins, pieces) + nth * SIZES[-1]
    first = np.minimum.reduceat(start[rows], begins)
    widths = np.maximum.reduceat(stop[rows], begins) - first

    for smaller, size in zip((0, *SIZES), SIZES, strict=False):
        of_size = np.flatnonzero((smaller < counts) & (counts <= size))
        if not of_size.size:
            continue
        width = int(widths[of_size].max())
        step = max(1, CHUNK_BYTES // (width * max(key_bytes, 1)))
        for at in range(0, len(of_size), step):
            blocks = of_size[at : at + step]
            # a block that is smaller repeats its last query
            members = np.minimum(np.arange(size), counts[blocks, None] - 1)
            yield rows[begins[blocks, None] + members], first[blocks], width
