"""Some queries and a vector of keys in the backward pass of additive attention: where the time goes.

With r = 1 / (1 + exp(2 query) exp(2 key)), tanh(query + key) is 1 - 2 r, and its derivative 4 r (1 - r). A score and
the gradients that come through it want the same r of all features, and between the two stands dS, which wants the whole
score. So r is computed once, and waits in the first-level cache:

    for each query:        terms[j][p] = -r, and the score of key j in lanes        terms_of, features in the lanes
    for each query:        P[j] and dS[j]                                           slopes_of, keys in the lanes
    for each query:        sums of dS · r (1 - r) and of dS · r                     spread, features in the lanes

As in the forward pass two features share a division. Which way a key goes, near or distant
(`fastattn.cpu.kernels.additive`), depends on its own row and the query's.
"""

from fastattn.cpu.kernels.additive import LOG2_E_TWICE, REACH_32, REACH_64, SATURATED, padded
from fastattn.cpu.kernels.functions import apply_along
from fastattn.cpu.kernels.masks import lowest, saturate
from fastattn.cpu.kernels.records import ADDITIVE_PLACES, QUERY_NUMBERS
from fastattn.cpu.kernels.scores import capped
from fastattn.cpu.kernels.softmax import MINUS_INFINITY, exp2
from fastattn.simd import (
    absolute,
    all_finite,
    all_zero,
    fma,
    jit,
    load_element,
    minimum,
    record_view,
    sum_rows,
    tile_fill,
    tile_iota,
    tile_load,
    tile_load_column,
    tile_repeat,
    tile_store,
    tile_transpose,
    where_greater,
)

places_view = record_view(ADDITIVE_PLACES)

LOG2_E = LOG2_E_TWICE / 2


@jit
def near_terms(shape, features, keys, row_bytes, query, factors, start, terms):
    """terms[j] = -r of one query and as many keys as the shape has rows; returns start + the scores, in lanes."""
    total = tile_repeat(shape, start)
    step = shape.vector_bytes
    for offset in range(0, features * shape.itemsize, 2 * step):
        after = offset + step
        a = fma(tile_load(shape, keys + offset, row_bytes), tile_load(shape.vector, query + offset, 0), 1.0)
        b = fma(tile_load(shape, keys + after, row_bytes), tile_load(shape.vector, query + after, 0), 1.0)
        both = -1.0 / (a * b)
        first, second = both * b, both * a
        tile_store(first, terms + offset, row_bytes)
        tile_store(second, terms + after, row_bytes)
        total = fma(first, tile_load(shape.vector, factors + offset, 0), total)
        total = fma(second, tile_load(shape.vector, factors + after, 0), total)
    return total


@jit
def distant_terms(kernel, features, key, query, factors, start, terms):
    """The same for one key, given both as they are: an exponential for each feature."""
    tile = kernel.tile
    total = start
    for offset in range(0, features * tile.itemsize, tile.vector_bytes):
        x = tile_load(tile.vector, key + offset, 0) + tile_load(tile.vector, query + offset, 0)
        term = -1.0 / (exp2(kernel, minimum(SATURATED, x * LOG2_E_TWICE)) + 1.0)
        tile_store(term, terms + offset, 0)
        total = fma(term, tile_load(tile.vector, factors + offset, 0), total)
    return total


@jit
def terms_of(kernel, places, features, row_bytes, i, j, start, terms, lanes):
    """terms = -r of query i and the vector of keys from j on; lanes: their scores, a row of lanes for each key."""
    tile = kernel.tile
    reach = REACH_32 if tile.itemsize == 4 else REACH_64
    reach = reach - load_element(tile, places.q_largest + i * tile.itemsize)
    q_raw, q_exp = places.q_raws + i * row_bytes, places.q_exps + i * row_bytes
    raws, exps = places.raws + j * row_bytes, places.exps + j * row_bytes
    largest, factors = places.largest + j * tile.itemsize, places.factors
    for _ in range(0, tile.lanes, tile.strip.rows):
        near = 0
        for r in range(tile.strip.rows):
            if load_element(tile, largest + r * tile.itemsize) <= reach:
                near += 1
        if near == tile.strip.rows:
            total = near_terms(tile.strip, features, exps, row_bytes, q_exp, factors, start, terms)
            tile_store(total, lanes, tile.vector_bytes)
        else:
            for r in range(tile.strip.rows):
                at, to = r * row_bytes, terms + r * row_bytes
                if load_element(tile, largest + r * tile.itemsize) <= reach:
                    one = near_terms(tile.vector, features, exps + at, row_bytes, q_exp, factors, start, to)
                else:
                    one = distant_terms(kernel, features, raws + at, q_raw, factors, start, to)
                tile_store(one, lanes + r * tile.vector_bytes, 0)
        largest += tile.strip.rows * tile.itemsize
        raws += tile.strip.rows * row_bytes
        exps += tile.strip.rows * row_bytes
        terms += tile.strip.rows * row_bytes
        lanes += tile.strip.rows * tile.vector_bytes


@jit
def clear_hidden(tile, hidden, terms, row_bytes):
    """Terms of 0 for keys that the query may not look at: 0 times what they hold would be NaN."""
    for _ in range(tile.lanes):
        if load_element(tile, hidden) == MINUS_INFINITY:
            for offset in range(0, row_bytes, tile.vector_bytes):
                tile_store(tile_fill(tile.vector, 0.0), terms + offset, 0)
        hidden += tile.itemsize
        terms += row_bytes


@jit
def slopes_of(
    kernel, plan, head, query, key, lanes, hidden, shift, row_sum, rest, weights, slopes, terms, row_bytes, distances
):
    """Make P of scores, over dO · value at `weights`, and -dS at `slopes`, which may be where `lanes` is; returns dS.

    The gradients of a mask and of captured arrays want another dS at `weights`, before the slope of a softcap; the
    latter also before that of the function, and at `slopes` the scores that this is given.

    `hidden` is what is added to the scores: -inf for a key that the query may not look at, and from here on for one
    that the user's function hides. P is 2 to the power of (score - shift) log2(e) - rest: the shift is usually the
    log-sum-exp, and the rest 0 (`fastattn.cpu.kernels.additive_sums`). `distances`, unless 0: where to add dS, before
    the slope of a softcap, times the positions between the query and the keys, which `away` is for the first.
    """
    tile = kernel.tile
    bias = tile_load(tile.vector, hidden, 0)
    score = sum_rows(tile_transpose(tile_load(tile.square, lanes, tile.vector_bytes)))
    odd = not all_finite(score)
    descent = tile_fill(tile.vector, 1.0)
    if "softcap" in kernel.steps and plan.softcap != 0.0:
        score, descent = capped(tile, plan, score)
    score = saturate(tile, score + bias)
    if "function" in kernel.steps:
        if kernel.work == "additive_captured_gradient":
            tile_store(score, slopes, 0)
        score, own_descent = apply_along(tile, head, score, bias, query, key)
        bias = where_greater(lowest(tile), score, MINUS_INFINITY, bias)
        tile_store(bias, hidden, 0)
    if odd:
        clear_hidden(tile, hidden, terms, row_bytes)
    # of a sum of exp(score) no score takes more than all of it
    weight = minimum(1.0, exp2(kernel, (score - shift) * LOG2_E - rest))
    slope = weight * (tile_load(tile.vector, weights, 0) - row_sum)
    if "function" in kernel.steps and kernel.work != "additive_captured_gradient":
        slope = slope * own_descent
    if kernel.work != "additive_backward":
        tile_store(where_greater(lowest(tile), bias, 0.0, slope), weights, 0)
        return slope
    if distances != 0:
        taken = where_greater(lowest(tile), bias, 0.0, slope)
        apart = absolute(tile_iota(tile.vector) - (head.offset + query - key) * 1.0)
        tile_store(fma(taken, apart, tile_load(tile.vector, distances, 0)), distances, 0)
    if "softcap" in kernel.steps:
        slope = slope * descent
    slope = where_greater(lowest(tile), bias, 0.0, slope)
    tile_store(where_greater(lowest(tile), bias, 0.0, weight), weights, 0)
    tile_store(slope * -1.0, slopes, 0)
    return slope


@jit
def spread(shape, features, terms, row_bytes, slopes, grad_keys, grad_query, grad_weight):
    """Add dS · r (1 - r) to the sums of a query and of as many keys as the shape has rows, dS · r to the weight's."""
    slope = tile_load_column(shape, slopes, shape.itemsize)
    for offset in range(0, features * shape.itemsize, shape.vector_bytes):
        term = tile_load(shape, terms + offset, row_bytes)
        along = term * slope
        inner = fma(along, term, along)
        tile_store(tile_load(shape, grad_keys + offset, row_bytes) + inner, grad_keys + offset, row_bytes)
        tile_store(tile_load(shape.vector, grad_query + offset, 0) + sum_rows(inner), grad_query + offset, 0)
        tile_store(tile_load(shape.vector, grad_weight + offset, 0) + sum_rows(along), grad_weight + offset, 0)


@jit
def looks_at_none(tile, hidden):
    """Whether a query may look at no key of a vector."""
    return all_zero(where_greater(lowest(tile), tile_load(tile.vector, hidden, 0), 0.0, 1.0))


@jit
def differentiate_vector(kernel, places, plan, head, first_query, first_key, queries, j):
    """All queries of a block and the vector of keys from j on; at a time, as many as there is room for terms of.

    `first_query` and `first_key` are the numbers of the blocks' first.
    """
    tile = kernel.tile
    features, row_bytes = plan.head_dim, padded(tile, plan.head_dim) * tile.itemsize
    weights_bytes = plan.key_block * tile.itemsize
    terms_bytes, lanes_bytes = tile.lanes * row_bytes, tile.lanes * tile.vector_bytes
    weights, hidden = places.weights + j * tile.itemsize, places.hidden + j * tile.itemsize
    start = tile_load(tile.vector, places.sums, 0)
    at_a_time = places.term_queries
    for first in range(0, queries, at_a_time):
        end = min(queries, first + at_a_time)
        terms, lanes = places.terms, places.lanes
        for i in range(first, end):
            if not looks_at_none(tile, hidden + i * weights_bytes):
                terms_of(kernel, places, features, row_bytes, i, j, start, terms, lanes)
            terms += terms_bytes
            lanes += lanes_bytes
        terms, lanes = places.terms, places.lanes
        for i in range(first, end):
            at = i * weights_bytes
            if looks_at_none(tile, hidden + at):
                tile_store(tile_fill(tile.vector, 0.0), weights + at, 0)
            else:
                numbers = places.numbers + i * QUERY_NUMBERS * tile.itemsize
                shift, row_sum = load_element(tile, numbers), load_element(tile, numbers + tile.itemsize)
                rest, here = load_element(tile, numbers + 3 * tile.itemsize), weights + at
                distances = places.distances + i * tile.vector_bytes if places.distances != 0 else 0
                slope = slopes_of(
                    kernel, plan, head, first_query + i, first_key + j, lanes, hidden + at, shift, row_sum, rest, here,
                    lanes, terms, row_bytes, distances,
                )  # fmt: skip
                tile_store(tile_load(tile.vector, places.slope_sums, 0) + slope, places.slope_sums, 0)
            terms += terms_bytes
            lanes += lanes_bytes
        terms, lanes = places.terms, places.lanes
        for i in range(first, end):
            if not looks_at_none(tile, hidden + i * weights_bytes):
                grad_query, grad_keys = places.grad_queries + i * row_bytes, places.grad_keys + j * row_bytes
                for r in range(0, tile.lanes, tile.strip.rows):
                    at, slopes = r * row_bytes, lanes + r * tile.itemsize
                    strip, to = terms + at, grad_keys + at
                    spread(tile.strip, features, strip, row_bytes, slopes, to, grad_query, places.grad_weight)
            terms += terms_bytes
            lanes += lanes_bytes
