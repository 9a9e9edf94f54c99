"""The forward pass: FlashAttention's loop order on blocks of queries in the lanes (Dao et al. 2022, arXiv 2205.14135).

A task is a group of query blocks of one head. The group goes through the keys together, one block of keys at a time, so
that K and V are fetched once for all of it:

    for each block of keys:                       K and V rows in their natural layout, read in place
        for each query block of the group:        its state stays in the second-level cache
            scores[j][i] = key[j] · q[i]          q[p][i]: the queries, transposed, times scale · log2(e)
            scores[j][i] = 2^(scores[j][i] - m[i])
            out[p][i]   += value[j][p] · scores[j][i]

Which queries share a block, and which blocks a group, changes no bit of a query's result: every lane runs the same
operations on the same keys in the same order.
"""

import math

from fastattn.cpu.dropout import drop
from fastattn.cpu.layout import AXIS, CALL, MASK_BOOL, MASK_NONE, PLAN
from fastattn.cpu.masks import looks_at, restrict
from fastattn.cpu.pack import pack_queries, unpack_rows
from fastattn.cpu.softmax import MINUS_INFINITY, absorb
from fastattn.cpu.tiles import product
from fastattn.simd import (
    all_zero,
    jit,
    largest_row,
    load_element,
    maximum,
    record_view,
    store_element,
    tile_fill,
    tile_load,
    tile_repeat,
    tile_store,
)

axis_view, call_view, plan_view = record_view(AXIS), record_view(CALL), record_view(PLAN)
AXIS_BYTES, PLAN_BYTES = AXIS.itemsize, PLAN.itemsize
LN_2 = 0.6931471805599453


@jit
def score_block(tile, q, features, key, key_row, key_column, count, start, scores, top):
    """scores[j][i] = start[i] + key[j] · q[i] for `count` keys; their maximum over j goes to `top`."""
    best = tile_fill(tile.single, MINUS_INFINITY)
    initial = tile_repeat(tile, start)
    whole = count - count % tile.rows
    for _ in range(0, whole, tile.rows):
        acc = product(initial, key, key_row, key_column, q, tile.row_bytes, features)
        tile_store(acc, scores, tile.row_bytes)
        best = maximum(largest_row(acc), best)
        key += tile.rows * key_row
        scores += tile.rows * tile.row_bytes
    for _ in range(whole, count):
        row = product(start, key, key_row, key_column, q, tile.row_bytes, features)
        tile_store(row, scores, tile.row_bytes)
        best = maximum(row, best)
        key += key_row
        scores += tile.row_bytes
    tile_store(best, top, 0)


@jit
def add_values(tile, weights, count, value, value_row, value_column, out, features):
    """out[p][i] += Σ_j value[j][p] · weights[j][i]."""
    whole = features - features % tile.rows
    for _ in range(0, whole, tile.rows):
        acc = tile_load(tile, out, tile.row_bytes)
        acc = product(acc, value, value_column, value_row, weights, tile.row_bytes, count)
        tile_store(acc, out, tile.row_bytes)
        value += tile.rows * value_column
        out += tile.rows * tile.row_bytes
    for _ in range(whole, features):
        row = tile_load(tile.single, out, tile.row_bytes)
        row = product(row, value, value_column, value_row, weights, tile.row_bytes, count)
        tile_store(row, out, tile.row_bytes)
        value += value_column
        out += tile.row_bytes


@jit
def is_finite(tile, value, value_column, features):
    """Whether a row of values holds neither NaN nor infinity (x · 0 = 0 only for a finite x)."""
    done = 0
    if value_column == tile.itemsize:
        sums = tile_fill(tile.vector, 0.0)
        while done + tile.lanes <= features:
            sums = sums + tile_load(tile.vector, value + done * value_column, 0) * 0.0
            done += tile.lanes
        if not all_zero(sums):
            return False
    for p in range(done, features):
        if load_element(tile, value + p * value_column) * 0.0 != 0.0:
            return False
    return True


@jit
def add_values_carefully(tile, plan, weights, count, value, mask, present, position, first_key, out):
    """`add_values` for a block in which some query may not look at some key: 0 · NaN must not reach it.

    Rows of values that are finite throughout take the fast way; in the others a query is added where it may look.
    """
    start = 0
    for j in range(count + 1):
        row = value + j * plan.value_row
        if j < count and is_finite(tile, row, plan.value_column, plan.value_dim):
            continue
        add_values(
            tile,
            weights + start * tile.row_bytes,
            j - start,
            value + start * plan.value_row,
            plan.value_row,
            plan.value_column,
            out,
            plan.value_dim,
        )
        start = j + 1
        if j == count:
            break
        for i in range(present):
            if looks_at(tile, plan, mask, i, j, position - first_key):
                weight = load_element(tile, weights + j * tile.row_bytes + i * tile.itemsize)
                for p in range(plan.value_dim):
                    place = out + p * tile.row_bytes + i * tile.itemsize
                    product_ = load_element(tile, row + p * plan.value_column) * weight
                    store_element(tile, place, load_element(tile, place) + product_)


@jit
def visible_keys(tile, plan, first_query, first_key):
    """How many keys of a block some query of the block looks at, and whether some query does not look at some of them."""
    count = min(plan.key_block, plan.keys - first_key)
    partial = plan.mask_kind != MASK_NONE
    if plan.causal:
        position = plan.first_position + first_query
        present = min(tile.width, plan.queries - first_query)
        count = min(count, position + present - first_key)
        partial = partial or position < first_key + count - 1
    return count, partial


@jit
def scores_of(tile, plan, q, m, relative, partial, count, first_query, first_key, key, mask, work):
    """The block of scores of some queries with `count` keys, their place; its maximum over the keys at `work`.

    `relative`: less m, from which the sums of products then start.
    """
    scores = work + tile.row_bytes + tile.buffer_bytes
    start = tile_fill(tile.single, 0.0)
    if relative:
        start = start - tile_load(tile.single, m, 0)
    score_block(tile, q, plan.head_dim, key, plan.key_row, plan.key_column, count, start, scores, work)
    if partial:
        present = min(tile.width, plan.queries - first_query)
        position = plan.first_position + first_query
        restrict(tile, plan, scores, count, mask, present, position, first_key, work, work + tile.row_bytes)
    return scores


@jit
def attend(tile, plan, seed, head, q, m, out, first_query, first_key, key, value, mask, work):
    """Take one block of queries through one block of keys."""
    count, partial = visible_keys(tile, plan, first_query, first_key)
    if count <= 0:
        return
    relative = plan.mask_kind <= MASK_BOOL  # else m may stem from the mask, and be far from the scores
    scores = scores_of(tile, plan, q, m, relative, partial, count, first_query, first_key, key, mask, work)
    absorb(tile, scores, count, tile_load(tile.single, work, 0), relative, m, m + tile.row_bytes, out, plan.value_dim)
    if plan.drop_below > 0:
        drop(tile, plan, seed, scores, count, head, first_query, first_key)
    if partial:
        present = min(tile.width, plan.queries - first_query)
        position = plan.first_position + first_query
        add_values_carefully(tile, plan, scores, count, value, mask, present, position, first_key, out)
    else:
        add_values(tile, scores, count, value, plan.value_row, plan.value_column, out, plan.value_dim)


@jit
def finish(tile, plan, m, l, block, out, lse, present):
    """Divide by the sum of the weights, write the rows of the output, and the log-sum-exp where it is wanted."""
    for i in range(tile.width):
        total = load_element(tile, l + i * tile.itemsize)
        if lse != 0 and i < present:
            reference = load_element(tile, m + i * tile.itemsize)
            value = (reference + math.log2(total)) * LN_2 if total != 0.0 else MINUS_INFINITY
            store_element(tile, lse + i * tile.itemsize, value)
        store_element(tile, l + i * tile.itemsize, plan.keep_scale / total if total != 0.0 else 0.0)
    unpack_rows(tile, block, l, out, plan.out_row, plan.out_column, present, plan.value_dim)


@jit
def clear(tile, at, rows):
    """Fill rows with 0."""
    for _ in range(rows):
        tile_store(tile_fill(tile.single, 0.0), at, tile.row_bytes)
        at += tile.row_bytes


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


@jit
def forward_group(tile, call, plan, head, first_query, blocks, scratch):
    """One task: `blocks` query blocks of one head, from its first query on, through all keys they look at."""
    query, key, value, mask, out = locate(call, plan, head)
    query += call.query
    key += call.key
    value += call.value
    mask += call.mask
    out += call.out
    lse = call.lse
    if lse != 0:
        lse += head * plan.queries * tile.itemsize
    # The state of a block: queries, output, m, l. Behind the states, the working memory of `attend`.
    q_bytes, out_bytes = plan.head_dim * tile.row_bytes, plan.value_dim * tile.row_bytes
    state_bytes = q_bytes + out_bytes + 2 * tile.row_bytes
    work = scratch + blocks * state_bytes

    end = plan.keys
    if plan.causal:
        last = min(first_query + blocks * tile.width, plan.queries) - 1
        end = min(end, plan.first_position + last + 1)
    for b in range(blocks):
        first = first_query + b * tile.width
        state = scratch + b * state_bytes
        present = min(tile.width, plan.queries - first)
        source = query + first * plan.query_row
        pack_queries(tile, state, source, plan.query_row, plan.query_column, present, plan.head_dim, plan.scale)
        clear(tile, state + q_bytes, plan.value_dim + 2)
    for first_key in range(0, end, plan.key_block):
        for b in range(blocks):
            first = first_query + b * tile.width
            q = scratch + b * state_bytes
            block = q + q_bytes
            m = block + out_bytes
            attend(
                tile,
                plan,
                call.seed,
                head,
                q,
                m,
                block,
                first,
                first_key,
                key + first_key * plan.key_row,
                value + first_key * plan.value_row,
                mask + first * plan.mask_row + first_key * plan.mask_column,
                work,
            )
    for b in range(blocks):
        first = first_query + b * tile.width
        block = scratch + b * state_bytes + q_bytes
        m = block + out_bytes
        present = min(tile.width, plan.queries - first)
        rows = out + first * plan.out_row
        finish(tile, plan, m, m + tile.row_bytes, block, rows, lse + first * tile.itemsize if lse != 0 else 0, present)


def forward_task(tile):
    """The task function of the forward pass for a register tile."""

    def task(call_at, slot, number):
        call = call_view(call_at)
        plan = plan_view(call.plan)
        heads = plan.tasks // plan.groups
        head = number % heads
        part = number // heads
        if plan.causal:
            part = plan.groups - 1 - part  # the longest first: they are what others would wait for
        first = part * plan.group
        blocks = min(plan.group, plan.blocks - first)
        scratch = call.scratch + slot * call.scratch_bytes
        forward_group(tile, call, plan, head, first * tile.width, blocks, scratch)

    return task
