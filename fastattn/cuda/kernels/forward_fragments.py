"""The steps of the forward pass on tensor cores beside those of `fastattn.cuda.kernels.fragments`: the online softmax.

A lane has two rows of each group of 16 queries. Its sums are of its own columns alone, until the end.
"""

from __future__ import annotations

from fastattn.cuda.kernels.elements import LN_2, LOG2_E
from fastattn.cuda.kernels.fragments import (
    FLOAT,
    HALF,
    INFINITY,
    LANES,
    add_not_finite,
    any_not_finite,
    clear,
    factor_of,
    look,
    place_of_weight,
    rows_of,
    second_tile,
    whole,
)
from fastattn.cuda.kernels.primitives import (
    exp2,
    fma,
    global_address,
    load_shared,
    log2,
    maximum,
    minimum,
    narrow,
    pack,
    reciprocal,
    select,
    shuffle_xor,
    store_float,
    store_pair,
)

# -- what there is to do -----------------------------------------------------------------------------------------------


def part_of(shape, block, queries):
    """The slice of a block, and its first query: those that see most keys come first."""
    blocks = (narrow(queries) + (shape.queries - 1)) // shape.queries
    return block // blocks, (blocks - 1 - block % blocks) * shape.queries


def tiles_of(shape, count):
    """How many tiles `count` keys are in."""
    return (count + (shape.keys - 1)) // shape.keys


def first_key(shape, tile):
    """The first key of a tile."""
    return narrow(tile) * shape.keys


def seen_by(shape, first, queries, keys, offset, warp):
    """How many of the first keys are seen by any query of a block, by any of a warp, and by all of the warp."""
    queries, keys, own = narrow(queries), narrow(keys), first + warp * shape.rows
    offset = narrow(offset)
    limits = (minimum(first + shape.queries, queries), own + shape.rows, own + 1)
    return tuple(maximum(minimum(limit + offset, keys), 0) for limit in limits)


def limits_of(shape, first, offset, count, queries, thread):
    """How many of the first keys each row of a lane may look at, none if there is no such query."""
    offset, count, queries = narrow(offset), narrow(count), narrow(queries)
    rows = rows_of(shape, first, thread)
    return tuple(select(row < queries, minimum(row + offset + 1, count), 0) for row in rows)


# -- scores and weights ------------------------------------------------------------------------------------------------


def at(shape, scores, m, n, i):
    """An element of the scores."""
    return scores[(m * shape.key_matrices + n) * 4 + i]


def restrict(shape, scores, first, limits, first_query, mask, scale, thread):
    """Apply the masks: -inf in place of the scores of keys that a row may not look at."""
    column, rows = narrow(first) + thread % 4 * 2, rows_of(shape, first_query, thread)
    restricted = []
    for m in range(shape.groups):
        for n in range(shape.key_matrices):
            for i in range(4):
                row, key, score = 2 * m + i // 2, column + (8 * n + i % 2), at(shape, scores, m, n, i)
                sees, added = look(shape, mask, rows[row], key, key < limits[row])
                if shape.floating:
                    score = fma(score, scale, added)
                restricted.append(select(sees, score, -INFINITY))
    return tuple(restricted)


def start(shape):
    """The output, the greatest score of each row, and the sum of its weights, before the first key."""
    return clear(shape), (-INFINITY,) * (2 * shape.groups), (0.0,) * (2 * shape.groups)


def power(shape, score, shift, scale):
    """The weight of a score: base 2 if a factor log2(e) is in `scale`, and so in `shift`, else base e.

    finfo.min, which masks are full of, times log2(e) would be no number.
    """
    return exp2((score - shift) * LOG2_E) if shape.floating else exp2(fma(score, scale, -shift))


def greatest(scores, top):
    """The greatest score of a row, of which four lanes have some each, or `top` if that is greater."""
    for score in scores:
        top = maximum(top, score)
    top = maximum(top, shuffle_xor(top, 1))
    return maximum(top, shuffle_xor(top, 2))


def absorb(shape, scores, highest, total, output, scale):
    """Turn scores into weights, in halves, and bring the greatest score, the sums and the output up to them.

    The output may be empty, where only the sums are wanted.
    """
    highest, total, output = list(highest), list(total), list(output)
    columns, features = shape.key_matrices, shape.feature_matrices
    # the fragment of the scores is the one of a left factor, 2 matrices of 8 columns to each 16 columns of it
    weights = [None] * (len(scores) // 2)
    for row in range(2 * shape.groups):
        m, half = row // 2, row % 2
        own = [at(shape, scores, m, n, 2 * half + i) for n in range(columns) for i in range(2)]
        top = greatest(own, highest[row])
        # a row that has seen no key yet: -inf - -inf would be NaN
        shift = select(top == -INFINITY, 0.0, top if shape.floating else top * scale)
        factor = power(shape, highest[row], shift, scale)
        highest[row], total[row] = top, total[row] * factor
        for n in range(columns):
            pair = [power(shape, score, shift, scale) for score in own[2 * n : 2 * n + 2]]
            total[row] = total[row] + (pair[0] + pair[1])
            weights[(m * columns + n) * 2 + half] = pack(*pair, shape.storage)
        for n in range(features if output else 0):
            for i in (2 * half, 2 * half + 1):
                index = (m * features + n) * 4 + i
                output[index] = output[index] * factor
    return tuple(weights), tuple(highest), tuple(total), tuple(output)


# -- values that are not finite ----------------------------------------------------------------------------------------


def has_odd(shape, stage, thread):
    """Whether any value of a tile is not finite."""
    own = second_tile(shape, stage) + thread % LANES * 16
    places = range(0, shape.tile_bytes, 16 * LANES)
    return any_not_finite(shape, (word for begin in places for word in load_shared(own + begin)))


def add_odd(shape, output, bits, stage, first, row, limits, first_query, mask, thread):
    """Add what is not finite of the value of one key, row `row` of the stage, to the queries that see it.

    `bits` is what `positive` says.
    """
    row = narrow(row)
    key = narrow(first) + row
    owner, bit = place_of_weight(row, thread)
    sees, factors = [], []
    for query, limit, word in zip(rows_of(shape, first_query, thread), limits, bits, strict=True):
        sees.append(look(shape, mask, query, key, key < limit)[0])
        factors.append(factor_of(word, owner, bit))
    return add_not_finite(shape, output, stage, row, sees, factors, thread)


# -- the result --------------------------------------------------------------------------------------------------------


def finish(shape, output, highest, total, scale, out, begin, step, lse, lse_begin, first, count, length, thread):
    """Divide by the sums of the weights, and store the rows and their log-sum-exp."""
    rows, count, length = rows_of(shape, first, thread), narrow(count), narrow(length)
    target, column = global_address(out, begin), thread % LANES % 4 * 2
    for r, row in enumerate(rows):
        sums = whole(total[r])
        # a sum of 0 with a key to look at is that of scores too large for base 2: NaN, as of infinite ones
        empty = (sums == 0.0) & (highest[r] == -INFINITY)
        inverse = reciprocal(sums)
        exists = row < count
        base = target + row * (step * HALF)
        for n in range(shape.feature_matrices):
            index = (r // 2 * shape.feature_matrices + n) * 4 + 2 * (r % 2)
            pair = [select(empty, 0.0, output[index + i] * inverse) for i in range(2)]
            where = column + 8 * n
            store_pair(base + where * HALF, pack(*pair, shape.storage), exists & (where < length))
        top = highest[r] if shape.floating else highest[r] * (scale * LN_2)
        value = select(empty, -INFINITY, top + log2(sums) * LN_2)
        store_float(global_address(lse, lse_begin) + row * FLOAT, value, exists & (thread % LANES % 4 == 0))
