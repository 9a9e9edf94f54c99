"""What the forward pass asks for ahead: rows that will be wanted next, in the order in which they will be.

While a query block is worked on, every register tile asks for its share of a list (`fastattn.cpu.kernels.prefetch`):
where the block's result will be written, the queries of the next block, the next block of keys and values, of which
each query block asks for a share, and what masks have for the next query block. After the last keys of a head come the
first of the head that this thread is likely to do next.
"""

from collections import namedtuple

from fastattn.cpu.kernels.blocks import begins_together
from fastattn.cpu.kernels.pages import foreseen
from fastattn.cpu.kernels.prefetch import prefetch_rows, rows_of_step, want, want_nothing, want_share
from fastattn.cpu.kernels.scores import keys_of_block, want_masks
from fastattn.cpu.kernels.tasks import locate
from fastattn.simd import jit

# A query block's turn with a block of keys: the first of these, whether they are the first or the last that it looks
# at, how many blocks had a turn with them before, and how many will have had one.
Turn = namedtuple("Turn", "first_key is_first is_last share shares")


@jit
def next_head(kernel, call, plan, number, head):
    """The head that this thread is likely to do next, the same part of it; this one, if none is."""
    if plan.prefetch_distance > 0 and number + plan.prefetch_distance < plan.tasks // plan.groups:
        return locate(call, plan, number + plan.prefetch_distance)
    return head


@jit
def foresee(kernel, call, plan, head, group):
    """Ask for the first block of keys and values, at once."""
    head, count = foreseen(kernel, call, plan, head, group.begin, min(plan.key_block, group.end - group.begin))
    prefetch_rows(head.key + group.begin * plan.key_row, plan.key_row, count, plan.head_dim * kernel.itemsize)
    prefetch_rows(
        head.value + group.begin * plan.value_row, plan.value_row, count, plan.value_dim * kernel.value_place.itemsize
    )


@jit
def list_wanted(kernel, call, plan, head, then, group, wanted, block, after, multiplied, turn):
    """Write down what a query block of a group asks for, what is wanted first before the rest; who comes `after` it.

    Meanwhile so many keys are `multiplied`.
    """
    tile = kernel.tile
    goes_on = then.query != head.query or then.key != head.key
    b, first = block.number, block.first
    key_bytes, value_bytes = plan.head_dim * kernel.itemsize, plan.value_dim * kernel.value_place.itemsize
    want_nothing(wanted, (multiplied + plan.value_dim) // rows_of_step(kernel))
    if plan.prefetch_distance > 0:
        if turn.is_last:
            present = min(tile.width, plan.queries - first)
            want(wanted, head.out + first * plan.out_row, plan.out_row, value_bytes, present)
            if b + 1 == group.blocks and goes_on:
                rows = then.query + group.first_query * plan.query_row
                want(wanted, rows, plan.query_row, key_bytes, tile.width)
        if turn.is_first and b + 1 < group.blocks and not begins_together(kernel):
            rows = head.query + (first + tile.width) * plan.query_row
            want(wanted, rows, plan.query_row, key_bytes, min(tile.width, plan.queries - first - tile.width))
    source, next_key = head, turn.first_key + plan.key_block
    count = min(plan.key_block, group.end - next_key)
    if count <= 0 and goes_on:
        source, next_key = then, group.begin
        count = min(plan.key_block, plan.keys - group.begin)
    if "mask" in kernel.steps:
        if after.number < group.blocks:
            want_masks(kernel, plan, head, wanted, after.first, turn.first_key, after.part)
        elif count > 0:
            part = keys_of_block(kernel, plan, source, group.first_query, next_key)
            want_masks(kernel, plan, source, wanted, group.first_query, next_key, part)
    source, count = foreseen(kernel, call, plan, source, next_key, count)
    if count > 0:
        rows = source.key + next_key * plan.key_row
        want_share(wanted, rows, plan.key_row, key_bytes, count, turn.share, turn.shares)
        rows = source.value + next_key * plan.value_row
        want_share(wanted, rows, plan.value_row, value_bytes, count, turn.share, turn.shares)
