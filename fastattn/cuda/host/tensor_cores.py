"""The host side of the forward pass on tensor cores: which calls have it, and with which tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastattn.call.problem import Problem
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.host.plan import SCALES, Table, for_portable_kernels, is_extreme, slices_of
from fastattn.cuda.kernels.fragments import CHUNK, HALF, TileShape
from fastattn.cuda.kernels.plan import KEY, OUT, QUERY, VALUE

WIDEST = 128
CAPABILITY = (8, 0)
LONGEST = 2**29 - 2**10  # queries and keys: in 32 bits are bytes of a number for each of both, and some tiles more
IN_ROWS = (QUERY, KEY, VALUE, OUT)  # what is read and written 16 bytes at a time, or 4


def shape_for(storage: str, mask: str, width: int) -> TileShape:
    """The shape for rows of up to `width` elements."""
    # 32 queries to a warp halve what it reads of keys and values from shared memory; with 128 features these would not
    # fit in its registers
    if width <= 64:
        if mask == "none":
            return TileShape(storage, mask, width=64, warps=4, rows=32, keys=64, blocks=2)
        return TileShape(storage, mask, width=64, warps=4, rows=16, keys=64, blocks=2)
    return TileShape(storage, mask, width=128, warps=4, rows=16, keys=32, blocks=3 if mask == "none" else 2)


def options(shape: TileShape) -> dict[str, Any]:
    """The options of `cuda.jit` for this kernel: how many registers a thread may have follows from them."""
    return {} if SIMULATED else {"launch_bounds": (shape.threads, shape.blocks)}


def block_of(shape: TileShape) -> tuple[int, int]:
    """The block that the kernel is launched with; in the simulator a thread stands for a warp."""
    return (shape.warps if SIMULATED else shape.threads), 1


def grid_of(shape: TileShape, problem: Problem) -> int:
    """How many blocks a problem takes."""
    return slices_of(problem) * -(-problem.queries // shape.queries)


def against(
    storage: str,
    mask: str,
    problem: Problem,
    table: Table,
    addresses: Sequence[int],
    capability: tuple[int, int],
    in_rows: Sequence[int] = IN_ROWS,
) -> str | None:
    """Say why a call cannot have this kernel; None if it can.

    Parameters
    ----------
    storage, mask : str
        What the operands, and the mask if it is not "none", are stored in.
    problem : Problem
    table : Table
        On the host.
    addresses : sequence of int
        Where the memory of what has to lie in rows begins.
    capability : (int, int)
        Of the GPU.
    in_rows : sequence of int
        Which rows of the table these are.
    """
    low, high = SCALES["float32"]
    halves = 16 // HALF
    rows = list(in_rows)
    if storage not in ("float16", "bfloat16"):
        return f"{storage} is not what tensor cores multiply here"
    if capability < CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if problem.dropout_p > 0:
        return "dropout"
    if (beyond := for_portable_kernels(problem)) is not None:
        return beyond
    if mask == "float64":
        return "a mask of float64"
    if is_extreme(problem) or (mask in ("none", "bool") and not low < problem.scores.scale < high):
        return f"scale {problem.scores.scale:g} is not between {low:g} and {high:g}"
    for name, size in (("head", problem.head_dim), ("value", problem.value_dim)):
        if not 0 < size <= WIDEST or size % CHUNK:
            return f"{name} size {size} is not a multiple of 8 up to 128"
    if problem.queries + problem.keys > LONGEST:
        return f"lengths {problem.queries} and {problem.keys} are not below 2^29 together"
    if (table.steps[rows, 1] != 1).any():
        return "features are not next to each other in memory"
    if (table.steps[rows, 0] % halves).any() or (table.offsets[rows] % halves).any() or any(a % 16 for a in addresses):
        return "rows do not begin at multiples of 16 bytes"
    return None
