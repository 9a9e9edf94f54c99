"""Vectors for Numba: register tiles and the operations on them.

A *tile* is ``rows x vectors`` SIMD vectors of ``lanes`` elements each. Its LLVM value is an array of vectors, which
LLVM splits, so that a tile lives in registers as long as the machine has enough of them. Kernels are ordinary Python
loops over tile operations; every operation below is an intrinsic that emits its LLVM IR directly.

Memory is addressed by plain integers (byte addresses), strides are in bytes, as in NumPy.

`TileShape` is a compile-time value: passing a shape to a jitted function makes Numba compile that function for it.
"""

from fastattn.simd.arithmetic import (
    absolute,
    all_finite,
    all_zero,
    exponent_bits,
    fma,
    fraction,
    horner,
    largest_row,
    maximum,
    minimum,
    scale_by_power,
    where_greater,
)
from fastattn.simd.compiler import jit
from fastattn.simd.memory import (
    as_element,
    load_element,
    load_f32,
    load_f64,
    load_i64,
    load_u8,
    load_u16,
    prefetch,
    record_view,
    stack_memory,
    store_element,
    store_f32,
    store_f64,
    store_i64,
    store_u8,
    store_u16,
    tile_fill,
    tile_iota,
    tile_load,
    tile_load_bool,
    tile_load_half,
    tile_load_other,
    tile_rank1,
    tile_repeat,
    tile_row_index,
    tile_store,
    tile_transpose,
)
from fastattn.simd.tile import (
    ShapeType,
    TileShape,
    TileType,
    make_tile,
)

__all__ = [
    "ShapeType",
    "TileShape",
    "TileType",
    "absolute",
    "all_finite",
    "all_zero",
    "as_element",
    "exponent_bits",
    "fma",
    "fraction",
    "horner",
    "jit",
    "largest_row",
    "load_element",
    "load_f32",
    "load_f64",
    "load_i64",
    "load_u8",
    "load_u16",
    "make_tile",
    "maximum",
    "minimum",
    "prefetch",
    "record_view",
    "scale_by_power",
    "stack_memory",
    "store_element",
    "store_f32",
    "store_f64",
    "store_i64",
    "store_u8",
    "store_u16",
    "tile_fill",
    "tile_iota",
    "tile_load",
    "tile_load_bool",
    "tile_load_half",
    "tile_load_other",
    "tile_rank1",
    "tile_repeat",
    "tile_row_index",
    "tile_store",
    "tile_transpose",
    "where_greater",
]
