"""A user's function by itself: compiled, and run on chosen scores and places; and the same in Python."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn import reference
from fastattn.cpu.host import session
from fastattn.cpu.host.functions import compiled
from fastattn.functions.function import described, record_of
from fastattn.machine.objects import address_of
from fastattn.reference.functions import Where

Array = NDArray[Any]

#: What marks a score whose function has read out of range, in `fastattn.functions.rows`.
MARKED = {np.dtype(np.float32): 0x7FE5_A7A1, np.dtype(np.float64): 0x7FFC_A771_0000_A7A1}


def as_compiled(function: Any, scores: Array, batch: int, head: int, query: int, key: int) -> tuple[Array, Array]:
    """Return what a function of scores makes of scores[j, i], of the keys and queries from `key` and `query` on.

    Where an index is out of range, that is True in the second array.
    """
    found, _ = _run("value", function, scores, batch, head, query, key)
    bits = np.ascontiguousarray(found).view(f"u{scores.dtype.itemsize}")
    return found, bits == MARKED[scores.dtype]


def slopes_as_compiled(function: Any, scores: Array, batch: int, head: int, query: int, key: int) -> Array:
    """Return the derivatives there."""
    return _run("slope", function, scores, batch, head, query, key)[1]


def _run(which: str, function: Any, scores: Array, batch: int, head: int, query: int, key: int) -> tuple[Array, Array]:
    tile = session.current.row.tile(scores.dtype.name)
    its, values = described("score_mod", function)
    library = compiled("score_function", its, tile)
    record = record_of(its, values)
    found, slopes = scores.copy(), np.ones_like(scores)
    for first in range(0, scores.shape[1], tile.width):
        rows, beside = np.zeros((2, len(scores), tile.width), scores.dtype)
        columns = slice(first, min(first + tile.width, scores.shape[1]))
        count = columns.stop - first
        rows[:, :count], beside[:] = scores[:, columns], 1
        arrays = (address_of(rows), *((address_of(beside),) if which == "slope" else ()))
        last = query + first + tile.width - 1
        getattr(library, which)(*arrays, len(rows), batch, head, query + first, key, last, address_of(record))
        found[:, columns], slopes[:, columns] = rows[:, :count], beside[:, :count]
    return found, slopes


def as_python(function: Any, scores: Array, batch: int, head: int, query: int, key: int) -> tuple[Array, Array]:
    """Return the same, as Python has it, in the dtype of the scores."""
    where = _places(scores, batch, head, query, key)
    found = reference.functions.scores_of_function(described("score_mod", function)[0], scores, where)
    return found.values, ~found.inside


def slopes_as_python(function: Any, scores: Array, batch: int, head: int, query: int, key: int) -> tuple[Array, Array]:
    """Return the derivatives there, in the dtype of the scores, and how wrong they may be."""
    where = _places(scores, batch, head, query, key)
    return reference.functions.slopes_of_function(described("score_mod", function)[0], scores, where)


def _places(scores: Array, batch: int, head: int, query: int, key: int) -> Where:
    queries, keys = np.arange(scores.shape[1]) + query, np.arange(scores.shape[0])[:, None] + key
    return Where(*np.broadcast_arrays(np.int64(batch), np.int64(head), queries, keys))
