"""A user's function that has been described before: its code, and what that captures, which may have changed.

To describe a function is to read all that its compiled code depends on, which takes some 50 µs. What was read is
remembered with the code, and compared: what is no number and no array has to be the very same, and the others of the
same kinds as they were. Their values are what compiled code is told in each call.
"""

from __future__ import annotations

from itertools import count
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from fastattn.functions import names
from fastattn.functions.function import captured_by, names_around

__all__ = ["Recalled", "recalled", "remember"]

REMEMBERED = 256  # functions
MISSING = object()

_numbers = count(1)
_known: dict[tuple[str, int], Recalled] = {}


class Recalled:
    """What is known of a function's code.

    Attributes
    ----------
    number : int
        Another one for each that was ever remembered.
    code : CodeType
    """

    def __init__(self, given: FunctionType):
        self.number = next(_numbers)
        self.code: CodeType = given.__code__
        self.around = given.__globals__
        self.reads = [(self._place_of(name), name, known) for name, known in _read_by(given)]

    def _place_of(self, name: str) -> int:
        """Where a function's closure has a variable; -1: it is a global one."""
        return self.code.co_freevars.index(name) if name in self.code.co_freevars else -1

    def values(self, given: FunctionType) -> tuple[Any, ...] | None:
        """What a function of this code captures, as compiled code takes it; None if it has to be described anew."""
        closure, around, found = given.__closure__ or (), given.__globals__, []
        if around is not self.around:
            return None
        for place, name, known in self.reads:
            try:
                value = around.get(name, MISSING) if place < 0 else closure[place].cell_contents
            except ValueError:  # it has no value yet
                return None
            if type(known) is _Kind:
                if not known.is_of(value):
                    return None
                found.append(value)
            elif value is not known:
                return None
        return tuple(found)


class _Kind:
    """Of which kind a number or an array is."""

    def __init__(self, value: Any):
        self.type = type(value)
        self.dtype: Any = value.dtype if self.type is np.ndarray else None
        self.axes: int = value.ndim if self.type is np.ndarray else -1

    def is_of(self, value: Any) -> bool:
        """Whether another value is as well."""
        if type(value) is not self.type:
            return False
        if self.dtype is not None:
            return bool(value.dtype == self.dtype and value.ndim == self.axes)
        return self.type is not int or -(2**63) <= value < 2**63

    @property
    def is_plain(self) -> bool:
        """Whether values of this kind are what compiled code takes, whatever they are."""
        if self.dtype is None:
            return self.type in (bool, int, float)
        return self.dtype.isnative and self.dtype != np.uint64


def _read_by(given: FunctionType) -> list[tuple[str, Any]]:
    """The names that a function reads, and what they mean.

    Raises
    ------
    LookupError
        If what it captures is not told by that.
    """
    found: list[tuple[str, Any]] = []
    around = dict(captured_by("", given))
    for name in names_around(given.__code__):
        value = around.get(name, MISSING)  # what is not there is one of Python's own
        if isinstance(value, FunctionType) and names.meaning(value, name) is None:
            raise LookupError(name)  # one of the user's, which captures what it likes
        if value is MISSING or callable(value) or value is None or isinstance(value, (str, ModuleType)):
            found.append((name, value))
            continue
        kind = _Kind(value)
        if not kind.is_plain:
            raise LookupError(name)
        found.append((name, kind))
    return found


def remember(role: str, given: Any) -> int:
    """Remember a function that has been described, by a number of its own.

    Raises
    ------
    LookupError
        If there is no telling what it captures at a glance.
    """
    made = Recalled(given)
    if len(_known) >= REMEMBERED:
        _known.clear()
    _known[role, id(made.code)] = made
    return made.number


def recalled(role: str, given: Any) -> tuple[int, tuple[Any, ...]] | None:
    """The number of what is known of a function, and what this one captures; None if it has to be described."""
    if given is None:
        return 0, ()
    known = _known.get((role, id(given.__code__))) if type(given) is FunctionType else None
    values = None if known is None else known.values(given)
    return None if known is None or values is None else (known.number, values)
