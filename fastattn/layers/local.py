"""Luong's local attention: each query looks at a window around a position of its own, given or predicted.

The keys of a window are gathered, see `fastattn.layers.windows`. Where a position is predicted, weights are multiplied
by a Gaussian of the distance from it, which attention has as a bias: its logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.call.problem import Array, Mask, Shape
from fastattn.call.score_options import FurtherOptions
from fastattn.call.shapes import masks_of
from fastattn.call.upstream import summed_to
from fastattn.layers.alignment import Alignment, Attended, scores_of_rows
from fastattn.layers.scores import Dot
from fastattn.layers.windows import Blocks, Windows, at_scores, find_windows, gathered, scatter

__all__ = ["Local", "Sight", "find_local", "find_sight"]

#: Options that say which keys a query may look at, and those that act on a score wherever its key lies.
OF_KEYS, OF_SCORES = ("window", "query_offset", "key_lengths"), ("softcap",)


@dataclass(frozen=True)
class Sight:
    """The keys that options leave each query, whatever it looks at: those with ``begin <= j < end``.

    Attributes
    ----------
    begin, end : ndarray of int64, shape (*batch, Lq)
    lengths : ndarray of int64, shape (*batch, 1)
        How many keys each sentence has.
    options : FurtherOptions
        The other options: those of scores.
    """

    begin: Array
    end: Array
    lengths: Array
    options: FurtherOptions


def find_sight(options: FurtherOptions, batch: Shape, queries: int, keys: int) -> Sight:
    """Find the keys that options leave each query.

    Raises
    ------
    TypeError
        For an option that does not go with windows of queries' own.
    TypeError, ValueError
        For one that `fastattn.attention` does not take.
    """
    for name, option in options.items():
        if option is not None and name not in OF_KEYS + OF_SCORES:
            expected = ", ".join(OF_KEYS + OF_SCORES)
            raise TypeError(f"{name}: given where each query has a window of its own; expected none but {expected}")
    scores, offsets, rows = scores_of_rows(options, batch, queries, keys)
    lengths = np.broadcast_to(keys if rows is None else rows.reshape(batch), batch)[..., None]
    positions = np.arange(queries) + (scores.offset if offsets is None else offsets.reshape(*batch, 1))
    begin = np.zeros_like(positions) if scores.left is None else np.clip(positions - scores.left, 0, lengths)
    end = lengths if scores.right is None else np.clip(positions + scores.right + 1, 0, lengths)
    begin, end = (np.broadcast_to(one, (*batch, queries)) for one in (begin, end))
    left: Any = {name: option for name, option in options.items() if name in OF_SCORES}
    return Sight(begin, end, lengths, left)


@dataclass(frozen=True)
class Local(Alignment):
    """The alignment of queries that each look at a window of their own.

    Attributes
    ----------
    windows : Windows
    sight : Sight
    lost : ndarray of bool, shape (*batch, Lq)
        The queries that nobody knows where they look. Their windows are empty.
    deviation : float or None
        Weights are multiplied by a Gaussian of the distance from p with this standard deviation.
    """

    windows: Windows
    sight: Sight
    lost: Array
    deviation: float | None

    @np.errstate(all="ignore")
    def attend(
        self, score: Dot, query: Array, key: Array, value: Array, mask: Mask, return_weights: bool
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """Attend: see `Alignment.attend`. The log-sum-exp is that without the Gaussian."""
        rows, keys = self.windows.start.shape, key.shape[-2]
        out = np.zeros((*rows, value.shape[-1]), query.dtype)
        lse = np.full(rows, -np.inf, query.dtype)
        weights = np.zeros((*rows, keys), query.dtype) if return_weights else None
        for blocks in gathered(query, key, value, self.windows, mask):
            found, sums, shares = self._attend(score, blocks, return_weights)
            out[blocks.rows], lse[blocks.rows] = found, sums
            if weights is not None and shares is not None:
                inside = blocks.inside
                at = at_scores(blocks.rows, np.minimum(blocks.keys, keys - 1))
                weights[tuple(np.broadcast_to(index, inside.shape)[inside] for index in at)] = shares[inside]
        out[self.lost] = np.nan
        if weights is not None:
            j, begin, end = np.arange(keys), self.sight.begin[..., None], self.sight.end[..., None]
            weights[self.lost[..., None] & (begin <= j) & (j < end)] = np.nan
        return out, lse, weights, None

    def _attend(self, score: Dot, blocks: Blocks, return_weights: bool) -> tuple[Array, Array, Array | None]:
        """Return result, log-sum-exp and weights of blocks.

        Weights softmax(s) · g, not normalised again, are softmax(s + log g) times what two log-sum-exps give.
        """
        operands, options = (blocks.query, score.project_key(blocks.key)), self.sight.options
        if self.deviation is None:
            return score.attend(*operands, blocks.value, blocks.mask, options, return_weights)
        _, sums, _ = score.attend(*operands, blocks.value[..., :0], blocks.mask, options)
        bias = blocks.biased(self.windows, self.deviation)
        found, scaled, shares = score.attend(*operands, blocks.value, bias, options, return_weights)
        factor = _ratio(scaled, sums)
        return found * factor, sums, None if shares is None else shares * factor

    @np.errstate(all="ignore")
    def backward(self, score: Dot, grad_out: Array, saved: Attended) -> tuple[Array, Array, Array, Array | None]:
        """Differentiate `attend`: see `Alignment.backward`.

        Raises
        ------
        ValueError
            If gradients are named: masks are gathered here, and there is nothing else.
        """
        if score.grads is not None:
            raise ValueError("grads: given where each query has a window of its own; expected None")
        grad_scored = np.zeros((*self.windows.start.shape, saved.scored.shape[-1]), grad_out.dtype)
        grad_key = np.zeros(saved.key.shape, grad_out.dtype)
        # a key that is the value as well has the sum
        grad_value = np.zeros(saved.value.shape, grad_out.dtype) if saved.has_value else grad_key
        grad_center = None if self.deviation is None else np.zeros(self.windows.start.shape)
        for blocks in gathered(saved.scored, saved.key, saved.value, self.windows, saved.mask):
            own, rows = blocks.own, blocks.rows
            places = tuple(index[own] for index in rows)
            grad = np.where(own[..., None], grad_out[rows], 0)
            to_query, to_key, to_value, to_center = self._backward(
                score, blocks, grad, saved.out[rows], saved.lse[rows]
            )
            grad_scored[places] = to_query[own]
            if grad_center is not None and to_center is not None:
                grad_center[places] = to_center[own]
            for gradient, found in ((grad_value, to_value), (grad_key, score.project_key_backward(to_key, blocks.key))):
                scatter(gradient, found, blocks, self.windows.start.shape[:-1])
        grad_scored[self.lost] = np.nan
        if grad_center is not None:
            grad_center[self.lost] = np.nan
        return summed_to(grad_scored, saved.scored.shape), grad_key, grad_value, grad_center

    def _backward(
        self, score: Dot, blocks: Blocks, grad: Array, out: Array, lse: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        """Return the gradients of the queries, keys, values and positions of blocks.

        With the weights w = softmax(s) in the window, the Gaussian g = exp(-(j - p)² / (2σ²)) and c = dO · out,

            dvalue = (w g)ᵀ dO      dscores = w g · (dO valueᵀ) - w · c      dp = Σ_j w g · (dO valueᵀ) · (j - p) / σ²

        The first term of dscores is what attention with log g as a bias says where its result is taken to be 0, the
        second what attention to values of 0 says where its result is taken to be c; and dp is dO times attention to the
        values (j - p) / σ² · value.
        """
        operands, options = (blocks.query, score.project_key(blocks.key)), self.sight.options
        if self.deviation is None:
            found = score.attend_backward(grad, *operands, blocks.value, out, lse, blocks.mask, options)
            return found[0], found[1], found[2], None
        bias = blocks.biased(self.windows, self.deviation)
        of_bell = score.attend_backward(grad, *operands, blocks.value, np.zeros_like(out), lse, bias, options)
        shares = (grad * out).sum(axis=-1, keepdims=True)
        nothing = np.zeros((*blocks.key.shape[:-1], 1), grad.dtype)
        less = score.attend_backward(np.ones_like(shares), *operands, nothing, shares, lse, blocks.mask, options)
        # around the middle of the slab: (j - middle) - (p - middle), where neither is large
        middle = blocks.keys.mean(axis=-1, keepdims=True)
        moved = blocks.value * (blocks.keys - middle)[..., None].astype(grad.dtype)
        moment, scaled, _ = score.attend(*operands, moved, bias, options)
        moment = moment * _ratio(scaled, lse) - (self.windows.center[blocks.rows] - middle)[..., None] * out
        to_center = (grad * moment).sum(axis=-1) / self.deviation**2
        return of_bell[0] + less[0], of_bell[1] + less[1], of_bell[2], to_center


def _ratio(scaled: Array, plain: Array) -> Array:
    """Return exp(scaled - plain), 0 for a query without a key, shape (blocks, size, 1)."""
    return np.where(plain == -np.inf, 0, np.exp(scaled - plain))[..., None]


def find_local(center: Array, window: int, sight: Sight, mask: Mask, deviation: float | None) -> Local:
    """Find the keys with \\|j - p\\| <= window that options leave a query.

    Parameters
    ----------
    center : ndarray of float64, broadcasting to (*batch, Lq)
        p; where it is NaN, the window is empty.
    window : int
    sight : Sight
    mask : ndarray, pair of them, or None
        Broadcasting to (*batch, Lq, Lk).
    deviation : float or None
    """
    center = np.broadcast_to(center, sight.begin.shape)
    windows = find_windows(center, window, sight.begin, sight.end)
    return Local(windows, sight, _lost(center, sight, mask), deviation)


def _lost(center: Array, sight: Sight, mask: Mask) -> Array:
    """Say which queries have a position of NaN, so that nobody knows where they look, but some key that they may."""
    lost: Array = np.isnan(center) & (sight.begin < sight.end)
    if mask is not None and lost.any():
        j = np.arange(sight.end[lost].max())
        seen = (sight.begin[lost][:, None] <= j) & (j < sight.end[lost][:, None])
        for one in masks_of(mask):
            if one is not None:
                rows = np.broadcast_to(one, np.broadcast_shapes(one.shape, (*lost.shape, 1)))[lost][:, : len(j)]
                seen &= rows if rows.dtype.kind == "b" else rows != -np.inf
        lost[lost] = seen.any(axis=-1)
    return lost
