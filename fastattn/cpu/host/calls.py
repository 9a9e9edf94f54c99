"""A call, run: its plan, the record that compiled code reads, and working memory.

The record of a call is written by compiled code, in `fastattn.cpu.kernels.entry`, from the objects that Python has;
where objects do not look as expected, here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.problem import Shape
from fastattn.cpu.host.builtin import bind
from fastattn.cpu.kernels.records import ALIGNMENT, RECORD_BYTES
from fastattn.machine import os_threads
from fastattn.machine.libraries import Library
from fastattn.machine.objects import address_of, objects_are_as_expected

Array = NDArray[Any]


class Calls:
    """The ways to call a kernel that has tasks."""

    def __init__(self, kernel: Library):
        self.kernel = kernel
        self.note: Callable[..., int] = _note
        self.quick: Callable[..., int] = self._quick
        self.shared: Callable[..., int] | None = None
        if objects_are_as_expected():
            self.note, self.quick = bind(kernel, "note"), bind(kernel, "quick")
            self.shared = bind(kernel, "shared", task=kernel.addresses["task"])

    def _quick(self, held: Array, record: Array, *objects: Any) -> int:
        tasks = int(record[:8].view(np.int64)[0])
        return self.kernel.alone(_note(held, record, *objects), 0, tasks)

    def in_turns(self, held: Array, plan: Plan, objects: tuple[Any, ...]) -> None:
        """Run a call in the calling thread, which sees signals now and then."""
        at = self.note(held, plan.record, *objects)
        for first in range(0, plan.tasks, plan.turn):
            self.kernel.alone(at, first, min(first + plan.turn, plan.tasks))


@cache
def calls_of(kernel: Library) -> Calls:
    """The ways to call a kernel."""
    return Calls(kernel)


def _note(held: Array, record: Array, *objects: Any) -> int:
    """Write the record of a call at the beginning of its working memory; return where that is."""
    at = _aligned(address_of(held))
    numbers = [address_of(record), at + RECORD_BYTES, *map(number_of, objects)]
    place = at - address_of(held)
    held[place : place + 8 * len(numbers)].view(np.uint64)[:] = numbers
    return at


def number_of(thing: Any) -> int:
    """What a record has of an object: the address of an array's first element, an integer, or 0 for None."""
    if thing is None:
        return 0
    return thing % 2**64 if isinstance(thing, int) else address_of(thing)


def _aligned(address: int) -> int:
    return address + -address % ALIGNMENT


class Memory(os_threads.local):
    """Working memory of the calling thread: an address, and the array that it is in; None while a call has it."""

    held: tuple[int, Array] | None = None

    def of(self, size: int) -> tuple[int, Array]:
        """This thread's working memory of at least `size` bytes: its address, and what keeps it alive."""
        held = self.held
        if held is None or len(held[1]) < size + ALIGNMENT:
            array = np.empty(size + ALIGNMENT, np.uint8)
            held = self.held = (_aligned(address_of(array)), array)
        return held

    def take(self, size: int) -> tuple[int, Array]:
        """The same for a call that other calls may interrupt, a signal handler's in this very thread.

        These need memory of their own: who takes it puts it back, into `held`, at the end of the call.
        """
        held = self.of(size)
        self.held = None
        return held


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call needs, but for the arrays.

    Attributes
    ----------
    out_shape : tuple of int
    storage, real : numpy.dtype
        Those of the problem, as is the shape of the result.
    has_bias, drops : bool
        Whether there are a floating mask, and dropout.
    calls : Calls
        Of the kernel.
    record : ndarray of uint8
        What the kernel reads: the fields of a plan, and the table of leading axes.
    tasks : int
    turn : int
        Tasks that are done between two looks at Python's signals.
    flops : float
    threads : int
        That may work on it.
    memory_bytes : int
        Working memory of all threads.
    counters : int
        Words at the beginning of the partials, which are 0 when a call begins.
    partials_bytes : int
        What tasks leave for each other, 0 where there is nothing.
    is_small : bool
        Whether it is not worth to be shared, or to be looked after.
    own : callable or None
        Of calls that are known by what they were asked: what makes the table of what heads have of their own, from the
        arguments (`fastattn.cpu.host.own`).
    functions : object or None
        The same for the user's functions (`fastattn.cpu.host.functions.KnownFunctions`).
    """

    out_shape: Shape
    storage: np.dtype[Any]
    real: np.dtype[Any]
    has_bias: bool
    drops: bool
    calls: Calls
    record: Array = field(repr=False)
    tasks: int
    turn: int
    flops: float
    threads: int
    memory_bytes: int
    is_small: bool
    counters: int = 0
    partials_bytes: int = 0
    own: Callable[..., Array | None] | None = None
    functions: Any = None

    def new_partials(self, calls: int = 1) -> Array:
        """Memory for what the tasks of some calls leave for each other, a row for each call."""
        partials = np.empty((calls, self.partials_bytes // 8), np.int64)
        partials[:, : self.counters] = 0
        return partials


def packed(layout: np.dtype[Any], fields: Mapping[str, float], axes: Iterable[tuple[int, ...]]) -> Array:
    """Write the fields of a plan, 0 where none is given, and the table behind them, as compiled code reads them."""
    zeros, form = _form(layout)
    table = [number for axis in axes for number in axis]
    numbers = {**zeros, **fields}
    assert len(numbers) == len(zeros), f"not in the record: {numbers.keys() - zeros.keys()}"
    content = form.pack(*numbers.values()) + struct.pack(f"{len(table)}q", *table)
    return np.frombuffer(content, np.uint8)


@cache
def _form(layout: np.dtype[Any]) -> tuple[dict[str, int], struct.Struct]:
    """The fields of a record in their order, and how they are written."""
    names = layout.names or ()
    return dict.fromkeys(names, 0), struct.Struct(
        "=" + "".join("d" if layout[name].kind == "f" else "q" for name in names)
    )
