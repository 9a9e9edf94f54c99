"""What a picture is made of: weights, all of them or the largest of each query, checked and cut down to what is shown.

Both kinds answer the same questions, so that nothing that draws needs to know which one it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.call.advice import said
from fastattn.call.arrays import as_array
from fastattn.call.options import is_real
from fastattn.call.problem import Array, Shape

__all__ = ["Head", "Summary", "Weights", "as_weights", "check_query", "check_vmax"]

#: Which head of a stack: an index of the first axis, or of the first few.
Head: TypeAlias = "int | tuple[int, ...] | None"

_SUMMARY = ("top_weights", "top_indices", "received")


class Summary(Protocol):
    """The part of an `AttentionSummary` that is drawn."""

    @property
    def top_weights(self) -> NDArray[Any]:
        """The largest weights, shape (..., Lq, k)."""

    @property
    def top_indices(self) -> NDArray[Any]:
        """Their keys, shape (..., Lq, k)."""

    @property
    def received(self) -> NDArray[Any]:
        """What each key receives, shape (..., Lk)."""


@dataclass(frozen=True)
class Weights:
    """Weights of one head or of a stack of heads.

    Attributes
    ----------
    values : ndarray, shape (*lead, Lq, Lk) or (*lead, Lq, k)
    indices : ndarray of int, shape (*lead, Lq, k), or None
        The keys of the values, where only the k largest of each query are known; -1 where there is none.
    received : ndarray, shape (*lead, Lk), or None
        What each key receives, given together with `indices`.
    keys : int
        Lk.
    """

    values: Array
    indices: Array | None
    received: Array | None
    keys: int

    @property
    def lead(self) -> Shape:
        """The axes before the last two: layers, batch, heads."""
        return self.values.shape[:-2]

    @property
    def queries(self) -> int:
        """Lq."""
        queries: int = self.values.shape[-2]
        return queries

    @property
    def known(self) -> str:
        """A remark for the scale: which of the weights are known."""
        return "" if self.indices is None else f", the {self.values.shape[-1]} largest of each query"

    def at(self, index: Any) -> Weights:
        """A head, or a part of the stack, by a NumPy index of the axes before the last two."""
        return Weights(
            self.values[index],
            None if self.indices is None else self.indices[index],
            None if self.received is None else self.received[index],
            self.keys,
        )

    def only(self, query: int) -> Weights:
        """One query of the only head; what keys receive is not known of a part."""
        part = slice(query, query + 1)
        return Weights(self.values[part], None if self.indices is None else self.indices[part], None, self.keys)

    def without_ones(self, rank: int, chosen: str = "") -> Weights:
        """The stack with no more than `rank` axes before the last two, axes of length 1 left out as far as needed.

        Raises
        ------
        ValueError
            If it has more that are longer than 1: the message says what to choose some of them with, an example of
            head= unless given.
        """
        fewer = self._squeezed(rank)
        if len(fewer.lead) > rank:
            wanted = ("one head, (Lq, Lk)", "heads, (H, Lq, Lk)", "layers and heads, (layers, H, Lq, Lk)")[rank]
            raise ValueError(
                f"weights: a stack of shape {self.lead} of maps of {self.queries} queries and {self.keys} keys; "
                f"expected {wanted}: choose with {chosen or _first_of(len(fewer.lead) - rank)}"
            )
        return fewer

    def _squeezed(self, rank: int) -> Weights:
        """The same without axes of length 1 before the last two, as far as there are more than `rank` of them."""
        lead = list(self.lead)
        while len(lead) > rank and 1 in lead:
            lead.remove(1)
        return Weights(
            self.values.reshape(*lead, *self.values.shape[-2:]),
            None if self.indices is None else self.indices.reshape(*lead, *self.indices.shape[-2:]),
            None if self.received is None else self.received.reshape(*lead, self.keys),
            self.keys,
        )

    def head(self, index: Head, rank: int = 0) -> Weights:
        """The heads that a user asks for, with no more than `rank` axes before the last two.

        An index of fewer axes than there are is one of those that are longer than 1: of a batch of one, head 3 is 3.
        """
        if index is None:
            return self.without_ones(rank)
        places = index if isinstance(index, tuple) else (index,)
        if any(isinstance(each, bool) or not isinstance(each, (int, np.integer)) for each in places):
            raise TypeError(f"head: {said(index)}; expected an int or a tuple of ints")
        stack = self._squeezed(len(places))
        fits = len(places) <= len(stack.lead)
        if not fits or any(not -n <= i < n for i, n in zip(places, stack.lead, strict=False)):
            raise ValueError(f"head: {index}; expected an index of the axes {stack.lead} before queries and keys")
        if len(places) < len(stack.lead) - rank:
            raise ValueError(
                f"head: {index} for the axes {stack.lead} before queries and keys; expected an index of more of them, "
                f"such as {_first_of(len(stack.lead) - rank)}"
            )
        return stack.at(tuple(int(each) for each in places)).without_ones(rank)

    def largest(self) -> float:
        """The largest weight that is a number; 0 if there is none."""
        with np.errstate(all="ignore"):
            return float(np.fmax.reduce(self.values, axis=None, initial=0))

    def has_nan(self) -> bool:
        """Whether some weight is not a number."""
        return bool(np.isnan(self.values).any())

    def row(self, query: int) -> Array:
        """The weights of one query, shape (Lk,); 0 where it is not known. Of one head only."""
        if self.indices is None:
            return np.asarray(self.values[query])
        row = np.zeros(self.keys)
        known = self.indices[query] >= 0
        row[self.indices[query][known]] = self.values[query][known]
        if np.isnan(self.values[query]).any():  # without order, so without keys: every weight of this query is NaN
            row[:] = np.nan
        return row

    def totals(self) -> Array:
        """What each key receives, summed over the queries, shape (Lk,). Of one head only."""
        with np.errstate(all="ignore"):
            return np.asarray(self.values.sum(axis=0, dtype=np.float64) if self.received is None else self.received)

    def pooled(self, rows: int, columns: int) -> tuple[Array, int, int]:
        """A map of no more than `rows` × `columns` fields, each with the largest weight of a rectangle of cells.

        So a single large weight stays visible where a mean would hide it. NaN wins over every number. Fields are as
        even as can be: drawn as if they all had the same size, none is off by a whole cell.

        Returns
        -------
        fields : ndarray
        height, width : int
            Queries and keys of the largest field.
        """
        top, height = _edges(self.queries, rows)
        left, width = _edges(self.keys, columns)
        with np.errstate(all="ignore"):
            if self.indices is None:
                fields = self.values
                if width > 1:
                    fields = np.maximum.reduceat(fields, left, axis=1)
                if height > 1:
                    fields = np.maximum.reduceat(fields, top, axis=0)
                return fields, height, width
            fields = np.zeros((len(top), len(left)))
            query, place = np.nonzero(self.indices >= 0)
            key = self.indices[query, place]
            row, column = np.searchsorted(top, query, side="right") - 1, np.searchsorted(left, key, side="right") - 1
            np.maximum.at(fields, (row, column), self.values[query, place])
        lost = np.flatnonzero(np.isnan(self.values).any(axis=1))
        fields[np.searchsorted(top, lost, side="right") - 1] = np.nan
        return fields, height, width

    def mean(self) -> Weights:
        """The mean of a stack of heads, shape (H, ...); a weight that is not known counts as 0."""
        heads = self.lead[0]
        if self.indices is None:
            with np.errstate(all="ignore"):
                return Weights(np.mean(self.values, axis=0), None, None, self.keys)
        # of each query, the weights of all heads, those to the same key side by side
        indices = np.concatenate(list(self.indices), axis=-1)
        order = np.argsort(indices, axis=-1, kind="stable")
        indices = np.take_along_axis(indices, order, axis=-1)
        values = np.take_along_axis(np.concatenate(list(self.values), axis=-1), order, axis=-1)
        place = np.zeros(indices.shape, np.int64)
        place[:, 1:] = np.cumsum(indices[:, 1:] != indices[:, :-1], axis=-1)
        sums, keys = np.zeros(indices.shape), np.full(indices.shape, -1)
        row = np.arange(self.queries)[:, None]
        np.add.at(sums, (row, place), values)
        keys[row, place] = indices
        return Weights(sums / heads, keys, None, self.keys)

    def pairs(self, least: float) -> tuple[Array, Array, Array]:
        """Queries, keys and weights, of those weights that are above 0 and at least `least`, or NaN; of one head."""
        with np.errstate(all="ignore"):
            if self.indices is None:
                rows, columns = np.nonzero(~((self.values < least) | (self.values <= 0)))
                return rows, columns, self.values[rows, columns]
            rows, places = np.nonzero((self.indices >= 0) & (self.values > 0) & (self.values >= least))
        lost = np.flatnonzero(np.isnan(self.values).any(axis=1))  # without order, so without keys: all weights are NaN
        return (
            np.concatenate([rows, np.repeat(lost, self.keys)]),
            np.concatenate([self.indices[rows, places], np.tile(np.arange(self.keys), len(lost))]),
            np.concatenate([self.values[rows, places], np.full(len(lost) * self.keys, np.nan)]),
        )


def _first_of(axes: int) -> str:
    """What chooses the first of so many axes."""
    return f"head={(0,) * axes if axes > 1 else 0}"


def _edges(length: int, most: int) -> tuple[Array, int]:
    """Where each of at most `most` fields along a side begins, and how many cells the largest of them has."""
    size = -(-length // most)
    fields = -(-length // size)
    return np.arange(fields) * length // fields, size


def as_weights(given: ArrayLike | Summary) -> Weights:
    """Make `Weights` of an array or of an `AttentionSummary`, without a copy where the dtype allows.

    Raises
    ------
    TypeError
        If it is not an array_like of real numbers.
    ValueError
        If it has fewer than two axes, no query or no key, or a weight that is negative or infinite; for a summary, if
        the shapes of its parts do not go together.
    """
    if all(hasattr(given, name) for name in _SUMMARY):
        return _from_summary(given)
    values = _real("weights", given)
    if values.ndim < 2:
        raise ValueError(f"weights: shape {values.shape}; expected (queries, keys), or a stack (..., queries, keys)")
    _check_values(values)
    return _not_empty(Weights(values, None, None, values.shape[-1]))


def _from_summary(given: Any) -> Weights:
    top, received = _real("weights.top_weights", given.top_weights), _real("weights.received", given.received)
    indices = as_array("weights.top_indices", given.top_indices)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"weights.top_indices: dtype {indices.dtype}; expected integers")
    if top.ndim < 2 or indices.shape != top.shape:
        raise ValueError(
            f"weights: an AttentionSummary of top_weights of shape {top.shape} and top_indices of shape "
            f"{indices.shape}; expected the same shape, (..., queries, k)"
        )
    if received.ndim < 1 or received.shape[:-1] != top.shape[:-2]:
        raise ValueError(
            f"weights: an AttentionSummary of top_weights of shape {top.shape} and received of shape "
            f"{received.shape}; expected {(*top.shape[:-2], 'keys')}"
        )
    keys = received.shape[-1]
    if indices.size and not -1 <= indices.min() <= indices.max() < keys:
        raise ValueError(
            f"weights.top_indices: from {indices.min()} to {indices.max()}; expected indices of {keys} keys, or -1"
        )
    _check_values(top)
    return _not_empty(Weights(top, indices, received, keys))


def _real(name: str, given: object) -> Array:
    array = as_array(name, given)
    if array.dtype.kind in "biu":
        return array.astype(np.float64)
    if array.dtype.type in (np.float16, np.float32, np.float64, np.longdouble):
        return array
    if np.can_cast(array.dtype, np.float32):  # what ml_dtypes adds to NumPy, such as bfloat16
        return array.astype(np.float32)
    raise TypeError(f"{name}: dtype {array.dtype}; expected real numbers")


def _check_values(values: Array) -> None:
    with np.errstate(all="ignore"):
        low = float(np.fmin.reduce(values, axis=None, initial=0))
        high = float(np.fmax.reduce(values, axis=None, initial=0))
    if low < 0 or high == math.inf:
        wrong = low if low < 0 else high
        raise ValueError(f"weights: has {wrong:g}; expected weights, finite and not negative (or NaN), not scores")


def _not_empty(weights: Weights) -> Weights:
    if not weights.queries or not weights.keys or 0 in weights.lead:
        raise ValueError(
            f"weights: a stack of shape {weights.lead} of maps of {weights.queries} queries and {weights.keys} keys; "
            "expected at least one of each"
        )
    return weights


def check_query(given: object, count: int) -> int:
    """Return the number of a query, negative ones counted from the end."""
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)):
        raise TypeError(f"query: {said(given)}; expected None or an int, the number of a query")
    if not -count <= given < count:
        raise ValueError(f"query: {given}; expected the number of one of {count} queries")
    return int(given) % count


def check_vmax(given: object, largest: float) -> float:
    """Return the end of the scale: what the user wants, or the largest weight, or 1 where nothing is above 0."""
    if given is None:
        return largest if largest > 0 else 1.0
    if not is_real(given):
        raise TypeError(f"vmax: {said(given)}; expected None or a number, the weight at the end of the scale")
    vmax = float(given)  # type: ignore[arg-type]
    if not 0 < vmax < math.inf:
        raise ValueError(f"vmax: {vmax}; expected a finite number above 0")
    return vmax
