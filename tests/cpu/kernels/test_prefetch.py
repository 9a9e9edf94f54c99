"""What is asked for ahead: in equal shares, and just what is read next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastattn.cpu.kernels import backward, tasks
from fastattn.cpu.kernels import prefetch as ahead
from fastattn.cpu.kernels.backward import Work
from fastattn.cpu.kernels.forward import Block, Group, Turn
from fastattn.cpu.kernels.forward_prefetch import list_wanted as list_wanted_forward
from fastattn.cpu.kernels.gradient_prefetch import list_wanted as list_wanted_backward
from fastattn.cpu.kernels.records import BIAS_SAME, GRADIENT_PLAN, PLAN
from fastattn.cpu.kernels.scores import Part
from fastattn.machine import building as build
from fastattn.machine.kernel import Kernel
from fastattn.machine.libraries import Library
from fastattn.machine.table import host
from fastattn.simd import jit


@pytest.mark.parametrize("near", [False, True])
def test_what_is_wanted_is_asked_for_in_equal_shares(near: bool) -> None:
    counts = {"want_nothing": 2, "want": 5, "want_share": 7, "ask": 1, "ask_for_all": 1}
    functions = {name: (getattr(ahead, name), count) for name, count in counts.items()}
    kernel = Kernel("", replace(host(), near=near))
    functions["ask"] = jit(lambda at: ahead.ask(kernel, at)), 1
    functions["ask_for_all"] = jit(lambda at: ahead.ask_for_all(kernel, at)), 1
    native = Library(build.emit(functions, host()), host(), counts)
    memory = np.zeros(64, np.int64)
    at = memory.ctypes.data
    rows = np.zeros((41, 1000), np.uint8)
    place, row = -(-rows.ctypes.data // 64) * 64, rows.strides[0]

    native.want_nothing(at, 7)
    native.want(at, place, row, 500, 10)  # rows of 8 lines
    native.want(at, place, row, 1, 3)
    native.want(at, place, row, 64, 0)
    native.want_share(at, place, row, 65, 40, 2, 3)  # rows 28 to 39
    native.want_share(at, place, row, 64, 2, 2, 3)  # nothing is left of two for the third
    pieces = memory[ahead.LIST_BYTES // 8 :][: 5 * ahead.PIECE_BYTES // 8].view(ahead.PIECE)
    assert memory[:1].tolist() == [5]
    assert pieces["left"].tolist() == [80, 3, 0, 24, 0]
    native.ask(at)
    assert pieces["left"].tolist() == [80 - 12, 3 - 1, 0, 24 - 4, 0]
    assert pieces["next"][[0, 1, 3]].tolist() == [place + row + 4 * 64, place + row, place + 30 * row]
    for _ in range(6):
        native.ask(at)
    assert not pieces["left"].any()
    assert pieces["next"][[0, 1, 3]].tolist() == [place + 10 * row, place + 3 * row, place + 40 * row]
    native.ask(at)
    assert not pieces["left"].any()

    native.want_nothing(at, 7)
    native.want(at, place + 16, row, 512, 10)  # rows that reach into a ninth line
    native.want(at, place + 16, 512, 512, 10)  # and those that follow each other
    assert pieces["left"][:2].tolist() == [90, 80]
    native.ask_for_all(at)
    assert not pieces["left"].any()
    native.ask_for_all(ahead.NOTHING)


# -- masks -------------------------------------------------------------------------------------------------------------

TILE = host().tile("float32")
WIDTH, FEATURES, KEY_BLOCK = TILE.width, 16, 32
QUERIES, KEYS = 4 * WIDTH - 3, 3 * KEY_BLOCK - 5  # the last tile width and the last block are not whole
LINE = 64
KERNEL = Kernel("backward", host(), TILE, "float32", steps=("mask",))
BIAS, KEEP, QUERY, GRAD_OUT, GRAD_QUERY, OUT = range(1 << 24, 7 << 24, 1 << 24)  # addresses: nothing is there
OTHER = 1 << 30  # to those of the next head


def rows_of(memory: NDArray[np.int64]) -> set[tuple[int, int, int]]:
    """Return what is on a list: where rows begin, how many there are, and the lines of each."""
    count = memory[0]
    pieces = memory[ahead.LIST_BYTES // 8 :][: count * ahead.PIECE_BYTES // 8].view(ahead.PIECE)
    return {(int(x["next"]), int(x["left"] // x["lines"]), int(x["lines"])) for x in pieces if x["left"]}


def masks_at(query: int, begin: int, end: int, head: int = 0) -> set[tuple[int, int, int]]:
    """Return what there is to be read of a floating and of a boolean mask for a tile width of queries and some keys."""
    bias, keep = head + BIAS + query * 1024 + begin * 4, head + KEEP + query * 512 + begin
    there = min(WIDTH, QUERIES - query)
    return {
        (bias, there, -(-(bias % LINE + (end - begin) * 4) // LINE)),
        (keep, there, -(-(keep % LINE + end - begin) // LINE)),
    }


def plan_of(record: Any, **fields: int) -> Any:
    plan = np.zeros(1, record)
    common = {
        "queries": QUERIES, "keys": KEYS, "head_dim": FEATURES, "value_dim": FEATURES, "key_block": KEY_BLOCK,
        "query_row": FEATURES * 4, "adds": 1, "bias_kind": BIAS_SAME, "bias_row": 1024, "bias_column": 4,
        "bias_itemsize": 4, "keep": 1, "keep_row": 512, "keep_column": 1,
    }  # fmt: skip
    for name, value in (common | fields).items():
        plan[name] = value
    return plan


def seen(query: int, key: int, causal: bool) -> int:
    """Return the end of those keys of a block that a tile width of queries looks at."""
    end = min(key + KEY_BLOCK, KEYS)
    return min(end, query + min(WIDTH, QUERIES - query)) if causal else end


def of_masks(rows: set[tuple[int, int, int]]) -> set[tuple[int, int, int]]:
    return {row for row in rows if BIAS <= row[0] % OTHER < QUERY}


@pytest.mark.parametrize("causal", [False, True])
def test_masks_are_asked_for_as_the_backward_pass_reads_them(causal: bool) -> None:
    """And all rows of the next block of queries, while queries of one look at keys, or might."""

    def listed(plan, wanted, block, subs, s, first_key, with_out):
        head = backward.Head(0, QUERY, 0, 0, BIAS, KEEP, GRAD_OUT, OUT, GRAD_QUERY, 0, 0, 0, 0, KEYS, 0, 0)
        work = Work(0, 0, KEYS, 0, 2)
        list_wanted_backward(
            KERNEL, backward.plan_view(plan), head, work, wanted, block, subs, s, first_key, with_out != 0
        )

    native = Library(build.emit({"listed": (jit(listed), 7)}, host()), host(), {"listed": 7})
    row = FEATURES * 4
    rows = {"query_row": row, "grad_out_row": row, "grad_query_row": row, "out_row": row}
    plan = plan_of(GRADIENT_PLAN, query_block=2 * WIDTH, right_bound=causal, **rows)
    memory = np.zeros(64, np.int64)
    visits = [
        (block, s, key) for block in range(2) for key in range(0, KEYS, KEY_BLOCK) for s in range(2)
    ]  # in this order
    followed: dict[int, set[int]] = {QUERY: set(), GRAD_OUT: set(), GRAD_QUERY: set(), OUT: set()}
    for visit, (block, s, key) in enumerate(visits):
        native.listed(plan.ctypes.data, memory.ctypes.data, block, 2, s, key, 1)
        found = rows_of(memory)
        wanted = set()
        if visit + 1 < len(visits):
            other, s, key = visits[visit + 1]
            query = (2 * other + s) * WIDTH
            if (end := seen(query, key, causal)) > key:
                wanted = masks_at(query, key, end)
        assert of_masks(found) == wanted
        for place, count, lines in found - of_masks(found):
            assert (block, lines) == (0, 1)
            begin = max(first for first in followed if first <= place)
            followed[begin] |= {(place - begin) // row + i for i in range(count)}
    assert all(numbers == set(range(2 * WIDTH, QUERIES)) for numbers in followed.values())


@pytest.mark.parametrize("goes_on", [False, True])
def test_masks_are_asked_for_as_the_forward_pass_reads_them(goes_on: bool) -> None:
    """Of the next query block; after the last of a group of the first with the next keys, or of the next head."""

    def listed(plan, wanted, number, first_key, following, end, then):
        head = tasks.Head(QUERY, 0, 0, BIAS, KEEP, 0, 0, KEYS, 0, 0, 0)
        following_head = tasks.Head(QUERY + then, 0, 0, BIAS + then, KEEP + then, 0, 0, KEYS, 0, 0, 0)
        block = Block(number, number * WIDTH, 0, Part(0, 0, 0, KEY_BLOCK), 0)
        after = Block(following, following * WIDTH, 0, Part(0, 0, 0, end), 0)
        list_wanted_forward(
            KERNEL, 0, tasks.plan_view(plan), head, following_head, Group(0, 2, 0, KEYS), wanted, block, after,
            KEY_BLOCK, Turn(first_key, False, False, 0, 1),
        )  # fmt: skip

    native = Library(build.emit({"listed": (jit(listed), 7)}, host()), host(), {"listed": 7})
    plan, memory, then = plan_of(PLAN), np.zeros(64, np.int64), OTHER if goes_on else 0

    def asked(*numbers: int) -> set[tuple[int, int, int]]:
        native.listed(plan.ctypes.data, memory.ctypes.data, *numbers, then)
        return of_masks(rows_of(memory))

    assert asked(0, KEY_BLOCK, 1, KEY_BLOCK - 6) == masks_at(WIDTH, KEY_BLOCK, 2 * KEY_BLOCK - 6)
    assert asked(1, KEY_BLOCK, 2, 0) == masks_at(0, 2 * KEY_BLOCK, KEYS)
    assert asked(1, 2 * KEY_BLOCK, 2, 0) == (masks_at(0, 0, KEY_BLOCK, OTHER) if goes_on else set())
