"""From a Problem to what the kernels are told: the plan record, the blocking, the split into tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.halves import is_bfloat16
from fastattn.call.problem import Operands, Problem, Shape
from fastattn.call.scores import HEAD
from fastattn.cpu.host import pool
from fastattn.cpu.host.calls import Plan, calls_of, packed
from fastattn.cpu.host.kernels import load
from fastattn.cpu.host.pool import concurrency, tasks_at_a_time
from fastattn.cpu.kernels.records import (
    ALIGNMENT,
    BIAS_BFLOAT16,
    BIAS_HALF,
    BIAS_NONE,
    BIAS_OTHER,
    BIAS_SAME,
    PLAN,
    RECORD_BYTES,
)
from fastattn.machine.kernel import Kernel
from fastattn.machine.table import Isa
from fastattn.machine.tile import MATRIX_DEPTH, MATRIX_ROWS, MATRIX_TILE, TileShape

Array = NDArray[Any]

TASKS_PER_THREAD = 4  # enough to even out, as long as there are blocks to split into
LOG2_E = 1.4426950408889634
TASK_FLOPS = 4e9  # at most, where a group can be made smaller: no thread is away from Python for long
#: A dtype divides by softcaps up to this, and by those from its inverse on. No score of any use is near either.
SOFTCAP_LIMITS = {"float32": 2.0**120, "float64": 2.0**1000}
MODERATE = 2.0**-16  # a scale, or its inverse
WORK_ROWS = 2  # rows of a tile needed besides the scores: maxima, and factors of the weights


def choose_tile(row: Isa, dtype: np.dtype[Any], queries: int) -> TileShape:
    """The table's tile; for at most one vector of queries a tall one, one vector wide, that wastes no lanes."""
    tile = row.tall_tile(dtype.type.__name__)  # for `dtype.name` NumPy imports a module each time
    return tile if queries <= tile.lanes else row.tile(tile.dtype)


def choose_key_block(kernel: Kernel, problem: Problem) -> int:
    """The table's number of keys, halved until their rows leave room in the level-2 cache."""
    row = kernel.row
    key_block = row.key_block // 2 if kernel.reads == "matrix" and kernel.terms == 3 else row.key_block
    while (
        key_block > row.blocking.least_rows
        and key_block * (problem.head_dim + problem.value_dim) * problem.real.itemsize > row.blocking.block_bytes
    ):
        key_block //= 2
    return key_block


def room_for_rows(place: Kernel, array: Array, elements: int, pairs: int) -> tuple[int, int]:
    """Room for a block of keys or values, 0 where they are read in place; and where rows are, how far apart they are.

    `place`: of these. `elements`: of a block in panels. `pairs`: of bfloat16 in a row, where these are multiplied.
    """
    row, tile = place.row, place.tile
    step, column = array.strides[-2:]
    if place.reads == "pairs":
        dense, as_it_lies = pairs * tile.itemsize, column == 2 and 2 * pairs == array.shape[-1]
    else:
        dense, as_it_lies = array.shape[-1] * tile.itemsize, place.storage == tile.dtype
        if as_it_lies and tile.vectors == 1:
            return 0, step
        as_it_lies = as_it_lies and not row.panels and column == tile.itemsize
    if as_it_lies and abs(step) <= max(row.blocking.in_place_bytes, dense):
        return 0, step
    return aligned(elements * tile.itemsize), dense


def additive_query_bytes(tile: TileShape, features: int) -> int:
    """Room for a block of queries as `fastattn.cpu.kernels.additive` lays it out."""
    row = padded(tile, features)
    return (2 * row * tile.width + 3 * row + 8 * tile.lanes) * tile.itemsize


def additive_key_bytes(tile: TileShape, features: int, key_block: int) -> int:
    """Room for a block of keys there, through which a block of queries passes as well: it has no more rows."""
    return (key_block + 2 * tile.lanes + 2 * (key_block + tile.rows) * padded(tile, features)) * tile.itemsize


def padded(tile: TileShape, features: int) -> int:
    """The features of additive attention with what is added to fill quads of vectors."""
    return -(-features // (4 * tile.lanes)) * 4 * tile.lanes


def group_size(row: Isa, blocks: int, state: int, flops: float, heads: int, threads: int) -> int:
    """How many of a head's blocks are a task, each of so many bytes of state and operations."""
    group = max(1, min(row.blocking.group_bytes // state, blocks, int(TASK_FLOPS / max(flops, 1.0))))
    while group > 1 and heads * -(-blocks // group) < TASKS_PER_THREAD * threads:
        group -= 1
    return group


def aligned(size: int) -> int:
    """The size, rounded up to what working memory is counted in."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(slots=True)
class Draft:
    """A plan in the making: `fields` and `axes` are what the kernel will read, in the order of `layout`."""

    problem: Problem
    kernel: Kernel
    layout: np.dtype[Any]
    fields: dict[str, Any]
    axes: list[tuple[int, ...]]
    flops: float
    scratch_bytes: int = 0
    task_flops: float = 0.0  # of the longest tasks, where some are of another kind than others
    counters: int = 0  # of tasks that wait for others
    partials_bytes: int = 0  # of these, and of what the tasks leave for each other

    def finish(self, threads: int) -> Plan:
        """Write it down."""
        tasks = self.fields["tasks"]
        threads = concurrency(tasks, self.flops, threads)
        turn = tasks_at_a_time(1, self.task_flops or self.flops / max(1, tasks))
        self.fields.update(workers=threads - 1, turn=turn, scratch_bytes=self.scratch_bytes)
        return Plan(
            out_shape=self.problem.out_shape,
            storage=self.problem.storage,
            real=self.problem.real,
            has_bias=self.problem.scores.bias,
            drops=self.problem.dropout_p > 0,
            calls=calls_of(load(self.kernel)),
            record=packed(self.layout, self.fields, self.axes),
            tasks=tasks,
            turn=turn,
            flops=self.flops,
            threads=threads,
            memory_bytes=RECORD_BYTES + threads * self.scratch_bytes,
            counters=self.counters,
            partials_bytes=self.partials_bytes,
            is_small=tasks > 0 and threads == 1 and self.flops < pool.WORTH_SHARING,
        )


def bias_kind(bias: Array | None, real: np.dtype[Any]) -> int:
    """Which of BIAS_* a floating mask is."""
    if bias is None:
        return BIAS_NONE
    if bias.dtype.itemsize == 2:
        return BIAS_BFLOAT16 if is_bfloat16(bias.dtype) else BIAS_HALF
    return BIAS_SAME if bias.dtype == real else BIAS_OTHER


def fields_of_scores(problem: Problem, bias: Array | None) -> dict[str, float]:
    """The fields of a plan that say what happens to scores."""
    scores = problem.scores
    base = 1.0 if scores.adds else LOG2_E  # finfo.min times log2(e) is no number: scores stay in base e
    head = scores.head(problem.keys)
    return {
        **fields_of_softcap(problem, base),
        "scale": scores.scale * base,
        "to_base_2": LOG2_E / base,
        "adds": scores.adds,
        "bias_kind": bias_kind(bias, problem.real),
        "bias_itemsize": bias.itemsize if bias is not None else 0,
        "keep": scores.keep,
        "left_bound": scores.left is not None,
        "left": scores.left or 0,
        "right_bound": scores.right is not None,
        "right": scores.right or 0,
        "drop_below": problem.drop_threshold,
        "keep_scale": problem.keep_scale,
        "first_head": scores.first_head,
        "first_query": scores.first_query,
        "first_key": scores.first_key,
        **{"own_" + name: head[name].item() for name in HEAD.names or ()},
    }


def fields_of_softcap(problem: Problem, base: float) -> dict[str, float]:
    """Those of them that say of a softcap, for scores times `base`."""
    if problem.scores.softcap is None:
        return {"softcap": 0.0, "softcap_factor": 0.0}
    limit = SOFTCAP_LIMITS[problem.real.type.__name__]
    softcap = min(max(problem.scores.softcap * base, 1 / limit), limit)
    return {"softcap": softcap, "softcap_factor": 2.0 * LOG2_E / softcap}


def may_be_in_pairs(problem: Problem) -> bool:
    """Whether queries times the power of two of the scale are as large as queries are, or nearly.

    Multiplied in pairs, numbers below 2^-126 count as 0.
    """
    return MODERATE <= abs(problem.scores.scale) <= 1 / MODERATE or problem.scores.scale == 0


def may_be_of_bfloat16(row: Isa, problem: Problem) -> bool:
    """The same for a forward pass: with few features, tiles of a matrix unit would be almost empty."""
    if row.matrix and min(problem.head_dim, problem.value_dim) < row.blocking.matrix_features:
        return False
    return may_be_in_pairs(problem)


def fields_of_pairs(problem: Problem, fields: dict[str, Any]) -> dict[str, float]:
    """The same where queries are multiplied by a power of two alone.

    What the scale is besides, a number from 1 to 2, is a factor of the products, where they are to be scores; else it
    is one of the exponents.
    """
    power, rest = split_scale(fields["scale"])
    if problem.scores.adds or problem.scores.softcap is not None:
        return {"scale": power, "factor": rest}
    return {"scale": power, "factor": 1.0, "to_base_2": fields["to_base_2"] * rest}


def split_scale(scale: float) -> tuple[float, float]:
    """Return a power of two, with the sign of a scale, and what it is besides, a number from 1 to 2; of 0, 0 and 1."""
    fraction, exponent = math.frexp(scale)
    return (math.copysign(math.ldexp(1.0, exponent - 1), fraction), 2.0 * abs(fraction)) if fraction else (0.0, 1.0)


def share_of_keys(problem: Problem) -> float:
    """About which share of the keys a query looks at."""
    scores = problem.scores
    if scores.left is None or scores.right is None:
        return 1.0 if scores.left is None and scores.right is None else 0.5
    return min(1.0, (scores.left + scores.right + 1) / max(1, problem.keys))


def draft_forward(kernel: Kernel, problem: Problem, operands: Operands, out: Array, threads: int) -> Draft:
    """Plan the calls that agree with these operands in everything but addresses, as tasks on groups of query blocks.

    `out` has the axes of the operands: (*batch, Hk, G, Lq, Dv).
    """
    key, value, bias = operands.key, operands.value, operands.bias
    row, tile, lead = kernel.row, kernel.tile, problem.rows_shape
    heads, blocks = math.prod(lead), -(-problem.queries // tile.width)
    feature_flops = row.blocking.additive_cost if kernel.score == "additive" else 2.0
    flops_per_block = tile.width * problem.keys * (feature_flops * problem.head_dim + 2.0 * problem.value_dim)
    key_block = choose_key_block(kernel, problem)
    room = room_of_blocks(kernel, problem, key, value, key_block)
    state = room["query_bytes"] + (problem.value_dim + 2) * tile.row_bytes
    group = group_size(row, blocks, state, flops_per_block, heads, threads)
    groups = -(-blocks // group)
    fields: dict[str, Any] = {**sizes_of(problem), **fields_of_scores(problem, bias), **room}
    fields.update(fields_of_pairs(problem, fields) if kernel.of_bfloat16 else {}, out_itemsize=out.itemsize)
    axes = axes_of(fields, lead, operands, out)
    everything = heads * (problem.queries + problem.keys) * (problem.head_dim + problem.value_dim) * tile.itemsize
    fields.update(
        key_block=key_block,
        prefetch_distance=threads if everything > row.blocking.cached_bytes else 0,
        blocks=blocks,
        group=group,
        groups=groups,
        tasks=heads * groups,
    )
    work = ((WORK_ROWS + key_block) * tile.row_bytes + tile.buffer_bytes) * (2 if kernel.reads == "matrix" else 1)
    work += rows_behind_scores(kernel, problem, key_block) * tile.row_bytes
    return Draft(
        problem,
        kernel,
        PLAN,
        fields,
        axes,
        flops=heads * blocks * flops_per_block * share_of_keys(problem),
        scratch_bytes=aligned(group * (state + ALIGNMENT) + room["key_bytes"] + room["value_bytes"] + work),
    )


def rows_behind_scores(kernel: Kernel, problem: Problem, key_block: int) -> int:
    """Room behind scores, in rows: for sums of values that are not finite, or for what a matrix unit wants."""
    if kernel.reads != "matrix":
        return problem.value_dim
    queries_and_key = problem.head_dim + -(-problem.head_dim // kernel.tile.width)
    return max(queries_and_key, MATRIX_DEPTH + kernel.terms * key_block // 2)


def axes_of(fields: dict[str, Any], lead: Shape, operands: Operands, out: Array) -> list[tuple[int, ...]]:
    """Fill in the fields that say how matrices lie in memory; return the table of the axes before the last two."""
    arrays = {name: getattr(operands, name) for name in ("query", "key", "value", "bias", "keep")} | {"out": out}
    for name, array in arrays.items():
        if array is not None:
            fields[name + "_row"], fields[name + "_column"] = array.strides[-2:]
    strides = [(0,) * len(lead) if array is None else array.strides for array in arrays.values()]
    return [(size, *(of_array[i] for of_array in strides)) for i, size in enumerate(lead)]


def sizes_of(problem: Problem) -> dict[str, int]:
    """The fields of a plan that say how large a call is."""
    return {
        "queries": problem.queries,
        "keys": problem.keys,
        "head_dim": problem.head_dim,
        "value_dim": problem.value_dim,
        "axes": len(problem.rows_shape),
        "heads": problem.heads,
    }


def bytes_of_rows(kernel: Kernel, features: int, key_block: int) -> int:
    """What rows of a block take for a matrix unit, as `fastattn.cpu.kernels.matrix` lays them out, and flags."""
    tiles = key_block // MATRIX_ROWS * -(-features // MATRIX_DEPTH)
    return tiles * kernel.terms * MATRIX_TILE + aligned(8 * (key_block + 1))


def bytes_of_columns(kernel: Kernel, features: int, key_block: int) -> int:
    """The same of columns."""
    return -(-features // MATRIX_ROWS) * (key_block // MATRIX_DEPTH) * kernel.terms * MATRIX_TILE


def bytes_of_lanes(kernel: Kernel, features: int) -> int:
    """The same of lanes: a tile width of queries, with a number each."""
    return -(-features // MATRIX_DEPTH) * kernel.terms * 2 * MATRIX_TILE + kernel.tile.row_bytes


def room_of_matrices(kernel: Kernel, problem: Problem, key_block: int) -> dict[str, int]:
    """The same as `room_of_blocks` for a matrix unit."""
    return {
        "query_bytes": bytes_of_lanes(kernel, problem.head_dim),
        "key_bytes": bytes_of_rows(kernel, problem.head_dim, key_block),
        "value_bytes": bytes_of_columns(kernel, problem.value_dim, key_block),
        "key_step": 0,
        "value_step": 0,
    }


def room_of_blocks(kernel: Kernel, problem: Problem, key: Array, value: Array, key_block: int) -> dict[str, int]:
    """The fields of a plan that say how blocks of queries, keys and values are laid out, and what room they take."""
    tile, features = kernel.tile, problem.head_dim
    if kernel.reads == "matrix":
        return room_of_matrices(kernel, problem, key_block)
    if kernel.score == "additive":
        query_bytes = additive_query_bytes(tile, features)
        key_bytes, key_step = additive_key_bytes(tile, features, key_block), 0
    else:
        query_bytes = (-(-features // 2) if kernel.reads == "pairs" else features) * tile.row_bytes
        key_bytes, key_step = room_for_rows(kernel, key, key_block * features, -(-features // 2))
    panels = -(-problem.value_dim // tile.rows)
    elements = key_block * panels * tile.rows
    value_bytes, value_step = room_for_rows(kernel.value_place, value, elements, problem.value_dim)
    return {
        "query_bytes": query_bytes,
        "key_bytes": key_bytes,
        "value_bytes": value_bytes,
        "key_step": key_step,
        "value_step": value_step,
    }
