"""Backward passes of layers against PyTorch's autograd: of its own layer, and of the papers' formulas written in it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from layer_cases import ALIGNMENTS, SCORES, check, luong_case, strengthened, torch_masks
from layer_torch import torch_bahdanau, torch_luong

from fastattn import BahdanauAttention, LuongAttention, MultiHeadAttention

Array = np.ndarray[Any, Any]

every_variant = pytest.mark.parametrize(("score", "align"), list(itertools.product(SCORES, ALIGNMENTS)))


# -- PyTorch, and the papers' formulas in it ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("q", {}),
        ("qk", {}),
        ("qkv", {}),
        ("qq", {}),
        ("qqq", {}),
        ("qqv", {}),
        ("qkv", {"kdim": 12}),
        ("qkv", {"vdim": 20}),
        ("qkv", {"kdim": 12, "vdim": 20}),
    ],
)
@pytest.mark.parametrize("mask", [None, "bool", "float", "heads", "padding", "both", "causal"])
def test_multi_head_attention_of_torch(form: str, options: dict[str, int], mask: str | None, bias: bool) -> None:
    torch = pytest.importorskip("torch")
    square = mask == "causal" or form in ("q", "qq", "qqq", "qqv")
    batch, queries, keys, embed, heads = 3, 9, 9 if square else 14, 24, 4
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(embed, heads, bias=bias, batch_first=True, dtype=torch.float64, **options)
    layer = MultiHeadAttention(embed, heads, bias=bias, dtype=np.float64, **options)
    layer.load_state_dict({name: tensor.detach() for name, tensor in theirs.named_parameters()})

    shapes = {"q": (batch, queries, embed), "k": (batch, keys, layer.kdim), "v": (batch, keys, layer.vdim)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    inputs = tuple(arrays[name] for name in form)
    tensors = [torch.tensor(array, requires_grad=True) for array in inputs]
    query, key, value = (tensors + tensors[-1:] * 2)[:3]

    ours, their = torch_masks(rng, mask, batch, heads, queries, keys)

    grad_out = rng.standard_normal((batch, queries, embed))
    theirs(query, key, value, **their)[0].backward(torch.from_numpy(grad_out))
    exact = [tensor.grad.numpy() for tensor in tensors]
    exact_parameters = [tensor.grad.numpy() for tensor in theirs.parameters()]

    grad_inputs, gradients = layer.backward(grad_out, inputs, **ours)
    assert list(gradients) == list(layer.state_dict()) == [name for name, _ in theirs.named_parameters()]
    check(grad_inputs, exact)
    check(gradients.values(), exact_parameters)
    _, saved = layer(*inputs, **ours, return_saved=True)
    again, gradients_again = layer.backward(grad_out, saved)
    for one, other in zip((*again, *gradients_again.values()), (*grad_inputs, *gradients.values()), strict=True):
        assert np.array_equal(one, other)


def test_grouped_heads_sum_the_gradients_of_repeated_ones() -> None:
    rng = np.random.default_rng(0)
    grouped = MultiHeadAttention(24, 6, num_kv_heads=2, dtype=np.float64, rng=rng)
    grouped.in_proj_bias = rng.standard_normal(40)
    whole = MultiHeadAttention(24, 6, dtype=np.float64, rng=rng)
    repeated = [
        np.repeat(w.reshape(2, 4, -1), 3, axis=0).reshape(24, -1)
        for w in (grouped.k_proj_weight, grouped.v_proj_weight)
    ]
    whole.in_proj_weight = np.concatenate([grouped.q_proj_weight, *repeated])
    of_query, *of_both = np.split(grouped.in_proj_bias, [24, 32])
    whole.in_proj_bias = np.concatenate([of_query, *(np.repeat(b.reshape(2, 4), 3, axis=0).ravel() for b in of_both)])
    whole.out_proj_weight = grouped.out_proj_weight
    x, grad_out = rng.standard_normal((2, 2, 7, 24))
    (exact,), want = whole.backward(grad_out, (x,), is_causal=True)
    (found,), gradients = grouped.backward(grad_out, (x,), is_causal=True)
    parts = np.split(want["in_proj_weight"], 3)
    sums = [part.reshape(2, 3, 4, -1).sum(axis=1).reshape(8, -1) for part in parts[1:]]
    check(
        [found, *(gradients[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))],
        [exact, parts[0], *sums],
    )
    biases = np.split(want["in_proj_bias"], 3)
    check(
        [gradients["in_proj_bias"]],
        [np.concatenate([biases[0], *(b.reshape(2, 3, 4).sum(axis=1).ravel() for b in biases[1:])])],
    )


@every_variant
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("own_value", [False, True], ids=["value is key", "own value"])
def test_luongs_formulas_in_torch(score: str, align: str, own_value: bool, mask: str | None) -> None:
    torch = pytest.importorskip("torch")
    layer, inputs, call, grad_out = luong_case(score, align, own_value, mask)
    tensors = [torch.tensor(array, requires_grad=True) for array in inputs]
    w = {name: torch.tensor(array, requires_grad=True) for name, array in layer.state_dict().items()}
    S = torch.from_numpy(call["key_lengths"])[:, None, None]
    visible = torch.arange(60) < S
    if mask == "bool":
        visible = visible & torch.from_numpy(call["attn_mask"])
    t = torch.from_numpy(call.get("positions", np.arange(40.0)[None]))
    added: Any = 0
    if mask == "float":
        seen = np.isfinite(call["attn_mask"])
        visible, added = visible & torch.from_numpy(seen), torch.from_numpy(np.where(seen, call["attn_mask"], 0))
    context = torch_luong(torch, layer, w, *tensors[:2], tensors[-1], visible, added, t, S)
    assert np.abs(context.detach().numpy() - layer(*inputs, **call)).max() <= 1e-12
    context.backward(torch.from_numpy(grad_out))

    grad_inputs, gradients = layer.backward(grad_out, inputs, **call)
    assert list(gradients) == list(layer.state_dict())
    check(grad_inputs, [tensor.grad.numpy() for tensor in tensors])
    check(gradients.values(), [np.zeros(one.shape) if one.grad is None else one.grad.numpy() for one in w.values()])


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("own_value", [False, True], ids=["value is key", "own value"])
def test_bahdanaus_formula_in_torch(own_value: bool, mask: str | None) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    layer = strengthened(BahdanauAttention(6, 5, 9, rng=rng, dtype=np.float64), 3.0)
    inputs = [rng.standard_normal((3, 8, 6)), rng.standard_normal((3, 20, 5))]
    if own_value:
        inputs.append(rng.standard_normal((3, 20, 4)))
    call: dict[str, Any] = {}
    visible, added = torch.ones(3, 8, 20, dtype=torch.bool), torch.zeros(3, 8, 20, dtype=torch.float64)
    if mask is not None:
        seen = rng.random((3, 8, 20)) < 0.5
        seen[1, 2] = False
        visible = torch.from_numpy(seen)
        call["attn_mask"] = seen
    if mask == "float":
        values = rng.standard_normal((3, 8, 20))
        added, call["attn_mask"] = torch.from_numpy(values), np.where(seen, values, -np.inf)
    tensors = [torch.tensor(array, requires_grad=True) for array in inputs]
    w = {name: torch.tensor(array, requires_grad=True) for name, array in layer.state_dict().items()}
    context = torch_bahdanau(torch, w, *tensors[:2], tensors[-1], visible, added)
    assert np.abs(context.detach().numpy() - layer(*inputs, **call)).max() <= 1e-12
    grad_out = rng.standard_normal(tuple(context.shape))
    context.backward(torch.from_numpy(grad_out))

    grad_inputs, gradients = layer.backward(grad_out, tuple(inputs), **call)
    assert list(gradients) == list(layer.state_dict())
    check(grad_inputs, [tensor.grad.numpy() for tensor in tensors])
    check(gradients.values(), [one.grad.numpy() for one in w.values()])

    # the same in two steps: the keys projected once
    projected = layer.project_keys(inputs[1])
    (*own, through), apart = layer.backward(grad_out, tuple(inputs), **call, projected_keys=projected)
    assert not apart["key_weight"].any()
    (more,), of_keys = layer.project_keys_backward(through, (inputs[1],))
    own[1] += more
    check(own, grad_inputs)
    check((apart | of_keys).values(), gradients.values())


@pytest.mark.parametrize(("context_shape", "query_shape"), [((2, 7), (2, 7)), ((7,), (2, 7)), ((2, 1), (7,))])
def test_the_attentional_state(context_shape: Any, query_shape: Any) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    layer = strengthened(LuongAttention(6, 5, value_dim=4, hidden_dim=3, rng=rng, dtype=np.float64))
    inputs = rng.standard_normal((*context_shape, 4)), rng.standard_normal((*query_shape, 6))
    tensors = [torch.tensor(array, requires_grad=True) for array in inputs]
    weight = torch.tensor(layer.combine_weight, requires_grad=True)
    both = [tensor.expand(2, 7, -1) for tensor in tensors]
    state = torch.tanh(torch.cat(both, dim=-1) @ weight.T)
    grad_state = rng.standard_normal((2, 7, 3))
    state.backward(torch.from_numpy(grad_state))

    for known in (None, layer.attentional(*inputs)):
        grad_inputs, gradients = layer.attentional_backward(grad_state, inputs, state=known)
        assert list(gradients) == ["combine_weight"]
        check(grad_inputs, [tensor.grad.numpy() for tensor in tensors])
        check(gradients.values(), [weight.grad.numpy()])
