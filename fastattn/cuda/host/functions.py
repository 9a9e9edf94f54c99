"""A user's functions in a call: what they capture, on the device, and whether all that they read was there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from fastattn.call.problem import Captures, Problem
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.host.arrays import Place, allocating
from fastattn.cuda.kernels.plan import CAPTURED, OUT_OF_RANGE
from fastattn.functions.function import Function, record_of
from fastattn.machine.objects import address_of

Array = NDArray[Any]


@contextmanager
def captured(problem: Problem, given: Captures | None, place: Place) -> Iterator[Any]:
    """The words that tell kernels of what functions capture, in device memory; None without functions.

    Raises
    ------
    IndexError
        Afterwards, if a function has read out of range for a key that a query may look at. It is waited for, where
        functions capture arrays.
    """
    if given is None:
        yield None
        return
    held: list[Any] = []
    words = [np.zeros(CAPTURED, np.int64)]
    functions = [
        (function, values)
        for function, values in ((problem.scores.score_mod, given.score), (problem.scores.mask_mod, given.seen))
        if function is not None
    ]
    for function, values in functions:
        words.append(_words_of(function, values, place, held))
    record = np.concatenate(words)
    on_device: Any = record.data if SIMULATED else cuda.to_device(record, stream=place.stream)
    yield on_device
    if not any(each.axes >= 0 for function, _ in functions for each in function.captured):
        return
    if not SIMULATED:
        record = on_device.copy_to_host(stream=place.stream)
        place.wait()
    if record[OUT_OF_RANGE]:
        names = ", ".join(function.label for function, _ in functions)
        raise IndexError(f"{names}: an index was out of range, for a key that the query may look at")


def _words_of(function: Function, values: tuple[Any, ...], place: Place, held: list[Any]) -> NDArray[np.int64]:
    """What is told of one function; `held` are the arrays that it tells the addresses of."""

    def moved(array: Array) -> int:
        if SIMULATED:
            held.append(array)
            return address_of(array)
        with allocating("what functions capture", array.shape, "bool"):
            held.append(cuda.to_device(array.reshape(-1).view(np.uint8), stream=place.stream))
        return int(held[-1].device_ctypes_pointer.value)

    given = tuple(np.asarray(value, order="C") if isinstance(value, np.ndarray) else value for value in values)
    return record_of(function, given, moved)[: function.words]
