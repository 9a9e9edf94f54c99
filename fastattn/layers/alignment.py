"""Which keys the queries of the layers of one head look at, and what is kept of it for the way back.

An `Alignment` attends with a score, and differentiates that. Where what queries look at is an interval that moves with
their positions, one call of `fastattn.attention` says all of it: `Interval`. Where each query has a window of its own,
see `fastattn.layers.windows`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.arrays import as_upstream
from fastattn.call.problem import Array, Mask, Shape
from fastattn.call.score_options import FurtherOptions, scores_from
from fastattn.call.scores import Scores
from fastattn.call.shapes import masks_of
from fastattn.call.types import MaskLike
from fastattn.layers.backward import Saved
from fastattn.layers.base import Layer, as_arrays, common_batch
from fastattn.layers.masks import changed, mask_of_scores
from fastattn.layers.scores import Dot

__all__ = ["Alignment", "Attended", "Interval", "find_interval", "read_inputs", "scores_of_rows"]

ALL = Scores()


@dataclass(eq=False, repr=False)
class Attended(Saved):
    """What the attention of one head was made of.

    Attributes
    ----------
    query, key, value : ndarray
        In one dtype.
    mask : ndarray, pair of them, or None
    alignment : Alignment
    scored : ndarray
        What stands for the queries in the score.
    projected : ndarray or None
        What stands for those keys that any query looks at, where it was kept.
    out, lse : ndarray
        With local-p, `lse` is that of the scores without the Gaussian.
    projected_keys : array_like or None
        As they were given, if so.
    """

    query: Array
    key: Array
    value: Array
    mask: Mask
    alignment: Alignment
    scored: Array
    projected: Array | None
    out: Array
    lse: Array
    projected_keys: ArrayLike | None = None

    def differentiate(self, score: Dot, grad_out: ArrayLike) -> tuple[list[Array], Array | None]:
        """Return the gradients of query, key and value, as many as were given, and that of the positions looked at.

        Raises
        ------
        TypeError, ValueError
            If `grad_out` is not like the result.
        """
        grad = as_upstream("grad_out", grad_out, self.out.dtype, self.out.shape)
        to_query, grad_key, grad_value, to_center = self.alignment.backward(score, grad, self)
        grad_query = score.project_query_backward(to_query, self.query)
        return [grad_query, grad_key, grad_value][: len(self.inputs)], to_center


class Alignment(ABC):
    """Which keys the queries of a call look at."""

    def attended(
        self,
        layer: Layer,
        inputs: tuple[Any, ...],
        arrays: list[Array],
        storage: np.dtype[Any],
        mask: Mask,
        score: Dot,
        return_weights: bool,
        projected_keys: ArrayLike | None = None,
    ) -> Attended:
        """Attend to inputs of a layer, given as arrays as well, and keep what `backward` wants.

        `storage` is the dtype of the results.
        """
        query, key, value = arrays
        scored = score.project_query(query)
        out, lse, weights, projected = self.attend(score, scored, key, value, mask, return_weights)
        return Attended(
            layer, inputs, weights, storage, query, key, value, mask, self, scored, projected, out, lse, projected_keys
        )

    @abstractmethod
    def attend(
        self, score: Dot, query: Array, key: Array, value: Array, mask: Mask, return_weights: bool
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """Attend.

        Parameters
        ----------
        score : Dot
            Or another score.
        query : ndarray, shape (..., Lq, D)
            What stands for the queries in the score. Its axes on the left, and those of key, value and mask, broadcast
            to the batch.
        key, value : ndarray, shapes (..., Lk, D'), (..., Lk, Dv)
        mask : ndarray, pair of them, or None
            Broadcasting to (*batch, Lq, Lk).
        return_weights : bool

        Returns
        -------
        out : ndarray, shape (*batch, Lq, Dv)
        lse : ndarray, shape (*batch, Lq)
        weights : ndarray, shape (*batch, Lq, Lk), or None
        projected : ndarray or None
            What `Attended` has under this name.
        """

    @abstractmethod
    def backward(self, score: Dot, grad_out: Array, saved: Attended) -> tuple[Array, Array, Array, Array | None]:
        """Differentiate `attend`.

        Returns
        -------
        grad_scored, grad_key, grad_value : ndarray
            With the shapes of what they belong to. Where the value is the key, that of the key is the sum of both.
        grad_center : ndarray, shape (*batch, Lq), or None
            That of the positions that queries look at, where they are more than an end of a window.
        """


@dataclass(slots=True)
class Interval(Alignment):
    """The alignment of queries that look at an interval of keys which moves with their positions, or at all of them.

    Keys that no query of the call looks at are cut off: nothing of them is projected.

    Attributes
    ----------
    begin, end : int
        The keys that are left.
    options : FurtherOptions
        What a call with these keys is told of its scores.
    scores : Scores
        What one with all keys would be told, where keys are cut off.
    offsets, lengths : ndarray of int64, shape (*batch, 1, 1), or None
        And of each row of the batch.
    """

    begin: int
    end: int
    options: FurtherOptions
    scores: Scores = ALL
    offsets: Array | None = None
    lengths: Array | None = None

    def attend(
        self, score: Dot, query: Array, key: Array, value: Array, mask: Mask, return_weights: bool
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """Attend: see `Alignment.attend`."""
        projected, near = score.project_key(self._rows(key)), changed(mask, self._columns)
        out, lse, weights = score.attend(query, projected, self._rows(value), near, self.options, return_weights)
        return out, lse, None if weights is None else self._all_weights(weights, key.shape[-2]), projected

    def _all_weights(self, weights: Array, keys: int) -> Array:
        """Return the weights of all keys, given those of the keys that are left."""
        if not self.scores.bounded:
            return weights
        whole = np.zeros((*weights.shape[:-1], keys), weights.dtype)
        whole[..., self.begin : self.end] = weights
        # where a score is NaN, attention says so of all keys of the call
        rows, columns = np.arange(weights.shape[-2])[:, None], np.arange(keys)
        sees = self.scores.sees(rows, columns, keys if self.lengths is None else self.lengths, self.offsets)
        whole[np.isnan(whole) & ~sees] = 0
        return whole

    def backward(self, score: Dot, grad_out: Array, saved: Attended) -> tuple[Array, Array, Array, Array | None]:
        """Differentiate `attend`: see `Alignment.backward`."""
        assert saved.projected is not None
        value, near = self._rows(saved.value), changed(saved.mask, self._columns)
        grad_scored, to_key, grad_value = score.attend_backward(
            grad_out, saved.scored, saved.projected, value, saved.out, saved.lse, near, self.options
        )
        grad_key = score.project_key_backward(to_key, self._rows(saved.key))
        if "attn_mask" in score.named:
            bias, of_near = masks_of(saved.mask)[0], score.named["attn_mask"]
            assert bias is not None
            score.named["attn_mask"] = whole = np.zeros(bias.shape, of_near.dtype)
            self._columns(whole)[...] = of_near
        if not saved.has_value:
            grad_key = grad_key + grad_value
        return grad_scored, self._whole(grad_key, saved.key), self._whole(grad_value, saved.value), None

    def _rows(self, array: Array) -> Array:
        return array[..., self.begin : self.end, :]

    def _columns(self, mask: Array) -> Array:
        return mask[..., self.begin : self.end] if mask.ndim and mask.shape[-1] > 1 else mask

    def _whole(self, gradient: Array, array: Array) -> Array:
        """Return the gradient of an array, given that of its rows that are left."""
        if gradient.shape == array.shape:
            return gradient
        whole = np.zeros(array.shape, gradient.dtype)
        self._rows(whole)[...] = gradient
        return whole


def read_inputs(
    layer: Any, inputs: tuple[Any, ...], attn_mask: MaskLike | None, value_dim: int | None = None, **more: ArrayLike
) -> tuple[list[Array], np.dtype[Any], Shape, Mask]:
    """Return arrays of query, key, value and what else is given, the dtype of results, the batch's axes, and the mask.

    Parameters
    ----------
    layer : BahdanauAttention or LuongAttention
    inputs : tuple of array_like or None
        Query and key, and perhaps the value, which is the key unless given.
    attn_mask : array_like or None
    value_dim : int or None
        Features of a value; None: any number.
    **more : array_like
        Under their names.

    Raises
    ------
    TypeError, ValueError
        If one has no meaning here, or they do not go together.
    """
    query, key, value = (*inputs, None, None)[:3]
    given = {"query": query, "key": key, "value": key if value is None else value, **more}
    arrays, storage = as_arrays(given, layer.dtype)
    q, k, v = arrays[:3]
    features = (v.shape[-1] if v.ndim else 0) if value_dim is None else value_dim
    batch = common_batch([q, k, v], (layer.query_dim, layer.key_dim, features))
    return arrays, storage, batch, mask_of_scores(attn_mask, (*batch, q.shape[-2], k.shape[-2]))


def scores_of_rows(
    options: FurtherOptions, batch: Shape, queries: int, keys: int
) -> tuple[Scores, Array | None, Array | None]:
    """Return what options say of scores, checked, and the offset and the length of each row of the batch, if own."""
    given: Any = options
    scores, own, _ = scores_from(given, batch, 1, queries, keys, head_dim=1, bias=False, keep=False)
    if own is None:
        return scores, None, None
    offsets, lengths = (own[name] if name in scores.own else None for name in ("offset", "keys"))
    return scores, offsets, lengths


def find_interval(options: FurtherOptions, batch: Shape, queries: int, keys: int) -> Interval:
    """Find the keys that any query may look at, as far as positions and lengths say.

    Raises
    ------
    TypeError, ValueError
        For an option that `fastattn.attention` does not take.
    """
    if not options:  # nothing to check, and nothing to cut off
        return Interval(0, keys, options)
    scores, offsets, lengths = scores_of_rows(options, batch, queries, keys)
    if scores.has_functions:  # which are asked by the numbers of keys
        return Interval(0, keys, options)
    if offsets is None:
        begin, _, _, end = scores.span(0, queries - 1, keys)
    else:
        # A row has the same bits in any batch: where its keys begin does not depend on other rows.
        ends = [scores.span(0, queries - 1, keys, offset).end for offset in offsets.tolist()]
        begin, end = 0, max(ends, default=0)
    offsets, lengths = (None if rows is None else rows.reshape(*batch, 1, 1) for rows in (offsets, lengths))
    moved: FurtherOptions = {**options}
    if begin:
        moved["query_offset"] = scores.offset - begin
    if lengths is not None:
        moved["key_lengths"] = np.clip(lengths[..., 0, 0] - begin, 0, end - begin)
    return Interval(begin, end, moved, scores, offsets, lengths)
