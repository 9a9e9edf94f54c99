"""Measure on this machine, and write the table of README.md and this machine's section of docs/benchmarks.md.

Run it as ``python benchmarks/readme_table.py``, or ``make bench-table``. In the README the table stands between the
markers ``<!-- table:begin -->`` and ``<!-- table:end -->``; in docs/benchmarks.md each machine has a section, and those
of other machines stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastattn.bench import report
from fastattn.bench.cases import CASES, select
from fastattn.bench.host import this_host
from fastattn.bench.measure import Effort, measure
from fastattn.console.arguments import Parser, number, output_file
from fastattn.console.terminal import Progress, Style

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=output_file(), default=ROOT / "README.md")
    parser.add_argument("--docs", type=output_file(), default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--no-readme", action="store_true", help="write docs/benchmarks.md only")
    parser.add_argument("--rounds", type=number("number of rounds", 1), default=Effort().rounds)
    parser.add_argument("--case", action="append", default=[], help="only cases whose name contains this, for a try")
    args = parser.parse_args(argv)
    try:
        cases = select(args.case, CASES)
        if not args.no_readme:
            report.with_table(args.readme.read_text("utf-8"), "")
    except (OSError, ValueError) as error:
        parser.error(str(error))

    host, style = this_host(), Style.of(sys.stdout)
    engines = list(host.versions)
    print(report.header(engines, style))
    results = []
    for index, case in enumerate(cases):
        with Progress(f"{index + 1} of {len(cases)}: {case.name}") as progress:
            results.append(measure(case, Effort(rounds=args.rounds), progress=progress))
        print(report.line(results[-1], engines, style), flush=True)
    print(report.disturbance(results) or "Nothing else ran meanwhile.")
    table = report.markdown(results, host)
    if not args.no_readme:
        args.readme.write_text(report.with_table(args.readme.read_text("utf-8"), table), "utf-8")
    before = args.docs.read_text("utf-8") if args.docs.exists() else "# Benchmarks\n"
    args.docs.write_text(report.with_section(before, host.name, table), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
