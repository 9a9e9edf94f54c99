"""Both products of attention, and those of the backward pass, on a matrix unit, which takes 32 of everything at a time.

    multiply      scores[j][i] = start[i] + Σ_p row[j][p] · lane[p][i]
    add_columns   sums[p][i] += Σ_j column[p][j] · weights[j][i]
    add_panels    sums[j][p] += Σ_i weights[j][i] · panel[i][p]

Operands are as `fastattn.cpu.kernels.matrix` lays them out. Scores of what is odd in them are then computed anew by
multiply-adds (`mend`); values that are not finite are added by themselves, where they are looked at.

The unit works by itself: while it multiplies, the core may do something else. In the forward pass these are weights of
other scores (`fastattn.cpu.kernels.matrix_softmax`), some after every four products.
"""

from fastattn.cpu.kernels.matrix import (
    WORD,
    column_step,
    depth,
    flags_of_lanes,
    flags_of_rows,
    row_step,
    store_row_of_terms,
    store_terms,
)
from fastattn.cpu.kernels.matrix_softmax import no_weights, weigh
from fastattn.cpu.kernels.pack import add_rows, clear, copy_rows, pack_queries
from fastattn.cpu.kernels.prefetch import ask
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
    tile_fill,
    tile_load,
    tile_store,
    where_greater,
)
from fastattn.simd.matrix import OF_SCORES, TILE_ROW, WIDE, WIDE_ROW

PRODUCTS = tuple(len(OF_SCORES.get(terms, ())) for terms in range(4))  # of terms, by how many there are

memory_of_row = stack_memory(WIDE_ROW)


def over(add, meanwhile):
    """What adds the products of operands of several tiles in depth: left ones `left_step` apart, right ones in turn.

    After each product of terms, of at most six, some of what there is to do `meanwhile` is done; how much then is.
    """

    @inline
    def add_all(kernel, left, left_step, next_rows, right, deep, weighing, done):
        for _ in range(deep):
            add(kernel, 0, left, next_rows, right)
            done = meanwhile(kernel, weighing, done)
            if kernel.terms > 1:
                add(kernel, 1, left, next_rows, right)
                done = meanwhile(kernel, weighing, done)
                add(kernel, 2, left, next_rows, right)
                done = meanwhile(kernel, weighing, done)
                add(kernel, 3, left, next_rows, right)
                done = meanwhile(kernel, weighing, done)
            if kernel.terms > 2:
                add(kernel, 4, left, next_rows, right)
                done = meanwhile(kernel, weighing, done)
                add(kernel, 5, left, next_rows, right)
                done = meanwhile(kernel, weighing, done)
            left += left_step
            right += kernel.terms * WIDE
        return done

    return add_all


@inline
def nothing(kernel, weighing, done):
    """What there is to do beneath products of values."""
    return done


score_one, score_two = (over(add, weigh) for add in (matrix_score_one, matrix_score_two))
value_one, value_two = (over(add, nothing) for add in (matrix_value_one, matrix_value_two))


# -- scores ------------------------------------------------------------------------------------------------------------


@jit
def products_of(kernel, count, features):
    """How many products of terms there are to scores of so many rows, after each of which something can be done."""
    return depth(count) * depth(features) * PRODUCTS[kernel.terms]


@jit
def multiply(kernel, rows, lanes, first, count, start, features, scores, wanted, weighing):
    """scores[j][i] = start[i] + row[first + j] · lane[i] for `count` rows, `first` a multiple of those of a tile.

    What follows the last one, to the end of its tile, is written as well. Meanwhile what is on the list is asked for,
    and weights are made of other scores; of how many of these.
    """
    tile, initial, done = kernel.tile, memory_of_row(), 0
    deep, step = depth(features), row_step(kernel, features)
    tile_store(start, initial, 0)
    rows += first // TILE_ROWS * step
    for j in range(0, count, 2 * TILE_ROWS):
        if count - j > TILE_ROWS:
            matrix_repeat_two(initial)
            done = score_two(kernel, rows, kernel.terms * TILE, step, lanes, deep, weighing, done)
            matrix_store_two(scores)
        else:
            matrix_repeat_one(initial)
            done = score_one(kernel, rows, kernel.terms * TILE, step, lanes, deep, weighing, done)
            matrix_store_one(scores)
        ask(kernel, wanted)
        rows += 2 * step
        scores += 2 * TILE_ROWS * tile.row_bytes
    return done


@jit
def is_odd(kernel, plan, rows, lanes, first, count, features):
    """Whether some of the rows, or of the lanes, have numbers that are not multiplied here."""
    flags = flags_of_rows(kernel, plan, rows, features)
    any_row = load_i64(flags - WORD)
    if any_row != 0:
        any_row, flags = 0, flags + WORD * first
        for j in range(count):
            any_row |= load_i64(flags + WORD * j)
    return any_row != 0 or not all_zero(tile_load(kernel.tile.single, flags_of_lanes(kernel, lanes, features), 0))


@jit
def mend(kernel, plan, rows, lanes, numbers, first, count, start, source, row, column, features, scores, buffer):
    """Form such scores anew, by multiply-adds, and no others: those of odd rows, and those of odd lanes.

    `numbers` are the lanes in float32; `source` is where the first row lies; `buffer` is room for one.
    """
    tile, flags = kernel.tile, flags_of_rows(kernel, plan, rows, features) + WORD * first
    odd_lanes = tile_load(tile.single, flags_of_lanes(kernel, lanes, features), 0)
    no_lane = all_zero(odd_lanes)
    for j in range(count):
        odd_row = load_i64(flags + WORD * j) != 0
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
def finish_scores(kernel, plan, head, first_query, first_key, q, key, first, count, scores, best, rest):
    """Of products of `count` keys of a block, from key `first` on, make scores; the maximum of `best` and of them.

    The block's first key is number `first_key`; `rest` is room.
    """
    tile, features = kernel.tile, plan.head_dim
    if kernel.terms > 1 and is_odd(kernel, plan, key, q, first, count, features):
        source, row, column = head.query + first_query * plan.query_row, plan.query_row, plan.query_column
        present = min(tile.width, plan.queries - first_query)
        pack_queries(kernel.query_place, tile, rest, source, row, column, present, features, plan.scale)
        buffer, row, column = rest + features * tile.row_bytes, plan.key_row, plan.key_column
        source = head.key + (first_key + first) * row
        zero = tile_fill(tile.single, 0.0)
        mend(kernel, plan, key, q, rest, first, count, zero, source, row, column, features, scores, buffer)
    return largest_of(kernel, plan.factor, scores, count, best)


@jit
def score_lanes(
    kernel,
    plan,
    rows,
    lanes,
    numbers,
    first,
    count,
    start,
    source,
    row,
    column,
    features,
    factor,
    scores,
    buffer,
    wanted,
):
    """The same for lanes that there are in float32 as well; where scores lack a factor, they are given it."""
    tile = kernel.tile
    multiply(kernel, rows, lanes, first, count, start, features, scores, wanted, no_weights())
    if kernel.terms > 1 and is_odd(kernel, plan, rows, lanes, first, count, features):
        mend(kernel, plan, rows, lanes, numbers, first, count, start, source, row, column, features, scores, buffer)
    if kernel.steps != PLAIN:
        for at in range(scores, scores + count * tile.row_bytes, tile.row_bytes):
            tile_store(tile_load(tile.single, at, 0) * factor, at, 0)


# -- sums of weights times something -----------------------------------------------------------------------------------


@jit
def pairs_of_weights(kernel, rest):
    """Where weights are laid out in that room: behind what is summed by itself."""
    return rest + DEEP * kernel.tile.row_bytes


@jit
def add_columns(kernel, plan, weights, count, columns, features, sums, rest, wanted):
    """sums[p][i] += Σ_j column[p][j] · weights[j][i] for `count` keys, what is added by itself first.

    `rest` is room. Rows of weights behind the last are set to 0, to the end of a tile.
    """
    tile = kernel.tile
    clear(tile, weights + count * tile.row_bytes, depth(count) * DEEP - count)
    at = pairs_of_weights(kernel, rest)
    for _ in range(depth(count)):
        for _ in range(TILE_ROWS):
            low, high = tile_load(tile.single, weights, 0), tile_load(tile.single, weights + tile.row_bytes, 0)
            store_terms(kernel, low, high, at, WIDE)
            weights += 2 * tile.row_bytes
            at += WIDE_ROW
        at += (kernel.terms - 1) * WIDE
    add_weighed(kernel, plan, count, columns, features, sums, rest, wanted)


@jit
def add_weighed(kernel, plan, count, columns, features, sums, rest, wanted):
    """The same for weights that are laid out already."""
    tile = kernel.tile
    deep, step = depth(count), column_step(kernel, plan)
    found, pairs = rest, pairs_of_weights(kernel, rest)
    for p in range(0, features, 2 * TILE_ROWS):
        if features - p > TILE_ROWS:
            matrix_clear_two()
            value_two(kernel, columns, kernel.terms * TILE, step, pairs, deep, no_weights(), 0)
            matrix_store_two(found)
        else:
            matrix_clear_one()
            value_one(kernel, columns, kernel.terms * TILE, step, pairs, deep, no_weights(), 0)
            matrix_store_one(found)
        add_rows(tile, sums, found, min(2 * TILE_ROWS, features - p))
        ask(kernel, wanted)
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
            value_two(kernel, from_here, weight_step, step, panels, deep, no_weights(), 0)
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
            score_two(kernel, a, 2 * step, step, b, depth(count), no_weights(), 0)
            matrix_store_two(out)
        matrix_end()

    return run
