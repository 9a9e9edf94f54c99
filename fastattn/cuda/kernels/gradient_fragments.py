"""The steps of the backward pass on tensor cores beside those of the forward pass: `unrolled` functions of one shape.

A block of warps has rows of its own, `TileShape.rows` to a warp, and other rows come by in tiles: what
`fastattn.cuda.kernels.fragments` calls queries and keys. Here the own rows are keys and the others queries, or the
other way round. A lane has two own rows and, of each group of 8 others, two columns; weights and gradients of scores
are fragments, `scores[n * 4 + i]` as there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastattn.call.rounding import PRECISE
from fastattn.cuda.kernels.elements import LN_2, LOG2_E
from fastattn.cuda.kernels.fragments import CHUNK, HALF, INFINITY, LANES, TileShape
from fastattn.cuda.kernels.plan import DELTA, NUMBERS, REST, SHIFT
from fastattn.cuda.kernels.primitives import (
    exp2,
    fma,
    global_address,
    load_byte,
    load_float,
    load_half,
    load_shared,
    load_word,
    log2,
    maximum,
    narrow,
    pack,
    select,
    shared_memory,
    shuffle,
    shuffle_xor,
    store_float,
    store_pair,
    unrolled,
    warp_any,
    widen,
)

FLOAT = 4  # bytes
COARSE = PRECISE["float32"]


class GradientSteps(NamedTuple):
    """The `unrolled` functions."""

    allocate: Any
    first_own: Any
    second_own: Any
    before: Any
    any_odd: Any
    differentiate: Any
    differentiate_seen: Any
    add_odd: Any
    store: Any
    copy_sums: Any
    store_shifts: Any


def shared_bytes(shape: TileShape, apart: bool) -> int:
    """Shared memory of a block: two stages of two tiles, and the block's own rows, in their place or apart."""
    stages, own = 2 * shape.stage_bytes, 2 * shape.queries * shape.row_bytes
    return stages + own if apart else max(stages, own)


def make_gradient_steps(shape: TileShape, of_keys: bool, apart: bool) -> GradientSteps:
    """Make the steps of one shape; `of_keys`: the own rows are keys, `apart`: they stay in shared memory."""
    storage, width, tile = shape.storage, shape.width, shape.keys
    columns, features = tile // 8, width // 8
    row_bytes, tile_bytes, own_bytes = shape.row_bytes, tile * shape.row_bytes, shape.queries * shape.row_bytes
    exponent = 0x7F80 if storage == "bfloat16" else 0x7C00

    def place(row, chunk):
        """Where a chunk of a row stands, in bytes."""
        return row * row_bytes + (chunk ^ row % 8) * 16

    def rows_of(first, thread):
        """The own rows of a lane."""
        row = narrow(first) + thread // LANES * shape.rows + thread % LANES // 4
        return [row, row + 8]

    def look(mask_at, row_step, column_step, query, key, within):
        """Whether a query sees a key, and what the mask adds to their score; `within`: they are there to be asked."""
        if shape.mask == "none":
            return within, 0.0
        size = 1 if shape.mask == "bool" else FLOAT if shape.mask == "float32" else HALF
        where = mask_at + query * (row_step * size) + key * (column_step * size)
        if shape.mask == "bool":
            return load_byte(where, within) != 0, 0.0
        added = load_float(where, within) if size == FLOAT else widen(load_half(where, within), shape.mask)
        return within & (added != -INFINITY), added

    def pair_of(own, other):
        """A query and a key."""
        return (other, own) if of_keys else (own, other)

    def are_near(query, key, queries, keys, offset):
        """Whether there are such a query and such a key, and no causal mask between them."""
        return (query < queries) & (key < keys) & (key < query + (offset + 1))

    @unrolled
    def allocate():
        """The address of the block's memory."""
        return shared_memory(shared_bytes(shape, apart))

    @unrolled
    def first_own(memory):
        """Where the block's own rows of the first operand are."""
        return memory + (2 * shape.stage_bytes if apart else 0)

    @unrolled
    def second_own(memory):
        """Where those of the second operand are."""
        return memory + (2 * shape.stage_bytes if apart else 0) + own_bytes

    @unrolled
    def before(stage):
        """What `accumulate` has to be told for the first tile of a stage, since it takes the second."""
        return stage + -tile_bytes

    @unrolled
    def any_odd(stage, thread):
        """Whether anything is not finite of what this warp has copied to a stage.

        That is when adding 1 to an exponent turns it over into the sign.
        """
        both, one = exponent * 0x10001, (exponent & -exponent) * 0x10001
        chunks = width // CHUNK
        chunk, own = thread % chunks, thread // chunks
        found = 0
        for begin in range(0, tile, shape.threads // chunks):
            for at in (0, tile_bytes):
                for word in load_shared(stage + place(begin + own, chunk) + at):
                    found = found | (word & both) + one
        return warp_any((found & 0x80008000) != 0)

    def make_differentiate(restricted):
        def differentiate(
            scores, grads, first, begin, numbers_at, queries, keys, offset, mask_at, row_step, column_step, unit,
            thread,
        ):  # fmt: skip
            """Turn products of queries and keys into weights, those of dO and values into gradients of scores.

            `first` is the first own row of the block, `begin` the first other one.
            """
            queries, keys, offset = narrow(queries), narrow(keys), narrow(offset)
            own, column = rows_of(first, thread), narrow(begin) + thread % LANES % 4 * 2

            def numbers_of(query):
                within, at = query < queries, numbers_at + query * (NUMBERS * FLOAT)
                shift, rest, delta = (load_float(at + place * FLOAT, within) for place in (SHIFT, REST, DELTA))
                # of a query that looks at nothing every weight is 0
                return select(shift == -INFINITY, INFINITY, shift), rest, delta

            weights, gradients = [None] * (2 * columns), [None] * (2 * columns)
            of_rows = [] if of_keys else [numbers_of(row) for row in own]
            for n in range(columns):
                of_columns = [numbers_of(column + (8 * n + i)) for i in range(2)] if of_keys else []
                for half in range(2):
                    pair = []
                    for i in range(2):
                        shift, rest, delta = of_columns[i] if of_keys else of_rows[half]
                        score, grad = scores[4 * n + 2 * half + i], grads[4 * n + 2 * half + i]
                        query, key = pair_of(own[half], column + (8 * n + i))
                        sees, added = False, 0.0
                        if restricted:
                            within = are_near(query, key, queries, keys, offset)
                            sees, added = look(mask_at, row_step, column_step, query, key, within)
                            sees = sees & (shift != INFINITY)
                        if shape.floating:  # finfo.min, which masks are full of, times log2(e) would be no number
                            power = (fma(score, unit, added) - shift - rest) * LOG2_E
                        else:
                            power = fma(score, unit, -shift) - rest
                        weight = exp2(select(power > 0.0, 0.0, power))
                        gradient = weight * (grad - delta)
                        if restricted:
                            weight, gradient = select(sees, weight, 0.0), select(sees, gradient, 0.0)
                        pair.append((weight, gradient))
                    weights[2 * n + half] = pack(pair[0][0], pair[1][0], storage)
                    gradients[2 * n + half] = pack(pair[0][1], pair[1][1], storage)
            return tuple(weights), tuple(gradients)

        return unrolled(differentiate)

    @unrolled
    def add_odd(
        sums, bits, stage, first, begin, row, queries, keys, offset, mask_at, row_step, column_step, numbers_at, thread,
    ):  # fmt: skip
        """Add what is not finite of one row of the second tile to the own rows that see it, or that it sees.

        `bits` is what `positive` says of the weights: 0 times an infinity is NaN.
        """
        queries, keys, offset = narrow(queries), narrow(keys), narrow(offset)
        row, column = narrow(row), thread % 4 * 2
        other = narrow(begin) + row
        # the lane that has the weight of this row
        owner, place_of_bit = thread % LANES // 4 * 4 + row % 8 // 2, row // 8 * 2 + row % 2
        sees, factors = [], []
        for own, word in zip(rows_of(first, thread), bits, strict=True):
            query, key = pair_of(own, other)
            seen = look(mask_at, row_step, column_step, query, key, are_near(query, key, queries, keys, offset))[0]
            shift = load_float(numbers_at + (query * (NUMBERS * FLOAT) + SHIFT * FLOAT), query < queries)
            sees.append(seen & (shift != -INFINITY))
            factors.append(select((shuffle(word, owner) >> place_of_bit & 1) != 0, 1.0, 0.0))
        added = list(sums)
        for n in range(features):
            word = load_word(stage + tile_bytes + place(row, n) + column * HALF)
            for i in range(2):
                half = word >> 16 & 0xFFFF if i else word & 0xFFFF
                odd = select((half & exponent) == exponent, widen(half, storage), 0.0)
                for r in range(2):
                    index = n * 4 + 2 * r + i
                    added[index] = select(sees[r], fma(odd, factors[r], added[index]), added[index])
        return tuple(added)

    @unrolled
    def store(sums, factor, result, at, first, count, length, thread):
        """Store the own rows times a factor, rows next to each other from element `at` on."""
        target, column = global_address(result, at), thread % 4 * 2
        count, length = narrow(count), narrow(length)
        for half, row in enumerate(rows_of(first, thread)):
            for n in range(features):
                pair = [sums[n * 4 + 2 * half + i] * factor for i in range(2)]
                where = column + 8 * n
                address = target + row * (length * HALF) + where * HALF
                store_pair(address, pack(*pair, storage), (row < count) & (where < length))

    def sums_of(lse_at, lse_step, row, queries):
        """The log-sum-exp of a query, in base 2 where the scores are, its magnitude, and whether it is coarse."""
        exists = row < narrow(queries)
        sums = load_float(lse_at + row * (lse_step * FLOAT), exists)
        size = maximum(sums, -sums)
        coarse = exists & (size >= COARSE) & (size < INFINITY)
        return (sums, size, coarse) if shape.floating else (sums * LOG2_E, size * LOG2_E, coarse)

    def store_numbers(numbers_at, row, shift, rest, when):
        """Store SHIFT and REST of a query, in lanes where `when` holds."""
        where = numbers_at + row * (NUMBERS * FLOAT)
        store_float(where + SHIFT * FLOAT, shift, when)
        store_float(where + REST * FLOAT, rest, when)

    @unrolled
    def copy_sums(numbers_at, lse_at, lse_step, first, queries, thread):
        """Store SHIFT and REST as the log-sum-exp has them. Whether that is coarse for any query of the warp."""
        found = False
        for row in rows_of(first, thread):
            sums, _, coarse = sums_of(lse_at, lse_step, row, queries)
            store_numbers(numbers_at, row, sums, 0.0, (row < narrow(queries)) & (thread % 4 == 0))
            found = found | coarse
        return warp_any(found)

    @unrolled
    def store_shifts(highest, total, unit, numbers_at, lse_at, lse_step, slack, first, queries, thread):
        """Store SHIFT and REST of the queries whose log-sum-exp is coarse, and of no more keys than these.

        `highest` and `total` are what `absorb` makes of the scores of a block's queries.
        """
        for row, top, total_here in zip(rows_of(first, thread), highest, total, strict=True):
            sums, size, coarse = sums_of(lse_at, lse_step, row, queries)
            whole = total_here + shuffle_xor(total_here, 1)
            whole = whole + shuffle_xor(whole, 2)
            shift, rest = (top, log2(whole) * LN_2) if shape.floating else (top * unit, log2(whole))
            own = (shift - sums) + rest >= -(slack * size)
            store_numbers(numbers_at, row, shift, rest, coarse & own & (thread % 4 == 0))

    return GradientSteps(
        allocate,
        first_own,
        second_own,
        before,
        any_odd,
        make_differentiate(False),
        make_differentiate(True),
        add_odd,
        store,
        copy_sums,
        store_shifts,
    )
