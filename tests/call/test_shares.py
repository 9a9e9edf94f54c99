"""Shares of positions: they are all of them, causal ones are the same work in zigzag, and keys go to who needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastattn.call.positions import Whole
from fastattn.call.shares import LAYOUTS, Route, Run, Span, needs, runs_of, shares

layouts = pytest.mark.parametrize("layout", LAYOUTS)
WHOLE = {"window": None, "query_offset": None, "key_lengths": None, "block_mask": None, "sinks": None}


def positions(spans: list[Span]) -> list[int]:
    return [position for span in spans for position in range(span.begin, span.end)]


def whole(queries: int, keys: int, causal: Any, **options: Any) -> Whole:
    return Whole(np.empty((queries, 1)), keys, None, causal, {**WHOLE, **options})  # type: ignore[typeddict-item]


@layouts
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 5, 16, 97])
def test_every_position_has_one_owner(length: int, ranks: int, layout: str) -> None:
    found = shares(length, ranks, layout)
    assert len(found) == ranks
    assert sorted(position for spans in found for position in positions(spans)) == list(range(length))
    sizes = [len(positions(spans)) for spans in found]
    assert max(sizes) - min(sizes) <= (1 if layout == "contiguous" else 2)
    for spans in found:
        assert [span.place for span in spans] == [sum(s.end - s.begin for s in spans[:i]) for i in range(len(spans))]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_in_zigzag_causal_queries_see_as_many_keys_on_each_rank(ranks: int) -> None:
    length = 2 * ranks * 6
    seen = [sum(position + 1 for position in positions(spans)) for spans in shares(length, ranks, "zigzag")]
    assert seen == [length * (length + 1) // 2 // ranks] * ranks
    contiguous = [sum(position + 1 for position in positions(spans)) for spans in shares(length, ranks, "contiguous")]
    assert contiguous == sorted(set(contiguous))


def test_runs_are_spans_cut_where_sequences_begin() -> None:
    spans = [Span(3, 9, 0), Span(12, 20, 6)]
    starts = np.array([0, 5, 5, 8, 14, 20])
    assert runs_of(spans, starts) == [
        Run(0, 3, 2, slice(0, 2)),
        Run(2, 0, 3, slice(2, 5)),
        Run(3, 0, 1, slice(5, 6)),
        Run(3, 4, 2, slice(6, 8)),
        Run(4, 0, 6, slice(8, 14)),
    ]


@layouts
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"causal": True},
        {"causal": "bottom-right"},
        {"causal": True, "window": (6, 0)},
        {"causal": False, "window": (0, 9), "query_offset": -5},
        {"causal": True, "query_offset": 30, "key_lengths": np.array([25, 11])},
    ],
    ids=str,
)
def test_keys_are_needed_by_who_has_a_query_that_may_look_at_them(options: Any, ranks: int, layout: str) -> None:
    queries, keys = 40, 50
    call = whole(queries, keys, **options)
    cut = [shares(length, ranks, layout) for length in (queries, keys)]
    starts = [np.array([0, length]) for length in (queries, keys)]
    runs = [runs_of(spans, starts[0]) for spans in cut[0]]
    found = needs(runs, cut[1], starts[1], lambda run: call.reach_of(run.first, run.length))
    j = np.arange(keys)
    begin, end = zip(*(call.reach_of(row, 1) for row in range(queries)), strict=True)
    seen = (j >= np.array(begin)[:, None]) & (j < np.array(end)[:, None])
    wanted = [[seen[np.ix_(positions(a), positions(b))].any() for b in cut[1]] for a in cut[0]]
    np.testing.assert_array_equal(found, wanted)


def test_only_ranks_that_share_a_sequence_need_each_other() -> None:
    starts = np.array([0, 10, 30, 40])
    spans = shares(40, 4, "contiguous")
    found = needs([runs_of(own, starts) for own in spans], spans, starts, lambda run: (0, 100))
    np.testing.assert_array_equal(found, [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("seed", range(5))
def test_keys_go_from_their_owner_to_all_who_need_them_and_to_nobody_else(seed: int) -> None:
    ranks = 6
    needed = np.random.default_rng(seed).random((ranks, ranks)) < 0.5
    routes = [Route(needed, rank) for rank in range(ranks)]
    for owner in range(ranks):
        way = [owner]
        while (after := routes[way[-1]].neighbours(owner)[1]) is not None:
            assert routes[after].neighbours(owner)[0] == way[-1]
            way.append(after)
        assert routes[0].way(owner) == way
        assert {*way} == {owner, *np.flatnonzero(needed[:, owner])}
        distances = [(rank - owner) % ranks for rank in way]
        assert distances == sorted(distances)
        assert all((owner in route.owners) == (route.rank in way) for route in routes)
    for route in routes:
        assert route.owners[0] == route.rank
        distances = [(route.rank - owner) % ranks for owner in route.owners]
        assert distances == sorted(distances)


def test_the_reach_of_some_queries_is_part_of_that_of_all() -> None:
    reach = whole(40, 50, True, window=(6, 0), query_offset=3).reach_of
    assert reach(0, 40) == (0, 43)
    assert reach(10, 5) == (7, 18)
