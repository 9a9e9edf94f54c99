"""How positions are dealt out to those who compute a call together, and who needs whose keys.

A share is some spans of the whole, which lie one behind the other in the arrays of its owner. Who computes has a
number, its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from fastattn.call.advice import said
from fastattn.call.problem import Array

__all__ = ["LAYOUTS", "Layout", "Route", "Run", "Span", "check_layout", "needs", "runs_of", "shares"]

Layout: TypeAlias = Literal["contiguous", "zigzag"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag")


class Span(NamedTuple):
    """Positions of the whole that follow each other, and where the first of them lies in arrays of their owner."""

    begin: int
    end: int
    place: int


class Run(NamedTuple):
    """What a span has of one sequence: the positions there, and where they lie in arrays of their owner."""

    sequence: int
    first: int
    length: int
    rows: slice


def check_layout(given: object) -> Layout:
    """Return the name of a layout.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if not isinstance(given, str) or given not in LAYOUTS:
        raise ValueError(f"layout: {said(given)}; expected {' or '.join(map(repr, LAYOUTS))}")
    return given


def shares(length: int, ranks: int, layout: str) -> list[list[Span]]:
    """Return the spans of each rank, in their order.

    Contiguous, each has one. In zigzag the whole is cut into twice as many as there are ranks, and each has one from
    the front and its counterpart from the back: where queries look back, those together are the same work for all.
    """
    count = ranks if layout == "contiguous" else 2 * ranks
    ends = [length * i // count for i in range(count + 1)]
    found = []
    for rank in range(ranks):
        spans: list[Span] = []
        place = 0
        for number in (rank,) if layout == "contiguous" else (rank, count - 1 - rank):
            begin, end = ends[number], ends[number + 1]
            if spans and spans[-1].end == begin:  # in the middle of zigzag, where both are one
                spans[-1] = spans[-1]._replace(end=end)
            else:
                spans.append(Span(begin, end, place))
            place += end - begin
        found.append(spans)
    return found


def runs_of(spans: Iterable[Span], starts: Array) -> list[Run]:
    """Return what spans have of sequences that lie one behind the other, without empty ones.

    Parameters
    ----------
    spans : iterable of Span
    starts : ndarray of int, shape (sequences + 1,)
        Where each begins, and the end of the last.
    """
    found = []
    for begin, end, place in spans:
        # sequences that end behind the beginning and begin before the end
        first, stop = np.searchsorted(starts[1:], begin, "right"), np.searchsorted(starts[:-1], end, "left")
        for number in range(int(first), int(stop)):
            own, behind = max(begin, int(starts[number])), min(end, int(starts[number + 1]))
            if own < behind:
                rows = slice(place + own - begin, place + behind - begin)
                found.append(Run(number, own - int(starts[number]), behind - own, rows))
    return found


def needs(
    queries: Sequence[Sequence[Run]],
    keys: Sequence[Sequence[Span]],
    starts: Array,
    reach: Callable[[Run], tuple[int, float]],
) -> Array:
    """Return which ranks look at keys of which owners, shape (ranks, owners).

    Parameters
    ----------
    queries : sequence of sequences of Run
        Of each rank.
    keys : sequence of sequences of Span
        Of each rank.
    starts : ndarray of int, shape (sequences + 1,)
        Where keys of each sequence begin, and the end of the last.
    reach : callable
        Says of a run the first key of its sequence that any of its queries may look at, and an end of those.
    """
    spans = sorted((*span[:2], owner) for owner, own in enumerate(keys) for span in own if span.begin < span.end)
    begins, ends, owners = np.array(spans, np.int64).reshape(-1, 3).T
    found = np.zeros((len(queries), len(keys)), bool)
    for rank, runs in enumerate(queries):
        for run in runs:
            begin, end = reach(run)
            first, last = int(starts[run.sequence]), int(starts[run.sequence + 1])
            begin, end = first + begin, min(first + end, last)
            if begin < end:
                those = slice(np.searchsorted(ends, begin, "right"), np.searchsorted(begins, end, "left"))
                found[rank, owners[those]] = True
    return found


class Route:
    """Whose keys come to a rank, in which order, and from whom and to whom they go.

    The keys of an owner go around a ring, from it to the ranks behind it that look at them; others are left out.

    Attributes
    ----------
    owners : list of int
        Whose keys this rank has one after the other: its own, then those of who is nearest before it.
    """

    def __init__(self, needs: Array, rank: int) -> None:
        self.rank = rank
        self._stops = needs | np.eye(len(needs), dtype=bool)  # an owner is on the way of its keys
        found = np.flatnonzero(self._stops[rank]).tolist()
        place = found.index(rank) + 1
        self.owners = [*found[:place][::-1], *found[place:][::-1]]

    def neighbours(self, owner: int) -> tuple[int | None, int | None]:
        """Return who has the keys of an owner before this rank, None for its own, and after it, None for the last."""
        way = [None, *self.way(owner), None]
        place = way.index(self.rank)
        return way[place - 1], way[place + 1]

    def way(self, owner: int) -> list[int]:
        """Return who has the keys of an owner, one after the other: it first."""
        found = np.flatnonzero(self._stops[:, owner]).tolist()
        place = found.index(owner)
        return [*found[place:], *found[:place]]
