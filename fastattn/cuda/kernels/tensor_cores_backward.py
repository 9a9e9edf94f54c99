"""The backward pass on tensor cores: mma.sync on halves, for compute capability 8.0 and later.

The five products are FlashAttention-2's [1]_, but shared among two kernels of one source, so that every gradient is
summed by one warp, in one order, without atomic additions. Either kernel computes the weights again:

    own rows    others come by     a = own · otherᵀ     b = own · otherᵀ      sums of
    keys        queries, dO        key · queryᵀ         value · dOᵀ           dkey += dSᵀ · query    dvalue += Pᵀ · dO
    queries     keys, values       query · keyᵀ         dO · valueᵀ           dquery += dS · key

with P = exp(a - lse), dS = P · (b - delta) in the fragments of a and b, rounded to halves, which are the left factors
of the last products as they stand: nothing goes through shared memory but the other rows, whose next tile is copied
while one is worked on. Seven products instead of five is the price: a, b once more.

Keys and values that a group of query heads shares, or an axis of the batch, keep their sums through all slices that
share them. What is hidden has P = dS = 0. Tiles in which anything is not finite go another way, in which it is taken
out of the last products: of queries and keys for good, since where they may be looked at dS is NaN, and of dO to be
added afterwards where it is looked at.

For lse there are two numbers, which `find_shifts` writes: nothing is lost to its rounding (`fastattn.call.rounding`).

The gradient of a score is rounded to halves: in float16 it is infinite beyond 65504, as it is in PyTorch.

References
----------
.. [1] Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023, arXiv 2307.08691.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from fastattn.cuda.kernels import forward_fragments as softmax
from fastattn.cuda.kernels import fragments
from fastattn.cuda.kernels import gradient_fragments as own_fragments
from fastattn.cuda.kernels.elements import device
from fastattn.cuda.kernels.fragments import address, close, own_thread, wait_for_all, warp_of
from fastattn.cuda.kernels.gradient_fragments import Gradients
from fastattn.cuda.kernels.plan import (
    CAUSAL_OFFSET,
    GRAD_OUT,
    HEAD_DIM,
    KEY,
    KEYS,
    LSE,
    MASK,
    NUMBERS,
    QUERIES,
    QUERY,
    VALUE,
    VALUE_DIM,
)
from fastattn.cuda.kernels.primitives import unrolled


def gradients(spec: Gradients) -> Any:
    """The kernel: a block of warps for each block of own rows of each row of `members`.

    Its first four arguments are what the own rows and the others are of: (key, value, query, dO) for the gradients of
    keys and values, which it writes, else (query, dO, key, value) for that of queries, in `result`. `scale` is what
    scores are multiplied by, with a factor log2(e) where they are in base 2, and `factor` the scale itself.
    """
    shape, of_keys, _ = spec
    rows, tile, masked = shape.queries, shape.keys, shape.mask != "none"
    own_size, other_size = (KEYS, QUERIES) if of_keys else (QUERIES, KEYS)

    def own(step, *known):
        return unrolled(step, spec, *known)

    allocate, stage_of = own(fragments.allocate), unrolled(fragments.stage_of, shape)
    clear, positive = unrolled(fragments.clear, shape), unrolled(fragments.positive, shape)
    load_own, multiply_both, any_odd = map(
        own, (own_fragments.load_own, own_fragments.multiply_both, own_fragments.any_odd)
    )
    differentiate, differentiate_seen = (own(own_fragments.differentiate, restricted) for restricted in (False, True))
    accumulate, accumulate_finite = (
        unrolled(step, shape) for step in (fragments.accumulate, fragments.accumulate_finite)
    )
    before, all_see = own(own_fragments.before), own(own_fragments.all_see)
    add_odd, store = own(own_fragments.add_odd), unrolled(own_fragments.store, shape)
    copy_own, copy_others = _make_copies(spec)

    def kernel(a, b, c, d, mask, numbers, offsets, steps, sizes, members, scale, factor, result, second_result):
        count, others, offset = sizes[own_size], sizes[other_size], sizes[CAUSAL_OFFSET]
        near, lengths = (sizes[QUERIES], sizes[KEYS], offset), (sizes[HEAD_DIM], sizes[VALUE_DIM])
        blocks = (count + rows - 1) // rows
        owner, first = cuda.blockIdx.x // blocks, cuda.blockIdx.x % blocks * rows
        thread, memory = own_thread(), allocate()
        # the others that may look at any of the own rows, or be looked at
        start = max(0, first - offset) // tile * tile if of_keys else 0
        end = others if of_keys else min(others, first + rows + offset)
        tiles = max(0, (end - start + tile - 1) // tile)
        total = tiles * members.shape[1]

        number = members[owner, 0]
        copy_own(memory, a, b, offsets, steps, number, first, count, lengths, thread)
        wait_for_all()
        cuda.syncthreads()
        left = load_own(memory, thread)
        cuda.syncthreads()
        if total > 0:
            copy_others(memory, c, d, offsets, steps, number, start, others, lengths, thread)

        sums = clear()
        second_sums = clear()
        for step in range(total):
            # of what is computed from this nothing is kept from tile to tile or step to step: registers are short
            thread = own_thread()
            number, begin = members[owner, step // tiles], start + step % tiles * tile
            stage, following = stage_of(memory, step), stage_of(memory, step + 1)
            wait_for_all()
            # the tile is there for all warps, and none reads the one before it any more
            odd = cuda.syncthreads_or(np.int32(1 if any_odd(stage, thread) else 0))
            if step + 1 < total:
                after, after_number = start + (step + 1) % tiles * tile, members[owner, (step + 1) // tiles]
                copy_others(following, c, d, offsets, steps, after_number, after, others, lengths, thread)
            scores, grads, thread = multiply_both(left, memory, stage, thread)
            numbers_at, mask_at = address(numbers, NUMBERS * number * near[0]), address(mask, offsets[MASK, number])
            whole = all_see(first, begin, others, offset)
            if masked or odd or not whole:
                at = mask_at, steps[MASK, 0], steps[MASK, 1]
                weights, slopes = differentiate_seen(scores, grads, first, begin, numbers_at, near, at, scale, thread)
            else:
                weights, slopes = differentiate(scores, grads, first, begin, numbers_at, near, (), scale, thread)
            thread = own_thread()
            if odd:
                sums = accumulate_finite(sums, slopes, before(stage), thread)
                if of_keys:
                    second_sums = accumulate_finite(second_sums, weights, stage, thread)
                    bits = positive(weights)
                    for row in range(tile):
                        at = mask_at, steps[MASK, 0], steps[MASK, 1]
                        second_sums = add_odd(second_sums, bits, stage, first, begin, row, near, at, numbers_at, thread)
            else:
                sums = accumulate(sums, slopes, before(stage), thread)
                if of_keys:
                    second_sums = accumulate(second_sums, weights, stage, thread)
        wait_for_all()
        store(sums, factor, result, owner, first, count, lengths[0], thread)
        if of_keys:
            store(second_sums, np.float32(1), second_result, owner, first, count, lengths[1], thread)

    return kernel


def _make_copies(spec: Gradients) -> tuple[Any, Any]:
    """Device functions that begin to copy the rows of both operands: the own ones, and a tile of others."""
    shape, of_keys = spec.shape, spec.of_keys
    one, two = (KEY, VALUE) if of_keys else (QUERY, GRAD_OUT)
    other, other_two = (QUERY, GRAD_OUT) if of_keys else (KEY, VALUE)
    copy_block, copy_tile = (unrolled(fragments.copy_rows, shape, count) for count in (shape.queries, shape.keys))
    first_own, second_own = unrolled(own_fragments.first_own, spec), unrolled(own_fragments.second_own, spec)
    second_tile = unrolled(fragments.second_tile, shape)

    @device
    def copy_own(memory, a, b, offsets, steps, number, first, count, lengths, thread):
        """The block's own rows, of slice `number`, from row `first` on."""
        copy_block(first_own(memory), address(a, offsets[one, number]), steps[one, 0], first, count, lengths[0], thread)
        at = address(b, offsets[two, number])
        copy_block(second_own(memory), at, steps[two, 0], first, count, lengths[1], thread)
        close()

    @device
    def copy_others(stage, c, d, offsets, steps, number, begin, count, lengths, thread):
        """A tile of other rows, of slice `number`, from row `begin` on."""
        at = address(c, offsets[other, number])
        copy_tile(stage, at, steps[other, 0], begin, count, lengths[0], thread)
        at = address(d, offsets[other_two, number])
        copy_tile(second_tile(stage), at, steps[other_two, 0], begin, count, lengths[1], thread)
        close()

    return copy_own, copy_others


def find_shifts(spec: Gradients) -> Any:
    """The kernel of SHIFT and REST of each query, those of `portable.find_shifts`, from the scores of these kernels.

    A block of warps has a block of queries of a slice, and if need be goes over the keys like the forward pass.
    """
    shape = spec.shape

    def own(step):
        return unrolled(step, shape)

    copy_sums, store_shifts = own(own_fragments.copy_sums), own(own_fragments.store_shifts)
    part_of, tiles_of, first_key = map(own, (softmax.part_of, softmax.tiles_of, softmax.first_key))
    allocate, stage_of = own(fragments.allocate), own(fragments.stage_of)
    load_queries, multiply = own(fragments.load_queries), own(fragments.multiply)
    copy_queries, copy_keys = (unrolled(fragments.copy_rows, shape, count) for count in (shape.queries, shape.keys))
    seen_by, limits_of, start = map(own, (softmax.seen_by, softmax.limits_of, softmax.start))
    restrict, absorb, masked = own(softmax.restrict), own(softmax.absorb), shape.mask != "none"

    def kernel(query, key, mask, lse, numbers, offsets, steps, sizes, scale, slack):
        queries, keys, length, offset = sizes[QUERIES], sizes[KEYS], sizes[HEAD_DIM], sizes[CAUSAL_OFFSET]
        part, first = part_of(cuda.blockIdx.x, queries)
        thread, memory = own_thread(), allocate()
        numbers_at, lse_at = address(numbers, NUMBERS * part * queries), address(lse, offsets[LSE, part])
        coarse = copy_sums(numbers_at, lse_at, steps[LSE, 0], first, queries, thread)
        if cuda.syncthreads_or(np.int32(1 if coarse else 0)) == 0:
            return

        block_sees, warp_sees, all_see = seen_by(first, queries, keys, offset, warp_of())
        query_at, key_at = address(query, offsets[QUERY, part]), address(key, offsets[KEY, part])
        mask_at, key_step = address(mask, offsets[MASK, part]), steps[KEY, 0]
        copy_queries(stage_of(memory, 1), query_at, steps[QUERY, 0], first, queries, length, thread)
        copy_keys(memory, key_at, key_step, 0, keys, length, thread)
        close()
        wait_for_all()
        cuda.syncthreads()
        left = load_queries(stage_of(memory, 1), thread)

        _, highest, total = start()
        for tile in range(tiles_of(block_sees)):
            thread = own_thread()
            begin, after = first_key(tile), first_key(tile + 1)
            wait_for_all()
            # the tile is there for all warps, and none reads the one before it any more
            cuda.syncthreads()
            if after < block_sees:
                copy_keys(stage_of(memory, tile + 1), key_at, key_step, after, keys, length, thread)
                close()
            if begin < warp_sees:
                scores = multiply(left, stage_of(memory, tile), thread)
                if masked or after > all_see:
                    limits = limits_of(first, offset, keys, queries, thread)
                    at = mask_at, steps[MASK, 0], steps[MASK, 1]
                    scores = restrict(scores, begin, limits, first, at, scale, thread)
                _, highest, total, _ = absorb(scores, highest, total, (), scale)
        wait_for_all()
        store_shifts(highest, total, scale, numbers_at, lse_at, steps[LSE, 0], slack, first, queries, thread)

    return kernel
