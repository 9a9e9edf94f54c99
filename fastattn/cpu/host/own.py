"""What heads have of their own in a call like an earlier one: lengths, offsets, slopes and sinks are data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.halves import is_bfloat16
from fastattn.call.problem import Problem, Shape
from fastattn.call.scores import HEAD
from fastattn.cpu.host.builtin import bind
from fastattn.cpu.host.kernels import load
from fastattn.cpu.kernels.records import OWN, REAL, SHORT_REAL, SOURCE, UNSIGNED, WHOLE
from fastattn.machine.kernel import Kernel
from fastattn.machine.objects import address_of, objects_are_as_expected
from fastattn.machine.table import host

Array = NDArray[Any]

#: The arguments that numbers of heads come from, in the order in which `OwnHeads` takes them.
ARGUMENTS = ("query_offset", "key_lengths", "alibi_slopes", "sinks")
FIELDS = dict(zip(HEAD.names or (), ARGUMENTS, strict=True))
KINDS = {"i": WHOLE, "u": UNSIGNED, "f": REAL}
PLACES = {name: place[1] for name, place in (HEAD.fields or {}).items()}  # in HEAD, in bytes
WORD_LIMITS = np.iinfo(np.int64)


class OwnHeads:
    """Makes the table of what heads have of their own, for calls with arguments like those that were checked once.

    Called with the arguments of a call, in the order of `ARGUMENTS`, it returns the table: None if a number in them is
    out of range.
    """

    def __init__(self, problem: Problem, sources: Mapping[str, tuple[str, Array]]):
        heads, single = math.prod(problem.batch) * problem.heads, problem.real.itemsize == 4
        self.heads = heads
        self.places = {name: places_of(name, array, problem) for name, (_, array) in sources.items()}
        how, table = np.zeros(1, OWN), np.zeros(len(sources), SOURCE)
        how["heads"], how["sources"] = heads, len(sources)
        for name in HEAD.names or ():
            how[name] = problem.scores.head(problem.keys)[name]
        for source, (field, (argument, array)) in zip(table, sources.items(), strict=True):
            source["argument"] = ARGUMENTS.index(argument)
            source["kind"] = KINDS.get(array.dtype.kind, SHORT_REAL)
            source["itemsize"] = array.itemsize
            source["places"] = address_of(self.places[field])
            source["field"] = PLACES[field]
            source["is_whole"] = HEAD[field].kind == "i"
            source["low"], source["high"] = WORD_LIMITS.min, WORD_LIMITS.max
            if argument == "key_lengths":
                source["low"], source["high"] = 0, problem.keys
                source["less"] = problem.queries if field == "offset" else 0
            source["finite"] = field == "slope"
            source["largest"] = np.finfo(problem.real).max if field == "sink" else 0.0
            source["single"] = single
        self.how = np.frombuffer(how.tobytes() + table.tobytes(), np.uint8)
        self.fill = bind(load(Kernel("own_heads", host())), "own_heads")

    def __call__(self, *arguments: Any) -> Array | None:
        table = np.empty(self.heads, HEAD)
        return table if self.fill(table, self.how, *arguments) else None


def places_of(field: str, array: Array, problem: Problem) -> NDArray[np.int64]:
    """Return where each head of each row of a batch finds its number in an array, in bytes from the first."""
    places = np.zeros(array.shape, np.int64)
    for axis, (size, step) in enumerate(zip(array.shape, array.strides, strict=True)):
        places += (np.arange(size) * step).reshape((size,) + (1,) * (array.ndim - 1 - axis))
    shape: Shape = (*problem.batch, problem.heads)
    if HEAD[field].kind == "i":  # one for all heads of a row
        places = np.broadcast_to(places, problem.batch)[..., None]
    return np.ascontiguousarray(np.broadcast_to(places, shape))


def own_heads(problem: Problem, options: Mapping[str, Any]) -> OwnHeads | None:
    """What makes the table for calls with options like these, which have been checked.

    Raises
    ------
    LookupError
        If there is no telling which calls these are: an option is no array, or its elements cannot be read as they lie.
    """
    if not problem.scores.own:
        return None
    sources: dict[str, tuple[str, Array]] = {}
    for field in problem.scores.own:
        argument = FIELDS[field]
        if field == "offset" and options[argument] is None:  # "bottom-right"
            argument = "key_lengths"
        array = options[argument]
        if type(array) is not np.ndarray or not is_readable(array.dtype):
            raise LookupError(argument)
        sources[field] = argument, array
    if not objects_are_as_expected():
        raise LookupError("no builtins")
    return OwnHeads(problem, sources)


def is_readable(dtype: np.dtype[Any]) -> bool:
    """Whether compiled code reads numbers of this dtype: in the machine's byte order, not above those of 64 bits."""
    if dtype.kind == "u" and dtype.itemsize == 8:
        return False
    return is_bfloat16(dtype) or (dtype.kind in KINDS and dtype.isnative and dtype.itemsize <= 8)
