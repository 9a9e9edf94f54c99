"""What a block of queries adds to the gradients of keys and values, once its weights are known.

dv[j][:] += Σ_i p[j][i] · do[i][:]          dk[j][:] += Σ_i ds[j][i] · q[i][:]
"""

from fastattn.cpu.kernels import gradient_matrix
from fastattn.cpu.kernels.functions import has_score_function
from fastattn.cpu.kernels.panels import add_along
from fastattn.cpu.kernels.scores import sees
from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.simd import (
    jit,
    load_element,
    load_i64,
    store_element,
    store_i64,
    tile_load,
    tile_round_to_pairs,
    tile_store,
    tile_store_rounded,
)

WORD = 8


@jit
def whole_tiles(kernel, count):
    """`count`, rounded up to the rows of whole tiles, or of two of a matrix unit."""
    tile = kernel.tile
    if kernel.reads == "matrix":
        return (count + tile.width - 1) // tile.width * tile.width
    return (count + tile.rows - 1) // tile.rows * tile.rows


@jit
def note_span(plan, part, s, end, scratch):
    """Write down which keys of a block tile width `s` of the queries looks at; those before have got to `end`.

    Who looks at none stands where the keys begin, or behind them all, so that spans do not go back.
    """
    begin, stop = part.begin, part.end
    if begin >= stop and end > 0:
        begin = stop = plan.key_block
    store_i64(scratch + plan.spans_at + 2 * s * WORD, begin)
    store_i64(scratch + plan.spans_at + (2 * s + 1) * WORD, stop)


@jit
def begin_of(plan, s, scratch):
    """The first key of a block that tile width `s` of the queries looks at; behind it stands the end."""
    return load_i64(scratch + plan.spans_at + 2 * s * WORD)


@jit
def stop_of(plan, s, scratch):
    """The end of these keys."""
    return load_i64(scratch + plan.spans_at + (2 * s + 1) * WORD)


@jit
def end_of(kernel, plan, s, scratch):
    """The same in whole tiles of keys."""
    return whole_tiles(kernel, stop_of(plan, s, scratch))


@jit
def round_weights(kernel, plan, part, s, scratch):
    """Round p and ds of tile width `s` of the queries to bfloat16: rows in which neighbours are pairs, and ds in pairs
    of rows as well. They are multiplied by what the other factors of their products could not be.
    """
    tile, before = kernel.tile, s * plan.score_panel + part.begin * kernel.tile.row_bytes
    weights, grads = scratch + plan.scores_at + before, scratch + plan.score_grads_at + before
    weight_rows, grad_rows = scratch + plan.weight_rows_at + before // 2, scratch + plan.grad_rows_at + before // 2
    grad_pairs, factor, keep_scale = scratch + plan.grad_pairs_at, plan.score_factor, plan.keep_scale
    for _ in range(0, whole_tiles(kernel, part.end - part.begin), 2):
        first = tile_load(tile.single, grads, 0) * factor
        second = tile_load(tile.single, grads + tile.row_bytes, 0) * factor
        tile_store(tile_round_to_pairs(first, second), grad_pairs, 0)
        tile_store_rounded(first, grad_rows)
        tile_store_rounded(second, grad_rows + tile.row_bytes // 2)
        for at in range(0, 2 * tile.row_bytes, tile.row_bytes):
            weight = tile_load(tile.single, weights + at, 0)
            if "dropout" in kernel.steps:
                weight = weight * keep_scale
            tile_store_rounded(weight, weight_rows + at // 2)
        weights += 2 * tile.row_bytes
        grads += 2 * tile.row_bytes
        weight_rows += tile.row_bytes
        grad_rows += tile.row_bytes
        grad_pairs += tile.row_bytes


@jit
def add_to_keys(kernel, plan, offset, subs, present, scratch):
    """dv[j] += Σ_i p[j][i] · do[i], dk[j] += Σ_i ds[j][i] · q[i] for the keys of a block, from `offset` on in a panel.

    Neither where the keys begin that queries look at, nor where they end, is less for later queries. So there are rows
    of keys that the same tile widths of queries see, from `first` to `last`, and behind them others.
    """
    tile = kernel.tile
    first = last = row = 0
    while True:
        while first < subs and end_of(kernel, plan, first, scratch) <= row:
            first += 1
        if first == subs:
            break
        row = max(row, begin_of(plan, first, scratch))
        last = max(last, first)
        while last < subs and begin_of(plan, last, scratch) <= row:
            last += 1
        end = end_of(kernel, plan, first, scratch)
        if last < subs:
            end = min(end, begin_of(plan, last, scratch))
        add_rows(kernel, plan, offset, row, end - row, first, min(present, last * tile.width), scratch)
        row = end


@jit
def add_rows(kernel, plan, offset, row, rows, first, present, scratch):
    """The same for some rows, from `row` on, and the queries from tile width `first` on."""
    tile = kernel.tile
    at, step = row * tile.row_bytes, plan.score_panel
    a, b, c = first * step + at, first * tile.width * tile.row_bytes, offset + at
    values, keys = scratch + plan.value_sums_at + c, scratch + plan.key_sums_at + c
    if kernel.reads == "matrix":
        deep = (present + tile.width - 1) // tile.width - first
        gradient_matrix.add_to_keys(kernel, plan, values, keys, row, rows, first, deep, scratch)
        return
    weights, weight_grads = scratch + plan.scores_at + a, scratch + plan.score_grads_at + a
    if kernel.reads == "pairs":  # half as long, as are columns of queries
        a, b, step = a // 2, b // 2, step // 2
        weights, weight_grads = scratch + plan.weight_rows_at + a, scratch + plan.grad_rows_at + a
    grads, queries = scratch + plan.grads_at + b, scratch + plan.queries_at + b
    terms = present - first * tile.width
    panel, inner = plan.panel, plan.query_panel
    add_along(kernel, values, panel, plan.value_dim, rows, weights, step, grads, inner, terms)
    add_along(kernel, keys, panel, plan.head_dim, rows, weight_grads, step, queries, inner, terms)


@jit
def looks(kernel, plan, head, query, key, grad):
    """Whether a query, of which an element of do is not finite, may look at a key.

    Where a function of scores has a say that is read off ds, `grad`: 0 where the key is hidden, not finite elsewhere.
    """
    if "function" in kernel.steps and has_score_function(head):
        return load_element(kernel.tile, grad) != 0.0
    return sees(kernel, plan, head, query, key)


@jit
def add_visible(kernel, call, plan, head, first_query, present, first_key, offset, scratch):
    """dv[j] += p[j][i] · do[i] for those elements of do that are not finite, where query i may look at key j."""
    tile = kernel.tile
    grad_out = head.grad_out + first_query * plan.grad_out_row
    lse = call.lse + (head.number * plan.queries + first_query) * tile.itemsize
    for i in range(present):
        if load_element(tile, lse + i * tile.itemsize) == MINUS_INFINITY:
            continue
        s = i // tile.width
        at = scratch + s * plan.score_panel + i % tile.width * tile.itemsize
        weights, grads = at + plan.scores_at, at + plan.score_grads_at
        for p in range(plan.value_dim):
            odd = load_element(tile, grad_out + i * plan.grad_out_row + p * plan.grad_out_column)
            if odd * 0.0 == 0.0:
                continue
            place = scratch + plan.value_sums_at + offset + p // tile.width * plan.panel
            place += p % tile.width * tile.itemsize
            for j in range(begin_of(plan, s, scratch), stop_of(plan, s, scratch)):
                row = j * tile.row_bytes
                if looks(kernel, plan, head, first_query + i, first_key + j, grads + row):
                    here = place + row
                    weight = load_element(tile, weights + row) * plan.keep_scale
                    store_element(tile, here, load_element(tile, here) + weight * odd)
