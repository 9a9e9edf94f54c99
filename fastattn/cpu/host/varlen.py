"""The CPU backend of packed sequences: the plans of each sequence alone, run as one call.

Sequences of one kind, as `fastattn.call.packed.Packed.kinds` puts them together, have one plan: what their records
differ in is computed at once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastattn.call.out import delivered, target_for
from fastattn.call.packed import Packed, heads_first
from fastattn.call.problem import Array
from fastattn.cpu.host import several
from fastattn.cpu.host.forward import plan_forward
from fastattn.cpu.kernels.records import CALL

CALL_NAMES = (CALL.names or ())[2:]  # behind the plan and the working memory


def attention(packed: Packed, out: Array | None, return_lse: bool, seed: int, threads: int) -> Any:
    """Compute attention of packed sequences; the results asked for, as `fastattn.attention_varlen` returns them."""
    problem, inputs = packed.problem, (packed.query, packed.key, packed.value)
    target = target_for(out, problem, inputs)
    sums = np.empty(problem.out_shape[0] * problem.heads, problem.real) if return_lse else None
    steps = {
        "query": (packed.query.strides[0], 0, 0),
        "key": (0, packed.key.strides[0], 0),
        "value": (0, packed.value.strides[0], 0),
        "out": (target.strides[0], 0, 0),
        "lse": (problem.heads * problem.real.itemsize if return_lse else 0, 0, 0),
        "first_batch": (0, 0, 1),
    }
    calls = []
    for numbers in packed.kinds():
        one, operands = packed.sequence(numbers[0])
        queries = packed.queries[numbers[0]]
        rows = heads_first(target[queries])
        plan = plan_forward(one, operands, rows, threads)
        lse = None if sums is None else sums[queries.start * problem.heads :]
        given = {"out": rows, "lse": lse, "seed": seed, "first_batch": numbers[0]}
        calls.append(
            several.alike(plan, operands._asdict() | given, CALL_NAMES, moves(packed, numbers, CALL_NAMES, steps))
        )
    several.run(calls, threads)
    result = delivered(target, target, out)
    return result if sums is None else (result, sums[places(packed)])


def moves(packed: Packed, numbers: list[int], names: Sequence[str], steps: Mapping[str, tuple[int, int, int]]) -> Array:
    """Return how far what records have moves from the first of some sequences to each of them.

    `steps`, by the names of records: for each query, each key, and each sequence that lies in between.
    """
    starts = [(packed.queries[number].start, packed.keys[number].start, number) for number in numbers]
    between = np.array(starts, np.int64)
    return (between - between[0]) @ np.array([steps.get(name, (0, 0, 0)) for name in names], np.int64).T


def places(packed: Packed) -> Array:
    """Return where the numbers of queries lie, shape (T, H), where each sequence has them as (H, its own length)."""
    lengths = np.array([queries.stop - queries.start for queries in packed.queries], np.int64)
    starts = np.array([queries.start for queries in packed.queries], np.int64)
    heads = packed.problem.heads
    first = np.arange(len(packed.query)) + np.repeat((heads - 1) * starts, lengths)
    return first[:, None] + np.repeat(lengths, lengths)[:, None] * np.arange(heads)
