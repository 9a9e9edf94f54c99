"""What was measured, as a picture: a row for each case, a mark for each engine, the faster the further to the right.

Colours and marks are those of the other pictures: the palette of Okabe and Ito, which colour-blind people can tell
apart, and a mark of its own for each engine, for prints without colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastattn.bench.host import Host
from fastattn.bench.measure import Result
from fastattn.bench.peers import OURS
from fastattn.plot.colours import HEAD_COLOURS

__all__ = ["save_picture", "speeds"]

WIDTH, ROW, AROUND = 8.0, 0.21, 1.25  # inches: of the figure, of a case, of all above and below
GAP = 0.6  # between groups of cases, in rows
MARKS = "osD^vPX"
INK, FAINT = "0.25", "0.8"


def speeds(result: Result) -> dict[str, float]:
    """How fast each engine is, the fastest of the others being 1; empty where there is nothing to compare.

    The ratios are those of the table: medians over the rounds.

    Examples
    --------
    >>> from fastattn.bench.cases import Case
    >>> from fastattn.bench.chart import speeds
    >>> from fastattn.bench.measure import Result
    >>> speeds(Result(Case("float32", 1, 1, 8, 8), {"fastattn": [1.0], "PyTorch": [1.5], "NumPy": [6.0]}))
    {'fastattn': 1.5, 'PyTorch': 1.0, 'NumPy': 0.25}
    """
    best = result.best_peer
    ratios = {name: result.ratio(name) for name in result.times if name != OURS.name}
    ours = ratios.get(best or "")
    if ours is None:
        return {}
    return {OURS.name: ours} | {name: ours / ratio for name, ratio in ratios.items() if ratio is not None}


def save_picture(results: Sequence[Result], host: Host, path: Path) -> None:
    """Draw how fast each engine is in each case, relative to the fastest of the others.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    places = _places(results)
    figure = Figure(figsize=(WIDTH, AROUND + ROW * (places[-1] + 1)), dpi=120, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    rows = [(place, speeds(result)) for place, result in zip(places, results, strict=True)]
    axes.axvline(1, color=INK, linewidth=0.8, zorder=1)
    for place, row in rows:
        if row:
            axes.hlines(place, min(row.values()), max(row.values()), color=FAINT, linewidth=1.2, zorder=1)
    engines = [name for name in host.versions if any(name in row for _, row in rows)]
    for index, name in reversed(list(enumerate(engines))):  # ours above all others
        points = [(row[name], place) for place, row in rows if name in row]
        axes.scatter(
            *zip(*points, strict=True),
            s=52 if name == OURS.name else 26,
            color=HEAD_COLOURS[index % len(HEAD_COLOURS)],
            marker=MARKS[index % len(MARKS)],
            linewidth=0,
            zorder=3 if name == OURS.name else 2,
            label=name,
        )
    _dress(axes, results, places)
    axes.set_title(f"{host.name}, {host.isa}", loc="left", fontsize=10, fontweight="bold", pad=26)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="lower left", bbox_to_anchor=(0, 1), ncols=max(1, len(engines)), frameon=False,
        fontsize=8, handletextpad=0.2, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip
    figure.savefig(path)


def _places(results: Sequence[Result]) -> list[float]:
    """Where each case stands, in rows from above; between two groups there is a gap."""
    places, groups = [0.0], [result.case.name.partition(" (")[0] for result in results]
    for before, group in pairwise(groups):
        places.append(places[-1] + 1 + GAP * (group != before))
    return places


def _dress(axes: Any, results: Sequence[Result], places: Sequence[float]) -> None:
    """Name the cases at the left, write what the table's last column says at the right, and scale the axis between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from fastattn.bench.report import versus

    axes.set_yticks(places, [result.case.name for result in results], fontsize=8)
    axes.set_ylim(places[-1] + 0.7, -0.7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="both", length=0, labelsize=8, colors=INK)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        "speed; 1 is the fastest of the others, each step to the right is twice as fast", fontsize=8, color=INK
    )
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.45), max(high, 2.2))
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(places, [versus(result) for result in results], fontsize=8)
    beside.tick_params(length=0, colors=INK)
    beside.spines[:].set_visible(False)
