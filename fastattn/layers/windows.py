"""Attention of queries that each look at a window of the keys: what lies outside is neither read nor computed.

Queries whose windows begin within `REACH` keys of each other are taken together, as a block: their windows lie in one
slab of keys, which is gathered, and holds few keys that a query of the block may not look at. Blocks are then the heads
of calls of `fastattn.attention`, chunk by chunk, in memory that depends neither on the lengths nor on the batch.

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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.broadcasting import check_broadcasts
from fastattn.call.problem import FLOAT64, Array, Shape
from fastattn.layers.base import as_inputs
from fastattn.layers.masks import combine
from fastattn.layers.scores import Dot

__all__ = ["Windows", "as_positions", "attend_windows", "find_windows", "lost_queries", "windows_backward"]

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


def as_positions(given: ArrayLike | None, rows: Shape) -> Array:
    """Return the positions p of queries, which have the axes `rows`, as float64: 0, 1, 2 … unless they are given.

    Raises
    ------
    TypeError
        If the dtype has no meaning here.
    ValueError
        If they do not broadcast to `rows`, or are not finite.
    """
    if given is None:
        return np.arange(rows[-1], dtype=np.float64)
    (positions,) = as_inputs(FLOAT64, positions=given)
    check_broadcasts("positions", positions.shape, rows)
    if not np.isfinite(positions).all():
        raise ValueError("positions: some are NaN or infinite; expected finite numbers")
    return positions


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


@dataclass(frozen=True)
class _Blocks:
    """The blocks of one call of attention, gathered.

    Attributes
    ----------
    rows : tuple of ndarray, shapes (blocks, size)
        Where the queries are: their indices in (*batch, Lq).
    own : ndarray of bool, shape (blocks, size)
        False for a query that only fills its block, and is the one before it.
    element, first : ndarray, shape (blocks,)
        Where the slabs are: the number of the sentence in the batch, and the first key.
    query, key, value : ndarray, shapes (blocks, size, D), (blocks, width, D'), (blocks, width, Dv)
    mask : ndarray, shape (blocks, size, width)
    inside : ndarray of bool, shape (blocks, size, width)
        Whether a key is in the window of a query.
    keys : ndarray, shape (blocks, width)
        Positions of the keys, those behind the last key included.
    """

    rows: tuple[Array, ...]
    own: Array
    element: Array
    first: Array
    query: Array
    key: Array
    value: Array
    mask: Array
    inside: Array
    keys: Array

    def biased(self, windows: Windows, deviation: float, dtype: np.dtype[Any]) -> Array:
        """Return the mask with the logarithm of the Gaussian of the distance from p."""
        exponent = -((self.keys[:, None, :] - windows.center[self.rows][..., None]) ** 2) / (2 * deviation**2)
        if self.mask.dtype.kind == "b":
            biased: Array = np.where(self.mask, exponent, -np.inf).astype(dtype)
        else:
            biased = self.mask + exponent
        return biased


def _gathered(query: Array, key: Array, value: Array, windows: Windows, mask: Array | None) -> Iterator[_Blocks]:
    """Yield blocks, a chunk at a time; the arrays are those of `attend_windows`."""
    (*batch, queries), keys = windows.start.shape, key.shape[-2]
    query, k = (np.broadcast_to(array, (*batch, *array.shape[-2:])) for array in (query, key))
    # a key array that is its value array as well is gathered once
    value = k if value is key else np.broadcast_to(value, (*batch, *value.shape[-2:]))
    key, mask = k, None if mask is None else np.broadcast_to(mask, (*batch, queries, keys))
    key_bytes = (key.shape[-1] + (value.shape[-1] if value is not key else 0)) * query.dtype.itemsize
    for numbers, first, width in _chunks(windows, queries, key_bytes):
        *element, i = np.unravel_index(numbers, (*batch, queries))
        start, stop = windows.start[(*element, i)], windows.stop[(*element, i)]
        j = first[:, None] + np.arange(width)
        inside = (start[..., None] <= j[:, None, :]) & (j[:, None, :] < stop[..., None])
        existing = np.minimum(j, keys - 1)
        at_key = (*(index[:, :1] for index in element), existing)
        slab = key[at_key]
        yield _Blocks(
            rows=(*element, i),
            query=query[(*element, i)],
            own=np.diff(numbers, axis=1, prepend=-1) != 0,
            element=numbers[:, 0] // queries,
            first=first,
            key=slab,
            value=slab if value is key else value[at_key],
            mask=combine(inside, None if mask is None else mask[_at_scores((*element, i), existing)]),
            inside=inside,
            keys=j,
        )


def _at_scores(rows: tuple[Array, ...], keys: Array) -> tuple[Array, ...]:
    """Return the indices in (*batch, Lq, Lk) of the scores of queries, (blocks, size), and keys, (blocks, width)."""
    return (*(index[..., None] for index in rows), keys[:, None, :])


@np.errstate(all="ignore")
def attend_windows(
    score: Dot,
    query: Array,
    key: Array,
    value: Array,
    windows: Windows,
    mask: Array | None,
    deviation: float | None,
    return_weights: bool,
) -> tuple[Array, Array, Array | None]:
    """Attend to the keys in windows.

    Parameters
    ----------
    score : Dot
        Or another score.
    query : ndarray, shape (..., Lq, D)
        What stands for the queries in the score. Its axes on the left, and those of key, value and mask, broadcast to
        the batch, which the windows have in full.
    key, value : ndarray, shapes (..., Lk, D'), (..., Lk, Dv)
    windows : Windows
    mask : ndarray, broadcasting to (*batch, Lq, Lk), or None
        Boolean or floating.
    deviation : float or None
        Weights are multiplied by a Gaussian of the distance from p with this standard deviation.
    return_weights : bool

    Returns
    -------
    out : ndarray, shape (*batch, Lq, Dv)
    lse : ndarray, shape (*batch, Lq)
        The log-sum-exp of the scores in the window, without the Gaussian.
    weights : ndarray, shape (*batch, Lq, Lk), or None
    """
    rows, keys = windows.start.shape, key.shape[-2]
    out = np.zeros((*rows, value.shape[-1]), query.dtype)
    lse = np.full(rows, -np.inf, query.dtype)
    weights = np.zeros((*rows, keys), query.dtype) if return_weights else None
    for blocks in _gathered(query, key, value, windows, mask):
        operands = blocks.query, score.project_key(blocks.key)
        if deviation is None:
            found, sums, shares = score.attend(*operands, blocks.value, blocks.mask, return_weights)
        else:
            # weights softmax(s) · g, not normalised again, are softmax(s + log g) times what two log-sum-exps give
            _, sums, _ = score.attend(*operands, blocks.value[..., :0], blocks.mask)
            bias = blocks.biased(windows, deviation, query.dtype)
            found, scaled, shares = score.attend(*operands, blocks.value, bias, return_weights)
            factor = _ratio(scaled, sums)
            found = found * factor
            shares = None if shares is None else shares * factor
        out[blocks.rows], lse[blocks.rows] = found, sums
        if weights is not None and shares is not None:
            inside = blocks.inside
            at = _at_scores(blocks.rows, np.minimum(blocks.keys, keys - 1))
            weights[tuple(np.broadcast_to(index, inside.shape)[inside] for index in at)] = shares[inside]
    return out, lse, weights


@np.errstate(all="ignore")
def windows_backward(
    score: Dot,
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    windows: Windows,
    mask: Array | None,
    deviation: float | None,
    grad_key: Array,
    grad_value: Array,
) -> tuple[Array, Array | None]:
    """Differentiate `attend_windows`, whose arguments and results these are.

    With the weights w = softmax(s) in the window, the Gaussian g = exp(-(j - p)² / (2σ²)) and c = dO · out,

        dvalue = (w g)ᵀ dO        dscores = w g · (dO valueᵀ) - w · c        dp = Σ_j w g · (dO valueᵀ) · (j - p) / σ²

    The first term of dscores is what attention with log g as a bias says where its result is taken to be 0, the second
    what attention to values of 0 says where its result is taken to be c; and dp is dO times attention to the values
    (j - p) / σ² · value.

    Parameters
    ----------
    grad_out : ndarray, shape (*batch, Lq, Dv)
    grad_key, grad_value : ndarray, shapes (..., Lk, D'), (..., Lk, Dv)
        What to add the gradients of key and value to; they may be one array. Their axes on the left are those of the
        batch, or 1, or missing.

    Returns
    -------
    grad_query : ndarray, shape (*batch, Lq, D)
    grad_center : ndarray, shape (*batch, Lq), or None
        That of p, where a Gaussian makes a difference to it.
    """
    grad_query = np.zeros((*windows.start.shape, query.shape[-1]), query.dtype)
    grad_center = None if deviation is None else np.zeros(windows.start.shape)
    for blocks in _gathered(query, key, value, windows, mask):
        own, rows = blocks.own, blocks.rows
        grad, found, sums = np.where(own[..., None], grad_out[rows], 0), out[rows], lse[rows]
        operands = blocks.query, score.project_key(blocks.key)
        if deviation is None:
            to_query, to_key, to_value = score.attend_backward(grad, *operands, blocks.value, found, sums, blocks.mask)
        else:
            bias = blocks.biased(windows, deviation, query.dtype)
            to_query, to_key, to_value = score.attend_backward(
                grad, *operands, blocks.value, np.zeros_like(found), sums, bias
            )
            shares = (grad * found).sum(axis=-1, keepdims=True)
            nothing = np.zeros((*blocks.key.shape[:-1], 1), query.dtype)
            less = score.attend_backward(np.ones_like(shares), *operands, nothing, shares, sums, blocks.mask)
            to_query, to_key = to_query + less[0], to_key + less[1]
            if grad_center is not None:
                # around the middle of the slab: (j - middle) - (p - middle), where neither is large
                middle = blocks.keys.mean(axis=-1, keepdims=True)
                moved = blocks.value * (blocks.keys - middle)[..., None].astype(query.dtype)
                moment, scaled, _ = score.attend(*operands, moved, bias)
                moment = moment * _ratio(scaled, sums) - (windows.center[rows] - middle)[..., None] * found
                grad_center[tuple(index[own] for index in rows)] = ((grad * moment).sum(axis=-1) / deviation**2)[own]
        grad_query[tuple(index[own] for index in rows)] = to_query[own]
        for gradient, found in ((grad_value, to_value), (grad_key, score.project_key_backward(to_key, blocks.key))):
            _scatter(gradient, found, blocks, windows.start.shape[:-1])
    return grad_query, grad_center


def _ratio(scaled: Array, plain: Array) -> Array:
    """Return exp(scaled - plain), 0 for a query without a key, shape (blocks, size, 1)."""
    return np.where(plain == -np.inf, 0, np.exp(scaled - plain))[..., None]


def _scatter(gradient: Array, found: Array, blocks: _Blocks, batch: Shape) -> None:
    """Add what slabs have found, (blocks, width, features), to the gradient of what they were gathered from."""
    *lead, keys, features = gradient.shape
    sentences = gradient.reshape(-1, keys, features)
    numbers = np.broadcast_to(np.arange(len(sentences)).reshape(lead), batch).ravel()[blocks.element]
    for sentence, first, slab in zip(numbers.tolist(), blocks.first.tolist(), found, strict=True):
        part = sentences[sentence, first : first + len(slab)]
        part += slab[: len(part)]


def lost_queries(windows: Windows, lengths: Array, mask: Array | None) -> Array:
    """Say which queries have a position of NaN, so that nobody knows where they look, but some key that they may.

    Parameters
    ----------
    windows : Windows
    lengths : ndarray of int64, shape (*batch, 1)
    mask : ndarray, broadcasting to (*batch, Lq, Lk), or None

    Returns
    -------
    ndarray of bool, shape (*batch, Lq)
    """
    lost: Array = np.isnan(windows.center) & (lengths > 0)
    if mask is not None and lost.any():
        own = np.broadcast_to(mask, (*lost.shape, mask.shape[-1] if mask.ndim else 1))[lost]
        within = np.arange(own.shape[-1]) < np.broadcast_to(lengths, lost.shape)[lost][:, None]
        lost[lost] = (combine(within, own) if own.dtype.kind == "b" else within & (own != -np.inf)).any(axis=-1)
    return lost


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
