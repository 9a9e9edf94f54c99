"""Both products of attention with features in the lanes, for few queries: rows, each of a query of some head.

    scores[r][j] = q[r] · key[j]                    q[r][p]: the rows, times the scale
    sums[r][p]  += Σ_j weights[r][j] · value[j][p]

Keys and values are read where they lie, or have been copied to, as they are: half precision is widened in registers,
unless pairs of bfloat16 are multiplied with a query of bfloat16, whose rows are words then, each of a pair. So is int8
for up to four rows: with a row or two a scale is multiplied by a sum of whole numbers, or a weight, and not by each
number. For more rows some keys at a time are widened first, to the first-level cache. `place` is what is read from, and
says whether it has to be widened. But for int8, what is computed for a row is the same, in the same order, whatever
other rows there are.
"""

from fastattn.cpu.kernels.int8 import load_rows, numbers_of, scales_of
from fastattn.cpu.kernels.pack import copy_rows
from fastattn.cpu.kernels.prefetch import NOTHING, ask, want, want_nothing
from fastattn.cpu.kernels.records import KEYS_AT_ONCE
from fastattn.machine.kernel import PLAIN
from fastattn.simd import (
    add_dot,
    add_dot_of_blocks,
    add_dot_of_pairs,
    fma,
    fma_of_pairs,
    inline,
    jit,
    load_element,
    row_sums,
    stack_memory,
    store_split,
    tile_apart,
    tile_fill,
    tile_load,
    tile_load_apart,
    tile_load_column,
    tile_load_part_stored,
    tile_load_stored,
    tile_store,
    tile_stretch,
    tile_together,
)

LESS = 2.0**-12  # times the sum of a block of int8, a number is no more than it was
memory_of_a_square = stack_memory(16 * 64)  # of the widest vectors


# -- scores ------------------------------------------------------------------------------------------------------------


@inline
def add_products(kernel, place, strip, q, key, row, first, features, present, sums):
    """sums[j] += q · key[j] by lanes, for some keys and as many whole strips of features as follow `first`.

    Returns where these end. Keys are read row by row: memory is fastest in its own order. Until there are sums, from
    the first strip on, these count as 0.
    """
    tile, p = kernel.tile, first
    while p + strip.width <= features:
        features_of_q, at, total_at = tile_load(strip, q + p * tile.itemsize, 0), key, sums
        if place.storage == "int8":
            features_of_q = features_of_q * LESS
        for _ in range(present):
            total = tile_fill(tile.vector, 0.0)
            if p > 0:
                total = tile_load(tile.vector, total_at, 0)
            if place.storage == "int8":
                scales = scales_of(place, strip, at, 0, p, 1.0)
                total = add_dot_of_blocks(features_of_q, numbers_of(place, strip, at, 0, p, features), scales, total)
            elif kernel.reads == "pairs":
                total = add_dot_of_pairs(features_of_q, tile_load(strip, at + p * tile.itemsize, 0), total)
            else:
                total = add_dot(features_of_q, tile_load_stored(place, strip, at + p * place.itemsize, 0), total)
            tile_store(total, total_at, 0)
            at += row
            total_at += tile.vector_bytes
        p += strip.width
    return p


@inline
def words_of(kernel, features):
    """How many elements as the tile has them hold some features of a key: a word holds a pair."""
    return features // 2 if kernel.reads == "pairs" else features


@inline
def multiply_add(kernel, keys, queries, total):
    """total + keys · queries, by lanes."""
    if kernel.reads == "pairs":
        return fma_of_pairs(keys, queries, total)
    return fma(keys, queries, total)


@jit
def products(kernel, place, q, key, row, features, present):
    """q · key[j] for a vector of keys, of which so many are there, and one row."""
    tile, sums, p = kernel.tile, memory_of_a_square(), 0
    total = tile_fill(tile.square, 0.0)
    if present == tile.lanes or place.storage == "int8":
        for j in range(present, tile.lanes):
            tile_store(tile_fill(tile.vector, 0.0), sums + j * tile.vector_bytes, 0)
        p = add_products(kernel, place, tile.long, q, key, row, p, features, present, sums)
        p = add_products(kernel, place, tile.half_long, q, key, row, p, features, present, sums)
        if kernel.reads == "pairs":
            p = add_products(kernel, place, tile.double, q, key, row, p, features, present, sums)
        p = add_products(kernel, place, tile.vector, q, key, row, p, features, present, sums)
    if p > 0:
        total = tile_load(tile.square, sums, tile.vector_bytes)
    if place.storage != "int8":  # of which all features are whole vectors here
        for first in range(p, features, tile.lanes):
            at, columns = key + first * place.itemsize, min(tile.lanes, features - first)
            keys = tile_load_part_stored(place, tile.square, at, row, present, columns)
            total = multiply_add(kernel, keys, tile_load(tile.vector, q + first * tile.itemsize, 0), total)
        return row_sums(total)
    return row_sums(total) * (1.0 / LESS)


@jit
def crossed_products(kernel, place, plan, q, key, row, present, wanted):
    """q[r] · key[j] for some rows and some keys, that make a vector together: the keys of the first row come first.

    So many of the keys are there.
    """
    tile, features = kernel.tile, words_of(kernel, plan.head_dim)
    whole = features - features % tile.lanes if present >= tile.cofactor.rows else 0
    total = tile_fill(tile.square, 0.0)
    for p in range(0, whole, tile.lanes):
        queries = tile_stretch(tile.square, tile_load(tile.factor, q + p * tile.itemsize, plan.query_bytes))
        total = multiply_add(kernel, load_rows(place, tile.cofactor, key, row, p, features), queries, total)
        ask(wanted)
    if place.storage != "int8":  # of which all vectors, and all keys, are whole here
        for p in range(whole, features, tile.lanes):
            queries = tile_stretch(tile.square, tile_load(tile.factor, q + p * tile.itemsize, plan.query_bytes))
            at, columns = key + p * place.itemsize, min(tile.lanes, features - p)
            keys = tile_load_part_stored(place, tile.cofactor, at, row, present, columns)
            total = multiply_add(kernel, keys, queries, total)
    return row_sums(total)


@jit
def crossed_rows(tile, count):
    """How many of some rows share what is loaded of the keys, so many at a time. Three have one without a query."""
    rows = tile.factor.rows
    return (count + rows // 4) // rows * rows


@jit
def score_vector(kernel, place, plan, count, queries, key, row, present, scores, wanted):
    """The scores of `count` rows, or one more, with a vector of keys, of which so many are there."""
    tile, features = kernel.tile, words_of(kernel, plan.head_dim)
    rows, columns, crossed = tile.factor.rows, tile.cofactor.rows, crossed_rows(tile, count)
    factor = plan.factor if kernel.reads == "pairs" and kernel.steps != PLAIN else 1.0
    for r in range(0, crossed, rows):
        q, at = queries + r * plan.query_bytes, scores + r * plan.score_bytes
        for i in range(0, present, columns):
            some = crossed_products(kernel, place, plan, q, key + i * row, row, present - i, wanted)
            store_split(tile.cofactor_row, some * factor, at + i * tile.itemsize, plan.score_bytes)
    for r in range(crossed, count):
        q, at = queries + r * plan.query_bytes, scores + r * plan.score_bytes
        tile_store(products(kernel, place, q, key, row, features, present) * factor, at, 0)


@jit
def are_single(tile, count, features):
    """Whether so few rows read int8 that each multiplies its own sums by scales: whole vectors of features."""
    return crossed_rows(tile, count) == 0 and features % tile.lanes == 0


@jit
def are_crossed(tile, count, features):
    """Whether more rows do, and so few that numbers are widened in registers: for others they are before, once."""
    return crossed_rows(tile, count) > 0 and count <= tile.rows == tile.factor.rows and features % tile.lanes == 0


@jit
def score_rows(kernel, plan, count, queries, key, keys, scores, buffer, wanted):
    """scores[r][j] = q[r] · key[j] for `count` rows, or one more; meanwhile what is on the list is asked for."""
    tile = kernel.tile
    single, crossed = are_single(tile, count, plan.head_dim), are_crossed(tile, count, plan.head_dim)
    for j in range(0, keys, tile.lanes):
        present, at = min(tile.lanes, keys - j), scores + j * tile.itemsize
        if kernel.storage != "int8":
            score_vector(kernel, kernel.key_place, plan, count, queries, key, plan.key_step, present, at, wanted)
            key += tile.lanes * plan.key_step
            continue
        if single:
            for r in range(count):
                q = queries + r * plan.query_bytes
                found = products(kernel, kernel, q, key, plan.key_row, plan.head_dim, present)
                tile_store(found, at + r * plan.score_bytes, 0)
        elif crossed and present == tile.lanes:
            score_vector(kernel, kernel, plan, count, queries, key, plan.key_row, present, at, wanted)
        else:
            copy_rows(kernel, tile, buffer, plan.key_step, key, plan.key_row, 1, present, plan.head_dim)
            score_vector(kernel, tile, plan, count, queries, buffer, plan.key_step, present, at, wanted)
        key += tile.lanes * plan.key_row


# -- sums of values ----------------------------------------------------------------------------------------------------


@inline
def add_weighted(place, plan, weights, strip, value, p, acc):
    """acc[r] += weights[r] · value[p:], for one value; of int8 a single row has its weight times scales."""
    if place.storage == "int8" and strip.rows == 1:
        factors = scales_of(place, strip, value, 0, p, load_element(strip, weights))
        return fma(factors, numbers_of(place, strip, value, 0, p, plan.value_dim), acc)
    if place.storage == "bfloat16" and strip.vectors > 1:
        row = tile_load_apart(strip.single, value + p * place.itemsize, 0)
    else:
        row = load_rows(place, strip.single, value, 0, p, plan.value_dim)
    return fma(tile_load_column(strip, weights, plan.score_bytes), row, acc)


@inline
def add_to_columns(place, plan, weights, strip, value, step, p, count, sums, wanted):
    """sums[r][p] += Σ_j weights[r][j] · value[j][p], for as many rows, and columns from p on, as a strip has.

    Of bfloat16 the elements of even and of odd places stand apart meanwhile, as they are widened faster that way.
    """
    acc = tile_load(strip, sums, plan.sum_bytes)
    if place.storage == "bfloat16" and strip.vectors > 1:
        acc = tile_apart(acc)
    for _ in range(count):
        acc = add_weighted(place, plan, weights, strip, value, p, acc)
        weights += strip.itemsize
        value += step
        ask(wanted)
    if place.storage == "bfloat16" and strip.vectors > 1:
        acc = tile_together(acc)
    tile_store(acc, sums, plan.sum_bytes)


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
        acc = fma(tile_load_column(narrow, weight, plan.score_bytes), part, acc)
        weight += tile.itemsize
        at += step
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
    """The same for `count` rows and so few keys that their values stay in the first-level cache meanwhile."""
    whole, others = count - count % tile.rows, count % tile.rows
    for _ in range(0, whole, tile.rows):
        add_to_tile(place, tile, plan, weights, tile, value, step, keys, sums, wanted)
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
def add_values(kernel, plan, together, count, weights, keys, value, sums, buffer, wanted):
    """sums[r] += Σ_j weights[r][j] · value[j] for `count` rows; meanwhile what is on the list is asked for.

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


# -- what is asked for ahead -------------------------------------------------------------------------------------------


@jit
def want_values(kernel, plan, count, keys, values, wanted):
    """List the values of a piece, which are asked for while its scores are computed."""
    tile = kernel.tile
    crossed = crossed_rows(tile, count)
    steps = crossed * (words_of(kernel, plan.head_dim) // tile.lanes)
    want_nothing(wanted, keys // tile.lanes * steps)
    if plan.prefetch_distance > 0 and crossed > 0:
        want(wanted, values, plan.value_row, plan.value_dim * kernel.value_place.itemsize, keys)


@jit
def want_keys(kernel, plan, count, keys, source, wanted):
    """List the keys of the next piece, which are asked for while values are added up."""
    tile = kernel.tile
    strips = (count // tile.rows + (count % tile.rows > 1)) * (plan.value_dim // tile.width)
    want_nothing(wanted, keys * strips)
    if plan.prefetch_distance > 0 and strips > 0:
        want(wanted, source, plan.key_row, plan.head_dim * kernel.itemsize, keys)
