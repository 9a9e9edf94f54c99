"""What happens to a block of scores in the backward pass, and to the gradients of weights beside it.

Softcaps and the user's functions, whose slopes are factors of a gradient, and what the slopes of ALiBi get of it.
"""

from fastattn.cpu.kernels.masks import lowest
from fastattn.cpu.kernels.scores import cap, cap_with_slope
from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.cpu.kernels.sums import hide_keys
from fastattn.simd import absolute, fma, jit, tile_fill, tile_iota, tile_load, tile_store, where_greater

SMALLEST_FLOAT32, SMALLEST_FLOAT64 = 2.0**-126, 2.0**-1022  # normal numbers: less of a gradient is nothing to a sum


@jit
def spoil(kernel, scores, count, log_sum):
    """Scores of NaN for queries whose lse is not finite: what is subtracted later finds none of -inf.

    A score of -inf is a hidden key's otherwise, and has no weight, where one of NaN is due beside an lse of NaN.
    """
    tile, nothing = kernel.tile, log_sum - log_sum
    for at in range(scores, scores + count * tile.row_bytes, tile.row_bytes):
        tile_store(tile_load(tile.single, at, 0) + nothing, at, 0)


@jit
def hide_from_empty(kernel, scores, count, log_sum):
    """Scores of -inf for queries that look at nothing: a query of 0 and a key that is not finite have made NaN."""
    tile = kernel.tile
    for _ in range(count):
        score = tile_load(tile.single, scores, 0)
        tile_store(where_greater(log_sum, -lowest(tile), MINUS_INFINITY, score), scores, 0)
        scores += tile.row_bytes


@jit
def cap_block(kernel, plan, scores, grads, count, delta):
    """Cap a block of scores; what is beside them becomes the gradient of a weight, times the slope of the score.

    The gradients of a mask, and of what a user's function captures, which come behind the softcap, do without.
    """
    tile = kernel.tile
    if plan.drop_below > 0:
        for offset in range(0, count * tile.row_bytes, tile.row_bytes):
            grad = tile_load(tile.single, grads + offset, 0) * plan.keep_scale - delta
            tile_store(grad, grads + offset, 0)
    if plan.softcap == 0.0:
        return
    if kernel.work != "backward":
        cap(tile, plan, scores, count, tile_fill(tile.single, MINUS_INFINITY))
    else:
        cap_with_slope(tile, plan, scores, grads, count)


@jit
def keep_bare(kernel, plan, grads, count, delta, scratch):
    """Gradients of weights as they are before a softcap's slope is a factor of them; where that is kept."""
    tile, bare = kernel.tile, scratch + plan.bare_grads_at
    for offset in range(0, count * tile.row_bytes, tile.row_bytes):
        grad = tile_load(tile.single, grads + offset, 0)
        tile_store(grad * plan.keep_scale - delta if plan.drop_below > 0 else grad, bare + offset, 0)
    return bare


@jit
def apply_to_block(kernel, plan, head, scores, grads, bare, part, first_query, first_key, scratch):
    """`hide_keys`, with the user's functions, whose slope is a factor of what is beside the scores, `bare` or not."""
    tile = kernel.tile
    before, beside = part.begin * tile.row_bytes, scratch + plan.raws_at
    if kernel.work == "captured_gradient":  # wants gradients without the slope, and the scores before
        hide_keys(kernel, plan, head, scores - before, beside, part, first_query, first_key, scratch)
    elif bare == grads:
        hide_keys(kernel, plan, head, scores - before, grads - before, part, first_query, first_key, scratch)
    else:
        rows = range(0, (part.end - part.begin) * tile.row_bytes, tile.row_bytes)
        for offset in rows:
            tile_store(tile_fill(tile.single, 1.0), beside + before + offset, 0)
        hide_keys(kernel, plan, head, scores - before, beside, part, first_query, first_key, scratch)
        for offset in rows:
            slope = tile_load(tile.single, beside + before + offset, 0)
            tile_store(tile_load(tile.single, grads + offset, 0) * slope, grads + offset, 0)
            tile_store(tile_load(tile.single, bare + offset, 0) * slope, bare + offset, 0)


@jit
def add_distances(kernel, plan, head, weights, grads, bare, count, first_query, first_key, s, scratch):
    """Add ds · |position - j| to the sums of tile width `s` of the queries: what the slope of the head gets, negative.

    A softcap's slope is no factor of these ds. So they are the weights times what is `bare`, but for hidden keys.
    """
    tile = kernel.tile
    sums, total = scratch + plan.slope_sums_at + s * tile.row_bytes, tile_fill(tile.single, 0.0)
    lanes = tile_iota(tile.single)
    away = (head.offset + first_query - first_key) * 1.0
    smallest = SMALLEST_FLOAT32 if tile.itemsize == 4 else SMALLEST_FLOAT64
    for _ in range(count):
        grad = tile_load(tile.single, grads, 0)
        if "softcap" in kernel.steps:
            weight = tile_load(tile.single, weights, 0)
            size = absolute(weight) + absolute(grad)
            grad = where_greater(smallest, size, 0.0, weight * tile_load(tile.single, bare, 0))
            weights += tile.row_bytes
            bare += tile.row_bytes
        total = fma(grad, absolute(lanes + away), total)
        grads += tile.row_bytes
        away -= 1.0
    tile_store(tile_load(tile.single, sums, 0) + total, sums, 0)
