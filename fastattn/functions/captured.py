"""Captured arrays and numbers in compiled code: read from where a record of the call says that they are.

An index that is out of range reads the first element, and clears a flag that the caller has set: whether that is an
error depends on whether the query may look at the key. Loads are told to be of memory that no kernel writes to, so that
LLVM may gather a vector of them.

To differentiate by the elements of an array, one place in the function where it is indexed is chosen at a time, and if
elements are read there several times, one of these: what is read then is a dual number of slope 1, at other times of
slope 0, and behind the flag is noted which element it was, and how often one was read.
"""

from collections import namedtuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import signature
from numba.extending import intrinsic, models, register_model
from numba.np.numpy_support import from_dtype

from fastattn.functions.dual import DualType, make_dual

__all__ = ["FLAG", "ArrayType", "captured", "item_at", "shape_of", "size_of"]

FLAG = types.CPointer(types.int8)
_WORD = ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()


class ArrayType(types.Type):
    """A captured array, or what an index has left of one; `chosen`: its name, if its elements are differentiated by."""

    def __init__(self, kind, axes, chosen=""):
        self.kind, self.axes, self.chosen = kind, axes, chosen
        super().__init__(f"captured array of {kind} with {axes} axes" + (f", {chosen}" if chosen else ""))

    @property
    def element(self):
        """The Numba type of its elements."""
        if self.kind in ("float16", "bfloat16"):
            return types.float32
        return from_dtype(np.dtype(self.kind))


@register_model(ArrayType)
class _ArrayModel(models.StructModel):
    """Where the first element is, and its number; where the shape of what is left begins, and its strides; a flag."""

    def __init__(self, dmm, fe_type):
        members = [(name, types.intp) for name in ("at", "number", "shape", "strides")]
        super().__init__(dmm, fe_type, [*members, ("flag", FLAG)])


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


def captured(each, place, real, chosen=""):
    """An intrinsic that finds one of `fastattn.functions.function.Captured`, whose words begin at `place`.

    A floating number is one of the dtype `real`, as are those that are written in the function. `chosen`: as of the
    type.
    """

    @intrinsic
    def find(typingctx, record, flag):
        if each.axes < 0:
            ty = {"int": types.int64, "bool": types.boolean, "float": real}[each.kind]
        else:
            ty = ArrayType(each.kind, each.axes, chosen)

        def codegen(context, builder, sig, values):
            word = _word_at(builder, values[0], place)
            if each.kind == "bool" and each.axes < 0:
                return builder.icmp_signed("!=", word, ir.Constant(_WORD, 0))
            if each.axes < 0:
                if each.kind == "int":
                    return word
                return context.cast(builder, builder.bitcast(word, ir.DoubleType()), types.float64, real)
            array = cgutils.create_struct_proxy(ty)(context, builder)
            array.at, array.number = word, ir.Constant(_WORD, 0)
            array.shape = builder.add(values[0], ir.Constant(_WORD, 8 * (place + 1)))
            array.strides = builder.add(values[0], ir.Constant(_WORD, 8 * (place + 1 + each.axes)))
            array.flag = values[1]
            return array._getvalue()

        return signature(ty, record, flag), codegen

    return find


def item_at(real, is_chosen, read):
    """An intrinsic that reads an element of a captured array, or what is left of it where it has more axes.

    `is_chosen`: at this place in the function what is read of a chosen array is a dual number of the dtype `real`.
    `read` is called with the names of chosen arrays of which an element is read here.
    """

    @intrinsic(prefer_literal=True)
    def item(typingctx, array, index):
        if isinstance(array, types.BaseTuple):
            return _item_of_tuple(array, index)
        if not isinstance(array, ArrayType):
            return None
        numbers = tuple(index) if isinstance(index, types.BaseTuple) else (index,)
        if len(numbers) > array.axes or not all(isinstance(ty, types.Integer) for ty in numbers):
            return None
        rest = array.axes - len(numbers)
        ty = ArrayType(array.kind, rest, array.chosen) if rest else read_as(array.element, real)
        if array.chosen and not rest:
            read(array.chosen)
        dual = DualType(real) if is_chosen and array.chosen and not rest else None

        def codegen(context, builder, sig, values):
            given = cgutils.create_struct_proxy(array)(context, builder, values[0])
            indices = cgutils.unpack_tuple(builder, values[1]) if isinstance(index, types.BaseTuple) else [values[1]]
            indices = [context.cast(builder, *pair, types.int64) for pair in zip(indices, numbers, strict=True)]
            found = _found(builder, given, indices)
            if rest:
                left = cgutils.create_struct_proxy(ty)(context, builder)
                left.at, left.number, left.flag = found.at, found.number, given.flag
                step = ir.Constant(_WORD, 8 * len(numbers))
                left.shape, left.strides = builder.add(given.shape, step), builder.add(given.strides, step)
                return left._getvalue()
            element = context.cast(builder, _element(context, builder, array, found.pointer), array.element, ty)
            if dual is None:
                return element
            is_wanted = _note(builder, given.flag, found.number)
            value = context.cast(builder, element, ty, real)
            slope = builder.select(is_wanted, context.get_constant(real, 1.0), context.get_constant(real, 0.0))
            return make_dual(context, builder, dual, value, slope)

        return signature(dual or ty, array, index), codegen

    return item


def read_as(element, real):
    """The type that an element is read as: a whole number as int64, a floating one as `real` unless it is wider."""
    if isinstance(element, types.Float):
        return real if element.bitwidth < real.bitwidth else element
    return types.int64 if isinstance(element, types.Integer) else element


def _item_of_tuple(array, index):
    """The signature, and the code, of an element of a tuple, which a constant says; None if nothing does."""
    if not isinstance(index, types.IntegerLiteral) or not -len(array) <= index.literal_value < len(array):
        return None
    number = index.literal_value % len(array)
    return signature(array.types[number], array, index), lambda context, builder, sig, values: builder.extract_value(
        values[0], number
    )


# Where an element is, as an address and as a pointer, and its number in an array without gaps.
_Found = namedtuple("_Found", "at pointer number")


def _found(builder, array, indices):
    """Find an element, or the first of what is left; clear the flag where an index is out of range."""
    offset, number, inside = ir.Constant(_WORD, 0), array.number, ir.Constant(ir.IntType(1), 1)
    for axis, index in enumerate(indices):
        size = _word_at(builder, array.shape, axis)
        below = builder.icmp_signed("<", index, ir.Constant(_WORD, 0))
        index = builder.select(below, builder.add(index, size), index)
        valid = builder.icmp_unsigned("<", index, size)
        index = builder.select(valid, index, ir.Constant(_WORD, 0))
        offset = builder.add(offset, builder.mul(index, _word_at(builder, array.strides, axis)))
        number = builder.add(builder.mul(number, size), index)
        inside = builder.and_(inside, valid)
    kept = builder.and_(builder.load(array.flag), builder.zext(inside, ir.IntType(8)))
    builder.store(kept, array.flag)
    pointer = builder.gep(builder.inttoptr(array.at, _BYTES), [offset])
    return _Found(builder.add(array.at, offset), pointer, number)


def _note(builder, flag, number):
    """Note behind the flag that an element was read, and which, if it is the time that is wanted; whether it is."""
    words = builder.bitcast(flag, _WORD.as_pointer())
    known, times, wanted = (builder.gep(words, [ir.Constant(_WORD, word)]) for word in (1, 2, 3))
    before = builder.load(times)
    is_wanted = builder.icmp_signed("==", before, builder.load(wanted))
    builder.store(builder.select(is_wanted, number, builder.load(known)), known)
    builder.store(builder.add(before, ir.Constant(_WORD, 1)), times)
    return is_wanted


def _from_half(builder, half):
    """A float32 of the bits of a float16, in operations that every processor has: 2^112 moves the exponent."""
    word, real = ir.IntType(32), ir.FloatType()
    bits = builder.zext(half, word)
    size = builder.and_(bits, ir.Constant(word, 0x7FFF))
    moved = builder.shl(size, ir.Constant(word, 13))
    finite = builder.bitcast(builder.fmul(builder.bitcast(moved, real), ir.Constant(real, 2.0**112)), word)
    odd = builder.or_(moved, ir.Constant(word, 0x7F800000))
    is_finite = builder.icmp_unsigned("<", size, ir.Constant(word, 0x7C00))
    sign = builder.shl(builder.and_(bits, ir.Constant(word, 0x8000)), ir.Constant(word, 16))
    return builder.bitcast(builder.or_(builder.select(is_finite, finite, odd), sign), real)


def _element(context, builder, array, pointer):
    """Load one element; those of half precision become float32."""
    stored = {"float16": ir.IntType(16), "bfloat16": ir.IntType(16), "bool": ir.IntType(8)}.get(array.kind)
    stored = stored or context.get_value_type(array.element)
    found = read_only(builder, builder.load(builder.bitcast(pointer, stored.as_pointer()), align=1))
    if array.kind == "float16":
        return _from_half(builder, found)
    if array.kind == "bfloat16":
        word = builder.shl(builder.zext(found, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(word, ir.FloatType())
    if array.kind == "bool":
        return builder.icmp_unsigned("!=", found, ir.Constant(found.type, 0))
    return found


def _size(context, builder, array, given, axis):
    """The size of an axis of a captured array."""
    shape = cgutils.create_struct_proxy(array)(context, builder, given).shape
    return _word_at(builder, shape, axis)


@intrinsic
def size_of(typingctx, array):
    """The size of the first axis."""
    if not isinstance(array, ArrayType) or not array.axes:
        return None
    ty = signature(types.int64, array)
    return ty, lambda context, builder, sig, values: _size(context, builder, array, values[0], 0)


@intrinsic
def shape_of(typingctx, array):
    """The sizes of all axes."""
    if not isinstance(array, ArrayType):
        return None
    ty = types.UniTuple(types.int64, array.axes)

    def codegen(context, builder, sig, values):
        sizes = [_size(context, builder, array, values[0], axis) for axis in range(array.axes)]
        return context.make_tuple(builder, ty, sizes)

    return signature(ty, array), codegen
