"""The host side of attention with few queries: whether a call is one, and its two kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastattn.call.problem import Problem
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.host.arrays import Given, nothing
from fastattn.cuda.host.compile import kernel, launch
from fastattn.cuda.host.plan import for_portable_kernels, is_extreme, slices_of
from fastattn.cuda.kernels import decode
from fastattn.cuda.kernels.elements import MASKS, real_of
from fastattn.cuda.kernels.vectors import VECTOR_BYTES, vector_width

__all__ = ["Work", "against", "attend", "is_aligned", "work_for"]

REMEMBERED = 256  # tables
#: For the simulator: up to how many queries keys are split, and the work of a block, with a thread at least for a row.
SIMULATED_ROWS, SMALL = 4, {"rows": 2, "keys": 8, "threads": 4, "lanes": 2, "passes": 2}
_tables: dict[Any, tuple[Any, Any, Any]] = {}


MAX_ROWS = 16  # queries of a block, half as many of float64; more of a group are more blocks, which read the keys again
MAX_FEATURES = 256
THREADS = 128
PARTIAL_BYTES = 20 << 10  # of shared memory, for sums that are still to be taken over lanes


class Work(NamedTuple):
    """What is queued for a call.

    Attributes
    ----------
    spec : decode.Decode
    parts : int
        Of the keys.
    blocks : int
        Blocks of threads that go through a part each.
    rows : int
        Rows of the result.
    """

    spec: decode.Decode
    parts: int
    blocks: int
    rows: int


def is_aligned(given: Given) -> bool:
    """Whether the rows of an array can be loaded 16 bytes at a time."""
    width = vector_width(given.storage)
    contiguous = given.strides[-1] == 1 and given.shape[-1] % width == 0 and given.address % VECTOR_BYTES == 0
    return contiguous and all(
        stride % width == 0 for stride, count in zip(given.strides[:-1], given.shape[:-1], strict=True) if count > 1
    )


def against(problem: Problem) -> str | None:
    """Say why a call cannot have these kernels; None if it can."""
    rows, limit = problem.group * problem.queries, SIMULATED_ROWS if SIMULATED else MAX_ROWS
    if not rows:
        return "there are no queries"
    if rows > limit:
        return f"{rows} queries share them, more than {limit}"
    if not problem.keys:
        return "there are none"
    if (beyond := for_portable_kernels(problem)) is not None:
        return f"there is {beyond}"
    if is_extreme(problem):
        return f"scale {problem.scores.scale:g} is extreme"
    for name, size in (("head", problem.head_dim), ("value", problem.value_dim)):
        if size > MAX_FEATURES:
            return f"{name} size {size} is above {MAX_FEATURES}"
    return None


def work_for(problem: Problem, storage: str, mask: str, aligned: bool) -> Work | None:
    """What there is to do, if the queries that share their keys are few enough; None if not."""
    if against(problem) is not None:
        return None
    rows = problem.group * problem.queries
    features = max(problem.head_dim, problem.value_dim)
    spec = decode_for(storage, mask, problem.dropout_p > 0, aligned, rows, problem.keys, features)
    if spec is None:
        return None
    if SIMULATED:
        lanes = max(SMALL["lanes"], power_of_two(-(-features // vector_width(storage))))
        small: dict[str, Any] = {**SMALL, "lanes": lanes, "threads": max(SMALL["threads"], lanes)}
        spec = spec._replace(**small)
    parts = -(-problem.keys // spec.keys)
    heads = slices_of(problem) // problem.group
    return Work(spec, parts, parts * -(-rows // spec.rows) * heads, slices_of(problem) * problem.queries)


def decode_for(
    storage: str, mask: str, dropout: bool, aligned: bool, rows: int, keys: int, features: int
) -> decode.Decode | None:
    """The kernels for so many rows of a group, keys, and features of keys or values, if these are for it.

    Nothing else has a say: the parts of the keys, and so the bits of the result, are the same on every device.
    """
    if features > MAX_FEATURES:
        return None
    itemsize = np.dtype(real_of(storage)).itemsize
    rows = min(MAX_ROWS * 4 // itemsize, power_of_two(rows))
    part = 64 if keys <= 2048 or rows * features * itemsize > 8192 else 128 if keys <= 8192 or rows > 8 else 256
    lanes = min(THREADS, max(4, power_of_two(-(-features // vector_width(storage)))))
    per_pass = rows * (THREADS + THREADS // lanes) * itemsize
    passes = min(8, -(-part * lanes // THREADS), max(1, PARTIAL_BYTES // per_pass))
    return decode.Decode(storage, mask, dropout, aligned, rows, part, THREADS, lanes, passes)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def attend(call: Any, out: Given, lse: Given, seed: int, make_tables: Callable[[], tuple[Any, Any, Any]]) -> bool:
    """Queue the work of a call, if it is one of few queries; whether it is.

    Parameters
    ----------
    call : fastattn.cuda.host.attention.Call
    out, lse : Given
        Where the results come to be; lse contiguous.
    seed : int
    make_tables : callable
        Makes those of `fastattn.cuda.kernels.plan` on the device; calls of the same shapes and strides share them.
    """
    problem, place, real, givens = call.problem, call.place, call.real, call.givens
    aligned = is_aligned(givens["key"]) and is_aligned(givens["value"])
    work = work_for(problem, call.storage, call.mask, aligned)
    if work is None:
        return False
    if not work.rows:
        return True
    tables = _tables_of(call, out, make_tables)
    name = np.dtype(real).name
    numbers = place.new("numbers of the parts", (2 * work.rows * work.parts,), name)
    sums = place.new("sums of the parts", (work.rows * work.parts * problem.value_dim,), name)
    mask = givens["attn_mask"].memory() if "attn_mask" in givens else nothing(MASKS["bool"])
    arguments = (
        *(givens[operand].memory() for operand in ("query", "key", "value")),
        mask,
        numbers.memory(),
        sums.memory(),
        *tables,
        problem.group,
        real(problem.scores.scale),
        real(problem.keep_scale),
        np.uint32(seed & 0xFFFFFFFF),
        np.uint32(seed >> 32),
    )
    block = (work.spec.threads, 1)
    launch(kernel(decode.split_keys, work.spec), work.blocks, block, place.stream, arguments)
    merged = (numbers.memory(), sums.memory(), out.memory(), lse.memory(), *tables)
    launch(kernel(decode.merge_splits, work.spec), work.rows, block, place.stream, merged)
    return True


def _tables_of(call: Any, out: Given, make: Callable[[], tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    layout = tuple((name, given.layout) for name, given in call.givens.items())
    identity = (call.problem, call.storage, call.place.device, layout, out.layout)
    tables = _tables.get(identity)
    if tables is None:
        tables = make()
        if len(_tables) >= REMEMBERED:
            _tables.clear()
        _tables[identity] = tables
    return tables
