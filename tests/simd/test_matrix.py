"""The instructions of a matrix unit: products of tiles against NumPy, emulated where the processor has none."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from fastattn.machine import building, loading
from fastattn.machine.kernel import Kernel
from fastattn.machine.objects import address_of
from fastattn.machine.table import Isa
from fastattn.simd import (
    jit,
    matrix_begin,
    matrix_clear_one,
    matrix_end,
    matrix_repeat_two,
    matrix_score_one,
    matrix_score_two,
    matrix_store_one,
    matrix_store_two,
    matrix_value_one,
)
from fastattn.simd.matrix import OF_SCORES, OF_VALUES

Array = NDArray[Any]

TERMS = {"bfloat16": 1, "float16": 2, "float32": 3}
dtypes = pytest.mark.parametrize("dtype", TERMS)


def all_products(add: Any) -> Any:
    """What adds all products of terms, of which there are at most six."""

    def add_all(kernel, left, left_step, right):
        add(kernel, 0, left, left_step, right)
        add(kernel, 1, left, left_step, right)
        add(kernel, 2, left, left_step, right)
        add(kernel, 3, left, left_step, right)
        add(kernel, 4, left, left_step, right)
        add(kernel, 5, left, left_step, right)

    return jit(add_all)


score_one, score_two, value_one = map(all_products, (matrix_score_one, matrix_score_two, matrix_value_one))


@contextmanager
def compiled(row: Isa, function: Any, count: int) -> Iterator[Any]:
    """Give a function of addresses, compiled."""
    code = building.emit({"run": (jit(function), count)}, row)
    addresses, engine = loading.load(code, row, ["run"])
    yield ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * count)(addresses["run"])
    del engine


def run(row: Isa, function: Any, *arrays: Array) -> None:
    """Compile a function of addresses, and run it on arrays."""
    with compiled(row, function, len(arrays)) as call:
        call(*map(address_of, arrays))


def terms_of(array: Array, count: int) -> list[Array]:
    """Return numbers of bfloat16 whose sum an array is: cut off, but for the last."""
    found = []
    for _ in range(count):
        term = (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        found.append(term.astype(ml_dtypes.bfloat16))
        array = array - term
    assert not array.any()
    return found


def operands(terms: int, tiles: int, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Return rows (16 · tiles, 32) and columns (32, 32), and both as tiles of terms."""
    rng = np.random.default_rng(seed)
    rows, columns = (
        (rng.integers(-(2 ** (8 * terms)), 2 ** (8 * terms), shape) / 2 ** (8 * terms)).astype(np.float32)
        for shape in ((16 * tiles, 32), (32, 32))
    )
    left = np.stack([np.stack(terms_of(rows[t * 16 :][:16], terms)) for t in range(tiles)])
    right = np.stack([term.reshape(16, 2, 32).swapaxes(1, 2) for term in terms_of(columns, terms)])
    return rows, columns, left.copy(), right.copy()


def multiply_two(row: Isa, dtype: str, *arrays: Array) -> None:
    """Of a start, operands as tiles of terms, and room for what they give: the sums of two tiles of rows."""
    kernel = Kernel("forward", row, row.tile("float32"), dtype, reads="matrix")

    def multiply(start, left, right, out):
        matrix_begin()
        matrix_repeat_two(start)
        score_two(kernel, left, kernel.terms * 1024, right)
        matrix_store_two(out)
        matrix_end()

    run(row, multiply, *arrays)


@dtypes
def test_products_of_two_tiles_of_rows(amx: Isa, dtype: str) -> None:
    """The sums of a row that is repeated, and of all products of terms but the least."""
    terms = TERMS[dtype]
    rows, columns, left, right = operands(terms, 2)
    start, found = np.arange(32, dtype=np.float32), np.empty((32, 32), np.float32)
    multiply_two(amx, dtype, start, left, right, found)
    exact = start + rows.astype(np.float64) @ columns
    # sums of 32, and of three terms what is left out: 2 · 2^-7 · 2^-15 of each product
    size = np.abs(start) + np.abs(rows).astype(np.float64) @ np.abs(columns)
    assert (np.abs(found - exact) <= size * (8 * 2.0**-24 + (2.0**-21 if terms == 3 else 0))).all()
    if terms == 1:  # whole numbers
        assert np.array_equal(found, exact)


@dtypes
def test_products_of_one_tile_of_rows(amx: Isa, dtype: str) -> None:
    """What is behind the rows of a tile is not written. Of weights of two terms, the product of both second is less."""
    kernel = Kernel("forward", amx, amx.tile("float32"), dtype, reads="matrix")
    rows, columns, left, right = operands(TERMS[dtype], 1)
    found = np.full((2, 32, 32), 7, np.float32)

    def multiply(left, right, out, other):
        matrix_begin()
        matrix_clear_one()
        score_one(kernel, left, 0, right)
        matrix_store_one(out)
        matrix_clear_one()
        value_one(kernel, left, 0, right)
        matrix_store_one(other)
        matrix_end()

    run(amx, multiply, left, right, *found)
    exact = rows.astype(np.float64) @ columns
    assert (found[:, 16:] == 7).all()
    assert np.abs(found[0, :16] - exact).max() < 2.0**-18
    assert np.abs(found[1, :16] - exact).max() < (2.0**-11 if dtype == "float16" else 2.0**-18)


def test_each_product_of_terms_changes_one_operand() -> None:
    """So that two tiles are loaded for four products; and no product is there twice."""
    for table in (OF_SCORES, OF_VALUES):
        for pairs in table.values():
            assert len(set(pairs)) == len(pairs)
            for before, after in itertools.pairwise(pairs):
                assert (before[0] == after[0]) != (before[1] == after[1])
    assert [len(OF_SCORES[terms]) for terms in (1, 2, 3)] == [1, 4, 6]


def test_subnormal_numbers_count_as_0(amx: Isa) -> None:
    """As the unit's manual says: in operands, and in sums."""
    kernel = Kernel("forward", amx, amx.tile("float32"), "bfloat16", reads="matrix")
    left, right = np.zeros((16, 32), ml_dtypes.bfloat16), np.zeros((16, 32, 2), ml_dtypes.bfloat16)
    left[0, 0], left[1, 0], left[2, 0] = 2.0**-127, 2.0**-126, 2.0**-100
    right[0, 0, 0], right[0, 1, 0] = 2.0, 2.0**-30
    found = np.ones((32, 32), np.float32)

    def multiply(left, right, out):
        matrix_begin()
        matrix_clear_one()
        score_one(kernel, left, 0, right)
        matrix_store_one(out)
        matrix_end()

    run(amx, multiply, left, right, found)
    assert found[:3, :2].tolist() == [[0.0, 0.0], [2.0**-125, 0.0], [2.0**-99, 0.0]]


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(amx: Isa, odd: float) -> None:
    rows, columns, left, right = operands(1, 2)
    left[0, 0, 3, 5] = odd
    right[0, 4, 7, 1] = odd
    found = np.empty((32, 32), np.float32)
    multiply_two(amx, "bfloat16", np.zeros(32, np.float32), left, right, found)
    touched = np.zeros((32, 32), bool)
    touched[3], touched[:, 7] = True, True
    assert not np.isfinite(found[touched]).any()
    assert np.array_equal(found[~touched], (rows @ columns)[~touched])


def test_each_thread_has_tiles_of_its_own(amx: Isa) -> None:
    """One is in the midst of a product while others begin theirs, end them, and come to an end."""
    start = np.arange(32, dtype=np.float32)
    opposite, (found, other) = -start, np.empty((2, 32, 32), np.float32)

    def begin(start):
        matrix_begin()
        matrix_repeat_two(start)

    def end(out):
        matrix_store_two(out)
        matrix_end()

    with compiled(amx, begin, 1) as first, compiled(amx, end, 1) as last:

        def both() -> None:
            first(address_of(opposite))
            last(address_of(other))

        first(address_of(start))
        for _ in range(4):
            thread = threading.Thread(target=both)
            thread.start()
            thread.join()
        last(address_of(found))
    assert (found == start).all()
    assert (other == opposite).all()
