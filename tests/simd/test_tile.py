"""The vector operations, each against NumPy, for every number of lanes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numba.core import errors
from numpy.typing import NDArray

from fastattn import simd as s
from fastattn.cpu.kernels import additive
from fastattn.cpu.kernels.additive import exp_twice
from fastattn.cpu.kernels.softmax import exp2
from fastattn.machine import building as build
from fastattn.machine.features import HOST
from fastattn.machine.kernel import Kernel
from fastattn.machine.libraries import Library
from fastattn.machine.table import host

Array = NDArray[Any]

SHAPES = [("float32", 4), ("float32", 8), ("float32", 16), ("float64", 2), ("float64", 4), ("float64", 8)]
COEFFICIENTS = (1.0, -0.5, 0.25, 3.0)
ROWS, VECTORS = 3, 2


def functions(dtype: str, lanes: int) -> dict[str, tuple[Callable[..., Any], int]]:
    """Return the functions to compile for a number of lanes, and the number of their arguments."""
    scalef = host().scalef and host().vector_bytes == lanes * np.dtype(dtype).itemsize
    tile = s.TileShape(dtype, lanes, ROWS, VECTORS)
    kernel = Kernel("", replace(host(), scalef=scalef), tile)
    size = ROWS * tile.row_bytes

    def arithmetic(a, b, c, out):
        x, y, z = (
            s.tile_load(tile, a, tile.row_bytes),
            s.tile_load(tile, b, tile.row_bytes),
            s.tile_load(tile, c, tile.row_bytes),
        )
        row, vector = s.tile_load(tile.single, b, 0), s.tile_load(tile.vector, b, 0)
        at = out
        for result in (
            x + y,
            x - y,
            x * y,
            x / y,
            s.maximum(x, y),
            s.minimum(x, y),
            s.where_greater(x, y, z, x),
            s.absolute(x),
            s.fma(x, y, z),
            s.horner(x, COEFFICIENTS),
            x + row,
            x * vector,
            2.0 * x,
            x - 1.0,
            s.maximum(0.5, x),
        ):
            s.tile_store(result, at, tile.row_bytes)
            at += size

    def making(row, column, stride, out):
        at = out
        acc = s.tile_fill(tile, 1.5)
        for result in (
            acc,
            s.tile_iota(tile),
            s.tile_row_index(tile),
            s.tile_repeat(tile, s.tile_load(tile.single, row, 0)),
            s.tile_rank1(acc, column, stride, row),
            s.tile_load_column(tile, column, stride),
            s.tile_rank1_reciprocals(acc, column, stride, column + stride, row, row + tile.itemsize, column, row),
        ):
            s.tile_store(result, at, tile.row_bytes)
            at += size
        s.tile_store(s.largest_row(s.tile_rank1(acc, column, stride, row)), at, tile.row_bytes)
        s.tile_store(s.sum_rows(s.tile_rank1(acc, column, stride, row)), at + tile.row_bytes, tile.row_bytes)

    def neighbours(a, a_row, b, out):
        acc = s.tile_fill(tile, 1.5)
        s.tile_store(s.tile_rank1_packed(acc, a, b), out, tile.row_bytes)
        s.tile_store(s.tile_rank1_along(acc, a, a_row, b), out + size, tile.row_bytes)

    def all_zero(a):
        return int(s.all_zero(s.tile_load(tile, a, tile.row_bytes)))

    def transpose(source, row, out):
        s.tile_store(s.tile_transpose(s.tile_load(tile.square, source, row)), out, tile.vector_bytes)

    def load_bool(source, count, out):
        for i in range(0, count, tile.lanes):
            s.tile_store(s.tile_load_bool(tile.vector, source + i, 0), out + i * tile.itemsize, 0)

    def load_half(source, count, out):
        for i in range(0, count, tile.lanes):
            widened = s.tile_load_stored(kernel.half_place, tile.vector, source + 2 * i, 0)
            s.tile_store(widened, out + i * tile.itemsize, 0)

    def load_bfloat16(source, count, out):
        for i in range(0, count, tile.lanes):
            widened = s.tile_load_stored(kernel.bfloat16_place, tile.vector, source + 2 * i, 0)
            s.tile_store(widened, out + i * tile.itemsize, 0)

    def load_other(source, count, out):
        for i in range(0, count, tile.lanes):
            s.tile_store(
                s.tile_load_other(tile.vector, source + (12 - tile.itemsize) * i, 0), out + i * tile.itemsize, 0
            )

    def load_part(source, row, rows, columns, out):
        part = s.tile_load_part(tile.square, source, row, rows, columns)
        s.tile_store(part, out, tile.vector_bytes)

    def over_lanes(source, out):
        square, vector = s.tile_load(tile.square, source, tile.vector_bytes), s.tile_load(tile.vector, source, 0)
        s.tile_store(s.row_sums(square), out, 0)
        s.store_element(tile, out + tile.vector_bytes, s.sum_lanes(vector))
        s.store_element(tile, out + tile.vector_bytes + tile.itemsize, s.largest_lane(vector))

    def of_factors(source, row, out):
        few = s.tile_load(tile.factor, source, row)
        s.tile_store(s.tile_stretch(tile.square, few), out, tile.vector_bytes)
        out += tile.square.rows * tile.vector_bytes
        s.store_split(tile.cofactor_row, s.tile_load(tile.vector, source, 0), out, row)

    def dot(a, b, c, out):
        left, right = s.tile_load(tile.half_long, a, 0), s.tile_load(tile.half_long, b, 0)
        s.tile_store(s.add_dot(left, right, s.tile_load(tile.vector, c, 0)), out, 0)

    def power(source, count, out):
        for i in range(0, count * tile.itemsize, tile.vector_bytes):
            s.tile_store(exp2(kernel, s.tile_load(tile.vector, source + i, 0)), out + i, 0)

    def twice(source, count, out):
        for i in range(0, count * tile.itemsize, tile.vector_bytes):
            s.tile_store(exp_twice(tile, s.tile_load(tile.vector, source + i, 0)), out + i, 0)

    return {
        f"{function.__name__}_{dtype}_{lanes}": (s.jit(function), function.__code__.co_argcount)
        for function in (
            *(arithmetic, making, neighbours, all_zero, transpose, power, twice),
            *(load_bool, load_half, load_bfloat16, load_other),
            *(load_part, over_lanes, of_factors, dot),
        )
    }


@pytest.fixture(scope="module")
def compiled() -> Library:
    """Compile all functions at once, for this machine."""
    wanted: dict[str, tuple[Callable[..., Any], int]] = {}
    for shape in SHAPES:
        wanted |= functions(*shape)
    return Library(build.emit(wanted, host()), host(), {name: count for name, (_, count) in wanted.items()})


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def shape(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


@pytest.fixture
def call(compiled: Library, shape: tuple[str, int]) -> Callable[..., Any]:
    """Return a function that runs the compiled function of that name on arrays, given as their addresses."""

    def run(name: str, *args: Any) -> Any:
        function = getattr(compiled, "{}_{}_{}".format(name, *shape))
        return function(*(arg.ctypes.data if isinstance(arg, np.ndarray) else arg for arg in args))

    return run


def numbers(shape: tuple[str, int], *size: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(size).astype(shape[0])


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for x, y, z in zip(a.flat, b.flat, c.flat, strict=True)
    ]
    return np.array([float(number) for number in exact]).astype(a.dtype).reshape(a.shape)


def is_fused() -> bool:
    """Whether multiply-adds of the row are rounded once."""
    return HOST == "arm64" or "fma" in host().needs


def multiply_add(a: Array, b: Array, c: Array) -> Array:
    return fused(a, b, c) if is_fused() else a * b + c


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
def test_arithmetic(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    x, y, z = (numbers(shape, ROWS, VECTORS, shape[1], seed=i) for i in range(3))
    # x, y and z are not NaN in the same places: it matters which operand NaN is
    for array, special in ((x, [np.nan, 1, 1, np.inf, -np.inf, 0, 2]), (y, [1, np.nan, 1, np.inf, 0, 0, 2])):
        array.flat[: len(special)] = special
    z.flat[-1] = np.nan
    out = np.empty((15, *x.shape), shape[0])
    call("arithmetic", x, y, z, out)
    polynomial = np.full_like(x, COEFFICIENTS[-1])
    fine = slice(7, -1)
    with np.errstate(all="ignore"):
        wanted = [
            x + y,
            x - y,
            x * y,
            x / y,
            np.where(x > y, x, y),
            np.where(x < y, x, y),
            np.where(x > y, z, x),
            np.abs(x),
            x * y + z,
            x,
            x + y[0],
            x * y[0, 0],
            2 * x,
            x - 1,
            np.where(x < 0.5, np.array(0.5, x.dtype), x),
        ]
    for number in (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14):
        np.testing.assert_array_equal(out[number], wanted[number], err_msg=str(number))
    np.testing.assert_array_equal(np.isnan(out[8]), np.isnan(wanted[8]))
    fx, fy, fz = (array.ravel()[fine] for array in (x, y, z))
    np.testing.assert_array_equal(out[8].ravel()[fine], multiply_add(fx, fy, fz))
    polynomial = np.full_like(fx, COEFFICIENTS[-1])
    for coefficient in COEFFICIENTS[-2::-1]:
        polynomial = multiply_add(polynomial, fx, np.full_like(fx, coefficient))
    np.testing.assert_array_equal(out[9].ravel()[fine], polynomial)


def test_making_tiles(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    wide_row, long_column = numbers(shape, VECTORS * shape[1] + 1), numbers(shape, 2 * ROWS + 2, seed=1)[::2]
    row, column = wide_row[:-1], long_column[:-1]
    out = np.empty((8, ROWS, row.size), shape[0])
    call("making", row, column, column.strides[0], out)
    assert (out[0] == 1.5).all()
    assert (out[1] == np.arange(row.size)).all()
    assert (out[2] == np.arange(ROWS)[:, None]).all()
    assert (out[3] == row).all()
    outer = [multiply_add(np.full_like(row, element), row, np.full_like(row, 1.5)) for element in column]
    np.testing.assert_array_equal(out[4], outer)
    np.testing.assert_array_equal(out[5], np.repeat(column[:, None], row.size, axis=1))
    with np.errstate(all="ignore"):
        pair = 1.5 + column[0] / (1 + np.outer(column, row)) + row[0] / (1 + np.outer(long_column[1:], wide_row[1:]))
    np.testing.assert_allclose(out[6], pair, rtol=1e-4 if shape[0] == "float32" else 1e-12)
    np.testing.assert_array_equal(out[7][0], np.max(outer, axis=0))
    np.testing.assert_array_equal(out[7][1], (outer[2] + (outer[1] + outer[0])))


def test_elements_that_lie_next_to_each_other(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    """What machines do that multiply by elements of a register, as all machines can."""
    a, b = numbers(shape, ROWS, 7), numbers(shape, 4, VECTORS * shape[1], seed=1)
    out = np.empty((2, ROWS, b.shape[1]), shape[0])
    call("neighbours", a, a.strides[0], b, out)

    def add(acc: Array, column: Array, row: Array) -> Array:
        return multiply_add(np.repeat(column[:, None], row.size, axis=1), np.repeat(row[None], ROWS, axis=0), acc)

    acc = np.full_like(out[0], 1.5)
    np.testing.assert_array_equal(out[0], add(acc, a.ravel()[:ROWS], b[0]))
    for step in range(4):
        acc = add(acc, a[:, step], b[step])
    np.testing.assert_array_equal(out[1], acc)


def test_all_zero(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    tile = np.zeros((ROWS, VECTORS * shape[1]), shape[0])
    assert call("all_zero", tile) == 1
    for place in range(tile.size):
        for value, wanted in ((1.0, 0), (-0.0, 1), (np.inf, 0), (np.nan, 0), (-np.inf, 0), (1e-40, 0)):
            tile.flat[place] = value
            assert call("all_zero", tile) == wanted, (place, value)
        tile.flat[place] = 0


def test_transpose(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    lanes = shape[1]
    source, out = numbers(shape, lanes, lanes + 3), np.empty((lanes, lanes), shape[0])
    call("transpose", source, source.strides[0], out)
    np.testing.assert_array_equal(out, source[:, :lanes].T)


def test_a_part_of_a_tile_reads_nothing_else(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    lanes = shape[1]
    source, out = numbers(shape, lanes, lanes + 3), np.empty((lanes, lanes), shape[0])
    for rows, columns in ((lanes, lanes), (lanes, 1), (1, lanes - 1), (0, lanes), (lanes - 1, 0)):
        call("load_part", source, source.strides[0], rows, columns, out)
        wanted = np.zeros_like(out)
        wanted[:rows, :columns] = source[:rows, :columns]
        np.testing.assert_array_equal(out, wanted)
    call("load_part", 0, 1 << 40, 0, lanes, out)  # not even where nothing is
    assert not out.any()


def test_sums_over_lanes_have_one_order(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    lanes = shape[1]
    source, out = numbers(shape, lanes, lanes), np.empty(lanes + 2, shape[0])
    call("over_lanes", source, out)
    sums = source
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    np.testing.assert_array_equal(out[:lanes], sums[:, 0])
    assert out[lanes] == sums[0, 0]
    assert out[lanes + 1] == source[0].max()


def test_factors_of_a_square(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    lanes = shape[1]
    rows = s.TileShape(shape[0], lanes, 1, 1).factor.rows
    source = numbers(shape, rows, lanes + 1)
    out = np.full((lanes * lanes) + rows * (lanes + 1), np.nan, shape[0])
    call("of_factors", source, source.strides[0], out)
    np.testing.assert_array_equal(
        out[: lanes * lanes].reshape(lanes, lanes), source[:, :lanes].repeat(lanes // rows, 0)
    )
    pieces = out[lanes * lanes :].reshape(rows, lanes + 1)[:, : lanes // rows]
    np.testing.assert_array_equal(pieces, source[0, :lanes].reshape(rows, -1))


def test_a_dot_product_by_lanes(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    a, b, c, out = (numbers(shape, *size, seed=i) for i, size in enumerate([(4, shape[1])] * 2 + [(shape[1],)] * 2))
    call("dot", a, b, c, out)
    for left, right in zip(a, b, strict=True):
        c = multiply_add(left, right, c)
    np.testing.assert_array_equal(out, c)


def test_every_boolean_byte(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    source, out = np.arange(256, dtype=np.uint8), np.empty(256, shape[0])
    call("load_bool", source, source.size, out)
    np.testing.assert_array_equal(out, np.where(source != 0, 0, -np.inf))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_every_half(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    source, out = np.arange(1 << 16, dtype=np.uint16).view(np.float16), np.empty(1 << 16, shape[0])
    call("load_half", source, source.size, out)
    np.testing.assert_array_equal(out, source.astype(shape[0]))
    np.testing.assert_array_equal(np.signbit(out), np.signbit(source))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_every_bfloat16(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    source, out = np.arange(1 << 16, dtype=np.uint16), np.empty(1 << 16, shape[0])
    call("load_bfloat16", source, source.size, out)
    wanted = (source.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(out, wanted.astype(shape[0]))
    np.testing.assert_array_equal(np.signbit(out), np.signbit(wanted))


def test_the_other_dtype_saturates(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    dtype, other = (np.float32, np.float64) if shape[0] == "float32" else (np.float64, np.float32)
    largest = float(np.finfo(np.float32).max)
    special = [
        0.0,
        -0.0,
        1.1,
        -1e-50,
        largest,
        -largest,
        np.inf,
        -np.inf,
        np.nan,
        0.1,
        1e-310,
        1e-42,
        1.0,
        -7.3,
        2.5,
        3.0,
    ]
    with np.errstate(over="ignore"):
        source = np.array([*special, 1e39, -1e39, 1.7e308, -1.7e308, *np.linspace(-5, 5, 44)]).astype(other)
    out = np.empty(source.size, dtype)
    call("load_other", source, source.size, out)
    wanted = source
    if dtype is np.float32:
        wanted = np.where(np.isfinite(source), np.clip(source, -largest, largest), source)
    np.testing.assert_array_equal(out, wanted.astype(dtype))
    np.testing.assert_array_equal(np.signbit(out), np.signbit(wanted))


def test_exp2_is_right_to_some_units_in_the_last_place(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    single = shape[0] == "float32"
    scalef = host().scalef and host().vector_bytes == shape[1] * np.dtype(shape[0]).itemsize
    wider, lowest = (np.float64, -126) if single else (np.longdouble, -1022)
    x = np.concatenate(
        [
            np.linspace(lowest, -lowest, 400_000),
            np.linspace(-1, 1, 400_000),
            np.arange(lowest, -lowest + 1),
            np.arange(lowest, -lowest) + 0.5,
            np.nextafter(np.arange(lowest, -lowest) + 0.5, 0, dtype=shape[0]),
            -np.logspace(-45, 2, 2000),
        ]
    ).astype(shape[0])
    x = np.resize(x, -(-x.size // 16) * 16)
    out = np.empty_like(x)
    call("power", x, x.size, out)
    exact = np.exp2(x.astype(wider))
    error = np.abs(out - exact) / np.spacing(exact.astype(shape[0]))
    bound = 2.1 if is_fused() else 2.4
    assert error.max() <= (3 if scalef and single else bound), (error.max(), x[error.argmax()])
    whole = x == np.rint(x)
    np.testing.assert_array_equal(out[whole], exact[whole])  # and 2^0 is 1


def test_exp_twice_is_right_to_some_units_in_the_last_place(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    """As far as additive attention takes it: large arguments keep their digits."""
    single = shape[0] == "float32"
    wider, farthest = (np.float64, additive.REACH_32) if single else (np.longdouble, additive.REACH_64)
    x = np.concatenate([np.linspace(-farthest, farthest, 400_000), np.linspace(-1, 1, 40_000)]).astype(shape[0])
    out = np.empty_like(x)
    call("twice", x, x.size, out)
    exact = np.exp(2 * x.astype(wider))
    error = np.abs(out - exact) / np.spacing(exact.astype(shape[0]))
    bound = 2.2 if is_fused() else 2.5  # what 2^x errs by, and the rounding of its argument
    assert error.max() <= bound, (error.max(), x[error.argmax()])


def test_exp2_at_its_limits(call: Callable[..., Any], shape: tuple[str, int]) -> None:
    tiny = np.finfo(shape[0]).tiny
    lowest = -126 if shape[0] == "float32" else -1022
    x = np.array(
        [-np.inf, -1e30, -3e38, lowest - 150, lowest - 1000, lowest - 1, np.nan, 0, *lowest - np.linspace(0, 1, 8)]
    )
    x = x.astype(shape[0])
    out = np.empty_like(x)
    call("power", x, x.size, out)
    assert (out[:5] == 0).all()
    assert 0 <= out[5] < tiny
    assert np.isnan(out[6])
    assert out[7] == 1
    assert (np.abs(out[8:] - np.exp2(x[8:].astype(np.float64))) <= tiny).all()


# -- static values -----------------------------------------------------------------------------------------------------


@s.jit
def answer(kernel: Any, number: Any) -> Any:
    """Return something else for each kernel; what is said of an unknown step would not compile."""
    if "unknown" in kernel.steps:
        return number.unknown
    total = kernel.tile.single.rows + 10 * kernel.tile.rows
    if kernel.reads == "panels" and "mask" not in kernel.steps:
        total += 100
    elif kernel.reads == "rows":
        total += 200
    is_small = kernel.score != "dot" or number < 3
    if is_small:
        total += 1000
    return total + 10000 * kernel.row.scalef


def test_kernels_branch_on_words() -> None:
    row = replace(host(), scalef=False)
    plain = Kernel("", row, s.TileShape("float32", 4, ROWS, VECTORS), reads="panels")
    expected = {
        plain: (1131, 131),
        replace(plain, steps=("dropout", "mask")): (1031, 31),
        replace(plain, reads="rows", row=replace(row, scalef=True)): (11231, 10231),
        replace(plain, score="additive", reads="strided"): (1031, 1031),
    }

    def asking(kernel: Kernel) -> Callable[..., Any]:
        return s.jit(lambda number: answer(kernel, number))

    functions = {f"f{i}": (asking(kernel), 1) for i, kernel in enumerate(expected)}
    library = Library(build.emit(functions, host()), host(), dict.fromkeys(functions, 1))
    for i, (small, large) in enumerate(expected.values()):
        assert (getattr(library, f"f{i}")(2), getattr(library, f"f{i}")(3)) == (small, large)


def test_what_is_not_taken_is_not_typed() -> None:
    kernel = Kernel("", host(), s.TileShape("float32", 4, ROWS, VECTORS), steps=("unknown",))
    with pytest.raises(errors.TypingError, match="unknown"):
        build.emit({"function": (s.jit(lambda number: answer(kernel, number)), 1)}, host())


def test_sizes_that_code_is_told_are_no_part_of_it() -> None:
    """No kernel can read them, and no kernel is compiled anew for them."""
    row = host()
    told = replace(row, blocking=replace(row.blocking, group_bytes=1))
    assert Kernel("forward", row) == Kernel("forward", told)
    assert repr(Kernel("forward", row)) == repr(Kernel("forward", told))
    kernel = Kernel("forward", row)
    with pytest.raises(errors.TypingError, match="blocking"):
        build.emit({"function": (s.jit(lambda number: number + kernel.row.blocking.group_bytes), 1)}, row)
