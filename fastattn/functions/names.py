"""What names mean in a user's function: those of NumPy's functions, and of the same in other modules and in Python.

A value means something if it is what a module here has by a name here: a function of another module that goes by the
same name does not. Where modules differ, what is meant is that of the module.
"""

import operator
import sys
from typing import Any

__all__ = ["CONSTANTS", "CONVERSIONS", "KEEPING", "MODULES", "meaning", "method", "module_of"]

#: Modules whose functions of numbers have a meaning.
MODULES = (
    *("numpy", "math", "torch", "jax.numpy", "torch.nn.functional", "torch.special", "jax.nn", "scipy.special"),
    "builtins",
)
#: Modules that others are in.
PACKAGES = ("torch.nn", "jax", "scipy")

#: Functions of one number, by all the names that they go by.
FUNCTIONS = {
    **{name: name for name in ("exp", "exp2", "expm1", "tanh", "sqrt", "square", "log", "log2", "log10", "log1p")},
    **{name: name for name in ("sin", "cos", "floor", "ceil", "trunc", "rint", "sign", "reciprocal", "relu")},
    **dict.fromkeys(("abs", "absolute", "fabs"), "abs"),
    **dict.fromkeys(("sigmoid", "expit"), "sigmoid"),
    **dict.fromkeys(("negative", "neg"), "negative"),
    **dict.fromkeys(("round", "around"), "rint"),
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
    **dict.fromkeys(("bitwise_and",), operator.and_),
    **dict.fromkeys(("bitwise_or",), operator.or_),
    **dict.fromkeys(("bitwise_xor",), operator.xor),
}
LOGICAL = {"logical_and": operator.and_, "logical_or": operator.or_, "logical_xor": operator.xor}
EXTREMES = {
    "maximum": ("nan", ">"),
    "minimum": ("nan", "<"),
    "fmax": ("number", ">"),
    "fmin": ("number", "<"),
}
CONSTANTS = ("pi", "e", "tau", "inf", "nan")
CONVERSIONS = {
    **dict.fromkeys(("float64", "double"), "float64"),
    **dict.fromkeys(("float32", "float"), "float32"),
    **dict.fromkeys(("int64", "intp", "int_", "long"), "int"),
    **dict.fromkeys(("int32", "int"), "int32"),
    **dict.fromkeys(("bool", "bool_"), "bool"),
    **dict.fromkeys(("asarray", "tensor", "scalar_tensor"), "same"),
}
OTHERS = {
    "logical_not": ("unary", operator.not_),
    "where": ("where", None),
    "clip": ("special", "clip"),
    "clamp": ("special", "clip"),
    **{name: ("special", name) for name in ("masked_fill", "full_like", "zeros_like", "ones_like")},
}
#: What Python's own names mean, and what those of `math` do where NumPy's differ.
PYTHON = {
    "abs": ("function", "abs"),
    "max": ("extreme", ("first", ">")),
    "min": ("extreme", ("first", "<")),
    "pow": ("operator", operator.pow),
    "round": ("whole", "rint"),
    "float": ("conversion", "real"),
    "int": ("conversion", "int"),
    "bool": ("conversion", "bool"),
    "range": ("python", range),
    "len": ("length", None),
}
MATH = {name: ("whole", name) for name in ("floor", "ceil", "trunc")}
#: Methods of numbers, besides those that are torch's functions of that name; and those that leave a number what it is,
#: unless they are given a dtype.
METHODS = {
    "float": ("conversion", "real"),
    "double": ("conversion", "float64"),
    "int": ("conversion", "int32"),
    "long": ("conversion", "int"),
    "bool": ("conversion", "bool"),
    "where": None,  # whose arguments have another order
}
KEEPING = ("to", "type", "astype", "item", "clone", "contiguous")
#: What has another meaning in a module than the name says here, or none for one number.
REFUSED = {("math", "remainder"), ("numpy", "max"), ("numpy", "min")}


def meaning(value, name=""):
    """Return of what kind something that can be called is, and what it stands for there; None if it means nothing.

    `name` is what it goes by where it is called; it may have another one of its own.
    """
    for known in (getattr(value, "__name__", ""), name):
        for module in MODULES if isinstance(known, str) else ():
            if module in sys.modules and vars(sys.modules[module]).get(known) is value:
                return _in_module(module, known)
    return None


def method(name):
    """Return the same of a method of numbers, as tensors have them, which are given the number first."""
    return METHODS[name] if name in METHODS else _in_module("torch", name)


def _in_module(module, name):
    """Return what the name of a function means in a module."""
    if module == "builtins":
        return PYTHON.get(name)
    if module == "math" and name in MATH:
        return MATH[name]
    if (module, name) in REFUSED:
        return None
    if module == "torch" and name in ("max", "min"):
        name += "imum"
    tables: dict[str, dict[str, Any]] = {
        "function": FUNCTIONS,
        "operator": OPERATORS,
        "logical": LOGICAL,
        "extreme": EXTREMES,
        "conversion": CONVERSIONS,
    }
    for kind, table in tables.items():
        if name in table:
            return kind, table[name]
    return OTHERS.get(name)


def module_of(name):
    """Whether names in a module may mean something, those of modules in it included."""
    return name in MODULES or name in PACKAGES
