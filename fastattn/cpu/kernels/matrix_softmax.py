"""Weights of a block of scores, laid out for a matrix unit, while that multiplies something else.

A product of four tiles takes the unit 64 cycles, and the core two instructions to have it begin. So the scores of the
next block of queries are formed while the exponentials of this one are: after every four products come some of them. In
longer runs, of either, the other side would be idle: a processor looks some 500 instructions ahead.
"""

from collections import namedtuple

from fastattn.cpu.kernels.matrix import depth, store_terms
from fastattn.cpu.kernels.softmax import MINUS_INFINITY, exp2
from fastattn.machine.tile import MATRIX_DEPTH as DEEP
from fastattn.simd import all_finite, fma, inline, jit, stack_memory, tile_fill, tile_load, tile_store
from fastattn.simd.matrix import WIDE, WIDE_ROW

PARTS = 512  # of a pair of keys; the smallest step

# Scores of `count` keys, an even number, of which weights are made, so many parts of a pair of them at a time; where in
# memory their reference is, and the sum of the weights; where weights are laid out.
Weighing = namedtuple("Weighing", "scores count some shift total to_base_2 pairs")

memory_to_weigh = stack_memory(2 * WIDE_ROW)


@jit
def no_weights():
    """Nothing to do."""
    return Weighing(0, 0, 0, 0, 0, 1.0, 0)


@jit
def to_weigh(kernel, scores, count, shift, to_base_2, pairs, memory, steps):
    """Weights of a block of scores, in so many steps; behind the last key scores are -inf, to the end of a tile.

    `memory`: of `memory_to_weigh`.
    """
    tile = kernel.tile
    end = depth(count) * DEEP
    for at in range(scores + count * tile.row_bytes, scores + end * tile.row_bytes, tile.row_bytes):
        tile_store(tile_fill(tile.single, MINUS_INFINITY), at, 0)
    tile_store(shift, memory, 0)
    tile_store(tile_fill(tile.single, 0.0), memory + tile.row_bytes, 0)
    some = (end // 2 * PARTS + steps - 1) // steps
    return Weighing(scores, end, some, memory, memory + tile.row_bytes, to_base_2, pairs)


@inline
def weights_of(kernel, weighing, begin, end, shift, added, total):
    """Those of the scores from `begin` to `end`, and the sum with them. `added`: -shift · to_base_2 is given."""
    tile, to_base_2 = kernel.tile, weighing.to_base_2
    at, rest = weighing.scores + begin * tile.row_bytes, (kernel.terms - 1) * WIDE
    to = weighing.pairs + begin // 2 * WIDE_ROW + begin // DEEP * rest
    for j in range(begin, end, 2):
        low, high = tile_load(tile.single, at, 0), tile_load(tile.single, at + tile.row_bytes, 0)
        if added:
            low, high = exp2(kernel, fma(low, to_base_2, shift)), exp2(kernel, fma(high, to_base_2, shift))
        else:
            low, high = exp2(kernel, (low - shift) * to_base_2), exp2(kernel, (high - shift) * to_base_2)
        total = total + low + high
        store_terms(kernel, low, high, to, WIDE)
        at += 2 * tile.row_bytes
        to += WIDE_ROW
        if kernel.terms > 1 and j & (DEEP - 1) == DEEP - 2:
            to += rest
    return total


@jit
def weigh(kernel, weighing, done):
    """Make the next weights, if any are left; how much is done then, in parts of a pair. Elsewhere there are none."""
    if kernel.work != "forward":
        return done
    begin = done // PARTS * 2
    done += weighing.some
    end = min(done // PARTS * 2, weighing.count)
    if begin < end:
        tile = kernel.tile
        shift, total = tile_load(tile.single, weighing.shift, 0), tile_load(tile.single, weighing.total, 0)
        added = tile_fill(tile.single, 0.0) - shift * weighing.to_base_2
        if kernel.terms == 1 and all_finite(added):  # an instruction less, and a rounding that bfloat16 does not show
            total = weights_of(kernel, weighing, begin, end, added, True, total)
        else:
            total = weights_of(kernel, weighing, begin, end, shift, False, total)
        tile_store(total, weighing.total, 0)
    return done


@jit
def weigh_all(kernel, weighing, done):
    """Make the weights that are left; the sum of all of them."""
    while done < weighing.count // 2 * PARTS:
        done = weigh(kernel, weighing, done)
    return tile_load(kernel.tile.single, weighing.total, 0)
