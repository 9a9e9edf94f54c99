"""Matrices in panels, and the products of the backward pass, all of them the micro-kernel's.

A matrix x[row][column] stands in panels as wide as the register tile:

    x[column / width][row][column % width]

so that some rows of one panel are a tile, and a row of it is what a multiply-add takes whole. In that form a matrix can
be any of the three in c += a · b: c and b as they are, and a, of which single elements are taken, either way round:

    along     c[m][n] += Σ_k a[m][k] · b[k][n]        k runs along the rows of a
    across    c[m][n] += Σ_k a[k][m] · b[k][n]        k runs across them: a's transpose is multiplied
"""

from fastattn.cpu.kernels.masks import INFINITY
from fastattn.cpu.kernels.tiles import four_along, product_across
from fastattn.simd import (
    absolute,
    all_zero,
    inline,
    jit,
    load_element,
    load_stored,
    store_element,
    tile_fill,
    tile_load,
    tile_load_stored,
    tile_rank1,
    tile_repeat,
    tile_store,
    where_greater,
)


@inline
def along(tile, acc, a, a_panel, b, count):
    """acc[m][n] + Σ_k a[m][k] · b[k][n] over `count` k, from the first of a panel on."""
    for _ in range(count // tile.width):
        at = a
        for _ in range(tile.width // 4):
            acc = four_along(tile, acc, at, tile.row_bytes, tile.itemsize, b)
            at += 4 * tile.itemsize
            b += 4 * tile.row_bytes
        a += a_panel
    for _ in range(count % tile.width):
        acc = tile_rank1(acc, a, tile.row_bytes, b)
        a += tile.itemsize
        b += tile.row_bytes
    return acc


@jit
def across(tile, acc, a, b, count):
    """acc[m][n] + Σ_k a[k][m] · b[k][n] over `count` k."""
    return product_across(tile, acc, a, tile.itemsize, tile.row_bytes, b, count)


@jit
def product_along(tile, start, rows, a, a_panel, b, count, c):
    """c[m][n] = start[n] + Σ_k a[m][k] · b[k][n] for one panel of c: `rows` rows, rounded up to whole tiles."""
    initial = tile_repeat(tile, start)
    for _ in range(0, rows, tile.rows):
        tile_store(along(tile, initial, a, a_panel, b, count), c, tile.row_bytes)
        a += tile.rows * tile.row_bytes
        c += tile.rows * tile.row_bytes


@jit
def add_along(tile, c, c_panel, columns, rows, a, a_panel, b, b_panel, count):
    """c[m][n] += Σ_k a[m][k] · b[k][n] for `rows` rows, rounded up to whole tiles, and the panels of `columns` n."""
    for _ in range(0, columns, tile.width):
        at, place = a, c
        for _ in range(0, rows, tile.rows):
            acc = along(tile, tile_fill(tile, 0.0), at, a_panel, b, count)
            tile_store(tile_load(tile, place, tile.row_bytes) + acc, place, tile.row_bytes)
            at += tile.rows * tile.row_bytes
            place += tile.rows * tile.row_bytes
        b += b_panel
        c += c_panel


@jit
def add_across(tile, c, c_panel, columns, a, b, b_panel, count):
    """c[m][n] += Σ_k a[k][m] · b[k][n] for the m of one panel of a, and the panels of `columns` n."""
    for _ in range(0, columns, tile.width):
        at, place = a, c
        for _ in range(0, tile.width, tile.rows):
            acc = across(tile, tile_fill(tile, 0.0), at, b, count)
            tile_store(tile_load(tile, place, tile.row_bytes) + acc, place, tile.row_bytes)
            at += tile.rows * tile.itemsize
            place += tile.rows * tile.row_bytes
        b += b_panel
        c += c_panel


@jit
def pack_panels(place, tile, target, panel, source, row, column, count, features):
    """target[p / width][j][p % width] = source[j][p]; 0 behind the last feature. `place`: of the source."""
    for first in range(0, features, tile.width):
        width = min(tile.width, features - first)
        at, there = source + first * column, target
        if width == tile.width and column == place.itemsize:
            for _ in range(count):
                tile_store(tile_load_stored(place, tile.single, at, 0), there, 0)
                at += row
                there += tile.row_bytes
        else:
            for _ in range(count):
                for p in range(width):
                    store_element(tile, there + p * tile.itemsize, load_stored(place, at + p * column))
                for p in range(width, tile.width):
                    store_element(tile, there + p * tile.itemsize, 0.0)
                at += row
                there += tile.row_bytes
        target += panel


@jit
def unpack_panels(tile, source, panel, target, row, column, count, features):
    """target[j][p] = source[p / width][j][p % width]."""
    for first in range(0, features, tile.width):
        width = min(tile.width, features - first)
        at, place = source, target + first * column
        if width == tile.width and column == tile.itemsize:
            for _ in range(count):
                tile_store(tile_load(tile.single, at, 0), place, 0)
                at += tile.row_bytes
                place += row
        else:
            for _ in range(count):
                for p in range(width):
                    store_element(tile, place + p * column, load_element(tile, at + p * tile.itemsize))
                at += tile.row_bytes
                place += row
        source += panel


@jit
def clean_panels(tile, target, target_panel, source, source_panel, count, features, factor):
    """target = source · factor, with 0 for what is not finite."""
    for _ in range(0, features, tile.width):
        for offset in range(0, count * tile.row_bytes, tile.row_bytes):
            x = tile_load(tile.single, source + offset, 0)
            tile_store(where_greater(INFINITY, absolute(x), x, 0.0) * factor, target + offset, 0)
        source += source_panel
        target += target_panel


@jit
def are_finite(tile, panels, panel, count, features):
    """Whether rows in panels hold neither NaN nor infinity."""
    sums = tile_fill(tile, 0.0)
    rest = tile_fill(tile.single, 0.0)
    whole = (count - count % tile.rows) * tile.row_bytes
    for _ in range(0, features, tile.width):
        for offset in range(0, whole, tile.rows * tile.row_bytes):
            sums = sums + tile_load(tile, panels + offset, tile.row_bytes) * 0.0
        for offset in range(whole, count * tile.row_bytes, tile.row_bytes):
            rest = rest + tile_load(tile.single, panels + offset, 0) * 0.0
        panels += panel
    return all_zero(sums + rest)


@jit
def clear_row(tile, panels, panel, i, features):
    """Set a row in panels to 0."""
    for _ in range(0, features, tile.width):
        tile_store(tile_fill(tile.single, 0.0), panels + i * tile.row_bytes, 0)
        panels += panel
