"""Both products of attention, and those of the backward pass, on a matrix unit, which takes 32 of everything at a time.

    multiply      scores[j][i] = start[i] + Σ_p row[j][p] · lane[p][i]
    add_columns   sums[p][i] += Σ_j column[p][j] · weights[j][i]
    add_panels    sums[j][p] += Σ_i weights[j][i] · panel[i][p]

Operands are as `fastattn.cpu.kernels.matrix` lays them out. Scores of what is odd in them are then computed anew by
multiply-adds (`mend`); values that are not finite are added by themselves, where they are looked at.
"""

from fastattn.cpu.kernels.matrix import (
    column_step,
    depth,
    flags_of_lanes,
    flags_of_rows,
    row_step,
    store_row_of_terms,
    store_terms,
)
from fastattn.cpu.kernels.pack import add_rows, clear, copy_rows, pack_queries
from fastattn.cpu.kernels.prefetch import NOTHING, ask
from fastattn.cpu.kernels.tiles import product
from fastattn.machine.kernel import PLAIN
from fastattn.machine.tile import MATRIX_DEPTH as DEEP
from fastattn.machine.tile import MATRIX_ROWS as TILE_ROWS
from fastattn.machine.tile import MATRIX_TILE as TILE
from fastattn.simd import (
    all_zero,
    inline,
    jit,
    largest_row,
    load_i64,
    matrix_begin,
    matrix_clear_one,
    matrix_clear_two,
    matrix_end,
    matrix_repeat_one,
    matrix_repeat_two,
    matrix_score_one,
    matrix_score_two,
    matrix_store_one,
    matrix_store_two,
    matrix_value_one,
    matrix_value_two,
    maximum,
    stack_memory,
    tile_load,
    tile_store,
    where_greater,
)
from fastattn.simd.matrix import TILE_ROW, WIDE, WIDE_ROW

memory_of_row = stack_memory(WIDE_ROW)


def over(add):
    """What adds the products of operands of several tiles in depth: left ones `left_step` apart, right ones in turn."""

    @inline
    def add_all(kernel, left, left_step, next_rows, right, deep):
        for _ in range(deep):
            add(kernel, left, next_rows, right)
            left += left_step
            right += kernel.terms * WIDE

    return add_all


score_one, score_two, value_one, value_two = map(
    over, (matrix_score_one, matrix_score_two, matrix_value_one, matrix_value_two)
)


# -- scores ------------------------------------------------------------------------------------------------------------


@jit
def multiply(kernel, rows, lanes, first, count, start, features, scores, wanted):
    """scores[j][i] = start[i] + row[first + j] · lane[i] for `count` rows, `first` a multiple of those of a tile.

    What follows the last one, to the end of its tile, is written as well. Meanwhile what is on the list is asked for.
    """
    tile, initial = kernel.tile, memory_of_row()
    deep, step = depth(features), row_step(kernel, features)
    tile_store(start, initial, 0)
    rows += first // TILE_ROWS * step
    for j in range(0, count, 2 * TILE_ROWS):
        if count - j > TILE_ROWS:
            matrix_repeat_two(initial)
            score_two(kernel, rows, kernel.terms * TILE, step, lanes, deep)
            matrix_store_two(scores)
        else:
            matrix_repeat_one(initial)
            score_one(kernel, rows, kernel.terms * TILE, step, lanes, deep)
            matrix_store_one(scores)
        ask(wanted)
        rows += 2 * step
        scores += 2 * TILE_ROWS * tile.row_bytes


@jit
def is_odd(kernel, plan, rows, lanes, first, count, features):
    """Whether some of the rows, or of the lanes, have numbers that are not multiplied here."""
    flags, any_row = flags_of_rows(kernel, plan, rows, features) + 8 * first, 0
    for j in range(count):
        any_row |= load_i64(flags + 8 * j)
    return any_row != 0 or not all_zero(tile_load(kernel.tile.single, flags_of_lanes(kernel, lanes, features), 0))


@jit
def mend(kernel, plan, rows, lanes, numbers, first, count, start, source, row, column, features, scores, buffer):
    """Form such scores anew, by multiply-adds, and no others: those of odd rows, and those of odd lanes.

    `numbers` are the lanes in float32; `source` is where the first row lies; `buffer` is room for one.
    """
    tile, flags = kernel.tile, flags_of_rows(kernel, plan, rows, features) + 8 * first
    odd_lanes = tile_load(tile.single, flags_of_lanes(kernel, lanes, features), 0)
    no_lane = all_zero(odd_lanes)
    for j in range(count):
        odd_row = load_i64(flags + 8 * j) != 0
        if odd_row or not no_lane:
            copy_rows(kernel, tile, buffer, 0, source, 0, column, 1, features)
            one = product(start, buffer, 0, tile.itemsize, numbers, tile.row_bytes, features)
            if not odd_row:
                one = where_greater(odd_lanes, 0.0, one, tile_load(tile.single, scores, 0))
            tile_store(one, scores, 0)
        source += row
        scores += tile.row_bytes


@jit
def largest_of(kernel, factor, scores, count, best):
    """The maximum of `best` and of a block of scores over the keys; where these lack a factor, they are given it."""
    tile = kernel.tile
    whole = count - count % tile.rows
    for _ in range(0, whole, tile.rows):
        some = tile_load(tile, scores, tile.row_bytes)
        if kernel.steps != PLAIN:
            some = some * factor
            tile_store(some, scores, tile.row_bytes)
        best = maximum(largest_row(some), best)
        scores += tile.rows * tile.row_bytes
    for _ in range(whole, count):
        one = tile_load(tile.single, scores, 0)
        if kernel.steps != PLAIN:
            one = one * factor
            tile_store(one, scores, 0)
        best = maximum(one, best)
        scores += tile.row_bytes
    return best


@jit
def score_block(kernel, plan, head, first_query, first_key, q, key, first, count, start, scores, best, rest, wanted):
    """The scores of `count` keys of a block, from key `first` on; the maximum of `best` and of them over the keys.

    The block's first key is number `first_key`; `rest` is room.
    """
    tile, features = kernel.tile, plan.head_dim
    multiply(kernel, key, q, first, count, start, features, scores, wanted)
    if kernel.terms > 1 and is_odd(kernel, plan, key, q, first, count, features):
        source, row, column = head.query + first_query * plan.query_row, plan.query_row, plan.query_column
        present = min(tile.width, plan.queries - first_query)
        pack_queries(kernel.query_place, tile, rest, source, row, column, present, features, plan.scale)
        buffer, row, column = rest + features * tile.row_bytes, plan.key_row, plan.key_column
        source = head.key + (first_key + first) * row
        mend(kernel, plan, key, q, rest, first, count, start, source, row, column, features, scores, buffer)
    return largest_of(kernel, plan.factor, scores, count, best)


@jit
def score_lanes(
    kernel, plan, rows, lanes, numbers, first, count, start, source, row, column, features, factor, scores, buffer
):
    """The same for lanes that there are in float32 as well; where scores lack a factor, they are given it."""
    tile = kernel.tile
    multiply(kernel, rows, lanes, first, count, start, features, scores, NOTHING)
    if kernel.terms > 1 and is_odd(kernel, plan, rows, lanes, first, count, features):
        mend(kernel, plan, rows, lanes, numbers, first, count, start, source, row, column, features, scores, buffer)
    if kernel.steps != PLAIN:
        for at in range(scores, scores + count * tile.row_bytes, tile.row_bytes):
            tile_store(tile_load(tile.single, at, 0) * factor, at, 0)


# -- sums of weights times something -----------------------------------------------------------------------------------


@jit
def add_columns(kernel, plan, weights, count, columns, features, sums, rest, wanted):
    """sums[p][i] += Σ_j column[p][j] · weights[j][i] for `count` keys, what is added by itself first.

    `rest` is room. Rows of weights behind the last are set to 0, to the end of a tile.
    """
    tile = kernel.tile
    deep, step = depth(count), column_step(kernel, plan)
    clear(tile, weights + count * tile.row_bytes, deep * DEEP - count)
    found, pairs = rest, rest + DEEP * tile.row_bytes
    at = pairs
    for _ in range(deep):
        for _ in range(TILE_ROWS):
            low, high = tile_load(tile.single, weights, 0), tile_load(tile.single, weights + tile.row_bytes, 0)
            store_terms(kernel, low, high, at, WIDE)
            weights += 2 * tile.row_bytes
            at += WIDE_ROW
        at += (kernel.terms - 1) * WIDE
    for p in range(0, features, 2 * TILE_ROWS):
        if features - p > TILE_ROWS:
            matrix_clear_two()
            value_two(kernel, columns, kernel.terms * TILE, step, pairs, deep)
            matrix_store_two(found)
        else:
            matrix_clear_one()
            value_one(kernel, columns, kernel.terms * TILE, step, pairs, deep)
            matrix_store_one(found)
        add_rows(tile, sums, found, min(2 * TILE_ROWS, features - p))
        ask(wanted)
        columns += 2 * step
        sums += 2 * TILE_ROWS * tile.row_bytes


@jit
def split_weights(kernel, weights, count, factor, target):
    """Lay out weights of 32 queries as rows, of which these are summed over, in tiles of 16 keys; times a factor.

    What weights are rounded to then stays in their place as well, but for that.
    """
    tile = kernel.tile
    for j in range(0, count, TILE_ROWS):
        for at in range(target, target + min(TILE_ROWS, count - j) * TILE_ROW, TILE_ROW):
            store_row_of_terms(kernel, tile_load(tile.single, weights, 0) * factor, at)
            weights += tile.row_bytes
        target += kernel.terms * TILE


@jit
def add_panels(kernel, rows, weights, weight_step, deep, panels, panel_step, features, sums, sums_step, rest):
    """sums[j][p] += Σ_i weights[j][i] · panel[i][p] for `rows` keys, whole pairs of tiles, and 32 · `deep` queries.

    Of 32 queries weights are `weight_step` apart. From 32 features to the next it is `panel_step` and `sums_step`.
    """
    tile, step = kernel.tile, kernel.terms * TILE
    for _ in range(0, features, tile.width):
        to, from_here = sums, weights
        for _ in range(0, rows, 2 * TILE_ROWS):
            matrix_clear_two()
            value_two(kernel, from_here, weight_step, step, panels, deep)
            matrix_store_two(rest)
            add_rows(tile, to, rest, 2 * TILE_ROWS)
            to += 2 * TILE_ROWS * tile.row_bytes
            from_here += 2 * step
        panels += panel_step
        sums += sums_step


def peak(kernel):
    """The unit alone, over and over: scores of 32 keys and as many queries."""

    @jit
    def run(a, b, out, count, repeats):
        step = kernel.terms * TILE
        matrix_begin()
        for _ in range(repeats):
            matrix_clear_two()
            score_two(kernel, a, 2 * step, step, b, depth(count))
            matrix_store_two(out)
        matrix_end()

    return run
