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

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from fastattn.cuda.kernels.fragments import TileShape, make_steps
from fastattn.cuda.kernels.gradient_fragments import make_gradient_steps, shared_bytes
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
from fastattn.cuda.kernels.primitives import global_address, hold_loads, unrolled


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
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return shared_bytes(self.shape, self.apart)


def gradients(spec: Gradients) -> Any:
    """The kernel: a block of warps for each block of own rows of each row of `members`.

    Its first four arguments are what the own rows and the others are of: (key, value, query, dO) for the gradients of
    keys and values, which it writes, else (query, dO, key, value) for that of queries, in `result`.
    """
    shape, of_keys, apart = spec
    first_own, second_own = (KEY, VALUE) if of_keys else (QUERY, GRAD_OUT)
    first_other, second_other = (QUERY, GRAD_OUT) if of_keys else (KEY, VALUE)
    own_size, other_size = (KEYS, QUERIES) if of_keys else (QUERIES, KEYS)
    own, more = make_steps(shape), make_gradient_steps(shape, of_keys, apart)
    own_thread, stage_of, close, wait_for_all = own.own_thread, own.stage_of, own.close, own.wait_for_all
    copy_own, copy_others, load_own, clear = own.copy_queries, own.copy_keys, own.load_queries, own.clear
    multiply, accumulate, accumulate_finite, positive = (
        own.multiply, own.accumulate, own.accumulate_finite, own.positive,
    )  # fmt: skip
    allocate, own_at, second_own_at = more.allocate, more.first_own, more.second_own
    before, any_odd = more.before, more.any_odd
    differentiate, differentiate_seen = more.differentiate, more.differentiate_seen
    add_odd, store = more.add_odd, more.store
    second_tile = unrolled(lambda stage: stage + shape.keys * shape.row_bytes)
    address, hold, masked = unrolled(global_address), unrolled(hold_loads), shape.mask != "none"
    rows, tile = shape.queries, shape.keys

    def kernel(
        a, b, c, d, mask, numbers, offsets, steps, sizes, members, unit, scale, result, second_result
    ):  # fmt: skip
        count, others, offset = sizes[own_size], sizes[other_size], sizes[CAUSAL_OFFSET]
        queries, keys = sizes[QUERIES], sizes[KEYS]
        length, second_length = sizes[HEAD_DIM], sizes[VALUE_DIM]
        blocks = (count + rows - 1) // rows
        owner, first = cuda.blockIdx.x // blocks, cuda.blockIdx.x % blocks * rows
        thread, memory = own_thread(), allocate()

        # the others that may look at any of the own rows, or be looked at
        start, end = 0, others
        if of_keys:
            start = max(0, first - offset) // tile * tile
        else:
            end = min(others, first + rows + offset)
        tiles = max(0, (end - start + tile - 1) // tile)
        total = tiles * members.shape[1]

        number = members[owner, 0]
        copy_own(
            own_at(memory), address(a, offsets[first_own, number]), steps[first_own, 0], first, count, length, thread
        )
        at = address(b, offsets[second_own, number])
        copy_own(second_own_at(memory), at, steps[second_own, 0], first, count, second_length, thread)
        close()
        wait_for_all()
        cuda.syncthreads()
        left, second_left = load_own(own_at(memory), thread), load_own(second_own_at(memory), thread)
        cuda.syncthreads()
        if total > 0:
            at = address(c, offsets[first_other, number])
            copy_others(memory, at, steps[first_other, 0], start, others, length, thread)
            at = address(d, offsets[second_other, number])
            copy_others(second_tile(memory), at, steps[second_other, 0], start, others, second_length, thread)
            close()

        sums, _, _ = clear()
        second_sums, _, _ = clear()
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
                at = address(c, offsets[first_other, after_number])
                copy_others(following, at, steps[first_other, 0], after, others, length, thread)
                at = address(d, offsets[second_other, after_number])
                copy_others(second_tile(following), at, steps[second_other, 0], after, others, second_length, thread)
                close()
            if apart:
                left = load_own(own_at(memory), thread)
            scores = multiply(left, stage, thread)
            thread = own_thread()
            if apart:
                second_left = load_own(second_own_at(memory), thread)
            grads = multiply(second_left, second_tile(stage), thread)
            thread = own_thread()
            if apart:
                # where registers are this short, none is for the mask while there are factors in them
                hold()
            numbers_at, mask_at = address(numbers, NUMBERS * number * queries), address(mask, offsets[MASK, number])
            # whether the last key is seen by the first query
            if of_keys:
                whole = begin + tile <= others and first + rows <= begin + offset + 1
            else:
                whole = begin + tile <= others and begin + tile <= first + offset + 1
            if masked or odd or not whole:
                weights, score_grads = differentiate_seen(
                    scores, grads, first, begin, numbers_at, queries, keys, offset, mask_at, steps[MASK, 0],
                    steps[MASK, 1], unit, thread,
                )  # fmt: skip
            else:
                weights, score_grads = differentiate(
                    scores, grads, first, begin, numbers_at, queries, keys, offset, mask_at, steps[MASK, 0],
                    steps[MASK, 1], unit, thread,
                )  # fmt: skip
            thread = own_thread()
            if odd:
                sums = accumulate_finite(sums, score_grads, before(stage), thread)
                if of_keys:
                    second_sums = accumulate_finite(second_sums, weights, stage, thread)
                    bits = positive(weights)
                    for row in range(tile):
                        second_sums = add_odd(
                            second_sums, bits, stage, first, begin, row, queries, keys, offset, mask_at,
                            steps[MASK, 0], steps[MASK, 1], numbers_at, thread,
                        )  # fmt: skip
            else:
                sums = accumulate(sums, score_grads, before(stage), thread)
                if of_keys:
                    second_sums = accumulate(second_sums, weights, stage, thread)
        wait_for_all()
        store(sums, scale, result, owner * count * length, first, count, length, thread)
        if of_keys:
            at = owner * count * second_length
            store(second_sums, np.float32(1), second_result, at, first, count, second_length, thread)

    return kernel


def find_shifts(spec: Gradients) -> Any:
    """The kernel of SHIFT and REST of each query, those of `portable.find_shifts`, from the scores of these kernels.

    A block of warps has a block of queries of a slice, and if need be goes over the keys like the forward pass.
    """
    shape = spec.shape
    own, more = make_steps(shape), make_gradient_steps(shape, of_keys=False, apart=False)
    copy_sums, store_shifts = more.copy_sums, more.store_shifts
    allocate, own_thread, warp_of, part_of = own.allocate, own.own_thread, own.warp_of, own.part_of
    tiles_of, first_key, stage_of, load_queries = own.tiles_of, own.first_key, own.stage_of, own.load_queries
    copy_queries, copy_keys, close, clear = own.copy_queries, own.copy_keys, own.close, own.clear
    wait_for_all, seen_by, limits_of = own.wait_for_all, own.seen_by, own.limits_of
    multiply, restrict, absorb = own.multiply, own.restrict, own.absorb
    address, masked = unrolled(global_address), shape.mask != "none"

    def kernel(query, key, mask, lse, numbers, offsets, steps, sizes, unit, slack):
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

        _, highest, total = clear()
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
                    scores = restrict(
                        scores, begin, limits, thread, first, mask_at, steps[MASK, 0], steps[MASK, 1], unit
                    )
                _, highest, total, _ = absorb(scores, highest, total, (), unit)
        wait_for_all()
        store_shifts(highest, total, unit, numbers_at, lse_at, steps[LSE, 0], slack, first, queries, thread)

    return kernel
