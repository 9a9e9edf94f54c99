"""Operands for a matrix unit (`fastattn.simd.matrix`), which `fastattn.cpu.kernels.matrix_products` multiplies.

An operand is a sum of terms of bfloat16: one, where arrays are of it; two, which are all of a float16; three, which are
all of a float32. Each is the nearest number to what is left, so that products that are left out have either sign; where
that could overflow, in columns and panels, it is cut off. (Of weights, and gradients of scores, only so many terms are
taken as arrays have.) An operand lies as tiles in the order of its use, the terms of each one behind the other. There
are four kinds, by what is summed over, in pairs, and by the side of a product it is on, the left one of 16 rows or the
right one of 32 columns:

    rows      [16 keys][32 features][term] tiles of 16 rows           keys, and values in the backward pass
    columns   [16 features][32 keys][term] tiles of 16 columns        values, and keys there
    lanes     [32 features][term] rows of pairs of features           32 queries, and gradients of their results there
    panels    [32 features][32 queries][term] rows of pairs of rows   the same two, for gradients of keys and values

What is not there is 0 in them. The unit takes numbers below 2^-126 for 0, among them low terms of what is below 2^-102.
Where the other operand is no larger than `LARGE`, that changes no score by more than it is rounded by. What is larger
than that, infinite or NaN is noted where rows and lanes are laid out; in columns and panels 0 stands for what is not
finite.
"""

from fastattn.cpu.kernels.pack import clear, copy_rows, pack_queries
from fastattn.machine.tile import MATRIX_DEPTH as DEEP
from fastattn.machine.tile import MATRIX_ROWS as TILE_ROWS
from fastattn.machine.tile import MATRIX_TILE as TILE
from fastattn.simd import (
    absolute,
    all_zero,
    inline,
    jit,
    nearest_half,
    stack_memory,
    store_i64,
    tile_fill,
    tile_load,
    tile_load_stored,
    tile_load_two_rows,
    tile_pair_up,
    tile_round_to_pairs,
    tile_store,
    tile_store_rounded,
    tile_transpose,
    upper_half,
    where_greater,
)
from fastattn.simd.matrix import TILE_ROW, WIDE, WIDE_ROW
from fastattn.simd.memory import LINE

WORD = 8  # bytes
INFINITY = float("inf")
LARGE = 2.0**90  # where D is below 2^12, D · LARGE · 2^-126 · 6 is below 2^-21

memory_of_pairs = stack_memory(3 * TILE)
memory_of_block = stack_memory(DEEP * WIDE_ROW)


@jit
def depth(count):
    """How many tiles hold so many elements of what is summed over."""
    return (count + DEEP - 1) // DEEP


@jit
def row_step(kernel, features):
    """From 16 rows to the next."""
    return depth(features) * kernel.terms * TILE


@jit
def flags_of_rows(kernel, plan, rows, features):
    """Where it is noted which of a block's rows are odd, behind them: a word for each, before which is one for all."""
    return rows + plan.key_block // TILE_ROWS * row_step(kernel, features) + WORD


@jit
def bytes_of_rows(kernel, plan, features):
    """What a block of rows takes, with that."""
    return plan.key_block // TILE_ROWS * row_step(kernel, features) + LINE + WORD * plan.key_block


@jit
def flags_of_lanes(kernel, lanes, features):
    """The same for lanes: a row of numbers, of which those are not 0."""
    return lanes + depth(features) * kernel.terms * WIDE


@jit
def bytes_of_lanes(kernel, features):
    """What lanes take, with that."""
    return depth(features) * kernel.terms * WIDE + kernel.tile.row_bytes


@jit
def column_step(kernel, plan):
    """From 16 columns of a block to the next."""
    return plan.key_block // DEEP * kernel.terms * TILE


@jit
def bytes_of_columns(kernel, plan, features):
    """What a block of columns takes."""
    return (features + TILE_ROWS - 1) // TILE_ROWS * column_step(kernel, plan)


@jit
def columns_from(kernel, columns, key):
    """Where the columns of a block are from one of its keys on, a multiple of 32."""
    return columns + key // DEEP * kernel.terms * TILE


def storing(half):
    """What writes numbers as their terms, each the `half` of what those before have left, the last one the rest."""

    @inline
    def store_terms(kernel, low, high, target, step):
        """Write pairs of two rows, term after term, `step` bytes apart."""
        if kernel.terms == 3:
            first, second = half(low), half(high)
            tile_store(tile_pair_up(first, second), target, 0)
            low, high, target = low - first, high - second, target + step
        if kernel.terms > 1:
            first, second = half(low), half(high)
            tile_store(tile_pair_up(first, second), target, 0)
            low, high, target = low - first, high - second, target + step
        tile_store(tile_round_to_pairs(low, high), target, 0)

    @inline
    def store_row_of_terms(kernel, row, target):
        """Write pairs of neighbours in a row; terms are a tile apart."""
        if kernel.terms == 3:
            first = half(row)
            tile_store_rounded(first, target)
            row, target = row - first, target + TILE
        if kernel.terms > 1:
            first = half(row)
            tile_store_rounded(first, target)
            row, target = row - first, target + TILE
        tile_store_rounded(row, target)

    return store_terms, store_row_of_terms


store_terms, store_row_of_terms = storing(nearest_half)
store_cut_terms, _ = storing(upper_half)


@jit
def large(row):
    """Not 0 where a number is larger than `LARGE`, infinite or NaN."""
    return where_greater(LARGE, absolute(row), 0.0, 1.0)


@inline
def split_lanes(kernel, numbers, target):
    """Lay out 32 features with queries in the lanes; the rows of what is odd."""
    tile, odd = kernel.tile, tile_fill(kernel.tile.single, 0.0)
    for p in range(0, DEEP, 2):
        at = numbers + p * tile.row_bytes
        low, high = tile_load(tile.single, at, 0), tile_load(tile.single, at + tile.row_bytes, 0)
        odd = odd + large(low) + large(high)
        store_terms(kernel, low, high, target + p // 2 * WIDE_ROW, WIDE)
    return odd


@jit
def load_lanes(kernel, plan, target, source, present):
    """Lay out queries, times a power of two; lanes beyond are 0."""
    tile, block = kernel.tile, memory_of_block()
    odd, row, column = tile_fill(tile.single, 0.0), plan.query_row, plan.query_column
    flags = flags_of_lanes(kernel, target, plan.head_dim)
    for first in range(0, plan.head_dim, DEEP):
        some = min(DEEP, plan.head_dim - first)
        clear(tile, block + some * tile.row_bytes, DEEP - some)
        pack_queries(kernel.query_place, tile, block, source + first * column, row, column, present, some, plan.scale)
        odd = odd + split_lanes(kernel, block, target)
        target += kernel.terms * WIDE
    tile_store(odd, flags, 0)


@jit
def split_all_lanes(kernel, target, numbers, present, features):
    """Lay out queries that are in the lanes in float32, [32 queries][feature], 32 after 32."""
    tile, block = kernel.tile, memory_of_block()
    for _ in range(0, present, tile.width):
        odd, to = tile_fill(tile.single, 0.0), target
        for first in range(0, features, DEEP):
            some, at = features - first, numbers + first * tile.row_bytes
            if some < DEEP:
                for offset in range(0, some * tile.row_bytes, tile.row_bytes):
                    tile_store(tile_load(tile.single, at + offset, 0), block + offset, 0)
                clear(tile, block + some * tile.row_bytes, DEEP - some)
                at = block
            odd = odd + split_lanes(kernel, at, to)
            to += kernel.terms * WIDE
        tile_store(odd, to, 0)
        numbers += features * tile.row_bytes
        target += bytes_of_lanes(kernel, features)


@jit
def copy_squares(kernel, plan, target, source, row, count, features):
    """Lay out 16 rows and 32 features at a time, of bfloat16 in rows without gaps; how many of both then are."""
    tile, rows, some = kernel.tile, count - count % TILE_ROWS, features - features % DEEP
    for _ in range(0, rows, TILE_ROWS):
        for at in range(0, some // DEEP * TILE, TILE):
            tile_store(tile_load(tile.square, source + at // TILE_ROWS, row), target + at, TILE_ROW)
        source += TILE_ROWS * row
        target += row_step(kernel, features)
    return rows, some


@jit
def load_rows(kernel, place, plan, target, source, row, column, count, features):
    """Lay out a block of rows. `place`: of the source."""
    tile, block, rows, done, odd_rows = kernel.tile, memory_of_block(), 0, 0, 0
    flags, step = flags_of_rows(kernel, plan, target, features), row_step(kernel, features)
    if kernel.terms == 1 and column == place.itemsize:
        rows, done = copy_squares(kernel, plan, target, source, row, count, features)
    for j in range(rows if done == features else 0, count):
        to, begin = target + j // TILE_ROWS * step + j % TILE_ROWS * TILE_ROW, done if j < rows else 0
        to += begin // DEEP * kernel.terms * TILE
        odd = tile_fill(tile.single, 0.0)
        for first in range(begin, features, DEEP):
            at, some = source + j * row + first * column, min(DEEP, features - first)
            if column == place.itemsize and some == DEEP:
                numbers = tile_load_stored(place, tile.single, at, 0)
            else:
                clear(tile, block, 1)
                copy_rows(place, tile, block, 0, at, row, column, 1, some)
                numbers = tile_load(tile.single, block, 0)
            if kernel.terms > 1:
                odd = odd + large(numbers)
            store_row_of_terms(kernel, numbers, to)
            to += kernel.terms * TILE
        if kernel.terms > 1:
            is_odd = 0 if all_zero(odd) else 1
            odd_rows |= is_odd
            store_i64(flags + WORD * j, is_odd)
    if kernel.terms > 1:
        store_i64(flags - WORD, odd_rows)


@inline
def store_column_terms(kernel, low, high, finite, target):
    """Write pairs of two keys, with 0 for what is not finite, term after term."""
    if not finite:
        low = where_greater(INFINITY, absolute(low), low, 0.0)
        high = where_greater(INFINITY, absolute(high), high, 0.0)
    store_cut_terms(kernel, low, high, target, TILE)


@jit
def load_columns(kernel, place, plan, target, source, row, column, count, features, finite):
    """Lay out a block of rows as columns, with 0 for what is not finite. `place`: of the source."""
    tile, step = kernel.tile, column_step(kernel, plan)
    block, pairs = memory_of_block(), memory_of_pairs()
    for p in range(0, features, TILE_ROWS):
        some, to = min(TILE_ROWS, features - p), target
        for j in range(0, count, DEEP):
            rows, at = min(DEEP, count - j), source + j * row + p * column
            whole = column == place.itemsize and some == TILE_ROWS and rows == DEEP
            if not whole:
                clear(tile.vector, block, DEEP)
                copy_rows(place, tile, block, TILE_ROW, at, row, column, rows, some)
            for i in range(0, TILE_ROWS * TILE_ROW, TILE_ROW):
                if whole and kernel.terms == 1 and finite:
                    tile_store(tile_load_two_rows(tile.vector, at, at + row), pairs + i, 0)
                elif whole:
                    low = tile_load_stored(place, tile.vector, at, 0)
                    store_column_terms(
                        kernel, low, tile_load_stored(place, tile.vector, at + row, 0), finite, pairs + i
                    )
                else:
                    low = tile_load(tile.vector, block + 2 * i, 0)
                    high = tile_load(tile.vector, block + 2 * i + TILE_ROW, 0)
                    store_column_terms(kernel, low, high, finite, pairs + i)
                at += 2 * row
            for term in range(kernel.terms):
                square = tile_transpose(tile_load(tile.square, pairs + term * TILE, TILE_ROW))
                tile_store(square, to, TILE_ROW)
                to += TILE
        target += step


@jit
def split_panels(kernel, plan, target, numbers, present, features):
    """Lay out queries that stand in panels of float32, as `fastattn.cpu.kernels.panels` has them, for sums over them.

    Behind those that are present, rows of the last 32 are set to 0.
    """
    tile, step = kernel.tile, plan.query_block // DEEP * kernel.terms * WIDE
    for _ in range(0, features, tile.width):
        clear(tile, numbers + present * tile.row_bytes, depth(present) * DEEP - present)
        at, to = numbers, target
        for _ in range(depth(present)):
            for i in range(TILE_ROWS):
                low, high = tile_load(tile.single, at, 0), tile_load(tile.single, at + tile.row_bytes, 0)
                store_cut_terms(kernel, low, high, to + i * WIDE_ROW, WIDE)
                at += 2 * tile.row_bytes
            to += kernel.terms * WIDE
        numbers += plan.query_panel
        target += step
