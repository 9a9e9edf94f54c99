"""Object code is loaded: that for other systems, and wherever there is room."""

from __future__ import annotations

import platform
import sys

import processes
import pytest

is_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="triples are those of x86-64")
ANSWER = """
from llvmlite import binding as llvm
from fastattn.machine import loading
from fastattn.machine.libraries import Library
from fastattn.machine.table import host
row = host()
loading.sys.platform, llvm.get_process_triple = SYSTEM, lambda: NAME
code = loading.target_machine(row).emit_object(llvm.parse_assembly("define i64 @answer() {\\n    ret i64 42\\n}"))
library = Library(code, row, {"answer": 0})
print(code[:4].hex(), library.answer())
"""  # of no calls, which have conventions


@is_x86
@pytest.mark.parametrize(
    ("system", "name", "begins"),
    [
        ("linux", "x86_64-unknown-linux-gnu", b"\x7fELF"),
        ("win32", "x86_64-pc-windows-msvc", b"\x7fELF"),
        ("darwin", "x86_64-apple-darwin24.0.0", b"\xcf\xfa\xed\xfe"),
    ],
)
def test_the_format_is_one_that_the_loader_takes(system: str, name: str, begins: bytes) -> None:
    """Of Windows, ELF: COFF, which the system itself has, is what LLVM's loader does not know there.

    In a process of its own, which has no use for how another system finds its way back from errors.
    """
    printed = processes.run(ANSWER.replace("SYSTEM", repr(system)).replace("NAME", repr(name)))
    assert printed == f"{begins.hex()} 42\n"


FULL = """
import mmap
import numpy as np
import fastattn
holes = [mmap.mmap(-1, 8192) for _ in range(2000)]
large = mmap.mmap(-1, 5 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0)
for hole in holes[::2]:
    hole.close()
arrays = np.random.default_rng(0).standard_normal((3, 1, 2, 40, 16), dtype=np.float32)
print(np.allclose(fastattn.attention(*arrays), fastattn.attention(*arrays, backend="reference"), atol=1e-5))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="maps memory in another way")
def test_kernels_are_loaded_where_arrays_of_gigabytes_lie_between_small_holes() -> None:
    """A page of constants would go into a hole, code behind the arrays, too far away for what it refers to it with."""
    assert processes.run(FULL) == "True\n"


TIGHT = """
import mmap
from fastattn.cpu.host import kernels
from fastattn.machine import libraries, loading, room
from fastattn.machine.table import host
row = host()
kernel = kernels.describe("forward", row.tile("float32"), row, steps=kernels.PLAIN)
code = libraries._code(kernel, kernels.EXPORTS["forward"], kernels.compile_kernel)
pages = -(-(4 * len(code) + loading.MORE) // mmap.PAGESIZE)

def large():
    "Map gigabytes, and fill what gaps of three pages and more are left before them."
    kept = [mmap.mmap(-1, 5 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0)]
    first = room._mapped(pages)[1]
    for size in (pages, 64, 16, 8, 4, 3):
        address = first + 1
        while address > first:
            memory, address = room._mapped(size)
            kept.append(memory)
    return kept

held = [mmap.mmap(-1, mmap.PAGESIZE * size) for size in (64, 16, 8, 4) for _ in range(1000)]
holes = [mmap.mmap(-1, 2 * mmap.PAGESIZE) for _ in range(2000)]
held += large()
gap = room._mapped(pages)[0]
held += large()
for hole in (gap, *holes[::2]):
    hole.close()
loading.load(code, row, [])
print("loaded")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="maps memory in another way")
def test_a_kernel_is_loaded_where_the_only_large_gap_before_more_gigabytes_just_holds_it() -> None:
    assert processes.run(TIGHT) == "loaded\n"
