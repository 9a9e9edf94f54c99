"""The CPU backend of attention on keys in pages: plans of the forward pass, whose kernels find the rows of a block."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from fastattn.call.halves import name_of
from fastattn.call.packed import heads_first
from fastattn.call.packed_pages import PackedPages
from fastattn.call.pages import Pages, room_for
from fastattn.call.problem import Array, Operands, Problem
from fastattn.call.scores import HEAD
from fastattn.cpu.host import session, several
from fastattn.cpu.host.calls import Plan
from fastattn.cpu.host.decode import PIECE, draft_decode, is_decode, may_be_in_words, steps_of_rows
from fastattn.cpu.host.forward import tile_of_functions
from fastattn.cpu.host.functions import prepared
from fastattn.cpu.host.kernels import describe, steps_of
from fastattn.cpu.host.plan import Draft, aligned, choose_key_block, choose_tile, draft_forward, may_be_of_bfloat16
from fastattn.cpu.host.varlen import CALL_NAMES, places_of

__all__ = ["attention", "attention_again", "packed", "recalled"]


class Layout(NamedTuple):
    """How pages lie in memory, and the table: what a plan depends on."""

    page: int
    key: tuple[int, ...]  # strides
    value: tuple[int, ...]
    dtypes: tuple[np.dtype[Any], np.dtype[Any]]
    table: tuple[int, ...]
    table_itemsize: int


def layout_of(pages: Pages) -> Layout:
    """Say how pages lie."""
    key, value, table = pages.key, pages.value, pages.table
    return Layout(pages.page, key.strides, value.strides, (key.dtype, value.dtype), table.strides, table.itemsize)


class Again(NamedTuple):
    """What a call like an earlier one needs, besides its arrays and the lengths of its rows.

    Attributes
    ----------
    plan : Plan
    heads : ndarray of `HEAD`, shape (B, Hq)
        What heads have of their own, but for these lengths.
    follows : bool
        Whether the last query stands at the last key.
    """

    plan: Plan
    heads: Array
    follows: bool


def recalled(asked: Hashable, pages: Pages) -> Again | None:
    """What there is for calls of which the same is `asked`, if one of about these lengths has been planned."""
    found: Again | None = session.current.plans.get(("paged", asked, room_for(pages.longest)))
    return found


def attention_again(again: Again, query: Array, pages: Pages, out: Array, return_lse: bool) -> Array | None:
    """Compute attention into `out` as for an earlier call; the log-sum-exp, if it is wanted."""
    plan, heads, lengths = again.plan, again.heads.copy(), pages.lengths[:, None]
    heads["keys"] = lengths
    if again.follows:
        heads["offset"] = lengths - query.shape[2]
    lse = np.empty(plan.out_shape[:-1], plan.real) if return_lse else None
    run(plan, Operands(query, pages.key, pages.value, heads=heads), pages, out, lse, None, 0)
    return lse


def attention(
    problem: Problem,
    operands: Operands,
    pages: Pages,
    out: Array,
    return_lse: bool,
    seed: int | None,
    threads: int,
    asked: Hashable = b"",
) -> Array | None:
    """Compute attention into `out`, shape (B, Hq, Lq, Dv); the log-sum-exp, if it is wanted.

    One like it, of which the same is `asked`, will find the plan.
    """
    plan = plan_paged(problem, operands, pages, out, threads)
    if asked and operands.heads is not None:  # lengths are always among what heads have of their own
        heads = operands.heads.reshape(len(pages.table), problem.heads)
        again = Again(plan, heads, "offset" in problem.scores.own)
        session.current.plans.keep(("paged", asked, room_for(pages.longest)), again)
    lse = np.empty(problem.lse_shape, problem.real) if return_lse else None
    with prepared(problem, operands, tile_of_functions(problem)) as ready:
        run(plan, ready, pages, out, lse, seed, problem.scores.first_batch)
    return lse


def packed(whole: PackedPages, out: Array, return_lse: bool, seed: int | None, threads: int) -> Array | None:
    """Compute attention of packed queries into `out`, shape (T, Hq, Dv); the log-sum-exp, if it is wanted."""
    problem, pages = whole.problem, whole.pages
    sums = np.empty(len(whole.query) * problem.heads, problem.real) if return_lse else None
    calls = []
    with ExitStack() as until_run:
        for numbers in whole.kinds():
            one, operands = whole.rows(numbers[:1])
            queries, of_one = whole.queries[numbers[0]], pages.row(numbers[0])
            rows = heads_first(out[queries])[None]
            plan = plan_paged(one, operands, of_one, rows, threads)
            ready = until_run.enter_context(prepared(one, operands, tile_of_functions(one)))
            partials = plan.new_partials(len(numbers))
            heads = ready.heads if len(numbers) == 1 else whole.rows(numbers)[1].heads
            objects = {**ready._asdict(), "key": pages.key, "value": pages.value, "heads": heads, "out": rows}
            objects |= {"functions": ready.captured, "seed": seed, "first_batch": numbers[0]}
            objects |= {"partials": partials, "pages": of_one.table}
            objects["lse"] = None if sums is None else sums[queries.start * problem.heads :]
            steps = {
                "query": (whole.query.strides[0], 0, 0),
                "out": (out.strides[0], 0, 0),
                "lse": (problem.heads * problem.real.itemsize, 0, 0),
                "first_batch": (0, 1, 0),
                "pages": (0, pages.table.strides[0], 0),
                "heads": (0, 0, problem.heads * HEAD.itemsize),
                "partials": (0, 0, partials.strides[0]),
            }
            calls.append(_alike(whole, numbers, plan, objects, steps))
        several.run(calls, threads)
    return None if sums is None else sums[places_of(whole.queries, problem.heads)]


def _alike(
    whole: PackedPages, numbers: list[int], plan: Plan, objects: dict[str, Any], steps: dict[str, tuple[int, int, int]]
) -> several.Alike:
    """Describe the calls of sequences that have one plan, where `objects` are those of the first.

    `steps`: how far they move for each query that lies in between, for each sequence, and for each of the same kind.
    """
    between = np.array([(whole.queries[n].start, n, rank) for rank, n in enumerate(numbers)], np.int64)
    none = (0, 0, 0)
    by_name = [none if objects.get(name) is None else steps.get(name, none) for name in CALL_NAMES]
    moves = (between - between[0]) @ np.array(by_name, np.int64).T
    return several.alike(plan, objects, CALL_NAMES, moves)


def run(
    plan: Plan, ready: Operands, pages: Pages, out: Array, lse: Array | None, seed: int | None, first_batch: int
) -> None:
    """Run a planned call."""
    partials = plan.new_partials() if plan.partials_bytes else None
    arrays = ready.query, pages.key, pages.value, ready.bias, ready.keep, ready.heads, ready.captured
    session.current.run(plan, (*arrays, out, lse, None, None, seed, first_batch, partials, pages.table))


def plan_paged(problem: Problem, operands: Operands, pages: Pages, out: Array, threads: int) -> Plan:
    """Plan a call, or find the plan of one like it."""
    layout = layout_of(pages)
    bias, keep = operands.bias, operands.keep
    masks = [None if each is None else (each.strides, each.dtype) for each in (bias, keep)]
    key = ("paged", problem, layout, operands.query.strides, *masks, out.strides, out.dtype, threads)
    return session.current.plans.of(key, lambda: _plan(problem, operands, layout, out, threads))


def _plan(problem: Problem, operands: Operands, layout: Layout, out: Array, threads: int) -> Plan:
    row, real = session.current.row, problem.real
    split = out.reshape(*problem.rows_shape, *out.shape[-2:])
    few = is_decode(row, problem)
    tile = row.wide_tile(real.type.__name__) if few else choose_tile(row, real, problem.queries)
    keys, values = map(name_of, layout.dtypes)
    of_memory = {"storage": keys, "values": values, "queries": name_of(problem.storage), "pages": keys}
    steps = (steps_of_rows if few else steps_of)(problem)
    in_pairs = may_be_in_words(problem) if few else may_be_of_bfloat16(row, problem)
    kernel = describe("decode" if few else "forward", tile, row, steps=steps, in_pairs=in_pairs, **of_memory)
    block = PIECE if few else choose_key_block(kernel, problem)
    gathers = layout.page % block != 0
    placed = operands._replace(key=_rows(operands.key, gathers), value=_rows(operands.value, gathers))
    draft = (draft_decode if few else draft_forward)(kernel, problem, placed, split, threads)
    _add_pages(draft, layout, placed, block if gathers else 0)
    return draft.finish(threads)


def _rows(array: Array, gathers: bool) -> Array:
    """Return an operand with the strides that its rows have when they are used: those of a page, or gathered ones."""
    if not gathers:
        return array
    strides = (*array.strides[:-2], array.shape[-1] * array.itemsize, array.itemsize)
    return as_strided(array[..., :1, :], strides=strides, writeable=False)


def _add_pages(draft: Draft, layout: Layout, operands: Operands, block: int) -> None:
    """Add to a plan where pages are, and room for a block that is gathered."""
    # some for rows without features, too: that there is room tells kernels to gather
    room = [aligned(block * max(1, array.strides[-2])) for array in (operands.key, operands.value)]
    draft.fields.update(page=layout.page, table_itemsize=layout.table_itemsize)
    draft.fields.update(zip(("table_row", "table_column"), layout.table, strict=True))
    draft.fields.update(gathered_keys=room[0], gathered_values=room[1])
    for name, (page, row, _, column) in (("key", layout.key), ("value", layout.value)):
        strides = {"page": page, "page_row": row, "page_column": column}
        draft.fields.update({f"{name}_{of}": stride for of, stride in strides.items()})
    draft.scratch_bytes += sum(room)
    if block:
        draft.fields["prefetch_distance"] = 0
