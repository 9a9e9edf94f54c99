"""The scores of additive attention (Bahdanau et al. 2014, arXiv 1409.0473); all else is the forward pass's.

A score is Σ_p weight[p] · tanh(query[p] + key[p]). With A = exp(2 query) and B = exp(2 key), made once for each row,

    tanh(query + key) = 1 - 2 / (1 + A · B)

so that what is left for each query, key and feature is a multiply-add, a division and an addition; two features share a
division. This holds as long as neither A · B nor the product of two denominators leaves the range of the dtype: where
the largest |query| of a block and the largest |key| of a key sum to at most `reach`. Elsewhere the tanh of the sum is
taken, with an exponential for each query, key and feature.

Which way a key goes depends on its own row and the block of queries. So a key that is masked out, and may hold
anything, changes no bit of another key's score.

Layouts, features padded with 0 to a multiple of four vectors:

    block of queries      exps, raws [p][i], or for few queries [i][p]
                          factors[p] = -2 weight[p], weight[p], sums of weights, the largest |query|, and room
    block of keys         largest |key| [j], raws [j][p], exps in panels [j / rows][p][j % rows], or for few [j][p]
"""

from fastattn.cpu.kernels.pack import pack_keys, pack_queries
from fastattn.cpu.kernels.softmax import NEAREST_32, NEAREST_64, ROUND_32, ROUND_64, exp2
from fastattn.simd import (
    absolute,
    as_element,
    exponent_bits,
    fma,
    horner,
    jit,
    largest_row,
    load_element,
    maximum,
    minimum,
    stack_memory,
    store_element,
    sum_rows,
    tile_fill,
    tile_load,
    tile_load_column,
    tile_rank1_reciprocals,
    tile_repeat,
    tile_store,
)

# Features that are summed on their own before they join the sum: partial sums stay small, and so do their roundings.
PART = 32
# Of |query| + |key|: the products of two denominators, exp(4 reach), and of one and a weight are below 2^127, 2^1023.
REACH_32, REACH_64 = 21.0, 170.0
WEIGHT_REACH_32, WEIGHT_REACH_64 = 2.0**60, 2.0**500
SATURATED = 100.0  # 1 - 2 / (1 + 2^100) is 1
LOG2_E_TWICE = 2.8853900817779268
# ln(2) / 2 in two parts, the first so short that its product with a whole number below 2^7, 2^10 is exact.
HALF_LN2_HIGH_32, HALF_LN2_LOW_32 = 0.3465728759765625, 7.143034101547086e-07
HALF_LN2_HIGH_64, HALF_LN2_LOW_64 = 0.3465735902796041, 3.6855012825838994e-13
INFINITY = float("inf")
stack_memory_of_a_quad = stack_memory(4 * 64)  # four of the largest vectors


@jit
def exp_twice(tile, x):
    """exp(2x) by elements, to 2.2 units in the last place; NaN for NaN. |x| is at most `reach`, or the result is any.

    2x = 2 (n · ln(2) / 2 + r), so that exp(2x) = 2^n · 2^(r · 2 log2(e)). The rounding of x · log2(e) alone would cost
    as many digits as n has.
    """
    if tile.itemsize == 4:
        moved = fma(x, LOG2_E_TWICE, ROUND_32)
        n = moved - ROUND_32
        rest = x - n * HALF_LN2_HIGH_32 - n * HALF_LN2_LOW_32
        return horner(rest * LOG2_E_TWICE, NEAREST_32) * exponent_bits(moved)
    moved = fma(x, LOG2_E_TWICE, ROUND_64)
    n = moved - ROUND_64
    rest = x - n * HALF_LN2_HIGH_64 - n * HALF_LN2_LOW_64
    return horner(rest * LOG2_E_TWICE, NEAREST_64) * exponent_bits(moved)


@jit
def tanh(kernel, x):
    """tanh(x) by elements, to an error of some units in the last place of 1; NaN for NaN.

    Where x is large, and its product with log2(e) wrong by more than that, tanh no longer depends on it.
    """
    return 1.0 - 2.0 / (exp2(kernel, minimum(SATURATED, x * LOG2_E_TWICE)) + 1.0)


# -- rows of queries and keys ------------------------------------------------------------------------------------------


@jit
def padded(tile, features):
    """The features with what is added to fill quads of vectors."""
    quad = tile.quad.rows * tile.lanes
    return (features + quad - 1) // quad * quad


@jit
def copy_row(tile, source, column, features, length, target):
    """target[p] = source[p]; 0 from `features` to `length`, a multiple of lanes."""
    done = 0
    if column == tile.itemsize:
        done = features - features % tile.lanes
        for p in range(0, done, tile.lanes):
            tile_store(tile_load(tile.vector, source + p * column, 0), target + p * tile.itemsize, 0)
    for p in range(done, features):
        store_element(tile, target + p * tile.itemsize, load_element(tile, source + p * column))
    for p in range(features, length):
        store_element(tile, target + p * tile.itemsize, 0.0)


@jit
def load_rows(tile, source, row, column, count, features, raws, exps, largest):
    """raws[j] = source[j], exps[j] = exp(2 source[j]), largest[j] = max |source[j]| over what is no NaN."""
    length = padded(tile, features)
    row_bytes = length * tile.itemsize
    for j in range(count):
        copy_row(tile, source + j * row, column, features, length, raws)
        best = tile_fill(tile.quad, 0.0)
        for offset in range(0, row_bytes, tile.quad.rows * tile.vector_bytes):
            x = tile_load(tile.quad, raws + offset, tile.vector_bytes)
            tile_store(exp_twice(tile, x), exps + offset, tile.vector_bytes)
            best = maximum(absolute(x), best)
        tile_store(largest_row(best), largest, 0)  # over the numbers of the next keys, which are still to come
        store_element(tile, largest, largest_of(tile, largest, tile.lanes))
        raws += row_bytes
        exps += row_bytes
        largest += tile.itemsize


@jit
def largest_of(tile, at, count):
    """The largest of some numbers that are not negative."""
    best = load_element(tile, at)
    for i in range(1, count):
        best = max(best, load_element(tile, at + i * tile.itemsize))
    return best


@jit
def places(tile, plan, q):
    """Where in a block of queries raws, factors, weights, sums and the largest |query| are."""
    length = padded(tile, plan.head_dim)
    raws = q + length * tile.row_bytes
    factors = raws + length * tile.row_bytes
    weights = factors + length * tile.itemsize
    sums = weights + length * tile.itemsize
    return raws, factors, weights, sums, sums + (length + tile.lanes) * tile.itemsize


@jit
def key_places(tile, plan, keys):
    """Where in a block of keys raws and exps are, behind the largest |key| of each."""
    raws = keys + (plan.key_block + 2 * tile.lanes) * tile.itemsize
    return raws, raws + plan.key_block * padded(tile, plan.head_dim) * tile.itemsize


@jit
def load_weight(tile, call, plan, q):
    """Write factors, weights and sums of a block of queries. Returns the largest |weight| that is no NaN, in lanes."""
    _, factors, weights, sums, _ = places(tile, plan, q)
    length = padded(tile, plan.head_dim)
    scale = as_element(tile, plan.scale)
    best = tile_fill(tile.vector, 0.0)
    lanes = tile_fill(tile.vector, 0.0)
    copy_row(tile, call.weight, tile.itemsize, plan.head_dim, length, weights)
    for offset in range(0, length * tile.itemsize, tile.vector_bytes):
        weight = tile_load(tile.vector, weights + offset, 0) * scale
        tile_store(weight, weights + offset, 0)
        tile_store(weight * -2.0, factors + offset, 0)
        lanes = lanes + weight
        best = maximum(absolute(weight), best)
    if tile.vectors == 1:
        tile_store(lanes, sums, 0)
    else:
        for first in range(0, length, PART):
            part = load_element(tile, weights + first * tile.itemsize)
            for p in range(first + 1, min(first + PART, length)):
                part += load_element(tile, weights + p * tile.itemsize)
            store_element(tile, sums + first // PART * tile.itemsize, part)
    return best


@jit
def store_largest(tile, call, plan, q, largest, present):
    """Write the largest |query| of a block; infinity where the weights are too large for denominators."""
    reach = WEIGHT_REACH_32 if tile.itemsize == 4 else WEIGHT_REACH_64
    place = places(tile, plan, q)[4]
    tile_store(load_weight(tile, call, plan, q), place, 0)
    allowed = largest_of(tile, place, tile.lanes) <= reach
    store_element(tile, place, largest_of(tile, largest, present) if allowed else INFINITY)


@jit
def reach_of(tile, plan, q):
    """How large a key may be for a block of queries; less than 0 where none may."""
    return (REACH_32 if tile.itemsize == 4 else REACH_64) - load_element(tile, places(tile, plan, q)[4])


@jit
def all_near(tile, largest, count, reach):
    """Whether `count` keys are within reach."""
    return largest_of(tile, largest, count) <= reach


# -- queries in the lanes ----------------------------------------------------------------------------------------------


@jit
def load_many_queries(tile, call, plan, q, source, present, work):
    """A block of queries, transposed; `work` is room for their rows."""
    features, length = plan.head_dim, padded(tile, plan.head_dim)
    rows, exps = key_places(tile, plan, work)
    load_rows(tile, source, plan.query_row, plan.query_column, present, features, rows, exps, work)
    pack_queries(tile, tile, q, exps, length * tile.itemsize, tile.itemsize, present, length, 1.0)
    raws = places(tile, plan, q)[0]
    pack_queries(tile, tile, raws, rows, length * tile.itemsize, tile.itemsize, present, length, 1.0)
    store_largest(tile, call, plan, q, work, present)


@jit
def load_many_keys(tile, plan, keys, source, count):
    """A block of keys, its exponentials in panels."""
    features, length = plan.head_dim, padded(tile, plan.head_dim)
    raws, panels = key_places(tile, plan, keys)
    row_bytes = length * tile.itemsize
    exps = panels + (plan.key_block + tile.rows) * row_bytes
    largest = keys
    for j in range(0, count, tile.rows):
        height = min(tile.rows, count - j)
        load_rows(tile, source, plan.key_row, plan.key_column, height, features, raws, exps, largest)
        pack_keys(tile, tile, panels, exps, row_bytes, tile.itemsize, height, length)
        source += tile.rows * plan.key_row
        raws += tile.rows * row_bytes
        panels += tile.rows * row_bytes
        largest += tile.rows * tile.itemsize
    return keys


@jit
def near_scores(shape, plan, exps, column, q, row_bytes, factors, sums):
    """The scores of the panel's next keys (as many as the shape has rows), which are within reach."""
    total = tile_fill(shape, 0.0)
    for first in range(0, plan.head_dim, PART):
        part = tile_fill(shape, load_element(shape, sums))
        for _ in range(first, min(first + PART, plan.head_dim), 2):
            part = tile_rank1_reciprocals(
                part, exps, shape.itemsize, exps + column, q, q + row_bytes, factors, factors + shape.itemsize
            )
            exps += 2 * column
            q += 2 * row_bytes
            factors += 2 * shape.itemsize
        total = total + part
        sums += shape.itemsize
    return total


@jit
def distant_scores(kernel, plan, raw, q_raws, weights):
    """The scores of one key, with a tanh for each query and feature."""
    tile = kernel.tile
    total = tile_fill(tile.single, 0.0)
    for first in range(0, plan.head_dim, PART):
        part = tile_fill(tile.pair, 0.0)
        for _ in range(first, min(first + PART, plan.head_dim), 2):
            x = tile_load(tile.pair, q_raws, tile.row_bytes) + tile_load_column(tile.pair, raw, tile.itemsize)
            part = fma(tanh(kernel, x), tile_load_column(tile.pair, weights, tile.itemsize), part)
            q_raws += 2 * tile.row_bytes
            raw += 2 * tile.itemsize
            weights += 2 * tile.itemsize
        total = total + sum_rows(part)
    return total


@jit
def score_many(kernel, plan, q, keys, first, count, scores, best):
    """scores[j][i] = the score of query i and key first + j for `count` keys; `best` and their maximum."""
    tile = kernel.tile
    q_raws, factors, weights, sums, _ = places(tile, plan, q)
    raws, exps = key_places(tile, plan, keys)
    row_bytes = padded(tile, plan.head_dim) * tile.itemsize
    panel_row = tile.rows * tile.itemsize
    reach = reach_of(tile, plan, q)
    largest = keys + first * tile.itemsize
    raws += first * row_bytes
    exps += first * row_bytes
    for j in range(0, count, tile.rows):
        height = min(tile.rows, count - j)
        if height == tile.rows and all_near(tile, largest, height, reach):
            acc = near_scores(tile, plan, exps, panel_row, q, tile.row_bytes, factors, sums)
            tile_store(acc, scores, tile.row_bytes)
            best = maximum(largest_row(acc), best)
        else:
            for r in range(height):
                if load_element(tile, largest + r * tile.itemsize) <= reach:
                    at = exps + r * tile.itemsize
                    one = near_scores(tile.single, plan, at, panel_row, q, tile.row_bytes, factors, sums)
                else:
                    one = distant_scores(kernel, plan, raws + r * row_bytes, q_raws, weights)
                tile_store(one, scores + r * tile.row_bytes, 0)
                best = maximum(one, best)
        largest += panel_row
        raws += tile.rows * row_bytes
        exps += tile.rows * row_bytes
        scores += tile.rows * tile.row_bytes
    return best


# -- few queries: features in the lanes --------------------------------------------------------------------------------


@jit
def load_query_rows(tile, call, plan, q, source, present, work):
    """A block of queries, row by row."""
    raws = places(tile, plan, q)[0]
    load_rows(tile, source, plan.query_row, plan.query_column, present, plan.head_dim, raws, q, work)
    store_largest(tile, call, plan, q, work, present)


@jit
def load_key_rows(tile, plan, keys, source, count):
    """A block of keys, row by row."""
    raws, exps = key_places(tile, plan, keys)
    load_rows(tile, source, plan.key_row, plan.key_column, count, plan.head_dim, raws, exps, keys)
    return keys


@jit
def near_lanes(shape, features, exps, row_bytes, q, factors, sums):
    """The scores of one query and the next keys, in lanes that are to be summed."""
    total = tile_repeat(shape, tile_load(shape.vector, sums, 0))
    step = shape.vector_bytes
    for offset in range(0, features * shape.itemsize, 2 * step):
        a = fma(tile_load(shape, exps + offset, row_bytes), tile_load(shape.vector, q + offset, 0), 1.0)
        b = fma(tile_load(shape, exps + offset + step, row_bytes), tile_load(shape.vector, q + offset + step, 0), 1.0)
        factor = tile_load(shape.vector, factors + offset, 0)
        next_factor = tile_load(shape.vector, factors + offset + step, 0)
        total = total + fma(factor, b, next_factor * a) / (a * b)
    return total


@jit
def distant_lanes(kernel, length, raw, q_raw, weights):
    """The same for one key, with a tanh for each feature."""
    tile = kernel.tile
    total = tile_fill(tile.quad, 0.0)
    step = tile.vector_bytes
    for offset in range(0, length * tile.itemsize, tile.quad.rows * step):
        x = tile_load(tile.quad, raw + offset, step) + tile_load(tile.quad, q_raw + offset, step)
        total = fma(tanh(kernel, x), tile_load(tile.quad, weights + offset, step), total)
    return sum_rows(total)


@jit
def sum_of(tile, at):
    """The sum of a vector in memory."""
    total = load_element(tile, at)
    for i in range(1, tile.lanes):
        total += load_element(tile, at + i * tile.itemsize)
    return total


@jit
def score_by_features(kernel, plan, q, keys, first, count, scores, best):
    """`score_many` for at most one vector of queries, whose exponentials and products have features in the lanes."""
    tile = kernel.tile
    q_raws, factors, weights, sums, q_largest = places(tile, plan, q)
    raws, exps = key_places(tile, plan, keys)
    length = padded(tile, plan.head_dim)
    row_bytes = length * tile.itemsize
    reach = reach_of(tile, plan, q)
    largest = keys + first * tile.itemsize
    raws += first * row_bytes
    exps += first * row_bytes
    quad = tile.quad.rows
    lanes_at = q_largest + tile.vector_bytes  # room in which the lanes of a quad are summed
    for j in range(count):
        tile_store(tile_fill(tile.single, 0.0), scores + j * tile.row_bytes, 0)
    for j in range(0, count, quad):
        height = min(quad, count - j)
        near = height == quad and all_near(tile, largest, height, reach)
        for i in range(plan.queries):
            query = i * row_bytes
            place = scores + j * tile.row_bytes + i * tile.itemsize
            if near:
                acc = near_lanes(tile.quad, plan.head_dim, exps, row_bytes, q + query, factors, sums)
                tile_store(acc, lanes_at, tile.vector_bytes)
                for r in range(quad):
                    store_element(tile, place + r * tile.row_bytes, sum_of(tile, lanes_at + r * tile.vector_bytes))
                continue
            for r in range(height):
                offset = r * row_bytes
                if load_element(tile, largest + r * tile.itemsize) <= reach:
                    one = near_lanes(tile.vector, plan.head_dim, exps + offset, row_bytes, q + query, factors, sums)
                else:
                    one = distant_lanes(kernel, length, raws + offset, q_raws + query, weights)
                tile_store(one, lanes_at, 0)
                store_element(tile, place + r * tile.row_bytes, sum_of(tile, lanes_at))
        largest += quad * tile.itemsize
        raws += quad * row_bytes
        exps += quad * row_bytes
    for j in range(count):
        best = maximum(tile_load(tile.single, scores + j * tile.row_bytes, 0), best)
    return best


@jit
def add_values(tile, plan, weights, count, value, value_row, out, features, apart):
    """out[p][i] += Σ_j value[j][p] · weights[j][i], with features in the lanes: a multiple of four vectors of them.

    The sums are those of the other way, in the same order, and so the same bits. `apart`: as there.
    """
    buffer = stack_memory_of_a_quad()
    width = tile.quad.rows * tile.lanes
    for i in range(plan.queries):
        for p in range(0, features, width):
            place = out + p * tile.row_bytes + i * tile.itemsize
            for r in range(width):
                store_element(tile, buffer + r * tile.itemsize, load_element(tile, place + r * tile.row_bytes))
            acc = tile_fill(tile.quad, 0.0) if apart else tile_load(tile.quad, buffer, tile.vector_bytes)
            at, weight = value + p * tile.itemsize, weights + i * tile.itemsize
            for _ in range(count):
                acc = fma(tile_load(tile.quad, at, tile.vector_bytes), load_element(tile, weight), acc)
                at += value_row
                weight += tile.row_bytes
            if apart:
                acc = tile_load(tile.quad, buffer, tile.vector_bytes) + acc
            tile_store(acc, buffer, tile.vector_bytes)
            for r in range(width):
                store_element(tile, place + r * tile.row_bytes, load_element(tile, buffer + r * tile.itemsize))


# -- which of both -----------------------------------------------------------------------------------------------------


@jit
def load_queries(tile, call, plan, q, source, present, work):
    """Lay out a block of queries; `work` is room for their rows."""
    if tile.vectors > 1:
        load_many_queries(tile, call, plan, q, source, present, work)
    else:
        load_query_rows(tile, call, plan, q, source, present, work)


@jit
def load_keys(tile, plan, keys, source, count):
    """Lay out a block of keys; returns its address."""
    if tile.vectors > 1:
        return load_many_keys(tile, plan, keys, source, count)
    return load_key_rows(tile, plan, keys, source, count)


@jit
def score_block(kernel, plan, q, keys, first, count, scores, best):
    """scores[j][i] = the score of query i and key first + j for `count` keys; `best` and their maximum."""
    tile = kernel.tile
    if tile.vectors > 1:
        return score_many(kernel, plan, q, keys, first, count, scores, best)
    return score_by_features(kernel, plan, q, keys, first, count, scores, best)
