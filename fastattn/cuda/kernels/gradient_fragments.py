"""The steps of the backward pass on tensor cores beside those of `fastattn.cuda.kernels.fragments`.

A block of warps has rows of its own, `TileShape.rows` to a warp, and other rows come by in tiles: what is called
queries and keys there. Here the own rows are keys and the others queries, or the other way round. A lane has two own
rows and, of each group of 8 others, two columns; weights and gradients of scores are fragments, `scores[n * 4 + i]` as
there.
"""

from __future__ import annotations

from typing import NamedTuple

from fastattn.call.rounding import PRECISE
from fastattn.cuda.kernels.elements import LN_2, LOG2_E
from fastattn.cuda.kernels.fragments import (
    CHUNK,
    FLOAT,
    HALF,
    INFINITY,
    LANES,
    TileShape,
    add_not_finite,
    any_not_finite,
    factor_of,
    load_queries,
    look,
    multiply,
    place,
    place_of_weight,
    second_tile,
    whole,
)
from fastattn.cuda.kernels.plan import DELTA, NUMBERS, REST, SHIFT
from fastattn.cuda.kernels.primitives import (
    exp2,
    fma,
    global_address,
    hold_loads,
    load_float,
    load_shared,
    log2,
    maximum,
    narrow,
    opaque,
    pack,
    select,
    store_float,
    store_pair,
    thread_index,
    warp_any,
)

COARSE = PRECISE["float32"]


class Gradients(NamedTuple):
    """What a kernel is compiled for.

    Attributes
    ----------
    shape : TileShape
    of_keys : bool
        Whether it is for the gradients of keys and values, and not for that of queries.
    apart : bool
        Whether the own rows stay in shared memory, and not in registers.
    """

    shape: TileShape
    of_keys: bool
    apart: bool = False

    @property
    def own_bytes(self) -> int:
        """Bytes of the block's own rows, of one operand."""
        return self.shape.queries * self.shape.row_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: two stages of two tiles, and the block's own rows, in their place or apart."""
        stages, own = 2 * self.shape.stage_bytes, 2 * self.own_bytes
        return stages + own if self.apart else max(stages, own)


# -- shared memory -----------------------------------------------------------------------------------------------------


def first_own(spec, memory):
    """Where the block's own rows of the first operand are."""
    return memory + (2 * spec.shape.stage_bytes if spec.apart else 0)


def second_own(spec, memory):
    """Where those of the second operand are."""
    return first_own(spec, memory) + spec.own_bytes


def any_odd(spec, stage, thread):
    """Whether anything is not finite of what this warp has copied to a stage."""
    shape, chunks = spec.shape, spec.shape.width // CHUNK
    chunk, own = thread % chunks, thread // chunks
    rows = range(0, shape.keys, shape.threads // chunks)
    places = (stage + place(shape, begin + own, chunk) + at for begin in rows for at in (0, shape.tile_bytes))
    return any_not_finite(shape, (word for where in places for word in load_shared(where)))


# -- products ----------------------------------------------------------------------------------------------------------


def load_own(spec, memory, thread):
    """The own rows of both operands."""
    return tuple(load_queries(spec.shape, at(spec, memory), thread) for at in (first_own, second_own))


def multiply_both(spec, left, memory, stage, thread):
    """The products of the own rows and those of a tile, of both operands, where scores stand.

    Before each what is computed from the thread's index is computed anew, and in the end the index is given as unknown
    as well: registers are short.
    """
    found = []
    for operand, (own, at) in enumerate(zip(left, (first_own, second_own), strict=True)):
        if spec.apart:
            own = load_queries(spec.shape, at(spec, memory), thread)
        tile = second_tile(spec.shape, stage) if operand else stage
        found.append(multiply(spec.shape, own, tile, thread))
        thread = opaque(thread_index())
    if spec.apart:
        # where registers are this short, none is for the mask while there are factors in them
        hold_loads()
    return (*found, thread)


def before(spec, stage):
    """What `accumulate` has to be told for the first tile of a stage, since it takes the second."""
    return stage + -spec.shape.tile_bytes


# -- weights, and gradients of scores ----------------------------------------------------------------------------------


def rows_of(shape, first, thread):
    """The own rows of a lane."""
    row = narrow(first) + thread // LANES * shape.rows + thread % LANES // 4
    return [row, row + 8]


def pair_of(spec, own, other):
    """A query and a key."""
    return (other, own) if spec.of_keys else (own, other)


def are_near(query, key, queries, keys, offset):
    """Whether there are such a query and such a key, and no causal mask between them."""
    return (query < queries) & (key < keys) & (key < query + (offset + 1))


def all_see(spec, first, begin, others, offset):
    """Whether a tile is whole, and its last key is seen by the first query."""
    own, tile = spec.shape.queries, spec.shape.keys
    query, last_key = (begin, first + (own - 1)) if spec.of_keys else (first, begin + (tile - 1))
    return (begin + tile <= others) & (last_key <= query + offset)


def numbers_of(numbers_at, query, queries):
    """SHIFT, REST and DELTA of a query."""
    within, at = query < queries, numbers_at + query * (NUMBERS * FLOAT)
    shift, rest, delta = (load_float(at + number * FLOAT, within) for number in (SHIFT, REST, DELTA))
    # of a query that looks at nothing every weight is 0
    return select(shift == -INFINITY, INFINITY, shift), rest, delta


def gradient_of(shape, score, grad, added, numbers, scale):
    """The weight of a score, and its gradient, of products of query and key, and of dO and value."""
    shift, rest, delta = numbers
    if shape.floating:  # finfo.min, which masks are full of, times log2(e) would be no number
        power = (fma(score, scale, added) - shift - rest) * LOG2_E
    else:
        power = fma(score, scale, -shift) - rest
    weight = exp2(select(power > 0.0, 0.0, power))
    return weight, weight * (grad - delta)


def differentiate(spec, restricted, scores, grads, first, begin, numbers_at, near, mask, scale, thread):
    """Turn products of queries and keys into weights, those of dO and values into gradients of scores.

    `restricted`: not every query sees every key, or there is a mask. `first` is the first own row of the block, `begin`
    the first other one. `near` is what `are_near` takes, `mask` what `look` does.
    """
    shape, of_keys = spec.shape, spec.of_keys
    queries, keys, offset = map(narrow, near)
    own, column = rows_of(shape, first, thread), narrow(begin) + thread % LANES % 4 * 2
    weights, gradients = [None] * (2 * shape.key_matrices), [None] * (2 * shape.key_matrices)
    of_rows = [] if of_keys else [numbers_of(numbers_at, row, queries) for row in own]
    for n in range(shape.key_matrices):
        of_columns = [numbers_of(numbers_at, column + (8 * n + i), queries) for i in range(2)] if of_keys else []
        for half in range(2):
            pair = []
            for i in range(2):
                numbers, element, added = of_columns[i] if of_keys else of_rows[half], 4 * n + 2 * half + i, 0.0
                if restricted:
                    query, key = pair_of(spec, own[half], column + (8 * n + i))
                    within = are_near(query, key, queries, keys, offset)
                    sees, added = look(shape, mask, query, key, within)
                    sees = sees & (numbers[0] != INFINITY)
                both = gradient_of(shape, scores[element], grads[element], added, numbers, scale)
                pair.append([select(sees, x, 0.0) for x in both] if restricted else both)
            weights[2 * n + half] = pack(pair[0][0], pair[1][0], shape.storage)
            gradients[2 * n + half] = pack(pair[0][1], pair[1][1], shape.storage)
    return tuple(weights), tuple(gradients)


def add_odd(spec, sums, bits, stage, first, begin, row, near, mask, numbers_at, thread):
    """Add what is not finite of one row of the second tile to the own rows that see it, or that it sees.

    `bits` is what `positive` says of the weights.
    """
    shape, row = spec.shape, narrow(row)
    queries, keys, offset = map(narrow, near)
    other = narrow(begin) + row
    owner, bit = place_of_weight(row, thread)
    sees, factors = [], []
    for own, word in zip(rows_of(shape, first, thread), bits, strict=True):
        query, key = pair_of(spec, own, other)
        within = are_near(query, key, queries, keys, offset)
        seen = look(shape, mask, query, key, within)[0]
        shift = load_float(numbers_at + (query * (NUMBERS * FLOAT) + SHIFT * FLOAT), query < queries)
        sees.append(seen & (shift != -INFINITY))
        factors.append(factor_of(word, owner, bit))
    return add_not_finite(shape, sums, stage, row, sees, factors, thread)


def store(shape, sums, factor, result, owner, first, count, length, thread):
    """Store the own rows times a factor, in slice `owner` of a result whose rows lie next to each other."""
    target, column = global_address(result, owner * count * length), thread % 4 * 2
    count, length = narrow(count), narrow(length)
    for half, row in enumerate(rows_of(shape, first, thread)):
        for n in range(shape.feature_matrices):
            pair = [sums[n * 4 + 2 * half + i] * factor for i in range(2)]
            where = column + 8 * n
            address = target + row * (length * HALF) + where * HALF
            store_pair(address, pack(*pair, shape.storage), (row < count) & (where < length))


# -- what weights are computed from ------------------------------------------------------------------------------------


def sums_of(shape, lse_at, lse_step, row, queries):
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


def copy_sums(shape, numbers_at, lse_at, lse_step, first, queries, thread):
    """Store SHIFT and REST as the log-sum-exp has them. Whether that is coarse for any query of the warp."""
    found = False
    for row in rows_of(shape, first, thread):
        sums, _, coarse = sums_of(shape, lse_at, lse_step, row, queries)
        store_numbers(numbers_at, row, sums, 0.0, (row < narrow(queries)) & (thread % 4 == 0))
        found = found | coarse
    return warp_any(found)


def store_shifts(shape, highest, total, scale, numbers_at, lse_at, lse_step, slack, first, queries, thread):
    """Store SHIFT and REST of the queries whose log-sum-exp is coarse, and of no more keys than these.

    `highest` and `total` are what `absorb` makes of the scores of a block's queries.
    """
    for row, top, total_here in zip(rows_of(shape, first, thread), highest, total, strict=True):
        sums, size, coarse = sums_of(shape, lse_at, lse_step, row, queries)
        sum_here = whole(total_here)
        shift, rest = (top, log2(sum_here) * LN_2) if shape.floating else (top * scale, log2(sum_here))
        own = (shift - sums) + rest >= -(slack * size)
        store_numbers(numbers_at, row, shift, rest, coarse & own & (thread % 4 == 0))
