"""Plots: each is drawn, and its pixels and artists are compared with the weights."""

from __future__ import annotations

import copy
import html.parser
import io
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import processes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn import plot, reference
from fastattn.console import terminal
from fastattn.console.terminal import Style
from fastattn.plot import colours, tokens
from fastattn.plot.weights import as_weights

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws the plots, is not installed")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.colors import to_hex, to_rgb  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

WORDS = ["[CLS]", "the", "animal", "didn", "'", "t", "cross", "##ing", "costs", "$5", "and", "$6", "[SEP]"]


@pytest.fixture(autouse=True)
def close() -> Any:
    """Close all figures."""
    yield
    pyplot.close("all")


def softmax_like(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.2), size=shape[:-1])


def summary_of(weights: Any, k: int) -> Any:
    """Return what an AttentionSummary has to draw, by plain sorting."""
    order = np.argsort(-weights, axis=-1, kind="stable")[..., :k]
    top = np.take_along_axis(weights, order, -1)
    return SimpleNamespace(top_weights=top, top_indices=np.where(top > 0, order, -1), received=weights.sum(axis=-2))


def long_tokens(count: int) -> list[str]:
    return [f"token{place}" for place in range(count)]


def draw(ax: Any) -> None:
    """Draw the figure, unless it is drawn as it is."""
    if ax.figure.stale:
        ax.figure.canvas.draw()


def pixels(ax: Any) -> Any:
    """Return the pixels of the figure, the first row at the bottom, as matplotlib counts."""
    ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba())[::-1, :, :3]


def colour_at(drawn: Any, ax: Any, x: float, y: float) -> Any:
    column, row = ax.transData.transform((x, y))
    return drawn[int(row), int(column)].astype(int)


def darkest_near(drawn: Any, ax: Any, x: float, y: float) -> float:
    """Return the lightness of the darkest pixel at a place or beside it: where a field of one pixel may be."""
    column, row = (int(place) for place in ax.transData.transform((x, y)))
    near = drawn[row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3)
    return min(lightness(to_hex(pixel / 255)) for pixel in near)


def close_to(pixel: Any, colour: str, by: int = 4) -> bool:
    return bool(np.abs(pixel - np.round(255 * np.array(to_rgb(colour)))).max() <= by)


def shown(axis: Any) -> list[Any]:
    """Return the labels along an axis that are drawn."""
    draw(axis.axes)
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    labels = [label for tick in ticks for label in (tick.label1, tick.label2)]
    return [label for label in labels if label.get_visible() and label.get_text()]


def assert_apart(labels: list[Any]) -> None:
    """Labels along an axis do not overlap. Half a pixel is rounding."""
    boxes = [label.get_window_extent() for label in labels]
    for one, other in itertools.pairwise(boxes):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        down = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(across, down) <= 0.5


def assert_inside(ax: Any) -> None:
    """Everything is within the figure."""
    draw(ax)
    box = ax.get_tightbbox(ax.figure.canvas.get_renderer())
    assert box.x0 >= -1
    assert box.y0 >= -1
    assert box.x1 <= ax.figure.bbox.x1 + 1
    assert box.y1 <= ax.figure.bbox.y1 + 1


# -- colours -----------------------------------------------------------------------------------------------------------


def lightness(colour: str) -> float:
    """Return CIELAB's L* of an sRGB colour."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return float(116 * np.cbrt(luminance) - 16 if luminance > (6 / 29) ** 3 else luminance * 24389 / 27)


class TestColours:
    def test_lightness_falls_evenly(self) -> None:
        found = [lightness(colours.shade(fraction)) for fraction in np.linspace(0, 1, 65)]
        np.testing.assert_allclose(found, np.linspace(100, 16, 65), atol=1.5)
        assert (np.diff(found) < 0).all()

    def test_nan_is_no_colour_of_the_scale(self) -> None:
        nan = np.array(to_rgb(colours.shade(float("nan"))))
        scale = np.array([to_rgb(colours.shade(fraction)) for fraction in np.linspace(0, 1, 65)])
        assert np.abs(scale - nan).max(axis=1).min() > 0.3

    def test_what_is_written_on_a_shade_is_legible(self) -> None:
        for fraction in np.linspace(0, 1, 101):
            field = colours.shade(fraction)
            light, dark = sorted((lightness(field), lightness(colours.ink_on(field))), reverse=True)
            luminance = [((each + 16) / 116) ** 3 for each in (light, dark)]
            luminance[1] = 0.0 if dark == 0 else luminance[1]
            assert (luminance[0] + 0.05) / (luminance[1] + 0.05) >= 3.7

    def test_heads_differ(self) -> None:
        for one, other in itertools.combinations(colours.HEAD_COLOURS, 2):
            assert np.abs(np.subtract(to_rgb(one), to_rgb(other))).max() > 0.2


# -- weights -----------------------------------------------------------------------------------------------------------


class TestWeights:
    @given(
        shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        limits=st.tuples(st.integers(1, 10), st.integers(1, 10)),
        seed=st.integers(0, 99),
        nan=st.booleans(),
    )
    def test_a_field_is_the_largest_of_its_cells(self, shape: Any, limits: Any, seed: int, nan: bool) -> None:
        weights = softmax_like(*shape, seed=seed)
        if nan:
            weights[seed % shape[0]] = np.nan
        fields, height, width = as_weights(weights).pooled(*limits)
        assert fields.shape[0] <= limits[0]
        assert fields.shape[1] <= limits[1]
        for (row, column), field in np.ndenumerate(fields):
            top, bottom = (place * shape[0] // fields.shape[0] for place in (row, row + 1))
            left, right = (place * shape[1] // fields.shape[1] for place in (column, column + 1))
            np.testing.assert_array_equal(field, weights[top:bottom, left:right].max())
            assert height - 1 <= bottom - top <= height
            assert width - 1 <= right - left <= width
        summary = summary_of(weights, shape[1])
        np.testing.assert_array_equal(as_weights(summary).pooled(*limits)[0], fields)

    @given(keys=st.integers(1, 9), k=st.integers(0, 9), seed=st.integers(0, 99))
    def test_a_summary_is_the_matrix_without_the_rest(self, keys: int, k: int, seed: int) -> None:
        weights = softmax_like(3, 4, keys, seed=seed)
        weights[1, 2] = np.nan
        weights[0, 3, 0] = 0
        stack = as_weights(summary_of(weights, k))
        kept = np.zeros_like(weights)
        if k > 0:
            least = -np.sort(-weights, axis=-1)[..., min(k, keys) - 1, None]
            kept = np.where(weights >= least, weights, 0)
        kept[1, 2] = np.nan if k else 0
        for head in range(3):
            one = stack.at(head)
            np.testing.assert_array_equal([one.row(query) for query in range(4)], kept[head])
            rows, columns, found = one.pairs(0.0)
            dense = np.zeros((4, keys))
            dense[rows, columns] = found
            np.testing.assert_array_equal(dense, kept[head])
            np.testing.assert_allclose(one.totals(), weights[head].sum(axis=0), rtol=1e-15)
        mean = stack.mean()
        np.testing.assert_allclose([mean.row(query) for query in range(4)], kept.mean(axis=0), rtol=1e-14)

    def test_what_attention_summary_returns(self) -> None:
        x = np.random.default_rng(0).standard_normal((2, 6, 8))
        summary = reference.attention_summary(x, x, top_k=6)
        weights = reference.attention(x, x, x, return_weights=True)[1]
        for head, query in itertools.product(range(2), range(6)):
            np.testing.assert_allclose(as_weights(summary).at(head).row(query), weights[head, query], rtol=1e-12)

    def test_axes_of_length_one_need_no_index(self) -> None:
        """A batch of one is what most have: head=3 is head 3."""
        stack = as_weights(softmax_like(6, 1, 4, 3, 3))
        np.testing.assert_array_equal(stack.head((2, 3)).values, stack.values[2, 0, 3])
        np.testing.assert_array_equal(stack.head((2, 0, 3)).values, stack.values[2, 0, 3])
        np.testing.assert_array_equal(stack.head(2, rank=1).values, stack.values[2, 0])
        batch = as_weights(softmax_like(1, 4, 3, 3))
        for head in (0, 3, -1):
            np.testing.assert_array_equal(batch.head(head).values, batch.values[0, head])
            np.testing.assert_array_equal(batch.head(head, rank=1).values, batch.values[0, head])
            np.testing.assert_array_equal(batch.head((0, head)).values, batch.values[0, head])
        one = as_weights(softmax_like(1, 1, 3, 3))
        np.testing.assert_array_equal(one.head(0).values, one.values[0, 0])
        summary = as_weights(summary_of(softmax_like(1, 4, 3, 3), 2))
        np.testing.assert_array_equal(summary.head(2).received, summary.received[0, 2])


# -- tokens ------------------------------------------------------------------------------------------------------------


class TestTokens:
    @pytest.mark.parametrize(
        ("pieces", "text"),
        [
            (["un", "##believ", "##able", ",", "isn", "'", "t", "it", "?"], "unbelievable, isn't it?"),
            (["Hello", "Ġworld", "!", "Ġ(", "ok", ")"], "Hello world! (ok)"),
            (["▁New", "▁York", "er", "s"], "New Yorkers"),
            (["Once", " upon", " a", " time"], "Once upon a time"),
            (["see", "(", "below", ")", "."], "see (below)."),
            (["東", "京", "tower"], "東京 tower"),
            (["a", "\n", "b", "Ċ"], "a \\n b \\n"),
            (["<s>", "Hello", "Ġtoken", "ization", "</s>"], "<s> Hello tokenization </s>"),
            (["▁Hello", "▁world", "</s>"], "Hello world </s>"),
            (["<|im_start|>", "user", "Ċ", "Hi", "Ġthere"], "<|im_start|> user \\n Hi there"),
            (["▁anti", "dis", "establish", "ment"], "antidisestablishment"),
            # a few marks by chance make no tokenizer's list of words
            (["the", "cat", " sat", "on", "it"], "the cat sat on it"),
            (["The", "▁cat", "sat", "on"], "The cat sat on"),
            (["a", "good", "▁", "film"], "a good ␣ film"),
            (["un", "##do", " it", "now"], "undo it now"),
            (["##ing", "##"], "##ing ##"),
            (["", " ", "\x1b[2J"], "∅ ␣ [2J"),
        ],
    )
    def test_running_text(self, pieces: list[str], text: str) -> None:
        words = tokens.running_text(pieces)
        assert len(words) == len(pieces)
        assert "".join(gap + word for gap, word in words) == text

    def test_columns_of_tables_are_sequences(self) -> None:
        column = SimpleNamespace(tolist=lambda: ["a", "b"])
        assert tokens.as_tokens("keys", column, 2, "key") == tokens.as_tokens("keys", np.array(["a", "b"]), 2, "key")

    def test_labels_are_short_and_never_empty(self) -> None:
        assert [tokens.label(each) for each in ("", " ", "\n", "▁the", "Ġ")] == ["∅", "␣", "\\n", "the", "␣"]
        assert terminal.display_width(tokens.label("東" * 40)) <= tokens.LONGEST_LABEL


# -- heatmap -----------------------------------------------------------------------------------------------------------


class TestHeatmap:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_each_cell_has_the_colour_of_its_weight(self, dtype: Any) -> None:
        weights = softmax_like(7, 9).astype(dtype)
        ax = plot.heatmap(weights)
        drawn = pixels(ax)
        for (query, key), weight in np.ndenumerate(weights):
            pixel = colour_at(drawn, ax, key, query)
            assert close_to(pixel, colours.shade(float(weight) / float(weights.max())))
        darkest = min(np.ndindex(7, 9), key=lambda at: colour_at(drawn, ax, at[1], at[0]).sum())
        assert darkest == np.unravel_index(weights.argmax(), weights.shape)

    def test_the_scale_ends_at_vmax_and_says_so_if_there_is_more(self) -> None:
        weights = [[0.2, 0.8], [0.5, 0.5]]
        for vmax, extend in ((None, "neither"), (1.0, "neither"), (0.5, "max")):
            ax = plot.heatmap(weights, vmax=vmax)
            assert close_to(colour_at(pixels(ax), ax, 0, 0), colours.shade(0.2 / (vmax or 0.8)))
            (bar,) = ax.child_axes
            assert bar.get_ylim() == (0, vmax or 0.8)
            assert bar._colorbar.extend == extend
            assert bar.get_ylabel() == "weight"

    def test_nan_has_a_colour_and_a_legend(self) -> None:
        weights = softmax_like(4, 4)
        weights[2, 1] = np.nan
        ax = plot.heatmap(weights)
        drawn = pixels(ax)
        orange = [at for at in np.ndindex(4, 4) if close_to(colour_at(drawn, ax, at[1], at[0]), colours.NAN_COLOUR)]
        assert orange == [(2, 1)]
        assert [text.get_text() for text in ax.child_axes[0].get_legend().get_texts()] == ["NaN"]
        assert plot.heatmap(softmax_like(4, 4)).child_axes[0].get_legend() is None

    def test_all_zero_and_all_nan(self) -> None:
        for value, colour in ((0.0, "#ffffff"), (np.nan, colours.NAN_COLOUR)):
            ax = plot.heatmap(np.full((3, 3), value))
            assert close_to(colour_at(pixels(ax), ax, 1, 1), colour)
            assert ax.child_axes[0].get_ylim() == (0, 1)

    def test_a_colour_map_of_matplotlib(self) -> None:
        for cmap in ("cividis", matplotlib.colormaps["cividis"]):
            ax = plot.heatmap([[0.0, 1.0]], cmap=cmap, colorbar=False)
            drawn = pixels(ax)
            for key, weight in enumerate((0.0, 1.0)):
                assert close_to(colour_at(drawn, ax, key, 0), to_hex(matplotlib.colormaps["cividis"](weight)))
            assert ax.child_axes == []

    def test_tokens(self) -> None:
        ax = plot.heatmap(softmax_like(13, 13), WORDS)
        for axis in (ax.xaxis, ax.yaxis):
            assert [label.get_text().replace("\\$", "$") for label in shown(axis)] == WORDS
        ax = plot.heatmap(softmax_like(2, 3), ["le", "chat"], ["the", "cat", "."])
        assert [label.get_text() for label in shown(ax.xaxis)] == ["the", "cat", "."]
        assert [label.get_text() for label in shown(ax.yaxis)] == ["le", "chat"]
        ax = plot.heatmap(softmax_like(2, 3), ["le", "chat"])
        assert [label.get_text() for label in shown(ax.xaxis)] == ["0", "1", "2"]

    def test_dollar_signs_are_drawn_as_they_are(self) -> None:
        """A formula would be set in italics without the signs, and so be narrower."""
        ax = plot.heatmap([[1.0, 0.5]], ["q"], ["$ab$", "x"])
        label = shown(ax.xaxis)[0]
        assert label._preprocess_math(label.get_text()) == ("$ab$", False)

    def test_glyphs_that_no_font_has_become_boxes_without_a_warning(self) -> None:
        ax = plot.heatmap(softmax_like(3, 3), ["a\u0378b", "c\U000e0101d", "e\ue123"])
        assert [label.get_text() for label in shown(ax.yaxis)] == ["a□b", "cd", "e□"]

    @pytest.mark.parametrize("count", [1, 2, 17, 60, 1000])
    def test_labels_do_not_overlap_and_all_is_inside(self, count: int) -> None:
        ax = plot.heatmap(np.eye(count), long_tokens(count))
        for axis in (ax.xaxis, ax.yaxis):
            labels = shown(axis)
            assert_apart(labels)
            assert len(labels) >= min(count, 20)
            assert min(label.get_fontsize() for label in labels) >= 6
        assert_inside(ax)
        assert max(ax.figure.get_size_inches()) <= 10

    @pytest.mark.parametrize("shape", [(1, 300), (5, 60), (2000, 30)])
    def test_slender_maps(self, shape: tuple[int, int]) -> None:
        ax = plot.heatmap(np.ones(shape), long_tokens(shape[0]), long_tokens(shape[1]))
        assert_apart(shown(ax.xaxis))
        assert_apart(shown(ax.yaxis))
        assert_inside(ax)
        assert max(ax.figure.get_size_inches()) <= 10

    def test_zooming_in_brings_labels_back(self) -> None:
        ax = plot.heatmap(np.eye(500), long_tokens(500))
        assert "token101" not in [label.get_text() for label in shown(ax.xaxis)]
        ax.set(xlim=(99.5, 109.5), ylim=(109.5, 99.5))
        assert [label.get_text() for label in shown(ax.xaxis)] == [f"token{place}" for place in range(100, 110)]
        drawn = pixels(ax)
        area = ax.get_window_extent()
        assert (drawn[: int(area.y0) - 1] == 255).all()  # nothing is drawn below
        assert close_to(colour_at(drawn, ax, 105, 105), colours.shade(1))

    def test_a_title_finds_its_place(self) -> None:
        ax = plot.heatmap(softmax_like(13, 13), WORDS)
        title = ax.set_title("What it looks at")
        assert_inside(ax)
        boxes = [label.get_window_extent() for label in shown(ax.xaxis)]
        assert title.get_window_extent().y0 >= max(box.y1 for box in boxes)

    def test_a_single_large_weight_of_a_long_map_is_seen(self) -> None:
        weights = np.zeros((1500, 3000), np.float32)
        weights[1001, 2002] = 1
        ax = plot.heatmap(weights)
        drawn = pixels(ax)
        assert drawn.shape[0] < 1500
        assert darkest_near(drawn, ax, 2002, 1001) < 20
        assert close_to(colour_at(drawn, ax, 2100, 1001), "#ffffff")
        assert "largest of 6 × 6 cells" in ax.child_axes[0].get_ylabel()

    def test_a_summary(self) -> None:
        weights = softmax_like(2, 3, 20, 20)
        ax = plot.heatmap(summary_of(weights, 20), long_tokens(20), head=(1, 2))
        full = plot.heatmap(weights[1, 2], long_tokens(20))
        np.testing.assert_array_equal(pixels(ax)[:, :300], pixels(full)[:, :300])
        ax = plot.heatmap(summary_of(weights, 2), head=(1, 2))
        image = np.asarray(ax.images[0].get_array())
        assert (np.count_nonzero(image, axis=1) == 2).all()
        np.testing.assert_array_equal(image.max(axis=1), weights[1, 2].max(axis=1))
        assert ax.child_axes[0].get_ylabel() == "weight, the 2 largest of each query"

    def test_a_summary_of_a_long_text_is_cheap(self) -> None:
        length = 32768
        keys = np.maximum(np.arange(length)[:, None] - np.arange(4), -1)
        summary = SimpleNamespace(
            top_weights=np.where(keys >= 0, np.float32([0.6, 0.2, 0.1, 0.1]), 0),
            top_indices=keys,
            received=np.ones(length),
        )
        ax = plot.heatmap(summary)
        drawn = pixels(ax)
        assert close_to(colour_at(drawn, ax, length * 0.25, length * 0.75), "#ffffff")
        assert darkest_near(drawn, ax, length * 0.5, length * 0.5) < 20


# -- heads -------------------------------------------------------------------------------------------------------------


class TestHeads:
    def test_each_map_is_where_its_layer_and_head_are(self) -> None:
        weights = np.zeros((3, 4, 5, 5))
        for layer, head in np.ndindex(3, 4):
            weights[layer, head] = (layer * 4 + head) / 11
        for given_weights in (weights, list(weights), [layer[None] for layer in weights], weights[:, None]):
            ax = plot.heads(given_weights)
            drawn = pixels(ax)
            for layer, head in np.ndindex(3, 4):
                assert close_to(colour_at(drawn, ax, head, layer), colours.shade((layer * 4 + head) / 11))
            assert close_to(colour_at(drawn, ax, 0.5, 0.5), "#ffffff")  # between them
            assert (ax.get_xlabel(), ax.get_ylabel()) == ("head", "layer")
            assert [label.get_text() for label in shown(ax.xaxis)] == list("0123")
            assert [label.get_text() for label in shown(ax.yaxis)] == list("012")
            assert_inside(ax)

    def test_one_layer_has_no_number(self) -> None:
        ax = plot.heads(softmax_like(12, 8, 8))
        assert len(ax.images) == 12
        assert ax.get_ylabel() == ""
        assert shown(ax.yaxis) == []

    def test_layers_may_differ(self) -> None:
        ax = plot.heads([softmax_like(2, 4, 6), softmax_like(3, 8, 5), summary_of(softmax_like(1, 7, 7), 2)])
        assert [image.get_array().shape for image in ax.images] == [(4, 6)] * 2 + [(8, 5)] * 3 + [(7, 7)]

    def test_rows_run_downwards(self) -> None:
        weights = np.zeros((1, 1, 10, 10))
        weights[..., 9] = 1  # the last key
        weights[..., 0, :] = 0.5  # the first query
        ax = plot.heads(weights)
        drawn = pixels(ax)
        assert close_to(colour_at(drawn, ax, 0.4, 0.2), colours.shade(1))
        assert close_to(colour_at(drawn, ax, 0, -0.4), colours.shade(0.5))
        assert close_to(colour_at(drawn, ax, -0.4, 0.2), colours.shade(0))

    def test_long_maps_keep_single_weights(self) -> None:
        weights = np.zeros((2, 12, 1000, 1000), np.float32)
        weights[1, 7, 500, 500] = 1
        ax = plot.heads(weights)
        drawn = pixels(ax)
        assert max(max(image.get_array().shape) for image in ax.images) <= 50
        assert darkest_near(drawn, ax, 7, 1) < 20
        assert darkest_near(drawn, ax, 6, 1) > 99
        assert "largest of" in ax.child_axes[0].get_ylabel()

    def test_a_summary(self) -> None:
        weights = softmax_like(2, 3, 9, 9)
        full, short = plot.heads(weights), plot.heads(summary_of(weights, 9))
        for one, other in zip(full.images, short.images, strict=True):
            np.testing.assert_array_equal(one.get_array(), other.get_array())


# -- links -------------------------------------------------------------------------------------------------------------


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


# -- text --------------------------------------------------------------------------------------------------------------


class _Spans(html.parser.HTMLParser):
    """Text and style of each span, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.spans, self.depth = "", [], 0  # type: ignore[var-annotated]
        self.feed(page)
        assert self.depth == 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.depth += 1
        assert tag in ("div", "span")
        if tag == "span":
            self.spans.append([dict(attrs), ""])

    def handle_endtag(self, tag: str) -> None:
        self.depth -= 1

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.spans:
            self.spans[-1][1] += data


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class TestText:
    def test_which_weights(self) -> None:
        weights = softmax_like(2, 4, 4)
        names = ["a", "b", "c", "d"]

        def shown_weights(*args: Any, **kwargs: Any) -> list[float]:
            return [weight for _, _, weight in plot.text(*args, names, **kwargs).words]

        assert shown_weights(weights[0, 1]) == weights[0, 1].tolist()
        assert shown_weights(weights, head=1, query=-1) == weights[1, 3].tolist()
        assert shown_weights(weights, head=0) == pytest.approx(weights[0].sum(axis=0))
        assert shown_weights(summary_of(weights, 1), head=0) == pytest.approx(weights[0].sum(axis=0))
        assert shown_weights(summary_of(weights, 4), head=1, query=2) == weights[1, 2].tolist()
        assert plot.text(weights[0], names, query=1).about == "weight, from query 1, “b”"
        assert plot.text(summary_of(weights[:, :3], 2), names, head=0, query=1).about == (
            "weight, the 2 largest of each query, from query 1"
        )
        assert plot.text(weights[0], names).about == "weight received from 4 queries"

    def test_html_is_escaped_and_has_the_colours(self) -> None:
        names = ["<script>", "&amp;", '"x"', "##'y", "plain"]
        weights = [0.1, 0.2, 0.3, 0.4, float("nan")]
        page = _Spans(plot.text(weights, names)._repr_html_())
        assert page.text.startswith('<script> &amp; "x"\'y plain')
        for (attributes, _), weight in zip(page.spans, weights, strict=False):
            assert f"background:{colours.shade(weight / 0.4)};" in attributes["style"]
            assert attributes["title"] == f"{weight:.4g}"

    @pytest.mark.parametrize(
        ("stream", "environ", "coloured"),
        [(_Terminal, {}, True), (_Terminal, {"NO_COLOR": "1"}, False), (io.StringIO, {}, False)],
    )
    def test_colours_are_for_terminals_and_not_under_no_color(
        self, stream: Any, environ: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdout", stream())
        printed = str(plot.text([0.7, 0.3], ["animal", "street"]))
        assert ("\x1b[" in printed) is coloured
        assert ("animal(.70)" in printed) is not coloured

    def test_small_weights_are_shaded_relative_to_the_largest(self) -> None:
        shaded = plot.text([0.004, 0.002, 0.0001], ["one", "two", "three"])
        first, _, about = shaded.lines(Style(colour=False, width=60))
        assert first == "one(.004) two(.002) three"
        assert about == "weight"
        coloured = shaded.lines(Style(colour=True, width=60))
        strongest = Style(colour=True).shade(1.0, "one")
        assert coloured[0].startswith(strongest)
        assert coloured[0].endswith(" three")
        assert ".0002" in coloured[-1]

    def test_words_stay_whole_in_a_terminal(self) -> None:
        names = ["aaaa", "bbbb", "##cc", "##dd", "e"]
        lines = plot.text([0.0] * 5, names).lines(Style(width=12))
        assert lines[:3] == ["aaaa", "bbbbccdd e", ""]
        lines = plot.text([0.0] * 4, ["abcdef", "##ghijkl", "##mnopqr", "z"]).lines(Style(width=12))
        assert lines[:3] == ["abcdefghijkl", "mnopqr z", ""]

    def test_nothing_is_wider_than_the_terminal(self) -> None:
        names = [word for place in range(40) for word in (f"word{place}", "##piece", ",")]
        for width in (24, 40, 80):
            for line in plot.text(softmax_like(120), names).lines(Style(width=width)):
                assert terminal.display_width(line) <= width

    @pytest.mark.parametrize("given_axes", [False, True])
    def test_each_word_is_on_its_field(self, given_axes: bool) -> None:
        names = [word for place in range(30) for word in (f"word{place}", "##piece", ",")]
        weights = softmax_like(90)
        if given_axes:
            ax = pyplot.figure(figsize=(5, 3)).add_subplot()
            assert plot.text(weights, names, ax=ax) is ax
        else:
            ax = plot.text(weights, names).draw()
        ax.figure.canvas.draw()
        shaded = plot.text(weights, names)
        texts = [text for text in ax.texts if text.get_text()][:90]
        fields = [patch for patch in ax.patches if isinstance(patch, Rectangle)][:90]
        area = ax.get_window_extent()
        rows = set()
        for (_, word, weight), text, field in zip(shaded.words, texts, fields, strict=True):
            assert text.get_text() == word
            assert to_hex(field.get_facecolor()) == colours.shade(weight / shaded.vmax)
            box, ground = text.get_window_extent(), field.get_window_extent()
            assert ground.x0 - 1 <= box.x0 <= box.x1 <= ground.x1 + 1
            assert ground.y0 - 1 <= box.y0 <= box.y1 <= ground.y1 + 1
            assert area.x0 - 1 <= ground.x0 <= ground.x1 <= area.x1 + 1
            assert area.y0 - 1 <= ground.y0 <= ground.y1 <= area.y1 + 1
            rows.add(round(ground.y0))
        assert len(rows) > 2
        boxes = [field.get_window_extent() for field in fields]
        for one, other in itertools.combinations(boxes, 2):
            across, down = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(across, down) <= 0.01
        assert_inside(ax)

    def test_pieces_of_a_word_stay_together(self) -> None:
        names = [word for place in range(60) for word in (f"w{place}", "##abc", "##defg")]
        ax = plot.text(softmax_like(180), names).draw()
        boxes = [patch.get_window_extent() for patch in ax.patches][:180]
        for word in range(60):
            assert len({round(box.y0, 3) for box in boxes[3 * word : 3 * word + 3]}) == 1

    def test_the_largest_weight_is_the_darkest_word(self) -> None:
        ax = plot.text([0.1, 0.9, 0.0], ["one", "$two$", "three"]).draw()
        drawn = pixels(ax)
        for patch, weight in zip(ax.patches, (0.1, 0.9, 0.0), strict=False):
            box = patch.get_window_extent()
            corner = drawn[int(box.y0) + 1, int(box.x0) + 1].astype(int)
            assert close_to(corner, colours.shade(weight / 0.9))
        assert [text.get_text() for text in ax.texts][:3] == ["one", "$two$", "three"]

    def test_repr(self) -> None:
        assert repr(plot.text([0.5, 0.25], ["a", "b"])) == "ShadedText(2 tokens, weight, vmax=0.5)"


# -- what all have in common -------------------------------------------------------------------------------------------

SQUARE = softmax_like(4, 4)
CALLS = {
    "heatmap": lambda ax: plot.heatmap(SQUARE, list("abcd"), ax=ax),
    "links": lambda ax: plot.links(SQUARE, list("abcd"), ax=ax),
    "heads": lambda ax: plot.heads(SQUARE, ax=ax),
    "text": lambda ax: plot.text(SQUARE, list("abcd"), ax=ax) if ax else plot.text(SQUARE, list("abcd")).draw(),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_axes_that_are_given_are_drawn_on(call: Any) -> None:
    figure, axes = pyplot.subplots(1, 2, layout="constrained")
    size = figure.get_size_inches().tolist()
    assert call(axes[0]) is axes[0]
    assert pyplot.get_fignums() == [figure.number]
    assert pyplot.gca() is axes[1]
    assert figure.get_size_inches().tolist() == size
    assert_apart(shown(axes[0].yaxis))
    assert call(None).figure is not figure


@every_call
def test_figures_without_pyplot(call: Any) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3))
    ax = figure.subplots()
    call(ax)
    for kind in ("png", "svg", "pdf"):
        figure.savefig(io.BytesIO(), format=kind)
    assert pyplot.get_fignums() == []


@every_call
def test_settings_and_windows_are_left_alone(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyplot, "show", lambda *_, **__: pytest.fail("a window was opened"))
    before = copy.deepcopy(dict(matplotlib.rcParams))
    call(None)
    assert dict(matplotlib.rcParams) == before


@every_call
def test_settings_of_the_user_do_no_harm(call: Any) -> None:
    with matplotlib.rc_context(
        {"image.origin": "lower", "figure.constrained_layout.use": True, "font.family": "serif"}
    ):
        assert_inside(call(None))


def test_inputs_are_not_written_to() -> None:
    weights = softmax_like(2, 3, 3)
    weights.flags.writeable = False
    plot.heatmap(weights, head=0)
    plot.links(weights)
    plot.heads(weights)
    plot.text(weights, ["a", "b", "c"], head=1).draw()


@pytest.mark.parametrize("function", [plot.heatmap, plot.links, plot.heads])
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([0.5, 0.5], ValueError, r"^weights: shape \(2,\); expected \(queries, keys\)"),
        ([[0.5, -0.1]], ValueError, "^weights: has -0.1; expected weights, finite and not negative"),
        ([[0.5, np.inf]], ValueError, "^weights: has inf"),
        ([[1j]], TypeError, "^weights: dtype complex128; expected real numbers"),
        ([["a"]], TypeError, "^weights: dtype <U1"),
        (np.zeros((0, 3)), ValueError, "0 queries and 3 keys; expected at least one of each"),
        (np.zeros((2, 0)), ValueError, "2 queries and 0 keys"),
        (
            np.zeros((2, 2, 2, 2, 2)),
            ValueError,
            r"stack of shape \(2, 2, 2\) of maps of 2 queries and 2 keys; expected",
        ),
        (
            SimpleNamespace(top_weights=np.ones((2, 1)), top_indices=np.ones((2, 2), int), received=np.ones(2)),
            ValueError,
            r"top_weights of shape \(2, 1\) and top_indices of shape \(2, 2\)",
        ),
        (
            SimpleNamespace(top_weights=np.ones((2, 1)), top_indices=np.full((2, 1), 5), received=np.ones(2)),
            ValueError,
            "^weights.top_indices: from 5 to 5; expected indices of 2 keys, or -1",
        ),
        (
            SimpleNamespace(top_weights=np.ones((3, 2, 1)), top_indices=np.zeros((3, 2, 1), int), received=np.ones(2)),
            ValueError,
            r"received of shape \(2,\); expected \(3, 'keys'\)",
        ),
        (
            SimpleNamespace(top_weights=np.ones((2, 1)), top_indices=np.ones((2, 1)), received=np.ones(2)),
            TypeError,
            "^weights.top_indices: dtype float64; expected integers",
        ),
    ],
)
def test_bad_weights(function: Any, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(weights)
    assert pyplot.get_fignums() == []


STACK = softmax_like(2, 3, 3)
BATCH = softmax_like(2, 5, 3, 3)  # and heads


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot.heatmap(STACK), ValueError, r"stack of shape \(2,\).*expected one head, .*head="),
        (lambda: plot.links(STACK[None].repeat(2, 0)), ValueError, r"stack of shape \(2, 2\).*expected heads"),
        (lambda: plot.heatmap(STACK), ValueError, "choose with head=0$"),
        (lambda: plot.heatmap(BATCH), ValueError, r"choose with head=\(0, 0\)$"),
        (lambda: plot.heatmap(BATCH, head=0), ValueError, r"^head: 0 for the axes \(2, 5\).* such as head=\(0, 0\)$"),
        (lambda: plot.text(BATCH, ["a", "b", "c"], head=1), ValueError, r"^head: 1 for .* such as head=\(0, 0\)$"),
        (lambda: plot.links(BATCH), ValueError, r"expected heads, \(H, Lq, Lk\): choose with head=0$"),
        (lambda: plot.links(BATCH[None].repeat(3, 0), head=0), ValueError, r"^head: 0 for .* such as head=\(0, 0\)$"),
        (lambda: plot.heatmap(BATCH[:1], head=5), ValueError, r"^head: 5; expected an index of the axes \(5,\)"),
        (
            lambda: plot.heads(BATCH[None].repeat(3, 0)),
            ValueError,
            r"choose with weights\[:, 0\], the first of",
        ),
        (
            lambda: plot.heads([BATCH] * 3),
            ValueError,
            r"^layer 0 .* choose with \[layer\[0\] for layer in",
        ),
        (lambda: plot.heatmap(STACK, head=2), ValueError, r"^head: 2; expected an index of the axes \(2,\)"),
        (lambda: plot.heatmap(STACK, head=(0, 0)), ValueError, r"^head: \(0, 0\)"),
        (lambda: plot.heatmap(STACK, head=0.5), TypeError, "^head: 0.5 of type float"),
        (
            lambda: plot.heatmap(SQUARE, "abcd"),
            TypeError,
            "^queries: 'abcd' of type str; expected a sequence of 4 strings",
        ),
        (lambda: plot.heatmap(SQUARE, ["a"]), ValueError, "^queries: 1 strings; expected 4, one for each query"),
        (lambda: plot.heatmap(SQUARE, None, list("abc")), ValueError, "^keys: 3 strings; expected 4, one for each key"),
        (lambda: plot.links(STACK, names=["a"]), ValueError, "^names: 1 strings; expected 2, one for each head"),
        (lambda: plot.links(SQUARE, [1, 2, 3, 4]), TypeError, "^queries: 1 of type int at 0"),
        (lambda: plot.links(SQUARE, query=4), ValueError, "^query: 4; expected the number of one of 4 queries"),
        (lambda: plot.links(SQUARE, query=True), TypeError, "^query: True of type bool"),
        (lambda: plot.heatmap(SQUARE, vmax=0), ValueError, "^vmax: 0.0; expected a finite number above 0"),
        (lambda: plot.heads(SQUARE, vmax=np.nan), ValueError, "^vmax: nan"),
        (lambda: plot.links(SQUARE, vmax="1"), TypeError, "^vmax: '1' of type str"),
        (lambda: plot.heatmap(SQUARE, cmap="nope"), ValueError, "^cmap: 'nope'"),
        (lambda: plot.heads(SQUARE, cmap=3), TypeError, "^cmap: 3 of type int"),
        (lambda: plot.heatmap(SQUARE, colorbar=2), TypeError, "^colorbar: "),
        (lambda: plot.heatmap(SQUARE, ax=3), TypeError, "^ax: 3 of type int; expected None or a matplotlib Axes"),
        (lambda: plot.text(SQUARE, list("abcd"), ax=3), TypeError, "^ax: 3"),
        (lambda: plot.heads([SQUARE, -SQUARE]), ValueError, "^layer 1 of weights: has -"),
        (lambda: plot.text(SQUARE, None), TypeError, "^tokens: None; expected a sequence of 4 strings"),
        (lambda: plot.text(SQUARE, ["a"]), ValueError, "^tokens: 1 strings; expected 4"),
        (
            lambda: plot.text(SQUARE[0], list("abcd"), query=0),
            ValueError,
            r"^query: given with weights of shape \(4,\)",
        ),
        (lambda: plot.text(SQUARE[0], list("abcd"), head=0), ValueError, r"^head: given with weights of shape \(4,\)"),
        (lambda: plot.text(0.5, ["a"]), ValueError, r"^weights: shape \(\)"),
        (lambda: plot.text([-1.0], ["a"]), ValueError, "^weights: has -1"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert pyplot.get_fignums() == []


def test_without_matplotlib() -> None:
    """Text is printed without it, and everything else says in one clear error what to install."""
    code = """
import sys
sys.modules["matplotlib"] = None
from fastattn import plot
print(plot.text([0.9], ["cat"])._repr_html_().count("cat"))
for call in (plot.heatmap, plot.links, plot.heads, lambda _: plot.text([0.9], ["cat"]).draw()):
    try:
        call([[1.0]])
    except ImportError as error:
        print(error)
"""
    message = 'fastattn.plot draws with matplotlib, which is not installed here: pip install "fastattn[plot]"\n'
    assert processes.run(code) == "1\n" + 4 * message


def test_importing_it_loads_no_matplotlib() -> None:
    assert processes.run("import sys\nfrom fastattn import plot\nprint('matplotlib' in sys.modules)") == "False\n"
