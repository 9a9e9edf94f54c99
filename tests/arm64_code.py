"""arm64's machine code of kernels, on any machine: LLVM compiles for processors that it does not run on.

``python tests/arm64_code.py neon float32 peak`` prints the assembly of a kernel for a row of the ISA table. That wants
a process of its own, as Numba compiles a function for one kind of processor and keeps it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from typing import Any

import processes
import pytest
from arm64_kernels import TRIPLE


@cache
def assembly(row: str, storage: str = "float32", work: str = "forward") -> list[str]:
    """Return the lines of a kernel's assembly, with LLVM's comments."""
    # without these names Numba asks for the features of the processor that it runs on
    environment = processes.environment(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    command = [sys.executable, __file__, row, storage, work]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def loops(lines: list[str]) -> list[list[str]]:
    """Return the lines of every innermost loop: from a label to a jump back to it, with no other label between."""
    found, start, label = [], 0, None
    for number, line in enumerate(lines):
        if match := re.match(r"(\.L\w+):", line):
            start, label = number, match[1]
        elif (match := re.match(r"\t(?:b|b\.\w+|cbn?z|tbn?z)\t.*?(\.L\w+)", line)) and match[1] == label:
            found.append(lines[start + 1 : number + 1])
    return found


SKIPPED = 3


def _main(row_name: str, storage: str, work: str) -> None:
    from llvmlite import binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        llvm.Target.from_triple(TRIPLE)
    except RuntimeError as error:
        print(error)
        sys.exit(SKIPPED)
    llvm.get_process_triple = lambda: TRIPLE
    from fastattn.cpu.host.kernels import PLAIN, describe
    from fastattn.cpu.kernels import catalogue
    from fastattn.machine import building, loading, table
    from fastattn.machine.kernel import Kernel

    def assembler(row: table.Isa) -> Any:
        target = loading.target_machine(row)
        target.set_asm_verbosity(True)
        target.emit_object = lambda module: target.emit_assembly(module).encode()
        return target

    building.target_machine = assembler
    row = next(row for row in table.TABLE if row.name == row_name)
    tile = row.tile("float64" if storage == "float64" else "float32")
    if work == "peak":
        reads = "pairs" if storage == "bfloat16" and row.pairs else "strided"
        code = catalogue.build(Kernel(work, row, tile, reads=reads), {"run": 5})
    else:
        code = catalogue.build(describe(work, tile, row, steps=PLAIN, storage=storage), {"task": 3})
    print(code.decode())


if __name__ == "__main__":
    _main(*sys.argv[1:])
