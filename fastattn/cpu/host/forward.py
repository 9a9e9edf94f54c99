"""The CPU backend: a call's description, planned once, runs on the addresses of each call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastattn.call.problem import Operands, Problem
from fastattn.cpu.host import pool, processors
from fastattn.cpu.host.builtin import bind
from fastattn.cpu.host.kernels import describe, load, steps_of
from fastattn.cpu.host.plan import Plan, make_plan
from fastattn.cpu.kernels.records import ALIGNMENT, CALL, RECORD_BYTES
from fastattn.machine import os_threads
from fastattn.machine.libraries import Library
from fastattn.machine.objects import address_of, objects_are_as_expected
from fastattn.machine.table import host

if TYPE_CHECKING:
    from fastattn.cpu.host.backward import GradientPlan

Array = NDArray[Any]
T = TypeVar("T")

REMEMBERED = 1024  # plans


class _Memory(os_threads.local):
    """Working memory of the calling thread: an address, and the array that it is in; None while a call has it."""

    held: tuple[int, Array] | None = None


_memory = _Memory()


def _scratch(size: int) -> tuple[int, Array]:
    """This thread's working memory of at least `size` bytes: its address, and what keeps it alive."""
    held = _memory.held
    if held is None or held[1].size < size + ALIGNMENT:
        array = np.empty(size + ALIGNMENT, np.uint8)
        address = address_of(array)
        held = _memory.held = (address + -address % ALIGNMENT, array)
    return held


@contextlib.contextmanager
def scratch_memory(size: int) -> Iterator[int]:
    """Working memory for a call that other calls may interrupt: a signal handler's, in this very thread."""
    scratch, held = _scratch(size)
    _memory.held = None  # who interrupts needs memory of its own
    yield scratch
    _memory.held = scratch, held


_prepared: dict[Any, Prepared] = {}


def prepare(problem: Problem, operands: Operands, out: Array, threads: int, additive: bool = False) -> Prepared:
    """Plan a call, or find the plan of one like it; `out` is an array like those that will be written to."""
    key = (
        problem,
        operands.query.strides,
        operands.key.strides,
        operands.value.strides,
        *(None if mask is None else (mask.strides, mask.dtype) for mask in (operands.bias, operands.keep)),
        out.strides,
        threads,
        additive,
    )
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = Prepared(problem, operands, _split_heads(problem, out), threads, additive)
        remember(_prepared, key, prepared)
    return prepared


def remember(plans: dict[Any, T], key: Any, prepared: T) -> None:
    """Keep a plan for calls that agree in `key`; with too many of them, only this one."""
    if len(plans) >= REMEMBERED:
        plans.clear()
    plans[key] = prepared


def _split_heads(problem: Problem, array: Array) -> Array:
    """An output array's view with the axes of the operands, (*batch, Hk, G, ...)."""
    return array.reshape(*problem.rows_shape, *array.shape[-2:])


class Prepared:
    """All that calls with the same shapes, strides and options share."""

    def __init__(self, problem: Problem, operands: Operands, out: Array, threads: int, additive: bool = False):
        self.problem = problem
        self.row, self.score = row, score = host(), "additive" if additive else "dot"
        self.plan = plan = make_plan(problem, operands, out, row, threads, additive)
        self.threads = pool.concurrency(plan.tasks, plan.flops, threads)
        steps = steps_of(problem, all_of=additive)
        self.forward = load(describe("forward", plan.tile, row, score, steps))
        self.most = pool.tasks_at_a_time(plan.tasks, plan.flops)
        self.quick: Callable[..., int] | None = None
        if objects_are_as_expected():
            numbers = {"plan": plan.address, "scratch_bytes": plan.scratch_bytes}
            self.quick = bind(self.forward, "quick", **numbers)
            if self.threads > 1:
                numbers.update(task=self.forward.addresses["task"], workers=self.threads - 1, most=self.most)
                self.shared = bind(self.forward, "shared", **numbers)

    @property
    def weights(self) -> Library:
        """The kernel of the matrix of weights, which few calls want."""
        return load(describe("weights", self.plan.tile, self.row, self.score, steps_of(self.problem, all_of=True)))


def run(
    plan: Plan,
    threads: int,
    kernels: Library,
    seed: int,
    operands: Operands,
    out: Array | None = None,
    lse: Array | None = None,
    weights: Array | None = None,
    weight: Array | None = None,
) -> None:
    """Run a plan's tasks, on arrays whose addresses are those of the operands that it was made for."""
    if not plan.tasks:
        return
    arrays = {**operands._asdict(), "out": out, "lse": lse, "weights": weights, "weight": weight}
    run_call(CALL, plan, threads, kernels, seed, arrays)


def run_call(
    layout: np.dtype[Any],
    plan: Plan | GradientPlan,
    threads: int,
    kernels: Library,
    seed: int,
    arrays: Mapping[str, Array | None],
) -> None:
    """Write a call's record, whose fields are whole numbers, and run the plan's tasks."""
    numbers = {name: address_of(array) for name, array in arrays.items() if array is not None}
    numbers["plan"] = address_of(plan.record)
    numbers["seed"] = seed - 2**64 if seed >= 2**63 else seed
    with scratch_memory(threads * plan.scratch_bytes) as scratch:
        numbers["scratch"], numbers["scratch_bytes"] = scratch, plan.scratch_bytes
        call = np.array([numbers.get(name, 0) for name in layout.names or ()], np.int64)
        pool.run(kernels, address_of(call), plan.tasks, plan.flops, threads)


def run_prepared(prepared: Prepared, *objects: Any) -> None:
    """Run a call's tasks. `objects`: the operands, out, lse, weight, seed."""
    plan, threads, quick = prepared.plan, prepared.threads, prepared.quick
    if not plan.tasks:
        return
    is_shared = is_long = False
    if threads > 1:  # much work is always shared, less only while workers are awake or will be wanted again soon
        is_shared = pool.rhythm.begin() or plan.flops >= pool.WORTH_WAKING
    elif plan.flops >= pool.WORTH_SHARING:
        processors.look_if_old()
        is_long = plan.flops >= pool.TURN_FLOPS
    if quick is None or is_long:
        out, lse, weight, seed = objects[7:]
        run(plan, threads, prepared.forward, seed, Operands(*objects[:7]), out, lse, weight=weight)
    elif is_shared:
        at, held = _scratch(RECORD_BYTES + threads * plan.scratch_bytes)
        _memory.held = None  # who interrupts needs memory of its own
        arguments = (held, *objects)
        most, tasks, flops = prepared.most, plan.tasks, plan.flops
        if not pool.share(prepared.forward, prepared.shared, arguments, at, tasks, flops, threads - 1, most):
            quick(*arguments)
        _memory.held = at, held
    else:
        _, held = _scratch(RECORD_BYTES + plan.scratch_bytes)
        quick(held, *objects)
    if threads > 1 and pool.rhythm.end(threads - 1):
        pool.rouse(threads - 1)


def attention(
    prepared: Prepared,
    operands: Operands,
    seed: int,
    out: Array | None,
    return_lse: bool,
    return_weights: bool,
    weight: Array | None = None,
) -> Any:
    """Run a prepared call; the results asked for, as `fastattn.attention` returns them.

    `weight` is that of additive attention, contiguous.
    """
    problem = prepared.problem
    plan, threads = prepared.plan, prepared.threads
    result = np.empty(problem.out_shape, problem.real) if out is None else out
    lse = np.empty(problem.lse_shape, problem.real) if return_lse else None
    weights = None
    if return_weights:
        weights = np.empty(problem.weights_shape, problem.real)
        run(plan, threads, prepared.weights, seed, operands, weights=weights, weight=weight)
    run_prepared(prepared, *operands, result, lse, weight, seed)
    if lse is None and weights is None:
        return result
    return tuple(array for array in (result, lse, weights) if array is not None)
