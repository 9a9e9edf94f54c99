"""What does fastattn bring to models that are trained in PyTorch, against its own attention ("sdpa")?

Two layers of a model stand for all of them: layers are alike, and so is the ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import fastattn
from fastattn.bench.peers import cores

#: (B, L): short texts in a batch, and one longer text.
SHAPES = [(8, 128), (4, 512), (1, 1024)]
ROUNDS = 5


def _models(kind: str) -> list[Any]:
    """Return two layers of a BERT of base size, or of a small GPT-2, with sdpa and with fastattn."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from fastattn.integrations.transformers import register

    register()
    torch.set_num_threads(cores())
    fastattn.set_num_threads(cores())
    models = []
    for implementation in ("sdpa", "fastattn"):
        torch.manual_seed(0)
        if kind == "BERT":
            config = transformers.BertConfig(num_hidden_layers=2, max_position_embeddings=1024)
            model = transformers.AutoModel.from_config(config, attn_implementation=implementation)
        else:
            config = transformers.GPT2Config(n_layer=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        models.append(model)
    return models


def _forward(model: Any, tokens: Any) -> Callable[[], object]:
    import torch

    model.eval()

    def run() -> object:
        with torch.no_grad():
            return model(tokens)

    return run


def _step(model: Any, tokens: Any) -> Callable[[], object]:
    model.train()

    def run() -> None:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encoder(benchmark: Any, alternate: Any, shape: tuple[int, int]) -> None:
    """The forward pass of two layers of BERT, base size."""
    models = _models("BERT")
    import torch

    tokens = torch.randint(0, 1000, shape)
    benchmark.group = f"BERT, two layers, {shape}"
    theirs, ours = [_forward(model, tokens) for model in models]
    alternate(ours, theirs, "sdpa", ROUNDS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_step(benchmark: Any, alternate: Any, shape: tuple[int, int]) -> None:
    """Forward and backward pass of two layers of a small GPT-2, with its embedding and loss."""
    models = _models("GPT-2")
    import torch

    tokens = torch.randint(0, 1000, shape)
    benchmark.group = f"GPT-2, two layers, a training step, {shape}"
    theirs, ours = [_step(model, tokens) for model in models]
    alternate(ours, theirs, "sdpa", ROUNDS)
