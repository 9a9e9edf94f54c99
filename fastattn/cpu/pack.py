"""Queries into the lanes, results out of them: transposes between row-major matrices and blocks.

A *block* holds one tile width of queries, transposed: `block[p][i]` is feature p of query i, rows `row_bytes` apart.
"""

from fastattn.simd import (
    jit,
    load_element,
    store_element,
    tile_load,
    tile_store,
    tile_transpose,
)


@jit
def pack_queries(tile, block, source, row, column, present, features, scale):
    """block[p][i] = source[i][p] * scale for i < present; lanes beyond are 0."""
    for v in range(tile.vectors):
        first = v * tile.lanes
        lanes_at = block + v * tile.vector_bytes
        rows_at = source + first * row
        done = 0
        if first + tile.lanes <= present and column == tile.itemsize:
            while done + tile.lanes <= features:
                square = tile_load(tile.square, rows_at + done * column, row)
                tile_store(tile_transpose(square) * scale, lanes_at + done * tile.row_bytes, tile.row_bytes)
                done += tile.lanes
        for p in range(done, features):
            for i in range(tile.lanes):
                element = load_element(tile, rows_at + i * row + p * column) * scale if first + i < present else 0.0
                store_element(tile, lanes_at + p * tile.row_bytes + i * tile.itemsize, element)


@jit
def unpack_rows(tile, block, factors, target, row, column, present, features):
    """target[i][p] = block[p][i] * factors[i] for i < present."""
    for v in range(tile.vectors):
        first = v * tile.lanes
        lanes_at = block + v * tile.vector_bytes
        rows_at = target + first * row
        factor = tile_load(tile.vector, factors + v * tile.vector_bytes, 0)
        done = 0
        if first + tile.lanes <= present and column == tile.itemsize:
            while done + tile.lanes <= features:
                square = tile_load(tile.square, lanes_at + done * tile.row_bytes, tile.row_bytes) * factor
                tile_store(tile_transpose(square), rows_at + done * column, row)
                done += tile.lanes
        for i in range(min(tile.lanes, present - first)):
            one = load_element(tile, factors + (first + i) * tile.itemsize)
            for p in range(done, features):
                element = load_element(tile, lanes_at + p * tile.row_bytes + i * tile.itemsize) * one
                store_element(tile, rows_at + i * row + p * column, element)
