"""The micro-kernel: both products of attention, and nothing else, run through `product`.

    out[m, n] = start[m, n] + Σ_p a[m, p] · b[p, n]

`a` is a matrix of scalars, read in place with any two strides, one element broadcast at a time; a row of `b` is one
row of vectors. The tile out[rows][vectors] stays in registers over the whole sum.
"""

from fastattn.simd import jit, tile_rank1


@jit
def product(start, a, a_row, a_column, b, b_row, count):
    """start + the product of a's next rows (as many as the tile has) with b, over `count` columns of a.

    Four columns a round: with so few rounds the processor foresees the last one, which otherwise costs it as much as
    five of them.
    """
    acc = start
    for _ in range(count >> 2):
        acc = tile_rank1(acc, a, a_row, b)
        acc = tile_rank1(acc, a + a_column, a_row, b + b_row)
        acc = tile_rank1(acc, a + 2 * a_column, a_row, b + 2 * b_row)
        acc = tile_rank1(acc, a + 3 * a_column, a_row, b + 3 * b_row)
        a += 4 * a_column
        b += 4 * b_row
    for _ in range(count & 3):
        acc = tile_rank1(acc, a, a_row, b)
        a += a_column
        b += b_row
    return acc
