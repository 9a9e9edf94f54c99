"""Measure on this machine: write its section of docs/benchmarks.md, and draw the overview of README.md.

Run it as ``python benchmarks/readme_table.py``, or ``make bench-table``. In docs/benchmarks.md each machine has a
section with its tables; those of other machines stay as they are. The overview is a picture, in docs/figures/, of the
section that was written last, and stands in README.md between ``<!-- overview:begin -->`` and
``<!-- overview:end -->``. With ``--redraw`` it is made anew of the tables there are, and nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePath

from fastattn.bench import chart, measure_all, report
from fastattn.bench.cases import CASES, select
from fastattn.bench.host import this_host
from fastattn.bench.measure import Effort, measure
from fastattn.console.arguments import Parser, number, output_file

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write and draw."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=output_file(), default=ROOT / "README.md")
    parser.add_argument("--docs", type=output_file(), default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--no-readme", action="store_true", help="measure, and write docs/benchmarks.md only")
    what.add_argument("--redraw", action="store_true", help="draw only, the tables that docs/benchmarks.md has")
    parser.add_argument("--rounds", type=number("number of rounds", 1), default=Effort().rounds)
    parser.add_argument("--case", action="append", default=[], help="only cases whose name contains this, for a try")
    args = parser.parse_args(argv)
    try:
        cases = select(args.case, CASES)
        if not args.no_readme:
            report.with_overview(args.readme.read_text("utf-8"), "")
        if args.redraw:
            report.latest(args.docs.read_text("utf-8"))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not args.no_readme and importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib, which draws the overview, is not installed: pip install 'fastattn[plot]'")

    if not args.redraw:
        host = this_host()
        results = measure_all(cases, partial(measure, effort=Effort(rounds=args.rounds)))
        print(report.disturbance(results) or "Nothing else ran meanwhile.")
        before = args.docs.read_text("utf-8") if args.docs.exists() else "# Benchmarks\n"
        args.docs.write_text(report.with_section(before, host.name, report.markdown(results, host)), "utf-8")
    if not args.no_readme:
        draw(args.docs, args.readme, args.figures)
    return 0


def draw(docs: Path, readme: Path, figures: Path) -> None:
    """Draw the tables that were written last, on light and on dark, and put the picture into the README."""
    machine, table = report.latest(docs.read_text("utf-8"))
    figures.mkdir(exist_ok=True)
    for name, dark in (("speed.svg", False), ("speed-dark.svg", True)):
        chart.save_overview(report.speeds_in(table), machine, figures / name, dark=dark)
    page, folder = (PurePath(os.path.relpath(path, readme.parent)).as_posix() for path in (docs, figures))
    shown = report.overview(table, page, folder)
    readme.write_text(report.with_overview(readme.read_text("utf-8"), shown), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
