"""Packed sequences: one behind the other on one axis, each of which is a call of its own.

A call of packed sequences is described whole, for what concerns it as a whole, and sequence by sequence. What an option
has for each row of a batch it has here for each sequence, whose number is that of its row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.arrays import as_array, as_integers
from fastattn.call.problem import Array, Captures, Operands, Problem, Shape
from fastattn.call.score_options import FurtherOptions
from fastattn.call.shapes import describe
from fastattn.call.types import Causal, Number
from fastattn.call.upstream import (
    OF_HEADS,
    Upstream,
    own_dtype,
    sources_of,
    split_upstream,
    summed_to,
)

__all__ = [
    "BY_ROW",
    "Packed",
    "as_given",
    "as_starts",
    "by_row",
    "describe_packed",
    "has_rows",
    "heads_first",
    "slices",
    "sources_of_packed",
]

#: Options that may have something for each row of a batch, and how many axes these have behind that of the batch.
BY_ROW = {"query_offset": 0, "alibi_slopes": 1, "sinks": 1}


@dataclass(frozen=True)
class Packed:
    """A call of packed sequences, checked.

    Attributes
    ----------
    query : ndarray, shape (T, Hq, D)
    key : ndarray, shape (S, Hk, D)
    value : ndarray, shape (S, Hk, Dv)
    problem : Problem
        That of all queries and keys, as if they were one sequence. Its `out_shape` is the packed result's, (T, H, Dv).
    queries, keys : list of slice
        Where the sequences lie.
    options : dict
        What was said of all of them, by the names of arguments of `fastattn.call.shapes.describe`.
    own : dict of str to ndarray
        What was said of each, with an axis of sequences in front.
    captured : Captures, or None
        What the user's functions capture.
    """

    query: Array
    key: Array
    value: Array
    problem: Problem
    queries: list[slice]
    keys: list[slice]
    options: dict[str, Any]
    own: dict[str, Array]
    captured: Captures | None

    def sequence(self, number: int, numbered: bool = True) -> tuple[Problem, Operands]:
        """Return a sequence, as a call of its own: one that knows its number, or else one like others of its kind."""
        queries, keys = self.queries[number], self.keys[number]
        arrays = heads_first(self.query[queries]), heads_first(self.key[keys]), heads_first(self.value[keys])
        options = self.options | {name: rows[number] for name, rows in self.own.items()}
        return describe(*arrays, None, **options, first_batch=number if numbered else 0)

    def upstream(self, number: int, of_all: Upstream) -> Upstream:
        """Return what arrives at a sequence of what arrives at all of them."""
        queries, grad_lse = self.queries[number], of_all.grad_lse
        own = of_all._replace(
            grad_out=heads_first(of_all.grad_out[queries]),
            out=heads_first(of_all.out[queries]),
            lse=heads_first(of_all.lse[queries]),
            grad_lse=None if grad_lse is None else heads_first(grad_lse[queries]),
        )
        return split_upstream(replace(self.problem, queries=queries.stop - queries.start), own)

    def kinds(self) -> list[list[int]]:
        """Return the numbers of the sequences, those together that differ by their number, and place, alone."""
        found = defaultdict(list)
        for number, (queries, keys) in enumerate(zip(self.queries, self.keys, strict=True)):
            own = tuple(rows[number].tobytes() for rows in self.own.values())
            name = number if self.is_asked_numbers else 0
            found[(queries.stop - queries.start, keys.stop - keys.start, own, name)].append(number)
        return list(found.values())

    @property
    def is_asked_numbers(self) -> bool:
        """Whether functions of the user's ask for the numbers of sequences."""
        functions = self.problem.scores.score_mod, self.problem.scores.mask_mod
        return any(function is not None and "batch" in function.reads for function in functions)


def heads_first(array: Array) -> Array:
    """Return a view of a packed array with the axes of attention's: (heads, length, ...)."""
    return array.swapaxes(0, 1)


def describe_packed(
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None,
    dropout_p: Number,
    is_causal: Causal,
    scale: Number | None,
    enable_gqa: bool,
    further: Mapping[str, Any],
) -> Packed:
    """Work out what a call of packed sequences computes.

    Parameters
    ----------
    query, key, value : ndarray
        As `fastattn.call.arrays.as_operands` returns them.
    cu_seqlens_q, cu_seqlens_k, dropout_p, is_causal, scale, enable_gqa, further
        As the user gave them.

    Raises
    ------
    ValueError, TypeError
        As `fastattn.call.shapes.describe`, and where sequences are not what lies on the axes.
    """
    _check_shapes(query, key, value, enable_gqa)
    starts = as_starts("cu_seqlens_q", cu_seqlens_q, "query", len(query))
    if cu_seqlens_k is not None:
        key_starts = as_starts("cu_seqlens_k", cu_seqlens_k, "key", len(key))
        if len(key_starts) != len(starts):
            raise ValueError(
                f"cu_seqlens_k: {len(key_starts)} numbers; expected {len(starts)}, as cu_seqlens_q has, a 0 and the "
                "end of each sequence"
            )
    elif len(key) == len(query):
        key_starts = starts
    else:
        raise ValueError(
            f"cu_seqlens_k: None, which means that it is cu_seqlens_q, whose last number is {len(query)}; expected one "
            f"that ends with {len(key)}, the length of key"
        )
    count = len(starts) - 1
    options: dict[str, Any] = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        **further,
    }
    own = {name: by_row(name, options.pop(name), count) for name in BY_ROW if has_rows(name, options.get(name))}
    first = {name: rows[0] for name, rows in own.items() if count}
    problem, operands = describe(heads_first(query), heads_first(key), heads_first(value), None, **options | first)
    packed = replace(problem, out_shape=(len(query), problem.heads, problem.value_dim))
    parts = slices(starts), slices(key_starts)
    return Packed(query, key, value, packed, *parts, options, own, operands.captured)


def sources_of_packed(query: Any, key: Any, value: Any, options: FurtherOptions) -> dict[str, Any]:
    """Return what gradients may be of, as it was given, by name; None for what a call has not got."""
    sources = sources_of(query, key, value, None, options)
    del sources["attn_mask"]  # which is no argument of packed sequences'
    return sources


def as_given(
    packed: Packed, names: Sequence[str], gradients: Mapping[str, Array], sources: Mapping[str, Any]
) -> tuple[Array, ...]:
    """Return the gradients with these names, each with the shape and the dtype of its argument.

    Parameters
    ----------
    packed : Packed
    names : sequence of str
    gradients : mapping of str to ndarray
        With the shapes of their arguments; of what has a number for each head, (B, Hq), of each sequence its own. These
        are summed in the order of the sequences, where they have them in common.
    sources : mapping of str
        The arguments, as they were given.
    """
    found = []
    for name in names:
        gradient = gradients[name]
        if name in OF_HEADS:
            gradient = summed_to(gradient, np.shape(sources[name]))
        found.append(own_dtype(gradient, sources[name], packed.problem.real))
    return tuple(found)


def _check_shapes(query: Array, key: Array, value: Array, enable_gqa: bool) -> None:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 3:
            raise ValueError(f"{name}: shape {array.shape}; expected (all lengths together, heads, features)")
    if value.shape[0] != key.shape[0]:
        raise ValueError(
            f"value: shape {value.shape}; expected length {len(key)} on axis 0, as key of shape {key.shape}"
        )
    queries = query.shape[1]
    for name, array in (("key", key), ("value", value)):
        heads = array.shape[1]
        if heads != queries and 1 not in (heads, queries) and not (enable_gqa and heads and queries % heads == 0):
            raise ValueError(
                f"{name}: shape {array.shape} has {heads} heads, and query of shape {query.shape} has {queries}; "
                f"expected {queries} or 1, or with enable_gqa=True a number that divides it"
            )


def as_starts(name: str, given: ArrayLike, of: str, length: int) -> Array:
    """Return where sequences begin, and the end of the last one."""
    starts = as_integers(name, given, "cumulative lengths")
    expected = (
        f"expected cumulative lengths: 0, then the end of each sequence, the last one {length}, the length of {of}"
    )
    if starts.ndim != 1 or not starts.size:
        raise ValueError(f"{name}: shape {starts.shape}; {expected}")
    starts = starts.astype(np.int64)
    if starts[0] != 0 or starts[-1] != length:
        raise ValueError(f"{name}: from {starts[0]} to {starts[-1]}; {expected}")
    falls = np.flatnonzero(np.diff(starts) < 0)
    if falls.size:
        raise ValueError(f"{name}: {starts[falls[0]]} before {starts[falls[0] + 1]}; {expected}")
    return starts


def slices(starts: Array) -> list[slice]:
    ends: list[int] = starts.tolist()
    return list(map(slice, ends[:-1], ends[1:]))


def has_rows(name: str, given: Any) -> bool:
    """Whether there is something in an option for each row of a batch."""
    return given is not None and not isinstance(given, int) and as_array(name, given).ndim > BY_ROW[name]


def by_row(name: str, given: Any, count: int) -> Array:
    """Return an array with something for each of so many sequences."""
    rows = as_array(name, given)
    shape: Shape = (count, *rows.shape[1:])
    if rows.ndim != BY_ROW[name] + 1 or rows.shape[0] not in (1, count):
        raise ValueError(f"{name}: shape {rows.shape}; expected ({count}, ...), with something for each sequence")
    return np.broadcast_to(rows, shape)
