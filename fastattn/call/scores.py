"""What happens to a score between query · key and the softmax, and which keys a query may look at.

In this order, as docs/semantics.md has it:

    score = scale · (query · key)
    score = softcap · tanh(score / softcap)          with a softcap
    score = score + bias                             under a floating mask
    score = score - slope · |position - j|           with ALiBi slopes, one for each query head
    score = score_mod(score, batch, head, position, j)
    score = -inf                                     where one of these says no: a boolean mask, the interval,
                                                     mask_mod(batch, head, position, j)

A sink is one more score of each query of a head, which has a share of the weights and no value.

Query i stands at the position i + offset, key j at j. Causality, windows and the lengths of sequences leave a query one
interval of keys: from its position less `left` to its position plus `right`, both included, below the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn.call.halves import cast
from fastattn.call.rounding import saturated
from fastattn.functions.function import Function

__all__ = ["FARTHEST", "HEAD", "Places", "Scores", "Span"]

#: What a query head of a row of the batch may have of its own: the position of query 0, the number of keys, the slope
#: of ALiBi, and the sink, -inf where there is none.
HEAD = np.dtype([("offset", np.int64), ("keys", np.int64), ("slope", np.float64), ("sink", np.float64)])

#: No position is farther from the keys: what is beyond is at least as far as any key.
FARTHEST = 1 << 60
#: How far a query looks from there where nothing bounds it; positions less or plus this are whole numbers of 64 bits.
UNBOUNDED = 1 << 61


class Places(NamedTuple):
    """Where scores stand, in arrays that broadcast to their axes, (*batch, Hk, G, Lq, Lk).

    Attributes
    ----------
    query, key : ndarray of int
        Their numbers.
    head : ndarray of `HEAD`, or None
        What the heads have of their own.
    """

    query: Any
    key: Any
    head: Any


class Span(NamedTuple):
    """Keys that some queries may look at: any of them from `begin` to `end`, all of them from `full_begin` on."""

    begin: int
    full_begin: int
    full_end: int
    end: int


@dataclass(frozen=True, slots=True)
class Scores:
    """What happens to the scores of a call, in numbers: everything but arrays, which are among its operands.

    Attributes
    ----------
    scale : float
        The factor of query · key.
    softcap : float or None
        The magnitude that scores approach, and do not exceed.
    bias, keep : bool
        Whether there is a floating mask, which is added, and a boolean one, where True takes part.
    left, right : int or None
        How many keys before its position, and behind it, a query may look at; None: all.
    offset : int
        The position of query 0 among the keys.
    own : tuple of str
        Which fields of `HEAD` each head has of its own, in the operand `heads`.
    score_mod, mask_mod : Function or None
        The user's functions; what they capture is in the operand `captured`.
    first_batch, first_head, first_query, first_key : int
        The numbers that the first row of the batch, head, query and key have in the whole, where a call is a piece of
        another: what depends on such numbers, functions and dropout, is that of the whole. Positions here count from
        the first key of the piece, as lengths do; a function is told those of the whole.
    """

    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False
    keep: bool = False
    left: int | None = None
    right: int | None = None
    offset: int = 0
    own: tuple[str, ...] = ()
    score_mod: Function | None = None
    mask_mod: Function | None = None
    first_batch: int = 0
    first_head: int = 0
    first_query: int = 0
    first_key: int = 0

    @property
    def adds(self) -> bool:
        """Whether something is added to scores, or they become something else altogether."""
        return self.bias or "slope" in self.own or self.score_mod is not None

    @property
    def has_functions(self) -> bool:
        """Whether there are functions of the user's."""
        return self.score_mod is not None or self.mask_mod is not None

    @property
    def placed(self) -> bool:
        """Whether what happens to a score depends on where its query and key stand."""
        return self.bounded or "slope" in self.own or self.has_functions

    @property
    def bounded(self) -> bool:
        """Whether positions or lengths keep queries from some keys."""
        return self.left is not None or self.right is not None or "keys" in self.own

    def head(self, keys: int) -> NDArray[np.void]:
        """Return what a head has that has nothing of its own, where there are so many keys: a record of `HEAD`."""
        record = np.zeros(1, HEAD)
        record["offset"], record["keys"], record["sink"] = self.offset, keys, -np.inf
        return record

    def span(self, first: int, last: int, keys: int, offset: int | None = None) -> Span:
        """Return which of so many keys the queries from `first` to `last` look at, in a row of this offset."""
        at = self.offset if offset is None else offset
        left, right = self._reach()
        begin, end = max(0, first + at - left), min(keys, last + at + right + 1)
        if begin >= end:
            return Span(0, 0, 0, 0)
        full_begin, full_end = max(begin, last + at - left), min(end, first + at + right + 1)
        return Span(begin, full_begin, full_end, end) if full_begin < full_end else Span(begin, end, end, end)

    def sees(self, query: Any, key: Any, keys: Any, offset: Any = None) -> Any:
        """Say whether queries may look at keys, all given by their numbers, where a row has so many keys."""
        position = query + (self.offset if offset is None else offset)
        left, right = self._reach()
        return (key >= position - left) & (key <= position + right) & (key < keys)

    def _reach(self) -> tuple[int, int]:
        return tuple(UNBOUNDED if reach is None else reach for reach in (self.left, self.right))  # type: ignore[return-value]

    def value(self, raw: Any, bias: NDArray[Any] | None, real: np.dtype[Any], places: Any = None) -> Any:
        """Return what becomes of scale · (query · key), before anything is hidden.

        The bias counts as the dtype `real` has it, of which no finite number is infinite. `places` are
        `Places`, or None where nothing depends on them.
        """
        if self.softcap is not None:
            raw = self.softcap * np.tanh(raw / self.softcap)
        if not (self.bias or "slope" in self.own):
            return raw
        added = np.zeros(1, raw.dtype) if bias is None else cast(saturated(bias, real), raw.dtype)
        if "slope" in self.own:
            limit = np.finfo(real).max
            distance = np.abs(places.query + places.head["offset"] - places.key).astype(raw.dtype)
            away = np.clip(np.clip(places.head["slope"], -limit, limit).astype(raw.dtype) * distance, -limit, limit)
            added = np.where(np.isinf(added), added, np.clip(added - away, -limit, limit))
        return raw + added

    def slope(self, raw: Any) -> Any:
        """Return the derivative of `value` by `raw`."""
        if self.softcap is None:
            return 1.0
        return 1.0 / np.cosh(np.clip(raw / self.softcap, -350.0, 350.0)) ** 2
