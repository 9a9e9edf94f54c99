"""The CPU backend of packed sequences: the plans of each sequence alone, run as one call.

Sequences of one kind, as `fastattn.call.packed.Packed.kinds` puts them together, have one plan: what their records
differ in is computed at once for all of them. Gradients of captured arrays, which every sequence adds to, are those of
one sequence after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from fastattn.call.head_gradients import gradient_of_sinks, gradient_of_slopes
from fastattn.call.out import delivered, target_for
from fastattn.call.packed import Packed, heads_first
from fastattn.call.problem import Array, Operands, Problem, Shape
from fastattn.call.shapes import split_shape
from fastattn.call.upstream import OF_HEADS, Upstream, folded
from fastattn.cpu.host import several
from fastattn.cpu.host.backward import CALL_NAMES as GRADIENT_NAMES
from fastattn.cpu.host.backward import Arrays, arrival_of, by_keys, by_parts, own_axes, planned, tile_of
from fastattn.cpu.host.backward import run as run_alone
from fastattn.cpu.host.calls import Plan
from fastattn.cpu.host.forward import plan_forward, tile_of_functions
from fastattn.cpu.host.functions import Parts, captured_among, prepared
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
    with ExitStack() as until_run:
        for numbers in packed.kinds():
            one, operands = packed.sequence(numbers[0], numbered=False)
            queries = packed.queries[numbers[0]]
            rows = heads_first(target[queries])
            plan = plan_forward(one, operands, rows, threads)
            lse = None if sums is None else sums[queries.start * problem.heads :]
            ready = until_run.enter_context(prepared(_numbered(one, numbers[0]), operands, tile_of_functions(one)))
            objects = {**ready._asdict(), "functions": ready.captured, "out": rows, "lse": lse, "seed": seed}
            objects["first_batch"] = numbers[0]
            partials = plan.new_partials(len(numbers))
            own = {**steps, "partials": (0, 0, 0, partials.strides[0])}
            calls.append(_alike(packed, numbers, plan, {**objects, "partials": partials}, CALL_NAMES, own))
        several.run(calls, threads)
    result = delivered(target, target, out)
    return result if sums is None else (result, sums[places_of(packed.queries, problem.heads)])


def backward(packed: Packed, upstream: Upstream, names: Sequence[str], seed: int, threads: int) -> dict[str, Array]:
    """Return gradients by the names of the arguments, those that are wanted among them.

    Those of query, key and value have their shapes, those of captured arrays theirs, in float64; what has a number for
    each head, has it for each sequence: (B, Hq).
    """
    work = _Backward(packed, upstream, names, seed, threads)
    with ExitStack() as until_run:
        calls = [each for numbers in packed.kinds() for each in work.calls(numbers, until_run)]
        several.run(calls, threads)
    return work.found()


class _Backward:
    """The backward pass of packed sequences: arrays of what they all have, and the calls that write there.

    Numbers of queries lie as each sequence has them, (H, its own length), one sequence behind the other.
    """

    def __init__(self, packed: Packed, upstream: Upstream, names: Sequence[str], seed: int, threads: int) -> None:
        self.packed, self.upstream, self.names, self.seed, self.threads = packed, upstream, names, seed, threads
        self.problem = problem = packed.problem
        real, self.lead = problem.real, problem.rows_shape
        self.arrival = arrival_of(problem, names, upstream)
        shapes = (heads_first(each).shape for each in (packed.key, packed.value))
        self.own = own_axes(problem, *(split_shape(shape, problem, True) for shape in shapes))
        self.summed = tuple(size if axis in self.own else 1 for axis, size in enumerate(self.lead))
        shared = math.prod(self.summed)
        self.gradients = {
            "query": np.zeros((len(packed.query), problem.heads, problem.head_dim), real),
            "key": np.zeros((len(packed.key), shared, problem.head_dim), real),
            "value": np.zeros((len(packed.key), shared, problem.value_dim), real),
        }
        places, count = places_of(packed.queries, problem.heads), len(packed.query) * problem.heads
        self.of_rows: dict[str, Any] = {
            "lse": _by_sequence(upstream.lse, places),
            "grad_lse": _by_sequence(upstream.grad_lse, places),
            "deltas": np.empty((count, 3), real),
            "sink_weights": np.full(count, np.nan, real) if "sinks" in names else None,
            "slope_sums": np.zeros(count, real) if "alibi_slopes" in names else None,
        }
        self.steps = self._steps()

    def _steps(self) -> Steps:
        packed, grads = self.packed, self.gradients
        rows = {name: self.problem.heads * each.strides[0] for name, each in self.of_rows.items() if each is not None}
        return {
            **_by_query(query=packed.query, grad_out=self.upstream.grad_out, out=self.upstream.out),
            **_by_key(key=packed.key, value=packed.value),
            **_by_query(grad_query=grads["query"]),
            **_by_key(grad_key=grads["key"], grad_value=grads["value"]),
            **{name: (step, 0, 0, 0) for name, step in rows.items()},
            "first_batch": (0, 0, 1, 0),
        }

    def calls(self, numbers: list[int], until_run: ExitStack) -> list[several.Alike]:
        """Describe the calls of sequences of one kind, if there is something to do."""
        one, operands = self.packed.sequence(numbers[0], numbered=False)
        if not one.keys or not one.queries or 0 in self.lead:
            return []
        ready = until_run.enter_context(prepared(_numbered(one, numbers[0]), operands, tile_of(one)))
        arrays = self.arrays(numbers[0], operands)
        plan, counters = planned(by_keys, one, arrays, self.arrival, self.own, self.threads)
        turns = np.zeros((len(numbers), counters), np.int64)
        objects = {**arrays, "functions": ready.captured, "turns": turns, "seed": self.seed, "first_batch": numbers[0]}
        steps = {**self.steps, "turns": (0, 0, 0, turns.strides[0])}
        return [_alike(self.packed, numbers, plan, objects, GRADIENT_NAMES, steps)]

    def arrays(self, number: int, operands: Operands) -> Arrays:
        """Return what a sequence reads and writes."""
        packed, grads = self.packed, self.gradients
        queries, keys = packed.queries[number], packed.keys[number]
        arrived = packed.upstream(number, self.upstream)
        arrays: Arrays = dict.fromkeys(GRADIENT_ARRAYS)
        arrays |= operands._asdict()
        del arrays["captured"]  # of another kind
        arrays |= {"grad_out": arrived.grad_out, "out": arrived.out}
        arrays["grad_query"] = _split(grads["query"][queries], self.lead)
        arrays["grad_key"], arrays["grad_value"] = (_split(grads[of][keys], self.summed) for of in ("key", "value"))
        return arrays | {name: self.rows(number, name) for name in self.of_rows}

    def rows(self, number: int, name: str) -> Array | None:
        """Return the numbers of queries of a sequence."""
        queries, heads, numbers = self.packed.queries[number], self.problem.heads, self.of_rows[name]
        return None if numbers is None else numbers[queries.start * heads : queries.stop * heads]

    def found(self) -> dict[str, Array]:
        """Return the gradients, when all has been run."""
        packed, names, grads = self.packed, self.names, self.gradients
        scale = self.problem.scores.scale
        with np.errstate(all="ignore"):
            if self.arrival.without_scale:
                grads["query"] *= scale
                grads["key"] *= scale
            found = {
                "query": _folded(packed, grads["query"], packed.query, packed.queries, self.lead, False),
                "key": _folded(packed, grads["key"], packed.key, packed.keys, self.summed, True),
                "value": _folded(packed, grads["value"], packed.value, packed.keys, self.summed, True),
            }
            for name in OF_HEADS:
                if name in names:
                    found[name] = np.zeros((len(packed.queries), self.problem.heads))
                    for number, total in enumerate(found[name]):
                        total[:] = self.of_heads(number, name).reshape(-1)
        names = captured_among(self.problem, names)
        return found | self.captured(names) if names else found

    def of_heads(self, number: int, name: str) -> Array:
        """Return the gradients of slopes or sinks of a sequence, shape (Hk, G)."""
        packed, rows = self.packed, self.rows(number, "slope_sums" if name == "alibi_slopes" else "sink_weights")
        assert rows is not None
        if name == "alibi_slopes":
            queries = packed.queries[number]
            return gradient_of_slopes(rows.reshape(*self.lead, queries.stop - queries.start), self.arrival.factor)
        return gradient_of_sinks(*packed.sequence(number), packed.upstream(number, self.upstream), rows)

    def captured(self, names: tuple[str, ...]) -> dict[str, Array]:
        """Return the gradients of captured arrays: the sums over the sequences, in their order."""
        totals: dict[str, Array] = {}
        for number in range(len(self.packed.queries)):
            one, operands = self.packed.sequence(number)
            parts = Parts(one, operands, names)
            if one.keys and one.queries and 0 not in self.lead:
                arrays = self.arrays(number, operands)
                call = (one, arrays, self.arrival, self.own, self.threads, parts.number)
                plan, counters = planned(by_parts, *call)
                with prepared(one, operands, tile_of(one), parts) as ready:
                    functions = {**arrays, "functions": ready.captured}
                    run_alone(plan, counters, functions, {"seed": self.seed, "first_batch": number})
            with np.errstate(all="ignore"):
                totals = {name: totals.get(name, 0) + each for name, each in parts.sums().items()}
        return totals


def _numbered(problem: Problem, number: int) -> Problem:
    """Return the problem of a sequence that knows its number, if there are functions, which are told."""
    if not problem.scores.has_functions:
        return problem
    return replace(problem, scores=replace(problem.scores, first_batch=number))


def _by_query(**arrays: Array) -> Steps:
    return {name: (array.strides[0], 0, 0, 0) for name, array in arrays.items()}


def _by_key(**arrays: Array) -> Steps:
    return {name: (0, array.strides[0], 0, 0) for name, array in arrays.items()}


def _alike(
    packed: Packed, numbers: list[int], plan: Plan, objects: dict[str, Any], names: Sequence[str], steps: Steps
) -> several.Alike:
    """Describe the calls of sequences of one kind, where `objects` are those of the first."""
    if len(numbers) == 1:
        return several.alike(plan, objects, names, np.zeros((1, len(names)), np.int64))
    starts = [(packed.queries[n].start, packed.keys[n].start, n, rank) for rank, n in enumerate(numbers)]
    between = np.array(starts, np.int64)
    none = (0, 0, 0, 0)
    by_name = [none if objects.get(name) is None else steps.get(name, none) for name in names]
    return several.alike(plan, objects, names, (between - between[0]) @ np.array(by_name, np.int64).T)


def places_of(sequences: Sequence[slice], heads: int) -> Array:
    """Return where the numbers of queries lie, shape (T, H), where each sequence has them as (H, its own length)."""
    lengths = np.array([queries.stop - queries.start for queries in sequences], np.int64)
    starts = np.array([queries.start for queries in sequences], np.int64)
    first = np.arange(lengths.sum()) + np.repeat((heads - 1) * starts, lengths)
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
