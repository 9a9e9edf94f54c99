"""The micro-kernel: both products of attention, and nothing else, run through these functions.

    out[m, n] = start[m, n] + Σ_p a[m, p] · b[p, n]

`a` is a matrix of scalars, one element broadcast at a time; a row of `b` is one row of vectors. The tile
out[rows][vectors] stays in registers over the whole sum.
"""

from fastattn.simd import inline, jit, tile_rank1, tile_rank2


@jit
def product(start, a, a_row, a_column, b, b_row, count):
    """start + the product of a's next rows (as many as the tile has) with b; a is read in place, with any strides."""
    acc = start
    for _ in range(count):
        acc = tile_rank1(acc, a, a_row, b)
        a += a_column
        b += b_row
    return acc


def unrolled(step):
    """The same, for callers of which one stride of a is fixed: packed panels, and rows that are each contiguous.

    Four columns a round: with so few rounds the processor foresees the last one, which otherwise costs it as much as
    five of them. (With two free strides LLVM would keep addresses of the four on the stack.)
    """

    @inline
    def product_of_steps(tile, start, a, a_row, a_column, b, count):
        acc = start
        for _ in range(count >> 2):
            acc = step(acc, a, a_row, b)
            acc = step(acc, a + a_column, a_row, b + tile.row_bytes)
            acc = step(acc, a + 2 * a_column, a_row, b + 2 * tile.row_bytes)
            acc = step(acc, a + 3 * a_column, a_row, b + 3 * tile.row_bytes)
            a += 4 * a_column
            b += 4 * tile.row_bytes
        for _ in range(count & 3):
            acc = step(acc, a, a_row, b)
            a += a_column
            b += tile.row_bytes
        return acc

    return product_of_steps


unrolled_product = unrolled(tile_rank1)
product_of_pairs = unrolled(tile_rank2)  # of which `count` is the number


@inline
def tile_product(kernel, start, a, a_row, a_column, b, count):
    """The product for a whole tile, by the way in which a kernel finds a."""
    if kernel.reads == "pairs":
        return product_of_pairs(kernel.tile, start, a, a_row, a_column, b, count)
    if kernel.reads != "strided":
        return unrolled_product(kernel.tile, start, a, a_row, a_column, b, count)
    return product(start, a, a_row, a_column, b, kernel.tile.row_bytes, count)


@inline
def row_product(kernel, start, a, a_row, a_column, b, count):
    """The same for one row of a tile, of which there are few: they are not worth a round of four."""
    if kernel.reads == "pairs":
        return product_of_pairs(kernel.tile, start, a, a_row, a_column, b, count)
    return product(start, a, a_row, a_column, b, kernel.tile.row_bytes, count)
