"""The gradient of a floating mask: that of the scores, summed over what the mask is broadcast along.

It is of the mask's own shape, and nothing larger comes to be. A task owns a rectangle of one head of the mask: the part
that a block of queries and a block of keys share, or all queries where the mask has one row, or all keys where it has
one column. Whatever is added there comes by in one order:

    for each head of queries that the mask is broadcast to:
        for each block of queries, for each block of keys of the rectangle:
            sums[j][i] += ds[j][i]                    as in the backward pass, which must have found the deltas and sums
"""

from collections import namedtuple

from fastattn.cpu.kernels.backward import call_view, load_keys, locate, plan_view, weigh
from fastattn.cpu.kernels.gradient_rows import copy_numbers, load_lanes
from fastattn.cpu.kernels.pack import clear, unpack_rows
from fastattn.cpu.kernels.prefetch import NOTHING
from fastattn.cpu.kernels.scores import keys_of_queries
from fastattn.cpu.kernels.sums import any_has_lost, load_sums
from fastattn.simd import jit, load_element, matrix_begin, matrix_end, store_element, tile_fill, tile_load, tile_store


@jit
def add_block(tile, sums, grads, count, present):
    """sums[j][i] += grads[j][i] for `count` keys and those lanes in which there is a query."""
    for _ in range(count):
        if present >= tile.width:
            tile_store(tile_load(tile.single, sums, 0) + tile_load(tile.single, grads, 0), sums, 0)
        else:
            for i in range(present):
                at = sums + i * tile.itemsize
                store_element(tile, at, load_element(tile, at) + load_element(tile, grads + i * tile.itemsize))
        sums += tile.row_bytes
        grads += tile.row_bytes


@jit
def write_rectangle(tile, plan, sums, ones, target, present, count):
    """Write sums[j][i] to target[i][j], summed over i where the mask has one row, over j where it has one column."""
    subs = plan.query_block // tile.width
    if plan.bias_queries > 1 and plan.bias_keys > 1:
        for s in range((present + tile.width - 1) // tile.width):
            there = min(tile.width, present - s * tile.width)
            rows = target + s * tile.width * plan.grad_bias_row
            unpack_rows(tile, tile, sums, ones, rows, plan.grad_bias_row, tile.itemsize, there, count)
            sums += plan.score_panel
        return
    lanes, columns = subs * tile.width, plan.key_block
    own_lanes, own_columns = present if plan.bias_queries > 1 else 1, count if plan.bias_keys > 1 else 1
    for i in range(own_lanes):
        for j in range(own_columns):
            total = 0.0
            for other_i in range(i, i + 1 if plan.bias_queries > 1 else lanes):
                column = sums + other_i // tile.width * plan.score_panel + other_i % tile.width * tile.itemsize
                for other_j in range(j, j + 1 if plan.bias_keys > 1 else columns):
                    total += load_element(tile, column + other_j * tile.row_bytes)
            store_element(tile, target + i * plan.grad_bias_row + j * tile.itemsize, total)


# The rectangle of a task: blocks of queries, and keys.
Rectangle = namedtuple("Rectangle", "first_block last_block first_key end")


@jit
def rectangle_of(plan, query_task, key_task):
    """Which part of a mask a task owns."""
    first_block, last_block = 0, plan.query_blocks
    if plan.bias_queries > 1:
        first_block, last_block = query_task, query_task + 1
    first_key, end = 0, plan.keys
    if plan.bias_keys > 1:
        first_key, end = key_task * plan.key_block, min(plan.keys, (key_task + 1) * plan.key_block)
    return Rectangle(first_block, last_block, first_key, end)


@jit
def add_head(kernel, call, plan, head, own, scratch):
    """Add the gradients of the scores of one head of queries to the sums of a rectangle."""
    tile = kernel.tile
    sums = scratch + plan.key_sums_at
    for block in range(own.first_block, own.last_block):
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
        begin, end = max(own.first_key, begin - begin % plan.key_block), min(own.end, end)
        for start_key in range(begin, end, plan.key_block):
            load_keys(kernel, plan, head.key, head.value, start_key, min(plan.key_block, end - start_key), scratch)
            for s in range((present + tile.width - 1) // tile.width):
                first = first_query + s * tile.width
                part = weigh(kernel, call, plan, head, s, first, start_key, 0, lost, scratch, NOTHING)
                place = s * plan.score_panel + part.begin * tile.row_bytes
                found = scratch + plan.score_grads_at + place
                add_block(tile, sums + place, found, part.end - part.begin, plan.queries - first)


@jit
def differentiate_rectangle(kernel, call, plan, mask_head, query_task, key_task, scratch):
    """One task. The working memory of sums is where the backward pass has the gradients of keys."""
    tile = kernel.tile
    own = rectangle_of(plan, query_task, key_task)
    sums, ones = scratch + plan.key_sums_at, scratch + plan.query_sums_at
    clear(tile, sums, plan.query_block // tile.width * plan.key_block)
    tile_store(tile_fill(tile.single, 1.0), ones, 0)
    target = call.grad_bias
    if kernel.reads == "matrix":
        matrix_begin()
    for number in range(mask_head * plan.inner, (mask_head + 1) * plan.inner):
        head = locate(call, plan, number)
        target = head.grad_bias
        add_head(kernel, call, plan, head, own, scratch)
    if kernel.reads == "matrix":
        matrix_end()
    first_query = own.first_block * plan.query_block
    target += first_query * plan.grad_bias_row + own.first_key * tile.itemsize
    present, count = min(plan.query_block, plan.queries - first_query), min(plan.key_block, own.end - own.first_key)
    write_rectangle(tile, plan, sums, ones, target, present, count)


def task_function(kernel):
    """The task function of the gradient of a mask."""

    @jit
    def task(call_at, slot, number):
        call = call_view(call_at)
        plan = plan_view(call.plan)
        mask_head, number = number % plan.outer, number // plan.outer
        query_task, key_task = number % plan.parts, number // plan.parts
        scratch = call.scratch + slot * plan.scratch_bytes
        differentiate_rectangle(kernel, call, plan, mask_head, query_task, key_task, scratch)

    return task
