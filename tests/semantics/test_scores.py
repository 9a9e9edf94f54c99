"""What happens to a score, in order: scale, softcap, masks, dropout, slopes, sinks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tolerances
from semantic_cases import (
    INF,
    NAN,
    Array,
    Attention,
    close,
    dtypes,
    inputs,
    lengths,
    normal,
    softmax_attention,
)

from fastattn.call.halves import finfo
from fastattn.reference import keep_mask


@dtypes
@lengths
def test_scale_is_one_over_root_d_unless_given(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    close(attention(query, key, value), softmax_attention(query, key, value, 0.25), dtype)


@dtypes
@pytest.mark.parametrize("scale", [1, -0.5, 0, 0.0, 3, 1e-30, np.float32(0.1)])
def test_scale_is_any_finite_number(attention: Attention, dtype: Any, scale: Any) -> None:
    query, key, value = inputs((50, 70), dtype=dtype)
    tolerances.check_call(attention, query, key, value, scale=scale)


def test_scale_zero_gives_the_mean(attention: Attention) -> None:
    query, key, value = inputs((50, 70))
    close(attention(query, key, value, scale=0), np.broadcast_to(value.mean(-2, keepdims=True), query.shape))


def test_a_negative_scale_prefers_what_is_unlike(attention: Attention) -> None:
    query, key, value = inputs()
    close(attention(query, key, value, scale=-0.25), attention(-query, key, value, scale=0.25))


@dtypes
@lengths
def test_a_floating_mask_is_added_after_the_scale(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    mask = normal(2, *length, seed=4)
    out = attention(query, key, value, mask, scale=0.5)
    close(out, softmax_attention(query, key, value, 0.5, mask), dtype)


@lengths
def test_true_in_a_boolean_mask_takes_part(attention: Attention, length: tuple[int, int]) -> None:
    query, key, value = inputs(length)
    mask = normal(2, *length, seed=4) > 0
    mask[..., 0] = True
    wanted = softmax_attention(query, key, value, 0.25, np.where(mask, 0, -INF))
    close(attention(query, key, value, mask), wanted)


@pytest.mark.parametrize("is_causal", [True, "bottom-right"])
@lengths
def test_a_key_takes_no_part_where_any_mask_says_no(
    attention: Attention, length: tuple[int, int], is_causal: Any
) -> None:
    query, key, value = inputs(length)
    causal = np.tri(*length, k=0 if is_causal is True else length[1] - length[0], dtype=bool)
    allowed = normal(2, *length, seed=4) > 0
    for mask in (allowed, np.where(allowed, normal(2, *length, seed=5), -INF)):
        both = causal & mask if mask.dtype == bool else np.where(causal, mask, -INF)
        results = attention(query, key, value, mask, is_causal=is_causal, return_weights=True, return_lse=True)
        assert not results[2][~(causal & allowed)].any()
        tolerances.check_all(results, tolerances.expected(query, key, value, both))


@dtypes
@lengths
def test_a_softcap_comes_after_the_scale_and_before_a_mask(
    attention: Attention, dtype: Any, length: tuple[int, int]
) -> None:
    query, key, value = inputs(length, dtype=dtype)
    mask = normal(2, *length, seed=4)
    scores = 1.5 * (query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2))
    for bias in (None, mask):
        capped = 2 * np.tanh(scores / 2) + (0 if bias is None else bias)
        weights = np.exp(capped - capped.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        results = tolerances.check_call(attention, query, key, value, bias, scale=1.5, softcap=2)
        close(results[0], weights @ value, dtype)
        close(results[2], weights, dtype)
        close(results[1], np.log(np.exp(capped).sum(-1)), dtype)


@dtypes
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("softcap", [5e-324, 1e-60, 1e-40, 1e-18, 1e-3, 0.3, np.float32(7), 50, 1e18, 1e40, 1.7e308])
def test_a_softcap_is_any_finite_number_above_0(attention: Attention, dtype: Any, softcap: Any, mask: Any) -> None:
    query, key, value = inputs((50, 70), dtype=dtype)
    bias = normal(50, 70, seed=4)
    given = None if mask is None else bias > 0 if mask == "bool" else bias
    results = tolerances.check_call(attention, query, key, value, given, softcap=softcap)
    if softcap < 1e-10:  # all scores are 0
        wanted = attention(query, key, value, given, scale=0)
    elif softcap > 1e10:  # no score is near it
        wanted = attention(query, key, value, given)
    else:
        return
    close(results[0], wanted, dtype)


@dtypes
@pytest.mark.parametrize("softcap", [1e-5, 2.0, 60.0])
def test_no_score_exceeds_a_softcap(attention: Attention, dtype: Any, softcap: float) -> None:
    query, key, value = inputs((60, 130), dtype=dtype)
    raw = query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2)
    query, key = query * dtype(3e17), key * dtype(3e17)
    weights = np.exp(softcap * np.sign(raw) - softcap)  # +softcap and -softcap, none of them is near 0
    close(attention(query, key, value, softcap=softcap), weights / weights.sum(-1, keepdims=True) @ value, dtype)
    lse = attention(query, key, value, softcap=softcap, return_lse=True)[1]
    assert (np.abs(lse) <= softcap + math.log(130) + 1e-5).all()


def test_a_softcap_makes_an_infinite_score_finite_and_leaves_nan(attention: Attention) -> None:
    query, key, value = (np.abs(array) for array in inputs((60, 90)))
    query[:, 7], query[:, 8], query[:, 9, 3] = INF, -INF, NAN
    results = tolerances.check_call(attention, query, key, value, softcap=3.0)
    for row in (7, 8):
        close(results[0][:, row], value.mean(-2))
        close(results[1][:, row], math.log(90) + (3 if row == 7 else -3))
    for result in results:
        assert np.isnan(result[:, 9]).all()
        assert np.isfinite(np.delete(result, 9, 1)).all()


@dtypes
@lengths
def test_a_floating_and_a_boolean_mask_both_hold(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    bias, keep = normal(2, *length, seed=4), normal(*length, seed=5) > 0
    bias[normal(2, *length, seed=6) > 1] = -INF
    both = np.where(keep, bias, -INF)
    results = attention(query, key, value, (bias, keep), return_lse=True, return_weights=True)
    tolerances.check_all(results, tolerances.expected(query, key, value, both))
    np.testing.assert_array_equal(results[2] != 0, both > -INF)
    for kind in (np.float16, np.float64):
        tolerances.check_call(attention, query, key, value, (bias.astype(kind), keep))


@pytest.mark.parametrize(
    "shapes", [((), (60, 70)), ((60, 1), (70,)), ((3, 1, 70), (2, 1, 60, 1)), ((70,), ())], ids=str
)
def test_each_mask_of_a_pair_broadcasts(attention: Attention, shapes: tuple[tuple[int, ...], ...]) -> None:
    query, key, value = inputs((60, 70), (2, 3))
    bias, keep = (np.asarray(normal(*shape, 1, seed=i)[..., 0]) for i, shape in enumerate(shapes, 1))
    keep = np.asarray(keep > -0.5)
    full = [np.broadcast_to(mask, (2, 3, 60, 70)).copy() for mask in (bias, keep)]
    np.testing.assert_array_equal(attention(query, key, value, (bias, keep)), attention(query, key, value, tuple(full)))


def test_a_pair_may_have_one_mask_or_none(attention: Attention) -> None:
    query, key, value = inputs((60, 70))
    bias, keep = normal(60, 70), normal(60, 70) > 0
    np.testing.assert_array_equal(attention(query, key, value, (bias, None)), attention(query, key, value, bias))
    np.testing.assert_array_equal(attention(query, key, value, (None, keep)), attention(query, key, value, keep))
    np.testing.assert_array_equal(attention(query, key, value, (None, None)), attention(query, key, value))


@dtypes
@lengths
def test_lse_is_the_natural_logarithm_of_the_denominator(
    attention: Attention, dtype: Any, length: tuple[int, int]
) -> None:
    query, key, value = inputs(length, dtype=dtype)
    scores = 0.25 * (query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2))
    close(attention(query, key, value, return_lse=True)[1], np.log(np.exp(scores).sum(-1)), dtype)


@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal"])
def test_weights_are_exp_of_score_minus_lse(attention: Attention, kind: str) -> None:
    query, key, value = inputs((60, 90), dtype=np.float64)
    scores = 0.25 * (query @ key.swapaxes(-1, -2))
    mask: Array | None = None
    if kind == "bool":
        mask = normal(60, 90) > 0
        scores = np.where(mask, scores, -INF)
    elif kind == "float":
        mask = normal(60, 90)
        scores = scores + mask
    elif kind == "causal":
        scores = np.where(np.tri(60, 90, dtype=bool), scores, -INF)
    _, lse, weights = attention(
        query, key, value, mask, is_causal=kind == "causal", return_lse=True, return_weights=True
    )
    close(weights, np.exp(scores - lse[..., None]), np.float64)
    close(weights.sum(-1), 1, np.float64)


@dtypes
@lengths
@pytest.mark.parametrize("p", [0.1, 0.5, 1])
def test_dropout_zeroes_weights_and_enlarges_those_it_keeps(
    attention: Attention, dtype: Any, length: tuple[int, int], p: float
) -> None:
    query, key, value = inputs(length, (3, 2), dtype=dtype)
    weights = attention(query, key, value, return_weights=True)[1]
    out, lse, dropped = attention(query, key, value, None, p, rng=11, return_weights=True, return_lse=True)
    kept = keep_mask(11, np.arange(3)[:, None], np.arange(2), *length, p)
    np.testing.assert_array_equal(dropped != 0, kept & (weights != 0))
    close(dropped, np.where(kept, weights / (1 - p) if p < 1 else 0, 0), dtype)
    close(out, dropped.astype(np.float64) @ value, dtype)
    # the denominator is that of all weights
    np.testing.assert_array_equal(lse, attention(query, key, value, return_lse=True)[1])


def test_what_dropout_keeps_depends_on_seed_batch_head_query_and_key_alone(attention: Attention) -> None:
    def kept(length: tuple[int, int], features: int = 16, seed: int = 5, **options: Any) -> Array:
        query, key, value = inputs(length, (2, 4), features)
        weights = attention(query, key, value, dropout_p=0.5, rng=seed, return_weights=True, **options)[1]
        return np.asarray(weights != 0)

    large = kept((70, 200))
    np.testing.assert_array_equal(kept((33, 90)), large[..., :33, :90])
    np.testing.assert_array_equal(kept((70, 200), features=5), large)
    causal = np.tri(70, 200, dtype=bool)
    np.testing.assert_array_equal(kept((70, 200), is_causal=True), large & causal)
    assert (kept((70, 200), seed=6) != large).any()
    patterns = {large[b, h].tobytes() for b in range(2) for h in range(4)}
    assert len(patterns) == 8
    query, key, value = inputs((70, 200), (2, 4))
    grouped = attention(query, key[:, :2], value[:, :2], None, 0.5, False, None, True, rng=5, return_weights=True)[1]
    np.testing.assert_array_equal(grouped != 0, large)


def test_what_dropout_keeps_is_not_moved_by_positions_and_lengths(attention: Attention) -> None:
    query, key, value = inputs((70, 200), (2, 4))
    dropped: dict[str, Any] = {"dropout_p": 0.5, "rng": 5, "return_weights": True}
    kept = attention(query, key, value, **dropped)[1] != 0
    for options in (
        {"window": (20, 3), "query_offset": 31},
        {"is_causal": True, "query_offset": [100, -20]},
        {"key_lengths": [150, 33], "window": (None, 60)},
    ):
        seen = attention(query, key, value, **options, return_weights=True)[1] != 0
        some = attention(query, key, value, **options, **dropped)[1] != 0
        np.testing.assert_array_equal(some, kept & seen)


def test_dropout_with_an_equal_seed_is_equal(attention: Attention) -> None:
    query, key, value = inputs((33, 44))
    first = attention(query, key, value, dropout_p=0.5, rng=2**64 - 1)
    np.testing.assert_array_equal(first, attention(query, key, value, dropout_p=0.5, rng=2**64 - 1))
    rng = np.random.default_rng(1)
    drawn = [attention(query, key, value, dropout_p=0.5, rng=rng) for _ in range(2)]
    assert (drawn[0] != drawn[1]).any()
    seed = np.random.default_rng(1).integers(0, 2**64, dtype=np.uint64)
    np.testing.assert_array_equal(drawn[0], attention(query, key, value, dropout_p=0.5, rng=seed))
    assert (attention(query, key, value, dropout_p=0.5) != attention(query, key, value, dropout_p=0.5)).any()


def test_dropout_of_everything_gives_zero(attention: Attention) -> None:
    query, key, value = inputs()
    out, weights = attention(query, key, value, dropout_p=1.0, return_weights=True)
    assert not out.any()
    assert not weights.any()


def test_a_dropped_key_was_looked_at(attention: Attention) -> None:
    query, key, value = inputs()
    key[:, 3], value[:, 4] = NAN, NAN
    assert np.isnan(attention(query, key, value, dropout_p=0.9, rng=0)).all()


@dtypes
@lengths
def test_out_is_the_weights_times_the_values(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    out, weights = attention(query, key, value, return_weights=True)
    close(out, weights @ value, dtype)


def test_what_was_asked_for_comes_back_in_order(attention: Attention) -> None:
    query, key, value = inputs((7, 9))
    out = attention(query, key, value)
    assert isinstance(out, np.ndarray)
    shapes = {"return_lse": (2, 7), "return_weights": (2, 7, 9)}
    for flag, shape in shapes.items():
        both = attention(query, key, value, **{flag: True})
        assert isinstance(both, tuple)
        assert [array.shape for array in both] == [out.shape, shape]
    everything = attention(query, key, value, return_lse=True, return_weights=True)
    assert [array.shape for array in everything] == [out.shape, *shapes.values()]


def away(queries: int, keys: int, offset: Any = 0) -> Array:
    """Return how many positions each key is away from each query."""
    return np.abs(np.arange(queries)[:, None] + offset - np.arange(keys))


@dtypes
@lengths
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_alibi_takes_a_slope_for_each_position_between_after_softcap_and_mask(
    attention: Attention, dtype: Any, length: tuple[int, int], softcap: float | None
) -> None:
    query, key, value = inputs(length, dtype=dtype)
    slopes = np.array([0.5, 2.0**-8])
    scores = 1.5 * (query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2))
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    scores = scores - slopes[:, None, None] * away(*length)
    for bias in (None, normal(2, *length, seed=4)):
        biased = scores + (0 if bias is None else bias)
        weights = np.exp(biased - biased.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        options: dict[str, Any] = {"scale": 1.5, "softcap": softcap, "alibi_slopes": slopes}
        results = tolerances.check_call(attention, query, key, value, bias, **options)
        close(results[0], weights @ value, dtype)
        close(results[2], weights, dtype)
        close(results[1], np.log(np.exp(biased).sum(-1)), dtype)


@dtypes
@pytest.mark.parametrize(
    ("options", "offsets"),
    [
        ({"query_offset": 30}, [30, 30]),
        ({"query_offset": -200}, [-200, -200]),
        ({"query_offset": [5, -3], "window": (20, 4)}, [5, -3]),
        ({"is_causal": "bottom-right"}, [90, 90]),
        ({"is_causal": "bottom-right", "key_lengths": [130, 51]}, [90, 11]),
        ({"key_lengths": [130, 51]}, [0, 0]),
    ],
    ids=str,
)
def test_alibi_goes_by_positions(attention: Attention, dtype: Any, options: Any, offsets: list[int]) -> None:
    query, key, value = inputs((40, 130), (2, 3), dtype=dtype)
    slopes = np.array([0.5, 0.0, -0.125])
    bias = -slopes[:, None, None] * np.stack([away(40, 130, offset) for offset in offsets])[:, None]
    results = tolerances.check_call(attention, query, key, value, alibi_slopes=slopes, **options)
    wanted = attention(query, key, value, bias, **options, return_lse=True, return_weights=True)
    for got, want in zip(results, wanted, strict=True):
        np.testing.assert_allclose(
            got, want, rtol=100 * np.finfo(dtype).eps, atol=100 * float(finfo(np.dtype(dtype)).eps)
        )


def test_alibi_slopes_are_one_for_each_query_head(attention: Attention) -> None:
    """Or for each of each row of the batch; of a group of heads each has its own."""
    query, key, value = normal(2, 6, 40, 16), normal(2, 2, 70, 16, seed=2), normal(2, 2, 70, 16, seed=3)
    slopes = np.abs(normal(2, 6, seed=4))
    for given in (slopes, slopes[0], slopes[:, :1], slopes[0, 0], slopes.astype(np.float16), (slopes[0] * 9).tolist()):
        whole = tolerances.check_call(attention, query, key, value, enable_gqa=True, alibi_slopes=given)
        own = np.broadcast_to(given, (2, 6))
        for b in range(2):
            for h in range(6):
                arrays = query[b, h], key[b, h // 3], value[b, h // 3]
                np.testing.assert_array_equal(whole[0][b, h], attention(*arrays, alibi_slopes=own[b, h]))


@dtypes
@pytest.mark.parametrize("slope", [0, 5e-324, 1e-40, 1e-8, np.float32(0.7), 1e30, 3e38, -3e38, 1e300, -1.7e308])
@pytest.mark.parametrize("offset", [0, 1, 1000, 2**62], ids=str)
def test_a_slope_is_any_finite_number(attention: Attention, dtype: Any, slope: Any, offset: int) -> None:
    query, key, value = inputs((50, 70), dtype=dtype)
    options: dict[str, Any] = {"alibi_slopes": [slope, 0.5], "query_offset": offset}
    out, lse, weights = tolerances.check_call(attention, query, key, value, **options)
    assert np.isfinite(lse).all()
    if float(slope) >= 1e30 and offset == 0:
        np.testing.assert_array_equal(weights[0], np.eye(50, 70))
        close(out[0], value[0, :50], dtype)
    if float(slope) >= 1e300 and offset > 70 and dtype == np.float32:  # as a mask that is finfo.min throughout
        close(out[0], np.broadcast_to(value[0].mean(0), (50, 16)), dtype)


def test_slopes_do_not_make_a_hidden_key_seen(attention: Attention) -> None:
    query, key, value = inputs((50, 70))
    key[:, 60:], value[:, 60:] = NAN, INF
    mask = np.arange(70) < 60
    for slope in (0.25, 1e300, -1e300):
        for given in (mask, np.where(mask, 0, -INF)):
            results = tolerances.check_call(attention, query, key, value, given, alibi_slopes=slope)
            assert np.isfinite(results[0]).all()
            assert not results[2][..., 60:].any()
            alone = attention(query, key[:, :60], value[:, :60], alibi_slopes=slope)
            np.testing.assert_allclose(results[0], alone, rtol=0, atol=2e-6)


@dtypes
@lengths
def test_a_sink_is_a_score_without_a_key(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    """One more column of scores, whose weight goes nowhere."""
    query, key, value = inputs(length, dtype=dtype)
    sinks = np.array([0.5, -2.0])
    scores = 0.25 * (query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2))
    for bias in (None, normal(2, *length, seed=4)):
        powers = np.exp(scores + (0 if bias is None else bias))
        total = powers.sum(-1) + np.exp(sinks)[:, None]
        options: dict[str, Any] = {"scale": 0.25, "sinks": sinks}
        out, lse, weights = tolerances.check_call(attention, query, key, value, bias, **options)
        close(weights, powers / total[..., None], dtype)
        close(lse, np.log(total), dtype)
        close(out, powers / total[..., None] @ value, dtype)
        assert (weights.sum(-1) < 1).all()
        close(weights.sum(-1), 1 - np.exp(sinks[:, None] - lse), dtype)


@dtypes
@pytest.mark.parametrize("sink", [0, 5e-324, 100, -100, 1e9, -1e9, 1e30, -1e30, 3e38, -3e38, 1e300, -1.7e308])
def test_a_sink_is_any_finite_number(attention: Attention, dtype: Any, sink: float) -> None:
    query, key, value = inputs((50, 70), dtype=dtype)
    mask = np.ones((50, 70), bool)
    mask[:3] = False
    options: dict[str, Any] = {"sinks": [sink, 0.5]}
    out, lse, weights = tolerances.check_call(attention, query, key, value, mask, **options)
    limit = np.finfo(dtype).max
    assert (lse[0, :3] == dtype(np.clip(sink, -limit, limit))).all()
    if sink >= 1e9:
        assert not weights[0].any()
        assert not out[0].any()
    if sink <= -1e9:
        plain = attention(query[:1], key[:1], value[:1], mask)
        np.testing.assert_allclose(out[:1], plain, rtol=0, atol=20 * np.finfo(dtype).eps)


@dtypes
@pytest.mark.parametrize("queries", [1, 50])
def test_a_sink_far_above_the_scores_is_the_lse_to_the_last_digits(
    attention: Attention, dtype: Any, queries: int
) -> None:
    """It is not told by way of the largest score."""
    query, key, value = inputs((queries, 70), dtype=dtype)
    query, key = (20 if dtype == np.float64 else 3) * abs(query), -20 * abs(key)
    sinks = np.array([6.0, -3.0], dtype)
    _, lse = attention(query, key, value, sinks=sinks, return_lse=True)
    np.testing.assert_allclose(lse, np.broadcast_to(sinks[:, None], lse.shape), rtol=2 * np.finfo(dtype).eps)


def test_a_sink_of_minus_infinity_is_none(attention: Attention) -> None:
    query, key, value = inputs((50, 70))
    wanted = attention(query, key, value, return_lse=True, return_weights=True)
    results = attention(query, key, value, sinks=-INF, return_lse=True, return_weights=True)
    assert [array.tobytes() for array in results] == [array.tobytes() for array in wanted]


@pytest.mark.parametrize("sink", [NAN, INF])
def test_a_sink_of_nan_or_infinity_makes_its_rows_nan(attention: Attention, sink: float) -> None:
    """As such a score does; a row without keys has no weights that could be NaN."""
    query, key, value = inputs((50, 70))
    mask = np.arange(50)[:, None] > 2
    out, lse, weights = attention(query, key, value, mask, sinks=[sink, 0.0], return_lse=True, return_weights=True)
    assert np.isnan(lse[0]).all()
    for array in (out, weights):
        assert np.isnan(array[0, 3:]).all()
        assert not array[0, :3].any()
        assert np.isfinite(array[1]).all()


def test_sinks_are_one_for_each_query_head(attention: Attention) -> None:
    """Or for each of each row of the batch; of a group of heads each has its own."""
    query, key, value = normal(2, 6, 40, 16), normal(2, 2, 70, 16, seed=2), normal(2, 2, 70, 16, seed=3)
    sinks = normal(2, 6, seed=4)
    for given in (sinks, sinks[0], sinks[:, :1], sinks[0, 0], sinks.astype(np.float16), (sinks[0] * 9).tolist()):
        whole = tolerances.check_call(attention, query, key, value, enable_gqa=True, sinks=given)
        own = np.broadcast_to(given, (2, 6))
        for b in range(2):
            for h in range(6):
                arrays = query[b, h], key[b, h // 3], value[b, h // 3]
                np.testing.assert_array_equal(whole[0][b, h], attention(*arrays, sinks=own[b, h]))


def test_dropout_leaves_a_sink_its_share(attention: Attention) -> None:
    query, key, value = inputs((50, 70))
    options: dict[str, Any] = {"sinks": [2.0, -1.0], "return_lse": True, "return_weights": True}
    _, lse, weights = attention(query, key, value, **options)
    _, dropped_lse, dropped = attention(query, key, value, dropout_p=0.5, rng=3, **options)
    assert dropped_lse.tobytes() == lse.tobytes()
    np.testing.assert_allclose(dropped, np.where(dropped == 0, 0, 2 * weights), rtol=1e-6)
