"""Links: a line for each weight, and the tokens at its ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from plot_cases import (
    assert_apart,
    assert_inside,
    colour_at,
    long_tokens,
    pixels,
    shown,
    softmax_like,
    summary_of,
)

from fastattn import plot
from fastattn.plot import colours

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws the plots, is not installed")
matplotlib.use("agg")
from matplotlib.colors import to_hex  # noqa: E402


def lines_of(ax: Any) -> dict[tuple[int, int, str], float]:
    """Return the opacity of each line by query, key and colour."""
    found = {}
    collection = ax.collections[0]
    for segment, colour in zip(collection.get_segments(), collection.get_colors(), strict=True):
        assert segment[:, 0].tolist() == [0, 1]
        query, key = np.round(segment[:, 1]).astype(int).tolist()
        found[query, key, to_hex(colour[:3])] = float(colour[3])
    assert len(found) == len(collection.get_segments())
    return found


class TestLinks:
    def test_a_line_for_each_weight_as_opaque_as_it_is_large(self) -> None:
        weights = softmax_like(5, 7)
        lines = lines_of(plot.links(weights, long_tokens(5), long_tokens(7)))
        assert lines == {
            (i, j, colours.HEAD_COLOURS[0]): pytest.approx(weight / weights.max())
            for (i, j), weight in np.ndenumerate(weights)
            if weight >= 0.01 * weights.max()
        }

    def test_vmax(self) -> None:
        lines = lines_of(plot.links([[0.2, 0.8]], vmax=0.4))
        assert lines == {(0, 0, colours.HEAD_COLOURS[0]): 0.5, (0, 1, colours.HEAD_COLOURS[0]): 1.0}

    def test_strong_lines_lie_on_top(self) -> None:
        collection = plot.links(softmax_like(3, 6, 6)).collections[0]
        assert (np.diff(collection.get_colors()[:, 3]) >= 0).all()

    def test_heads_have_colours_and_lie_side_by_side(self) -> None:
        weights = np.full((7, 3, 3), 1 / 3)
        ax = plot.links(weights)
        assert {colour for _, _, colour in lines_of(ax)} == set(colours.HEAD_COLOURS)
        texts = [text.get_text() for text in ax.get_legend().get_texts()]
        assert texts == [f"head {head}" for head in range(7)]
        named = plot.links(weights[:2], names=["3.1", "$5$"]).get_legend().get_texts()
        assert [text._preprocess_math(text.get_text()) for text in named] == [("3.1", False), ("$5$", False)]
        drawn = pixels(ax)
        heights = sorted(
            segment[0, 1] for segment in ax.collections[0].get_segments() if segment[0, 1] == segment[1, 1]
        )
        seen = {to_hex(colour_at(drawn, ax, 0.004, y) / 255) for y in heights}
        assert len(seen) >= 7
        assert_inside(ax)

    def test_of_many_heads_the_mean(self) -> None:
        weights = softmax_like(8, 4, 4)
        ax = plot.links(weights, query=2)
        mean = weights.mean(axis=0)[2]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["mean of 8 heads"]
        assert lines_of(ax) == {
            (2, j, colours.HEAD_COLOURS[0]): pytest.approx(mean[j] / mean.max())
            for j in range(4)
            if mean[j] >= 0.01 * mean.max()
        }

    def test_one_query(self) -> None:
        weights = softmax_like(2, 5, 5)
        assert {query for query, _, _ in lines_of(plot.links(weights, query=-2))} == {3}

    def test_nan_is_dotted(self) -> None:
        weights = softmax_like(3, 3)
        weights[1, 2] = np.nan
        ax = plot.links(weights)
        assert [segment[:, 1].tolist() for segment in ax.collections[1].get_segments()] == [[1, 2]]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["NaN"]
        assert plot.links(np.full((2, 2), np.nan)).collections[0].get_segments() == []

    @pytest.mark.parametrize("count", [1, 13, 300])
    def test_tokens_do_not_overlap(self, count: int) -> None:
        weights = np.eye(count)
        ax = plot.links(weights, long_tokens(count))
        (right,) = ax.child_axes
        for axis in (ax.yaxis, right.yaxis):
            labels = shown(axis)
            assert_apart(labels)
            assert len(labels) >= min(count, 60)
            assert labels[0].get_text() == "token0"
        assert_inside(ax)
        assert max(ax.figure.get_size_inches()) <= 14

    def test_tokens_are_at_the_ends_of_their_lines(self) -> None:
        ax = plot.links(np.eye(6)[:4], long_tokens(4), long_tokens(6))
        (right,) = ax.child_axes
        for axis, count in ((ax.yaxis, 4), (right.yaxis, 6)):
            labels = shown(axis)
            assert [label.get_text() for label in labels] == long_tokens(count)
            for place, label in enumerate(labels):
                box = label.get_window_extent()
                height = ax.transData.transform((0, place))[1]
                assert box.y0 <= height <= box.y1
        assert [label.get_text() for label in shown(ax.xaxis)] == ["queries", "keys"]

    def test_a_summary(self) -> None:
        weights = softmax_like(3, 8, 8)
        assert lines_of(plot.links(summary_of(weights, 8))) == pytest.approx(lines_of(plot.links(weights)))
        assert len(lines_of(plot.links(summary_of(weights, 1), head=0))) == 8
