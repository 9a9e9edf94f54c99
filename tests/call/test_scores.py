"""`fastattn.call.scores`: which keys queries look at, against a look at every key, and what becomes of a score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.call.scores import FARTHEST, UNBOUNDED, Scores, Span

reaches = st.one_of(st.none(), st.integers(0, 12), st.sampled_from((FARTHEST, 2 * FARTHEST)))
offsets = st.one_of(st.integers(-25, 25), st.sampled_from((-FARTHEST, FARTHEST)))


def visible(scores: Scores, queries: range, keys: int, offset: int) -> np.ndarray[Any, Any]:
    """Say which of the queries look at which keys, with Python's integers."""
    left, right = (UNBOUNDED if reach is None else reach for reach in (scores.left, scores.right))
    return np.array([[i + offset - left <= j <= i + offset + right for j in range(keys)] for i in queries], bool)


@settings(max_examples=10 * settings().max_examples)
@given(
    left=reaches,
    right=reaches,
    offset=offsets,
    own=st.one_of(st.none(), offsets),
    keys=st.integers(0, 20),
    first=st.integers(0, 15),
    count=st.integers(1, 10),
)
def test_the_span_of_some_queries_is_what_each_of_them_looks_at(
    left: int | None, right: int | None, offset: int, own: int | None, keys: int, first: int, count: int
) -> None:
    scores = Scores(left=left, right=right, offset=offset)
    span = scores.span(first, first + count - 1, keys, own)
    each = visible(scores, range(first, first + count), keys, offset if own is None else own)
    assert each.shape == (count, keys) or not keys
    some, all_of_them = np.flatnonzero(each.any(axis=0)), np.flatnonzero(each.all(axis=0))
    assert 0 <= span.begin <= span.full_begin <= span.full_end <= span.end <= keys
    if not some.size:
        assert span == Span(0, 0, 0, 0)
        return
    assert (span.begin, span.end) == (some[0], some[-1] + 1)
    if all_of_them.size:
        assert (span.full_begin, span.full_end) == (all_of_them[0], all_of_them[-1] + 1)
    else:
        assert span.full_begin == span.full_end


@given(left=reaches, right=reaches, offset=offsets, keys=st.integers(0, 20), length=st.integers(0, 20))
def test_sees_is_said_of_each_query_and_key(
    left: int | None, right: int | None, offset: int, keys: int, length: int
) -> None:
    scores = Scores(left=left, right=right, offset=offset)
    wanted = visible(scores, range(9), keys, offset).reshape(9, keys) & (np.arange(keys) < length)
    found = scores.sees(np.arange(9)[:, None], np.arange(keys), length)
    np.testing.assert_array_equal(np.broadcast_to(found, (9, keys)), wanted)
    rows = scores.sees(np.arange(9)[:, None], np.arange(keys), length, np.array([[[offset]], [[3]]]))
    other = visible(scores, range(9), keys, 3).reshape(9, keys) & (np.arange(keys) < length)
    np.testing.assert_array_equal(rows, np.stack([wanted, other]))


def test_bounded_is_what_keeps_queries_from_keys() -> None:
    assert not Scores(offset=5, softcap=2.0, bias=True, keep=True, own=("offset",)).bounded
    assert all(Scores(**bound).bounded for bound in ({"left": 0}, {"right": 0}, {"own": ("keys",)}))


@pytest.mark.parametrize("softcap", [None, 1e-3, 2.0, 1e5])
def test_slope_is_the_derivative_of_value(softcap: float | None) -> None:
    scores, float64 = Scores(softcap=softcap), np.dtype(np.float64)
    raw = np.linspace(-3, 3, 25) * min(softcap or 1.0, 10.0)
    h = 1e-5 * min(softcap or 1.0, 1.0)
    bias = np.full(25, 0.5)
    measured = (scores.value(raw + h, bias, float64) - scores.value(raw - h, bias, float64)) / (2 * h)
    np.testing.assert_allclose(np.broadcast_to(scores.slope(raw), raw.shape), measured, rtol=1e-5, atol=1e-9)


def test_a_capped_score_of_any_size() -> None:
    raw = np.array([-np.inf, -1e300, -1e-300, 0, 1e-300, 1e300, np.inf, np.nan])
    for softcap in (5e-324, 1e-3, 1.7e308):
        scores = Scores(softcap=softcap)
        with np.errstate(all="ignore"):
            capped, slope = scores.value(raw, None, np.dtype(np.float64)), scores.slope(raw)
        assert (np.abs(capped[:-1]) <= softcap).all()
        assert np.isnan(capped[-1])
        assert ((slope[:-1] >= 0) & (slope[:-1] <= 1)).all()
        assert slope[3] == 1
        np.testing.assert_array_equal(capped[[0, 6]], [-softcap, softcap])


def test_a_bias_saturates_in_the_dtype_of_the_call() -> None:
    scores, bias = Scores(bias=True), np.array([-1e300, 1e300, -np.inf, np.inf, 2.0])
    found = scores.value(np.zeros(5), bias, np.dtype(np.float32))
    limit = float(np.finfo(np.float32).max)
    np.testing.assert_array_equal(found, [-limit, limit, -np.inf, np.inf, 2])
