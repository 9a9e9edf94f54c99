"""Online softmax on a block of scores (Milakov and Gimelshein 2018, arXiv 1805.02867), queries in the lanes.

Scores stand as `scores[j][i]`, key j, query i, in base 2: the queries were multiplied by log2(e), so that the
exponential is 2^x. (Where something is added to them they stay in base e, as finfo.min times log2(e) is no number;
`to_base_2` is log2(e) then, else 1.) For every query the block keeps `m`, to which all exponents refer, and `l`, the
sum of the weights.

`m` need not be the maximum: softmax is the same for any reference that does not overflow. It follows the maximum only
when that is more than `SLACK` above it, so that after the first blocks neither `l` nor the output is rescaled.
"""

from fastattn.simd import (
    all_zero,
    exponent_bits,
    fma,
    fraction,
    fraction_of_sixteenths,
    horner,
    jit,
    maximum,
    pick_sixteenth,
    scale_by_power,
    tile_fill,
    tile_load,
    tile_store,
    where_greater,
)

SLACK = 8.0  # weights grow up to 2^8 before m follows; float32 has 2^127 of room
MINUS_INFINITY = float("-inf")


# Least-maximum fits of the relative error of 2^f with p(0) = 1, lowest power first: 9e-8 and 3e-18 before rounding,
# the last one 8e-18.
# f in [-1/2, 1/2], for machines that round to the nearest whole number:
NEAREST_32 = (
    1.0,
    0.6931469775828203,
    0.240222420747427,
    0.05550733766693795,
    0.00967151312733926,
    0.0013264720150998596,
)
NEAREST_64 = (
    1.0,
    0.6931471805599453,
    0.24022650695910131,
    0.05550410866482008,
    0.00961812910759411,
    0.0013333558146774831,
    0.00015403530457123798,
    1.5252733492952222e-05,
    1.321543527718275e-06,
    1.0178199636717864e-07,
    7.073784038835728e-09,
    4.434762438655448e-10,
)
# f in [0, 1), for machines that round down:
DOWN_32 = (1.0, 0.6931513118202098, 0.240164450039123, 0.05579991339072367, 0.009017030031062538, 0.0018671301746041288)
# f in [0, 1/16), without p(0), and powers of two in steps of sixteenths:
SIXTEENTH_64 = (
    0.6931471805599377,
    0.24022650696146328,
    0.05550410841954057,
    0.009618140803127449,
    0.0013330742239606786,
    0.00015736283143053643,
)
POWERS_64 = (
    1.0,
    1.0442737824274138,
    1.0905077326652577,
    1.1387886347566916,
    1.189207115002721,
    1.241857812073484,
    1.2968395546510096,
    1.3542555469368927,
    1.4142135623730951,
    1.4768261459394993,
    1.5422108254079407,
    1.6104903319492543,
    1.681792830507429,
    1.7562521603732995,
    1.8340080864093424,
    1.9152065613971474,
)
# Added to x, these leave round(x) plus the exponent bias in the lowest bits: 1.5 * 2^23 + 127, 1.5 * 2^52 + 1023.
ROUND_32, ROUND_64 = 12583039.0, 6755399441056767.0


@jit
def exp2(kernel, x):
    """2^x by elements; 0 for x = -inf and where the result is subnormal, NaN for NaN.

    Right to 2.1 units in the last place, or 3 for float32 with AVX-512's instructions: these round down, and where f is
    close to 1 the errors of the fit (1.5) and of the sum's last steps (1.3) meet a result of half the size, but not
    half the unit. Without fused multiply-adds 2.4: the last product, below 1/2, is rounded by itself, to a quarter
    of the unit at most, and what those before it add is less than a tenth.

    2^x = 2^n · p(f), n a whole number, f = x - n. AVX-512 has instructions for the fraction (0 for an infinity) and for
    the scaling; elsewhere adding a large number rounds x, and leaves n where a shift makes it an exponent. In float64
    AVX-512 takes sixteenths from a table in two registers, which saves five terms of p for three instructions.
    """
    tile = kernel.tile
    if kernel.row.scalef:
        if tile.itemsize == 4:
            return scale_by_power(horner(fraction(x), DOWN_32), x)
        power, rest = pick_sixteenth(x, POWERS_64), fraction_of_sixteenths(x)
        return scale_by_power(fma(power * rest, horner(rest, SIXTEENTH_64), power), x)
    if tile.itemsize == 4:
        x = maximum(-127.0, x)
        shifted = x + ROUND_32
        return horner(x - (shifted - ROUND_32), NEAREST_32) * exponent_bits(shifted)
    x = maximum(-1023.0, x)
    shifted = x + ROUND_64
    return horner(x - (shifted - ROUND_64), NEAREST_64) * exponent_bits(shifted)


@jit
def exponentials(kernel, scores, count, shift, to_base_2):
    """scores[j] = 2^((scores[j] - shift) · to_base_2) for all keys of the block; returns their sum."""
    tile = kernel.tile
    at, total = scores, tile_fill(kernel.tile.single, 0.0)
    for _ in range(count):
        weights = exp2(kernel, (tile_load(tile.single, at, tile.row_bytes) - shift) * to_base_2)
        tile_store(weights, at, tile.row_bytes)
        total = total + weights
        at += tile.row_bytes
    return total


@jit
def rescale(tile, block, features, factor):
    """block[p] *= factor for all features p."""
    at = block
    for _ in range(features):
        tile_store(tile_load(tile.single, at, tile.row_bytes) * factor, at, tile.row_bytes)
        at += tile.row_bytes


@jit
def follow(kernel, top, to_base_2, m_at, l_at, out, features):
    """Bring m up to date, and rescale the output if it rose; what scores then refer to, and the same factor for l.

    `top` is a block's maximum for every query. Differences of scores are times `to_base_2`, and so is the slack.
    """
    tile = kernel.tile
    zero = tile_fill(tile.single, 0.0)
    m = tile_load(tile.single, m_at, tile.row_bytes)
    total = tile_load(tile.single, l_at, tile.row_bytes)
    # A query that has seen no key yet (l = 0) takes whatever maximum comes, unless that is still -inf.
    bound = where_greater(total, zero, m + SLACK / to_base_2, MINUS_INFINITY)
    shift, factor = where_greater(top, bound, top, m), tile_fill(tile.single, 1.0)
    if not all_zero(shift - m):
        factor = where_greater(total, zero, exp2(kernel, (m - shift) * to_base_2), 1.0)
        rescale(tile, out, features, factor)
        tile_store(shift, m_at, tile.row_bytes)
    return shift, factor


@jit
def absorb(kernel, scores, count, top, to_base_2, m_at, l_at, out, features):
    """Turn a block of scores into weights, whose sum is added to l; and what `follow` does."""
    tile = kernel.tile
    shift, factor = follow(kernel, top, to_base_2, m_at, l_at, out, features)
    if to_base_2 == 1.0:
        total = exponentials(kernel, scores, count, shift, 1.0)
    else:
        total = exponentials(kernel, scores, count, shift, to_base_2)
    tile_store(fma(tile_load(tile.single, l_at, 0), factor, total), l_at, 0)
