"""The CPU backend of `fastattn.additive_attention_backward`: plans a call, and runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastattn.call.head_gradients import gradient_of_sinks, gradient_of_slopes
from fastattn.call.problem import Array, Operands, Problem, Shape
from fastattn.call.rounding import limit_of, slack
from fastattn.call.shapes import split_shape
from fastattn.call.upstream import Upstream
from fastattn.cpu.host import session
from fastattn.cpu.host.additive_score_gradients import Pass, over_parts, over_rectangles
from fastattn.cpu.host.backward import own_axes
from fastattn.cpu.host.calls import Plan
from fastattn.cpu.host.functions import Parts, captured_among, prepared
from fastattn.cpu.host.kernels import describe, steps_of
from fastattn.cpu.host.plan import TASK_FLOPS, Draft, aligned, draft_forward, fields_of_softcap, padded, share_of_keys
from fastattn.cpu.kernels.records import ADDITIVE_BACKWARD, ADDITIVE_PLACES, QUERY_NUMBERS
from fastattn.machine.objects import address_of
from fastattn.machine.table import Blocking
from fastattn.machine.tile import TileShape


def backward(
    problem: Problem,
    operands: Operands,
    weight: Array,
    upstream: Upstream,
    shapes: Mapping[str, Shape],
    names: Sequence[str],
    threads: int,
) -> dict[str, Array]:
    """Return the gradients of the operands, query, key and value, and that of weight.

    Parameters
    ----------
    problem : Problem
    operands : Operands
    weight : ndarray, shape (D,)
    upstream : Upstream
    shapes : mapping of str to tuple of int
        That of the argument attn_mask.
    names : sequence of str
        Of the arguments whose gradients are wanted.
    threads : int

    Returns
    -------
    dict of str to ndarray
        By the names of the arguments, those that are wanted among them.

        - "query", "key", "value": with the axes of the operands.
        - "weight": shape (D,)
        - "attn_mask": with 1 for the axes that the mask does not have, float64
        - "alibi_slopes", "sinks": (*batch, H, 1)
        - arrays that the function of scores captures: of their shapes, float64
    """
    lead, dtype = problem.rows_shape, problem.real
    heads = math.prod(lead)
    worked = heads and problem.queries and problem.keys
    # the gradients of what lies behind the length of a row, nobody writes
    ragged = "keys" in problem.scores.own
    make = np.zeros if ragged or not worked else np.empty
    grad_query, grad_key = (make((*lead, n, problem.head_dim), dtype) for n in (problem.queries, problem.keys))
    grad_value = make((*lead, problem.keys, problem.value_dim), dtype)
    found = {"query": grad_query, "key": grad_key, "value": grad_value, "weight": np.zeros(problem.head_dim, dtype)}
    out, lse, weight = map(np.ascontiguousarray, (upstream.out, upstream.lse, weight))
    of_heads = {
        "sink_weights": np.full_like(lse, np.nan) if "sinks" in names else None,
        "slope_sums": np.zeros_like(lse) if "alibi_slopes" in names else None,
    }
    parts = Parts(problem, operands, captured_among(problem, names))
    if "attn_mask" in names:
        split = split_shape(shapes["attn_mask"], problem)
        axes = own_axes(problem, split)
        found["attn_mask"] = np.zeros((*(n if axis in axes else 1 for axis, n in enumerate(lead)), *split[-2:]))
    if worked:
        grad_lse = None if upstream.grad_lse is None else np.ascontiguousarray(upstream.grad_lse)
        arrays = {"out": out, "lse": lse, "grad_lse": grad_lse, **found, **of_heads}
        found["weight"] = _run(problem, operands, weight, upstream, arrays, parts, threads)
    with np.errstate(all="ignore"):
        if of_heads["slope_sums"] is not None:
            found["alibi_slopes"] = gradient_of_slopes(of_heads["slope_sums"], 1.0)
        if of_heads["sink_weights"] is not None:
            found["sinks"] = gradient_of_sinks(problem, operands, upstream, of_heads["sink_weights"])
        found |= parts.sums()
    return found


def _run(
    problem: Problem,
    operands: Operands,
    weight: Array,
    upstream: Upstream,
    arrays: dict[str, Any],
    of_captured: Parts,
    threads: int,
) -> Array:
    """Write the gradients to `arrays` and `of_captured`, where they have their places; return that of weight."""
    dtype, heads, ragged = problem.real, math.prod(problem.rows_shape), "keys" in problem.scores.own
    make = np.zeros if ragged else np.empty
    plan, given = plan_rounds(problem, operands, upstream.grad_out, threads)
    blocking = session.current.row.blocking
    chunks, _, _ = _cut(problem, problem.keys, blocking)
    parts, turns = make((heads * chunks, problem.head_dim), dtype), np.zeros((heads, chunks), np.int64)
    sums = np.empty((heads * problem.queries, 2), dtype)
    gradients = {f"grad_{name}": arrays[name] for name in ("query", "key", "value")}
    of_heads = {name: arrays[name] for name in ("sink_weights", "slope_sums")}
    _note(given, grad_out=upstream.grad_out, out=arrays["out"], grad_lse=arrays["grad_lse"], **gradients, **of_heads)
    lengths = operands.heads["keys"][:: problem.heads].tolist() if ragged and operands.heads is not None else ()
    cuts = np.array([_cut(problem, length, blocking) for length in lengths], np.int64)
    _note(given, grad_weight=parts, sums=sums, turns=turns, cuts=cuts if lengths else None)
    given["precise"], given["slack"] = limit_of(dtype, upstream.rounded), slack(upstream.rounded, problem.head_dim)
    passes = [Pass(plan, given)]
    if "attn_mask" in arrays:
        draft = _draft("additive_mask_gradient", problem, operands, upstream.grad_out, threads)
        passes.append(over_rectangles(draft, given, arrays["attn_mask"], threads))
    if of_captured.names:
        draft = _draft("additive_captured_gradient", problem, operands, upstream.grad_out, threads)
        passes.append(over_parts(draft, given, of_captured.number, threads))
    with prepared(problem, operands, session.current.row.tile(dtype.type.__name__), of_captured) as ready:
        for each in passes:
            session.current.run(each.plan, (*ready, each.given, arrays["lse"], weight, None, None, 0))
    with np.errstate(all="ignore"):
        summed: Array = parts.sum(axis=0, dtype=np.float64).astype(dtype)
    return summed


def _note(record: Array, **arrays: Array | None) -> None:
    """Write down where arrays are."""
    for name, array in arrays.items():
        record[name] = 0 if array is None else address_of(array)


def plan_rounds(problem: Problem, operands: Operands, grad_out: Array, threads: int) -> tuple[Plan, Array]:
    """Plan a call, of as many rounds as there are chunks, and write down the sizes of blocks and chunks.

    They depend on the shapes of one head alone.
    """
    blocking = session.current.row.blocking
    query_block, _ = _blocks(problem, blocking)
    chunks, query_blocks, key_blocks = _cut(problem, problem.keys, blocking)
    given: Any = np.zeros(1, ADDITIVE_BACKWARD)
    given["query_block"], given["query_blocks"], given["key_blocks"] = query_block, query_blocks, key_blocks
    given["term_queries"] = _term_queries(problem)
    draft = _draft("additive_backward", problem, operands, grad_out, threads)
    draft.fields.update(blocks=chunks, group=1, groups=chunks, tasks=math.prod(problem.rows_shape) * chunks**2)
    return draft.finish(threads), given


def _draft(work: str, problem: Problem, operands: Operands, grad_out: Array, threads: int) -> Draft:
    """Write down everything but how the work is split."""
    row = session.current.row
    tile, blocking = row.tile(problem.real.type.__name__), row.blocking
    query_block, key_block = _blocks(problem, blocking)
    kernel = describe(work, tile, row, "additive", steps_of(problem, all_of=True))
    draft = draft_forward(kernel, problem, operands, grad_out, threads)
    draft.fields.update(key_block=key_block)
    draft.fields.update(fields_of_softcap(problem, 1.0))  # scores are in base e here
    draft.flops = math.prod(problem.rows_shape) * _flops(problem, problem.keys, blocking) * share_of_keys(problem)
    sizes = problem.head_dim, problem.value_dim, _term_queries(problem)
    draft.scratch_bytes = aligned(_scratch_bytes(tile, query_block, key_block, *sizes))
    return draft


def _term_queries(problem: Problem) -> int:
    """How many queries meet a vector of keys at a time: as many as there is room for terms of."""
    row = session.current.row
    tile, blocking = row.tile(problem.real.type.__name__), row.blocking
    query_block, _ = _blocks(problem, blocking)
    row_bytes = padded(tile, problem.head_dim) * tile.itemsize
    return max(1, min(query_block, blocking.additive_terms_bytes // max(1, tile.lanes * row_bytes)))


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
    of_queries = query_block * (QUERY_NUMBERS + 1 + tile.lanes + 3 * row + values) + tile.lanes
    of_keys = key_block * (1 + 3 * row + 2 * values) + tile.lanes
    of_both = 2 * query_block * key_block + term_queries * tile.lanes * (tile.lanes + row)
    work = max((2 + key_block + tile.lanes) * tile.width + 8 * tile.lanes * tile.lanes, values)
    return aligned(ADDITIVE_PLACES.itemsize) + (of_weight + of_queries + of_keys + of_both + work) * tile.itemsize
