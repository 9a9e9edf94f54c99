"""A user's functions in a call: compiled, told of what they capture, and asked once which blocks of keys they hide."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.problem import Operands, Problem
from fastattn.cpu.host import session
from fastattn.cpu.host.kernels import load
from fastattn.cpu.kernels.records import FUNCTIONS, KIND_KEYS, KIND_QUERIES
from fastattn.functions.function import Function, record_of
from fastattn.machine.kernel import Kernel
from fastattn.machine.libraries import Library
from fastattn.machine.objects import address_of
from fastattn.machine.tile import TileShape

Array = NDArray[Any]

MOST_PARTS, MOST_ELEMENTS = 16, 1 << 22  # of the work on gradients of captured arrays, and of their sums together
WORTH_LOOKING = 2 * KIND_QUERIES  # queries and keys from which on blocks are looked at


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

    def sums(self) -> list[Array]:
        """The gradients."""
        return [array.sum(axis=0) for array in self.arrays]


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
    record = np.zeros(1, FUNCTIONS)
    record["heads"], record["first_key"] = max(1, problem.heads), scores.first_key
    held: list[Array] = []
    if scores.score_mod is not None:
        library = compiled("score_function", scores.score_mod, tile)
        held.append(record_of(scores.score_mod, given.score))
        record["score_captured"] = address_of(held[-1])
        for name in ("value", "slope", "along", "marks"):
            record[name] = library.addresses[name]
        if parts is not None and parts.names:
            adding = compiled("captured_function", scores.score_mod, tile, parts.names)
            held.append(parts.addresses())
            record["add"], record["arrays"] = adding.addresses["add"], len(parts.names)
            record["targets"] = address_of(held[-1])
    if scores.mask_mod is not None:
        library = compiled("seen_function", scores.mask_mod, tile)
        held.append(record_of(scores.mask_mod, given.seen))
        record["seen_captured"] = address_of(held[-1])
        record["hide"], record["marks"] = library.addresses["hide"], library.addresses["marks"]
        kinds = kinds_of_blocks(problem, operands, library, scores.mask_mod, held[-1])
        if kinds is not None:
            held.append(kinds)
            record["kinds"] = address_of(kinds)
            steps = (step if size > 1 else 0 for step, size in zip(kinds.strides, kinds.shape, strict=True))
            record["kinds_batch"], record["kinds_head"], record["kinds_row"] = [*list(steps)[:2], kinds.strides[2]]
    yield operands._replace(captured=record)  # type: ignore[arg-type]
    if record["repeated"]:
        raise ValueError(
            f"grads: {scores.score_mod.label if scores.score_mod else ''} reads an array more than once at one place, "
            "in a loop or a function called twice; there is no gradient of that"
        )
    if record["out_of_range"]:
        names = [function.label for function in (scores.score_mod, scores.mask_mod) if function is not None]
        raise IndexError(f"{', '.join(names)}: an index was out of range, for a key that the query may look at")


def compiled(work: str, function: Function, tile: TileShape, names: tuple[str, ...] = ()) -> Library:
    """A function's library, for blocks as wide as a tile."""
    return load(Kernel(work, session.current.row, tile, steps=names, function=function))


def kinds_of_blocks(
    problem: Problem, operands: Operands, library: Library, function: Function, record: Array
) -> Array | None:
    """Of which kind each block of keys is, for queries of some rows of the batch and heads, or the same for all.

    What has been found out is remembered, for the same function and values of what it captures.
    """
    if problem.queries < WORTH_LOOKING or problem.keys < WORTH_LOOKING or problem.scores.first_key:
        return None
    batches = int(np.prod(problem.batch, dtype=np.int64)) or 1
    offsets: Any = [problem.scores.offset]
    if operands.heads is not None and "offset" in problem.scores.own:
        offsets = operands.heads["offset"].reshape(batches, -1)[:, 0]
    assert operands.captured is not None
    rows = batches if "batch" in function.reads or len(offsets) > 1 else 1
    heads = problem.heads if "head" in function.reads else 1
    key = (
        "kinds", function, contents(operands.captured.seen), rows, heads, bytes(np.asarray(offsets, np.int64)),
        problem.queries, problem.keys,
    )  # fmt: skip

    def find() -> Array:
        blocks = -(-problem.queries // KIND_QUERIES), -(-problem.keys // KIND_KEYS)
        kinds = np.empty((rows, heads, *blocks), np.uint8)
        for row in range(rows):
            offset = int(offsets[row % len(offsets)])
            for head in range(heads):
                for block in range(blocks[0]):
                    first = block * KIND_QUERIES
                    count = min(KIND_QUERIES, problem.queries - first)
                    where = (address_of(kinds[row, head, block]), row, head, first, count, offset)
                    library.look(*where, problem.keys, KIND_KEYS, address_of(record))
        return kinds

    return session.current.plans.of(key, find)


def contents(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What captured values are known by: numbers, and hashes of arrays."""
    return tuple(
        (value.shape, hashlib.blake2b(value.tobytes(), digest_size=16).digest())
        if isinstance(value, np.ndarray)
        else value
        for value in values
    )
