"""Tiles of attention on tensor cores: steps that the forward and the backward pass share, in registers.

A step is a function of a `TileShape`, and of what is known when the kernel runs: `unrolled` makes of the step and a
shape what kernels call.

Fragments are flat tuples: element i of matrix (m, n) of the scores or of the output, of 16 queries and 8 keys or
features, stands at (m * N + n) * 4 + i, N matrices to a group of queries. What lane has which element is PTX's doing:
lane 4 g + t has columns 2 t and 2 t + 1 of row g, then the same of row g + 8.

The backward pass calls its own rows queries here, and those that come by keys, whichever they are.
"""

from __future__ import annotations

from typing import NamedTuple

from fastattn.cuda.kernels.primitives import (
    commit,
    copy_async,
    fma,
    global_address,
    load_byte,
    load_float,
    load_half,
    load_matrices,
    load_matrices_transposed,
    load_word,
    mma,
    narrow,
    opaque,
    select,
    shared_memory,
    shuffle,
    shuffle_xor,
    thread_index,
    unrolled,
    wait,
    warp_any,
    warp_index,
    widen,
)

LANES = 32
CHUNK = 8  # halves in 16 bytes
HALF, FLOAT = 2, 4  # bytes
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
    def groups(self) -> int:
        """Groups of 16 queries that a warp has."""
        return self.rows // 16

    @property
    def key_matrices(self) -> int:
        """Matrices of 8 keys in a group's scores."""
        return self.keys // 8

    @property
    def feature_matrices(self) -> int:
        """Matrices of 8 features in a group's output."""
        return self.width // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in shared memory."""
        return HALF * self.width

    @property
    def tile_bytes(self) -> int:
        """Bytes of the keys of a tile, or of its values."""
        return self.keys * self.row_bytes

    @property
    def stage_bytes(self) -> int:
        """Bytes of the keys and values of a tile."""
        return 2 * self.tile_bytes

    @property
    def floating(self) -> bool:
        """Whether the mask is added to the scores, which are not in base 2 then."""
        return self.mask not in ("none", "bool")

    @property
    def exponent(self) -> int:
        """The bits of a half's exponent: in what is not finite, all of them are set."""
        return 0x7F80 if self.storage == "bfloat16" else 0x7C00

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of the forward pass."""
        return self.stage_bytes + max(self.stage_bytes, self.queries * self.row_bytes)


#: Steps that know no shape. `address`: of an element of an array in global memory. `close`: make a group of the copies
#: begun so far. `warp_of`: the index of the warp in its block.
address, close, warp_of = (unrolled(step) for step in (global_address, commit, warp_index))


@unrolled
def own_thread():
    """The index of the thread in its block, unknown to be the same from one tile to the next."""
    return opaque(thread_index())


@unrolled
def wait_for_all():
    """Wait for all copies."""
    wait(0)


@unrolled
def wait_for_first():
    """Wait for all groups of copies but the last."""
    wait(1)


# -- shared memory -----------------------------------------------------------------------------------------------------


def allocate(spec):
    """The address of the block's memory."""
    return shared_memory(spec.shared_bytes)


def stage_of(shape, memory, tile):
    """The address of the stage of a tile."""
    return memory + narrow(tile) % 2 * shape.stage_bytes


def second_tile(shape, stage):
    """The address of what stands behind the keys in a stage: the values, or dO."""
    return stage + shape.tile_bytes


def place(shape, row, chunk):
    """Where a chunk of a row stands, in bytes."""
    return row * shape.row_bytes + (chunk ^ row % 8) * 16


def copy_rows(shape, count, to, source, step, first, limit, length, thread):
    """Begin to copy `count` rows from `first` on, `step` elements apart, zeros from row `limit`, element `length`."""
    chunks = shape.width // CHUNK
    first, limit, length = narrow(first), narrow(limit), narrow(length)
    chunk, own = thread % chunks, thread // chunks
    size = select(CHUNK * chunk < length, 16, 0)
    step_bytes = step * HALF
    for begin in range(0, count, shape.threads // chunks):
        row = begin + own
        within = select(first + row < limit, size, 0)
        copy_async(to + place(shape, row, chunk), source + (first + row) * step_bytes + chunk * 16, within)


def load_queries(shape, memory, thread):
    """The queries of a warp: 4 registers for each group and 16 features."""
    lane, warp = thread % LANES, thread // LANES
    fragments = []
    for m in range(shape.groups):
        row = warp * shape.rows + 16 * m + lane % 16
        for k in range(shape.width // 16):
            fragments.extend(load_matrices(memory + place(shape, row, 2 * k + lane // 16)))
    return tuple(fragments)


# -- products ----------------------------------------------------------------------------------------------------------


def multiply(shape, queries, stage, thread):
    """query · keyᵀ of a tile."""
    lane, groups, columns, steps = thread % LANES, shape.groups, shape.key_matrices, shape.width // 16
    sums = [[[0.0] * 4 for _ in range(columns)] for _ in range(groups)]
    row, chunk = lane % 8 + lane // 16 * 8, lane // 8 % 2
    for k in range(steps):
        for n in range(0, columns, 2):
            b = load_matrices(stage + place(shape, row + 8 * n, chunk + 2 * k))
            for m in range(groups):
                a = queries[(m * steps + k) * 4 : (m * steps + k) * 4 + 4]
                sums[m][n] = mma(a, b[:2], sums[m][n], shape.storage)
                sums[m][n + 1] = mma(a, b[2:], sums[m][n + 1], shape.storage)
    return tuple(x for group in sums for matrix in group for x in matrix)


def clear(shape):
    """The output, before the first key: zeros."""
    return (0.0,) * (shape.groups * shape.feature_matrices * 4)


def accumulate(shape, output, weights, stage, thread):
    """output + weights · value."""
    return _sum_values(shape, output, weights, stage, thread, list)


def accumulate_finite(shape, output, weights, stage, thread):
    """The same as `accumulate`, without values that are not finite."""

    def finite(registers):
        kept = []
        for word in registers:
            low = (word & shape.exponent) == shape.exponent
            high = (word >> 16 & shape.exponent) == shape.exponent
            kept.append(word & select(low, 0xFFFF0000, ALL) & select(high, 0x0000FFFF, ALL))
        return kept

    return _sum_values(shape, output, weights, stage, thread, finite)


def _sum_values(shape, output, weights, stage, thread, prepare):
    sums = [list(output[i : i + 4]) for i in range(0, len(output), 4)]
    steps, features = shape.keys // 16, shape.feature_matrices
    for k in range(steps):
        for n in range(0, features, 2):
            b = prepare(_values_of(shape, stage, thread, k, n))
            for m in range(shape.groups):
                a = weights[(m * steps + k) * 4 : (m * steps + k) * 4 + 4]
                index = m * features + n
                sums[index] = mma(a, b[:2], sums[index], shape.storage)
                sums[index + 1] = mma(a, b[2:], sums[index + 1], shape.storage)
    return tuple(x for matrix in sums for x in matrix)


def _values_of(shape, stage, thread, k, n):
    """4 registers of the values: of 16 keys, the features of groups n and n + 1."""
    lane = thread % LANES
    return load_matrices_transposed(second_tile(shape, stage) + place(shape, lane % 16 + 16 * k, n + lane // 16))


# -- what a query may look at ------------------------------------------------------------------------------------------


def rows_of(shape, first, thread):
    """The queries of the rows of a lane: two of each group."""
    lane, warp = thread % LANES, thread // LANES
    row = narrow(first) + warp * shape.rows + lane // 4
    return [row + 16 * m + 8 * half for m in range(shape.groups) for half in range(2)]


def look(shape, mask, row, column, within):
    """Whether a query sees a key, and what the mask adds to their score.

    `mask` is where it begins, and its steps, in elements; `within`: query and key are there to be asked.
    """
    if shape.mask == "none":
        return within, 0.0
    mask_at, row_step, column_step = mask
    size = 1 if shape.mask == "bool" else FLOAT if shape.mask == "float32" else HALF
    where = mask_at + row * (row_step * size) + column * (column_step * size)
    if shape.mask == "bool":
        return load_byte(where, within) != 0, 0.0
    added = load_float(where, within) if size == FLOAT else widen(load_half(where, within), shape.mask)
    return within & (added != -INFINITY), added


def whole(total):
    """The sum of a row, of which four lanes have some terms each."""
    total = total + shuffle_xor(total, 1)
    return total + shuffle_xor(total, 2)


# -- what is not finite ------------------------------------------------------------------------------------------------


def any_not_finite(shape, words):
    """Whether any half in these words is not finite in any lane.

    That is when adding 1 to its exponent turns it over into the sign.
    """
    both, one = shape.exponent * 0x10001, (shape.exponent & -shape.exponent) * 0x10001
    found = 0
    for word in words:
        found = found | (word & both) + one
    return warp_any((found & 0x80008000) != 0)


def positive(shape, weights):
    """Which weights of a lane are not 0: a word for each row, with a bit for each column."""
    words = []
    for m in range(shape.groups):
        for half in range(2):
            word = 0
            for n in range(shape.key_matrices):
                pair = weights[(m * shape.key_matrices + n) * 2 + half]
                word = word | select((pair & 0xFFFF) != 0, 1 << 2 * n, 0)
                word = word | select(pair >> 16 != 0, 2 << 2 * n, 0)
            words.append(opaque(word))
    return tuple(words)


def place_of_weight(row, thread):
    """Which lane has the weights of key `row` of a tile for the rows of a lane, and which bit of `positive` tells."""
    return thread % LANES // 4 * 4 + row % 8 // 2, row // 8 * 2 + row % 2


def factor_of(word, owner, bit):
    """1 if the weight of `place_of_weight` is not 0, else 0; `word` is what `positive` says of the row."""
    return select((shuffle(word, owner) >> bit & 1) != 0, 1.0, 0.0)


def add_not_finite(shape, output, stage, row, sees, factors, thread):
    """Add what is not finite of the value of one key, row `row` of the stage, to the rows of a lane that see it.

    `factors` are those of `factor_of`: 0 times an infinity is NaN.
    """
    sums, column = list(output), thread % 4 * 2
    for n in range(shape.feature_matrices):
        word = load_word(second_tile(shape, stage) + place(shape, row, n) + column * HALF)
        for i in range(2):
            half = word >> 16 & 0xFFFF if i else word & 0xFFFF
            odd = select((half & shape.exponent) == shape.exponent, widen(half, shape.storage), 0.0)
            for r in range(2 * shape.groups):
                index = (r // 2 * shape.feature_matrices + n) * 4 + 2 * (r % 2) + i
                sums[index] = select(sees[r], fma(odd, factors[r], sums[index]), sums[index])
    return tuple(sums)
