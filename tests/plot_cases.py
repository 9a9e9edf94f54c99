"""What the tests of plots share: weights, pixels, and where labels are."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws the plots, is not installed")
matplotlib.use("agg")
from matplotlib.colors import to_hex, to_rgb  # noqa: E402

WORDS = ["[CLS]", "the", "animal", "didn", "'", "t", "cross", "##ing", "costs", "$5", "and", "$6", "[SEP]"]


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


def lightness(colour: str) -> float:
    """Return CIELAB's L* of an sRGB colour."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return float(116 * np.cbrt(luminance) - 16 if luminance > (6 / 29) ** 3 else luminance * 24389 / 27)
