"""Gradients and weights where a log-sum-exp is so large that rounding it has lost what the number of keys adds to it.

The oracle is the derivative of the softmax itself: it never sees a log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances
from dense import gradients as gradients_of
from dense import softmax
from hypothesis import given
from hypothesis import strategies as st

import fastattn
from fastattn import BahdanauAttention, LuongAttention, MultiHeadAttention
from fastattn.call.rounding import PRECISE

Array = np.ndarray[Any, Any]

DTYPES = [np.float32, np.float64]
LARGE = [-300.0, -1e4, -1e9, float(np.finfo(np.float32).min), 1e9, 1e35]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_size = pytest.mark.parametrize("size", LARGE)
every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def wide(array: Array) -> Array:
    return array.astype(np.float64 if array.dtype == np.float32 else np.longdouble)


def exact_gradients(grad_out: Array, query: Array, key: Array, value: Array, scores: Array) -> tuple[Array, ...]:
    """The derivative of softmax(scores) value by query, key, value and scores = query · keyᵀ + mask."""
    return gradients_of(grad_out, query, key, value, scores, 1.0)[:4]


def exact_inputs(queries: int, keys: int, dtype: Any, seed: int = 0) -> tuple[Array, ...]:
    """grad_out, query, key and value, whose scores with a scale of 1 are small multiples of 1/4: no rounding at all."""
    rng = np.random.default_rng(seed)
    query = rng.integers(-2, 3, (queries, 8)).astype(dtype)
    key = (rng.integers(-2, 3, (keys, 8)) / 4).astype(dtype)
    return rng.standard_normal((queries, 5)).astype(dtype), query, key, rng.standard_normal((keys, 5)).astype(dtype)


def as_computed(scores: Array, dtype: Any, backend: str) -> Array:
    """Scores as they are summed: in the call's dtype, which at -1e9 has steps of 64; the reference has a wider one."""
    return scores.astype(dtype) if backend == "cpu" else scores


def gradients(grad_out: Array, *args: Any, backend: str = "cpu", grad_mask: bool = False, **options: Any) -> Any:
    out, lse = fastattn.attention(*args, **options, backend=backend, return_lse=True)
    query, key, value, *mask = args
    return fastattn.attention_backward(
        grad_out, query, key, value, out, lse, *mask, **options, backend=backend, grad_mask=grad_mask
    )


# -- attention ---------------------------------------------------------------------------------------------------------


@every_backend
@every_dtype
@every_size
def test_every_key_of_a_row_of_equal_scores_has_its_share(size: float, dtype: Any, backend: str) -> None:
    query, key, value = np.zeros((1, 2), dtype), np.zeros((512, 2), dtype), np.ones((512, 1), dtype)
    mask = np.full((1, 512), size, dtype)
    grad_value = gradients(np.ones((1, 1), dtype), query, key, value, mask, backend=backend)[2]
    np.testing.assert_allclose(grad_value, 1 / 512, rtol=tolerances.GRADIENT_PROMISE[np.dtype(dtype)])


@every_backend
@every_dtype
@every_size
@pytest.mark.parametrize("lengths", [(1, 700), (70, 300), (130, 1100)], ids=str)
def test_gradients_keep_their_promise(size: float, dtype: Any, backend: str, lengths: tuple[int, int]) -> None:
    """Rows with large scores of either sign, and rows without, in the same blocks."""
    grad_out, *args = exact_inputs(*lengths, dtype)
    rng = np.random.default_rng(1)
    mask = np.where(rng.random(lengths) < 0.7, 0, -np.inf).astype(dtype)
    mask[:, 0] = 0
    mask[::3] += dtype(size)
    mask[1::5] -= dtype(size)
    scores = as_computed(wide(args[0]) @ args[1].T + mask, dtype, backend)
    found = gradients(grad_out, *args, mask, scale=1.0, backend=backend, grad_mask=True)
    tolerances.check_promise(found, exact_gradients(grad_out, *args, scores), dtype)


@every_dtype
@pytest.mark.parametrize("size", [-1e4, -1e9])
def test_dropout_and_causal_limits_do_too(size: float, dtype: Any) -> None:
    grad_out, *args = exact_inputs(70, 300, dtype)
    mask = np.full((70, 300), size, dtype)
    mask[::2] = 0
    options: dict[str, Any] = {"scale": 1.0, "is_causal": True, "dropout_p": 0.5, "rng": 7}
    out, lse, kept = fastattn.attention(*args, mask, **options, return_lse=True, return_weights=True)
    found = fastattn.attention_backward(grad_out, *args, out, lse, mask, **options)
    wanted = kept.astype(np.float64).T @ grad_out
    tolerances.check_promise((found[2],), (wanted,), dtype)


@every_dtype
def test_a_row_that_has_lost_nothing_keeps_its_bits(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    grad_out, query, key, value = (rng.standard_normal((n, 16)).astype(dtype) for n in (150, 150, 400, 400))
    plain = np.zeros((150, 400), dtype)
    large = plain.copy()
    large[::4] = -1e9
    usual, mixed = (gradients(grad_out, query, key, value, mask, grad_mask=True) for mask in (plain, large))
    others = np.arange(150) % 4 > 0
    for index in (0, 3):  # the gradients of queries and of the mask
        assert usual[index][others].tobytes() == mixed[index][others].tobytes()


@every_dtype
def test_the_same_bits_at_any_thread_count(dtype: Any) -> None:
    grad_out, *args = exact_inputs(200, 3000, dtype)
    mask = np.full((200, 3000), -1e9, dtype)
    with fastattn.num_threads(1):
        alone = gradients(grad_out, *args, mask, grad_mask=True)
    with fastattn.num_threads(4):
        shared = gradients(grad_out, *args, mask, grad_mask=True)
    for one, other in zip(alone, shared, strict=True):
        assert one.tobytes() == other.tobytes()


@given(
    exponent=st.floats(-2, 30),
    kind=st.sampled_from(("none", "bool", "float", "one number")),
    shape=st.tuples(st.integers(1, 90), st.integers(1, 300), st.integers(1, 140)),
    is_causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_weights_sum_to_one_at_any_magnitude(
    exponent: float, kind: str, shape: tuple[int, int, int], is_causal: bool, dtype: Any, seed: int
) -> None:
    """Whatever roundings have made of the scores, all of the gradient of the result arrives at the values."""
    rng = np.random.default_rng(seed)
    queries, keys, features = shape
    query = (10**exponent * rng.standard_normal((queries, features))).astype(dtype)
    key, value = rng.standard_normal((keys, features)).astype(dtype), rng.standard_normal((keys, 3)).astype(dtype)
    grad_out = rng.standard_normal((queries, 3)).astype(dtype)
    mask: Array | None = None
    if kind == "bool":
        mask = rng.random((queries, keys)) < 0.7
        mask[:, 0] = True
    elif kind == "float":
        mask = (10 ** rng.uniform(0, max(exponent, 1)) * rng.standard_normal((queries, keys))).astype(dtype)
    elif kind == "one number":
        mask = np.full((queries, keys), -(10 ** rng.uniform(0, 35)), dtype)
    out, lse = fastattn.attention(query, key, value, mask, is_causal=is_causal, return_lse=True)
    found = fastattn.attention_backward(grad_out, query, key, value, out, lse, mask, is_causal=is_causal)
    promise = tolerances.GRADIENT_PROMISE[np.dtype(dtype)]
    total, wanted = found[2].sum(axis=0, dtype=np.float64), grad_out.sum(axis=0, dtype=np.float64)
    assert np.abs(total - wanted).max() <= promise * max(1.0, np.abs(grad_out).sum(axis=0).max())
    for gradient in found:
        assert np.isfinite(gradient).all()
    weights = fastattn.attention_weights(query, key, mask, is_causal, lse=lse)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=promise)


@every_backend
@every_dtype
def test_a_log_sum_exp_of_more_keys_is_taken_for_what_it_says(dtype: Any, backend: str) -> None:
    """A long sequence in pieces, at a size where the log-sum-exp of all tells which part of it each piece has."""
    grad_out, query, key, value = exact_inputs(70, 600, dtype)
    mask = np.full((70, 600), -1000.0, dtype)
    mask[::2] = 0
    out, lse = fastattn.attention(query, key, value, mask, scale=1.0, return_lse=True)
    scores = query @ key.T + mask
    pieces = []
    for keys in (slice(0, 150), slice(150, 600)):
        given = query, key[keys], value[keys], out, lse, mask[:, keys]
        pieces.append(fastattn.attention_backward(grad_out, *given, scale=1.0, grad_mask=True, backend=backend))
    first, second = pieces
    found = (
        first[0] + second[0],
        np.concatenate((first[1], second[1])),
        np.concatenate((first[2], second[2])),
        np.concatenate((first[3], second[3]), axis=1),
    )
    # two units in the last place of the log-sum-exp, one where it is converted to base 2
    lost = 2 * float(np.finfo(dtype).eps) * 1000
    for gradient, wanted in zip(found, exact_gradients(grad_out, query, key, value, scores), strict=True):
        assert np.abs(gradient - wanted).max() <= lost * max(1.0, np.abs(wanted).max())


@every_dtype
def test_a_foreign_log_sum_exp_may_be_a_few_units_off(dtype: Any) -> None:
    grad_out, *args = exact_inputs(9, 40, dtype)
    mask = np.full((9, 40), -1e6, dtype)
    out, lse = fastattn.attention(*args, mask, scale=1.0, return_lse=True)
    wanted = exact_gradients(grad_out, *args, args[0] @ args[1].T + mask)
    for direction in (-np.inf, np.inf):
        near = np.nextafter(lse, dtype(direction))
        found = fastattn.attention_backward(grad_out, *args, out, near, mask, scale=1.0)
        tolerances.check_promise(found, wanted[:3], dtype)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_log_sum_exp_that_is_not_finite_is_taken_for_what_it_says(odd: float) -> None:
    grad_out, *args = exact_inputs(9, 40, np.float32)
    mask = np.full((9, 40), -1e6, np.float32)
    out, lse = fastattn.attention(*args, mask, return_lse=True)
    lse[4] = odd
    for backend in ("cpu", "reference"):
        found = fastattn.attention_backward(grad_out, *args, out, lse, mask, backend=backend)
        weights = fastattn.attention_weights(*args[:2], mask, lse=lse, backend=backend)
        assert np.isnan(found[0][4]).all() if np.isnan(odd) else (found[0][4] == 0).all()
        assert np.isnan(weights[4]).all() if np.isnan(odd) else (weights[4] == 0).all()
        assert np.isfinite(np.delete(found[0], 4, axis=0)).all()


# -- weights, additive attention, layers, PyTorch ----------------------------------------------------------------------


@every_backend
@every_dtype
@every_size
@pytest.mark.parametrize("rows", [None, 5, [2, 40, -1], slice(60, 0, -7)], ids=str)
def test_weights_of_a_rounded_log_sum_exp(size: float, dtype: Any, backend: str, rows: Any) -> None:
    _, query, key, _ = exact_inputs(70, 300, dtype)
    mask = np.zeros((70, 300), dtype)
    mask[::3] = size
    _, lse = fastattn.attention(query, key, key, mask, scale=1.0, return_lse=True)
    chosen = [rows] if isinstance(rows, int) else slice(None) if rows is None else rows
    wanted = softmax(wide(as_computed(wide(query) @ key.T + mask, dtype, backend)))[chosen][:, 3:200]
    options: Any = {"scale": 1.0, "rows": rows, "columns": slice(3, 200), "lse": lse, "backend": backend}
    found = fastattn.attention_weights(query, key, mask, **options)
    np.testing.assert_allclose(found, wanted, rtol=tolerances.GRADIENT_PROMISE[np.dtype(dtype)])


def test_weights_of_a_log_sum_exp_of_more_keys() -> None:
    _, query, key, _ = exact_inputs(20, 300, np.float64)
    mask = np.full((20, 300), -1e4)
    _, lse = fastattn.attention(query, key, key, mask, scale=1.0, return_lse=True)
    wanted = softmax(query @ key.T + mask)[:, :100]
    for backend in ("cpu", "reference"):
        part = fastattn.attention_weights(query, key[:100], mask[:, :100], scale=1.0, lse=lse, backend=backend)
        np.testing.assert_allclose(part, wanted, rtol=2 * np.finfo(np.float64).eps * 1e4)


@every_backend
@every_dtype
@every_size
@pytest.mark.parametrize("lengths", [(1, 700), (70, 300), (150, 520)], ids=str)
def test_additive_gradients_keep_their_promise(size: float, dtype: Any, backend: str, lengths: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    queries, keys = lengths
    # tanh of 0 or of what saturates: scores are multiples of 1/4
    query = rng.choice((0.0, 200.0), (queries, 6)).astype(dtype)
    key = rng.choice((0.0, 400.0), (keys, 6)).astype(dtype)
    value, weight = rng.standard_normal((keys, 5)).astype(dtype), (rng.integers(-4, 5, 6) / 4).astype(dtype)
    grad_out = rng.standard_normal((queries, 5)).astype(dtype)
    mask = np.where(rng.random(lengths) < 0.7, 0, -np.inf).astype(dtype)
    mask[:, 0] = 0
    mask[::3] += dtype(size)
    tanh = np.tanh(query[:, None].astype(np.float64) + key)
    scores = as_computed(wide(tanh) @ weight.astype(np.float64) + mask, dtype, backend)
    *_, grad_value, grad_scores = exact_gradients(grad_out, np.zeros_like(query), np.zeros_like(key), value, scores)
    inner = grad_scores[..., None] * (1 - tanh * tanh) * weight
    wanted = inner.sum(axis=1), inner.sum(axis=0), grad_value, (grad_scores[..., None] * tanh).sum(axis=(0, 1))
    args = query, key, value, weight
    out, lse = fastattn.additive_attention(*args, mask, return_lse=True, backend=backend)
    found = fastattn.additive_attention_backward(grad_out, *args, out, lse, mask, backend=backend)
    tolerances.check_promise(found, wanted, dtype)


@every_dtype
@pytest.mark.parametrize("size", [-1e4, -1e9])
def test_additive_pieces_and_what_is_not_lost(size: float, dtype: Any) -> None:
    """Two pieces whose log-sum-exp tells them apart, beside rows with nothing lost, which keep their bits."""
    rng = np.random.default_rng(4)
    query, key, value, grad_out = (rng.standard_normal((n, 7)).astype(dtype) for n in (90, 400, 400, 90))
    weight, mask = rng.standard_normal(7).astype(dtype), np.zeros((90, 400), dtype)
    args = query, key, value, weight
    large = mask.copy()
    large[::4] = size
    usual, mixed = (
        fastattn.additive_attention_backward(
            grad_out, *args, *fastattn.additive_attention(*args, m, return_lse=True), m
        )
        for m in (mask, large)
    )
    others = np.arange(90) % 4 > 0
    assert usual[0][others].tobytes() == mixed[0][others].tobytes()
    if size == -1e4:
        out, lse = fastattn.additive_attention(*args, large, return_lse=True)
        halves = [
            fastattn.additive_attention_backward(
                grad_out, query, key[part], value[part], weight, out, lse, large[:, part]
            )[2]
            for part in (slice(0, 200), slice(200, 400))
        ]
        lost = 4 * float(np.finfo(dtype).eps) * 1e4
        assert np.abs(np.concatenate(halves) - mixed[2]).max() <= lost * np.abs(mixed[2]).max()


def test_layers_give_each_key_of_a_padded_row_its_share() -> None:
    rng = np.random.default_rng(5)
    tokens = rng.standard_normal((2, 64, 16), dtype=np.float32)
    mask = np.zeros((64, 64), np.float32)
    mask[10:] = -1e35  # beside which all scores are the same, in either dtype
    layers: list[tuple[Any, tuple[Any, ...]]] = [
        (MultiHeadAttention(16, 2, rng=0), (tokens,)),
        (LuongAttention(16, 16, score="dot", rng=0), (tokens, tokens)),
        (LuongAttention(16, 16, score="concat", rng=0), (tokens, tokens)),
        (BahdanauAttention(16, 16, 8, rng=0), (tokens, tokens)),
    ]
    for layer, inputs in layers:
        out, saved = layer(*inputs, attn_mask=mask, return_saved=True)
        grad_out = np.ones_like(out)
        single, _ = layer.backward(grad_out, saved)
        layer.load_state_dict({name: array.astype(np.float64) for name, array in layer.state_dict().items()})
        double, _ = layer.backward(
            grad_out.astype(np.float64), tuple(array.astype(np.float64) for array in inputs), attn_mask=mask
        )
        for one, other in zip(single, double, strict=True):
            assert np.abs(one - other).max() <= 2e-5 * max(1.0, np.abs(other).max())


@pytest.mark.parametrize("size", LARGE)
def test_pytorch(size: float) -> None:
    torch = pytest.importorskip("torch")
    from fastattn.integrations.torch import scaled_dot_product_attention

    grad_out, *args = exact_inputs(70, 300, np.float32)
    mask = np.full((70, 300), size, np.float32)
    mask[::2] = 0
    tensors = [torch.from_numpy(array).requires_grad_() for array in (*args, mask)]
    out = scaled_dot_product_attention(*tensors, scale=1.0)
    found = torch.autograd.grad(out, tensors, torch.from_numpy(grad_out))
    wanted = exact_gradients(grad_out, *args, (args[0] @ args[1].T + mask).astype(np.float32))
    tolerances.check_promise(tuple(gradient.numpy() for gradient in found), wanted, np.float32)


@every_dtype
def test_what_is_precise_is_where_the_promise_begins(dtype: Any) -> None:
    """Half of what is promised is left for all other roundings."""
    kind = np.finfo(dtype)
    limit = PRECISE[kind.dtype.name]
    half_a_unit = float(kind.eps) * limit / 4
    converted = float(kind.eps) * np.log(2) * limit / 2
    assert half_a_unit + converted <= tolerances.GRADIENT_PROMISE[np.dtype(dtype)] / 2


@every_backend
def test_a_log_sum_exp_of_a_lesser_dtype_than_its_call(backend: str) -> None:
    """Where one framework computes in float32 what another differentiates in float64."""
    grad_out, *args = exact_inputs(70, 300, np.float64)
    for size in (0.0, -1e4):
        mask = np.full((70, 300), size)
        out, lse = fastattn.attention(*args, mask, scale=1.0, return_lse=True)
        found = fastattn.attention_backward(
            grad_out, *args, out, lse.astype(np.float32), mask, scale=1.0, backend=backend
        )
        scores = args[0] @ args[1].T + mask
        tolerances.check_promise(found, exact_gradients(grad_out, *args, scores)[:3], np.float64)
        weights = fastattn.attention_weights(*args[:2], mask, scale=1.0, lse=lse.astype(np.float32), backend=backend)
        np.testing.assert_allclose(weights, softmax(scores), rtol=1e-12)


@every_backend
@pytest.mark.parametrize("kind", ["array", "list", "tensor"])
def test_a_lesser_log_sum_exp_may_come_as_anything(kind: str, backend: str) -> None:
    """In a list of NumPy's numbers, and in a tensor, it is as coarse as in an array."""
    grad_out, *args = exact_inputs(20, 300, np.float64)
    out, lse = fastattn.attention(*args, scale=1.0, return_lse=True)
    coarse: Any = lse.astype(np.float32)
    if kind == "list":
        coarse = list(coarse)
    elif kind == "tensor":
        coarse = pytest.importorskip("torch").from_numpy(coarse)
    found = fastattn.attention_backward(grad_out, *args, out, coarse, scale=1.0, backend=backend)
    scores = args[0] @ args[1].T
    tolerances.check_promise(found, exact_gradients(grad_out, *args, scores)[:3], np.float64)
    weights = fastattn.attention_weights(*args[:2], scale=1.0, lse=coarse, backend=backend)
    np.testing.assert_allclose(weights, softmax(scores), rtol=1e-12)


LOWEST = float(np.finfo(np.float32).min)


@every_backend
@pytest.mark.parametrize(
    ("scale", "query", "mask"),
    [(1.0, -1e18, LOWEST), (1e39, -1.0, None), (1e39, -1.0, 0.0), (1e39, -1.0, True), (-1e39, 1.0, LOWEST)],
)
def test_a_log_sum_exp_that_was_saturated(scale: float, query: float, mask: Any, backend: str) -> None:
    """The lowest number of a dtype stands for any below: it is no sum over more keys than these."""
    queries, keys = np.full((1, 1), query, np.float32), np.full((4, 1), abs(query), np.float32)
    masks = () if mask is None else (np.full((1, 4), mask, np.bool_ if mask is True else np.float32),)
    values, grad_out = np.ones((4, 1), np.float32), np.ones((1, 1), np.float32)
    found = gradients(grad_out, queries, keys, values, *masks, scale=scale, backend=backend)
    np.testing.assert_array_equal(found[2], 0.25)
    _, lse = fastattn.attention(queries, keys, values, *masks, scale=scale, return_lse=True, backend=backend)
    assert lse == LOWEST
    weights = fastattn.attention_weights(queries, keys, *masks, scale=scale, lse=lse, backend=backend)
    np.testing.assert_array_equal(weights, 0.25)


def test_a_log_sum_exp_in_a_list_is_no_more_precise_than_its_call() -> None:
    """Not even where the call is computed in float64 for the sake of its scale."""
    query, key, value = np.full((1, 1), 1e-19, np.float32), np.full((9, 1), 1e-17, np.float32), np.eye(9, dtype="f")
    out, lse = fastattn.attention(query, key, value, scale=1e39, return_lse=True)
    assert 1000 < lse < 1010
    arrays = np.ones((1, 9), np.float32), query, key, value, out
    for one in (lse, lse.tolist()):
        np.testing.assert_allclose(fastattn.attention_backward(*arrays, one, scale=1e39)[2], 1 / 9, rtol=1e-6)
        weights = fastattn.attention_weights(query, key, scale=1e39, lse=one)
        np.testing.assert_allclose(weights, 1 / 9, rtol=1e-6)


@every_backend
@every_dtype
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_a_row_whose_scores_are_all_minus_infinity_is_empty(dtype: Any, kind: str, backend: str) -> None:
    """Beside rows that have something, large or not, whatever its keys and values are."""
    grad_out, query, key, value = exact_inputs(70, 300, dtype)
    query[:, 0], query[3, 0] = 1, -1
    key[:, 1:], key[0] = 0, [np.inf, *[0] * 7]
    visible = np.ones((70, 300), bool)
    visible[3, 1:] = visible[:3, 0] = visible[4:, 0] = False
    mask: Any = visible if kind == "bool" else np.where(visible, -1e4, -np.inf).astype(dtype)
    if kind == "none":
        query, grad_out, mask, key, value = query[3:4], grad_out[3:4], None, key[:1], value[:1]
    value[0] = np.inf
    found = gradients(grad_out, query, key, value, *(() if mask is None else (mask,)), backend=backend)
    at = 0 if kind == "none" else 3
    np.testing.assert_array_equal(found[0][at], 0)
    for gradient in found:
        assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(found[2][0], 0)
