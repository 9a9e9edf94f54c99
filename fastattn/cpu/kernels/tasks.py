"""From the number of a task to the part of a call that it is: some blocks of one head."""

from collections import namedtuple

from fastattn.call.scores import HEAD
from fastattn.cpu.kernels.records import AXIS, CALL, OWN_AT, PLAN
from fastattn.simd import jit, record_view

axis_view, call_view, plan_view, own_view = map(record_view, (AXIS, CALL, PLAN, HEAD))
AXIS_BYTES, PLAN_BYTES, OWN_BYTES = AXIS.itemsize, PLAN.itemsize, HEAD.itemsize


# Where a head's matrices begin; the position of query 0, the number of keys, and where these and what else it may have
# of its own lie; its number, and where the user's functions are.
Head = namedtuple("Head", "query key value bias keep out offset keys own number functions")


@jit
def locate(call, plan, number):
    """The head of this number."""
    axis = call.plan + PLAN_BYTES + plan.axes * AXIS_BYTES
    query, key, value, bias, keep, out = call.query, call.key, call.value, call.bias, call.keep, call.out
    rest = number
    for _ in range(plan.axes):
        axis -= AXIS_BYTES
        strides = axis_view(axis)
        index = rest % strides.size
        rest //= strides.size
        query += index * strides.query
        key += index * strides.key
        value += index * strides.value
        bias += index * strides.bias
        keep += index * strides.keep
        out += index * strides.out
    own = own_of(call, number)
    offset, keys = own_view(own).offset, own_view(own).keys
    return Head(query, key, value, bias, keep, out, offset, keys, own, number, call.functions)


@jit
def own_of(call, number):
    """Where what a head has of its own is, or else what the plan says of all."""
    return call.plan + OWN_AT if call.heads == 0 else call.heads + number * OWN_BYTES


def task_function(kernel, work, on_keys=None):
    """The task function of a kernel: `work(kernel, call, plan, head, first_block, blocks, scratch)` on its blocks.

    The longest tasks of a causal call come first, since they are what others would wait for: those of the last queries.
    Behind all of these come a second stage's, if there is one: `on_keys(kernel, call, plan, head, part, scratch)`.
    """
    two_stages = on_keys is not None

    @jit
    def task(call_at, slot, number):
        call = call_view(call_at)
        plan = plan_view(call.plan)
        parts = plan.groups + plan.key_groups if two_stages else plan.groups
        heads = plan.tasks // parts
        part = number // heads
        if two_stages and part >= plan.groups:
            on_keys(kernel, call, plan, number % heads, part - plan.groups, call.scratch + slot * plan.scratch_bytes)
            return
        if plan.right_bound:
            part = plan.groups - 1 - part
        first = part * plan.group
        blocks = min(plan.group, plan.blocks - first)
        work(kernel, call, plan, number % heads, first, blocks, call.scratch + slot * plan.scratch_bytes)

    return task
