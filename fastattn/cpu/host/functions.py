"""A user's functions in a call: compiled, told of what they capture, and asked once which blocks of keys they hide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.problem import Operands, Problem
from fastattn.call.scores import Scores
from fastattn.cpu.host import session
from fastattn.cpu.host.kernels import load
from fastattn.cpu.kernels.records import FUNCTIONS
from fastattn.functions.function import Function, contents, record_of
from fastattn.functions.kinds import FULL, KIND_KEYS, KIND_QUERIES, WORTH_LOOKING
from fastattn.functions.recall import recalled, remember
from fastattn.machine.kernel import Kernel
from fastattn.machine.libraries import Library
from fastattn.machine.objects import address_of
from fastattn.machine.tile import TileShape

Array = NDArray[Any]

SCORE_CAPTURED, SEEN_CAPTURED, OUT_OF_RANGE = (
    (FUNCTIONS.names or ()).index(name) for name in ("score_captured", "seen_captured", "out_of_range")
)
MOST_PARTS, MOST_ELEMENTS = 16, 1 << 22  # of the work on gradients of captured arrays, and of their sums together


class Parts:
    """The gradients of captured arrays, one for each part of the work: as many parts whatever number of threads.

    Attributes
    ----------
    names : tuple of str
        Of the arrays.
    number : int
        How many parts there are: fewer where the arrays are large.
    """

    def __init__(self, problem: Problem, operands: Operands, names: tuple[str, ...]):
        self.names = names
        function, captured = problem.scores.score_mod, operands.captured
        values: dict[str, Any] = {}
        if function is not None and captured is not None:
            values = {each.name: value for each, value in zip(function.captured, captured.score, strict=True)}
        shapes = [values[name].shape for name in names]
        elements = max(1, sum(map(math.prod, shapes)))
        self.number = max(2, min(MOST_PARTS, MOST_ELEMENTS // elements))
        self.arrays = [np.zeros((self.number, *shape)) for shape in shapes]

    def addresses(self) -> Array:
        """Where the array of each part and name is."""
        return np.array([[address_of(array[part, ...]) for array in self.arrays] for part in range(self.number)])

    def sums(self) -> dict[str, Array]:
        """The gradients, by name."""
        return {name: array.sum(axis=0) for name, array in zip(self.names, self.arrays, strict=True)}


def captured_among(problem: Problem, names: Sequence[str]) -> tuple[str, ...]:
    """Return which names are those of arrays that the function of scores captures."""
    function = problem.scores.score_mod
    captured = () if function is None else [each.name for each in function.captured]
    return tuple(name for name in names if name in captured)


@contextmanager
def prepared(problem: Problem, operands: Operands, tile: TileShape, parts: Parts | None = None) -> Iterator[Operands]:
    """The operands as kernels of a tile take them: with a record of the user's functions in place of what they capture.

    `parts` are where gradients of captured arrays go.

    Raises
    ------
    IndexError
        Afterwards, if a function has read out of range for a key that a query may look at.
    """
    if operands.captured is None:
        yield operands
        return
    scores, given = problem.scores, operands.captured
    record, held = record_of_functions(problem, tile), list[Array]()
    if scores.score_mod is not None:
        held.append(record_of(scores.score_mod, given.score))
        record["score_captured"] = address_of(held[-1])
        if parts is not None and parts.names:
            adding = compiled("captured_function", scores.score_mod, tile, parts.names)
            held.append(parts.addresses())
            record["add"], record["arrays"] = adding.addresses["add"], len(parts.names)
            record["targets"] = address_of(held[-1])
    if scores.mask_mod is not None:
        held.append(record_of(scores.mask_mod, given.seen))
        record["seen_captured"] = address_of(held[-1])
        library = compiled("seen_function", scores.mask_mod, tile)
        kinds = kinds_of_blocks(problem, operands, library, scores.mask_mod, held[-1])
        if kinds is not None:
            held.append(kinds)
            record["kinds"] = address_of(kinds)
            steps = (step if size > 1 else 0 for step, size in zip(kinds.strides, kinds.shape, strict=True))
            record["kinds_batch"], record["kinds_head"], record["kinds_row"] = [*list(steps)[:2], kinds.strides[2]]
    yield operands._replace(captured=record)  # type: ignore[arg-type]
    if record["out_of_range"]:
        raise out_of_range(scores)


def out_of_range(scores: Scores) -> IndexError:
    """What to raise where a function has read out of range."""
    names = [function.label for function in (scores.score_mod, scores.mask_mod) if function is not None]
    return IndexError(f"{', '.join(names)}: an index was out of range, for a key that the query may look at")


def record_of_functions(problem: Problem, tile: TileShape) -> Array:
    """The record of the user's functions, without what they capture."""
    scores, record = problem.scores, np.zeros(1, FUNCTIONS)
    record["heads"] = max(1, problem.heads)
    record["first_row"], record["first_head"] = scores.first_batch, scores.first_head
    record["first_key"] = scores.first_key
    if scores.score_mod is not None:
        library = compiled("score_function", scores.score_mod, tile)
        for name in ("value", "slope", "along", "marks"):
            record[name] = library.addresses[name]
    if scores.mask_mod is not None:
        library = compiled("seen_function", scores.mask_mod, tile)
        record["hide"], record["marks"] = library.addresses["hide"], library.addresses["marks"]
    return record


class KnownFunctions:
    """The user's functions in calls like one that was looked at: other values of what they capture are data.

    Attributes
    ----------
    scores : Scores
    """

    def __init__(self, problem: Problem, tile: TileShape):
        self.scores = problem.scores
        self._words = record_of_functions(problem, tile).view(np.int64)
        self._functions = (self.scores.score_mod, SCORE_CAPTURED), (self.scores.mask_mod, SEEN_CAPTURED)

    def record(self, captured: tuple[tuple[Any, ...], ...]) -> tuple[Array, list[Array]]:
        """The record for a call whose functions, of scores and of masks, capture this; and what has to live as long."""
        record, held = self._words.copy(), []
        for (function, word), values in zip(self._functions, captured, strict=True):
            if function is not None:
                held.append(record_of(function, values))
                record[word] = address_of(held[-1])
        return record, held

    def check(self, record: Array) -> None:
        """Refuse what a call has done.

        Raises
        ------
        IndexError
            If a function has read out of range for a key that a query may look at.
        """
        if record[OUT_OF_RANGE]:
            raise out_of_range(self.scores)


def known_functions(problem: Problem, options: Mapping[str, Any], tile: TileShape) -> tuple[KnownFunctions, Any] | None:
    """What calls with functions like these need, and what those are known by; None if there are no functions.

    Raises
    ------
    LookupError
        If each such call has to be looked at: functions are not recalled, or blocks of keys are.
    """
    if not problem.scores.has_functions:
        return None
    if problem.scores.mask_mod is not None and min(problem.queries, problem.keys) >= WORTH_LOOKING:
        raise LookupError("mask_mod")
    numbers = []
    for role in ("score_mod", "mask_mod"):
        known = recalled(role, options[role])
        numbers.append(remember(role, options[role]) if known is None else known[0])
    return KnownFunctions(problem, tile), tuple(numbers)


def compiled(work: str, function: Function, tile: TileShape, names: tuple[str, ...] = ()) -> Library:
    """A function's library, for blocks as wide as a tile."""
    return load(Kernel(work, session.current.row, tile, steps=names, function=function))


def kinds_of_blocks(
    problem: Problem, operands: Operands, library: Library, function: Function, record: Array
) -> Array | None:
    """Of which kind each block of keys is, for queries of some rows of the batch and heads, or the same for all.

    What has been found out is remembered, for the same function and values of what it captures.
    """
    assert operands.captured is not None
    blocks = operands.captured.blocks
    if blocks is not None and blocks.shape[2:] == (problem.queries, problem.keys):
        return blocks.kinds
    if min(problem.queries, problem.keys) < WORTH_LOOKING or 0 in problem.rows_shape:
        return None
    batches = math.prod(problem.batch)
    offsets: Any = [problem.scores.offset]
    if operands.heads is not None and "offset" in problem.scores.own:
        offsets = operands.heads["offset"].reshape(batches, -1)[:, 0]
    scores = problem.scores
    first_row = scores.first_batch if "batch" in function.reads else 0
    first_head = scores.first_head if "head" in function.reads else 0
    rows = batches if "batch" in function.reads or len(offsets) > 1 else 1
    heads = problem.heads if "head" in function.reads else 1
    shape = (rows, heads, problem.queries, problem.keys)
    of_rows = bytes(np.asarray(offsets, np.int64))
    first = first_row, first_head, scores.first_key
    key = ("kinds", function, contents(operands.captured.seen), of_rows, first, shape)
    return session.current.plans.of(key, lambda: kinds_found(library, record, shape, offsets, first))


def kinds_found(
    library: Library,
    record: Array,
    shape: tuple[int, int, int, int],
    offsets: Any = (0,),
    numbers: tuple[int, int, int] = (0, 0, 0),
) -> Array:
    """Look at all blocks, for so many rows, heads, queries and keys; `offsets` are of each row, or one for all.

    `numbers` are those that the first row, head and key have for the function.
    """
    first_row, first_head, first_key = numbers
    rows, heads, queries, keys = shape
    kinds = np.empty((rows, heads, -(-queries // KIND_QUERIES), -(-keys // KIND_KEYS)), np.uint8)
    for row, head, block in np.ndindex(kinds.shape[:3]):
        first = block * KIND_QUERIES
        where = (first_row + row, first_head + head, first_key + int(offsets[row % len(offsets)]) + first)
        some = (min(KIND_QUERIES, queries - first), first_key, keys, KIND_KEYS)
        library.look(address_of(kinds[row, head, block]), *where, *some, address_of(record))
    return kinds


def look_at(function: Function, captured: tuple[Any, ...], shape: tuple[int, int, int, int]) -> Array:
    """Of which kind each block is that a function speaks of, for so many rows, heads, queries and keys."""
    return kinds_found(_library_to_look(function), record_of(function, captured), shape)


def seen(function: Function, captured: tuple[Any, ...], shape: tuple[int, int, int, int]) -> Array:
    """Which single keys a function says yes to."""
    library, record = _library_to_look(function), record_of(function, captured)
    kinds = np.empty(shape, np.uint8)
    for row, head, query in np.ndindex(shape[:3]):
        library.look(address_of(kinds[row, head, query]), row, head, query, 1, 0, shape[3], 1, address_of(record))
    return kinds == FULL


def _library_to_look(function: Function) -> Library:
    return compiled("seen_function", function, session.current.row.tile("float32"))
