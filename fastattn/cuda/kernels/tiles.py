"""Tiles in shared memory and registers: their sizes, and device functions of the portable kernels that work on them.

Each function here makes device functions for tiles of given sizes, which the compiler then knows. Arguments called
`..._tile` are in shared memory; `scores`, `seen`, `m`, `total` and `sums` are the part that the calling thread, (y, x)
of its block, has in its registers: rows y, y + Y, ... and columns x, x + X, ... of the tile. The kernels see to it that
threads wait for each other.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastattn.cuda.kernels.elements import LOG2_E, device, exp2, minus_zero_test, philox
from fastattn.cuda.kernels.plan import DROP_BELOW, FIRST_BATCH, HEADS, QUERIES, VALUE_DIM


class Tiles(NamedTuple):
    """The sizes of the tiles, in elements.

    A block has ``threads_y * rows`` queries, ``threads_x * columns`` keys and ``threads_x * values`` columns of the
    result; of these, `rows`, `columns` and `values` are a thread's own. `features` of queries and keys, and
    `value_rows` rows of values, are in shared memory at a time.
    """

    threads_y: int
    threads_x: int
    rows: int
    columns: int
    values: int
    features: int
    value_rows: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.threads_y * self.threads_x

    @property
    def queries(self) -> int:
        """Queries of a block."""
        return self.threads_y * self.rows

    @property
    def keys(self) -> int:
        """Keys of a block."""
        return self.threads_x * self.columns

    @property
    def value_columns(self) -> int:
        """Columns of the result that a block computes."""
        return self.threads_x * self.values


class Block(NamedTuple):
    """What a block of threads of the forward pass has to do.

    Attributes
    ----------
    slice, query, value
        The slice, the first of its queries, and the first column of the result.
    queries
        How many queries there are.
    """

    slice: int
    query: int
    value: int
    queries: int


def parts_of_work(tiles: Tiles) -> Any:
    """The device function of the work of a block of threads, by its number."""
    block_q, block_v = tiles.queries, tiles.value_columns

    @device
    def part_of(block, sizes):
        """What a block has to do."""
        queries = sizes[QUERIES]
        parts = max(1, (sizes[VALUE_DIM] + block_v - 1) // block_v)
        blocks = (queries + block_q - 1) // block_q
        first_value = block % parts * block_v
        block = block // parts
        first_query = (blocks - 1 - block % blocks) * block_q
        return Block(block // blocks, first_query, first_value, min(block_q, queries - first_query))

    return part_of


def tile_loader(load: Any, real: Any) -> Any:
    """A device function that copies a part of an operand to shared memory, and says whether all of it is finite.

    Element (i, c) of the tile of `rows` x `columns` comes to stand at i * pitch + c. It is element (i, c) of the
    operand counted from `base`, times `factor`, and 0 where that has no more than `row_count` rows or `column_count`
    columns.
    """

    @device
    def load_tile(
        tile, rows, columns, pitch, factor, source, base, steps, operand, row_count, column_count, thread, threads
    ):
        row_step, column_step = steps[operand, 0], steps[operand, 1]
        finite = True
        for e in range(thread, rows * columns, threads):
            i = e // columns
            c = e - i * columns
            x = real(0)
            if i < row_count and c < column_count:
                x = load(source[base + i * row_step + c * column_step]) * factor
                finite = finite and x - x == 0
            tile[i * pitch + c] = x
        return finite

    return load_tile


def multiplication(tiles: Tiles) -> Any:
    """The device function that brings forward the scores by the features that are in shared memory."""
    rows, columns, features, pitch = tiles.rows, tiles.columns, tiles.features, tiles.features + 1
    threads_y, threads_x = tiles.threads_y, tiles.threads_x

    @device
    def multiply(scores, query_tile, key_tile, y, x):
        """scores[i][j] += query[i] · key[j]."""
        for f in range(features):
            for i in range(rows):
                for j in range(columns):
                    q = query_tile[(y + i * threads_y) * pitch + f]
                    scores[i, j] += q * key_tile[(x + j * threads_x) * pitch + f]

    return multiply


def softmax_functions(tiles: Tiles, real: Any, base_2: bool) -> tuple[Any, Any]:
    """The device functions of the online softmax: `publish` maxima, then `absorb` a block of scores."""
    rows, columns, values, threads_y, threads_x = (
        tiles.rows,
        tiles.columns,
        tiles.values,
        tiles.threads_y,
        tiles.threads_x,
    )
    pitch = tiles.keys + 1
    to_base_2 = real(1.0 if base_2 else LOG2_E)
    lowest, zero, hidden = real(-math.inf), real(0), real(-0.0)

    @device
    def publish(scores, maxima_tile, y, x):
        """Show the other threads of a row the maximum of this thread's scores."""
        for i in range(rows):
            top = lowest
            for j in range(columns):
                top = max(top, scores[i, j])
            maxima_tile[(y + i * threads_y) * threads_x + x] = top

    @device
    def absorb(scores, seen, maxima_tile, weights_tile, m, total, sums, y, x):
        """Turn scores into weights, and bring m, the total of the weights and the sums up to date."""
        for i in range(rows):
            top = m[i]
            for other in range(threads_x):
                top = max(top, maxima_tile[(y + i * threads_y) * threads_x + other])
            shift = top if top > lowest else zero  # no key so far: -inf less -inf is NaN
            factor = exp2((m[i] - shift) * to_base_2)
            m[i] = top
            total[i] *= factor
            for c in range(values):
                sums[i, c] *= factor
            for j in range(columns):
                weight = exp2((scores[i, j] - shift) * to_base_2)
                total[i] += weight
                weights_tile[(y + i * threads_y) * pitch + x + j * threads_x] = weight if seen[i, j] else hidden

    return publish, absorb


def dropping(tiles: Tiles, real: Any) -> Any:
    """The device function of dropout: a thread draws for four neighbouring keys at a time."""
    block_q, groups, pitch = tiles.queries, tiles.keys // 4, tiles.keys + 1
    threads, zero = tiles.threads, real(0)

    @device
    def drop(weights_tile, slice_, first_query, first_key, sizes, seed_low, seed_high, thread):
        """Set to 0 what dropout takes from a block of weights; first_key is a multiple of 4."""
        batch, head = sizes[FIRST_BATCH] + slice_ // sizes[HEADS], slice_ % sizes[HEADS]
        below = np.uint64(sizes[DROP_BELOW])
        for e in range(thread, block_q * groups, threads):
            i = e // groups
            at = i * pitch + (e - i * groups) * 4
            group = first_key // 4 + e - i * groups
            words = philox(group, first_query + i, head, batch, seed_low, seed_high)
            # times 0: NaN stays, and so does -0.0
            if words[0] < below:
                weights_tile[at] *= zero
            if words[1] < below:
                weights_tile[at + 1] *= zero
            if words[2] < below:
                weights_tile[at + 2] *= zero
            if words[3] < below:
                weights_tile[at + 3] *= zero

    return drop


def addition(tiles: Tiles, real: Any) -> tuple[Any, Any]:
    """The device functions `add_values` and `add_visible_values`: what is behind a mask is left out by the second."""
    threads_y, threads_x, rows, values, value_rows = (
        tiles.threads_y,
        tiles.threads_x,
        tiles.rows,
        tiles.values,
        tiles.value_rows,
    )
    pitch, block_v = tiles.keys + 1, tiles.value_columns
    is_hidden = minus_zero_test(real)

    @device
    def add_values(sums, weights_tile, value_tile, first_row, y, x):
        """sums[i][c] += Σ_r weights[i][first_row + r] · value[r][c]."""
        for r in range(value_rows):
            for i in range(rows):
                for c in range(values):
                    weight = weights_tile[(y + i * threads_y) * pitch + first_row + r]
                    sums[i, c] += weight * value_tile[r * block_v + x + c * threads_x]

    @device
    def add_visible_values(sums, weights_tile, value_tile, first_row, y, x):
        """The same, of the keys that a query may look at."""
        for r in range(value_rows):
            for i in range(rows):
                weight = weights_tile[(y + i * threads_y) * pitch + first_row + r]
                if not is_hidden(weight):
                    for c in range(values):
                        sums[i, c] += weight * value_tile[r * block_v + x + c * threads_x]

    return add_values, add_visible_values
