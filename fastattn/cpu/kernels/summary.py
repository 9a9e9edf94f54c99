"""What can be said of the weights while their matrix never exists: sums, entropies, the greatest weights of each query.

The loop order and the tasks are those of the forward pass, with no second product. The scores of a block are there once
and are asked three things:

    for each block of keys:
        for each query block of the group:
            scores[j][i] = key[j] · q[i]             scores_of, as in the forward pass
            heaps of the k greatest scores           keep_top
            m, l, and Σ_j 2^x · x                    gather, x the exponent that belongs to scores[j][i]
    lse, entropy, greatest weights                   write_block

Once these tasks of a head are done, those of a second stage sum up the weights of its keys, in
`fastattn.cpu.kernels.key_weights`.

With the sum l of 2^x, a weight is w = 2^x / l, and the entropy -Σ w ln w = ln l - ln 2 · Σ 2^x · x / l: no logarithm is
taken of a weight, and as x is relative to m nothing large is subtracted. m and l come to be what they are for
`fastattn.cpu.kernels.weights`: the weights of any key can be made of them later, bit for bit the same.
"""

import math

from fastattn.cpu.kernels.blocks import load_keys, place_of_scores, scores_of
from fastattn.cpu.kernels.forward import group_of
from fastattn.cpu.kernels.key_weights import summary_view
from fastattn.cpu.kernels.pack import clear, pack_queries
from fastattn.cpu.kernels.prefetch import NOTHING
from fastattn.cpu.kernels.scores import keys_of_block
from fastattn.cpu.kernels.sinks import INFINITY, LN_2, log_sum, sink_of, term_of
from fastattn.cpu.kernels.softmax import MINUS_INFINITY, SLACK, exp2, exponentials
from fastattn.cpu.kernels.stages import finish
from fastattn.cpu.kernels.tasks import locate
from fastattn.cpu.kernels.top import NOBODY, WORD, clear_heap, keep_top, sort_heap
from fastattn.cpu.kernels.weights import write_weights
from fastattn.simd import (
    all_zero,
    fma,
    jit,
    load_element,
    load_i64,
    maximum,
    store_element,
    store_i64,
    tile_fill,
    tile_load,
    tile_store,
    where_greater,
)

STATE_ROWS = 4  # of a query block besides the queries: m, l, moment, and the score that is to be exceeded
LOWEST = -2000.0  # an exponent of which 2 to the power is 0 in both dtypes; 0 · LOWEST is 0, unlike 0 · -inf
NAN = float("nan")


@jit
def moments(kernel, scores, count, shift, to_base_2, total, moment):
    """total + Σ_j 2^x and moment + Σ_j 2^x · x with x = (scores[j] - shift) · to_base_2."""
    tile = kernel.tile
    at = scores
    for _ in range(count):
        x = maximum(LOWEST, (tile_load(tile.single, at, 0) - shift) * to_base_2)
        weights = exp2(kernel, x)
        total = total + weights
        moment = fma(weights, x, moment)
        at += tile.row_bytes
    return total, moment


@jit
def gather(kernel, scores, count, top, to_base_2, state):
    """Bring m, l and the moment of a query block up to date; m follows the maximum as in `softmax.absorb`."""
    tile = kernel.tile
    zero = tile_fill(tile.single, 0.0)
    l_at, moment_at = state + tile.row_bytes, state + 2 * tile.row_bytes
    m = tile_load(tile.single, state, 0)
    total = tile_load(tile.single, l_at, 0)
    moment = tile_load(tile.single, moment_at, 0)
    bound = where_greater(total, zero, m + SLACK, MINUS_INFINITY)
    shift = where_greater(top, bound, top, m)
    if not all_zero(shift - m):
        change = maximum(LOWEST, (m - shift) * to_base_2)
        factor = where_greater(total, zero, exp2(kernel, change), 1.0)
        # every x so far becomes x + change
        moment = where_greater(total, zero, factor * fma(total, change, moment), moment)
        total = total * factor
        tile_store(shift, state, 0)
    total, moment = moments(kernel, scores, count, shift, to_base_2, total, moment)
    tile_store(total, l_at, 0)
    tile_store(moment, moment_at, 0)


@jit
def finish_top(kernel, m, total, to_base_2, scores, keys, k, buffer):
    """Turn one query's heap into weights, in falling order. Those of a row with NaN have none: NaN, and no keys."""
    tile = kernel.tile
    if total != total:
        for r in range(k):
            store_element(tile, scores + r * tile.itemsize, NAN)
            store_i64(keys + r * WORD, NOBODY)
        return
    sort_heap(tile, scores, keys, k)
    before = 1.0
    for start in range(0, k, tile.lanes):
        count = min(tile.lanes, k - start)
        at = scores + start * tile.itemsize
        for r in range(count):
            store_element(tile, buffer + r * tile.itemsize, load_element(tile, at + r * tile.itemsize))
        weights = exp2(kernel, (tile_load(tile.vector, buffer, 0) - m) * to_base_2) / total
        tile_store(weights, buffer, 0)
        for r in range(count):
            taken = load_i64(keys + (start + r) * WORD) != NOBODY
            weight = load_element(tile, buffer + r * tile.itemsize) if taken else 0.0
            # 2^x rounds, and might rise by a unit in the last place where x falls by less
            before = min(before, weight)
            store_element(tile, at + r * tile.itemsize, before)


@jit
def write_block(kernel, plan, head, out, state, row, present, buffer):
    """Write what is known of `present` queries, of which the first is query number `row` of all heads."""
    tile, sink = kernel.tile, sink_of(head)
    for i in range(present):
        m = load_element(tile, state + i * tile.itemsize)
        total = load_element(tile, state + tile.row_bytes + i * tile.itemsize)
        moment = load_element(tile, state + 2 * tile.row_bytes + i * tile.itemsize)
        place = (row + i) * tile.itemsize
        term = term_of(plan, sink, m, total)
        store_element(tile, out.m + place, m)
        store_element(tile, out.l + place, total + term)
        if out.lse != 0:
            if sink != MINUS_INFINITY:
                lse = log_sum(plan, sink, m, total, term)
            else:
                lse = m * (LN_2 * plan.to_base_2) + math.log(total) if total != 0.0 else MINUS_INFINITY
            store_element(tile, out.lse + place, lse)
        if out.entropy != 0:
            wide = total + term
            entropy = math.log(wide) * (total / wide) - LN_2 * moment / wide if total != 0.0 else 0.0
            store_element(tile, out.entropy + place, 0.0 if entropy < 0.0 or term == INFINITY else entropy)
        k = out.top_k
        if k > 0:
            first = (row + i) * k
            scores, keys = out.top_weights + first * tile.itemsize, out.top_indices + first * WORD
            whole = load_element(tile, out.l + place)
            finish_top(kernel, m, whole, plan.to_base_2, scores, keys, k, buffer)


@jit
def begin_block(kernel, plan, head, out, first, row, state):
    """Lay out a block of queries, with nothing known of them yet; the first is number `row` of all heads."""
    tile = kernel.tile
    present = min(tile.width, plan.queries - first)
    source = head.query + first * plan.query_row
    pack_queries(kernel, tile, state, source, plan.query_row, plan.query_column, present, plan.head_dim, plan.scale)
    state += plan.head_dim * tile.row_bytes
    clear(tile, state, 3)
    for i in range(tile.width):  # lanes without a query have no heap
        least = MINUS_INFINITY if i < present else INFINITY
        store_element(tile, state + 3 * tile.row_bytes + i * tile.itemsize, least)
    start = row * out.top_k
    clear_heap(tile, out.top_weights + start * tile.itemsize, out.top_indices + start * WORD, present * out.top_k)


@jit
def summarise_group(kernel, call, plan, number, first_block, blocks, scratch):
    """One task: `blocks` query blocks of one head, from `first_block` on, through all keys they look at."""
    tile = kernel.tile
    out = summary_view(call.out)
    head = locate(call, plan, number)
    group = group_of(kernel, plan, head, first_block, blocks)
    row = number * plan.queries
    q_bytes = plan.head_dim * tile.row_bytes
    state_bytes = q_bytes + STATE_ROWS * tile.row_bytes
    packed = scratch + blocks * state_bytes
    work = packed + plan.key_bytes
    k = out.top_k
    for b in range(blocks):
        first = group.first_query + b * tile.width
        begin_block(kernel, plan, head, out, first, row + first, scratch + b * state_bytes)
    for first_key in range(group.begin, group.end, plan.key_block):
        keys = head.key + first_key * plan.key_row
        keys_at = load_keys(kernel, plan, packed, keys, min(plan.key_block, group.end - first_key))
        for b in range(blocks):
            first = group.first_query + b * tile.width
            part = keys_of_block(kernel, plan, head, first, first_key)
            count = part.end - part.begin
            if count <= 0:
                continue
            q = scratch + b * state_bytes
            state = q + q_bytes
            scores_of(kernel, plan, head, q, part, first, first_key, keys_at, work, NOTHING)
            scores = place_of_scores(tile, work) + part.begin * tile.row_bytes
            top = tile_load(tile.single, work, 0)
            if k > 0:
                start = (row + first) * k
                heaps, heap_keys = out.top_weights + start * tile.itemsize, out.top_indices + start * WORD
                least = state + 3 * tile.row_bytes
                keep_top(tile, scores, count, top, least, first_key + part.begin, heaps, heap_keys, k)
            gather(kernel, scores, count, top, plan.to_base_2, state)
    for b in range(blocks):
        first = group.first_query + b * tile.width
        present = min(tile.width, plan.queries - first)
        write_block(kernel, plan, head, out, scratch + b * state_bytes + q_bytes, row + first, present, work)
    if out.finished != 0:
        finish(out.finished + number * WORD)


@jit
def load_rows(tile, at, first, present, target):
    """The row of numbers that belong to a block of queries, 1 in the lanes behind the last."""
    for i in range(tile.width):
        value = load_element(tile, at + (first + i) * tile.itemsize) if i < present else 1.0
        store_element(tile, target + i * tile.itemsize, value)
    return tile_load(tile.single, target, 0)


@jit
def weigh_block(kernel, call, plan, head, number, first_query, scratch):
    """Write the rows of the weights of one block of queries, whose m and l are known."""
    tile = kernel.tile
    out = summary_view(call.out)
    query = head.query + first_query * plan.query_row
    present = min(tile.width, plan.queries - first_query)
    row = number * plan.queries + first_query
    q = scratch
    factors = q + plan.head_dim * tile.row_bytes
    work = factors + tile.row_bytes
    m = load_rows(tile, out.m, row, present, factors)
    total = load_rows(tile, out.l, row, present, factors)
    tile_store(tile_fill(tile.single, 1.0), factors, 0)
    pack_queries(kernel, tile, q, query, plan.query_row, plan.query_column, present, plan.head_dim, plan.scale)
    scores = place_of_scores(tile, work)
    for first_key in range(0, plan.keys, plan.key_block):
        keys = head.key + first_key * plan.key_row
        part = keys_of_block(kernel, plan, head, first_query, first_key)
        count = part.end - part.begin
        if count > 0:
            scores_of(kernel, plan, head, q, part, first_query, first_key, keys, work, NOTHING)
        exponentials(kernel, scores + part.begin * tile.row_bytes, count, m, plan.to_base_2)
        weights = call.weights + row * plan.keys * tile.itemsize
        write_weights(kernel, plan, scores, part, total, factors, weights, first_key, present)


@jit
def weigh_known_group(kernel, call, plan, number, first_block, blocks, scratch):
    """One task: the weights of `blocks` query blocks of one head whose m and l are known, from `first_block` on."""
    tile = kernel.tile
    head = locate(call, plan, number)
    for block in range(first_block, first_block + blocks):
        weigh_block(kernel, call, plan, head, number, block * tile.width, scratch)
