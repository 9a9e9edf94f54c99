"""Dropout whose random numbers depend on (seed, batch, head, query, key) alone.

They are those of Philox4x32-10 (`fastattn.simd.philox`). The counter's words are (key // 4, query, head, batch), the
four words of the result belong to four neighbouring keys, the mixing key is the seed.
"""

from fastattn.simd import jit, keep_rows, stack_memory, tile_load, tile_store

__all__ = ["drop", "numbers_of_head"]

memory_of_a_quad = stack_memory(4 * 64)  # four of the widest vectors


@jit
def numbers_of_head(call, plan, head):
    """The numbers of the row of the batch and of the head, in the whole of which the call may be a piece."""
    return call.first_batch + head // plan.heads, plan.first_head + head % plan.heads


@jit
def drop(tile, plan, call, weights, count, head, first_query, first_key):
    """Set to 0 what dropout takes from a block of weights; first_key is a multiple of 4.

    In a piece of a call it may not be one in the whole: then the first four and the last are not all of this block.
    """
    batch, head = numbers_of_head(call, plan, head)
    first_key += plan.first_key
    before = first_key % 4
    for v in range(tile.vectors):
        query = plan.first_query + first_query + v * tile.lanes
        place = weights + v * tile.vector_bytes - before * tile.row_bytes
        for j in range(-before, count, 4):
            keep = keep_rows(tile, (first_key + j) // 4, query, head, batch, call.seed, plan.drop_below)
            if before == 0 or (j >= 0 and j + 4 <= count):
                tile_store(tile_load(tile.quad, place, tile.row_bytes) * keep, place, tile.row_bytes)
            else:
                drop_some(tile, keep, place, max(0, -j), min(4, count - j))
            place += 4 * tile.row_bytes


@jit
def drop_some(tile, keep, weights, begin, end):
    """The same for some of four keys."""
    buffer = memory_of_a_quad()
    tile_store(keep, buffer, tile.vector_bytes)
    for i in range(begin, end):
        place = weights + i * tile.row_bytes
        kept = tile_load(tile.vector, buffer + i * tile.vector_bytes, 0)
        tile_store(tile_load(tile.vector, place, 0) * kept, place, 0)
