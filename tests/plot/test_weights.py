"""Weights to draw: fields of long maps, summaries, and which head is meant."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plot_cases import (
    softmax_like,
    summary_of,
)

from fastattn import reference
from fastattn.plot.weights import as_weights

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws the plots, is not installed")
matplotlib.use("agg")


class TestWeights:
    @given(
        shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        limits=st.tuples(st.integers(1, 10), st.integers(1, 10)),
        seed=st.integers(0, 99),
        nan=st.booleans(),
    )
    def test_a_field_is_the_largest_of_its_cells(self, shape: Any, limits: Any, seed: int, nan: bool) -> None:
        weights = softmax_like(*shape, seed=seed)
        if nan:
            weights[seed % shape[0]] = np.nan
        fields, height, width = as_weights(weights).pooled(*limits)
        assert fields.shape[0] <= limits[0]
        assert fields.shape[1] <= limits[1]
        for (row, column), field in np.ndenumerate(fields):
            top, bottom = (place * shape[0] // fields.shape[0] for place in (row, row + 1))
            left, right = (place * shape[1] // fields.shape[1] for place in (column, column + 1))
            np.testing.assert_array_equal(field, weights[top:bottom, left:right].max())
            assert height - 1 <= bottom - top <= height
            assert width - 1 <= right - left <= width
        summary = summary_of(weights, shape[1])
        np.testing.assert_array_equal(as_weights(summary).pooled(*limits)[0], fields)

    @given(keys=st.integers(1, 9), k=st.integers(0, 9), seed=st.integers(0, 99))
    def test_a_summary_is_the_matrix_without_the_rest(self, keys: int, k: int, seed: int) -> None:
        weights = softmax_like(3, 4, keys, seed=seed)
        weights[1, 2] = np.nan
        weights[0, 3, 0] = 0
        stack = as_weights(summary_of(weights, k))
        kept = np.zeros_like(weights)
        if k > 0:
            least = -np.sort(-weights, axis=-1)[..., min(k, keys) - 1, None]
            kept = np.where(weights >= least, weights, 0)
        kept[1, 2] = np.nan if k else 0
        for head in range(3):
            one = stack.at(head)
            np.testing.assert_array_equal([one.row(query) for query in range(4)], kept[head])
            rows, columns, found = one.pairs(0.0)
            dense = np.zeros((4, keys))
            dense[rows, columns] = found
            np.testing.assert_array_equal(dense, kept[head])
            np.testing.assert_allclose(one.totals(), weights[head].sum(axis=0), rtol=1e-15)
        mean = stack.mean()
        np.testing.assert_allclose([mean.row(query) for query in range(4)], kept.mean(axis=0), rtol=1e-14)

    def test_what_attention_summary_returns(self) -> None:
        x = np.random.default_rng(0).standard_normal((2, 6, 8))
        summary = reference.attention_summary(x, x, top_k=6)
        weights = reference.attention(x, x, x, return_weights=True)[1]
        for head, query in itertools.product(range(2), range(6)):
            np.testing.assert_allclose(as_weights(summary).at(head).row(query), weights[head, query], rtol=1e-12)

    def test_axes_of_length_one_need_no_index(self) -> None:
        """A batch of one is what most have: head=3 is head 3."""
        stack = as_weights(softmax_like(6, 1, 4, 3, 3))
        np.testing.assert_array_equal(stack.head((2, 3)).values, stack.values[2, 0, 3])
        np.testing.assert_array_equal(stack.head((2, 0, 3)).values, stack.values[2, 0, 3])
        np.testing.assert_array_equal(stack.head(2, rank=1).values, stack.values[2, 0])
        batch = as_weights(softmax_like(1, 4, 3, 3))
        for head in (0, 3, -1):
            np.testing.assert_array_equal(batch.head(head).values, batch.values[0, head])
            np.testing.assert_array_equal(batch.head(head, rank=1).values, batch.values[0, head])
            np.testing.assert_array_equal(batch.head((0, head)).values, batch.values[0, head])
        one = as_weights(softmax_like(1, 1, 3, 3))
        np.testing.assert_array_equal(one.head(0).values, one.values[0, 0])
        summary = as_weights(summary_of(softmax_like(1, 4, 3, 3), 2))
        np.testing.assert_array_equal(summary.head(2).received, summary.received[0, 2])
