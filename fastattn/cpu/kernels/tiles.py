"""The micro-kernel: both products of attention, and nothing else, run through these functions.

    out[m, n] = start[m, n] + Σ_p a[m, p] · b[p, n]

`a` is a matrix of scalars, one element broadcast at a time; a row of `b` is one row of vectors. The tile
out[rows][vectors] stays in registers over the whole sum.
"""

from fastattn.simd import (
    inline,
    jit,
    tile_rank1,
    tile_rank1_along,
    tile_rank1_packed,
    tile_rank2,
    tile_rank2_along,
    tile_rank2_packed,
)


@jit
def product(start, a, a_row, a_column, b, b_row, count):
    """start + the product of a's next rows (as many as the tile has) with b; a is read in place, with any strides."""
    acc = start
    for _ in range(count):
        acc = tile_rank1(acc, a, a_row, b)
        a += a_column
        b += b_row
    return acc


def four_steps(step):
    """Four terms of a sum, one after the other."""

    @inline
    def four(tile, acc, a, a_row, a_column, b):
        acc = step(tile, acc, a, a_row, b)
        acc = step(tile, acc, a + a_column, a_row, b + tile.row_bytes)
        acc = step(tile, acc, a + 2 * a_column, a_row, b + 2 * tile.row_bytes)
        return step(tile, acc, a + 3 * a_column, a_row, b + 3 * tile.row_bytes)

    return four


def unrolled(step, four):
    """The same, for callers of which one stride of a is fixed: packed panels, and rows that are each contiguous.

    Four columns a round: with so few rounds the processor foresees the last one, which otherwise costs it as much as
    five of them. (With two free strides LLVM would keep addresses of the four on the stack.)
    """

    @inline
    def product_of_steps(tile, start, a, a_row, a_column, b, count):
        acc = start
        for _ in range(count >> 2):
            acc = four(tile, acc, a, a_row, a_column, b)
            a += 4 * a_column
            b += 4 * tile.row_bytes
        for _ in range(count & 3):
            acc = step(tile, acc, a, a_row, b)
            a += a_column
            b += tile.row_bytes
        return acc

    return product_of_steps


def products(rank, rank_packed, rank_along):
    """The unrolled products: with columns of a that are each contiguous, and with rows that are."""

    @inline
    def step(tile, acc, a, a_row, b):
        return rank(acc, a, a_row, b)

    @inline
    def step_across(tile, acc, a, a_row, b):
        if tile.by_element:
            return rank_packed(acc, a, b)
        return rank(acc, a, a_row, b)

    four = four_steps(step)

    @inline
    def four_along(tile, acc, a, a_row, a_column, b):
        if tile.by_element:
            return rank_along(acc, a, a_row, b)
        return four(tile, acc, a, a_row, a_column, b)

    return unrolled(step_across, four_steps(step_across)), unrolled(step, four_along), four_along


product_across, product_along, four_along = products(tile_rank1, tile_rank1_packed, tile_rank1_along)
# of pairs, of which `count` is the number
pairs_across, pairs_along, four_pairs_along = products(tile_rank2, tile_rank2_packed, tile_rank2_along)


@inline
def key_product(kernel, start, a, a_row, a_column, b, count):
    """The product of a whole tile of keys, which are rows of a, by the way in which a kernel finds them."""
    if kernel.reads == "pairs":
        return pairs_along(kernel.tile, start, a, a_row, a_column, b, count)
    if kernel.reads == "rows":
        return product_along(kernel.tile, start, a, a_row, a_column, b, count)
    if kernel.reads == "panels":
        return product_across(kernel.tile, start, a, a_row, a_column, b, count)
    return product(start, a, a_row, a_column, b, kernel.tile.row_bytes, count)


@inline
def value_product(kernel, start, a, a_row, a_column, b, count):
    """The same of values, which are columns of a."""
    if kernel.reads == "pairs":
        return pairs_across(kernel.tile, start, a, a_row, a_column, b, count)
    if kernel.reads != "strided":
        return product_across(kernel.tile, start, a, a_row, a_column, b, count)
    return product(start, a, a_row, a_column, b, kernel.tile.row_bytes, count)


@inline
def row_product(kernel, start, a, a_row, a_column, b, count):
    """The same for one row of a tile, of which there are few: they are not worth a round of four."""
    if kernel.reads == "pairs":  # whose column is one pair, of keys and of values
        return pairs_across(kernel.tile, start, a, a_row, a_column, b, count)
    return product(start, a, a_row, a_column, b, kernel.tile.row_bytes, count)
