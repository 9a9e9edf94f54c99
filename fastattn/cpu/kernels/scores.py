"""What happens to a score between the first product and the softmax, and which keys a block of queries looks at.

For a call's kind of scores (`fastattn.call.scores.Scores`) this file has all that kernels know of it: the interval of
keys (`keys_of_blocks`, `keys_of_block`), what is done to a block of scores (`cap`, `restrict`), the slope of that for
the backward pass (`cap_with_slope`), and whether one query looks at one key (`sees`). Positions are numbers of keys.
"""

from collections import namedtuple

from fastattn.cpu.kernels.functions import apply_function, hide_unseen, note_marks, says_yes, seen_part
from fastattn.cpu.kernels.masks import add_bias, add_square, hide, hide_square, lowest, saturate, square_of
from fastattn.cpu.kernels.prefetch import want
from fastattn.cpu.kernels.records import BIAS_BFLOAT16, BIAS_HALF, BIAS_NONE, KEEP
from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.cpu.kernels.tanh import tanh_with_slope
from fastattn.cpu.kernels.tasks import own_view
from fastattn.simd import (
    absolute,
    as_element,
    jit,
    largest_row,
    load_f32,
    load_f64,
    load_u8,
    load_u16,
    maximum,
    tile_fill,
    tile_iota,
    tile_load,
    tile_row_index,
    tile_store,
    where_greater,
)

HALF_MINUS_INFINITY, BFLOAT16_MINUS_INFINITY = 0xFC00, 0xFF80
EXACT = 1 << 24  # whole numbers up to here are numbers of float32
NEGLIGIBLE = 1e31  # no finite number of float32 becomes infinite by the sum with one below
ADDITIVE_GRADIENTS = ("additive_backward", "additive_mask_gradient", "additive_captured_gradient")
FAR = 1 << 20  # more than any block is wide; small enough to be exact in float32

# Keys of a block, by their numbers in it: any of its queries looks at those from `begin` to `end`, all of them at those
# from `full` to `full_end`. What is outside of the latter is restricted, in whole squares.
Part = namedtuple("Part", "begin full full_end end")


@jit
def keys_of_queries(plan, head, first, last):
    """The first key and the end of those that any query from `first` to `last` looks at."""
    begin, end = 0, head.keys
    if plan.left_bound:
        begin = min(max(0, head.offset + first - plan.left), end)
    if plan.right_bound:
        end = min(end, head.offset + last + plan.right + 1)
    return begin, max(begin, end)


@jit
def queries_of_keys(plan, head, start, end):
    """The first query and the end of those that may look at any key from `start` to `end`."""
    first, stop = 0, plan.queries
    if plan.right_bound:
        first = max(0, start - plan.right - head.offset)
    if plan.left_bound:
        stop = min(stop, end + plan.left - head.offset)
    return first, stop


@jit
def step_of(kernel):
    """How many keys are restricted together: where a part begins, or becomes full, is a multiple of that."""
    tile = kernel.tile
    return 2 * tile.lanes if kernel.reads == "matrix" else max(tile.lanes, tile.rows)


@jit
def keys_of_block(kernel, plan, head, first_query, first_key):
    """Which keys of a block the queries of a block look at."""
    tile = kernel.tile
    begin, end = 0, max(0, min(plan.key_block, head.keys - first_key))
    full, full_end = 0, end
    if plan.left_bound or plan.right_bound:
        at = head.offset + first_query - first_key
        last = min(tile.width, plan.queries - first_query) - 1
        if plan.right_bound:
            end = min(end, at + last + plan.right + 1)
            full_end = min(end, at + plan.right + 1)
        if plan.left_bound:
            begin = max(0, at - plan.left)
            full = max(0, at + last - plan.left)
        if begin >= end:
            return Part(0, 0, 0, 0)
    if "mask" in kernel.steps:
        if plan.keep and plan.keep_row == 0:
            row = keep_at(plan, head, first_query, first_key)
            while end > begin and load_u8(row + (end - 1) * plan.keep_column) == 0:
                end -= 1  # padding, usually
        if plan.keep or plan.adds:
            full_end = 0
    if "function" in kernel.steps:
        begin, end, whole = seen_part(tile, plan, head, first_query, first_key, begin, end)
        full = max(full, begin)
        if not whole or plan.adds:
            full_end = 0
    full_end = min(full_end, end)
    if full > 0 or full_end < end:
        step = step_of(kernel)
        begin -= begin % step
        full += (step - full % step) % step
        if full_end < end:
            full_end -= full_end % step
        if full >= full_end:
            full = full_end = begin
    return Part(begin, full, full_end, max(begin, end))


# -- blocks of scores --------------------------------------------------------------------------------------------------


@jit
def capped(tile, plan, score):
    """softcap · tanh(score / softcap) by elements, and the derivative."""
    t, slope = tanh_with_slope(tile, score * as_element(tile, plan.softcap_factor))
    return t * as_element(tile, plan.softcap), slope


@jit
def cap(tile, plan, scores, count, best):
    """Cap a block of scores; the maximum of `best` and of them over the keys."""
    for _ in range(count):
        score, _ = capped(tile, plan, tile_load(tile.single, scores, 0))
        tile_store(score, scores, 0)
        best = maximum(score, best)
        scores += tile.row_bytes
    return best


@jit
def cap_with_slope(tile, plan, scores, grads, count):
    """The same, and multiply what stands beside the scores by the derivative."""
    for _ in range(count):
        score, slope = capped(tile, plan, tile_load(tile.single, scores, 0))
        tile_store(score, scores, 0)
        tile_store(tile_load(tile.single, grads, 0) * slope, grads, 0)
        scores += tile.row_bytes
        grads += tile.row_bytes


@jit
def restrict(kernel, plan, head, scores, count, first_query, first_key, top, buffer):
    """Apply masks and interval to a block of scores; raise `top` to its maximum over the keys.

    The block is that of the queries from `first_query` on, and `count` keys from `first_key` on.
    """
    if "function" in kernel.steps:
        restrict_with_functions(kernel, plan, head, scores, 0, count, first_query, first_key, top, buffer)
        return
    tile, lanes, alone = kernel.tile, kernel.tile.lanes, BIAS_NONE
    present = min(tile.width, plan.queries - first_query)
    if "mask" in kernel.steps and is_inside(plan, head, count, first_query, first_key, present):
        alone = mask_alone(plan, head)
        if has_slopes_alone(plan, head, count, first_query, first_key, present):
            add_slopes(tile, head, scores, count, first_query, first_key, top)
            return
    for v in range(tile.vectors):
        first, rows = first_query + v * lanes, min(lanes, present - v * lanes)
        best = tile_load(tile.vector, top + v * tile.vector_bytes, 0)
        for j in range(0, count, lanes):
            key, columns = first_key + j, min(lanes, count - j)
            place = scores + j * tile.row_bytes + v * tile.vector_bytes
            if "mask" in kernel.steps and alone != BIAS_NONE and rows == lanes and columns == lanes:
                if alone == KEEP:
                    best = hide_square(kernel, plan, place, keep_at(plan, head, first, key), best)
                else:
                    best = add_square(kernel, plan, place, bias_at(plan, head, first, key), best)
                continue
            square = tile_load(tile.square, place, tile.row_bytes)
            square = restrict_square(kernel, plan, head, square, first, key, rows, columns, buffer)
            tile_store(square, place, tile.row_bytes)
            best = maximum(largest_row(square), best)
        tile_store(best, top + v * tile.vector_bytes, 0)


@jit
def is_inside(plan, head, count, first_query, first_key, present):
    """Whether so many queries all look at so many keys, as far as the interval goes."""
    first = head.offset + first_query - first_key
    if plan.right_bound and first + plan.right < count - 1:
        return False
    return not (plan.left_bound and first + present - 1 > plan.left)


@jit
def mask_alone(plan, head):
    """The kind of the mask, if there is one alone, its rows lie as they are read, and nothing else is to scores."""
    if own_view(head.own).slope != 0.0:
        return BIAS_NONE
    if plan.keep:
        return KEEP if plan.bias_kind == BIAS_NONE and plan.keep_column == 1 else BIAS_NONE
    return plan.bias_kind if plan.bias_column == plan.bias_itemsize else BIAS_NONE


@jit
def has_slopes_alone(plan, head, count, first_query, first_key, present):
    """Whether a slope is all that there is to a block of scores, and no sum with it can become infinite."""
    slope = own_view(head.own).slope
    if slope == 0.0 or plan.bias_kind != BIAS_NONE or plan.keep:
        return False
    first = head.offset + first_query - first_key
    farthest = max(abs(first), abs(first + present - 1)) + count
    return farthest < EXACT and abs(slope) * farthest < NEGLIGIBLE


@jit
def bias_at(plan, head, query, key):
    """Where a floating mask has its number for a query and a key."""
    return head.bias + query * plan.bias_row + key * plan.bias_column


@jit
def keep_at(plan, head, query, key):
    """The same of a boolean mask."""
    return head.keep + query * plan.keep_row + key * plan.keep_column


@jit
def want_masks(kernel, plan, head, wanted, first_query, first_key, part):
    """Append to a list of what is wanted what masks have for a block of queries, and such a part of a block of keys."""
    keys, queries = part.end - part.begin, min(kernel.tile.width, plan.queries - first_query)
    if keys <= 0:
        return
    if plan.bias_kind != BIAS_NONE and plan.bias_row != 0:
        rows = bias_at(plan, head, first_query, first_key + part.begin)
        want(wanted, rows, plan.bias_row, keys * plan.bias_itemsize, queries)
    if plan.keep and plan.keep_row != 0:
        rows = keep_at(plan, head, first_query, first_key + part.begin)
        want(wanted, rows, plan.keep_row, keys, queries)


@jit
def add_slopes(tile, head, scores, count, first_query, first_key, top):
    """Add what `add_to_square` does there; raise `top` to the maximum over the keys."""
    slope, best = own_view(head.own).slope, tile_load(tile.single, top, 0)
    distance = tile_iota(tile.single) + (head.offset + first_query - first_key) * 1.0
    for _ in range(count):
        score = tile_load(tile.single, scores, 0) + absolute(distance) * -slope
        tile_store(score, scores, 0)
        best = maximum(score, best)
        distance = distance - 1.0
        scores += tile.row_bytes
    tile_store(best, top, 0)


@jit
def restrict_square(kernel, plan, head, square, query, key, rows, columns, buffer):
    """The same for a square of scores, of which so many rows (queries) and columns (keys) are there."""
    square = add_to_square(kernel, plan, head, square, query, key, rows, columns, buffer)
    return hide_in_square(kernel, plan, head, square, query, key, rows, columns, buffer)


@jit
def add_to_square(kernel, plan, head, square, query, key, rows, columns, buffer):
    """Add what is added to scores."""
    tile = kernel.tile
    if "mask" in kernel.steps and rows > 0:
        distance = tile_iota(tile.square) - tile_row_index(tile.square)
        kind, itemsize, row, column = plan.bias_kind, plan.bias_itemsize, plan.bias_row, plan.bias_column
        slope = min(max(own_view(head.own).slope, lowest(tile)), -lowest(tile))
        linear = tile_fill(tile.square, 0.0)
        if slope != 0.0:
            away = absolute(distance + (head.offset + query - key) * 1.0)
            linear = saturate(tile, away * -slope)
        if kind != BIAS_NONE:
            at = bias_at(plan, head, query, key)
            bias = square_of(kernel, kind, itemsize, at, row, column, rows, columns, buffer)
            if slope != 0.0:
                bias = add_bias(tile, bias, linear)
            square = add_bias(tile, square, bias)
        elif slope != 0.0:
            square = add_bias(tile, square, linear)
    return square


@jit
def hide_in_square(kernel, plan, head, square, query, key, rows, columns, buffer):
    """Put -inf where a query may not look at a key."""
    tile = kernel.tile
    index = tile_row_index(tile.square)
    distance = tile_iota(tile.square) - index
    if "mask" in kernel.steps and rows > 0 and plan.keep:
        at, row, column = keep_at(plan, head, query, key), plan.keep_row, plan.keep_column
        square = hide(tile, square, square_of(kernel, KEEP, 1, at, row, column, rows, columns, buffer))
    if plan.right_bound:
        last = min(max(head.offset + plan.right + query - key, -FAR), FAR)
        square = where_greater(distance + (last + 0.5), 0.0, square, MINUS_INFINITY)
    if plan.left_bound:
        first = min(max(head.offset - plan.left + query - key, -FAR), FAR)
        square = where_greater(0.5 - first, distance, square, MINUS_INFINITY)
    if columns < tile.lanes:
        square = where_greater(columns - 0.5, index, square, MINUS_INFINITY)
    return square


def by_squares(restrict_one):
    """A function that applies another one to each square of a block of scores."""

    @jit
    def restrict_all(kernel, plan, head, scores, count, first_query, first_key, buffer):
        tile = kernel.tile
        lanes = tile.lanes
        present = min(tile.width, plan.queries - first_query)
        for v in range(tile.vectors):
            rows = min(lanes, present - v * lanes)
            for j in range(0, count, lanes):
                place = scores + j * tile.row_bytes + v * tile.vector_bytes
                square = tile_load(tile.square, place, tile.row_bytes)
                query, key, columns = first_query + v * lanes, first_key + j, min(lanes, count - j)
                square = restrict_one(kernel, plan, head, square, query, key, rows, columns, buffer)
                tile_store(square, place, tile.row_bytes)

    return restrict_all


@jit
def hide_behind_function(kernel, plan, head, square, query, key, rows, columns, buffer):
    """`hide_in_square`, and -inf where a floating mask has it, whatever a function has made of that."""
    square = hide_in_square(kernel, plan, head, square, query, key, rows, columns, buffer)
    if "mask" in kernel.steps and rows > 0 and plan.bias_kind != BIAS_NONE:
        tile, at, row, column = kernel.tile, bias_at(plan, head, query, key), plan.bias_row, plan.bias_column
        bias = square_of(kernel, plan.bias_kind, plan.bias_itemsize, at, row, column, rows, columns, buffer)
        square = where_greater(lowest(tile), bias, MINUS_INFINITY, square)
    return square


add_by_squares, hide_by_squares = by_squares(add_to_square), by_squares(hide_behind_function)


@jit
def restrict_with_functions(kernel, plan, head, scores, grads, count, first_query, first_key, top, buffer):
    """`restrict`, with the user's functions; what stands beside the scores, if anything, is multiplied by the slope.

    Where gradients of captured arrays are wanted, the scores before the function are kept there.
    """
    tile = kernel.tile
    if "mask" in kernel.steps and (plan.bias_kind != BIAS_NONE or own_view(head.own).slope != 0.0):
        add_by_squares(kernel, plan, head, scores, count, first_query, first_key, buffer)
    if kernel.work == "captured_gradient" and grads != 0:
        for offset in range(0, count * tile.row_bytes, tile.row_bytes):
            tile_store(tile_load(tile.single, scores + offset, 0), grads + offset, 0)
        grads = 0
    inside = True
    if kernel.work not in ADDITIVE_GRADIENTS:  # which do that by themselves
        inside = apply_function(plan, head, scores, grads, count, first_query, first_key)
    hide_by_squares(kernel, plan, head, scores, count, first_query, first_key, buffer)
    inside = hide_unseen(plan, head, scores, count, first_query, first_key) and inside
    if not inside:
        note_marks(head, scores, count, min(tile.width, plan.queries - first_query))
    best = tile_load(tile.single, top, 0)
    for j in range(count):
        best = maximum(tile_load(tile.single, scores + j * tile.row_bytes, 0), best)
    tile_store(best, top, 0)


@jit
def sees(kernel, plan, head, query, key):
    """Whether one query may look at one key, both by their numbers; what a function of scores hides aside."""
    if not is_kept(kernel, plan, head, query, key):
        return False
    if "function" in kernel.steps:
        return says_yes(kernel, plan, head, query, key)
    return True


@jit
def is_kept(kernel, plan, head, query, key):
    """The same by interval and masks alone."""
    position = head.offset + query
    if plan.right_bound and position + plan.right < key:
        return False
    if plan.left_bound and position - plan.left > key:
        return False
    if "mask" not in kernel.steps:
        return True
    if plan.keep and load_u8(keep_at(plan, head, query, key)) == 0:
        return False
    if plan.bias_kind == BIAS_NONE:
        return True
    at = bias_at(plan, head, query, key)
    if plan.bias_kind == BIAS_HALF:
        return load_u16(at) != HALF_MINUS_INFINITY
    if plan.bias_kind == BIAS_BFLOAT16:
        return load_u16(at) != BFLOAT16_MINUS_INFINITY
    if plan.bias_itemsize == 4:
        return load_f32(at) != MINUS_INFINITY
    return load_f64(at) != MINUS_INFINITY
