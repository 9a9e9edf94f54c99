"""The CPU backend of packed sequences: the plans of each sequence alone, run as one call.

Sequences of one kind, as `fastattn.call.packed.Packed.kinds` puts them together, have one plan: what their records
differ in is computed at once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from fastattn.call.out import delivered, target_for
from fastattn.call.packed import Packed, heads_first
from fastattn.call.problem import Array, Shape
from fastattn.call.shapes import split_shape
from fastattn.call.upstream import Upstream, folded
from fastattn.cpu.host import several
from fastattn.cpu.host.backward import CALL_NAMES as GRADIENT_NAMES
from fastattn.cpu.host.backward import Arrays, by_keys, own_axes, planned
from fastattn.cpu.host.calls import Plan
from fastattn.cpu.host.forward import plan_forward
from fastattn.cpu.kernels.records import CALL, GRADIENT_ARRAYS

CALL_NAMES = (CALL.names or ())[2:]  # behind the plan and the working memory

#: How far what a record has moves, by its name there: for each query that lies in between, for each key, for each
#: sequence, and for each sequence of the same kind.
Steps: TypeAlias = "dict[str, tuple[int, int, int, int]]"


def attention(packed: Packed, out: Array | None, return_lse: bool, seed: int, threads: int) -> Any:
    """Compute attention of packed sequences; the results asked for, as `fastattn.attention_varlen` returns them."""
    problem = packed.problem
    target = target_for(out, problem, (packed.query, packed.key, packed.value))
    sums = np.empty(len(packed.query) * problem.heads, problem.real) if return_lse else None
    steps = {
        **_by_query(query=packed.query, out=target),
        **_by_key(key=packed.key, value=packed.value),
        "lse": (problem.heads * problem.real.itemsize, 0, 0, 0),
        "first_batch": (0, 0, 1, 0),
    }
    calls = []
    for numbers in packed.kinds():
        one, operands = packed.sequence(numbers[0], numbered=False)
        queries = packed.queries[numbers[0]]
        rows = heads_first(target[queries])
        plan = plan_forward(one, operands, rows, threads)
        lse = None if sums is None else sums[queries.start * problem.heads :]
        objects = {**operands._asdict(), "out": rows, "lse": lse, "seed": seed, "first_batch": numbers[0]}
        calls.append(_alike(packed, numbers, plan, objects, CALL_NAMES, steps))
    several.run(calls, threads)
    result = delivered(target, target, out)
    return result if sums is None else (result, sums[_places(packed)])


def backward(packed: Packed, upstream: Upstream, seed: int, threads: int) -> tuple[Array, Array, Array]:
    """Return the gradients of query, key and value, with their shapes."""
    problem, real = packed.problem, packed.problem.real
    lead, heads, places = problem.rows_shape, problem.heads, _places(packed)
    own = own_axes(
        problem, *(split_shape(heads_first(each).shape, problem, True) for each in (packed.key, packed.value))
    )
    summed = tuple(size if axis in own else 1 for axis, size in enumerate(lead))
    grad_query = np.zeros((len(packed.query), heads, problem.head_dim), real)
    grad_key, grad_value = (
        np.zeros((len(packed.key), math.prod(summed), features), real)
        for features in (problem.head_dim, problem.value_dim)
    )
    lse, grad_lse = (_by_sequence(numbers, places) for numbers in (upstream.lse, upstream.grad_lse))
    deltas = np.empty((len(packed.query) * heads, 3), real)
    steps = {
        **_by_query(query=packed.query, grad_out=upstream.grad_out, out=upstream.out, grad_query=grad_query),
        **_by_key(key=packed.key, value=packed.value, grad_key=grad_key, grad_value=grad_value),
        **dict.fromkeys(("lse", "grad_lse"), (heads * real.itemsize, 0, 0, 0)),
        "deltas": (3 * heads * real.itemsize, 0, 0, 0),
        "first_batch": (0, 0, 1, 0),
    }
    calls = []
    for numbers in packed.kinds():
        one, operands = packed.sequence(numbers[0], numbered=False)
        if not one.keys or not one.queries or 0 in lead:
            continue
        queries, keys = packed.queries[numbers[0]], packed.keys[numbers[0]]
        arrived, first = packed.upstream(numbers[0], upstream), queries.start * heads
        arrays: Arrays = dict.fromkeys(GRADIENT_ARRAYS)
        arrays |= operands._asdict()
        arrays |= {
            "grad_out": arrived.grad_out,
            "out": arrived.out,
            "grad_query": _split(grad_query[queries], lead),
            "grad_key": _split(grad_key[keys], summed),
            "grad_value": _split(grad_value[keys], summed),
            "lse": lse[first:],
            "grad_lse": None if grad_lse is None else grad_lse[first:],
            "deltas": deltas[first:],
        }
        plan, counters = planned(by_keys, one, arrays, upstream.rounded, own, one.scores.scale, threads)
        turns = np.zeros((len(numbers), counters), np.int64)
        objects = {**arrays, "turns": turns, "seed": seed, "first_batch": numbers[0]}
        of_kind = {**steps, "turns": (0, 0, 0, turns.strides[0])}
        calls.append(_alike(packed, numbers, plan, objects, GRADIENT_NAMES, of_kind))
    several.run(calls, threads)
    return (
        _folded(packed, grad_query, packed.query, packed.queries, lead, False),
        _folded(packed, grad_key, packed.key, packed.keys, summed, True),
        _folded(packed, grad_value, packed.value, packed.keys, summed, True),
    )


def _by_query(**arrays: Array) -> Steps:
    return {name: (array.strides[0], 0, 0, 0) for name, array in arrays.items()}


def _by_key(**arrays: Array) -> Steps:
    return {name: (0, array.strides[0], 0, 0) for name, array in arrays.items()}


def _alike(
    packed: Packed, numbers: list[int], plan: Plan, objects: dict[str, Any], names: Sequence[str], steps: Steps
) -> several.Alike:
    """Describe the calls of sequences of one kind, where `objects` are those of the first."""
    starts = [(packed.queries[n].start, packed.keys[n].start, n, rank) for rank, n in enumerate(numbers)]
    between = np.array(starts, np.int64)
    none = (0, 0, 0, 0)
    by_name = [none if objects.get(name) is None else steps.get(name, none) for name in names]
    return several.alike(plan, objects, names, (between - between[0]) @ np.array(by_name, np.int64).T)


def _places(packed: Packed) -> Array:
    """Return where the numbers of queries lie, shape (T, H), where each sequence has them as (H, its own length)."""
    lengths = np.array([queries.stop - queries.start for queries in packed.queries], np.int64)
    starts = np.array([queries.start for queries in packed.queries], np.int64)
    heads = packed.problem.heads
    first = np.arange(len(packed.query)) + np.repeat((heads - 1) * starts, lengths)
    return first[:, None] + np.repeat(lengths, lengths)[:, None] * np.arange(heads)


def _by_sequence(numbers: Array | None, places: Array) -> Any:
    """Return numbers of queries, shape (T, H), as each sequence has them."""
    if numbers is None:
        return None
    laid_out = np.empty(places.size, numbers.dtype)
    laid_out[places] = numbers
    return laid_out


def _split(array: Array, lead: Shape) -> Array:
    """Return a view of the rows of a sequence with the axes of an operand."""
    view = heads_first(array)
    return view.reshape(*lead, *view.shape[1:])


def _folded(packed: Packed, gradient: Array, argument: Array, parts: list[slice], lead: Shape, shared: bool) -> Array:
    """Return a gradient with the shape of its argument, summed over heads where that was broadcast along them."""
    if gradient.shape == argument.shape:
        return gradient
    found = np.empty(argument.shape, gradient.dtype)
    for part in parts:  # each as a call of its own sums it, to the bit
        own = heads_first(found[part])
        own[...] = folded(np.ascontiguousarray(_split(gradient[part], lead)), own.shape, packed.problem, shared)
    return found
