"""A user's functions, as Python runs them: once for each score, on NumPy's numbers.

They are given numbers of the wider type and whole numbers of 64 bits. So are the arrays and numbers that they capture,
and their modules' functions are NumPy's: `torch.clamp` and `math.exp` are understood here as in compiled code, which
shares nothing with this.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastattn.call.problem import Problem
from fastattn.functions.function import Function

__all__ = [
    "Found",
    "Where",
    "derivatives",
    "in_numpy",
    "out_of_range",
    "scores_of_function",
    "seen_by_function",
    "slopes_of_function",
    "where_all",
]

Array = NDArray[Any]
#: What stands for captured values: by the function that reads one, and its name for it.
Instead = Mapping[tuple[FunctionType, str], Any]

#: What derivatives are made of: differences over these steps, times the size of the score or 1.
STEPS = tuple(4.0**-power for power in range(2, 12))


class Where(NamedTuple):
    """The last four arguments of a function, for each score: arrays of int64, shape (*batch, Hk, G, Lq, Lk)."""

    batch: Array
    head: Array
    query: Array
    key: Array


class Found(NamedTuple):
    """What a function has returned for each score, and whether its indices were in range there."""

    values: Array
    inside: NDArray[np.bool_]


def where_all(problem: Problem, heads: Array | None) -> Where:
    """Return the arguments of a function for all scores; `heads` are those of the operands."""
    lead = problem.rows_shape
    rows = np.arange(math.prod(lead)).reshape(*lead, 1, 1)
    offset: Any = problem.scores.offset if heads is None else heads["offset"].reshape(*lead, 1, 1)
    query, key = np.arange(problem.queries)[:, None] + problem.scores.first_key, np.arange(problem.keys)
    batch = problem.scores.first_batch + rows // max(1, problem.heads)
    head = problem.scores.first_head + rows % max(1, problem.heads)
    return Where(*np.broadcast_arrays(batch, head, query + offset, key + problem.scores.first_key))


def scores_of_function(function: Function, scores: Array, where: Where) -> Found:
    """Return what a function of scores makes of them; NaN where an index is out of range."""
    return _each(in_numpy(function.python, scores.dtype.type), (scores, *where), scores.dtype, np.nan)


def seen_by_function(function: Function, where: Where, wide: Any) -> Found:
    """Return what a function says of which keys are seen; where an index is out of range, yes."""
    return _each(in_numpy(function.python, wide), where, np.dtype(bool), True)


@np.errstate(all="ignore")
def slopes_of_function(function: Function, scores: Array, where: Where) -> tuple[Array, Array]:
    """Return the derivative of a function of scores, and an estimate of its error."""
    call = in_numpy(function.python, scores.dtype.type)
    return derivatives(lambda moved: _each(call, (moved, *where), scores.dtype, np.nan).values, scores)


def derivatives(function: Callable[[Array], Array], at: Array) -> tuple[Array, Array]:
    """Return the derivative of a function of numbers, each by its own, and an estimate of its error.

    Central differences over steps h and h / 4 are put together so that the terms of h² cancel (Richardson). Of all
    steps, the pair that agrees best counts: large ones lose to the function's curvature and to its kinks, small ones to
    rounding.
    """
    size = np.maximum(np.abs(at), 1)
    eps = np.finfo(at.dtype).eps
    slopes, errors = np.zeros_like(at), np.full_like(at, np.inf)
    before = None
    for step in STEPS:
        above, below = at + size * step, at - size * step
        ends = [function(end) for end in (above, below)]
        difference = (ends[0] - ends[1]) / (above - below)
        rounding = eps * np.maximum(*map(np.abs, ends)) / (size * step)
        if before is not None:
            better = difference + (difference - before) / 15
            error = np.abs(difference - before) / 15 + 4 * rounding
            taken = error < errors
            slopes, errors = np.where(taken, better, slopes), np.where(taken, error, errors)
        before = difference
    return slopes, errors


def out_of_range(*functions: Function | None) -> NoReturn:
    """Say that a function has read out of range.

    Raises
    ------
    IndexError
        Always.
    """
    names = ", ".join(function.label for function in functions if function is not None)
    raise IndexError(f"{names}: an index was out of range, for a key that the query may look at")


@np.errstate(all="ignore")
def _each(function: Callable[..., Any], arguments: tuple[Array, ...], dtype: np.dtype[Any], otherwise: Any) -> Found:
    """Call a function for all arguments, which have one shape."""
    values = np.empty(arguments[0].shape, dtype)
    inside = np.ones(values.shape, bool)
    for place in np.ndindex(values.shape):
        try:
            values[place] = function(*(argument[place] for argument in arguments))
        except IndexError:
            values[place], inside[place] = otherwise, False
    return Found(values, inside)


# -- Python's functions on NumPy's numbers -----------------------------------------------------------------------------


def in_numpy(
    function: FunctionType, wide: Any, instead: Instead | None = None, known: dict[int, FunctionType] | None = None
) -> FunctionType:
    """Return a function of the same code, around which everything is NumPy's, of the wider type."""
    instead, known = instead or {}, {} if known is None else known
    if id(function) in known:
        return known[id(function)]
    code, around = function.__code__, {"__builtins__": {**vars(builtins), **_python_names(wide)}}
    cells = [type(cell)() for cell in function.__closure__ or ()]
    made = known[id(function)] = FunctionType(code, around, function.__name__, function.__defaults__, tuple(cells))

    def converted(name: str, value: Any) -> Any:
        if (function, name) in instead:
            return instead[function, name]
        if isinstance(value, FunctionType) and not _module_of(value):
            return in_numpy(value, wide, instead, known)
        return _converted(value, wide)

    for name in code.co_names:
        if name in function.__globals__:
            around[name] = converted(name, function.__globals__[name])
    for name, cell, own in zip(code.co_freevars, function.__closure__ or (), cells, strict=True):
        own.cell_contents = converted(name, cell.cell_contents)
    return made


def _converted(value: Any, wide: Any) -> Any:
    """Return what stands for a value around a function."""
    if isinstance(value, ModuleType):
        return _Module(value, wide)
    if callable(value):
        name = getattr(value, "__name__", "")
        return getattr(_Module(np, wide), name) if _module_of(value) else _python_names(wide).get(name, value)
    if value is None or isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "iu":
        array = array.astype(np.int64)
    elif array.dtype.kind != "b":
        array = array.astype(wide)
    return array if array.ndim else array[()]


def _module_of(value: Any) -> str:
    """Return the package that a function comes from, if it is one whose names are NumPy's."""
    package = str(getattr(value, "__module__", "") or type(value).__module__).partition(".")[0]
    return package if package in ("numpy", "math", "torch", "jax") else ""


class _Module:
    """A module whose functions are NumPy's of the same meaning."""

    def __init__(self, module: ModuleType, wide: Any) -> None:
        self.module, self.wide = module, wide

    def __getattr__(self, name: str) -> Any:
        own = getattr(self.module, name, None)
        if isinstance(own, ModuleType):
            return _Module(own, self.wide)
        if self.module is math and name in _OF_MATH:
            return _OF_MATH[name]
        found = _OTHER_NAMES.get(name)
        if found is None and name in ("float32", "float64", "double"):
            found = self.wide
        return getattr(np, name) if found is None else found


def _python_names(wide: Any) -> dict[str, Any]:
    """Return Python's own functions of numbers, as NumPy's numbers have them."""

    def whole_numbers(*bounds: int) -> Iterator[np.int64]:
        return map(np.int64, range(*bounds))

    return {"float": wide, "int": _whole, "bool": np.bool_, "round": _rounded, "range": whole_numbers}


def _whole(number: Any) -> Any:
    """Return a number without its fraction; the least of all whole ones where there is none of 64 bits."""
    return np.int64(int(number)) if np.abs(number) < 2.0**63 else np.int64(-(2**63))


def _rounded(number: Any) -> Any:
    return _whole(np.rint(number))


#: What is a whole number to Python's module, and a floating one to NumPy.
_OF_MATH: dict[str, Any] = {
    "floor": lambda x: _whole(np.floor(x)),
    "ceil": lambda x: _whole(np.ceil(x)),
    "trunc": lambda x: _whole(np.trunc(x)),
}


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    return np.clip(x, min, max)


#: What other modules call by other names.
_OTHER_NAMES: dict[str, Any] = {
    "sigmoid": _sigmoid,
    "expit": _sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "clamp": _clamp,
    "neg": np.negative,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "pow": np.power,
    "tensor": np.asarray,
    "scalar_tensor": np.asarray,
    "round": np.rint,
    "max": np.maximum,
    "min": np.minimum,
}
