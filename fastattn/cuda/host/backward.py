"""The CUDA backend's host side of the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fastattn.call.arrays import as_upstream
from fastattn.call.halves import name_of
from fastattn.call.problem import Problem, Shape
from fastattn.call.rounding import slack
from fastattn.call.score_options import FurtherOptions
from fastattn.call.shapes import split_shape
from fastattn.call.types import Causal, Number
from fastattn.call.upstream import (
    OF_HEADS,
    Names,
    Upstream,
    captured_sources,
    describe_upstream,
    own_dtype,
    seed_of_forward,
    sources_of,
    wanted_gradients,
)
from fastattn.cuda.available import SIMULATED, device
from fastattn.cuda.host import tensor_cores_backward
from fastattn.cuda.host.arguments import (
    KEEP,
    Options,
    carriers_of,
    checked,
    common_storage,
    described,
    named,
    options_of,
    read_arrays,
)
from fastattn.cuda.host.arrays import Given, HostPlace, Place, check_together, nothing, place_of, read, settle
from fastattn.cuda.host.attention import (
    ALIGNMENT,
    REMEMBERED,
    Call,
    captured_of,
    copied,
    has_rows,
    keep_of,
    mask_of,
    masks_in,
    moved,
    new_numbers,
    of_heads,
    queue_shifts,
    scale_of,
    uploaded,
    with_rows,
)
from fastattn.cuda.host.captured_gradient import Parts, parts_among
from fastattn.cuda.host.choice import kind_of, wants_rows
from fastattn.cuda.host.compile import kernel, launch, table
from fastattn.cuda.host.functions import captured
from fastattn.cuda.host.plan import is_extreme, make_table, own_of, slices_of
from fastattn.cuda.host.tensor_cores import block_of, grid_of
from fastattn.cuda.kernels import deltas, head_gradients
from fastattn.cuda.kernels import portable_backward as portable
from fastattn.cuda.kernels import tensor_cores_backward as on_tensor_cores
from fastattn.cuda.kernels.backward_tiles import Backward, Tiling
from fastattn.cuda.kernels.elements import STORAGE
from fastattn.cuda.kernels.plan import (
    GRAD_LSE,
    GRAD_OUT,
    KEY,
    LSE,
    NUMBERS,
    OUT,
    QUERY,
    VALUE,
)

__all__ = ["attention_backward", "tiling_for"]

ARGUMENTS = {"query": False, "key": True, "value": True, "attn_mask": False}  # and whether groups of heads share it
SMALL = Tiling(side=2, rows=2, columns=2, depth=2)  # for the simulator
SUM_THREADS = 4 if SIMULATED else 128  # of a block that sums numbers of rows
_plans: dict[Any, Plan] = {}


class Plan(NamedTuple):
    """What calls of the same shapes, strides and options share, on the device.

    Attributes
    ----------
    tables : tuple
        Those of `fastattn.cuda.kernels.plan` that all kernels have.
    own : array
        The one that only the portable kernels have.
    members : dict of str
        For each argument the slices that share it, shape (its own slices, slices that share one).
    owners : dict of str to int
        How many slices of its own each argument has.
    same_members : bool
        Whether the same slices share key and value.
    against : str or None
        What speaks against tensor cores.
    """

    tables: tuple[Any, Any, Any]
    own: Any
    members: dict[str, Any]
    owners: dict[str, int]
    same_members: bool
    against: str | None


def tiling_for(storage: str, problem: Problem) -> Tiling:
    """How blocks divide the work: 64 x 64 scores with 256 threads of 4 x 4; in float64 32 x 32, of 2 x 2.

    A thread has four columns of a gradient or, where this saves computing the weights again for others, eight: not
    with dropout, whose random words need registers as well.
    """
    if SIMULATED:
        return SMALL
    if storage == "float64" or is_extreme(problem):
        return Tiling(side=16, rows=2, columns=4, depth=8)
    many = max(problem.head_dim, problem.value_dim) > 64 and problem.dropout_p == 0
    return Tiling(side=16, rows=4, columns=8 if many else 4, depth=8)


def attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    attn_mask: Any,
    dropout_p: Number,
    is_causal: Causal,
    scale: Number | None,
    enable_gqa: bool,
    rng: Any,
    grad_lse: Any,
    grad_mask: bool,
    grads: Names,
    **further: Any,
) -> tuple[Any, ...]:
    """Compute what `fastattn.attention_backward` is asked for, on the device; the arguments are the user's."""
    options = options_of(dropout_p, is_causal, scale, enable_gqa, further)
    given = named(query, key, value, attn_mask)
    arrived = {"grad_out": grad_out, "out": out, "lse": lse, "grad_lse": grad_lse}
    if not check_together({**given, **arrived}):
        return _of_host_arrays(given, arrived, options, rng, grad_mask, grads)

    givens = read_arrays(given)
    storage = common_storage(givens)
    problem, operands = described(carriers_of(givens, storage), options)
    others = {name: read(name, array) for name, array in arrived.items() if array is not None}
    for name, array in others.items():
        wanted = storage if name in ("grad_out", "out") else problem.real.name
        if array.storage != wanted:
            raise TypeError(f"{name}: dtype {array.storage}; expected {wanted}, with a query of dtype {storage}")
    _described(problem, others)  # for shapes that do not fit
    sources = _sources(given, options) | captured_sources(problem, operands.captured)
    names = wanted_gradients(grads, sources, grad_mask, (operands.bias, operands.keep))
    seed = seed_of_forward(rng, problem)
    place = place_of({**givens, **others})
    with place.active(), captured(problem, operands.captured, place) as words:
        call = Call(problem, place, storage, operands, givens, words)
        found = gradients_of(call, others, seed, names, options)
        settle({**givens, **others}, place)
        return tuple(place.deliver(found[name]) for name in names)


def _of_host_arrays(
    given: dict[str, Any], arrived: dict[str, Any], options: Options, rng: Any, grad_mask: bool, grads: Names
) -> tuple[Any, ...]:
    """Compute the gradients of NumPy arrays: they are moved to the device, and the gradients back."""
    arrays, problem, functions = checked(given, options)
    dtype, mask = arrays["query"].dtype, arrays["attn_mask"]
    upstream = {}
    for name, array in arrived.items():
        if array is not None:
            of_result = name in ("grad_out", "out")
            shape, of = (problem.out_shape, "the result") if of_result else (problem.lse_shape, "the log-sum-exp")
            upstream[name] = as_upstream(name, array, dtype if of_result else problem.real, shape, of)
    sources = _sources(given, options) | captured_sources(problem, functions)
    names = wanted_gradients(grads, sources, grad_mask, (mask, arrays.get(KEEP)) if KEEP in arrays else mask)
    seed = seed_of_forward(rng, problem)
    further = [np.asarray(sources[name]) for name in names if name not in ARGUMENTS]
    dtypes = {name_of(array.dtype): array.dtype for array in (*further, *arrays.values()) if array is not None}
    place = HostPlace(dtypes)
    with place.active():
        call = moved(arrays, options, place)
        others = {name: place.move(name, array) for name, array in upstream.items()}
        with captured(call.problem, call.operands.captured, place) as words:
            found = gradients_of(call._replace(captured=words), others, seed, names, options)
        gradients = {name: place.deliver(found[name]) for name in names}
    return tuple(own_dtype(gradient, sources[name], problem.real) for name, gradient in gradients.items())


def _sources(given: dict[str, Any], options: Options) -> dict[str, Any]:
    """What gradients may be of, by name, as it was given."""
    first = given["attn_mask"] if given.get(KEEP) is None or given["attn_mask"] is not None else given[KEEP]
    return sources_of(given["query"], given["key"], given["value"], first, cast("FurtherOptions", options))


def _described(problem: Problem, others: dict[str, Given]) -> Upstream:
    """Views without memory of what arrives, with the axes of the operands, their shapes checked."""
    grad_out, out, lse = (others[name].carrier(problem.real) for name in ("grad_out", "out", "lse"))
    grad_lse = others.get("grad_lse")
    return describe_upstream(problem, grad_out, out, lse, grad_lse and grad_lse.carrier(problem.real))


# -- the work ----------------------------------------------------------------------------------------------------------


def gradients_of(
    call: Call, others: dict[str, Given], seed: int, names: Sequence[str], options: Options
) -> dict[str, Given]:
    """Queue the work of a call; the gradients of query, key and value, and what else is among the names."""
    parts = parts_among(names, captured_sources(call.problem, call.operands.captured), call.place)
    found = differentiate(call, others, seed, names, options, parts)
    return found | {each.name: each.sums(call.place) for each in parts}


def differentiate(
    call: Call,
    others: dict[str, Given],
    seed: int,
    names: Sequence[str],
    options: Options,
    parts: Sequence[Parts] = (),
) -> dict[str, Given]:
    """The same but for what functions capture, whose gradients are added to parts."""
    call, others = in_rows(call, others)
    if call.captured is not None:
        call.captured.look(call.problem, call.operands, call.real)
    problem, place, givens = call.problem, call.place, call.givens
    with_mask, of_heads = "attn_mask" in names, [name for name in names if name in OF_HEADS]
    of_arrays = ("query", "key", "value", *(("attn_mask",) if with_mask else ()))
    results = {name: place.new(f"gradient of {name}", givens[name].shape, givens[name].storage) for name in of_arrays}
    plan = plan_of(call, others)
    if plan.against is None:
        numbers = queue_deltas(call, plan, others)
        queue_tensor_cores(call, plan, others, numbers, results)
    if plan.against is not None or with_mask:
        # the portable kernels sum the products of a score in an order of their own, and have their own numbers
        numbers = queue_deltas(call, plan, others)
        bound = slack(problem.real, problem.head_dim)
        queue_shifts(call, others["lse"], numbers, plan.tables, plan.own, base_2=False, slack=bound)
    if plan.against is not None:
        queue_portable(call, plan, others, numbers, results, seed)
    if with_mask:
        queue_mask(call, plan, others, numbers, results["attn_mask"], seed)
    for name in of_heads:  # which tensor cores know nothing of
        results[name] = queue_head_gradient(call, plan, others, numbers, name, options[name], seed)
    for each in parts:
        queue_captured(call, plan, others, numbers, each, seed)
    return results


def in_rows(call: Call, others: dict[str, Given]) -> tuple[Call, dict[str, Given]]:
    """The call with copies of what tensor cores would read, where its rows do not lie as they need it."""
    if not wants_rows(call.storage, call.mask, call.problem, device().capability):
        return call, others
    grad_out = others["grad_out"]
    if not has_rows(grad_out):
        others = {**others, "grad_out": copied("grad_out", grad_out, call.place)}
    return with_rows(call), others


def queue_deltas(call: Call, plan: Plan, others: dict[str, Given]) -> Given:
    """Queue the deltas; the numbers of all queries, in which SHIFT and REST are still to be written."""
    tiling, with_lse, numbers = tiling_for(call.storage, call.problem), "grad_lse" in others, new_numbers(call)
    # whether there is a mask, or dropout, does not matter here: one kernel serves all
    spec = Backward(call.storage, "none", False, tiling, extreme=is_extreme(call.problem))
    grad_lse = others["grad_lse"].memory() if with_lse else nothing(call.problem.real.type)
    arrived = (others["grad_out"].memory(), others["out"].memory(), grad_lse, with_lse)
    arguments = (*arrived, *plan.tables, numbers.memory())
    _queue(call, deltas.find_deltas, spec, -(-numbers.shape[0] // (NUMBERS * tiling.side)), arguments)
    return numbers


def _queue(call: Call, factory: Any, spec: Backward, blocks: int, arguments: tuple[Any, ...]) -> None:
    if blocks:
        launch(kernel(factory, spec), blocks, (spec.tiling.side, spec.tiling.side), call.place.stream, arguments)


def _common(
    call: Call, plan: Plan, others: dict[str, Given], numbers: Given, name: str, seed: int
) -> tuple[Backward, tuple[Any, ...]]:
    """The specification of the portable kernels, and the arguments that they have in common."""
    problem, givens = call.problem, call.givens
    tiling = tiling_for(call.storage, problem)
    spec = Backward(call.storage, call.mask, problem.dropout_p > 0, tiling, **kind_of(problem))
    arrays = (*(givens[operand].memory() for operand in ("query", "key", "value")), mask_of(call))
    arrived = (others["grad_out"].memory(), numbers.memory())
    options = (scale_of(call), np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32), call.real(problem.keep_scale))
    last = (keep_of(call), plan.own, captured_of(call))
    return spec, (*arrays, *arrived, *plan.tables, plan.members[name], *options, *last)


def queue_portable(
    call: Call, plan: Plan, others: dict[str, Given], numbers: Given, results: dict[str, Given], seed: int
) -> None:
    """Queue the gradients of query, key and value."""
    problem = call.problem
    tiling = tiling_for(call.storage, problem)
    query, key, value = (results[name].memory() for name in ("query", "key", "value"))

    def blocks(name: str, length: int, chunks: int) -> int:
        return chunks * -(-length // tiling.tile) * plan.owners[name]

    def chunks(name: str) -> int:
        return -(-results[name].shape[-1] // tiling.features)

    spec, common = _common(call, plan, others, numbers, "query", seed)
    own = chunks("query")
    _queue(call, portable.grad_queries, spec, blocks("query", problem.queries, own), (*common, own, query))
    if plan.same_members:
        spec, common = _common(call, plan, others, numbers, "key", seed)
        own = max(chunks("key"), chunks("value"))
        _queue(call, portable.grad_keys, spec, blocks("key", problem.keys, own), (*common, own, key, value))
        return
    for name in ("key", "value"):
        spec, common = _common(call, plan, others, numbers, name, seed)
        spec, own = spec._replace(key=name == "key", value=name == "value"), chunks(name)
        _queue(call, portable.grad_keys, spec, blocks(name, problem.keys, own), (*common, own, key, value))


def queue_mask(call: Call, plan: Plan, others: dict[str, Given], numbers: Given, result: Given, seed: int) -> None:
    """Queue the gradient of the mask."""
    spec, common = _common(call, plan, others, numbers, "attn_mask", seed)
    queries, keys = split_shape(call.givens["attn_mask"].shape, call.problem)[-2:]
    blocks = -(-queries // spec.tiling.tile) * -(-keys // spec.tiling.tile) * plan.owners["attn_mask"]
    _queue(call, portable.grad_mask, spec, blocks, (*common, queries, keys, result.memory()))


def queue_head_gradient(
    call: Call, plan: Plan, others: dict[str, Given], numbers: Given, name: str, argument: Any, seed: int
) -> Given:
    """Queue the gradient of an argument that has a number for each head, and return it."""
    problem, place, shape = call.problem, call.place, np.shape(argument)
    members = members_of(split_shape((*shape, 1, 1), problem), problem)
    count = slices_of(problem) * problem.queries
    rows = place.new(f"parts of {name}", (count,), np.dtype(call.real).name)
    result = place.new(f"gradient of {name}", shape, storage_of(argument, problem))
    if name == "sinks":
        made = kernel(head_gradients.sink_rows, head_gradients.Rows(call.storage, is_extreme(problem)))
        arguments: tuple[Any, ...] = (numbers.memory(), plan.own, plan.tables[2], rows.memory())
        if count:
            launch(made, -(-count // SUM_THREADS), (SUM_THREADS, 1), place.stream, arguments)
    else:
        spec, common = _common(call, plan, others, numbers, "query", seed)
        blocks = slices_of(problem) * -(-problem.queries // spec.tiling.tile)
        _queue(call, portable.slope_rows, spec, blocks, (*common, rows.memory()))
    queue_sums(rows, members, problem.queries, result, place)
    return result


def queue_captured(call: Call, plan: Plan, others: dict[str, Given], numbers: Given, parts: Parts, seed: int) -> None:
    """Queue what a captured array gets, which is added to the parts of its gradient."""
    spec, common = _common(call, plan, others, numbers, "query", seed)
    for by in parts.reads(call.problem, call.real):
        arguments = (*common, parts.elements, parts.fresh, parts.memory.memory())
        _queue(call, portable.captured_parts, differentiating(spec, by), parts.count, arguments)
        parts.fresh = False


def differentiating(spec: Backward, by: tuple[int, int]) -> Backward:
    """The specification of what differentiates by a captured array: 2 x 2 scores a thread leave registers for it."""
    return spec._replace(by=by, tiling=spec.tiling._replace(rows=2))


def storage_of(argument: Any, problem: Problem) -> str:
    """What the gradient of an argument that has a number for each head is stored in."""
    kind = name_of(np.asarray(argument).dtype)
    return kind if kind in STORAGE else problem.real.name


def queue_sums(rows: Given, members: NDArray[np.int64], length: int, result: Given, place: Place) -> None:
    """Queue sums over the rows, so many for each slice, of the slices that share a number of the result."""
    if len(members):
        made = kernel(head_gradients.sum_rows, head_gradients.Sums(result.storage, SUM_THREADS))
        arguments = (rows.memory(), table(members, place.device), length, result.memory())
        launch(made, len(members), (SUM_THREADS, 1), place.stream, arguments)


def queue_tensor_cores(
    call: Call, plan: Plan, others: dict[str, Given], numbers: Given, results: dict[str, Given]
) -> None:
    """Queue the gradients of query, key and value on tensor cores."""
    problem, place, givens = call.problem, call.place, call.givens
    width = max(problem.head_dim, problem.value_dim)
    query, key, value = (givens[name].memory() for name in ("query", "key", "value"))
    grad_out = others["grad_out"].memory()
    queue_tensor_core_shifts(call, plan, others["lse"], numbers)
    for name, length, operands, written in (
        ("query", problem.queries, (query, grad_out, key, value), ("query", "query")),
        ("key", problem.keys, (key, value, query, grad_out), ("key", "value")),
    ):
        spec = tensor_cores_backward.spec_for(call.storage, call.mask, width, of_keys=name == "key")
        blocks = -(-length // spec.shape.queries) * plan.owners[name]
        tables, scales = (*plan.tables, plan.members[name]), (scale_of(call, not spec.shape.floating), scale_of(call))
        arguments = (*operands, mask_of(call), numbers.memory(), *tables, *scales)
        gradients = (results[target].memory() for target in written)
        made = kernel(on_tensor_cores.gradients, spec, **tensor_cores_backward.options(spec))
        if blocks:
            launch(made, blocks, block_of(spec.shape), place.stream, (*arguments, *gradients))


def queue_tensor_core_shifts(call: Call, plan: Plan, lse: Given, numbers: Given) -> None:
    """Queue SHIFT and REST as the kernels on tensor cores want them."""
    problem, givens = call.problem, call.givens
    width = max(problem.head_dim, problem.value_dim)
    spec = tensor_cores_backward.spec_for(call.storage, call.mask, width, of_keys=False)
    shape = spec.shape
    arrays = (givens["query"].memory(), givens["key"].memory(), mask_of(call), lse.memory(), numbers.memory())
    options = (scale_of(call, not shape.floating), call.real(slack(problem.real, problem.head_dim)))
    made = kernel(on_tensor_cores.find_shifts, spec, **tensor_cores_backward.options(spec))
    blocks = grid_of(shape, problem)
    if blocks:
        launch(made, blocks, block_of(shape), call.place.stream, (*arrays, *plan.tables, *options))


def plan_of(call: Call, others: dict[str, Given]) -> Plan:
    """Plan a call, or find the plan of one like it."""
    problem, place, givens = call.problem, call.place, call.givens
    arrays = {**givens, **others}
    layout = tuple((name, array.layout, array.extent[0] % ALIGNMENT) for name, array in arrays.items())
    identity = (problem, call.storage, call.mask, place.device, layout)
    plan = _plans.get(identity)
    if plan is None:
        upstream = _described(problem, others)
        views = [
            (QUERY, call.operands.query, givens["query"]),
            (KEY, call.operands.key, givens["key"]),
            (VALUE, call.operands.value, givens["value"]),
            (GRAD_OUT, upstream.grad_out, others["grad_out"]),
            (OUT, upstream.out, others["out"]),
            (LSE, upstream.lse[..., None], others["lse"]),
        ]
        views += [(row, mask, givens[name]) for row, mask, name in masks_in(call.operands)]
        if upstream.grad_lse is not None:
            views.append((GRAD_LSE, upstream.grad_lse[..., None], others["grad_lse"]))
        tables = make_table(problem, [(row, view, array.span[0]) for row, view, array in views])
        members = {
            name: members_of(split_shape(array.shape, problem, ARGUMENTS[name]), problem)
            for name, array in givens.items()
            if name != KEEP
        }
        same_members = np.array_equal(members["key"], members["value"])
        addresses = tuple(arrays[name].extent[0] for name in ("query", "key", "value", "grad_out"))
        against = tensor_cores_backward.against(
            call.storage, call.mask, problem, tables, addresses, device().capability
        )
        if against is None and not (same_members and members["query"].shape[1] == 1):
            against = "axes along which key or value alone is broadcast, or query"
        if against is None and members["key"].size == 0:
            against = "an empty batch"
        plan = Plan(
            uploaded(tables, place),
            table(own_of(problem, call.real, base_2=False), place.device),
            {name: table(array, place.device) for name, array in members.items()},
            {name: array.shape[0] for name, array in members.items()},
            same_members,
            against,
        )
        if len(_plans) >= REMEMBERED:
            _plans.clear()
        _plans[identity] = plan
    return plan._replace(**of_heads(call, plan.tables, base_2=False))


def members_of(split: Shape, problem: Problem) -> NDArray[np.int64]:
    """Which slices share each slice of an argument whose shape, with the head axis split, is `split`.

    Rows stand in the order of the argument's own slices in memory, if that is contiguous.
    """
    lead = problem.rows_shape
    own = sorted(len(lead) - i for i, size in enumerate(reversed(split[:-2]), 1) if size != 1)
    rest = [axis for axis in range(len(lead)) if axis not in own]
    owners = int(np.prod([lead[axis] for axis in own], dtype=np.int64))
    sharing = int(np.prod([lead[axis] for axis in rest], dtype=np.int64))
    slices = np.arange(slices_of(problem), dtype=np.int64).reshape(lead)
    return np.ascontiguousarray(slices.transpose(own + rest).reshape(owners, sharing))
