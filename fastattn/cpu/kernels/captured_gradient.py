"""The gradients of arrays that a user's function captures: what each score contributes, added up element by element.

The work is cut into parts, as many whatever number of threads there is, and each part has arrays of its own, which the
host adds up. A part is some blocks of queries of some heads, and goes through them in order:

    for each block of queries, for each block of keys:
        ds[j][i]                                  as in the backward pass, which must have found the deltas and sums
        grad[index(i, j)] += ds[j][i] · the derivative of the function by the element that it has read there

So every sum has one order of its terms.
"""

from fastattn.cpu.kernels.backward import call_view, load_keys, locate, plan_view, weigh
from fastattn.cpu.kernels.functions import add_to_captured
from fastattn.cpu.kernels.gradient_rows import copy_numbers, load_lanes
from fastattn.cpu.kernels.prefetch import NOTHING
from fastattn.cpu.kernels.scores import keys_of_queries
from fastattn.cpu.kernels.sums import any_has_lost, load_sums
from fastattn.simd import jit, matrix_begin, matrix_end


@jit
def add_block(kernel, call, plan, head, own, block, scratch):
    """Add what a block of queries of one head contributes to the arrays of part `own`."""
    tile = kernel.tile
    first_query = block * plan.query_block
    present = min(plan.query_block, plan.queries - first_query)
    at = (head.number * plan.queries + first_query) * tile.itemsize
    lse = call.lse + at
    rows, grads = head.query + first_query * plan.query_row, head.grad_out + first_query * plan.grad_out_row
    load_lanes(kernel, plan, rows, grads, lse, present, 1.0, scratch)
    lost = any_has_lost(tile, plan, lse, present)
    if lost:
        load_sums(kernel, plan, lse, present, call.deltas + at, scratch)
    copy_numbers(tile, scratch + plan.deltas_at, call.deltas + at, present, plan.query_block, 1.0)
    begin, end = keys_of_queries(plan, head, first_query, first_query + present - 1)
    for start_key in range(begin - begin % plan.key_block, end, plan.key_block):
        load_keys(kernel, plan, head.key, head.value, start_key, min(plan.key_block, end - start_key), scratch)
        for s in range((present + tile.width - 1) // tile.width):
            first = first_query + s * tile.width
            part = weigh(kernel, call, plan, head, s, first, start_key, 0, lost, scratch, NOTHING)
            count = part.end - part.begin
            if count > 0:
                rows_at = part.begin * tile.row_bytes
                found = scratch + plan.score_grads_at + s * plan.score_panel + rows_at
                there = min(tile.width, plan.queries - first)
                first_key = start_key + part.begin
                raws = scratch + plan.raws_at + rows_at
                add_to_captured(head, own, raws, found, count, there, 0, first, first_key)


def task_function(kernel):
    """The task function of the gradients of captured arrays: a task is a part."""

    @jit
    def task(call_at, slot, number):
        call = call_view(call_at)
        plan = plan_view(call.plan)
        blocks = plan.outer * plan.inner * plan.query_blocks
        scratch = call.scratch + slot * plan.scratch_bytes
        if kernel.reads == "matrix":
            matrix_begin()
        for block in range(number * blocks // plan.tasks, (number + 1) * blocks // plan.tasks):
            head = locate(call, plan, block // plan.query_blocks)
            add_block(kernel, call, plan, head, number, block % plan.query_blocks, scratch)
        if kernel.reads == "matrix":
            matrix_end()

    return task
