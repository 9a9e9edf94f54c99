"""Rows of numbers, as a cache keeps them: rounded to another dtype, or in int8 (`fastattn.cpu.kernels.int8`).

A builtin of Python (`fastattn.cpu.kernels.entry`), of two arrays: what is to be kept, (heads, n, features) with any
strides, and where, (heads, n, elements of a row), each row of which is contiguous.
"""

from fastattn.cpu.kernels.entry import WORD, length_of, link_view, stride_of
from fastattn.cpu.kernels.int8 import SCALE_BYTES, bytes_of_scales
from fastattn.cpu.kernels.pack import copy_rows
from fastattn.machine.objects import OBJECT_HEADER
from fastattn.machine.tile import BLOCK
from fastattn.simd import (
    absolute,
    all_finite,
    as_element,
    call_compiled,
    jit,
    largest_lane,
    load_element,
    load_i64,
    load_stored,
    load_u16,
    maximum,
    minimum,
    stack_memory,
    store_stored,
    store_u16,
    tile_fill,
    tile_load,
    tile_load_stored,
    tile_store,
    tile_store_stored,
)

STEPS = 127
LARGEST, NAN = 0x7BFF, 0x7E00  # bits of float16
memory_of_a_block = stack_memory(8 * BLOCK)


@jit
def round_row(kernel, tile, source, column, target, features):
    """target[p] = source[p], rounded to what lies there."""
    place, done = kernel.query_place, 0
    if column == kernel.itemsize:
        done = features - features % tile.lanes
        for p in range(0, done, tile.lanes):
            numbers = tile_load_stored(kernel, tile.vector, source + p * column, 0)
            tile_store_stored(place, numbers, target + p * place.itemsize, 0)
    for p in range(done, features):
        store_stored(place, target + p * place.itemsize, load_stored(kernel, source + p * column))


@jit
def largest_of(tile, block):
    """The largest magnitude in a block."""
    best = tile_fill(tile.vector, 0.0)
    for at in range(block, block + BLOCK * tile.itemsize, tile.vector_bytes):
        best = maximum(absolute(tile_load(tile.vector, at, 0)), best)
    return largest_lane(best)


@jit
def write_scale(kernel, tile, largest, at):
    """Write the least number of float16 of which 127 reach the largest of a block, or the largest there is; return it.

    To the nearest is either that, or the one before.
    """
    steps, place = as_element(tile, STEPS), kernel.scale_place
    store_stored(place, at, largest / steps)
    if load_stored(place, at) * steps < largest:
        store_u16(at, load_u16(at) + 1)
    if load_u16(at) > LARGEST:
        store_u16(at, LARGEST)
    return load_stored(place, at)


@jit
def write_block(kernel, tile, block, count, scale_at, target):
    """Write a block, of which so many numbers are there; the others are 0."""
    scale = as_element(tile, 0.0)
    numbers = tile_load(tile.block, block, 0)
    if all_finite(numbers):
        scale = write_scale(kernel, tile, largest_of(tile, block), scale_at)
    else:
        store_u16(scale_at, NAN)
    if scale == 0.0:  # or all are NaN
        numbers = tile_fill(tile.block, 0.0)
        scale = as_element(tile, 1.0)
    numbers = maximum(minimum(numbers / scale, STEPS * 1.0), -STEPS * 1.0)
    if count == BLOCK:
        tile_store_stored(kernel.query_place, numbers, target, 0)
    else:
        tile_store(numbers, block, 0)
        for p in range(count):
            store_stored(kernel.query_place, target + p, load_element(tile, block + p * tile.itemsize))


@jit
def write_blocks(kernel, tile, source, column, target, features):
    """Write a row in int8."""
    block, start = memory_of_a_block(), bytes_of_scales(features)
    for p in range(0, features, BLOCK):
        count = min(BLOCK, features - p)
        if count < BLOCK:
            tile_store(tile_fill(tile.block, 0.0), block, 0)
        copy_rows(kernel, tile, block, 0, source + p * column, 0, column, 1, count)
        write_block(kernel, tile, block, count, target + p // BLOCK * SCALE_BYTES, target + start + p)


def function(kernel):
    """The builtin of a kernel: `kernel.storage` is what comes, `kernel.queries` what is kept."""
    tile = kernel.tile

    @jit
    def convert(self, objects, count):
        link = link_view(load_i64(self + OBJECT_HEADER))
        source, target = load_i64(objects), load_i64(objects + WORD)
        features, column = length_of(source, 2), stride_of(source, 2)
        thread = call_compiled(link.save_thread, ())
        for head in range(length_of(source, 0)):
            row = load_i64(source + OBJECT_HEADER) + head * stride_of(source, 0)
            place = load_i64(target + OBJECT_HEADER) + head * stride_of(target, 0)
            for _ in range(length_of(source, 1)):
                if kernel.queries == "int8":
                    write_blocks(kernel, tile, row, column, place, features)
                else:
                    round_row(kernel, tile, row, column, place, features)
                row += stride_of(source, 1)
                place += stride_of(target, 1)
        call_compiled(link.restore_thread, (thread,))
        return call_compiled(link.to_int, (0,))

    return convert
