"""What a worker computes of a call that is cut into pieces: one of them, and what several come to together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.api.pieces import First, attend, differentiate
from fastattn.call.halves import cast
from fastattn.call.pieces import Merged
from fastattn.call.problem import Array
from fastattn.call.widening import narrowed
from fastattn.cpu.host.builtin import in_default_mode
from fastattn.cpu.host.threads import num_threads
from fastattn.integrations.grid import HEAD, Place

__all__ = ["Call", "attended", "differentiated", "finished", "merged", "summed"]


@dataclass(frozen=True)
class Call:
    """What all pieces of a call are told.

    Attributes
    ----------
    storage, real : numpy.dtype
    head_dim, value_dim : int
        As of `fastattn.call.problem.Problem`.
    rank : int
        How many axes the result has.
    told : dict
        dropout_p, causal, scale, enable_gqa and seed, as `fastattn.api.pieces` takes them.
    options : dict
        Further options of the whole; a block mask is a function.
    threads : int
        How many of fastattn's threads a task uses.
    """

    storage: np.dtype[Any]
    real: np.dtype[Any]
    head_dim: int
    value_dim: int
    rank: int
    told: dict[str, Any]
    options: dict[str, Any]
    threads: int

    def of(self, place: Place, sinks: bool) -> dict[str, Any]:
        """Return what a piece is told; `sinks`: whether those of its queries are counted there."""
        options = {name: place.of(name, option) for name, option in self.options.items()}
        options["sinks"] = options["sinks"] if sinks else None
        (head, _), (query, _), (key, _) = place.spans[HEAD:]
        return {**self.told, "first": First(place.row, head, query, key), "options": options}

    def operands(self, place: Place, query: Array | None, key: Array | None, value: Array | None) -> list[Array]:
        """Return query, key and value of a piece: zeros where its queries see no key, and there are none of these."""
        *leading, queries, keys = place.shape

        def zeros(length: int, features: int) -> Array:
            return np.zeros((*leading, length, features)[-self.rank :], self.storage)

        return [
            zeros(queries, self.head_dim) if query is None else query,
            zeros(keys, self.head_dim) if key is None else key,
            zeros(keys, self.value_dim) if value is None else value,
        ]


def attended(
    call: Call, place: Place, sinks: bool, query: Any, key: Any, value: Any, bias: Any, keep: Any
) -> tuple[Array, Array]:
    """Return the result over a piece and its log-sum-exp, both in the dtype that sums have."""
    query, key, value = call.operands(place, query, key, value)
    mask = None if bias is keep is None else (bias, keep)
    with num_threads(call.threads):
        return attend(query, key, value, mask, **call.of(place, sinks))


@in_default_mode
def merged(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Return the result over several pieces of the same queries, and its log-sum-exp."""
    result = Merged()
    for out, lse in parts:
        result.add(out, lse)
    return result.finish(parts[0][0].dtype)


@in_default_mode
def finished(part: tuple[Array, Array], dtype: np.dtype[Any]) -> Array:
    """Return the result over all pieces in the dtype that it is to have."""
    return narrowed(part[0], dtype)


def differentiated(
    names: Sequence[str], call: Call, place: Place, grad_out: Any, out: Any, lse: Any, grad_lse: Any,
    query: Any, key: Any, value: Any, bias: Any, keep: Any,
) -> dict[str, Array]:  # fmt: skip
    """Return the parts of a piece in gradients, by name; those by what has axes of operands in the dtype of sums."""
    query, key, value = call.operands(place, query, key, value)
    mask = None if bias is keep is None else (None if bias is None else cast(bias, call.real), keep)
    given: Any = (grad_out, query, key, value, out, lse, mask)
    told = call.of(place, "sinks" in names)
    with num_threads(call.threads):
        found = differentiate(*given, **told, grad_lse=grad_lse, grads=names)
    return dict(zip(names, found, strict=True))


@in_default_mode
def summed(parts: Sequence[Array]) -> Array:
    """Return the sum of parts of a gradient, added in their order."""
    with np.errstate(all="ignore"):
        return sum(parts[1:], start=parts[0])
