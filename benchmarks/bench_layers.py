"""How fast are layers: multi-head attention with its projections; what does a local alignment cost?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import LuongAttention, MultiHeadAttention
from fastattn.bench.measure import settle
from fastattn.bench.peers import cores

#: (B, L, E, heads), self-attention in float32
SHAPES = [(8, 512, 512, 8), (1, 2048, 512, 8), (64, 16, 512, 8), (64, 1, 512, 8)]
KEYS = [64, 1024, 16384]

Make = Callable[[int, int, int, int], Callable[[], Any]]


def _input(batch: int, length: int, embed: int) -> Any:
    return np.random.default_rng(0).standard_normal((batch, length, embed), dtype=np.float32)


def ours(batch: int, length: int, embed: int, heads: int) -> Callable[[], Any]:
    """Return a call of our layer."""
    fastattn.set_num_threads(cores())
    layer, x = MultiHeadAttention(embed, heads, rng=0), _input(batch, length, embed)
    return lambda: layer(x)


def torchs(batch: int, length: int, embed: int, heads: int, fast: bool = True) -> Callable[[], Any]:
    """Return a call of PyTorch's layer: by the path of its own for inference, or by the functions of training."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(cores())
    layer = torch.nn.MultiheadAttention(embed, heads, batch_first=True).eval().requires_grad_(False)
    state = MultiHeadAttention(embed, heads, rng=0).state_dict()
    layer.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    x = torch.from_numpy(_input(batch, length, embed))

    def run() -> Any:
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.no_grad():
            return layer(x, x, x, need_weights=False)[0]

    return run


ENGINES: dict[str, Make] = {
    "fastattn": ours,
    "PyTorch": torchs,
    "PyTorch, no fast path": partial(torchs, fast=False),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_multi_head(benchmark: Any, shape: tuple[int, int, int, int], engine: str) -> None:
    run = ENGINES[engine](*shape)
    assert np.abs(np.asarray(run()) - ours(*shape)()).max() < 1e-4
    benchmark.group = f"multi-head {shape}"
    settle()
    benchmark(run)


def our_step(batch: int, length: int, embed: int, heads: int, saved: bool = True) -> Callable[[], Any]:
    """Return forward and backward of our layer, which hands over what it has computed, or computes it twice."""
    fastattn.set_num_threads(cores())
    layer, x = MultiHeadAttention(embed, heads, rng=0), _input(batch, length, embed)

    def run() -> Any:
        out, *kept = layer(x, return_saved=True) if saved else (layer(x),)
        return layer.backward(out, kept[0] if kept else (x,))

    return run


def torchs_step(batch: int, length: int, embed: int, heads: int) -> Callable[[], Any]:
    """Return forward and backward of PyTorch's layer."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(cores())
    layer = torch.nn.MultiheadAttention(embed, heads, batch_first=True)
    state = MultiHeadAttention(embed, heads, rng=0).state_dict()
    layer.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    x = torch.from_numpy(_input(batch, length, embed)).requires_grad_()

    def run() -> Any:
        x.grad = None
        layer.zero_grad()
        out = layer(x, x, x, need_weights=False)[0]
        out.backward(out.detach())
        return (x.grad.numpy(),), {name: tensor.grad.numpy() for name, tensor in layer.named_parameters()}

    return run


STEPS: dict[str, Make] = {
    "fastattn": our_step,
    "fastattn, nothing handed over": partial(our_step, saved=False),
    "PyTorch": torchs_step,
}


@pytest.mark.parametrize("engine", STEPS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_multi_head_step(benchmark: Any, shape: tuple[int, int, int, int], engine: str) -> None:
    """A training step, but for what comes after the gradients."""
    run = STEPS[engine](*shape)
    (grad_x,), gradients = run()
    (exact,), exact_gradients = our_step(*shape)()
    assert np.abs(grad_x - exact).max() < 1e-4
    for name, gradient in gradients.items():
        assert np.abs(gradient - exact_gradients[name]).max() < 1e-4 * max(1, np.abs(exact_gradients[name]).max())
    benchmark.group = f"multi-head step {shape}"
    settle()
    benchmark(run)


@pytest.mark.parametrize("align", ["global", "local-m", "local-p"])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("queries", [1, 128])
def test_local(benchmark: Any, queries: int, keys: int, align: Any) -> None:
    """A decoder's step, or all of a short sentence at once, over longer and longer sources."""
    rng = np.random.default_rng(0)
    layer = LuongAttention(256, 256, "general", align, rng=0)
    query, key = (rng.standard_normal((4, length, 256), dtype=np.float32) for length in (queries, keys))
    benchmark.group = f"Luong, {queries} queries, {align}"
    benchmark.extra_info["keys"] = keys
    settle()
    benchmark(layer, query, key)
