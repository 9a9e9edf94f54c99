"""Both products of attention with features in the lanes, for few queries: rows, each of a query of some head.

    scores[r][j] = q[r] · key[j]                    q[r][p]: the rows, times the scale
    sums[r][p]  += Σ_j weights[r][j] · value[j][p]

Keys and values are read where they lie, or copied a few rows at a time, which stay in the first-level cache meanwhile.
What is computed for a row is the same, in the same order, whatever other rows there are.
"""

from fastattn.cpu.kernels.int8 import load_strip
from fastattn.cpu.kernels.pack import copy_rows
from fastattn.cpu.kernels.prefetch import ask, want, want_nothing
from fastattn.cpu.kernels.records import KEYS_AT_ONCE
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
    tile_load_part,
    tile_store,
    tile_stretch,
)

memory_of_a_square = stack_memory(16 * 64)  # of the widest vectors


# -- scores ------------------------------------------------------------------------------------------------------------


@inline
def add_products(place, tile, strip, q, key, row, first, features, sums):
    """sums[j] += q · key[j] by lanes, for a vector of keys and as many whole strips of features as follow `first`.

    Returns where these end. Keys are read row by row: memory is fastest in its own order.
    """
    p = first
    while p + strip.width <= features:
        features_of_q, at, total = tile_load(strip, q + p * tile.itemsize, 0), key, sums
        for _ in range(tile.lanes):
            features_of_key = load_strip(place, strip, at, p, features)
            tile_store(add_dot(features_of_q, features_of_key, tile_load(tile.vector, total, 0)), total, 0)
            at += row
            total += tile.vector_bytes
        p += strip.width
    return p


@inline
def add_whole_products(place, tile, q, key, row, features, sums):
    """`add_products` of all whole vectors of features; where these end."""
    p = add_products(place, tile, tile.long, q, key, row, 0, features, sums)
    p = add_products(place, tile, tile.half_long, q, key, row, p, features, sums)
    return add_products(place, tile, tile.vector, q, key, row, p, features, sums)


@jit
def products_where_they_lie(kernel, plan, q, key):
    """q · key[j] for a vector of keys that are all there, whose features are whole vectors, and one row."""
    tile = kernel.tile
    sums = memory_of_a_square()
    tile_store(tile_fill(tile.square, 0.0), sums, tile.vector_bytes)
    add_whole_products(kernel, tile, q, key, plan.key_row, plan.head_dim, sums)
    return row_sums(tile_load(tile.square, sums, tile.vector_bytes))


@jit
def products(kernel, plan, q, key, present):
    """q · key[j] for a vector of keys, of which so many are there, and one row."""
    tile = kernel.tile
    row, features = plan.key_step, plan.head_dim
    sums = memory_of_a_square()
    tile_store(tile_fill(tile.square, 0.0), sums, tile.vector_bytes)
    p = add_whole_products(tile, tile, q, key, row, features, sums) if present == tile.lanes else 0
    total = tile_load(tile.square, sums, tile.vector_bytes)
    for first in range(p, features, tile.lanes):
        offset = first * tile.itemsize
        keys = tile_load_part(tile.square, key + offset, row, present, min(tile.lanes, features - first))
        total = fma(keys, tile_load(tile.vector, q + offset, 0), total)
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
    for offset in range(0, whole * tile.itemsize, tile.vector_bytes):
        queries = tile_stretch(tile.square, tile_load(tile.factor, q + offset, plan.query_bytes))
        total = fma(tile_load(tile.cofactor, key + offset, row), queries, total)
        ask(wanted)
    for p in range(whole, features, tile.lanes):
        offset = p * tile.itemsize
        queries = tile_stretch(tile.square, tile_load(tile.factor, q + offset, plan.query_bytes))
        keys = tile_load_part(tile.cofactor, key + offset, row, present, min(tile.lanes, features - p))
        total = fma(keys, queries, total)
    return row_sums(total)


@jit
def are_whole(place, count, column, features):
    """Whether keys, or values, are whole vectors of features, for so few rows that no copy pays."""
    tile = place.tile
    return count < tile.factor.rows and column == place.itemsize and features % tile.lanes == 0


@jit
def bring_keys(kernel, plan, source, count, buffer):
    """Where some keys are to be read: where they lie, or copied."""
    if plan.key_bytes == 0:
        return source
    row, column = plan.key_row, plan.key_column
    copy_rows(kernel, kernel.tile, buffer, plan.key_step, source, row, column, count, plan.head_dim)
    return buffer


@jit
def score_rows(kernel, plan, count, queries, source, keys, scores, buffer, wanted):
    """scores[r][j] = q[r] · key[j] for `count` rows; meanwhile what is on the list is asked for.

    Some rows at a time share what is loaded of the keys. A product is summed in the same order either way.
    """
    tile = kernel.tile
    rows, columns = tile.factor.rows, tile.cofactor.rows
    crossed = count - count % rows
    as_it_lies = are_whole(kernel, count, plan.key_column, plan.head_dim)
    for j in range(0, keys, tile.lanes):
        present = min(tile.lanes, keys - j)
        if kernel.storage != tile.dtype and as_it_lies and present == tile.lanes:
            for r in range(count):
                q, at = queries + r * plan.query_bytes, scores + r * plan.score_bytes + j * tile.itemsize
                tile_store(products_where_they_lie(kernel, plan, q, source), at, 0)
            source += tile.lanes * plan.key_row
            continue
        key = bring_keys(kernel, plan, source, present, buffer)
        for r in range(0, crossed, rows):
            q, at = queries + r * plan.query_bytes, scores + r * plan.score_bytes + j * tile.itemsize
            for i in range(0, present, columns):
                some = crossed_products(kernel, plan, q, key + i * plan.key_step, present - i, wanted)
                store_split(tile.cofactor_row, some, at + i * tile.itemsize, plan.score_bytes)
        for r in range(crossed, count):
            q, at = queries + r * plan.query_bytes, scores + r * plan.score_bytes + j * tile.itemsize
            tile_store(products(kernel, plan, q, key, present), at, 0)
        source += tile.lanes * plan.key_row


# -- sums of values ----------------------------------------------------------------------------------------------------


@inline
def add_to_columns(place, plan, weights, strip, value, step, p, count, sums, wanted):
    """sums[r][p] += Σ_j weights[r][j] · value[j][p], for as many rows, and columns from p on, as a strip has."""
    acc = tile_load(strip, sums, plan.sum_bytes)
    itemsize, row, features = strip.itemsize, plan.score_bytes, plan.value_dim
    for _ in range(count >> 2):
        for _ in range(4):
            acc = fma(tile_load_column(strip, weights, row), load_strip(place, strip.single, value, p, features), acc)
            weights += itemsize
            value += step
        ask(wanted)
    for _ in range(count & 3):
        acc = fma(tile_load_column(strip, weights, row), load_strip(place, strip.single, value, p, features), acc)
        weights += itemsize
        value += step
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
def add_to_rest(kernel, plan, weights, narrow, value, count, sums, first):
    """The same for the columns behind the last whole vector, if there are any."""
    tile, offset, columns = kernel.tile, first * kernel.tile.itemsize, plan.value_dim - first
    if columns == 0:
        return
    acc, at, weight = tile_load(narrow, sums + offset, plan.sum_bytes), value + offset, weights
    for _ in range(count):
        part = tile_load_part(tile.vector, at, 0, 1, columns)
        acc = fma(tile_load_column(narrow, weight, plan.score_bytes), part, acc)
        weight += tile.itemsize
        at += plan.value_step
    tile_store(acc, sums + offset, plan.sum_bytes)


@jit
def add_to_tile(kernel, plan, weights, value, count, sums, wanted):
    """The same for all columns of as many rows as a tile has."""
    tile, step = kernel.tile, plan.value_step
    p = add_to_strips(tile, plan, weights, tile, value, step, count, sums, 0, wanted)
    p = add_to_strips(tile, plan, weights, tile.quad, value, step, count, sums, p, wanted)
    add_to_rest(kernel, plan, weights, tile.quad, value, count, sums, p)


@inline
def add_to_whole_row(place, tile, plan, weights, value, step, count, sums, wanted):
    """The same for one row and all whole vectors of columns; where these end."""
    p = add_to_strips(place, plan, weights, tile.long, value, step, count, sums, 0, wanted)
    p = add_to_strips(place, plan, weights, tile.half_long, value, step, count, sums, p, wanted)
    return add_to_strips(place, plan, weights, tile.vector, value, step, count, sums, p, wanted)


@jit
def add_to_row(kernel, plan, weights, value, count, sums, wanted):
    """The same for one row."""
    tile = kernel.tile
    p = add_to_whole_row(tile, tile, plan, weights, value, plan.value_step, count, sums, wanted)
    add_to_rest(kernel, plan, weights, tile.vector, value, count, sums, p)


@jit
def bring_values(kernel, plan, source, count, buffer):
    """Where the values of some keys are to be read: where they lie, or copied."""
    if plan.value_bytes == 0:
        return source
    row, column = plan.value_row, plan.value_column
    copy_rows(kernel.value_place, kernel.tile, buffer, plan.value_step, source, row, column, count, plan.value_dim)
    return buffer


@jit
def add_values(kernel, plan, count, weights, keys, source, sums, buffer, wanted):
    """sums[r] += Σ_j weights[r][j] · value[j] for `count` rows; meanwhile what is on the list is asked for."""
    tile, place = kernel.tile, kernel.value_place
    if kernel.value_place.storage != tile.dtype and are_whole(place, count, plan.value_column, plan.value_dim):
        for r in range(count):
            at, total = weights + r * plan.score_bytes, sums + r * plan.sum_bytes
            add_to_whole_row(place, tile, plan, at, source, plan.value_row, keys, total, wanted)
        return
    whole = count - count % tile.rows
    for first in range(0, keys, KEYS_AT_ONCE):
        here = min(KEYS_AT_ONCE, keys - first)
        value = bring_values(kernel, plan, source, here, buffer)
        at, place = weights + first * tile.itemsize, sums
        for _ in range(0, whole, tile.rows):
            add_to_tile(kernel, plan, at, value, here, place, wanted)
            at += tile.rows * plan.score_bytes
            place += tile.rows * plan.sum_bytes
        for _ in range(whole, count):
            add_to_row(kernel, plan, at, value, here, place, wanted)
            at += plan.score_bytes
            place += plan.sum_bytes
        source += here * plan.value_row


# -- what is asked for ahead -------------------------------------------------------------------------------------------


@jit
def want_values(kernel, plan, count, keys, values, wanted):
    """List the values of a piece, which are asked for while its scores are computed."""
    tile = kernel.tile
    crossed = count - count % tile.factor.rows
    steps = crossed * (plan.head_dim // tile.lanes)
    want_nothing(wanted, keys // tile.lanes * steps)
    if plan.prefetch_distance > 0 and crossed > 0:
        want(wanted, values, plan.value_row, plan.value_dim * tile.itemsize, keys)


@jit
def want_keys(kernel, plan, count, keys, source, wanted):
    """List the keys of the next piece, which are asked for while values are added up."""
    tile = kernel.tile
    strips = count // tile.rows * (plan.value_dim // tile.width)
    want_nothing(wanted, keys // 4 * strips)
    if plan.prefetch_distance > 0 and strips > 0:
        want(wanted, source, plan.key_row, plan.head_dim * tile.itemsize, keys)
