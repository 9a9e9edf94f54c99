"""The layouts of fragments, by themselves: what the PTX ISA says of them, and what comes of a wrong lane."""

from __future__ import annotations

from typing import Any

import emulated_ptx as emulated
import numpy as np
import pytest
from emulated_ptx import Address, from_halves, mma, pack, to_halves

STORAGES = ("bfloat16", "float16")
LANES = range(32)


# -- the formulas of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" -------------------------


def place_in_a(lane: int, i: int) -> tuple[int, int]:
    group_id, thread_id_in_group = lane >> 2, lane % 4
    row = group_id if 0 <= i < 2 or 4 <= i < 6 else group_id + 8
    column = thread_id_in_group * 2 + (i & 1) + (8 if i >= 4 else 0)
    return row, column


def place_in_b(lane: int, i: int) -> tuple[int, int]:
    group_id, thread_id_in_group = lane >> 2, lane % 4
    row = thread_id_in_group * 2 + (i & 1) + (8 if i >= 2 else 0)
    return row, group_id


def place_in_c(lane: int, i: int) -> tuple[int, int]:
    group_id, thread_id_in_group = lane >> 2, lane % 4
    row = group_id if i < 2 else group_id + 8
    return row, thread_id_in_group * 2 + (i & 1)


@pytest.mark.parametrize(
    ("place", "rows", "columns", "shape"),
    [
        (place_in_a, emulated.A_ROWS, emulated.A_COLUMNS, (16, 16)),
        (place_in_b, emulated.B_ROWS, emulated.B_COLUMNS, (16, 8)),
        (place_in_c, emulated.C_ROWS, emulated.C_COLUMNS, (16, 8)),
    ],
)
def test_tables_are_those_of_the_isa(place: Any, rows: Any, columns: Any, shape: tuple[int, int]) -> None:
    elements = shape[0] * shape[1] // 32
    stated = np.array([[place(lane, i) for i in range(elements)] for lane in LANES])
    np.testing.assert_array_equal(stated[..., 0], rows)
    np.testing.assert_array_equal(stated[..., 1], columns)
    # each element of the matrix stands in one place
    assert len({tuple(place) for lane in stated for place in lane}) == shape[0] * shape[1]


def fragment(matrix: Any, place: Any, storage: str) -> list[Any]:
    """Registers of a matrix of float32, put together element by element."""
    elements = matrix.size // 32
    values = np.array([[matrix[place(lane, i)] for i in range(elements)] for lane in LANES], np.float32)
    return [pack(values[:, i], values[:, i + 1], storage) for i in range(0, elements, 2)]


def multiplied(a: Any, b: Any, c: Any) -> Any:
    result = np.empty((16, 8), np.float32)
    for i, register in enumerate(mma(a, b, c, "bfloat16")):
        for lane in LANES:
            result[place_in_c(lane, i)] = register[lane]
    return result


def matrices(rng: Any) -> tuple[Any, Any, Any, list[Any]]:
    left, right = (rng.integers(-8, 9, size).astype(np.float32) for size in ((16, 16), (16, 8)))
    sums = rng.integers(-8, 9, (16, 8)).astype(np.float32)
    c = [np.array([sums[place_in_c(lane, i)] for lane in LANES]) for i in range(4)]
    return left, right, sums, c


def test_fragments_multiply_as_matrices_do() -> None:
    left, right, sums, c = matrices(np.random.default_rng(0))
    a, b = fragment(left, place_in_a, "bfloat16"), fragment(right, place_in_b, "bfloat16")
    np.testing.assert_array_equal(multiplied(a, b, c), sums + left @ right)


@pytest.mark.parametrize("lane", [0, 7, 31])
def test_a_wrong_lane_shows(lane: int) -> None:
    """Registers of two lanes that are exchanged, or two registers of one lane, give another product."""
    left, right, sums, c = matrices(np.random.default_rng(1))
    a, b = fragment(left, place_in_a, "bfloat16"), fragment(right, place_in_b, "bfloat16")
    order = np.arange(32)
    order[[lane, lane ^ 1]] = order[[lane ^ 1, lane]]
    exact = sums + left @ right
    for wrong in (
        multiplied([register[order] for register in a], b, c),
        multiplied(a, [register[order] for register in b], c),
        multiplied(a, b, [register[order] for register in c]),
        multiplied([a[0], a[2], a[1], a[3]], b, c),
        multiplied(a, b[::-1], c),
    ):
        assert (wrong != exact).any()


# -- ldmatrix ----------------------------------------------------------------------------------------------------------


def in_memory(matrix: Any) -> Any:
    return np.ascontiguousarray(matrix).view(np.uint8).reshape(-1)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_as_the_isa_says(transposed: bool) -> None:
    """Lane i says where row i % 8 of matrix i // 8 is, and gets elements 2 · (i % 4) and the next of row i // 4."""
    rng = np.random.default_rng(2)
    memory = rng.integers(0, 2**16, (64, 8)).astype(np.uint16)
    rows = rng.permutation(64)[:32]
    load = emulated.load_matrices_transposed if transposed else emulated.load_matrices
    registers = load(Address(in_memory(memory), 16 * rows))
    for j in range(4):
        matrix = memory[rows[8 * j : 8 * j + 8]]
        matrix = matrix.T if transposed else matrix
        for lane in LANES:
            low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
            assert registers[j][lane] == int(low) | int(high) << 16


def test_loaded_matrices_are_factors() -> None:
    """A 16×16 matrix by rows is a left factor; the right one comes of keys by rows, or transposed of values by rows."""
    rng = np.random.default_rng(3)
    lane = np.arange(32)
    left, right = (rng.integers(-8, 9, (16, 16)).astype(np.float32) for _ in range(2))
    zeros = [np.zeros(32, np.float32)] * 4
    a = emulated.load_matrices(Address(in_memory(to_halves(left, "bfloat16")), lane % 16 * 32 + lane // 16 * 16))
    memory = in_memory(to_halves(right, "bfloat16"))
    keys = emulated.load_matrices(Address(memory, (lane % 8 + lane // 16 * 8) * 32 + lane // 8 % 2 * 16))
    values = emulated.load_matrices_transposed(Address(memory, lane % 16 * 32 + lane // 16 * 16))
    for side in range(2):
        part = slice(8 * side, 8 * side + 8)
        pair = slice(2 * side, 2 * side + 2)
        np.testing.assert_array_equal(multiplied(a, keys[pair], zeros), left @ right[part].T)
        np.testing.assert_array_equal(multiplied(a, values[pair], zeros), left @ right[:, part])


# -- halves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_halves_are_the_nearest(storage: str) -> None:
    """Every half is itself; between two of them the nearer one is taken, in the middle the even one."""
    bits = np.arange(0x7C00 if storage == "float16" else 0x7F80, dtype=np.uint16)  # not negative, finite
    numbers = from_halves(bits, storage)
    np.testing.assert_array_equal(to_halves(numbers, storage), bits)
    np.testing.assert_array_equal(to_halves(-numbers, storage), bits | 0x8000)
    low, high = numbers[:-1].astype(np.float64), numbers[1:].astype(np.float64)
    middle = ((low + high) / 2).astype(np.float32)
    exact = middle == (low + high) / 2
    np.testing.assert_array_equal(to_halves(middle, storage)[exact], (bits[:-1] + bits[:-1] % 2)[exact])
    np.testing.assert_array_equal(to_halves(np.nextafter(middle, np.float32(0)), storage)[exact], bits[:-1][exact])
    above = np.nextafter(middle, np.float32(np.inf))
    np.testing.assert_array_equal(to_halves(above, storage)[exact], bits[1:][exact])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays(storage: str, number: float) -> None:
    back = from_halves(to_halves(np.float32([number, -number]), storage), storage)
    np.testing.assert_array_equal(back, np.float32([number, -number]))
