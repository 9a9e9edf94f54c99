"""The forward pass on any GPU, and the matrix of weights: FlashAttention's loop order on tiles in shared memory.

    for each block of queries:                       a block of threads each; threads stand in a grid of Y x X
        for each block of keys:                      those that positions and lengths let any of them see
            s[i][j] = query[i] · key[j]              in registers: i = y, y + Y, ...; j = x, x + X, ...
            s       = scale · s, capped, + mask, or -inf where the query may not look
            w[i][j] = 2^(s[i][j] - m[i])             m follows the maximum (online softmax); w goes to shared memory
            out[i] += Σ_j w[i][j] · value[j]         in registers: columns x, x + X, ...

Nothing here is special to an architecture: numbers of the storage type are multiplied as float32 (float64 as float64),
and threads speak to each other through shared memory alone. Values wider than a block's columns are shared among
blocks of threads that each compute the scores again.

Scores are in base 2: the scale has a factor log2(e) in it. Where something is added to them they stay in base e, since
finfo.min times log2(e) is no number, and where scale or softcap is extreme (see `fastattn.cuda.host.plan`), which has
all arithmetic in float64 as well; `to_base_2` is log2(e) then, else 1.

A key that a query may not look at has the weight -0.0, which adds nothing to a finite sum. Where a block of values
holds NaN or infinities, weights that are -0.0 are left out, as 0 · NaN is NaN.

What happens to a score is in `fastattn.cuda.kernels.scores`, what works on tiles in `fastattn.cuda.kernels.tiles`;
`syncthreads` stands here alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from fastattn.call.rounding import PRECISE
from fastattn.cuda.kernels.elements import LN_2, LOG2_E, device, exp2, holder, loader, log2, real_of, storer
from fastattn.cuda.kernels.plan import (
    HEAD_DIM,
    KEY,
    KEYS,
    LSE,
    NUMBERS,
    OUT,
    QUERIES,
    QUERY,
    REST,
    SHIFT,
    SLICES,
    VALUE,
    VALUE_DIM,
)
from fastattn.cuda.kernels.scores import head_of, in_base_2, keys_of_queries, kinds, restriction
from fastattn.cuda.kernels.tiles import (
    Tiles,
    addition,
    dropping,
    multiplication,
    parts_of_work,
    softmax_functions,
    tile_loader,
)
from fastattn.functions.function import Function
from fastattn.functions.kinds import EMPTY


class Forward(NamedTuple):
    """What a forward kernel is compiled for.

    Attributes
    ----------
    storage : {"float16", "bfloat16", "float32", "float64"}
        What operands and result are stored in.
    mask : str
        The same of the mask, or "bool", or "none".
    dropout : bool
    tiles : Tiles
    extreme : bool
        What `fastattn.cuda.host.plan` says of scale and softcap.
    keep : bool
        Whether there is a boolean mask beside a floating one.
    softcap : bool
    adds : bool
        Whether something is added to scores.
    own : tuple of str
        Which fields of `fastattn.call.scores.HEAD` heads have of their own, but for those in `BOUNDING`.
    score_mod, mask_mod : Function or None
        The user's functions.
    """

    storage: str
    mask: str
    dropout: bool
    tiles: Tiles
    extreme: bool = False
    keep: bool = False
    softcap: bool = False
    adds: bool = False
    own: tuple[str, ...] = ()
    score_mod: Function | None = None
    mask_mod: Function | None = None


class Weights(Forward):
    """What a kernel of weights is compiled for."""


class Shifts(NamedTuple):
    """What a kernel of shifts is compiled for; `base_2`: whether there is a factor log2(e) in the scale."""

    storage: str
    mask: str
    tiles: Tiles
    base_2: bool
    extreme: bool = False
    keep: bool = False
    softcap: bool = False
    adds: bool = False
    own: tuple[str, ...] = ()
    score_mod: Function | None = None
    mask_mod: Function | None = None


class Copy(NamedTuple):
    """What a kernel that copies a result is compiled for."""

    storage: str


def forward(spec: Forward) -> Any:
    """The kernel of the result and the log-sum-exp.

    A block of threads for each block of queries of each slice, and of columns of the result, all along x. The last
    queries come first: under a causal mask they have the most to do.
    """
    dropout, tiles, real = spec.dropout, spec.tiles, real_of(spec.storage, spec.extreme)
    find_scores, drop = _make_find_scores(spec), dropping(tiles, real)
    publish, absorb = softmax_functions(tiles, real, in_base_2(spec.adds, spec.extreme))
    part_of, add_values, finish = parts_of_work(tiles), _make_add_values(spec), _make_finish(spec)
    threads_x, rows, columns, values = tiles.threads_x, tiles.rows, tiles.columns, tiles.values
    block_q, block_k, features = tiles.queries, tiles.keys, tiles.features
    # rows of shared tiles are an element longer, so that the threads of a warp read from different banks
    query_size, key_size = block_q * (features + 1), max(block_k * (features + 1), block_q * (block_k + 1))
    value_size = max(tiles.value_rows * tiles.value_columns, block_q * threads_x)
    lowest, zero, (kind_of, first_of) = real(-math.inf), real(0), kinds(spec)

    def kernel(
        query, key, value, mask, out, lse, offsets, steps, sizes, scale, keep_scale, seed_low, seed_high, keep, own,
        captured,
    ):  # fmt: skip
        query_tile = cuda.shared.array(query_size, real)
        key_tile = cuda.shared.array(key_size, real)  # after the scores: the weights
        value_tile = cuda.shared.array(value_size, real)  # before the values: what a row's threads tell each other
        scores = cuda.local.array((rows, columns), real)
        seen = cuda.local.array((rows, columns), np.bool_)
        sums = cuda.local.array((rows, values), real)
        m = cuda.local.array(rows, real)
        total = cuda.local.array(rows, real)  # of the weights of this thread's own keys
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        here, head_dim, value_dim = part_of(cuda.blockIdx.x, sizes), sizes[HEAD_DIM], sizes[VALUE_DIM]
        head = head_of(here.slice, offsets, steps, sizes, own, captured)
        begin, end = keys_of_queries(head, here.query, here.query + here.queries - 1, block_k)
        begin = first_of(head, here.query, begin, end)
        value_base = offsets[VALUE, here.slice] + here.value * steps[VALUE, 1]

        for i in range(rows):
            m[i] = lowest
            total[i] = zero
            for c in range(values):
                sums[i, c] = zero

        for first_key in range(begin, end, block_k):
            if kind_of(head, here.query, first_key) == EMPTY:
                continue
            count = min(block_k, end - first_key)
            find_scores(
                scores, seen, query_tile, key_tile, query, key, mask, keep, offsets, steps, sizes, head, scale,
                here.slice, here.query, first_key, here.queries, count, first_key == begin or head_dim > features, y, x,
            )  # fmt: skip
            cuda.syncthreads()
            publish(scores, value_tile, y, x)
            cuda.syncthreads()
            absorb(scores, seen, value_tile, key_tile, m, total, sums, y, x)
            if dropout:
                cuda.syncthreads()
                drop(key_tile, here.slice, here.query, first_key, sizes, seed_low, seed_high, y * threads_x + x)
            at = value_base + first_key * steps[VALUE, 0]
            add_values(sums, key_tile, value_tile, value, at, steps, count, value_dim - here.value, y, x)

        finish(out, lse, value_tile, sums, m, total, offsets, steps, sizes, here, head, keep_scale, y, x)

    return kernel


def _make_find_scores(spec: Forward | Weights | Shifts) -> Any:
    """A device function of a block of queries and one of keys."""
    tiles, real = spec.tiles, real_of(spec.storage, spec.extreme)
    load_tile, multiply = tile_loader(loader(spec.storage, real), real), multiplication(tiles)
    restrict = restriction(spec)
    threads, block_q, block_k, features = tiles.threads, tiles.queries, tiles.keys, tiles.features
    rows, columns, threads_x, pitch = tiles.rows, tiles.columns, tiles.threads_x, tiles.features + 1
    one, zero = real(1), real(0)

    @device
    def find_scores(
        scores, seen, query_tile, key_tile, query, key, mask, keep, offsets, steps, sizes, head, scale, slice_,
        first_query, first_key, present, count, fresh, y, x,
    ):  # fmt: skip
        """The scores, and whether the query may look at the key, of so many queries and keys.

        `fresh`: the queries have to be loaded, and are not in shared memory from the keys before.
        """
        thread, head_dim = y * threads_x + x, sizes[HEAD_DIM]
        query_base = offsets[QUERY, slice_] + first_query * steps[QUERY, 0]
        key_base = offsets[KEY, slice_] + first_key * steps[KEY, 0]
        for i in range(rows):
            for j in range(columns):
                scores[i, j] = zero
        for f in range(0, head_dim, features):
            left = head_dim - f
            cuda.syncthreads()
            if fresh:
                at = query_base + f * steps[QUERY, 1]
                load_tile(
                    query_tile, block_q, features, pitch, scale, query, at, steps, QUERY, present, left, thread, threads
                )
            at = key_base + f * steps[KEY, 1]
            load_tile(key_tile, block_k, features, pitch, one, key, at, steps, KEY, count, left, thread, threads)
            cuda.syncthreads()
            multiply(scores, query_tile, key_tile, y, x)
        restrict(scores, seen, mask, keep, head, first_query, first_key, y, x)

    return find_scores


def _make_add_values(spec: Forward) -> Any:
    """A device function of the weights and values of a block of keys."""
    tiles, real = spec.tiles, real_of(spec.storage, spec.extreme)
    load_tile, (add_finite_values, add_visible_values) = (
        tile_loader(loader(spec.storage, real), real),
        addition(tiles, real),
    )
    value_rows, block_v, threads_x, threads, one = (
        tiles.value_rows, tiles.value_columns, tiles.threads_x, tiles.threads, real(1),
    )  # fmt: skip

    @device
    def add_values(sums, weights_tile, value_tile, value, base, steps, count, left, y, x):
        """sums += weights · value; of values that are not finite, to the queries that may look at the key."""
        thread = y * threads_x + x
        for first_row in range(0, count, value_rows):
            cuda.syncthreads()
            at, below = base + first_row * steps[VALUE, 0], count - first_row
            finite = load_tile(
                value_tile, value_rows, block_v, block_v, one, value, at, steps, VALUE, below, left, thread, threads
            )
            if cuda.syncthreads_or(np.int32(0 if finite else 1)):
                add_visible_values(sums, weights_tile, value_tile, first_row, y, x)
            else:
                add_finite_values(sums, weights_tile, value_tile, first_row, y, x)

    return add_values


def _make_finish(spec: Forward) -> Any:
    """A device function of what is summed."""
    storage, tiles, extreme = spec.storage, spec.tiles, spec.extreme
    real, store = real_of(storage, extreme), storer(storage)
    threads_y, threads_x, rows, values = tiles.threads_y, tiles.threads_x, tiles.rows, tiles.values
    lowest, zero, one, ln_2, infinite, log2_e = map(real, (-math.inf, 0, 1, LN_2, math.inf, LOG2_E))
    to_natural, with_sink = real(LN_2 if in_base_2(spec.adds, extreme) else 1.0), "sink" in spec.own
    hold = holder(real, real_of(storage) if extreme else np.float64)

    @device
    def finish(out, lse, shared_tile, sums, m, total, offsets, steps, sizes, here, head, keep_scale, y, x):
        """Divide by the sums of the weights, and store the rows and their log-sum-exp."""
        queries, value_dim = sizes[QUERIES], sizes[VALUE_DIM]
        cuda.syncthreads()
        for i in range(rows):
            shared_tile[(y + i * threads_y) * threads_x + x] = total[i]
        cuda.syncthreads()
        for i in range(rows):
            row = here.query + y + i * threads_y
            if row < queries:
                whole = zero
                for other in range(threads_x):
                    whole += shared_tile[(y + i * threads_y) * threads_x + other]
                empty, keys, of_sink = whole == zero, whole, zero
                if with_sink and not empty and head.sink != lowest:
                    of_sink = exp2((head.sink - m[i] * to_natural) * log2_e)
                    whole += of_sink
                if x == 0 and here.value == 0:
                    sums_of_row = m[i] * to_natural + log2(whole) * ln_2 if whole != zero else lowest
                    if with_sink and (empty or whole == infinite):  # nothing is left for the keys
                        sums_of_row = head.sink
                    elif with_sink and of_sink > keys:  # far from m, from where digits would be lost on the way back
                        sums_of_row = head.sink + log2(one + keys / of_sink) * ln_2
                    lse[here.slice * queries + row] = hold(sums_of_row)
                at = offsets[OUT, here.slice] + row * steps[OUT, 0]
                for c in range(values):
                    column = here.value + x + c * threads_x
                    if column < value_dim:
                        result = sums[i, c] * keep_scale / whole if whole != zero else zero
                        out[at + column * steps[OUT, 1]] = store(result)

    return finish


def find_shifts(spec: Shifts) -> Any:
    """The kernel of SHIFT and REST of each query: a block of threads for each block of queries of each slice.

    Scores and numbers are in base 2 where the scale has a factor log2(e) in it. Where a log-sum-exp is so large that
    its rounding matters, the block goes over the keys once more: see `fastattn.call.rounding`, which has `slack` as
    well.
    """
    storage, tiles, base_2, extreme = spec.storage, spec.tiles, spec.base_2, spec.extreme
    real, find_scores = real_of(storage, extreme), _make_find_scores(spec)
    publish, absorb = softmax_functions(tiles._replace(values=0), real, base_2)
    threads_y, threads_x, rows, columns, _, features, _ = tiles
    block_q, block_k, pitch = tiles.queries, tiles.keys, features + 1
    query_size, key_size = block_q * pitch, max(block_k * pitch, block_q * (block_k + 1))
    shared_size = block_q * threads_x
    lowest, zero, infinite = real(-math.inf), real(0), real(math.inf)
    to_scores, from_base_2 = real(LOG2_E if base_2 else 1.0), real(1.0 if base_2 else LN_2)
    coarse = real(PRECISE[np.dtype(real_of(storage)).name])
    with_sink, largest = "sink" in spec.own, real(np.finfo(real).max)
    to_base_2, (kind_of, _) = real(1.0 if base_2 else LOG2_E), kinds(spec)

    def kernel(query, key, mask, lse, numbers, offsets, steps, sizes, scale, slack, keep, own, captured):
        query_tile = cuda.shared.array(query_size, real)
        key_tile = cuda.shared.array(key_size, real)  # after the scores: exp(score - m), which nobody reads
        shared_tile = cuda.shared.array(shared_size, real)  # what a row's threads tell each other
        scores = cuda.local.array((rows, columns), real)
        seen = cuda.local.array((rows, columns), np.bool_)
        m, total = cuda.local.array(rows, real), cuda.local.array(rows, real)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y

        queries = sizes[QUERIES]
        blocks = (queries + block_q - 1) // block_q
        slice_, first_query = cuda.blockIdx.x // blocks, cuda.blockIdx.x % blocks * block_q
        lse_at = offsets[LSE, slice_] + first_query * steps[LSE, 0]
        numbers_at = NUMBERS * (slice_ * queries + first_query)
        lost = False
        for i in range(rows):
            m[i], total[i] = lowest, zero
            row = y + i * threads_y
            if first_query + row < queries:
                sums = real(lse[lse_at + row * steps[LSE, 0]])
                lost = lost or coarse <= abs(sums) < infinite
                if x == 0:
                    numbers[numbers_at + NUMBERS * row + SHIFT] = sums * to_scores
                    numbers[numbers_at + NUMBERS * row + REST] = zero
        if cuda.syncthreads_or(np.int32(1 if lost else 0)) == 0:
            return

        head = head_of(slice_, offsets, steps, sizes, own, captured)
        begin, end = keys_of_queries(head, first_query, min(queries, first_query + block_q) - 1, block_k)
        for first_key in range(begin, end, block_k):
            if kind_of(head, first_query, first_key) == EMPTY:
                continue
            find_scores(
                scores, seen, query_tile, key_tile, query, key, mask, keep, offsets, steps, sizes, head, scale, slice_,
                first_query, first_key, queries - first_query, head.keys - first_key, True, y, x,
            )  # fmt: skip
            cuda.syncthreads()
            publish(scores, shared_tile, y, x)
            cuda.syncthreads()
            absorb(scores, seen, shared_tile, key_tile, m, total, scores, y, x)
        cuda.syncthreads()
        for i in range(rows):
            shared_tile[(y + i * threads_y) * threads_x + x] = total[i]
        cuda.syncthreads()
        for i in range(rows):
            row = y + i * threads_y
            if x == 0 and first_query + row < queries:
                sums, whole = real(lse[lse_at + row * steps[LSE, 0]]), zero
                for other in range(threads_x):
                    whole += shared_tile[row * threads_x + other]
                top = m[i]
                if with_sink and head.sink != lowest:
                    sink = min(max(head.sink * to_scores, -largest), largest)
                    top = max(m[i], sink)
                    whole = whole * exp2((m[i] - top) * to_base_2) + exp2((sink - top) * to_base_2)
                rest, given = log2(whole) * from_base_2, sums * to_scores
                # the log-sum-exp may be that of more keys than these
                if coarse <= abs(sums) < infinite and (top - given) + rest >= -slack * abs(given):
                    numbers[numbers_at + NUMBERS * row + SHIFT] = top
                    numbers[numbers_at + NUMBERS * row + REST] = rest

    return kernel


def weights(spec: Weights) -> Any:
    """The kernel of the weights: a block of threads for each block of queries and keys.

    `out` is the matrix of weights, and in the place of the log-sum-exp there are the numbers of `find_shifts`; `value`
    is not read.
    """
    storage, dropout, tiles, real = spec.storage, spec.dropout, spec.tiles, real_of(spec.storage, spec.extreme)
    store, find_scores, drop = storer(storage), _make_find_scores(spec), dropping(tiles, real)
    threads_y, threads_x, rows, columns, _, features, _ = tiles
    block_q, block_k, pitch = tiles.queries, tiles.keys, features + 1
    query_size, key_size = block_q * pitch, max(block_k * pitch, block_q * (block_k + 1))
    lowest, one, zero, (kind_of, _) = real(-math.inf), real(1), real(0), kinds(spec)
    to_base_2 = real(1.0 if in_base_2(spec.adds, spec.extreme) else LOG2_E)

    def kernel(
        query, key, value, mask, out, numbers, offsets, steps, sizes, scale, keep_scale, seed_low, seed_high, keep, own,
        captured,
    ):  # fmt: skip
        query_tile = cuda.shared.array(query_size, real)
        key_tile = cuda.shared.array(key_size, real)  # after the scores: the weights
        scores = cuda.local.array((rows, columns), real)
        seen = cuda.local.array((rows, columns), np.bool_)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        thread = y * threads_x + x

        queries, keys = sizes[QUERIES], sizes[KEYS]
        key_blocks = (keys + block_k - 1) // block_k
        query_blocks = (queries + block_q - 1) // block_q
        block = cuda.blockIdx.x
        first_key = block % key_blocks * block_k
        block = block // key_blocks
        first_query = block % query_blocks * block_q
        slice_ = block // query_blocks

        head = head_of(slice_, offsets, steps, sizes, own, captured)
        if kind_of(head, first_query, first_key) == EMPTY:
            for i in range(rows):
                for j in range(columns):
                    scores[i, j] = lowest
        else:
            find_scores(
                scores, seen, query_tile, key_tile, query, key, mask, keep, offsets, steps, sizes, head, scale, slice_,
                first_query, first_key, queries - first_query, keys - first_key, True, y, x,
            )  # fmt: skip
        cuda.syncthreads()
        for i in range(rows):
            row = first_query + y + i * threads_y
            shift, rest = zero, zero
            if row < queries:
                at = NUMBERS * (slice_ * queries + row)
                shift, rest = numbers[at + SHIFT], numbers[at + REST]
            if shift == lowest:  # no key at all: -inf less -inf is NaN
                shift = zero
            for j in range(columns):
                weight = exp2(((scores[i, j] - shift) - rest) * to_base_2)
                # of a sum of exp(score) no score takes more than all of it, whatever rounding says
                weight = one if weight > one else weight
                key_tile[(y + i * threads_y) * (block_k + 1) + x + j * threads_x] = weight
        if dropout:
            cuda.syncthreads()
            drop(key_tile, slice_, first_query, first_key, sizes, seed_low, seed_high, thread)
            cuda.syncthreads()
        for i in range(rows):
            row = first_query + y + i * threads_y
            for j in range(columns):
                column = first_key + x + j * threads_x
                if row < queries and column < keys:
                    weight = key_tile[(y + i * threads_y) * (block_k + 1) + x + j * threads_x] * keep_scale
                    out[offsets[OUT, slice_] + row * steps[OUT, 0] + column * steps[OUT, 1]] = store(weight)

    return kernel


def copy(spec: Copy) -> Any:
    """The kernel that copies a result: element by element, from QUERY to OUT of the tables."""

    def kernel(source, target, offsets, steps, sizes):
        queries, columns = sizes[QUERIES], sizes[VALUE_DIM]
        first, stride = cuda.grid(1), cuda.gridsize(1)
        for e in range(first, sizes[SLICES] * queries * columns, stride):
            row = e // columns
            column = e - row * columns
            slice_ = row // queries
            row = row - slice_ * queries
            at = offsets[QUERY, slice_] + row * steps[QUERY, 0] + column * steps[QUERY, 1]
            target[offsets[OUT, slice_] + row * steps[OUT, 0] + column * steps[OUT, 1]] = source[at]

    return kernel
