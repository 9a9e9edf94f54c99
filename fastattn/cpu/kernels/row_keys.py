"""The products of few queries with keys, features in the lanes: scores of rows, each of a query of some head.

    scores[r][j] = q[r] · key[j]                    q[r][p]: the rows, times the scale

Keys are read where they lie, or have been copied to, as they are: half precision is widened in registers, unless pairs
of bfloat16 are multiplied, neighbours, with queries whose rows are words then, each of a pair. int8 is widened in
registers for up to four rows: with a row or two a scale is multiplied by a sum of whole numbers, and not by each. For
more rows some keys at a time are widened first, to the first-level cache. `place` is what is read from, and says
whether it has to be widened. But for int8, what is computed for a row is the same, in the same order, whatever other
rows there are.
"""

from fastattn.cpu.kernels.int8 import load_rows, numbers_of, scales_of
from fastattn.cpu.kernels.pack import copy_rows
from fastattn.cpu.kernels.prefetch import NOTHING, ask, want, want_nothing
from fastattn.machine.kernel import PLAIN
from fastattn.simd import (
    add_dot,
    add_dot_of_blocks,
    add_dot_of_pairs,
    fma,
    fma_of_pairs,
    inline,
    jit,
    row_sums,
    stack_memory,
    store_split,
    tile_fill,
    tile_load,
    tile_load_part_stored,
    tile_load_stored,
    tile_store,
    tile_stretch,
)

MOST_ASKING = 8  # rows that ask for what is wanted ahead: with more there is time, and asking takes some
LESS = 2.0**-12  # times the sum of a block of int8, a number is no more than it was
memory_of_a_square = stack_memory(16 * 64)  # of the widest vectors


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
        ask(kernel, wanted)
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
            asked = wanted if r < MOST_ASKING else NOTHING
            some = crossed_products(kernel, place, plan, q, key + i * row, row, present - i, asked)
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


@jit
def want_values(kernel, plan, count, keys, values, wanted):
    """List the values of a piece, which are asked for while its scores are computed."""
    tile = kernel.tile
    crossed = crossed_rows(tile, count)
    steps = min(crossed, MOST_ASKING) * (words_of(kernel, plan.head_dim) // tile.lanes)
    want_nothing(wanted, keys // tile.lanes * steps)
    if plan.prefetch_distance > 0 and crossed > 0:
        want(wanted, values, plan.value_row, plan.value_dim * kernel.value_place.itemsize, keys)
