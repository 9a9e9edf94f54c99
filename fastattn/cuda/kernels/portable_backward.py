"""The backward pass in plain CUDA: shared memory and registers, on any device, and in the simulator.

With the weights P = exp(scores - lse), recomputed tile by tile, the factors Z of dropout and the gradient dO of the
result (Dao et al. 2022, arXiv 2205.14135, appendix B; `fastattn.reference.backward` derives the formulas):

    delta[i]  = Σ_f dO[i][f] · out[i][f] - dlse[i]
    dS[i][j]  = P · (Z · (dO[i] · value[j]) - delta[i])
    dvalue[j] = Σ_i P · Z · dO[i]      dkey[j] = scale Σ_i dS · query[i]      dquery[i] = scale Σ_j dS · key[j]

In the last two dS is multiplied by the slope of the softcap, if there is one; the gradient of a mask, which is added
behind the softcap, does without.

For lse there are two numbers, which `fastattn.cuda.kernels.portable.find_shifts` writes: nothing is lost to its
rounding.

Every element of a gradient has one block of threads that computes all of it: its terms are added in one order, there
are no atomic additions, and no partial sums in memory. This costs one recomputation: `grad_keys` goes through the
queries that look at its keys, `grad_queries` through the keys that its queries look at, each with weights of its own.
Where slices share an argument, because a group of query heads does or an axis is broadcast, the block goes through
these slices too, in order: a sum is rounded to the type of storage once, and memory does not grow with the group.

What is in shared memory:

    left  [depth][tile]             right [depth][tile or features]             operands of a product weights, grads
    [summed index][row of the result]                            P · Z and dS, whole tiles numbers [3][tile]
    of the queries: see fastattn.cuda.kernels.plan

What is hidden has P = -0.0 and dS = 0, and 0 times what is not finite must not arise. Queries and keys that are not
finite are 0 in the last two products, since where they may be looked at dS is NaN. Of dO, infinities must arrive where
they may be looked at: a tile of queries that has any takes a slower product, which asks each weight for its sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from fastattn.cuda.kernels.backward_tiles import PADDING, Backward, Tiles, make_tiles
from fastattn.cuda.kernels.elements import device, storer
from fastattn.cuda.kernels.plan import (
    GRAD_OUT,
    HEAD_DIM,
    KEY,
    KEYS,
    NUMBERS,
    QUERIES,
    QUERY,
    SLICES,
    VALUE,
    VALUE_DIM,
)
from fastattn.cuda.kernels.scores import head_of, keys_of_queries, kinds, queries_of_keys
from fastattn.functions.kinds import EMPTY

__all__ = ["captured_parts", "grad_keys", "grad_mask", "grad_queries", "slope_rows"]


def _make_both_products(spec: Backward, tiles: Tiles) -> Any:
    """A device function of a tile of queries and one of keys."""
    side, rows, depth = spec.tiling.side, spec.tiling.rows, spec.tiling.depth
    real, stage_across = spec.real, tiles.stage_across
    zero, unscaled = real(0.0), real(1.0)

    @device
    def products(
        result, factor, left, right, steps, one, a, a_at, a_first, a_count, other, b, b_at, b_first, b_count, length
    ):
        """The scalar products of rows of `a`, times `factor`, and of `b`. How many of a's elements were not finite."""
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        odd = 0
        for r in range(rows):
            for c in range(rows):
                result[r, c] = zero
        for first in range(0, length, depth):
            odd += stage_across(
                left, factor, a, a_at, steps[one, 0], steps[one, 1], a_first, a_count, first, length, thread
            )
            stage_across(
                right, unscaled, b, b_at, steps[other, 0], steps[other, 1], b_first, b_count, first, length, thread
            )
            cuda.syncthreads()
            for s in range(depth):
                for r in range(rows):
                    x = left[s, ty + r * side]
                    for c in range(rows):
                        result[r, c] += x * right[s, tx + c * side]
            cuda.syncthreads()
        return odd

    @device
    def both_products(
        scores, grads, left, right, query, key, value, grad_out, offsets, steps, sizes, number, first_query, first_key,
        scale,
    ):  # fmt: skip
        """scale · (query · key) and dO · value of slice `number`. How many elements of dO were not finite."""
        queries, keys = sizes[QUERIES], sizes[KEYS]
        odd = products(
            grads, unscaled, left, right, steps, GRAD_OUT, grad_out, offsets[GRAD_OUT, number], first_query, queries,
            VALUE, value, offsets[VALUE, number], first_key, keys, sizes[VALUE_DIM],
        )  # fmt: skip
        products(
            scores, scale, left, right, steps, QUERY, query, offsets[QUERY, number], first_query, queries,
            KEY, key, offsets[KEY, number], first_key, keys, sizes[HEAD_DIM],
        )  # fmt: skip
        return odd

    return both_products


def _make_differentiate(spec: Backward, tiles: Tiles) -> Any:
    """A device function of a tile of queries and one of keys."""
    both_products, weigh = _make_both_products(spec, tiles), tiles.weigh

    @device
    def differentiate(
        weights, grads, left, right, numbers_here, query, key, value, mask, keep, grad_out, offsets, steps, sizes, head,
        number, first_query, first_key, scale, seed_low, seed_high, keep_scale,
    ):  # fmt: skip
        """P · Z and dS of slice `number`, -0.0 and 0 where hidden. How many elements of dO were not finite."""
        odd = both_products(
            weights, grads, left, right, query, key, value, grad_out, offsets, steps, sizes, number, first_query,
            first_key, scale,
        )  # fmt: skip
        no_elements = weights
        weigh(
            weights, grads, no_elements, numbers_here, mask, keep, sizes, head, number, first_query, first_key,
            seed_low, seed_high, keep_scale, cuda.threadIdx.x, cuda.threadIdx.y,
        )  # fmt: skip
        return odd

    return differentiate


def grad_keys(spec: Backward) -> Any:
    """The kernel of the gradients of keys and values.

    Blocks stand along x: first the parts of `features` columns, `chunks` of them, then the tiles of keys, then the rows
    of `members`, which say what slices share an argument.
    """
    tiling, with_key, with_value = spec.tiling, spec.key, spec.value
    side, rows, columns, depth, tile = tiling.side, tiling.rows, tiling.columns, tiling.depth, tiling.tile
    features, wide, width = tiling.features, max(tile, tiling.features) + PADDING, tile + PADDING
    real, store = spec.real, storer(spec.storage)
    tiles = make_tiles(spec)
    clear, load_rows, differentiate = tiles.clear, tiles.load_rows, _make_differentiate(spec, tiles)
    add_products, (kind_of, _) = _make_add_products(spec, tiles), kinds(spec)

    def kernel(
        query, key, value, mask, grad_out, numbers, offsets, steps, sizes, members, scale, seed_low, seed_high,
        keep_scale, keep, own, captured, chunks, grad_key, grad_value,
    ):  # fmt: skip
        left = cuda.shared.array((depth, wide), real)
        right = cuda.shared.array((depth, wide), real)
        weights = cuda.shared.array((tile, width), real)
        grads = cuda.shared.array((tile, width), real)
        numbers_here = cuda.shared.array((NUMBERS, tile), real)
        weights_here = cuda.local.array((rows, rows), real)
        grads_here = cuda.local.array((rows, rows), real)
        key_sums = cuda.local.array((rows, columns), real)
        value_sums = cuda.local.array((rows, columns), real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        queries, keys, head_dim, value_dim = sizes[QUERIES], sizes[KEYS], sizes[HEAD_DIM], sizes[VALUE_DIM]

        key_tiles = (keys + tile - 1) // tile
        column = cuda.blockIdx.x % chunks * features
        first_key = cuda.blockIdx.x // chunks % key_tiles * tile
        owner = cuda.blockIdx.x // chunks // key_tiles
        clear(key_sums)
        clear(value_sums)
        for member in range(members.shape[1]):
            number = members[owner, member]
            head = head_of(number, offsets, steps, sizes, own, captured)
            query_at, grad_at = offsets[QUERY, number], offsets[GRAD_OUT, number]
            numbers_at = NUMBERS * number * queries
            begin, end = queries_of_keys(head, first_key, min(keys, first_key + tile) - 1, tile)
            for first_query in range(begin, end, tile):
                if kind_of(head, first_query, first_key) == EMPTY:
                    continue
                load_rows(numbers_here, numbers, numbers_at, first_query, queries, thread)
                cuda.syncthreads()
                odd = differentiate(
                    weights_here, grads_here, left, right, numbers_here, query, key, value, mask, keep, grad_out,
                    offsets, steps, sizes, head, number, first_query, first_key, scale, seed_low, seed_high, keep_scale,
                )  # fmt: skip
                for r in range(rows):
                    for c in range(rows):
                        weights[ty + r * side, tx + c * side] = weights_here[r, c]
                        grads[ty + r * side, tx + c * side] = grads_here[r, c]
                odd = cuda.syncthreads_or(np.int32(odd != 0))
                add_products(
                    key_sums, value_sums, weights, grads, odd, left, right, query, query_at, grad_out, grad_at, steps,
                    first_query, queries, column, head_dim, value_dim, tx, ty,
                )  # fmt: skip

        for r in range(rows):
            j = first_key + ty + r * side
            for c in range(columns):
                f = column + tx + c * side
                if with_key and j < keys and f < head_dim:
                    grad_key[(owner * keys + j) * head_dim + f] = store(key_sums[r, c] * scale)
                if with_value and j < keys and f < value_dim:
                    grad_value[(owner * keys + j) * value_dim + f] = store(value_sums[r, c])

    return kernel


def _make_add_products(spec: Backward, tiles: Tiles) -> Any:
    """A device function of the weights of a tile, and the gradients of its scores."""
    side, tile, depth, with_key, with_value = (
        spec.tiling.side,
        spec.tiling.tile,
        spec.tiling.depth,
        spec.key,
        spec.value,
    )
    multiply, multiply_visible, stage = tiles.multiply, tiles.multiply_visible, tiles.stage

    @device
    def add_products(
        key_sums, value_sums, weights, grads, odd, left, right, query, query_at, grad_out, grad_at, steps, first_query,
        queries, column, head_dim, value_dim, tx, ty,
    ):  # fmt: skip
        """key_sums += dSᵀ · query, value_sums += (P · Z)ᵀ · dO; `odd`: there is dO that is not finite."""
        thread = ty * side + tx
        for first in range(0, tile, depth):
            start = first_query + first
            if with_value:
                row, step = steps[GRAD_OUT, 0], steps[GRAD_OUT, 1]
                stage(right, grad_out, grad_at, row, step, start, queries, column, value_dim, False, thread)
            if with_key:
                row, step = steps[QUERY, 0], steps[QUERY, 1]
                stage(left, query, query_at, row, step, start, queries, column, head_dim, True, thread)
            cuda.syncthreads()
            if with_value:
                if odd:
                    multiply_visible(value_sums, weights, first, right, tx, ty)
                else:
                    multiply(value_sums, weights, first, right, tx, ty)
            if with_key:
                multiply(key_sums, grads, first, left, tx, ty)
            cuda.syncthreads()

    return add_products


def grad_queries(spec: Backward) -> Any:
    """The kernel of the gradient of queries, with blocks like those of `grad_keys`."""
    tiling = spec.tiling
    side, rows, columns, depth, tile = tiling.side, tiling.rows, tiling.columns, tiling.depth, tiling.tile
    features, wide, width = tiling.features, max(tile, tiling.features) + PADDING, tile + PADDING
    real, store = spec.real, storer(spec.storage)
    tiles = make_tiles(spec)
    clear, multiply, stage, load_rows = tiles.clear, tiles.multiply, tiles.stage, tiles.load_rows
    differentiate, (kind_of, _) = _make_differentiate(spec, tiles), kinds(spec)

    def kernel(
        query, key, value, mask, grad_out, numbers, offsets, steps, sizes, members, scale, seed_low, seed_high,
        keep_scale, keep, own, captured, chunks, grad_query,
    ):  # fmt: skip
        left = cuda.shared.array((depth, width), real)
        right = cuda.shared.array((depth, wide), real)
        grads = cuda.shared.array((tile, width), real)
        numbers_here = cuda.shared.array((NUMBERS, tile), real)
        weights_here = cuda.local.array((rows, rows), real)
        grads_here = cuda.local.array((rows, rows), real)
        sums = cuda.local.array((rows, columns), real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        queries, keys, head_dim = sizes[QUERIES], sizes[KEYS], sizes[HEAD_DIM]

        query_tiles = (queries + tile - 1) // tile
        column = cuda.blockIdx.x % chunks * features
        first_query = cuda.blockIdx.x // chunks % query_tiles * tile
        owner = cuda.blockIdx.x // chunks // query_tiles
        clear(sums)
        for member in range(members.shape[1]):
            number = members[owner, member]
            key_at, numbers_at = offsets[KEY, number], NUMBERS * number * queries
            load_rows(numbers_here, numbers, numbers_at, first_query, queries, thread)
            cuda.syncthreads()
            head = head_of(number, offsets, steps, sizes, own, captured)
            begin, end = keys_of_queries(head, first_query, min(queries, first_query + tile) - 1, tile)
            for first_key in range(begin, end, tile):
                if kind_of(head, first_query, first_key) == EMPTY:
                    continue
                differentiate(
                    weights_here, grads_here, left, right, numbers_here, query, key, value, mask, keep, grad_out,
                    offsets, steps, sizes, head, number, first_query, first_key, scale, seed_low, seed_high, keep_scale,
                )  # fmt: skip
                for r in range(rows):
                    for c in range(rows):
                        grads[tx + c * side, ty + r * side] = grads_here[r, c]
                for first in range(0, tile, depth):
                    row, step = steps[KEY, 0], steps[KEY, 1]
                    stage(right, key, key_at, row, step, first_key + first, keys, column, head_dim, True, thread)
                    cuda.syncthreads()
                    multiply(sums, grads, first, right, tx, ty)
                    cuda.syncthreads()
            cuda.syncthreads()

        for r in range(rows):
            i = first_query + ty + r * side
            for c in range(columns):
                f = column + tx + c * side
                if i < queries and f < head_dim:
                    grad_query[(owner * queries + i) * head_dim + f] = store(sums[r, c] * scale)

    return kernel


def grad_mask(spec: Backward) -> Any:
    """The kernel of the gradient of a floating mask.

    A block has a tile of it, and goes through the slices of a row of `members`, and along an axis of length 1 through
    all tiles of the scores.
    """
    tiling = spec.tiling
    side, rows, depth, tile, width = tiling.side, tiling.rows, tiling.depth, tiling.tile, tiling.tile + PADDING
    real, store = spec.real, storer(spec.mask)
    tiles = make_tiles(spec, with_slope=False)
    load_rows, differentiate, zero = tiles.load_rows, _make_differentiate(spec, tiles), real(0.0)
    kind_of, _ = kinds(spec)

    def kernel(
        query, key, value, mask, grad_out, numbers, offsets, steps, sizes, members, scale, seed_low, seed_high,
        keep_scale, keep, own, captured, mask_queries, mask_keys, result,
    ):  # fmt: skip
        left = cuda.shared.array((depth, width), real)
        right = cuda.shared.array((depth, width), real)
        grads = cuda.shared.array((tile, width), real)
        numbers_here = cuda.shared.array((NUMBERS, tile), real)
        weights_here = cuda.local.array((rows, rows), real)
        grads_here = cuda.local.array((rows, rows), real)
        sums = cuda.local.array((rows, rows), real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread, queries, keys = ty * side + tx, sizes[QUERIES], sizes[KEYS]

        key_tiles, query_tiles = (mask_keys + tile - 1) // tile, (mask_queries + tile - 1) // tile
        own_key = cuda.blockIdx.x % key_tiles * tile
        own_query = cuda.blockIdx.x // key_tiles % query_tiles * tile
        owner = cuda.blockIdx.x // key_tiles // query_tiles
        # an axis of length 1 is summed: over tiles in registers, and in the end over the tile
        query_end, key_end, down, across = own_query + tile, own_key + tile, 1, 1
        if mask_queries == 1:
            query_end, down = queries, tile
        if mask_keys == 1:
            key_end, across = keys, tile
        for r in range(rows):
            for c in range(rows):
                sums[r, c] = zero
        for member in range(members.shape[1]):
            number = members[owner, member]
            head, numbers_at = head_of(number, offsets, steps, sizes, own, captured), NUMBERS * number * queries
            for first_query in range(own_query, query_end, tile):
                load_rows(numbers_here, numbers, numbers_at, first_query, queries, thread)
                cuda.syncthreads()
                begin, end = keys_of_queries(head, first_query, min(queries, first_query + tile) - 1, tile)
                for first_key in range(max(begin, own_key), min(end, key_end), tile):
                    if kind_of(head, first_query, first_key) == EMPTY:
                        continue
                    differentiate(
                        weights_here, grads_here, left, right, numbers_here, query, key, value, mask, keep, grad_out,
                        offsets, steps, sizes, head, number, first_query, first_key, scale, seed_low, seed_high,
                        keep_scale,
                    )  # fmt: skip
                    for r in range(rows):
                        for c in range(rows):
                            sums[r, c] += grads_here[r, c]
                cuda.syncthreads()

        for r in range(rows):
            for c in range(rows):
                grads[ty + r * side, tx + c * side] = sums[r, c]
        cuda.syncthreads()
        own_rows, own_columns = tile // down, tile // across
        for e in range(thread, own_rows * own_columns, side * side):
            i, j = e // own_columns, e % own_columns
            if own_query + i < mask_queries and own_key + j < mask_keys:
                total = zero
                for below in range(down):
                    for beside in range(across):
                        total += grads[i + below, j + beside]
                result[(owner * mask_queries + own_query + i) * mask_keys + own_key + j] = store(total)

    return kernel


def slope_rows(spec: Backward) -> Any:
    """The kernel of what slopes of ALiBi get from each query: a block for each tile of queries of each slice."""
    tiling = spec.tiling
    side, rows, depth, tile, width = tiling.side, tiling.rows, tiling.depth, tiling.tile, tiling.tile + PADDING
    real, tiles, zero = spec.real, make_tiles(spec, with_slope=False), spec.real(0.0)
    load_rows, differentiate, (kind_of, _) = tiles.load_rows, _make_differentiate(spec, tiles), kinds(spec)
    pitch = side + PADDING

    def kernel(
        query, key, value, mask, grad_out, numbers, offsets, steps, sizes, members, scale, seed_low, seed_high,
        keep_scale, keep, own, captured, result,
    ):  # fmt: skip
        left = cuda.shared.array((depth, width), real)
        right = cuda.shared.array((depth, width), real)
        partial = cuda.shared.array((tile, pitch), real)
        numbers_here = cuda.shared.array((NUMBERS, tile), real)
        weights_here = cuda.local.array((rows, rows), real)
        grads_here = cuda.local.array((rows, rows), real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread, queries = ty * side + tx, sizes[QUERIES]
        query_tiles = (queries + tile - 1) // tile
        number, first_query = cuda.blockIdx.x // query_tiles, cuda.blockIdx.x % query_tiles * tile
        head, numbers_at = head_of(number, offsets, steps, sizes, own, captured), NUMBERS * number * queries
        for r in range(rows):
            partial[ty + r * side, tx] = zero
        load_rows(numbers_here, numbers, numbers_at, first_query, queries, thread)
        cuda.syncthreads()
        begin, end = keys_of_queries(head, first_query, min(queries, first_query + tile) - 1, tile)
        for first_key in range(begin, end, tile):
            if kind_of(head, first_query, first_key) == EMPTY:
                continue
            differentiate(
                weights_here, grads_here, left, right, numbers_here, query, key, value, mask, keep, grad_out,
                offsets, steps, sizes, head, number, first_query, first_key, scale, seed_low, seed_high, keep_scale,
            )  # fmt: skip
            for r in range(rows):
                for c in range(rows):
                    apart = real(first_query + ty + r * side - (first_key + tx + c * side))
                    partial[ty + r * side, tx] -= grads_here[r, c] * abs(head.offset + apart)
        cuda.syncthreads()
        for i in range(thread, min(tile, queries - first_query), side * side):
            total = zero
            for other in range(side):
                total += partial[i, other]
            result[number * queries + first_query + i] = total

    return kernel


def captured_parts(spec: Backward) -> Any:
    """The kernel of what a captured array gets where it is read at one place: a block for each part of the work.

    A part is some tiles of queries, of some slices, whose keys the block goes through in order. For each score threads
    write which element was read, and what its gradient gets; then each thread reads all of that, in order, and adds up
    what is of its own elements. So every sum has one order, whatever the function reads where.
    """
    tiling = spec.tiling
    rows, depth, tile, threads, width = tiling.rows, tiling.depth, tiling.tile, tiling.threads, tiling.tile + PADDING
    side, real, zero, (kind_of, _) = tiling.side, spec.real, np.float64(0.0), kinds(spec)
    tiles = make_tiles(spec, with_slope=False)
    load_rows, weigh, add_up = tiles.load_rows, tiles.weigh, tiles.add_up
    both_products, scores_of_tile = _make_both_products(spec, tiles), tile * tile

    def kernel(
        query, key, value, mask, grad_out, numbers, offsets, steps, sizes, members, scale, seed_low, seed_high,
        keep_scale, keep, own, captured, count, fresh, result,
    ):  # fmt: skip
        left = cuda.shared.array((depth, width), real)
        right = cuda.shared.array((depth, width), real)
        numbers_here = cuda.shared.array((NUMBERS, tile), real)
        elements = cuda.shared.array(scores_of_tile, np.int32)
        terms = cuda.shared.array(scores_of_tile, real)
        scores = cuda.local.array((rows, rows), real)
        grads = cuda.local.array((rows, rows), real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread, queries, first = ty * side + tx, sizes[QUERIES], cuda.blockIdx.x * count
        query_tiles = (queries + tile - 1) // tile
        if fresh:
            for e in range(thread, count, threads):
                result[first + e] = zero
        held, total = np.int64(-1), zero  # an element, and what is to be added to it
        part, parts, blocks = cuda.blockIdx.x, cuda.gridDim.x, sizes[SLICES] * query_tiles
        for block in range(part * blocks // parts, (part + 1) * blocks // parts):
            number, first_query = block // query_tiles, block % query_tiles * tile
            head, numbers_at = head_of(number, offsets, steps, sizes, own, captured), NUMBERS * number * queries
            load_rows(numbers_here, numbers, numbers_at, first_query, queries, thread)
            cuda.syncthreads()
            begin, end = keys_of_queries(head, first_query, min(queries, first_query + tile) - 1, tile)
            for first_key in range(begin, end, tile):
                if kind_of(head, first_query, first_key) == EMPTY:
                    continue
                both_products(
                    scores, grads, left, right, query, key, value, grad_out, offsets, steps, sizes, number, first_query,
                    first_key, scale,
                )  # fmt: skip
                weigh(
                    scores, grads, elements, numbers_here, mask, keep, sizes, head, number, first_query, first_key,
                    seed_low, seed_high, keep_scale, tx, ty,
                )  # fmt: skip
                for r in range(rows):
                    for c in range(rows):
                        terms[(ty + r * side) * tile + tx + c * side] = grads[r, c]
                cuda.syncthreads()
                held, total = add_up(elements, terms, held, total, result, first, thread)
                cuda.syncthreads()
        if held >= 0:
            result[first + held] += total

    return kernel
