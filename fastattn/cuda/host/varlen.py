"""Packed sequences on the device: a call for each of them, on views of what lies there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fastattn.call.arrays import as_operands, as_upstream
from fastattn.call.halves import name_of
from fastattn.call.options import check_flag
from fastattn.call.out import check_out
from fastattn.call.packed import Packed, describe_packed, sources_of_packed
from fastattn.call.problem import Array, Problem
from fastattn.call.score_options import FurtherOptions
from fastattn.call.seeds import seed_from
from fastattn.call.shapes import split_shape
from fastattn.call.upstream import (
    OF_HEADS,
    Names,
    captured_sources,
    own_dtype,
    seed_of_forward,
    wanted_gradients,
)
from fastattn.call.upstream import arrived as describe_arrived
from fastattn.cuda.host.arguments import carriers_of, common_storage, read_arrays
from fastattn.cuda.host.arrays import Given, HostPlace, Place, check_together, on_host, place_of, read, settle
from fastattn.cuda.host.attention import Call, check_device_out, copy, evaluate, overlap
from fastattn.cuda.host.backward import differentiate, members_of, queue_sums, storage_of
from fastattn.cuda.host.captured_gradient import parts_among
from fastattn.cuda.host.functions import captured
from fastattn.cuda.kernels.elements import real_of


class Whole(NamedTuple):
    """A call of packed sequences, checked, whose arrays are on the device or about to be moved there.

    Attributes
    ----------
    packed : Packed
        Of views without memory.
    storage : str
    arrays : dict of str to (ndarray or Given)
        By the names of the arguments.
    on_device : bool
    further : dict of str
        What was said of scores by keyword, in host memory.
    """

    packed: Packed
    storage: str
    arrays: dict[str, Any]
    on_device: bool
    further: FurtherOptions

    def moved(self, others: dict[str, Any]) -> tuple[Packed, Place, dict[str, Given]]:
        """The call as it lies on the device, where its results come to be, and all arrays there, others as well."""
        arrays = {**self.arrays, **others}
        if self.on_device:
            return self.packed, place_of(arrays), arrays
        place = HostPlace({name_of(array.dtype): array.dtype for array in arrays.values()})
        with place.active():
            givens = {name: place.move(name, array) for name, array in arrays.items()}
        carriers = carriers_of({name: givens[name] for name in self.arrays}, self.storage)
        return replace(self.packed, **carriers), place, givens


def described(
    arrays: tuple[Any, ...], lengths: tuple[Any, ...], options: dict[str, Any], others: dict[str, Any]
) -> Whole:
    """Read and check the arguments of a call; `others` are arrays that have to be where these are."""
    given = dict(zip(("query", "key", "value"), arrays, strict=True))
    on_device = check_together({**given, **others})
    further = {name: on_host(option) for name, option in options["further"].items()}
    if on_device:
        givens: Any = read_arrays(given)
        storage = common_storage(givens)
        carriers = carriers_of(givens, storage)
    else:
        givens = dict(zip(given, as_operands(arrays[0], arrays[1], arrays[2])[:3], strict=True))
        storage = name_of(givens["query"].dtype)
        real = real_of(storage)
        carriers = {name: np.broadcast_to(np.empty((), real), array.shape) for name, array in givens.items()}
    packed = describe_packed(*carriers.values(), *map(on_host, lengths), **options | {"further": further})
    return Whole(packed, storage, givens, on_device, cast("FurtherOptions", further))


def attention(
    arrays: tuple[Any, ...], lengths: tuple[Any, ...], options: dict[str, Any], return_lse: bool, rng: Any, out: Any
) -> Any:
    """Compute what `fastattn.attention_varlen` is asked for, on the device; the arguments are the user's."""
    call = described(arrays, lengths, options, {"out": out})
    problem = call.packed.problem
    return_lse, seed = check_flag("return_lse", return_lse), seed_from(rng, problem.dropout_p > 0)
    target: Any = None
    if out is not None and call.on_device:
        target = check_device_out(out, problem, call.storage, call.arrays["query"])
    elif out is not None:
        dtype = call.arrays["query"].dtype  # what kernels write
        check_out(out, replace(problem, storage=dtype, real=dtype))
    packed, place, givens = call.moved({} if target is None else {"out": target})
    with place.active(), captured(packed.problem, packed.captured, place) as words:
        apart = target is None or any(overlap(target, givens[name]) for name in ("query", "key", "value"))
        result = place.new("out", problem.out_shape, call.storage) if apart else target
        lse = place.new("lse", problem.lse_shape, problem.real.name)
        for number, queries in enumerate(packed.queries):
            one = sequence(packed, number, call.storage, place, givens)._replace(captured=words)
            _, sums, _ = evaluate(one, seed, part(result, queries), False)
            copy(sums, part(lse, queries), place)
        if target is not None and apart:
            copy(result, target, place)
        settle(givens, place)
        first = place.deliver(result) if target is None else out
        if out is not None and target is None:
            np.copyto(out, first)
            first = out
        return (first, place.deliver(lse)) if return_lse else first


def backward(
    arrays: tuple[Any, ...],
    arrived: dict[str, Any],
    lengths: tuple[Any, ...],
    options: dict[str, Any],
    rng: Any,
    grads: Names,
) -> tuple[Any, ...]:
    """Compute what `fastattn.attention_varlen_backward` is asked for, on the device; the arguments are the user's."""
    arrived = {name: array for name, array in arrived.items() if array is not None}
    call = described(arrays, lengths, options, arrived)
    problem = call.packed.problem
    query, key, value = arrays
    arrays_captured = captured_sources(problem, call.packed.captured)
    sources = sources_of_packed(query, key, value, call.further) | arrays_captured
    names = wanted_gradients(grads, sources)
    seed = seed_of_forward(rng, problem)
    packed, place, givens = call.moved(_upstream(call, arrived))
    of_heads = [name for name in names if name in OF_HEADS]
    count, heads = len(packed.queries), problem.heads
    with place.active(), captured(packed.problem, packed.captured, place) as words:
        results = {name: place.new(f"gradient of {name}", givens[name].shape, call.storage) for name in call.arrays}
        parts = {name: place.new(f"parts of {name}", (count, heads), "float64") for name in of_heads}
        captured_parts = parts_among(names, arrays_captured, place)
        for number, (queries, keys) in enumerate(zip(packed.queries, packed.keys, strict=True)):
            others = {name: part(givens[name], queries) for name in arrived}
            one = sequence(packed, number, call.storage, place, givens)._replace(captured=words)
            zeros = dict.fromkeys(of_heads, np.zeros(heads))
            found = differentiate(one, others, seed, of_heads, zeros, captured_parts)
            for name, rows in (("query", queries), ("key", keys), ("value", keys)):
                copy(found[name], part(results[name], rows), place)
            for name, own in parts.items():
                copy(_as_row(found[name]), _row(own, number), place)
        for name, own in parts.items():
            results[name] = _summed(name, own, sources[name], problem, place)
        results |= {each.name: each.sums(place) for each in captured_parts}
        settle(givens, place)
        gradients = {name: place.deliver(results[name]) for name in names}
    if call.on_device:
        return tuple(gradients.values())
    return tuple(own_dtype(each, sources[name], problem.real) for name, each in gradients.items())


def _as_row(numbers: Given) -> Given:
    """Numbers of heads, with an axis in front."""
    return numbers._replace(shape=(1, *numbers.shape), strides=(0, *numbers.strides))


def _row(numbers: Given, number: int) -> Given:
    """Those of one sequence among those of all, with that axis."""
    step = numbers.strides[0]
    return numbers._replace(address=numbers.address + number * step * numbers.itemsize, shape=(1, numbers.shape[1]))


def _summed(name: str, parts: Given, argument: Any, problem: Problem, place: Place) -> Given:
    """Queue the sums over sequences that share numbers, in their order; the gradient, in the shape of the argument."""
    shape = np.shape(argument)
    result = place.new(f"gradient of {name}", shape, storage_of(argument, problem))
    of_sequences = replace(problem, batch=parts.shape[:1])
    queue_sums(parts, members_of(split_shape((*shape, 1, 1), of_sequences), of_sequences), 1, result, place)
    return result


def _upstream(call: Whole, arrived: dict[str, Any]) -> dict[str, Any]:
    """What arrives at the backward pass, checked."""
    problem = call.packed.problem
    if not call.on_device:
        dtype = call.arrays["query"].dtype
        made: dict[str, Array] = {}
        for name, array in arrived.items():
            of_result = name in ("grad_out", "out")
            shape, of = (problem.out_shape, "the result") if of_result else (problem.lse_shape, "the log-sum-exp")
            made[name] = as_upstream(name, array, dtype if of_result else problem.real, shape, of)
        return made
    givens = {name: read(name, array) for name, array in arrived.items()}
    for name, given in givens.items():
        wanted = call.storage if name in ("grad_out", "out") else problem.real.name
        if given.storage != wanted:
            raise TypeError(f"{name}: dtype {given.storage}; expected {wanted}, with a query of dtype {call.storage}")
    carriers: dict[str, NDArray[Any]] = {name: given.carrier(problem.real) for name, given in givens.items()}
    describe_arrived(problem, **carriers)  # for shapes that do not fit
    return givens


def sequence(packed: Packed, number: int, storage: str, place: Place, givens: dict[str, Given]) -> Call:
    """A sequence, as a call of its own."""
    numbered = packed.problem.dropout_p > 0 or packed.is_asked_numbers
    problem, operands = packed.sequence(number, numbered)
    queries, keys = packed.queries[number], packed.keys[number]
    parts = {"query": queries, "key": keys, "value": keys}
    return Call(problem, place, storage, operands, {name: part(givens[name], parts[name]) for name in parts})


def part(given: Given, rows: slice) -> Given:
    """A sequence of a packed array, with the axes of attention's."""
    _, heads, *features = given.shape
    step, across, *along = given.strides
    return given._replace(
        address=given.address + rows.start * step * given.itemsize,
        shape=(heads, rows.stop - rows.start, *features),
        strides=(across, step, *along),
    )
