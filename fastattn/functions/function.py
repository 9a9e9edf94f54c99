"""A user's function: what it is called with, what it captures, and what it is known by.

What a function reads besides its arguments is found in its code: variables of the functions around it, and globals. An
array or a number there is *captured*: compiled code is told where it is, or what it is, in each call, so that another
array, of another length, and another number compile nothing. Functions that are called belong to the code, as do the
names of modules.
"""

from __future__ import annotations

import builtins
import dis
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.functions import names
from fastattn.machine.digest import written
from fastattn.machine.objects import address_of, masked_arrays

__all__ = [
    "ARGUMENTS",
    "SCORE",
    "SEEN",
    "Captured",
    "Function",
    "captured_by",
    "contents",
    "described",
    "names_around",
    "rebuilt",
    "record_of",
]

#: The arguments of a function of a score, and of one that says which keys are seen.
SCORE = ("score", "batch", "head", "query", "key")
SEEN = SCORE[1:]

#: Names of arguments that gradients are returned by: what is captured goes by others.
ARGUMENTS = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks", "weight")

#: Flags of code that does not run when it is called.
LATER = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@dataclass(frozen=True)
class Captured:
    """One array or number that a function reads.

    Attributes
    ----------
    name : str
        As the function calls it.
    kind : str
        The dtype of an array, or "int", "float" or "bool".
    axes : int
        Of an array; -1 of a number.
    """

    name: str
    kind: str
    axes: int

    @property
    def words(self) -> int:
        """How many words tell compiled code of it: a number, or an address, a shape and strides."""
        return 1 if self.axes < 0 else 1 + 2 * self.axes


@dataclass(frozen=True, slots=True)
class Function:
    """A user's function as it is compiled, known by its code and by the kinds of what it captures.

    Attributes
    ----------
    role : str
        The argument that it was given as: "score_mod" or "mask_mod".
    identity : str
        A hash of all that its compiled code depends on.
    captured : tuple of Captured
    reads : frozenset of str
        Which of its arguments it uses.
    python : function
        Its code with what stands around it. It is not compared: functions of one identity are the same.
    own_names : dict of (function, str) to str
        What is captured by the names that the functions here, those that are called included, have for it.
    """

    role: str
    identity: str
    captured: tuple[Captured, ...]
    reads: frozenset[str] = field(compare=False, repr=False)
    python: FunctionType = field(compare=False, repr=False)
    own_names: dict[tuple[FunctionType, str], str] = field(compare=False, repr=False)

    @property
    def arguments(self) -> tuple[str, ...]:
        """What it is called with."""
        return SCORE if self.role == "score_mod" else SEEN

    @property
    def label(self) -> str:
        """The function, for messages."""
        code = self.python.__code__
        return f"{self.role}: {code.co_qualname if hasattr(code, 'co_qualname') else code.co_name}"

    @property
    def words(self) -> int:
        """How many words tell compiled code of all that it captures."""
        return sum(each.words for each in self.captured)

    def place_of(self, name: str) -> int:
        """At which word what compiled code is told of one that it captures begins."""
        place = 0
        for each in self.captured:
            if each.name == name:
                return place
            place += each.words
        raise KeyError(name)


def described(role: str, given: Any) -> tuple[Function, tuple[Any, ...]]:
    """Describe a function; the values that it captures come with it, arrays as NumPy's.

    Raises
    ------
    TypeError
        If it is no Python function of so many arguments, or captures what cannot be compiled.
    """
    arguments = SCORE if role == "score_mod" else SEEN
    if not isinstance(given, FunctionType):
        raise TypeError(
            f"{role}: {type(given).__name__}; expected a Python function, by def or lambda, of "
            f"({', '.join(arguments)}), or None"
        )
    code = given.__code__
    if code.co_flags & LATER:
        raise TypeError(
            f"{role}: {given.__name__} is a generator or a coroutine; expected a function that returns a number"
        )
    if code.co_argcount != len(arguments) or code.co_kwonlyargcount or code.co_flags & 0x0C:
        raise TypeError(
            f"{role}: {given.__name__} takes ({', '.join(code.co_varnames[: code.co_argcount])}); "
            f"expected {len(arguments)} arguments, ({', '.join(arguments)})"
        )
    reader = _Reader(role)
    words = reader.words_of(given, ())
    captured = tuple(each for each, _ in reader.found.values())
    identity = _hash_of((role, words, captured))
    reads = frozenset(
        argument
        for argument, name in zip(arguments, code.co_varnames, strict=False)
        if name in code.co_cellvars or name in _locals_read_by(code)
    )
    function = Function(role, identity, captured, reads, given, reader.own_names)
    return function, tuple(value for _, value in reader.found.values())


@lru_cache(maxsize=256)
def _hash_of(words: Any) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()[:32]


_written = lru_cache(maxsize=256)(written)


class _Reader:
    """Goes through a function and those that it calls, for what they capture and what their code depends on."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.found: dict[str, tuple[Captured, Any]] = {}
        self.given: dict[str, Any] = {}
        self.own_names: dict[tuple[FunctionType, str], str] = {}

    def words_of(self, function: FunctionType, above: tuple[Any, ...]) -> Any:
        """What a function's code depends on, in words."""
        if function in above:
            raise TypeError(f"{self.role}: {function.__name__} calls itself, which cannot be compiled")
        words: list[Any] = [_written(function.__code__)]
        for name, value in captured_by(self.role, function):
            if isinstance(value, ModuleType):
                words.append((name, name_of_module(self.role, name, value)))
            elif callable(value):
                means = names.meaning(value, name)
                if means is None and isinstance(value, FunctionType):
                    words.append((name, self.words_of(value, (*above, function))))
                else:
                    words.append((name, repr(means)))
            elif value is None or isinstance(value, str):
                words.append((name, value))
            else:
                own = self.own_names[function, name] = self._own_name(function, name, value)
                words.append((name, own))
        return tuple(words)

    def _own_name(self, function: FunctionType, name: str, value: Any) -> str:
        """What a captured value is called: as the function does, unless an argument is called so, or another value."""
        own, others = name, 0
        while own in ARGUMENTS or (own in self.found and self.given[own] is not value):
            others += 1
            own = f"{name} of {function.__name__}" + (f" ({others})" if others > 1 else "")
        if own not in self.found:
            self.found[own], self.given[own] = _captured(self.role, own, value), value
        return own


def _captured(role: str, name: str, value: Any) -> tuple[Captured, Any]:
    """Describe a captured value; the value as compiled code takes it."""
    if isinstance(value, (bool, np.bool_)):
        return Captured(name, "bool", -1), bool(value)
    if isinstance(value, (int, np.integer)):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{role}: captures {name}, which is {value}; expected a whole number of 64 bits")
        return Captured(name, "int", -1), int(value)
    if isinstance(value, (float, np.floating)):
        return Captured(name, "float", -1), float(value)
    expected = "expected a number, or an array of booleans, integers or real floating numbers"
    if isinstance(value, masked_arrays()):
        raise TypeError(f"{role}: captures {name}, a masked array; {expected}")
    try:
        array = np.asarray(value)
    except Exception as error:
        raise TypeError(f"{role}: captures {name}, a {type(value).__name__}; {expected}") from error
    if (array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16") or array.dtype.itemsize > 8:
        raise TypeError(f"{role}: captures {name}, a {type(value).__name__} of dtype {array.dtype}; {expected}")
    if array.dtype == np.uint64 and array.max(initial=0) >= 2**63:
        raise ValueError(f"{role}: captures {name}, in which {array.max()} is; expected whole numbers below 2**63")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return Captured(name, array.dtype.name, array.ndim), array


def captured_by(role: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Go through what a function's code reads besides its arguments: names and values.

    Raises
    ------
    TypeError
        If it reads a variable that is not there.
    """
    code = function.__code__
    for name in names_around(code):
        if name in code.co_freevars:
            cell = (function.__closure__ or ())[code.co_freevars.index(name)]
            try:
                yield name, cell.cell_contents
            except ValueError as error:
                raise TypeError(f"{role}: {function.__name__} reads {name}, which has no value yet") from error
        elif name in function.__globals__:
            yield name, function.__globals__[name]
        elif not hasattr(builtins, name):
            raise TypeError(f"{role}: {function.__name__} reads {name}, which is not defined")


def rebuilt(role: str, given: FunctionType, change: Callable[[str, Any], Any]) -> FunctionType:
    """Return a function with others in place of what it and the functions that it calls capture.

    Parameters
    ----------
    role : str
        The argument that it was given as.
    given : function
    change : callable
        From the name and the value of a variable, which may be a function, to what takes its place.
    """
    copies: dict[FunctionType, FunctionType] = {}
    cells: dict[int, CellType] = {}
    scopes: dict[int, dict[str, Any]] = {}

    def copy(function: FunctionType) -> FunctionType:
        if function in copies:
            return copies[function]
        code, around = function.__code__, function.__globals__
        scope = scopes.setdefault(id(around), {"__name__": around.get("__name__"), "__builtins__": builtins})
        closure = tuple(cells.setdefault(id(cell), CellType()) for cell in function.__closure__ or ())
        made = copies[function] = FunctionType(code, scope, function.__name__, function.__defaults__, closure)
        for name, value in captured_by(role, function):
            new = change(name, value)
            if isinstance(new, FunctionType) and names.meaning(new, name) is None:
                new = copy(new)
            if name in code.co_freevars:
                closure[code.co_freevars.index(name)].cell_contents = new
            else:
                scope[name] = new
        return made

    return copy(given)


@lru_cache(maxsize=256)
def _locals_read_by(code: CodeType) -> frozenset[str]:
    """The names of variables of its own that a code object reads."""
    return frozenset(
        name
        for step in dis.get_instructions(code)
        if step.opname.startswith("LOAD_FAST")
        for name in (step.argval if isinstance(step.argval, tuple) else (step.argval,))
    )


@lru_cache(maxsize=256)
def names_around(code: CodeType) -> list[str]:
    """The names of variables around a code object that it reads."""
    found: dict[str, None] = {}
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") or (
            step.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
            and step.argval in code.co_freevars
        ):
            found[step.argval] = None
    return list(found)


def name_of_module(role: str, name: str, module: ModuleType) -> str:
    """The name of a module whose functions mean something here.

    Raises
    ------
    TypeError
        If it is another one.
    """
    if not names.module_of(module.__name__):
        raise TypeError(f"{role}: uses the module {name}; expected one of {', '.join(names.MODULES[:4])}")
    return module.__name__


def record_of(
    function: Function, values: tuple[Any, ...], address: Callable[[NDArray[Any]], int] = address_of
) -> NDArray[np.int64]:
    """Write what compiled code is told of captured values; whoever runs it keeps these alive.

    `address` says where compiled code finds the elements of an array.
    """
    words: list[int] = []
    for each, value in zip(function.captured, values, strict=True):
        if each.axes >= 0:
            held = value if value.size else _NOTHING
            words += [address(held), *value.shape, *(value.strides if value.size else (0,) * value.ndim)]
        elif each.kind == "float":
            words.append(int(np.float64(value).view(np.int64)))
        else:
            words.append(int(np.int64(value)))
    return np.array(words or [0], np.int64)


def contents(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What captured values are known by: numbers, and hashes of arrays."""
    return tuple(
        (value.shape, hashlib.blake2b(value.tobytes(), digest_size=16).digest())
        if isinstance(value, np.ndarray)
        else value
        for value in values
    )


_NOTHING = np.zeros(1, np.int64)  # what is read of an array without elements
