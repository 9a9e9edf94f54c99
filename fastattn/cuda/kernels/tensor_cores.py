"""The forward pass on tensor cores: mma.sync on halves, for compute capability 8.0 and later.

The schedule is FlashAttention-2's [1]_. A block of warps takes the queries of one tile, each warp `TileShape.rows` of
them, and walks over the tiles of keys that any of them may look at:

    scores  = query · keyᵀ                fragments of float32, in registers
    weights = 2^(scores · scale - m)      m the greatest so far; sum and output are rescaled where it rises
    output += weights · value             the weights are rounded to halves, and stay in their registers

where `scale` has a factor log2(e) in it; under a floating mask scores stay in base e.

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

from typing import Any

from numba import cuda

from fastattn.cuda.kernels import forward_fragments as softmax
from fastattn.cuda.kernels import fragments
from fastattn.cuda.kernels.fragments import (
    TileShape,
    address,
    close,
    own_thread,
    wait_for_all,
    wait_for_first,
    warp_of,
)
from fastattn.cuda.kernels.plan import (
    CAUSAL_OFFSET,
    HEAD_DIM,
    KEY,
    KEYS,
    MASK,
    OUT,
    QUERIES,
    QUERY,
    VALUE,
    VALUE_DIM,
)
from fastattn.cuda.kernels.primitives import unrolled


def forward(shape: TileShape) -> Any:
    """The kernel of the result and the log-sum-exp: a block of warps for each block of queries of each slice.

    Its arguments are those of `fastattn.cuda.kernels.portable.forward`, of which it does without dropout's.
    """

    def own(step):
        return unrolled(step, shape)

    part_of, tiles_of, first_key = map(own, (softmax.part_of, softmax.tiles_of, softmax.first_key))
    allocate, stage_of, tile_bytes = own(fragments.allocate), own(fragments.stage_of), shape.tile_bytes
    copy_queries, copy_keys = (unrolled(fragments.copy_rows, shape, count) for count in (shape.queries, shape.keys))
    load_queries, multiply, start = map(own, (fragments.load_queries, fragments.multiply, softmax.start))
    seen_by, limits_of, restrict = map(own, (softmax.seen_by, softmax.limits_of, softmax.restrict))
    has_odd, absorb, finish = map(own, (softmax.has_odd, softmax.absorb, softmax.finish))
    accumulate, accumulate_finite = own(fragments.accumulate), own(fragments.accumulate_finite)
    positive, add_odd, tile_keys = own(fragments.positive), own(softmax.add_odd), shape.keys
    masked = shape.mask != "none"

    def kernel(query, key, value, mask, out, lse, offsets, steps, sizes, scale, keep_scale, seed_low, seed_high):
        queries, keys, length = sizes[QUERIES], sizes[KEYS], sizes[HEAD_DIM]
        value_length, offset = sizes[VALUE_DIM], sizes[CAUSAL_OFFSET]
        part, first = part_of(cuda.blockIdx.x, queries)
        thread, memory = own_thread(), allocate()

        # how many of the first keys are seen by any query of the block, by any of the warp, and by all of the warp
        block_sees, warp_sees, all_see = seen_by(first, queries, keys, offset, warp_of())

        query_at = address(query, offsets[QUERY, part])
        mask_at = address(mask, offsets[MASK, part])
        key_at, value_at = address(key, offsets[KEY, part]), address(value, offsets[VALUE, part])
        copy_queries(stage_of(memory, 1), query_at, steps[QUERY, 0], first, queries, length, thread)
        close()
        key_step, value_step = steps[KEY, 0], steps[VALUE, 0]
        copy_keys(memory, key_at, key_step, 0, keys, length, thread)
        copy_keys(memory + tile_bytes, value_at, value_step, 0, keys, value_length, thread)
        close()
        wait_for_first()
        cuda.syncthreads()
        left = load_queries(stage_of(memory, 1), thread)

        output, highest, total = start()
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
                limits, odd = limits_of(first, offset, keys, queries, thread), False
                if masked or after > all_see:
                    at = mask_at, steps[MASK, 0], steps[MASK, 1]
                    scores = restrict(scores, begin, limits, first, at, scale, thread)
                    odd = has_odd(stage, thread)
                weights, highest, total, output = absorb(scores, highest, total, output, scale)
                if odd:
                    output = accumulate_finite(output, weights, stage, thread)
                    bits = positive(weights)
                    for row in range(tile_keys):
                        at = mask_at, steps[MASK, 0], steps[MASK, 1]
                        output = add_odd(output, bits, stage, begin, row, limits, first, at, thread)
                else:
                    output = accumulate(output, weights, stage, thread)
        wait_for_all()
        finish(
            output, highest, total, scale, out, offsets[OUT, part], steps[OUT, 0], lse, part * queries, first, queries,
            value_length, thread,
        )  # fmt: skip

    return kernel
