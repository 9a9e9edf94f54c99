"""Tiles as Numba types, and the building blocks of the operations on them."""

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import signature
from numba.extending import models, register_model

from fastattn.machine.tile import TileShape
from fastattn.simd.static import StaticType


def is_shape(ty):
    """Whether a Numba type is that of a `TileShape`."""
    return isinstance(ty, StaticType) and isinstance(ty.value, TileShape)


class TileType(types.Type):
    """Numba's view of a tile in registers."""

    def __init__(self, shape):
        self.shape = shape
        self.element = types.float32 if shape.dtype == "float32" else types.float64
        super().__init__(f"tile({shape})")


@register_model(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        shape = fe_type.shape
        super().__init__(manager, fe_type, ir.ArrayType(vector_of(shape), shape.rows * shape.vectors))


def element_of(shape):
    return ir.FloatType() if shape.dtype == "float32" else ir.DoubleType()


def bits_of(shape):
    return ir.IntType(8 * shape.itemsize)


def vector_of(shape):
    return ir.VectorType(element_of(shape), shape.lanes)


def integers_of(shape):
    return ir.VectorType(bits_of(shape), shape.lanes)


def pointer_to(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def load_from(builder, address, pointee, align):
    return builder.load(pointer_to(builder, address, pointee), align=align)


def splat(builder, scalar, lanes):
    vector = ir.VectorType(scalar.type, lanes)
    seed = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(seed, ir.Constant(vector, ir.Undefined), zeros)


def vectors_of(builder, shape, value):
    return [builder.extract_value(value, i) for i in range(shape.rows * shape.vectors)]


def make_tile(builder, shape, vectors):
    value = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        value = builder.insert_value(value, vector, i)
    return value


def call_named(builder, name, result, *args):
    """Call a function of the module's, or one of LLVM's, which gives what has this type."""
    function = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


def call_llvm(builder, name, vector, args):
    """Call an LLVM intrinsic that takes and gives vectors, or numbers, of one type."""
    element = getattr(vector, "element", vector)
    lanes = f"v{vector.count}" if element is not vector else ""
    suffix = f"{lanes}f{32 if isinstance(element, ir.FloatType) else 64}"
    return call_named(builder, f"llvm.{name}.{suffix}", vector, *args)


def shifted(builder, address, offset):
    return (
        address if isinstance(offset, int) and offset == 0 else builder.add(address, ir.Constant(address.type, offset))
    )


def elementwise(emit, *args):
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
                operands.append((vectors_of(builder, ty.shape, value), ty.shape))
            else:
                scalar = context.cast(builder, value, ty, result.element)
                operands.append(([splat(builder, scalar, shape.lanes)], shape.vector))
        out = []
        for row in range(shape.rows):
            for column in range(shape.vectors):
                picked = [v[(row % s.rows) * s.vectors + column % s.vectors] for v, s in operands]
                out.append(emit(builder, shape, *picked))
        return make_tile(builder, shape, out)

    return signature(result, *args), codegen
