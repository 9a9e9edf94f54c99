"""Both products of attention with features in the lanes, for few queries: rows, each of a query of some head.

    scores[r][j] = q[r] · key[j]                    q[r][p]: the rows, times the scale
    sums[r][p]  += Σ_j weights[r][j] · value[j][p]

Keys and values are read where they lie, or have been copied to, as they are: half precision is widened in registers.
What is computed for a row is the same, in the same order, whatever other rows there are.
"""

from fastattn.cpu.kernels.prefetch import ask, want, want_nothing
from fastattn.simd import (
    add_dot,
    fma,
    inline,
    jit,
    row_sums,
    stack_memory,
    store_split,
    tile_fill,
    tile_load,
    tile_load_column,
    tile_load_part_stored,
    tile_load_stored,
    tile_store,
    tile_stretch,
)

memory_of_a_square = stack_memory(16 * 64)  # of the widest vectors
KEYS_AT_ONCE = 32  # whose values are multiplied for all rows in turn: they stay in the first-level cache meanwhile


# -- scores ------------------------------------------------------------------------------------------------------------


@inline
def add_products(kernel, strip, q, key, row, first, features, sums):
    """sums[j] += q · key[j] by lanes, for a vector of keys and as many whole strips of features as follow `first`.

    Returns where these end. Keys are read row by row: memory is fastest in its own order. Until there are sums, from
    the first strip on, these count as 0.
    """
    tile, p = kernel.tile, first
    while p + strip.width <= features:
        features_of_q, at, place = tile_load(strip, q + p * tile.itemsize, 0), key + p * kernel.itemsize, sums
        for _ in range(tile.lanes):
            total = tile_fill(tile.vector, 0.0)
            if p > 0:
                total = tile_load(tile.vector, place, 0)
            tile_store(add_dot(features_of_q, tile_load_stored(kernel, strip, at, 0), total), place, 0)
            at += row
            place += tile.vector_bytes
        p += strip.width
    return p


@jit
def products(kernel, plan, q, key, present):
    """q · key[j] for a vector of keys, of which so many are there, and one row."""
    tile = kernel.tile
    row, features = plan.key_step, plan.head_dim
    sums, total, p = memory_of_a_square(), tile_fill(tile.square, 0.0), 0
    if present == tile.lanes:
        p = add_products(kernel, tile.long, q, key, row, p, features, sums)
        p = add_products(kernel, tile.half_long, q, key, row, p, features, sums)
        p = add_products(kernel, tile.vector, q, key, row, p, features, sums)
    if p > 0:
        total = tile_load(tile.square, sums, tile.vector_bytes)
    for first in range(p, features, tile.lanes):
        at, columns = key + first * kernel.itemsize, min(tile.lanes, features - first)
        keys = tile_load_part_stored(kernel, tile.square, at, row, present, columns)
        total = fma(keys, tile_load(tile.vector, q + first * tile.itemsize, 0), total)
    return row_sums(total)


@jit
def crossed_products(kernel, plan, q, key, present, wanted):
    """q[r] · key[j] for some rows and some keys, that make a vector together: the keys of the first row come first.

    So many of the keys are there.
    """
    tile = kernel.tile
    row, features, columns = plan.key_step, plan.head_dim, tile.cofactor.rows
    whole = features - features % tile.lanes if present >= columns else 0
    total = tile_fill(tile.square, 0.0)
    for p in range(0, whole, tile.lanes):
        queries = tile_stretch(tile.square, tile_load(tile.factor, q + p * tile.itemsize, plan.query_bytes))
        total = fma(tile_load_stored(kernel, tile.cofactor, key + p * kernel.itemsize, row), queries, total)
        ask(wanted)
    for p in range(whole, features, tile.lanes):
        queries = tile_stretch(tile.square, tile_load(tile.factor, q + p * tile.itemsize, plan.query_bytes))
        at, columns = key + p * kernel.itemsize, min(tile.lanes, features - p)
        total = fma(tile_load_part_stored(kernel, tile.cofactor, at, row, present, columns), queries, total)
    return row_sums(total)


@jit
def crossed_rows(tile, count):
    """How many of some rows share what is loaded of the keys, so many at a time. Three have one without a query."""
    rows = tile.factor.rows
    return (count + rows // 4) // rows * rows


@jit
def score_rows(kernel, plan, count, queries, key, keys, scores, wanted):
    """scores[r][j] = q[r] · key[j] for `count` rows, or one more; meanwhile what is on the list is asked for.

    A product is summed in the same order, whichever way.
    """
    tile = kernel.tile
    rows, columns, crossed = tile.factor.rows, tile.cofactor.rows, crossed_rows(tile, count)
    for j in range(0, keys, tile.lanes):
        present = min(tile.lanes, keys - j)
        for r in range(0, crossed, rows):
            q, at = queries + r * plan.query_bytes, scores + r * plan.score_bytes + j * tile.itemsize
            for i in range(0, present, columns):
                some = crossed_products(kernel, plan, q, key + i * plan.key_step, present - i, wanted)
                store_split(tile.cofactor_row, some, at + i * tile.itemsize, plan.score_bytes)
        for r in range(crossed, count):
            q, at = queries + r * plan.query_bytes, scores + r * plan.score_bytes + j * tile.itemsize
            tile_store(products(kernel, plan, q, key, present), at, 0)
        key += tile.lanes * plan.key_step


# -- sums of values ----------------------------------------------------------------------------------------------------


@inline
def add_to_columns(kernel, plan, weights, strip, value, count, sums, wanted):
    """sums[r][p] += Σ_j weights[r][j] · value[j][p], for as many rows and columns as a strip has."""
    acc = tile_load(strip, sums, plan.sum_bytes)
    itemsize, row, step = kernel.tile.itemsize, plan.score_bytes, plan.value_step
    for _ in range(count >> 2):
        for _ in range(4):
            acc = fma(tile_load_column(strip, weights, row), tile_load_stored(kernel, strip.single, value, 0), acc)
            weights += itemsize
            value += step
        ask(wanted)
    for _ in range(count & 3):
        acc = fma(tile_load_column(strip, weights, row), tile_load_stored(kernel, strip.single, value, 0), acc)
        weights += itemsize
        value += step
    tile_store(acc, sums, plan.sum_bytes)


@jit
def add_to_strips(kernel, plan, weights, strip, value, count, sums, first, wanted):
    """The same for as many whole strips as there are from a column on; where they end."""
    tile, p = kernel.tile, first
    while p + strip.width <= plan.value_dim:
        at, place = value + p * kernel.itemsize, sums + p * tile.itemsize
        add_to_columns(kernel, plan, weights, strip, at, count, place, wanted)
        p += strip.width
    return p


@jit
def add_to_rest(kernel, plan, weights, narrow, value, count, sums, first):
    """The same for the columns behind the last whole vector, if there are any."""
    tile, columns = kernel.tile, plan.value_dim - first
    if columns == 0:
        return
    place, at, weight = sums + first * tile.itemsize, value + first * kernel.itemsize, weights
    acc = tile_load(narrow, place, plan.sum_bytes)
    for _ in range(count):
        part = tile_load_part_stored(kernel, tile.vector, at, 0, 1, columns)
        acc = fma(tile_load_column(narrow, weight, plan.score_bytes), part, acc)
        weight += tile.itemsize
        at += plan.value_step
    tile_store(acc, place, plan.sum_bytes)


@jit
def add_to_tile(kernel, plan, weights, tile, value, count, sums, wanted):
    """The same for all columns of as many rows as a tile has."""
    p = add_to_strips(kernel, plan, weights, tile, value, count, sums, 0, wanted)
    p = add_to_strips(kernel, plan, weights, tile.column, value, count, sums, p, wanted)
    add_to_rest(kernel, plan, weights, tile.column, value, count, sums, p)


@jit
def add_to_pair(kernel, plan, weights, value, count, sums, wanted):
    """The same for two rows, for which nothing is asked for ahead: whole rows of values are read, if they fit."""
    tile = kernel.tile
    p = add_to_strips(kernel, plan, weights, tile.wide_pair, value, count, sums, 0, wanted)
    p = add_to_strips(kernel, plan, weights, tile.pair, value, count, sums, p, wanted)
    p = add_to_strips(kernel, plan, weights, tile.pair.column, value, count, sums, p, wanted)
    add_to_rest(kernel, plan, weights, tile.pair.column, value, count, sums, p)


@jit
def add_to_row(kernel, plan, weights, value, count, sums, wanted):
    """The same for one row."""
    tile = kernel.tile
    p = add_to_strips(kernel, plan, weights, tile.long, value, count, sums, 0, wanted)
    p = add_to_strips(kernel, plan, weights, tile.half_long, value, count, sums, p, wanted)
    p = add_to_strips(kernel, plan, weights, tile.vector, value, count, sums, p, wanted)
    add_to_rest(kernel, plan, weights, tile.vector, value, count, sums, p)


@jit
def add_values(kernel, plan, count, weights, keys, value, sums, wanted):
    """sums[r] += Σ_j weights[r][j] · value[j] for `count` rows; meanwhile what is on the list is asked for."""
    tile = kernel.tile
    whole, others = count - count % tile.rows, count % tile.rows
    for first in range(0, keys, KEYS_AT_ONCE):
        here = min(KEYS_AT_ONCE, keys - first)
        at, place = weights + first * tile.itemsize, sums
        for _ in range(0, whole, tile.rows):
            add_to_tile(kernel, plan, at, tile, value, here, place, wanted)
            at += tile.rows * plan.score_bytes
            place += tile.rows * plan.sum_bytes
        if others == 1:
            add_to_row(kernel, plan, at, value, here, place, wanted)
        elif others == 2:
            add_to_pair(kernel, plan, at, value, here, place, wanted)
        elif others == 3:
            add_to_tile(kernel, plan, at, tile.triple, value, here, place, wanted)
        value += here * plan.value_step


# -- what is asked for ahead -------------------------------------------------------------------------------------------


@jit
def want_values(kernel, plan, count, keys, values, wanted):
    """List the values of a piece, which are asked for while its scores are computed."""
    tile = kernel.tile
    crossed = crossed_rows(tile, count)
    steps = crossed * (plan.head_dim // tile.lanes)
    want_nothing(wanted, keys // tile.lanes * steps)
    if plan.prefetch_distance > 0 and crossed > 0:
        want(wanted, values, plan.value_row, plan.value_dim * kernel.itemsize, keys)


@jit
def want_keys(kernel, plan, count, keys, source, wanted):
    """List the keys of the next piece, which are asked for while values are added up."""
    tile = kernel.tile
    strips = (count // tile.rows + (count % tile.rows > 1)) * (plan.value_dim // tile.width)
    want_nothing(wanted, keys // 4 * strips)
    if plan.prefetch_distance > 0 and strips > 0:
        want(wanted, source, plan.key_row, plan.head_dim * kernel.itemsize, keys)
