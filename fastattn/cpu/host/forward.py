"""The CPU backend of the forward pass: plans a call, and runs it on the addresses of its arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.problem import Operands, Problem
from fastattn.cpu.host import session
from fastattn.cpu.host.calls import Plan
from fastattn.cpu.host.kernels import describe, steps_of
from fastattn.cpu.host.plan import choose_tile, draft_forward

Array = NDArray[Any]


def plan_forward(problem: Problem, operands: Operands, out: Array, threads: int, score: str = "dot") -> Plan:
    """Plan a call, or find the plan of one like it; `out` is an array like those that will be written to."""
    strides = tuple(None if array is None else array.strides for array in operands[:5])
    bias = None if operands.bias is None else operands.bias.dtype
    key = (problem, strides, bias, out.strides, threads, score)
    return session.current.plans.of(key, lambda: _plan("forward", problem, operands, out, threads, score))


def _plan(work: str, problem: Problem, operands: Operands, out: Array, threads: int, score: str) -> Plan:
    row = session.current.row
    tile = choose_tile(row, problem.real, problem.queries)
    steps = steps_of(problem, all_of=work != "forward" or score != "dot")
    kernel = describe(work, tile, row, score, steps)
    split = out.reshape(*problem.rows_shape, *out.shape[-2:])
    return draft_forward(kernel, problem, operands, split, threads).finish(threads)


def attention(
    plan: Plan, operands: Any, seed: int | None, out: Array | None, return_lse: bool, weight: Array | None = None
) -> Any:
    """Run a planned call; the results asked for, as `fastattn.attention` returns them.

    `operands` may be any arrays with the addresses of those; `weight` is that of additive attention, contiguous.
    """
    problem = plan.problem
    result = np.empty(problem.out_shape, problem.storage) if out is None else out
    lse = np.empty(problem.lse_shape, problem.real) if return_lse else None
    session.current.run(plan, *operands, result, lse, weight, None, seed)
    return result if lse is None else (result, lse)


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
    session.current.run(plan, *operands._replace(value=None), None, None, weight, matrix, seed)  # type: ignore[arg-type]
    return matrix
