"""Tiles as Numba types, and the building blocks of the operations on them."""

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_constant, lower_getattr
from numba.core.typing.templates import AttributeTemplate, infer_getattr, signature
from numba.extending import models, register_model, typeof_impl


@dataclass(frozen=True)
class TileShape:
    """A register tile: `rows` rows of `vectors` vectors of `lanes` elements of a floating dtype.

    What it says is known while a kernel is compiled, and branches on it are decided then. `scalef`: the machine has
    AVX-512's instruction for scaling by a power of two. `packed`: the kernel packs the matrices that it takes scalars
    from. `dense`: if not, each of their rows is contiguous, or is copied. `masked`: its calls may have a mask, or
    dropout. `additive`: its scores are those of additive attention.
    """

    dtype: str
    lanes: int
    rows: int
    vectors: int
    scalef: bool = False
    packed: bool = False
    masked: bool = False
    additive: bool = False
    dense: bool = False

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
    def pair(self):
        """The same row, twice."""
        return TileShape(self.dtype, self.lanes, 2, self.vectors, self.scalef)

    @property
    def quad(self):
        """Four rows of one vector."""
        return TileShape(self.dtype, self.lanes, 4, 1, self.scalef)

    @property
    def strip(self):
        """Up to four rows of one vector, no more than a square has."""
        return TileShape(self.dtype, self.lanes, min(4, self.lanes), 1, self.scalef)

    @property
    def vector(self):
        return TileShape(self.dtype, self.lanes, 1, 1, self.scalef)

    @property
    def llvm_vector(self):
        """LLVM's type of one of the tile's vectors."""
        return vector_of(self)


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
        super().__init__(manager, fe_type, ir.ArrayType(vector_of(shape), shape.rows * shape.vectors))


def element_of(shape):
    return ir.FloatType() if shape.dtype == "float32" else ir.DoubleType()


def bits_of(shape):
    return ir.IntType(8 * shape.itemsize)


def vector_of(shape):
    return ir.VectorType(element_of(shape), shape.lanes)


def integers_of(shape):
    return ir.VectorType(bits_of(shape), shape.lanes)


@typeof_impl.register(TileShape)
def _typeof_shape(value, context):
    return ShapeType(value)


@lower_constant(ShapeType)
def _constant_shape(context, builder, ty, value):
    return context.get_dummy_value()


_INTEGERS = (
    "scalef",
    "dense",
    "packed",
    "masked",
    "additive",
    "lanes",
    "rows",
    "vectors",
    "itemsize",
    "width",
    "row_bytes",
    "vector_bytes",
    "buffer_bytes",
)
_SHAPES = ("single", "pair", "square", "panel", "quad", "strip", "vector")


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


def call_llvm(builder, name, vector, args):
    """Call an LLVM intrinsic that takes and gives vectors of one type."""
    suffix = f"v{vector.count}f{32 if isinstance(vector.element, ir.FloatType) else 64}"
    fnty = ir.FunctionType(vector, [vector] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, f"llvm.{name}.{suffix}"), args)


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
