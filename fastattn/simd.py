"""Vectors for Numba: register tiles and the operations on them.

A *tile* is ``rows x vectors`` SIMD vectors of ``lanes`` elements each. Its LLVM value is an array of vectors, which
LLVM splits, so that a tile lives in registers as long as the machine has enough of them. Kernels are ordinary Python
loops over tile operations; every operation below is an intrinsic that emits its LLVM IR directly.

Memory is addressed by plain integers (byte addresses), strides are in bytes, as in NumPy.

`TileShape` is a compile-time value: passing a shape to a jitted function makes Numba compile that function for it.
"""

import operator
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin, lower_constant, lower_getattr
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global, signature
from numba.extending import intrinsic, models, register_model, typeof_impl
from numba.np.numpy_support import from_dtype

# --------------------------------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileShape:
    """A register tile: `rows` rows of `vectors` vectors of `lanes` elements of a floating dtype.

    `exp2` names how the machine scales by a power of two, see `fastattn.cpu.softmax.exp2`.
    """

    dtype: str
    lanes: int
    rows: int
    vectors: int
    scalef: bool = False

    @property
    def itemsize(self):
        return np.dtype(self.dtype).itemsize

    @property
    def width(self):
        """Elements in one row."""
        return self.lanes * self.vectors

    @property
    def row_bytes(self):
        return self.width * self.itemsize

    @property
    def vector_bytes(self):
        return self.lanes * self.itemsize

    @property
    def buffer_bytes(self):
        """Room for a square of elements of any dtype."""
        return 8 * self.lanes * self.lanes

    @property
    def single(self):
        """The same row, once: what a tail of fewer than `rows` rows is made of."""
        return TileShape(self.dtype, self.lanes, 1, self.vectors, self.scalef)

    @property
    def square(self):
        """`lanes` rows of one vector: what is transposed in registers."""
        return TileShape(self.dtype, self.lanes, self.lanes, 1, self.scalef)

    @property
    def panel(self):
        """A square of as many elements as the tile has rows: what is packed at a time."""
        return TileShape(self.dtype, self.rows, self.rows, 1)

    @property
    def quad(self):
        """Four rows of one vector."""
        return TileShape(self.dtype, self.lanes, 4, 1, self.scalef)

    @property
    def vector(self):
        return TileShape(self.dtype, self.lanes, 1, 1, self.scalef)

    @property
    def llvm_vector(self):
        """LLVM's type of one of the tile's vectors."""
        return _vector(self)


class ShapeType(types.Dummy):
    """Numba's view of one `TileShape`; carries no run-time data."""

    def __init__(self, shape):
        self.shape = shape
        super().__init__(f"shape({shape})")


class TileType(types.Type):
    """Numba's view of a tile in registers."""

    def __init__(self, shape):
        self.shape = shape
        self.element = types.float32 if shape.dtype == "float32" else types.float64
        super().__init__(f"tile({shape})")


@register_model(ShapeType)
class _ShapeModel(models.OpaqueModel):
    pass


@register_model(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        shape = fe_type.shape
        super().__init__(manager, fe_type, ir.ArrayType(_vector(shape), shape.rows * shape.vectors))


def _element(shape):
    return ir.FloatType() if shape.dtype == "float32" else ir.DoubleType()


def _bits(shape):
    return ir.IntType(8 * shape.itemsize)


def _vector(shape):
    return ir.VectorType(_element(shape), shape.lanes)


def _int_vector(shape):
    return ir.VectorType(_bits(shape), shape.lanes)


@typeof_impl.register(TileShape)
def _typeof_shape(value, context):
    return ShapeType(value)


@lower_constant(ShapeType)
def _constant_shape(context, builder, ty, value):
    return context.get_dummy_value()


_INTEGERS = ("scalef", "lanes", "rows", "vectors", "itemsize", "width", "row_bytes", "vector_bytes", "buffer_bytes")
_SHAPES = ("single", "square", "panel", "quad", "vector")


@infer_getattr
class _ShapeAttributes(AttributeTemplate):
    key = ShapeType

    def generic_resolve(self, ty, name):
        if name in _INTEGERS:
            return types.intp
        if name in _SHAPES:
            return ShapeType(getattr(ty.shape, name))
        return None


def _lower_attributes():
    def integer(name):
        def lower(context, builder, ty, value):
            return context.get_constant(types.intp, int(getattr(ty.shape, name)))

        return lower

    for name in _INTEGERS:
        lower_getattr(ShapeType, name)(integer(name))
    for name in _SHAPES:
        lower_getattr(ShapeType, name)(lambda context, builder, ty, value: context.get_dummy_value())


_lower_attributes()

# --------------------------------------------------------------------------------------------------------------------
# Building blocks for the intrinsics
# --------------------------------------------------------------------------------------------------------------------


def _pointer(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def _load(builder, address, pointee, align):
    return builder.load(_pointer(builder, address, pointee), align=align)


def _splat(builder, scalar, lanes):
    vector = ir.VectorType(scalar.type, lanes)
    seed = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(seed, ir.Constant(vector, ir.Undefined), zeros)


def _vectors(builder, shape, value):
    return [builder.extract_value(value, i) for i in range(shape.rows * shape.vectors)]


def make_tile(builder, shape, vectors):
    value = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        value = builder.insert_value(value, vector, i)
    return value


def _call(builder, name, vector, args):
    """Call an LLVM intrinsic that takes and gives vectors of one type."""
    suffix = f"v{vector.count}f{32 if isinstance(vector.element, ir.FloatType) else 64}"
    fnty = ir.FunctionType(vector, [vector] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, f"llvm.{name}.{suffix}"), args)


def _offset(builder, address, offset):
    return (
        address if isinstance(offset, int) and offset == 0 else builder.add(address, ir.Constant(address.type, offset))
    )


def _elementwise(emit, *args):
    """Signature and lowering of `emit(builder, shape, *vectors)`, applied vector by vector.

    Operands are tiles or scalars. The result has the shape of the largest; one with a single row, or a single vector in
    its row, is repeated, and a scalar is a vector of equal elements.
    """
    tiles = [ty for ty in args if isinstance(ty, TileType)]
    if not tiles or not all(isinstance(ty, (TileType, types.Number)) for ty in args):
        return None
    result = max(tiles, key=lambda ty: ty.shape.rows * ty.shape.vectors)

    def codegen(context, builder, sig, values):
        shape = result.shape
        operands = []
        for ty, value in zip(sig.args, values, strict=True):
            if isinstance(ty, TileType):
                operands.append((_vectors(builder, ty.shape, value), ty.shape))
            else:
                scalar = context.cast(builder, value, ty, result.element)
                operands.append(([_splat(builder, scalar, shape.lanes)], shape.vector))
        out = []
        for row in range(shape.rows):
            for column in range(shape.vectors):
                picked = [v[(row % s.rows) * s.vectors + column % s.vectors] for v, s in operands]
                out.append(emit(builder, shape, *picked))
        return make_tile(builder, shape, out)

    return signature(result, *args), codegen


# --------------------------------------------------------------------------------------------------------------------
# Arithmetic
# --------------------------------------------------------------------------------------------------------------------


jit = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _register_operator(op, emit):
    @infer_global(op)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            typed = _elementwise(emit, *args)
            return typed and typed[0]

    def lower(context, builder, sig, values):
        return _elementwise(emit, *sig.args)[1](context, builder, sig, values)

    for left, right in ((TileType, TileType), (TileType, types.Number), (types.Number, TileType)):
        lower_builtin(op, left, right)(lower)


_register_operator(operator.add, lambda builder, shape, a, b: builder.fadd(a, b))
_register_operator(operator.sub, lambda builder, shape, a, b: builder.fsub(a, b))
_register_operator(operator.mul, lambda builder, shape, a, b: builder.fmul(a, b))
_register_operator(operator.truediv, lambda builder, shape, a, b: builder.fdiv(a, b))


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, fused where the machine can."""
    return _elementwise(lambda builder, shape, *v: _call(builder, "fmuladd", v[0].type, v), a, b, c)


@intrinsic
def horner(typingctx, x, coefficients):
    """The polynomial with these coefficients (a tuple of floats, lowest power first) at x."""
    if not (isinstance(x, TileType) and isinstance(coefficients, types.UniTuple)):
        return None

    def codegen(context, builder, sig, values):
        scalars = cgutils.unpack_tuple(builder, values[1], coefficients.count)
        lanes = x.shape.lanes
        splats = [_splat(builder, context.cast(builder, c, coefficients.dtype, x.element), lanes) for c in scalars]
        out = []
        for vector in _vectors(builder, x.shape, values[0]):
            total = splats[-1]
            for coefficient in reversed(splats[:-1]):
                total = _call(builder, "fmuladd", vector.type, [total, vector, coefficient])
            out.append(total)
        return make_tile(builder, x.shape, out)

    return signature(x, x, coefficients), codegen


def _select_max(builder, shape, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def maximum(typingctx, a, b):
    """The greater of two; b where either is NaN (x86's own rule, one instruction)."""
    return _elementwise(_select_max, a, b)


@intrinsic
def minimum(typingctx, a, b):
    """The lesser of two; b where either is NaN."""
    return _elementwise(lambda builder, shape, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b), a, b)


@intrinsic
def where_greater(typingctx, a, b, yes, no):
    """yes where a > b, else no (also where either is NaN)."""

    def emit(builder, shape, a, b, yes, no):
        return builder.select(builder.fcmp_ordered(">", a, b), yes, no)

    return _elementwise(emit, a, b, yes, no)


@intrinsic
def absolute(typingctx, a):
    """|a|."""
    return _elementwise(lambda builder, shape, a: _call(builder, "fabs", a.type, [a]), a)


@intrinsic
def exponent_bits(typingctx, a):
    """The bits of a, moved up so that its lowest bits become the exponent of a power of two."""

    def emit(builder, shape, a):
        integers = _int_vector(shape)
        shift = ir.Constant(integers, [23 if shape.itemsize == 4 else 52] * shape.lanes)
        return builder.bitcast(builder.shl(builder.bitcast(a, integers), shift), a.type)

    return _elementwise(emit, a)


def _avx512(builder, shape, name, args):
    """Call a masked AVX-512 instruction with all lanes taken and the current rounding."""
    mask, i32 = ir.IntType(max(8, shape.lanes)), ir.IntType(32)
    kind = "ps" if shape.itemsize == 4 else "pd"
    merged = ir.Constant(_vector(shape), [0.0] * shape.lanes)
    args = [*args, merged, ir.Constant(mask, -1), ir.Constant(i32, 4)]
    fnty = ir.FunctionType(_vector(shape), [arg.type for arg in args])
    name = f"llvm.x86.avx512.mask.{name}.{kind}.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, name), args)


@intrinsic
def fraction(typingctx, a):
    """a - floor(a), 0 for an infinity (AVX-512's vreduce); only where the shape says `scalef`."""

    def emit(builder, shape, a):
        if not shape.scalef:
            return a
        return _avx512(builder, shape, "reduce", [a, ir.Constant(ir.IntType(32), 1)])  # 1: towards -inf

    return _elementwise(emit, a)


@intrinsic
def scale_by_power(typingctx, a, b):
    """a * 2^floor(b) (AVX-512's vscalef); only where the shape says `scalef`."""
    return _elementwise(lambda builder, s, a, b: _avx512(builder, s, "scalef", [a, b]) if s.scalef else a, a, b)


def _reduce_or(builder, shape, flags):
    name = f"llvm.vector.reduce.or.v{shape.lanes}i{8 * shape.itemsize}"
    fnty = ir.FunctionType(_bits(shape), [flags.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, name), [flags])


@intrinsic
def any_greater(typingctx, a, bound):
    """True if an element of the tile a is greater than the number `bound`; False for NaN."""
    if not (isinstance(a, TileType) and isinstance(bound, types.Number)):
        return None

    def codegen(context, builder, sig, values):
        shape = a.shape
        limit = _splat(builder, context.cast(builder, values[1], bound, a.element), shape.lanes)
        flags = ir.Constant(_int_vector(shape), [0] * shape.lanes)
        for vector in _vectors(builder, shape, values[0]):
            flags = builder.or_(flags, builder.sext(builder.fcmp_ordered(">", vector, limit), flags.type))
        return builder.icmp_unsigned("!=", _reduce_or(builder, shape, flags), ir.Constant(_bits(shape), 0))

    return signature(types.boolean, a, bound), codegen


@intrinsic
def all_zero(typingctx, a):
    """True if every element of the tile is 0; False if one is NaN."""
    if not isinstance(a, TileType):
        return None

    def codegen(context, builder, sig, values):
        shape = a.shape
        flags = ir.Constant(_int_vector(shape), [0] * shape.lanes)
        for vector in _vectors(builder, shape, values[0]):
            other = builder.fcmp_unordered("!=", vector, ir.Constant(vector.type, [0.0] * shape.lanes))
            flags = builder.or_(flags, builder.sext(other, flags.type))
        return builder.icmp_unsigned("==", _reduce_or(builder, shape, flags), ir.Constant(_bits(shape), 0))

    return signature(types.boolean, a), codegen


@intrinsic
def largest_row(typingctx, a):
    """The maximum over the rows of a tile: one row."""
    if not isinstance(a, TileType):
        return None
    shape, row = a.shape, TileType(a.shape.single)

    def codegen(context, builder, sig, values):
        vectors = _vectors(builder, shape, values[0])
        best = vectors[: shape.vectors]
        for i in range(shape.vectors, len(vectors)):
            best[i % shape.vectors] = _select_max(builder, shape, vectors[i], best[i % shape.vectors])
        return make_tile(builder, row.shape, best)

    return signature(row, a), codegen


# --------------------------------------------------------------------------------------------------------------------
# Making, loading and storing tiles
# --------------------------------------------------------------------------------------------------------------------


@intrinsic
def tile_fill(typingctx, shape, value):
    """A tile whose elements are all `value`."""
    if not (isinstance(shape, ShapeType) and isinstance(value, types.Number)):
        return None
    tile = TileType(shape.shape)

    def codegen(context, builder, sig, values):
        s = shape.shape
        scalar = context.cast(builder, values[1], value, tile.element)
        return make_tile(builder, s, [_splat(builder, scalar, s.lanes)] * (s.rows * s.vectors))

    return signature(tile, shape, value), codegen


@intrinsic
def tile_iota(typingctx, shape):
    """A row 0, 1, 2, … over its lanes, repeated in every row."""
    if not isinstance(shape, ShapeType):
        return None
    tile = TileType(shape.shape)

    def codegen(context, builder, sig, values):
        s = shape.shape
        row = [
            ir.Constant(_vector(s), [float(v * s.lanes + lane) for lane in range(s.lanes)]) for v in range(s.vectors)
        ]
        return make_tile(builder, s, row * s.rows)

    return signature(tile, shape), codegen


@intrinsic
def tile_row_index(typingctx, shape):
    """A tile whose row r is filled with r."""
    if not isinstance(shape, ShapeType):
        return None
    tile = TileType(shape.shape)

    def codegen(context, builder, sig, values):
        s = shape.shape
        return make_tile(
            builder, s, [ir.Constant(_vector(s), [float(i // s.vectors)] * s.lanes) for i in range(s.rows * s.vectors)]
        )

    return signature(tile, shape), codegen


@intrinsic
def tile_repeat(typingctx, shape, row):
    """A tile whose rows are all `row`."""
    if not (isinstance(shape, ShapeType) and isinstance(row, TileType)):
        return None
    tile = TileType(shape.shape)

    def codegen(context, builder, sig, values):
        return make_tile(builder, shape.shape, _vectors(builder, row.shape, values[1]) * shape.shape.rows)

    return signature(tile, shape, row), codegen


def _rows(builder, shape, address, row_bytes):
    """The address of each vector of a tile in memory."""
    for row in range(shape.rows):
        start = address if row == 0 else builder.add(address, builder.mul(row_bytes, ir.Constant(address.type, row)))
        for v in range(shape.vectors):
            yield _offset(builder, start, v * shape.lanes * shape.itemsize)


@intrinsic
def tile_load(typingctx, shape, address, row_bytes):
    """The tile at `address`, its rows `row_bytes` apart; no alignment is asked."""
    if not isinstance(shape, ShapeType):
        return None
    tile = TileType(shape.shape)

    def codegen(context, builder, sig, values):
        s = shape.shape
        places = _rows(builder, s, values[1], values[2])
        return make_tile(builder, s, [_load(builder, place, _vector(s), s.itemsize) for place in places])

    return signature(tile, shape, types.intp, types.intp), codegen


def _loader(convert):
    """An intrinsic like `tile_load` whose vectors come from `convert(builder, shape, address)`."""

    def typed(shape):
        if not isinstance(shape, ShapeType):
            return None
        tile = TileType(shape.shape)

        def codegen(context, builder, sig, values):
            s = shape.shape
            starts = [
                builder.add(values[1], builder.mul(values[2], ir.Constant(values[2].type, r))) for r in range(s.rows)
            ]
            return make_tile(builder, s, [convert(builder, s, start) for start in starts])

        return signature(tile, shape, types.intp, types.intp), codegen

    return typed


def _load_bool(builder, shape, address):
    flags = _load(builder, address, ir.VectorType(ir.IntType(8), shape.lanes), 1)
    taken = builder.icmp_unsigned("!=", flags, ir.Constant(flags.type, [0] * shape.lanes))
    vector = _vector(shape)
    return builder.select(
        taken,
        ir.Constant(vector, [0.0] * shape.lanes),
        ir.Constant(vector, [float("-inf")] * shape.lanes),
    )


def _load_half(builder, shape, address):
    # By integer operations, which every machine has: exponent and fraction move to float32's place, the product with
    # 2**112 corrects the exponent (and normalises subnormals); infinities and NaNs get all exponent bits.
    lanes, i32 = shape.lanes, ir.IntType(32)
    ints, floats = ir.VectorType(i32, lanes), ir.VectorType(ir.FloatType(), lanes)

    def constant(value):
        return ir.Constant(ints, [value] * lanes)

    half = builder.zext(_load(builder, address, ir.VectorType(ir.IntType(16), lanes), 1), ints)
    sign = builder.shl(builder.and_(half, constant(0x8000)), constant(16))
    moved = builder.shl(builder.and_(half, constant(0x7FFF)), constant(13))
    scaled = builder.fmul(builder.bitcast(moved, floats), ir.Constant(floats, [2.0**112] * lanes))
    special = builder.icmp_unsigned("==", builder.and_(half, constant(0x7C00)), constant(0x7C00))
    bits = builder.select(special, builder.or_(moved, constant(0x7F800000)), builder.bitcast(scaled, ints))
    value = builder.bitcast(builder.or_(bits, sign), floats)
    return value if shape.itemsize == 4 else builder.fpext(value, _vector(shape))


def _load_other(builder, shape, address):
    """float64 for a float32 tile, saturating so that finite stays finite, and float32 for a float64 tile."""
    if shape.itemsize == 8:
        return builder.fpext(_load(builder, address, ir.VectorType(ir.FloatType(), shape.lanes), 4), _vector(shape))
    value = _load(builder, address, ir.VectorType(ir.DoubleType(), shape.lanes), 8)
    vector, lanes = value.type, shape.lanes
    largest = float(np.finfo(np.float32).max)
    low, high = ir.Constant(vector, [-largest] * lanes), ir.Constant(vector, [largest] * lanes)
    infinity = ir.Constant(vector, [float("inf")] * lanes)
    clamped = builder.select(builder.fcmp_ordered("<", value, low), low, value)
    clamped = builder.select(builder.fcmp_ordered(">", value, high), high, clamped)
    finite = builder.fcmp_ordered("<", _call(builder, "fabs", vector, [value]), infinity)
    return builder.fptrunc(builder.select(finite, clamped, value), _vector(shape))


@intrinsic
def tile_load_bool(typingctx, shape, address, row_bytes):
    """Boolean bytes as scores to add: 0 where True, -inf where False. One vector in a row."""
    return _loader(_load_bool)(shape)


@intrinsic
def tile_load_half(typingctx, shape, address, row_bytes):
    """float16 values. One vector in a row."""
    return _loader(_load_half)(shape)


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
        places = _rows(builder, s, values[1], values[2])
        for vector, place in zip(_vectors(builder, s, values[0]), places, strict=True):
            builder.store(vector, _pointer(builder, place, _vector(s)), align=s.itemsize)
        return context.get_dummy_value()

    return signature(types.none, tile, types.intp, types.intp), codegen


@intrinsic
def tile_rank1(typingctx, acc, column, column_stride, row):
    """acc + column ⊗ row: column element m is the scalar at `column + m * column_stride`, row a row of vectors in memory.

    This is the micro-kernel's whole inner step: rows + vectors loads and rows × vectors multiply-adds.
    """
    if not isinstance(acc, TileType):
        return None

    def codegen(context, builder, sig, values):
        s = acc.shape
        accumulators = _vectors(builder, s, values[0])
        step = s.lanes * s.itemsize
        row = [_load(builder, _offset(builder, values[3], v * step), _vector(s), s.itemsize) for v in range(s.vectors)]
        out = []
        for m in range(s.rows):
            place = (
                values[1] if m == 0 else builder.add(values[1], builder.mul(values[2], ir.Constant(values[2].type, m)))
            )
            scalar = _splat(builder, _load(builder, place, _element(s), s.itemsize), s.lanes)
            for v in range(s.vectors):
                out.append(_call(builder, "fmuladd", _vector(s), [scalar, row[v], accumulators[m * s.vectors + v]]))
        return make_tile(builder, s, out)

    return signature(acc, acc, types.intp, types.intp, types.intp), codegen


@intrinsic
def tile_transpose(typingctx, tile):
    """The transpose of a square tile (`lanes` rows of one vector), in log2(lanes) rounds of register shuffles."""
    if not (isinstance(tile, TileType) and tile.shape == tile.shape.square):
        return None

    def codegen(context, builder, sig, values):
        s, n = tile.shape, tile.shape.lanes
        rows = _vectors(builder, s, values[0])
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


# --------------------------------------------------------------------------------------------------------------------
# Scalars
# --------------------------------------------------------------------------------------------------------------------


def _scalar_access(ty):
    """Intrinsics that load and store one scalar of a Numba type at an address."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, values):
            pointer = _pointer(builder, values[0], context.get_data_type(ty))
            return context.unpack_value(builder, ty, pointer) if ty is types.boolean else builder.load(pointer, align=1)

        return signature(ty, types.intp), codegen

    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, values):
            builder.store(values[1], _pointer(builder, values[0], context.get_data_type(ty)), align=1)
            return context.get_dummy_value()

        return signature(types.none, types.intp, ty), codegen

    return load, store


load_u8, store_u8 = _scalar_access(types.uint8)
load_u16, store_u16 = _scalar_access(types.uint16)
load_i64, store_i64 = _scalar_access(types.int64)
load_f32, store_f32 = _scalar_access(types.float32)
load_f64, store_f64 = _scalar_access(types.float64)


@intrinsic
def as_element(typingctx, shape, value):
    """A number, rounded to the shape's dtype."""
    if not (isinstance(shape, ShapeType) and isinstance(value, types.Number)):
        return None
    element = TileType(shape.shape).element

    def codegen(context, builder, sig, values):
        return context.cast(builder, values[1], value, element)

    return signature(element, shape, value), codegen


@intrinsic
def load_element(typingctx, shape, address):
    """The scalar of the shape's dtype at `address`."""
    if not isinstance(shape, ShapeType):
        return None
    result = TileType(shape.shape).element

    def codegen(context, builder, sig, values):
        return _load(builder, values[1], _element(shape.shape), shape.shape.itemsize)

    return signature(result, shape, types.intp), codegen


@intrinsic
def store_element(typingctx, shape, address, value):
    """Write a number to `address` as a scalar of the shape's dtype."""
    if not (isinstance(shape, ShapeType) and isinstance(value, types.Number)):
        return None
    element = TileType(shape.shape).element

    def codegen(context, builder, sig, values):
        pointer = _pointer(builder, values[1], _element(shape.shape))
        builder.store(context.cast(builder, values[2], value, element), pointer, align=shape.shape.itemsize)
        return context.get_dummy_value()

    return signature(types.none, shape, types.intp, value), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at `address`, which may be anywhere, to be brought near."""

    def codegen(context, builder, sig, values):
        i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        fnty = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        fn = cgutils.get_or_insert_function(builder.module, fnty, "llvm.prefetch.p0")
        builder.call(
            fn, [builder.inttoptr(values[0], byte), ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)]
        )
        return context.get_dummy_value()

    return signature(types.none, types.intp), codegen


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
    """An intrinsic that gives the address of `size` bytes, aligned to 64, on the stack of the function it is used in."""

    @intrinsic
    def memory(typingctx):
        def codegen(context, builder, sig, values):
            place = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), size))
            place.align = 64
            return builder.ptrtoint(place, ir.IntType(64))

        return signature(types.intp), codegen

    return memory
