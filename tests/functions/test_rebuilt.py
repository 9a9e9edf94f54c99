"""Functions rebuilt on other values, and methods of numbers, which tensors have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.functions.function import described, rebuilt

TABLE = [1.0, 2.0]


def scaled(score: Any, factor: Any) -> Any:
    return score * factor * TABLE[0]


def test_what_functions_share_they_share_again() -> None:
    count = 3

    def helper(score: Any) -> Any:
        return scaled(score, count)

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return helper(score) + count + TABLE[1]

    seen = []

    def change(name: str, value: Any) -> Any:
        seen.append(name)
        return np.array(value) * 10 if name == "TABLE" else 5 if name == "count" else value

    new = rebuilt("score_mod", score_mod, change)
    assert set(seen) == {"helper", "scaled", "count", "TABLE"}
    assert new(2.0, 0, 0, 0, 0) == 2 * 5 * 10 + 5 + 20
    assert score_mod(2.0, 0, 0, 0, 0) == 2 * 3 * 1 + 3 + 2  # which stays what it was
    (before, _), (after, values) = described("score_mod", score_mod), described("score_mod", new)
    assert after == before
    assert dict(zip((each.name for each in after.captured), values, strict=True))["count"] == 5


def test_a_function_that_calls_itself_is_refused_after_as_before() -> None:
    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask_mod(batch, head, query, key)

    with pytest.raises(TypeError, match="mask_mod calls itself"):
        described("mask_mod", rebuilt("mask_mod", mask_mod, lambda name, value: value))


def attend(score_mod: Any) -> Any:
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 20, 8), dtype=np.float32)
    return fastattn.attention(query, key, value, score_mod=score_mod)


def test_methods_mean_the_functions() -> None:
    def by_methods(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        distance = query.sub(key).abs().float()
        score = score.tanh().mul(3).clamp(min=-2, max=2.5).to(score.dtype)
        return score.masked_fill(distance.gt(9).logical_or(head.bool() & key.eq(2)), float("-inf")) - distance / 8

    def by_functions(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        distance = np.abs(query - key)
        hidden = (distance > 9) | ((head != 0) & (key == 2))
        return np.where(hidden, -np.inf, np.clip(np.tanh(score) * 3, -2, 2.5)) - distance / 8

    assert (attend(by_methods) == attend(by_functions)).all()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda score, batch, head, query, key: score.cumsum(), r"\.cumsum of what is no module has no meaning"),
        (lambda score, batch, head, query, key: score.to(key), r"\.to of what is no dtype has no meaning"),
        (lambda score, batch, head, query, key: score * float("much"), "'much' is no number"),
        (lambda score, batch, head, query, key: score.masked_fill(query > key), "masked_fill with 2 arguments"),
    ],
)
def test_methods_that_mean_nothing(function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        attend(function)
