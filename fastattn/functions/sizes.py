"""The sizes of captured arrays, in compiled code."""

from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.functions.captured import ArrayType, length

__all__ = ["length_of", "shape_of"]


@intrinsic
def length_of(typingctx, array):
    """The size of the first axis."""
    if not isinstance(array, ArrayType):
        return None

    def codegen(context, builder, sig, values):
        find = length._defn(typingctx, array, types.int64)[1]
        return find(context, builder, None, [values[0], context.get_constant(types.int64, 0)])

    return signature(types.int64, array), codegen


@intrinsic
def shape_of(typingctx, array):
    """The sizes of all axes."""
    if not isinstance(array, ArrayType):
        return None
    ty = types.UniTuple(types.int64, array.axes)

    def codegen(context, builder, sig, values):
        find = length._defn(typingctx, array, types.int64)[1]
        sizes = [
            find(context, builder, None, [values[0], context.get_constant(types.int64, axis)])
            for axis in range(array.axes)
        ]
        return context.make_tuple(builder, ty, sizes)

    return signature(ty, array), codegen
