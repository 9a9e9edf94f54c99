"""What was measured, as a picture: bars for each case, one for each engine; the longer, the faster.

Colours are those of the other pictures: the palette of Okabe and Ito, which colour-blind people can tell apart. In each
case the engines stand in the order of the legend, for prints without colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from fastattn.bench.host import Host
from fastattn.bench.measure import Result
from fastattn.bench.peers import OURS
from fastattn.plot.colours import HEAD_COLOURS

__all__ = ["FAMILIES", "families", "save_overview", "save_picture", "speeds"]

WIDTH, BAR, GAP, AROUND = 8.0, 0.066, 0.11, 1.05  # inches: of the figure, a bar, between cases, of all above and below
PAPER, NIGHT = ("white", "0.25"), ("none", "0.8")  # background and ink

#: The rows of the overview, each with the groups of cases that it sums up.
FAMILIES = {
    "float32": ("float32",),
    "float32, causal": ("float32 causal",),
    "float64": ("float64", "float64 causal"),
    "half precision": ("bfloat16", "bfloat16 causal", "float16", "float16 causal"),
    "masks and padding": ("float mask per head", "boolean mask", "key padding"),
    "gradients": ("backward", "backward causal", "backward 64-bit", "backward 64-bit causal"),
    "gradients, bfloat16": ("backward bfloat16", "backward bfloat16 causal"),
    "tiny calls in a loop": ("tiny, in a loop", "tiny bfloat16, in a loop"),
    "a call every 20 ms": ("every 20 ms",),
}


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


def families(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Sum up the speeds of cases, which are found by their names: the geometric mean of those an engine can do.

    Examples
    --------
    >>> from fastattn.bench.chart import families
    >>> families({"float32 (1,8,512,64)": {"fastattn": 1.0}, "float32 (1,8,2048,64)": {"fastattn": 4.0, "NumPy": 0.5}})
    {'float32': {'fastattn': 2.0, 'NumPy': 0.5}}
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name, row in rows.items():
        family = next(family for family, groups in FAMILIES.items() if name.partition(" (")[0] in groups)
        for engine, speed in row.items():
            found.setdefault(family, {}).setdefault(engine, []).append(speed)
    return {
        family: {engine: geometric_mean(speed) for engine, speed in found[family].items()}
        for family in FAMILIES
        if family in found
    }


def save_picture(results: Sequence[Result], host: Host, path: Path) -> None:
    """Draw how fast each engine is in each case, relative to the fastest of the others.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    from fastattn.bench.report import versus

    rows = {result.case.name: speeds(result) for result in results}
    _draw(rows, [versus(result) for result in results], f"{host.name}, {host.isa}", PAPER, path)


def save_overview(rows: Mapping[str, Mapping[str, float]], machine: str, path: Path, *, dark: bool = False) -> None:
    """Draw a table in short, for a page that is light or dark: a row for each family of its cases.

    Parameters
    ----------
    rows : mapping of str to mapping of str to float
        How fast each engine is in each case, as of `speeds`.
    machine : str
        Where that was measured.
    path : Path
        The file.
    dark : bool
        Whether the page is dark.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    summed = families(rows)
    remarks = [f"{row[OURS.name]:.2f} ×" for row in summed.values()]
    _draw(summed, remarks, machine, NIGHT if dark else PAPER, path)


def _draw(
    rows: Mapping[str, Mapping[str, float]], remarks: Sequence[str], title: str, page: tuple[str, str], path: Path
) -> None:
    """Draw the rows from above, each with its name at the left and a remark at the right."""
    import matplotlib
    from matplotlib.figure import Figure

    engines = list(dict.fromkeys(name for row in rows.values() for name in row))
    step = BAR * max(1, len(engines)) + GAP  # inches of a row; on the axis a row is 1
    background, ink = page
    figure = Figure(figsize=(WIDTH, AROUND + step * len(rows)), dpi=120, layout="constrained", facecolor=background)
    axes = figure.add_subplot(facecolor="none")
    for index, name in enumerate(engines):
        places = [(place, row[name]) for place, row in enumerate(rows.values()) if name in row]
        axes.barh(
            [place + (index - (len(engines) - 1) / 2) * BAR / step for place, _ in places],
            [speed for _, speed in places],
            height=BAR / step,
            color=HEAD_COLOURS[index % len(HEAD_COLOURS)],
            label=name,
        )
    axes.axvline(1, color=ink, linewidth=0.8, zorder=0)
    _dress(axes, list(rows), remarks, ink)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=ink, pad=24)
    if engines:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=len(engines), frameon=False, fontsize=9, labelcolor=ink,
            handlelength=1.0, handletextpad=0.4, columnspacing=1.4, borderaxespad=0.2,
        )  # fmt: skip
    with matplotlib.rc_context({"svg.hashsalt": "fastattn", "svg.fonttype": "none"}):  # the same bars, the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _dress(axes: Any, names: Sequence[str], remarks: Sequence[str], ink: str) -> None:
    """Name the rows at the left, write the remarks at the right, and say what the axis between them means."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, max(1.2, axes.get_xlim()[1]))
    axes.set_xlabel("speed; 1 is the fastest of the others", fontsize=9, color=ink)
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(len(names)), remarks)
    for each in (axes, beside):
        each.tick_params(axis="both", length=0, labelsize=9, colors=ink)
        each.spines[:].set_visible(False)
