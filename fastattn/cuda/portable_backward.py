"""The backward pass in plain CUDA: shared memory and registers, on any device, and in the simulator.

With the weights P = exp(scores - lse), recomputed tile by tile, the factors Z of dropout and the gradient dO of the
result (Dao et al. 2022, arXiv 2205.14135, appendix B; `fastattn.reference.backward` derives the formulas):

    delta[i]  = Σ_f dO[i][f] · out[i][f] - dlse[i]
    dS[i][j]  = P · (Z · (dO[i] · value[j]) - delta[i])
    dvalue[j] = Σ_i P · Z · dO[i]      dkey[j] = scale Σ_i dS · query[i]      dquery[i] = scale Σ_j dS · key[j]

Every element of a gradient has one block of threads that computes all of it: its terms are added in one order, there
are no atomic additions, and no partial sums in memory. This costs one recomputation: `grad_keys` goes through the
queries that look at its keys, `grad_queries` through the keys that its queries look at, each with weights of its own.
Where slices share an argument, because a group of query heads does or an axis is broadcast, the block goes through
these slices too, in order: a sum is rounded to the type of storage once, and memory does not grow with the group.

What is in shared memory:

    left  [depth][tile]             right [depth][tile or features]             operands of a product
    weights, grads [summed index][row of the result]                            P · Z and dS, whole tiles
    numbers [2][tile]                                                           lse and delta of the queries

What is hidden has P = -0.0 and dS = 0, and 0 times what is not finite must not arise. Queries and keys that are not
finite are 0 in the last two products, since where they may be looked at dS is NaN. Of dO, infinities must arrive where
they may be looked at: a tile of queries that has any takes a slower product, which asks each weight for its sign.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda

from fastattn.cuda.backward_tiles import Tiles, Tiling, make_tiles
from fastattn.cuda.elements import device, loader, real_of, storer
from fastattn.cuda.plan import (
    CAUSAL_OFFSET,
    DROP_BELOW,
    GRAD_LSE,
    GRAD_OUT,
    HEAD_DIM,
    HEADS,
    KEY,
    KEYS,
    LSE,
    MASK,
    OUT,
    QUERIES,
    QUERY,
    VALUE,
    VALUE_DIM,
)

__all__ = ["BackwardKernels", "backward_kernels"]

PADDING = 1  # of a row in shared memory, so that a column of it lies in different banks


class BackwardKernels(NamedTuple):
    """The kernels, as functions that are still to be compiled."""

    find_deltas: Any
    grad_keys: Any
    grad_queries: Any
    grad_mask: Any


def backward_kernels(
    tiling: Tiling,
    storage: str,
    mask: str | None = None,
    dropout: bool = False,
    with_key: bool = True,
    with_value: bool = True,
) -> BackwardKernels:
    """Make the kernels of a backward pass.

    Parameters
    ----------
    tiling : Tiling
    storage : {"float16", "bfloat16", "float32", "float64"}
        Type of the elements in memory. The arithmetic is in float32 or float64.
    mask : str or None
        Type of the elements of the mask: "bool", or a floating one.
    dropout : bool
    with_key, with_value : bool
        What `grad_keys` computes: both at once where the same slices share key and value.
    """
    tiles = make_tiles(tiling, storage, mask, dropout)
    return BackwardKernels(
        _find_deltas(tiling, storage),
        _grad_keys(tiling, tiles, storage, with_key, with_value),
        _grad_queries(tiling, tiles, storage),
        _grad_mask(tiling, tiles, storage, "float32" if mask in (None, "bool") else mask),
    )


def _make_products(tiling: Tiling, tiles: Tiles, storage: str) -> Any:
    side, rows, depth = tiling.side, tiling.rows, tiling.depth
    zero, stage_across = real_of(storage)(0.0), tiles.stage_across

    @device
    def products(result, left, right, a, a_at, a_steps, a_first, a_count, b, b_at, b_steps, b_first, b_count, length):
        """result = the scalar products of a tile of rows of `a` and one of `b`. How many of a's were not finite."""
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        odd = 0
        for r in range(rows):
            for c in range(rows):
                result[r, c] = zero
        for first in range(0, length, depth):
            odd += stage_across(left, a, a_at, a_steps[0], a_steps[1], a_first, a_count, first, length, thread)
            stage_across(right, b, b_at, b_steps[0], b_steps[1], b_first, b_count, first, length, thread)
            cuda.syncthreads()
            for s in range(depth):
                for r in range(rows):
                    x = left[s, ty + r * side]
                    for c in range(rows):
                        result[r, c] += x * right[s, tx + c * side]
            cuda.syncthreads()
        return odd

    return products


def _find_deltas(tiling: Tiling, storage: str) -> Any:
    side, real = tiling.side, real_of(storage)
    load, zero, width = loader(storage, real), real(0.0), side + PADDING

    def find_deltas(grad_out, out, grad_lse, with_lse, offsets, steps, sizes, deltas):
        """deltas[slice · Lq + i] = Σ_f dO[i][f] · out[i][f] - dlse[i]: `side` threads a row, one block `side` rows."""
        partial = cuda.shared.array((side, width), real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        queries, features = sizes[QUERIES], sizes[VALUE_DIM]
        row = cuda.blockIdx.x * side + ty
        number, i = row // queries, row % queries
        here = row < deltas.shape[0]
        total = zero
        if here:
            at = offsets[GRAD_OUT, number] + i * steps[GRAD_OUT, 0]
            out_at = offsets[OUT, number] + i * steps[OUT, 0]
            for f in range(tx, features, side):
                total += load(grad_out[at + f * steps[GRAD_OUT, 1]]) * load(out[out_at + f * steps[OUT, 1]])
        partial[ty, tx] = total
        cuda.syncthreads()
        if here and tx == 0:
            for other in range(1, side):
                total += partial[ty, other]
            if with_lse:
                total -= grad_lse[offsets[GRAD_LSE, number] + i * steps[GRAD_LSE, 0]]
            deltas[row] = total

    return find_deltas


def _grad_keys(tiling: Tiling, tiles: Tiles, storage: str, with_key: bool, with_value: bool) -> Any:
    side, rows, columns, depth, tile = tiling.side, tiling.rows, tiling.columns, tiling.depth, tiling.tile
    features = tiling.features
    real, store = real_of(storage), storer(storage)
    clear, multiply, multiply_visible, _, stage, load_rows, weigh = tiles
    products = _make_products(tiling, tiles, storage)
    left_width, width = max(tile, features) + PADDING, tile + PADDING

    def grad_keys(
        query, key, value, mask, grad_out, lse, deltas, offsets, steps, sizes, members, scale, seed_low, seed_high,
        keep_scale, chunks, grad_key, grad_value,
    ):  # fmt: skip
        """Gradients of a tile of keys and values, `features` columns of each, over the slices of a row of `members`."""
        left = cuda.shared.array((depth, left_width), real)
        right = cuda.shared.array((depth, left_width), real)
        weights = cuda.shared.array((tile, width), real)
        grads = cuda.shared.array((tile, width), real)
        numbers = cuda.shared.array((2, tile), real)
        scores_here = cuda.local.array((rows, rows), real)
        grads_here = cuda.local.array((rows, rows), real)
        key_sums = cuda.local.array((rows, columns), real)
        value_sums = cuda.local.array((rows, columns), real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        queries, keys, head_dim, value_dim = sizes[QUERIES], sizes[KEYS], sizes[HEAD_DIM], sizes[VALUE_DIM]
        heads, reach, drop_below = sizes[HEADS], sizes[CAUSAL_OFFSET], sizes[DROP_BELOW]

        key_tiles = (keys + tile - 1) // tile
        first_feature = cuda.blockIdx.x % chunks * features
        first_key = cuda.blockIdx.x // chunks % key_tiles * tile
        owner = cuda.blockIdx.x // chunks // key_tiles
        clear(key_sums)
        clear(value_sums)
        for member in range(members.shape[1]):
            number = members[owner, member]
            query_at, key_at = offsets[QUERY, number], offsets[KEY, number]
            value_at, grad_at = offsets[VALUE, number], offsets[GRAD_OUT, number]
            # the tile of the first query that may look at the first key
            for first_query in range(max(0, first_key - reach) // tile * tile, queries, tile):
                load_rows(
                    numbers,
                    lse,
                    offsets[LSE, number],
                    steps[LSE, 0],
                    deltas,
                    number * queries,
                    first_query,
                    queries,
                    thread,
                )
                odd = products(
                    grads_here, left, right, grad_out, grad_at, steps[GRAD_OUT], first_query, queries,
                    value, value_at, steps[VALUE], first_key, keys, value_dim,
                )  # fmt: skip
                products(
                    scores_here, left, right, query, query_at, steps[QUERY], first_query, queries,
                    key, key_at, steps[KEY], first_key, keys, head_dim,
                )  # fmt: skip
                odd = cuda.syncthreads_or(odd)
                weigh(
                    scores_here, grads_here, numbers, mask, offsets[MASK, number], steps[MASK, 0], steps[MASK, 1],
                    number, first_query, first_key, keys, reach, scale, heads, seed_low, seed_high, drop_below,
                    keep_scale, tx, ty,
                )  # fmt: skip
                for r in range(rows):
                    for c in range(rows):
                        weights[ty + r * side, tx + c * side] = scores_here[r, c]
                        grads[ty + r * side, tx + c * side] = grads_here[r, c]
                for first in range(0, tile, depth):
                    start = first_query + first
                    if with_value:
                        stage(
                            right, grad_out, grad_at, steps[GRAD_OUT, 0], steps[GRAD_OUT, 1], start, queries,
                            first_feature, value_dim, False, thread,
                        )  # fmt: skip
                    if with_key:
                        stage(
                            left, query, query_at, steps[QUERY, 0], steps[QUERY, 1], start, queries,
                            first_feature, head_dim, True, thread,
                        )  # fmt: skip
                    cuda.syncthreads()
                    if with_value:
                        if odd:
                            multiply_visible(value_sums, weights, first, right, tx, ty)
                        else:
                            multiply(value_sums, weights, first, right, tx, ty)
                    if with_key:
                        multiply(key_sums, grads, first, left, tx, ty)
                    cuda.syncthreads()

        for r in range(rows):
            j = first_key + ty + r * side
            for c in range(columns):
                f = first_feature + tx + c * side
                if with_key and j < keys and f < head_dim:
                    grad_key[(owner * keys + j) * head_dim + f] = store(key_sums[r, c] * scale)
                if with_value and j < keys and f < value_dim:
                    grad_value[(owner * keys + j) * value_dim + f] = store(value_sums[r, c])

    return grad_keys


def _grad_queries(tiling: Tiling, tiles: Tiles, storage: str) -> Any:
    side, rows, columns, depth, tile = tiling.side, tiling.rows, tiling.columns, tiling.depth, tiling.tile
    features = tiling.features
    real, store = real_of(storage), storer(storage)
    clear, multiply, _, _, stage, load_rows, weigh = tiles
    products = _make_products(tiling, tiles, storage)
    right_width, width = max(tile, features) + PADDING, tile + PADDING

    def grad_queries(
        query, key, value, mask, grad_out, lse, deltas, offsets, steps, sizes, members, scale, seed_low, seed_high,
        keep_scale, chunks, grad_query,
    ):  # fmt: skip
        """Gradients of a tile of queries, `features` columns of them, over the slices of a row of `members`."""
        left = cuda.shared.array((depth, width), real)
        right = cuda.shared.array((depth, right_width), real)
        grads = cuda.shared.array((tile, width), real)
        numbers = cuda.shared.array((2, tile), real)
        scores_here = cuda.local.array((rows, rows), real)
        grads_here = cuda.local.array((rows, rows), real)
        sums = cuda.local.array((rows, columns), real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        queries, keys, head_dim, value_dim = sizes[QUERIES], sizes[KEYS], sizes[HEAD_DIM], sizes[VALUE_DIM]
        heads, reach, drop_below = sizes[HEADS], sizes[CAUSAL_OFFSET], sizes[DROP_BELOW]

        query_tiles = (queries + tile - 1) // tile
        first_feature = cuda.blockIdx.x % chunks * features
        first_query = cuda.blockIdx.x // chunks % query_tiles * tile
        owner = cuda.blockIdx.x // chunks // query_tiles
        end = min(keys, first_query + tile + reach)  # behind the last key that the last query may look at
        clear(sums)
        for member in range(members.shape[1]):
            number = members[owner, member]
            key_at = offsets[KEY, number]
            load_rows(
                numbers,
                lse,
                offsets[LSE, number],
                steps[LSE, 0],
                deltas,
                number * queries,
                first_query,
                queries,
                thread,
            )
            cuda.syncthreads()
            for first_key in range(0, end, tile):
                products(
                    grads_here, left, right, grad_out, offsets[GRAD_OUT, number], steps[GRAD_OUT], first_query, queries,
                    value, offsets[VALUE, number], steps[VALUE], first_key, keys, value_dim,
                )  # fmt: skip
                products(
                    scores_here, left, right, query, offsets[QUERY, number], steps[QUERY], first_query, queries,
                    key, key_at, steps[KEY], first_key, keys, head_dim,
                )  # fmt: skip
                weigh(
                    scores_here, grads_here, numbers, mask, offsets[MASK, number], steps[MASK, 0], steps[MASK, 1],
                    number, first_query, first_key, keys, reach, scale, heads, seed_low, seed_high, drop_below,
                    keep_scale, tx, ty,
                )  # fmt: skip
                for r in range(rows):
                    for c in range(rows):
                        grads[tx + c * side, ty + r * side] = grads_here[r, c]
                for first in range(0, tile, depth):
                    stage(
                        right, key, key_at, steps[KEY, 0], steps[KEY, 1], first_key + first, keys, first_feature,
                        head_dim, True, thread,
                    )  # fmt: skip
                    cuda.syncthreads()
                    multiply(sums, grads, first, right, tx, ty)
                    cuda.syncthreads()
            cuda.syncthreads()

        for r in range(rows):
            i = first_query + ty + r * side
            for c in range(columns):
                f = first_feature + tx + c * side
                if i < queries and f < head_dim:
                    grad_query[(owner * queries + i) * head_dim + f] = store(sums[r, c] * scale)

    return grad_queries


def _grad_mask(tiling: Tiling, tiles: Tiles, storage: str, mask_storage: str) -> Any:
    side, rows, depth, tile = tiling.side, tiling.rows, tiling.depth, tiling.tile
    real, store = real_of(storage), storer(mask_storage)
    load_rows, weigh = tiles.load_rows, tiles.weigh
    products = _make_products(tiling, tiles, storage)
    width, zero = tile + PADDING, real(0.0)

    def grad_mask(
        query, key, value, mask, grad_out, lse, deltas, offsets, steps, sizes, members, scale, seed_low, seed_high,
        keep_scale, mask_queries, mask_keys, result,
    ):  # fmt: skip
        """The gradient of a tile of the mask, over the slices of a row of `members`, and over all tiles along an axis
        of length 1."""
        left = cuda.shared.array((depth, width), real)
        right = cuda.shared.array((depth, width), real)
        grads = cuda.shared.array((tile, width), real)
        numbers = cuda.shared.array((2, tile), real)
        scores_here = cuda.local.array((rows, rows), real)
        grads_here = cuda.local.array((rows, rows), real)
        sums = cuda.local.array((rows, rows), real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        queries, keys, head_dim, value_dim = sizes[QUERIES], sizes[KEYS], sizes[HEAD_DIM], sizes[VALUE_DIM]
        heads, reach, drop_below = sizes[HEADS], sizes[CAUSAL_OFFSET], sizes[DROP_BELOW]

        key_tiles = (mask_keys + tile - 1) // tile
        query_tiles = (mask_queries + tile - 1) // tile
        own_key = cuda.blockIdx.x % key_tiles * tile
        own_query = cuda.blockIdx.x // key_tiles % query_tiles * tile
        owner = cuda.blockIdx.x // key_tiles // query_tiles
        query_end, key_end = own_query + tile, own_key + tile
        if mask_queries == 1:
            query_end = queries
        if mask_keys == 1:
            key_end = keys
        for r in range(rows):
            for c in range(rows):
                sums[r, c] = zero
        for member in range(members.shape[1]):
            number = members[owner, member]
            for first_query in range(own_query, query_end, tile):
                load_rows(
                    numbers,
                    lse,
                    offsets[LSE, number],
                    steps[LSE, 0],
                    deltas,
                    number * queries,
                    first_query,
                    queries,
                    thread,
                )
                cuda.syncthreads()
                for first_key in range(own_key, min(key_end, first_query + tile + reach), tile):
                    products(
                        grads_here, left, right, grad_out, offsets[GRAD_OUT, number], steps[GRAD_OUT], first_query,
                        queries, value, offsets[VALUE, number], steps[VALUE], first_key, keys, value_dim,
                    )  # fmt: skip
                    products(
                        scores_here, left, right, query, offsets[QUERY, number], steps[QUERY], first_query, queries,
                        key, offsets[KEY, number], steps[KEY], first_key, keys, head_dim,
                    )  # fmt: skip
                    weigh(
                        scores_here, grads_here, numbers, mask, offsets[MASK, number], steps[MASK, 0], steps[MASK, 1],
                        number, first_query, first_key, keys, reach, scale, heads, seed_low, seed_high, drop_below,
                        keep_scale, tx, ty,
                    )  # fmt: skip
                    for r in range(rows):
                        for c in range(rows):
                            sums[r, c] += grads_here[r, c]
                cuda.syncthreads()

        for r in range(rows):
            for c in range(rows):
                grads[ty + r * side, tx + c * side] = sums[r, c]
        cuda.syncthreads()
        own_rows, own_columns = tile, tile
        terms_down, terms_across = 1, 1
        if mask_queries == 1:
            own_rows, terms_down = 1, tile
        if mask_keys == 1:
            own_columns, terms_across = 1, tile
        for e in range(thread, own_rows * own_columns, side * side):
            i, j = e // own_columns, e % own_columns
            if own_query + i < mask_queries and own_key + j < mask_keys:
                total = zero
                for down in range(terms_down):
                    for across in range(terms_across):
                        total += grads[i + down, j + across]
                result[(owner * mask_queries + own_query + i) * mask_keys + own_key + j] = store(total)

    return grad_mask
