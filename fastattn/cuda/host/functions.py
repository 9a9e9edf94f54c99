"""A user's functions in a call: what kernels are told of them, and whether all that they read was there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from fastattn.call.problem import Captures, Operands, Problem
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.host.arrays import Place, allocating
from fastattn.cuda.host.compile import kernel, launch, table
from fastattn.cuda.host.plan import slices_of
from fastattn.cuda.kernels.kinds import Looking, find_kinds
from fastattn.cuda.kernels.plan import CAPTURED, KIND_WORDS, OUT_OF_RANGE, REPEATED
from fastattn.cuda.kernels.scores import kinds_at
from fastattn.functions.function import Function, contents, record_of
from fastattn.functions.kinds import KIND_KEYS, KIND_QUERIES, WORTH_LOOKING
from fastattn.machine.objects import address_of

Array = NDArray[Any]

REMEMBERED, MOST_BYTES = 256, 1 << 26  # maps of blocks, and bytes of them together
THREADS = 4 if SIMULATED else 256  # of a block that looks at one of the map
_kinds: dict[Any, Any] = {}


class Words:
    """The words that tell kernels of a call's functions, in device memory.

    Attributes
    ----------
    functions : list of Function
    memory : array
        As kernels are given it: see `fastattn.cuda.kernels.plan`.
    """

    def __init__(self, problem: Problem, given: Captures, place: Place):
        score_mod, mask_mod = problem.scores.score_mod, problem.scores.mask_mod
        self.functions = [function for function in (score_mod, mask_mod) if function is not None]
        self.place = place
        self._held: list[Any] = []  # what the words tell the addresses of
        self._kinds_at = kinds_at(score_mod)
        words = [np.zeros(CAPTURED, np.int64)]
        if score_mod is not None:
            words.append(self._told(score_mod, given.score))
        if mask_mod is not None:
            words += [np.zeros(KIND_WORDS, np.int64), self._told(mask_mod, given.seen)]
        self._record = np.concatenate([*words, np.zeros(1, np.int64)])
        self.memory: Any = self._record.data if SIMULATED else cuda.to_device(self._record, stream=place.stream)

    def _told(self, function: Function, values: tuple[Any, ...]) -> NDArray[np.int64]:
        """What is told of one function."""
        given = tuple(np.asarray(value, order="C") if isinstance(value, np.ndarray) else value for value in values)
        return record_of(function, given, self._moved)[: function.words]

    def _moved(self, array: Array) -> int:
        """The address of an array on the device."""
        if SIMULATED:
            self._held.append(array)
            return address_of(array)
        with allocating("what functions capture", array.shape, "bool"):
            self._held.append(cuda.to_device(array.reshape(-1).view(np.uint8), stream=self.place.stream))
        return int(self._held[-1].device_ctypes_pointer.value)

    def look(self, problem: Problem, operands: Operands, real: Any) -> None:
        """Tell the kernels of a call, that are queued next, of which kind blocks of keys are, where that is known.

        What is not is found out for calls that are large enough, and remembered for the same function and values of
        what it captures. `real` is the type of the arithmetic.
        """
        function, given = problem.scores.mask_mod, operands.captured
        if function is None or given is None:
            return
        told = np.zeros(KIND_WORDS, np.int64)
        blocks = given.blocks
        if blocks is not None and blocks.shape[2:] == (problem.queries, problem.keys):
            told[:] = self._said_of(self._moved(np.ascontiguousarray(blocks.kinds)), blocks.kinds.shape, problem)
        elif min(problem.queries, problem.keys) >= WORTH_LOOKING and slices_of(problem):
            shape, kinds = self._found(function, problem, operands, real)
            self._held.append(kinds)
            told[:] = self._said_of(_address_of(kinds), shape, problem)
        words = slice(self._kinds_at, self._kinds_at + KIND_WORDS)
        if (self._record[words] != told).any():
            self._record[words] = told
            if not SIMULATED:
                self.memory[words].copy_to_device(told, stream=self.place.stream)

    def _said_of(self, address: int, shape: tuple[int, ...], problem: Problem) -> list[int]:
        """The words of a map: rows of the batch are counted from the first of the whole call."""
        *_, query_blocks, key_blocks = shape
        row, head = query_blocks * key_blocks * shape[1], query_blocks * key_blocks
        row, head = (step if size > 1 else 0 for step, size in zip((row, head), shape[:2], strict=True))
        return [address - problem.scores.first_batch * row, row, head, key_blocks]

    def _found(
        self, function: Function, problem: Problem, operands: Operands, real: Any
    ) -> tuple[tuple[int, int, int, int], Any]:
        """The map of a function, and its shape."""
        assert operands.captured is not None
        batches = int(np.prod(problem.batch, dtype=np.int64))
        starts = np.array([problem.scores.offset], np.int64)
        if operands.heads is not None and "offset" in problem.scores.own:
            starts = operands.heads["offset"].reshape(batches, -1)[:, 0].astype(np.int64)
        first_row = problem.scores.first_batch if "batch" in function.reads else 0
        rows = batches if "batch" in function.reads or len(starts) > 1 else 1
        heads = problem.heads if "head" in function.reads else 1
        sizes = rows, heads, problem.queries, problem.keys
        shape = rows, heads, -(-problem.queries // KIND_QUERIES), -(-problem.keys // KIND_KEYS)
        dtype, device = np.dtype(real).name, self.place.device
        identity = (function, dtype, contents(operands.captured.seen), starts.tobytes(), first_row, sizes, device)
        kinds = _kinds.get(identity)
        if kinds is None:
            count = int(np.prod(shape))
            with allocating("blocks of keys", shape, "bool"):
                kinds = cuda.device_array(count, np.uint8, stream=self.place.stream)
            starts = np.broadcast_to(starts, rows).copy()
            of_function = (self.memory, self._kinds_at + KIND_WORDS)
            arguments = (kinds, table(starts, device), first_row, heads, *sizes[2:], *of_function)
            made = kernel(find_kinds, Looking(function, dtype, THREADS))
            launch(made, count, (THREADS, 1), self.place.stream, arguments)
            if not SIMULATED:
                self.place.wait()  # calls on other streams may use it as soon as it is remembered
            if len(_kinds) >= REMEMBERED or sum(each.size for each in _kinds.values()) + count > MOST_BYTES:
                _kinds.clear()
            _kinds[identity] = kinds
        return shape, kinds

    def check(self) -> None:
        """Wait for the kernels where functions capture arrays, and say what they have read that is not there.

        Raises
        ------
        IndexError
            If a function has read out of range for a key that a query may look at.
        ValueError
            If there is no gradient of an array, as it was read more than once at one place.
        """
        if not any(each.axes >= 0 for function in self.functions for each in function.captured):
            return
        if not SIMULATED:
            self._record = self.memory.copy_to_host(stream=self.place.stream)
            self.place.wait()
        if self._record[REPEATED]:
            raise ValueError(
                f"grads: {self.functions[0].label} reads an array more than once at one place, in a loop or a function "
                "called twice; there is no gradient of that"
            )
        if self._record[OUT_OF_RANGE]:
            names = ", ".join(function.label for function in self.functions)
            raise IndexError(f"{names}: an index was out of range, for a key that the query may look at")


def _address_of(array: Any) -> int:
    """Where an array of Numba's begins."""
    return address_of(array._ary) if SIMULATED else int(array.device_ctypes_pointer.value)


@contextmanager
def captured(problem: Problem, given: Captures | None, place: Place) -> Iterator[Words | None]:
    """The words of a call; None without functions.

    Raises
    ------
    IndexError, ValueError
        Afterwards, as `Words.check`.
    """
    if given is None:
        yield None
        return
    words = Words(problem, given, place)
    yield words
    words.check()
