"""The matrix of attention weights, for those who ask for it: two passes over the keys, the second knows the sums."""

from fastattn.cpu.kernels.blocks import load_keys, load_queries, place_of_scores, scores_of
from fastattn.cpu.kernels.dropout import drop
from fastattn.cpu.kernels.pack import clear, unpack_rows
from fastattn.cpu.kernels.prefetch import NOTHING
from fastattn.cpu.kernels.scores import keys_of_block
from fastattn.cpu.kernels.sinks import add_sinks
from fastattn.cpu.kernels.softmax import absorb, exponentials
from fastattn.cpu.kernels.tasks import locate
from fastattn.simd import jit, minimum, tile_fill, tile_load, tile_store, where_greater

TINY = 1e-30  # a sum of weights is 0, or at least about 1


@jit
def normalise(tile, weights, count, total):
    """Divide a block by the sums; no weight exceeds 1, and those of a query that looks at no key are 0."""
    divisor = where_greater(TINY, total, 1.0, total)
    for _ in range(count):
        share = minimum(1.0, tile_load(tile.single, weights, 0) / divisor)
        tile_store(share, weights, 0)
        weights += tile.row_bytes


@jit
def write_weights(kernel, plan, scores, part, total, factors, weights, first_key, present):
    """Normalise a block of exponentials, of which a part is not 0, and write it to its rows, times `factors`."""
    tile = kernel.tile
    width = min(plan.key_block, plan.keys - first_key)
    clear(tile, scores, part.begin)
    clear(tile, scores + part.end * tile.row_bytes, width - part.end)
    normalise(tile, scores, width, total)
    target = weights + first_key * kernel.itemsize
    unpack_rows(kernel, tile, scores, factors, target, plan.keys * kernel.itemsize, kernel.itemsize, present, width)


@jit
def weigh_block(kernel, call, plan, head, number, first_query, scratch):
    """Write the rows of the weights of one block of queries."""
    tile = kernel.tile
    query = head.query + first_query * plan.query_row
    present = min(tile.width, plan.queries - first_query)
    weights = call.weights + (number * plan.queries + first_query) * plan.keys * kernel.itemsize
    q = scratch
    m = q + plan.query_bytes
    total = m + tile.row_bytes
    factors = total + tile.row_bytes
    packed_keys = factors + tile.row_bytes
    work = packed_keys + plan.key_bytes
    tile_store(tile_fill(tile.single, plan.keep_scale), factors, 0)
    load_queries(kernel, call, plan, q, query, present, packed_keys)
    clear(tile, m, 2)
    scores = place_of_scores(tile, work)
    for second in range(2):
        if second:
            add_sinks(tile, plan, head, m, total)
        for first_key in range(0, plan.keys, plan.key_block):
            part = keys_of_block(kernel, plan, head, first_query, first_key)
            rows, count = scores + part.begin * tile.row_bytes, part.end - part.begin
            if count > 0:
                keys = load_keys(kernel, plan, packed_keys, head.key + first_key * plan.key_row, part.end)
                scores_of(kernel, plan, head, q, part, first_query, first_key, keys, work, NOTHING)
            if not second:
                if count > 0:
                    top = tile_load(tile.single, work, 0)
                    absorb(kernel, rows, count, top, plan.to_base_2, m, total, 0, 0)
                continue
            exponentials(kernel, rows, count, tile_load(tile.single, m, 0), plan.to_base_2)
            if plan.drop_below > 0:
                drop(tile, plan, call, rows, count, number, first_query, first_key + part.begin)
            sums = tile_load(tile.single, total, 0)
            write_weights(kernel, plan, scores, part, sums, factors, weights, first_key, present)


@jit
def weigh_group(kernel, call, plan, number, first_block, blocks, scratch):
    """One task: the weights of `blocks` query blocks of one head, from `first_block` on."""
    tile = kernel.tile
    head = locate(call, plan, number)
    for block in range(first_block, first_block + blocks):
        weigh_block(kernel, call, plan, head, number, block * tile.width, scratch)
