"""Maps of weights, one or many: their pixels are compared with the weights, and labels find room."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from plot_cases import (
    WORDS,
    assert_apart,
    assert_inside,
    close_to,
    colour_at,
    darkest_near,
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
