"""The backward pass of additive attention, in one pass over queries and keys.

With t = tanh(query + key), P = exp(score - lse), the gradient dO of the result and dS = P · (dO · value - Σ dO · out),

    grad_query[i] = weight · Σ_j dS (1 - t²)        grad_value[j] = Σ_i P dO[i]
    grad_key[j]   = weight · Σ_i dS (1 - t²)        grad_weight   = Σ_ij dS t

A task takes the blocks of queries of a chunk through the blocks of keys of another:

    for each block of queries, and of keys:
        hidden[i][j]   = what is added to a score: the mask, -inf where it hides          hide
        weights[i][j]  = dO[i] · value[j]                                                 product_with_values
        weights[i][j]  = P, and sums of the other three gradients                         differentiate_vector
        grad_value[j] += Σ_i P[i][j] · dO[i]                                              add_to_values

All sums have one owner at a time, and one order. A head's queries and its keys are cut into n chunks each, by their
numbers alone (of keys, that of the head's own row of the batch), and the pass has n rounds: in round r, task c takes
the queries of chunk c and the keys of chunk (r - c) mod n. So no two tasks of a round write to the same rows, and each
row is written to in the order of the rounds; in the first, all are. A task waits for the two of the round before that
had its queries and its keys, c and c - 1 (`fastattn.cpu.kernels.stages`). As the last chunk of a round comes first,
these are the better part of a round before it, and hardly anybody waits.
"""

from fastattn.cpu.kernels.additive import copy_row, load_rows, padded, sum_of
from fastattn.cpu.kernels.additive_sums import absorb_keys, clear_states, store_sums, subtract_from_sums, take_sums
from fastattn.cpu.kernels.additive_terms import differentiate_vector, places_view
from fastattn.cpu.kernels.pack import clear, pack_queries, unpack_rows
from fastattn.cpu.kernels.records import ADDITIVE_BACKWARD, ADDITIVE_PLACES, QUERY_NUMBERS
from fastattn.cpu.kernels.score_rows import fill_row
from fastattn.cpu.kernels.scores import keys_of_block, restrict
from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.cpu.kernels.stages import finish, wait_for
from fastattn.cpu.kernels.sums import any_has_lost
from fastattn.cpu.kernels.tasks import call_view, locate, plan_view
from fastattn.cpu.kernels.tiles import product
from fastattn.simd import (
    all_zero,
    as_element,
    fma,
    jit,
    load_element,
    load_i64,
    record_view,
    store_element,
    sum_rows,
    tile_fill,
    tile_load,
    tile_repeat,
    tile_store,
    tile_transpose,
)

backward_view = record_view(ADDITIVE_BACKWARD)
WORD = 8
PLACES_BYTES = -(-ADDITIVE_PLACES.itemsize // 64) * 64


# -- working memory ----------------------------------------------------------------------------------------------------


@jit
def value_bytes(tile, plan):
    """Of a row of dO or of a gradient of values: whole rows of the tile, and one more, as no power of two would do."""
    return ((plan.value_dim + tile.width - 1) // tile.width + 1) * tile.row_bytes


@jit
def lay_out(tile, plan, given, scratch):
    """Say where in a task's working memory what is; `fastattn.cpu.host.additive_backward` says how much that is."""
    places = places_view(scratch)
    row_bytes, v_bytes = padded(tile, plan.head_dim) * tile.itemsize, value_bytes(tile, plan)
    queries, keys = given.query_block, plan.key_block
    at = scratch + PLACES_BYTES
    places.factors, at = at, at + row_bytes
    places.grad_weight, at = at, at + row_bytes
    places.sums, at = at, at + tile.vector_bytes
    places.slope_sums, at = at, at + tile.vector_bytes

    places.numbers, at = at, at + queries * QUERY_NUMBERS * tile.itemsize
    places.q_largest, at = at, at + (queries + tile.lanes) * tile.itemsize
    places.distances, at = at, at + queries * tile.vector_bytes
    places.q_raws, at = at, at + queries * row_bytes
    places.q_exps, at = at, at + queries * row_bytes
    places.grad_queries, at = at, at + queries * row_bytes
    places.rows, at = at, at + queries * v_bytes

    places.largest, at = at, at + (keys + tile.lanes) * tile.itemsize
    places.raws, at = at, at + keys * row_bytes
    places.exps, at = at, at + keys * row_bytes
    places.grad_keys, at = at, at + keys * row_bytes
    places.values, at = at, at + keys * v_bytes
    places.grad_values, at = at, at + keys * v_bytes

    if given.slope_sums == 0:
        places.distances = 0
    places.term_queries = given.term_queries
    places.weights, at = at, at + queries * keys * tile.itemsize
    places.hidden, at = at, at + queries * keys * tile.itemsize
    places.lanes, at = at, at + places.term_queries * tile.lanes * tile.vector_bytes
    places.terms, at = at, at + places.term_queries * tile.lanes * row_bytes
    places.work = at
    return places


@jit
def fill(tile, at, size, value):
    """Fill so many bytes, whole vectors of them."""
    vector = tile_fill(tile.vector, value)
    for offset in range(0, size, tile.vector_bytes):
        tile_store(vector, at + offset, 0)


# -- the weight, queries and keys --------------------------------------------------------------------------------------


@jit
def load_weight(tile, plan, places, source):
    """factors[p] = 2 weight[p], padded with 0; sums: those of the weights, in lanes."""
    length = padded(tile, plan.head_dim)
    copy_row(tile, source, tile.itemsize, plan.head_dim, length, places.factors)
    total = tile_fill(tile.vector, 0.0)
    for at in range(places.factors, places.factors + length * tile.itemsize, tile.vector_bytes):
        weight = tile_load(tile.vector, at, 0)
        total = total + weight
        tile_store(weight * 2.0, at, 0)
    tile_store(total, places.sums, 0)


@jit
def load_upstream(tile, plan, places, grad_out, out, lse, present):
    """rows[i] = dO[i], padded with 0; of each query: its lse, Σ dO · out, 1 where dO is not finite, and 0."""
    row_bytes = value_bytes(tile, plan)
    length = row_bytes // tile.itemsize
    room, rows, numbers = places.work, places.rows, places.numbers
    for i in range(present):
        copy_row(tile, grad_out, plan.out_column, plan.value_dim, length, rows)
        copy_row(tile, out, tile.itemsize, plan.value_dim, length, room)
        products, odd = tile_fill(tile.vector, 0.0), tile_fill(tile.vector, 0.0)
        for offset in range(0, row_bytes, tile.vector_bytes):
            row = tile_load(tile.vector, rows + offset, 0)
            products = fma(row, tile_load(tile.vector, room + offset, 0), products)
            odd = odd + row * 0.0
        tile_store(products, room, 0)
        store_element(tile, numbers, load_element(tile, lse + i * tile.itemsize))
        store_element(tile, numbers + tile.itemsize, sum_of(tile, room))
        store_element(tile, numbers + 2 * tile.itemsize, 0.0 if all_zero(odd) else 1.0)
        store_element(tile, numbers + 3 * tile.itemsize, 0.0)
        grad_out += plan.out_row
        out += plan.value_dim * tile.itemsize
        rows += row_bytes
        numbers += QUERY_NUMBERS * tile.itemsize


@jit
def load_keys(tile, plan, places, key, value, queries, count, filled):
    """A block of keys, with some at the end that are 0, and values, for many queries in blocks of a row of the tile."""
    row_bytes = padded(tile, plan.head_dim) * tile.itemsize
    exps, largest = places.exps, places.largest
    load_rows(tile, key, plan.key_row, plan.key_column, count, plan.head_dim, places.raws, exps, largest)
    fill_row(tile, largest, count, filled, 0.0)
    fill(tile, exps + count * row_bytes, (filled - count) * row_bytes, 0.0)
    at = places.values
    if values_stay_rows(tile, queries):
        row_bytes = value_bytes(tile, plan)
        for _ in range(count):
            copy_row(tile, value, plan.value_column, plan.value_dim, row_bytes // tile.itemsize, at)
            value += plan.value_row
            at += row_bytes
        fill(tile, at, (filled - count) * row_bytes, 0.0)
        return
    for j in range(0, count, tile.width):
        present = min(tile.width, count - j)
        pack_queries(tile, tile, at, value, plan.value_row, plan.value_column, present, plan.value_dim, 1.0)
        value += tile.width * plan.value_row
        at += plan.value_dim * tile.row_bytes


@jit
def values_stay_rows(tile, queries):
    """Whether there are too few queries to transpose values for."""
    return queries < tile.rows


@jit
def hide(kernel, plan, head, places, first_query, present, first_key, filled, lse):
    """hidden[i][j] = what is added to a score: the mask, or -inf. Returns whether there is anything to look at.

    Nobody looks at the keys behind the last, and a query whose lse is -inf at none.
    """
    tile = kernel.tile
    hidden_bytes = plan.key_block * tile.itemsize
    tile_store(tile_fill(tile.single, 1.0), places.work, 0)
    clear(tile, places.work + tile.row_bytes, 1)
    hidden, some = places.hidden, False
    for first in range(0, present, tile.width):
        part = keys_of_block(kernel, plan, head, first_query + first, first_key)
        here = min(tile.width, present - first)
        hide_edge(kernel, plan, head, places, hidden, first_query + first, here, first_key, part.begin, part.full)
        hide_edge(kernel, plan, head, places, hidden, first_query + first, here, first_key, part.full_end, part.end)
        for i in range(first, first + here):
            if load_element(tile, lse + i * tile.itemsize) == MINUS_INFINITY:
                fill(tile, hidden, filled * tile.itemsize, MINUS_INFINITY)
            else:
                fill_row(tile, hidden, 0, part.begin, MINUS_INFINITY)
                fill_row(tile, hidden, part.full, part.full_end, 0.0)
                fill_row(tile, hidden, part.end, filled, MINUS_INFINITY)
                some = some or part.end > part.begin
            hidden += hidden_bytes
    return some


@jit
def hide_edge(kernel, plan, head, places, hidden, first_query, present, first_key, begin, end):
    """The same for keys of a block that only some queries look at, of one tile width of queries."""
    tile = kernel.tile
    count, hidden_bytes = end - begin, plan.key_block * tile.itemsize
    if count <= 0:
        return
    ones, top, buffer = places.work, places.work + tile.row_bytes, places.work + 2 * tile.row_bytes
    scores = buffer + tile.buffer_bytes
    clear(tile, scores, count)
    restrict(kernel, plan, head, scores, count, first_query, first_key + begin, top, buffer)
    unpack_rows(tile, tile, scores, ones, hidden + begin * tile.itemsize, hidden_bytes, tile.itemsize, present, count)


# -- the products with values and with the gradient of the result ------------------------------------------------------


@jit
def product_with_values(tile, plan, places, queries, keys):
    """weights[i][j] = dO[i] · value[j]."""
    features, row_bytes, weights_bytes = plan.value_dim, value_bytes(tile, plan), plan.key_block * tile.itemsize
    values, target = places.values, places.weights
    zero = tile_fill(tile.single, 0.0)
    whole = queries - queries % tile.rows
    for _ in range(0, keys, tile.width):
        at, place = places.rows, target
        for _ in range(0, whole, tile.rows):
            acc = product(tile_repeat(tile, zero), at, row_bytes, tile.itemsize, values, tile.row_bytes, features)
            tile_store(acc, place, weights_bytes)
            at += tile.rows * row_bytes
            place += tile.rows * weights_bytes
        for _ in range(whole, queries):
            one = product(zero, at, row_bytes, tile.itemsize, values, tile.row_bytes, features)
            tile_store(one, place, 0)
            at += row_bytes
            place += weights_bytes
        values += features * tile.row_bytes
        target += tile.row_bytes


@jit
def sums_with_values(tile, plan, places, queries, keys):
    """The same with features in the lanes, for few queries, and rows of values."""
    row_bytes, weights_bytes = value_bytes(tile, plan), plan.key_block * tile.itemsize
    strip = tile.strip.rows
    for i in range(queries):
        row, values, target = places.rows + i * row_bytes, places.values, places.weights + i * weights_bytes
        for _ in range(0, keys, tile.lanes):
            for r in range(0, tile.lanes, strip):
                total = tile_fill(tile.strip, 0.0)
                for offset in range(0, row_bytes - tile.row_bytes, tile.vector_bytes):
                    value = tile_load(tile.strip, values + offset, row_bytes)
                    total = fma(value, tile_load(tile.vector, row + offset, 0), total)
                tile_store(total, places.lanes + r * tile.vector_bytes, tile.vector_bytes)
                values += strip * row_bytes
            square = tile_load(tile.square, places.lanes, tile.vector_bytes)
            tile_store(sum_rows(tile_transpose(square)), target, 0)
            target += tile.vector_bytes


@jit
def product_with_rows(tile, plan, weights, queries, rows, keys, grad_values):
    """grad_values[j] += Σ_i weights[i][j] · rows[i]."""
    row_bytes, weights_bytes = value_bytes(tile, plan), plan.key_block * tile.itemsize
    for _ in range(0, keys, tile.rows):
        for offset in range(0, row_bytes - tile.row_bytes, tile.row_bytes):
            acc = tile_load(tile, grad_values + offset, row_bytes)
            acc = product(acc, weights, tile.itemsize, weights_bytes, rows + offset, row_bytes, queries)
            tile_store(acc, grad_values + offset, row_bytes)
        weights += tile.rows * tile.itemsize
        grad_values += tile.rows * row_bytes


@jit
def add_to_values(tile, plan, places, queries, keys):
    """grad_values[j] += Σ_i P[i][j] · dO[i] over the queries that may look at key j, whatever dO is of the others."""
    row_bytes, weights_bytes = value_bytes(tile, plan), plan.key_block * tile.itemsize
    start = 0
    for i in range(queries + 1):  # rows that are finite go together, in between the others
        if i < queries and load_element(tile, places.numbers + (i * QUERY_NUMBERS + 2) * tile.itemsize) == 0.0:
            continue
        weights, rows = places.weights + start * weights_bytes, places.rows + start * row_bytes
        product_with_rows(tile, plan, weights, i - start, rows, keys, places.grad_values)
        start = i + 1
        if i == queries:
            break
        for j in range(keys):
            offset = i * weights_bytes + j * tile.itemsize
            if load_element(tile, places.hidden + offset) != MINUS_INFINITY:
                weight = load_element(tile, places.weights + offset)
                for p in range(plan.value_dim):
                    place = places.grad_values + j * row_bytes + p * tile.itemsize
                    element = load_element(tile, places.rows + i * row_bytes + p * tile.itemsize)
                    store_element(tile, place, load_element(tile, place) + weight * element)


# -- results -----------------------------------------------------------------------------------------------------------


@jit
def deliver(tile, rows, row_bytes, factors, target, count, features, fresh):
    """target[j] += rows[j] · 2 factors (nothing for factors at 0); = where nothing has been written yet."""
    whole = features - features % tile.lanes
    for _ in range(count):
        for offset in range(0, whole * tile.itemsize, tile.vector_bytes):
            row = tile_load(tile.vector, rows + offset, 0)
            if factors != 0:
                row = row * (tile_load(tile.vector, factors + offset, 0) * 2.0)
            if not fresh:
                row = row + tile_load(tile.vector, target + offset, 0)
            tile_store(row, target + offset, 0)
        for offset in range(whole * tile.itemsize, features * tile.itemsize, tile.itemsize):
            element = load_element(tile, rows + offset)
            if factors != 0:
                element = as_element(tile, element * (load_element(tile, factors + offset) * 2.0))
            store_element(tile, target + offset, element if fresh else element + load_element(tile, target + offset))
        rows += row_bytes
        target += features * tile.itemsize


@jit
def deliver_weight(tile, places, target, features, fresh):
    """The part of a task in grad_weight, Σ dS (1 - 2 r)."""
    total = sum_of(tile, places.slope_sums)
    for offset in range(0, features * tile.itemsize, tile.itemsize):
        element = total - load_element(tile, places.grad_weight + offset) * 2.0
        store_element(tile, target + offset, element if fresh else element + load_element(tile, target + offset))


@jit
def deliver_distances(tile, places, target, queries):
    """The part of a task in what slopes of ALiBi get from each query, which begins at 0."""
    for i in range(queries):
        at = target + i * tile.itemsize
        store_element(tile, at, load_element(tile, at) + sum_of(tile, places.distances + i * tile.vector_bytes))


# -- a task ------------------------------------------------------------------------------------------------------------


@jit
def find_sums(kernel, plan, given, head, places, first_query, queries, lse, sums, sink_weights):
    """Form the sums of those queries of a block whose lse has lost digits, over all keys."""
    tile = kernel.tile
    clear_states(tile, plan, places, queries)
    for first_key in range(0, head.keys, plan.key_block):
        count = min(plan.key_block, head.keys - first_key)
        filled = (count + tile.width - 1) // tile.width * tile.width
        if hide(kernel, plan, head, places, first_query, queries, first_key, filled, lse):
            absorb_keys(kernel, plan, given, head, places, first_query, first_key, lse, queries, count, filled)
    store_sums(kernel, plan, given, head, places, lse, queries, sums, sink_weights)


@jit
def load_block(tile, plan, head, places, first_key, queries, count, filled):
    """Lay out a block of keys for the queries that meet it, and weights[i][j] = dO[i] · value[j]."""
    key, value = head.key + first_key * plan.key_row, head.value + first_key * plan.value_row
    load_keys(tile, plan, places, key, value, queries, count, filled)
    if values_stay_rows(tile, queries):
        sums_with_values(tile, plan, places, queries, filled)
    else:
        product_with_values(tile, plan, places, queries, filled)


@jit
def differentiate_block(kernel, plan, head, places, first_query, first_key, queries, count, filled):
    """All that a block of queries and one of keys, where there is anything to look at, have to do with each other."""
    tile = kernel.tile
    load_block(tile, plan, head, places, first_key, queries, count, filled)
    for j in range(0, filled, tile.lanes):
        differentiate_vector(kernel, places, plan, head, first_query, first_key, queries, j)
    add_to_values(tile, plan, places, queries, filled)


@jit
def begin_queries(kernel, call, plan, given, head, number, places, first, queries, first_round):
    """Lay out a block of queries, with what arrives at them; in the first round form the sums that an lse has lost."""
    tile = kernel.tile
    row = number * plan.queries + first
    lse = call.lse + row * tile.itemsize
    source, exps, largest = head.query + first * plan.query_row, places.q_exps, places.q_largest
    load_rows(tile, source, plan.query_row, plan.query_column, queries, plan.head_dim, places.q_raws, exps, largest)
    out = given.out + row * plan.value_dim * tile.itemsize
    grad_out = given.grad_out + (head.out - call.out) + first * plan.out_row
    load_upstream(tile, plan, places, grad_out, out, lse, queries)
    if given.grad_lse != 0:
        subtract_from_sums(tile, places.numbers, given.grad_lse + row * tile.itemsize, queries)
    if any_has_lost(tile, given, lse, queries):
        sums = given.sums + 2 * row * tile.itemsize
        if first_round:
            sink_weights = given.sink_weights + row * tile.itemsize if given.sink_weights != 0 else 0
            find_sums(kernel, plan, given, head, places, first, queries, lse, sums, sink_weights)
        take_sums(tile, given, places, lse, queries, sums)
    fill(tile, places.grad_queries, queries * padded(tile, plan.head_dim) * tile.itemsize, 0.0)
    if given.slope_sums != 0:
        fill(tile, places.distances, queries * tile.vector_bytes, 0.0)


@jit
def meet(kernel, call, plan, given, head, number, places, first, queries, first_key, count, fresh):
    """Take a block of queries and one of keys together, and add to the gradients of the keys."""
    tile = kernel.tile
    row_bytes, v_bytes = padded(tile, plan.head_dim) * tile.itemsize, value_bytes(tile, plan)
    lse = call.lse + (number * plan.queries + first) * tile.itemsize
    filled = (count + tile.width - 1) // tile.width * tile.width
    some = hide(kernel, plan, head, places, first, queries, first_key, filled, lse)
    if not (some or fresh):
        return
    fill(tile, places.grad_keys, filled * row_bytes, 0.0)
    fill(tile, places.grad_values, filled * v_bytes, 0.0)
    if some:
        differentiate_block(kernel, plan, head, places, first, first_key, queries, count, filled)
    row = number * plan.keys + first_key
    target = given.grad_key + row * plan.head_dim * tile.itemsize
    deliver(tile, places.grad_keys, row_bytes, places.factors, target, count, plan.head_dim, fresh)
    target = given.grad_value + row * plan.value_dim * tile.itemsize
    deliver(tile, places.grad_values, v_bytes, 0, target, count, plan.value_dim, fresh)


@jit
def cut_of(plan, given, number):
    """How many chunks a head is cut into; how many blocks of queries, and of keys, are a chunk."""
    if given.cuts == 0:
        return plan.groups, given.query_blocks, given.key_blocks
    at = given.cuts + number // plan.heads * 3 * WORD
    return load_i64(at), load_i64(at + WORD), load_i64(at + 2 * WORD)


@jit
def differentiate_chunk(kernel, call, plan, number, r, chunk, scratch):
    """One task: the queries of a chunk and the keys that are theirs in round r, of one head."""
    tile = kernel.tile
    given = backward_view(call.out)
    chunks, query_blocks, key_blocks = cut_of(plan, given, number)
    if chunk >= chunks or r >= chunks:
        return
    places = lay_out(tile, plan, given, scratch)
    row_bytes, features_bytes = padded(tile, plan.head_dim) * tile.itemsize, plan.head_dim * tile.itemsize
    head = locate(call, plan, number)
    query_start = chunk * query_blocks * given.query_block
    query_end = min(plan.queries, query_start + query_blocks * given.query_block)
    key_start = (r + chunks - chunk) % chunks * key_blocks * plan.key_block
    key_end = min(head.keys, key_start + key_blocks * plan.key_block)
    first_round = r == 0
    turns = given.turns + number * plan.groups * WORD

    wait_for(turns + chunk * WORD, r)
    wait_for(turns + (chunk + chunks - 1) % chunks * WORD, r)
    load_weight(tile, plan, places, call.weight)
    fill(tile, places.grad_weight, row_bytes, 0.0)
    fill(tile, places.slope_sums, tile.vector_bytes, 0.0)
    # Chunks at the end may have no queries: in the first round their keys want zeros all the same.
    for first in range(query_start, max(query_end, query_start + 1), given.query_block):
        queries = max(0, min(given.query_block, query_end - first))
        fresh = first_round and first == query_start
        begin_queries(kernel, call, plan, given, head, number, places, first, queries, first_round)
        for first_key in range(key_start, key_end, plan.key_block):
            count = min(plan.key_block, key_end - first_key)
            meet(kernel, call, plan, given, head, number, places, first, queries, first_key, count, fresh)
        target = given.grad_query + (number * plan.queries + first) * features_bytes
        deliver(tile, places.grad_queries, row_bytes, places.factors, target, queries, plan.head_dim, first_round)
        if given.slope_sums != 0:
            deliver_distances(tile, places, given.slope_sums + (number * plan.queries + first) * tile.itemsize, queries)
    target = given.grad_weight + (number * plan.groups + chunk) * features_bytes
    deliver_weight(tile, places, target, plan.head_dim, first_round)
    finish(turns + chunk * WORD)


def task_function(kernel):
    """The task function of the kernel: round by round, the last chunk first, of one head after the other."""

    @jit
    def task(call_at, slot, number):
        call = call_view(call_at)
        plan = plan_view(call.plan)
        chunks = plan.groups
        heads = plan.tasks // (chunks * chunks)
        head, number = number % heads, number // heads
        scratch = call.scratch + slot * plan.scratch_bytes
        differentiate_chunk(kernel, call, plan, head, number // chunks, chunks - 1 - number % chunks, scratch)

    return task
