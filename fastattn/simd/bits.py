"""Which lanes of a tile something holds for, as the bits of a word."""

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.simd.tile import TileType, call_named, vectors_of


@intrinsic
def lanes_above(typingctx, a, b):
    """A word with a bit for every element of two rows where a > b, the first element's the lowest."""
    if not (isinstance(a, TileType) and a == b):
        return None

    def codegen(context, builder, sig, values):
        shape, word = a.shape, ir.IntType(64)
        bits = ir.Constant(word, 0)
        pairs = zip(vectors_of(builder, shape, values[0]), vectors_of(builder, shape, values[1]), strict=True)
        for v, (left, right) in enumerate(pairs):
            flags = builder.bitcast(builder.fcmp_ordered(">", left, right), ir.IntType(shape.lanes))
            bits = builder.or_(bits, builder.shl(builder.zext(flags, word), ir.Constant(word, v * shape.lanes)))
        return bits

    return signature(types.int64, a, b), codegen


@intrinsic
def lowest_bit(typingctx, bits):
    """The number of the lowest bit of a word that is set; one is."""

    def codegen(context, builder, sig, values):
        return call_named(builder, "llvm.cttz.i64", ir.IntType(64), values[0], ir.Constant(ir.IntType(1), 1))

    return signature(types.int64, types.int64), codegen
