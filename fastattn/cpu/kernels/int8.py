"""Rows of int8: whole numbers, of which 32 have a scale in common, as `fastattn.kv_cache.formats` writes them.

    scale of block 0, scale of block 1, ...; number 0, number 1, ...        scales are of float16

A row is known by where it begins. Other rows, which are of floating dtypes, are read here as well.
"""

from fastattn.machine.tile import BLOCK
from fastattn.simd import (
    inline,
    jit,
    load_stored,
    store_element,
    tile_load_scales,
    tile_load_stored,
    tile_store,
)

SCALE_BYTES = 2


@jit
def bytes_of_scales(features):
    """Where the numbers of a row begin."""
    return (features + BLOCK - 1) // BLOCK * SCALE_BYTES


@jit
def scale_of(place, row, p):
    """The scale of feature p of a row."""
    return load_stored(place.scale_place, row + p // BLOCK * SCALE_BYTES)


@inline
def scales_of(place, shape, source, row, p, factor):
    """The scales of what `load_rows` loads, times a factor: p is a multiple of what a row of a shape has."""
    return tile_load_scales(place, shape, source + p // BLOCK * SCALE_BYTES, row, factor)


@inline
def load_rows(place, shape, source, row, p, features):
    """Features from p on of rows of any dtype, `row` bytes apart, as many of both as a shape has."""
    if place.storage == "int8":
        return numbers_of(place, shape, source, row, p, features) * scales_of(place, shape, source, row, p, 1.0)
    return tile_load_stored(place, shape, source + p * place.itemsize, row)


@inline
def numbers_of(place, shape, source, row, p, features):
    """The whole numbers of what `load_rows` loads, not yet times their scales."""
    return tile_load_stored(place, shape, source + bytes_of_scales(features) + p, row)


@jit
def copy_blocks(place, tile, target, target_row, source, row, count, features):
    """target[j][p] = source[j][p], rows `target_row` bytes apart."""
    whole = features - features % BLOCK
    for _ in range(count):
        for p in range(0, whole, BLOCK):
            tile_store(load_rows(place, tile.block, source, 0, p, features), target + p * tile.itemsize, 0)
        for p in range(whole, features):
            store_element(tile, target + p * tile.itemsize, load_number(place, source, p, 1, features))
        source += row
        target += target_row


@jit
def load_number(place, row, p, column, features):
    """Feature p of a row of any dtype, whose features are `column` bytes apart."""
    if place.storage == "int8":
        return load_stored(place, row + bytes_of_scales(features) + p) * scale_of(place, row, p)
    return load_stored(place, row + p * column)


@jit
def are_scales_finite(place, row, features):
    """Whether all numbers of a row of int8 are finite."""
    for p in range(0, features, BLOCK):
        if scale_of(place, row, p) * 0.0 != 0.0:
            return False
    return True
