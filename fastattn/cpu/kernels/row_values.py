"""The sums of values of few queries, features in the lanes: of rows, each of a query of some head.

    sums[r][p] += Σ_j weights[r][j] · value[j][p]

Values are read as keys are (`fastattn.cpu.kernels.row_keys`); of int8 a single row has its weight times a scale.
Where pairs of bfloat16 are multiplied, weights are rounded to pairs, and the values of a pair come from two rows: those
of keys 2i and 2i + 1, always, so that sums are the same wherever a piece, or what a row looks at, begins and ends. A
value without the other of its pair is multiplied as if that were 0.
"""

from fastattn.cpu.kernels.int8 import load_rows, numbers_of, scales_of
from fastattn.cpu.kernels.pack import copy_rows
from fastattn.cpu.kernels.pairs import HALF
from fastattn.cpu.kernels.prefetch import NOTHING, ask, want, want_nothing
from fastattn.cpu.kernels.records import KEYS_AT_ONCE
from fastattn.cpu.kernels.row_keys import MOST_ASKING, are_crossed, are_single
from fastattn.simd import (
    fma,
    fma_of_pairs,
    inline,
    jit,
    load_element,
    tile_apart,
    tile_fill,
    tile_from_zipped,
    tile_load,
    tile_load_apart,
    tile_load_column,
    tile_load_part_stored,
    tile_load_two_rows,
    tile_load_zipped,
    tile_round_to_pairs,
    tile_store,
    tile_store_rounded,
    tile_to_zipped,
    tile_together,
)


@inline
def as_read(place, strip, acc):
    """Sums, in the order that elements of values have when they are read."""
    if place.pairs_of_rows and strip.vectors > 1:
        return tile_to_zipped(acc)
    if place.storage == "bfloat16" and strip.vectors > 1:
        return tile_apart(acc)
    return acc


@inline
def in_order(place, strip, acc):
    """The same back again."""
    if place.pairs_of_rows and strip.vectors > 1:
        return tile_from_zipped(acc)
    if place.storage == "bfloat16" and strip.vectors > 1:
        return tile_together(acc)
    return acc


@inline
def load_pairs(place, strip, value, step):
    """Elements of a value, and of the next one."""
    if strip.vectors > 1:
        return tile_load_zipped(strip.single, value, value + step)
    return tile_load_two_rows(strip.single, value, value + step)


@inline
def load_values(place, plan, strip, value, p):
    """Elements of a value, widened."""
    if place.storage == "bfloat16" and strip.vectors > 1:
        return tile_load_apart(strip.single, value + p * place.itemsize, 0)
    return load_rows(place, strip.single, value, 0, p, plan.value_dim)


@inline
def add_weighted(place, plan, weights, strip, value, step, p, acc):
    """acc[r] += weights[r] · value[p:], for one value, or a pair; of int8 a single row has its weight times scales."""
    if place.storage == "int8" and strip.rows == 1:
        factors = scales_of(place, strip, value, 0, p, load_element(strip, weights))
        return fma(factors, numbers_of(place, strip, value, 0, p, plan.value_dim), acc)
    column = tile_load_column(strip, weights, plan.score_bytes)
    if place.pairs_of_rows:
        return fma_of_pairs(column, load_pairs(place, strip, value + p * place.itemsize, step), acc)
    return fma(column, load_values(place, plan, strip, value, p), acc)


@inline
def values_at_once(place):
    """How many values are multiplied by a number, or word, of the weights."""
    return 2 if place.pairs_of_rows else 1


@inline
def add_to_columns(place, plan, weights, strip, value, step, p, count, sums, wanted):
    """sums[r][p] += Σ_j weights[r][j] · value[j][p], for as many rows, and columns from p on, as a strip has."""
    acc = as_read(place, strip, tile_load(strip, sums, plan.sum_bytes))
    for _ in range(count):
        acc = add_weighted(place, plan, weights, strip, value, step, p, acc)
        weights += strip.itemsize
        value += values_at_once(place) * step
        ask(place, wanted)
    tile_store(in_order(place, strip, acc), sums, plan.sum_bytes)


@jit
def add_to_strips(place, plan, weights, strip, value, step, count, sums, first, wanted):
    """The same for as many whole strips as there are from a column on; where they end."""
    p = first
    while p + strip.width <= plan.value_dim:
        add_to_columns(place, plan, weights, strip, value, step, p, count, sums + p * strip.itemsize, wanted)
        p += strip.width
    return p


@jit
def add_to_rest(place, tile, plan, weights, narrow, value, step, count, sums, first):
    """The same for the columns behind the last whole vector, if there are any: of int8 there are none here."""
    columns = plan.value_dim - first
    if place.storage == "int8" or columns == 0:
        return
    total_at, at, weight = sums + first * tile.itemsize, value + first * place.itemsize, weights
    acc = tile_load(narrow, total_at, plan.sum_bytes)
    for _ in range(count):
        part = tile_load_part_stored(place, tile.vector, at, 0, 1, columns)
        column = tile_load_column(narrow, weight, plan.score_bytes)
        if place.pairs_of_rows:
            other = tile_load_part_stored(place, tile.vector, at + step, 0, 1, columns)
            acc = fma_of_pairs(column, tile_round_to_pairs(part, other), acc)
        else:
            acc = fma(column, part, acc)
        weight += tile.itemsize
        at += values_at_once(place) * step
    tile_store(acc, total_at, plan.sum_bytes)


@jit
def add_to_tile(place, tile, plan, weights, shape, value, step, count, sums, wanted):
    """The same for all columns of as many rows as a shape has."""
    p = add_to_strips(place, plan, weights, shape, value, step, count, sums, 0, wanted)
    p = add_to_strips(place, plan, weights, shape.column, value, step, count, sums, p, wanted)
    add_to_rest(place, tile, plan, weights, shape.column, value, step, count, sums, p)


@jit
def add_to_pair(place, tile, plan, weights, value, step, count, sums, wanted):
    """The same for two rows, for which nothing is asked for ahead: whole rows of values are read, if they fit."""
    p = add_to_strips(place, plan, weights, tile.wide_pair, value, step, count, sums, 0, wanted)
    p = add_to_strips(place, plan, weights, tile.pair, value, step, count, sums, p, wanted)
    p = add_to_strips(place, plan, weights, tile.pair.column, value, step, count, sums, p, wanted)
    add_to_rest(place, tile, plan, weights, tile.pair.column, value, step, count, sums, p)


@jit
def add_to_row(place, tile, plan, weights, value, step, count, sums, wanted):
    """The same for one row."""
    p = add_to_strips(place, plan, weights, tile.long, value, step, count, sums, 0, wanted)
    p = add_to_strips(place, plan, weights, tile.half_long, value, step, count, sums, p, wanted)
    p = add_to_strips(place, plan, weights, tile.vector, value, step, count, sums, p, wanted)
    add_to_rest(place, tile, plan, weights, tile.vector, value, step, count, sums, p)


@jit
def add_some_values(place, tile, plan, count, weights, value, step, keys, sums, wanted):
    """The same for `count` rows, and so few keys or pairs that their values stay in the first-level cache meanwhile."""
    whole, others = count - count % tile.rows, count % tile.rows
    for r in range(0, whole, tile.rows):
        asked = wanted if r < MOST_ASKING else NOTHING
        add_to_tile(place, tile, plan, weights, tile, value, step, keys, sums, asked)
        weights += tile.rows * plan.score_bytes
        sums += tile.rows * plan.sum_bytes
    if others == 1:
        add_to_row(place, tile, plan, weights, value, step, keys, sums, wanted)
    elif others == 2:
        add_to_pair(place, tile, plan, weights, value, step, keys, sums, wanted)
    elif others == 3:
        add_to_tile(place, tile, plan, weights, tile.triple, value, step, keys, sums, wanted)


@jit
def value_step(kernel, plan):
    """How far values lie apart where they are read: of int8 as they lie, of others as they may have been copied."""
    return plan.value_row if kernel.value_place.storage == "int8" else plan.value_step


@jit
def add_single_values(kernel, plan, together, count, weights, keys, value, sums, buffer, wanted):
    """sums[r] += Σ_j weights[r][j] · value[j] for `count` rows, value by value.

    `together`: how many rows there are, which decides how values are read; a row's sum is the same with all or alone.
    """
    tile, place, step = kernel.tile, kernel.value_place, value_step(kernel, plan)
    single = are_single(tile, together, plan.value_dim)
    crossed = count == together and are_crossed(tile, together, plan.value_dim)
    for first in range(0, keys, KEYS_AT_ONCE):
        here, at = min(KEYS_AT_ONCE, keys - first), weights + first * tile.itemsize
        if place.storage != "int8":
            add_some_values(place, tile, plan, count, at, value, step, here, sums, wanted)
        elif single:
            for r in range(count):
                total_at = sums + r * plan.sum_bytes
                add_to_row(place, tile, plan, at + r * plan.score_bytes, value, step, here, total_at, NOTHING)
        elif crossed and count == tile.rows:
            add_to_tile(place, tile, plan, at, tile, value, step, here, sums, wanted)
        elif crossed:
            add_to_tile(place, tile, plan, at, tile.triple, value, step, here, sums, wanted)
        else:
            copy_rows(place, tile, buffer, plan.value_step, value, step, 1, here, plan.value_dim)
            add_some_values(tile, tile, plan, count, at, buffer, plan.value_step, here, sums, wanted)
        value += here * step


@jit
def pairs_of_weights(tile, plan, weights):
    """Where a row of weights is in pairs: behind itself."""
    return weights + (plan.key_block + tile.lanes) * tile.itemsize


@jit
def round_weights(tile, plan, weights, piece, count):
    """Round a row of weights of a piece, whole vectors, to pairs; the first is the second of its pair if it is odd."""
    pairs = pairs_of_weights(tile, plan, weights)
    zeros = tile_fill(tile.vector, 0.0)
    tile_store(zeros, pairs, 0)
    pairs += piece.first % 2 * HALF
    for at in range(weights, weights + count * tile.itemsize, tile.vector_bytes):
        tile_store_rounded(tile_load(tile.vector, at, 0), pairs)
        pairs += tile.lanes * HALF
    tile_store(zeros, pairs, 0)


@jit
def add_half_pairs(place, tile, plan, count, pairs, value, is_second, sums):
    """sums[r] += weights[r] · value for one of a pair of values; the other counts as 0."""
    zeros = tile_fill(tile.vector, 0.0)
    for p in range(0, plan.value_dim, tile.lanes):
        columns = min(tile.lanes, plan.value_dim - p)
        part = tile_load_part_stored(place, tile.vector, value + p * place.itemsize, 0, 1, columns)
        both = tile_round_to_pairs(part, zeros)
        if is_second:
            both = tile_round_to_pairs(zeros, part)
        for r in range(count):
            column = tile_load_column(tile.vector, pairs + r * plan.score_bytes, 0)
            at = sums + r * plan.sum_bytes + p * tile.itemsize
            tile_store(fma_of_pairs(column, both, tile_load(tile.vector, at, 0)), at, 0)


@jit
def add_pairs(place, tile, plan, count, pairs, first, last, value, step, sums, wanted):
    """sums[r] += Σ_j weights[r][j] · value[j] for `count` rows, pair by pair.

    The keys are those of numbers from `first` on, before `last`; number 0, where a pair begins, would be at `value`.
    """
    if first == last:
        return
    if first % 2 == 1:
        at = pairs + first // 2 * tile.itemsize
        add_half_pairs(place, tile, plan, count, at, value + first * step, True, sums)
    for pair in range((first + 1) // 2, last // 2, KEYS_AT_ONCE):
        here, at = min(KEYS_AT_ONCE, last // 2 - pair), pairs + pair * tile.itemsize
        add_some_values(place, tile, plan, count, at, value + 2 * pair * step, step, here, sums, wanted)
    if last % 2 == 1:
        at = pairs + last // 2 * tile.itemsize
        add_half_pairs(place, tile, plan, count, at, value + (last - 1) * step, False, sums)


@jit
def add_values(kernel, plan, together, count, piece, weights, begin, end, value, sums, buffer, wanted):
    """sums[r] += Σ_j weights[r][j] · value[j] for `count` rows and some keys of a piece, whose first are at `value`.

    Meanwhile what is listed is asked for. `together`: how many rows there are in all.
    """
    tile, step = kernel.tile, value_step(kernel, plan)
    if kernel.value_place.pairs_of_rows:
        pairs, odd = pairs_of_weights(tile, plan, weights), piece.first % 2
        first, last, value = odd + begin, odd + end, value - odd * step
        add_pairs(kernel.value_place, tile, plan, count, pairs, first, last, value, step, sums, wanted)
    else:
        weights, value = weights + begin * tile.itemsize, value + begin * step
        add_single_values(kernel, plan, together, count, weights, end - begin, value, sums, buffer, wanted)


@jit
def want_keys(kernel, plan, count, keys, source, wanted):
    """List the keys of the next piece, which are asked for while values are added up."""
    tile = kernel.tile
    tiles = count // tile.rows + (count % tile.rows > 1)
    strips = min(tiles, MOST_ASKING // tile.rows) * (plan.value_dim // tile.width)
    want_nothing(wanted, keys // values_at_once(kernel.value_place) * strips)
    if plan.prefetch_distance > 0 and strips > 0:
        want(wanted, source, plan.key_row, plan.head_dim * kernel.itemsize, keys)
