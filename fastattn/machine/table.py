"""The machine, in one table: instruction set -> lanes, register tile, block sizes.

A new machine is a new row. The algorithm in `fastattn.cpu` reads the row and knows nothing else of the machine.
"""

import os
import platform
from dataclasses import dataclass
from functools import cache

from llvmlite import binding as llvm


@dataclass(frozen=True)
class Isa:
    """One row of the table.

    Attributes
    ----------
    name : str
        What ``FASTATTN_ISA`` calls it.
    cpu : str
        LLVM's name of the processor model to generate code for; "" is the architecture's baseline.
    needs : tuple of str
        CPU features without which the row's code does not run.
    vector_bytes : int
        Bytes of one SIMD register.
    rows, vectors : int
        The register tile, `rows` x `vectors` accumulators: enough to hide the latency of the multiply-adds, and with
        the operands no more than there are registers (16 of AVX2 and SSE, 32 of AVX-512 and NEON).
    tall_rows : int
        Rows of the tile that is one vector wide, for calls with few queries.
    key_block : int
        Keys taken through the softmax at a time.
    scalef : bool
        Whether the machine scales by a power of two in one instruction (AVX-512's vscalef).
    panels : bool
        Whether blocks of keys and values are laid out anew for a group of query blocks, in the order of their use.
        Otherwise they are read where they lie, or if that is awkward, from a copy of the rows.
    block_bytes : int
        What a block of keys and values may take of the second-level cache; blocks of long rows have fewer keys.
    """

    name: str
    cpu: str
    needs: tuple[str, ...]
    vector_bytes: int
    rows: int
    vectors: int
    tall_rows: int
    key_block: int
    scalef: bool = False
    panels: bool = True
    block_bytes: int = 128 << 10


_X86_V3 = ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe", "popcnt")
_X86_V4 = (*_X86_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
TABLE = (
    Isa("avx512", "x86-64-v4", _X86_V4, 64, 8, 2, 8, 128, scalef=True, panels=False, block_bytes=256 << 10),
    Isa("avx2", "x86-64-v3", _X86_V3, 32, 4, 2, 8, 128),
    Isa("generic", "", (), 16, 4, 2, 8, 128),
)
NAMES = tuple(row.name for row in TABLE)


@cache
def host_features() -> frozenset[str]:
    """The names of the CPU features that LLVM finds on this machine."""
    try:
        return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)
    except RuntimeError:  # LLVM cannot tell on this platform: only the baseline is safe
        return frozenset()


def runs_here(row: Isa) -> bool:
    """Whether this machine executes the row's instructions."""
    return set(row.needs) <= host_features()


@cache
def host() -> Isa:
    """The row that this process uses: the first that runs here, or the one that ``FASTATTN_ISA`` names.

    Raises
    ------
    ValueError
        If ``FASTATTN_ISA`` names no row, or one that this machine does not execute.
    """
    forced = os.environ.get("FASTATTN_ISA", "")
    if not forced:
        return next(row for row in TABLE if runs_here(row))
    for row in TABLE:
        if row.name == forced:
            if not runs_here(row):
                missing = ", ".join(sorted(set(row.needs) - host_features()))
                raise ValueError(f"FASTATTN_ISA={forced}: this {platform.machine()} machine lacks {missing}")
            return row
    raise ValueError(f"FASTATTN_ISA={forced!r} is unknown, expected one of {', '.join(NAMES)}")
