"""The forward pass: FlashAttention's loop order on blocks of queries in the lanes (Dao et al. 2022, arXiv 2205.14135).

A task is a group of query blocks of one head. The group goes through the keys together, one block of keys at a time, so
that K and V are fetched, and packed, once for all of it:

    for each block of keys:                       packed in panels, or where few queries want it, read in place
        for each query block of the group:        its state stays in the second-level cache
            scores[j][i] = key[j] · q[i]          q[p][i]: the queries, transposed, times scale · log2(e)
            scores[j][i] = 2^(scores[j][i] - m[i])
            out[p][i]   += value[j][p] · scores[j][i]

On a matrix unit the scores of the next query block are formed while the exponentials of one are computed.

Which blocks share a group changes no bit of a result: every lane runs the same operations on the same keys in the same
order, whatever the others hold. (Only how additive attention computes a score depends on the whole block of queries.)
"""

import math
from collections import namedtuple

import numpy as np

from fastattn.cpu.kernels.blocks import (
    add_values,
    add_visible_values,
    are_finite,
    begins_together,
    load_keys,
    load_queries,
    load_values,
    memory_of_words,
    note_seen,
    place_behind_scores,
    place_of_scores,
    scores_of,
)
from fastattn.cpu.kernels.dropout import drop
from fastattn.cpu.kernels.forward_prefetch import Turn, foresee, list_wanted, next_head
from fastattn.cpu.kernels.functions import seen_keys
from fastattn.cpu.kernels.matrix import columns_from
from fastattn.cpu.kernels.matrix_products import add_weighed, multiply, pairs_of_weights, products_of
from fastattn.cpu.kernels.matrix_softmax import memory_to_weigh, no_weights, to_weigh, weigh_all
from fastattn.cpu.kernels.pack import clear, unpack_rows, value_steps
from fastattn.cpu.kernels.pages import behind_gathered, with_rows
from fastattn.cpu.kernels.prefetch import list_memory
from fastattn.cpu.kernels.records import ALIGNMENT
from fastattn.cpu.kernels.scores import Part, keys_of_block, keys_of_queries
from fastattn.cpu.kernels.sinks import LN_2, log_sum, sink_of, term_of
from fastattn.cpu.kernels.softmax import MINUS_INFINITY, absorb, follow
from fastattn.cpu.kernels.tasks import locate
from fastattn.machine.kernel import PLAIN
from fastattn.simd import (
    fma,
    jit,
    load_element,
    matrix_begin,
    matrix_end,
    record_view,
    store_element,
    tile_fill,
    tile_load,
    tile_store,
)

# Where in working memory a task has what: the state of a query block (queries, output, m, l) is repeated for each, and
# so is its span. What the scores of a block of keys need, from `work` to `rest`, is there twice for a matrix unit.
Room = namedtuple("Room", "states state_bytes out m keys values spans work work_bytes rest")
# A query block: its number in the group, its first query, its state, which keys of a block it looks at, and the working
# memory for their scores.
Block = namedtuple("Block", "number first state part work")
# What a group of query blocks has in common: the first query, how many blocks, and the keys that any of them looks at.
Group = namedtuple("Group", "first_query blocks begin end")
# The keys that a query block of a group looks at, from the first of a block of keys on, to the end of them.
SPAN = np.dtype([("begin", np.int64), ("end", np.int64)])
SPAN_BYTES = ALIGNMENT  # of working memory, for each

span_view = record_view(SPAN)


@jit
def lay_out(kernel, plan, blocks, scratch):
    """Say where in working memory things are."""
    tile = kernel.tile
    out = plan.query_bytes
    m = out + plan.value_dim * tile.row_bytes
    state_bytes = m + 2 * tile.row_bytes
    keys = scratch + blocks * state_bytes
    values = keys + plan.key_bytes
    spans = values + plan.value_bytes
    work = spans + blocks * SPAN_BYTES
    work_bytes = place_behind_scores(tile, plan, 0) if kernel.reads == "matrix" else 0
    rest = place_behind_scores(tile, plan, work + work_bytes)
    return Room(scratch, state_bytes, out, m, keys, values, spans, work, work_bytes, rest)


@jit
def group_of(kernel, plan, head, first_block, blocks):
    """A group of query blocks; its keys begin with a whole block of them."""
    first = first_block * kernel.tile.width
    last = min(first + blocks * kernel.tile.width, plan.queries) - 1
    begin, end = keys_of_queries(plan, head, first, last)
    return Group(first, blocks, begin - begin % plan.key_block, end)


@jit
def note_spans(kernel, plan, head, group, spans):
    """Write down which keys each query block of a group looks at; the group, with those that any of them looks at.

    A block that looks at none goes through the first keys of the group.
    """
    begin, end = group.end, group.begin
    for b in range(group.blocks):
        span = span_view(spans + b * SPAN_BYTES)
        first = group.first_query + b * kernel.tile.width
        span.begin, span.end = keys_of_queries(plan, head, first, min(first + kernel.tile.width, plan.queries) - 1)
        if "function" in kernel.steps:
            span.begin, span.end = seen_keys(kernel.tile, plan, head, first, span.begin, span.end)
        span.begin -= span.begin % plan.key_block if span.begin < span.end else 0
        if span.begin < span.end:
            begin, end = min(begin, span.begin), max(end, span.end)
    begin = min(begin, end)
    for b in range(group.blocks):
        span = span_view(spans + b * SPAN_BYTES)
        if span.begin >= span.end:
            span.begin, span.end = begin, begin
    return Group(group.first_query, group.blocks, begin, end)


@jit
def begin_blocks(kernel, call, plan, head, group, room):
    """Lay out the queries of a group, whose outputs, m and l are 0."""
    tile = kernel.tile
    for b in range(group.blocks):
        first = group.first_query + b * tile.width
        state = room.states + b * room.state_bytes
        source = head.query + first * plan.query_row
        load_queries(kernel, call, plan, state, source, min(tile.width, plan.queries - first), room.keys)
        clear(tile, state + room.out, plan.value_dim + 2)


@jit
def values_from(kernel, plan, values, key):
    """Where the micro-kernel finds a block's values from one of its keys on."""
    if kernel.reads == "matrix":
        return columns_from(kernel, values, key)
    _, row, _ = value_steps(kernel, plan)
    return values + (key // 2 if kernel.reads == "pairs" else key) * row


@jit
def size_of(part):
    """How many keys there are to a part of a block."""
    return part.end - part.begin


@jit
def multiply_keys(kernel, plan, block, room, keys, wanted, weighing):
    """Form the products of a query block with keys on a matrix unit, and weights of another; how many of these."""
    tile, part = kernel.tile, block.part
    start = tile_fill(tile.single, 0.0)
    scores = place_of_scores(tile, block.work) + part.begin * tile.row_bytes
    count, features = size_of(part), plan.head_dim
    return multiply(kernel, keys, block.state, part.begin, count, start, features, scores, wanted, weighing)


@jit
def absorb_meanwhile(kernel, plan, scores, count, top, to_base_2, block, after, room, keys, wanted):
    """`absorb`, while a matrix unit forms the products of the next query block, if any; weights are laid out then."""
    tile, m, ahead, done = kernel.tile, block.state + room.m, size_of(after.part), 0
    l = m + tile.row_bytes
    shift, factor = follow(kernel, top, to_base_2, m, l, block.state + room.out, plan.value_dim)
    steps = max(1, products_of(kernel, ahead, plan.head_dim))
    pairs = pairs_of_weights(kernel, room.rest)
    weighing = to_weigh(kernel, scores, count, shift, to_base_2, pairs, memory_to_weigh(), steps)
    if ahead > 0:
        done = multiply_keys(kernel, plan, after, room, keys, wanted, weighing)
    total = weigh_all(kernel, weighing, done)
    tile_store(fma(tile_load(tile.single, l, 0), factor, total), l, 0)


@jit
def attend(kernel, call, plan, head, number, block, after, room, first_key, keys, values, finite, wanted):
    """Take one query block through a part of a block of keys: scores, softmax, and the sum of values."""
    tile, part, first = kernel.tile, block.part, block.first
    m, out = block.state + room.m, block.state + room.out
    to_base_2 = plan.to_base_2 if kernel.steps != PLAIN or kernel.of_bfloat16 else 1.0
    scores_of(kernel, plan, head, block.state, part, first, first_key, keys, block.work, wanted)
    count = size_of(part)
    scores = place_of_scores(tile, block.work) + part.begin * tile.row_bytes
    seen = 0
    if "function" in kernel.steps and not finite:
        seen = memory_of_words()
        note_seen(tile, scores, count, seen)
    top = tile_load(tile.single, block.work, 0)
    values = values_from(kernel, plan, values, part.begin)
    dropping = "dropout" in kernel.steps and plan.drop_below > 0
    if kernel.reads == "matrix":
        if finite and not dropping:
            absorb_meanwhile(kernel, plan, scores, count, top, to_base_2, block, after, room, keys, wanted)
            add_weighed(kernel, plan, count, values, plan.value_dim, out, room.rest, wanted)
            return
        if size_of(after.part) > 0:
            multiply_keys(kernel, plan, after, room, keys, wanted, no_weights())
    absorb(kernel, scores, count, top, to_base_2, m, m + tile.row_bytes, out, plan.value_dim)
    first_key += part.begin
    if "dropout" in kernel.steps and dropping:
        drop(tile, plan, call, scores, count, number, first, first_key)
    if not finite and (kernel.of_bfloat16 or part.begin < part.full or part.full_end < part.end):
        add_visible_values(kernel, plan, head, scores, count, first, first_key, values, out, room.rest, seen)
    else:
        add_values(kernel, plan, scores, count, values, out, room.rest, wanted, True)


@jit
def finish(kernel, plan, head, m, l, block, out, lse, present):
    """Divide by the sum of the weights, write the rows of the output, and the log-sum-exp where it is wanted."""
    tile = kernel.tile
    sink = sink_of(head)
    for i in range(tile.width):
        total = load_element(tile, l + i * tile.itemsize)
        reference = load_element(tile, m + i * tile.itemsize)
        term = term_of(plan, sink, reference, total)
        if lse != 0 and i < present:
            if sink != MINUS_INFINITY:
                value = log_sum(plan, sink, reference, total, term)
            else:
                value = reference * (LN_2 * plan.to_base_2) + math.log(total) if total != 0.0 else MINUS_INFINITY
            store_element(tile, lse + i * tile.itemsize, value)
        store_element(tile, l + i * tile.itemsize, plan.keep_scale / (total + term) if total != 0.0 else 0.0)
        if total == 0.0:  # no key, or none with a score above -inf: 0 even where a value it has looked at is NaN
            for p in range(plan.value_dim):
                store_element(tile, block + p * tile.row_bytes + i * tile.itemsize, 0.0)
    if kernel.query_place.storage != tile.dtype and plan.out_itemsize == tile.itemsize:
        unpack_rows(tile, tile, block, l, out, plan.out_row, plan.out_column, present, plan.value_dim)
    else:
        unpack_rows(kernel.query_place, tile, block, l, out, plan.out_row, plan.out_column, present, plan.value_dim)


@jit
def finish_block(kernel, call, plan, head, number, state, room, first):
    """Write the rows of a query block that has seen all its keys."""
    tile = kernel.tile
    present = min(tile.width, plan.queries - first)
    logs = call.lse
    if logs != 0:
        logs += (number * plan.queries + first) * tile.itemsize
    m = state + room.m
    rows = head.out + first * plan.out_row
    finish(kernel, plan, head, m, m + tile.row_bytes, state + room.out, rows, logs, present)


@jit
def may_hide(kernel, plan):
    """Whether keys of a block may be hidden from some of the queries that are taken through it."""
    if plan.left_bound or plan.right_bound or "function" in kernel.steps:
        return True
    return "mask" in kernel.steps and (plan.keep != 0 or plan.adds != 0)


@jit
def looking(kernel, plan, head, group, spans, first_key):
    """How many query blocks of a group look at a block of keys, or may do: 0 if none does."""
    count, any_looks = 0, "function" not in kernel.steps
    for b in range(group.blocks):
        span = span_view(spans + b * SPAN_BYTES)
        if span.begin <= first_key and first_key < span.end:
            count += 1
            if "function" in kernel.steps and not any_looks:
                part = keys_of_block(kernel, plan, head, group.first_query + b * kernel.tile.width, first_key)
                any_looks = part.end > part.begin
    return count if any_looks else 0


@jit
def block_from(kernel, plan, head, group, room, b, first_key, work):
    """The first query block of a group, from `b` on, that has to do with a block of keys."""
    tile = kernel.tile
    while b < group.blocks:
        span = span_view(room.spans + b * SPAN_BYTES)
        if first_key == span.begin or (span.begin < first_key and first_key < span.end):
            break
        b += 1
    first, part = group.first_query + b * tile.width, Part(0, 0, 0, 0)
    if b < group.blocks:
        part = keys_of_block(kernel, plan, head, first, first_key)
    return Block(b, first, room.states + b * room.state_bytes, part, work)


@jit
def forward_group(kernel, call, plan, number, first_block, blocks, scratch):
    """One task: `blocks` query blocks of one head, from `first_block` on, through all keys they look at."""
    tile = kernel.tile
    head = locate(call, plan, number)
    room = lay_out(kernel, plan, blocks, behind_gathered(kernel, plan, scratch))
    group = note_spans(kernel, plan, head, group_of(kernel, plan, head, first_block, blocks), room.spans)
    then = next_head(kernel, call, plan, number, head)
    wanted = list_memory()
    if kernel.reads == "matrix":
        matrix_begin()
    foresee(kernel, call, plan, head, group)
    if begins_together(kernel):  # for additive attention in working memory that packed keys need later
        begin_blocks(kernel, call, plan, head, group, room)
    for first_key in range(group.begin, max(group.end, group.begin + 1), plan.key_block):
        share, shares = 0, looking(kernel, plan, head, group, room.spans, first_key)
        count = min(plan.key_block, group.end - first_key) if shares > 0 else 0
        here = with_rows(kernel, call, plan, head, first_key, count, scratch)
        rows = here.value + first_key * plan.value_row
        keys = load_keys(kernel, plan, room.keys, here.key + first_key * plan.key_row, count)
        looked_at = kernel.reads == "matrix" or may_hide(kernel, plan)  # whether values are finite
        finite = not looked_at or are_finite(kernel, plan, rows, count)
        values = load_values(kernel, plan, room.values, rows, count, finite)
        block, is_ahead = block_from(kernel, plan, head, group, room, 0, first_key, room.work), False
        while block.number < blocks:
            span = span_view(room.spans + block.number * SPAN_BYTES)
            is_first, is_last = first_key == span.begin, first_key + plan.key_block >= span.end
            first, state, part = block.first, block.state, block.part
            if is_first and not begins_together(kernel):
                source, present = head.query + first * plan.query_row, min(tile.width, plan.queries - first)
                load_queries(kernel, call, plan, state, source, present, 0)
                clear(tile, state + room.out, plan.value_dim + 2)
            other = room.work + room.work + room.work_bytes - block.work
            after = block_from(kernel, plan, head, group, room, block.number + 1, first_key, other)
            if size_of(part) > 0:
                turn, multiplied = Turn(first_key, is_first, is_last, share, shares), 0 if is_ahead else size_of(part)
                if kernel.reads == "matrix":
                    multiplied += size_of(after.part)
                list_wanted(kernel, call, plan, head, then, group, wanted, block, after, multiplied, turn)
                if kernel.reads == "matrix" and not is_ahead:
                    multiply_keys(kernel, plan, block, room, keys, wanted, no_weights())
                attend(kernel, call, plan, here, number, block, after, room, first_key, keys, values, finite, wanted)
                share += 1
            is_ahead = kernel.reads == "matrix" and size_of(part) > 0 and size_of(after.part) > 0
            if is_last:
                finish_block(kernel, call, plan, head, number, state, room, first)
            block = after
    if kernel.reads == "matrix":
        matrix_end()
