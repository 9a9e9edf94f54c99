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
    "round": "rint",
    "fix": "trunc",
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
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
    "bitwise_xor": operator.xor,
}
#: The same of truths.
LOGICAL = {"logical_and": operator.and_, "logical_or": operator.or_, "logical_xor": operator.xor}
UNARY = {"logical_not": operator.not_, **dict.fromkeys(("bitwise_not", "invert"), operator.invert)}
EXTREMES = {
    **dict.fromkeys(("maximum", "max", "fmax"), ">"),
    **dict.fromkeys(("minimum", "min", "fmin"), "<"),
}
CONSTANTS = {"pi": math.pi, "e": math.e, "inf": math.inf, "nan": math.nan}
CONVERSIONS = {
    **dict.fromkeys(("float", "float16", "float32", "float64", "bfloat16", "half", "double"), "real"),
    **dict.fromkeys(("asarray", "tensor", "scalar_tensor"), "real"),
    **dict.fromkeys(("int", "int16", "int32", "int64", "intp", "short", "long"), "int"),
    **dict.fromkeys(("bool", "bool_"), "bool"),
}
#: Methods that leave a number what it is, unless one of their arguments is a dtype.
KEEPING = frozenset(("to", "type", "astype", "item", "clone", "contiguous"))


def meaning(name):
    """Return of what kind a name is, and what it stands for there; None if it means nothing here."""
    tables = {
        "function": FUNCTIONS,
        "operator": OPERATORS,
        "logical": LOGICAL,
        "unary": UNARY,
        "extreme": EXTREMES,
        "constant": CONSTANTS,
        "conversion": CONVERSIONS,
    }
    for kind, table in tables.items():
        if name in table:
            return kind, table[name]
    if name in ("where", "masked_fill", "clip", "clamp", "full_like", "zeros_like", "ones_like"):
        return "special", "clip" if name == "clamp" else name
    return None
