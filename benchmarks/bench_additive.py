"""How fast is additive attention, against the form in which it is usually written?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.bench.measure import settle
from fastattn.bench.peers import cores

#: (B, Lq, Lk, D), float32: whole sentences at once, and steps of a decoder.
SHAPES = [(4, 256, 256, 256), (16, 50, 50, 512), (4, 1, 256, 256), (64, 1, 50, 512)]
#: How large queries and keys are: tanh of them is anything, or almost always ±1.
SIZES = [1, 100]

Make = Callable[..., Callable[[], Any]]


def _inputs(batch: int, queries: int, keys: int, features: int, size: int = 1) -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = ((batch, queries, features), (batch, keys, features), (batch, keys, features), (features,))
    query, key, value, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return [query * np.float32(size), key * np.float32(size), value, weight]


def ours(*shape: int) -> Callable[[], Any]:
    """Return a call of ours."""
    fastattn.set_num_threads(cores())
    arrays = _inputs(*shape)
    return lambda: fastattn.additive_attention(*arrays)


def torchs(*shape: int) -> Callable[[], Any]:
    """Return a call of the broadcasting form in PyTorch."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(cores())
    query, key, value, weight = map(torch.from_numpy, _inputs(*shape))

    def run() -> Any:
        scores = (weight * torch.tanh(query[:, :, None] + key[:, None])).sum(-1)
        return scores.softmax(-1) @ value

    return run


def numpys(*shape: int) -> Callable[[], Any]:
    """Return a call of the broadcasting form in NumPy."""
    query, key, value, weight = _inputs(*shape)

    def run() -> Any:
        scores = np.tanh(query[:, :, None] + key[:, None]) @ weight
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        return scores / scores.sum(-1, keepdims=True) @ value

    return run


ENGINES: dict[str, Make] = {"fastattn": ours, "PyTorch": torchs, "NumPy": numpys}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_additive(benchmark: Any, shape: tuple[int, ...], size: int, engine: str) -> None:
    run = ENGINES[engine](*shape, size)
    assert np.abs(np.asarray(run()) - ours(*shape, size)()).max() < 2e-4
    benchmark.group = f"additive {shape}, inputs of size {size}"
    settle()
    benchmark(run)


def test_step_of_a_decoder(benchmark: Any) -> None:
    """What a step costs with its projections, once the keys have been projected."""
    layer = fastattn.BahdanauAttention(512, 512, 512, rng=0)
    state, source = (np.random.default_rng(0).standard_normal((64, n, 512), dtype=np.float32) for n in (1, 50))
    projected = layer.project_keys(source)
    settle()
    benchmark(layer, state, source, projected_keys=projected)
