"""The forward pass of few queries: whether a call is one, and its plan."""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray

from fastattn.call.problem import Operands, Problem
from fastattn.cpu.host.kernels import steps_of
from fastattn.cpu.host.plan import (
    TASKS_PER_THREAD,
    Draft,
    aligned,
    axes_of,
    fields_of_pairs,
    fields_of_scores,
    may_be_in_pairs,
    share_of_keys,
    sizes_of,
)
from fastattn.cpu.host.pool import TURN_FLOPS, concurrency
from fastattn.cpu.kernels.records import KEYS_AT_ONCE, PLAN
from fastattn.machine.kernel import Kernel
from fastattn.machine.table import Isa
from fastattn.machine.tile import TileShape

__all__ = ["draft_decode", "is_decode", "may_be_in_words", "steps_of_rows"]

Array = NDArray[Any]

PIECE = 256  # keys of a piece: how a row's result is summed up depends on it, so it is the same for all
MOST_ROWS = 32  # of a group of heads, that a task takes together
WORD = 8
#: Operations of the micro-kernel that take the time in which a byte arrives, about: threads and turns go by operations.
FLOPS_PER_BYTE = 2.0
#: Operations in the time of a row, a key and a feature: two, and what sums over the lanes and the softmax take.
ROW_FLOPS = 2.5


def is_decode(row: Isa, problem: Problem) -> bool:
    """Whether so few queries look at each key of a head that their features are in the lanes, and not they."""
    return problem.queries <= row.tile(problem.real.type.__name__).lanes // 2


def may_be_in_words(problem: Problem) -> bool:
    """Whether pairs of bfloat16 can be multiplied as they lie: words, of which none is half a pair."""
    return may_be_in_pairs(problem) and problem.head_dim % 2 == 0


def steps_of_rows(problem: Problem) -> tuple[str, ...]:
    """What may happen to the scores of a call of few queries: a row's functions are applied where its masks are."""
    return steps_of(problem, all_of=problem.scores.has_functions)


def draft_decode(kernel: Kernel, problem: Problem, operands: Operands, out: Array, threads: int) -> Draft:
    """Plan the calls that agree with these operands in everything but addresses, as shares of the keys of some rows."""
    tile, lead = kernel.tile, problem.rows_shape
    rows = problem.group * problem.queries
    chunk = min(MOST_ROWS, max(1, rows))
    parts = math.prod(lead[:-1]) * -(-rows // chunk)
    pieces = max(1, -(-problem.keys // PIECE))
    features = problem.head_dim + problem.value_dim
    width = max(2, kernel.itemsize)  # int8 takes as long to widen as two bytes to arrive
    flops_per_part = problem.keys * features * max(ROW_FLOPS * chunk, FLOPS_PER_BYTE * width)
    flops = parts * flops_per_part * share_of_keys(problem)
    shares = shares_of(parts, pieces, flops, threads)
    sizes = room_of_rows(kernel, problem, operands, chunk)
    everything = parts * problem.keys * features * kernel.itemsize
    copied = max(sizes["key_bytes"], sizes["value_bytes"])
    fields: dict[str, Any] = {**sizes_of(problem), **fields_of_scores(problem, operands.bias), **sizes}
    if kernel.reads == "pairs":
        fields.update(fields_of_pairs(problem, fields))
    axes = axes_of(fields, lead, operands, out)
    fields.update(
        key_block=PIECE,
        prefetch_distance=1 if everything > kernel.row.blocking.cached_bytes and not copied else 0,
        group=chunk,
        groups=-(-rows // chunk),
        group_heads=problem.group,
        out_itemsize=out.itemsize,
        shares=shares,
        pieces=pieces,
        tasks=parts * shares,
    )
    of_rows = (chunk + 1) * (sizes["query_bytes"] + sizes["score_bytes"]) + 2 * sizes["row_numbers"] * tile.itemsize
    draft = Draft(problem, kernel, PLAN, fields, axes, flops)
    draft.scratch_bytes = aligned(of_rows + 2 * sizes["partial_bytes"] + tile.buffer_bytes + copied)
    if shares > 1:
        draft.counters = parts
        draft.partials_bytes = parts * (WORD + pieces * sizes["partial_bytes"])
    return draft


def shares_of(parts: int, pieces: int, flops: float, threads: int) -> int:
    """How many tasks the keys of some rows are cut into: one, unless threads would be idle or away for long."""
    threads = concurrency(parts * pieces, flops, threads)
    wanted = 1 if threads == 1 else -(-TASKS_PER_THREAD * threads // max(1, parts))
    return max(1, min(pieces, max(wanted, int(flops / max(1, parts) / TURN_FLOPS))))


def room_of_rows(kernel: Kernel, problem: Problem, operands: Operands, rows: int) -> dict[str, int]:
    """The fields of a plan that say how rows are laid out, and keys and values where they are not read in place."""
    tile = kernel.tile
    query_bytes, sum_bytes = (padded(tile, size) * tile.itemsize for size in (problem.head_dim, problem.value_dim))
    row_numbers = padded(tile, rows)
    weights = PIECE + tile.lanes  # a vector may reach over the end
    if kernel.value_place.pairs_of_rows:
        weights += padded(tile, PIECE // 2 + 1 + tile.lanes)  # the same in pairs, and zeros
    sizes = {
        "query_bytes": query_bytes,
        "score_bytes": weights * tile.itemsize,
        "sum_bytes": sum_bytes,
        "row_numbers": row_numbers,
        "partial_bytes": 2 * row_numbers * tile.itemsize + rows * sum_bytes,
    }
    for name, array, place, wide in (
        ("key", operands.key, kernel, query_bytes),
        ("value", operands.value, kernel.value_place, sum_bytes),
    ):
        step, column = array.strides[-2:]
        in_place, row_bytes, together = column == place.itemsize, array.shape[-1] * place.itemsize, PIECE
        if place.storage == "int8":  # widened for several rows, a few keys at a time
            in_place, row_bytes, together = False, wide, KEYS_AT_ONCE
        sizes[name + "_bytes"] = 0 if in_place else aligned(together * row_bytes)
        sizes[name + "_step"] = step if in_place else row_bytes
    return sizes


def padded(tile: TileShape, size: int) -> int:
    """So many elements, with what is added to fill vectors."""
    return -(-size // tile.lanes) * tile.lanes
