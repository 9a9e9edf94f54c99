"""The CPU backend of the backward pass: plans a call, makes room for its gradients, and runs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from fastattn.call.problem import Array, Operands, Problem, Shape
from fastattn.call.rounding import limit_of, slack
from fastattn.call.shapes import split_shape
from fastattn.call.upstream import Upstream
from fastattn.cpu.host import pool
from fastattn.cpu.host.forward import remember, run_call
from fastattn.cpu.host.kernels import describe, load, steps_of
from fastattn.cpu.host.plan import TASK_FLOPS, TASKS_PER_THREAD, aligned, fields_of_scores, share_of_keys
from fastattn.cpu.kernels.records import GRADIENT_ARRAYS, GRADIENT_AXIS, GRADIENT_CALL, GRADIENT_PARTS, GRADIENT_PLAN
from fastattn.machine.kernel import Kernel
from fastattn.machine.libraries import Library
from fastattn.machine.table import Isa, host
from fastattn.machine.tile import TileShape

Arrays: TypeAlias = "dict[str, Array | None]"
_plans: dict[Any, GradientPlan] = {}


@dataclass(frozen=True, slots=True)
class GradientPlan:
    """What is to be run: `record` is the memory that the kernel reads, `fields` its part that is no table."""

    kernel: Library
    tile: TileShape
    record: Array = field(repr=False)
    fields: Any = field(repr=False)
    query_blocks: int
    groups: int
    tasks: int
    flops: float
    scratch_bytes: int


def attention_backward(
    problem: Problem,
    operands: Operands,
    upstream: Upstream,
    shapes: tuple[Shape, Shape],
    mask_shape: Shape | None,
    seed: int,
    threads: int,
) -> tuple[Array, Array, Array, Array | None]:
    """Return the gradients of the operands, summed over axes that they are broadcast along, where it is for the best.

    Parameters
    ----------
    problem : Problem
    operands : Operands
    upstream : Upstream
    shapes : tuple of two tuples of int
        Those of the arguments key and value.
    mask_shape : tuple of int or None
        That of the argument attn_mask, if its gradient is wanted.
    seed : int
    threads : int

    Returns
    -------
    grad_query : ndarray, shape (*batch, Hk, G, Lq, D)
    grad_key, grad_value : ndarray
        (*batch, Hk, G, Lk, D) and so on, with 1 for the axes that neither key nor value has.
    grad_mask : ndarray, or None
        With 1 for the axes that the mask does not have.
    """
    lead, dtype = problem.rows_shape, problem.real
    own = _own_axes(problem, *(split_shape(shape, problem, shared=True) for shape in shapes))
    summed = tuple(size if axis in own else 1 for axis, size in enumerate(lead))
    arrays: Arrays = dict.fromkeys(GRADIENT_ARRAYS)
    arrays |= operands._asdict()
    arrays |= {"grad_out": upstream.grad_out, "out": upstream.out}
    arrays["grad_query"] = grad_query = np.zeros((*lead, problem.queries, problem.head_dim), dtype)
    arrays["grad_key"] = grad_key = np.zeros((*summed, problem.keys, problem.head_dim), dtype)
    arrays["grad_value"] = grad_value = np.zeros((*summed, problem.keys, problem.value_dim), dtype)
    grad_mask = None
    if mask_shape is not None:
        split = split_shape(mask_shape, problem)
        mask_axes = _own_axes(problem, split)
        grad_mask = np.zeros((*(n if axis in mask_axes else 1 for axis, n in enumerate(lead)), *split[-2:]), dtype)
        arrays["grad_bias"] = grad_mask
    if not problem.keys or not problem.queries or 0 in lead:
        return grad_query, grad_key, grad_value, grad_mask

    arrays["lse"] = lse = np.ascontiguousarray(upstream.lse)
    arrays["grad_lse"] = None if upstream.grad_lse is None else np.ascontiguousarray(upstream.grad_lse)
    arrays["deltas"] = np.empty((3, lse.size), dtype)
    plan = _planned(_by_keys, problem, arrays, upstream.rounded, own, threads)
    _run(plan, problem, arrays, seed, threads)
    if grad_mask is not None:
        plan = _planned(_by_rectangles, problem, arrays, upstream.rounded, mask_axes, threads)
        _run(plan, problem, arrays, seed, threads)
    return grad_query, grad_key, grad_value, grad_mask


def _own_axes(problem: Problem, *splits: Shape) -> list[int]:
    """Return the leading axes that one of these arguments has, and is not broadcast along."""
    rank = len(problem.rows_shape)
    found = {rank - i for split in splits for i, size in enumerate(reversed(split[:-2]), 1) if size != 1}
    return sorted(found)


def _run(plan: GradientPlan, problem: Problem, arrays: Arrays, seed: int, threads: int) -> None:
    heads = math.prod(problem.rows_shape)
    arrays["query_tickets"] = np.zeros(heads * plan.query_blocks, np.int64)
    arrays["key_tickets"] = np.zeros(heads * plan.groups, np.int64)
    threads = pool.concurrency(plan.tasks, plan.flops, threads)
    run_call(GRADIENT_CALL, plan, threads, plan.kernel, seed, arrays)


def _planned(
    make: Callable[..., GradientPlan],
    problem: Problem,
    arrays: Arrays,
    rounded: np.dtype[Any],
    own: list[int],
    threads: int,
) -> Any:
    """Return the plan of a call, which all calls share that agree in all but addresses."""
    masks, grad_bias = (arrays["bias"], arrays["keep"]), arrays["grad_bias"]
    key = (
        make,
        problem,
        rounded,
        tuple(own),
        tuple(None if array is None else array.strides for array in arrays.values()),
        *(None if mask is None else mask.dtype for mask in masks),
        None if grad_bias is None else grad_bias.shape,
        threads,
        TASK_FLOPS,
    )
    plan = _plans.get(key)
    if plan is None:
        plan = make(problem, arrays, rounded, own, host(), threads)
        remember(_plans, key, plan)
    return plan


def _by_keys(
    problem: Problem, arrays: Arrays, rounded: np.dtype[Any], own: list[int], row: Isa, threads: int
) -> GradientPlan:
    """Plan the backward pass: its tasks own keys of one head, of which some leading axes make one each."""
    kernel = describe("backward", row.tile(problem.real.type.__name__), row, steps=steps_of(problem))
    plan = _plan(kernel, problem, arrays, rounded, own)
    fields = plan.fields
    outer, inner, blocks = int(fields["outer"]), int(fields["inner"]), int(fields["blocks"])
    panels = _panels(plan.tile, problem.head_dim) + _panels(plan.tile, problem.value_dim)
    state = 2 * panels * row.blocking.gradient_key_block * plan.tile.row_bytes
    group = max(1, min(row.blocking.gradient_state_bytes // max(1, state), blocks))
    while group > 1 and outer * inner * -(-blocks // group) < TASKS_PER_THREAD * threads:
        group -= 1
    block_flops = plan.flops / max(1, outer * inner * blocks * int(fields["query_blocks"]))
    query_blocks = int(fields["query_blocks"])
    part = max(1, min(query_blocks, int(TASK_FLOPS / max(1.0, group * block_flops))))
    groups, parts = -(-blocks // group), -(-query_blocks // part)
    return _split(plan, problem, outer * inner, group=group, groups=groups, part=part, parts=parts)


def _by_rectangles(
    problem: Problem, arrays: Arrays, rounded: np.dtype[Any], own: list[int], row: Isa, threads: int
) -> GradientPlan:
    """Plan the gradient of a mask: tasks own rectangles of it."""
    kernel = describe("mask_gradient", row.tile(problem.real.type.__name__), row, steps=steps_of(problem))
    plan = _plan(kernel, problem, arrays, rounded, own)
    fields = plan.fields
    groups = int(fields["blocks"]) if fields["bias_keys"] > 1 else 1
    parts = int(fields["query_blocks"]) if fields["bias_queries"] > 1 else 1
    heads = int(fields["outer"])  # a task goes through those that share the mask
    return _split(replace(plan, flops=plan.flops / 2.5), problem, heads, group=1, groups=groups, part=1, parts=parts)


def _panels(tile: TileShape, features: int) -> int:
    return -(-features // tile.width)


def _plan(kernel: Kernel, problem: Problem, arrays: Arrays, rounded: np.dtype[Any], own: list[int]) -> GradientPlan:
    """Write down everything but how the work is split."""
    row, tile, itemsize = kernel.row, kernel.tile, problem.real.itemsize
    lead = problem.rows_shape
    order = own + [axis for axis in range(len(lead)) if axis not in own]
    query_block = -(-row.blocking.gradient_query_bytes // itemsize // tile.width) * tile.width
    key_block = row.blocking.gradient_key_block
    query_blocks, key_blocks = -(-problem.queries // query_block), -(-problem.keys // key_block)
    heads = math.prod(lead)
    outer = math.prod(lead[axis] for axis in own)
    grad_bias = arrays["grad_bias"]
    values: dict[str, Any] = {
        "queries": problem.queries,
        "keys": problem.keys,
        "head_dim": problem.head_dim,
        "value_dim": problem.value_dim,
        **fields_of_scores(problem, arrays["bias"]),
        "bias_queries": grad_bias.shape[-2] if grad_bias is not None else 1,
        "bias_keys": grad_bias.shape[-1] if grad_bias is not None else 1,
        "score_scale": problem.scores.scale,
        "precise": limit_of(problem.real, rounded),
        "slack": slack(rounded, problem.head_dim),
        "numbers": heads * problem.queries * itemsize,
        "axes": len(lead),
        "heads": problem.heads,
        "blocks": key_blocks,
        "key_block": key_block,
        "query_block": query_block,
        "query_blocks": query_blocks,
        "outer": outer,
        "inner": heads // outer,
    }
    record = np.zeros(GRADIENT_PLAN.itemsize + len(lead) * GRADIENT_AXIS.itemsize, np.uint8)
    fields = record[: GRADIENT_PLAN.itemsize].view(GRADIENT_PLAN)[0]
    for name, value in values.items():
        fields[name] = value
    for name, array in arrays.items():
        for end, stride in zip(("_row", "_column"), array.strides[-2:] if array is not None else (), strict=False):
            if name + end in (GRADIENT_PLAN.names or ()):
                fields[name + end] = stride
    axes = record[GRADIENT_PLAN.itemsize :].view(GRADIENT_AXIS)
    for place, axis in zip(axes, order, strict=True):
        place["size"], place["head"] = lead[axis], math.prod(lead[axis + 1 :])
        for name in GRADIENT_ARRAYS:
            array = arrays[name]
            place[name] = array.strides[axis] if array is not None and array.shape[axis] > 1 else 0
    # three of the products have the features of a key in them, two those of a value
    flops = 2.0 * heads * problem.queries * problem.keys * (3.0 * problem.head_dim + 2.0 * problem.value_dim)
    flops *= share_of_keys(problem)
    return GradientPlan(
        load(kernel), tile, record, fields, query_blocks, groups=0, tasks=0, flops=flops, scratch_bytes=0
    )


def _split(
    plan: GradientPlan, problem: Problem, heads: int, *, group: int, groups: int, part: int, parts: int
) -> GradientPlan:
    """Split the work of so many heads into tasks, and lay out the working memory of one."""
    tile, fields = plan.tile, plan.fields
    row_bytes = tile.row_bytes
    query_block, key_block = int(fields["query_block"]), int(fields["key_block"])
    panel, query_panel, score_panel = group * key_block * row_bytes, query_block * row_bytes, key_block * row_bytes
    subs, numbers = query_block // tile.width, query_block * tile.itemsize
    keys, values = _panels(tile, problem.head_dim), _panels(tile, problem.value_dim)
    sizes = {
        "keys": keys * panel,
        "values": values * panel,
        "key_sums": max(keys * panel, subs * score_panel),  # where there is also room for sums of scores
        "value_sums": values * panel,
        "queries": keys * query_panel,
        "grads": values * query_panel,
        "query_sums": max(keys * query_panel, row_bytes),
        "query_lanes": numbers * problem.head_dim,
        "grad_lanes": numbers * problem.value_dim,
        "starts": numbers,
        "shifts": numbers,
        "rests": numbers,
        "deltas": numbers,
        "spans": 16 * subs,
        "work": row_bytes + 8 * tile.lanes * tile.lanes,
        "scores": subs * score_panel,
        "score_grads": subs * score_panel,
        "clean_keys": keys * score_panel,
        "outs": values * query_panel,
    }
    at = 0
    for name in GRADIENT_PARTS:
        fields[name + "_at"] = at
        at += aligned(sizes[name])
    fields["group"], fields["groups"], fields["part"], fields["parts"] = group, groups, part, parts
    fields["panel"], fields["query_panel"], fields["score_panel"] = panel, query_panel, score_panel
    return replace(plan, groups=groups, tasks=heads * groups * parts, scratch_bytes=at)
