"""Pictures of block masks: the colour of each block, what is said of them, and which head is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from plot_cases import assert_apart, assert_inside, close_to, colour_at, pixels, shown

from fastattn import BlockMask, plot
from fastattn.plot.blocks import COLOURS

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws the plots, is not installed")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402


def mask_of(kinds: Any, queries: int, keys: int) -> BlockMask:
    """Return a mask with blocks of these kinds: of a partial one, the first key is seen."""
    keep = np.zeros((*np.shape(kinds)[:-2], 64 * np.shape(kinds)[-2], 64 * np.shape(kinds)[-1]), bool)
    for place in np.ndindex(np.shape(kinds)):
        *lead, row, column = place
        seen = {0: 0, 1: 1, 2: 64}[np.asarray(kinds)[place]]
        keep[(*lead, slice(64 * row, 64 * row + 64), slice(64 * column, 64 * column + seen))] = True
    return BlockMask.from_array(keep[..., :queries, :keys])


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_each_block_has_the_colour_of_its_kind() -> None:
    kinds = np.random.default_rng(0).integers(0, 3, (4, 6))
    ax = plot.blocks(mask_of(kinds, 256, 384))
    drawn = pixels(ax)
    for (row, column), kind in np.ndenumerate(kinds):
        for shift in (8, 32, 56):
            pixel = colour_at(drawn, ax, 64 * column + shift, 64 * row + shift)
            assert close_to(pixel, COLOURS[kind])
    assert texts(ax) == [
        f"{name} {100 * (kinds == kind).mean():.0f}%" for kind, name in ((2, "full"), (1, "partial"), (0, "empty"))
    ]


def test_lengths_that_end_within_a_block() -> None:
    ax = plot.blocks(mask_of([[2, 0], [1, 2]], 70, 100))
    assert ax.get_xlim() == (-0.5, 99.5)
    assert ax.get_ylim() == (69.5, -0.5)
    drawn = pixels(ax)
    assert close_to(colour_at(drawn, ax, 95, 67), COLOURS[2])
    assert close_to(colour_at(drawn, ax, 95, 60), COLOURS[0])


def test_many_blocks_are_fields_as_dark_as_the_fullest() -> None:
    kinds = np.zeros((2, 2000), int)
    kinds[0, 1000], kinds[1, 300] = 2, 1
    ax = plot.blocks(mask_of(kinds, 128, 128000))
    (image,) = ax.images
    fields = image.get_array()
    assert fields.shape[1] <= 72 * 7
    assert [fields[row].max() for row in (0, 1)] == [2, 1]


def test_which_head_of_which_row() -> None:
    kinds = np.array([[[[0]], [[1]], [[2]]], [[[2]], [[0]], [[1]]]])
    several = mask_of(kinds, 64, 64)
    for (row, head), kind in np.ndenumerate(kinds[..., 0, 0]):
        ax = plot.blocks(several, head=(row, head))
        assert close_to(colour_at(pixels(ax), ax, 30, 30), COLOURS[kind])
    ax = plot.blocks(mask_of(kinds[0], 64, 64), head=2)
    assert close_to(colour_at(pixels(ax), ax, 30, 30), COLOURS[2])
    with pytest.raises(ValueError, match=r"block_mask: shape \(2, 3, 64, 64\).*head=\(0, 0\)"):
        plot.blocks(several)
    with pytest.raises(ValueError, match=r"block_mask: shape \(1, 3, 64, 64\).*head=0"):
        plot.blocks(mask_of(kinds[0], 64, 64))
    with pytest.raises(ValueError, match=r"head: \(0, 3\)"):
        plot.blocks(several, head=(0, 3))


@pytest.mark.parametrize("layout", [None, "constrained", "compressed", "tight"])
def test_side_by_side_nothing_overlaps(layout: Any) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(7, 3), layout=layout)
    for ax in axes:
        assert plot.blocks(mask_of(np.eye(8, dtype=int) + 1, 512, 512), ax=ax) is ax
    figure.canvas.draw()
    left, right = (ax.get_tightbbox() for ax in axes)
    assert left.x1 <= right.x0 + 0.5


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (1, 4000), (4000, 1), (5000, 5000)])
def test_labels_are_apart_and_inside(shape: tuple[int, int]) -> None:
    ax = plot.blocks(BlockMask.from_intervals(np.zeros(shape[0], int), np.arange(shape[0]), shape[1]))
    for axis in (ax.xaxis, ax.yaxis):
        assert_apart(shown(axis))
    assert_inside(ax)


def test_without_a_legend() -> None:
    assert plot.blocks(mask_of([[1]], 64, 64), legend=False).get_legend() is None


def test_refused() -> None:
    with pytest.raises(TypeError, match="block_mask: .*; expected a fastattn.BlockMask"):
        plot.blocks(np.ones((2, 2), bool))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"block_mask: shape \(1, 1, 0, 3\); expected at least one query"):
        plot.blocks(BlockMask.from_array(np.ones((0, 3), bool)))
    with pytest.raises(TypeError, match="legend"):
        plot.blocks(mask_of([[1]], 64, 64), legend=1)  # type: ignore[arg-type]
