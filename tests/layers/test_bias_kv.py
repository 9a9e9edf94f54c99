"""`bias_kv`: one more key and value behind the projections, against PyTorch's `add_bias_kv` and the formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layer_cases import torch_masks

from fastattn import MultiHeadAttention
from fastattn.layers.reference import multi_head_attention

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"is_causal": "bottom-right"},
    {"key_lengths": [0, 5]},
    {"window": (1, 0), "query_offset": [0, -20]},
    {"softcap": 0.5, "attn_mask": np.linspace(-3, 3, 63).reshape(7, 9)},
    {"key_mask": np.arange(9) < 4, "attn_mask": np.arange(63).reshape(7, 9) % 3 > 0},
    {"alibi_slopes": [0.5, 0.1, 2.0, 0.0], "is_causal": True},
)


def layer_of(**options: Any) -> MultiHeadAttention:
    """Return a layer of float64 none of whose parameters are 0."""
    rng = np.random.default_rng(0)
    layer = MultiHeadAttention(24, 4, bias_kv=True, dtype=np.float64, **options)
    layer.load_state_dict({name: rng.normal(0, 0.4, each.shape) for name, each in layer.state_dict().items()})
    return layer


@pytest.mark.parametrize(
    ("form", "options"), [("q", {}), ("qk", {}), ("qkv", {}), ("qkv", {"kdim": 12, "vdim": 20})], ids=str
)
@pytest.mark.parametrize("mask", [None, "bool", "float", "heads", "padding", "both", "causal"])
def test_torch_computes_the_same(form: str, mask: str | None, options: dict[str, int]) -> None:
    torch = pytest.importorskip("torch")
    batch, queries, keys = 3, 9, 9 if form == "q" or mask == "causal" else 14
    torch.manual_seed(0)
    named: Any = {"batch_first": True, "dtype": torch.float64, "add_bias_kv": True}
    theirs = torch.nn.MultiheadAttention(24, 4, **named, **options)
    layer = MultiHeadAttention(24, 4, dtype=np.float64, bias_kv=True, **options)
    layer.load_state_dict({name: tensor.detach() for name, tensor in theirs.named_parameters()})
    assert list(layer.state_dict()) == list(theirs.state_dict())
    rng = np.random.default_rng(0)
    shapes = {"q": (batch, queries, 24), "k": (batch, keys, layer.kdim), "v": (batch, keys, layer.vdim)}
    inputs = tuple(rng.standard_normal(shapes[name]) for name in form)
    tensors = [torch.tensor(array, requires_grad=True) for array in inputs]
    query, key, value = (tensors + tensors[-1:] * 2)[:3]
    ours, their = torch_masks(rng, mask, batch, 4, queries, keys)

    out, weights, saved = layer(*inputs, **ours, return_weights=True, return_saved=True)
    their_out, their_weights = theirs(query, key, value, **their, average_attn_weights=False)
    assert weights.shape == (batch, 4, queries, keys + 1)
    assert np.abs(out - their_out.detach().numpy()).max() <= 1e-13
    assert np.abs(weights - their_weights.detach().numpy()).max() <= 1e-13

    grad_out = rng.standard_normal(out.shape)
    their_out.backward(torch.from_numpy(grad_out))
    for given, rest in ((inputs, ours), (saved, {})):
        grad_inputs, gradients = layer.backward(grad_out, given, **rest)
        assert list(gradients) == [name for name, _ in theirs.named_parameters()]
        for found, exact in zip((*grad_inputs, *gradients.values()), (*tensors, *theirs.parameters()), strict=True):
            assert np.abs(found - exact.grad.numpy()).max() <= 1e-11


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_formula(options: dict[str, Any], kv_heads: int, dtype: Any) -> None:
    layer = layer_of(num_kv_heads=kv_heads)
    rng = np.random.default_rng(1)
    query, key = rng.standard_normal((2, 7, 24)).astype(dtype), rng.standard_normal((2, 9, 24)).astype(dtype)
    single = MultiHeadAttention(24, 4, bias_kv=True, num_kv_heads=kv_heads, dtype=dtype)
    single.load_state_dict(layer.state_dict())
    out, weights = single(query, key, **options, return_weights=True)
    exact, exact_weights = multi_head_attention(single, query, key, **options)
    assert out.dtype == weights.dtype == dtype
    bound = 200 * float(np.finfo(dtype).eps)
    assert np.abs(out - exact).max() <= bound
    assert np.abs(weights - exact_weights).max() <= bound
    assert np.abs(weights.sum(-1) - 1).max() <= bound  # every query looks at one key at least


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_small_steps(options: dict[str, Any]) -> None:
    layer = layer_of()
    rng = np.random.default_rng(1)
    query, key, grad_out = (rng.standard_normal(shape) for shape in ((2, 7, 24), (2, 9, 24), (2, 7, 24)))
    (grad_query, grad_key), gradients = layer.backward(grad_out, (query, key), **options)
    state = layer.state_dict()
    for name, own in gradients.items():
        step = rng.standard_normal(own.shape) * 1e-5
        ends = []
        for sign in (1, -1):
            layer.load_state_dict({**state, name: state[name] + sign * step})
            ends.append((layer(query, key, **options) * grad_out).sum())
        assert abs((ends[0] - ends[1]) / 2 - (own * step).sum()) <= 1e-9, name
    layer.load_state_dict(state)
    for own, array in ((grad_query, query), (grad_key, key)):
        step = rng.standard_normal(own.shape) * 1e-5
        ends = [
            (layer(*(x + sign * step if x is array else x for x in (query, key)), **options) * grad_out).sum()
            for sign in (1, -1)
        ]
        assert abs((ends[0] - ends[1]) / 2 - (own * step).sum()) <= 1e-9


def test_queries_without_a_batch_meet_keys_with_one() -> None:
    layer = layer_of()
    rng = np.random.default_rng(1)
    query, key = rng.standard_normal((7, 24)), rng.standard_normal((3, 9, 24))
    out = layer(query, key)
    whole = np.broadcast_to(query, (3, 7, 24))
    assert np.abs(out - layer(whole, key)).max() <= 1e-14
    (grad_query, _), gradients = layer.backward(out, (query, key))
    (grads, _), wanted = layer.backward(out, (whole, key))
    assert np.abs(grad_query - grads.sum(0)).max() <= 1e-12
    assert np.abs(gradients["bias_k"] - wanted["bias_k"]).max() <= 1e-12


def test_no_key_but_this_one() -> None:
    layer = layer_of()
    out, weights = layer(np.ones((2, 3, 24)), np.ones((2, 0, 24)), return_weights=True)
    assert (weights == 1).all()
    assert weights.shape == (2, 4, 3, 1)
    value = layer.bias_v.reshape(24) @ layer.out_proj_weight.T + layer.out_proj_bias
    assert np.abs(out - value).max() <= 1e-14


def test_parameters_start_as_those_of_torch() -> None:
    layer = MultiHeadAttention(256, 4, bias_kv=True, rng=0)
    for name in ("bias_k", "bias_v"):
        parameter = getattr(layer, name)
        assert parameter.shape == (1, 1, 256)
        assert 0.8 / 16 < parameter.std() < 1.2 / 16
    assert MultiHeadAttention(8, 2).bias_k is None
    with pytest.raises(TypeError, match="bias_kv: 1"):
        MultiHeadAttention(8, 2, bias_kv=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without 'bias_k', 'bias_v'"):
        layer.load_state_dict(MultiHeadAttention(256, 4).state_dict())
