"""The pictures of the guide: curves, maps of weights, lines between words; each in a terminal and by matplotlib.

Colours: cividis for maps, and the palette of Okabe and Ito for curves, which colour-blind people can tell apart;
curves differ in their markers as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.guide.page import Picture
from fastattn.terminal import Style, bar_table, heat_map, legend

__all__ = ["BLUE", "GREEN", "ORANGE", "RED", "curves", "draw_curves", "draw_map", "links", "weight_map"]

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
COLOURS = (BLUE, RED, GREEN, ORANGE)
MARKERS = "osD^"
MAP = "cividis"


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
        table = bar_table([f"{each:g}" for each in x], list(series.items()), style)
        return [style.dim(f"  {labels[1]}, by {labels[0]}"), *table]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        draw_curves(axes, x, series, labels=labels, log=log)
        axes.legend(frameon=False)

    return Picture(name, caption, lines, draw, size)


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
    numbers: bool = False,
    size: tuple[float, float] = (6.0, 4.0),
) -> Picture:
    """A map of weights: each row looks, each column is looked at; `numbers` writes them into the cells."""
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
        axes = figure.add_subplot()
        image = draw_map(axes, rows, columns, values, numbers=numbers)
        figure.colorbar(image, ax=axes, label="weight", shrink=0.9)

    return Picture(name, caption, lines, draw, size)


def draw_map(
    axes: Any, rows: Sequence[str], columns: Sequence[str], values: NDArray[Any], *, numbers: bool = False
) -> Any:
    """Draw a map on matplotlib's axes, from 0 to the greatest weight; returns the image."""
    top = float(values.max())
    image = axes.imshow(values, cmap=MAP, vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=0 if max(map(len, columns)) <= 3 else 45, ha="center")
    if max(map(len, columns)) > 3:
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            colour = "black" if value > 0.6 * top else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    return image


def links(
    axes: Any, left: Sequence[str], right: Sequence[str], weights: NDArray[Any], *, colour: str = BLUE, mark: int = -1
) -> None:
    """Draw two columns of words on matplotlib's axes, with lines as dark as the weights; the word `mark` in bold."""
    for side, words in ((0.0, left), (1.0, right)):
        for place, word in enumerate(words):
            axes.text(
                side + (0.02 if side else -0.02),
                -place,
                word,
                ha="left" if side else "right",
                va="center",
                fontsize=9,
                fontweight="bold" if not side and place == mark else "normal",
            )
    for (row, column), weight in np.ndenumerate(weights):
        if weight >= 0.02:
            axes.plot(
                [0, 1], [-row, -column], color=colour, alpha=min(1.0, 0.15 + float(weight)), linewidth=0.5 + 3 * weight
            )
    axes.set(xlim=(-0.55, 1.55), ylim=(-max(len(left), len(right)) + 0.4, 0.6))
    axes.axis("off")
