"""Blocks of queries, keys and values: how they are laid out, and both products of attention on them.

scores[j][i] = start[i] + key[j] · q[i]          q[p][i]: the queries, transposed, times the scale
out[p][i]   += Σ_j value[j][p] · weights[j][i]
"""

from fastattn.cpu.kernels import additive, matrix, matrix_products, pairs
from fastattn.cpu.kernels.functions import has_score_function
from fastattn.cpu.kernels.int8 import are_scales_finite, load_number
from fastattn.cpu.kernels.pack import (
    add_rows,
    clear,
    copy_rows,
    key_steps,
    pack_keys,
    pack_queries,
    pack_values,
    value_steps,
)
from fastattn.cpu.kernels.prefetch import NOTHING, ask
from fastattn.cpu.kernels.scores import cap, restrict, sees
from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.cpu.kernels.tiles import key_product, row_product, value_product
from fastattn.machine.kernel import PLAIN
from fastattn.simd import (
    all_zero,
    jit,
    lanes_above,
    largest_row,
    load_element,
    load_i64,
    load_stored,
    maximum,
    stack_memory,
    store_element,
    store_i64,
    tile_fill,
    tile_load,
    tile_load_stored,
    tile_store,
)

memory_of_words = stack_memory(8 * 512)  # no row of the table has more keys in a block


@jit
def begins_together(kernel):
    """Whether all queries of a task are laid out before the first keys."""
    return kernel.score == "additive" or kernel.reads == "matrix"


@jit
def load_queries(kernel, call, plan, q, source, present, work):
    """q[p][i] = feature p of query i, times the scale; or what additive attention makes of it."""
    tile = kernel.tile
    if kernel.score == "additive":
        additive.load_queries(tile, call, plan, q, source, present, work)
    elif kernel.reads == "pairs":
        pairs.pack_queries(kernel, q, source, plan.query_row, plan.query_column, present, plan.head_dim, plan.scale)
    elif kernel.reads == "matrix":
        matrix.load_lanes(kernel, plan, q, source, present)
    else:
        row, column, place = plan.query_row, plan.query_column, kernel.query_place
        pack_queries(place, tile, q, source, row, column, present, plan.head_dim, plan.scale)


@jit
def load_keys(kernel, plan, target, source, count):
    """Pack a block of keys, where they are not read in place; where they are then."""
    tile = kernel.tile
    if kernel.score == "additive":
        return additive.load_keys(tile, plan, target, source, count)
    if kernel.reads == "panels":
        pack_keys(kernel, tile, target, source, plan.key_row, plan.key_column, count, plan.head_dim)
        return target
    if kernel.reads == "rows" and plan.key_bytes > 0:
        copy_rows(kernel, tile, target, plan.key_step, source, plan.key_row, plan.key_column, count, plan.head_dim)
        return target
    if kernel.reads == "pairs" and plan.key_bytes > 0:
        pairs.copy_keys(kernel, target, plan.key_step, source, plan.key_row, plan.key_column, count, plan.head_dim)
        return target
    if kernel.reads == "matrix":
        row, column = plan.key_row, plan.key_column
        matrix.load_rows(kernel, kernel, plan, target, source, row, column, count, plan.head_dim)
        return target
    return source


@jit
def load_values(kernel, plan, target, source, count, finite):
    """The same for values. Of bfloat16, what is not finite is replaced by 0, where they are not all `finite`."""
    tile = kernel.tile
    if kernel.reads == "panels":
        panel, _, _ = value_steps(kernel, plan)
        pack_values(
            kernel.value_place, tile, target, source, plan.value_row, plan.value_column, count, plan.value_dim, panel
        )
        return target
    if kernel.reads == "rows" and plan.value_bytes > 0:
        row, column = plan.value_row, plan.value_column
        copy_rows(kernel.value_place, tile, target, plan.value_step, source, row, column, count, plan.value_dim)
        return target
    if kernel.reads == "pairs":
        row, column = plan.value_row, plan.value_column
        pairs.copy_values(kernel, target, plan.value_step, source, row, column, count, plan.value_dim)
        if not finite:
            pairs.clean_values(kernel, target, plan.value_step, count, plan.value_dim)
        return target
    if kernel.reads == "matrix":
        place, row, column = kernel.value_place, plan.value_row, plan.value_column
        matrix.load_columns(kernel, place, plan, target, source, row, column, count, plan.value_dim, finite)
        return target
    return source


@jit
def score_block(kernel, plan, q, key, first, count, scores, best, wanted):
    """scores[j][i] = key[first + j] · q[i] for `count` keys; the maximum of `best` and of them over j.

    Meanwhile what is on the list `wanted` is asked for.
    """
    tile = kernel.tile
    if kernel.score == "additive":
        return additive.score_block(kernel, plan, q, key, first, count, scores, best)
    features = plan.head_dim
    if kernel.reads == "pairs":
        features = pairs.pairs_of(features)
    panel, row, column = key_steps(kernel, plan)
    key += first // tile.rows * panel
    whole = count - count % tile.rows
    for _ in range(0, whole, tile.rows):
        acc = key_product(kernel, tile_fill(tile, 0.0), key, row, column, q, features)
        if kernel.reads == "pairs" and kernel.steps != PLAIN:
            acc = acc * plan.factor
        tile_store(acc, scores, tile.row_bytes)
        best = maximum(largest_row(acc), best)
        ask(kernel, wanted)
        key += panel
        scores += tile.rows * tile.row_bytes
    for _ in range(whole, count):
        one = row_product(kernel, tile_fill(tile.single, 0.0), key, row, column, q, features)
        if kernel.reads == "pairs" and kernel.steps != PLAIN:
            one = one * plan.factor
        tile_store(one, scores, tile.row_bytes)
        best = maximum(one, best)
        key += row
        scores += tile.row_bytes
    return best


@jit
def add_values(kernel, plan, weights, count, value, out, rest, wanted, apart):
    """out[p][i] += Σ_j value[j][p] · weights[j][i]; meanwhile what is on the list is asked for.

    `rest` is what a matrix unit wants room for. `apart`: what is added is summed by itself first, as it is of all keys
    of a block. Of many keys the roundings of one long sum would be most of the error.
    """
    if kernel.reads == "matrix":
        matrix_products.add_columns(kernel, plan, weights, count, value, plan.value_dim, out, rest, wanted)
        return
    tile = kernel.tile
    features = plan.value_dim
    panel, row, column = value_steps(kernel, plan)
    if kernel.reads == "pairs":
        pairs.pair_rows(tile, weights, count)
        count = pairs.pairs_of(count)
    if (
        kernel.score == "additive" and tile.vectors == 1 and column == tile.itemsize
    ):  # few queries: most lanes would be empty
        done = features - features % (tile.quad.rows * tile.lanes)
        additive.add_values(tile, plan, weights, count, value, row, out, done, apart)
        value += done * column
        out += done * tile.row_bytes
        features -= done
    whole = features - features % tile.rows
    for _ in range(0, whole, tile.rows):
        acc = tile_fill(tile, 0.0) if apart else tile_load(tile, out, tile.row_bytes)
        acc = value_product(kernel, acc, value, column, row, weights, count)
        tile_store(tile_load(tile, out, tile.row_bytes) + acc if apart else acc, out, tile.row_bytes)
        ask(kernel, wanted)
        value += panel
        out += tile.rows * tile.row_bytes
    for _ in range(whole, features):
        one = tile_fill(tile.single, 0.0) if apart else tile_load(tile.single, out, tile.row_bytes)
        one = row_product(kernel, one, value, column, row, weights, count)
        tile_store(tile_load(tile.single, out, tile.row_bytes) + one if apart else one, out, tile.row_bytes)
        value += column
        out += tile.row_bytes


@jit
def are_finite(kernel, plan, value, count):
    """Whether `count` rows of values hold neither NaN nor infinity (x · 0 = 0 only for a finite x)."""
    tile, place = kernel.tile, kernel.value_place
    if kernel.value_place.storage == "int8":
        for j in range(count):
            if not are_scales_finite(place, value + j * plan.value_row, plan.value_dim):
                return False
        return True
    sums = tile_fill(tile.vector, 0.0)
    vectors = plan.value_dim // tile.lanes if plan.value_column == place.itemsize else 0
    for j in range(count):
        row = value + j * plan.value_row
        for v in range(vectors):
            sums = sums + tile_load_stored(place, tile.vector, row + v * tile.lanes * place.itemsize, 0) * 0.0
        for p in range(vectors * tile.lanes, plan.value_dim):
            if load_stored(place, row + p * plan.value_column) * 0.0 != 0.0:
                return False
    return all_zero(sums)


@jit
def note_seen(tile, scores, count, seen):
    """Write down which queries look at which keys of a block, read off the scores: a word of bits for each key."""
    hidden = tile_fill(tile.single, MINUS_INFINITY)
    for j in range(count):
        store_i64(seen + 8 * j, lanes_above(tile_load(tile.single, scores + j * tile.row_bytes, 0), hidden))


@jit
def add_visible_values(kernel, plan, head, weights, count, first_query, first_key, value, out, rest, seen):
    """`add_values` for keys with values that are not finite and queries that may not look at some of them.

    There 0 · NaN must not reach a query. `value` is where the micro-kernel finds the row of the first key; `rest` room
    for as many numbers as there are in `out`; `seen` what `note_seen` has noted, where a function of scores has a say.
    """
    tile = kernel.tile
    source, start = head.value + first_key * plan.value_row, 0
    if kernel.of_bfloat16:  # rows of which cannot be parted: what is not finite there has been replaced by 0
        for j in range(count):
            at = source + j * plan.value_row
            if not are_finite(kernel, plan, at, 1):
                weight = weights + j * tile.row_bytes
                add_visible_row(kernel, plan, head, weight, first_query, first_key + j, at, out, seen + 8 * j)
        add_values(kernel, plan, weights, count, value, out, rest, NOTHING, True)
        return
    # Rows of values that are finite throughout take the fast way; in the others a query is added where it may look.
    clear(tile, rest, plan.value_dim)
    _, row, _ = value_steps(kernel, plan)
    for j in range(count + 1):
        at = source + j * plan.value_row
        if j < count and are_finite(kernel, plan, at, 1):
            continue
        some = weights + start * tile.row_bytes
        add_values(kernel, plan, some, j - start, value + start * row, rest, 0, NOTHING, False)
        start = j + 1
        if j < count:
            weight = weights + j * tile.row_bytes
            add_visible_row(kernel, plan, head, weight, first_query, first_key + j, at, rest, seen + 8 * j)
    add_rows(tile, out, rest, plan.value_dim)


@jit
def add_visible_row(kernel, plan, head, weights, first_query, key, value, out, seen):
    """Add a row of values to the queries that may look at its key; of bfloat16, what is not finite in it."""
    tile = kernel.tile
    for i in range(min(tile.width, plan.queries - first_query)):
        if "function" in kernel.steps and has_score_function(head):
            looks = (load_i64(seen) >> i) & 1 != 0
        else:
            looks = sees(kernel, plan, head, first_query + i, key)
        if looks:
            weight = load_element(tile, weights + i * tile.itemsize)
            for p in range(plan.value_dim):
                place = out + p * tile.row_bytes + i * tile.itemsize
                element = load_number(kernel.value_place, value, p, plan.value_column, plan.value_dim)
                if not kernel.of_bfloat16 or element * 0.0 != 0.0:
                    store_element(tile, place, load_element(tile, place) + element * weight)


@jit
def scores_of(kernel, plan, head, q, part, first_query, first_key, key, work, wanted):
    """Form the scores of some queries with a part of a block of keys; their maximum over the keys is at `work`.

    They are where `place_of_scores` says, those of key j of the block in row j; a matrix unit's products are there
    already.
    """
    tile = kernel.tile
    best = tile_fill(tile.single, MINUS_INFINITY)
    best = score_rows(kernel, plan, head, first_query, first_key, q, key, part.full, part.full_end, best, work, wanted)
    tile_store(best, work, 0)
    for edge in range(2):
        begin, end = (part.begin, part.full) if edge == 0 else (part.full_end, part.end)
        if begin < end:
            score_rows(kernel, plan, head, first_query, first_key, q, key, begin, end, best, work, wanted)
            rows = place_of_scores(tile, work) + begin * tile.row_bytes
            buffer = work + tile.row_bytes
            restrict(kernel, plan, head, rows, end - begin, first_query, first_key + begin, work, buffer)


@jit
def place_of_scores(tile, work):
    """Where scores are, in the working memory of `scores_of`: behind their maxima, and room for a square of a mask."""
    return work + tile.row_bytes + tile.buffer_bytes


@jit
def place_behind_scores(tile, plan, work):
    """Where there is room behind those of a block: for sums of values, and for what a matrix unit wants."""
    return place_of_scores(tile, work) + plan.key_block * tile.row_bytes


@jit
def score_rows(kernel, plan, head, first_query, first_key, q, key, begin, end, best, work, wanted):
    """Form the scores of the keys from `begin` to `end` of a block, capped; the maximum of `best` and of them."""
    tile = kernel.tile
    scores, count = place_of_scores(tile, work) + begin * tile.row_bytes, end - begin
    if kernel.reads == "matrix":
        rest = place_behind_scores(tile, plan, work)  # free until the products of the next query block are formed
        best_of = matrix_products.finish_scores(
            kernel, plan, head, first_query, first_key, q, key, begin, count, scores, best, rest
        )
    else:
        best_of = score_block(kernel, plan, q, key, begin, count, scores, best, wanted)
    if "softcap" in kernel.steps and plan.softcap != 0.0:
        return cap(tile, plan, scores, count, best)
    return best_of
