"""Attention of queries that each look at a window of the keys: what lies outside is neither read nor computed.

Queries whose windows begin within `REACH` keys of each other are taken together, as a block: their windows lie in one
slab of keys, which is gathered, and holds few keys that a query of the block may not look at. Blocks are then the heads
of calls of `fastattn.attention`, chunk by chunk, in memory that depends neither on the lengths nor on the batch.

    keys     0 1 2 3 4 5 6 7 8 9 …
    query 4      ▪ ▪ ▪ ▪ ▪              p = 4, window = 2
    query 5        ▪ ▪ ▪ ▪ ▪
    query 6          ▪ ▪ ▪ ▪ ▪
    slab         └───────────┘          one gathered copy for the three
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fastattn.layers.masks import combine
from fastattn.problem import Array

__all__ = ["Windows", "attend_windows", "find_windows"]

REACH = 32  # the windows of a block begin within so many keys
SIZES = (1, 8, 16, 32)  # a block is padded to the next of these: few calls, and few queries that are computed twice
CHUNK_BYTES = 2 << 20  # gathered keys and values of one call

#: (query, key, value, mask, return_weights) -> (out, lse, weights or None)
Attend: TypeAlias = Callable[[Array, Array, Array, "Array | None", bool], "tuple[Array, Array, Array | None]"]


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


def find_windows(center: Array, window: int, lengths: Array) -> Windows:
    """Find the keys with \\|j - p\\| <= window within sentences of the given lengths.

    Parameters
    ----------
    center : ndarray of float64, shape (*batch, Lq)
        p; where it is NaN, the window is empty.
    window : int
    lengths : ndarray of int64, shape (*batch, 1)
    """
    with np.errstate(all="ignore"):
        limit = lengths.astype(np.float64)
        start = np.clip(np.nan_to_num(np.ceil(center - window)), 0, limit).astype(np.int64)
        stop = np.clip(np.nan_to_num(np.floor(center + window) + 1), 0, limit).astype(np.int64)
    return Windows(start, np.where(np.isnan(center), start, np.maximum(start, stop)), center)


def attend_windows(
    attend: Attend,
    project_key: Callable[[Array], Array],
    query: Array,
    key: Array,
    value: Array,
    windows: Windows,
    mask: Array | None,
    deviation: float | None,
    return_weights: bool,
) -> tuple[Array, Array | None]:
    """Attend to the keys in windows.

    Parameters
    ----------
    attend : callable
        Attention with a score of its own.
    project_key : callable
        What `attend` wants done to keys, (..., D'), before.
    query, key, value : ndarray, shapes (*batch, Lq, D), (*batch, Lk, D'), (*batch, Lk, Dv)
    windows : Windows
    mask : ndarray, shape (*batch, Lq, Lk), or None
        Boolean or floating.
    deviation : float or None
        Weights are multiplied by a Gaussian of the distance from p with this standard deviation.
    return_weights : bool

    Returns
    -------
    out : ndarray, shape (*batch, Lq, Dv)
    weights : ndarray, shape (*batch, Lq, Lk), or None
    """
    batch, queries, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
    out = np.zeros((*batch, queries, value.shape[-1]), query.dtype)
    weights = np.zeros((*batch, queries, keys), query.dtype) if return_weights else None
    key_bytes = (key.shape[-1] + (value.shape[-1] if value is not key else 0)) * query.dtype.itemsize
    for rows, first, width in _chunks(windows, queries, key_bytes):
        *element, i = np.unravel_index(rows, (*batch, queries))
        start, stop = windows.start[(*element, i)], windows.stop[(*element, i)]
        j = first[:, None] + np.arange(width)  # (blocks, width of the slabs)
        inside = (start[..., None] <= j[:, None, :]) & (j[:, None, :] < stop[..., None])  # (blocks, size, width)
        j = np.minimum(j, keys - 1)
        at_key = (*(index[:, :1] for index in element), j)
        at_score = (*(index[..., None] for index in (*element, i)), j[:, None, :])

        slab = key[at_key]
        # a key array that is its value array as well is gathered once
        values = slab if value is key else value[at_key]
        arguments = query[(*element, i)], project_key(slab), values
        own_mask = combine(inside, None if mask is None else mask[at_score])
        if deviation is None:
            result, _, shares = attend(*arguments, own_mask, return_weights)
        else:
            distance = j[:, None, :] - windows.center[(*element, i)][..., None]
            exponent = -(distance**2) / (2 * deviation**2)
            result, shares = _attend_scaled(attend, *arguments, own_mask, exponent, return_weights)
        out[(*element, i)] = result
        if weights is not None and shares is not None:
            place = tuple(np.broadcast_to(index, inside.shape)[inside] for index in at_score)
            weights[place] = shares[inside]
    return out, weights


def _attend_scaled(
    attend: Attend, query: Array, key: Array, value: Array, mask: Array, exponent: Array, return_weights: bool
) -> tuple[Array, Array | None]:
    """Attend with weights softmax(s) · exp(exponent), which are not normalised again.

    They are softmax(s + exponent) · Σ exp(s + exponent) / Σ exp(s): an attention with a bias, times a factor for each
    query, which two log-sum-exps give.
    """
    _, plain, _ = attend(query, key, value[..., :0], mask, False)
    with np.errstate(all="ignore"):
        bias = np.where(mask, exponent, -np.inf).astype(query.dtype) if mask.dtype.kind == "b" else mask + exponent
        out, scaled, weights = attend(query, key, value, bias, return_weights)
        factor = np.where(plain == -np.inf, 0, np.exp(scaled - plain))[..., None]
        return out * factor, None if weights is None else weights * factor


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
