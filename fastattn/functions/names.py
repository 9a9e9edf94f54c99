"""What names mean in a user's function: those of NumPy's functions, and of the same in other modules and in Python."""

import math
import operator

__all__ = ["CONSTANTS", "meaning"]

#: Functions of one number, by all the names that they go by.
FUNCTIONS = {
    **{name: name for name in ("exp", "exp2", "expm1", "tanh", "sqrt", "square", "log", "log2", "log10", "log1p")},
    **{name: name for name in ("sin", "cos", "floor", "ceil", "trunc", "rint", "sign", "reciprocal", "relu")},
    **dict.fromkeys(("abs", "absolute", "fabs"), "abs"),
    **dict.fromkeys(("sigmoid", "expit"), "sigmoid"),
    **dict.fromkeys(("negative", "neg"), "negative"),
    **dict.fromkeys(("round", "fix"), "rint"),
    "positive": "positive",
}
#: Functions of two numbers that are operators.
OPERATORS = {
    **dict.fromkeys(("add",), operator.add),
    **dict.fromkeys(("subtract", "sub"), operator.sub),
    **dict.fromkeys(("multiply", "mul"), operator.mul),
    **dict.fromkeys(("divide", "true_divide", "div"), operator.truediv),
    **dict.fromkeys(("floor_divide",), operator.floordiv),
    **dict.fromkeys(("remainder", "mod"), operator.mod),
    **dict.fromkeys(("power", "pow", "float_power"), operator.pow),
    **dict.fromkeys(("less", "lt"), operator.lt),
    **dict.fromkeys(("less_equal", "le"), operator.le),
    **dict.fromkeys(("greater", "gt"), operator.gt),
    **dict.fromkeys(("greater_equal", "ge"), operator.ge),
    **dict.fromkeys(("equal", "eq"), operator.eq),
    **dict.fromkeys(("not_equal", "ne"), operator.ne),
    **dict.fromkeys(("logical_and", "bitwise_and"), operator.and_),
    **dict.fromkeys(("logical_or", "bitwise_or"), operator.or_),
    **dict.fromkeys(("logical_xor", "bitwise_xor"), operator.xor),
}
EXTREMES = {
    **dict.fromkeys(("maximum", "max", "fmax"), ">"),
    **dict.fromkeys(("minimum", "min", "fmin"), "<"),
}
CONSTANTS = {"pi": math.pi, "e": math.e, "inf": math.inf, "nan": math.nan}
CONVERSIONS = {
    **dict.fromkeys(("float", "float32", "float64", "asarray", "tensor", "scalar_tensor"), "real"),
    **dict.fromkeys(("int", "int32", "int64", "intp"), "int"),
    **dict.fromkeys(("bool", "bool_"), "bool"),
}


def meaning(name):
    """Return of what kind a name is, and what it stands for there; None if it means nothing here."""
    tables = {
        "function": FUNCTIONS,
        "operator": OPERATORS,
        "extreme": EXTREMES,
        "constant": CONSTANTS,
        "conversion": CONVERSIONS,
    }
    for kind, table in tables.items():
        if name in table:
            return kind, table[name]
    if name == "logical_not":
        return "unary", operator.not_
    if name in ("where", "clip", "clamp", "full_like", "zeros_like", "ones_like"):
        return "special", "clip" if name == "clamp" else name
    return None
