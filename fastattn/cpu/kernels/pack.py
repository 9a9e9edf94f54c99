"""Queries into the lanes, results out of them: transposes between row-major matrices and blocks.

A *block* holds one tile width of queries, transposed: `block[p][i]` is feature p of query i, rows `row_bytes` apart.

Keys and values are read in place by the micro-kernel where few queries want them. Elsewhere a block of keys is packed
once for a group of query blocks, in panels of as many rows as the tile has, which the micro-kernel reads straight on:

    keys[j / rows][p][j % rows]        values[p / rows][j][p % rows]

Read in place, rows whose length is a power of two fall into few sets of the first-level cache.

Of half precision, numbers are widened on the way, and rounded on the way out. Where the micro-kernel multiplies pairs
of bfloat16 (`fastattn.cpu.kernels.pairs`), they stay what they are.
"""

from fastattn.cpu.kernels.int8 import copy_blocks
from fastattn.simd import (
    as_element,
    copy_stored,
    jit,
    load_element,
    load_stored,
    store_element,
    store_stored,
    tile_fill,
    tile_load,
    tile_load_stored,
    tile_store,
    tile_store_stored,
    tile_transpose,
)


@jit
def key_steps(kernel, plan):
    """How far apart the micro-kernel finds panels, rows and columns of keys: packed, or as they lie."""
    tile = kernel.tile
    if kernel.reads == "panels":
        panel_row = tile.rows * tile.itemsize
        return plan.head_dim * panel_row, tile.itemsize, panel_row
    if kernel.reads == "rows" or kernel.reads == "pairs":
        return tile.rows * plan.key_step, plan.key_step, tile.itemsize
    return tile.rows * plan.key_row, plan.key_row, plan.key_column


@jit
def value_steps(kernel, plan):
    """The same of values, whose panels are of columns."""
    tile = kernel.tile
    if kernel.reads == "panels":
        panel_row = tile.rows * tile.itemsize
        return plan.key_block * panel_row, panel_row, tile.itemsize
    if kernel.reads == "rows" or kernel.reads == "pairs":
        return tile.rows * tile.itemsize, plan.value_step, tile.itemsize
    return tile.rows * plan.value_column, plan.value_row, plan.value_column


@jit
def pack_queries(place, tile, block, source, row, column, present, features, scale):
    """block[p][i] = source[i][p] * scale for i < present; lanes beyond are 0. `place`: of the source."""
    factor = as_element(tile, scale)
    zero = as_element(tile, 0.0)
    for v in range(tile.vectors):
        first = v * tile.lanes
        lanes_at = block + v * tile.vector_bytes
        rows_at = source + first * row
        done = 0
        if first + tile.lanes <= present and column == place.itemsize:
            while done + tile.lanes <= features:
                square = tile_load_stored(place, tile.square, rows_at + done * column, row)
                tile_store(tile_transpose(square) * factor, lanes_at + done * tile.row_bytes, tile.row_bytes)
                done += tile.lanes
        for p in range(done, features):
            for i in range(tile.lanes):
                element = load_stored(place, rows_at + i * row + p * column) * factor if first + i < present else zero
                store_element(tile, lanes_at + p * tile.row_bytes + i * tile.itemsize, element)


@jit
def unpack_rows(place, tile, block, factors, target, row, column, present, features):
    """target[i][p] = block[p][i] * factors[i] for i < present. `place`: of the target."""
    for v in range(tile.vectors):
        first = v * tile.lanes
        lanes_at = block + v * tile.vector_bytes
        rows_at = target + first * row
        factor = tile_load(tile.vector, factors + v * tile.vector_bytes, 0)
        done = 0
        if first + tile.lanes <= present and column == place.itemsize:
            while done + tile.lanes <= features:
                square = tile_load(tile.square, lanes_at + done * tile.row_bytes, tile.row_bytes) * factor
                tile_store_stored(place, tile_transpose(square), rows_at + done * column, row)
                done += tile.lanes
        for i in range(min(tile.lanes, present - first)):
            one = load_element(tile, factors + (first + i) * tile.itemsize)
            for p in range(done, features):
                element = load_element(tile, lanes_at + p * tile.row_bytes + i * tile.itemsize) * one
                store_stored(place, rows_at + i * row + p * column, element)


@jit
def copy_rows(place, tile, target, target_row, source, row, column, count, features):
    """target[j][p] = source[j][p], rows `target_row` bytes apart."""
    if place.storage == "int8":
        copy_blocks(place, tile, target, target_row, source, row, count, features)
        return
    for _ in range(count):
        p = 0
        if column == place.itemsize:
            while p + tile.lanes <= features:
                numbers = tile_load_stored(place, tile.vector, source + p * column, 0)
                tile_store(numbers, target + p * tile.itemsize, 0)
                p += tile.lanes
        for q in range(p, features):
            store_element(tile, target + q * tile.itemsize, load_stored(place, source + q * column))
        source += row
        target += target_row


@jit
def copy_as_they_lie(kernel, target, target_row, source, row, column, count, features):
    """The same without widening: the target has elements as memory has them, next to each other."""
    vector, whole = kernel.tile.vector, 0
    if column == kernel.itemsize:
        whole = features * column // vector.vector_bytes * vector.vector_bytes
    for _ in range(count):
        for offset in range(0, whole, vector.vector_bytes):
            tile_store(tile_load(vector, source + offset, 0), target + offset, 0)
        for p in range(whole // kernel.itemsize, features):
            copy_stored(kernel, target + p * kernel.itemsize, source + p * column)
        target += target_row
        source += row


@jit
def pack_keys(place, tile, target, source, row, column, count, features):
    """target[j / rows][p][j % rows] = source[j][p]."""
    rows, panel_row = tile.rows, tile.rows * tile.itemsize
    for j in range(0, count, rows):
        height = min(rows, count - j)
        p = 0
        if height == rows and column == place.itemsize:
            while p + rows <= features:
                square = tile_load_stored(place, tile.panel, source + p * column, row)
                tile_store(tile_transpose(square), target + p * panel_row, panel_row)
                p += rows
        for q in range(p, features):
            for r in range(height):
                element = load_stored(place, source + r * row + q * column)
                store_element(tile, target + q * panel_row + r * tile.itemsize, element)
        source += rows * row
        target += features * panel_row


@jit
def pack_values(place, tile, target, source, row, column, count, features, panel_bytes):
    """target[p / rows][j][p % rows] = source[j][p], panels `panel_bytes` apart."""
    rows, panel_row = tile.rows, tile.rows * tile.itemsize
    for j in range(0, count, rows):
        height = min(rows, count - j)
        p = 0
        at = target
        if height == rows and column == place.itemsize:
            while p + rows <= features:
                tile_store(tile_load_stored(place, tile.panel, source + p * column, row), at, panel_row)
                p += rows
                at += panel_bytes
        for q in range(p, features):
            at = target + q // rows * panel_bytes + q % rows * tile.itemsize
            for r in range(height):
                store_element(tile, at + r * panel_row, load_stored(place, source + r * row + q * column))
        source += rows * row
        target += rows * panel_row


@jit
def clear(tile, at, rows):
    """Fill rows with 0."""
    for _ in range(rows):
        tile_store(tile_fill(tile.single, 0.0), at, tile.row_bytes)
        at += tile.row_bytes


@jit
def add_rows(tile, target, source, rows):
    """Add rows to others."""
    row, whole = tile.row_bytes, (rows - rows % tile.rows) * tile.row_bytes
    for at in range(0, whole, tile.rows * row):
        tile_store(tile_load(tile, target + at, row) + tile_load(tile, source + at, row), target + at, row)
    for at in range(whole, rows * row, row):
        tile_store(tile_load(tile.single, target + at, 0) + tile_load(tile.single, source + at, 0), target + at, 0)
