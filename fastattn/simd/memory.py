"""Tiles and scalars, to and from memory: made, loaded, converted, stored, transposed."""

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import signature
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from fastattn.simd.storage import places_of
from fastattn.simd.tile import (
    TileType,
    call_llvm,
    call_named,
    element_of,
    is_shape,
    load_from,
    make_tile,
    pointer_to,
    splat,
    vector_of,
    vectors_of,
)

LINE = 64  # bytes of a cache line


@intrinsic
def tile_fill(typingctx, shape, value):
    """A tile whose elements are all `value`."""
    if not (is_shape(shape) and isinstance(value, types.Number)):
        return None
    tile = TileType(shape.value)

    def codegen(context, builder, sig, values):
        s = shape.value
        scalar = context.cast(builder, values[1], value, tile.element)
        return make_tile(builder, s, [splat(builder, scalar, s.lanes)] * (s.rows * s.vectors))

    return signature(tile, shape, value), codegen


@intrinsic
def tile_iota(typingctx, shape):
    """A row 0, 1, 2, … over its lanes, repeated in every row."""
    if not is_shape(shape):
        return None
    tile = TileType(shape.value)

    def codegen(context, builder, sig, values):
        s = shape.value
        row = [
            ir.Constant(vector_of(s), [float(v * s.lanes + lane) for lane in range(s.lanes)]) for v in range(s.vectors)
        ]
        return make_tile(builder, s, row * s.rows)

    return signature(tile, shape), codegen


@intrinsic
def tile_row_index(typingctx, shape):
    """A tile whose row r is filled with r."""
    if not is_shape(shape):
        return None
    tile = TileType(shape.value)

    def codegen(context, builder, sig, values):
        s = shape.value
        return make_tile(
            builder,
            s,
            [ir.Constant(vector_of(s), [float(i // s.vectors)] * s.lanes) for i in range(s.rows * s.vectors)],
        )

    return signature(tile, shape), codegen


@intrinsic
def tile_repeat(typingctx, shape, row):
    """A tile whose rows are all `row`."""
    if not (is_shape(shape) and isinstance(row, TileType)):
        return None
    tile = TileType(shape.value)

    def codegen(context, builder, sig, values):
        return make_tile(builder, shape.value, vectors_of(builder, row.shape, values[1]) * shape.value.rows)

    return signature(tile, shape, row), codegen


@intrinsic
def tile_load(typingctx, shape, address, row_bytes):
    """The tile at `address`, its rows `row_bytes` apart; no alignment is asked."""
    if not is_shape(shape):
        return None
    tile = TileType(shape.value)

    def codegen(context, builder, sig, values):
        s = shape.value
        places = places_of(builder, s, s.itemsize, values[1], values[2])
        return make_tile(builder, s, [load_from(builder, place, vector_of(s), s.itemsize) for place in places])

    return signature(tile, shape, types.intp, types.intp), codegen


@intrinsic
def tile_load_column(typingctx, shape, address, stride):
    """A tile whose row r is filled with the scalar at `address + r * stride`."""
    if not is_shape(shape):
        return None
    tile = TileType(shape.value)

    def codegen(context, builder, sig, values):
        s, rows = shape.value, []
        for r in range(s.rows):
            place = builder.add(values[1], builder.mul(values[2], ir.Constant(values[2].type, r)))
            rows += [splat(builder, load_from(builder, place, element_of(s), s.itemsize), s.lanes)] * s.vectors
        return make_tile(builder, s, rows)

    return signature(tile, shape, types.intp, types.intp), codegen


def _loader(convert):
    """An intrinsic like `tile_load` whose vectors come from `convert(builder, shape, address)`."""

    def typed(shape):
        if not is_shape(shape):
            return None
        tile = TileType(shape.value)

        def codegen(context, builder, sig, values):
            s = shape.value
            starts = [
                builder.add(values[1], builder.mul(values[2], ir.Constant(values[2].type, r))) for r in range(s.rows)
            ]
            return make_tile(builder, s, [convert(builder, s, start) for start in starts])

        return signature(tile, shape, types.intp, types.intp), codegen

    return typed


def _load_bool(builder, shape, address):
    flags = load_from(builder, address, ir.VectorType(ir.IntType(8), shape.lanes), 1)
    taken = builder.icmp_unsigned("!=", flags, ir.Constant(flags.type, [0] * shape.lanes))
    vector = vector_of(shape)
    return builder.select(
        taken,
        ir.Constant(vector, [0.0] * shape.lanes),
        ir.Constant(vector, [float("-inf")] * shape.lanes),
    )


def _load_other(builder, shape, address):
    """float64 for a float32 tile, saturating so that finite stays finite, and float32 for a float64 tile."""
    if shape.itemsize == 8:
        return builder.fpext(
            load_from(builder, address, ir.VectorType(ir.FloatType(), shape.lanes), 4), vector_of(shape)
        )
    value = load_from(builder, address, ir.VectorType(ir.DoubleType(), shape.lanes), 8)
    vector, lanes = value.type, shape.lanes
    largest = float(np.finfo(np.float32).max)
    low, high = ir.Constant(vector, [-largest] * lanes), ir.Constant(vector, [largest] * lanes)
    infinity = ir.Constant(vector, [float("inf")] * lanes)
    clamped = builder.select(builder.fcmp_ordered("<", value, low), low, value)
    clamped = builder.select(builder.fcmp_ordered(">", value, high), high, clamped)
    finite = builder.fcmp_ordered("<", call_llvm(builder, "fabs", vector, [value]), infinity)
    return builder.fptrunc(builder.select(finite, clamped, value), vector_of(shape))


@intrinsic
def tile_load_bool(typingctx, shape, address, row_bytes):
    """Boolean bytes as scores to add: 0 where True, -inf where False. One vector in a row."""
    return _loader(_load_bool)(shape)


@intrinsic
def tile_load_other(typingctx, shape, address, row_bytes):
    """Values of the other floating dtype, float64 or float32, saturating. One vector in a row."""
    return _loader(_load_other)(shape)


@intrinsic
def tile_store(typingctx, tile, address, row_bytes):
    """Write a tile to `address`, its rows `row_bytes` apart."""
    if not isinstance(tile, TileType):
        return None

    def codegen(context, builder, sig, values):
        s = tile.shape
        places = places_of(builder, s, s.itemsize, values[1], values[2])
        for vector, place in zip(vectors_of(builder, s, values[0]), places, strict=True):
            builder.store(vector, pointer_to(builder, place, vector_of(s)), align=s.itemsize)
        return context.get_dummy_value()

    return signature(types.none, tile, types.intp, types.intp), codegen


@intrinsic
def tile_transpose(typingctx, tile):
    """The transpose of a square tile (`lanes` rows of one vector), in log2(lanes) rounds of register shuffles."""
    if not (isinstance(tile, TileType) and tile.shape == tile.shape.square):
        return None

    def codegen(context, builder, sig, values):
        s, n = tile.shape, tile.shape.lanes
        rows = vectors_of(builder, s, values[0])
        i32 = ir.IntType(32)
        # Each round swaps the off-diagonal halves of every block of 2h x 2h elements.
        half = n // 2
        while half:
            swapped = list(rows)
            low = [lane if lane % (2 * half) < half else n + lane - half for lane in range(n)]
            high = [lane + half if lane % (2 * half) < half else n + lane for lane in range(n)]
            for i in range(n):
                if i % (2 * half) < half:
                    a, b = rows[i], rows[i + half]
                    swapped[i] = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, n), low))
                    swapped[i + half] = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, n), high))
            rows = swapped
            half //= 2
        return make_tile(builder, s, rows)

    return signature(tile, tile), codegen


def _scalar_access(ty):
    """Intrinsics that load and store one scalar of a Numba type at an address."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, values):
            pointer = pointer_to(builder, values[0], context.get_data_type(ty))
            return context.unpack_value(builder, ty, pointer) if ty is types.boolean else builder.load(pointer, align=1)

        return signature(ty, types.intp), codegen

    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, values):
            builder.store(values[1], pointer_to(builder, values[0], context.get_data_type(ty)), align=1)
            return context.get_dummy_value()

        return signature(types.none, types.intp, ty), codegen

    return load, store


load_u8, store_u8 = _scalar_access(types.uint8)
load_u16, store_u16 = _scalar_access(types.uint16)
load_i32, store_i32 = _scalar_access(types.int32)
load_i64, store_i64 = _scalar_access(types.int64)
load_f32, store_f32 = _scalar_access(types.float32)
load_f64, store_f64 = _scalar_access(types.float64)


@intrinsic
def as_element(typingctx, shape, value):
    """A number, rounded to the shape's dtype."""
    if not (is_shape(shape) and isinstance(value, types.Number)):
        return None
    element = TileType(shape.value).element

    def codegen(context, builder, sig, values):
        return context.cast(builder, values[1], value, element)

    return signature(element, shape, value), codegen


@intrinsic
def load_element(typingctx, shape, address):
    """The scalar of the shape's dtype at `address`."""
    if not is_shape(shape):
        return None
    result = TileType(shape.value).element

    def codegen(context, builder, sig, values):
        return load_from(builder, values[1], element_of(shape.value), shape.value.itemsize)

    return signature(result, shape, types.intp), codegen


@intrinsic
def store_element(typingctx, shape, address, value):
    """Write a number to `address` as a scalar of the shape's dtype."""
    if not (is_shape(shape) and isinstance(value, types.Number)):
        return None
    element = TileType(shape.value).element

    def codegen(context, builder, sig, values):
        pointer = pointer_to(builder, values[1], element_of(shape.value))
        builder.store(context.cast(builder, values[2], value, element), pointer, align=shape.value.itemsize)
        return context.get_dummy_value()

    return signature(types.none, shape, types.intp, value), codegen


def _prefetch(locality):
    """An intrinsic that asks for the cache line at `address`, which may be anywhere."""

    @intrinsic
    def ask(typingctx, address):
        def codegen(context, builder, sig, values):
            i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
            how = (ir.Constant(i32, n) for n in (0, locality, 1))  # to read, how near, data
            call_named(builder, "llvm.prefetch.p0", ir.VoidType(), builder.inttoptr(values[0], byte), *how)
            return context.get_dummy_value()

        return signature(types.none, types.intp), codegen

    return ask


prefetch, prefetch_near = _prefetch(2), _prefetch(3)  # into the second-level cache; into the first


def record_view(dtype):
    """An intrinsic that sees the memory at an address as a record of a structured NumPy dtype."""
    record = from_dtype(np.dtype(dtype))

    @intrinsic
    def view(typingctx, address):
        def codegen(context, builder, sig, values):
            return builder.inttoptr(values[0], context.get_value_type(record))

        return signature(record, types.intp), codegen

    return view


def stack_memory(size):
    """An intrinsic that gives the address of `size` bytes, aligned to 64, on its function's stack."""

    @intrinsic
    def memory(typingctx):
        def codegen(context, builder, sig, values):
            place = cgutils.alloca_once(builder, ir.IntType(8), size)  # as an array it would be filled with 0
            place.align = 64
            return builder.ptrtoint(place, ir.IntType(64))

        return signature(types.intp), codegen

    return memory
