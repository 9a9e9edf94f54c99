"""The greatest scores of each query, kept in a heap while the keys go by.

A query's heap is k scores and the k keys that they belong to, in two arrays. The worst of them stands first, and each
parent is worse than its children: of a lower score, or of an equal one and a later key. A score enters if it is
greater than the first, which it replaces; an equal one comes from a later key, and stays out. Places not taken yet hold
-inf and key -1. So scores of -inf, and NaN, never enter.
"""

from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.simd import (
    jit,
    lanes_above,
    load_element,
    load_i64,
    lowest_bit,
    maximum,
    store_element,
    store_i64,
    tile_fill,
    tile_load,
)

NOBODY = -1  # the key in a place that is not taken
ROWS = 8  # keys looked at together
WORD = 8  # bytes of a key's number


@jit
def is_worse(a, a_key, b, b_key):
    return (a < b) | ((a == b) & (a_key > b_key))  # without branches, which nobody could foresee


@jit
def sift_down(tile, scores, keys, k, score, key):
    """Put a score and its key into a heap of k whose first place is free."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= k:
            break
        best, best_key = load_element(tile, scores + child * tile.itemsize), load_i64(keys + child * WORD)
        if child + 1 < k:
            other = load_element(tile, scores + (child + 1) * tile.itemsize)
            other_key = load_i64(keys + (child + 1) * WORD)
            child += is_worse(other, other_key, best, best_key)
            best, best_key = load_element(tile, scores + child * tile.itemsize), load_i64(keys + child * WORD)
        if not is_worse(best, best_key, score, key):
            break
        store_element(tile, scores + place * tile.itemsize, best)
        store_i64(keys + place * WORD, best_key)
        place = child
    store_element(tile, scores + place * tile.itemsize, score)
    store_i64(keys + place * WORD, key)


@jit
def sort_heap(tile, scores, keys, k):
    """Turn a heap into a list: the greatest score first, of equal ones the lower key first."""
    for last in range(k - 1, 0, -1):
        score, key = load_element(tile, scores + last * tile.itemsize), load_i64(keys + last * WORD)
        store_element(tile, scores + last * tile.itemsize, load_element(tile, scores))
        store_i64(keys + last * WORD, load_i64(keys))
        sift_down(tile, scores, keys, last, score, key)


@jit
def clear_heap(tile, scores, keys, k):
    """A heap that nobody has entered."""
    for r in range(k):
        store_element(tile, scores + r * tile.itemsize, MINUS_INFINITY)
        store_i64(keys + r * WORD, NOBODY)


@jit
def keep_top(tile, block, count, top, least_at, first_key, heaps, heap_keys, k):
    """Enter the scores of a block, block[j][i], into the heaps of its queries, which stand k elements apart.

    `top` is the block's maximum for each query, `least_at` the place of the row of scores that is to be exceeded.
    """
    least = tile_load(tile.single, least_at, 0)
    if lanes_above(top, least) == 0:
        return
    for start in range(0, count, ROWS):
        stop = min(start + ROWS, count)
        best = tile_fill(tile.single, MINUS_INFINITY)
        for j in range(start, stop):
            best = maximum(tile_load(tile.single, block + j * tile.row_bytes, 0), best)
        if lanes_above(best, least) == 0:
            continue
        for j in range(start, stop):
            row = block + j * tile.row_bytes
            bits = lanes_above(tile_load(tile.single, row, 0), least)
            if bits == 0:
                continue
            while bits != 0:
                i = lowest_bit(bits)
                bits &= bits - 1
                scores = heaps + i * k * tile.itemsize
                score = load_element(tile, row + i * tile.itemsize)
                sift_down(tile, scores, heap_keys + i * k * WORD, k, score, first_key + j)
                store_element(tile, least_at + i * tile.itemsize, load_element(tile, scores))
            least = tile_load(tile.single, least_at, 0)
