"""The contract, sentence by sentence: what docs/semantics.md says of `fastattn.attention` has a test of that name here.

Every test runs on every backend. Where a sentence is about all calls rather than one (any shape, any mask), Hypothesis
tries them in test_properties.py.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import floating_modes
import numpy as np
import pytest
import tolerances
from numpy.typing import NDArray
from strategies import BFLOAT16, HALVES, LAYOUTS, each, laid_out, with_odd

import fastattn
from fastattn.call.halves import cast, finfo
from fastattn.reference import keep_mask

Array = NDArray[Any]
Attention = Callable[..., Any]

INF, NAN = np.inf, np.nan
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
halves = pytest.mark.parametrize("dtype", HALVES)
OTHER_HALF = dict(zip(HALVES, reversed(HALVES), strict=True))

#: Lengths (Lq, Lk) that fill vectors, tiles and blocks, that leave a bit over, and that are shorter than any of them.
LENGTHS = ((1, 1), (5, 3), (48, 64), (65, 130), (100, 300))
lengths = pytest.mark.parametrize("length", LENGTHS, ids=str)


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Array:
    """Return normally distributed numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def inputs(
    length: tuple[int, int] = (7, 9), heads: tuple[int, ...] = (2,), features: int = 16, dtype: Any = np.float32
) -> tuple[Array, Array, Array]:
    """Return query, key and value."""
    queries, keys = length
    return (
        normal(*heads, queries, features, dtype=dtype, seed=1),
        normal(*heads, keys, features, dtype=dtype, seed=2),
        normal(*heads, keys, features, dtype=dtype, seed=3),
    )


def halves_of(dtype: Any, *arrays: Array) -> list[Array]:
    """Return arrays rounded to half precision, or widened from there."""
    return [cast(array, np.dtype(dtype)).copy() for array in arrays]


def softmax_attention(query: Array, key: Array, value: Array, scale: float, bias: Any = 0.0) -> Array:
    """Evaluate the formula in float64 where nothing is masked, with nothing of the project in it."""
    query, key, value = (array.astype(np.float64) for array in (query, key, value))
    scores = scale * (query @ key.swapaxes(-1, -2)) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ value)


def close(got: Any, wanted: Any, dtype: Any = np.float32) -> None:
    """Assert that results of usual size agree to a few roundings (see tolerances.py; A is about 16 here)."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=100 * float(finfo(np.dtype(dtype)).eps))


# -- order of operations on a score ------------------------------------------------------------------------------------


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


# -- functions of the user's -------------------------------------------------------------------------------------------


def identity(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Leave a score what it is."""
    return score


@dtypes
@lengths
def test_a_score_mod_is_asked_after_softcap_mask_and_slopes(
    attention: Attention, dtype: Any, length: tuple[int, int]
) -> None:
    query, key, value = inputs(length, heads=(2, 2), dtype=dtype)
    bias, slopes = normal(*length, seed=4), np.array([0.25, 0.5])
    out = attention(
        query, key, value, bias, softcap=2.0, alibi_slopes=slopes, score_mod=lambda score, b, h, q, k: score * 0.5 + h
    )
    scores = query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) / 4
    scores = 2 * np.tanh(scores / 2) + bias
    scores = scores - slopes[:, None, None] * np.abs(np.arange(length[0])[:, None] - np.arange(length[1]))
    weights = np.exp(scores * 0.5)
    close(out, weights / weights.sum(-1, keepdims=True) @ value, dtype)


def test_functions_are_given_batch_head_position_and_key(attention: Attention) -> None:
    query, key, value = inputs((4, 9), heads=(2, 3, 2))
    offsets = np.array([[0, 1, 2], [5, 6, 7]])
    told = np.random.default_rng(0).standard_normal((6, 2, 12, 9))
    options: dict[str, Any] = {"query_offset": offsets, "is_causal": True}
    out = attention(query, key, value, score_mod=lambda s, b, h, q, k: s + told[b, h, q, k], **options)
    rows = (np.arange(4) + offsets[..., None])[:, :, None, :, None]
    added = told.reshape(2, 3, 2, 12, 9)[
        np.arange(2)[:, None, None, None, None],
        np.arange(3)[:, None, None, None],
        np.arange(2)[:, None, None],
        rows,
        np.arange(9),
    ]
    close(out, attention(query, key, value, added, **options))


@dtypes
@lengths
def test_a_mask_mod_says_which_keys_take_part(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    seen = (np.arange(length[0])[:, None] + 2 * np.arange(length[1])) % 3 > 0
    out, lse = attention(query, key, value, mask_mod=lambda b, h, q, k: (q + 2 * k) % 3 > 0, return_lse=True)
    wanted, wanted_lse = attention(query, key, value, seen, return_lse=True)
    close(out, wanted, dtype)
    close(lse, wanted_lse, dtype)


def test_a_mask_mod_hides_blocks_of_keys_parts_of_some_and_nothing_of_others(attention: Attention) -> None:
    query, key, value = inputs((150, 700))

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        kind = (query // 64 + key // 64) % 3
        return kind == 2 or (kind == 1 and (query + key) % 5 > 1)

    kind = (np.arange(150)[:, None] // 64 + np.arange(700) // 64) % 3
    seen = (kind == 2) | ((kind == 1) & ((np.arange(150)[:, None] + np.arange(700)) % 5 > 1))
    for _ in range(2):  # what is known of blocks by then
        close(attention(query, key, value, mask_mod=mask_mod), attention(query, key, value, seen))


@pytest.mark.parametrize("length", [(5, 9), (70, 200)])
def test_minus_infinity_from_a_score_mod_is_the_same_as_false(attention: Attention, length: tuple[int, int]) -> None:
    query, key, value = inputs(length)
    key[:, 4], value[:, 4], value[:, 3] = NAN, INF, NAN

    def hiding(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return -np.inf if key == 3 or key == 4 or query == 2 else score

    out = attention(query, key, value, score_mod=hiding)
    seen = (np.arange(length[1]) != 3) & (np.arange(length[1]) != 4) & (np.arange(length[0]) != 2)[:, None]
    close(out, attention(query, key, value, seen))
    assert not out[:, 2].any()


@pytest.mark.parametrize("length", [(5, 9), (70, 200)])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_a_function_hides_or_is_asked_about_in_vain_never_leaks(
    attention: Attention, bad: float, length: tuple[int, int]
) -> None:
    query, key, value = inputs(length)
    wanted = attention(query[:, :, :], key[:, 1:], value[:, 1:], score_mod=lambda s, b, h, q, k: s * 0.5)
    key[:, 0] = value[:, 0] = bad
    options: dict[str, Any] = {"score_mod": lambda s, b, h, q, k: s * 0.5 if k > 0 else bad}
    close(attention(query, key, value, mask_mod=lambda b, h, q, k: k > 0, **options), wanted)
    close(attention(query, key, value, np.arange(length[1]) > 0, **options), wanted)


@lengths
def test_what_a_floating_mask_hides_no_function_shows(attention: Attention, length: tuple[int, int]) -> None:
    query, key, value = inputs(length)
    bias = normal(*length, seed=4)
    bias[(np.arange(length[0])[:, None] + np.arange(length[1])) % 3 == 1] = -INF
    scores = 2 * np.tanh(query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) / 4 + bias)
    weights = np.where(bias == -INF, 0, np.exp(scores))
    out = attention(query, key, value, bias, score_mod=lambda s, b, h, q, k: 2 * np.tanh(s))
    close(out, weights / weights.sum(-1, keepdims=True) @ value)


def test_what_is_hidden_by_its_score_does_not_leak(attention: Attention) -> None:
    query, key, value = inputs((70, 90))
    clean = attention(query, key, value, score_mod=lambda s, b, h, q, k: s if s > 0 else -np.inf)
    hidden = query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) < 0
    value[:, 3] = NAN
    out = attention(query, key, value, score_mod=lambda s, b, h, q, k: s if s > 0 else -np.inf)
    np.testing.assert_array_equal(np.isnan(out).any(-1), ~hidden[..., 3])
    close(out[hidden[..., 3]], clean[hidden[..., 3]])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("length", [(5, 9), (70, 200)])
def test_what_is_hidden_by_its_score_does_not_leak_into_gradients(
    backend: str, length: tuple[int, int], bad: float, softcap: float | None
) -> None:
    query, key, value = inputs(length)
    key[:, 4], value[:, 4] = NAN, INF
    bias, table = normal(*length, seed=4), normal(length[1], seed=6)
    scores = query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) / 4
    scores = (scores if softcap is None else softcap * np.tanh(scores / softcap)) + bias
    names = ("query", "key", "value", "attn_mask", *(("table",) if backend == "cpu" else ()))
    options: dict[str, Any] = {
        "attn_mask": bias,
        "softcap": softcap,
        "score_mod": lambda s, b, h, q, k: s + table[k] if s > 0.1 else -np.inf,
        "backend": backend,
    }
    out, lse = fastattn.attention(query, key, value, **options, return_lse=True)
    grad_out = normal(*out.shape, seed=5)
    call: Any = (query, key, value, out, lse)
    clean = dict(zip(names, fastattn.attention_backward(grad_out, *call, **options, grads=names), strict=True))
    grad_out[:, 2, 3] = bad
    found = dict(zip(names, fastattn.attention_backward(grad_out, *call, **options, grads=names), strict=True))
    seen = scores > 0.1
    for name, looks in (("query", np.arange(length[0]) == 2), ("key", seen[:, 2]), ("value", seen[:, 2])):
        looks = np.broadcast_to(looks, found[name].shape[:-1])
        columns = found[name][..., 3:4] if name == "value" else found[name]
        np.testing.assert_array_equal(np.isfinite(columns).any(-1), ~looks)
        np.testing.assert_array_equal(found[name][~looks], clean[name][~looks])
    looks = (np.arange(length[0]) == 2)[:, None] & seen.any(axis=0)
    np.testing.assert_array_equal(np.isfinite(found["attn_mask"]), ~looks)
    if backend == "cpu":
        np.testing.assert_array_equal(np.isfinite(found["table"]), ~seen[:, 2].any(axis=0))


@pytest.mark.parametrize("length", [(5, 9), (70, 200)])
def test_what_a_score_mod_hides_never_leaks_into_gradients_of_additive_attention(
    backend: str, length: tuple[int, int]
) -> None:
    backend = "cpu" if backend == "cuda" else backend
    query, key, value = inputs(length)
    arrays = [*(0.3 * query[0], 0.3 * key[0], value[0]), normal(query.shape[-1], seed=7)]

    def hiding(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return -np.inf if key == 3 or key == 4 or query == 2 or (query + key) % 5 == 0 else score

    def gradients(*arrays: Any) -> Any:
        options: dict[str, Any] = {"score_mod": hiding, "backend": backend}
        out, lse = fastattn.additive_attention(*arrays, return_lse=True, **options)
        grad_out = normal(*out.shape, seed=5)
        grad_out[2], grad_out[1] = INF, np.where(np.arange(out.shape[-1]) == 3, NAN, grad_out[1])
        return fastattn.additive_attention_backward(grad_out, *arrays, out, lse, **options)

    clean = gradients(*arrays)
    seen = np.isin(np.arange(length[1]), (3, 4), invert=True) & ((1 + np.arange(length[1])) % 5 != 0)
    np.testing.assert_array_equal(np.isnan(clean[2][:, 3]), seen)
    assert np.isfinite(np.delete(clean[2], 3, axis=-1)).all()
    np.testing.assert_array_equal(np.isnan(clean[1]).any(-1), seen)
    for array in arrays[1:3]:
        array[3], array[4] = NAN, INF
    arrays[0][2] = NAN
    for found, wanted in zip(gradients(*map(np.asarray, arrays)), clean, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("length", [(20, 30), (70, 130)])
def test_a_key_that_a_mask_mod_lets_through_is_looked_at_whatever_its_score(
    attention: Attention, length: tuple[int, int]
) -> None:
    query, key, value = inputs(length)
    query[..., 0], key[..., 7, 0], value[..., 7, :] = 1.0, -np.inf, np.nan  # a weight of 0, and a value of NaN
    out = attention(query, key, value, mask_mod=lambda b, h, q, k: (k != 7) | (q % 3 > 0))
    assert np.isfinite(out[..., ::3, :]).all()
    assert np.isnan(out[..., 1::3, :]).all()
    assert np.isnan(out[..., 2::3, :]).all()


def test_where_a_mask_mod_hides_everything_out_is_zero(attention: Attention) -> None:
    query, key, value = inputs((70, 90))
    out, lse = attention(query, key, value, mask_mod=lambda b, h, q, k: False, return_lse=True)
    assert not out.any()
    assert (lse == -INF).all()


def test_an_index_counts_from_the_end_or_is_an_error_where_the_query_may_look(attention: Attention) -> None:
    query, key, value = inputs((6, 9))
    table = normal(5)

    def relative(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[query - key]

    near = {"window": (4, 4)}  # from table[-4] to table[4]
    added = table[np.clip(np.arange(6)[:, None] - np.arange(9), -4, 4)]
    close(attention(query, key, value, score_mod=relative, **near), attention(query, key, value, added, **near))
    with pytest.raises(IndexError, match="score_mod: .*relative: an index was out of range"):
        attention(query, key, value, score_mod=relative, window=(5, 4))
    with pytest.raises(IndexError, match="mask_mod"):
        attention(query, key, value, mask_mod=lambda b, h, q, k: table[k] > 0)
    attention(query, key, value, mask_mod=lambda b, h, q, k: table[k] > 0, key_lengths=5)


@pytest.mark.parametrize(
    "captured", [np.float64(0.5), np.float16(0.5), 0.5, np.full(3, 0.5), np.full(3, 0.5, np.float16)]
)
def test_a_score_has_the_dtype_of_accumulation_whatever_is_captured(attention: Attention, captured: Any) -> None:
    query, key, value = inputs()
    if np.ndim(captured):
        out = attention(query, key, value, score_mod=lambda s, b, h, q, k: s * captured[k % 3])
    else:
        out = attention(query, key, value, score_mod=lambda s, b, h, q, k: s * captured)
    assert out.dtype == np.float32
    close(out, attention(query, key, value, scale=0.125))


def test_a_function_that_leaves_scores_what_they_are_changes_nothing(attention: Attention) -> None:
    query, key, value = inputs((70, 90))
    options: dict[str, Any] = {"score_mod": identity, "mask_mod": lambda b, h, q, k: True}
    close(attention(query, key, value, **options, is_causal=True), attention(query, key, value, is_causal=True))


def test_with_functions_a_padded_sequence_has_the_bits_of_the_same_sequence_alone(cpu_attention: Attention) -> None:
    query, key, value = inputs((80, 150), heads=(3, 2))
    options: dict[str, Any] = {
        "score_mod": lambda s, b, h, q, k: s - 0.125 * abs(q - k) * (h + 1),
        "mask_mod": lambda b, h, q, k: (q // 16 == k // 16) | (k < 7),
    }
    lengths = [150, 101, 8]
    out = cpu_attention(query, key, value, key_lengths=lengths, **options)
    for row, length in enumerate(lengths):
        alone = cpu_attention(query[row], key[row, :, :length], value[row, :, :length], **options)
        assert alone.tobytes() == out[row].tobytes()


# -- positions ---------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("length", [*LENGTHS, (129, 129), (257, 300)], ids=str)  # a query's own key begins a block
def test_causal_keeps_keys_up_to_the_query(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    weights = tolerances.check_call(attention, query, key, value, is_causal=True)[2]
    np.testing.assert_array_equal(weights != 0, np.broadcast_to(np.tri(*length, dtype=bool), weights.shape))


@dtypes
@pytest.mark.parametrize("length", [*LENGTHS, (130, 65), (300, 100), (4, 3)], ids=str)
def test_causal_bottom_right_ends_with_the_last_query_at_the_last_key(
    attention: Attention, dtype: Any, length: tuple[int, int]
) -> None:
    query, key, value = inputs(length, dtype=dtype)
    weights = tolerances.check_call(attention, query, key, value, is_causal="bottom-right")[2]
    kept = np.tri(*length, k=length[1] - length[0], dtype=bool)
    np.testing.assert_array_equal(weights != 0, np.broadcast_to(kept, weights.shape))
    assert (weights[:, -1] != 0).all()


def test_one_new_query_at_the_end_sees_all_keys(attention: Attention) -> None:
    query, key, value = inputs((1, 200))
    np.testing.assert_array_equal(attention(query, key, value, is_causal="bottom-right"), attention(query, key, value))


def seen(
    length: tuple[int, int], left: int | None = None, right: int | None = None, offset: int = 0, keys: int | None = None
) -> Array:
    """Say which query may look at which key, with Python's integers."""

    def sees(position: int, j: int) -> bool:
        near = (left is None or position - left <= j) and (right is None or j <= position + right)
        return near and (keys is None or j < keys)

    return np.array([[sees(i + offset, j) for j in range(length[1])] for i in range(length[0])], bool).reshape(length)


def check_seen(
    attention: Attention, arrays: tuple[Array, Array, Array], visible: Array, **options: Any
) -> tuple[Array, Array, Array]:
    """Assert that a call is what it would be under a boolean mask; return its results."""
    query, key, value = arrays
    results: tuple[Array, Array, Array] = attention(*arrays, **options, return_lse=True, return_weights=True)
    tolerances.check_all(results, tolerances.expected(query, key, value, visible))
    np.testing.assert_array_equal(results[2] != 0, np.broadcast_to(visible, results[2].shape))
    return results


WINDOWS = ((0, 0), (3, 0), (0, 3), (5, 70), (64, 63), (None, 4), (4, None), (0, None), (1000, 1000))
some_windows = pytest.mark.parametrize("window", WINDOWS, ids=str)


@dtypes
@some_windows
@pytest.mark.parametrize("length", [*LENGTHS, (300, 100), (257, 300)], ids=str)
def test_a_window_keeps_the_keys_around_the_position(
    attention: Attention, dtype: Any, window: Any, length: tuple[int, int]
) -> None:
    check_seen(attention, inputs(length, dtype=dtype), seen(length, *window), window=window)


@some_windows
@pytest.mark.parametrize("is_causal", [True, "bottom-right"])
@pytest.mark.parametrize("length", [(5, 3), (65, 130), (300, 100)], ids=str)
def test_causal_and_a_window_both_hold(
    attention: Attention, window: Any, is_causal: Any, length: tuple[int, int]
) -> None:
    offset = 0 if is_causal is True else length[1] - length[0]
    visible = seen(length, window[0], 0, offset)
    check_seen(attention, inputs(length), visible, window=window, is_causal=is_causal)


def test_a_sliding_window_of_w_keys_has_w_keys(attention: Attention) -> None:
    query, key, value = inputs((200, 200))
    weights = attention(query, key, value, window=(49, 0), return_weights=True)[1]
    np.testing.assert_array_equal((weights != 0).sum(-1)[0], np.minimum(np.arange(200) + 1, 50))


def test_a_window_without_ends_is_none(attention: Attention) -> None:
    query, key, value = inputs((60, 90))
    np.testing.assert_array_equal(attention(query, key, value, window=(None, None)), attention(query, key, value))
    wanted = attention(query, key, value, is_causal=True)
    for window in ((None, None), (None, 0), [None, 50], (10**30, 10**30)):
        np.testing.assert_array_equal(attention(query, key, value, window=window, is_causal=True), wanted)


@pytest.mark.parametrize("window", [[3, 5], (np.int8(3), np.uint64(5)), (np.int64(3), 5)], ids=str)
def test_windows_may_be_lists_and_numpys_integers(attention: Attention, window: Any) -> None:
    query, key, value = inputs((60, 90))
    np.testing.assert_array_equal(
        attention(query, key, value, window=window), attention(query, key, value, window=(3, 5))
    )


@dtypes
@pytest.mark.parametrize("offset", [-200, -64, -7, -1, 1, 8, 20, 65, 129, 200])
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (5, 20)}, {"window": (70, None)}], ids=str)
def test_query_i_stands_at_i_plus_the_offset(
    attention: Attention, dtype: Any, offset: int, options: dict[str, Any]
) -> None:
    left, right = options.get("window", (None, 0))
    visible = seen((65, 130), left, right, offset)
    check_seen(attention, inputs((65, 130), dtype=dtype), visible, query_offset=offset, **options)


def test_an_offset_without_causality_and_window_changes_nothing(attention: Attention) -> None:
    query, key, value = inputs((60, 90))
    for offset in (-100, 7, 10**30, np.array(3)):
        np.testing.assert_array_equal(attention(query, key, value, query_offset=offset), attention(query, key, value))


@pytest.mark.parametrize("length", [(1, 1), (1, 200), (65, 130), (300, 100)], ids=str)
def test_bottom_right_is_an_offset_of_keys_less_queries(attention: Attention, length: tuple[int, int]) -> None:
    arrays = inputs(length)
    for window in (None, (20, 3)):
        moved = attention(*arrays, is_causal=True, query_offset=length[1] - length[0], window=window)
        np.testing.assert_array_equal(attention(*arrays, is_causal="bottom-right", window=window), moved)


FAR = 10**30
#: Offsets and windows as far as integers go, and the (left, right, offset) that says the same near by.
FAR_AWAY = [
    (FAR, (None, 0), (None, None, 0)),
    (2**63, (None, 0), (None, None, 0)),
    (np.int64(2**63 - 1), (None, 0), (None, None, 0)),
    (np.uint64(2**64 - 1), (None, 0), (None, None, 0)),
    (-FAR, (None, 0), None),
    (np.int64(-(2**63)), (None, 0), None),
    (FAR, (5, None), None),
    (FAR, (FAR, 0), (0, None, 0)),
    (FAR, (FAR + 3, 5), (3, None, 0)),
    (FAR, (10 * FAR, 10 * FAR), (None, None, 0)),
    (-FAR, (7, FAR), (None, 0, 0)),
    (-FAR, (7, FAR - 3), (None, 0, -3)),
    (3, (FAR, FAR), (None, None, 0)),
]


@pytest.mark.parametrize(("offset", "window", "near"), FAR_AWAY, ids=str)
def test_offsets_and_windows_reach_as_far_as_integers_go(
    attention: Attention, offset: Any, window: Any, near: Any
) -> None:
    length = (65, 130)
    visible = np.zeros(length, bool) if near is None else seen(length, *near)
    check_seen(attention, inputs(length), visible, query_offset=offset, window=window)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", [np.int64, np.int8, ">i4", list])
def test_each_row_of_a_batch_may_have_an_offset(attention: Attention, shape: tuple[int, ...], kind: Any) -> None:
    query, key, value = inputs((40, 70), (2, 3, 2))
    offsets = np.random.default_rng(0).integers(-45, 75, shape)
    given = offsets.tolist() if kind is list else offsets.astype(kind)
    options: dict[str, Any] = {"is_causal": True, "window": (30, 0)}
    whole = attention(query, key, value, query_offset=given, **options)
    for index, offset in np.ndenumerate(np.broadcast_to(offsets, (2, 3))):
        alone = attention(query[index], key[index], value[index], query_offset=int(offset), **options)
        np.testing.assert_array_equal(whole[index], alone)


def test_offsets_of_rows_reach_far_as_well(attention: Attention) -> None:
    query, key, value = inputs((40, 70), (4, 1))
    offsets = np.array([-(2**63), -3, 3, 2**63 - 1])
    weights = attention(query, key, value, is_causal=True, query_offset=offsets, return_weights=True)[1]
    for row, offset in enumerate(offsets.tolist()):
        np.testing.assert_array_equal(weights[row, 0] != 0, seen((40, 70), None, 0, offset))


LENGTHS_OF_ROWS = [[0, 70, 1], [64, 65, 63], [70, 70, 70], [0, 0, 0], [33, 0, 69]]


@dtypes
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 3)}, {"window": (None, 9)}], ids=str)
@pytest.mark.parametrize("key_lengths", LENGTHS_OF_ROWS, ids=str)
def test_keys_behind_the_length_of_a_row_take_no_part(
    attention: Attention, dtype: Any, options: dict[str, Any], key_lengths: list[int]
) -> None:
    left, right = options.get("window", (None, 0 if options else None))
    visible = np.stack([seen((60, 70), left, right, 0, keys) for keys in key_lengths])[:, None]
    check_seen(attention, inputs((60, 70), (3, 2), dtype=dtype), visible, key_lengths=key_lengths, **options)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", [np.int64, np.uint8, ">u4", list])
def test_lengths_broadcast_to_the_batch(attention: Attention, shape: tuple[int, ...], kind: Any) -> None:
    query, key, value = inputs((20, 70), (2, 3, 2))
    numbers = np.random.default_rng(1).integers(0, 71, shape)
    given = numbers.tolist() if kind is list else numbers.astype(kind)
    visible = np.stack([seen((20, 70), keys=int(n)) for n in np.broadcast_to(numbers, (2, 3)).flat])
    check_seen(attention, (query, key, value), visible.reshape(2, 3, 1, 20, 70), key_lengths=given)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("keys", [0, 1, 33, 70])
def test_without_a_batch_there_is_one_length(attention: Attention, rank: int, keys: int) -> None:
    arrays = inputs((20, 70), (2,) * (rank - 2))
    for given in (keys, np.int32(keys), np.array(keys)):
        check_seen(attention, arrays, seen((20, 70), keys=keys), key_lengths=given)


@dtypes
@pytest.mark.parametrize("window", [None, (9, 5), (None, 3)], ids=str)
@pytest.mark.parametrize("queries", [1, 40])
def test_bottom_right_ends_at_the_last_key_of_each_row(
    attention: Attention, dtype: Any, queries: int, window: Any
) -> None:
    arrays, key_lengths = inputs((queries, 70), (5, 2), dtype=dtype), [0, 1, 35, 64, 70]
    left = None if window is None else window[0]
    visible = np.stack([seen((queries, 70), left, 0, keys - queries, keys) for keys in key_lengths])[:, None]
    check_seen(attention, arrays, visible, is_causal="bottom-right", key_lengths=key_lengths, window=window)


def test_groups_of_heads_share_positions_and_lengths(attention: Attention) -> None:
    query, key, value = normal(2, 6, 40, 16), normal(2, 2, 70, 16, seed=2), normal(2, 2, 70, 16, seed=3)
    options: dict[str, Any] = {"key_lengths": [33, 70], "query_offset": [3, -5], "window": (20, 1), "softcap": 4.0}
    whole = tolerances.check_call(attention, query, key, value, enable_gqa=True, **options)
    for h in range(6):
        some = slice(h, h + 1), slice(h // 3, h // 3 + 1)
        alone = attention(query[:, some[0]], key[:, some[1]], value[:, some[1]], **options)
        np.testing.assert_array_equal(whole[0][:, some[0]], alone)


# -- packed sequences --------------------------------------------------------------------------------------------------


def packed_inputs(dtype: Any = np.float32, heads: tuple[int, int] = (2, 2)) -> tuple[list[Array], list[int], list[int]]:
    """Return query, key and value of four sequences, and the cumulative lengths of queries and keys."""
    queries, keys = [0, 15, 15, 60, 61], [0, 10, 30, 80, 150]
    arrays = [
        normal(length, n, 16, dtype=dtype, seed=i)
        for i, (length, n) in enumerate(((61, heads[0]), (150, heads[1]), (150, heads[1])))
    ]
    return arrays, queries, keys


def in_batch(arrays: list[Array], queries: list[int], keys: list[int]) -> tuple[list[Array], list[int], list[int]]:
    """Return packed sequences as rows of a padded batch, and their lengths."""
    ends = [(queries, 45), (keys, 70), (keys, 70)]
    batch = [
        np.zeros((4, array.shape[1], most, 16), array.dtype) for array, (_, most) in zip(arrays, ends, strict=True)
    ]
    for rows, array, (cu, _) in zip(batch, arrays, ends, strict=True):
        for row in range(4):
            rows[row, :, : cu[row + 1] - cu[row]] = array[cu[row] : cu[row + 1]].swapaxes(0, 1)
    return batch, np.diff(queries).tolist(), np.diff(keys).tolist()


@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window": (3, 2)},
        {"query_offset": [3, 0, -2, 9], "is_causal": True},
        {"alibi_slopes": [[0.5, 1.0], [0.0, 0.1], [2.0, 0.25], [1.0, 1.0]]},
        {"alibi_slopes": [0.5, 0.125], "softcap": 2.0, "scale": -0.5},
        {"dropout_p": 0.5, "rng": 3},
    ],
    ids=str,
)
def test_packed_sequences_are_the_rows_of_the_padded_batch(backend: str, dtype: Any, options: dict[str, Any]) -> None:
    arrays, queries, keys = packed_inputs(dtype)
    batch, query_lengths, key_lengths = in_batch(arrays, queries, keys)
    out, lse = fastattn.attention_varlen(*arrays, queries, keys, **options, return_lse=True, backend=backend)
    padded: Any = {**options, "key_lengths": key_lengths, "return_lse": True, "backend": backend}
    whole, sums = fastattn.attention(*batch, **padded)
    for row, length in enumerate(query_lengths):
        part = slice(queries[row], queries[row + 1])
        close(out[part].swapaxes(0, 1), whole[row, :, :length], dtype)
        close(lse[part].swapaxes(0, 1), sums[row, :, :length], dtype)


def test_bottom_right_is_that_of_each_packed_sequence(backend: str) -> None:
    arrays, queries, keys = packed_inputs()
    offsets = [keys[row + 1] - keys[row] - (queries[row + 1] - queries[row]) for row in range(4)]
    out = fastattn.attention_varlen(*arrays, queries, keys, is_causal="bottom-right", backend=backend)
    wanted = fastattn.attention_varlen(*arrays, queries, keys, is_causal=True, query_offset=offsets, backend=backend)
    close(out, wanted)


@dtypes
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_packed_sequence_has_the_bits_of_the_same_sequence_alone(dtype: Any, threads: int) -> None:
    arrays, queries, keys = packed_inputs(dtype, (4, 2))
    options: dict[str, Any] = {"enable_gqa": True, "is_causal": "bottom-right"}
    with fastattn.num_threads(threads):
        out, lse = fastattn.attention_varlen(*arrays, queries, keys, **options, return_lse=True)
        gradients = fastattn.attention_varlen_backward(out, *arrays, out, lse, queries, keys, **options)
    for row in range(4):
        own, others = slice(queries[row], queries[row + 1]), slice(keys[row], keys[row + 1])
        alone = [array[part].swapaxes(0, 1) for array, part in zip(arrays, (own, others, others), strict=True)]
        results = fastattn.attention(*alone, **options, return_lse=True)
        found = fastattn.attention_backward(results[0], *alone, *results, **options)
        for packed, array, part in zip(
            (out, lse, *gradients), (*results, *found), (own, own, own, others, others), strict=True
        ):
            np.testing.assert_array_equal(packed[part].swapaxes(0, 1), array)


# -- keys in pages -----------------------------------------------------------------------------------------------------


def in_pages(array: Any, lengths: Any, page: int, table: Any) -> Any:
    """Return rows of a batch, (B, H, L, D), in pages, where those of a table say; elsewhere is NaN."""
    pages = np.full((table.max() + 1, page, array.shape[1], array.shape[3]), np.nan, array.dtype)
    for row, length in enumerate(lengths):
        for j in range(length):
            pages[table[row, j // page], j % page] = array[row, :, j]
    return pages


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("queries", [1, 30])
def test_a_cached_sequence_has_the_bits_of_the_same_sequence_alone(queries: int, threads: int) -> None:
    rng, lengths = np.random.default_rng(0), np.array([300, 33, 0])
    query = rng.standard_normal((3, 4, queries, 16)).astype(np.float32)
    key, value = rng.standard_normal((2, 3, 2, 300, 16)).astype(np.float32)
    options: dict[str, Any] = {"is_causal": "bottom-right", "return_lse": True}
    for page, spare in ((1, 0), (7, 30), (16, 0), (256, 3), (1000, 0)):  # pages of any size, and room for more keys
        table = rng.permutation(3 * (-(-300 // page) + spare)).reshape(3, -1)
        pages = [in_pages(array, lengths, page, table) for array in (key, value)]
        with fastattn.num_threads(threads):
            found = fastattn.attention_paged(query.swapaxes(1, 2), *pages, table, lengths, **options)
        for row, length in enumerate(lengths):
            own = (array[row, :, :length] for array in (key, value))
            alone = fastattn.attention(query[row], *own, **options, enable_gqa=True)
            for whole, wanted in zip(found, alone, strict=True):
                np.testing.assert_array_equal(whole[row].swapaxes(0, 1), wanted)


# -- keys in pieces ----------------------------------------------------------------------------------------------------


@dtypes
@lengths
def test_merged_pieces_are_attention_to_all_keys(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    cuts = sorted({0, length[1] // 3, length[1] // 2, length[1]})
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    pieces = [attention(query, key[:, part], value[:, part], return_lse=True) for part in parts]
    out, lse = fastattn.merge(*zip(*pieces, strict=True))
    wanted = tolerances.expected(query, key, value)
    close(out, wanted.out, dtype)
    close(lse, wanted.lse, dtype)


def test_an_empty_piece_counts_for_nothing(attention: Attention) -> None:
    query, key, value = inputs()
    out, lse = attention(query, key, value, return_lse=True)
    empty = attention(query, key[:, :0], value[:, :0], return_lse=True)
    for nothing in (empty[0], np.full_like(out, NAN)):
        merged = fastattn.merge([nothing, out], [empty[1], lse])
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_array_equal(merged[1], lse)
    merged = fastattn.merge([empty[0]] * 2, [empty[1]] * 2)
    np.testing.assert_array_equal(merged[0], 0)
    np.testing.assert_array_equal(merged[1], -INF)


# -- a query that may look at no key -----------------------------------------------------------------------------------


def assert_empty(results: tuple[Array, Array, Array], rows: Any = slice(None)) -> None:
    """Assert that these rows of (out, lse, weights) are those of queries that may look at no key."""
    out, lse, weights = results
    assert not out[..., rows, :].any()
    assert not weights[..., rows, :].any()
    assert np.isneginf(lse[..., rows]).all()


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


# -- shapes and types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "key", "value", "out"),
    [
        ((5, 3), (7, 3), (7, 2), (5, 2)),
        ((4, 5, 3), (4, 7, 3), (4, 7, 2), (4, 5, 2)),
        ((2, 4, 5, 3), (2, 4, 7, 3), (2, 4, 7, 2), (2, 4, 5, 2)),
        ((3, 2, 4, 5, 3), (3, 2, 4, 7, 3), (3, 2, 4, 7, 2), (3, 2, 4, 5, 2)),
        ((4, 5, 3), (7, 3), (7, 2), (4, 5, 2)),
        ((5, 3), (4, 7, 3), (1, 7, 2), (4, 5, 2)),
        ((2, 1, 4, 5, 3), (3, 1, 7, 3), (4, 7, 2), (2, 3, 4, 5, 2)),
        ((1, 1, 5, 3), (3, 4, 7, 3), (4, 7, 2), (3, 4, 5, 2)),
    ],
)
def test_leading_axes_broadcast_as_in_numpy(attention: Attention, query: Any, key: Any, value: Any, out: Any) -> None:
    arrays = normal(*query), normal(*key), normal(*value)
    result = attention(*arrays)
    assert result.shape == out
    full = [np.broadcast_to(array, (*out[:-2], *array.shape[-2:])).copy() for array in arrays]
    np.testing.assert_array_equal(result, attention(*full))
    close(result, softmax_attention(full[0], full[1], full[2], scale=1 / math.sqrt(3)))


@pytest.mark.parametrize("shape", [(), (1,), (70,), (60, 1), (60, 70), (3, 1, 70), (1, 60, 70), (2, 1, 1, 70)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_broadcast_as_in_numpy(attention: Attention, shape: tuple[int, ...], kind: str) -> None:
    query, key, value = inputs((60, 70), (2, 3))
    mask: Array = np.asarray(normal(*shape, 1)[..., 0])
    mask = np.asarray(mask > -0.5) if kind == "bool" else mask
    result = attention(query, key, value, mask)
    np.testing.assert_array_equal(result, attention(query, key, value, np.broadcast_to(mask, (2, 3, 60, 70)).copy()))


@pytest.mark.parametrize("mask", [True, False, 0.5, [True, False, True], [[0.0], [1.0]]])
def test_masks_may_be_array_likes(attention: Attention, mask: Any) -> None:
    query, key, value = inputs((2, 3))
    np.testing.assert_array_equal(attention(query, key, value, mask), attention(query, key, value, np.array(mask)))


@pytest.mark.parametrize("mask_dtype", [np.int64, np.int8, np.uint8])
def test_masks_of_integers_are_refused(attention: Attention, mask_dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"attn_mask: .*boolean"):
        attention(*inputs(), np.ones((7, 9), mask_dtype))


@dtypes
@pytest.mark.parametrize("mask_dtype", [np.bool_, np.float16, np.float32, np.float64])
def test_masks_take_no_part_in_promotion(attention: Attention, dtype: Any, mask_dtype: Any) -> None:
    query, key, value = inputs(dtype=dtype)
    results = attention(query, key, value, np.ones((7, 9), mask_dtype), return_lse=True, return_weights=True)
    assert [result.dtype for result in results] == [dtype] * 3


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_rank_is_two_at_least(attention: Attention, shape: tuple[int, ...], which: int) -> None:
    arrays = [normal(3, 3) for _ in range(3)]
    arrays[which] = np.ones(shape, np.float32)
    with pytest.raises(ValueError, match=("query", "key", "value")[which] + ": .* rank"):
        attention(*arrays)


def test_head_counts_differ_only_with_enable_gqa(attention: Attention) -> None:
    query, key, value = normal(2, 6, 5, 3), normal(2, 2, 7, 3), normal(2, 2, 7, 3)
    with pytest.raises(ValueError, match=r"key: .*enable_gqa=True"):
        attention(query, key, value)
    assert attention(query, key, value, enable_gqa=True).shape == (2, 6, 5, 3)
    with pytest.raises(ValueError, match=r"key: .*multiple"):
        attention(query[:, :5], key, value, enable_gqa=True)


@dtypes
@pytest.mark.parametrize("heads", [(2, 1), (6, 2), (8, 1), (4, 4), (12, 3)], ids=str)
@pytest.mark.parametrize("length", [(1, 130), (7, 60), (65, 90)], ids=str)
def test_query_head_h_reads_key_head_h_over_group(
    attention: Attention, dtype: Any, heads: tuple[int, int], length: tuple[int, int]
) -> None:
    hq, hk = heads
    query = normal(2, hq, length[0], 16, dtype=dtype)
    key, value = normal(2, hk, length[1], 16, dtype=dtype, seed=2), normal(2, hk, length[1], 16, dtype=dtype, seed=3)
    out, lse, weights = tolerances.check_call(attention, query, key, value, enable_gqa=True, is_causal="bottom-right")
    for h in range(hq):
        alone = (query[:, h], key[:, h // (hq // hk)], value[:, h // (hq // hk)])
        wanted = tolerances.expected(*(array[:, None] for array in alone), is_causal="bottom-right")
        tolerances.check_all((out[:, h : h + 1], lse[:, h : h + 1], weights[:, h : h + 1]), wanted)


@pytest.mark.parametrize("shape", [(3, 1, 7, 9), (2, 2, 7, 9), (2, 1, 1, 7, 9), (1, 1, 1, 1, 1)])
def test_a_mask_may_not_enlarge_the_batch(attention: Attention, shape: tuple[int, ...]) -> None:
    query, key, value = inputs(heads=(1, 2) if shape[0] != 2 else (1, 1))
    with pytest.raises(ValueError, match=r"attn_mask: shape .* broadcasts to"):
        attention(query, key, value, np.ones(shape, bool))


@dtypes
@lengths
def test_without_features_every_score_is_zero(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key = np.ones((2, length[0], 0), dtype), np.ones((2, length[1], 0), dtype)
    value = normal(2, length[1], 5, dtype=dtype)
    out, lse, weights = attention(query, key, value, return_lse=True, return_weights=True)
    close(out, np.broadcast_to(value.mean(-2, keepdims=True, dtype=np.float64), out.shape), dtype)
    close(lse, math.log(length[1]), dtype)
    close(weights, 1 / length[1], dtype)


@pytest.mark.parametrize(
    ("query", "key", "value", "out"),
    [
        ((2, 0, 3), (2, 7, 3), (2, 7, 4), (2, 0, 4)),
        ((2, 5, 3), (2, 7, 3), (2, 7, 0), (2, 5, 0)),
        ((0, 2, 5, 3), (0, 2, 7, 3), (0, 2, 7, 4), (0, 2, 5, 4)),
        ((0, 5, 3), (0, 7, 3), (0, 7, 4), (0, 5, 4)),
        ((2, 0, 0), (2, 0, 0), (2, 0, 0), (2, 0, 0)),
        ((2, 5, 0), (2, 0, 0), (2, 0, 4), (2, 5, 4)),
    ],
)
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
def test_any_axis_may_be_of_length_zero(
    attention: Attention, query: Any, key: Any, value: Any, out: Any, is_causal: Any
) -> None:
    arrays = normal(*query), normal(*key), normal(*value)
    results = tolerances.check_call(attention, *arrays, is_causal=is_causal)
    assert results[0].shape == out


@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, NAN])
def test_dropout_is_a_probability(attention: Attention, dropout_p: float) -> None:
    with pytest.raises(ValueError, match=r"dropout_p: .*\[0, 1\]"):
        attention(*inputs(), dropout_p=dropout_p)


def test_array_likes_are_accepted(attention: Attention) -> None:
    class Wrapped:
        def __init__(self, array: Array) -> None:
            self.array = array

        def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
            return self.array

    query, key, value = inputs(dtype=np.float64)
    wanted = attention(query, key, value)
    np.testing.assert_array_equal(attention(query.tolist(), key.tolist(), value.tolist()), wanted)
    np.testing.assert_array_equal(attention(Wrapped(query), Wrapped(key), Wrapped(value)), wanted)
    np.testing.assert_array_equal(attention(query[0].tolist(), Wrapped(key[0]), tuple(value[0])), wanted[0])


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.uint64, bool])
def test_integers_compute_in_float64(attention: Attention, dtype: Any) -> None:
    query, key, value = (np.random.default_rng(i).integers(0, 2, (2, 7, 5)).astype(dtype) for i in range(3))
    results = attention(query, key, value, return_lse=True, return_weights=True)
    assert [result.dtype for result in results] == [np.float64] * 3
    wanted = attention(*(array.astype(np.float64) for array in (query, key, value)))
    np.testing.assert_array_equal(results[0], wanted)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("other", [np.float64, np.int8, np.int64, ">f4"])
def test_mixed_dtypes_promote_as_in_numpy(attention: Attention, which: int, other: Any) -> None:
    arrays = [np.round(array) for array in inputs()]
    arrays[which] = arrays[which].astype(other)
    out = attention(*arrays)
    common = np.result_type(*arrays)
    assert out.dtype == common
    np.testing.assert_array_equal(out, attention(*(array.astype(common) for array in arrays)))


@halves
@lengths
def test_half_precision_stays_itself_outside_and_is_float32_inside(
    attention: Attention, dtype: Any, length: tuple[int, int]
) -> None:
    arrays = halves_of(dtype, *inputs(length))
    results = attention(*arrays, return_lse=True, return_weights=True)
    assert [result.dtype for result in results] == [dtype, np.float32, dtype]
    wide = attention(*halves_of(np.float32, *arrays), return_lse=True, return_weights=True)
    tolerances.check_all(results, tolerances.expected(*arrays))
    tolerances.check_lse(results[1], tolerances.expected(*halves_of(np.float32, *arrays)))
    np.testing.assert_allclose(wide[1], results[1], rtol=0, atol=1e-5)


@halves
def test_half_precision_promotes(attention: Attention, dtype: Any) -> None:
    arrays = halves_of(dtype, *inputs())
    other = OTHER_HALF[dtype]
    for kind, common in ((other, np.float32), (np.float32, np.float32), (np.float64, np.float64), (np.int8, dtype)):
        for which in range(3):
            mixed = list(arrays)
            mixed[which] = np.round(np.asarray(arrays[which], np.float32)).astype(kind)
            out = attention(*mixed)
            assert out.dtype == common
            same = [np.asarray(array, np.float32).astype(common) for array in mixed]
            assert out.tobytes() == attention(*same).tobytes()


@halves
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_may_have_the_dtype_of_the_sums(backend: str, dtype: Any) -> None:
    query, key, value = halves_of(dtype, *inputs((60, 90)))
    out = np.empty(query.shape, np.float32)
    assert fastattn.attention(query, key, value, out=out, backend=backend) is out
    assert fastattn.attention(query, key, value, backend=backend).tobytes() == out.astype(dtype).tobytes()
    # that is what pieces are merged of
    pieces = [np.empty_like(out), np.empty_like(out)]
    sums = [
        fastattn.attention(query, key[:, part], value[:, part], out=piece, return_lse=True, backend=backend)[1]
        for part, piece in zip((slice(40), slice(40, None)), pieces, strict=True)
    ]
    merged, lse = fastattn.merge(pieces, sums)
    # weights may be rounded, those of the pieces and of the whole (tolerances.py)
    allowed = float(finfo(np.dtype(dtype)).eps) * float(np.abs(value.astype(np.float32)).max())
    np.testing.assert_allclose(merged, out, rtol=0, atol=allowed)
    assert merged.dtype == lse.dtype == np.float32
    for wrong in (np.float64, OTHER_HALF[dtype]):
        with pytest.raises(TypeError, match="out: dtype .*, the dtype of the result, or float32, that of its sums"):
            fastattn.attention(query, key, value, out=np.empty(query.shape, wrong), backend=backend)


@halves
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_have_their_inputs_dtype(backend: str, dtype: Any) -> None:
    query, key, value, mask = halves_of(dtype, *inputs((20, 30)), normal(20, 30))
    sinks, slopes = normal(2).astype(dtype), normal(2)
    options = {"attn_mask": mask, "sinks": sinks, "alibi_slopes": slopes, "backend": backend}
    out, lse = fastattn.attention(query, key, value, return_lse=True, **options)
    names = ("query", "key", "value", "attn_mask", "sinks", "alibi_slopes")
    for grad_out in (np.ones_like(out), np.ones(out.shape, np.float32)):
        call = grad_out, query, key, value, out, lse
        found = fastattn.attention_backward(*call, grads=names, **options)
        assert [gradient.dtype for gradient in found] == [dtype] * 5 + [np.float32]
        # so they are where only one array is of half precision
        mixed = grad_out, query.astype(np.float32), key, value.astype(np.float64), out.astype(np.float64), lse
        found = fastattn.attention_backward(*mixed, **options)
        assert [gradient.dtype for gradient in found] == [np.float32, dtype, np.float64]


@halves
def test_weights_have_the_dtype_of_the_result_and_summaries_that_of_the_sums(dtype: Any) -> None:
    query, key, value = halves_of(dtype, *inputs((20, 30)))
    for backend in ("cpu", "reference"):
        lse = fastattn.attention(query, key, value, return_lse=True, backend=backend)[1]
        for given in (None, lse, lse.astype(dtype)):
            assert fastattn.attention_weights(query, key, lse=given, backend=backend).dtype == dtype
        summary = fastattn.attention_summary(query, key, backend=backend)
        kinds = np.float32, np.int64, np.float32, np.float32, np.float32
        assert [array.dtype for array in summary] == list(kinds)


@halves
@lengths
def test_in_half_precision_what_is_masked_never_leaks_and_an_empty_row_is_zero(
    attention: Attention, dtype: Any, length: tuple[int, int]
) -> None:
    query, key, value = halves_of(dtype, *inputs(length))
    visible = np.random.default_rng(0).random(length) < 0.5
    visible[:, -1], visible[0] = False, False
    clean = attention(query, key, value, visible, return_lse=True, return_weights=True)
    assert_empty(clean, 0)
    key[:, -1], value[:, -1] = INF, NAN
    for mask in (visible, np.where(visible, 0, -INF).astype(dtype)):
        results = attention(query, key, value, mask, return_lse=True, return_weights=True)
        tolerances.check_all(results, tolerances.expected(query, key, value, mask))
        assert_empty(results, 0)
    found = attention(query, key, value, visible, return_lse=True, return_weights=True)
    assert [array.tobytes() for array in found] == [array.tobytes() for array in clean]
    value[:, 0] = NAN
    tolerances.check_call(attention, query, key, value, visible)


@halves
@pytest.mark.parametrize("scale", [1.0, 1e-30, -3e25, 1e39])
def test_in_half_precision_large_numbers_and_scales_are_finite_work(
    attention: Attention, dtype: Any, scale: float
) -> None:
    size = 1e18 if dtype is BFLOAT16 else 1e4
    query, key, value = halves_of(dtype, *(array * size for array in inputs((20, 30))[:2]), inputs((20, 30))[2])
    tolerances.check_call(attention, query, key, value, scale=scale)


@pytest.mark.parametrize("dtype", [*HALVES, np.float32])
@pytest.mark.parametrize("scale", [1.0, 1.38, 1.5])
def test_large_values_have_room_where_scores_rise(attention: Attention, dtype: Any, scale: float) -> None:
    # weights grow, and sums of values with them, until the reference follows: by 2^8 at most
    size = 1e36 if dtype is not np.float16 else 6e4
    query, key, value = np.ones((40, 1)), np.zeros((1500, 1)), np.ones((1500, 17))
    for rise in np.linspace(4, 8, 17):
        key[-1], value[-1] = rise, size
        arrays = halves_of(dtype, query, key, value)
        tolerances.check_out(attention(*arrays, scale=scale), tolerances.expected(*arrays, scale=scale))


@pytest.mark.parametrize("options", [{"attn_mask": np.zeros(1500)}, {"alibi_slopes": 1e-30}], ids=["mask", "slopes"])
def test_large_values_have_as_much_room_where_something_is_added(attention: Attention, options: dict[str, Any]) -> None:
    query, key, value = np.ones((40, 1)), np.zeros((1500, 1)), np.ones((1500, 17))
    for rise in np.linspace(4, 8, 17):
        key[-1], value[-1] = rise, 1e36
        arrays = [array.astype(np.float32) for array in (query, key, value)]
        tolerances.check_out(attention(*arrays, **options), tolerances.expected(*arrays, **options))


@halves
@pytest.mark.parametrize("mask_dtype", HALVES)
@lengths
def test_in_half_precision_the_lowest_number_of_a_mask_stays_finite(
    attention: Attention, dtype: Any, mask_dtype: Any, length: tuple[int, int]
) -> None:
    query, key, value = halves_of(dtype, *inputs(length))
    mask = np.zeros(length, mask_dtype)
    mask[::2] = finfo(mask.dtype).min
    _, lse, weights = tolerances.check_call(attention, query, key, value, mask, scale=0)
    assert np.isfinite(lse).all()
    close(np.asarray(weights[:, ::2], np.float32), 1 / length[1], dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("keys", [300, 700, 1500])
def test_hundreds_of_nearly_equal_scores(attention: Attention, dtype: Any, keys: int) -> None:
    # their weights are rounded alike wherever they are added
    query, key, value = inputs((40, keys), dtype=dtype)
    tolerances.check_call(attention, query * dtype(1e-5), key, value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_over_thousands_of_keys_lose_no_more_digits_than_over_some(attention: Attention, dtype: Any) -> None:
    # where weights and values are alike, so are the roundings of a long sum
    query, key, value = inputs((40, 5000), dtype=dtype)
    tolerances.check_call(attention, query * dtype(1e-2), key, 1 + value * dtype(0.1))


def test_float64_is_float64_throughout(attention: Attention) -> None:
    query, key, value = inputs((70, 130), dtype=np.float64)
    query[..., 0] += 1e-12
    close(attention(query, key, value), softmax_attention(query, key, value, 0.25), np.float64)


@pytest.mark.parametrize("dtype", [complex, object, "U3", np.longdouble, "M8[s]"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_other_dtypes_are_refused(attention: Attention, dtype: Any, which: int) -> None:
    arrays: list[Any] = list(inputs())
    arrays[which] = np.ones(arrays[which].shape, dtype)
    with pytest.raises(TypeError, match=("query", "key", "value")[which] + ": dtype .* is not supported"):
        attention(*arrays)


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [
        ({"scale": INF}, ValueError, "scale"),
        ({"scale": "1"}, TypeError, "scale"),
        ({"is_causal": "top"}, ValueError, "is_causal"),
        ({"is_causal": None}, TypeError, "is_causal"),
        ({"enable_gqa": 1}, TypeError, "enable_gqa"),
        ({"return_lse": 1}, TypeError, "return_lse"),
        ({"return_weights": None}, TypeError, "return_weights"),
        ({"dropout_p": "0"}, TypeError, "dropout_p"),
        ({"rng": -1}, ValueError, "rng"),
        ({"rng": 0.5}, TypeError, "rng"),
        ({"out": np.zeros((2, 7, 16))}, TypeError, "out"),
        ({"out": np.zeros((2, 7, 15), np.float32)}, ValueError, "out"),
        ({"out": np.broadcast_to(np.float32(0), (2, 7, 16))}, ValueError, "out"),
        ({"out": [0]}, TypeError, "out"),
    ],
)
def test_options_that_are_refused(
    attention: Attention, options: dict[str, Any], kind: type[Exception], word: str
) -> None:
    with pytest.raises(kind, match=f"^{word}: .*expected"):
        attention(*inputs(), **options)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend: 'abacus' .*'cpu'.*'reference'|backend: .*'reference'.*'cpu'"):
        fastattn.attention(*inputs(), backend="abacus")


def test_no_backend_is_the_best_one() -> None:
    query, key, value = inputs()
    np.testing.assert_array_equal(
        fastattn.attention(query, key, value), fastattn.attention(query, key, value, backend="cpu")
    )


def test_positional_order_is_that_of_pytorch(attention: Attention) -> None:
    query, key, value = normal(4, 7, 16), normal(2, 9, 16), normal(2, 9, 16)
    mask = normal(7, 9)
    by_position = attention(query, key, value, mask, 0.0, True, 0.5, True)
    by_name = attention(
        query=query, key=key, value=value, attn_mask=mask, dropout_p=0.0, is_causal=True, scale=0.5, enable_gqa=True
    )
    np.testing.assert_array_equal(by_position, by_name)
    with pytest.raises(TypeError):
        attention(query, key, value, mask, 0.0, True, 0.5, True, True)


@dtypes
@pytest.mark.parametrize("scale", [1, 1e-3])
def test_scores_of_1e36_are_finite_work(attention: Attention, dtype: Any, scale: float) -> None:
    query, key, value = inputs((60, 130), dtype=dtype)
    query, key = query * dtype(3e17), key * dtype(3e17)
    lse = tolerances.check_call(attention, query, key, value, scale=scale)[1]
    assert np.abs(lse).max() > 1e36 * scale
    # one key wins by far: the result is its value
    key[:, 77] = 0
    key[:, 77, 0] = np.abs(key).max() * 30
    query[..., 0] = 1e18
    out = attention(query, key, value, scale=1e-2)
    np.testing.assert_array_equal(out, np.broadcast_to(value[:, 77:78], out.shape))


#: Magnitudes of a scale, of queries and of keys, whose product is 1; those of float64 exceed float32.
BEYOND = [(1e39, 1e-19, 1e-20), (1e60, 1e-30, 1e-30), (1e39, 1e-39, 1.0), (1e-76, 1e38, 1e38), (1e-40, 1e35, 1e5)]


@dtypes
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize(("scale", "of_query", "of_key"), BEYOND)
def test_a_scale_need_not_be_a_number_of_float32(
    attention: Attention, dtype: Any, mask: str | None, scale: float, of_query: float, of_key: float
) -> None:
    query, key, value = (array[..., :4] for array in inputs((50, 70)))
    query, key, value = (query * of_query).astype(dtype), (key * of_key).astype(dtype), value.astype(dtype)
    bias = normal(50, 70, seed=4).astype(dtype)
    given = None if mask is None else bias > 0 if mask == "bool" else bias
    for sign in (1, -1):
        options: Any = {"scale": sign * scale, "dropout_p": 0.2, "rng": 5}
        results = tolerances.check_call(attention, query, key, value, given, **options)
        assert np.isfinite(results[1]).all()
        out = np.empty_like(results[0])
        assert attention(query, key, value, given, **options, out=out) is out
        assert out.tobytes() == results[0].tobytes()


@dtypes
@pytest.mark.parametrize(("scale", "softcap"), [(1e39, 2.0), (0.25, 1e-30), (1e-40, 1e30), (0.25, None)])
def test_such_a_scale_or_softcap_comes_with_windows_lengths_and_pairs_of_masks(
    backend: str, attention: Attention, dtype: Any, scale: float, softcap: float | None
) -> None:
    size = {1e39: 1e-20, 1e-40: 1e20}.get(scale, 1.0)
    query, key, value = ((size * array).astype(dtype) for array in inputs((50, 70), (2, 1)))
    pair = normal(50, 70, seed=4), normal(50, 70, seed=5) > -1
    options: Any = {"window": (30, 4), "query_offset": [-5, 30], "key_lengths": [70, 41]}
    options |= {"scale": scale, "softcap": softcap}
    out, lse, weights = tolerances.check_call(attention, query, key, value, pair, **options)
    visible = np.stack([seen((50, 70), 30, 4, -5, 70), seen((50, 70), 30, 4, 30, 41)])[:, None] & pair[1]
    np.testing.assert_array_equal(weights != 0, visible)
    grad_out = normal(2, 1, 50, 16, dtype=dtype, seed=6)
    found = fastattn.attention_backward(
        grad_out, query, key, value, out, lse, pair, **options, grad_mask=True, backend=backend
    )
    wanted = tolerances.expected_gradients(grad_out, query, key, value, pair, **options)
    tolerances.check_gradients(found, (query, key, value, pair), *wanted)


@dtypes
def test_a_scale_beyond_float32_may_leave_no_score_that_is_finite(attention: Attention, dtype: Any) -> None:
    """All of a row at -3e38 and a score far below it: the first share the row, as with any scale."""
    lowest = np.finfo(np.float32).min
    query, key, value = np.ones((1, 1), dtype), np.array([[0.0], [0], [-1]], dtype), np.eye(3, dtype=dtype)
    out, lse = attention(query, key, value, np.full(3, lowest), scale=1e39, return_lse=True)
    np.testing.assert_allclose(out, [[0.5, 0.5, 0]])
    assert np.isfinite(lse).all()


# -- what a call leaves alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_never_written_to(attention: Attention, layout: str) -> None:
    arrays = [laid_out(array, layout) for array in (*inputs((33, 70)), normal(33, 70, seed=4))]
    before = [array.tobytes() for array in arrays]
    attention(*arrays, is_causal=True, dropout_p=0.2, return_lse=True, return_weights=True)
    assert [array.tobytes() for array in arrays] == before


def test_masks_offsets_and_lengths_are_never_written_to(attention: Attention) -> None:
    query, key, value = inputs((33, 70), (2, 1))
    given = [normal(33, 70), normal(33, 70) > 0, np.array([0.5]), np.array([3, 70]), np.array([1, 50])]
    given += [np.array([-3, 2**63 - 1])]
    for array in given:
        array.flags.writeable = False
    before = [array.tobytes() for array in given]
    bias, keep, slopes, *numbers = given
    for offsets in numbers[1:]:
        options: Any = {"key_lengths": numbers[0], "query_offset": offsets, "window": (30, 2), "softcap": 2.0}
        options |= {"alibi_slopes": slopes, "sinks": slopes}
        attention(query, key, value, (bias, keep), **options, return_lse=True, return_weights=True)
    assert [array.tobytes() for array in given] == before


@dtypes
@pytest.mark.parametrize("length", [(1, 1), (9, 9), (65, 65), (200, 200), (400, 400)], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_out_may_be_an_input(
    attention: Attention, dtype: Any, length: tuple[int, int], which: int, is_causal: bool
) -> None:
    for flags in ({}, {"return_lse": True, "return_weights": True}):
        arrays = inputs(length, (1, 2), dtype=dtype)
        wanted = attention(*arrays, is_causal=is_causal, **flags)
        results = attention(*arrays, is_causal=is_causal, **flags, out=arrays[which])
        out = results[0] if flags else results
        assert out is arrays[which]
        for result, want in zip(results if flags else [out], wanted if flags else [wanted], strict=True):
            np.testing.assert_array_equal(result, want)


@pytest.mark.parametrize("shift", [(0, 3), (1, 0), (5, 5)], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_out_may_overlap_an_input(attention: Attention, shift: tuple[int, int], which: int) -> None:
    place = normal(2, 210, 32)
    arrays = list(inputs((200, 200)))
    arrays[which] = place[:, 5:205, 8:24]
    wanted = attention(*arrays)
    out = place[:, 5 - shift[0] : 205 - shift[0], 8 - shift[1] : 24 - shift[1]]
    np.testing.assert_array_equal(attention(*arrays, out=out), wanted)


def test_out_may_overlap_the_mask(attention: Attention) -> None:
    query, key, value = inputs((200, 200), (1,), 200)
    mask = normal(1, 200, 200)
    wanted = attention(query, key, value, mask)
    np.testing.assert_array_equal(attention(query, key, value, mask, out=mask), wanted)


def test_out_may_be_one_array_with_all_inputs(attention: Attention) -> None:
    array = normal(2, 150, 16)
    wanted = attention(array, array, array)
    np.testing.assert_array_equal(attention(array, array, array, out=array), wanted)
    heads = normal(4, 150, 16)
    shared = heads[:1]
    wanted = attention(heads, shared, shared)
    np.testing.assert_array_equal(attention(heads, shared, shared, out=heads), wanted)


@dtypes
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("read-only", "byte-swapped")])
def test_out_may_have_any_strides(attention: Attention, dtype: Any, layout: str) -> None:
    query, key, value = inputs((65, 70), (2, 3), dtype=dtype)
    wanted = attention(query, key, value, is_causal=True)
    out = laid_out(np.full(wanted.shape, NAN, dtype), layout)
    lies_in = out if out.base is None else out.base
    assert attention(query, key, value, is_causal=True, out=out) is out
    np.testing.assert_array_equal(out, wanted)
    if layout in ("every second", "every third feature", "inside NaN"):
        # nothing around it was touched
        assert np.count_nonzero(~np.isnan(lies_in)) == wanted.size


@pytest.mark.parametrize("rank", [2, 3])
def test_out_with_lse_and_weights(attention: Attention, rank: int) -> None:
    query, key, value = inputs((33, 70), (2,) * (rank - 2))
    wanted = attention(query, key, value, return_lse=True, return_weights=True)
    out = np.empty_like(query)
    results = attention(query, key, value, out=out, return_lse=True, return_weights=True)
    assert results[0] is out
    for result, want in zip(results, wanted, strict=True):
        np.testing.assert_array_equal(result, want)


def test_no_call_warns(attention: Attention) -> None:
    rng = np.random.default_rng(0)
    odd = (NAN, INF, -INF, 1e-42, 0.0, 3e38, -3e38)
    with warnings.catch_warnings(), np.errstate(all="warn"):
        warnings.simplefilter("error")
        for array in (np.zeros((60, 5)), np.full((60, 5), INF), np.full((60, 5), NAN), np.full((60, 5), 1e300)):
            attention(array, array, array, return_lse=True, return_weights=True)
        for dtype in (np.float32, np.float64):
            arrays = [with_odd(rng, array, odd, 0.1) for array in inputs((60, 60), dtype=dtype)]
            for mask in (None, np.full(60, -INF), np.full(60, -1e300), with_odd(rng, np.zeros((60, 60)), odd, 0.1)):
                for dropout_p in (0, 0.5, 1):
                    attention(*arrays, mask, dropout_p, return_lse=True, return_weights=True)
            for softcap in (1e-60, 2.0, 1e60):
                for window in (None, (3, 5), (10**30, 0)):
                    options: Any = {"softcap": softcap, "window": window, "query_offset": np.int64(2**63 - 1)}
                    attention(*arrays, **options, key_lengths=33, return_lse=True, return_weights=True)
                    attention(*arrays, **options, alibi_slopes=-1e300, return_lse=True, return_weights=True)
        # a signalling NaN, which NumPy itself warns of when it is cast
        signalling = np.full((60, 5), 0x7FA00000, np.uint32).view(np.float32)
        attention(signalling, np.zeros((60, 5)), np.zeros((60, 5)), np.zeros(60, np.float32))


def test_no_call_changes_the_floating_point_settings(attention: Attention) -> None:
    before = np.geterr()
    query, key, value = inputs()
    attention(query, key, value)
    assert np.geterr() == before
    # denormal numbers are still numbers: no flushing to zero has been left on
    assert np.float32(1e-38) * np.float32(0.1) > 0


# -- the same answer every time ----------------------------------------------------------------------------------------

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"is_causal": "bottom-right", "scale": -0.3},
    {"window": (70, 5), "query_offset": 9},
    {"window": (50, None), "is_causal": True, "softcap": 3.0},
    {"alibi_slopes": 0.125, "window": (300, None)},
    {"dropout_p": 0.3, "rng": 3},
)
SHAPES = (((2, 6), (2, 2), (1, 130)), ((3, 4), (3, 4), (65, 300)), ((1, 2), (1, 1), (600, 700)))


def grouped(shape: Any, dtype: Any) -> tuple[Array, Array, Array]:
    query_heads, key_heads, (queries, keys) = shape
    return (
        normal(*query_heads, queries, 24, dtype=dtype, seed=1),
        normal(*key_heads, keys, 24, dtype=dtype, seed=2),
        normal(*key_heads, keys, 24, dtype=dtype, seed=3),
    )


def assert_same(one: Any, other: Any) -> None:
    """Assert that results are the same bits."""
    for first, second in zip(one, other, strict=True):
        assert first.tobytes() == second.tobytes()


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_at_any_thread_count(
    cpu_attention: Attention, dtype: Any, options: dict[str, Any], shape: Any
) -> None:
    arrays = grouped(shape, dtype)
    mask = normal(*arrays[0].shape[-2:-1], arrays[1].shape[-2], seed=4)
    options = {**options, "enable_gqa": True, "return_lse": True, "return_weights": True}
    for args in (arrays, (*arrays, mask), (*arrays, mask > 0)):
        with fastattn.num_threads(1):
            alone = cpu_attention(*args, **options)
        for threads in (2, 3, 7):
            with fastattn.num_threads(threads):
                for _ in range(3):
                    assert_same(cpu_attention(*args, **options), alone)


@floating_modes.needs_modes
def test_the_same_bits_in_any_floating_point_mode() -> None:
    assert floating_modes.check(np.float32, names=["attention", "masked", "backward"]) == 3 * len(floating_modes.MODES)


@dtypes
@pytest.mark.parametrize("options", OPTIONS[:-1], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_in_any_batch(cpu_attention: Attention, dtype: Any, options: dict[str, Any], shape: Any) -> None:
    query, key, value = (np.concatenate([array, array[::-1], array]) for array in grouped(shape, dtype))
    mask = normal(len(query), 1, query.shape[-2], key.shape[-2], seed=4)
    options = {**options, "enable_gqa": True, "return_lse": True, "return_weights": True}
    for masks in (None, mask, mask > 0):
        together = cpu_attention(query, key, value, masks, **options)
        for b in range(len(query)):
            row = None if masks is None else masks[b]
            assert_same([result[b] for result in together], cpu_attention(query[b], key[b], value[b], row, **options))


#: Lengths of sequences, and those that their arrays are padded to.
PADDED = (
    ((1, 0), (1, 40)),
    ((1, 130), (1, 400)),
    ((65, 64), (65, 65)),
    ((65, 131), (65, 500)),
    ((150, 300), (150, 333)),
)


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", PADDED, ids=str)
def test_a_padded_sequence_has_the_bits_of_the_same_sequence_alone(
    cpu_attention: Attention, dtype: Any, options: dict[str, Any], lengths: Any
) -> None:
    (queries, keys), (_, capacity) = lengths
    arrays = grouped(((1, 4), (1, 2), (queries, capacity)), dtype)
    mask = normal(1, queries, capacity, seed=4)
    others = [np.concatenate([array, array[:, ::-1], array]) for array in arrays]  # in a batch, beside others
    short = [arrays[0], *(array[..., :keys, :] for array in arrays[1:])]
    for array in others[1:]:
        array[0, :, keys:] = NAN
    options = {**options, "enable_gqa": True, "return_lse": True, "return_weights": True}
    for masks in (None, mask, mask > 0, (mask, mask > -1)):
        cut = each(lambda given: given[..., :keys], masks)
        alone = cpu_attention(*short, cut, **options)
        for threads in (1, 3):
            with fastattn.num_threads(threads):
                padded = cpu_attention(*others, masks, **options, key_lengths=[keys, capacity, capacity // 2])
            assert_same([padded[0][:1], padded[1][:1], padded[2][:1, ..., :keys]], alone)
            assert not padded[2][0, ..., keys:].any()


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", PADDED, ids=str)
def test_a_padded_sequence_has_the_gradients_of_the_same_sequence_alone(
    cpu_attention: Attention, dtype: Any, options: dict[str, Any], lengths: Any
) -> None:
    (queries, keys), (_, capacity) = lengths
    arrays = grouped(((1, 4), (1, 2), (queries, capacity)), dtype)
    mask = normal(1, queries, capacity, seed=4)
    others = [np.concatenate([array, array[:, ::-1], array]) for array in arrays]
    short = [arrays[0], *(array[..., :keys, :] for array in arrays[1:])]
    for array in others[1:]:
        array[0, :, keys:] = NAN
    options = {**options, "enable_gqa": True}

    def gradients(args: Any, masks: Any, **lengths: Any) -> Any:
        out, lse = cpu_attention(*args, masks, **options, **lengths, return_lse=True)
        grad_out = np.broadcast_to(normal(*out.shape[1:], dtype=dtype, seed=5), out.shape)
        grad_lse = np.broadcast_to(normal(*lse.shape[1:], dtype=dtype, seed=6), lse.shape)
        return fastattn.attention_backward(
            grad_out, *args, out, lse, masks, **options, **lengths, grad_lse=grad_lse, backend="cpu"
        )

    for masks in (None, (mask, mask > -1)):
        alone = gradients(short, each(lambda given: given[..., :keys], masks))
        for threads in (1, 3):
            with fastattn.num_threads(threads):
                padded = gradients(others, masks, key_lengths=[keys, capacity, capacity // 2])
            assert_same([padded[0][:1], *(gradient[:1, :, :keys] for gradient in padded[1:])], alone)
            assert not any(gradient[0, :, keys:].any() for gradient in padded[1:])


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_in_any_memory_layout(
    cpu_attention: Attention, dtype: Any, options: dict[str, Any], layout: str
) -> None:
    arrays = grouped(SHAPES[1], dtype)
    masks = normal(4, 65, 300, seed=4), normal(4, 65, 300, seed=4) > 0
    options = {**options, "enable_gqa": True, "return_lse": True, "return_weights": True}
    for mask in masks:
        wanted = cpu_attention(*arrays, mask, **options)
        for which in range(4):
            args = [*arrays, mask]
            args[which] = laid_out(args[which], layout)
            assert_same(cpu_attention(*args, **options), wanted)
        assert_same(cpu_attention(*(laid_out(array, layout) for array in (*arrays, mask)), **options), wanted)


@halves
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_of_the_least_numbers_in_any_memory_layout(
    cpu_attention: Attention, dtype: Any, layout: str
) -> None:
    # times the scale, queries are rounded to subnormal numbers, or from there to the least normal one
    info = finfo(np.dtype(dtype))
    size = float(info.tiny) * (2 - float(info.eps))
    query, key, value = inputs((40, 70), features=32)
    arrays = halves_of(dtype, np.where(query > 0, size, -size), key / size, value)
    wanted = cpu_attention(*arrays, scale=0.4, return_lse=True)
    assert_same(cpu_attention(*(laid_out(array, layout) for array in arrays), scale=0.4, return_lse=True), wanted)


def test_the_same_bits_of_broadcast_and_repeated_arrays(cpu_attention: Attention) -> None:
    query, key, value = normal(2, 3, 65, 24), normal(65, 24, seed=1), normal(65, 24, seed=2)
    full = [np.broadcast_to(array, query.shape) for array in (key, value)]
    wanted = cpu_attention(query, *(array.copy() for array in full))
    assert_same([cpu_attention(query, *full)], [wanted])
    assert_same([cpu_attention(query, key, value)], [wanted])
    one = np.broadcast_to(np.float32(0.7), query.shape)
    assert_same([cpu_attention(one, *full)], [cpu_attention(one.copy(), *full)])
    mask = np.broadcast_to(normal(65), (2, 3, 65, 65))
    assert_same([cpu_attention(query, *full, mask)], [cpu_attention(query, *full, mask.copy())])


def test_the_same_bits_whatever_else_is_asked_for(cpu_attention: Attention) -> None:
    query, key, value = grouped(SHAPES[2], np.float32)
    out = cpu_attention(query, key, value, is_causal=True)
    with_lse = cpu_attention(query, key, value, is_causal=True, return_lse=True)
    with_both = cpu_attention(query, key, value, is_causal=True, return_lse=True, return_weights=True)
    assert_same([out], with_lse[:1])
    assert_same(with_lse, with_both[:2])


# -- coming from ... ---------------------------------------------------------------------------------------------------


def torch_attention(query: Array, key: Array, value: Array, mask: Array | None, options: dict[str, Any]) -> Array:
    """Call PyTorch's scaled_dot_product_attention, its causal mask made part of the mask where there is one."""
    torch = pytest.importorskip("torch")
    options = dict(options)
    is_causal = options.pop("is_causal", False)
    lengths = query.shape[-2], key.shape[-2]
    if is_causal and (mask is not None or is_causal == "bottom-right"):
        causal = np.tri(*lengths, k=0 if is_causal is True else lengths[1] - lengths[0], dtype=bool)
        if mask is None:
            mask = causal
        else:
            mask = causal & mask if mask.dtype == bool else np.where(causal, mask, -INF).astype(mask.dtype)
        is_causal = False
    arrays = [torch.from_numpy(array) for array in (query, key, value)]
    return np.asarray(
        torch.nn.functional.scaled_dot_product_attention(
            *arrays, None if mask is None else torch.from_numpy(mask), is_causal=is_causal, **options
        )
    )


@dtypes
@pytest.mark.parametrize(
    ("length", "features"),
    [((1, 1), 64), ((8, 8), 5), ((1, 300), 128), ((70, 60), 64), ((65, 150), 5), ((65, 150), 128)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
def test_coming_from_pytorch(
    attention: Attention, dtype: Any, length: tuple[int, int], features: int, kind: str, is_causal: Any
) -> None:
    query, key, value = inputs(length, (2, 2), features, dtype=dtype)
    mask = None if kind == "none" else normal(2, *length, dtype=dtype, seed=4)
    mask = mask > 0 if mask is not None and kind == "bool" else mask
    options = {"is_causal": is_causal, "scale": 0.2}
    peer = torch_attention(query, key, value, mask, options)
    wanted = tolerances.expected(query, key, value, mask, **options)
    tolerances.check_out(attention(query, key, value, mask, **options), wanted, peer)
    # and PyTorch means the same
    tolerances.check_out(peer, wanted, peer)


@dtypes
def test_coming_from_pytorch_with_groups(attention: Attention, dtype: Any) -> None:
    query, key, value = grouped(((2, 6), (2, 2), (50, 70)), dtype)
    peer = torch_attention(query, key, value, None, {"enable_gqa": True, "is_causal": True})
    wanted = tolerances.expected(query, key, value, enable_gqa=True, is_causal=True)
    tolerances.check_out(attention(query, key, value, is_causal=True, enable_gqa=True), wanted, peer)
    np.testing.assert_allclose(peer, wanted.out, atol=1e-5)


def test_coming_from_jax_and_flash_attention_axes_are_swapped_without_a_copy(attention: Attention) -> None:
    query, key, value = (normal(2, 33, 4, 16, seed=i).swapaxes(-3, -2) for i in range(3))
    out = attention(query, key, value)
    close(out, softmax_attention(query, key, value, 0.25))


def test_coming_from_torch_tensors(attention: Attention) -> None:
    torch = pytest.importorskip("torch")
    arrays = inputs()
    np.testing.assert_array_equal(attention(*map(torch.from_numpy, arrays)), attention(*arrays))
    with pytest.raises(TypeError, match=r"query: .*Tensor.*requires grad"):
        attention(torch.zeros(3, 4, requires_grad=True), *arrays[1:])
