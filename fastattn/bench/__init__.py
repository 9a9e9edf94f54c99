"""How fast: fastattn, NumPy and the other libraries that are installed, side by side on this machine.

``python -m fastattn bench`` runs `main`. `fastattn.bench.cases` has what is measured, `fastattn.bench.peers` who,
`fastattn.bench.measure` how, `fastattn.bench.report` and `fastattn.bench.chart` show it. `fastattn.bench.gpu` is all of
that for a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fastattn.call.advice import to_install
from fastattn.console.arguments import Parser, number, output_file, program
from fastattn.cpu.host.processors import MOST

if TYPE_CHECKING:
    from fastattn.bench.measure import Result

__all__ = ["main", "measure_all"]

PICTURES = (".png", ".svg", ".pdf")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{program()} bench",
        description="Measure attention on this machine: fastattn, NumPy, and those of PyTorch, OpenVINO and "
        "ONNX Runtime that are installed. Anything else that runs at the same time spoils the figures.",
    )
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu", help="measure the CPU (default), or a GPU")
    parser.add_argument("--quick", action="store_true", help="one case of each group, few rounds: half a minute")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="TEXT",
        help="only cases whose name contains TEXT; may be given several times",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and stop")
    parser.add_argument(
        "--rounds", type=number("number of rounds", 1), metavar="N", help="samples of each engine in each case"
    )
    parser.add_argument(
        "--threads",
        type=number("number of threads", 1, MOST),
        metavar="N",
        help="threads of each engine (default: all cores)",
    )
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="write all that was measured to FILE")
    parser.add_argument(
        "--plot",
        type=output_file(*PICTURES),
        metavar="FILE",
        help=f"draw a picture ({', '.join(PICTURES)}; needs matplotlib)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and draw what was measured.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments of the command line, without the program's name.

    Returns
    -------
    int
        The exit status.
    """
    parser = _parser()
    args = parser.parse_args(argv)

    from fastattn.bench import chart, gpu, report
    from fastattn.bench.cases import CASES, QUICK, select
    from fastattn.bench.host import this_host
    from fastattn.bench.measure import Effort, measure
    from fastattn.console.terminal import Style, wrap

    on_gpu = args.backend == "cuda"
    if on_gpu and args.threads:
        parser.error("--threads: a GPU has no use for it")
    everything: Any = gpu.CASES if on_gpu else CASES
    quick: Any = gpu.QUICK if on_gpu else QUICK
    try:
        cases: Any = select(args.case, quick if args.quick and not args.case else everything)
    except ValueError as error:
        parser.error(f"--case: {error}")
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    if args.plot is not None:
        if args.json is not None and args.plot.absolute() == args.json.absolute():
            parser.error("--plot: the same file as --json")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error(f"--plot: matplotlib is not installed: {to_install('plot')}")

    if on_gpu and (reason := gpu.why_not()):
        parser.error(f"--backend cuda: {reason}")

    effort = Effort.quick() if args.quick else Effort()
    if args.rounds:
        effort = Effort(args.rounds, effort.seconds)
    host, style = gpu.gpu_host() if on_gpu else this_host(), Style.of(sys.stdout)
    print(*wrap(str(host), style.width), sep="\n")
    one = partial(gpu.measure, effort=effort) if on_gpu else partial(measure, effort=effort, threads=args.threads)
    results = measure_all(cases, one)
    if left_out := report.reasons(results):
        print("", style.bold("Not measured"), sep="\n")
        print(*(line for reason in left_out for line in wrap(reason, style.width, "  ")), sep="\n")
    if disturbance := report.disturbance(results):
        print("", *map(style.bold, wrap(disturbance, style.width)), sep="\n")
    if args.json is not None:
        report.save_json(results, host, args.json)
    if args.plot is not None:
        chart.save_picture(results, host, args.plot)
    return 0


def measure_all(cases: Sequence[Any], one: Callable[..., Result]) -> list[Result]:
    """Measure cases, and draw each when it is done.

    Parameters
    ----------
    cases : sequence of Case or fastattn.bench.gpu.DeviceCase
    one : callable
        Measures a case, and is given the case and `progress`.
    """
    from fastattn.bench import report
    from fastattn.console.terminal import Progress, Style

    style = Style.of(sys.stdout)
    results = []
    for index, case in enumerate(cases):
        with Progress(f"{index + 1} of {len(cases)}: {case.name}") as progress:
            results.append(one(case, progress=progress))
        print("", *report.bars(results[-1], style), sep="\n", flush=True)
    return results
