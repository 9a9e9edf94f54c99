"""Functions of the user's, in the simulator or on a GPU: `score_mod` and `mask_mod`, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.call.shapes import describe
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.host import compile as compiling
from fastattn.cuda.host import decode as decoding
from fastattn.cuda.host import tensor_cores
from fastattn.cuda.host.plan import make_table

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from numba import cuda

Array = np.ndarray[Any, Any]
Numbers = dict[str, Any]
attention = partial(fastattn.attention, backend="cuda")
attention_backward = partial(fastattn.attention_backward, backend="cuda")

BATCH, HEADS, QUERIES, KEYS = 2, 2, 5, 7
RNG = np.random.default_rng(7)
TABLE = RNG.standard_normal((HEADS, QUERIES + KEYS))
SLOPES = np.array([0.5, 0.125], np.float32)
DOCUMENTS = np.array([0, 0, 1, 1, 1, 2, 2], np.int16)
WHOLE = RNG.integers(-3, 4, (HEADS, KEYS)).astype(np.int8)


def _slopes(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score - SLOPES[head] * abs(query - key)


def _relative(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score + TABLE[head, query - key]


def _cap(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return 2.0 * np.tanh(score / 2.0)


def _branches(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    if query > key:
        return score * score
    if batch == 1:
        return np.exp(-score)
    return score


def _of_whole_numbers(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score * (1 + query % 3) + WHOLE[head, key] // 2


def _wherever(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return np.where((query >= key) & (score > 0), np.log1p(score * score), score * 0.5)


def _hides(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score if query >= key else -np.inf


def _document(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return DOCUMENTS[query] == DOCUMENTS[key]


def _prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key <= query) | (key < 2 + batch)


def _of_head(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return head == 0 or key != 3


def _none_for_one(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query != 2 and key > batch


SCORE_MODS = {
    "slopes": _slopes,
    "relative bias": _relative,
    "softcap": _cap,
    "branches": _branches,
    "whole numbers": _of_whole_numbers,
    "where": _wherever,
    "hides": _hides,
}
MASK_MODS = {"documents": _document, "prefix": _prefix, "of a head": _of_head, "no key": _none_for_one}


def operands(dtype: Any = np.float32, queries: int = QUERIES) -> list[Array]:
    """Return dO, query, key and value: two rows of a batch, of two heads that share one of keys."""
    rng = np.random.default_rng(3)
    shapes = [(BATCH, HEADS, queries, 4), (BATCH, HEADS, queries, 3), (BATCH, 1, KEYS, 3), (BATCH, 1, KEYS, 4)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def wanted(grad_out: Array, query: Array, key: Array, value: Array, **options: Any) -> Numbers:
    """The formula in float64: functions are called by Python, their derivatives are differences."""
    grad_out, query, key, value = (array.astype(np.float64) for array in (grad_out, query, key, value))
    batch = len(query)
    score_mod: Callable[..., Any] = options.get("score_mod") or (lambda score, *where: score)
    mask_mod: Callable[..., Any] = options.get("mask_mod") or (lambda *where: True)
    offsets = np.broadcast_to(options.get("query_offset", 0), batch)
    raw = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    scores, slopes, step = np.empty_like(raw), np.zeros_like(raw), 1e-6
    for place in np.ndindex(raw.shape):
        where = (place[0], place[1], place[2] + int(offsets[place[0]]), place[3])
        seen = mask_mod(*where) and not (options.get("is_causal") and where[3] > where[2])
        scores[place] = score_mod(raw[place], *where) if seen else -np.inf
        if np.isfinite(scores[place]):
            ends = (score_mod(raw[place] + sign * step, *where) for sign in (1, -1))
            slopes[place] = np.subtract(*ends) / (2 * step)
    best = np.maximum(scores.max(-1, keepdims=True), -1e300)
    weights = np.exp(scores - best)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (best + np.log(total))[..., 0]
    weights /= np.where(total, total, 1)
    by_weight = grad_out @ value.swapaxes(-1, -2)
    by_score = weights * (by_weight - (weights * by_weight).sum(-1, keepdims=True)) * slopes / np.sqrt(query.shape[-1])
    gradients = (
        by_score @ key,
        (by_score.swapaxes(-1, -2) @ query).sum(1, keepdims=True),
        (weights.swapaxes(-1, -2) @ grad_out).sum(1, keepdims=True),
    )
    return {"out": weights @ value, "lse": lse, "weights": weights, "gradients": gradients}


def check(grad_out: Array, query: Array, key: Array, value: Array, **options: Any) -> None:
    """Check a call, and its gradients."""
    expected = wanted(grad_out, query, key, value, **options)
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7) if query.dtype == np.float64 else None
    close = close or partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    common: Any = {**options, "enable_gqa": True}
    out, lse, weights = attention(query, key, value, return_lse=True, return_weights=True, **common)
    for name, found in (("out", out), ("lse", lse), ("weights", weights)):
        assert found.dtype == query.dtype
        close(found, expected[name])
    found = attention_backward(grad_out, query, key, value, out, lse, **common)
    for one, other in zip(found, expected["gradients"], strict=True):
        close(one, other)


# -- what they mean ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SCORE_MODS)
def test_functions_of_scores(dtype: Any, name: str) -> None:
    check(*operands(dtype), score_mod=SCORE_MODS[name])


@pytest.mark.parametrize("name", MASK_MODS)
def test_functions_that_say_what_is_seen(name: str) -> None:
    check(*operands(), mask_mod=MASK_MODS[name])


def test_both_with_positions_and_causality() -> None:
    check(*operands(), score_mod=_branches, mask_mod=_prefix, is_causal=True, query_offset=[2, 0])


def test_few_queries() -> None:
    check(*operands(queries=1), score_mod=_relative, mask_mod=_document)


def test_a_floating_mask_is_added_before_and_a_softcap_is_under_it() -> None:
    """The gradient of the mask has the function's slope in it, and not the softcap's."""
    grad_out, query, key, value = operands(np.float64)
    rng = np.random.default_rng(4)
    bias = rng.standard_normal((HEADS, QUERIES, KEYS))
    bias[:, 1, 2:] = -np.inf
    options: Any = {"softcap": 1.5, "enable_gqa": True}

    def square(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score * score

    raw = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    summed = 1.5 * np.tanh(raw / 1.5) + bias
    scores = np.where(np.isfinite(summed), summed**2, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out, lse = attention(query, key, value, bias, score_mod=square, return_lse=True, **options)
    np.testing.assert_allclose(out, weights @ value)
    found = attention_backward(grad_out, query, key, value, out, lse, bias, score_mod=square, grad_mask=True, **options)
    by_weight = grad_out @ value.swapaxes(-1, -2)
    by_score = weights * (by_weight - (weights * by_weight).sum(-1, keepdims=True))
    by_bias = by_score * np.where(np.isfinite(summed), 2 * summed, 0)
    np.testing.assert_allclose(found[3], by_bias.sum(0), atol=1e-12)
    by_raw = by_bias * (1 - np.tanh(raw / 1.5) ** 2) / np.sqrt(query.shape[-1])
    np.testing.assert_allclose(found[0], by_raw @ key, atol=1e-12)


def test_half_precision_and_extreme_scales() -> None:
    grad_out, query, key, value = operands(np.float16)
    wide = [array.astype(np.float32) for array in (grad_out, query, key, value)]
    expected = wanted(*wide, score_mod=_slopes, mask_mod=_prefix)
    options: Any = {"score_mod": _slopes, "mask_mod": _prefix, "enable_gqa": True}
    out, lse = attention(query, key, value, return_lse=True, **options)
    assert (out.dtype, lse.dtype) == (np.float16, np.float32)
    np.testing.assert_allclose(out, expected["out"], rtol=2e-3, atol=2e-3)
    found = attention_backward(grad_out, query, key, value, out, lse, **options)
    for one, other in zip(found, expected["gradients"], strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=1e-2)
    scaled = [wide[0], wide[1] * np.float32(1e-19), wide[2] * np.float32(1e-20), wide[3]]
    out = attention(*scaled[1:], scale=1e39 / np.sqrt(3), **options)
    np.testing.assert_allclose(out, expected["out"], rtol=1e-3, atol=1e-3)


def test_what_is_hidden_never_leaks() -> None:
    """Neither what stands in keys and values that are not seen, nor what functions make of them."""
    _, query, key, value = operands()

    def odd(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score if key < 4 else score * np.nan

    def first(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key < 4

    before = attention(query, key[..., :4, :], value[..., :4, :], enable_gqa=True)
    key[..., 4:, :], value[..., 4:, :] = np.nan, np.inf
    for options in (
        {"mask_mod": first},
        {"score_mod": odd, "mask_mod": first},
        {"score_mod": odd, "key_lengths": [4, 4]},
    ):
        out = attention(query, key, value, enable_gqa=True, **options)
        np.testing.assert_allclose(out, before, rtol=1e-5, atol=1e-6)

    def behind(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score if key < 4 else -np.inf

    np.testing.assert_allclose(
        attention(query, key, value, enable_gqa=True, score_mod=behind), before, rtol=1e-5, atol=1e-6
    )


def test_queries_that_see_no_key() -> None:
    grad_out, query, key, value = operands()

    def nothing(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return False

    options: Any = {"mask_mod": nothing, "enable_gqa": True}
    out, lse, weights = attention(query, key, value, return_lse=True, return_weights=True, **options)
    assert not out.any()
    assert not weights.any()
    assert (lse == -np.inf).all()
    assert not any(found.any() for found in attention_backward(grad_out, query, key, value, out, lse, **options))


# -- what they capture -------------------------------------------------------------------------------------------------


def capturing(array: Any, number: Any) -> Callable[..., Any]:
    """Return a function that captures an array, which it indexes by keys, and a number."""

    def modified(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + array[key] * number

    return modified


def scores_of(score_mod: Callable[..., Any], dtype: Any = np.float32) -> Array:
    """The log-sum-exp of one key at a time, all of whose scores are 0 before."""
    query, key = np.zeros((KEYS, 1, 2), dtype), np.zeros((KEYS, KEYS, 2), dtype)

    def one(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key == head

    lse: Array = attention(query, key, key, score_mod=score_mod, mask_mod=one, return_lse=True)[1]
    return lse[:, 0]


@pytest.mark.parametrize("kind", ["bool", "int8", "uint16", "int32", "int64", "float16", "float32", "float64"])
def test_arrays_of_any_kind_and_layout(kind: str) -> None:
    numbers = np.array([1, 0, 1, 1, 0, 0, 1]) if kind == "bool" else np.arange(3, 3 + KEYS)
    for array in (numbers.astype(kind), numbers.astype(kind).repeat(2)[::2], numbers[::-1].astype(kind)[::-1]):
        np.testing.assert_allclose(scores_of(capturing(array, 2)), 2.0 * numbers)
    np.testing.assert_allclose(scores_of(capturing(np.broadcast_to(numbers[:1].astype(kind), KEYS), 1)), numbers[0])


def test_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.linspace(-3, 3, KEYS).astype(ml_dtypes.bfloat16)
    np.testing.assert_allclose(scores_of(capturing(array, 1)), array.astype(np.float32))


def test_other_arrays_and_numbers_compile_nothing() -> None:
    first = scores_of(capturing(np.arange(KEYS, dtype=np.float32), 0.5))
    made = compiling.kernel.cache_info().misses
    longer = np.linspace(5, 6, 3 * KEYS, dtype=np.float32)
    second = scores_of(capturing(longer, 0.25))
    array = np.arange(KEYS, dtype=np.float32)
    same = capturing(array, 0.5)
    array[:] = 7
    third = scores_of(same)
    assert compiling.kernel.cache_info().misses == made
    np.testing.assert_allclose(first, np.arange(KEYS) * 0.5)
    np.testing.assert_allclose(second, longer[:KEYS] * 0.25, rtol=1e-6)
    np.testing.assert_array_equal(third, np.full(KEYS, 3.5))


def test_scores_stay_what_they_are() -> None:
    """Python's numbers do not widen: 1.1 is that of float32 beside a float32 score."""
    for dtype in (np.float32, np.float64):
        array = np.arange(KEYS, dtype=dtype)
        np.testing.assert_array_equal(scores_of(capturing(array, 1.1), dtype), array * dtype(1.1))


def test_an_index_out_of_range() -> None:
    short = np.arange(KEYS - 2, dtype=np.float32)
    with pytest.raises(IndexError, match=r"score_mod: capturing.<locals>.modified.*out of range"):
        scores_of(capturing(short, 1))
    _, query, key, value = operands()
    options: Any = {"enable_gqa": True, "score_mod": capturing(short, 1)}
    attention(query, key, value, key_lengths=[KEYS - 2, 1], **options)

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key < KEYS - 2

    attention(query, key, value, mask_mod=seen, **options)

    def reads(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return short[key] > 1

    with pytest.raises(IndexError, match=r"mask_mod: .*reads"):
        attention(query, key, value, mask_mod=reads, enable_gqa=True)
    attention(query, key, value, mask_mod=reads, enable_gqa=True, key_lengths=[KEYS - 2, 0])


def test_gradients_say_that_an_index_was_out_of_range() -> None:
    grad_out, query, key, value = operands()
    out, lse = attention(query, key, value, enable_gqa=True, return_lse=True)
    short = capturing(np.zeros(KEYS - 1, np.float32), 1)
    with pytest.raises(IndexError, match="out of range"):
        attention_backward(grad_out, query, key, value, out, lse, enable_gqa=True, score_mod=short)


def test_an_empty_array() -> None:
    with pytest.raises(IndexError, match="out of range"):
        scores_of(capturing(np.zeros(0, np.float32), 1))


# -- where they run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"score_mod": _cap}, {"mask_mod": _prefix}])
def test_functions_are_for_the_portable_kernels(option: dict[str, Any]) -> None:
    array = np.zeros((2, 8), np.float32)
    problem = describe(array, array, array, **option)[0]
    assert "function" in (decoding.against(problem) or "")
    assert "function" in (tensor_cores.against("float16", "none", problem, make_table(problem, []), (0,), (8, 0)) or "")


def test_arrays_in_device_memory() -> None:
    _, query, key, value = operands()
    options: Any = {"score_mod": _relative, "mask_mod": _document, "enable_gqa": True}
    expected = attention(query, key, value, **options)
    out = attention(*map(cuda.to_device, (query, key, value)), **options)
    np.testing.assert_array_equal(out.copy_to_host(), expected)


def test_the_same_bits_in_any_batch() -> None:
    _, query, key, value = operands()
    options: Any = {"score_mod": _slopes, "mask_mod": _document, "enable_gqa": True}
    whole = attention(query, key, value, **options)
    for row in range(BATCH):
        alone = attention(query[row : row + 1], key[row : row + 1], value[row : row + 1], **options)
        np.testing.assert_array_equal(alone[0], whole[row])


def test_bad_functions_are_refused_by_name() -> None:
    _, query, key, value = operands()
    for name in ("score_mod", "mask_mod"):
        with pytest.raises(TypeError, match=f"{name}: .*expected"):
            attention(query, key, value, **{name: 3})
        with pytest.raises(TypeError, match=f"{name}: .*expected"):
            attention(query, key, value, **{name: lambda score: score})


def test_what_cannot_be_compiled_is_said_with_its_line() -> None:
    _, query, key, value = operands()

    def modified(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score.real

    with pytest.raises(TypeError, match=r"score_mod: .*modified, line \d+ of .*test_functions.py, 'return score.real'"):
        attention(query, key, value, enable_gqa=True, score_mod=modified)


@pytest.mark.skipif(not SIMULATED, reason="what is compiled is told by the simulator's kernels")
def test_the_name_of_a_kernel_tells_the_function() -> None:
    array = np.zeros((2, 8), np.float32)
    score_mod = describe(array, array, array, score_mod=_cap)[0].scores.score_mod
    assert score_mod is not None
    name = compiling.name_of(test_an_empty_array, ("float32", score_mod, None))
    assert name.endswith(f"float32_{score_mod.identity}")
