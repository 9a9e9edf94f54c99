"""The host side of attention with few queries: whether a call is one, and its two kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastattn.cuda import decode
from fastattn.cuda.arrays import Given, nothing
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.compile import kernel, launch
from fastattn.cuda.elements import MASKS
from fastattn.cuda.plan import slices_of
from fastattn.cuda.vectors import VECTOR_BYTES, vector_width
from fastattn.problem import Problem

__all__ = ["WHY", "Work", "is_aligned", "kernels_for", "queue"]

WHY = "decode: {rows} queries share their keys, in parts of {keys} keys"
SMALL = {"keys": 8, "threads": 4, "lanes": 2, "passes": 2}  # for the simulator


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
    together = given.strides[-1] == 1 and given.shape[-1] % width == 0 and given.address % VECTOR_BYTES == 0
    return together and all(
        stride % width == 0
        for stride, count in zip(given.strides[:-1], given.shape[:-1], strict=True)
        if count > 1
    )


def kernels_for(problem: Problem, storage: str, mask: str, aligned: bool) -> Work | None:
    """What there is to do, if the queries that share their keys are few enough; None if not."""
    rows = problem.group * problem.queries
    if not 0 < rows <= decode.MAX_ROWS or not problem.keys:
        return None
    features = max(problem.head_dim, problem.value_dim)
    spec = decode.decode_for(storage, mask, problem.dropout_p > 0, aligned, rows, problem.keys, features)
    if spec is None:
        return None
    if SIMULATED:
        lanes = decode.power_of_two(-(-max(1, features) // vector_width(storage)))
        lanes = max(SMALL["lanes"], lanes)
        spec = spec._replace(**{**SMALL, "lanes": lanes, "threads": max(SMALL["threads"], lanes)})
    parts = -(-problem.keys // spec.keys)
    heads = slices_of(problem) // problem.group
    return Work(spec, parts, parts * -(-rows // spec.rows) * heads, slices_of(problem) * problem.queries)


def queue(call: Any, work: Work, tables: tuple[Any, Any, Any], out: Given, lse: Given, seed: int) -> None:
    """Queue the two kernels of a call."""
    problem, place, real, givens = call.problem, call.place, call.real, call.givens
    if not work.rows:
        return
    name = np.dtype(real).name
    numbers = place.new("numbers of the parts", (2 * work.rows * work.parts,), name).memory()
    sums = place.new("sums of the parts", (work.rows * work.parts * problem.value_dim,), name).memory()
    mask = givens["attn_mask"].memory() if "attn_mask" in givens else nothing(MASKS["bool"])
    with np.errstate(all="ignore"):  # a scale beyond float32 is infinite there
        scale = real(problem.scale)
    arguments = (
        *(givens[operand].memory() for operand in ("query", "key", "value")),
        mask,
        numbers,
        sums,
        *tables,
        problem.group,
        scale,
        real(problem.keep_scale),
        np.uint32(seed & 0xFFFFFFFF),
        np.uint32(seed >> 32),
    )
    block = (work.spec.threads, 1)
    launch(kernel(decode.split_keys, work.spec), work.blocks, block, place.stream, arguments)
    merged = (numbers, sums, out.memory(), lse.memory(), *tables)
    launch(kernel(decode.merge_splits, work.spec), work.rows, block, place.stream, merged)
