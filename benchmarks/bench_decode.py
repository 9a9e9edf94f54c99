"""What does one decoded token cost, against reading its keys and values once, PyTorch and two products in NumPy?

Each alternates with a peer; the extra info has the ratio of the peer's time to ours. Long contexts come from memory,
where reading is all that counts; short ones stay in the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.bench.peers import cores

ROUNDS = 21
#: Batch, query heads, heads of keys, keys, features.
LONG = ((1, 32, 32, 8192, 128), (4, 32, 8, 4096, 128), (1, 8, 1, 65536, 64))
SHORT = ((1, 12, 12, 1024, 64), (1, 8, 8, 256, 64), (1, 9, 3, 512, 64))

Call = Callable[[], object]


def inputs(case: tuple[int, ...], queries: int = 1) -> list[Any]:
    """Return query, key and value of a case."""
    batch, heads, kv_heads, keys, features = case
    rng = np.random.default_rng(0)
    shapes = (batch, heads, queries, features), *[(batch, kv_heads, keys, features)] * 2
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def reading(query: Any, key: Any, value: Any) -> Call:
    """Read keys and values, and nothing else."""
    torch = pytest.importorskip("torch")
    arrays = [torch.from_numpy(array) for array in (key, value)]
    return lambda: [array.sum() for array in arrays]


def by_pytorch(query: Any, key: Any, value: Any) -> Call:
    torch = pytest.importorskip("torch")
    arrays = [torch.from_numpy(array) for array in (query, key, value)]
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(*arrays, enable_gqa=True)


def by_products(query: Any, key: Any, value: Any) -> Call:
    """Two products of matrices, and the softmax in between, of a group of heads at once."""
    batch, kv_heads, _, features = key.shape
    rows, scale = query.reshape(batch, kv_heads, -1, features), np.float32(features**-0.5)

    def run() -> object:
        scores = rows @ key.swapaxes(-1, -2) * scale
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True) @ value

    return run


PEERS = {"reading": reading, "PyTorch": by_pytorch, "NumPy": by_products}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", LONG + SHORT, ids=str)
def test_one_query(benchmark: Any, alternate: Any, case: tuple[int, ...], peer: str) -> None:
    fastattn.set_num_threads(cores())
    if peer != "NumPy":
        pytest.importorskip("torch").set_num_threads(cores())
    query, key, value = inputs(case)
    benchmark.group = f"decode, {case}"
    theirs = PEERS[peer](query, key, value)
    alternate(lambda: fastattn.attention(query, key, value, enable_gqa=True), theirs, peer, ROUNDS)


@pytest.mark.parametrize("queries", [2, 4, 8])
@pytest.mark.parametrize("case", LONG + SHORT, ids=str)
def test_several_queries(benchmark: Any, alternate: Any, case: tuple[int, ...], queries: int) -> None:
    """Queries that are checked at once, alternating with as many calls for one: the ratio is above 1 if that pays."""
    fastattn.set_num_threads(cores())
    query, key, value = inputs(case, queries)
    single = [query[:, :, i : i + 1] for i in range(queries)]
    options: Any = {"enable_gqa": True, "is_causal": "bottom-right"}

    def one_by_one() -> None:
        for one in single:
            fastattn.attention(one, key, value, **options)

    benchmark.group = f"{queries} queries, {case}"
    alternate(lambda: fastattn.attention(query, key, value, **options), one_by_one, "one by one", ROUNDS)
