"""What do a summary, and some chosen weights, cost beside attention itself?

Each alternates with attention on the same inputs; the extra info has the ratio of its time to ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastattn

HEADS, FEATURES = 1, 64
ROUNDS = {4096: 20, 32768: 3}


def _compare(benchmark: Any, alternate: Any, length: int, name: str, call: Callable[..., object]) -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, HEADS, length, FEATURES), dtype=np.float32)
    lse = fastattn.attention(query, key, value, is_causal=True, return_lse=True)[1]
    benchmark.group = f"float32 causal (1,{HEADS},{length},{FEATURES})"
    benchmark.extra_info["call"] = name
    attention = partial(fastattn.attention, query, key, value, is_causal=True)
    alternate(lambda: call(query, key, lse), attention, "attention", ROUNDS[length])


@pytest.mark.parametrize("top_k", [0, 8, 64])
@pytest.mark.parametrize("length", ROUNDS)
def test_summary(benchmark: Any, alternate: Any, length: int, top_k: int) -> None:
    def call(query: Any, key: Any, lse: Any) -> object:
        return fastattn.attention_summary(query, key, is_causal=True, top_k=top_k)

    _compare(benchmark, alternate, length, f"attention_summary, top_k={top_k}", call)


@pytest.mark.parametrize("with_lse", [False, True], ids=["without lse", "with lse"])
@pytest.mark.parametrize("length", ROUNDS)
def test_a_row_and_a_square(benchmark: Any, alternate: Any, length: int, with_lse: bool) -> None:
    square = slice(length - 64, None)

    def call(query: Any, key: Any, lse: Any) -> object:
        given = lse if with_lse else None
        fastattn.attention_weights(query, key, is_causal=True, rows=-1, lse=given)
        return fastattn.attention_weights(query, key, is_causal=True, rows=square, columns=square, lse=given)

    _compare(benchmark, alternate, length, "attention_weights, a row and a square of 64", call)
