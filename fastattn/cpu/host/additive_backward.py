"""The CPU backend of `fastattn.additive_attention_backward`: plans a call, and runs it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastattn.call.problem import Array, Operands, Problem
from fastattn.call.rounding import limit_of, slack
from fastattn.call.upstream import Upstream
from fastattn.cpu.host import session
from fastattn.cpu.host.calls import Plan
from fastattn.cpu.host.functions import prepared
from fastattn.cpu.host.kernels import describe, steps_of
from fastattn.cpu.host.plan import TASK_FLOPS, aligned, draft_forward, fields_of_softcap, padded, share_of_keys
from fastattn.cpu.kernels.records import ADDITIVE_BACKWARD, ADDITIVE_PLACES, QUERY_NUMBERS
from fastattn.machine.objects import address_of
from fastattn.machine.table import Blocking
from fastattn.machine.tile import TileShape


def backward(
    problem: Problem, operands: Operands, weight: Array, upstream: Upstream, threads: int
) -> tuple[Array, Array, Array, Array]:
    """Return the gradients of the operands, query, key and value, and that of weight.

    Parameters
    ----------
    problem : Problem
    operands : Operands
    weight : ndarray, shape (D,)
    upstream : Upstream
    threads : int

    Returns
    -------
    grad_query, grad_key, grad_value : ndarray
        With the axes of the operands.
    grad_weight : ndarray, shape (D,)
    """
    lead, dtype = problem.rows_shape, problem.real
    heads = math.prod(lead)
    worked = heads and problem.queries and problem.keys
    # the gradients of what lies behind the length of a row, nobody writes
    ragged = "keys" in problem.scores.own
    make = np.zeros if ragged or not worked else np.empty
    grad_query, grad_key = (make((*lead, n, problem.head_dim), dtype) for n in (problem.queries, problem.keys))
    grad_value = make((*lead, problem.keys, problem.value_dim), dtype)
    if not worked:
        return grad_query, grad_key, grad_value, np.zeros(problem.head_dim, dtype)

    plan, given = plan_rounds(problem, operands, upstream.grad_out, threads)
    blocking = session.current.row.blocking
    chunks, _, _ = _cut(problem, problem.keys, blocking)
    parts, turns = make((heads * chunks, problem.head_dim), dtype), np.zeros((heads, chunks), np.int64)
    sums = np.empty((heads * problem.queries, 2), dtype)
    out, lse, weight = map(np.ascontiguousarray, (upstream.out, upstream.lse, weight))
    _note(given, grad_out=upstream.grad_out, out=out, grad_query=grad_query, grad_key=grad_key, grad_value=grad_value)
    lengths = operands.heads["keys"][:: problem.heads].tolist() if ragged and operands.heads is not None else ()
    cuts = np.array([_cut(problem, length, blocking) for length in lengths], np.int64)
    _note(given, grad_weight=parts, sums=sums, turns=turns, cuts=cuts if lengths else None)
    given["precise"], given["slack"] = limit_of(dtype, upstream.rounded), slack(upstream.rounded, problem.head_dim)
    with prepared(problem, operands, session.current.row.tile(dtype.type.__name__)) as ready:
        session.current.run(plan, (*ready, given, lse, weight, None, None))
    with np.errstate(all="ignore"):
        return grad_query, grad_key, grad_value, parts.sum(axis=0, dtype=np.float64).astype(dtype)


def _note(record: Array, **arrays: Array | None) -> None:
    """Write down where arrays are."""
    for name, array in arrays.items():
        record[name] = 0 if array is None else address_of(array)


def plan_rounds(problem: Problem, operands: Operands, grad_out: Array, threads: int) -> tuple[Plan, Array]:
    """Plan a call, of as many rounds as there are chunks, and write down the sizes of blocks and chunks.

    They depend on the shapes of one head alone.
    """
    features, value_dim, itemsize = problem.head_dim, problem.value_dim, problem.real.itemsize
    row = session.current.row
    tile, blocking = row.tile(problem.real.type.__name__), row.blocking
    query_block, key_block = _blocks(problem, blocking)
    chunks, query_blocks, key_blocks = _cut(problem, problem.keys, blocking)
    row_bytes = padded(tile, features) * itemsize
    given: Any = np.zeros(1, ADDITIVE_BACKWARD)
    given["query_block"], given["query_blocks"], given["key_blocks"] = query_block, query_blocks, key_blocks
    term_queries = max(1, min(query_block, blocking.additive_terms_bytes // max(1, tile.lanes * row_bytes)))
    given["term_queries"] = term_queries

    kernel = describe("additive_backward", tile, row, "additive", steps_of(problem, all_of=True))
    draft = draft_forward(kernel, problem, operands, grad_out, threads)
    heads = math.prod(problem.rows_shape)
    draft.fields.update(key_block=key_block, blocks=chunks, group=1, groups=chunks, tasks=heads * chunks**2)
    draft.fields.update(fields_of_softcap(problem, 1.0))  # scores are in base e here
    draft.flops = heads * _flops(problem, problem.keys, blocking) * share_of_keys(problem)
    draft.scratch_bytes = aligned(_scratch_bytes(tile, query_block, key_block, features, value_dim, term_queries))
    return draft.finish(threads), given


def _blocks(problem: Problem, blocking: Blocking) -> tuple[int, int]:
    """How many queries, and how many keys, are a block."""
    row_bytes = (problem.head_dim + problem.value_dim) * problem.real.itemsize
    most = blocking.additive_query_bytes, blocking.additive_key_bytes
    return _block(blocking, most[0], row_bytes), _block(blocking, most[1], row_bytes)


def _flops(problem: Problem, keys: int, blocking: Blocking) -> float:
    """Operations on one head with so many keys."""
    per_score = blocking.additive_gradient_cost * problem.head_dim + 4.0 * problem.value_dim
    return problem.queries * keys * per_score


def _cut(problem: Problem, keys: int, blocking: Blocking) -> tuple[int, int, int]:
    """How many chunks a head with so many keys is cut into; how many blocks of queries, and of keys, are a chunk.

    They are as many as can be at work at a time, and more where tasks would be too long.
    """
    if not keys:
        return 0, 0, 0
    query_block, key_block = _blocks(problem, blocking)
    query_blocks, key_blocks, wide = -(-problem.queries // query_block), -(-keys // key_block), -(-keys // query_block)
    short = math.ceil(_flops(problem, keys, blocking) / TASK_FLOPS)
    chunks = min(max(query_blocks, key_blocks), max(min(query_blocks, wide), short))
    return chunks, -(-query_blocks // chunks), -(-key_blocks // chunks)


def _block(blocking: Blocking, most: int, row_bytes: int) -> int:
    """How many rows are a block."""
    block = blocking.additive_block
    while block > blocking.least_rows and block * row_bytes > most:
        block //= 2
    return block


def _scratch_bytes(
    tile: TileShape, query_block: int, key_block: int, features: int, value_dim: int, term_queries: int
) -> int:
    """Room for a block of queries and one of keys, as `fastattn.cpu.kernels.additive_backward` lays it out."""
    row = padded(tile, features)
    values = (-(-value_dim // tile.width) + 1) * tile.width
    of_weight = 2 * (row + tile.lanes)
    of_queries = query_block * (QUERY_NUMBERS + 1 + 3 * row + values) + tile.lanes
    of_keys = key_block * (1 + 3 * row + 2 * values) + tile.lanes
    of_both = 2 * query_block * key_block + term_queries * tile.lanes * (tile.lanes + row)
    work = max((2 + key_block + tile.lanes) * tile.width + 8 * tile.lanes * tile.lanes, values)
    return aligned(ADDITIVE_PLACES.itemsize) + (of_weight + of_queries + of_keys + of_both + work) * tile.itemsize
