"""The forward pass on tensor cores: mma.sync on halves, for compute capability 8.0 and later.

The schedule is FlashAttention-2's [1]_. A block of warps takes the queries of one tile, each warp `TileShape.rows` of
them, and walks over the tiles of keys that any of them may look at:

    scores  = query · keyᵀ                fragments of float32, in registers
    weights = 2^(scores · unit - m)       m the greatest so far; sum and output are rescaled where it rises
    output += weights · value             the weights are rounded to halves, and stay in their registers

Keys and values of the next tile are copied to shared memory meanwhile. There, a row of D halves is D / 8 chunks of 16
bytes, and chunk c of row r stands at place c ^ (r % 8), so that 8 rows of one chunk, which is what ldmatrix reads at a
time, are in all 32 banks:

    memory    | stage 0: keys [Bk][D], values [Bk][D] | stage 1: the same; the queries [Bq][D] until they are loaded |

What a query may not look at has no part in it, NaN and infinity included. Rows beyond the last key are zeros. In tiles
where one query sees a key and another does not, values that are not finite are taken out, since 0 · NaN is NaN, and
added afterwards to the queries that see them.

References
----------
.. [1] Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023, arXiv 2307.08691.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from fastattn.cuda.available import SIMULATED
from fastattn.cuda.elements import LN_2, LOG2_E
from fastattn.cuda.plan import (
    CAUSAL_OFFSET,
    HEAD_DIM,
    KEY,
    KEYS,
    OUT,
    QUERIES,
    QUERY,
    VALUE,
    VALUE_DIM,
    slices_of,
)
from fastattn.cuda.primitives import (
    commit,
    copy_async,
    exp2,
    fma,
    global_address,
    load_matrices,
    load_matrices_transposed,
    load_shared,
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
    shuffle_xor,
    store_float,
    store_pair,
    thread_index,
    unrolled,
    wait,
    warp_any,
    warp_index,
)
from fastattn.problem import Problem

LANES = 32
CHUNK = 8  # halves in 16 bytes
HALF = 2  # bytes
ALL = 0xFFFFFFFF
INFINITY, NAN = float("inf"), float("nan")


class TileShape(NamedTuple):
    """What a kernel is compiled for.

    Attributes
    ----------
    storage : {"bfloat16", "float16"}
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
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.stage_bytes + max(self.stage_bytes, self.queries * self.row_bytes)


def shape_for(storage: str, width: int) -> TileShape:
    """The shape for rows of up to `width` elements."""
    # 32 queries to a warp halve what it reads of keys and values from shared memory; with 128 features these would not
    # fit in its registers
    if width <= 64:
        return TileShape(storage, width=64, warps=4, rows=32, keys=48, blocks=2)
    return TileShape(storage, width=128, warps=4, rows=16, keys=32, blocks=3)


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
    hide: Any
    absorb: Any
    accumulate: Any
    accumulate_finite: Any
    add_odd: Any
    finish: Any


def make_steps(shape: TileShape) -> Steps:
    """Make the steps of the kernel of one shape.

    Fragments are tuples: scores[m][n][i] and output[m][n][i] are flat, element i of the 16×8 matrix of query group m
    and key or feature group n.
    """
    storage, width, keys = shape.storage, shape.width, shape.keys
    groups = shape.rows // 16  # of queries
    deep, long = width // 16, keys // 16  # steps of a sum over features, and over keys
    columns, features = keys // 8, width // 8  # of scores, and of the output
    row_bytes, tile_bytes = shape.row_bytes, keys * shape.row_bytes
    # exponents of all ones, in the lower and the upper half
    exponent, fraction = (0x7F80, 0x007F) if storage == "bfloat16" else (0x7C00, 0x03FF)

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
            """Begin to copy rows `first` up, `step` elements apart; zeros from row `limit` and from element `length`."""
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
    def limits_of(first, offset, count, thread):
        """How many of the first keys each row of a lane may look at."""
        offset, count = narrow(offset), narrow(count)
        return tuple(minimum(row + offset + 1, count) for row in rows_of(first, thread))

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

    @unrolled
    def hide(scores, first, limits, thread):
        """-inf in place of the scores of keys that a row may not look at; `first` is the first key of the tile."""
        column = narrow(first) + thread % 4 * 2
        hidden = []
        for m in range(groups):
            for n in range(columns):
                for i in range(4):
                    sees = column + (8 * n + i % 2) < limits[2 * m + i // 2]
                    hidden.append(select(sees, at(scores, m, n, i), -INFINITY))
        return tuple(hidden)

    @unrolled
    def absorb(scores, highest, total, output, unit):
        """Turn scores into weights, in halves, and bring the greatest score, the sums and the output up to them."""
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
                shift = select(top == -INFINITY, 0.0, top * unit)
                factor = exp2(fma(highest[row], unit, -shift))
                highest[row], total[row] = top, total[row] * factor
                for n in range(columns):
                    pair = [exp2(fma(score, unit, -shift)) for score in own[2 * n : 2 * n + 2]]
                    total[row] = total[row] + (pair[0] + pair[1])
                    weights[(m * columns + n) * 2 + half] = pack(*pair, storage)
                for n in range(features):
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
    def accumulate_finite(output, weights, stage, thread):
        """The same without values that are not finite, and whether there are any."""
        odd = [False]

        def prepare(registers):
            kept = []
            for word in registers:
                low, high = (word & exponent) == exponent, (word >> 16 & exponent) == exponent
                odd[0] = odd[0] | low | high
                kept.append(word & select(low, 0xFFFF0000, ALL) & select(high, 0x0000FFFF, ALL))
            return kept

        return sum_values(output, weights, stage, thread, prepare), warp_any(odd[0])

    @unrolled
    def add_odd(output, stage, first, row, limits, thread):
        """Add what is not finite of the value of one key, row `row` of the stage, to the queries that see it."""
        row, column = narrow(row), thread % 4 * 2
        sees = [narrow(first) + row < limit for limit in limits]
        sums = list(output)
        for n in range(features):
            word = load_shared(stage + tile_bytes + place(row, n) + column * HALF)
            for i in range(2):
                bits = word >> 16 * i
                special = select((bits & fraction) != 0, NAN, select((bits & 0x8000) != 0, -INFINITY, INFINITY))
                value = select((bits & exponent) == exponent, special, 0.0)
                for m in range(groups):
                    for half in range(2):
                        index = (m * features + n) * 4 + 2 * half + i
                        sums[index] = sums[index] + select(sees[2 * m + half], value, 0.0)
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
                empty = sums == 0.0
                inverse = reciprocal(sums)
                exists = row < count
                base = target + row * (step * HALF)
                for n in range(features):
                    index = (m * features + n) * 4 + 2 * half
                    pair = [select(empty, 0.0, output[index + i] * inverse) for i in range(2)]
                    where = column + 8 * n
                    store_pair(base + where * HALF, pack(*pair, storage), exists & (where < length))
                value = select(empty, -INFINITY, (highest[2 * m + half] * unit + log2(sums)) * LN_2)
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
        hide,
        absorb,
        accumulate,
        accumulate_finite,
        add_odd,
        finish,
    )


def forward(shape: TileShape) -> Any:
    """The kernel of the result and the log-sum-exp: a block of warps for each block of queries of each slice.

    Its arguments are those of `fastattn.cuda.portable.forward`, of which it does without the mask and dropout's.
    """
    own = make_steps(shape)
    allocate, own_thread, part_of = own.allocate, own.own_thread, own.part_of
    warp_of, tiles_of = own.warp_of, own.tiles_of
    first_key, stage_of = own.first_key, own.stage_of
    copy_queries, copy_keys, close = own.copy_queries, own.copy_keys, own.close
    wait_for_queries, wait_for_all = own.wait_for_queries, own.wait_for_all
    load_queries, clear, seen_by = own.load_queries, own.clear, own.seen_by
    limits_of, multiply = own.limits_of, own.multiply
    hide, absorb, accumulate = own.hide, own.absorb, own.accumulate
    accumulate_finite, add_odd, finish = own.accumulate_finite, own.add_odd, own.finish
    address = unrolled(global_address)
    tile_queries, tile_keys, rows, tile_bytes = shape.queries, shape.keys, shape.rows, shape.stage_bytes // 2

    def kernel(query, key, value, mask, out, lse, offsets, steps, sizes, unit, keep_scale, seed_low, seed_high):
        queries, keys, length = sizes[QUERIES], sizes[KEYS], sizes[HEAD_DIM]
        value_length, offset = sizes[VALUE_DIM], sizes[CAUSAL_OFFSET]
        part, first = part_of(cuda.blockIdx.x, queries)
        thread, memory = own_thread(), allocate()

        # how many of the first keys are seen by any query of the block, by any of the warp, and by all of the warp
        block_sees, warp_sees, all_see = seen_by(first, queries, keys, offset, warp_of())

        query_at = address(query, offsets[QUERY, part])
        key_at, value_at = address(key, offsets[KEY, part]), address(value, offsets[VALUE, part])
        copy_queries(stage_of(memory, 1), query_at, steps[QUERY, 0], first, queries, length, thread)
        close()
        key_step, value_step = steps[KEY, 0], steps[VALUE, 0]
        copy_keys(memory, key_at, key_step, 0, keys, length, thread)
        copy_keys(memory + tile_bytes, value_at, value_step, 0, keys, value_length, thread)
        close()
        wait_for_queries()
        cuda.syncthreads()
        left = load_queries(stage_of(memory, 1), thread)

        output, highest, total = clear()
        for tile in range(tiles_of(block_sees)):
            # of what is computed from this nothing is kept from tile to tile, where registers are short
            thread = own_thread()
            begin, after = first_key(tile), first_key(tile + 1)
            stage, following = stage_of(memory, tile), stage_of(memory, tile + 1)
            wait_for_all()
            # the tile is there for all warps, and none reads the one before it any more
            cuda.syncthreads()
            if after < block_sees:
                copy_keys(following, key_at, key_step, after, keys, length, thread)
                copy_keys(following + tile_bytes, value_at, value_step, after, keys, value_length, thread)
                close()
            if begin < warp_sees:
                scores = multiply(left, stage, thread)
                if after <= all_see:
                    weights, highest, total, output = absorb(scores, highest, total, output, unit)
                    output = accumulate(output, weights, stage, thread)
                else:
                    limits = limits_of(first, offset, keys, thread)
                    scores = hide(scores, begin, limits, thread)
                    weights, highest, total, output = absorb(scores, highest, total, output, unit)
                    output, odd = accumulate_finite(output, weights, stage, thread)
                    if odd:
                        for row in range(tile_keys):
                            output = add_odd(output, stage, begin, row, limits, thread)
        wait_for_all()
        finish(
            output, highest, total, unit, out, offsets[OUT, part], steps[OUT, 0], lse, part * queries, first, queries,
            value_length, thread,
        )  # fmt: skip

    return kernel


def options(shape: TileShape) -> dict[str, Any]:
    """The options of `cuda.jit` for this kernel: how many registers a thread may have follows from them."""
    return {} if SIMULATED else {"launch_bounds": (shape.threads, shape.blocks)}


def block_of(shape: TileShape) -> tuple[int, int]:
    """The block that the kernel is launched with; in the simulator a thread stands for a warp."""
    return (shape.warps if SIMULATED else shape.threads), 1


def grid_of(shape: TileShape, problem: Problem) -> int:
    """How many blocks a problem takes."""
    return slices_of(problem) * -(-problem.queries // shape.queries)
