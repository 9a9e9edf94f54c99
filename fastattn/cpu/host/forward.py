"""The CPU backend of the forward pass: plans a call, and runs it on the addresses of its arrays."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.halves import BITS, name_of
from fastattn.call.out import delivered, target_for
from fastattn.call.problem import Operands, Problem
from fastattn.cpu.host import session
from fastattn.cpu.host.calls import Plan
from fastattn.cpu.host.decode import draft_decode, is_decode, may_be_in_words, steps_of_rows
from fastattn.cpu.host.functions import known_functions, prepared
from fastattn.cpu.host.kernels import describe, steps_of
from fastattn.cpu.host.own import own_heads
from fastattn.cpu.host.plan import choose_tile, draft_forward, may_be_of_bfloat16
from fastattn.cpu.host.threads import get_num_threads
from fastattn.machine.tile import TileShape

Array = NDArray[Any]


def evaluate(
    asked: Hashable,
    problem: Problem,
    operands: Operands,
    arrays: tuple[Array | None, ...],
    given: tuple[Any, ...],
    out: Array | None,
    return_lse: bool,
    return_weights: bool,
    seed: int | None = None,
    weight: Array | None = None,
    *,
    options: Mapping[str, Any],
) -> Any:
    """Plan a call and run it; one like it, of which the same is `asked`, will find the plan.

    Parameters
    ----------
    asked : hashable
        What is the same of calls that are alike, b"" if nothing is known of them.
    problem : Problem
    operands : Operands
    arrays, given : tuple
        Query first, and all others that are read: what was made of them, and the user's own.
    out : ndarray, or None
        Checked.
    return_lse, return_weights : bool
    seed : int, optional
    weight : ndarray, shape (D,), optional
        That of additive attention, contiguous.
    options : mapping of str to object
        Those that are arrays or functions, by name: what `again` will be given.
    """
    target, threads = target_for(out, problem, arrays), get_num_threads()
    score = "dot" if weight is None else "additive"
    plan = plan_forward(problem, operands, target, threads, score)
    alike = all(array is other for array, other in zip(arrays, given, strict=True))  # nothing had to be converted
    if asked and alike and (out is None or target is out) and all(map(has_lasting_dtype, (*given, out))):
        keep(asked, plan, problem, options, tile_of_functions(problem, score))
    # first: out may be the query
    matrix = weights(problem, operands, target, seed, threads, weight, score) if return_weights else None
    with prepared(problem, operands, tile_of_functions(problem, score)) as ready:
        result = attention(plan, *ready, target, return_lse, seed, weight, problem.scores.first_batch)
    if matrix is not None:
        result = (*(result if return_lse else (result,)), matrix)
    return delivered(result, target, out)


def has_lasting_dtype(array: Array | None) -> bool:
    """Whether no other dtype can come to be where an array's is: a signature may have nothing else of a structure's."""
    return array is None or array.dtype.names is None or array.dtype is BITS


def keep(asked: Hashable, plan: Plan, problem: Problem, options: Mapping[str, Any], tile: TileShape) -> None:
    """Have calls of which the same is asked find their plan, if numbers and captured values are all that differs."""
    with suppress(LookupError):
        own, known = own_heads(problem, options), known_functions(problem, options, tile)
        if known is not None:
            plan, asked = replace(plan, functions=known[0]), (asked, *known[1])
        session.current.plans.keep(asked, plan if own is None else replace(plan, own=own))


def again(
    plan: Plan,
    numbers: tuple[Any, ...],
    captured: tuple[tuple[Any, ...], ...],
    arrays: tuple[Array, Array, Array, Array | None, Array | None],
    out: Array | None,
    return_lse: bool,
    seed: int | None,
) -> Any:
    """Run a call like an earlier one, of which a plan was kept; None if its numbers are not such as calls may have.

    Parameters
    ----------
    plan : Plan
    numbers : tuple
        The arguments that heads have numbers of their own from, as `fastattn.cpu.host.own` names them.
    captured : tuple of tuple
        What the function of scores captures, and that of masks.
    arrays : tuple
        Query, key, value and both masks, as `attention` takes them.
    out, return_lse, seed
        As there.
    """
    heads = None
    if plan.own is not None:
        heads = plan.own(*numbers)
        if heads is None:
            return None
    if plan.functions is None:
        return attention(plan, *arrays, heads, None, out, return_lse, seed)
    record, held = plan.functions.record(captured)
    result = attention(plan, *arrays, heads, record, out, return_lse, seed)
    del held
    plan.functions.check(record)
    return result


def plan_forward(problem: Problem, operands: Operands, out: Array, threads: int, score: str = "dot") -> Plan:
    """Plan a call, or find the plan of one like it; `out` is an array like those that will be written to."""
    strides = tuple(None if array is None else array.strides for array in operands[:5])
    bias = None if operands.bias is None else operands.bias.dtype
    key = (problem, strides, bias, out.strides, out.dtype, threads, score)
    return session.current.plans.of(key, lambda: _plan("forward", problem, operands, out, threads, score))


def _plan(work: str, problem: Problem, operands: Operands, out: Array, threads: int, score: str) -> Plan:
    row = session.current.row
    split = out.reshape(*problem.rows_shape, *out.shape[-2:])
    if work == "forward" and score == "dot" and is_decode(row, problem):
        tile = row.wide_tile(problem.real.type.__name__)
        steps, in_pairs = steps_of_rows(problem), may_be_in_words(problem)
        kernel = describe("decode", tile, row, steps=steps, storage=name_of(problem.storage), in_pairs=in_pairs)
        return draft_decode(kernel, problem, operands, split, threads).finish(threads)
    steps = steps_of(problem, all_of=work != "forward" or score != "dot")
    tile = choose_tile(row, problem.real, problem.queries)
    kernel = describe(work, tile, row, score, steps, name_of(problem.storage), may_be_of_bfloat16(row, problem))
    return draft_forward(kernel, problem, operands, split, threads).finish(threads)


def tile_of_functions(problem: Problem, score: str = "dot") -> TileShape:
    """The tile of the blocks of scores that a call gives to the user's functions."""
    row = session.current.row
    if score == "dot" and is_decode(row, problem):
        return row.wide_tile(problem.real.type.__name__).lane
    return choose_tile(row, problem.real, problem.queries)


def attention(
    plan: Plan,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    keep: Array | None,
    heads: Array | None,
    functions: Any,
    out: Array | None,
    return_lse: bool,
    seed: int | None = None,
    weight: Array | None = None,
    first_batch: int = 0,
) -> Any:
    """Run a planned call; the results asked for, as `fastattn.attention` returns them.

    The arrays may be any with the addresses of the operands, and `bias` the boolean mask where that is alone; `weight`
    is that of additive attention, contiguous. `functions` is the record of the user's, or None.
    """
    if bias is not None and keep is None and not plan.has_bias:
        bias, keep = None, bias
    if out is None:
        out = np.empty(plan.out_shape, plan.storage)
    lse = np.empty(plan.out_shape[:-1], plan.real) if return_lse else None
    here = session.current
    if plan.is_small:  # as `Session.run` does, without a microsecond's tenth for that
        held = here.memory.of(plan.memory_bytes)[1]
        # fmt: off
        plan.calls.quick(
            held, plan.record, query, key, value, bias, keep, heads, functions, out, lse, weight, None, seed,
            first_batch,
        )
        # fmt: on
    else:
        objects = (query, key, value, bias, keep, heads, functions, out, lse, weight, None, seed, first_batch)
        here.run(plan, (*objects, plan.new_partials()) if plan.partials_bytes else objects)
    return out if lse is None else (out, lse)


def weights(
    problem: Problem,
    operands: Operands,
    out: Array,
    seed: int | None,
    threads: int,
    weight: Array | None = None,
    score: str = "dot",
) -> Array:
    """Return the matrix of weights, which few calls want."""
    matrix = np.empty(problem.weights_shape, problem.storage)
    plan = _plan("weights", problem, operands, out, threads, score)
    first_batch = problem.scores.first_batch
    with prepared(problem, operands, choose_tile(session.current.row, problem.real, problem.queries)) as ready:
        query, key, _, *others = ready
        session.current.run(plan, (query, key, None, *others, None, None, weight, matrix, seed, first_batch))
    return matrix
