"""The hyperbolic tangent, with its slope: right to some units in the last place of the result itself, however small.

tanh(x) = (e - 1) / (e + 1) with e = 2^y, y = 2 log2(e) x. With y = n + f, n a whole number and f in [-1/2, 1/2],

    e - 1 = 2^n · f q(f) + (2^n - 1)         f q(f) = 2^f - 1

nothing is lost where x is small: there n is 0.
"""

from fastattn.cpu.kernels.softmax import ROUND_32, ROUND_64
from fastattn.simd import exponent_bits, fma, horner, jit, maximum, minimum

# Fits of (2^f - 1) / f on [-1/2, 1/2], lowest power first, to 1.3e-8 and 2e-17, relative.
POWER_32 = (
    0.6931471880262288,
    0.24022650760568126,
    0.05550357114219078,
    0.009618082557277854,
    0.0013390863364671215,
    0.00015453162945119471,
)
POWER_64 = (
    0.6931471805599453,
    0.24022650695910097,
    0.05550410866482159,
    0.0096181291076069,
    0.0013333558146418052,
    0.00015403530441733052,
    1.5252733828614522e-05,
    1.321544258585974e-06,
    1.0178063026613412e-07,
    7.072586722911188e-09,
    4.454862599313504e-10,
)
# From here on tanh is 1, and its slope 0 to the eye; squares of e are finite still.
FARTHEST_32, FARTHEST_64 = 60.0, 500.0


@jit
def tanh_with_slope(tile, y):
    """tanh(x) and 1 - tanh(x)² by elements, for y = 2 log2(e) x; NaN for NaN."""
    if tile.itemsize == 4:
        y = maximum(-FARTHEST_32, minimum(FARTHEST_32, y))
        moved = y + ROUND_32
        rest = y - (moved - ROUND_32)
        part = rest * horner(rest, POWER_32)
    else:
        y = maximum(-FARTHEST_64, minimum(FARTHEST_64, y))
        moved = y + ROUND_64
        rest = y - (moved - ROUND_64)
        part = rest * horner(rest, POWER_64)
    power = exponent_bits(moved)
    less = fma(power, part, power - 1.0)
    inverse = 1.0 / (less + 2.0)
    return less * inverse, fma(power, part, power) * 4.0 * inverse * inverse
