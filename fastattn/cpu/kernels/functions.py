"""How kernels call a user's functions (`fastattn.cpu.kernels.lanes`), and what they know of blocks of keys."""

from collections import namedtuple

from fastattn.cpu.kernels.masks import lowest
from fastattn.cpu.kernels.records import FUNCTIONS
from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.functions.kinds import EMPTY, FULL, KIND_KEYS, KIND_QUERIES
from fastattn.simd import (
    call_compiled,
    jit,
    load_element,
    load_u8,
    record_view,
    stack_memory,
    store_i64,
    tile_fill,
    tile_load,
    tile_store,
    where_greater,
)

functions_view = record_view(FUNCTIONS)
memory_of_two_vectors = stack_memory(2 * 64)
OUT_OF_RANGE = (FUNCTIONS.names or ()).index("out_of_range")


# Where a score stands, as functions are told: the row of the batch, the head, the position of the query, and the key.
Where = namedtuple("Where", "batch head query key")


@jit
def where_of(head, first_query, first_key):
    """Where the first score of a block stands."""
    functions = functions_view(head.functions)
    batch = functions.first_row + head.number // functions.heads
    number = functions.first_head + head.number % functions.heads
    moved = functions.first_key  # what counts the keys counts positions
    return Where(batch, number, moved + head.offset + first_query, moved + first_key)


@jit
def apply_function(plan, head, scores, grads, count, first_query, first_key):
    """Scores become the function's, and what is beside them is multiplied by its derivative, unless `grads` is 0.

    Returns whether every index was in range.
    """
    functions = functions_view(head.functions)
    if functions.value == 0:
        return True
    at = where_of(head, first_query, first_key)
    last, captured = at.query + (plan.queries - 1 - first_query), functions.score_captured
    if grads == 0:
        given = (scores, count, at.batch, at.head, at.query, at.key, last, captured)
        return call_compiled(functions.value, given) != 0
    beside = (scores, grads, count, at.batch, at.head, at.query, at.key, last, captured)
    return call_compiled(functions.slope, beside) != 0


@jit
def apply_along(tile, head, score, bias, query, key):
    """What the function makes of the scores of one query with a vector of keys, in the lanes, and its derivatives.

    `bias` is -inf for a key that the query may not look at: there an index may be out of range.
    """
    functions = functions_view(head.functions)
    if functions.value == 0:
        return score, tile_fill(tile.vector, 1.0)
    row = memory_of_two_vectors()
    slopes = row + tile.vector_bytes
    tile_store(score, row, 0)
    at = where_of(head, query, key)
    given = (row, slopes, at.batch, at.head, at.query, at.key, functions.score_captured)
    inside = call_compiled(functions.along, given) != 0
    score = tile_load(tile.vector, row, 0)
    if not inside:
        tile_store(where_greater(lowest(tile), bias, MINUS_INFINITY, score), row, 0)
        note_marks(head, row, 1, tile.lanes)
    return score, tile_load(tile.vector, slopes, 0)


@jit
def hide_unseen(plan, head, scores, count, first_query, first_key):
    """Scores become -inf where the user's function says that keys are not seen; the same is returned."""
    functions = functions_view(head.functions)
    if functions.hide == 0:
        return True
    at = where_of(head, first_query, first_key)
    last = at.query + (plan.queries - 1 - first_query)
    given = (scores, count, at.batch, at.head, at.query, at.key, last, functions.seen_captured)
    return call_compiled(functions.hide, given) != 0


@jit
def has_score_function(head):
    """Whether there is a function of scores, which may hide keys by what it returns."""
    return functions_view(head.functions).value != 0


@jit
def says_yes(kernel, plan, head, query, key):
    """Whether the user's function says that one query may look at one key, as the function of a block's rows does."""
    tile, row = kernel.tile, memory_of_two_vectors()
    for offset in range(0, 2 * tile.vector_bytes, tile.vector_bytes):
        tile_store(tile_fill(tile.vector, 0.0), row + offset, 0)
    hide_unseen(plan, head, row, 1, query, key)
    return load_element(tile, row) == 0.0


@jit
def note_marks(head, scores, count, present):
    """Note that an index was out of range where a mark is left, in so many rows of which so many lanes are there."""
    functions = functions_view(head.functions)
    if call_compiled(functions.marks, (scores, count, present)) != 0:
        store_i64(head.functions + 8 * OUT_OF_RANGE, 1)


@jit
def kinds_of_queries(tile, plan, head, first_query):
    """Where the kinds of blocks are that a block of queries is in, the first row of them, and how many rows."""
    functions = functions_view(head.functions)
    rows = functions.kinds + head.number // functions.heads * functions.kinds_batch
    rows += head.number % functions.heads * functions.kinds_head
    first = first_query // KIND_QUERIES
    last = (min(first_query + tile.width, plan.queries) - 1) // KIND_QUERIES
    return rows + first * functions.kinds_row, last + 1 - first


@jit
def is_empty(head, rows, count, column):
    """Whether so many rows of blocks see none of the keys of a column."""
    step = functions_view(head.functions).kinds_row
    for row in range(count):
        if load_u8(rows + row * step + column) != EMPTY:
            return False
    return True


@jit
def seen_keys(tile, plan, head, first_query, begin, end):
    """The first key and the end, between two, of those that a block of queries sees any of, by the kinds of blocks."""
    if functions_view(head.functions).kinds == 0 or begin >= end:
        return begin, end
    rows, count = kinds_of_queries(tile, plan, head, first_query)
    first, last = begin // KIND_KEYS, (end - 1) // KIND_KEYS
    while first <= last and is_empty(head, rows, count, first):
        first += 1
    if first > last:
        return begin, begin
    while is_empty(head, rows, count, last):
        last -= 1
    return max(begin, first * KIND_KEYS), min(end, (last + 1) * KIND_KEYS)


@jit
def seen_part(tile, plan, head, first_query, first_key, begin, end):
    """Keys of a block, between two, outside of which the queries of a block see none; and whether they see all there.

    In numbers of keys from the first of the block on, which is a multiple of the tile's width, as are the results.
    """
    functions = functions_view(head.functions)
    if functions.kinds == 0 or begin >= end:
        return begin, end, functions.hide == 0
    begin, end = seen_keys(tile, plan, head, first_query, first_key + begin, first_key + end)
    rows, count = kinds_of_queries(tile, plan, head, first_query)
    whole = True
    for column in range(begin // KIND_KEYS, (end - 1) // KIND_KEYS + 1 if begin < end else 0):
        for row in range(count):  # an empty one between two others is looked at
            whole = whole and load_u8(rows + row * functions.kinds_row + column) == FULL
    return begin - first_key, end - first_key, whole


@jit
def add_to_captured(head, part, scores, grads, count, present, along, first_query, first_key):
    """Add what a block contributes to the gradients of captured arrays, to those that a part of the work has.

    `along`: 0 where the lanes are queries, as everywhere, 1 where they are keys, of one query.
    """
    functions = functions_view(head.functions)
    at = where_of(head, first_query, first_key)
    captured, targets = functions.score_captured, functions.targets + part * functions.arrays * 8
    given = (scores, grads, count, present, along, at.batch, at.head, at.query, at.key, captured, targets)
    call_compiled(functions.add, given)
