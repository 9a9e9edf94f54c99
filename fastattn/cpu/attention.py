"""The CPU backend: plans are remembered, working memory is reused, kernels are fetched when a call needs them."""

import threading

import numpy as np

from fastattn.cpu import pool
from fastattn.cpu.kernels import kernel_name, library
from fastattn.cpu.layout import ALIGNMENT, CALL
from fastattn.cpu.plan import Plan, make_plan
from fastattn.isa import host
from fastattn.problem import Operands, Problem

_memory = threading.local()


def _scratch(size: int) -> int:
    """The address of this thread's working memory, of at least `size` bytes."""
    held = getattr(_memory, "held", None)
    if held is None or held.size < size + ALIGNMENT:
        held = _memory.held = np.empty(size + ALIGNMENT, np.uint8)
        address = held.ctypes.data
        _memory.address = address + -address % ALIGNMENT
    return _memory.address


def split_heads(problem: Problem, array: np.ndarray) -> np.ndarray:
    """A view of an output array with the axes of the operands, (*batch, Hk, G, ...)."""
    return array.reshape(*problem.rows_shape, *array.shape[-2:])


class Prepared:
    """A description of a call, planned; `__call__` runs it on new addresses."""

    def __init__(self, problem: Problem, operands: Operands, out: np.ndarray, threads: int):
        self.plan = plan = make_plan(problem, operands, split_heads(problem, out), host(), threads)
        self.threads = pool.concurrency(plan.tasks, plan.flops, threads)
        self.forward = library(kernel_name("forward", problem.dtype.name, plan.tile))
        self.scratch_bytes = plan.scratch_bytes
        template = np.zeros(1, CALL)
        template["plan"] = plan.address
        template["scratch_bytes"] = plan.scratch_bytes
        self.template = template

    def __call__(self, query: int, key: int, value: int, mask: int, out: int, lse: int, seed: int) -> None:
        plan = self.plan
        if not plan.tasks:
            return
        call = self.template.copy()
        words = call.view(np.int64)
        words[1:] = (query, key, value, mask, out, lse, 0, seed, _scratch(self.threads * self.scratch_bytes), self.scratch_bytes)
        pool.run(self.forward, words.ctypes.data, plan.tasks, plan.flops, self.threads)
