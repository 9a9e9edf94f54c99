"""From arguments of `fastattn.integrations.dask` to a graph: what is computed of which chunks, and merged how."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import product
from operator import getitem
from typing import Any, TypeAlias

import dask
import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from fastattn.call.advice import said
from fastattn.call.arrays import as_array, as_masks, as_operands, as_upstream, check_operand, is_pair
from fastattn.call.halves import cast, is_floating, native, real_of
from fastattn.call.positions import Whole
from fastattn.call.problem import Array, Mask, Shape
from fastattn.call.score_options import FurtherOptions
from fastattn.call.seeds import Rng, seed_from
from fastattn.call.shapes import describe
from fastattn.call.upstream import Names, captured_sources, seed_of_forward, sources_of, wanted_gradients
from fastattn.integrations.grid import Cut, Index, Place, grid_of, sees
from fastattn.integrations.tasks import Call, attended, differentiated, finished, merged, summed

__all__ = ["Plan", "differentiate", "forward"]

#: A dask.array.Array: Dask's types are not known where it is not installed.
Chunked: TypeAlias = Any
Key: TypeAlias = Hashable
#: Tasks by keys, as tuples of a function and its arguments, keys of others among them.
Layer: TypeAlias = dict[Key, Any]

#: Options that are arrays of a number for each row of the batch or each head.
SMALL = ("query_offset", "key_lengths", "alibi_slopes", "sinks")


class Plan:
    """A call, checked, whose arrays are cut along one grid.

    Attributes
    ----------
    problem : Problem
        Of the whole, as if it were one.
    grid : Grid
    split_every : int
        How many results one task merges.
    arrays : dict of str to dask.array.Array
        Operands and masks, and in a backward pass what arrives, those that there are, cut.
    mask : ndarray, pair of them, or None
        What attn_mask is, without memory.
    sources, captured : dict of str
        What gradients may be of, and of these what score_mod captures: arrays without memory, or as they were given.
    """

    def __init__(
        self,
        operands: dict[str, Any],
        attn_mask: Any,
        plain: tuple[Any, ...],
        further: FurtherOptions,
        split_every: int | None,
        num_threads: int,
    ) -> None:
        """Check a call, and cut its arrays; `plain` are dropout_p, is_causal, scale and enable_gqa as given."""
        if split_every is None:
            split_every = dask.config.get("split_every", 4)
        self.split_every, self._threads = _count("split_every", split_every, 2), _count("num_threads", num_threads, 1)
        operands = {name: _chunked(name, given) for name, given in operands.items()}
        for name, array in operands.items():
            check_operand(name, np.empty(1, array.dtype), array)
        masks, mask = _masks(attn_mask)
        self.mask: Any = mask
        _check_small(further)
        query, key, value = (_hollow(array) for array in operands.values())
        self.problem, views = describe(*as_operands(query, key, value)[:3], mask, *plain, **further)
        self._heads, self._blocks = views.heads, further["block_mask"]
        self.captured = captured_sources(self.problem, views.captured)
        self.sources = sources_of(query, key, value, self.mask, further) | self.captured

        self._plain, self._whole = plain, Whole(query, self.problem.keys, None, plain[1], further)
        self._whole.check(self.problem)
        numbered = self.problem.dropout_p > 0 or self.problem.scores.has_functions
        self.grid = grid_of(self.problem, {name: array.chunks for name, array in operands.items()}, numbered)
        self.arrays: dict[str, Chunked] = {}
        self._add(operands | masks)

    def receive(self, **given: Any) -> None:
        """Take what arrives at a backward pass."""
        out, lse = self.problem.out_shape, self.problem.lse_shape
        shapes = {"grad_out": (out, "the result"), "out": (out, "the result")}
        arrays = {
            name: _chunked(name, array) for name, array in given.items() if array is not None or name != "grad_lse"
        }
        for name, array in arrays.items():
            as_upstream(name, _hollow(array), self.problem.real, *shapes.get(name, (lse, "the log-sum-exp")))
        self._add(arrays)

    def _add(self, arrays: dict[str, Chunked]) -> None:
        self.arrays |= {name: array.rechunk(self.grid.cut(name, array.shape).chunks) for name, array in arrays.items()}

    def call(self, seed: int) -> Call:
        """Return what all pieces are told."""
        problem, (dropout_p, _, scale, enable_gqa) = self.problem, self._plain
        options = self._whole.of_all()
        for name in SMALL:
            if options[name] is not None and not isinstance(options[name], int):
                option = as_array(name, options[name])
                options[name] = cast(option, real_of(option.dtype)) if is_floating(option.dtype) else option
        told = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa, "seed": seed}
        told["causal"] = self._whole.causal != "no"
        sizes = problem.head_dim, problem.value_dim, len(problem.out_shape)
        return Call(problem.storage, problem.real, *sizes, told, options, self._threads)

    def chunks(self, index: Index, *names: str) -> list[Key]:
        """Return the keys of the chunks of arrays with these names at a place of the grid; None for others."""
        return [self._chunk(name, index) if name in self.arrays else None for name in names]

    def _chunk(self, name: str, index: Index) -> Key:
        array = self.arrays[name]
        return (array.name, *self.grid.cut(name, array.shape).at(index))

    def cut_of_source(self, name: str) -> Cut:
        """Return how the gradient by an argument is cut; what score_mod captures is one chunk."""
        role = {"attn_mask": "bias"}.get(name, name)
        return self.grid.cut("" if name in self.captured else role, np.shape(self.sources[name]))

    def pieces(self, row: Index) -> Iterator[tuple[Index, Place]]:
        """Yield those with the queries of a row of the grid that see anything, in the order of keys."""
        for number in range(len(self.grid.chunks[-1])):
            place = self.grid.place((*row, number))
            if sees(place, self.problem, self._heads, self._blocks):
                yield (*row, number), place


# -- passes ------------------------------------------------------------------------------------------------------------


def forward(plan: Plan, rng: Rng | None, wanted: Sequence[str]) -> tuple[Chunked, ...]:
    """Return "out", the result, and "lse", the log-sum-exp, those that are wanted."""
    problem = plan.problem
    graph = _Graph("attention", plan, plan.call(seed_from(rng, problem.dropout_p > 0)))
    last: dict[Index, Key] = {}
    for row in plan.grid.rows():
        keys: list[Key] = []
        for index, place in plan.pieces(row):
            chunks = plan.chunks(index, "query", "key", "value", "bias", "keep")
            keys.append(graph.add("piece", index, attended, graph.call, place, not keys, *chunks))
        if not keys:
            keys = [graph.add("nothing", row, attended, graph.call, plan.grid.place(row), True, *[None] * 5)]
        last[row] = graph.tree("merged", row, keys, merged)

    kinds: dict[str, tuple[Shape, np.dtype[Any], Callable[[Key], Any]]] = {
        "out": (problem.out_shape, problem.storage, lambda key: (partial(finished, dtype=problem.storage), key)),
        "lse": (problem.lse_shape, problem.real, lambda key: (getitem, key, 1)),
    }
    results = []
    for name in wanted:
        shape, dtype, task = kinds[name]
        cut = plan.grid.cut(name, shape)
        results.append(graph.array(name, cut, dtype, {cut.at(row): task(key) for row, key in last.items()}))
    return tuple(results)


def differentiate(plan: Plan, rng: Rng | None, grad_mask: bool, grads: Names) -> tuple[Chunked, ...]:
    """Return the gradients that are wanted, once what arrives has been taken."""
    names = wanted_gradients(grads, plan.sources, grad_mask, plan.mask)
    graph = _Graph("gradient", plan, plan.call(seed_of_forward(rng, plan.problem)))
    cuts = {name: plan.cut_of_source(name) for name in names}
    parts: dict[str, dict[Index, list[Key]]] = {name: {} for name in names}

    def add(own: Sequence[str], index: Index, place: Place, operands: Sequence[str], masks: Sequence[str]) -> None:
        arrived = plan.chunks(index, "grad_out", "out", "lse", "grad_lse")
        chunks = (*arrived, *plan.chunks(index, *operands), *plan.chunks(index, *masks))
        piece = graph.add("piece", index, partial(differentiated, own), graph.call, place, *chunks)
        for name in own:
            part = graph.add(f"part-{name}", index, getitem, piece, name)
            parts[name].setdefault(cuts[name].at(index), []).append(part)

    for row in plan.grid.rows():
        own = names
        for index, place in plan.pieces(row):
            if own:
                add(own, index, place, ("query", "key", "value"), ("bias", "keep"))
            own = tuple(name for name in names if name != "sinks")  # they are in one piece of each query
        if "sinks" in own:
            add(("sinks",), row, plan.grid.place(row), ("",) * 3, ("",) * 2)

    totals = {
        name: {chunk: graph.tree(f"sum-{name}", chunk, keys, summed) for chunk, keys in found.items()}
        for name, found in parts.items()
    }
    return tuple(_gradient(plan, graph, name, cuts[name], totals[name]) for name in names)


def _gradient(plan: Plan, graph: _Graph, name: str, cut: Cut, totals: dict[Index, Key]) -> Chunked:
    """Return a gradient in the dtype of its argument: 0 where no piece has a part in it."""
    source = np.asarray(plan.sources[name])
    dtype = native(source.dtype) if is_floating(source.dtype) else plan.problem.real
    tasks: dict[Index, Any] = {}
    for chunk in product(*(range(len(lengths)) for lengths in cut.chunks)):
        shape = tuple(lengths[number] for lengths, number in zip(cut.chunks, chunk, strict=True))
        seen = chunk in totals
        tasks[chunk] = (partial(cast, dtype=dtype), totals[chunk]) if seen else (partial(np.zeros, shape, dtype),)
    return graph.array(f"of-{name}", cut, dtype, tasks)


class _Graph:
    """Tasks of a call that belong together, under names that are the same for the same call."""

    def __init__(self, kind: str, plan: Plan, call: Call) -> None:
        self._plan, self._kind = plan, kind
        self._token = tokenize(call, kind, *(array.name for array in plan.arrays.values()))
        self.call: Key = self._name("call")
        self._layer: Layer = {self.call: call}

    def _name(self, part: str) -> str:
        return f"{self._kind}-{part}-{self._token}"

    def add(self, part: str, index: Index, function: Callable[..., Any], *given: Any) -> Key:
        """Put a task into the graph, and return its key."""
        key = (self._name(part), *index)
        self._layer[key] = (function, *given)
        return key

    def tree(self, part: str, index: Index, keys: Sequence[Key], function: Callable[..., Any]) -> Key:
        """Put tasks into the graph that make one result of many, some at a time, and return the key of the last."""
        every, level = self._plan.split_every, 0
        while len(keys) > 1:
            some = [list(keys[i : i + every]) for i in range(0, len(keys), every)]
            keys = [
                self.add(part, (*index, level, number), function, each) if len(each) > 1 else each[0]
                for number, each in enumerate(some)
            ]
            level += 1
        return keys[0]

    def array(self, part: str, cut: Cut, dtype: np.dtype[Any], tasks: dict[Index, Any]) -> Chunked:
        """Return an array whose chunks are the results of tasks on what is in the graph."""
        name = self._name(part)
        arrays = list(self._plan.arrays.values())
        shared = HighLevelGraph.from_collections(self._name("pieces"), self._layer, dependencies=arrays)
        layers = {**shared.layers, name: {(name, *chunk): task for chunk, task in tasks.items()}}
        graph = HighLevelGraph(layers, {**shared.dependencies, name: {self._name("pieces")}})
        return da.Array(graph, name, cut.chunks, meta=np.empty((0,) * len(cut.chunks), dtype))


# -- checks ------------------------------------------------------------------------------------------------------------


def _chunked(name: str, given: Any) -> Chunked:
    """Return an argument as an array in chunks: one, if it is none of Dask's.

    Raises
    ------
    TypeError
        If it is something else of Dask's, or of an array of another kind than NumPy's.
    ValueError
        If the lengths of its chunks are not known.
    """
    if isinstance(given, da.Array):
        as_array(name, given._meta)
        if np.isnan(given.shape).any():
            raise ValueError(
                f"{name}: chunks of lengths that are not known, {given.chunks}; expected known ones, as "
                f"{name}.compute_chunk_sizes() finds them"
            )
        return given
    if any(map(dask.is_dask_collection, given if isinstance(given, (list, tuple)) else [given])):
        raise TypeError(f"{name}: {said(given)}; expected a dask.array.Array")
    array = as_array(name, given)
    return da.from_array(array, chunks=array.shape)


def _hollow(array: Chunked) -> Array:
    """Return an array of the same shape and dtype that has the memory of one number."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def _masks(given: Any) -> tuple[dict[str, Chunked], Mask]:
    """Return the masks of an argument, "bias" and "keep", those that there are, and all of it without memory."""
    if given is None:
        return {}, None
    both = given if is_pair(given) else (given,)
    masks = [None if mask is None else _chunked("attn_mask", mask) for mask in both]
    hollow: Any = tuple(None if mask is None else _hollow(mask) for mask in masks)
    mask = as_masks(hollow if len(both) == 2 else hollow[0])
    return {"keep" if each.dtype == bool else "bias": each for each in masks if each is not None}, mask


def _check_small(options: FurtherOptions) -> None:
    """Refuse options in chunks, by which it is decided what there is to compute."""
    for name in SMALL:
        given: Any = options[name]  # type: ignore[literal-required]
        if dask.is_dask_collection(given):
            raise TypeError(f"{name}: {said(given)}; expected an array in memory, such as {name}.compute()")


def _count(name: str, given: object, least: int) -> int:
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)):
        raise TypeError(f"{name}: {said(given)}; expected an int")
    if given < least:
        raise ValueError(f"{name}: {given}; expected {least} or more")
    return int(given)
