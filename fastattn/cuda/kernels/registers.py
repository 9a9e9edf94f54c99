"""Straight-line code on registers: `unrolled` functions, and the values that they are traced with.

Tensor-core instructions take and give *fragments*: each thread of a warp has a few registers of a matrix. Kernels hold
them as tuples of numbers, which have no address, so that nothing but registers can hold them. An `unrolled` function is
ordinary Python over such tuples. While a kernel is compiled it runs once, with `Value`s in place of numbers: its loops
run then, and each operation leaves an instruction behind. What stands in the kernel is one straight line of them.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic
from numba.cuda.typing.templates import signature

__all__ = ["ArrayValue", "Value", "as_value", "builder", "unrolled"]

I1, I32, I64, F32 = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType()
_NUMBA = {I1: types.boolean, I32: types.int32, I64: types.int64, F32: types.float32}

# The builder of the function that is being traced: an operation without operands has no other way to find it.
_builders: list[Any] = []


def builder():
    """The builder that instructions go to."""
    return _builders[-1]


class Value:
    """A number that is known when the kernel runs: of LLVM's type i1, i32, i64 or float."""

    __slots__ = ("ir",)

    def __init__(self, value):
        self.ir = value

    @property
    def type(self):
        return self.ir.type

    @property
    def is_float(self):
        return self.ir.type == F32

    def __add__(self, other):
        return _binary(self, other, "fadd", "add")

    def __radd__(self, other):
        return _binary(other, self, "fadd", "add")

    def __sub__(self, other):
        return _binary(self, other, "fsub", "sub")

    def __rsub__(self, other):
        return _binary(other, self, "fsub", "sub")

    def __mul__(self, other):
        return _binary(self, other, "fmul", "mul")

    __rmul__ = __mul__

    def __truediv__(self, other):
        return _binary(self, other, "fdiv", None)

    def __rtruediv__(self, other):
        return _binary(other, self, "fdiv", None)

    def __neg__(self):
        return _binary(-0.0 if self.is_float else 0, self, "fsub", "sub")

    # of numbers that are not negative, which is all that indices are divided
    def __floordiv__(self, other):
        return _binary(self, other, None, "udiv")

    def __mod__(self, other):
        return _binary(self, other, None, "urem")

    def __and__(self, other):
        return _binary(self, other, None, "and_")

    __rand__ = __and__

    def __or__(self, other):
        return _binary(self, other, None, "or_")

    __ror__ = __or__

    def __xor__(self, other):
        return _binary(self, other, None, "xor")

    __rxor__ = __xor__

    def __lshift__(self, other):
        return _binary(self, other, None, "shl")

    def __rshift__(self, other):
        return _binary(self, other, None, "lshr")

    def __lt__(self, other):
        return _compare(self, other, "<")

    def __le__(self, other):
        return _compare(self, other, "<=")

    def __gt__(self, other):
        return _compare(self, other, ">")

    def __ge__(self, other):
        return _compare(self, other, ">=")

    def __eq__(self, other):
        return _compare(self, other, "==")

    def __ne__(self, other):
        return _compare(self, other, "!=")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self):
        raise TypeError("a Value is known when the kernel runs, and an unrolled function cannot branch on it")


class ArrayValue:
    """An array that was given to a kernel; its elements are reached by address alone."""

    __slots__ = ("data", "itemsize")

    def __init__(self, data, itemsize):
        self.data = data
        self.itemsize = itemsize


def as_value(given, like=None):
    """A Value of what may be a number of Python, of the type `like` where that says which."""
    if isinstance(given, Value):
        return given
    if isinstance(given, bool):
        return Value(ir.Constant(I1, given))
    if isinstance(given, float) or like == F32:
        return Value(ir.Constant(F32, float(given)))
    kind = like if like in (I32, I64) else I32
    bits = kind.width
    return Value(ir.Constant(kind, (given + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))))


def _pair(a, b):
    """Both as LLVM values of one type; integers of 32 bits become ones of 64 beside such."""
    a = as_value(a, b.type if isinstance(b, Value) else None)
    b = as_value(b, a.type)
    if a.type != b.type:
        if {a.type, b.type} != {I32, I64}:
            raise TypeError(f"operands of types {a.type} and {b.type}; expected one type, or two of integers")
        a, b = (v if v.type == I64 else Value(builder().sext(v.ir, I64)) for v in (a, b))
    return a.ir, b.ir


def _binary(a, b, on_floats, on_integers):
    x, y = _pair(a, b)
    name = on_floats if x.type == F32 else on_integers
    if name is None:
        raise TypeError(f"no such operation on {x.type}")
    return Value(getattr(builder(), name)(x, y))


def _compare(a, b, op):
    x, y = _pair(a, b)
    if x.type != F32:
        return Value(builder().icmp_signed(op, x, y))
    # only != is true of NaN
    compare = builder().fcmp_unordered if op == "!=" else builder().fcmp_ordered
    return Value(compare(op, x, y))


# -- from Numba's types to values and back -----------------------------------------------------------------------------


def _llvm_of(ty):
    if isinstance(ty, types.Boolean):
        return I1
    if isinstance(ty, types.Integer):
        return I32 if ty.bitwidth <= 32 else I64
    if ty == types.float32:
        return F32
    raise TypeError(f"an argument of type {ty}; expected integers, float32, arrays, and tuples of these")


def _unpacked(ty, value):
    """Values of an argument that is no array."""
    if isinstance(ty, types.BaseTuple):
        parts = cgutils.unpack_tuple(builder(), value, len(ty))
        return tuple(_unpacked(part, v) for part, v in zip(ty, parts, strict=True))
    kind = _llvm_of(ty)
    if isinstance(ty, types.Integer) and ty.bitwidth < 32:
        value = (builder().sext if ty.signed else builder().zext)(value, I32)
    return Value(value) if value.type == kind else Value(builder().trunc(value, kind))


def _type_of(result):
    if result is None:
        return types.void
    if isinstance(result, (tuple, list)):
        return types.BaseTuple.from_types(tuple(_type_of(part) for part in result))
    return _NUMBA[as_value(result).type]


def _packed(context, ty, result):
    if result is None:
        return context.get_dummy_value()
    if isinstance(ty, types.BaseTuple):
        parts = [_packed(context, part, value) for part, value in zip(ty, result, strict=True)]
        return context.make_tuple(builder(), ty, parts)
    return as_value(result).ir


def _trace(context, at, function, tys, values):
    _builders.append(at)
    try:
        arguments = []
        for ty, value in zip(tys, values, strict=True):
            if isinstance(ty, types.Array):
                data = context.make_array(ty)(context, at, value).data
                arguments.append(ArrayValue(data, context.get_abi_sizeof(context.get_data_type(ty.dtype))))
            else:
                arguments.append(_unpacked(ty, value))
        return function(*arguments)
    finally:
        _builders.pop()


def unrolled(function, *known):
    """Make a function of numbers, arrays and tuples one that kernels may call, unrolled where it is called.

    `known` are its first arguments, which are whatever it may be in Python; kernels give the others.

    It may use Python as it likes on what is known while compiling; with what is not, arithmetic, comparisons and the
    primitives of `fastattn.cuda.kernels.ptx`. It returns a number, or tuples of them, or None.
    """

    def typing(typingctx, *tys):
        from numba.cuda.descriptor import cuda_target

        tys = tuple(types.unliteral(ty) for ty in tys)
        context = cuda_target.target_context
        # what it returns shows when it is traced, here into a function that nobody keeps
        scratch = ir.Function(
            context.create_module("scratch"),
            ir.FunctionType(ir.VoidType(), [context.get_value_type(ty) for ty in tys]),
            "scratch",
        )
        block = ir.IRBuilder(scratch.append_basic_block())
        returned = _type_of(_trace(context, block, of_kernel, tys, scratch.args))

        def codegen(context, at, sig, values):
            result = _trace(context, at, of_kernel, sig.args, values)
            _builders.append(at)
            try:
                return _packed(context, sig.return_type, result)
            finally:
                _builders.pop()

        return signature(returned, *tys), codegen

    of_kernel = functools.partial(function, *known)
    own = inspect.signature(of_kernel)
    context = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_ONLY)
    named = [p.replace(kind=inspect.Parameter.POSITIONAL_ONLY) for p in own.parameters.values()]
    typing.__signature__ = own.replace(parameters=[context, *named])  # type: ignore[attr-defined]
    typing.__name__ = function.__name__
    typing.__doc__ = function.__doc__
    return intrinsic(typing)
