"""The CPU backend of `fastattn.additive_attention_backward`: plans and runs its kernel, round by round."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.cpu import pool
from fastattn.cpu.attention import run
from fastattn.cpu.kernels import kernel_name, library
from fastattn.cpu.layout import ADDITIVE_BACKWARD, ADDITIVE_PLACES, PLAN
from fastattn.cpu.plan import QUERY_NUMBERS, TASK_FLOPS, Plan, Tile, _padded, aligned, make_plan
from fastattn.gradients import Upstream
from fastattn.isa import Isa, host
from fastattn.problem import Operands, Problem

Array = NDArray[Any]

BLOCK = 128  # queries, and keys, that meet in scratch memory
BLOCK_BYTES = 256 << 10  # of their features and values, at most
LEAST = 32  # rows of a block, however long they are: a multiple of what a row of any tile holds
FLOPS = 20.0  # what a feature of a query and a key takes the time of
TERMS_BYTES = 8 << 10  # of the queries that meet a vector of keys at a time, if one does not have more


def gradients(
    problem: Problem, operands: Operands, weight: Array, upstream: Upstream, threads: int
) -> tuple[Array, Array, Array, Array]:
    """Return the gradients of query, key and value, with the axes of the operands, and of weight."""
    lead, dtype = problem.rows_shape, problem.dtype
    heads = math.prod(lead)
    grad_query, grad_key = (np.empty((*lead, n, problem.head_dim), dtype) for n in (problem.queries, problem.keys))
    grad_value = np.empty((*lead, problem.keys, problem.value_dim), dtype)
    if not (heads and problem.queries and problem.keys):
        for array in (grad_query, grad_key, grad_value):
            array.fill(0)
        return grad_query, grad_key, grad_value, np.zeros(problem.head_dim, dtype)
    plan, record = plan_chunks(problem, operands, upstream.grad_out, host(), threads)
    rounds = plan.tasks // heads
    parts = np.empty((heads * rounds, problem.head_dim), dtype)
    out, lse = np.ascontiguousarray(upstream.out), np.ascontiguousarray(upstream.lse)
    arrays = {"grad_out": upstream.grad_out, "out": out, "grad_query": grad_query, "grad_key": grad_key}
    for name, array in {**arrays, "grad_value": grad_value, "grad_weight": parts}.items():
        record[name] = array.ctypes.data
    kernels = library(kernel_name("additive_backward", dtype.name, plan.tile))
    threads = pool.concurrency(plan.tasks, plan.flops, threads)
    query, key, value, mask = operands
    for turn in range(rounds):
        record["round"] = turn
        run(plan, threads, kernels, 0, query, key, value, mask, record, lse, weight=weight)
    with np.errstate(all="ignore"):
        return grad_query, grad_key, grad_value, parts.sum(axis=0, dtype=np.float64).astype(dtype)


def plan_chunks(
    problem: Problem, operands: Operands, grad_out: Array, row: Isa, threads: int
) -> tuple[Plan, Array]:
    """Plan one round, and write down the sizes of blocks and chunks. They depend on a head's shape alone."""
    features, value_dim = problem.head_dim, problem.value_dim
    itemsize = problem.dtype.itemsize
    tile = Tile(row.rows, row.vectors, row.vector_bytes // itemsize, itemsize)
    block = BLOCK
    while block > LEAST and block * (features + value_dim) * itemsize > BLOCK_BYTES:
        block //= 2
    query_blocks, key_blocks = -(-problem.queries // block), -(-problem.keys // block)
    flops = problem.queries * problem.keys * (FLOPS * features + 4.0 * value_dim)
    n = max(1, min(query_blocks, key_blocks), math.ceil(flops / TASK_FLOPS))
    n = min(n, max(query_blocks, key_blocks))

    plan = make_plan(problem, operands, grad_out, row, threads)
    record = plan.record.copy()
    fields = record[: PLAN.itemsize].view(PLAN)[0]
    fields["key_block"] = block
    fields["blocks"], fields["group"], fields["groups"] = n, 1, n
    heads = math.prod(problem.rows_shape)
    fields["tasks"] = tasks = heads * n
    given = np.zeros(1, ADDITIVE_BACKWARD)
    given["query_block"], given["query_blocks"], given["key_blocks"] = block, -(-query_blocks // n), -(-key_blocks // n)
    row = _padded(tile, features)
    given["together"] = together = max(1, min(block, TERMS_BYTES // max(1, tile.lanes * row * itemsize)))
    causal = 0.5 if problem.causal_offset is not None else 1.0
    return (
        replace(
            plan,
            tile=tile,
            record=record,
            address=record.ctypes.data,
            tasks=tasks,
            flops=heads * flops * causal / n,
            scratch_bytes=aligned(_scratch_bytes(tile, block, row, value_dim, together)),
        ),
        given,
    )


def _scratch_bytes(tile: Tile, block: int, row: int, value_dim: int, together: int) -> int:
    """Room for a block of queries and one of keys, whose features take `row`, as the kernel lays it out."""
    values = (-(-value_dim // tile.width) + 1) * tile.width
    of_weight = 2 * (row + tile.lanes)
    of_queries = block * (QUERY_NUMBERS + 1 + 3 * row + values) + tile.lanes
    of_keys = block * (1 + 3 * row + value_dim + values) + tile.lanes
    of_both = 2 * block * block + together * tile.lanes * (tile.lanes + row)
    work = max((2 + block + tile.lanes) * tile.width + 8 * tile.lanes * tile.lanes, values)
    return aligned(ADDITIVE_PLACES.itemsize) + (of_weight + of_queries + of_keys + of_both + work) * tile.itemsize
