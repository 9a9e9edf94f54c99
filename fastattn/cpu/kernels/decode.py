"""The forward pass of few queries: features in the lanes, keys cut into pieces, whose results are merged in order.

With one query, or some, there is hardly anything to compute for a key: what counts is how fast keys and values arrive.
So all rows that look at the same keys, the queries of a group of heads, are computed together, and each key and value
is read once. Long sequences are work for several tasks, as in Flash-Decoding (Dao, Haziza, Massa and Sizov 2023):

    for each piece of the keys:
        scores[r][j] = q[r] · key[j]              q[r][p]: the rows, times scale · log2(e)
        m[r]         = max_j scores[r][j]
        scores[r][j] = 2^(scores[r][j] - m[r])    l[r] = Σ_j scores[r][j]
        sums[r][p]   = Σ_j scores[r][j] · value[j][p]
    for each piece, in order:                     by whoever has done the last one
        m, l and sums of all pieces so far, and of this one, are merged

A piece is so many keys, and where the first begins is fixed, however many there are: a row's result depends on its own
keys alone, not on the arrays they lie in, on the rows beside it or on how tasks are cut. What a piece leaves is a
*partial*: m, l and sums. A head that is one task merges each as it comes; otherwise they are in memory until then.

Row r of a group of heads is query r % Lq of the group's head r // Lq.
"""

import math
from collections import namedtuple

from fastattn.cpu.kernels.blocks import are_finite
from fastattn.cpu.kernels.dropout import numbers_of_head
from fastattn.cpu.kernels.forward import may_hide
from fastattn.cpu.kernels.functions import has_score_function
from fastattn.cpu.kernels.masks import lowest
from fastattn.cpu.kernels.pack import copy_as_they_lie, copy_rows
from fastattn.cpu.kernels.pages import behind_gathered, foreseen, with_rows
from fastattn.cpu.kernels.prefetch import NOTHING, list_memory
from fastattn.cpu.kernels.row_keys import score_rows, want_values, words_of
from fastattn.cpu.kernels.row_values import add_values, round_weights, values_at_once, want_keys
from fastattn.cpu.kernels.score_rows import keys_of_row, restrict_row
from fastattn.cpu.kernels.scores import Part, keys_of_queries, sees
from fastattn.cpu.kernels.sinks import LN_2, log_sum, sink_of, term_of
from fastattn.cpu.kernels.softmax import MINUS_INFINITY, exp2
from fastattn.cpu.kernels.stages import finish
from fastattn.cpu.kernels.tasks import call_view, locate, plan_view
from fastattn.simd import (
    all_finite,
    as_element,
    fma,
    inline,
    jit,
    keep_rows,
    largest_lane,
    load_element,
    load_u8,
    maximum,
    store_element,
    store_stored,
    sum_lanes,
    tile_fill,
    tile_load,
    tile_load_part,
    tile_scale_pairs,
    tile_store,
    tile_store_stored,
    where_greater,
)

WORD = 8

# Rows of a group of heads that a task has: the number of the first head and where that is, the first row, how many.
Rows = namedtuple("Rows", "number head first count")
# Where a task has what in its working memory.
Room = namedtuple("Room", "queries scores partial state factors buffer rows")
# Keys of a piece that any row looks at: the first, how many, and whether each row looks at all of them.
Piece = namedtuple("Piece", "first count all")
# Keys that will be wanted next: where they are, and how many.
Ahead = namedtuple("Ahead", "keys count")


@jit
def lay_out(kernel, plan, scratch):
    """Say where in working memory things are."""
    tile = kernel.tile
    scores = scratch + (plan.group + 1) * plan.query_bytes  # a row may be added to three
    partial = scores + (plan.group + 1) * plan.score_bytes
    state = partial + plan.partial_bytes
    factors = state + plan.partial_bytes
    buffer = factors + 2 * plan.row_numbers * tile.itemsize
    return Room(scratch, scores, partial, state, factors, buffer, buffer + tile.buffer_bytes)


@jit
def head_of(call, plan, rows, r):
    """The head that a row belongs to."""
    if plan.group_heads == 1:
        return rows.head
    return locate(call, plan, rows.number + (rows.first + r) // plan.queries)


# -- scores ------------------------------------------------------------------------------------------------------------


@inline
def scaled(kernel, part, scale):
    """Some features of a query, times the scale, of pairs a power of two."""
    if kernel.reads == "pairs":
        return tile_scale_pairs(part, scale)
    return part * scale


@jit
def load_queries(kernel, call, plan, rows, target):
    """target[r][p] = feature p of row r, times the scale; 0 behind the last feature, and in one row behind the last."""
    tile, features, column = kernel.tile, words_of(kernel, plan.head_dim), plan.query_column
    for r in range(rows.count):
        source = head_of(call, plan, rows, r).query + (rows.first + r) % plan.queries * plan.query_row
        if kernel.reads == "pairs":
            if column != kernel.itemsize:
                copy_as_they_lie(kernel, target, 0, source, 0, column, 1, plan.head_dim)
                source = target
        elif kernel.query_place.storage != tile.dtype or column != tile.itemsize:
            copy_rows(kernel.query_place, tile, target, 0, source, 0, column, 1, features)
            source = target
        for p in range(0, features, tile.lanes):
            offset = p * tile.itemsize
            part = tile_load_part(tile.vector, source + offset, 0, 1, min(tile.lanes, features - p))
            tile_store(scaled(kernel, part, plan.scale), target + offset, 0)
        target += plan.query_bytes
    clear_rows(tile, target, target + plan.query_bytes)


@jit
def restrict_rows(kernel, call, plan, rows, piece, scores, buffer):
    """Apply what happens to the scores of a piece."""
    tile = kernel.tile
    filled = (piece.count + tile.lanes - 1) // tile.lanes * tile.lanes
    for r in range(rows.count):
        begin, end, query, head = 0, piece.count, (rows.first + r) % plan.queries, rows.head
        if "mask" in kernel.steps:  # and functions, whose empty blocks may be a head's own
            head = head_of(call, plan, rows, r)
        if not piece.all:
            begin, end = keys_of_row(kernel, plan, head, query, piece.first, piece.first + piece.count)
        restrict_row(kernel, plan, head, scores, begin, end, filled, query, piece.first, buffer)
        scores += plan.score_bytes


# -- weights and values ------------------------------------------------------------------------------------------------


@inline
def to_base_2(kernel, plan):
    """What differences of scores are multiplied by to be exponents."""
    return plan.to_base_2 if "mask" in kernel.steps or kernel.reads == "pairs" else 1.0


@jit
def exponentials(kernel, plan, scores, count):
    """Turn a row of scores into weights; their maximum, and the sum of the weights. Hidden keys have a weight of -0."""
    tile = kernel.tile
    end = scores + count * tile.itemsize
    best, total = tile_fill(tile.vector, MINUS_INFINITY), tile_fill(tile.vector, 0.0)
    for at in range(scores, end, tile.vector_bytes):
        best = maximum(tile_load(tile.vector, at, 0), best)
    m = largest_lane(best)
    shift = m if m != MINUS_INFINITY else 0.0
    factor = to_base_2(kernel, plan)
    for at in range(scores, end, tile.vector_bytes):
        score = tile_load(tile.vector, at, 0)
        weights = exp2(kernel, (score - shift) * factor)
        total = total + weights
        if "function" in kernel.steps:
            weights = where_greater(lowest(tile), score, -0.0, weights)
        tile_store(weights, at, 0)
    return m, sum_lanes(total)


@jit
def drop_row(tile, plan, call, weights, count, number, query, first_key, buffer):
    """Set to 0 what dropout takes from a row of weights; the row is filled to a multiple of four keys."""
    batch, head = numbers_of_head(call, plan, number)
    query, first_key = plan.first_query + query, plan.first_key + first_key
    for j in range(-(first_key % 4), count, 4):
        keep = keep_rows(tile.lane, (first_key + j) // 4, query, head, batch, call.seed, plan.drop_below)
        tile_store(keep, buffer, tile.itemsize)
        for i in range(max(0, -j), min(4, count - j)):
            at = weights + (j + i) * tile.itemsize
            store_element(tile, at, load_element(tile, at) * load_element(tile, buffer + i * tile.itemsize))


@jit
def weigh_rows(kernel, call, plan, rows, piece, room, partial):
    """Turn the scores of a piece into weights; m and l of all rows are the first of a partial."""
    tile = kernel.tile
    filled = (piece.count + tile.lanes - 1) // tile.lanes * tile.lanes
    l_at, scores = partial + plan.row_numbers * tile.itemsize, room.scores
    for r in range(rows.count):
        m, total = exponentials(kernel, plan, scores, filled)
        store_element(tile, partial + r * tile.itemsize, m)
        store_element(tile, l_at + r * tile.itemsize, total)
        if "dropout" in kernel.steps and plan.drop_below > 0:
            a = rows.first + r
            number, query = rows.number + a // plan.queries, a % plan.queries
            drop_row(tile, plan, call, scores, piece.count, number, query, piece.first, room.buffer)
        if kernel.value_place.pairs_of_rows:
            round_weights(tile, plan, scores, piece, filled)
        scores += plan.score_bytes


@jit
def looks(kernel, call, plan, rows, r, piece, j, weights):
    """Whether a row, which has these weights, looks at a key of a piece."""
    if "function" in kernel.steps and has_score_function(rows.head):
        weight = load_element(kernel.tile, weights + j * kernel.tile.itemsize)
        return weight != 0.0 or 1.0 / weight > 0.0
    query = (rows.first + r) % plan.queries
    return sees(kernel, plan, head_of(call, plan, rows, r), query, piece.first + j)


@jit
def add_visible_values(kernel, call, plan, rows, piece, weights, value, sums, buffer):
    """`add_values` where values are not finite, and rows may not look at some of them: 0 · NaN must not reach these."""
    source, at_once = rows.head.value + piece.first * plan.value_row, values_at_once(kernel.value_place)
    done, j = 0, 0
    while j < piece.count:
        if are_finite(kernel, plan, source + j * plan.value_row, 1):
            j += 1
            continue
        begin = j - (piece.first + j) % at_once
        begin, end = max(0, begin), min(piece.count, begin + at_once)
        add_values(kernel, plan, rows.count, rows.count, piece, weights, done, begin, value, sums, buffer, NOTHING)
        for r in range(rows.count):
            add_seen_values(kernel, call, plan, rows, r, piece, weights, begin, end, value, sums, buffer)
        done, j = end, end
    add_values(kernel, plan, rows.count, rows.count, piece, weights, done, piece.count, value, sums, buffer, NOTHING)


@jit
def add_seen_values(kernel, call, plan, rows, r, piece, weights, begin, end, value, sums, buffer):
    """The same for one row and one key, or two."""
    weights, sums = weights + r * plan.score_bytes, sums + r * plan.sum_bytes
    while begin < end and not looks(kernel, call, plan, rows, r, piece, begin, weights):
        begin += 1
    while begin < end and not looks(kernel, call, plan, rows, r, piece, end - 1, weights):
        end -= 1
    add_values(kernel, plan, rows.count, 1, piece, weights, begin, end, value, sums, buffer, NOTHING)


@jit
def are_sums_finite(tile, plan, rows, sums):
    """Whether the sums of all rows are finite."""
    for at in range(sums, sums + rows.count * plan.sum_bytes, tile.vector_bytes):
        if not all_finite(tile_load(tile.vector, at, 0)):
            return False
    return True


# -- pieces of the keys ------------------------------------------------------------------------------------------------


@jit
def clear(tile, plan, partial):
    """Make a partial that of no keys."""
    l_at = partial + plan.row_numbers * tile.itemsize
    for at in range(partial, l_at, tile.vector_bytes):
        tile_store(tile_fill(tile.vector, MINUS_INFINITY), at, 0)
    clear_rows(tile, l_at, partial + plan.partial_bytes)


@jit
def clear_rows(tile, begin, end):
    """Fill whole vectors with 0."""
    for at in range(begin, end, tile.vector_bytes):
        tile_store(tile_fill(tile.vector, 0.0), at, 0)


@jit
def sums_of(tile, plan, partial):
    """Where the sums of a partial are, behind m and l."""
    return partial + 2 * plan.row_numbers * tile.itemsize


@jit
def attend(kernel, call, plan, rows, piece, room, partial, ahead):
    """Take all rows through a piece of the keys, which leaves a partial. Those `ahead` will be wanted next."""
    tile = kernel.tile
    keys, values = rows.head.key + piece.first * plan.key_row, rows.head.value + piece.first * plan.value_row
    wanted = list_memory()
    want_values(kernel, plan, rows.count, piece.count, values, wanted)
    clear(tile, plan, partial)
    if plan.key_bytes > 0 and kernel.storage != "int8":
        row, column = plan.key_row, plan.key_column
        copy_as_they_lie(kernel, room.rows, plan.key_step, keys, row, column, piece.count, plan.head_dim)
        keys = room.rows
    score_rows(kernel, plan, rows.count, room.queries, keys, piece.count, room.scores, room.rows, wanted)
    restrict_rows(kernel, call, plan, rows, piece, room.scores, room.buffer)
    weigh_rows(kernel, call, plan, rows, piece, room, partial)
    sums = sums_of(tile, plan, partial)
    if plan.value_bytes > 0 and kernel.value_place.storage != "int8":
        place, row, column = kernel.value_place, plan.value_row, plan.value_column
        copy_as_they_lie(place, room.rows, plan.value_step, values, row, column, piece.count, plan.value_dim)
        values = room.rows
    want_keys(kernel, plan, rows.count, ahead.count, ahead.keys, wanted)
    weights, end = room.scores, piece.count
    add_values(kernel, plan, rows.count, rows.count, piece, weights, 0, end, values, sums, room.rows, wanted)
    if may_hide(kernel, plan) and not are_sums_finite(tile, plan, rows, sums):
        clear_rows(tile, sums, sums + rows.count * plan.sum_bytes)
        add_visible_values(kernel, call, plan, rows, piece, room.scores, values, sums, room.rows)


@jit
def merge(kernel, plan, rows, state, factors, partial):
    """Add a partial to the state of all rows, which is one as well."""
    tile = kernel.tile
    numbers = plan.row_numbers * tile.itemsize
    factor = to_base_2(kernel, plan)
    for offset in range(0, numbers, tile.vector_bytes):
        m, other_m = tile_load(tile.vector, state + offset, 0), tile_load(tile.vector, partial + offset, 0)
        best = maximum(m, other_m)
        shift = where_greater(best, MINUS_INFINITY, best, 0.0)
        own, other = exp2(kernel, (m - shift) * factor), exp2(kernel, (other_m - shift) * factor)
        l_at = offset + numbers
        total = tile_load(tile.vector, state + l_at, 0) * own
        tile_store(best, state + offset, 0)
        tile_store(fma(tile_load(tile.vector, partial + l_at, 0), other, total), state + l_at, 0)
        tile_store(own, factors + offset, 0)
        tile_store(other, factors + l_at, 0)
    sums, more = sums_of(tile, plan, state), sums_of(tile, plan, partial)
    for r in range(rows.count):
        own_factor = load_element(tile, factors + r * tile.itemsize)
        other_factor = load_element(tile, factors + numbers + r * tile.itemsize)
        for _ in range(0, plan.sum_bytes, tile.vector_bytes):
            total = tile_load(tile.vector, sums, 0) * own_factor
            tile_store(fma(tile_load(tile.vector, more, 0), other_factor, total), sums, 0)
            sums += tile.vector_bytes
            more += tile.vector_bytes


@jit
def write_row(place, tile, plan, sums, factor, out):
    """out[p] = sums[p] · factor. `place`: of the output."""
    done = 0
    if plan.out_column == place.itemsize:
        done = plan.value_dim - plan.value_dim % tile.lanes
        for p in range(0, done, tile.lanes):
            numbers = tile_load(tile.vector, sums + p * tile.itemsize, 0) * factor
            tile_store_stored(place, numbers, out + p * place.itemsize, 0)
    for p in range(done, plan.value_dim):
        store_stored(place, out + p * plan.out_column, load_element(tile, sums + p * tile.itemsize) * factor)


@jit
def finish_rows(kernel, call, plan, rows, state):
    """Divide by the sum of the weights, and write the rows of the output, and the log-sum-exp where it is wanted."""
    tile = kernel.tile
    sums = sums_of(tile, plan, state)
    for r in range(rows.count):
        head, query = head_of(call, plan, rows, r), (rows.first + r) % plan.queries
        reference = load_element(tile, state + r * tile.itemsize)
        total = load_element(tile, state + (plan.row_numbers + r) * tile.itemsize)
        sink = sink_of(head)
        term = term_of(plan, sink, reference, total)
        if call.lse != 0:
            if sink != MINUS_INFINITY:
                value = log_sum(plan, sink, reference, total, term)
            else:
                value = reference * (LN_2 * plan.to_base_2) + math.log(total) if total != 0.0 else MINUS_INFINITY
            store_element(tile, call.lse + (head.number * plan.queries + query) * tile.itemsize, value)
        row, factor = sums + r * plan.sum_bytes, plan.keep_scale / (total + term)
        if total == 0.0:  # no key, or none with a score above -inf: 0 even where a value it has looked at is NaN
            factor = 0.0
            clear_rows(tile, row, row + plan.sum_bytes)
        out = head.out + query * plan.out_row
        if kernel.query_place.storage != tile.dtype and plan.out_itemsize == tile.itemsize:
            write_row(tile, tile, plan, row, as_element(tile, factor), out)
        else:
            write_row(kernel.query_place, tile, plan, row, as_element(tile, factor), out)


# -- tasks -------------------------------------------------------------------------------------------------------------


@jit
def keys_of_rows(kernel, plan, head):
    """The keys that some rows look at: any, and all of them."""
    last = plan.queries - 1
    begin, end = keys_of_queries(plan, head, 0, last)
    full, full_end = keys_of_queries(plan, head, last, last)[0], keys_of_queries(plan, head, 0, 0)[1]
    if "function" in kernel.steps:
        full_end = 0
    return Part(begin, full, full_end, end)


@jit
def piece_of(plan, keys, number):
    """The piece of a number, of these keys."""
    first, end = max(keys.begin, number * plan.key_block), min(keys.end, (number + 1) * plan.key_block)
    return Piece(first, end - first, first >= keys.full and end <= keys.full_end)


@jit
def keys_behind(kernel, call, plan, head, piece, is_last):
    """The keys that are wanted after a piece."""
    first = piece.first + piece.count
    head, count = foreseen(kernel, call, plan, head, first, 0 if is_last else piece.count)
    return Ahead(head.key + first * plan.key_row, count)


@jit
def without_padding(call, plan, rows, piece):
    """A piece without the keys at its end that a boolean mask hides from all rows: padding, usually."""
    count, mask = piece.count, rows.head.keep
    alike = plan.queries == 1 or plan.keep_row == 0
    if plan.keep and alike and head_of(call, plan, rows, rows.count - 1).keep == mask:
        mask += piece.first * plan.keep_column
        while count > 0 and load_u8(mask + (count - 1) * plan.keep_column) == 0:
            count -= 1
    return Piece(piece.first, count, piece.all)


@jit
def attend_share(kernel, call, plan, rows, share, counter, partials, scratch):
    """One task: a share of the pieces of the keys that some rows look at. Whoever ends last merges, and writes."""
    tile, is_alone = kernel.tile, plan.shares == 1
    room = lay_out(kernel, plan, behind_gathered(kernel, plan, scratch))
    keys = keys_of_rows(kernel, plan, rows.head)
    first = keys.begin // plan.key_block
    pieces = (keys.end - 1) // plan.key_block + 1 - first if keys.begin < keys.end else 0
    start, stop = pieces * share // plan.shares, pieces * (share + 1) // plan.shares
    load_queries(kernel, call, plan, rows, room.queries)
    clear(tile, plan, room.state)
    for number in range(start, stop):
        piece = piece_of(plan, keys, first + number)
        if "mask" in kernel.steps:
            piece = without_padding(call, plan, rows, piece)
        partial = room.partial if is_alone else partials + number * plan.partial_bytes
        ahead = keys_behind(kernel, call, plan, rows.head, piece, number == stop - 1)
        here = with_rows(kernel, call, plan, rows.head, piece.first, piece.count, scratch)
        of_piece = Rows(rows.number, here, rows.first, rows.count)
        attend(kernel, call, plan, of_piece, piece, room, partial, ahead)
        if is_alone and pieces > 1:
            merge(kernel, plan, rows, room.state, room.factors, partial)
    if not is_alone and finish(counter) < plan.shares:
        return
    state = room.state
    if pieces == 1:  # nothing to merge it with
        state = room.partial if is_alone else partials
    elif not is_alone:
        for number in range(pieces):
            merge(kernel, plan, rows, state, room.factors, partials + number * plan.partial_bytes)
    finish_rows(kernel, call, plan, rows, state)


def task_function(kernel):
    """The task function of a kernel: a share of the keys, for some rows of one group of heads."""

    @jit
    def task(call_at, slot, number):
        call = call_view(call_at)
        plan = plan_view(call.plan)
        part, share = number // plan.shares, number % plan.shares
        group, first = part // plan.groups, part % plan.groups * plan.group
        of_group = plan.group_heads * plan.queries
        number = group * plan.group_heads
        rows = Rows(number, locate(call, plan, number), first, min(plan.group, of_group - first))
        counters, scratch = call.partials, call.scratch + slot * plan.scratch_bytes
        partials = counters + WORD * (plan.tasks // plan.shares) + part * plan.pieces * plan.partial_bytes
        attend_share(kernel, call, plan, rows, share, counters + WORD * part, partials, scratch)

    return task
