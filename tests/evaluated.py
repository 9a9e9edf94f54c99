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
    tile = session.current.row.tile(scores.dtype.name)
    described_, values = described("score_mod", function)
    library = compiled("score_function", described_, tile)
    rows = np.zeros((len(scores), tile.width), scores.dtype)
    rows[:, : scores.shape[1]] = scores
    record = record_of(described_, values)
    place = (batch, head, query, key, query + tile.width - 1)
    library.addresses  # noqa: B018
    library.value(address_of(rows), len(rows), *place, address_of(record))
    found = rows[:, : scores.shape[1]]
    bits = np.ascontiguousarray(found).view(f"u{scores.dtype.itemsize}")
    return found, bits == MARKED[scores.dtype]


def as_python(function: Any, scores: Array, batch: int, head: int, query: int, key: int) -> tuple[Array, Array]:
    """Return the same, as Python has it, in the dtype of the scores."""
    queries, keys = np.arange(scores.shape[1]) + query, np.arange(scores.shape[0])[:, None] + key
    where = Where(*np.broadcast_arrays(np.int64(batch), np.int64(head), queries, keys))
    found = reference.functions.scores_of_function(described("score_mod", function)[0], scores, where)
    return found.values, ~found.inside
