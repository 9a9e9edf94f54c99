"""The CUDA backend's host side: arrays to the device, a plan, kernels, and results to where they belong."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn.call.halves import name_of
from fastattn.call.options import check_flag
from fastattn.call.out import check_out, check_shape_of_out
from fastattn.call.problem import Operands, Problem
from fastattn.call.seeds import seed_from
from fastattn.call.types import Causal, Number
from fastattn.call.widening import scale_in_float64
from fastattn.cuda.available import capability_of
from fastattn.cuda.host import decode as decoding
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
from fastattn.cuda.host.choice import Choice, Facts, choose_forward, choose_shifts, choose_weights, wants_rows
from fastattn.cuda.host.compile import kernel, launch, table
from fastattn.cuda.host.functions import Words, captured
from fastattn.cuda.host.plan import Table, copy_table, is_extreme, make_table, own_of, sizes_of, slices_of
from fastattn.cuda.kernels import portable, tensor_cores
from fastattn.cuda.kernels.elements import LOG2_E, MASKS, real_of
from fastattn.cuda.kernels.plan import KEEP as KEEP_ROW
from fastattn.cuda.kernels.plan import KEY, LSE, MASK, NUMBERS, OUT, QUERY, VALUE
from fastattn.cuda.kernels.scores import in_base_2

REMEMBERED = 256  # plans
ALIGNMENT = 16  # bytes: what a kernel may ask of where arrays begin
THREADS, MAX_BLOCKS = 256, 65535  # of a kernel that copies
_plans: dict[Any, Plan] = {}
_tables: dict[Any, tuple[Any, Any, Any]] = {}


class Plan(NamedTuple):
    """What calls of the same shapes, strides and options share: the kernel, and tables on the device."""

    choice: Choice
    kernel: Any
    tables: tuple[Any, Any, Any]
    own: Any


class Call(NamedTuple):
    """The arguments of a call, on the device.

    Attributes
    ----------
    problem : Problem
    place : Place
        Where the results come to be.
    storage : str
        What query, key, value and the result are stored in.
    operands : Operands
        Views without memory, for their strides.
    givens : dict of str to Given
        By the names of the arguments.
    captured : Words or None
        What kernels are told of the user's functions.
    """

    problem: Problem
    place: Place
    storage: str
    operands: Operands
    givens: dict[str, Given]
    captured: Words | None = None

    @property
    def mask(self) -> str:
        """What the mask is stored in, "none" if there is none."""
        return self.givens["attn_mask"].storage if "attn_mask" in self.givens else "none"

    @property
    def real(self) -> Any:
        """The NumPy type of the arithmetic."""
        return real_of(self.storage, is_extreme(self.problem))

    @property
    def base_2(self) -> bool:
        """Whether scores are in base 2 in the forward pass of the portable kernels."""
        return in_base_2(self.problem.scores.adds, is_extreme(self.problem))


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Number,
    is_causal: Causal,
    scale: Number | None,
    enable_gqa: bool,
    return_lse: bool,
    return_weights: bool,
    rng: Any,
    out: Any,
    **further: Any,
) -> Any:
    """Compute what `fastattn.attention` is asked for, on the device; the arguments are the user's."""
    options = options_of(dropout_p, is_causal, scale, enable_gqa, further)
    given = named(query, key, value, attn_mask)
    if not check_together({**given, "out": out}):
        return _of_host_arrays(given, options, return_lse, return_weights, rng, out)

    givens = read_arrays(given)
    storage = common_storage(givens)
    problem, operands = described(carriers_of(givens, storage), options)
    return_lse, return_weights = check_flag("return_lse", return_lse), check_flag("return_weights", return_weights)
    seed = seed_from(rng, problem.dropout_p > 0)
    target = None if out is None else check_device_out(out, problem, storage, givens["query"])
    place = place_of(givens if target is None else {**givens, "out": target})
    with place.active(), captured(problem, operands.captured, place) as words:
        call = Call(problem, place, storage, operands, givens, words)
        result, lse, weights = evaluate(call, seed, target, return_weights)
        settle(givens, place)
        first = out if target is not None else place.deliver(result)
        return _asked_for(first, lse, weights, place, return_lse)


def _of_host_arrays(
    given: dict[str, Any],
    options: Options,
    return_lse: bool,
    return_weights: bool,
    rng: Any,
    out: Any,
) -> Any:
    """Compute attention of NumPy arrays: they are moved to the device, and the results back."""
    arrays, problem, _ = checked(given, options)
    dtype = arrays["query"].dtype
    return_lse, return_weights = check_flag("return_lse", return_lse), check_flag("return_weights", return_weights)
    seed = seed_from(rng, problem.dropout_p > 0)
    target = check_out(out, replace(problem, storage=dtype, real=dtype))
    place = HostPlace({name_of(dtype): dtype})
    with place.active():
        call = moved(arrays, options, place)
        with captured(call.problem, call.operands.captured, place) as words:
            result, lse, weights = evaluate(call._replace(captured=words), seed, None, return_weights)
        first = place.deliver(result)
        if target is not None:
            np.copyto(target, first)
            first = target
        return _asked_for(first, lse, weights, place, return_lse)


def _asked_for(first: Any, lse: Given, weights: Given | None, place: Place, return_lse: bool) -> Any:
    if not return_lse and weights is None:
        return first
    others = ((lse,) if return_lse else ()) + ((weights,) if weights is not None else ())
    return (first, *(place.deliver(array) for array in others))


# -- the arguments -----------------------------------------------------------------------------------------------------


def moved(arrays: dict[str, Any], options: Options, place: HostPlace) -> Call:
    """Move NumPy arrays to the device."""
    storage = name_of(arrays["query"].dtype)
    givens = {name: place.move(name, array) for name, array in arrays.items() if array is not None}
    problem, operands = described(carriers_of(givens, storage), options)
    return Call(problem, place, storage, operands, givens)


def check_device_out(out: Any, problem: Problem, storage: str, query: Given) -> Given:
    """Return `out`, read, if the result can be written there.

    Raises
    ------
    TypeError
        If it is not of the result's dtype.
    ValueError
        If it is not of the result's shape, read-only, on another device, or has elements that share memory.
    """
    target = read("out", out)
    if target.storage != storage:
        raise TypeError(f"out: dtype {target.storage}; expected {storage}, the dtype of the result")
    if not target.writeable:
        raise ValueError("out: the array is read-only; expected a writeable one")
    if target.device != query.device:
        raise ValueError(f"out: on device {target.device}; expected device {query.device}, as query is")
    check_shape_of_out(target.carrier(problem.real), problem)
    return target


# -- the work ----------------------------------------------------------------------------------------------------------


def evaluate(call: Call, seed: int, out: Given | None, want_weights: bool) -> tuple[Given, Given, Given | None]:
    """Queue the work of a call; the result, in `out` if given, the log-sum-exp, and the weights if wanted."""
    problem, place = call.problem, call.place
    inputs = call.givens.values()
    if call.captured is not None:
        call.captured.look(problem, call.operands, call.real)
    splits_keys = decoding.work_for(problem, call.storage, call.mask, aligned=True) is not None
    in_rows = not splits_keys and wants_rows(call.storage, call.mask, problem, capability_of(place.device))
    if in_rows:
        call = with_rows(call)
    result = out
    if result is None or any(overlap(result, array) for array in inputs) or (in_rows and not has_rows(result)):
        result = place.new("out", problem.out_shape, call.storage)
    lse = place.new("lse", problem.lse_shape, problem.real.name)
    if splits_keys:
        decoding.attend(call, result, lse, seed, functools.partial(_uploaded_tables, call, result))
    else:
        run(call, "forward", choose_forward, result, lse, seed)
    weights = None
    if want_weights:
        weights = place.new("weights", problem.weights_shape, call.storage)
        find_weights(call, weights, lse, seed)
    if out is not None and result is not out:
        copy(result, out, place)
        result = out
    return result, lse, weights


def overlap(one: Given, other: Given) -> bool:
    """Whether two arrays may share memory."""
    (start, end), (other_start, other_end) = one.extent, other.extent
    return start < other_end and other_start < end


def run(call: Call, kind: str, choose: Callable[[Facts], Choice], out: Given, lse: Given, seed: int) -> None:
    """Queue a kernel that reads the operands and writes `out`, a matrix for each slice."""
    problem, place, real, givens = call.problem, call.place, call.real, call.givens
    plan = plan_of(call, kind, choose, out)
    if plan.choice.grid == 0:
        return
    arguments = (
        *(givens[name].memory() for name in ("query", "key", "value")),
        mask_of(call),
        out.memory(),
        lse.memory(),
        *plan.tables,
        scale_of(call, call.base_2),
        real(problem.keep_scale),
        np.uint32(seed & 0xFFFFFFFF),
        np.uint32(seed >> 32),
    )
    if plan.choice.factory is not tensor_cores.forward:
        arguments = (*arguments, keep_of(call), plan.own, captured_of(call))
    launch(plan.kernel, plan.choice.grid, plan.choice.block, place.stream, arguments)


def find_weights(call: Call, weights: Given, lse: Given, seed: int) -> None:
    """Queue the matrix of weights, from the log-sum-exp of the same keys."""
    plan, numbers = plan_of(call, "weights", choose_weights, weights), new_numbers(call)
    queue_shifts(call, lse, numbers, plan.tables, plan.own, call.base_2, slack=math.inf)
    run(call, "weights", choose_weights, weights, numbers, seed)


def new_numbers(call: Call) -> Given:
    """Memory for the numbers of all queries: see `fastattn.cuda.kernels.plan`."""
    count = slices_of(call.problem) * call.problem.queries * NUMBERS
    return call.place.new("numbers of queries", (count,), np.dtype(call.real).name)


def queue_shifts(call: Call, lse: Given, numbers: Given, tables: Any, own: Any, base_2: bool, slack: float) -> None:
    """Queue the numbers of the portable kernels, but for deltas.

    A log-sum-exp that is coarse, and within `slack` of that of these keys, is of no other keys: see
    `fastattn.call.rounding`.
    """
    givens, choice = call.givens, choose_shifts(call.storage, call.mask, call.problem, base_2)
    arrays = (givens["query"].memory(), givens["key"].memory(), mask_of(call), lse.memory(), numbers.memory())
    if choice.grid:
        arguments = (*arrays, *tables, scale_of(call, base_2), call.real(slack), keep_of(call), own, captured_of(call))
        launch(kernel(choice.factory, choice.spec), choice.grid, choice.block, call.place.stream, arguments)


def mask_of(call: Call) -> Any:
    """The memory of the mask, or what stands for it where there is none."""
    return call.givens["attn_mask"].memory() if "attn_mask" in call.givens else nothing(MASKS["bool"])


def scale_of(call: Call, base_2: bool = False) -> Any:
    """The scale in the type of the arithmetic, with a factor log2(e) where scores are in base 2."""
    problem = call.problem
    scale = problem.scores.scale if problem.real == np.float64 else scale_in_float64(problem)
    return call.real(scale * (LOG2_E if base_2 else 1.0))


def keep_of(call: Call) -> Any:
    """The memory of the boolean mask beside a floating one, or what stands for it where there is none."""
    return call.givens[KEEP].memory() if KEEP in call.givens else nothing(MASKS["bool"])


def captured_of(call: Call) -> Any:
    """The words that tell of what functions capture, or what stands for them where there are no functions."""
    return nothing(np.int64) if call.captured is None else call.captured.memory


def plan_of(call: Call, kind: str, choose: Callable[[Facts], Choice], out: Given) -> Plan:
    """Plan a call, or find the plan of one like it."""
    problem, place = call.problem, call.place
    arrays = {**call.givens, "out": out}
    layout = tuple((name, given.layout, given.extent[0] % ALIGNMENT) for name, given in arrays.items())
    identity = (kind, problem, call.storage, call.mask, place.device, layout)
    plan = _plans.get(identity)
    if plan is None:
        tables = tables_of(call, out)
        addresses = tuple(arrays[name].extent[0] for name in ("query", "key", "value", "out"))
        choice = choose(Facts(call.storage, call.mask, problem, tables, addresses, capability_of(place.device)))
        made = kernel(choice.factory, choice.spec, **dict(choice.options))
        own = own_of(problem, call.real, call.base_2)
        plan = Plan(choice, made, uploaded(tables, place), table(own, place.device))
        if len(_plans) >= REMEMBERED:
            _plans.clear()
        _plans[identity] = plan
    return plan._replace(**of_heads(call, plan.tables, call.base_2))


def tables_of(call: Call, out: Given) -> Table:
    """The tables for the operands of a call, and for what is written."""
    problem, givens, operands = call.problem, call.givens, call.operands
    views = [
        (QUERY, operands.query, givens["query"].span[0]),
        (KEY, operands.key, givens["key"].span[0]),
        (VALUE, operands.value, givens["value"].span[0]),
        (OUT, split_heads(problem, out), out.span[0]),
        (LSE, np.empty(problem.lse_shape, np.float32).reshape(*problem.rows_shape, problem.queries, 1), 0),
    ]
    views += [(row, mask, givens[name].span[0]) for row, mask, name in masks_in(operands)]
    return make_table(problem, views)


def masks_in(operands: Operands) -> list[tuple[int, NDArray[Any], str]]:
    """Rows of the tables, views and names of the masks that there are."""
    first = operands.keep if operands.bias is None else operands.bias
    masks = [] if first is None else [(MASK, first, "attn_mask")]
    if operands.bias is not None and operands.keep is not None:
        masks.append((KEEP_ROW, operands.keep, KEEP))
    return masks


def split_heads(problem: Problem, out: Given) -> NDArray[Any]:
    """A view, without memory, of a result with the axes of the operands, (*batch, Hk, G, ...)."""
    return out.carrier(np.float32).reshape(*problem.rows_shape, *out.shape[-2:])


def _uploaded_tables(call: Call, out: Given) -> tuple[Any, Any, Any]:
    return uploaded(tables_of(call, out), call.place)


def uploaded(tables: Table, place: Place) -> tuple[Any, Any, Any]:
    """The tables on the device."""
    offsets, steps, sizes = (table(array, place.device) for array in tables)
    return offsets, steps, sizes


def of_heads(call: Call, tables: tuple[Any, Any, Any], base_2: bool) -> dict[str, Any]:
    """What a call has in place of its plan's `tables` and `own`: nothing, unless heads have something of their own."""
    heads, device = call.operands.heads, call.place.device
    if heads is None:
        return {}
    sizes = table(sizes_of(call.problem, heads), device)
    return {"tables": (*tables[:2], sizes), "own": table(own_of(call.problem, call.real, base_2, heads), device)}


def with_rows(call: Call) -> Call:
    """The call with copies of those operands whose rows do not lie as tensor cores need them."""
    rows = {
        name: given if name in ("attn_mask", KEEP) or has_rows(given) else copied(name, given, call.place)
        for name, given in call.givens.items()
    }
    if all(given is call.givens[name] for name, given in rows.items()):
        return call
    carriers = {name: rows[name] for name in ("query", "key", "value")}
    views = described(carriers_of(carriers, call.storage), {"enable_gqa": call.problem.heads != call.problem.kv_heads})[
        1
    ]
    operands = call.operands._replace(query=views.query, key=views.key, value=views.value)
    return call._replace(givens=rows, operands=operands)


def has_rows(given: Given) -> bool:
    """Whether the rows of an array of halves begin at multiples of 16 bytes, with their elements side by side."""
    step = ALIGNMENT // given.itemsize
    return given.strides[-1] == 1 and given.address % ALIGNMENT == 0 and not any(n % step for n in given.strides[:-1])


def copied(name: str, given: Given, place: Place) -> Given:
    """Queue a copy of an array, contiguous, but for leading axes along which it repeats itself."""
    repeats = [stride == 0 for stride in given.strides[:-2]] + [False, False]
    shape = tuple(1 if repeat else count for count, repeat in zip(given.shape, repeats, strict=True))
    target = place.new(name, shape, given.storage)
    copy(given._replace(shape=shape), target, place)
    strides = (0 if repeat else stride for stride, repeat in zip(target.strides, repeats, strict=True))
    return target._replace(shape=given.shape, strides=tuple(strides))


def copy(source: Given, target: Given, place: Place) -> None:
    """Queue the copying of an array to another of its shape, which is of rank 2 or more."""
    elements = int(np.prod(source.shape, dtype=np.int64))
    if elements == 0:
        return
    tables = _copy_tables(source.shape, (source.strides, source.span[0]), (target.strides, target.span[0]), place)
    grid = min(-(-elements // THREADS), MAX_BLOCKS)
    block = (THREADS if grid > 1 else elements, 1)
    made = kernel(portable.copy, portable.Copy(source.storage))
    launch(made, grid, block, place.stream, (source.memory(), target.memory(), *tables))


def _copy_tables(shape: Any, source: Any, target: Any, place: Place) -> tuple[Any, Any, Any]:
    identity = ("copy", shape, source, target, place.device)
    tables = _tables.get(identity)
    if tables is None:
        tables = uploaded(copy_table(shape, source, target), place)
        if len(_tables) >= REMEMBERED:
            _tables.clear()
        _tables[identity] = tables
    return tables
