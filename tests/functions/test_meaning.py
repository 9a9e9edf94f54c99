"""What a compiled function gives is what Python gives: at random, and named examples of what once was not so."""

from __future__ import annotations

import math
from typing import Any

import evaluated
import function_sources
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

Array = NDArray[Any]

#: Odd numbers, and usual ones.
SCORES = np.random.default_rng(0).standard_normal((9, 8)) * 3
SCORES[0] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e300, 1.0, -2.5]
PLACE = (1, 2, 3, 2)  # batch, head, query, key


def close(a: Array, b: Array, within: float) -> NDArray[np.bool_]:
    """Say where two arrays are the same, or nearly."""
    with np.errstate(all="ignore"):
        near = np.abs(a - b) <= within * np.maximum(np.abs(b), 1e-300)
    return np.asarray(near | (a == b) | (np.isnan(a) & np.isnan(b)))


def check(function: Any, place: tuple[int, int, int, int] = PLACE, scores: Array = SCORES) -> None:
    """Assert that a function gives compiled what it gives in Python, where a rounding more or less changes nothing."""
    found, out_of_range = evaluated.as_compiled(function, scores, *place)
    wanted, wanted_out = evaluated.as_python(function, scores, *place)
    wide, wide_out = evaluated.as_python(function, scores.astype(np.longdouble), *place)
    steady = close(wanted, wide, 1e-11) & (wanted_out == wide_out)
    fine = (out_of_range == wanted_out) & (out_of_range | close(found, wanted, 1e-8))
    wrong = np.argwhere(steady & ~fine)
    assert not len(wrong), f"of {scores[tuple(wrong[0])]}: {found[tuple(wrong[0])]}, not {wanted[tuple(wrong[0])]}"


@settings(max_examples=settings().max_examples // 4)
@given(source=function_sources.sources())
def test_any_function(source: str) -> None:
    function = function_sources.made(source)
    for head in range(6):
        try:
            check(function, (1, head, 3, 2))
        except ZeroDivisionError:  # of Python's own numbers; NumPy has inf, NaN or 0
            continue


@settings(max_examples=settings().max_examples // 20)
@given(source=function_sources.sources(branches=2))
def test_any_derivative(source: str) -> None:
    function, scores = function_sources.made(source), SCORES[4:7, :3]
    for head in range(2):
        try:
            wanted, unsure = evaluated.slopes_as_python(function, scores.astype(np.longdouble), 1, head, 3, 2)
        except ZeroDivisionError:
            continue
        found = evaluated.slopes_as_compiled(function, scores, 1, head, 3, 2)
        with np.errstate(all="ignore"):
            told = np.isfinite(wanted) & (unsure < 1e-9 * (1 + np.abs(wanted))) & (np.abs(wanted) < 1e6)
            wrong = np.argwhere(told & ~(np.abs(found - wanted) <= 1e-6 * (1 + np.abs(wanted))))
        assert not len(wrong), (scores[tuple(wrong[0])], found[tuple(wrong[0])], wanted[tuple(wrong[0])])


bytes_, large = np.arange(100, 110, dtype=np.int8), np.array([2**62, 5], np.uint64)
widths, powers = np.arange(1, 9, dtype=np.float32), np.float16([1.5, 2.5, 3.5])
no_elements, scalar = np.zeros((0, 5)), np.array(2.5)
zero, half = 0, 0.5
EXAMPLES = {
    "whole numbers do not wrap at 8 bits": lambda s, b, h, q, k: bytes_[q] * bytes_[k],
    "whole numbers of 64 bits without sign": lambda s, b, h, q, k: large[0] if s > 0 else q,
    "// of floating numbers is exact": lambda s, b, h, q, k: 1.0 // 0.1 + (s + 1.0) // 0.1 * 0,
    "% has the sign of the divisor": lambda s, b, h, q, k: s % -1.5 + -q % 4,
    "% of floating numbers at infinity": lambda s, b, h, q, k: 1.5 % np.abs(s),
    "// of whole numbers by 0": lambda s, b, h, q, k: q // zero + q % zero,
    "division by 0": lambda s, b, h, q, k: q / zero - s / zero,
    "fix rounds to 0": lambda s, b, h, q, k: np.fix(s * 1.7),
    "math.floor makes an index": lambda s, b, h, q, k: widths[math.floor(min(max(abs(s), 0.0), 5.0))],
    "int of what is not finite": lambda s, b, h, q, k: int(s) % 1000,
    "sign of whole numbers is one": lambda s, b, h, q, k: widths[np.sign(q - k)],
    "a power of whole numbers": lambda s, b, h, q, k: 3**q % 7 + 2.0 ** (-q),
    "max is that of Python": lambda s, b, h, q, k: max(1.0, s) + min(s, 2.0, q),
    "maximum is NaN": lambda s, b, h, q, k: np.maximum(1.0, s),
    "fmax is not": lambda s, b, h, q, k: np.fmax(1.0, s),
    "round is to even": lambda s, b, h, q, k: round(q + 0.5) + np.round(k + 0.5),
    "whole and floating numbers compare exactly": lambda s, b, h, q, k: 1.0 if q + 2**53 > 2.0**53 else s,
    "comparisons in a chain": lambda s, b, h, q, k: 1 < q < k <= 7,
    "logical_and is of truth": lambda s, b, h, q, k: np.logical_and(2, 1 + 0 * q),
    "a shift beyond 64 bits": lambda s, b, h, q, k: (q << 70) + (1 << q),
    "half precision": lambda s, b, h, q, k: powers[q % 3] * s,
    "an array without elements": lambda s, b, h, q, k: no_elements[q % 1, k % 5] + no_elements[q % 1][k % 5],
    "an array without axes": lambda s, b, h, q, k: s * scalar,
    "a tuple": lambda s, b, h, q, k: (s, 2, half)[1] + (q, k)[-1],
    "and, or, not": lambda s, b, h, q, k: (q > 4 and k) or (not s),
    "~ of a comparison": lambda s, b, h, q, k: ~(q > k),
    "a product of comparisons": lambda s, b, h, q, k: (q > 3) * (k > 3) + s,
    "-0.0 and abs": lambda s, b, h, q, k: 1 / abs(s) + np.abs(-0.0),
    "shapes": lambda s, b, h, q, k: no_elements.shape[1] + len(bytes_),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str) -> None:
    check(EXAMPLES[name])


def test_loops_and_names_of_ones_own() -> None:
    def function(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        total, power = score, 1
        while power < query:
            power *= 2
        for step in range(5, 0, -2):
            total += step * widths[step] if step > head else 0.0
        a, (b, c) = head, (query, power)
        return total + a * b - c

    check(function)


@pytest.mark.parametrize(
    "dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "bool", "bfloat16"]
)
@pytest.mark.parametrize("steps", [(1, 1), (-1, 2), (3, -1), (0, 0)])
def test_captured_arrays_of_any_dtype_and_strides(dtype: str, steps: tuple[int, int]) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    table = np.random.default_rng(0).integers(0, 2, (30, 40)).astype(dtype)
    table = np.broadcast_to(table[:1, :1], (9, 9)) if steps == (0, 0) else table[:: steps[0], :: steps[1]]

    def function(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        row = table[-1 - query % len(table)]
        return score + (row[key - 7] if table.shape[0] > 5 else 0.0) * 2

    check(function)


def test_every_number_of_half_precision() -> None:
    table = np.arange(2**16, dtype=np.uint16).view(np.float16)

    def function(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return table[key * 8 + query]

    found, _ = evaluated.as_compiled(function, np.zeros((2**13, 8), np.float32), 0, 0, 0, 0)
    np.testing.assert_array_equal(found.reshape(-1), table.astype(np.float32))


SMOOTH = ("exp", "exp2", "expm1", "tanh", "sqrt", "square", "log", "log2", "log10", "log1p", "sin", "cos", "reciprocal")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SMOOTH)
def test_elementary_functions_to_the_last_places(name: str, dtype: Any) -> None:
    around: dict[str, Any] = {"np": np}
    exec(f"def function(score, batch, head, query, key): return np.{name}(score)", around)
    rng = np.random.default_rng(0)
    exponents = rng.uniform(-12, 2.2 if dtype == np.float32 else 2.8, (2000, 8))
    scores = (rng.choice((-1, 1), exponents.shape) * 10**exponents).astype(dtype)
    scores[0] = [0, 1, -1, np.inf, -np.inf, np.nan, 1e-30, 0.5]
    found, _ = evaluated.as_compiled(around["function"], scores, 0, 0, 0, 0)
    with np.errstate(all="ignore"):
        wanted = getattr(np, name)(scores.astype(np.longdouble if dtype == np.float64 else np.float64)).astype(dtype)
        units = np.abs(found - wanted) / np.spacing(np.maximum(np.abs(wanted), np.finfo(dtype).tiny))
    fine = (units <= 8) | (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    assert fine.all(), (scores[~fine][:5], found[~fine][:5], wanted[~fine][:5], np.nanmax(units[~fine]))
