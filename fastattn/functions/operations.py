"""What a user's function may do with numbers, for Numba: operators, functions, choices, each on dual numbers as well.

Numbers mix as NumPy's scalars do with Python's: an integer, or a Python number, takes the dtype of the floating number
that it meets, so that nothing becomes float64 unawares. (To Numba an int64 times a float32 is float64.)
"""

import operator
from functools import cache

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.functions.dual import DualType, make_dual, parts_of
from fastattn.functions.elementary import FUNCTIONS, Term, choose

__all__ = ["Operations"]

RELATIONS = {
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
}
INTEGERS = {operator.add: "add", operator.sub: "sub", operator.mul: "mul"}
BITS = {operator.and_: "and_", operator.or_: "or_", operator.xor: "xor"}


def is_number(ty):
    """Whether a Numba type is one of numbers, dual ones included."""
    return isinstance(ty, (types.Integer, types.Float, types.Boolean, DualType))


def common(real, *given):
    """The type that numbers have together: the widest floating one, or else int64."""
    floats = [ty.real if isinstance(ty, DualType) else ty for ty in given if isinstance(ty, (types.Float, DualType))]
    if any(isinstance(ty, DualType) for ty in given):
        return DualType(real)
    return max(floats, key=lambda ty: ty.bitwidth) if floats else types.int64


class Operand:
    """One number in the code that is being made, in the type that it has together with others."""

    def __init__(self, context, builder, ty, given, target):
        value, slope = parts_of(context, builder, ty, given)
        real = target.real if isinstance(target, DualType) else target
        self.value = Term(builder, context.cast(builder, value, ty.real if isinstance(ty, DualType) else ty, real))
        self.slope = self.value.like(0.0) if slope is None and isinstance(target, DualType) else slope
        if slope is not None:
            self.slope = Term(builder, slope)


class Operations:
    """The operations of calls that compute in one dtype."""

    def __init__(self, real):
        self.real = real

    def result(self, context, builder, ty, value, slope):
        """LLVM's value of a result."""
        if isinstance(ty, DualType):
            return make_dual(context, builder, ty, value.value, slope.value)
        return value.value

    @cache
    def binary(self, function):
        """Python's operator of two numbers."""
        if function in RELATIONS:
            return self._relation(RELATIONS[function])
        if function in BITS:
            return self._bits(BITS[function])
        if function in (operator.floordiv, operator.mod):
            return self._whole(function)
        return self._arithmetic(function)

    def _arithmetic(self, function):
        rules = {
            operator.add: lambda a, b: (a + b, lambda x, y: x + y),
            operator.sub: lambda a, b: (a - b, lambda x, y: x - y),
            operator.mul: lambda a, b: (a * b, lambda x, y: x * b + a * y),
            operator.truediv: lambda a, b: (a / b, lambda x, y: (x - a / b * y) / b),
            operator.pow: self._power,
        }
        if function not in rules:
            return None

        @intrinsic
        def operation(typingctx, a, b):
            if not (is_number(a) and is_number(b)):
                return None
            target = common(self.real, a, b)
            if target == types.int64 and function not in INTEGERS:
                target = self.real

            def codegen(context, builder, sig, values):
                if target == types.int64:
                    one, other = (context.cast(builder, v, t, target) for v, t in zip(values, (a, b), strict=True))
                    return getattr(builder, INTEGERS[function])(one, other)
                one, other = (
                    Operand(context, builder, t, v, target) for v, t in zip(values, (a, b), strict=True)
                )
                value, slope = rules[function](one.value, other.value)
                dual = isinstance(target, DualType)
                return self.result(context, builder, target, value, slope(one.slope, other.slope) if dual else None)

            return signature(target, a, b), codegen

        return operation

    @staticmethod
    def _power(a, b):
        value = a.call("pow", b)

        def slope(x, y):
            by_base = choose(b.compare("==", 0.0), a.like(0.0), b * a.call("pow", b - 1.0)) * x
            by_exponent = choose(y.compare("==", 0.0), a.like(0.0), value * a.call("log") * y)
            return by_base + by_exponent

        return value, slope

    def _whole(self, function):
        """// and % have the sign of the divisor."""

        @intrinsic
        def operation(typingctx, a, b):
            if not (is_number(a) and is_number(b)):
                return None
            target = common(self.real, a, b)
            if isinstance(target, DualType):
                target = target.real
            inner = signature(target, target, target)

            def codegen(context, builder, sig, values):
                given = []
                for v, t in zip(values, (a, b), strict=True):
                    value, _ = parts_of(context, builder, t, v)
                    given.append(context.cast(builder, value, t.real if isinstance(t, DualType) else t, target))
                if target == types.int64:
                    return _whole_division(builder, *given, function is operator.mod)
                one, other = (Term(builder, each) for each in given)
                quotient = (one / other).call("floor")
                return (one - quotient * other if function is operator.mod else quotient).value

            return signature(inner.return_type, a, b), codegen

        return operation

    def _relation(self, relation):
        @intrinsic
        def operation(typingctx, a, b):
            if not (is_number(a) and is_number(b)):
                return None
            target = common(self.real, a, b)

            def codegen(context, builder, sig, values):
                if target == types.int64:
                    one, other = (context.cast(builder, v, t, target) for v, t in zip(values, (a, b), strict=True))
                    return builder.icmp_signed(relation, one, other)
                one, other = (Operand(context, builder, t, v, target) for v, t in zip(values, (a, b), strict=True))
                return one.value.compare(relation, other.value, unordered=relation == "!=")

            return signature(types.boolean, a, b), codegen

        return operation

    def _bits(self, name):
        @intrinsic
        def operation(typingctx, a, b):
            both = isinstance(a, types.Boolean) and isinstance(b, types.Boolean)
            whole = all(isinstance(ty, (types.Boolean, types.Integer)) for ty in (a, b))
            if not whole:
                return None
            target = types.boolean if both else types.int64

            def codegen(context, builder, sig, values):
                one, other = (context.cast(builder, v, t, target) for v, t in zip(values, (a, b), strict=True))
                return getattr(builder, name)(one, other)

            return signature(target, a, b), codegen

        return operation

    @cache
    def logical(self, function):
        """The same of truths: a number is true if it is not 0."""

        @intrinsic
        def operation(typingctx, a, b):
            if not (is_number(a) and is_number(b)):
                return None

            def codegen(context, builder, sig, values):
                one, other = (_truth(context, builder, ty, given) for ty, given in zip((a, b), values, strict=True))
                return getattr(builder, BITS[function])(one, other)

            return signature(types.boolean, a, b), codegen

        return operation

    @cache
    def unary(self, function):
        """Python's operator of one number."""
        if function is operator.neg:
            return self.function("negative")
        if function is operator.pos:
            return self.function("positive")
        if function in (operator.not_, operator.invert):
            return self._not(function)
        return None

    def _not(self, function):
        @intrinsic
        def operation(typingctx, a):
            if function is operator.invert and isinstance(a, types.Integer):
                return signature(a, a), lambda context, builder, sig, values: builder.not_(values[0])
            if not is_number(a):
                return None
            if function is operator.invert and not isinstance(a, types.Boolean):
                return None

            def codegen(context, builder, sig, values):
                return builder.not_(_truth(context, builder, a, values[0]))

            return signature(types.boolean, a), codegen

        return operation

    @cache
    def function(self, name):
        """A function of one number, by its name in `fastattn.functions.names`."""
        whole = {
            "abs": lambda builder, x: builder.select(
                builder.icmp_signed("<", x, ir.Constant(x.type, 0)), builder.neg(x), x
            ),
            "negative": lambda builder, x: builder.neg(x),
            "positive": lambda builder, x: x,
            "square": lambda builder, x: builder.mul(x, x),
            **dict.fromkeys(("floor", "ceil", "trunc", "rint"), lambda builder, x: x),
        }
        rules = {**FUNCTIONS, "negative": lambda x: (-x, x.like(-1.0)), "positive": lambda x: (x, x.like(1.0))}

        @intrinsic
        def operation(typingctx, a):
            if not is_number(a):
                return None
            target = common(self.real, a)
            if target == types.int64 and name not in whole:
                target = self.real

            def codegen(context, builder, sig, values):
                if target == types.int64:
                    return whole[name](builder, context.cast(builder, values[0], a, target))
                one = Operand(context, builder, a, values[0], target)
                value, slope = rules[name](one.value)
                dual = isinstance(target, DualType)
                return self.result(context, builder, target, value, slope * one.slope if dual else None)

            return signature(target, a), codegen

        return operation

    @cache
    def extreme(self, relation):
        """The greater or the smaller of two numbers, NaN if one is."""

        @intrinsic
        def operation(typingctx, a, b):
            if not (is_number(a) and is_number(b)):
                return None
            target = common(self.real, a, b)

            def codegen(context, builder, sig, values):
                if target == types.int64:
                    one, other = (context.cast(builder, v, t, target) for v, t in zip(values, (a, b), strict=True))
                    return builder.select(builder.icmp_signed(relation, one, other), one, other)
                one, other = (Operand(context, builder, t, v, target) for v, t in zip(values, (a, b), strict=True))
                first = builder.or_(one.value.compare(relation, other.value), one.value.is_nan())
                value = choose(first, one.value, other.value)
                dual = isinstance(target, DualType)
                return self.result(
                    context, builder, target, value, choose(first, one.slope, other.slope) if dual else None
                )

            return signature(target, a, b), codegen

        return operation

    @property
    @cache
    def where(self):
        """One of two numbers, of which both are computed."""

        @intrinsic
        def operation(typingctx, condition, a, b):
            if not (is_number(a) and is_number(b) and isinstance(condition, (types.Boolean, types.Integer))):
                return None
            both = isinstance(a, types.Boolean) and isinstance(b, types.Boolean)
            target = types.boolean if both else common(self.real, a, b)

            def codegen(context, builder, sig, values):
                taken = context.cast(builder, values[0], condition, types.boolean)
                if target in (types.int64, types.boolean):
                    one, other = (context.cast(builder, v, t, target) for v, t in zip(values[1:], (a, b), strict=True))
                    return builder.select(taken, one, other)
                one, other = (Operand(context, builder, t, v, target) for v, t in zip(values[1:], (a, b), strict=True))
                dual = isinstance(target, DualType)
                slope = choose(taken, one.slope, other.slope) if dual else None
                return self.result(context, builder, target, choose(taken, one.value, other.value), slope)

            return signature(target, condition, a, b), codegen

        return operation

    @cache
    def conversion(self, target):
        """To int64, to a boolean, or to a floating number, which stays what it is."""

        @intrinsic
        def operation(typingctx, a):
            if not is_number(a):
                return None
            kept = target == self.real and isinstance(a, (DualType, types.Float))
            ty = a if kept else target

            def codegen(context, builder, sig, values):
                if kept:
                    return values[0]
                value, _ = parts_of(context, builder, a, values[0])
                return context.cast(builder, value, a.real if isinstance(a, DualType) else a, target)

            return signature(ty, a), codegen

        return operation


def _truth(context, builder, ty, given):
    """Whether a number is not 0."""
    value, _ = parts_of(context, builder, ty, given)
    return context.cast(builder, value, ty.real if isinstance(ty, DualType) else ty, types.boolean)


def _whole_division(builder, a, b, rest):
    """a // b or a % b of whole numbers, rounded down; 0 where b is 0, as NumPy has it."""
    zero, one = ir.Constant(a.type, 0), ir.Constant(a.type, 1)
    none = builder.icmp_signed("==", b, zero)
    turns = builder.icmp_signed("==", b, ir.Constant(a.type, -1))  # the processor traps the least number over -1
    divisor = builder.select(builder.or_(none, turns), one, b)
    a = builder.select(turns, builder.neg(a), a)
    quotient = builder.sdiv(a, divisor)
    remainder = builder.sub(a, builder.mul(quotient, divisor))
    signs_differ = builder.icmp_signed("<", builder.xor(remainder, divisor), zero)
    down = builder.and_(signs_differ, builder.icmp_signed("!=", remainder, zero))
    if rest:
        result = builder.add(remainder, builder.select(down, divisor, zero))
    else:
        result = builder.sub(quotient, builder.zext(down, a.type))
    return builder.select(none, zero, result)
