"""Gradients of attention by the chain rule on whole matrices, from the scores alone: no log-sum-exp is in it.

Scores are taken as the call has them, rounded to its dtype: which of them a mask of -1e9 still tells apart is a matter
of rounding, what their softmax is, and its derivative, is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Dense(NamedTuple):
    """Gradients in float64, or wider, the weights before dropout, and the output; a mask's are those of the scores."""

    query: Array
    key: Array
    value: Array
    scores: Array
    weights: Array
    out: Array


def softmax(scores: Array) -> Array:
    """Return the weights; 0 where all scores are -inf."""
    highest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    powers = np.exp(scores - np.where(highest == -np.inf, 0, highest))
    total = powers.sum(axis=-1, keepdims=True)
    weights: Array = np.where(total == 0, 0, powers / np.where(total == 0, 1, total))
    return weights


def gradients(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    scores: Array,
    scale: float,
    factors: Any = 1.0,
    grad_lse: Array | None = None,
) -> Dense:
    """Return the gradients where the call has these scores; `factors` are dropout's, of the weights."""
    wide: Any = np.float64 if scores.dtype.itemsize <= 4 else np.longdouble
    grad_out, query, key, value, scores = (array.astype(wide) for array in (grad_out, query, key, value, scores))
    weights = softmax(scores)
    kept = weights * factors
    grad_weights = grad_out @ value.swapaxes(-1, -2) * factors
    sums: Any = (weights * grad_weights).sum(axis=-1, keepdims=True)
    if grad_lse is not None:
        sums = sums - grad_lse.astype(wide)[..., None]
    grad_scores = weights * (grad_weights - sums)
    return Dense(
        scale * (grad_scores @ key),
        scale * (grad_scores.swapaxes(-1, -2) @ query),
        kept.swapaxes(-1, -2) @ grad_out,
        grad_scores,
        weights,
        kept @ value,
    )
