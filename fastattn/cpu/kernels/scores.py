"""What may change a score between the first product and the softmax, and which keys a block of queries looks at.

A mask is read tile by tile where it lies: a square of `lanes` queries by `lanes` keys is loaded along the keys and
transposed in registers, so that it meets the scores with queries in the lanes.
"""

from fastattn.cpu.kernels.records import MASK_BOOL, MASK_HALF, MASK_NONE, MASK_OTHER, MASK_SAME
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
    tile_iota,
    tile_load,
    tile_load_bool,
    tile_load_half,
    tile_load_other,
    tile_row_index,
    tile_store,
    tile_transpose,
    where_greater,
)

INFINITY = float("inf")
HALF_MINUS_INFINITY = 0xFC00
LARGEST_FLOAT32 = 3.4028234663852886e38
LARGEST_FLOAT64 = 1.7976931348623157e308
FAR = 1 << 20  # more than any block is wide; small enough to be exact in float32


@jit
def load_mask(tile, kind, at, row):
    """A square of the mask, [query][key], as values to add: a boolean is 0 or -inf."""
    if kind == MASK_BOOL:
        return tile_load_bool(tile.square, at, row)
    if kind == MASK_SAME:
        return tile_load(tile.square, at, row)
    if kind == MASK_OTHER:
        return tile_load_other(tile.square, at, row)
    return tile_load_half(tile.square, at, row)


@jit
def gather_mask(tile, kind, itemsize, at, row, column, rows, columns, buffer):
    """The same for a square that lies apart in memory, or reaches over an edge: elements are copied together first."""
    for i in range(rows):
        source = at + i * row
        target = buffer + i * tile.lanes * itemsize
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
    return load_mask(tile, kind, buffer, tile.lanes * itemsize)


@jit
def lowest(tile):
    """The lowest finite number of the tile's dtype."""
    return -LARGEST_FLOAT32 if tile.itemsize == 4 else -LARGEST_FLOAT64


@jit
def saturate(tile, x):
    """x, an infinity brought back to the largest finite number of the tile's dtype; NaN stays."""
    return maximum(lowest(tile), minimum(-lowest(tile), x))


@jit
def hide(tile, scores, mask):
    """-inf where the mask is -inf, the score, whatever it is, elsewhere."""
    return where_greater(lowest(tile), mask, MINUS_INFINITY, scores)


@jit
def add_mask(tile, kind, scores, mask):
    """Scores under a square of the mask, both with queries in the lanes. Sums of finite numbers stay finite."""
    if kind == MASK_BOOL:
        return hide(tile, scores, mask)
    biased = scores + mask
    if all_finite(scores + maximum(mask, lowest(tile))):
        return biased  # the mask's -inf, if any, is the only one
    largest = maximum(absolute(scores), absolute(mask))
    return hide(tile, where_greater(INFINITY, largest, saturate(tile, biased), biased), mask)


@inline
def add_square(tile, scores, mask, row, best):
    """`add_mask` for a whole square of the scores' dtype, where the scores stand; the maximum of `best` and of them."""
    values = tile_transpose(tile_load(tile.square, mask, row))
    biased = tile_load(tile.square, scores, tile.row_bytes) + values
    if not all_finite(biased):
        biased = add_mask(tile, MASK_SAME, tile_load(tile.square, scores, tile.row_bytes), values)
    tile_store(biased, scores, tile.row_bytes)
    return maximum(largest_row(biased), best)


@jit
def restrict(kernel, plan, scores, count, mask, present, position, first_key, top, buffer):
    """Apply the mask and the causal limit to a block of scores; raise `top` to its maximum over the keys.

    `mask` is the address of the mask's element for the block's first query and first key, `position` the position of
    that query, `present` the number of queries in the block.
    """
    tile = kernel.tile
    kind, itemsize, row, column = plan.mask_kind, plan.mask_itemsize, plan.mask_row, plan.mask_column
    lanes = tile.lanes
    index = tile_row_index(tile.square)
    distance = tile_iota(tile.square) - index
    plain = "mask" in kernel.steps and kind == MASK_SAME and column == itemsize and not plan.causal
    for v in range(tile.vectors):
        rows = min(lanes, present - v * lanes)
        best = tile_load(tile.vector, top + v * tile.vector_bytes, 0)
        for j in range(0, count, lanes):
            columns = min(lanes, count - j)
            place = scores + j * tile.row_bytes + v * tile.vector_bytes
            if plain and rows == lanes and columns == lanes:
                best = add_square(tile, place, mask + v * lanes * row + j * column, row, best)
                continue
            square = tile_load(tile.square, place, tile.row_bytes)
            if "mask" in kernel.steps and kind != MASK_NONE and rows > 0:
                at = mask + v * lanes * row + j * column
                if column == itemsize and rows == lanes and columns == lanes:
                    values = load_mask(tile, kind, at, row)
                else:
                    values = gather_mask(tile, kind, itemsize, at, row, column, rows, columns, buffer)
                square = add_mask(tile, kind, square, tile_transpose(values))
            if plan.causal:
                ahead = min(max(position + v * lanes - first_key - j, -FAR), FAR)
                square = where_greater(distance + (ahead + 0.5), 0.0, square, MINUS_INFINITY)
            if columns < lanes:
                square = where_greater(columns - 0.5, index, square, MINUS_INFINITY)
            tile_store(square, place, tile.row_bytes)
            best = maximum(largest_row(square), best)
        tile_store(best, top + v * tile.vector_bytes, 0)


@jit
def looks_at(kernel, plan, mask, query, key, position):
    """Whether one query of a block may look at one key; indices are relative to `mask` and `position`."""
    if plan.causal and position + query < key:
        return False
    if "mask" not in kernel.steps or plan.mask_kind == MASK_NONE:
        return True
    at = mask + query * plan.mask_row + key * plan.mask_column
    if plan.mask_kind == MASK_BOOL:
        return load_u8(at) != 0
    if plan.mask_kind == MASK_HALF:
        return load_u16(at) != HALF_MINUS_INFINITY
    if plan.mask_itemsize == 4:
        return load_f32(at) != MINUS_INFINITY
    return load_f64(at) != MINUS_INFINITY
