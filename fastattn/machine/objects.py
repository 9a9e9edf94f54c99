"""Arrays as objects in memory: where their fields are, and so where their elements begin.

``array.ctypes.data`` says the same, but imports a module of NumPy's each time. That takes ten times as long, and fails
when an interpreter is about to end.
"""

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Where Python's and NumPy's C interfaces put things, bytes behind the header that each object has: its type stands at
# the header's end, and the address of an array's first element right behind it.
OBJECT_HEADER = object.__basicsize__
ARRAY_RANK, ARRAY_DIMENSIONS, ARRAY_STRIDES, ARRAY_DTYPE = 8, 16, 24, 40
DTYPE_NUMBER = 8  # of a dtype: eight bytes for kind, byte order, and number


def _word(address: int, bits: int = 64) -> int:
    return (ctypes.c_uint32 if bits == 32 else ctypes.c_uint64).from_address(address).value


@cache
def objects_are_as_expected() -> bool:
    """Whether builtins can be made here, and arrays look as compiled code expects."""
    array = np.zeros((3, 4), np.float32)[1:, ::2]
    fields = id(array) + OBJECT_HEADER
    axes = (_word(fields + ARRAY_DIMENSIONS), _word(fields + ARRAY_STRIDES))

    def number(dtype: Any) -> int:
        return _word(id(np.dtype(dtype)) + OBJECT_HEADER + DTYPE_NUMBER)

    return (
        ctypes.sizeof(ctypes.c_void_p) == 8
        and hasattr(ctypes, "pythonapi")
        and _word(fields - 8) == id(np.ndarray)
        and _word(fields) == _said_address(array)
        and _word(fields + ARRAY_RANK, 32) == array.ndim
        and tuple(_word(axis + 8 * i) for axis in axes for i in range(2)) == array.shape + array.strides
        and _word(fields + ARRAY_DTYPE) == id(array.dtype)
        and len({number(kind) for kind in ("=f4", "<f8", ">f8", "=i4", "=u4", "=i8", "=f2", "?")}) == 8
        and number("=f4") == number(np.float32)
    )


def _said_address(array: Array) -> int:
    """What NumPy says, which is slower still for a structure."""
    address: int = array.__array_interface__["data"][0]
    return address


def address_of(array: Array) -> int:
    """The address of an array's first element."""
    return _word(id(array) + OBJECT_HEADER) if objects_are_as_expected() else _said_address(array)


def masked_arrays() -> tuple[type, ...]:
    """The type ``np.ma.MaskedArray``, for `isinstance`, or nothing where nobody has imported `np.ma`.

    NumPy imports it at the first mention. A child that is forked while another thread does so would wait for the end of
    that for ever.
    """
    kind = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
    return () if kind is None else (kind,)


def _look_up() -> None:
    """Have NumPy import what it imports at first use: as an interpreter ends, nothing can be imported."""
    words = np.zeros(2, np.int64)
    words.view([("first", np.int64), ("second", np.int64)])[0]
    for method in (words.all, words.any, words.max, words.mean, words.min, words.prod, words.sum):
        method()
    words.clip(0, 1)


_look_up()
