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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.machine.digest import written
from fastattn.machine.objects import address_of

__all__ = ["MODULES", "SCORE", "SEEN", "Captured", "Function", "captured_by", "described", "record_of"]

#: The arguments of a function of a score, and of one that says which keys are seen.
SCORE = ("score", "batch", "head", "query", "key")
SEEN = SCORE[1:]

#: Modules whose functions of numbers mean the same.
MODULES = ("numpy", "math", "torch", "jax.numpy", "torch.nn.functional", "builtins")

WORD = np.dtype(np.int64)


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
    places : int
        In how many places it indexes something, those of functions that it calls included.
    python : function
        Its code with what stands around it. It is not compared: functions of one identity are the same.
    """

    role: str
    identity: str
    captured: tuple[Captured, ...]
    reads: frozenset[str] = field(compare=False, repr=False)
    places: int = field(compare=False, repr=False)
    python: FunctionType = field(compare=False, repr=False)

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
        raise TypeError(f"{role}: {type(given).__name__}; expected a Python function of ({', '.join(arguments)}), or None")
    code = given.__code__
    if code.co_argcount != len(arguments) or code.co_kwonlyargcount or code.co_flags & 0x0C:
        raise TypeError(
            f"{role}: {given.__name__} takes ({', '.join(code.co_varnames[: code.co_argcount])}); "
            f"expected {len(arguments)} arguments, ({', '.join(arguments)})"
        )
    found: dict[str, tuple[Captured, Any]] = {}
    codes: dict[CodeType, None] = {}
    words = _words(role, given, found, codes, ())
    captured = tuple(each for each, _ in found.values())
    identity = _hash_of((role, words, captured))
    reads = frozenset(
        argument
        for argument, name in zip(arguments, code.co_varnames, strict=False)
        if name in code.co_cellvars or name in _locals_read_by(code)
    )
    places = sum(map(_subscripts, codes))
    return Function(role, identity, captured, reads, places, given), tuple(value for _, value in found.values())


@lru_cache(maxsize=256)
def _hash_of(words: Any) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()[:32]


_written = lru_cache(maxsize=256)(written)


def _words(
    role: str,
    function: FunctionType,
    found: dict[str, tuple[Captured, Any]],
    codes: dict[CodeType, None],
    above: tuple[Any, ...],
) -> Any:
    """What a function's code depends on, in words; what it captures is added to `found`, its code to `codes`."""
    codes[function.__code__] = None
    if function in above:
        raise TypeError(f"{role}: {function.__name__} calls itself, which cannot be compiled")
    words: list[Any] = [_written(function.__code__)]
    for name, value in captured_by(function):
        if isinstance(value, ModuleType):
            words.append((name, name_of_module(role, name, value)))
        elif isinstance(value, FunctionType) and value.__module__.partition(".")[0] not in ("numpy", "torch", "jax"):
            words.append((name, _words(role, value, found, codes, (*above, function))))
        elif callable(value):
            words.append((name, repr(getattr(value, "__name__", value))))
        elif value is None or isinstance(value, str):
            words.append((name, value))
        else:
            own = f"{name} of {function.__name__}" if name in found and found[name][1] is not value else name
            found[own] = _captured(role, own, value)
            words.append((name, own))
    return tuple(words)


def _captured(role: str, name: str, value: Any) -> tuple[Captured, Any]:
    """Describe a captured value; the value as compiled code takes it."""
    if isinstance(value, (bool, np.bool_)):
        return Captured(name, "bool", -1), bool(value)
    if isinstance(value, (int, np.integer)):
        return Captured(name, "int", -1), int(value)
    if isinstance(value, (float, np.floating)):
        return Captured(name, "float", -1), float(value)
    try:
        array = np.asarray(value)
    except Exception as error:
        raise TypeError(f"{role}: captures {name}, a {type(value).__name__}, which is neither array nor number") from error
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16" or array.dtype.itemsize > 8:
        raise TypeError(
            f"{role}: captures {name}, of dtype {array.dtype}; expected booleans, integers or real floating numbers"
        )
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return Captured(name, array.dtype.name, array.ndim), array


def captured_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Go through what a function's code reads besides its arguments: names and values.

    Raises
    ------
    TypeError
        If it reads a variable that is not there.
    """
    code = function.__code__
    for name in _read_by(code):
        if name in code.co_freevars:
            cell = (function.__closure__ or ())[code.co_freevars.index(name)]
            try:
                yield name, cell.cell_contents
            except ValueError as error:
                raise TypeError(f"{function.__name__} reads {name}, which has no value yet") from error
        elif name in function.__globals__:
            yield name, function.__globals__[name]
        elif not hasattr(builtins, name):
            raise TypeError(f"{function.__name__} reads {name}, which is not defined")


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
def _subscripts(code: CodeType) -> int:
    """In how many places a code object indexes something."""
    steps = dis.get_instructions(code)
    return sum("SUBSCR" in step.opname or (step.opname == "BINARY_OP" and step.argrepr == "[]") for step in steps)


@lru_cache(maxsize=256)
def _read_by(code: CodeType) -> list[str]:
    """The names of variables around a code object that it reads."""
    names: dict[str, None] = {}
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") or (
            step.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF") and step.argval in code.co_freevars
        ):
            names[step.argval] = None
    return list(names)


def name_of_module(role: str, name: str, module: ModuleType) -> str:
    """The name of a module whose functions mean something here.

    Raises
    ------
    TypeError
        If it is another one.
    """
    if module.__name__ not in MODULES:
        raise TypeError(f"{role}: uses the module {name}; expected one of {', '.join(MODULES[:4])}")
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
            words += [address(held), *value.shape, *value.strides]
        elif each.kind == "float":
            words.append(int(np.float64(value).view(np.int64)))
        else:
            words.append(int(np.int64(value)))
    return np.array(words or [0], np.int64)


_NOTHING = np.zeros(1, np.int64)  # what is read of an array without elements
