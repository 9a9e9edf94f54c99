"""The micro-kernel: both products of attention, and nothing else, run through `product`.

    out[m, n] = start[m, n] + Σ_p a[m, p] · b[p, n]

`a` is a matrix of scalars, read in place with any two strides, one element broadcast at a time; a row of `b` is one
row of vectors. The tile out[rows][vectors] stays in registers over the whole sum.
"""

from fastattn.simd import jit, tile_rank1


@jit
def product(start, a, a_row, a_column, b, b_row, count):
    """start + the product of a's next rows (as many as the tile has) with b, over `count` columns of a."""
    acc = start
    for _ in range(count):
        acc = tile_rank1(acc, a, a_row, b)
        a += a_column
        b += b_row
    return acc
