"""The backward pass of additive attention, in one pass over queries, keys and features.

With t = tanh(query + key), P = exp(score - lse), the gradient dO of the result and dS = P · (dO · value - Σ dO · out),

    grad_query[i] = weight · Σ_j dS (1 - t²)        grad_value[j] = Σ_i P dO[i]
    grad_key[j]   = weight · Σ_i dS (1 - t²)        grad_weight   = Σ_ij dS t

As in the forward pass, t = 1 - 2 r with r = 1 / (1 + exp(2 query) exp(2 key)), so that 1 - t² = 4 r (1 - r). A score and
the gradients that come through it want the same r of all features, and between the two stands dS, which wants the whole
score. So one query meets one vector of keys at a time, and their r wait in the first-level cache:

    for each block of keys:
        slopes[i][j] = dO[i] · value[j]             the micro-kernel, keys in the lanes
        for each vector of keys:
            for each query:
                terms[j][p] = -r, score[j]          near_terms, features in the lanes
                P[j], dS[j]                         slopes_of, keys in the lanes
                sums of dS r, of dS r (1 - r)       spread, features in the lanes
        grad_value[j] += Σ_i P[i][j] · dO[i]        the micro-kernel, features in the lanes

All sums have one owner and one order. A head's queries and keys are cut into as many chunks each, n, by their numbers
alone, and the pass has n rounds: in round r, task c takes the queries of chunk c and the keys of chunk (r - c) mod n. So
no two tasks of a round write to the same rows, and every row is written to in the order of the rounds.

Which way a key goes, near or distant (see `fastattn.cpu.additive`), depends on its own row and the query's.
"""

from fastattn.cpu.additive import (
    LOG2_E_TWICE,
    REACH_32,
    REACH_64,
    SATURATED,
    copy_row,
    load_rows,
    padded,
)
from fastattn.cpu.forward import clear, visible_keys
from fastattn.cpu.layout import ADDITIVE_BACKWARD
from fastattn.cpu.masks import lowest, restrict, saturate
from fastattn.cpu.pack import pack_queries, unpack_rows
from fastattn.cpu.plan import LOG2_E
from fastattn.cpu.softmax import MINUS_INFINITY, exp2
from fastattn.cpu.tasks import locate
from fastattn.cpu.tiles import product
from fastattn.simd import (
    all_finite,
    all_zero,
    fma,
    jit,
    load_element,
    minimum,
    record_view,
    store_element,
    sum_rows,
    tile_fill,
    tile_load,
    tile_load_column,
    tile_repeat,
    tile_store,
    tile_transpose,
    where_greater,
)

backward_view = record_view(ADDITIVE_BACKWARD)

ROW_NUMBERS = 4  # of a query: the largest |query|, lse, Σ dO · out, and whether dO is finite


# -- what is known of a query and some keys ----------------------------------------------------------------------------


@jit
def near_terms(shape, features, keys, row_bytes, query, factors, start, terms):
    """terms = -r of one query and as many keys as the shape has rows; returns the scores, in lanes to be summed."""
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
def distant_terms(tile, features, key, query, factors, start, terms):
    """The same for one key, given both as they are: an exponential for each feature."""
    total = start
    for offset in range(0, features * tile.itemsize, tile.vector_bytes):
        x = tile_load(tile.vector, key + offset, 0) + tile_load(tile.vector, query + offset, 0)
        term = -1.0 / (exp2(tile, minimum(SATURATED, x * LOG2_E_TWICE)) + 1.0)
        tile_store(term, terms + offset, 0)
        total = fma(term, tile_load(tile.vector, factors + offset, 0), total)
    return total


@jit
def terms_of(tile, features, row_bytes, largest, raws, exps, q_largest, q_raw, q_exp, factors, start, terms, lanes):
    """terms[j] = -r of one query and a vector of keys; lanes[j]: their scores, in lanes to be summed."""
    reach = (REACH_32 if tile.itemsize == 4 else REACH_64) - q_largest
    strip = tile.strip.rows
    for j in range(0, tile.lanes, strip):
        near = 0
        for r in range(strip):
            if load_element(tile, largest + (j + r) * tile.itemsize) <= reach:
                near += 1
        if near == strip:
            total = near_terms(tile.strip, features, exps, row_bytes, q_exp, factors, start, terms)
            tile_store(total, lanes, tile.vector_bytes)
        else:
            for r in range(strip):
                offset = r * row_bytes
                if load_element(tile, largest + (j + r) * tile.itemsize) <= reach:
                    one = near_terms(
                        tile.vector, features, exps + offset, row_bytes, q_exp, factors, start, terms + offset
                    )
                else:
                    one = distant_terms(tile, features, raws + offset, q_raw, factors, start, terms + offset)
                tile_store(one, lanes + r * tile.vector_bytes, 0)
        raws += strip * row_bytes
        exps += strip * row_bytes
        terms += strip * row_bytes
        lanes += strip * tile.vector_bytes


@jit
def slopes_of(tile, lanes, hidden, lse, row_sum, weights, slopes, terms, row_bytes):
    """Turn scores of one query and a vector of keys into P, over dO · value at `weights`, and -dS at `slopes`.

    `hidden` is what is added to the scores: -inf for a key that the query may not look at, and whose terms become 0 if
    they are not finite. Returns dS.
    """
    bias = tile_load(tile.vector, hidden, 0)
    score = sum_rows(tile_transpose(tile_load(tile.square, lanes, tile.vector_bytes)))
    if not all_finite(score):
        for j in range(tile.lanes):
            if load_element(tile, hidden + j * tile.itemsize) == MINUS_INFINITY:
                for offset in range(0, row_bytes, tile.vector_bytes):
                    tile_store(tile_fill(tile.vector, 0.0), terms + j * row_bytes + offset, 0)
    # of a sum of exp(score) no score takes more than all of it
    weight = minimum(1.0, exp2(tile, (saturate(tile, score + bias) - lse) * LOG2_E))
    slope = weight * (tile_load(tile.vector, weights, 0) - row_sum)
    slope = where_greater(lowest(tile), bias, 0.0, slope)
    tile_store(where_greater(lowest(tile), bias, 0.0, weight), weights, 0)
    tile_store(slope * -1.0, slopes, 0)
    return slope


@jit
def spread(shape, features, terms, row_bytes, slopes, grad_keys, grad_query, grad_weight):
    """Add dS · r (1 - r) to the sums of a query and of as many keys as the shape has rows, and dS · r to the weight's."""
    slope = tile_load_column(shape, slopes, shape.itemsize)
    for offset in range(0, features * shape.itemsize, shape.vector_bytes):
        term = tile_load(shape, terms + offset, row_bytes)
        along = term * slope
        inner = fma(along, term, along)
        tile_store(tile_load(shape, grad_keys + offset, row_bytes) + inner, grad_keys + offset, row_bytes)
        tile_store(tile_load(shape.vector, grad_query + offset, 0) + sum_rows(inner), grad_query + offset, 0)
        tile_store(tile_load(shape.vector, grad_weight + offset, 0) + sum_rows(along), grad_weight + offset, 0)


# -- the products with values and with the gradient of the result ------------------------------------------------------


@jit
def product_with_values(tile, rows, row_bytes, queries, values, features, keys, target, target_bytes):
    """target[i][j] = rows[i] · value j; values are in blocks of one row of the tile, [j / width][p][j % width]."""
    zero = tile_fill(tile.single, 0.0)
    whole = queries - queries % tile.rows
    for _ in range(0, keys, tile.width):
        at, place = rows, target
        for _ in range(0, whole, tile.rows):
            acc = product(
                tile_repeat(tile, zero), at, row_bytes, tile.itemsize, values, tile.row_bytes, features
            )
            tile_store(acc, place, target_bytes)
            at += tile.rows * row_bytes
            place += tile.rows * target_bytes
        for _ in range(whole, queries):
            one = product(zero, at, row_bytes, tile.itemsize, values, tile.row_bytes, features)
            tile_store(one, place, 0)
            at += row_bytes
            place += target_bytes
        values += features * tile.row_bytes
        target += tile.row_bytes


@jit
def product_with_rows(tile, weights, weights_bytes, queries, rows, row_bytes, keys, grad_values):
    """grad_values[j] += Σ_i weights[i][j] · rows[i]; rows and gradients are `row_bytes` long."""
    for _ in range(0, keys, tile.rows):
        for offset in range(0, row_bytes - tile.row_bytes, tile.row_bytes):
            acc = tile_load(tile, grad_values + offset, row_bytes)
            acc = product(acc, weights, tile.itemsize, weights_bytes, rows + offset, row_bytes, queries)
            tile_store(acc, grad_values + offset, row_bytes)
        weights += tile.rows * tile.itemsize
        grad_values += tile.rows * row_bytes


@jit
def add_to_values(tile, plan, numbers, weights, hidden, weights_bytes, queries, rows, row_bytes, keys, grad_values):
    """The same, where 0 · NaN must not reach a key that a query may not look at: rows that are not finite go alone."""
    start = 0
    for i in range(queries + 1):
        if i < queries and load_element(tile, numbers + (i * ROW_NUMBERS + 3) * tile.itemsize) == 0.0:
            continue
        first, at = weights + start * weights_bytes, rows + start * row_bytes
        product_with_rows(tile, first, weights_bytes, i - start, at, row_bytes, keys, grad_values)
        start = i + 1
        if i == queries:
            break
        for j in range(keys):
            offset = i * weights_bytes + j * tile.itemsize
            if load_element(tile, hidden + offset) != MINUS_INFINITY:
                weight = load_element(tile, weights + offset)
                for p in range(plan.value_dim):
                    place = grad_values + j * row_bytes + p * tile.itemsize
                    element = load_element(tile, rows + i * row_bytes + p * tile.itemsize)
                    store_element(tile, place, load_element(tile, place) + weight * element)


# -- blocks ------------------------------------------------------------------------------------------------------------


@jit
def value_bytes(tile, plan):
    """Of a row of dO or of a gradient of values: whole rows of the tile, and one more, as no power of two would do."""
    return ((plan.value_dim + tile.width - 1) // tile.width + 1) * tile.row_bytes


@jit
def fill_row(tile, at, first, end, value):
    """at[first:end] = value."""
    for j in range(first, end):
        store_element(tile, at + j * tile.itemsize, value)


@jit
def load_upstream(tile, plan, grad_out, out, lse, present, largest, rows, numbers, room):
    """rows[i] = dO[i], padded with 0, and the numbers of each query."""
    row_bytes = value_bytes(tile, plan)
    length = row_bytes // tile.itemsize
    for i in range(present):
        copy_row(tile, grad_out, plan.out_column, plan.value_dim, length, rows)
        copy_row(tile, out, tile.itemsize, plan.value_dim, length, room)
        products, odd = tile_fill(tile.vector, 0.0), tile_fill(tile.vector, 0.0)
        for offset in range(0, row_bytes, tile.vector_bytes):
            row = tile_load(tile.vector, rows + offset, 0)
            products = fma(row, tile_load(tile.vector, room + offset, 0), products)
            odd = odd + row * 0.0
        tile_store(products, room, 0)
        total = load_element(tile, room)
        for lane in range(1, tile.lanes):
            total += load_element(tile, room + lane * tile.itemsize)
        store_element(tile, numbers, load_element(tile, largest + i * tile.itemsize))
        store_element(tile, numbers + tile.itemsize, load_element(tile, lse + i * tile.itemsize))
        store_element(tile, numbers + 2 * tile.itemsize, total)
        store_element(tile, numbers + 3 * tile.itemsize, 0.0 if all_zero(odd) else 1.0)
        grad_out += plan.out_row
        out += plan.value_dim * tile.itemsize
        rows += row_bytes
        numbers += ROW_NUMBERS * tile.itemsize


@jit
def load_weight(tile, plan, source, factors, sums):
    """factors[p] = 2 weight[p], padded with 0; sums: those of the weights, in lanes."""
    length = padded(tile, plan.head_dim)
    copy_row(tile, source, tile.itemsize, plan.head_dim, length, factors)
    total = tile_fill(tile.vector, 0.0)
    for offset in range(0, length * tile.itemsize, tile.vector_bytes):
        weight = tile_load(tile.vector, factors + offset, 0)
        total = total + weight
        tile_store(weight * 2.0, factors + offset, 0)
    tile_store(total, sums, 0)


@jit
def hide(tile, plan, mask, first_query, present, first_key, keys, lse, hidden, hidden_bytes, work):
    """hidden[i][j] = what is added to a score: the mask, -inf where the query may not look at the key.

    There are `keys` in the block, with those that fill the last row of the tile, at which nobody looks. Returns whether
    there is anything to look at.
    """
    ones, top, buffer = work, work + tile.row_bytes, work + 2 * tile.row_bytes
    scores = buffer + tile.buffer_bytes
    tile_store(tile_fill(tile.single, 1.0), ones, 0)
    clear(tile, top, 1)
    some = False
    for first in range(0, present, tile.width):
        masks = mask + first * plan.mask_row
        count, safe = visible_keys(tile, plan, first_query + first, first_key, masks)
        here = min(tile.width, present - first)
        if count > safe:
            position = plan.first_position + first_query + first
            masks += safe * plan.mask_column
            rest = count - safe
            clear(tile, scores, rest)
            restrict(tile, plan, scores, rest, masks, here, position, first_key + safe, top, buffer)
            unpack_rows(tile, scores, ones, hidden + safe * tile.itemsize, hidden_bytes, tile.itemsize, here, rest)
        for i in range(first, first + here):
            if load_element(tile, lse + i * tile.itemsize) == MINUS_INFINITY:  # whatever the scores, no weights
                fill_row(tile, hidden, 0, keys, MINUS_INFINITY)
            else:
                fill_row(tile, hidden, 0, safe, 0.0)
                fill_row(tile, hidden, count, keys, MINUS_INFINITY)
                some = some or count > 0
            hidden += hidden_bytes
    return some


@jit
def deliver(tile, source, source_bytes, factors, target, count, features, fresh):
    """target[i] = source[i] · 2 factors, or for `fresh` 0 += the same; without factors where these are at 0."""
    whole = features - features % tile.lanes
    for _ in range(count):
        for p in range(0, whole, tile.lanes):
            offset = p * tile.itemsize
            row = tile_load(tile.vector, source + offset, 0)
            if factors != 0:
                row = row * (tile_load(tile.vector, factors + offset, 0) * 2.0)
            if not fresh:
                row = row + tile_load(tile.vector, target + offset, 0)
            tile_store(row, target + offset, 0)
        for p in range(whole, features):
            offset = p * tile.itemsize
            element = load_element(tile, source + offset)
            if factors != 0:
                element = element * (load_element(tile, factors + offset) + load_element(tile, factors + offset))
            if not fresh:
                element = element + load_element(tile, target + offset)
            store_element(tile, target + offset, element)
        source += source_bytes
        target += features * tile.itemsize


@jit
def deliver_weight(tile, source, slopes, target, features, fresh):
    """The part of a task in grad_weight, Σ dS (1 - 2 r)."""
    total = load_element(tile, slopes)
    for lane in range(1, tile.lanes):
        total += load_element(tile, slopes + lane * tile.itemsize)
    for p in range(features):
        offset = p * tile.itemsize
        element = load_element(tile, source + offset)
        element = total - (element + element)
        if not fresh:
            element = element + load_element(tile, target + offset)
        store_element(tile, target + offset, element)


@jit
def differentiate_chunk(tile, call, plan, head, chunk, _, scratch):
    """One task: the queries of a chunk and the keys that are theirs in this round, of one head."""
    given = backward_view(call.out)
    features, value_dim, itemsize = plan.head_dim, plan.value_dim, tile.itemsize
    row_bytes, v_bytes = padded(tile, features) * itemsize, value_bytes(tile, plan)
    query_block, key_block = given.query_block, plan.key_block
    query, key, value, mask, grad_out = locate(call, plan, head)
    query += call.query
    key += call.key
    value += call.value
    mask += call.mask
    grad_out += given.grad_out
    query_start = chunk * given.query_blocks * query_block
    query_end = min(plan.queries, query_start + given.query_blocks * query_block)
    key_start = (given.round + plan.groups - chunk) % plan.groups * given.key_blocks * key_block
    key_end = min(plan.keys, key_start + given.key_blocks * key_block)

    # Of the weight; of a block of queries; of a block of keys; of both.
    factors = scratch
    grad_weight = factors + row_bytes
    sums = grad_weight + row_bytes
    slope_sums = sums + tile.vector_bytes
    slopes = slope_sums + tile.vector_bytes
    numbers = slopes + tile.vector_bytes
    q_largest = numbers + query_block * ROW_NUMBERS * itemsize
    q_raws = q_largest + (query_block + tile.lanes) * itemsize
    q_exps = q_raws + query_block * row_bytes
    grad_queries = q_exps + query_block * row_bytes
    rows = grad_queries + query_block * row_bytes
    largest = rows + query_block * v_bytes
    raws = largest + (key_block + tile.lanes) * itemsize
    exps = raws + key_block * row_bytes
    grad_keys = exps + key_block * row_bytes
    values = grad_keys + key_block * row_bytes
    grad_values = values + key_block * value_dim * itemsize
    weights_bytes = key_block * itemsize
    weights = grad_values + key_block * v_bytes
    hidden = weights + query_block * weights_bytes
    lanes = hidden + query_block * weights_bytes
    terms = lanes + tile.lanes * tile.vector_bytes
    work = terms + tile.lanes * row_bytes

    load_weight(tile, plan, call.weight, factors, sums)
    fill_row(tile, grad_weight, 0, row_bytes // itemsize, 0.0)
    fill_row(tile, slope_sums, 0, tile.lanes, 0.0)
    first_round = given.round == 0
    for first_query in range(query_start, max(query_end, query_start + 1), query_block):
        present = max(0, min(query_block, query_end - first_query))
        at = head * plan.queries + first_query
        lse = call.lse + at * itemsize
        source = query + first_query * plan.query_row
        load_rows(tile, source, plan.query_row, plan.query_column, present, features, q_raws, q_exps, q_largest)
        source, result = grad_out + first_query * plan.out_row, given.out + at * value_dim * itemsize
        load_upstream(tile, plan, source, result, lse, present, q_largest, rows, numbers, work)
        fill_row(tile, grad_queries, 0, present * (row_bytes // itemsize), 0.0)
        for first_key in range(key_start, key_end, key_block):
            count = min(key_block, key_end - first_key)
            filled = (count + tile.width - 1) // tile.width * tile.width
            masks = mask + first_query * plan.mask_row + first_key * plan.mask_column
            some = hide(
                tile, plan, masks, first_query, present, first_key, filled, lse, hidden, weights_bytes, work
            )
            fresh = first_round and first_query == query_start
            if not (some or fresh):
                continue
            fill_row(tile, grad_keys, 0, filled * (row_bytes // itemsize), 0.0)
            fill_row(tile, grad_values, 0, filled * (v_bytes // itemsize), 0.0)
            if some:
                source = key + first_key * plan.key_row
                load_rows(tile, source, plan.key_row, plan.key_column, count, features, raws, exps, largest)
                fill_row(tile, largest, count, filled, 0.0)
                fill_row(tile, exps + count * row_bytes, 0, (filled - count) * (row_bytes // itemsize), 0.0)
                source, at = value + first_key * plan.value_row, values
                for j in range(0, count, tile.width):
                    here = min(tile.width, count - j)
                    pack_queries(tile, at, source, plan.value_row, plan.value_column, here, value_dim, 1.0)
                    source += tile.width * plan.value_row
                    at += value_dim * tile.row_bytes
                product_with_values(tile, rows, v_bytes, present, values, value_dim, filled, weights, weights_bytes)
                for j in range(0, filled, tile.lanes):
                    differentiate_vector(
                        tile,
                        features,
                        row_bytes,
                        present,
                        numbers,
                        q_raws,
                        q_exps,
                        grad_queries,
                        largest + j * itemsize,
                        raws + j * row_bytes,
                        exps + j * row_bytes,
                        grad_keys + j * row_bytes,
                        factors,
                        sums,
                        grad_weight,
                        slope_sums,
                        slopes,
                        weights + j * itemsize,
                        hidden + j * itemsize,
                        weights_bytes,
                        lanes,
                        terms,
                    )
                add_to_values(
                    tile, plan, numbers, weights, hidden, weights_bytes, present, rows, v_bytes, filled, grad_values
                )
            at = head * plan.keys + first_key
            target = given.grad_key + at * features * itemsize
            deliver(tile, grad_keys, row_bytes, factors, target, count, features, fresh)
            target = given.grad_value + at * value_dim * itemsize
            deliver(tile, grad_values, v_bytes, 0, target, count, value_dim, fresh)
        target = given.grad_query + (head * plan.queries + first_query) * features * itemsize
        deliver(tile, grad_queries, row_bytes, factors, target, present, features, first_round)
    target = given.grad_weight + (head * plan.groups + chunk) * features * itemsize
    deliver_weight(tile, grad_weight, slope_sums, target, features, first_round)


@jit
def differentiate_vector(
    tile,
    features,
    row_bytes,
    queries,
    numbers,
    q_raws,
    q_exps,
    grad_queries,
    largest,
    raws,
    exps,
    grad_keys,
    factors,
    sums,
    grad_weight,
    slope_sums,
    slopes,
    weights,
    hidden,
    weights_bytes,
    lanes,
    terms,
):
    """All queries of a block and a vector of keys."""
    start = tile_load(tile.vector, sums, 0)
    for _ in range(queries):
        bias = tile_load(tile.vector, hidden, 0)
        if all_zero(where_greater(lowest(tile), bias, 0.0, 1.0)):
            tile_store(tile_fill(tile.vector, 0.0), weights, 0)
        else:
            q_largest = load_element(tile, numbers)
            lse = load_element(tile, numbers + tile.itemsize)
            row_sum = load_element(tile, numbers + 2 * tile.itemsize)
            terms_of(
                tile, features, row_bytes, largest, raws, exps, q_largest, q_raws, q_exps, factors, start, terms, lanes
            )
            slope = slopes_of(tile, lanes, hidden, lse, row_sum, weights, slopes, terms, row_bytes)
            tile_store(tile_load(tile.vector, slope_sums, 0) + slope, slope_sums, 0)
            for j in range(0, tile.lanes, tile.strip.rows):
                spread(
                    tile.strip,
                    features,
                    terms + j * row_bytes,
                    row_bytes,
                    slopes + j * tile.itemsize,
                    grad_keys + j * row_bytes,
                    grad_queries,
                    grad_weight,
                )
        numbers += ROW_NUMBERS * tile.itemsize
        q_raws += row_bytes
        q_exps += row_bytes
        grad_queries += row_bytes
        weights += weights_bytes
        hidden += weights_bytes
