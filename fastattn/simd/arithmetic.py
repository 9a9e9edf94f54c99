"""Arithmetic on tiles in registers."""

import operator

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic

from fastattn.simd.tile import (
    TileType,
    bits_of,
    call_llvm,
    call_named,
    elementwise,
    integers_of,
    make_tile,
    splat,
    vector_of,
    vectors_of,
)


def _register_operator(op, emit):
    @infer_global(op)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            typed = elementwise(emit, *args)
            return typed and typed[0]

    def lower(context, builder, sig, values):
        return elementwise(emit, *sig.args)[1](context, builder, sig, values)

    for left, right in ((TileType, TileType), (TileType, types.Number), (types.Number, TileType)):
        lower_builtin(op, left, right)(lower)


_register_operator(operator.add, lambda builder, shape, a, b: builder.fadd(a, b))
_register_operator(operator.sub, lambda builder, shape, a, b: builder.fsub(a, b))
_register_operator(operator.mul, lambda builder, shape, a, b: builder.fmul(a, b))
_register_operator(operator.truediv, lambda builder, shape, a, b: builder.fdiv(a, b))


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, fused where the machine can."""
    return elementwise(lambda builder, shape, *v: call_llvm(builder, "fmuladd", v[0].type, v), a, b, c)


@intrinsic
def horner(typingctx, x, coefficients):
    """The polynomial with these coefficients (a tuple of floats, lowest power first) at x."""
    if not (isinstance(x, TileType) and isinstance(coefficients, types.UniTuple)):
        return None

    def codegen(context, builder, sig, values):
        scalars = cgutils.unpack_tuple(builder, values[1], coefficients.count)
        lanes = x.shape.lanes
        splats = [splat(builder, context.cast(builder, c, coefficients.dtype, x.element), lanes) for c in scalars]
        out = []
        for vector in vectors_of(builder, x.shape, values[0]):
            total = splats[-1]
            for coefficient in reversed(splats[:-1]):
                total = call_llvm(builder, "fmuladd", vector.type, [total, vector, coefficient])
            out.append(total)
        return make_tile(builder, x.shape, out)

    return signature(x, x, coefficients), codegen


def select_max(builder, shape, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def maximum(typingctx, a, b):
    """The greater of two; b where either is NaN (x86's own rule, one instruction)."""
    return elementwise(select_max, a, b)


@intrinsic
def minimum(typingctx, a, b):
    """The lesser of two; b where either is NaN."""
    return elementwise(lambda builder, shape, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b), a, b)


@intrinsic
def where_greater(typingctx, a, b, yes, no):
    """yes where a > b, else no (also where either is NaN)."""

    def emit(builder, shape, a, b, yes, no):
        return builder.select(builder.fcmp_ordered(">", a, b), yes, no)

    return elementwise(emit, a, b, yes, no)


@intrinsic
def absolute(typingctx, a):
    """|a|."""
    return elementwise(lambda builder, shape, a: call_llvm(builder, "fabs", a.type, [a]), a)


@intrinsic
def exponent_bits(typingctx, a):
    """The bits of a, moved up so that its lowest bits become the exponent of a power of two."""

    def emit(builder, shape, a):
        integers = integers_of(shape)
        shift = ir.Constant(integers, [23 if shape.itemsize == 4 else 52] * shape.lanes)
        return builder.bitcast(builder.shl(builder.bitcast(a, integers), shift), a.type)

    return elementwise(emit, a)


def _avx512(builder, shape, name, args):
    """Call a masked AVX-512 instruction with all lanes taken and the current rounding."""
    mask, i32 = ir.IntType(max(8, shape.lanes)), ir.IntType(32)
    kind = "ps" if shape.itemsize == 4 else "pd"
    merged = ir.Constant(vector_of(shape), [0.0] * shape.lanes)
    args = [*args, merged, ir.Constant(mask, -1), ir.Constant(i32, 4)]
    return call_named(builder, f"llvm.x86.avx512.mask.{name}.{kind}.512", vector_of(shape), *args)


def _fraction(bits):
    downward = ir.Constant(ir.IntType(32), bits << 4 | 1)

    def emit(builder, shape, a):
        return _avx512(builder, shape, "reduce", [a, downward])

    return emit


@intrinsic
def fraction(typingctx, a):
    """a - floor(a), 0 for an infinity (AVX-512's vreduce); only for a row that says `scalef`."""
    return elementwise(_fraction(0), a)


@intrinsic
def fraction_of_sixteenths(typingctx, a):
    """a less the multiple of 1/16 at or below it, 0 for an infinity; only for a row that says `scalef`."""
    return elementwise(_fraction(4), a)


@intrinsic
def pick_sixteenth(typingctx, a, table):
    """table[floor(16 a) mod 16] of sixteen float64 (AVX-512's vpermi2); only for a row that says `scalef`."""
    if not (isinstance(a, TileType) and isinstance(table, types.UniTuple) and table.count == 16):
        return None

    def codegen(context, builder, sig, values):
        shape, i32 = a.shape, ir.IntType(32)
        vector, integers = vector_of(shape), integers_of(shape)

        halves = []
        scalars = cgutils.unpack_tuple(builder, values[1], 16)
        for numbers in (scalars[:8], scalars[8:]):
            half = ir.Constant(vector, ir.Undefined)
            for i, number in enumerate(numbers):
                half = builder.insert_element(half, number, ir.Constant(i32, i))
            halves.append(half)
        # A sum this large has sixteenths in its last bit: rounded down, its lowest four bits are the index.
        large, downward = ir.Constant(vector, [1.5 * 2.0**48] * 8), ir.Constant(i32, 9)
        out = []
        for x in vectors_of(builder, shape, values[0]):
            index = builder.bitcast(
                call_named(builder, "llvm.x86.avx512.add.pd.512", vector, x, large, downward), integers
            )
            out.append(call_named(builder, "llvm.x86.avx512.vpermi2var.pd.512", vector, halves[0], index, halves[1]))
        return make_tile(builder, shape, out)

    return signature(a, a, table), codegen


@intrinsic
def scale_by_power(typingctx, a, b):
    """a * 2^floor(b) (AVX-512's vscalef); only for a row that says `scalef`."""
    return elementwise(lambda builder, shape, a, b: _avx512(builder, shape, "scalef", [a, b]), a, b)


def _reduce_or(builder, shape, flags):
    name = f"llvm.vector.reduce.or.v{shape.lanes}i{8 * shape.itemsize}"
    return call_named(builder, name, bits_of(shape), flags)


def _all_bits_zero(builder, shape, vectors):
    """Whether integers, in vectors, are all 0."""
    flags = vectors[0]
    for vector in vectors[1:]:
        flags = builder.or_(flags, vector)
    return builder.icmp_unsigned("==", _reduce_or(builder, shape, flags), ir.Constant(bits_of(shape), 0))


@intrinsic
def all_zero(typingctx, a):
    """True if every element of the tile is 0; False if one is NaN."""
    if not isinstance(a, TileType):
        return None

    def codegen(context, builder, sig, values):
        shape = a.shape
        zero = ir.Constant(vector_of(shape), [0.0] * shape.lanes)
        others = [builder.fcmp_unordered("!=", v, zero) for v in vectors_of(builder, shape, values[0])]
        return _all_bits_zero(builder, shape, [builder.sext(other, integers_of(shape)) for other in others])

    return signature(types.boolean, a), codegen


@intrinsic
def all_finite(typingctx, a):
    """Whether no element of the tile is infinite or NaN: for them alone a · 0 is not 0."""
    if not isinstance(a, TileType):
        return None

    def codegen(context, builder, sig, values):
        shape, vectors = a.shape, vectors_of(builder, a.shape, values[0])
        zero = ir.Constant(vector_of(shape), [0.0] * shape.lanes)
        sums = [zero] * min(4, len(vectors))  # side by side, so that none waits for the one before
        for i, vector in enumerate(vectors):
            n = i % len(sums)
            sums[n] = call_llvm(builder, "fmuladd", vector.type, [vector, zero, sums[n]])
        while len(sums) > 1:
            sums.append(builder.fadd(sums.pop(0), sums.pop(0)))
        differs = builder.fcmp_unordered("!=", sums[0], zero)
        return _all_bits_zero(builder, shape, [builder.sext(differs, integers_of(shape))])

    return signature(types.boolean, a), codegen


def _over_rows(combine, a):
    """Signature and lowering of one row made of a tile's by `combine(builder, shape, next, before)`."""
    if not isinstance(a, TileType):
        return None
    shape, row = a.shape, TileType(a.shape.single)

    def codegen(context, builder, sig, values):
        vectors = vectors_of(builder, shape, values[0])
        combined = vectors[: shape.vectors]
        for i in range(shape.vectors, len(vectors)):
            combined[i % shape.vectors] = combine(builder, shape, vectors[i], combined[i % shape.vectors])
        return make_tile(builder, row.shape, combined)

    return signature(row, a), codegen


@intrinsic
def largest_row(typingctx, a):
    """The maximum over the rows of a tile: one row."""
    return _over_rows(select_max, a)


@intrinsic
def sum_rows(typingctx, a):
    """The sum over the rows of a tile: one row."""
    return _over_rows(lambda builder, shape, a, b: builder.fadd(a, b), a)
