"""A user's functions, compiled for blocks of scores: each is a small library, which kernels call by its address.

So a function compiles in a fraction of a second, and no kernel is compiled for it. Blocks are scores[j][i], key j,
query i, as everywhere. A lane is a query, and LLVM makes vectors of the loop over the lanes. Lanes without a query have
the position of the last one.

An index that was out of range leaves a mark, a NaN of its own. What hides keys overwrites it; a mark that remains is an
error.
"""

from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.functions.compiler import compiled, reads_of
from fastattn.functions.kinds import EMPTY, FULL, PARTIAL
from fastattn.functions.rows import (
    chosen,
    is_marked,
    is_set,
    is_true,
    marked,
    new_flag,
    new_note,
    noted,
    numbers_at,
    put_score,
    row_at,
    score_in,
    slope_of,
    with_slope,
)
from fastattn.simd import as_element, jit, load_f64, load_i64, stack_memory, store_f64, store_u8

NOWHERE = -1  # instead of the number of an element
memory_of_a_row = stack_memory(2 * 8 * 64)  # no row is wider


def score_functions(kernel):
    """The library of a function of scores: its values, and its values with slopes."""
    tile, width, row_bytes, lanes = kernel.tile, kernel.tile.width, kernel.tile.row_bytes, kernel.tile.lanes
    function = compiled(kernel.function, tile.dtype)

    @jit
    def value(scores, count, batch, head, query, key, last, captured):
        """scores[j][i] becomes the function's; returns 1 if every index was in range."""
        inside = 1
        for j in range(count):
            row = row_at(tile, scores + j * row_bytes)
            for i in range(width):
                flag = new_flag()
                position = min(query + i, last)
                score = function((score_in(row, i), batch, head, position, key + j, captured, flag))
                valid = is_set(flag)
                put_score(row, i, marked(tile, score, valid))
                inside &= valid
        return inside

    @jit
    def slope(scores, grads, count, batch, head, query, key, last, captured):
        """The same, and grads[j][i] is multiplied by the derivative by the score."""
        inside = 1
        for j in range(count):
            row, beside = row_at(tile, scores + j * row_bytes), row_at(tile, grads + j * row_bytes)
            for i in range(width):
                flag = new_flag()
                position = min(query + i, last)
                start = score_in(row, i)
                score = function((with_slope(start), batch, head, position, key + j, captured, flag))
                valid = is_set(flag)
                put_score(row, i, marked(tile, score, valid))
                put_score(beside, i, score_in(beside, i) * slope_of(start, score))
                inside &= valid
        return inside

    @jit
    def along(scores, slopes, batch, head, query, key, captured):
        """The same for one query and a vector of keys, in the lanes; the derivatives stand beside them."""
        inside, row, beside = 1, row_at(tile, scores), row_at(tile, slopes)
        for i in range(lanes):
            flag = new_flag()
            start = score_in(row, i)
            score = function((with_slope(start), batch, head, query, key + i, captured, flag))
            valid = is_set(flag)
            put_score(row, i, marked(tile, score, valid))
            put_score(beside, i, slope_of(start, score))
            inside &= valid
        return inside

    return {"value": value, "slope": slope, "along": along, "marks": marks_function(tile)}


def captured_functions(kernel):
    """The library of the derivatives by elements of captured arrays, whose names are the kernel's steps."""
    tile, row_bytes, names = kernel.tile, kernel.tile.row_bytes, kernel.steps
    add_all = _one_after_the_other(
        [
            _adder(tile, compiled(kernel.function, tile.dtype, (name,), place), 8 * names.index(name))
            for name, place in reads_of(kernel.function, tile.dtype, names)
        ]
    )

    @jit
    def add(scores, grads, count, present, along, batch, head, query, key, captured, targets):
        """Add grads[j][i] times the derivatives to the elements that were read.

        `along`: 0, or 1 where the lanes of a row are keys, of one query. `targets`: the addresses of arrays without
        gaps, of float64.
        """
        for j in range(count):
            row, beside = row_at(tile, scores + j * row_bytes), row_at(tile, grads + j * row_bytes)
            add_all(row, beside, present, along, batch, head, query, key + j, captured, targets)
        return 0

    return {"add": add}


def _one_after_the_other(functions):
    """A function that calls some."""
    if not functions:
        return _nothing
    first, others = functions[0], _one_after_the_other(functions[1:])

    @jit
    def both(row, beside, present, along, batch, head, query, key, captured, targets):
        first(row, beside, present, along, batch, head, query, key, captured, targets)
        others(row, beside, present, along, batch, head, query, key, captured, targets)

    return both


@jit
def _nothing(row, beside, present, along, batch, head, query, key, captured, targets):
    """Add nothing."""


def _adder(tile, function, word):
    """A function that adds what a row contributes to the gradient of an array, by one place where that is read.

    First for all lanes which elements these are, and the derivatives by them, in vectors; then the sums, one by one. If
    elements are read several times at that place, all of it is done for each time.
    """

    @jit
    def add_row(row, beside, present, along, batch, head, query, key, captured, targets):
        room = memory_of_a_row()
        numbers, slopes = numbers_at(room), row_at(tile, room + 8 * tile.width)
        target, wanted, most = load_i64(targets + word), 0, 1
        while wanted < most:
            for i in range(present):
                note = new_note(wanted)
                own_query, own_key = query + i * (1 - along), key + i * along
                score = score_in(row, i)
                put_score(
                    slopes, i, slope_of(score, function((score, batch, head, own_query, own_key, captured, note)))
                )
                number, times = noted(note)
                put_score(numbers, i, number if times > wanted else NOWHERE)
                most = max(most, times)
            for i in range(present):
                grad, number = score_in(beside, i), score_in(numbers, i)
                if grad != 0.0 and number != NOWHERE:  # of a hidden key it is 0
                    at = target + number * 8
                    store_f64(at, load_f64(at) + score_in(slopes, i) * 1.0 * grad)
            wanted += 1

    return add_row


def seen_functions(kernel):
    """The library of a function that says which keys are seen: it hides others, and looks at whole blocks."""
    tile, width, row_bytes = kernel.tile, kernel.tile.width, kernel.tile.row_bytes
    function = compiled(kernel.function, tile.dtype)

    @jit
    def hide(scores, count, batch, head, query, key, last, captured):
        """scores[j][i] becomes -inf where the function says no; returns 1 if every index was in range."""
        inside = 1
        for j in range(count):
            row = row_at(tile, scores + j * row_bytes)
            for i in range(width):
                flag = new_flag()
                seen = is_true(function((batch, head, min(query + i, last), key + j, captured, flag)))
                valid = is_set(flag)
                score, hidden = score_in(row, i), as_element(tile, MINUS_INFINITY)
                kept = marked(tile, chosen(seen, score, hidden), valid)
                put_score(row, i, chosen(score == hidden, hidden, kept))
                inside &= valid
        return inside

    @jit
    def look(kinds, batch, head, query, queries, first_key, keys, size, captured):
        """Write of which kind the blocks of keys are for some queries, from a position on: EMPTY, PARTIAL or FULL."""
        for block in range(0, keys, size):
            some, every = 0, 1
            for j in range(block, min(block + size, keys)):
                for i in range(queries):
                    flag = new_flag()
                    seen = is_true(function((batch, head, query + i, first_key + j, captured, flag)))
                    valid = is_set(flag)
                    some |= seen | (valid ^ 1)
                    every &= seen & valid
            store_u8(kinds, FULL if every else (PARTIAL if some else EMPTY))
            kinds += 1
        return 0

    return {"hide": hide, "look": look, "marks": marks_function(tile)}


def marks_function(tile):
    """A function that looks for marks."""
    row_bytes = tile.row_bytes

    @jit
    def marks(scores, count, present):
        """Whether a mark is left in a block, at a query that is there."""
        found = 0
        for j in range(count):
            row = row_at(tile, scores + j * row_bytes)
            for i in range(present):
                found |= is_marked(tile, score_in(row, i))
        return found

    return marks
