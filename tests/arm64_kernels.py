"""Kernels of arm64 for an emulated Python, compiled by this one in a seventh of the time.

``python tests/arm64_kernels.py 3.11.2`` fills the folder ``FASTATTN_CACHE_DIR`` for that version of Python, which finds
there what it would have compiled to the same bytes, given the same versions of Numba and llvmlite.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from llvmlite import binding as llvm

TRIPLE = "aarch64-unknown-linux-gnu"
ROW = "neon_bf16"  # the emulated processor has all that there is
FURTHER = ("softcap",), ("softcap", "function")  # what tests ask for besides what a wheel has


def kernels() -> Iterator[Any]:
    """Yield what most tests want of the row."""
    from fastattn.cpu.host import prebuild
    from fastattn.cpu.host.kernels import STEPS
    from fastattn.machine.table import TABLE

    for kernel in prebuild.of_a_wheel(next(row for row in TABLE if row.name == ROW)):
        yield kernel
        if kernel.steps == STEPS:
            yield from (replace(kernel, steps=(*STEPS, *steps)) for steps in FURTHER)


def prepare(python: str) -> None:
    """Make this process compile for arm64, and name files as that version of Python does there."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: TRIPLE
    platform.machine = lambda: "aarch64"
    platform.python_version = lambda: python


def write(kernel: Any) -> str:
    """Compile a kernel into the cache, and return its label."""
    from fastattn.cpu.kernels import catalogue
    from fastattn.cpu.kernels.exports import EXPORTS
    from fastattn.machine import libraries

    path = libraries._path(kernel)
    assert path is not None
    if libraries._read(path) is None:
        assert libraries._write(path, catalogue.build(kernel, EXPORTS[kernel.work]))
    return str(kernel.label)


def main(python: str) -> None:
    """Compile all of them, in a process on each CPU."""
    # without these names Numba asks for the features of the processor that it runs on
    os.environ.update(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, prepare, (python,)) as processes:
        print(len(list(processes.map(write, kernels()))), "kernels of arm64")


if __name__ == "__main__":
    main(*sys.argv[1:])
