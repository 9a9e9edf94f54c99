"""The command line: ``python -m fastattn``, or the command ``fastattn``."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import io
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

import fastattn
from fastattn.api.backends import ATTENTION_BACKENDS
from fastattn.call.types import DeviceBackend
from fastattn.console.arguments import Parser, program
from fastattn.console.terminal import Progress, Style, UserError, printable, wrap
from fastattn.cpu.host import prebuild, processors
from fastattn.demo import cli
from fastattn.guide import cli as guide
from fastattn.machine import prebuilt
from fastattn.machine import table as isa
from fastattn.machine.libraries import cache_folder, prebuilt_name, why_not_kept
from fastattn.machine.processor import processor_name

__all__ = ["main"]


def build_parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    parser = Parser(
        prog=program(),
        description="Exact attention for NumPy arrays, at the speed of the machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    demo = commands.add_parser(
        "demo",
        help="a real sentence encoder: what its heads look at, and semantic search",
        description="Run all-MiniLM-L6-v2, a real pre-trained sentence encoder, with every attention by fastattn, and "
        "draw where a word of a sentence looks: bars for the word, and a heat map of the head for all words.",
    )
    cli.add_parsers(demo)
    guide.add_parser(
        commands.add_parser(
            "guide",
            help="what attention is, page by page, measured on real weights",
            description="List the pages of the guide, or run one: it measures what it says, on a real pre-trained "
            "sentence encoder and real text, and draws it.",
        )
    )
    commands.add_parser(
        "info",
        help="this machine, instruction set, threads, kernels and versions",
        description="Print what fastattn found: the machine, its instruction set, threads, where kernels come from, "
        "versions, and which backends there are.",
    ).set_defaults(run=info)
    commands.add_parser(
        "warmup",
        help="compile all kernels now, not at the first call",
        description="Compile all kernels for this machine into the cache, so that no first call has to.",
    ).set_defaults(run=warmup)
    commands.add_parser("bench", help="measure against NumPy and the peers that are installed", add_help=False)
    return parser


def info(args: argparse.Namespace) -> int:
    """Print what there is to know about this installation."""
    style = Style.of(sys.stdout)
    with Progress("trying the backends"):
        facts: list[tuple[str, Callable[[], str]]] = [
            ("fastattn", lambda: fastattn.__version__),
            ("machine", _machine),
            ("ISA", _isa),
            ("cores", _cores),
            ("threads", lambda: f"{fastattn.get_num_threads()} in a call"),
            ("kernels", _kernels),
            ("cache", _cache),
            ("versions", _versions),
            *((f"backend {name}", functools.partial(_backend, name)) for name in ATTENTION_BACKENDS),
        ]
        rows = [(name, _value_of(fact)) for name, fact in facts]
    for name, value in rows:
        lines = wrap(value, style.width - 20)
        print(style.bold(f"{name:18}"), lines[0])
        print(*(" " * 19 + line + "\n" for line in lines[1:]), sep="", end="")
    return 0


def _value_of(fact: Callable[[], str]) -> str:
    """A fact, or why there is none: `info` is for finding out what is wrong."""
    try:
        return fact()
    except Exception as error:  # whatever it is, that is what the user is looking for
        return f"error: {printable(str(error)) or type(error).__name__}"


def _machine() -> str:
    """The processor's name, as the system and as LLVM call it, and the system's."""
    from llvmlite import binding as llvm  # type: ignore[import-untyped, unused-ignore]

    name = printable(processor_name())
    known = ", ".join(dict.fromkeys(filter(None, (name, platform.machine(), f"LLVM: {llvm.get_host_cpu_name()}"))))
    return f"{known}; {platform.system()} {platform.release()}"


def _isa() -> str:
    """The row of the ISA table in use, and the others that would run."""
    row = isa.host()
    rest = [other.name for other in isa.TABLE if other is not row and isa.runs_here(other)]
    why = "FASTATTN_ISA says so" if os.environ.get("FASTATTN_ISA") else "the best that runs here"
    return f"{row.name}, {why}{'; also ' + ', '.join(rest) if rest else ''}"


def _cores() -> str:
    """How many CPUs there are, how many of them are for this process, and for how many it has time."""
    total, allowed, quota = os.cpu_count() or 1, processors.affinity(), processors.quota()
    said = f"{len(allowed)} for this process, of {total}" if allowed else str(total)
    return said if quota == math.inf else f"{said}; a quota of {quota:.3g}"


def _kernels() -> str:
    """How many of the kernels for this machine came with the package."""
    if not prebuilt.sums():
        return "compiled when they are needed: none came with this installation"
    row = isa.host()
    names = [prebuilt_name(kernel) for kernel in prebuild.of_a_wheel(row)]
    there = sum(prebuilt.intact(name) is not None for name in names)
    return (
        f"{there} of {len(names)} for {row.name} came with this installation; others are compiled when they are needed"
    )


def _cache() -> str:
    """The folder of compiled kernels, and what is in it."""
    folder = cache_folder()
    if folder is None:
        return f"none: {_no_folder()}, each process compiles"
    sizes = [item.stat().st_size for item in folder.glob("*.o")]
    return f"{folder} ({len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB)"


def _no_folder() -> str:
    """Why there is no cache."""
    named = os.environ.get("FASTATTN_CACHE_DIR")
    if named:
        return f"FASTATTN_CACHE_DIR={printable(named)!r} {why_not_kept()}"
    return f"the user's folder {why_not_kept()} (FASTATTN_CACHE_DIR names another)"


def _versions() -> str:
    parts = [f"Python {platform.python_version()}"]
    for name in ("numpy", "numba", "llvmlite"):
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{name} missing")
    return ", ".join(parts)


def _backend(name: DeviceBackend) -> str:
    """Whether a backend works, which a small call shows, and what is to be said of it."""
    ones = np.ones((1, 1), np.float32)
    try:
        fastattn.attention(ones, ones, ones, backend=name)
        more = _cuda() if name == "cuda" else ""
    except Exception as error:  # any reason is worth printing
        why = str(error).removeprefix(f"backend: {name!r} cannot be used here: ")
        return f"not available: {printable(why) or type(error).__name__}"
    return "works" + (", the default" if name == ATTENTION_BACKENDS[0] else "") + more


def _cuda() -> str:
    """The GPU, its driver, and the kernels that calls get there."""
    from fastattn.cuda.available import device, versions
    from fastattn.cuda.host.choice import said

    found = device()
    capability = ".".join(map(str, found.capability))
    return (
        f": {printable(found.name)}, compute capability {capability}; driver for CUDA {found.driver}, {versions()}; "
        f"kernels: {said(found.capability)}"
    )


def warmup(args: argparse.Namespace) -> int:
    """Compile everything, with progress."""
    folder = cache_folder()
    if folder is None:
        raise UserError(f"{_no_folder()}, so that no later process would find what is compiled")
    start = time.perf_counter()
    fastattn.warmup(progress=True)
    seconds = time.perf_counter() - start
    print(f"All kernels for {isa.host().name} are ready ({seconds:.1f} s). Those that were compiled are in {folder}.")
    return 0


def _check_environment() -> None:
    """Turn environment variables that make no sense into an error of one line."""
    try:
        isa.host()
        fastattn.get_num_threads()
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is returned.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, those of the process unless given.

    Returns
    -------
    int
        0; 2 for what the user can put right, said in one line; 130 after Ctrl-C; 141 where nobody reads any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows ? in its place
    try:
        with _warnings_of_one_line():
            status = _run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"{program()}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader has seen enough
        _write_nowhere()
        status = 141
    except OSError as error:  # what cannot be read is a UserError: this is a full disk, or a terminal that has gone
        print(f"{program()}: cannot write: {error.strerror}", file=sys.stderr)
        _write_nowhere()
        status = 2
    return status


def _open_what_is_closed() -> None:
    """Put nothing where there is no standard input, and nowhere where there is no output: Python has None there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # open as long as the process


def _write_nowhere() -> None:
    """Let standard output go nowhere: Python's own flush at exit must find a place to write to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """Warnings without the place in a source, which says nothing to whoever has typed a command."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *place: f"{program()}: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["bench"]:  # has arguments of its own
        _check_environment()
        from fastattn import bench

        code: int = bench.main(arguments[1:])
        return code
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    if args.run is not info:  # which is for finding out what is wrong
        _check_environment()
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
