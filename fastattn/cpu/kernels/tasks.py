"""From the number of a task to the part of a call that it is: some blocks of one head."""

from fastattn.cpu.kernels.records import AXIS, CALL, PLAN
from fastattn.simd import jit, record_view

axis_view, call_view, plan_view = record_view(AXIS), record_view(CALL), record_view(PLAN)
AXIS_BYTES, PLAN_BYTES = AXIS.itemsize, PLAN.itemsize


@jit
def locate(call, plan, head):
    """Where a head's matrices begin, as offsets from the arrays' addresses: query, key, value, mask, out."""
    axis = call.plan + PLAN_BYTES + plan.axes * AXIS_BYTES
    query = key = value = mask = out = 0
    for _ in range(plan.axes):
        axis -= AXIS_BYTES
        strides = axis_view(axis)
        index = head % strides.size
        head //= strides.size
        query += index * strides.query
        key += index * strides.key
        value += index * strides.value
        mask += index * strides.mask
        out += index * strides.out
    return query, key, value, mask, out


def task_function(kernel, work, by_keys):
    """The task function of a kernel: `work(kernel, call, plan, head, first_block, blocks, scratch)` on a task's part.

    The longest tasks of a causal call come first: they are what others would wait for. Those are the last of the tasks
    on blocks of queries, and the first of those on blocks of keys (`by_keys`).
    """

    @jit
    def task(call_at, slot, number):
        call = call_view(call_at)
        plan = plan_view(call.plan)
        heads = plan.tasks // plan.groups
        part = number // heads
        if plan.causal and not by_keys:
            part = plan.groups - 1 - part
        first = part * plan.group
        blocks = min(plan.group, plan.blocks - first)
        work(kernel, call, plan, number % heads, first, blocks, call.scratch + slot * call.scratch_bytes)

    return task
