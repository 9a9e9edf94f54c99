"""Weights and gradients where rounding has taken from the log-sum-exp what tells one weight from another.

What is right is computed from the scores alone (`dense`). Queries and keys are small integers, whose products no order
of a sum rounds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import dense
import half_gradients
import numpy as np
import pytest
import tolerances
from half_cases import EPS, Halves

import fastattn
from fastattn.call.rounding import PRECISE
from fastattn.cuda.available import Device
from fastattn.cuda.host import backward
from fastattn.cuda.kernels.fragments import TileShape

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

Array = np.ndarray[Any, Any]
attention = partial(fastattn.attention, backend="cuda")
attention_backward = partial(fastattn.attention_backward, backend="cuda")
LOWEST = {dtype: float(np.finfo(dtype).min) for dtype in (np.float16, np.float32, np.float64)}
SMALL = TileShape("bfloat16", "none", width=64, warps=1, rows=16, keys=16, blocks=1)


def integers(*shapes: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.integers(-2, 3, shape).astype(dtype) for shape in shapes]


def added(scores: Array, mask: Array) -> Array:
    """Return the scores under a floating mask, in their dtype; the mask saturates."""
    limit = np.finfo(scores.dtype).max
    with np.errstate(all="ignore"):
        mask = np.where(np.isinf(mask), mask, np.clip(mask, -limit, limit)).astype(scores.dtype)
    return scores + mask


def checked(dtype: Any, grad_out: Array, query: Array, key: Array, value: Array, mask: Array, **options: Any) -> None:
    """Call attention and its gradients, that of the mask included, and assert that they are right."""
    real = np.float64 if dtype == np.float64 else np.float32
    scale = 0.5
    scores = added((real(scale) * (query.astype(real) @ key.astype(real).swapaxes(-1, -2))), mask)
    if options.get("is_causal"):
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    grad_lse, dropout = options.pop("grad_lse", None), options.get("dropout_p", 0.0)
    out, lse, weights = attention(query, key, value, mask, return_lse=True, return_weights=True, scale=scale, **options)
    factors: Any = 1.0
    if dropout:
        zeros = np.zeros_like(scores, real)
        options_alone = {name: option for name, option in options.items() if name != "is_causal"}
        kept = fastattn.attention(
            zeros[..., :1],
            zeros[..., 0, :, None],
            zeros[..., 0, :, None],
            **options_alone,
            return_weights=True,
            backend="reference",
        )[1]
        factors = (kept > 0) / (1 - dropout)
    wanted = dense.gradients(grad_out, query, key, value, scores, scale, factors, grad_lse)
    promise = {np.float16: 2e-5}.get(dtype, tolerances.GRADIENT_PROMISE[np.dtype(real)])
    found = attention_backward(
        grad_out, query, key, value, out, lse, mask, grad_lse=grad_lse, grad_mask=True, scale=scale, **options
    )
    pairs = [*zip(found, wanted[:3], strict=False), (found[3], wanted.scores), (weights, wanted.weights * factors)]
    for one, want in pairs:
        # the output that arrives is rounded, which counts for halves, and so is the gradient of a mask of halves
        rounding = 4 * float(np.finfo(dtype).eps + np.finfo(one.dtype).eps)
        size = max(1.0, float(np.abs(want).max()))
        assert float(np.abs(one - want).max()) <= (promise + rounding) * size


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("mask_dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("height", [-200.0, -1e4, -1e9, "lowest", 1e9])
def test_a_row_of_scores_all_alike_has_equal_weights(dtype: Any, mask_dtype: Any, height: Any) -> None:
    height = LOWEST[mask_dtype] if height == "lowest" else max(height, LOWEST[mask_dtype])
    height = min(height, -LOWEST[mask_dtype])
    query, key, value = (np.zeros(shape, dtype) for shape in ((1, 2), (24, 2), (24, 1)))
    value += 1
    mask = np.full((1, 24), height, mask_dtype)
    out, lse, weights = attention(query, key, value, mask, return_lse=True, return_weights=True)
    np.testing.assert_allclose(weights.astype(float), 1 / 24, rtol=1e-3 if dtype == np.float16 else 1e-6)
    grad_value = attention_backward(np.ones((1, 1), dtype), query, key, value, out, lse, mask)[2]
    np.testing.assert_allclose(grad_value.astype(float), 1 / 24, rtol=1e-3 if dtype == np.float16 else 1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("mask_dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.25, "rng": 5}], ids=str)
def test_lost_rows_beside_others(dtype: Any, mask_dtype: Any, options: dict[str, Any]) -> None:
    """Rows of all sizes in a block: ordinary ones, coarse ones, the lowest there are, and empty ones."""
    grad_out, query, key, value = integers((2, 11, 3), (2, 11, 4), (2, 9, 4), (2, 9, 3), dtype=dtype)
    rows = np.array([0, 130, -500, -1e4, 6e4, -6e4, LOWEST[mask_dtype], -LOWEST[mask_dtype], -np.inf, 1, -1])
    mask = np.broadcast_to(rows[:, None], (2, 11, 9)).astype(mask_dtype)
    mask[:, :, 4] = -np.inf
    mask[:, 3, 2:5] -= 8
    grad_lse = integers((2, 11), seed=1, dtype=np.float64 if dtype == np.float64 else np.float32)[0]
    checked(dtype, grad_out, query, key, value, mask, grad_lse=grad_lse, **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ordinary_rows_have_the_bits_that_they_have_alone(dtype: Any) -> None:
    grad_out, query, key, value = integers((12, 3), (12, 4), (9, 4), (9, 3), dtype=dtype)
    rows = np.arange(12) % 2 == 0
    mask = np.where(rows[:, None], 0, -1e9) * np.ones(9)
    results = []
    for height in (mask, np.zeros_like(mask)):
        out, lse, weights = attention(query, key, value, height, return_lse=True, return_weights=True)
        grad_query = attention_backward(grad_out, query, key, value, out, lse, height)[0]
        results.append((weights[rows].tobytes(), grad_query[rows].tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("height", [0.0, -300.0, -1e4])
def test_an_lse_of_more_keys_is_taken_for_what_it_says(dtype: Any, height: float) -> None:
    """The gradients of the pieces of a sequence add up to those of the whole."""
    grad_out, query, key, value = integers((7, 3), (7, 4), (20, 4), (20, 3), dtype=dtype)
    mask = np.full((7, 20), height, dtype)
    out, lse = attention(query, key, value, mask, return_lse=True)
    whole = attention_backward(grad_out, query, key, value, out, lse, mask)
    pieces = [
        attention_backward(grad_out, query, key[part], value[part], out, lse, mask[:, part])
        for part in (slice(8), slice(8, 20))
    ]
    of_queries, of_keys, of_values = zip(*pieces, strict=True)
    found = (sum(of_queries), np.concatenate(of_keys), np.concatenate(of_values))
    for one, other in zip(found, whole, strict=True):
        bound = 8 * np.finfo(dtype).eps * (8 + abs(height)) * max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("height", [-1e6, -1e15, -1e30])
def test_an_lse_that_was_rounded_elsewhere(dtype: Any, height: float) -> None:
    """Another library's may be some units in the last place away."""
    grad_out, query, key, value = integers((5, 3), (5, 4), (9, 4), (9, 3), dtype=dtype)
    mask = np.full((5, 9), height, dtype)
    out, lse = attention(query, key, value, mask, return_lse=True)
    wanted = attention_backward(grad_out, query, key, value, out, lse, mask)
    for other in (np.nextafter(lse, dtype(0)), np.nextafter(lse, dtype(-np.inf))):
        found = attention_backward(grad_out, query, key, value, out, other, mask)
        assert all(one.tobytes() == want.tobytes() for one, want in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_coarse_begins_where_it_is_said_to(dtype: Any) -> None:
    """Below, a wrong log-sum-exp is taken for what it says; from there on the keys are asked."""
    most = PRECISE[np.dtype(dtype).name]
    for height, right in ((0.95 * most, False), (1.01 * most, True)):
        query, key, value = np.zeros((1, 1), dtype), np.zeros((6, 1), dtype), np.ones((6, 1), dtype)
        mask, lse = np.full((1, 6), height, dtype), np.full(1, height + np.log(6), dtype)
        wrong = lse * dtype(1 - 4 * np.finfo(dtype).eps)
        one, other = (
            attention_backward(np.ones((1, 1), dtype), query, key, value, np.ones((1, 1), dtype), sums, mask)[2]
            for sums in (lse, wrong)
        )
        assert (one.tobytes() == other.tobytes()) == right


# -- on tensor cores ---------------------------------------------------------------------------------------------------


def half_integers(storage: str, *shapes: tuple[int, ...]) -> list[Halves]:
    return [Halves(array, storage) for array in integers(*shapes)]


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("mask", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("causal", [False, True])
def test_lost_rows_on_tensor_cores(storage: str, mask: str, causal: bool) -> None:
    grad_out, query, key, value = half_integers(storage, (2, 37, 16), (2, 37, 16), (2, 41, 16), (2, 41, 16))
    lowest = {"float16": -65504.0, "bfloat16": -(2.0**128 - 2.0**120), "float32": LOWEST[np.float32]}[mask]
    rows = np.resize([0, 130, -512, -1e4, max(-1e9, lowest), lowest, -lowest, -np.inf, 1], 37)
    numbers = np.broadcast_to(rows[:, None], (37, 41)).astype(np.float32)
    numbers[:, 4] = -np.inf
    given: Any = Halves(numbers, mask) if mask == "bfloat16" else numbers.astype(mask)
    numbers = given.numbers if mask == "bfloat16" else numbers
    operands = [grad_out, query, key, value]
    arrays = [operand.numbers for operand in operands]
    scores = added(np.float32(0.5) * (arrays[1] @ arrays[2].swapaxes(-1, -2)), numbers.astype(np.float32))
    if causal:
        scores = np.where(np.tri(37, 41, dtype=bool), scores, -np.inf)
    wanted = dense.gradients(*arrays, scores, 0.5)
    shape = SMALL._replace(storage=storage, mask=mask)
    found, _ = half_gradients.run(shape, operands, given, arrives=wanted.out, is_causal=causal, scale=0.5)
    near(found, wanted[:3], storage)


def near(found: Any, wanted: Any, storage: str) -> None:
    """Assert that gradients are right: weights and gradients of scores were rounded to halves, and what arrives."""
    for one, want in zip(found, wanted, strict=True):
        most = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(one.astype(float), want.astype(float), rtol=0, atol=4 * EPS[storage] * most)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_large_scores_on_tensor_cores(storage: str, mask: str) -> None:
    """Scores in base 2, of up to some thousands; without a mask a first tile that all see goes another way."""
    grad_out, query, key, value = half_integers(storage, (37, 16), (37, 16), (41, 16), (41, 16))
    query.bits[:] = Halves(query.numbers * 128, storage).bits
    query.numbers[:] = query.numbers * 128
    seen = np.random.default_rng(2).random((37, 41)) < 0.7 if mask == "bool" else None
    operands = [grad_out, query, key, value]
    found, _ = half_gradients.run(SMALL._replace(storage=storage, mask=mask), operands, seen, scale=1.0)
    arrays = [operand.numbers for operand in operands]
    scores = arrays[1] @ arrays[2].T
    if seen is not None:
        scores = np.where(seen, scores, -np.inf)
    assert np.abs(scores[np.isfinite(scores)]).max() > 1000
    near(found, dense.gradients(*arrays, scores, 1.0)[:3], storage)


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Give calls the kernels on tensor cores, and return a list of those that got them."""
    monkeypatch.setattr(backward, "_plans", {})
    monkeypatch.setattr(backward, "device", lambda: Device(0, "one that is not there", (8, 0), "none"))
    found: list[Any] = []
    queue = backward.queue_tensor_cores
    monkeypatch.setattr(backward, "queue_tensor_cores", lambda *a: (found.append(a), queue(*a)))
    return found


def test_calls_on_tensor_cores(queued: list[Any]) -> None:
    """Through the public function: the gradient of the mask comes of a portable kernel."""
    grad_out, query, key, value = integers((20, 8), (20, 8), (24, 8), (24, 8), dtype=np.float16)
    mask = np.where(np.arange(20)[:, None] % 3 == 0, 0, np.float16(-65504)) * np.ones(24, np.float16)
    checked(np.float16, grad_out, query, key, value, mask.astype(np.float16))
    assert len(queued) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_an_lse_of_more_keys_on_tensor_cores(queued: list[Any], masked: bool) -> None:
    grad_out, query, key, value = integers((20, 8), (20, 8), (40, 8), (40, 8), dtype=np.float16)
    query[:, 0], key[:, 0] = 64, 8
    mask = np.zeros((20, 40), np.float16) if masked else None
    out, lse = attention(query, key, value, mask, return_lse=True)
    assert (lse > PRECISE["float32"]).all()
    whole = attention_backward(grad_out, query, key, value, out, lse, mask)
    pieces = [
        attention_backward(grad_out, query, key[part], value[part], out, lse, None if mask is None else mask[:, part])
        for part in (slice(16), slice(16, 40))
    ]
    assert len(queued) == 3
    of_queries, of_keys, of_values = zip(*pieces, strict=True)
    # the gradient of a query is a sum of large terms, which differ in the pieces
    most = float(np.abs(of_queries[0]).max())
    np.testing.assert_allclose(sum(of_queries), whole[0], rtol=0, atol=4 * EPS["float16"] * most)
    for one, other in ((np.concatenate(of_keys), whole[1]), (np.concatenate(of_values), whole[2])):
        np.testing.assert_allclose(one, other, rtol=0, atol=4 * EPS["float16"] * float(np.abs(other).max()))
