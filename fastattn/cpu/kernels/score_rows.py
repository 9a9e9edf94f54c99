"""What happens to the scores of one query, with keys in the lanes: `fastattn.cpu.kernels.scores` for few queries.

Scores of a query are a row, scores[j]. Its restrictions meet it in the same order: cap, mask and slopes, the user's
function, and what hides keys. A row ends with a whole vector; what stands behind its keys is -inf when all is done.
"""

from fastattn.cpu.kernels.functions import apply_function, hide_unseen, note_marks, seen_part
from fastattn.cpu.kernels.masks import add_bias, hide, lowest, row_of, saturate
from fastattn.cpu.kernels.records import BIAS_NONE, KEEP
from fastattn.cpu.kernels.scores import bias_at, capped, keep_at, keys_of_queries
from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.cpu.kernels.tasks import own_view
from fastattn.simd import absolute, jit, store_element, tile_fill, tile_iota, tile_load, tile_store, where_greater


@jit
def keys_of_row(kernel, plan, head, query, first_key, end_key):
    """The first key, and the end of those, that a query looks at, between two: numbers from the first of these on."""
    begin, end = keys_of_queries(plan, head, query, query)
    begin, end = max(begin, first_key) - first_key, min(end, end_key) - first_key
    if "function" in kernel.steps:
        begin, end, _ = seen_part(kernel.tile.lane, plan, head, query, first_key, begin, end)
    return (begin, end) if begin < end else (0, 0)


@jit
def fill_row(tile, row, begin, end, value):
    """Fill a part of a row."""
    for j in range(begin, end):
        store_element(tile, row + j * tile.itemsize, value)


@jit
def cap_row(tile, plan, scores, count):
    """Cap the scores of a row."""
    for at in range(scores, scores + count * tile.itemsize, tile.vector_bytes):
        score, _ = capped(tile, plan, tile_load(tile.vector, at, 0))
        tile_store(score, at, 0)


@jit
def add_to_row(kernel, plan, head, scores, count, query, key, buffer):
    """Add what is added to the scores of a query with `count` keys from `key` on."""
    tile, kind, itemsize = kernel.tile, plan.bias_kind, plan.bias_itemsize
    bias = bias_at(plan, head, query, key)
    slope = min(max(own_view(head.own).slope, lowest(tile)), -lowest(tile))
    linear = tile_fill(tile.vector, 0.0)
    for j in range(0, count, tile.lanes):
        place = scores + j * tile.itemsize
        score = tile_load(tile.vector, place, 0)
        if slope != 0.0:
            away = absolute((head.offset + query - key - j) * 1.0 - tile_iota(tile.vector))
            linear = saturate(tile, away * -slope)
        if kind != BIAS_NONE:
            at = bias + j * plan.bias_column
            added = row_of(kernel, kind, itemsize, at, plan.bias_column, min(tile.lanes, count - j), buffer)
            if slope != 0.0:
                added = add_bias(tile, added, linear)
            score = add_bias(tile, score, added)
        elif slope != 0.0:
            score = add_bias(tile, score, linear)
        tile_store(score, place, 0)


@jit
def hide_in_row(kernel, plan, head, scores, count, query, key, buffer):
    """Put -inf where masks say that the query does not look at a key."""
    tile = kernel.tile
    keep = keep_at(plan, head, query, key)
    bias = bias_at(plan, head, query, key)
    for j in range(0, count, tile.lanes):
        place, columns = scores + j * tile.itemsize, min(tile.lanes, count - j)
        score = tile_load(tile.vector, place, 0)
        if plan.keep:
            at = keep + j * plan.keep_column
            score = hide(tile, score, row_of(kernel, KEEP, 1, at, plan.keep_column, columns, buffer))
        if "function" in kernel.steps and plan.bias_kind != BIAS_NONE:  # whatever the function has made of it
            at = bias + j * plan.bias_column
            added = row_of(kernel, plan.bias_kind, plan.bias_itemsize, at, plan.bias_column, columns, buffer)
            score = where_greater(lowest(tile), added, MINUS_INFINITY, score)
        tile_store(score, place, 0)


@jit
def restrict_row(kernel, plan, head, scores, begin, end, filled, query, first_key, buffer):
    """Apply all that happens to the scores of a query, which looks at keys from `begin` to `end` of those in the row.

    The row is `filled` long, a multiple of the lanes, and its first key is `first_key`.
    """
    tile = kernel.tile
    if "softcap" in kernel.steps and plan.softcap != 0.0:
        cap_row(tile, plan, scores, filled)
    row, key, count = scores + begin * tile.itemsize, first_key + begin, end - begin
    if "mask" in kernel.steps and count > 0:
        if plan.bias_kind != BIAS_NONE or own_view(head.own).slope != 0.0:
            add_to_row(kernel, plan, head, row, count, query, key, buffer)
        inside = True
        if "function" in kernel.steps:
            inside = apply_function(plan, head, row, 0, count, query, key)
        if plan.keep or "function" in kernel.steps:
            hide_in_row(kernel, plan, head, row, count, query, key, buffer)
        if "function" in kernel.steps:
            inside = hide_unseen(plan, head, row, count, query, key) and inside
            if not inside:
                note_marks(head, row, count, 1)
    fill_row(tile, scores, 0, begin, MINUS_INFINITY)
    fill_row(tile, scores, end, filled, MINUS_INFINITY)
