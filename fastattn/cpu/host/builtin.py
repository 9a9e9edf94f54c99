"""Compiled functions as builtins of Python.

ctypes makes an integer of each argument, and takes 0.7 µs for a call, 30 µs after a pause, when all of its code and
Python's is cold. A builtin takes 0.05 and 5: it is given the objects, and the compiled function reads what it needs of
them (`fastattn.cpu.kernels.entry`). A builtin is the address of a function, and a few words about it that Python's
stable interface describes (PyMethodDef).
"""

import ctypes
from collections.abc import Callable, Hashable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from fastattn.cpu.host.kernels import load
from fastattn.cpu.kernels.records import LINK
from fastattn.machine.kernel import Kernel
from fastattn.machine.libraries import Library
from fastattn.machine.objects import objects_are_as_expected
from fastattn.machine.table import host

Array = NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])
METH_VARARGS, METH_KEYWORDS, METH_FASTCALL = 0x1, 0x2, 0x80


class _Definition(ctypes.Structure):
    """PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


# By the function's address: definitions, and the code itself, have to live as long as the builtins.
_definitions: dict[int, tuple[_Definition, Library]] = {}


@cache
def _interface() -> dict[str, int]:
    python = ctypes.pythonapi

    def address(function: Any) -> int:
        found = ctypes.cast(function, ctypes.c_void_p).value
        assert found is not None
        return found

    return {
        "none": id(None),
        "true": id(True),
        "false": id(False),
        "int_type": id(int),
        "float_type": id(float),
        "to_word": address(python.PyLong_AsLongLongAndOverflow),
        "array_type": id(np.ndarray),
        "save_thread": address(python.PyEval_SaveThread),
        "restore_thread": address(python.PyEval_RestoreThread),
        "to_int": address(python.PyLong_FromLongLong),
        "from_int": address(python.PyLong_AsUnsignedLongLongMask),
        "to_bytes": address(python.PyBytes_FromStringAndSize),
        "call": address(python.PyObject_Call),
    }


def bind(kernel: Library, name: str, flags: int = METH_FASTCALL, **numbers: int) -> Callable[..., Any]:
    """A compiled function as a builtin that is bound to a record of `LINK` with these numbers."""
    link = np.zeros(1, LINK)
    for field, number in {**_interface(), **numbers}.items():
        link[field] = number
    address = kernel.addresses[name]
    if address not in _definitions:
        _definitions[address] = _Definition(name.encode(), address, flags, None), kernel
    make = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    function: Callable[..., Any] = make(("PyCFunction_NewEx", ctypes.pythonapi))(
        ctypes.addressof(_definitions[address][0]), link, None
    )
    return function


def _described(*things: Any) -> Hashable:
    """The same as a signature, with what Python offers."""
    found: list[Hashable] = []
    for thing in things:
        if type(thing) is np.ndarray:
            found.append((thing.shape, thing.strides, thing.dtype))
        elif thing is None or type(thing) in (bool, float, int):
            found.append((type(thing), thing))
        else:
            return b""
    return tuple(found)


class Signatures:
    """What can be said of arguments at once.

    `of` arrays and options is a key: equal where arrays agree in dtypes, shapes and strides, and options are the same,
    None, bools, floats or ints. It is b"" where an argument is something else, or has more than 32 axes.

    `overlap`: whether the first array may share memory with the others, of which the first may be the same once more.

    `longest`: the most keys of a row, of a table of pages, its items' bytes, the keys of each row, and how many pages
    and keys of a page there are; -1 where the table has no room for them, or names a page that does not exist.
    """

    def __init__(self) -> None:
        self.of: Callable[..., Hashable] = self._first
        self.overlap: Callable[..., int] = self._first_overlap
        self.longest: Callable[..., int] = self._first_longest

    def _first(self, *arguments: Any) -> Hashable:
        expected = objects_are_as_expected()
        self.of = bind(load(Kernel("signature", host())), "signature") if expected else _described
        return self.of(*arguments)

    def _first_overlap(self, *arrays: Array | None) -> int:
        expected = objects_are_as_expected()
        self.overlap = bind(load(Kernel("overlaps", host())), "overlaps") if expected else _they_may
        return self.overlap(*arrays)

    def _first_longest(self, *pages: Any) -> int:
        expected = objects_are_as_expected()
        self.longest = bind(load(Kernel("longest", host())), "longest") if expected else _not_known
        return self.longest(*pages)


def _they_may(*arrays: Array | None) -> int:
    """The same where it takes its time: a caller finds out when it has made sure of its plan."""
    return 1


def _not_known(*pages: Any) -> int:
    """The same: a caller finds out in another way."""
    return -1


signatures = Signatures()


def in_default_mode(function: F) -> F:
    """Make a function run in the default floating-point mode and give its caller's back, however it ends.

    Kernels do so by themselves. This is for what Python and NumPy compute around them, and results depend on: a scale,
    the conversion of an argument, the sum of a gradient.
    """

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return _calling(function)(*arguments, **keywords)

    return cast("F", call)


@cache
def _calling(function: Callable[..., Any]) -> Callable[..., Any]:
    if not objects_are_as_expected():
        return function
    return bind(
        load(Kernel("signature", host())), "in_default_mode", METH_VARARGS | METH_KEYWORDS, function=id(function)
    )
