"""The weights of each key summed over the queries: `received` of a summary, once m and l of a head's queries are known.

Here a task owns keys: the blocks of a group of one head, packed once. All query blocks that may look at them come by,
in order, so that each sum has one owner and one order of its terms, and needs no memory but its own:

    for each query block:                            packed each time: a small part of the work on some hundred keys
        for each block of keys of the group:
            scores[j][i] = key[j] · q[i]
            sums[j][i]  += 2^((scores[j][i] - m[i]) · to_base_2) / l[i]      0 where the score is -inf
    key_weights[j] = Σ_i sums[j][i]                  over the lanes, once
"""

from fastattn.cpu.kernels.blocks import load_keys, place_of_scores, scores_of
from fastattn.cpu.kernels.masks import lowest
from fastattn.cpu.kernels.pack import clear, pack_queries
from fastattn.cpu.kernels.prefetch import NOTHING
from fastattn.cpu.kernels.records import SUMMARY
from fastattn.cpu.kernels.scores import keys_of_block, queries_of_keys
from fastattn.cpu.kernels.softmax import MINUS_INFINITY, exp2
from fastattn.cpu.kernels.stages import wait_for
from fastattn.cpu.kernels.tasks import locate
from fastattn.simd import jit, load_element, record_view, store_element, tile_load, tile_store, where_greater

summary_view = record_view(SUMMARY)

WORD = 8
QUERY_ROWS = 2  # of a query block besides the queries: m, and 1 / l


@jit
def load_sums(tile, out, first, present, target):
    """target[0][i] = m, target[1][i] = 1 / l, or 0 for a query that looks at no key."""
    for i in range(tile.width):
        m, total = 0.0, 0.0
        if i < present:
            m = load_element(tile, out.m + (first + i) * tile.itemsize) * 1.0
            total = load_element(tile, out.l + (first + i) * tile.itemsize) * 1.0
        store_element(tile, target + i * tile.itemsize, m)
        store_element(tile, target + tile.row_bytes + i * tile.itemsize, 1.0 / total if total != 0.0 else 0.0)


@jit
def leave_out(tile, scores, count, present):
    """Hide all keys from the lanes behind the last query: 0 there is no score, and NaN in a key must not be counted."""
    for j in range(count):
        for i in range(present, tile.width):
            store_element(tile, scores + j * tile.row_bytes + i * tile.itemsize, MINUS_INFINITY)


@jit
def add_weights(kernel, scores, count, to_base_2, state, sums):
    """sums[j][i] += the weight that belongs to scores[j][i]: nothing for -inf, even where the other weights are NaN."""
    tile = kernel.tile
    m = tile_load(tile.single, state, 0)
    inverse = tile_load(tile.single, state + tile.row_bytes, 0)
    for _ in range(count):
        score = tile_load(tile.single, scores, 0)
        weight = exp2(kernel, (score - m) * to_base_2) * inverse
        weight = where_greater(lowest(tile), score, 0.0, weight)
        tile_store(tile_load(tile.single, sums, 0) + weight, sums, 0)
        scores += tile.row_bytes
        sums += tile.row_bytes


@jit
def write_sums(tile, sums, count, target):
    """Sum over the lanes."""
    for j in range(count):
        total = load_element(tile, sums)
        for i in range(1, tile.width):
            total += load_element(tile, sums + i * tile.itemsize)
        store_element(tile, target + j * tile.itemsize, total)
        sums += tile.row_bytes


@jit
def sum_weights(kernel, call, plan, number, part, scratch):
    """One task: the blocks of keys in a part of one head, for all queries that look at them."""
    tile = kernel.tile
    out = summary_view(call.out)
    head = locate(call, plan, number)
    row = number * plan.queries
    start = part * plan.key_group * plan.key_block
    end = min(plan.keys, start + plan.key_group * plan.key_block)
    blocks = (end - start + plan.key_block - 1) // plan.key_block
    sums = scratch
    q = sums + blocks * plan.key_block * tile.row_bytes
    state = q + plan.head_dim * tile.row_bytes
    packed = state + QUERY_ROWS * tile.row_bytes
    work = packed
    keys, block_bytes = head.key + start * plan.key_row, plan.key_block * plan.key_row
    if plan.key_bytes > 0:
        block_bytes = plan.key_bytes
        for b in range(blocks):
            first_key = start + b * plan.key_block
            count = max(0, min(plan.key_block, min(end, head.keys) - first_key))
            source = head.key + first_key * plan.key_row
            load_keys(kernel, plan, packed + b * block_bytes, source, count)
        keys = packed
        work = packed + blocks * block_bytes
    clear(tile, sums, blocks * plan.key_block)

    wait_for(out.finished + number * WORD, plan.groups)
    first_query, last_query = queries_of_keys(plan, head, start, end)
    for first in range(first_query // tile.width * tile.width, last_query, tile.width):
        present = min(tile.width, plan.queries - first)
        source = head.query + first * plan.query_row
        pack_queries(kernel, tile, q, source, plan.query_row, plan.query_column, present, plan.head_dim, plan.scale)
        load_sums(tile, out, row + first, present, state)
        for b in range(blocks):
            first_key = start + b * plan.key_block
            part = keys_of_block(kernel, plan, head, first, first_key)
            count = part.end - part.begin
            if count <= 0:
                continue
            at = keys + b * block_bytes
            scores_of(kernel, plan, head, q, part, first, first_key, at, work, NOTHING)
            scores = place_of_scores(tile, work) + part.begin * tile.row_bytes
            if present < tile.width:
                leave_out(tile, scores, count, present)
            place = sums + (b * plan.key_block + part.begin) * tile.row_bytes
            add_weights(kernel, scores, count, plan.to_base_2, state, place)
    write_sums(tile, sums, end - start, out.key_weights + (number * plan.keys + start) * tile.itemsize)
