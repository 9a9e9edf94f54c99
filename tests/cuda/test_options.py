"""Values of options that float64 holds, and float32 does not, or hardly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import tolerances

import fastattn
from fastattn.call.problem import Problem
from fastattn.call.shapes import describe
from fastattn.cuda.host import decode as decoding
from fastattn.cuda.host import tensor_cores
from fastattn.cuda.host.plan import Table, is_extreme

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

Array = np.ndarray[Any, Any]
attention = partial(fastattn.attention, backend="cuda")
attention_backward = partial(fastattn.attention_backward, backend="cuda")

#: Scales, and the sizes of queries and keys that make usual scores of them.
FACTORS = {
    np.float32: [
        (1e39, 1e-19, 1e-20),
        (-1e39, 1e-38, 1e-1),
        (1e60, 1e-30, 1e-30),
        (1e-40, 1e20, 1e20),
        (-1e-50, 1e25, 1e25),
        (1e-70, 1e36, 1e34),
    ],
    np.float64: [(1.5e308, 1e-150, 1e-158), (-1.5e308, 1e-300, 1e-8), (5e-324, 1e165, 1e158), (1e-310, 1e5, 1e305)],
}
CASES = [(dtype, *factors) for dtype, cases in FACTORS.items() for factors in cases]


def operands(dtype: Any, query_size: float, key_size: float, queries: int = 7) -> list[Array]:
    """Return dO, query, key and value; some are subnormal."""
    rng = np.random.default_rng(0)
    shapes = [(2, queries, 3), (2, queries, 5), (2, 9, 5), (2, 9, 3)]
    arrays = [rng.standard_normal(shape) for shape in shapes]
    arrays[1], arrays[2] = arrays[1] * query_size, arrays[2] * key_size
    return [array.astype(dtype) for array in arrays]


@pytest.mark.parametrize(("dtype", "scale", "query_size", "key_size"), CASES)
@pytest.mark.parametrize("kind", ["none", "bool", "float", "few queries", "dropout"])
def test_any_finite_scale(dtype: Any, scale: float, query_size: float, key_size: float, kind: str) -> None:
    grad_out, query, key, value = operands(dtype, query_size, key_size, 2 if kind == "few queries" else 7)
    rng = np.random.default_rng(1)
    seen = rng.random((7, 9)) < 0.8
    mask = {"bool": seen, "float": np.where(seen, rng.standard_normal((7, 9)), -np.inf)}.get(kind)
    options: Any = {"scale": scale, "is_causal": kind == "none"}
    if kind == "dropout":
        options.update(dropout_p=0.3, rng=4)
    out, lse, _ = tolerances.check_call(attention, query, key, value, mask, **options)
    given = (query, key, value, mask)
    found = attention_backward(grad_out, query, key, value, out, lse, mask, **options, grad_mask=kind == "float")
    tolerances.check_gradients(found, given, *tolerances.expected_gradients(grad_out, *given, **options))
    assert all(np.isfinite(one).all() and one.any() for one in (out, lse, *found))


@pytest.mark.parametrize(("scale", "query_size", "key_size"), [(1e39, 1e10, 1e-44), (1e84, 1e-42, 1e-42)])
@pytest.mark.parametrize("queries", [2, 7])
def test_scores_whose_gradients_are_beyond_float32(
    scale: float, query_size: float, key_size: float, queries: int
) -> None:
    _, query, key, value = operands(np.float32, query_size, key_size, queries)
    out, lse, _ = tolerances.check_call(attention, query, key, value, scale=scale)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("scale", [1e39, 1e60])
def test_large_scores_of_an_extreme_scale(scale: float) -> None:
    """Such that float32 holds, but not their differences: the log-sum-exp has lost what tells weights apart."""
    size = 1e20 / scale
    query, key = np.array([[size], [-size]], np.float32), np.array([[1.0], [1.0], [-1.0]], np.float32)
    value = np.array([[1.0], [3.0], [5.0]], np.float32)
    out, lse, weights = attention(query, key, value, scale=scale, return_lse=True, return_weights=True)
    np.testing.assert_allclose(out, [[2.0], [5.0]])
    np.testing.assert_allclose(lse, 1e20, rtol=1e-5)  # a query of 1e-40 is subnormal
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0], [0, 0, 1]])
    grad_value = attention_backward(np.ones((2, 1), np.float32), query, key, value, out, lse, scale=scale)[2]
    np.testing.assert_allclose(grad_value, [[0.5], [0.5], [1]])


def test_scores_beyond_float32_are_told_apart() -> None:
    """The log-sum-exp saturates, as a mask does."""
    query, key, value = np.ones((1, 1), np.float32), np.array([[1.0], [2.0]], np.float32), np.eye(2, dtype=np.float32)
    out, lse = attention(query, key, value, scale=1e300, return_lse=True)
    assert out.tolist() == [[0, 1]]
    assert lse == np.finfo(np.float32).max
    grad_value = attention_backward(np.ones((1, 2), np.float32), query, key, value, out, lse, scale=1e300)[2]
    assert grad_value.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("scale", [1e300, -1.7e308])
def test_the_largest_scales_make_nothing_infinite(scale: float) -> None:
    """Scores of 0 are 0 under any scale, however large the queries."""
    query, key, value = np.full((3, 2), 1e10, np.float32), np.zeros((4, 2), np.float32), np.eye(4, dtype=np.float32)
    out, lse, weights = attention(query, key, value, scale=scale, return_lse=True, return_weights=True)
    np.testing.assert_array_equal(out, weights)
    np.testing.assert_allclose(weights, np.full((3, 4), 0.25), rtol=1e-6)
    np.testing.assert_allclose(lse, np.log(4), rtol=1e-6)
    gradients = attention_backward(np.ones((3, 4), np.float32), query, key, value, out, lse, scale=scale)
    np.testing.assert_allclose(gradients[2], np.full((4, 4), 0.75), rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_a_float64_mask_saturates_beside_an_extreme_scale() -> None:
    query, key, value = np.zeros((5, 2), np.float32), np.zeros((6, 2), np.float32), np.eye(6, dtype=np.float32)
    mask = np.full((5, 6), -1e300)
    mask[:, 2:4] = [1e300, 2e300]
    out, lse, weights = attention(query, key, value, mask, scale=1e39, return_lse=True, return_weights=True)
    wanted = np.broadcast_to([0, 0, 0.5, 0.5, 0, 0], (5, 6))
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(weights, wanted)
    assert (lse == np.finfo(np.float32).max).all()


def test_half_precision() -> None:
    _, query, key, value = operands(np.float16, 1e-3, 1e-3)
    for scale in (1e-31, 1e31):
        wide = (array.astype(np.float32) for array in (query, key, value))
        out = attention(query, key, value, scale=scale)
        assert out.dtype == np.float16
        wanted = fastattn.attention(*wide, scale=scale, backend="reference")
        np.testing.assert_allclose(out, wanted, rtol=1e-3, atol=1e-3)


def with_scale(problem: Problem, scale: float, dtype: Any = np.float32) -> Problem:
    """Return a problem with another scale, in another dtype."""
    return replace(problem, real=np.dtype(dtype), scores=replace(problem.scores, scale=scale))


def test_which_scales_are_extreme() -> None:
    array = np.zeros((2, 2), np.float32)
    problem = describe(array, array, array)[0]
    for dtype, extreme, usual in (
        (np.float32, (1e39, -1e39, 1e31, 1e-31, -1e-300), (0.0, 1.0, -1.0, 1e30, 1e-30)),
        (np.float64, (1.1e300, -1.7e308), (0.0, 1.0, 1e-320, -1e300)),
    ):
        for scale in extreme:
            assert is_extreme(with_scale(problem, scale, dtype))
        for scale in usual:
            assert not is_extreme(with_scale(problem, scale, dtype))
    problem = with_scale(problem, 1e39)
    assert "extreme" in (decoding.against(problem) or "")
    table = Table(np.zeros((8, 1), np.int64), np.ones((8, 2), np.int64), np.zeros(8, np.int64))
    assert "scale" in (tensor_cores.against("float16", "float32", problem, table, (0,), (8, 0)) or "")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dropout_p", [1e-300, 5e-324, 1 - 2.0**-33, 1 - 2.0**-53, 1.0])
def test_any_probability_of_dropout(dtype: Any, dropout_p: float) -> None:
    grad_out, query, key, value = operands(dtype, 1, 1)
    options: Any = {"dropout_p": dropout_p, "rng": 3}
    out, lse, _ = tolerances.check_call(attention, query, key, value, **options)
    found = attention_backward(grad_out, query, key, value, out, lse, **options)
    given = (query, key, value, None)
    tolerances.check_gradients(found, given, *tolerances.expected_gradients(grad_out, *given, **options))
    assert all(np.isfinite(one).all() for one in (out, lse, *found))
