"""The pictures of the guide: curves, and maps of weights; each in a terminal and by matplotlib.

Colours: those of `fastattn.plot` for maps, and the palette of Okabe and Ito for curves, which colour-blind people can
tell apart; curves differ in their markers as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.console.terminal import Style, bar_table, heat_map, legend, pad, wrap
from fastattn.guide.page import Picture

__all__ = ["BLUE", "GREEN", "ORANGE", "RED", "curves", "draw_curves", "numbers", "weight_map"]

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
COLOURS = (BLUE, RED, GREEN, ORANGE)
MARKERS = "osD^"


def curves(
    name: str,
    caption: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    labels: tuple[str, str],
    log: str = "",
    size: tuple[float, float] = (6.0, 3.0),
) -> Picture:
    """Curves over a few points; bars in the terminal.

    Parameters
    ----------
    name, caption : str
    x : sequence of float
    series : mapping of str to sequence of float
        The height at each x.
    labels : tuple of str
        Of the two axes.
    log : str
        Which axes are logarithmic: "", "x" or "xy".
    size : tuple of float
        Of the figure, in inches.
    """

    def lines(style: Style) -> list[str]:
        title = f"{labels[1]}, by {labels[0]}"
        if "y" in log:  # of such numbers bars show the largest only
            return numbers(title, x, series, style)
        table = bar_table([f"{each:g}" for each in x], list(series.items()), style)
        return [style.dim(line) for line in wrap(title, style.width, "  ")] + table

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        draw_curves(axes, x, series, labels=labels, log=log)
        axes.legend(frameon=False)

    return Picture(name, caption, lines, draw, size)


def numbers(title: str, x: Sequence[float], series: Mapping[str, Sequence[float]], style: Style) -> list[str]:
    """Curves as numbers, for a terminal: a line for each point, a column for each curve."""
    width = min(16, (style.width - 8) // len(series) - 2)
    if width < 9 and len(series) > 1:  # one curve below another
        return [line for name, curve in series.items() for line in numbers(title, x, {name: curve}, style)]
    lines = [style.dim(line) for line in wrap(title, style.width, "  ")]
    lines.append(" " * 8 + "".join("  " + style.bold(pad(name, width, right=True)) for name in series))
    for at, place in enumerate(x):
        cells = (pad(f"{heights[at]:.4g}", width + 2, right=True) for heights in series.values())
        lines.append("  " + pad(f"{place:g}", 6) + "".join(cells))
    return lines


def draw_curves(
    axes: Any, x: Sequence[float], series: Mapping[str, Sequence[float]], *, labels: tuple[str, str], log: str = ""
) -> None:
    """Draw curves on matplotlib's axes."""
    for (label, heights), colour, marker in zip(series.items(), COLOURS, MARKERS, strict=False):
        axes.plot(x, heights, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=label)
    if "x" in log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{each:g}" for each in x])
    if "y" in log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def weight_map(
    name: str,
    caption: str,
    rows: Sequence[str],
    columns: Sequence[str],
    weights: ArrayLike,
    *,
    size: tuple[float, float] = (6.0, 4.0),
) -> Picture:
    """A map of weights: each row looks, each column is looked at."""
    values: NDArray[Any] = np.asarray(weights, dtype=np.float64)

    def lines(style: Style) -> list[str]:
        drawn = heat_map(rows, values.tolist(), style, columns=columns)
        if drawn is None:  # no space: for each row, where it looks most
            best = values.argmax(axis=1)
            return [
                f"  {row}: {columns[at]} {values[i, at]:.2f}"
                for i, (row, at) in enumerate(zip(rows, best, strict=True))
            ]
        return [*drawn, "", *legend(style)]

    def draw(figure: Any) -> None:
        from fastattn import plot

        plot.heatmap(values, rows, columns, ax=figure.add_subplot())

    return Picture(name, caption, lines, draw, size)
