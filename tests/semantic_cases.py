"""What the tests of semantics share: inputs, the formula by itself, and what agrees.

What docs/semantics.md says of `fastattn.attention` has a test of that name in tests/semantics, sentence by sentence,
and every test runs on every backend. Where a sentence is about all calls rather than one (any shape, any mask),
Hypothesis tries them in test_properties.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from strategies import HALVES

from fastattn.call.halves import cast, finfo

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


def seen(
    length: tuple[int, int], left: int | None = None, right: int | None = None, offset: int = 0, keys: int | None = None
) -> Array:
    """Say which query may look at which key, with Python's integers."""

    def sees(position: int, j: int) -> bool:
        near = (left is None or position - left <= j) and (right is None or j <= position + right)
        return near and (keys is None or j < keys)

    return np.array([[sees(i + offset, j) for j in range(length[1])] for i in range(length[0])], bool).reshape(length)


def assert_empty(results: tuple[Array, Array, Array], rows: Any = slice(None)) -> None:
    """Assert that these rows of (out, lse, weights) are those of queries that may look at no key."""
    out, lse, weights = results
    assert not out[..., rows, :].any()
    assert not weights[..., rows, :].any()
    assert np.isneginf(lse[..., rows]).all()


def grouped(shape: Any, dtype: Any) -> tuple[Array, Array, Array]:
    query_heads, key_heads, (queries, keys) = shape
    return (
        normal(*query_heads, queries, 24, dtype=dtype, seed=1),
        normal(*key_heads, keys, 24, dtype=dtype, seed=2),
        normal(*key_heads, keys, 24, dtype=dtype, seed=3),
    )
