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


def our_gradients(shape: tuple[int, ...], forward: bool) -> Callable[[], Any]:
    """Return a call of our backward pass, alone or after the forward pass."""
    fastattn.set_num_threads(cores())
    arrays = _inputs(*shape)
    out, lse = fastattn.additive_attention(*arrays, return_lse=True)
    grad_out = np.random.default_rng(1).standard_normal(out.shape, dtype=np.float32)

    def run() -> Any:
        results = fastattn.additive_attention(*arrays, return_lse=True) if forward else (out, lse)
        return fastattn.additive_attention_backward(grad_out, *arrays, *results)

    return run


def torchs_gradients(shape: tuple[int, ...], forward: bool) -> Callable[[], Any]:
    """Return a call of autograd on the broadcasting form in PyTorch, alone or after the forward pass."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(cores())
    arrays = [torch.from_numpy(array).requires_grad_() for array in _inputs(*shape)]
    query, key, value, weight = arrays

    def attend() -> Any:
        scores = (weight * torch.tanh(query[:, :, None] + key[:, None])).sum(-1)
        return scores.softmax(-1) @ value

    kept = attend()
    grad_out = torch.from_numpy(np.random.default_rng(1).standard_normal(kept.shape, dtype=np.float32))

    def run() -> Any:
        out = attend() if forward else kept
        grads = torch.autograd.grad(out, arrays, grad_out, retain_graph=not forward)
        return [grad.numpy() for grad in grads]

    return run


GRADIENT_ENGINES = {"fastattn": our_gradients, "PyTorch": torchs_gradients}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_additive(benchmark: Any, shape: tuple[int, ...], size: int, engine: str) -> None:
    run = ENGINES[engine](*shape, size)
    assert np.abs(np.asarray(run()) - ours(*shape, size)()).max() < 2e-4
    benchmark.group = f"additive {shape}, inputs of size {size}"
    settle()
    benchmark(run)


@pytest.mark.parametrize("engine", GRADIENT_ENGINES)
@pytest.mark.parametrize("forward", [False, True], ids=["backward", "forward and backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(benchmark: Any, shape: tuple[int, ...], forward: bool, engine: str) -> None:
    run = GRADIENT_ENGINES[engine](shape, forward)
    for got, want in zip(run(), our_gradients(shape, forward)(), strict=True):
        assert np.abs(got - want).max() <= 1e-4 * max(1, np.abs(want).max())
    benchmark.group = f"additive gradients {shape}, {'forward and backward' if forward else 'backward alone'}"
    settle()
    benchmark(run)


def test_step_of_a_decoder(benchmark: Any) -> None:
    """What a step costs with its projections, once the keys have been projected."""
    layer = fastattn.BahdanauAttention(512, 512, 512, rng=0)
    state, source = (np.random.default_rng(0).standard_normal((64, n, 512), dtype=np.float32) for n in (1, 50))
    projected = layer.project_keys(source)
    settle()
    benchmark(layer, state, source, projected_keys=projected)
