"""Which kernels there are, and where one comes from: memory, the cache on disk, or the compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache

from fastattn.call.problem import Problem
from fastattn.cpu.kernels.exports import EXPORTS
from fastattn.machine.collector import collector_at_rest
from fastattn.machine.kernel import PLAIN, TERMS, Kernel
from fastattn.machine.libraries import Library, library
from fastattn.machine.table import Isa
from fastattn.machine.tile import TileShape

STEPS = ("dropout", "mask")
FUNCTION = ("function",)
ON_MATRIX = ("forward", "backward", "mask_gradient", "captured_gradient")
ON_PAIRS = (*ON_MATRIX, "decode")
#: These take few queries, or blocks of them one by one: too few to lay out keys for.
IN_PLACE = ("decode", "weights", "known_weights")


def describe(
    work: str,
    tile: TileShape,
    row: Isa,
    score: str = "dot",
    steps: tuple[str, ...] = STEPS,
    storage: str = "",
    in_pairs: bool = True,
    queries: str = "",
    values: str = "",
    pages: str = "",
) -> Kernel:
    """Describe the kernel of some work on scores, for a register tile, and arrays of another dtype than its own.

    `in_pairs`: pairs of bfloat16 may be multiplied, where the machine does that, or by its matrix unit. `queries`,
    `values` and `pages` are those of a `Kernel`.

    A kernel for all that may happen to scores does what one without these steps does, more slowly. The forward and the
    backward pass have both: a single one would make a first call wait for what it does not use.
    """
    few = work in IN_PLACE or tile.vectors == 1  # a tall tile is for few queries
    storage = storage or tile.dtype
    queries, values = ("" if each == storage else each for each in (queries, values))
    if in_pairs and storage == "bfloat16" and not queries and not values and row.pairs and work in ON_PAIRS:
        reads = "pairs"
    elif in_pairs and not few and score == "dot" and is_for_matrix(row, work, tile.dtype, storage, values):
        reads = "matrix"
    elif few and storage == tile.dtype and not values:
        reads = "strided"
    else:
        reads = "panels" if row.panels and not few and "int8" not in (storage, values) else "rows"
    return Kernel(work, row, tile, storage, score, reads, steps, queries, values, pages)


def is_for_matrix(row: Isa, work: str, *dtypes: str) -> bool:
    """Whether a row has a matrix unit, and that does such work on arrays of these dtypes; "" is any."""
    return row.matrix and work in ON_MATRIX and all(dtype in TERMS for dtype in dtypes if dtype)


def steps_of(problem: Problem, all_of: bool = False) -> tuple[str, ...]:
    """Return what may happen to the scores of a call; `all_of`: there is no kernel without masks and dropout."""
    scores = problem.scores
    masked = all_of or scores.bias or scores.keep or "slope" in scores.own or problem.dropout_p > 0
    if scores.has_functions:
        return (*STEPS, "softcap", "function") if masked or scores.softcap is not None else FUNCTION
    if scores.softcap is not None:
        return (*STEPS, "softcap")
    return STEPS if masked else PLAIN


def every_kernel(row: Isa, dtypes: Iterable[str]) -> Iterator[Kernel]:
    """All kernels that calls with arrays of these dtypes run on a machine, but for softcaps, functions and pages."""
    yield Kernel("schedule", row)
    yield Kernel("signature", row)
    yield Kernel("overlaps", row)
    yield Kernel("own_heads", row)
    yield Kernel("several", row)
    for dtype in dtypes:
        yield from kernels_of(row, dtype)


def kernels_of(row: Isa, storage: str) -> Iterator[Kernel]:
    """Those of them that are for arrays of one dtype; of half precision, those that read it as it lies."""
    real = "float64" if storage == "float64" else "float32"
    tile, is_half = row.tile(real), storage != real
    of_blocks = ("weights", "summary", *(() if is_half else ("known_weights",)))
    for shape in (tile, row.tall_tile(real)):
        for in_pairs in {True, not row.matrix}:  # few features are too few for a matrix unit
            yield describe("forward", shape, row, steps=PLAIN, storage=storage, in_pairs=in_pairs)
            yield describe("forward", shape, row, storage=storage, in_pairs=in_pairs)
        for work in of_blocks:
            yield describe(work, shape, row, storage=storage)
    for steps in (PLAIN, STEPS):
        yield describe("decode", row.wide_tile(real), row, steps=steps, storage=storage)
    yield describe("backward", tile, row, steps=PLAIN, storage=storage)
    for work in ("backward", "mask_gradient"):
        yield describe(work, tile, row, storage=storage)
    if not is_half:
        for work in ("forward", "weights"):
            for shape in (tile, row.tall_tile(real)):
                yield describe(work, shape, row, "additive")
        for work in ("additive_backward", "additive_mask_gradient"):
            yield describe(work, tile, row, "additive")


def load(kernel: Kernel) -> Library:
    """Return the functions of a kernel, which is compiled if it has not been."""
    return library(kernel, EXPORTS[kernel.work], compile_kernel)


def compile_kernel(kernel: Kernel, exports: Mapping[str, int]) -> bytes:
    """Compile a kernel, which wants Numba."""
    with collector_at_rest():
        return _compiler()(kernel, exports)


@cache  # as the interpreter ends, nothing can be imported, not even again
def _compiler() -> Callable[[Kernel, Mapping[str, int]], bytes]:
    from fastattn.cpu.kernels import catalogue  # imports Numba, which a cached kernel does not need

    return catalogue.build
