"""The steps of attention on tensor cores, in registers and shared memory: `unrolled` functions for tiles of one shape.

Fragments are flat tuples: element i of matrix (m, n) of the scores or of the output, of 16 queries and 8 keys or
features, stands at (m * N + n) * 4 + i, N matrices to a group of queries. What lane has which element is PTX's doing:
lane 4 g + t has columns 2 t and 2 t + 1 of row g, then the same of row g + 8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastattn.cuda.kernels.elements import LN_2, LOG2_E
from fastattn.cuda.kernels.primitives import (
    commit,
    copy_async,
    exp2,
    fma,
    global_address,
    load_byte,
    load_float,
    load_half,
    load_matrices,
    load_matrices_transposed,
    load_shared,
    load_word,
    log2,
    maximum,
    minimum,
    mma,
    narrow,
    opaque,
    pack,
    reciprocal,
    select,
    shared_memory,
    shuffle,
    shuffle_xor,
    store_float,
    store_pair,
    thread_index,
    unrolled,
    wait,
    warp_any,
    warp_index,
    widen,
)

LANES = 32
CHUNK = 8  # halves in 16 bytes
HALF = 2  # bytes
ALL = 0xFFFFFFFF
INFINITY = float("inf")


class TileShape(NamedTuple):
    """What a kernel is compiled for.

    Attributes
    ----------
    storage : {"bfloat16", "float16"}
    mask : {"none", "bool", "bfloat16", "float16", "float32"}
        What the mask is stored in.
    width : int
        D and Dv as they are in shared memory, filled up with zeros: a multiple of 64.
    warps : int
        Warps of a block.
    rows : int
        Queries of a warp, a multiple of 16.
    keys : int
        Keys of a tile, a multiple of 16.
    blocks : int
        Blocks that are meant to be on a multiprocessor at a time, which bounds the registers of a thread.
    """

    storage: str
    mask: str
    width: int
    warps: int
    rows: int
    keys: int
    blocks: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return LANES * self.warps

    @property
    def queries(self) -> int:
        """Queries of a block."""
        return self.warps * self.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in shared memory."""
        return HALF * self.width

    @property
    def stage_bytes(self) -> int:
        """Bytes of the keys and values of a tile."""
        return 2 * self.keys * self.row_bytes

    @property
    def floating(self) -> bool:
        """Whether the mask is added to the scores, which are not in base 2 then."""
        return self.mask not in ("none", "bool")

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.stage_bytes + max(self.stage_bytes, self.queries * self.row_bytes)


class Steps(NamedTuple):
    """The `unrolled` functions of a kernel."""

    allocate: Any
    own_thread: Any
    warp_of: Any
    part_of: Any
    tiles_of: Any
    first_key: Any
    stage_of: Any
    copy_queries: Any
    copy_keys: Any
    close: Any
    wait_for_queries: Any
    wait_for_all: Any
    load_queries: Any
    clear: Any
    seen_by: Any
    limits_of: Any
    multiply: Any
    restrict: Any
    absorb: Any
    accumulate: Any
    has_odd: Any
    accumulate_finite: Any
    positive: Any
    add_odd: Any
    finish: Any


def make_steps(shape: TileShape) -> Steps:
    """Make the steps of the kernel of one shape."""
    storage, width, keys = shape.storage, shape.width, shape.keys
    groups = shape.rows // 16  # of queries
    deep, long = width // 16, keys // 16  # steps of a sum over features, and over keys
    columns, features = keys // 8, width // 8  # of scores, and of the output
    row_bytes, tile_bytes = shape.row_bytes, keys * shape.row_bytes
    # exponents of all ones, in the lower and the upper half
    exponent = 0x7F80 if storage == "bfloat16" else 0x7C00

    def place(row, chunk):
        """Where a chunk of a row stands, in bytes."""
        return row * row_bytes + (chunk ^ row % 8) * 16

    def at(scores, m, n, i):
        return scores[(m * columns + n) * 4 + i]

    @unrolled
    def allocate():
        """The address of the block's memory."""
        return shared_memory(shape.shared_bytes)

    @unrolled
    def own_thread():
        """The index of the thread in its block, unknown to be the same from one tile to the next."""
        return opaque(thread_index())

    @unrolled
    def part_of(block, queries):
        """The slice of a block, and its first query: those that see most keys come first."""
        blocks = (narrow(queries) + (shape.queries - 1)) // shape.queries
        return block // blocks, (blocks - 1 - block % blocks) * shape.queries

    @unrolled
    def warp_of():
        """The index of the warp in its block."""
        return warp_index()

    @unrolled
    def tiles_of(count):
        """How many tiles `count` keys are in."""
        return (count + (keys - 1)) // keys

    @unrolled
    def first_key(tile):
        """The first key of a tile."""
        return narrow(tile) * keys

    @unrolled
    def stage_of(memory, tile):
        """The address of the stage of a tile."""
        return memory + narrow(tile) % 2 * shape.stage_bytes

    def make_copy(count):
        def copy_tile(to, source, step, first, limit, length, thread):
            """Begin to copy rows from `first` on, `step` elements apart, zeros from row `limit`, element `length`."""
            chunks = width // CHUNK
            first, limit, length = narrow(first), narrow(limit), narrow(length)
            chunk, own = thread % chunks, thread // chunks
            size = select(CHUNK * chunk < length, 16, 0)
            step_bytes = step * HALF
            for begin in range(0, count, shape.threads // chunks):
                row = begin + own
                within = select(first + row < limit, size, 0)
                copy_async(to + place(row, chunk), source + (first + row) * step_bytes + chunk * 16, within)

        return unrolled(copy_tile)

    @unrolled
    def load_queries(memory, thread):
        """The queries of a warp: 4 registers for each group and 16 features."""
        lane, warp = thread % LANES, thread // LANES
        fragments = []
        for m in range(groups):
            row = warp * shape.rows + 16 * m + lane % 16
            for k in range(deep):
                fragments.extend(load_matrices(memory + place(row, 2 * k + lane // 16)))
        return tuple(fragments)

    @unrolled
    def clear():
        """The output, the greatest score of each row, and the sum of its weights, before the first key.

        A lane has two rows of each group. Its sums are of its own columns alone, until the end.
        """
        return (0.0,) * (groups * features * 4), (-INFINITY,) * (2 * groups), (0.0,) * (2 * groups)

    def rows_of(first, thread):
        """The queries of the rows of a lane."""
        lane, warp = thread % LANES, thread // LANES
        row = narrow(first) + warp * shape.rows + lane // 4
        return [row + 16 * m + 8 * half for m in range(groups) for half in range(2)]

    @unrolled
    def close():
        """Make a group of the copies begun so far."""
        commit()

    @unrolled
    def wait_for_queries():
        """Wait for all groups of copies but the last."""
        wait(1)

    @unrolled
    def wait_for_all():
        """Wait for all copies."""
        wait(0)

    @unrolled
    def seen_by(first, queries, keys, offset, warp):
        """How many of the first keys are seen by any query of a block, by any of a warp, and by all of the warp."""
        queries, keys, own = narrow(queries), narrow(keys), first + warp * shape.rows
        offset = narrow(offset)
        limits = (minimum(first + shape.queries, queries), own + shape.rows, own + 1)
        return tuple(maximum(minimum(limit + offset, keys), 0) for limit in limits)

    @unrolled
    def limits_of(first, offset, count, queries, thread):
        """How many of the first keys each row of a lane may look at, none if there is no such query."""
        offset, count, queries = narrow(offset), narrow(count), narrow(queries)
        rows = rows_of(first, thread)
        return tuple(select(row < queries, minimum(row + offset + 1, count), 0) for row in rows)

    @unrolled
    def multiply(queries, stage, thread):
        """query · keyᵀ of a tile."""
        lane = thread % LANES
        sums = [[[0.0] * 4 for _ in range(columns)] for _ in range(groups)]
        row, chunk = lane % 8 + lane // 16 * 8, lane // 8 % 2
        for k in range(deep):
            for n in range(0, columns, 2):
                b = load_matrices(stage + place(row + 8 * n, chunk + 2 * k))
                for m in range(groups):
                    a = queries[(m * deep + k) * 4 : (m * deep + k) * 4 + 4]
                    sums[m][n] = mma(a, b[:2], sums[m][n], storage)
                    sums[m][n + 1] = mma(a, b[2:], sums[m][n + 1], storage)
        return tuple(x for group in sums for matrix in group for x in matrix)

    def look(mask_at, row_step, column_step, row, column, within):
        """Whether a query sees a key, and what the mask adds to their score; `within`: they are there to be asked."""
        if shape.mask == "none":
            return within, 0.0
        size = 1 if shape.mask == "bool" else 4 if shape.mask == "float32" else HALF
        where = mask_at + row * (row_step * size) + column * (column_step * size)
        if shape.mask == "bool":
            return load_byte(where, within) != 0, 0.0
        added = load_float(where, within) if size == 4 else widen(load_half(where, within), shape.mask)
        return within & (added != -INFINITY), added

    @unrolled
    def restrict(scores, first, limits, thread, first_query, mask_at, row_step, column_step, scale):
        """Apply the masks: -inf in place of the scores of keys that a row may not look at."""
        column, rows = narrow(first) + thread % 4 * 2, rows_of(first_query, thread)
        restricted = []
        for m in range(groups):
            for n in range(columns):
                for i in range(4):
                    row, key, score = 2 * m + i // 2, column + (8 * n + i % 2), at(scores, m, n, i)
                    sees, added = look(mask_at, row_step, column_step, rows[row], key, key < limits[row])
                    if shape.floating:
                        score = fma(score, scale, added)
                    restricted.append(select(sees, score, -INFINITY))
        return tuple(restricted)

    def power(score, shift, unit):
        """The weight of a score: base 2 if there is a factor `unit` in `shift`, base e else.

        finfo.min, which masks are full of, times log2(e) would be no number.
        """
        return exp2((score - shift) * LOG2_E) if shape.floating else exp2(fma(score, unit, -shift))

    @unrolled
    def absorb(scores, highest, total, output, unit):
        """Turn scores into weights, in halves, and bring the greatest score, the sums and the output up to them.

        The output may be empty, where only the sums are wanted.
        """
        highest, total, output = list(highest), list(total), list(output)
        # the fragment of the scores is the one of a left factor, 2 matrices of 8 columns to each 16 columns of it
        weights = [None] * (len(scores) // 2)
        for m in range(groups):
            for half in range(2):
                row = 2 * m + half
                own = [at(scores, m, n, 2 * half + i) for n in range(columns) for i in range(2)]
                top = highest[row]
                for score in own:
                    top = maximum(top, score)
                top = maximum(top, shuffle_xor(top, 1))
                top = maximum(top, shuffle_xor(top, 2))
                # a row that has seen no key yet: -inf - -inf would be NaN
                shift = select(top == -INFINITY, 0.0, top if shape.floating else top * unit)
                factor = power(highest[row], shift, unit)
                highest[row], total[row] = top, total[row] * factor
                for n in range(columns):
                    pair = [power(score, shift, unit) for score in own[2 * n : 2 * n + 2]]
                    total[row] = total[row] + (pair[0] + pair[1])
                    weights[(m * columns + n) * 2 + half] = pack(*pair, storage)
                for n in range(features if output else 0):
                    for i in (2 * half, 2 * half + 1):
                        index = (m * features + n) * 4 + i
                        output[index] = output[index] * factor
        return tuple(weights), tuple(highest), tuple(total), tuple(output)

    def values_of(stage, thread, k, n):
        """4 registers of the values: of 16 keys, the features of groups n and n + 1."""
        lane = thread % LANES
        return load_matrices_transposed(stage + tile_bytes + place(lane % 16 + 16 * k, n + lane // 16))

    def sum_values(output, weights, stage, thread, prepare):
        sums = [list(output[i : i + 4]) for i in range(0, len(output), 4)]
        for k in range(long):
            for n in range(0, features, 2):
                b = prepare(values_of(stage, thread, k, n))
                for m in range(groups):
                    a = weights[(m * long + k) * 4 : (m * long + k) * 4 + 4]
                    index = m * features + n
                    sums[index] = mma(a, b[:2], sums[index], storage)
                    sums[index + 1] = mma(a, b[2:], sums[index + 1], storage)
        return tuple(x for matrix in sums for x in matrix)

    @unrolled
    def accumulate(output, weights, stage, thread):
        """output + weights · value."""
        return sum_values(output, weights, stage, thread, lambda b: b)

    @unrolled
    def has_odd(stage, thread):
        """Whether any value of a tile is not finite: whether adding 1 to an exponent turns it over into the sign."""
        both, one = exponent * 0x10001, (exponent & -exponent) * 0x10001
        found = 0
        for begin in range(0, tile_bytes, 16 * LANES):
            for word in load_shared(stage + tile_bytes + thread % LANES * 16 + begin):
                found = found | (word & both) + one
        return warp_any((found & 0x80008000) != 0)

    @unrolled
    def accumulate_finite(output, weights, stage, thread):
        """The same as `accumulate`, without values that are not finite."""

        def prepare(registers):
            kept = []
            for word in registers:
                low, high = (word & exponent) == exponent, (word >> 16 & exponent) == exponent
                kept.append(word & select(low, 0xFFFF0000, ALL) & select(high, 0x0000FFFF, ALL))
            return kept

        return sum_values(output, weights, stage, thread, prepare)

    @unrolled
    def positive(weights):
        """Which weights of a lane are not 0: a word for each row, with a bit for each column."""
        words = []
        for m in range(groups):
            for half in range(2):
                word = 0
                for n in range(columns):
                    pair = weights[(m * columns + n) * 2 + half]
                    word = word | select((pair & 0xFFFF) != 0, 1 << 2 * n, 0)
                    word = word | select(pair >> 16 != 0, 2 << 2 * n, 0)
                words.append(opaque(word))
        return tuple(words)

    @unrolled
    def add_odd(output, bits, stage, first, row, limits, thread, first_query, mask_at, row_step, column_step):
        """Add what is not finite of the value of one key, row `row` of the stage, to the queries that see it.

        `bits` is what `positive` says: 0 times an infinity is NaN.
        """
        row, column = narrow(row), thread % 4 * 2
        key = narrow(first) + row
        # the lane that has the weight of this key
        owner, place_of_bit = thread % LANES // 4 * 4 + row % 8 // 2, row // 8 * 2 + row % 2
        sees, factors = [], []
        for query, limit, word in zip(rows_of(first_query, thread), limits, bits, strict=True):
            sees.append(look(mask_at, row_step, column_step, query, key, key < limit)[0])
            factors.append(select((shuffle(word, owner) >> place_of_bit & 1) != 0, 1.0, 0.0))
        sums = list(output)
        for n in range(features):
            word = load_word(stage + tile_bytes + place(row, n) + column * HALF)
            for i in range(2):
                half = word >> 16 & 0xFFFF if i else word & 0xFFFF
                odd = select((half & exponent) == exponent, widen(half, storage), 0.0)
                for m in range(groups):
                    for r in (2 * m, 2 * m + 1):
                        index = (m * features + n) * 4 + 2 * (r % 2) + i
                        sums[index] = select(sees[r], fma(odd, factors[r], sums[index]), sums[index])
        return tuple(sums)

    @unrolled
    def finish(output, highest, total, unit, out, begin, step, lse, lse_begin, first, count, length, thread):
        """Divide by the sums of the weights, and store the rows and their log-sum-exp."""
        rows, count, length = rows_of(first, thread), narrow(count), narrow(length)
        lane = thread % LANES
        target, column = global_address(out, begin), lane % 4 * 2
        for m in range(groups):
            for half in range(2):
                row, sums = rows[2 * m + half], total[2 * m + half]
                sums = sums + shuffle_xor(sums, 1)
                sums = sums + shuffle_xor(sums, 2)
                # a sum of 0 with a key to look at is that of scores too large for base 2: NaN, as of infinite ones
                empty = (sums == 0.0) & (highest[2 * m + half] == -INFINITY)
                inverse = reciprocal(sums)
                exists = row < count
                base = target + row * (step * HALF)
                for n in range(features):
                    index = (m * features + n) * 4 + 2 * half
                    pair = [select(empty, 0.0, output[index + i] * inverse) for i in range(2)]
                    where = column + 8 * n
                    store_pair(base + where * HALF, pack(*pair, storage), exists & (where < length))
                top = highest[2 * m + half] if shape.floating else highest[2 * m + half] * (unit * LN_2)
                value = select(empty, -INFINITY, top + log2(sums) * LN_2)
                store_float(global_address(lse, lse_begin) + row * 4, value, exists & (lane % 4 == 0))

    return Steps(
        allocate,
        own_thread,
        warp_of,
        part_of,
        tiles_of,
        first_key,
        stage_of,
        make_copy(shape.queries),
        make_copy(keys),
        close,
        wait_for_queries,
        wait_for_all,
        load_queries,
        clear,
        seen_by,
        limits_of,
        multiply,
        restrict,
        absorb,
        accumulate,
        has_odd,
        accumulate_finite,
        positive,
        add_odd,
        finish,
    )
