"""How chunked arrays of a call are cut so that they go together: alike along the batch, heads, queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fastattn.call.blocks import Blocks
from fastattn.call.problem import Array, Problem, Shape
from fastattn.functions.kinds import KIND_KEYS, KIND_QUERIES

__all__ = ["Cut", "Grid", "Index", "Place", "grid_of", "sees"]


#: The number of a chunk along each axis of a grid: those of the batch, heads, queries and keys.
Index: TypeAlias = tuple[int, ...]

#: Axes of arguments, from the right, by their place at the right end of a grid's; None is that of features, uncut.
HEAD, QUERY, KEY = -3, -2, -1
TAILS: dict[str, tuple[int | None, ...]] = {
    **dict.fromkeys(("query", "grad_out", "out"), (HEAD, QUERY, None)),
    **dict.fromkeys(("key", "value"), (HEAD, KEY, None)),
    **dict.fromkeys(("bias", "keep"), (HEAD, QUERY, KEY)),
    **dict.fromkeys(("lse", "grad_lse"), (HEAD, QUERY)),
    **dict.fromkeys(("alibi_slopes", "sinks"), (HEAD,)),
    **dict.fromkeys(("query_offset", "key_lengths"), ()),
}
SHARED = ("key", "value")  # by groups of query heads


@dataclass(frozen=True)
class Place:
    """Where a piece of a call is: where it begins and ends along each axis of a grid, and the number of its first row.

    An object of its own, which no engine takes for a tuple of tasks.
    """

    spans: tuple[tuple[int, int], ...]
    row: int

    @property
    def shape(self) -> Shape:
        """How many rows, heads, queries and keys there are."""
        return tuple(end - begin for begin, end in self.spans)

    def of(self, name: str, array: Any) -> Any:
        """Return what an option, an array that has the axes of `name`, says of the piece; all else is as it is."""
        if not isinstance(array, np.ndarray):
            return array
        axes = axes_of(name, array.shape, len(self.spans))
        return array[tuple(slice(None) if axis is None else slice(*self.spans[axis]) for axis in axes)]


class Cut(NamedTuple):
    """How an array is cut along a grid.

    Attributes
    ----------
    axes : tuple of int or None
        Which axis of the grid each of its own is cut along; None: it is not cut.
    chunks : tuple of tuple of int
        The lengths of its chunks along each of its axes.
    """

    axes: tuple[int | None, ...]
    chunks: tuple[tuple[int, ...], ...]

    def at(self, index: Index) -> Index:
        """Return the number of the chunk that is at a place of the grid."""
        return tuple(0 if axis is None else index[axis] for axis in self.axes)


class Grid:
    """Where a call is cut.

    Attributes
    ----------
    chunks : tuple of tuple of int
        The lengths of chunks along each axis of the batch, query heads, queries and keys.
    group : int
        How many query heads share one of the keys.
    """

    def __init__(self, chunks: tuple[tuple[int, ...], ...], group: int):
        self.chunks, self.group = chunks, group
        self._begins = [tuple(accumulate(each[:-1], initial=0)) for each in chunks]

    def cut(self, name: str, shape: Shape) -> Cut:
        """Return how an argument of this name and shape is cut."""
        axes = axes_of(name, shape, len(self.chunks))
        chunks = []
        for length, axis in zip(shape, axes, strict=True):
            shared = self.group if name in SHARED and axis == len(self.chunks) + HEAD else 1
            chunks.append((length,) if axis is None else tuple(each // shared for each in self.chunks[axis]))
        return Cut(axes, tuple(chunks))

    def place(self, index: Index) -> Place:
        """Return where a piece is; one of no keys at all where the index has none of these."""
        begins = [self._begins[axis][number] for axis, number in enumerate(index)]
        spans = [(begin, begin + self.chunks[axis][index[axis]]) for axis, begin in enumerate(begins)]
        row = 0
        for begin, lengths in zip(begins, self.chunks[:HEAD], strict=False):
            row = row * sum(lengths) + begin
        return Place((*spans, (0, 0))[: len(self.chunks)], row)

    def rows(self) -> Iterator[Index]:
        """Yield the number of each chunk of queries, whose pieces are merged."""
        yield from product(*(range(len(each)) for each in self.chunks[:KEY]))

    def along_keys(self) -> range:
        """Return the numbers of chunks of keys."""
        return range(len(self.chunks[KEY]))


def axes_of(name: str, shape: Shape, axes: int) -> tuple[int | None, ...]:
    """Return which axis of a grid with so many each axis of an argument is cut along, None where it is not.

    What has no place among the arguments, such as an array that a function captures, is not cut at all.
    """
    if name not in TAILS:
        return (None,) * len(shape)
    tail = tuple(None if axis is None else axes + axis for axis in TAILS[name])
    own = (*range(axes + HEAD), *tail)[len(tail) + axes + HEAD - len(shape) :]
    return tuple(None if length == 1 else axis for length, axis in zip(shape, own, strict=True))


def grid_of(problem: Problem, chunks: Mapping[str, tuple[tuple[int, ...], ...]], numbered: bool) -> Grid:
    """Return the grid of a call: cut wherever query, key or value is, but for heads within a group.

    Parameters
    ----------
    problem : Problem
    chunks : mapping of str to tuple of tuple of int
        Those of query, key and value.
    numbered : bool
        Whether the rows of a piece have to be neighbours among those of the batch.
    """
    sizes = (*problem.batch, problem.heads, problem.queries, problem.keys)
    group = problem.group if problem.kv_heads > 1 else 1
    ends: list[set[int]] = [{0, size} for size in sizes]
    for name, given in chunks.items():
        for lengths, axis in zip(given, axes_of(name, tuple(map(sum, given)), len(sizes)), strict=True):
            if axis is not None:
                shared = group if name in SHARED and axis == len(sizes) + HEAD else 1
                ends[axis] |= {end * shared for end in accumulate(lengths)}
    ends[HEAD] = {end for end in ends[HEAD] if end % group == 0}
    if numbered:  # in all axes of the batch before the last one that is cut, each row is alone
        cut = [axis for axis in range(len(problem.batch)) if len(ends[axis]) > 2]
        for axis in range(max(cut, default=0)):
            ends[axis] |= set(range(sizes[axis]))
    return Grid(tuple(_lengths(sorted(each)) for each in ends), group)


def _lengths(ends: list[int]) -> tuple[int, ...]:
    return tuple(np.diff(ends).tolist()) or (0,)


def sees(place: Place, problem: Problem, heads: Array | None, blocks: Blocks | None) -> bool:
    """Whether any query of a piece may look at any of its keys, as causality, a window, lengths and blocks have it.

    Parameters
    ----------
    place : Place
    problem : Problem
        Of the whole.
    heads : ndarray of `fastattn.call.scores.HEAD`, or None
        Of the whole, as `fastattn.call.problem.Operands` has them.
    blocks : Blocks or None
    """
    if 0 in place.shape:
        return True
    return _in_an_interval(place, problem, heads) and (blocks is None or _in_a_block(place, problem, blocks))


def _in_an_interval(place: Place, problem: Problem, heads: Array | None) -> bool:
    scores = problem.scores
    if not scores.bounded:
        return True
    (first, last), (begin, end) = place.spans[QUERY:]
    own = {(scores.offset, problem.keys)}
    if heads is not None:
        rows = place.of("alibi_slopes", heads.reshape(*problem.batch, problem.heads))
        own = set(zip(rows["offset"].ravel().tolist(), rows["keys"].ravel().tolist(), strict=True))
    spans = (scores.span(first, last - 1, keys, offset) for offset, keys in own)
    return any(max(begin, seen.begin) < min(end, seen.end) for seen in spans)


def _in_a_block(place: Place, problem: Problem, blocks: Blocks) -> bool:
    kinds = blocks.kinds
    rows = problem.batch if kinds.shape[0] != 1 else (1,) * len(problem.batch)
    # a block is there with all of its queries and keys, where the piece has some of them
    sizes = zip(place.spans[QUERY:], (KIND_QUERIES, KIND_KEYS), strict=True)
    of_blocks = Place((*place.spans[:QUERY], *((begin // size, -(-end // size)) for (begin, end), size in sizes)), 0)
    return bool(of_blocks.of("keep", kinds.reshape(*rows, *kinds.shape[1:])).any())
