"""How it is shown: lines and bars for a terminal, Markdown for docs/benchmarks.md and the README, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastattn.bench.host import Host
from fastattn.bench.measure import Result
from fastattn.bench.peers import OURS
from fastattn.console.terminal import Style, bar, cut, pad, wrap

__all__ = [
    "bars",
    "disturbance",
    "latest",
    "markdown",
    "overview",
    "reasons",
    "save_json",
    "speeds_in",
    "versus",
    "with_overview",
    "with_section",
]

BEGIN, END = "<!-- overview:begin -->", "<!-- overview:end -->"
_UNITS = {
    "GF/s": "GF/s, more is better",
    "µs": "µs a call, less is better",
    "TF/s": "TF/s, more is better",
    "GB/s": "GB/s, more is better",
}


def number(value: float) -> str:
    """Return a figure to about three digits.

    Examples
    --------
    >>> from fastattn.bench.report import number
    >>> [number(x) for x in (7543.21, 198.44, 87.31, 6.5)]
    ['7543', '198', '87.3', '6.50']
    """
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _cell(result: Result, engine: str) -> str:
    return number(result.figure(engine)) if engine in result.times else "–"


def versus(result: Result) -> str:
    """Return how many times faster than the best of the others fastattn is."""
    ratio = result.ratio(result.best_peer) if result.best_peer else None
    return "–" if ratio is None else f"{ratio:.2f} × {result.best_peer}"


def _of_peak(result: Result) -> str:
    return "–" if result.of_peak is None else f"{result.of_peak:.0%}".replace("%", " %")


# --------------------------------------------------------------------------------------------------------------------
# Terminal
# --------------------------------------------------------------------------------------------------------------------


def bars(result: Result, style: Style) -> list[str]:
    """Return a case, how far fastattn comes, and a bar for each engine: the longer, the faster; the fastest is full."""
    if not result.times:
        return []
    said = [versus(result)] if result.of_peak is None else [versus(result), f"{_of_peak(result)} of peak"]
    lines = [style.bold(line) for line in wrap(f"{result.case.name}: {', '.join(said)}", style.width)]
    fastest = min(result.seconds(name) for name in result.times)
    for name in result.times:
        drawn = bar(fastest / result.seconds(name), max(4, style.width - 29), style.blocks)
        figure = pad(number(result.figure(name)), 6, right=True)
        drawn = style.accent(drawn) if name == OURS.name else style.dim(drawn)
        lines.append(cut(f"  {pad(name, 12)} {figure} {pad(result.case.unit, 4)} ", style.width - 4) + drawn)
    return lines


def reasons(results: Sequence[Result]) -> list[str]:
    """Say which engines were left out, and why."""
    cases: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result.absent.items():
            cases.setdefault((name, reason), []).append(result.case.name)
    return [
        f"{name}: {reason}" + ("" if len(names) == len(results) else f" [{', '.join(names)}]")
        for (name, reason), names in cases.items()
    ]


def disturbance(results: Sequence[Result]) -> str | None:
    """Say so if other processes took the cores while all this was measured."""
    used = [cores for result in results for cores in result.others]
    share = sum(used) / len(used) if used else 0.0
    if share < 0.1:
        return None
    return f"Other processes took {share:.1f} cores meanwhile: figures may be too low, and ratios wrong."


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def markdown(results: Sequence[Result], host: Host) -> str:
    """Return the tables, one for each unit, and under them the machine and the versions."""
    engines = list(host.versions)
    blocks = []
    for unit, meaning in _UNITS.items():
        chosen = [result for result in results if result.case.unit == unit]
        if not chosen:
            continue
        rate = unit == "GF/s"
        head = [meaning, *engines, *(["of peak"] if rate else []), "against the best of the others"]
        rows = [head, ["---"] + ["---:"] * (len(head) - 2) + ["---"]]
        for result in chosen:
            cells = [_cell(result, name) for name in engines]
            cells[0] = f"**{cells[0]}**"
            rows.append([result.case.name, *cells, *([_of_peak(result)] if rate else []), versus(result)])
        blocks.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join([*blocks, f"Measured on {host}."])


def speeds_in(table: str) -> dict[str, dict[str, float]]:
    """Read tables that `markdown` has made: how fast each engine is in each case, the fastest of the others being 1.

    Examples
    --------
    >>> from fastattn.bench.report import speeds_in
    >>> lines = ["| GF/s, more is better | fastattn | PyTorch | NumPy | of peak | against the best of the others |"]
    >>> lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
    >>> lines += ["| float32 (1,8,512,64) | **60** | 40 | 10 | 80 % | 1.51 × PyTorch |"]
    >>> speeds_in("\\n".join(lines))
    {'float32 (1,8,512,64)': {'fastattn': 1.51, 'PyTorch': 1.0, 'NumPy': 0.25}}
    """
    rows: dict[str, dict[str, float]] = {}
    for block in re.findall(r"(?:^\|.*\n?)+", table, re.MULTILINE):
        head, _, *lines = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in block.splitlines())
        power = -1 if "less is better" in head[0] else 1
        for line in lines:
            ratio, _, best = line[-1].partition(" × ")
            if best:  # else there is nothing to compare
                others = {name: cell for name, cell in zip(head[2:-1], line[2:-1], strict=True) if cell[-1].isdigit()}
                reached = {name: (float(cell) / float(others[best])) ** power for name, cell in others.items()}
                rows[line[0]] = {OURS.name: float(ratio)} | reached
    return rows


def overview(table: str, page: str, folder: str) -> str:
    """Return what the README shows of a table: the picture, light or dark as the page is, and where it was measured.

    Parameters
    ----------
    table : str
        What `markdown` has made.
    page, folder : str
        Where the table is to be read, and where the pictures are, seen from the README.
    """
    measured = table.splitlines()[-1]
    return f"""<picture>
  <source media="(prefers-color-scheme: dark)" srcset="{folder}/speed-dark.svg">
  <img src="{folder}/speed.svg" alt="How fast attention is: bars for fastattn and for the other libraries">
</picture>

Each bar is a geometric mean over [the rows of a table]({page}#machines). {measured}"""


def with_overview(text: str, shown: str) -> str:
    """Return a text with the overview put between its two markers.

    Raises
    ------
    ValueError
        If the markers are not there.
    """
    place = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"the text has no {BEGIN} … {END}")
    return place.sub(lambda match: f"{BEGIN}\n{shown}\n{END}", text)


def with_section(text: str, machine: str, table: str) -> str:
    """Return a text in which the machine's section holds the table; those of other machines stay as they are.

    Examples
    --------
    >>> from fastattn.bench.report import with_section
    >>> text = with_section("# Benchmarks", "Zen 3", "old")
    >>> text = with_section(text, "Zen 4", "other")
    >>> print(with_section(text, "Zen 3", "new"))
    # Benchmarks
    <BLANKLINE>
    <!-- machine:begin Zen 3 -->
    ## Zen 3
    <BLANKLINE>
    new
    <!-- machine:end -->
    <BLANKLINE>
    <!-- machine:begin Zen 4 -->
    ## Zen 4
    <BLANKLINE>
    other
    <!-- machine:end -->
    <BLANKLINE>
    """
    begin, end = f"<!-- machine:begin {machine} -->", "<!-- machine:end -->"
    section = f"{begin}\n## {machine}\n\n{table}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda match: section, text, count=1)
    return f"{text.rstrip()}\n\n{section}\n"


def latest(text: str) -> tuple[str, str]:
    """Return the machine and the table of the section that was written last, by the date at its end.

    Raises
    ------
    ValueError
        If there is no section.
    """
    pattern = r"<!-- machine:begin (.*?) -->\n## .*?\n\n(.*?; ([\d-]+)\.)\n<!-- machine:end -->"
    sections = re.findall(pattern, text, re.DOTALL)
    if not sections:
        raise ValueError("the text has no section of a machine")
    machine, table, _ = max(sections, key=lambda section: section[2])
    return machine, table


def save_json(results: Sequence[Result], host: Host, path: Path) -> None:
    """Write all that was measured."""
    content = {"host": asdict(host), "results": [result.as_dict() for result in results]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
