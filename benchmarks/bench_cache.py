"""What does a cache cost: a token's attention in int8 against bfloat16, and what it takes to append one?

Each alternates with a peer; the extra info has the ratio of the peer's time to ours. Long contexts come from memory,
where int8 is half of what there is to read; short ones stay in the caches, where its arithmetic shows.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn
from fastattn.bench.peers import cores
from fastattn.kv_cache.formats import FormatLike

ROUNDS = 21
#: Batch, query heads, heads of keys, tokens, features.
CASES = ((1, 32, 32, 8192, 128), (4, 32, 8, 4096, 128), (1, 8, 8, 256, 64), (1, 8, 8, 256, 128))
PORTION = 1024


def filled(case: tuple[int, ...], dtype: FormatLike) -> fastattn.KVCache:
    """Return a cache of so many tokens."""
    batch, _, kv_heads, tokens, features = case
    cache = fastattn.KVCache(batch, kv_heads, features, dtype=dtype)
    rng = np.random.default_rng(0)
    for first in range(0, tokens, PORTION):
        shape = (2, batch, kv_heads, min(PORTION, tokens - first), features)
        cache.append(*rng.standard_normal(shape, dtype=np.float32))
    return cache


def queries(case: tuple[int, ...]) -> Any:
    """Return a query for each head, in bfloat16."""
    batch, heads, _, _, features = case
    return np.random.default_rng(1).standard_normal((batch, heads, 1, features)).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("peer", ["bfloat16", "float32"])
def test_one_query_of_int8(benchmark: Any, alternate: Any, case: tuple[int, ...], peer: FormatLike) -> None:
    fastattn.set_num_threads(cores())
    query, ours, theirs = queries(case), filled(case, "int8"), filled(case, peer)
    benchmark.group = f"cache, {case}"
    alternate(lambda: ours.attention(query), lambda: theirs.attention(query), str(peer), ROUNDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_token_is_appended(benchmark: Any, alternate: Any, dtype: FormatLike) -> None:
    """Against attention of one query to a short context, which a layer calls as often."""
    case = (1, 9, 3, 64, 64)
    cache, query = filled(case, dtype), queries(case)
    token = np.random.default_rng(2).standard_normal((2, 1, 3, 1, 64), dtype=np.float32)

    def appends() -> None:
        for _ in range(100):
            cache.append(*token)
        cache.truncate(64)

    def asks() -> None:
        for _ in range(100):
            cache.attention(query)

    benchmark.group = "a token"
    alternate(appends, asks, "attention", ROUNDS)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_prompt_is_appended(benchmark: Any, alternate: Any, dtype: FormatLike) -> None:
    """Against a copy of it."""
    prompt = np.random.default_rng(3).standard_normal((2, 1, 8, 4096, 128), dtype=np.float32)

    def appends() -> None:
        cache = fastattn.KVCache(1, 8, 128, dtype=dtype)
        cache.append(*prompt)

    benchmark.group = "a prompt"
    alternate(appends, prompt.copy, "copy", ROUNDS)
