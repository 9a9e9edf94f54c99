"""The CPU backend of `fastattn.attention_weights` and `fastattn.attention_summary`: plans and runs their kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.halves import name_of
from fastattn.call.problem import Operands, Problem
from fastattn.cpu.host import session
from fastattn.cpu.host.functions import prepared
from fastattn.cpu.host.kernels import describe, steps_of
from fastattn.cpu.host.plan import Draft, aligned, choose_tile, draft_forward, group_size
from fastattn.cpu.kernels.records import SUMMARY
from fastattn.machine.objects import address_of

Array = NDArray[Any]

LN_2 = 0.6931471805599453
MORE_STATE = 2  # rows of a query block's state besides those that the forward pass has too
QUERY_ROWS = 2  # rows besides the queries of the one query block that a task on keys works on


def summarise(problem: Problem, operands: Operands, threads: int, top_k: int) -> tuple[Array, ...]:
    """Return the fields of an `AttentionSummary`. The value operand is not read."""
    rows, dtype = problem.lse_shape, problem.real
    m, l, lse, entropy = (np.empty(rows, dtype) for _ in range(4))
    top_weights, top_indices = np.empty((*rows, top_k), dtype), np.empty((*rows, top_k), np.int64)
    key_weights, finished = np.empty((*rows[:-1], problem.keys), dtype), np.zeros(rows[:-1], np.int64)
    arrays = {"m": m, "l": l, "lse": lse, "entropy": entropy, "top_weights": top_weights, "top_indices": top_indices}
    record = _record(top_k, **arrays, key_weights=key_weights, finished=finished)
    draft = _draft("summary", problem, operands, threads)
    _add_tasks_on_keys(draft, threads)
    _run(draft, operands, threads, record)
    return top_weights, top_indices, entropy, lse, key_weights


def sums(problem: Problem, operands: Operands, threads: int) -> tuple[Array, Array]:
    """Return m and l of every query: its weights are 2^((score - m) · to_base_2) / l."""
    m, l = (np.empty(problem.lse_shape, problem.real) for _ in range(2))
    _run(_draft("summary", problem, operands, threads), operands, threads, _record(m=m, l=l))
    return m, l


def log_of_base(problem: Problem) -> float:
    """Return the natural logarithm of the base that m is in: e where something is added to scores, else 2."""
    return 1.0 if problem.scores.adds else LN_2


def sums_from(problem: Problem, lse: Array) -> tuple[Array, Array]:
    """Return the same, made of log-sum-exps: exp(score - lse) is 2^((score - m) · to_base_2).

    A query that looks at no key has an lse of -inf, and weights of 0: as 2^-inf, whatever its scores. One whose lse is
    NaN has weights of NaN, those of hidden keys included, whose score l alone meets.
    """
    limit = np.finfo(problem.real).max
    with np.errstate(all="ignore"):
        m = np.clip(lse / log_of_base(problem), -limit, limit)
        m = np.ascontiguousarray(np.where(lse == -np.inf, np.inf, m), problem.real)
        return m, np.where(np.isnan(m), m, np.ones(1, m.dtype))


def weigh(problem: Problem, operands: Operands, threads: int, m: Array, l: Array) -> Array:
    """Return the weights of all queries and keys, for given sums."""
    weights = np.empty(problem.weights_shape, problem.real)
    _run(_draft("known_weights", problem, operands, threads), operands, threads, _record(m=m, l=l), weights)
    return weights


def _record(top_k: int = 0, **arrays: Array) -> Array:
    """Write down where the arrays are."""
    record = np.zeros(1, SUMMARY)
    record["top_k"] = top_k
    for name, array in arrays.items():
        record[name] = address_of(array)
    return record


def _run(draft: Draft, operands: Operands, threads: int, record: Array, weights: Array | None = None) -> None:
    plan = draft.finish(threads)
    with prepared(draft.problem, operands, draft.kernel.tile) as ready:
        query, key, _, *others = ready
        session.current.run(plan, (query, key, None, *others, record, None, None, weights, None, 0))


def _draft(work: str, problem: Problem, operands: Operands, threads: int) -> Draft:
    """Plan tasks that own queries: those of the forward pass, for half of its work."""
    row = session.current.row
    tile, steps = choose_tile(row, problem.real, problem.queries), steps_of(problem, all_of=True)
    kernel = describe(work, tile, row, steps=steps, storage=name_of(problem.storage))
    draft = draft_forward(kernel, problem, operands, operands.query, threads)  # nothing is written to `out`
    draft.flops /= 2
    draft.scratch_bytes = aligned(draft.scratch_bytes + draft.fields["group"] * MORE_STATE * kernel.tile.row_bytes)
    return draft


def _add_tasks_on_keys(draft: Draft, threads: int) -> None:
    """Plan tasks besides that own keys, as many blocks of them as stay in the level-2 cache while queries come by."""
    problem, tile, fields = draft.problem, draft.kernel.tile, draft.fields
    key_block, row_bytes = fields["key_block"], tile.row_bytes
    heads = math.prod(problem.rows_shape)
    state = key_block * row_bytes + (key_block + tile.rows) * problem.head_dim * tile.itemsize  # sums, packed keys
    flops_per_block = 2.0 * key_block * problem.queries * problem.head_dim
    blocks = -(-problem.keys // key_block)
    group = group_size(draft.kernel.row, blocks, state, flops_per_block, heads, threads)
    groups = -(-blocks // group)
    draft.task_flops = draft.flops / max(1, heads * min(fields["groups"], groups))  # all of either kind do as much
    draft.flops *= 2
    fields.update(key_group=group, key_groups=groups, tasks=fields["tasks"] + heads * groups)
    # a block of queries, and one of scores with the maxima and the buffer that go with it
    block = (problem.head_dim + QUERY_ROWS + 1 + key_block) * row_bytes + tile.lanes * tile.lanes * 8
    draft.scratch_bytes = max(draft.scratch_bytes, aligned(group * state + block))
