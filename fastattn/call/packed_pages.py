"""Packed queries, one sequence behind the other, each of which has its keys in pages: prompts and decoding rows.

A call is described whole, for what concerns it as a whole, and by sequences that have as many queries each.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.packed import BY_ROW, as_starts, by_row, has_rows, heads_first, slices
from fastattn.call.pages import Pages, describe_paged, room_for
from fastattn.call.problem import Array, Operands, Problem
from fastattn.call.score_options import FurtherOptions
from fastattn.call.types import Causal, Number

__all__ = ["PackedPages", "describe_packed_pages"]


@dataclass(frozen=True)
class PackedPages:
    """A call of packed queries, checked.

    Attributes
    ----------
    query : ndarray, shape (T, Hq, D)
    pages : Pages
        Of all sequences.
    problem : Problem
        One with all queries, as if they were one sequence. Its `out_shape` is the packed result's, (T, Hq, Dv).
    queries : list of slice
        Where the sequences lie.
    options : dict
        What was said of all of them, by the names of arguments of `describe_paged`.
    own : dict of str to ndarray
        What was said of each, with an axis of sequences in front.
    """

    query: Array
    pages: Pages
    problem: Problem
    queries: list[slice]
    options: dict[str, Any]
    own: dict[str, Array]

    def kinds(self) -> list[list[int]]:
        """Return the numbers of the sequences, those together that can have one plan, with room for about as many keys.

        Functions of the user's are told of each sequence alone.
        """
        found = defaultdict(list)
        for number, (queries, length) in enumerate(zip(self.queries, self.pages.lengths.tolist(), strict=True)):
            name = number if self.problem.scores.has_functions else -1
            found[queries.stop - queries.start, room_for(length), name].append(number)
        return list(found.values())

    def rows(self, numbers: list[int]) -> tuple[Problem, Operands]:
        """Return sequences with as many queries each, as a batch: its queries are those of the first of them.

        Keys and values are one page, as `describe_paged` has them.
        """
        first, pages = self.query[self.queries[numbers[0]]], self.pages
        query = np.broadcast_to(heads_first(first), (len(numbers), *heads_first(first).shape))
        of_rows = replace(pages, table=pages.table[:, :0][numbers], lengths=pages.lengths[numbers])
        own: dict[str, Any] = {name: rows[numbers] for name, rows in self.own.items()}
        return describe_paged(query, of_rows, **self.options, **own, first_batch=numbers[0])

    def gathered(self) -> list[Array]:
        """Return copies of the keys and of the values of all sequences, packed."""
        pages, numbers = self.pages, range(len(self.queries))
        found = []
        for array in (pages.key, pages.value):
            none = np.zeros((0, *array.shape[2:]), array.dtype)
            rows = [pages.row(number).gathered(array, int(pages.lengths[number]))[0] for number in numbers]
            found.append(np.concatenate([none, *map(heads_first, rows)]))
        return found


def describe_packed_pages(
    query: Array,
    pages: Pages,
    cu_seqlens_q: ArrayLike,
    dropout_p: Number,
    is_causal: Causal,
    scale: Number | None,
    further: FurtherOptions,
) -> PackedPages:
    """Work out what a call of packed queries computes.

    Raises
    ------
    ValueError, TypeError
        As `describe_paged`, and where sequences are not what lies on the axes.
    """
    starts = as_starts("cu_seqlens_q", cu_seqlens_q, "query", len(query))
    count = len(starts) - 1
    if len(pages.table) != count:
        raise ValueError(
            f"page_table: {len(pages.table)} rows; expected {count}, one for each sequence of cu_seqlens_q"
        )
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, **further}
    own = {name: by_row(name, options.pop(name), count) for name in BY_ROW if has_rows(name, options.get(name))}
    first = {name: rows[:1] for name, rows in own.items() if count}
    empty = replace(pages, table=np.zeros((1, 0), np.int64), lengths=np.zeros(1, np.int64))
    problem, _ = describe_paged(heads_first(query)[None], empty, **options | first)
    problem = replace(problem, out_shape=(len(query), problem.heads, problem.value_dim))
    return PackedPages(query, pages, problem, slices(starts), options, own)
