"""What does it cost that keys and values lie in pages, against arrays of the same ones?

Decoding rows have their keys and values in pages that lie anywhere: with the axes of flash-attn, (n, page, Hk, D), or
with heads before keys. Each alternates with `attention` on arrays; the extra info has the ratio of its time to ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.bench.peers import cores

ROUNDS = 21
#: Batch, query heads, heads of keys, keys, features.
CASES = ((1, 32, 8, 8192, 128), (8, 32, 8, 1024, 128), (1, 9, 3, 512, 64))


def in_pages(array: Any, page: int, table: Any, heads_first: bool) -> Any:
    """Return rows of a batch, (B, Hk, L, D), in pages, where those of a table say."""
    batch, heads, keys, features = array.shape
    shape = (table.size, heads, page, features) if heads_first else (table.size, page, heads, features)
    pages = np.empty(shape, array.dtype)
    if heads_first:
        pages = pages.swapaxes(1, 2)
    pages[table] = array.reshape(batch, heads, keys // page, page, features).transpose(0, 2, 3, 1, 4)
    return pages


@pytest.mark.parametrize("heads_first", [False, True], ids=["keys first", "heads first"])
@pytest.mark.parametrize("page", [16, 256])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_query(
    benchmark: Any, alternate: Any, case: tuple[int, ...], dtype: Any, page: int, heads_first: bool
) -> None:
    """A query for each row, alternating with a call on arrays."""
    fastattn.set_num_threads(cores())
    batch, heads, kv_heads, keys, features = case
    rng = np.random.default_rng(0)
    query = rng.standard_normal((batch, heads, 1, features), dtype=np.float32).astype(dtype)
    shape = (batch, kv_heads, keys, features)
    key, value = (rng.standard_normal(shape, dtype=np.float32).astype(dtype) for _ in range(2))
    table = rng.permutation(batch * (keys // page)).reshape(batch, -1)
    pages = [in_pages(array, page, table, heads_first) for array in (key, value)]
    lengths, rows = np.full(batch, keys), query.swapaxes(1, 2)
    benchmark.group = f"{case}, {np.dtype(dtype).name}"

    def ours() -> None:
        fastattn.attention_paged(rows, pages[0], pages[1], table, lengths)

    alternate(ours, lambda: fastattn.attention(query, key, value, enable_gqa=True), "arrays", ROUNDS)
