"""The micro-kernel: both products of attention, and nothing else, run through these functions.

    out[m, n] = start[m, n] + Σ_p a[m, p] · b[p, n]

`a` is a matrix of scalars, one element broadcast at a time; a row of `b` is one row of vectors. The tile
out[rows][vectors] stays in registers over the whole sum.
"""

from fastattn.simd import inline, jit, tile_rank1


@jit
def product(start, a, a_row, a_column, b, b_row, count):
    """start + the product of a's next rows (as many as the tile has) with b; a is read in place, with any strides."""
    acc = start
    for _ in range(count):
        acc = tile_rank1(acc, a, a_row, b)
        a += a_column
        b += b_row
    return acc


@inline
def packed_product(tile, start, a, b, count):
    """The same for a packed panel, a[p][m]: what is next in memory is next in the sum.

    Four columns a round: with so few rounds the processor foresees the last one, which otherwise costs it as much as
    five of them.
    """
    row, column = tile.itemsize, tile.rows * tile.itemsize
    acc = start
    for _ in range(count >> 2):
        acc = tile_rank1(acc, a, row, b)
        acc = tile_rank1(acc, a + column, row, b + tile.row_bytes)
        acc = tile_rank1(acc, a + 2 * column, row, b + 2 * tile.row_bytes)
        acc = tile_rank1(acc, a + 3 * column, row, b + 3 * tile.row_bytes)
        a += 4 * column
        b += 4 * tile.row_bytes
    for _ in range(count & 3):
        acc = tile_rank1(acc, a, row, b)
        a += column
        b += tile.row_bytes
    return acc


@inline
def row_product(tile, start, a, row, b, count):
    """The same for rows where they lie, a[m][p], each one contiguous: keys."""
    element = tile.itemsize
    acc = start
    for _ in range(count >> 2):
        acc = tile_rank1(acc, a, row, b)
        acc = tile_rank1(acc, a + element, row, b + tile.row_bytes)
        acc = tile_rank1(acc, a + 2 * element, row, b + 2 * tile.row_bytes)
        acc = tile_rank1(acc, a + 3 * element, row, b + 3 * tile.row_bytes)
        a += 4 * element
        b += 4 * tile.row_bytes
    for _ in range(count & 3):
        acc = tile_rank1(acc, a, row, b)
        a += element
        b += tile.row_bytes
    return acc


@inline
def column_product(tile, start, a, row, b, count):
    """The same for columns of rows where they lie, a[p][m], each row contiguous: values."""
    element = tile.itemsize
    acc = start
    for _ in range(count >> 2):
        acc = tile_rank1(acc, a, element, b)
        acc = tile_rank1(acc, a + row, element, b + tile.row_bytes)
        acc = tile_rank1(acc, a + 2 * row, element, b + 2 * tile.row_bytes)
        acc = tile_rank1(acc, a + 3 * row, element, b + 3 * tile.row_bytes)
        a += 4 * row
        b += 4 * tile.row_bytes
    for _ in range(count & 3):
        acc = tile_rank1(acc, a, element, b)
        a += row
        b += tile.row_bytes
    return acc
