"""The CPU backend: a call's description, planned once, runs on the addresses of each call."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastattn.cpu import pool
from fastattn.cpu.kernels import Library, kernel_name, library
from fastattn.cpu.layout import ALIGNMENT, OBJECT_HEADER, RECORD_BYTES
from fastattn.cpu.plan import Plan, make_plan
from fastattn.isa import host
from fastattn.problem import Operands, Problem

Array = NDArray[Any]
T = TypeVar("T")

TUPLE_HEADER = tuple.__basicsize__
REMEMBERED = 1024  # plans
_memory = threading.local()


def _scratch(size: int) -> tuple[int, Array]:
    """This thread's working memory of at least `size` bytes: its address, and what keeps it alive."""
    held = getattr(_memory, "held", None)
    if held is None or held[1].size < size + ALIGNMENT:
        array = np.empty(size + ALIGNMENT, np.uint8)
        address = array.ctypes.data
        held = _memory.held = (address + -address % ALIGNMENT, array)
    return held


@contextlib.contextmanager
def scratch_memory(size: int) -> Iterator[int]:
    """Working memory for a call that other calls may interrupt: a signal handler's, in this very thread."""
    scratch, held = _scratch(size)
    _memory.held = None  # who interrupts needs memory of its own
    yield scratch
    _memory.held = scratch, held


@cache
def _objects_are_as_expected() -> bool:
    """Whether an array's address stands behind the object's header, and a tuple's items behind its own.

    Compiled code reads them there. Asking an array for its address takes longer than computing a small call.
    """
    array = np.zeros(3)[1:]
    arrays = (array, None)
    return (
        ctypes.c_size_t.from_address(id(array) + OBJECT_HEADER).value == array.ctypes.data
        and ctypes.c_size_t.from_address(id(arrays) + TUPLE_HEADER).value == id(array)
        and ctypes.c_size_t.from_address(id(arrays) + TUPLE_HEADER + 8).value == id(None)
    )


def _objects(arrays: tuple[Array | None, ...]) -> Array:
    """The same for where they do not: memory that looks to compiled code like a tuple's items, and like arrays."""
    memory = np.zeros(2 * len(arrays), np.uint64)
    for i, array in enumerate(arrays):
        memory[i] = id(None) if array is None else memory.ctypes.data + 8 * (len(arrays) + i) - OBJECT_HEADER
        memory[len(arrays) + i] = 0 if array is None else array.ctypes.data
    return memory


_prepared: dict[Any, Prepared] = {}


def prepare(problem: Problem, operands: Operands, out: Array, threads: int, additive: bool = False) -> Prepared:
    """Plan a call, or find the plan of one like it; `out` is an array like those that will be written to."""
    mask = operands.mask
    key = (
        problem,
        operands.query.strides,
        operands.key.strides,
        operands.value.strides,
        None if mask is None else (mask.strides, mask.dtype),
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
        self.plan = plan = make_plan(problem, operands, out, host(), threads, additive)
        self.threads = pool.concurrency(plan.tasks, plan.flops, threads)
        if additive:
            forward, self._weights = "additive", "additive_weights"
        else:
            forward = "masked" if problem.mask_kind != "none" or problem.dropout_p > 0 else "forward"
            self._weights = "weights"
        self.forward = library(kernel_name(forward, problem.dtype.name, plan.tile))

    @property
    def weights(self) -> Library:
        """The kernels of the matrix of weights, which few calls want."""
        return library(kernel_name(self._weights, self.problem.dtype.name, self.plan.tile))


def run(
    plan: Plan,
    threads: int,
    kernels: Library,
    seed: int,
    query: Array,
    key: Array,
    value: Array | None = None,
    mask: Array | None = None,
    out: Array | None = None,
    lse: Array | None = None,
    weights: Array | None = None,
    weight: Array | None = None,
) -> None:
    """Run a plan's tasks, on arrays whose addresses are those of the operands that it was made for."""
    if not plan.tasks:
        return
    arrays = (query, key, value, mask, out, lse, weights, weight)
    objects = id(arrays) + TUPLE_HEADER
    if not _objects_are_as_expected():
        memory = _objects(arrays)
        objects = memory.ctypes.data
    is_shared = threads > 1 and pool.is_worth_sharing(plan.flops)
    if not is_shared and plan.flops < pool.TURN_FLOPS:
        at, _ = _scratch(RECORD_BYTES + plan.scratch_bytes)
        kernels.quick(at, plan.address, seed, objects)
    else:
        at, held = _scratch(RECORD_BYTES + threads * plan.scratch_bytes)
        _memory.held = None  # who interrupts needs memory of its own
        pool.run(kernels, at, plan.tasks, plan.flops, threads, (plan.address, plan.scratch_bytes, seed, objects))
        _memory.held = at, held
    if threads > 1:
        pool.note_call(min(threads, plan.tasks) - 1)


def attention(
    prepared: Prepared,
    arrays: tuple[Array, Array, Array, Array | None],
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
    query, key, value, mask = arrays
    result = np.empty(problem.out_shape, problem.dtype) if out is None else out
    lse = np.empty(problem.lse_shape, problem.dtype) if return_lse else None
    weights = None
    if return_weights:
        weights = np.empty(problem.weights_shape, problem.dtype)
        run(plan, threads, prepared.weights, seed, query, key, mask=mask, weights=weights, weight=weight)
    run(plan, threads, prepared.forward, seed, query, key, value, mask, result, lse, weight=weight)
    if lse is None and weights is None:
        return result
    return tuple(array for array in (result, lse, weights) if array is not None)
