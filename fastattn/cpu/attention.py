"""The CPU backend: a call's description, planned once, runs on the addresses of each call."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.cpu import pool
from fastattn.cpu.kernels import Library, kernel_name, library
from fastattn.cpu.layout import ALIGNMENT, CALL
from fastattn.cpu.plan import make_plan
from fastattn.isa import host
from fastattn.problem import Operands, Problem

Array = NDArray[Any]

OBJECT_HEADER = object.__basicsize__
_memory = threading.local()


def _scratch(size: int) -> tuple[int, Array]:
    """This thread's working memory of at least `size` bytes: its address, and what keeps it alive."""
    held = getattr(_memory, "held", None)
    if held is None or held[1].size < size + ALIGNMENT:
        array = np.empty(size + ALIGNMENT, np.uint8)
        address = array.ctypes.data
        held = _memory.held = (address + -address % ALIGNMENT, array)
    return held


@cache
def _objects_are_as_expected() -> bool:
    """Whether an array's address stands where compiled code looks for it, behind the object's header."""
    import ctypes

    array = np.zeros(3)[1:]
    return ctypes.c_size_t.from_address(id(array) + OBJECT_HEADER).value == array.ctypes.data


def prepare(problem: Problem, operands: Operands, out: Array, threads: int) -> Prepared:
    """Plan a call; `out` is an array like those that will be written to."""
    split = _split_heads(problem, out)
    return Prepared(problem, operands, split, threads)


def _split_heads(problem: Problem, array: Array) -> Array:
    """An output array's view with the axes of the operands, (*batch, Hk, G, ...)."""
    return array.reshape(*problem.rows_shape, *array.shape[-2:])


class Prepared:
    """All that calls with the same shapes, strides and options share."""

    def __init__(self, problem: Problem, operands: Operands, out: Array, threads: int):
        self.problem = problem
        self.plan = plan = make_plan(problem, operands, out, host(), threads)
        self.threads = pool.concurrency(plan.tasks, plan.flops, threads)
        self.dtype = problem.dtype.name
        self.forward = library(kernel_name("forward", self.dtype, plan.tile))
        self.quick = self.threads == 1 and plan.flops < pool.TURN_FLOPS and _objects_are_as_expected()
        template = np.zeros(1, CALL)
        template["plan"] = plan.address
        template["scratch_bytes"] = plan.scratch_bytes
        self.template = template

    def run(
        self, query: Array, key: Array, value: Array, mask: Array | None, out: Array, lse: Array | None, seed: int
    ) -> None:
        """Compute `out`, and `lse` if it is given. The arrays are the call's own, not the operands made of them."""
        plan = self.plan
        if self.quick:
            scratch, _ = _scratch(plan.scratch_bytes)
            mask_id = 0 if mask is None else id(mask)
            lse_id = 0 if lse is None else id(lse)
            self.forward.quick(plan.address, id(query), id(key), id(value), mask_id, id(out), lse_id, scratch, seed)
            return
        self._run(self.forward, query, key, value, mask, out, lse, None, seed)

    def run_weights(self, query: Array, key: Array, mask: Array | None, weights: Array, seed: int) -> None:
        """Compute the weights."""
        kernels = library(kernel_name("weights", self.dtype, self.plan.tile))
        self._run(kernels, query, key, None, mask, None, None, weights, seed)

    def _run(
        self,
        kernels: Library,
        query: Array,
        key: Array,
        value: Array | None,
        mask: Array | None,
        out: Array | None,
        lse: Array | None,
        weights: Array | None,
        seed: int,
    ) -> None:
        plan = self.plan
        if not plan.tasks:
            return
        scratch, held = _scratch(self.threads * plan.scratch_bytes)
        _memory.held = None  # a signal handler's call in this thread, while this one runs, needs memory of its own
        call = self.template.copy()
        fields = call[0]
        for name, array in (
            ("query", query),
            ("key", key),
            ("value", value),
            ("mask", mask),
            ("out", out),
            ("lse", lse),
            ("weights", weights),
        ):
            if array is not None:
                fields[name] = array.ctypes.data
        fields["scratch"] = scratch
        fields["seed"] = seed - (1 << 64) if seed >= 1 << 63 else seed
        pool.run(kernels, call.ctypes.data, plan.tasks, plan.flops, self.threads)
        _memory.held = scratch, held


def attention(
    prepared: Prepared,
    arrays: tuple[Array, Array, Array, Array | None],
    seed: int,
    out: Array | None,
    return_lse: bool,
    return_weights: bool,
) -> Any:
    """Run a prepared call; the results asked for, as `fastattn.attention` returns them."""
    problem = prepared.problem
    query, key, value, mask = arrays
    result = np.empty(problem.out_shape, problem.dtype) if out is None else out
    lse = np.empty(problem.lse_shape, problem.dtype) if return_lse else None
    weights = None
    if return_weights:
        weights = np.empty(problem.weights_shape, problem.dtype)
        prepared.run_weights(query, key, mask, weights, seed)
    prepared.run(query, key, value, mask, result, lse, seed)
    if lse is None and weights is None:
        return result
    return tuple(array for array in (result, lse, weights) if array is not None)
