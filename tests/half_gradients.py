"""Gradients of halves by kernels on tensor cores, and how far they may be from the exact ones.

Beside what `tolerances` derives for arithmetic in float32, with eps the spacing of halves at 1: weights and gradients
of scores are rounded to halves before they are multiplied, each by up to eps/2 of itself, in float16 also by up to
2^-25, and the gradients when they are stored. The output that arrives is rounded, too, but that is what the exact
gradients are evaluated with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from emulated_ptx import from_halves
from half_cases import EPS, SUBNORMAL, Halves
from numba import cuda
from tolerances import expected_gradients, folded

from fastattn import reference
from fastattn.call.rounding import slack
from fastattn.call.shapes import describe, split_shape
from fastattn.call.upstream import Upstream
from fastattn.cuda.host.backward import members_of
from fastattn.cuda.host.compile import kernel, launch
from fastattn.cuda.host.plan import make_table
from fastattn.cuda.host.tensor_cores import block_of, grid_of
from fastattn.cuda.host.tensor_cores_backward import options as jit_options
from fastattn.cuda.kernels import tensor_cores_backward as tensor_cores
from fastattn.cuda.kernels.elements import LOG2_E
from fastattn.cuda.kernels.fragments import TileShape
from fastattn.cuda.kernels.plan import DELTA, GRAD_OUT, KEY, LSE, MASK, NUMBERS, QUERY, VALUE

Array = np.ndarray[Any, Any]


class Work(NamedTuple):
    """A kernel to be run: how many blocks, and its arguments on the host, of which `results` are written."""

    spec: tensor_cores.Gradients
    grid: int
    arguments: list[Any]
    results: list[Halves]

    @property
    def numbers(self) -> Array:
        """SHIFT, REST and DELTA of each query."""
        numbers: Array = self.arguments[5].copy_to_host().reshape(-1, NUMBERS)
        return numbers


def operands(
    rng: Any, storage: str, query: tuple[int, ...], key: tuple[int, ...], columns: int | None = None
) -> list[Halves]:
    """Return dO, query, key and value."""
    columns = query[-1] if columns is None else columns
    shapes = ((*query[:-1], columns), query, key, (*key[:-1], columns))
    return [Halves(rng.normal(size=shape), storage) for shape in shapes]


def prepare(
    shape: TileShape, given: list[Halves], mask: Any, apart: bool, arrives: Array | None = None, **options: Any
) -> tuple[list[Work], Upstream]:
    """Return the kernel of the gradient of queries, that of keys and values, and what arrives at them.

    The output that arrives is the exact one, rounded, unless `arrives` says otherwise.
    """
    grad_out, query, key, value = given
    numbers = mask.numbers if isinstance(mask, Halves) else mask
    problem, views = describe(query.numbers, key.numbers, value.numbers, numbers, **options)
    rows = problem.rows_shape
    with np.errstate(all="ignore"):
        exact, sums, _ = reference.evaluate(problem, views)
    out = Halves(exact if arrives is None else arrives, shape.storage).numbers.reshape(
        *rows, problem.queries, problem.value_dim
    )
    lse = np.ascontiguousarray(sums, np.float32).reshape(*rows, problem.queries)
    upstream = Upstream(grad_out.numbers.reshape(out.shape), out, lse, None, lse.dtype)
    with np.errstate(all="ignore"):
        deltas = (upstream.grad_out * out).sum(-1, dtype=np.float32)
    table_views = [
        (QUERY, views.query, query.first),
        (KEY, views.key, key.first),
        (VALUE, views.value, value.first),
        (GRAD_OUT, upstream.grad_out, grad_out.first),
        (LSE, lse[..., None], 0),
    ]
    shown = np.zeros(1, np.uint8)
    if mask is not None:
        table_views.append((MASK, views.bias if views.keep is None else views.keep, 0))
        shown = mask.base if isinstance(mask, Halves) else np.ascontiguousarray(mask)
        shown = shown.view(np.uint8 if shown.dtype == bool else shown.dtype).reshape(-1)
    tables = make_table(problem, table_views)
    unit = np.float32(problem.scores.scale * (1.0 if shape.floating else LOG2_E))
    numbers_of_queries = np.full((deltas.size, NUMBERS), np.nan, np.float32)
    numbers_of_queries[:, DELTA] = deltas.reshape(-1)
    taken = cuda.to_device(numbers_of_queries.reshape(-1))
    arrays = [query, key, shown.reshape(-1), lse.reshape(-1), taken, *tables]
    arguments = [*arrays, unit, np.float32(slack(problem.real, problem.head_dim))]
    spec = tensor_cores.Gradients(shape, of_keys=False)
    run_kernel(tensor_cores.find_shifts, spec, grid_of(shape, problem), [on_device(one) for one in arguments])
    work = []
    for of_keys in (False, True):
        own = (key, value, query, grad_out) if of_keys else (query, grad_out, key, value)
        like = [key, value] if of_keys else [query]
        members = members_of(split_shape(like[0].numbers.shape, problem, of_keys), problem)
        results = [Halves(np.full(array.numbers.shape, np.nan), shape.storage) for array in like]
        arguments = [*own, shown.reshape(-1), taken, *tables, members]
        arguments += [unit, np.float32(problem.scores.scale), results[0], results[-1]]
        length = problem.keys if of_keys else problem.queries
        grid = -(-length // shape.queries) * members.shape[0]
        work.append(Work(tensor_cores.Gradients(shape, of_keys, apart), grid, arguments, results))
    return work, upstream


def on_device(argument: Any) -> Any:
    """An argument as a kernel takes it."""
    if isinstance(argument, Halves):
        return argument.memory
    return cuda.to_device(argument) if isinstance(argument, np.ndarray) else argument


def run_kernel(factory: Any, spec: tensor_cores.Gradients, grid: int, arguments: list[Any]) -> None:
    """Compile and launch a kernel."""
    made = kernel(factory, spec, **jit_options(spec))
    launch(made, grid, block_of(spec.shape), 0, tuple(arguments))


def launched(work: Work) -> list[Array]:
    """Run a kernel, and return the gradients as float32."""
    places = {id(result): result.memory for result in work.results}

    arguments = [places.get(id(argument), on_device(argument)) for argument in work.arguments]
    run_kernel(tensor_cores.gradients, work.spec, work.grid, arguments)
    found = [places[id(result)].copy_to_host().view(np.uint16) for result in work.results]
    return [
        from_halves(bits, work.spec.shape.storage).reshape(result.numbers.shape)
        for bits, result in zip(found, work.results, strict=True)
    ]


def run(
    shape: TileShape,
    given: list[Halves],
    mask: Any = None,
    apart: bool = False,
    **options: Any,
) -> tuple[list[Array], Upstream]:
    """Run both kernels: the gradients of query, key and value, and what arrived, with the axes of the operands."""
    work, upstream = prepare(shape, given, mask, apart, **options)
    return [gradient for one in work for gradient in launched(one)], upstream


def check(
    shape: TileShape,
    given: list[Halves],
    mask: Any = None,
    apart: bool = False,
    **options: Any,
) -> list[Array]:
    """Call the kernels, assert that what comes of them is right, and return it."""
    found, upstream = run(shape, given, mask, apart, **options)
    grad_out, query, key, value = (operand.numbers for operand in given)
    numbers = mask.numbers if isinstance(mask, Halves) else mask
    with np.errstate(all="ignore"):
        exact = reference.differentiate(*describe(query, key, value, numbers, **options), upstream)
        # what is not finite has no size: where it is looked at, so is the gradient
        finite = [np.where(np.isfinite(array), array, 0) for array in (grad_out, query, key, value)]
        problem, _, bounds = expected_gradients(*finite, numbers, **options)
        views = describe(*finite[1:], numbers, **options)[1]
        eps = EPS[shape.storage]
        q, k, g = (np.abs(array.astype(np.float64)) for array in (views.query, views.key, upstream.grad_out))
        scores = np.abs(np.where(np.isfinite(exact.scores), exact.scores, 0))
        scores = eps / 2 * scores + SUBNORMAL + bounds[3]
        weights = reference.evaluate(replace(problem, dropout_p=0.0), views)[2].reshape(scores.shape)
        weights, g = eps / 2 * weights + SUBNORMAL, np.where(np.isfinite(g), g, 0)
        roundings = [
            abs(problem.scores.scale) * (scores @ k),
            abs(problem.scores.scale) * (scores.swapaxes(-1, -2) @ q),
            weights.swapaxes(-1, -2) @ g,
        ]
        for name, gradient, wide, bound, rounding, argument in zip(
            ("grad_query", "grad_key", "grad_value"), found, exact, bounds, roundings, given[1:], strict=False
        ):
            shared, size = name != "grad_query", argument.numbers.shape
            want = folded(wide, size, problem, shared)
            limit = folded(bound + rounding, size, problem, shared) + eps / 2 * np.abs(want) + SUBNORMAL
            fine = np.abs(gradient - want) <= limit
            fine |= ~np.isfinite(want) & ~np.isfinite(gradient)
            worst = np.nanmax(np.abs(gradient - want) / limit, initial=0)
            assert fine.all(), f"{name}: {np.count_nonzero(~fine)} of {fine.size} wrong, {worst:.3g} bounds; {problem}"
    return found
