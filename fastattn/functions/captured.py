"""Captured arrays and numbers in compiled code: read from where a record of the call says that they are.

An index that is out of range reads the first element, and clears a flag that the caller has set: whether that is an
error depends on whether the query may look at the key. Loads are told to be of memory that no kernel writes to, so that
LLVM may gather a vector of them.
"""

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import signature
from numba.extending import intrinsic, models, register_model
from numba.np.numpy_support import from_dtype

__all__ = ["FLAG", "ArrayType", "captured", "item", "length"]

FLAG = types.CPointer(types.int8)
_WORD = ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()


class ArrayType(types.Type):
    """A captured array, or what an index has left of one."""

    def __init__(self, kind, axes):
        self.kind, self.axes = kind, axes
        super().__init__(f"Captured({kind}, {axes})")

    @property
    def element(self):
        """The Numba type of its elements."""
        if self.kind in ("float16", "bfloat16"):
            return types.float32
        return from_dtype(np.dtype(self.kind))


@register_model(ArrayType)
class _ArrayModel(models.StructModel):
    """Where the first element is, and where the shape of what is left begins, which strides stand behind."""

    def __init__(self, dmm, fe_type):
        super().__init__(
            dmm, fe_type, [("at", types.intp), ("shape", types.intp), ("strides", types.intp), ("flag", FLAG)]
        )


def read_only(builder, instruction):
    """Say of a load that nothing writes there meanwhile."""
    module = builder.module
    domain = module.add_metadata(["fastattn"])
    scope = module.add_metadata(["fastattn captured", domain])
    instruction.set_metadata("alias.scope", module.add_metadata([scope]))
    return instruction


def writes_elsewhere(builder, instruction):
    """Say of a store that it is not to what is captured."""
    module = builder.module
    domain = module.add_metadata(["fastattn"])
    scope = module.add_metadata(["fastattn captured", domain])
    instruction.set_metadata("noalias", module.add_metadata([scope]))
    return instruction


def _word_at(builder, address, number):
    pointer = builder.gep(builder.inttoptr(address, _WORD.as_pointer()), [ir.Constant(_WORD, number)])
    return read_only(builder, builder.load(pointer, align=8))


def captured(each, place):
    """An intrinsic that finds one of `fastattn.functions.function.Captured`, whose words begin at `place`."""

    @intrinsic
    def find(typingctx, record, flag):
        if each.axes < 0:
            ty = {"int": types.int64, "bool": types.boolean, "float": types.float64}[each.kind]
        else:
            ty = ArrayType(each.kind, each.axes)

        def codegen(context, builder, sig, values):
            word = _word_at(builder, values[0], place)
            if each.kind == "bool" and each.axes < 0:
                return builder.icmp_signed("!=", word, ir.Constant(_WORD, 0))
            if each.axes < 0:
                return builder.bitcast(word, ir.DoubleType()) if each.kind == "float" else word
            array = cgutils.create_struct_proxy(ty)(context, builder)
            array.at = word
            array.shape = builder.add(values[0], ir.Constant(_WORD, 8 * (place + 1)))
            array.strides = builder.add(values[0], ir.Constant(_WORD, 8 * (place + 1 + each.axes)))
            array.flag = values[1]
            return array._getvalue()

        return signature(ty, record, flag), codegen

    return find


@intrinsic
def item(typingctx, array, index):
    """An element of a captured array, or what is left of it where it has more axes than are given."""
    if not isinstance(array, ArrayType):
        return None
    numbers = tuple(index) if isinstance(index, types.BaseTuple) else (index,)
    if len(numbers) > array.axes or not all(isinstance(ty, (types.Integer, types.Boolean)) for ty in numbers):
        return None
    rest = array.axes - len(numbers)
    ty = ArrayType(array.kind, rest) if rest else array.element

    def codegen(context, builder, sig, values):
        given = cgutils.create_struct_proxy(array)(context, builder, values[0])
        indices = cgutils.unpack_tuple(builder, values[1]) if isinstance(index, types.BaseTuple) else [values[1]]
        offset, inside = ir.Constant(_WORD, 0), ir.Constant(ir.IntType(1), 1)
        for axis, (number, kind) in enumerate(zip(indices, numbers, strict=True)):
            number = context.cast(builder, number, kind, types.int64)
            size = _word_at(builder, given.shape, axis)
            number = builder.select(
                builder.icmp_signed("<", number, ir.Constant(_WORD, 0)), builder.add(number, size), number
            )
            valid = builder.icmp_unsigned("<", number, size)
            number = builder.select(valid, number, ir.Constant(_WORD, 0))
            offset = builder.add(offset, builder.mul(number, _word_at(builder, given.strides, axis)))
            inside = builder.and_(inside, valid)
        kept = builder.and_(builder.load(given.flag), builder.zext(inside, ir.IntType(8)))
        builder.store(kept, given.flag)
        if rest:
            left = cgutils.create_struct_proxy(ty)(context, builder)
            left.at = builder.add(given.at, offset)
            step = ir.Constant(_WORD, 8 * len(numbers))
            left.shape, left.strides = builder.add(given.shape, step), builder.add(given.strides, step)
            left.flag = given.flag
            return left._getvalue()
        base = builder.inttoptr(given.at, _BYTES)
        return _element(context, builder, array, builder.gep(base, [offset]))

    return signature(ty, array, index), codegen


def _element(context, builder, array, pointer):
    """Load one element; those of half precision become float32."""
    stored = {"float16": ir.HalfType(), "bfloat16": ir.IntType(16), "bool": ir.IntType(8)}.get(array.kind)
    stored = stored or context.get_value_type(array.element)
    found = read_only(builder, builder.load(builder.bitcast(pointer, stored.as_pointer()), align=1))
    if array.kind == "float16":
        return builder.fpext(found, ir.FloatType())
    if array.kind == "bfloat16":
        word = builder.shl(builder.zext(found, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(word, ir.FloatType())
    if array.kind == "bool":
        return builder.icmp_unsigned("!=", found, ir.Constant(found.type, 0))
    return found


@intrinsic
def length(typingctx, array, axis):
    """The size of an axis."""
    if not isinstance(array, ArrayType):
        return None

    def codegen(context, builder, sig, values):
        given = cgutils.create_struct_proxy(array)(context, builder, values[0])
        pointer = builder.gep(builder.inttoptr(given.shape, _WORD.as_pointer()), [values[1]])
        return read_only(builder, builder.load(pointer, align=8))

    return signature(types.int64, array, types.int64), codegen
