"""The CPU backend of the backward pass: plans a call, makes room for its gradients, and runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fastattn.call.halves import name_of
from fastattn.call.head_gradients import gradient_of_sinks, gradient_of_slopes
from fastattn.call.problem import Array, Operands, Problem, Shape
from fastattn.call.rounding import is_precise, limit_of, slack
from fastattn.call.shapes import split_shape
from fastattn.call.upstream import Upstream
from fastattn.cpu.host import session
from fastattn.cpu.host.calls import Plan
from fastattn.cpu.host.functions import Parts, captured_among, prepared
from fastattn.cpu.host.kernels import describe, steps_of
from fastattn.cpu.host.plan import (
    TASK_FLOPS,
    TASKS_PER_THREAD,
    Draft,
    aligned,
    bytes_of_columns,
    bytes_of_lanes,
    bytes_of_rows,
    fields_of_pairs,
    fields_of_scores,
    may_be_of_bfloat16,
    share_of_keys,
    sizes_of,
    split_scale,
)
from fastattn.cpu.kernels.records import GRADIENT_ARRAYS, GRADIENT_AXIS, GRADIENT_CALL, GRADIENT_PARTS, GRADIENT_PLAN
from fastattn.machine.kernel import TERMS
from fastattn.machine.tile import MATRIX_DEPTH, MATRIX_ROWS, MATRIX_TILE, TileShape

Arrays: TypeAlias = "dict[str, Array | None]"
CALL_NAMES = (GRADIENT_CALL.names or ())[2:]  # behind the plan and the working memory
#: Gradients of scores times a scale below this might become too small to be divided by it again.
LEAST_FACTOR = 2.0**-40


def attention_backward(
    problem: Problem,
    operands: Operands,
    upstream: Upstream,
    shapes: Mapping[str, Shape],
    names: Sequence[str],
    seed: int,
    threads: int,
) -> dict[str, Array]:
    """Return the gradients of the operands, summed over axes that they are broadcast along, where it is for the best.

    Parameters
    ----------
    problem : Problem
    operands : Operands
    upstream : Upstream
    shapes : mapping of str to tuple of int
        Those of the arguments key, value and attn_mask.
    names : sequence of str
        Of the arguments whose gradients are wanted.
    seed : int
    threads : int
    Returns
    -------
    dict of str to ndarray
        By the names of the arguments, those that are wanted among them.

        - "query": shape (*batch, Hk, G, Lq, D)
        - "key", "value": (*batch, Hk, G, Lk, D) and so on, with 1 for the axes that neither key nor value has.
        - "attn_mask": with 1 for the axes that the mask does not have.
        - "alibi_slopes", "sinks": (*batch, Hk, G)
        - arrays that the function of scores captures: of their shapes, float64
    """
    lead, dtype = problem.rows_shape, problem.real
    own = own_axes(problem, *(split_shape(shapes[name], problem, shared=True) for name in ("key", "value")))
    summed = tuple(size if axis in own else 1 for axis, size in enumerate(lead))
    arrays: Arrays = dict.fromkeys(GRADIENT_ARRAYS)
    arrays |= operands._asdict()
    del arrays["captured"]  # of another kind
    arrays |= {"grad_out": upstream.grad_out, "out": upstream.out}
    arrays["grad_query"] = grad_query = np.zeros((*lead, problem.queries, problem.head_dim), dtype)
    arrays["grad_key"] = grad_key = np.zeros((*summed, problem.keys, problem.head_dim), dtype)
    arrays["grad_value"] = grad_value = np.zeros((*summed, problem.keys, problem.value_dim), dtype)
    found = {"query": grad_query, "key": grad_key, "value": grad_value}
    if "attn_mask" in names:
        split = split_shape(shapes["attn_mask"], problem)
        mask_axes = own_axes(problem, split)
        found["attn_mask"] = arrays["grad_bias"] = np.zeros(
            (*(n if axis in mask_axes else 1 for axis, n in enumerate(lead)), *split[-2:]), dtype
        )
    parts = Parts(problem, operands, captured_among(problem, names))
    arrays["lse"] = lse = np.ascontiguousarray(upstream.lse)
    arrays["grad_lse"] = None if upstream.grad_lse is None else np.ascontiguousarray(upstream.grad_lse)
    arrays["deltas"] = np.empty((3, lse.size), dtype)
    arrays["sink_weights"] = weights = np.full_like(lse, np.nan) if "sinks" in names else None
    arrays["slope_sums"] = sums = np.zeros_like(lse) if "alibi_slopes" in names else None
    numbers = {"seed": seed, "first_batch": problem.scores.first_batch}
    arrival = arrival_of(problem, names, upstream)
    rows_suffice = set(names) == {"sinks"} and is_precise(lse, limit_of(dtype, upstream.rounded)).all()
    if problem.keys and lse.size and not rows_suffice:
        plans = [planned(by_keys, problem, arrays, arrival, own, threads)]
        if "attn_mask" in names:
            plans.append(planned(_by_rectangles, problem, arrays, arrival, mask_axes, threads))
        if parts.names:
            plans.append(planned(by_parts, problem, arrays, arrival, own, threads, parts.number))
        with prepared(problem, operands, tile_of(problem), parts) as ready:
            for plan, counters in plans:
                run(plan, counters, {**arrays, "functions": ready.captured}, numbers)
    with np.errstate(all="ignore"):
        if arrival.without_scale:
            grad_query *= problem.scores.scale
            grad_key *= problem.scores.scale
        if sums is not None:
            found["alibi_slopes"] = gradient_of_slopes(sums, arrival.factor)
        if weights is not None:
            found["sinks"] = gradient_of_sinks(problem, operands, upstream, weights)
        found |= parts.sums()
    return found


class Arrival(NamedTuple):
    """How kernels take what arrives.

    Attributes
    ----------
    rounded : numpy.dtype
        What the log-sum-exp was rounded to.
    in_pairs : bool
        Whether they may multiply pairs of bfloat16, where arrays are that, or terms of it on a matrix unit.
    factor : float
        What gradients of scores are multiplied by: the scale, if they can be divided by it again.
    rest : float
        By what besides, as they are rounded to bfloat16: the factor is a power of two there.
    without_scale : bool
        Whether the gradients of queries and keys have still to be multiplied by the scale.
    """

    rounded: np.dtype[Any]
    in_pairs: bool
    factor: float
    rest: float
    without_scale: bool


def arrival_of(problem: Problem, names: Sequence[str], upstream: Upstream) -> Arrival:
    """Return how kernels take what arrives at a backward pass."""
    row, storage = session.current.row, name_of(problem.storage)
    multiplied = storage in TERMS if row.matrix else storage == "bfloat16" and row.pairs
    in_pairs = multiplied and name_of(upstream.came_in) == storage and may_be_of_bfloat16(row, problem)
    factor, rest = split_scale(problem.scores.scale) if in_pairs else (problem.scores.scale, 1.0)
    without_scale = "alibi_slopes" in names and abs(factor) < LEAST_FACTOR
    return Arrival(upstream.rounded, in_pairs, *((1.0, 1.0) if without_scale else (factor, rest)), without_scale)


def own_axes(problem: Problem, *splits: Shape) -> list[int]:
    """Return the leading axes that one of these arguments has, and is not broadcast along."""
    rank = len(problem.rows_shape)
    found = {rank - i for split in splits for i, size in enumerate(reversed(split[:-2]), 1) if size != 1}
    return sorted(found)


def run(plan: Plan, counters: int, arrays: Mapping[str, Any], numbers: Mapping[str, int]) -> None:
    """Run a planned call that has so many counters."""
    objects: dict[str, Any] = {**arrays, "turns": np.zeros(counters, np.int64), **numbers}
    session.current.run(plan, tuple(objects.get(name) for name in CALL_NAMES))


def planned(
    make: Callable[..., tuple[Plan, int]],
    problem: Problem,
    arrays: Arrays,
    arrival: Arrival,
    own: list[int],
    threads: int,
    *further: int,
) -> tuple[Plan, int]:
    """Return a call's plan, which all calls share that agree in all but addresses, and how many counters it has."""
    grad_bias = arrays["grad_bias"]
    key = (
        make,
        problem,
        arrival,
        tuple(own),
        tuple(None if array is None else array.strides for array in arrays.values()),
        *(None if mask is None else mask.dtype for mask in (arrays["bias"], arrays["keep"])),
        None if grad_bias is None else grad_bias.shape,
        threads,
        TASK_FLOPS,
        further,
    )
    return session.current.plans.of(key, lambda: make(problem, arrays, arrival, own, threads, *further))


def by_keys(problem: Problem, arrays: Arrays, arrival: Arrival, own: list[int], threads: int) -> tuple[Plan, int]:
    """Plan the backward pass: its tasks own keys of one head, of which some leading axes make one each."""
    draft = _draft("backward", problem, arrays, arrival, own)
    fields, tile, blocking = draft.fields, draft.kernel.tile, draft.kernel.row.blocking
    heads, blocks, query_blocks = fields["outer"] * fields["inner"], fields["blocks"], fields["query_blocks"]
    panels = _panels(tile, problem.head_dim) + _panels(tile, problem.value_dim)
    state = 2 * panels * blocking.gradient_key_block * tile.row_bytes
    group = max(1, min(blocking.gradient_state_bytes // max(1, state), blocks))
    while group > 1 and heads * -(-blocks // group) < TASKS_PER_THREAD * threads:
        group -= 1
    block_flops = draft.flops / max(1, heads * blocks * query_blocks)
    part = max(1, min(query_blocks, int(TASK_FLOPS / max(1.0, group * block_flops))))
    groups, parts = -(-blocks // group), -(-query_blocks // part)
    _split(draft, heads, group=group, groups=groups, part=part, parts=parts)
    return draft.finish(threads), heads * query_blocks + fields["outer"] * groups


def _by_rectangles(
    problem: Problem, arrays: Arrays, arrival: Arrival, own: list[int], threads: int
) -> tuple[Plan, int]:
    """Plan the gradient of a mask: tasks own rectangles of it, and nobody takes turns."""
    draft = _draft("mask_gradient", problem, arrays, arrival, own)
    fields = draft.fields
    groups = fields["blocks"] if fields["bias_keys"] > 1 else 1
    parts = fields["query_blocks"] if fields["bias_queries"] > 1 else 1
    draft.flops /= 2.5
    # a task goes through the heads that share the mask
    _split(draft, fields["outer"], group=1, groups=groups, part=1, parts=parts)
    return draft.finish(threads), 0


def by_parts(
    problem: Problem, arrays: Arrays, arrival: Arrival, own: list[int], threads: int, parts: int
) -> tuple[Plan, int]:
    """Plan the gradients of captured arrays: so many parts of the work, whatever number of threads there is."""
    draft = _draft("captured_gradient", problem, arrays, arrival, own)
    draft.flops /= 2.5
    _split(draft, parts, group=1, groups=1, part=1, parts=1)
    return draft.finish(threads), 0


def _panels(tile: TileShape, features: int) -> int:
    return -(-features // tile.width)


def tile_of(problem: Problem) -> TileShape:
    """The shape of the tiles of a backward pass."""
    return session.current.row.tile(problem.real.type.__name__)


def _draft(work: str, problem: Problem, arrays: Arrays, arrival: Arrival, own: list[int]) -> Draft:
    """Write down everything but how the work is split."""
    row = session.current.row
    steps, storage = steps_of(problem), name_of(problem.storage)
    kernel = describe(work, tile_of(problem), row, steps=steps, storage=storage, in_pairs=arrival.in_pairs)
    blocking, tile, lead = row.blocking, kernel.tile, problem.rows_shape
    query_block = -(-blocking.gradient_query_bytes // tile.itemsize // tile.width) * tile.width
    heads, outer = math.prod(lead), math.prod(lead[axis] for axis in own)
    grad_bias = arrays["grad_bias"]
    fields: dict[str, Any] = {
        **sizes_of(problem),
        **fields_of_scores(problem, arrays["bias"]),
        "bias_queries": grad_bias.shape[-2] if grad_bias is not None else 1,
        "bias_keys": grad_bias.shape[-1] if grad_bias is not None else 1,
        "score_scale": arrival.factor,
        "score_factor": arrival.rest,
        "precise": limit_of(problem.real, arrival.rounded),
        "slack": slack(arrival.rounded, problem.head_dim),
        "numbers": heads * problem.queries * tile.itemsize,
        "blocks": -(-problem.keys // blocking.gradient_key_block),
        "key_block": blocking.gradient_key_block,
        "query_block": query_block,
        "query_blocks": -(-problem.queries // query_block),
        "outer": outer,
        "inner": heads // outer,
    }
    fields.update(fields_of_pairs(problem, fields) if kernel.of_bfloat16 else {})
    for name, array in arrays.items():
        for end, stride in zip(("_row", "_column"), array.strides[-2:] if array is not None else (), strict=False):
            if name + end in (GRADIENT_PLAN.names or ()):
                fields[name + end] = stride
    # three of the products have the features of a key in them, two those of a value
    flops = 2.0 * heads * problem.queries * problem.keys * (3.0 * problem.head_dim + 2.0 * problem.value_dim)
    return Draft(problem, kernel, GRADIENT_PLAN, fields, _axes(lead, arrays, own), flops * share_of_keys(problem))


def _sizes_of_terms(draft: Draft, group: int) -> dict[str, int]:
    """What a matrix unit wants instead, or besides: as `fastattn.cpu.kernels.matrix` lays it out."""
    problem, fields, kernel = draft.problem, draft.fields, draft.kernel
    key_block, subs, block = fields["key_block"], fields["query_block"] // kernel.tile.width, kernel.terms * MATRIX_TILE
    weights, one_row = subs * (key_block // MATRIX_ROWS) * block, max(problem.head_dim, problem.value_dim)
    keys, values = (-(-features // MATRIX_DEPTH) for features in (problem.head_dim, problem.value_dim))
    found, pairs = MATRIX_DEPTH * kernel.tile.row_bytes, key_block // MATRIX_DEPTH * 2 * block
    return {
        "keys": group * bytes_of_rows(kernel, problem.head_dim, key_block),
        "values": group * bytes_of_rows(kernel, problem.value_dim, key_block),
        "clean_keys": bytes_of_rows(kernel, problem.head_dim, key_block),
        "key_rows": group * bytes_of_columns(kernel, problem.head_dim, key_block),
        "weight_rows": weights,
        "grad_rows": weights,
        "grad_pairs": max(found + pairs, one_row * kernel.tile.itemsize),
        "query_lane_terms": subs * bytes_of_lanes(kernel, problem.head_dim),
        "grad_lane_terms": subs * bytes_of_lanes(kernel, problem.value_dim),
        "query_panel_terms": keys * subs * 2 * block,
        "grad_panel_terms": values * subs * 2 * block,
    }


def _axes(lead: Shape, arrays: Arrays, own: list[int]) -> list[tuple[int, ...]]:
    """The table of leading axes: first those of which each has tasks of its own."""
    order = own + [axis for axis in range(len(lead)) if axis not in own]
    axes = []
    for axis in order:
        steps = {"size": lead[axis], "head": math.prod(lead[axis + 1 :])}
        for name in GRADIENT_ARRAYS:
            array = arrays[name]
            steps[name] = array.strides[axis] if array is not None and array.shape[axis] > 1 else 0
        axes.append(tuple(steps[name] for name in GRADIENT_AXIS.names or ()))
    return axes


def _split(draft: Draft, heads: int, *, group: int, groups: int, part: int, parts: int) -> None:
    """Split the work of so many heads into tasks, and lay out the working memory of one."""
    problem, tile, fields = draft.problem, draft.kernel.tile, draft.fields
    row_bytes = tile.row_bytes
    query_block, key_block = fields["query_block"], fields["key_block"]
    panel, query_panel, score_panel = group * key_block * row_bytes, query_block * row_bytes, key_block * row_bytes
    subs, numbers = query_block // tile.width, query_block * tile.itemsize
    keys, values = _panels(tile, problem.head_dim), _panels(tile, problem.value_dim)
    sizes = {
        "keys": keys * panel,
        "values": values * panel,
        "key_sums": max(keys * panel, subs * score_panel),  # where there is also room for sums of scores
        "value_sums": values * panel,
        "queries": keys * query_panel,
        "grads": values * query_panel,
        "query_sums": max(keys * query_panel, row_bytes),
        "query_lanes": numbers * problem.head_dim,
        "grad_lanes": numbers * problem.value_dim,
        "log_sums": numbers,
        "shifts": numbers,
        "rests": numbers,
        "deltas": numbers,
        "slope_sums": numbers,
        "bare_grads": score_panel if "softcap" in draft.kernel.steps else 0,
        "spans": 16 * subs,
        "work": row_bytes + 8 * tile.lanes * tile.lanes,
        "scores": subs * score_panel,
        "score_grads": subs * score_panel,
        "clean_keys": keys * score_panel,
        "outs": values * query_panel,
        "raws": score_panel if "function" in draft.kernel.steps else 0,
    }
    if draft.kernel.reads == "pairs":
        rows = subs * score_panel // 2
        sizes |= {"key_rows": keys * panel, "weight_rows": rows, "grad_rows": rows, "grad_pairs": score_panel // 2}
    if draft.kernel.reads == "matrix":
        sizes |= _sizes_of_terms(draft, group)
    at = 0
    for name in GRADIENT_PARTS:
        fields[name + "_at"] = at
        at += aligned(sizes.get(name, 0))
    fields["group"], fields["groups"], fields["part"], fields["parts"] = group, groups, part, parts
    fields["panel"], fields["query_panel"], fields["score_panel"] = panel, query_panel, score_panel
    fields["tasks"], draft.scratch_bytes = heads * groups * parts, at
