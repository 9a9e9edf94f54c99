"""Dropout whose random numbers depend on (seed, batch, head, query, key) alone.

They are those of Philox4x32-10 (`fastattn.simd.philox`). The counter's words are (key // 4, query, head, batch), the
four words of the result belong to four neighbouring keys, the mixing key is the seed.
"""

from fastattn.simd import jit, keep_rows, tile_load, tile_store


@jit
def drop(tile, plan, call, weights, count, head, first_query, first_key):
    """Set to 0 what dropout takes from a block of weights; first_key is a multiple of 4."""
    batch, head = call.first_batch + head // plan.heads, head % plan.heads
    for v in range(tile.vectors):
        query = first_query + v * tile.lanes
        place = weights + v * tile.vector_bytes
        for j in range(0, count, 4):
            keep = keep_rows(tile, (first_key + j) // 4, query, head, batch, call.seed, plan.drop_below)
            tile_store(tile_load(tile.quad, place, tile.row_bytes) * keep, place, tile.row_bytes)
            place += 4 * tile.row_bytes
