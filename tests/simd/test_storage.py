"""Half precision, widened and rounded by kernels: every number there is, and every place where rounding turns."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastattn import simd as s
from fastattn.call.halves import BITS, cast
from fastattn.machine import building as build
from fastattn.machine.kernel import Kernel
from fastattn.machine.libraries import Library
from fastattn.machine.table import TABLE, Isa, host, runs_here

Array = NDArray[Any]

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": BITS}
needs_pairs = pytest.mark.skipif(not host().pairs, reason="this machine does not multiply pairs of bfloat16")
rows = pytest.mark.parametrize("row", [row for row in TABLE if runs_here(row)], ids=lambda row: row.name)


def compiled(row: Isa, storage: str) -> Library:
    """Return functions that copy `count` numbers, a vector or an element at a time, widening or rounding them."""
    tile = row.tile("float32").vector
    kernel = Kernel("", row, tile, storage)

    def widen(source, target, count):
        for i in range(0, count, tile.lanes):
            numbers = s.tile_load_stored(kernel, tile, source + i * kernel.itemsize, 0)
            s.tile_store(numbers, target + i * tile.itemsize, 0)

    def widen_elements(source, target, count):
        for i in range(count):
            s.store_element(tile, target + i * tile.itemsize, s.load_stored(kernel, source + i * kernel.itemsize))

    def narrow(source, target, count):
        for i in range(0, count, tile.lanes):
            s.tile_store_stored(
                kernel, s.tile_load(tile, source + i * tile.itemsize, 0), target + i * kernel.itemsize, 0
            )

    def narrow_elements(source, target, count):
        for i in range(count):
            s.store_stored(kernel, target + i * kernel.itemsize, s.load_element(tile, source + i * tile.itemsize))

    def copy(source, target, count):
        for i in range(count):
            s.copy_stored(kernel, target + i * kernel.itemsize, source + i * kernel.itemsize)

    def widen_part(source, target, count):
        part = s.tile_load_part_stored(kernel, tile.square, source, 2 * tile.lanes * kernel.itemsize, count, count)
        s.tile_store(part, target, tile.vector_bytes)

    functions = {
        each.__name__: (s.jit(each), 3) for each in (widen, widen_elements, narrow, narrow_elements, copy, widen_part)
    }
    return Library(build.emit(functions, row), row, dict.fromkeys(functions, 3))


def same(found: Array, wanted: Array) -> bool:
    """Whether numbers are the same to the bit, of NaN whatever it carries."""
    found, wanted = (cast(each, np.dtype(np.float32)) for each in (found, wanted))
    nan = np.isnan(wanted)
    return bool((np.isnan(found) == nan).all() and (found.view(np.uint32)[~nan] == wanted.view(np.uint32)[~nan]).all())


@rows
@pytest.mark.parametrize("storage", DTYPES)
def test_every_number_is_widened(row: Isa, storage: str) -> None:
    library, numbers = compiled(row, storage), np.arange(65536, dtype=np.uint16).view(DTYPES[storage])
    for name in ("widen", "widen_elements"):
        found = np.empty(numbers.size, np.float32)
        getattr(library, name)(numbers.ctypes.data, found.ctypes.data, numbers.size)
        assert same(found, cast(numbers, found.dtype)), name


@rows
@pytest.mark.parametrize("storage", DTYPES)
def test_parts_of_rows_are_widened_and_elements_copied(row: Isa, storage: str) -> None:
    library, numbers = compiled(row, storage), np.arange(65536, dtype=np.uint16)
    found = np.zeros_like(numbers)
    library.copy(numbers.ctypes.data, found.ctypes.data, numbers.size)
    assert (found == numbers).all()
    lanes = row.tile("float32").lanes
    for first in (0, 0x3C00, 0x7C00 - lanes, 0x8000):
        for count in range(lanes + 1):
            rows = numbers[first:][: 2 * lanes * lanes].view(DTYPES[storage]).reshape(lanes, -1)
            part = np.full((lanes, lanes), np.nan, np.float32)
            library.widen_part(rows.ctypes.data, part.ctypes.data, count)
            wanted = np.zeros_like(part)
            wanted[:count, :count] = cast(rows[:count, :count], part.dtype)
            assert same(part, wanted), (first, count)


@rows
@pytest.mark.parametrize("storage", DTYPES)
def test_numbers_are_rounded_to_the_nearest_of_two_the_even_one(row: Isa, storage: str) -> None:
    """All numbers of half precision, those half way between two, and their neighbours."""
    library, every = compiled(row, storage), np.arange(65536, dtype=np.uint16).view(DTYPES[storage])
    wide = cast(every, np.dtype(np.float32))
    bits = wide.view(np.uint32)[np.isfinite(wide)]
    half = 1 << (15 if storage == "bfloat16" else 12)
    near = np.concatenate([bits + np.uint32(step) for step in (0, 1, half - 1, half, half + 1, 2 * half - 1)])
    rng = np.random.default_rng(0)
    some = rng.integers(0, 2**32, 1 << 16, dtype=np.uint32)
    subnormal = (rng.random(1 << 14) * 2.0**-13).astype(np.float32).view(np.uint32)
    numbers = np.concatenate([near, some, subnormal]).view(np.float32)
    numbers = np.ascontiguousarray(numbers[: numbers.size // 64 * 64])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = cast(numbers, DTYPES[storage])
    for name in ("narrow", "narrow_elements"):
        found = np.empty(numbers.size, DTYPES[storage])
        getattr(library, name)(numbers.ctypes.data, found.ctypes.data, numbers.size)
        assert same(found, wanted), name


@needs_pairs
def test_pairs_are_laid_out_scaled_and_multiplied() -> None:
    row = host()
    tile = row.tile("float32")
    rng = np.random.default_rng(1)
    numbers = rng.integers(-8, 9, (4, 2 * tile.lanes)).astype(np.float32)
    halves = cast(numbers, BITS)
    one, vector = tile.single, tile.vector
    size = vector.vector_bytes

    def run(first, second, words, column, out):
        s.tile_store(s.tile_load_two_rows(vector, first, second), out, 0)
        out += vector.vector_bytes
        s.tile_store(s.tile_scale_pairs(s.tile_load(vector, first, 0), -0.5), out, 0)
        out += vector.vector_bytes
        s.tile_store(s.tile_round_to_pairs(s.tile_load(vector, words, 0), s.tile_load(vector, words + size, 0)), out, 0)
        out += vector.vector_bytes
        s.tile_store(s.tile_pair_up(s.tile_load(vector, words, 0), s.tile_load(vector, words + size, 0)), out, 0)
        out += vector.vector_bytes
        s.tile_store(s.tile_rank2(s.tile_fill(one, 0.5), column, 4, first), out, 0)
        s.tile_store_rounded(s.tile_load(one, words, 0) + 0.001, out + one.row_bytes)

    library = Library(build.emit({"run": (s.jit(run), 5)}, row), row, {"run": 5})
    column, words = halves[2, :2].copy(), np.ascontiguousarray(numbers[2:])
    out = np.empty(7 * tile.lanes, np.float32)
    both = np.ascontiguousarray(halves[:2].ravel())  # a row of the tile is two vectors of pairs
    library.run(both.ctypes.data, halves[1:].ctypes.data, words.ctypes.data, column.ctypes.data, out.ctypes.data)
    pairs = cast(out[: 4 * tile.lanes].view(BITS), np.dtype(np.float32)).reshape(4, tile.lanes, 2)
    assert (pairs[0] == numbers[:2, : tile.lanes].T).all()
    assert (pairs[1] == -0.5 * numbers[0].reshape(-1, 2)).all()
    assert (pairs[2:] == words.ravel()[: 2 * tile.lanes].reshape(2, -1).T).all()
    products = numbers[:2].reshape(-1, 2) @ numbers[2, :2] + 0.5
    assert (out[4 * tile.lanes : 6 * tile.lanes] == products).all()
    rounded = cast(out[6 * tile.lanes :].view(BITS), np.dtype(np.float32))
    assert (rounded == cast(cast(words.ravel()[: tile.width] + np.float32(0.001), BITS), rounded.dtype)).all()


def test_rows_are_zipped() -> None:
    row = host()
    strip, rng = row.tile("float32").half_long, np.random.default_rng(3)
    halves = rng.integers(1 << 16, size=(2, strip.width), dtype=np.uint16)
    numbers = rng.random(strip.width, np.float32)

    def run(halves, second, numbers, out):
        zipped = s.tile_load_zipped(strip, halves, second)
        s.tile_store(s.tile_from_zipped(zipped), out, 0)
        s.tile_store(s.tile_from_zipped(s.tile_to_zipped(s.tile_load(strip, numbers, 0))), out + strip.row_bytes, 0)
        s.tile_store(zipped, out + 2 * strip.row_bytes, 0)

    library = Library(build.emit({"run": (s.jit(run), 4)}, row), row, {"run": 4})
    out = np.empty((3, strip.width), np.float32)
    library.run(halves.ctypes.data, halves[1:].ctypes.data, numbers.ctypes.data, out.ctypes.data)
    assert (out[0].view(np.uint16).reshape(-1, 2) == halves.T).all()
    assert (out[1] == numbers).all()
    fours = halves.T.reshape(2, -1, 2, 4, 2).swapaxes(1, 2)
    assert (out[2].view(np.uint16) == fours.ravel()).all()


@needs_pairs
def test_steps_of_pairs() -> None:
    row = host()
    tile, rng = row.tile("float32"), np.random.default_rng(2)
    a, b = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((tile.rows, 5, 2), (4, tile.width, 2)))
    size = tile.rows * tile.row_bytes

    def run(a, a_row, b, out):
        acc = s.tile_fill(tile, 0.5)
        s.tile_store(s.tile_rank2(acc, a, a_row, b), out, tile.row_bytes)
        s.tile_store(s.tile_rank2_packed(acc, a, b), out + size, tile.row_bytes)
        s.tile_store(s.tile_rank2_along(acc, a, a_row, b), out + 2 * size, tile.row_bytes)

    library = Library(build.emit({"run": (s.jit(run), 4)}, row), row, {"run": 4})
    left, right = cast(a, BITS), cast(b, BITS)
    out = np.empty((3, tile.rows, tile.width), np.float32)
    library.run(left.ctypes.data, left.strides[0], right.ctypes.data, out.ctypes.data)
    assert (out[0] == 0.5 + a[:, 0] @ b[0].T).all()
    assert (out[1] == 0.5 + a.reshape(-1, 2)[: tile.rows] @ b[0].T).all()
    assert (out[2] == 0.5 + np.einsum("mkh,knh->mn", a[:, :4], b)).all()
