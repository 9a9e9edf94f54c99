"""The CPU backend of the backward pass: plans a call, makes room for its gradients, and runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastattn.cpu import pool
from fastattn.cpu.attention import scratch_memory
from fastattn.cpu.kernels import kernel_name, library
from fastattn.cpu.layout import GRADIENT_ARRAYS, GRADIENT_AXIS, GRADIENT_CALL, GRADIENT_PLAN
from fastattn.cpu.plan import LOG2_E, TASK_FLOPS, Tile, aligned, mask_kind
from fastattn.gradients import Upstream
from fastattn.isa import Isa, host
from fastattn.problem import Array, Operands, Problem, Shape, split_shape

QUERY_BLOCK = 64  # queries taken together, at least: what one pass over a gradient of keys or values adds up
KEY_BLOCK = 128
STATE_BYTES = 1 << 20  # of a group of key blocks, at most: keys, values, and the gradients of both


@dataclass(frozen=True, slots=True)
class GradientPlan:
    """What is to be run: `record` is the memory that the kernels read."""

    tile: Tile
    record: Array = field(repr=False)
    tasks: int
    groups: int
    query_blocks: int
    flops: float
    scratch_bytes: int


def attention_backward(
    problem: Problem,
    operands: Operands,
    upstream: Upstream,
    shapes: tuple[Shape, Shape],
    seed: int,
    threads: int,
) -> tuple[Array, Array, Array]:
    """Return the gradients of the operands: those of key and value summed over the axes that both are broadcast along.

    Parameters
    ----------
    problem : Problem
    operands : Operands
    upstream : Upstream
    shapes : tuple of two tuples of int
        Those of the arguments key and value.
    seed : int
    threads : int
    """
    order, outer = _order(problem, shapes)
    lead = problem.rows_shape
    summed = tuple(size if axis in order[:outer] else 1 for axis, size in enumerate(lead))
    arrays: dict[str, Array | None] = {
        "query": operands.query,
        "key": operands.key,
        "value": operands.value,
        "mask": operands.mask,
        "grad_out": upstream.grad_out,
        "out": upstream.out,
        "grad_query": np.zeros((*lead, problem.queries, problem.head_dim), problem.dtype),
        "grad_key": np.zeros((*summed, problem.keys, problem.head_dim), problem.dtype),
        "grad_value": np.zeros((*summed, problem.keys, problem.value_dim), problem.dtype),
    }
    gradients = tuple(arrays[name] for name in ("grad_query", "grad_key", "grad_value"))
    plan = make_plan(problem, arrays, order, outer, host(), threads)
    if plan.tasks:
        _run(plan, problem, arrays, upstream, seed, threads)
    return gradients  # type: ignore[return-value]


def _run(
    plan: GradientPlan,
    problem: Problem,
    arrays: dict[str, Array | None],
    upstream: Upstream,
    seed: int,
    threads: int,
) -> None:
    heads = math.prod(problem.rows_shape)
    lse = np.ascontiguousarray(upstream.lse)
    grad_lse = None if upstream.grad_lse is None else np.ascontiguousarray(upstream.grad_lse)
    query_tickets = np.zeros(heads * plan.query_blocks, np.int64)
    key_tickets = np.zeros(heads * plan.groups, np.int64)
    call = np.zeros(1, GRADIENT_CALL)
    call["plan"] = plan.record.ctypes.data
    call["seed"] = np.uint64(seed).astype(np.int64)
    addressed = {**arrays, "lse": lse, "grad_lse": grad_lse}
    addressed |= {
        "deltas": np.empty(lse.size, problem.dtype),
        "query_tickets": query_tickets,
        "key_tickets": key_tickets,
    }
    for name, array in addressed.items():
        call[name] = 0 if array is None else array.ctypes.data
    masked = problem.mask_kind != "none" or problem.dropout_p > 0
    kernels = library(kernel_name("backward_masked" if masked else "backward", problem.dtype.name, plan.tile))
    threads = pool.concurrency(plan.tasks, plan.flops, threads)
    with scratch_memory(threads * plan.scratch_bytes) as address:
        call["scratch"], call["scratch_bytes"] = address, plan.scratch_bytes
        pool.run(kernels, call.ctypes.data, plan.tasks, plan.flops, threads)


def _order(problem: Problem, shapes: tuple[Shape, Shape]) -> tuple[list[int], int]:
    """Return the leading axes, those last that neither key nor value has, and how many they are not."""
    rank = len(problem.rows_shape)

    def has(axis: int) -> bool:
        for shape in shapes:
            split = split_shape(shape, problem, shared=True)[:-2]
            place = axis - rank + len(split)
            if place >= 0 and split[place] != 1:
                return True
        return False

    own = [axis for axis in range(rank) if has(axis)]
    return own + [axis for axis in range(rank) if axis not in own], len(own)


def make_plan(
    problem: Problem, arrays: dict[str, Array | None], order: list[int], outer: int, row: Isa, threads: int
) -> GradientPlan:
    """Plan a backward pass on these arrays, all of which have the axes of the operands."""
    itemsize = problem.dtype.itemsize
    tile = Tile(row.rows, row.vectors, row.vector_bytes // itemsize, itemsize)
    lead = problem.rows_shape
    sizes = [lead[axis] for axis in order]
    kv_heads, inner = math.prod(sizes[:outer]), math.prod(sizes[outer:])

    query_block = -(-QUERY_BLOCK // tile.width) * tile.width
    key_block = KEY_BLOCK
    query_blocks, key_blocks = -(-problem.queries // query_block), -(-problem.keys // key_block)
    panels = -(-problem.head_dim // tile.width) + -(-problem.value_dim // tile.width)
    row_bytes = tile.width * itemsize
    state = 2 * panels * key_block * row_bytes
    # two of the products of D and one of Dv with queries or keys, two of Dv and one of D the other way round
    block_flops = query_block * key_block * (6.0 * problem.head_dim + 4.0 * problem.value_dim)
    group = max(1, min(STATE_BYTES // state, key_blocks)) if state else 1
    while group > 1 and kv_heads * inner * -(-key_blocks // group) < 4 * threads:
        group -= 1
    groups = -(-key_blocks // group)
    part = max(1, min(query_blocks, int(TASK_FLOPS / max(1.0, group * block_flops))))
    parts = -(-query_blocks // part)

    record = np.zeros(GRADIENT_PLAN.itemsize + len(lead) * GRADIENT_AXIS.itemsize, np.uint8)
    plan = record[: GRADIENT_PLAN.itemsize].view(GRADIENT_PLAN)[0]
    for name in ("query", "key", "value", "mask", "grad_out", "out"):
        array = arrays[name]
        if array is not None:
            plan[name + "_row"], plan[name + "_column"] = array.strides[-2:]
    for name in ("grad_query", "grad_key", "grad_value"):
        array = arrays[name]
        assert array is not None
        plan[name + "_row"] = array.strides[-2]
    mask = arrays["mask"]
    natural = problem.mask_kind == "float"
    values: dict[str, Any] = {
        "queries": problem.queries,
        "keys": problem.keys,
        "head_dim": problem.head_dim,
        "value_dim": problem.value_dim,
        "mask_kind": mask_kind(mask, problem.dtype),
        "mask_itemsize": mask.itemsize if mask is not None else 0,
        "causal": problem.causal_offset is not None,
        "first_position": problem.causal_offset or 0,
        "scale": problem.scale * (1.0 if natural else LOG2_E),
        "unit": LOG2_E if natural else 1.0,
        "score_scale": problem.scale,
        "drop_below": problem.drop_threshold,
        "keep_scale": problem.keep_scale,
        "axes": len(lead),
        "heads": problem.heads,
        "blocks": key_blocks,
        "key_block": key_block,
        "group": group,
        "groups": groups,
        "query_block": query_block,
        "query_blocks": query_blocks,
        "outer": kv_heads,
        "inner": inner,
        "parts": parts,
        "part": part,
    }
    for name, value in values.items():
        plan[name] = value
    axes = record[GRADIENT_PLAN.itemsize :].view(GRADIENT_AXIS)
    for place, axis in zip(axes, order, strict=True):
        place["size"], place["head"] = lead[axis], math.prod(lead[axis + 1 :])
        for name in GRADIENT_ARRAYS:
            array = arrays[name]
            place[name] = array.strides[axis] if array is not None and array.shape[axis] > 1 else 0

    tasks = kv_heads * inner * groups * parts
    queries = panels * query_block * row_bytes * 2 + -(-problem.head_dim // tile.width) * query_block * row_bytes
    queries += query_block * (problem.head_dim + problem.value_dim) * itemsize
    scores = 2 * query_block * key_block * itemsize + panels * key_block * row_bytes
    rest = 3 * query_block * itemsize + 2 * row_bytes + 8 * tile.lanes * tile.lanes
    flops = kv_heads * inner * query_blocks * key_blocks * block_flops
    if problem.causal_offset is not None:
        flops /= 2
    return GradientPlan(
        tile=tile,
        record=record,
        tasks=tasks,
        groups=groups,
        query_blocks=query_blocks,
        flops=flops,
        scratch_bytes=aligned(group * state + queries + scores + rest),
    )
