"""Plans of passes over the scores of additive attention, behind its backward pass: of a mask, of captured arrays."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastattn.call.problem import Array
from fastattn.cpu.host.calls import Plan
from fastattn.cpu.host.plan import Draft
from fastattn.machine.objects import address_of


class Pass(NamedTuple):
    """A pass that can be run.

    Attributes
    ----------
    plan : Plan
    given : ndarray of `fastattn.cpu.kernels.records.ADDITIVE_BACKWARD`
    held : ndarray or None
        What the record has the address of, to be kept alive.
    """

    plan: Plan
    given: Array
    held: Array | None = None


def over_rectangles(draft: Draft, given: Array, grad_bias: Array, threads: int) -> Pass:
    """Plan the gradient of a mask: tasks own rectangles of it, and go through the heads that share it.

    Parameters
    ----------
    draft : Draft
    given : ndarray
        What the backward pass is given.
    grad_bias : ndarray of float64, with the axes of the operands
        1 where the mask is broadcast.
    threads : int
    """
    lead, (rows, columns), steps = draft.problem.rows_shape, grad_bias.shape[-2:], grad_bias.strides[-2:]
    own = [axis for axis, size in enumerate(grad_bias.shape[:-2]) if size > 1]
    outer = math.prod(lead[axis] for axis in own)
    order = own + [axis for axis in range(len(lead)) if axis not in own]
    shared_by = np.ascontiguousarray(np.arange(math.prod(lead)).reshape(lead).transpose(order), np.int64)
    record: Any = _with_blocks(draft, given)
    record["outer"], record["inner"], record["shared_by"] = outer, shared_by.size // outer, address_of(shared_by)
    record["grad_bias"], record["grad_bias_head"] = address_of(grad_bias), rows * steps[0]
    record["grad_bias_row"], record["grad_bias_column"] = (
        step if size > 1 else 0 for step, size in zip(steps, (rows, columns), strict=True)
    )
    key_blocks = -(-draft.problem.keys // draft.fields["key_block"])
    draft.fields["tasks"] = outer * (record["head_blocks"][0] if rows > 1 else 1) * (key_blocks if columns > 1 else 1)
    return Pass(draft.finish(threads), record, shared_by)


def over_parts(draft: Draft, given: Array, parts: int, threads: int) -> Pass:
    """Plan the gradients of captured arrays: so many parts of the work, whatever number of threads there is."""
    record: Any = _with_blocks(draft, given)
    record["outer"], record["inner"] = math.prod(draft.problem.rows_shape), 1
    draft.fields["tasks"] = parts
    return Pass(draft.finish(threads), record)


def _with_blocks(draft: Draft, given: Array) -> Array:
    """Return a copy of a record, which says how many blocks of queries a head has."""
    record: Any = given.copy()
    record["head_blocks"] = -(-draft.problem.queries // record["query_block"])
    return np.asarray(record)
