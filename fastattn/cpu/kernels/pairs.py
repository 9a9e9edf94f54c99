"""Pairs of bfloat16 in the place of one float32: how queries, keys, values and weights are laid out as such.

Some machines multiply pair by pair, and add both products, in the time of one multiply-add. So the micro-kernel's loops
are what they are elsewhere, over half as many rows:

    scores[j][i] = Σ_p key[j][2p, 2p+1] · q[p][i]          q[p][i]: features 2p and 2p+1 of query i
    out[p][i]   += Σ_j value[j][p] · weights[j][i]         both are pairs of keys 2j and 2j+1

Keys are read where they lie, if their features are neighbours, and even in number. Queries can only be multiplied by
powers of two without another rounding; what remains of the scale is a factor of the scores.
"""

from fastattn.simd import (
    WORD,
    jit,
    load_stored,
    load_u16,
    store_stored,
    store_u16,
    tile_fill,
    tile_load,
    tile_load_two_rows,
    tile_round_to_pairs,
    tile_scale_pairs,
    tile_store,
    tile_transpose,
)

HALF = 2  # bytes


@jit
def pairs_of(count):
    """How many pairs hold so many elements."""
    return (count + 1) // 2


@jit
def pack_queries(kernel, block, source, row, column, present, features, scale):
    """Write queries as pairs of features, times a power of two; lanes beyond are 0."""
    tile = kernel.tile
    pairs = pairs_of(features)
    for v in range(tile.vectors):
        first = v * tile.lanes
        lanes_at = block + v * tile.vector_bytes
        rows_at = source + first * row
        done = 0
        if first + tile.lanes <= present and column == HALF:
            while 2 * (done + tile.lanes) <= features:
                square = tile_transpose(tile_load(tile.square, rows_at + done * WORD, row))
                tile_store(tile_scale_pairs(square, scale), lanes_at + done * tile.row_bytes, tile.row_bytes)
                done += tile.lanes
        for p in range(done, pairs):
            tile_store(tile_fill(tile.vector, 0.0), lanes_at + p * tile.row_bytes, 0)
        for p in range(2 * done, features):
            at = lanes_at + p // 2 * tile.row_bytes + p % 2 * HALF
            for i in range(min(tile.lanes, present - first)):
                store_stored(kernel, at + i * WORD, load_stored(kernel, rows_at + i * row + p * column) * scale)


@jit
def copy_keys(kernel, target, target_row, source, row, column, count, features):
    """target[j][p] = source[j][p] with neighbours as pairs, behind the last feature 0."""
    tile = kernel.tile
    for _ in range(count):
        p = 0
        if column == HALF:
            while p + 2 * tile.lanes <= features:
                tile_store(tile_load(tile.vector, source + p * HALF, 0), target + p * HALF, 0)
                p += 2 * tile.lanes
        for q in range(p, features):
            store_u16(target + q * HALF, load_u16(source + q * column))
        if features % 2 == 1:
            store_u16(target + features * HALF, 0)
        source += row
        target += target_row


@jit
def copy_panels(kernel, target, panel, source, row, column, count, features):
    """target[p / width][j][p % width] = source[j][2p] and source[j][2p + 1], which behind the last feature is 0."""
    tile = kernel.tile
    for first in range(0, features, 2 * tile.width):
        some = min(2 * tile.width, features - first)
        copy_keys(kernel, target, tile.row_bytes, source + first * column, row, column, count, some)
        target += panel


@jit
def copy_values(kernel, target, target_row, source, row, column, count, features):
    """target[j][p] = source[2j][p] and source[2j + 1][p]; behind the last row 0."""
    tile = kernel.tile
    for j in range(0, count, 2):
        p = 0
        if column == HALF and j + 1 < count:
            while p + tile.lanes <= features:
                at = source + p * HALF
                tile_store(tile_load_two_rows(tile.vector, at, at + row), target + p * WORD, 0)
                p += tile.lanes
        for q in range(p, features):
            store_u16(target + q * WORD, load_u16(source + q * column))
            other = load_u16(source + row + q * column) if j + 1 < count else 0
            store_u16(target + q * WORD + HALF, other)
        source += 2 * row
        target += target_row


@jit
def clean_values(kernel, values, values_row, count, features):
    """Put 0 in the place of what is not finite."""
    for j in range(count):
        for p in range(features):
            at = values + j // 2 * values_row + p * WORD + j % 2 * HALF
            if load_stored(kernel, at) * 0.0 != 0.0:
                store_u16(at, 0)


@jit
def pair_rows(tile, rows, count):
    """Round rows to bfloat16, in pairs, which are in their place from the first row on; behind the last row 0."""
    target = rows
    for j in range(0, count, 2):
        first = tile_load(tile.single, rows, 0)
        second = tile_fill(tile.single, 0.0)
        if j + 1 < count:
            second = tile_load(tile.single, rows + tile.row_bytes, 0)
        tile_store(tile_round_to_pairs(first, second), target, 0)
        rows += 2 * tile.row_bytes
        target += tile.row_bytes
