"""What a user's function may do with numbers, for Numba: operators, functions, choices, each on dual numbers as well.

Numbers mix as NumPy's scalars do with Python's: an integer, or a Python number, takes the dtype of the floating number
that it meets, so that nothing becomes float64 unawares. (To Numba an int64 times a float32 is float64.)
"""

import operator
from functools import cache, cached_property

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.functions.dual import DualType, make_dual, parts_of, value_as
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
SHIFTS = {operator.lshift: "shl", operator.rshift: "ashr"}


def is_number(ty):
    """Whether a Numba type is one of numbers, dual ones included."""
    return isinstance(ty, (types.Integer, types.Float, types.Boolean, DualType))


def common(real, *given):
    """The type that numbers have together: the widest floating one, or else int64."""
    floats = [ty.real if isinstance(ty, DualType) else ty for ty in given if isinstance(ty, (types.Float, DualType))]
    if any(isinstance(ty, DualType) for ty in given):
        return DualType(real)
    return max(floats, key=lambda ty: ty.bitwidth) if floats else types.int64


def are_booleans(*given):
    """Whether types are all that of booleans: these are no numbers that are added up."""
    return all(isinstance(ty, types.Boolean) for ty in given)


def are_whole(*given):
    """Whether types are all of whole numbers, or booleans."""
    return all(isinstance(ty, (types.Boolean, types.Integer)) for ty in given)


class Operand:
    """One number in the code that is being made, in the type that it has together with others."""

    def __init__(self, context, builder, ty, given, target):
        _, slope = parts_of(context, builder, ty, given)
        real = target.real if isinstance(target, DualType) else target
        self.value = Term(builder, value_as(context, builder, ty, given, real))
        self.slope = self.value.like(0.0) if slope is None and isinstance(target, DualType) else slope
        if slope is not None:
            self.slope = Term(builder, slope)


class Operations:
    """The operations of calls that compute in one dtype."""

    def __init__(self, real):
        self.real = real
        for name in ("binary", "logical", "unary", "function", "whole", "extreme", "conversion"):
            setattr(self, name, cache(getattr(self, name)))  # one intrinsic for each thing

    def result(self, context, builder, ty, value, slope):
        """LLVM's value of a result."""
        if isinstance(ty, DualType):
            return make_dual(context, builder, ty, value.value, slope.value)
        return value.value

    def binary(self, function):
        """Python's operator of two numbers; None if it is not one of numbers."""
        if function in RELATIONS:
            return self._relation(RELATIONS[function])
        if function in BITS:
            return self._bits(BITS[function])
        if function in SHIFTS:
            return self._shift(SHIFTS[function])
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
            if are_booleans(a, b):  # Python makes numbers of them, NumPy does not
                product = signature(types.boolean, a, b), lambda context, builder, sig, values: builder.and_(*values)
                return product if function is operator.mul else None
            target = common(self.real, a, b)
            if target == types.int64 and function not in INTEGERS:
                target = types.float64 if function is operator.pow else self.real

            def codegen(context, builder, sig, values):
                if target == types.int64:
                    one, other = (context.cast(builder, v, t, target) for v, t in zip(values, (a, b), strict=True))
                    return getattr(builder, INTEGERS[function])(one, other)
                one, other = (Operand(context, builder, t, v, target) for v, t in zip(values, (a, b), strict=True))
                value, slope = rules[function](one.value, other.value)
                dual = isinstance(target, DualType)
                return self.result(context, builder, target, value, slope(one.slope, other.slope) if dual else None)

            return signature(target, a, b), codegen

        return operation

    @staticmethod
    def _power(a, b):
        value = a.call("pow", b)

        def slope(x, y):
            by_base = b * a.call("pow", b - 1.0) * x
            by_base = choose(a.builder.or_(b.compare("==", 0.0), x.compare("==", 0.0)), a.like(0.0), by_base)
            by_exponent = choose(y.compare("==", 0.0), a.like(0.0), value * a.call("log") * y)
            return by_base + by_exponent

        return value, slope

    def _whole(self, function):
        """// and % have the sign of the divisor."""

        @intrinsic
        def operation(typingctx, a, b):
            if not (is_number(a) and is_number(b)) or are_booleans(a, b):
                return None
            target = common(self.real, a, b)

            def codegen(context, builder, sig, values):
                if target == types.int64:
                    one, other = (context.cast(builder, v, t, target) for v, t in zip(values, (a, b), strict=True))
                    return _whole_division(builder, one, other, function is operator.mod)
                first, second = (Operand(context, builder, t, v, target) for v, t in zip(values, (a, b), strict=True))
                quotient, rest = _division(first.value, second.value)
                if not isinstance(target, DualType):
                    return (rest if function is operator.mod else quotient).value
                if function is operator.mod:
                    return self.result(context, builder, target, rest, first.slope - quotient * second.slope)
                return self.result(context, builder, target, quotient, quotient.like(0.0))

            return signature(target, a, b), codegen

        return operation

    def _relation(self, relation):
        """Whether two numbers are in a relation; a whole number and a floating one are compared as NumPy does it."""

        @intrinsic
        def operation(typingctx, a, b):
            if not (is_number(a) and is_number(b)):
                return None
            target = common(self.real, a, b)
            if target != types.int64 and (are_whole(a) or are_whole(b)):
                target = types.float64

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
            if not are_whole(a, b):
                return None
            target = types.boolean if are_booleans(a, b) else types.int64

            def codegen(context, builder, sig, values):
                one, other = (context.cast(builder, v, t, target) for v, t in zip(values, (a, b), strict=True))
                return getattr(builder, name)(one, other)

            return signature(target, a, b), codegen

        return operation

    def _shift(self, name):
        """What is shifted by more bits than there are, or by a negative number of them, is gone."""

        @intrinsic
        def operation(typingctx, a, b):
            if not are_whole(a, b) or are_booleans(a, b):
                return None

            def codegen(context, builder, sig, values):
                one, other = (context.cast(builder, v, t, types.int64) for v, t in zip(values, (a, b), strict=True))
                most = ir.Constant(other.type, 63)
                is_few = builder.icmp_unsigned("<=", other, most)
                moved = getattr(builder, name)(one, builder.select(is_few, other, most))
                return moved if name == "ashr" else builder.select(is_few, moved, ir.Constant(one.type, 0))

            return signature(types.int64, a, b), codegen

        return operation

    def logical(self, function):
        """An operator of what is true of two numbers."""

        @intrinsic
        def operation(typingctx, a, b):
            if not (is_number(a) and is_number(b)):
                return None

            def codegen(context, builder, sig, values):
                given = (truth_of(context, builder, t, v) for v, t in zip(values, (a, b), strict=True))
                return getattr(builder, BITS[function])(*given)

            return signature(types.boolean, a, b), codegen

        return operation

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
        """`not`, and ~ of booleans, of which NumPy makes the same; of whole numbers, ~ turns all bits."""

        @intrinsic
        def operation(typingctx, a):
            if function is operator.not_ or are_booleans(a):
                if not is_number(a):
                    return None
                return signature(types.boolean, a), lambda context, builder, sig, values: builder.not_(
                    truth_of(context, builder, a, values[0])
                )
            if not are_whole(a):
                return None
            return signature(types.int64, a), lambda context, builder, sig, values: builder.not_(
                context.cast(builder, values[0], a, types.int64)
            )

        return operation

    def function(self, name):
        """A function of one number, by its name in `fastattn.functions.names`."""
        whole = {
            "abs": lambda builder, x: builder.select(
                builder.icmp_signed("<", x, ir.Constant(x.type, 0)), builder.neg(x), x
            ),
            "negative": lambda builder, x: builder.neg(x),
            "positive": lambda builder, x: x,
            "square": lambda builder, x: builder.mul(x, x),
            "sign": lambda builder, x: builder.sub(
                builder.zext(builder.icmp_signed(">", x, ir.Constant(x.type, 0)), x.type),
                builder.zext(builder.icmp_signed("<", x, ir.Constant(x.type, 0)), x.type),
            ),
            **dict.fromkeys(("floor", "ceil", "trunc", "rint"), lambda builder, x: x),
        }
        rules = {**FUNCTIONS, "negative": lambda x: (-x, x.like(-1.0)), "positive": lambda x: (x, x.like(1.0))}

        @intrinsic
        def operation(typingctx, a):
            if not is_number(a) or (name == "reciprocal" and are_whole(a)):
                return None
            if are_booleans(a) and name in ("negative", "positive", "sign"):
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

    def whole(self, name):
        """A function that makes whole numbers of others: floor, ceil, trunc or rint."""

        @intrinsic
        def operation(typingctx, a):
            if not is_number(a):
                return None

            def codegen(context, builder, sig, values):
                value, _ = parts_of(context, builder, a, values[0])
                if are_whole(a):
                    return context.cast(builder, value, a, types.int64)
                return whole_number(Term(builder, value).call(name))

            return signature(types.int64, a), codegen

        return operation

    def extreme(self, kind, relation):
        """The greater or the smaller of two numbers.

        With NaN among them it is NaN ("nan"), or the other one ("number"), or Python's ("first"): the first one, unless
        the second is greater, or smaller.
        """

        @intrinsic
        def operation(typingctx, a, b):
            if not (is_number(a) and is_number(b)):
                return None
            target = types.boolean if are_booleans(a, b) else common(self.real, a, b)

            def codegen(context, builder, sig, values):
                if target in (types.int64, types.boolean):
                    one, other = (context.cast(builder, v, t, target) for v, t in zip(values, (a, b), strict=True))
                    compare = builder.icmp_signed if target == types.int64 else builder.icmp_unsigned
                    return builder.select(compare(relation, one, other), one, other)
                one, other = (Operand(context, builder, t, v, target) for v, t in zip(values, (a, b), strict=True))
                first = {
                    "nan": lambda: builder.or_(one.value.compare(relation, other.value), one.value.is_nan()),
                    "number": lambda: builder.or_(one.value.compare(relation, other.value), other.value.is_nan()),
                    "first": lambda: builder.not_(other.value.compare(relation, one.value)),
                }[kind]()
                value = choose(first, one.value, other.value)
                dual = isinstance(target, DualType)
                return self.result(
                    context, builder, target, value, choose(first, one.slope, other.slope) if dual else None
                )

            return signature(target, a, b), codegen

        return operation

    @cached_property
    def where(self):
        """One of two numbers, of which both are computed."""

        @intrinsic
        def operation(typingctx, condition, a, b):
            if not (is_number(a) and is_number(b) and is_number(condition)):
                return None
            target = types.boolean if are_booleans(a, b) else common(self.real, a, b)

            def codegen(context, builder, sig, values):
                taken = truth_of(context, builder, condition, values[0])
                if target in (types.int64, types.boolean):
                    one, other = (context.cast(builder, v, t, target) for v, t in zip(values[1:], (a, b), strict=True))
                    return builder.select(taken, one, other)
                one, other = (Operand(context, builder, t, v, target) for v, t in zip(values[1:], (a, b), strict=True))
                dual = isinstance(target, DualType)
                slope = choose(taken, one.slope, other.slope) if dual else None
                return self.result(context, builder, target, choose(taken, one.value, other.value), slope)

            return signature(target, condition, a, b), codegen

        return operation

    def conversion(self, name):
        """To a whole number, to a boolean, or to a floating number, which stays what it is with "real"."""
        floats = {"real": self.real, "float32": types.float32, "float64": types.float64}

        @intrinsic
        def operation(typingctx, a):
            if not is_number(a):
                return None
            is_floating = isinstance(a, (DualType, types.Float))
            if name == "same" or (name in floats and (isinstance(a, DualType) or (name == "real" and is_floating))):
                return signature(a, a), lambda context, builder, sig, values: values[0]
            ty = floats.get(name, types.boolean if name == "bool" else types.int64)

            def codegen(context, builder, sig, values):
                if name == "bool":
                    return truth_of(context, builder, a, values[0])
                value, _ = parts_of(context, builder, a, values[0])
                if name in floats:
                    return context.cast(builder, value, a, ty)
                whole = whole_number(Term(builder, value)) if is_floating else context.cast(builder, value, a, ty)
                return builder.sext(builder.trunc(whole, ir.IntType(32)), whole.type) if name == "int32" else whole

            return signature(ty, a), codegen

        return operation


def truth_of(context, builder, ty, given):
    """What is true of a number: that it is not 0."""
    value, _ = parts_of(context, builder, ty, given)
    if isinstance(value.type, (ir.FloatType, ir.DoubleType)):
        return Term(builder, value).compare("!=", 0.0, unordered=True)
    return builder.icmp_unsigned("!=", value, ir.Constant(value.type, 0))


def whole_number(term):
    """A floating number without its fraction, as int64; the least of these where there is none, for NaN as well."""
    builder, word, limit = term.builder, ir.IntType(64), 2.0**63
    fits = builder.and_(term.compare(">=", -limit), term.compare("<", limit))
    return builder.select(fits, builder.fptosi(choose(fits, term, 0.0).value, word), ir.Constant(word, -(2**63)))


def _division(a, b):
    """a // b, and a % b, of floating numbers, as Python has them: of the exact remainder, nothing is rounded."""
    builder = a.builder
    rest = Term(builder, builder.frem(a.value, b.value))
    signs_differ = builder.xor(rest.compare("<", 0.0), b.compare("<", 0.0))
    moved = builder.and_(signs_differ, rest.compare("!=", 0.0))
    exact = (a - rest) / b
    rest, exact = choose(moved, rest + b, rest), choose(moved, exact - 1.0, exact)
    floor = exact.call("floor")
    quotient = choose((exact - floor).compare(">", 0.5), floor + 1.0, floor)
    return choose(b.compare("==", 0.0), a / b, quotient), rest


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
