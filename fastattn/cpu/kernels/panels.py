"""Matrices in panels, and the products of the backward pass, all of them the micro-kernel's.

A matrix x[row][column] stands in panels as wide as the register tile:

    x[column / width][row][column % width]

so that some rows of one panel are a tile, and a row of it is what a multiply-add takes whole. In that form a matrix can
be any of the three in c += a · b: c and b as they are, and a, of which single elements are taken, either way round:

    along     c[m][n] += Σ_k a[m][k] · b[k][n]        k runs along the rows of a
    across    c[m][n] += Σ_k a[k][m] · b[k][n]        k runs across them: a's transpose is multiplied

Where the machine multiplies pairs of bfloat16, an element of a and b is a pair of neighbours in k, in float32's place.
Of weights, which are added `along`, a row is half as long then.
"""

from fastattn.cpu.kernels import pairs
from fastattn.cpu.kernels.masks import INFINITY
from fastattn.cpu.kernels.prefetch import ask
from fastattn.cpu.kernels.tiles import four_along, four_pairs_along, pairs_across, product_across
from fastattn.machine.kernel import PLAIN
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
    tile_rank2,
    tile_repeat,
    tile_store,
    where_greater,
)


@inline
def along(kernel, acc, a, a_row, a_panel, b, count):
    """acc[m][n] + Σ_k a[m][k] · b[k][n] over `count` k, from the first of a panel on, whose rows are `a_row` bytes."""
    tile = kernel.tile
    width = a_row // tile.itemsize
    for _ in range(count // width):
        at = a
        for _ in range(width // 4):
            if kernel.reads == "pairs":
                acc = four_pairs_along(tile, acc, at, a_row, tile.itemsize, b)
            else:
                acc = four_along(tile, acc, at, a_row, tile.itemsize, b)
            at += 4 * tile.itemsize
            b += 4 * tile.row_bytes
        a += a_panel
    for _ in range(count % width):
        acc = tile_rank2(acc, a, a_row, b) if kernel.reads == "pairs" else tile_rank1(acc, a, a_row, b)
        a += tile.itemsize
        b += tile.row_bytes
    return acc


@jit
def across(kernel, acc, a, b, count):
    """acc[m][n] + Σ_k a[k][m] · b[k][n] over `count` k."""
    tile = kernel.tile
    if kernel.reads == "pairs":
        return pairs_across(tile, acc, a, tile.itemsize, tile.row_bytes, b, pairs.pairs_of(count))
    return product_across(tile, acc, a, tile.itemsize, tile.row_bytes, b, count)


@jit
def product_along(kernel, start, rows, a, a_panel, b, count, factor, c, wanted):
    """c[m][n] = start[n] + Σ_k a[m][k] · b[k][n] for one panel of c: `rows` rows, rounded up to whole tiles.

    Of pairs, sums are multiplied by a factor, where something may happen to them. Meanwhile what is on the list
    `wanted` is asked for.
    """
    tile = kernel.tile
    initial = tile_repeat(tile, start)
    if kernel.reads == "pairs":
        count = pairs.pairs_of(count)
    for _ in range(0, rows, tile.rows):
        acc = along(kernel, initial, a, tile.row_bytes, a_panel, b, count)
        if kernel.reads == "pairs" and kernel.steps != PLAIN:
            acc = acc * factor
        tile_store(acc, c, tile.row_bytes)
        ask(kernel, wanted)
        a += tile.rows * tile.row_bytes
        c += tile.rows * tile.row_bytes


@jit
def add_along(kernel, c, c_panel, columns, rows, a, a_panel, b, b_panel, count):
    """c[m][n] += Σ_k a[m][k] · b[k][n] for `rows` rows, rounded up to whole tiles, and the panels of `columns` n."""
    tile, a_row = kernel.tile, kernel.tile.row_bytes
    if kernel.reads == "pairs":
        count, a_row = pairs.pairs_of(count), kernel.tile.row_bytes // 2
    for _ in range(0, columns, tile.width):
        at, place = a, c
        for _ in range(0, rows, tile.rows):
            acc = along(kernel, tile_fill(tile, 0.0), at, a_row, a_panel, b, count)
            tile_store(tile_load(tile, place, tile.row_bytes) + acc, place, tile.row_bytes)
            at += tile.rows * a_row
            place += tile.rows * tile.row_bytes
        b += b_panel
        c += c_panel


@jit
def add_across(kernel, c, c_panel, columns, a, b, b_panel, count):
    """c[m][n] += Σ_k a[k][m] · b[k][n] for the m of one panel of a, and the panels of `columns` n."""
    tile = kernel.tile
    for _ in range(0, columns, tile.width):
        at, place = a, c
        for _ in range(0, tile.width, tile.rows):
            acc = across(kernel, tile_fill(tile, 0.0), at, b, count)
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
def pack_factors(kernel, target, panel, source, row, column, count, features):
    """Lay out rows for the products over features, which run along them."""
    if kernel.reads == "pairs":
        pairs.copy_panels(kernel, target, panel, source, row, column, count, features)
    else:
        pack_panels(kernel, kernel.tile, target, panel, source, row, column, count, features)


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


@jit
def pair_panels(tile, panels, panel, count, features):
    """Round rows in panels to bfloat16, in pairs of rows."""
    for _ in range(0, features, tile.width):
        pairs.pair_rows(tile, panels, count)
        panels += panel


@jit
def pack_finite_pairs(kernel, target, panel, source, row, column, count, features):
    """`pack_panels` in pairs of rows, with 0 for what is not finite."""
    tile = kernel.tile
    pack_panels(kernel, tile, target, panel, source, row, column, count, features)
    if not are_finite(tile, target, panel, count, features):
        clean_panels(tile, target, panel, target, panel, count, features, 1.0)
    pair_panels(tile, target, panel, count, features)
