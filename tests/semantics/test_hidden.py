"""A query that may look at no key, what is masked, and what is not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances
from semantic_cases import INF, NAN, Array, Attention, assert_empty, close, dtypes, inputs, lengths, normal, seen
from strategies import HALVES, with_odd

import fastattn


@dtypes
@lengths
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_an_empty_row_is_zero(attention: Attention, dtype: Any, length: tuple[int, int], kind: str) -> None:
    query, key, value = inputs(length, dtype=dtype)
    everything = np.zeros(length, bool) if kind == "bool" else np.full(length, -INF, dtype)
    assert_empty(attention(query, key, value, everything, return_lse=True, return_weights=True))
    some = np.ones(length, bool) if kind == "bool" else np.zeros(length, dtype)
    some[::3] = everything[::3]
    results = tolerances.check_call(attention, query, key, value, some)
    assert_empty(results, slice(0, None, 3))


def test_an_empty_row_of_a_causal_mask_is_zero(attention: Attention) -> None:
    query, key, value = inputs((150, 70))
    results = tolerances.check_call(attention, query, key, value, is_causal="bottom-right")
    assert_empty(results, slice(80))


#: Options that leave the first three queries no key, and the others some.
NO_KEY = [
    {"is_causal": True, "query_offset": -3},
    {"window": (None, 4), "query_offset": -7},
    {"window": (5, 3), "query_offset": [-6]},
    {"is_causal": "bottom-right", "key_lengths": 57},
]


@dtypes
@pytest.mark.parametrize("options", NO_KEY, ids=str)
def test_an_empty_interval_is_zero(backend: str, attention: Attention, dtype: Any, options: dict[str, Any]) -> None:
    query, key, value = inputs((60, 70), (1, 2), dtype=dtype)
    for further in ({}, {"softcap": 3.0}, {"alibi_slopes": [0.25, 1e300]}):
        results = tolerances.check_call(attention, query, key, value, **options, **further)
        assert_empty(results, slice(3))
        assert np.isfinite(results[1][..., 3:]).all()
        grad_out, grad_lse = normal(1, 2, 60, 16, dtype=dtype, seed=5), normal(1, 2, 60, dtype=dtype, seed=6)
        grad_out[..., :3, :] = NAN  # what arrives at a query that has looked at nothing goes nowhere
        given = {"grad_lse": grad_lse, "backend": backend, **options, **further}
        found = fastattn.attention_backward(grad_out, query, key, value, *results[:2], **given)
        assert not found[0][..., :3, :].any()
        assert all(np.isfinite(gradient).all() for gradient in found)


@dtypes
@pytest.mark.parametrize("options", NO_KEY, ids=str)
def test_an_empty_row_gives_its_sink_the_gradient_of_its_lse(
    backend: str, attention: Attention, dtype: Any, options: dict[str, Any]
) -> None:
    query, key, value = inputs((60, 70), (1, 2), dtype=dtype)
    sinks = np.array([0.5, -40.0], dtype)
    for further in ({}, {"softcap": 3.0}, {"alibi_slopes": [0.25, 1.0]}):
        given: dict[str, Any] = {"sinks": sinks, **options, **further}
        out, lse, weights = tolerances.check_call(attention, query, key, value, **given)
        assert not out[..., :3, :].any()
        assert not weights[..., :3, :].any()
        np.testing.assert_array_equal(lse[..., :3], np.broadcast_to(sinks[:, None], (1, 2, 3)))
        grad_out, grad_lse = np.zeros_like(out), np.zeros_like(lse)
        grad_out[..., :3, :], grad_lse[..., :3] = 5.0, 1.0
        call: Any = (grad_out, query, key, value, out, lse)
        names = ("query", "key", "value", "sinks")
        *found, to_sinks = fastattn.attention_backward(*call, **given, grad_lse=grad_lse, grads=names, backend=backend)
        assert not any(gradient.any() for gradient in found)
        np.testing.assert_array_equal(to_sinks, [3, 3])


@pytest.mark.parametrize(
    "options",
    [
        {"key_lengths": 0},
        {"key_lengths": [0, 0], "softcap": 2.0},
        {"window": (5, 5), "query_offset": 76, "alibi_slopes": [1, 2, 3]},
        {"window": (None, 5), "query_offset": -66},
        {"window": (5, None), "query_offset": [75, 10**9]},
        {"is_causal": True, "query_offset": -60},
        {"is_causal": "bottom-right", "key_lengths": [0, 0]},
    ],
    ids=str,
)
def test_where_nobody_may_look_at_a_key_everything_is_zero(
    backend: str, attention: Attention, options: dict[str, Any]
) -> None:
    query, key, value = (with_odd(np.random.default_rng(0), array, (NAN, INF)) for array in inputs((60, 70), (2, 3)))
    results = attention(query, key, value, **options, return_lse=True, return_weights=True)
    assert_empty(results)
    grad_out = normal(2, 3, 60, 16)
    for gradient in fastattn.attention_backward(grad_out, query, key, value, *results[:2], **options, backend=backend):
        assert not gradient.any()


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"is_causal": "bottom-right"}, {"dropout_p": 0.5}], ids=str
)
def test_no_keys_is_the_same_case(attention: Attention, options: dict[str, Any]) -> None:
    query, key, value = inputs((7, 0))
    for mask in (None, np.ones((7, 0), bool), np.zeros((1, 0), np.float32), np.array(True)):
        results = attention(query, key, value, mask, **options, return_lse=True, return_weights=True)
        assert [array.shape for array in results] == [(2, 7, 16), (2, 7), (2, 7, 0)]
        assert_empty(results)


def test_an_empty_row_is_zero_whatever_its_values(attention: Attention) -> None:
    query, key, value = inputs((70, 90))
    mask = np.ones((70, 90), bool)
    mask[11] = False
    query[:, 11] = NAN
    value[:, 5] = NAN
    value[:, 6] = INF
    results = attention(query, key, value, mask, return_lse=True, return_weights=True)
    assert_empty(results, 11)
    assert np.isnan(results[0][:, 12]).all()


@dtypes
@lengths
@pytest.mark.parametrize("mask_dtype", [np.float16, np.float32, np.float64])
def test_a_row_of_the_lowest_number_gives_the_mean(
    attention: Attention, dtype: Any, length: tuple[int, int], mask_dtype: Any
) -> None:
    query, key, value = inputs(length, dtype=dtype)
    mask = np.zeros(length, mask_dtype)
    # float16's lowest is only 65504: next to it the scores of float64 still count
    mask[::2] = np.finfo(mask_dtype).min
    scale = 0 if mask_dtype == np.float16 else None
    out, lse, weights = attention(query, key, value, mask, scale=scale, return_lse=True, return_weights=True)
    mean = np.broadcast_to(value.mean(-2, keepdims=True, dtype=np.float64), out.shape)
    close(out[:, ::2], mean[:, ::2], dtype)
    close(weights[:, ::2], 1 / length[1], dtype)
    assert np.isfinite(lse).all()
    other = attention(query, key, value, scale=scale)
    close(out[:, 1::2], other[:, 1::2], dtype)


@dtypes
def test_the_lowest_number_and_a_large_negative_score_stay_finite(attention: Attention, dtype: Any) -> None:
    query, key, value = np.ones((1, 40, 4), dtype), np.full((1, 70, 4), -1, dtype), inputs((40, 70), dtype=dtype)[2]
    mask = np.full((40, 70), np.finfo(dtype).min)
    out = attention(query, key, value, mask, scale=float(np.finfo(dtype).max) / 1200)
    close(out, np.broadcast_to(value.mean(-2, keepdims=True, dtype=np.float64), out.shape), dtype)


@dtypes
def test_the_lowest_number_on_some_keys_leaves_them_out(attention: Attention, dtype: Any) -> None:
    query, key, value = inputs((60, 90), dtype=dtype)
    mask = np.zeros(90, dtype)
    mask[40:] = np.finfo(dtype).min
    close(attention(query, key, value, mask), attention(query, key[:, :40], value[:, :40]), dtype)


@pytest.mark.parametrize("length", [(5, 3), (48, 64), (65, 130), (100, 400)], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["bool", "float", "padding", "causal", "bottom-right"])
@pytest.mark.parametrize("where", ["key", "value", "both"])
def test_what_is_masked_never_leaks(
    attention: Attention, length: tuple[int, int], bad: float, kind: str, where: str
) -> None:
    queries, keys = length
    query, key, value = inputs(length)
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {}
    mask: Array | None = None
    if kind == "padding":
        visible = np.broadcast_to(np.arange(keys) < keys // 2, length)
        mask = visible[:1]
    elif kind in ("causal", "bottom-right"):
        options["is_causal"] = True if kind == "causal" else kind
        visible = np.tri(queries, keys, k=0 if kind == "causal" else keys - queries, dtype=bool)
    else:
        visible = rng.random(length) < 0.5
        mask = visible if kind == "bool" else np.where(visible, np.float32(0), np.float32(-INF))
    clean = attention(query, key, value, mask, **options, return_lse=True, return_weights=True)

    # one bad key each time: whoever does not see it must not change by a bit, whoever does must show it
    for j in sorted({0, 1, keys // 2, keys - 2, keys - 1}):
        bad_key, bad_value = key.copy(), value.copy()
        if where != "value":
            bad_key[:, j] = bad
        if where != "key":
            bad_value[:, j, ::3] = bad
        results = attention(query, bad_key, bad_value, mask, **options, return_lse=True, return_weights=True)
        blind = ~visible[:, j]
        for name, result, wanted in zip(("out", "lse", "weights"), results, clean, strict=True):
            np.testing.assert_array_equal(result[:, blind], wanted[:, blind], err_msg=f"{name}, key {j}")
        tolerances.check_all(results, tolerances.expected(query, bad_key, bad_value, mask, **options))


#: Options that keep some queries from some keys, and what they see of 100 keys at 80 queries in two rows.
INTERVALS: list[tuple[dict[str, Any], list[tuple[Any, ...]]]] = [
    ({"window": (10, 4)}, [(10, 4)] * 2),
    ({"window": (3, None), "query_offset": [-7, 30]}, [(3, None, -7), (3, None, 30)]),
    ({"key_lengths": [40, 91]}, [(None, None, 0, 40), (None, None, 0, 91)]),
    ({"key_lengths": [40, 91], "is_causal": "bottom-right"}, [(None, 0, -40, 40), (None, 0, 11, 91)]),
    ({"key_lengths": [99, 64], "window": (20, 0), "query_offset": 5}, [(20, 0, 5, 99), (20, 0, 5, 64)]),
]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(("options", "intervals"), INTERVALS, ids=str)
@pytest.mark.parametrize("where", ["key", "value"])
def test_what_lies_outside_of_an_interval_never_leaks(
    attention: Attention, bad: float, options: dict[str, Any], intervals: Any, where: str, softcap: float | None
) -> None:
    query, key, value = inputs((80, 100), (2, 1))
    visible = np.stack([seen((80, 100), *interval) for interval in intervals])[:, None]
    options = {**options, "softcap": softcap}
    clean = attention(query, key, value, **options, return_lse=True, return_weights=True)
    for j in (0, 1, 50, 64, 98, 99):
        bad_key, bad_value = key.copy(), value.copy()
        (bad_key if where == "key" else bad_value)[..., j, ::3] = bad
        results = attention(query, bad_key, bad_value, **options, return_lse=True, return_weights=True)
        blind = ~visible[..., j]
        for name, result, wanted in zip(("out", "lse", "weights"), results, clean, strict=True):
            np.testing.assert_array_equal(result[blind], wanted[blind], err_msg=f"{name}, key {j}")
        tolerances.check_all(results, tolerances.expected(query, bad_key, bad_value, visible, softcap=softcap))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize(("options", "intervals"), INTERVALS, ids=str)
@pytest.mark.parametrize("where", ["key", "value"])
def test_what_lies_outside_of_all_intervals_never_leaks_into_gradients(
    backend: str, bad: float, options: dict[str, Any], intervals: Any, where: str, softcap: float | None
) -> None:
    query, key, value = inputs((80, 100), (2, 2))
    grad_out, mask = normal(2, 2, 80, 16, seed=5), normal(80, 100, seed=6)
    visible = np.stack([seen((80, 100), *interval) for interval in intervals])
    visible[:, :, 30:34] = False  # a mask hides some more
    options = {**options, "softcap": softcap, "attn_mask": (mask, np.isin(np.arange(100), range(30, 34), invert=True))}

    def gradients(key: Array, value: Array) -> Any:
        out, lse = fastattn.attention(query, key, value, **options, return_lse=True, backend=backend)
        return fastattn.attention_backward(
            grad_out, query, key, value, out, lse, **options, grad_mask=True, backend=backend
        )

    clean = gradients(key, value)
    for row, hidden in enumerate(~visible.any(axis=1)):
        assert hidden.any()
        for gradient in clean[1:3]:
            assert not gradient[row, :, hidden].any()
        (key if where == "key" else value)[row, :, hidden] = bad
    for found, wanted in zip(gradients(key, value), clean, strict=True):
        assert found.tobytes() == wanted.tobytes()


def test_minus_infinity_in_a_mask_is_the_same_as_false(attention: Attention) -> None:
    query, key, value = inputs((70, 130))
    visible = np.random.default_rng(0).random((70, 130)) < 0.5
    visible[3] = False
    key[:, 100], value[:, 101] = NAN, INF
    visible[:, 100:102] = False
    wanted = tolerances.check_call(attention, query, key, value, visible)
    assert_empty(wanted, 3)
    for dtype in (*HALVES, np.float32, np.float64):
        results = tolerances.check_call(attention, query, key, value, np.where(visible, 0, -INF).astype(dtype))
        assert_empty(results, 3)
        np.testing.assert_array_equal(results[2] != 0, wanted[2] != 0)
        close(results[0], wanted[0])


@dtypes
@lengths
def test_nan_in_a_query_makes_its_row_nan_and_no_other(
    attention: Attention, dtype: Any, length: tuple[int, int]
) -> None:
    query, key, value = inputs(length, dtype=dtype)
    clean = attention(query, key, value, return_lse=True, return_weights=True)
    row = length[0] // 2
    query[0, row, 3] = NAN
    for result, wanted in zip(attention(query, key, value, return_lse=True, return_weights=True), clean, strict=True):
        assert np.isnan(result[0, row]).all()
        np.testing.assert_array_equal(np.delete(result[0], row, 0), np.delete(wanted[0], row, 0))
        np.testing.assert_array_equal(result[1], wanted[1])


@dtypes
@lengths
def test_nan_in_a_key_makes_all_rows_nan_that_see_it(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    key[0, length[1] // 2, 3] = NAN
    out, lse, weights = attention(query, key, value, return_lse=True, return_weights=True)
    for result in (out, lse, weights):
        assert np.isnan(result[0]).all()
        assert np.isfinite(result[1]).all()


@dtypes
@lengths
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_odd_in_a_value_shows_in_its_feature(
    attention: Attention, dtype: Any, length: tuple[int, int], bad: float
) -> None:
    query, key, value = inputs(length, dtype=dtype)
    clean = attention(query, key, value)
    value[0, length[1] // 2, 3] = bad
    out = attention(query, key, value)
    np.testing.assert_array_equal(out[0, :, 3], np.full(length[0], bad))
    np.testing.assert_array_equal(np.delete(out, 3, -1), np.delete(clean, 3, -1))
    np.testing.assert_array_equal(out[1], clean[1])


def test_infinities_of_both_signs_make_nan(attention: Attention) -> None:
    query, key, value = inputs((30, 70))
    value[:, 3], value[:, 60] = INF, -INF
    assert np.isnan(attention(query, key, value)).all()


def test_a_weight_of_zero_does_not_hide_nan(attention: Attention) -> None:
    query, key, value = np.full((20, 1), 1.0), np.zeros((70, 1)), np.zeros((70, 1))
    key[5], key[6] = -1e4, 1e4
    value[5] = NAN
    out, weights = attention(query, key, value, return_weights=True)
    assert not weights[:, 5].any()
    assert np.isnan(out).all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_or_plus_infinity_in_a_mask_makes_its_row_nan(attention: Attention, bad: float) -> None:
    query, key, value = inputs((60, 90))
    mask = np.zeros((60, 90), np.float32)
    clean = attention(query, key, value, mask)
    mask[7, 50] = bad
    out, lse, weights = attention(query, key, value, mask, return_lse=True, return_weights=True)
    assert all(np.isnan(result[:, 7]).all() for result in (out, lse, weights))
    np.testing.assert_array_equal(np.delete(out, 7, 1), np.delete(clean, 7, 1))


@dtypes
@lengths
def test_a_score_of_plus_infinity_makes_its_row_nan(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    query, key = np.abs(query), np.abs(key)
    row = length[0] // 2
    query[0, row, 0] = INF
    out, lse, weights = attention(query, key, value, return_lse=True, return_weights=True)
    for result in (out, lse, weights):
        assert np.isnan(result[0, row]).all()
        assert np.isfinite(np.delete(result[0], row, 0)).all()
        assert np.isfinite(result[1]).all()


@pytest.mark.parametrize("mask", [None, True, 0.0, np.float32(-1e30), np.finfo(np.float32).min], ids=str)
def test_scores_that_are_all_minus_infinity_are_an_empty_row(attention: Attention, mask: Any) -> None:
    query, key, value = inputs((60, 90))
    query, key = np.abs(query), -np.abs(key)
    query[:, 7] = INF
    results = attention(query, key, value, mask, return_lse=True, return_weights=True)
    assert_empty(results, 7)
    assert np.isfinite(results[1][:, 8]).all()


@pytest.mark.parametrize("mask", [None, True, 0.0, np.float32(-1e30), np.finfo(np.float32).min], ids=str)
def test_a_finite_mask_leaves_an_infinite_score_infinite(attention: Attention, mask: Any) -> None:
    query, key, value = (np.abs(array) for array in inputs((60, 90)))
    query[:, 7] = INF
    results = attention(query, key, value, mask, return_lse=True, return_weights=True)
    for result in results:
        assert np.isnan(result[:, 7]).all()
        assert np.isfinite(result[:, 8]).all()


def test_a_float64_mask_in_a_float32_call_saturates(attention: Attention) -> None:
    query, key, value = inputs((60, 90))
    lowest = np.full(90, -1e300)
    out, lse = attention(query, key, value, lowest, return_lse=True)
    close(out, np.broadcast_to(value.mean(-2, keepdims=True), out.shape))
    assert np.isfinite(lse).all()
    highest = np.zeros((60, 90))
    highest[:, 70] = 1e300
    out, lse, weights = attention(query, key, value, highest, return_lse=True, return_weights=True)
    np.testing.assert_array_equal(out, np.broadcast_to(value[:, 70:71], out.shape))
    assert np.isfinite(lse).all()
    assert (weights[..., 70] == 1).all()
    some = np.zeros(90)
    some[:30] = -1e300
    close(attention(query, key, value, some), attention(query, key[:, 30:], value[:, 30:]))
