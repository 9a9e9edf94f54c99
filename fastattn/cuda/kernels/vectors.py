"""Loads of 16 bytes at a time, where elements lie side by side at addresses that are multiples of 16."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastattn.cuda.available import SIMULATED
from fastattn.cuda.kernels.elements import STORAGE, device, loader

__all__ = ["VECTOR_BYTES", "vector_loader", "vector_width"]

VECTOR_BYTES = 16


def vector_width(storage: str) -> int:
    """How many elements are loaded at a time."""
    return VECTOR_BYTES // np.dtype(STORAGE[storage]).itemsize


if SIMULATED:

    def _load_vector(array, index):
        own = getattr(array, "_item", array)
        assert own.strides == (own.dtype.itemsize,), "the elements do not lie side by side"
        return [array[index + i] for i in range(VECTOR_BYTES // own.dtype.itemsize)]

else:
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic
    from numba.cuda.typing.templates import signature

    @intrinsic
    def _load_vector(typingctx, array, index):
        """The elements of 16 bytes, from one that is aligned on."""
        if not isinstance(array, types.Array) or array.ndim != 1:
            return None
        count = VECTOR_BYTES * 8 // array.dtype.bitwidth
        result = types.UniTuple(array.dtype, count)

        def codegen(context, builder, sig, values):
            data = context.make_array(array)(context, builder, values[0]).data
            kind = context.get_data_type(array.dtype)
            vector = ir.VectorType(kind, count)
            place = builder.bitcast(builder.gep(data, [values[1]]), vector.as_pointer())
            loaded = builder.load(place, align=VECTOR_BYTES)
            parts = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), i)) for i in range(count)]
            return context.make_tuple(builder, result, parts)

        return signature(result, array, types.int64), codegen


def _spread(width: int) -> Any:
    """A device function that puts the elements of a vector into a row of an array.

    Each is written out: a tuple that is indexed by what is not a constant has to be in memory.
    """

    def spread_2(target, row, elements, load):
        target[row, 0], target[row, 1] = load(elements[0]), load(elements[1])

    def spread_4(target, row, elements, load):
        target[row, 0], target[row, 1] = load(elements[0]), load(elements[1])
        target[row, 2], target[row, 3] = load(elements[2]), load(elements[3])

    def spread_8(target, row, elements, load):
        target[row, 0], target[row, 1] = load(elements[0]), load(elements[1])
        target[row, 2], target[row, 3] = load(elements[2]), load(elements[3])
        target[row, 4], target[row, 5] = load(elements[4]), load(elements[5])
        target[row, 6], target[row, 7] = load(elements[6]), load(elements[7])

    return device({2: spread_2, 4: spread_4, 8: spread_8}[width])


def vector_loader(storage: str, real: Any, aligned: bool) -> Any:
    """A device function that puts numbers of neighbouring columns, 0 behind the last one, into a row of an array.

    Parameters
    ----------
    storage : str
        What the elements in memory are.
    real : type
        What the numbers are.
    aligned : bool
        Whether the columns lie side by side, their number is a multiple of `vector_width` and each such part of a row
        begins at an address that is a multiple of 16. Otherwise they are loaded one by one: the same numbers.
    """
    load, width, zero = loader(storage, real), vector_width(storage), real(0.0)

    if aligned:
        spread = _spread(width)

        def load_columns(target, row, source, at, step, first, count):
            """target[row][c] = column first + c, c < `vector_width`; `at` is where column 0 is."""
            if first < count:
                spread(target, row, _load_vector(source, at + first), load)
            else:
                for c in range(width):
                    target[row, c] = zero

    else:

        def load_columns(target, row, source, at, step, first, count):
            """target[row][c] = column first + c, c < `vector_width`; `at` is where column 0 is."""
            for c in range(width):
                target[row, c] = load(source[at + (first + c) * step]) if first + c < count else zero

    return device(load_columns)
