"""Squares of masks, laid out as scores are.

A mask is read tile by tile where it lies: a square of `lanes` queries by `lanes` keys is loaded along the keys and
transposed in registers, so that it meets the scores with queries in the lanes. Where keys are in the lanes, a row of a
mask meets them as it lies.
"""

from fastattn.cpu.kernels.records import BIAS_BFLOAT16, BIAS_OTHER, BIAS_SAME, KEEP
from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.simd import (
    absolute,
    all_finite,
    inline,
    jit,
    largest_row,
    load_f32,
    load_f64,
    load_u8,
    load_u16,
    maximum,
    minimum,
    store_f32,
    store_f64,
    store_u8,
    store_u16,
    tile_load,
    tile_load_bool,
    tile_load_other,
    tile_load_stored,
    tile_store,
    tile_transpose,
    where_greater,
)

INFINITY = float("inf")
LARGEST_FLOAT32 = 3.4028234663852886e38
LARGEST_FLOAT64 = 1.7976931348623157e308


@jit
def load_mask(kernel, shape, kind, at, row):
    """A square of a mask, [query][key], or a row of one, as values to add: a boolean is 0 or -inf."""
    if kind == KEEP:
        return tile_load_bool(shape, at, row)
    if kind == BIAS_SAME:
        return tile_load(shape, at, row)
    if kind == BIAS_OTHER:
        return tile_load_other(shape, at, row)
    if kind == BIAS_BFLOAT16:
        return tile_load_stored(kernel.bfloat16_place, shape, at, row)
    return tile_load_stored(kernel.half_place, shape, at, row)


@jit
def gather_mask(kernel, shape, kind, itemsize, at, row, column, rows, columns, buffer):
    """The same for one that lies apart in memory, or reaches over an edge: elements are copied together first."""
    for i in range(rows):
        source = at + i * row
        target = buffer + i * shape.lanes * itemsize
        for _ in range(columns):
            if itemsize == 1:
                store_u8(target, load_u8(source))
            elif itemsize == 2:
                store_u16(target, load_u16(source))
            elif itemsize == 4:
                store_f32(target, load_f32(source))
            else:
                store_f64(target, load_f64(source))
            source += column
            target += itemsize
    return load_mask(kernel, shape, kind, buffer, shape.lanes * itemsize)


@jit
def lowest(tile):
    """The lowest finite number of the tile's dtype."""
    return -LARGEST_FLOAT32 if tile.itemsize == 4 else -LARGEST_FLOAT64


@jit
def saturate(tile, x):
    """x, an infinity brought back to the largest finite number of the tile's dtype; NaN stays."""
    return maximum(lowest(tile), minimum(-lowest(tile), x))


@inline
def hide(tile, scores, mask):
    """-inf where the mask is -inf, the score, whatever it is, elsewhere."""
    return where_greater(lowest(tile), mask, MINUS_INFINITY, scores)


@jit
def add_bias(tile, scores, mask):
    """Scores under a square of a floating mask, queries in the lanes. Sums of finite numbers stay finite."""
    biased = scores + mask
    if all_finite(scores + maximum(mask, lowest(tile))):
        return biased  # the mask's -inf, if any, is the only one
    largest = maximum(absolute(scores), absolute(mask))
    return hide(tile, where_greater(INFINITY, largest, saturate(tile, biased), biased), mask)


@inline
def add_square(kernel, plan, scores, mask, best):
    """`add_bias` for a square of a floating mask that lies in rows, where the scores stand; the maximum of all."""
    tile = kernel.tile
    if plan.bias_kind == BIAS_SAME:  # which `load_mask` does as well, but hands over in memory
        values = tile_transpose(tile_load(tile.square, mask, plan.bias_row))
    else:
        values = tile_transpose(load_mask(kernel, tile.square, plan.bias_kind, mask, plan.bias_row))
    biased = tile_load(tile.square, scores, tile.row_bytes) + values
    if not all_finite(biased):
        biased = add_bias(tile, tile_load(tile.square, scores, tile.row_bytes), values)
    tile_store(biased, scores, tile.row_bytes)
    return maximum(largest_row(biased), best)


@inline
def hide_square(kernel, plan, scores, mask, best):
    """`hide` for a square of a boolean mask that lies in rows, where the scores stand; the maximum of all."""
    tile = kernel.tile
    hidden = tile_transpose(tile_load_bool(tile.square, mask, plan.keep_row))
    seen = hide(tile, tile_load(tile.square, scores, tile.row_bytes), hidden)
    tile_store(seen, scores, tile.row_bytes)
    return maximum(largest_row(seen), best)


@jit
def square_of(kernel, kind, itemsize, at, row, column, rows, columns, buffer):
    """A square of a mask with queries in the lanes, of which so many rows and columns are there."""
    tile = kernel.tile
    if column == itemsize and rows == tile.lanes and columns == tile.lanes:
        return tile_transpose(load_mask(kernel, tile.square, kind, at, row))
    return tile_transpose(gather_mask(kernel, tile.square, kind, itemsize, at, row, column, rows, columns, buffer))


@jit
def row_of(kernel, kind, itemsize, at, column, columns, buffer):
    """A vector of a row of a mask, of which so many columns are there."""
    shape = kernel.tile.vector
    if column == itemsize and columns == shape.lanes:
        return load_mask(kernel, shape, kind, at, 0)
    return gather_mask(kernel, shape, kind, itemsize, at, 0, column, 1, columns, buffer)
