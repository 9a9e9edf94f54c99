"""Backward passes of layers: PyTorch's autograd of the papers' formulas, finite differences, and layers that learn."""

from __future__ import annotations

import copy
import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from strategies import LAYOUTS, laid_out
from tolerances import check_promise

import fastattn
from fastattn import BahdanauAttention, LuongAttention, MultiHeadAttention
from fastattn.layers import windows

Array = np.ndarray[Any, Any]

SCORES = ("dot", "general", "concat")
ALIGNMENTS = ("global", "local-m", "local-p")
every_variant = pytest.mark.parametrize(("score", "align"), list(itertools.product(SCORES, ALIGNMENTS)))
every_local = pytest.mark.parametrize("align", ["local-m", "local-p"])


def check(found: Any, exact: Any, dtype: Any = np.float64) -> None:
    """Assert that gradients have the shapes of the exact ones, and are as near to them as promised."""
    found, exact = tuple(found), tuple(exact)
    assert [one.shape for one in found] == [one.shape for one in exact]
    check_promise(found, exact, dtype)


def strengthened(layer: Any, factor: float = 8.0) -> Any:
    """Make parameters large: weights far from uniform, predicted positions all over the sentence."""
    for name, array in layer.state_dict().items():
        setattr(layer, name.replace(".", "_"), array * layer.dtype.type(factor))
    return layer


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

    ours: dict[str, Any] = {}
    their: dict[str, Any] = {}
    visible = rng.random((queries, keys)) < 0.6
    visible[:, 0] = True
    padding = np.arange(keys) < np.array([keys, 3, 5])[:, None]
    if mask in ("bool", "both"):
        ours["attn_mask"], their["attn_mask"] = visible, torch.from_numpy(~visible)
    if mask == "float":
        ours["attn_mask"] = added = rng.standard_normal((queries, keys))
        their["attn_mask"] = torch.from_numpy(added)
    if mask == "heads":
        ours["attn_mask"] = added = rng.standard_normal((batch, heads, queries, keys))
        their["attn_mask"] = torch.from_numpy(added.reshape(batch * heads, queries, keys))
    if mask in ("padding", "both"):
        ours["key_mask"], their["key_padding_mask"] = padding, torch.from_numpy(~padding)
    if mask == "causal":
        ours["is_causal"] = True
        their["attn_mask"] = torch.from_numpy(~np.tri(queries, keys, dtype=bool))

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


def torch_softmax(torch: Any, scores: Any, visible: Any) -> Any:
    """Return softmaxed scores; rows with nothing visible are 0."""
    least = torch.where(visible, scores, -1e30)
    parts = torch.exp(least - least.detach().amax(-1, keepdim=True)) * visible
    total = parts.sum(-1, keepdim=True)
    return parts / torch.where(total > 0, total, torch.ones_like(total))


def torch_luong(
    torch: Any, layer: LuongAttention, w: Any, q: Any, k: Any, v: Any, visible: Any, added: Any, t: Any, S: Any
) -> Any:
    """Evaluate section 3 of Luong's paper; the ends of a window are no function of p."""
    if layer.score == "dot":
        scores = q @ k.mT
    elif layer.score == "general":
        scores = q @ w["score_weight"] @ k.mT
    else:
        h = q[..., :, None, :].expand(*q.shape[:-1], k.shape[-2], -1)
        s = k[..., None, :, :].expand(*q.shape[:-1], *k.shape[-2:])
        scores = torch.tanh(torch.cat([h, s], dim=-1) @ w["score_weight"].T) @ w["score_vector"]
    j = torch.arange(k.shape[-2], dtype=torch.float64)
    p = t[..., None]
    if layer.align == "local-p":
        p = S * torch.sigmoid(torch.tanh(q @ w["position_weight"].T) @ w["position_vector"])[..., None]
    if layer.align != "global":
        visible = visible & ((j - p.detach()).abs() <= layer.window)
    weights = torch_softmax(torch, scores + added, visible)
    if layer.align == "local-p":
        weights = weights * torch.exp(-((j - p) ** 2) / (2 * (layer.window / 2) ** 2))
    return weights @ v


def luong_case(score: str, align: str, own_value: bool, mask: str | None) -> tuple[LuongAttention, Any, Any, Array]:
    """Return a layer, inputs, options and the gradient of the result, of five sentences, one of them empty."""
    rng = np.random.default_rng(0)
    key_dim = 6 if score == "dot" else 5
    options: dict[str, Any] = {"value_dim": 7} if own_value else {}
    layer = strengthened(
        LuongAttention(6, key_dim, score, align, window=4, hidden_dim=9, rng=rng, dtype=np.float64, **options)  # type: ignore[arg-type]
    )
    query, key = rng.standard_normal((5, 40, 6)), rng.standard_normal((5, 60, key_dim))
    inputs = (query, key, rng.standard_normal((5, 60, 7))) if own_value else (query, key)
    call: dict[str, Any] = {"key_lengths": np.array([60, 0, 3, 17, 53])}
    if align == "local-m" and own_value:
        call["positions"] = rng.uniform(-6, 66, (5, 40))
    if mask is not None:
        seen = rng.random((5, 40, 60)) < 0.7
        seen[0, 3] = False
        call["attn_mask"] = seen if mask == "bool" else np.where(seen, rng.standard_normal(seen.shape), -np.inf)
    return layer, inputs, call, rng.standard_normal((5, 40, layer.value_dim))


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
    q, k, v = (tensors + tensors[-1:])[:3]
    inside = (q @ w["query_weight"].T + w["bias"])[:, :, None] + (k @ w["key_weight"].T)[:, None]
    context = torch_softmax(torch, torch.tanh(inside) @ w["weight"] + added, visible) @ v
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


# -- finite differences ------------------------------------------------------------------------------------------------

CASES: dict[str, Any] = {
    "multi-head, grouped": lambda rng: (MultiHeadAttention(12, 6, num_kv_heads=2, kdim=5, rng=rng, dtype=np.float64),
                                        [(3, 7, 12), (9, 5), (3, 9, 12)], {"is_causal": "bottom-right"}),
    "multi-head, self": lambda rng: (MultiHeadAttention(12, 3, rng=rng, dtype=np.float64), [(2, 7, 12)],
                                     {"key_mask": np.arange(7) < [[7], [3]]}),
    "bahdanau": lambda rng: (BahdanauAttention(4, 5, 6, rng=rng, dtype=np.float64), [(3, 7, 4), (9, 5)],
                             {"attn_mask": rng.standard_normal((7, 9))}),
} | {
    f"luong, {score}, {align}": lambda rng, score=score, align=align: (
        strengthened(LuongAttention(5, 5, score, align, window=3, hidden_dim=4, rng=rng, dtype=np.float64)),
        [(7, 5), (3, 30, 5)], {"key_lengths": [30, 0, 11]})
    for score, align in itertools.product(SCORES, ALIGNMENTS)
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_finite_differences(case: str) -> None:
    """The derivative along a direction in which all inputs and parameters move; some inputs broadcast."""
    rng = np.random.default_rng(1)
    layer, shapes, call = CASES[case](rng)
    inputs = tuple(rng.standard_normal(shape) for shape in shapes)
    grad_out = rng.standard_normal(layer(*inputs, **call).shape)
    directions = [rng.standard_normal(shape) for shape in shapes]
    state = layer.state_dict()
    state_directions = {name: rng.standard_normal(array.shape) for name, array in state.items()}

    def moved(step: float) -> tuple[float, Array]:
        other = copy.deepcopy(layer)
        other.load_state_dict({name: array + step * state_directions[name] for name, array in state.items()})
        arrays = (array + step * direction for array, direction in zip(inputs, directions, strict=True))
        out, weights = other(*arrays, **call, return_weights=True)
        return float((out * grad_out).sum()), weights > 0

    grad_inputs, gradients = layer.backward(grad_out, inputs, **call)
    slope = sum(float((g * d).sum()) for g, d in zip(grad_inputs, directions, strict=True))
    slope += sum(float((gradients[name] * d).sum()) for name, d in state_directions.items())
    step = 1e-5
    (above, seen), (below, seen_below) = moved(step), moved(-step)
    assert (seen == seen_below).all(), "a window has jumped: take another seed"
    assert abs(slope) > 0.1
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-6)


# -- what is promised --------------------------------------------------------------------------------------------------


def any_case(case: str, dtype: Any = np.float64) -> tuple[Any, tuple[Array, ...], dict[str, Any], Array]:
    """Return a layer, inputs, options and the gradient of the result."""
    rng = np.random.default_rng(1)
    layer, shapes, call = CASES[case](rng)
    if dtype != np.float64:
        narrow = type(layer)(**{name: getattr(layer, name) for name in layer.arguments}, dtype=dtype)
        narrow.load_state_dict(layer.state_dict())
        layer = narrow
    inputs = tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return layer, inputs, call, rng.standard_normal(layer(*inputs, **call).shape).astype(dtype)


every_case = pytest.mark.parametrize("case", CASES)


def everything(results: Any) -> list[Array]:
    """Return all gradients of a backward pass in one list."""
    grad_inputs, gradients = results
    return [*grad_inputs, *gradients.values()]


@every_case
def test_float32(case: str) -> None:
    layer, inputs, call, grad_out = any_case(case, np.float32)
    wide = type(layer)(**{name: getattr(layer, name) for name in layer.arguments}, dtype=np.float64)
    wide.load_state_dict(layer.state_dict())
    found = everything(layer.backward(grad_out, inputs, **call))
    assert all(gradient.dtype == np.float32 for gradient in found)
    check(found, everything(wide.backward(grad_out, inputs, **call)), np.float32)


@every_case
def test_gradients_have_the_dtype_of_what_they_belong_to(case: str) -> None:
    layer, inputs, call, grad_out = any_case(case)
    exact = everything(layer.backward(grad_out, tuple(array.astype(np.float32) for array in inputs), **call))
    assert all(gradient.dtype == np.float32 for gradient in exact[: len(inputs)])
    assert all(gradient.dtype == np.float64 for gradient in exact[len(inputs) :])
    whole = tuple(np.sign(array).astype(int) for array in inputs)
    found = everything(layer.backward(grad_out.tolist(), tuple(array.tolist() for array in whole), **call))
    assert all(gradient.dtype == np.float64 for gradient in found)
    check(found, everything(layer.backward(grad_out, tuple(array.astype(float) for array in whole), **call)))


@every_case
def test_inputs_stay_as_they_are_and_may_lie_anyhow(case: str) -> None:
    layer, inputs, call, grad_out = any_case(case, np.float32)
    before = copy.deepcopy((inputs, grad_out, layer.state_dict(), call))
    wanted = everything(layer.backward(grad_out, inputs, **call))
    for layout in LAYOUTS:
        arrays = tuple(laid_out(array, layout) for array in inputs)
        found = everything(layer.backward(laid_out(grad_out, layout), arrays, **call))
        assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True)), layout
    after = inputs, grad_out, layer.state_dict(), call
    for one, other in zip(before, after, strict=True):
        np.testing.assert_equal(one, other)


@every_case
def test_the_same_bits_at_any_thread_count(case: str) -> None:
    layer, inputs, call, grad_out = any_case(case, np.float32)
    with fastattn.num_threads(1):
        alone = everything(layer.backward(grad_out, inputs, **call))
    with fastattn.num_threads(3):
        found = everything(layer.backward(grad_out, inputs, **call))
    assert all(np.array_equal(one, other) for one, other in zip(found, alone, strict=True))


@every_case
def test_what_a_call_has_saved_is_not_computed_again(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs, call, grad_out = any_case(case)
    out, weights, saved = layer(*inputs, **call, return_weights=True, return_saved=True)
    assert np.array_equal(out, layer(*inputs, **call))
    assert np.array_equal(weights, layer(*inputs, **call, return_weights=True)[1])
    wanted = everything(layer.backward(grad_out, inputs, **call))
    monkeypatch.setattr(type(layer), "_attend", None)
    found = everything(layer.backward(grad_out, saved))
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert saved.weights is None


@every_case
def test_a_broadcast_input_has_the_sum(case: str) -> None:
    layer, inputs, call, grad_out = any_case(case)
    batch = grad_out.shape[:-2]
    whole = tuple(np.broadcast_to(array, (*batch, *array.shape[-2:])) for array in inputs)
    assert len(inputs) == 1 or any(one.ndim < other.ndim for one, other in zip(inputs, whole, strict=True))
    exact, want = layer.backward(grad_out, whole, **call)
    found, gradients = layer.backward(grad_out, inputs, **call)
    assert [one.shape for one in found] == [one.shape for one in inputs]
    sums = [one if one.ndim == array.ndim else one.sum(axis=0) for one, array in zip(exact, inputs, strict=True)]
    check(found, sums)
    check(gradients.values(), want.values())


@every_case
def test_odd_values_are_no_reason_to_warn(case: str) -> None:
    layer, inputs, call, grad_out = any_case(case, np.float32)
    rng, odd = np.random.default_rng(0), np.array([np.nan, np.inf, -np.inf, 3e38, 1e-45, 0], np.float32)
    inputs = tuple(rng.choice(odd, array.shape) for array in inputs)
    with np.errstate(all="raise"):
        layer.backward(rng.choice(odd, grad_out.shape), inputs, **call)
        strengthened(layer, 1e30).backward(grad_out * 1e30, inputs, **call)


@every_case
def test_no_gradient_gives_none(case: str) -> None:
    layer, inputs, call, grad_out = any_case(case)
    assert not any(gradient.any() for gradient in everything(layer.backward(np.zeros_like(grad_out), inputs, **call)))


# -- what may not be looked at -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("attn_mask", [None, np.ones((5, 9), bool), np.zeros((5, 9))], ids=["none", "bool", "float"])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}], ids=["packed", "grouped"])
def test_padding_does_not_leak(options: Any, attn_mask: Array | None, bad: float) -> None:
    rng = np.random.default_rng(0)
    layer = MultiHeadAttention(8, 2, **options, rng=rng)
    query, memory = rng.standard_normal((2, 5, 8), dtype=np.float32), rng.standard_normal((2, 9, 8), dtype=np.float32)
    grad_out = rng.standard_normal((2, 5, 8), dtype=np.float32)
    call = {"attn_mask": attn_mask, "key_mask": np.arange(9) < [[9], [3]]}
    memory[1, 3:] = 0
    clean = everything(layer.backward(grad_out, (query, memory), **call))
    memory[1, 3:] = bad
    dirty = everything(layer.backward(grad_out, (query, memory), **call))
    check(dirty, clean, np.float32)
    assert not dirty[1][1, 3:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bahdanaus_padding_does_not_leak(bad: float) -> None:
    rng = np.random.default_rng(0)
    layer = BahdanauAttention(4, 5, 6, rng=rng, dtype=np.float64)
    query, key, grad_out = rng.standard_normal((7, 4)), rng.standard_normal((9, 5)), rng.standard_normal((7, 5))
    mask = np.arange(9) < 4
    key[4:] = 0
    clean = everything(layer.backward(grad_out, (query, key), mask))
    key[4:] = bad
    check(everything(layer.backward(grad_out, (query, key), mask)), clean)


@every_variant
def test_what_luong_does_not_look_at_has_no_gradient_and_leaks_nothing(score: str, align: str) -> None:
    rng = np.random.default_rng(0)
    layer = strengthened(LuongAttention(4, 4, score, align, window=3, rng=rng, dtype=np.float64))  # type: ignore[arg-type]
    query, key, grad_out = (
        rng.standard_normal((2, 6, 4)),
        rng.standard_normal((2, 60, 4)),
        rng.standard_normal((2, 6, 4)),
    )
    call = {"key_lengths": [60, 25]}
    unseen = ~(layer(query, key, **call, return_weights=True)[1] > 0).any(axis=1)
    assert unseen.sum() >= 35
    clean = everything(layer.backward(grad_out, (query, key), **call))
    assert not clean[1][unseen].any()
    assert clean[1][~unseen].all()
    key[unseen] = np.nan
    check(everything(layer.backward(grad_out, (query, key), **call)), clean)


def test_a_query_without_a_key_moves_the_last_bias_alone() -> None:
    layer = MultiHeadAttention(8, 2, rng=0)
    x = np.random.default_rng(1).standard_normal((2, 5, 8), dtype=np.float32)
    (grad_x,), gradients = layer.backward(np.ones((2, 5, 8)), (x,), key_mask=[[False] * 5] * 2)
    assert not grad_x.any()
    assert [name for name, gradient in gradients.items() if gradient.any()] == ["out_proj.bias"]
    assert (gradients["out_proj.bias"] == 10).all()


@every_variant
def test_an_empty_sentence_has_no_gradient(score: str, align: str) -> None:
    layer = LuongAttention(4, 4, score, align, rng=0)  # type: ignore[arg-type]
    query, key = np.random.default_rng(0).standard_normal((2, 3, 5, 4), dtype=np.float32)
    assert not any(one.any() for one in everything(layer.backward(query, (query, key), key_lengths=[0, 0, 0])))
    hidden = np.zeros((3, 5, 5), bool)
    assert not any(one.any() for one in everything(layer.backward(query, (query, key), hidden)))


def test_a_state_that_the_loss_does_not_ask_for_may_be_anything() -> None:
    layer = LuongAttention(4, 4, rng=0, dtype=np.float64)
    context, query, grad_state = np.random.default_rng(0).standard_normal((3, 7, 4))
    grad_state[2] = 0
    clean = everything(layer.attentional_backward(grad_state, (context, query)))
    context[2] = np.nan
    check(everything(layer.attentional_backward(grad_state, (context, query))), clean)


@every_local
def test_a_query_with_nan_spoils_its_own_gradient(align: str) -> None:
    layer = LuongAttention(4, 4, "dot", align, window=3, rng=0, dtype=np.float64)  # type: ignore[arg-type]
    query, key, grad_out = np.random.default_rng(0).standard_normal((3, 2, 20, 4))
    call = {"key_lengths": [20, 0]}
    (clean, _), _ = layer.backward(grad_out, (query, key), **call)
    query[:, 2, 1] = np.nan
    (dirty, _), _ = layer.backward(grad_out, (query, key), **call)
    others = np.arange(20) != 2
    check([dirty[:, others]], [clean[:, others]])
    assert np.isnan(dirty[0, 2]).any()
    assert not dirty[1].any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("empty", ["queries", "keys"])
def test_no_queries_and_no_keys(case: str, empty: str) -> None:
    layer, inputs, _, grad_out = any_case(case)
    at = 0 if empty == "queries" or len(inputs) == 1 else 1
    inputs = tuple(array[..., :0, :] if (i == at or (i > at == 1)) else array for i, array in enumerate(inputs))
    if at == 0:
        grad_out = grad_out[..., :0, :]
    grad_inputs, gradients = layer.backward(grad_out, inputs)
    assert [one.shape for one in grad_inputs] == [one.shape for one in inputs]
    assert not any(one.any() for one in grad_inputs)
    assert [name for name, one in gradients.items() if one.any()] == ["out_proj.bias"] * (
        isinstance(layer, MultiHeadAttention) and at == 1
    )


# -- windows -----------------------------------------------------------------------------------------------------------


@every_local
@pytest.mark.parametrize("score", SCORES)
def test_the_cost_of_a_window_does_not_grow_with_the_keys(score: str, align: str) -> None:
    """Its memory, but for the gradient of the keys, which is as large as they are."""
    layer = LuongAttention(4, 4, score, align, window=10, rng=0)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    query, grad_out = rng.standard_normal((2, 3, 100, 4), dtype=np.float32)

    def peak_beside_the_gradient(keys: int) -> int:
        key = np.broadcast_to(rng.standard_normal(4, dtype=np.float32), (3, keys, 4))
        positions = {"positions": np.linspace(0, keys, 100)} if align == "local-m" else {}
        layer.backward(grad_out, (query, key), **positions)  # what is compiled, or loaded, is so by now
        tracemalloc.start()
        try:
            (_, grad_key), _ = layer.backward(grad_out, (query, key), **positions)
            return tracemalloc.get_traced_memory()[1] - grad_key.nbytes
        finally:
            tracemalloc.stop()

    # more keys, and so fewer windows that share a slab
    assert peak_beside_the_gradient(2_000_000) < 4 * peak_beside_the_gradient(400) + (1 << 20) < 16 << 20


@every_local
@pytest.mark.parametrize("score", SCORES)
def test_chunks_and_blocks_change_nothing(score: str, align: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs, call, grad_out = luong_case(score, align, False, "bool")
    whole = everything(layer.backward(grad_out, inputs, **call))
    monkeypatch.setattr(windows, "CHUNK_BYTES", 1)
    check(everything(layer.backward(grad_out, inputs, **call)), whole)
    monkeypatch.setattr(windows, "REACH", 1)
    check(everything(layer.backward(grad_out, inputs, **call)), whole)


def test_queries_at_one_place_all_count() -> None:
    """Blocks that are filled up with a query that is there already."""
    layer = LuongAttention(4, 4, "dot", "local-m", window=2, rng=0, dtype=np.float64)
    query, key = np.ones((1, 3, 4)), np.ones((1, 9, 4))
    (_, _, grad_value), _ = layer.backward(np.ones((1, 3, 4)), (query, key, key), positions=[4, 4, 4])
    assert np.allclose(grad_value[0, :, 0], [0, 0, 0.6, 0.6, 0.6, 0.6, 0.6, 0, 0])


# -- arguments ---------------------------------------------------------------------------------------------------------

X, Y = np.zeros((2, 5, 8)), np.zeros((2, 5, 8), np.float32)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda mha, _: mha.backward(Y[0], (X,)), ValueError, "grad_out: shape .5, 8.; expected .2, 5, 8."),
        (lambda mha, _: mha.backward(Y + 1j, (X,)), TypeError, "grad_out: dtype complex"),
        (
            lambda mha, _: mha.backward(Y, X),
            TypeError,
            r"inputs: an array .*expected a tuple \(query\[, key\]\[, value",
        ),
        (lambda mha, _: mha.backward(Y, [X]), TypeError, "inputs: .* of type list"),
        (lambda mha, _: mha.backward(Y, ()), ValueError, "inputs: a tuple of length 0"),
        (lambda mha, _: mha.backward(Y, (X, X, X, None)), ValueError, "inputs: a tuple of length 4"),
        (lambda mha, _: mha.backward(Y, (None,)), TypeError, "inputs: None for query"),
        (lambda mha, _: mha.backward(Y, (X, None, X)), TypeError, "value: given without key"),
        (lambda mha, _: mha.backward(Y, (X[..., :7],)), ValueError, "query: shape .2, 5, 7."),
        (lambda mha, _: mha.backward(Y, (X,), key_mask=X), TypeError, "key_mask: dtype float64"),
        (lambda mha, _: mha.backward(Y, (X,), is_causal="up"), ValueError, "is_causal: 'up'"),
        (lambda mha, _: mha(X, return_saved=1), TypeError, "return_saved: 1"),
        (
            lambda mha, _: mha.backward(Y, mha(X, return_saved=True)[1], is_causal=True),
            TypeError,
            "is_causal: given besi",
        ),
        (lambda mha, saved: mha.backward(Y, saved), ValueError, "inputs: .* of another layer"),
    ],
)
def test_bad_calls_are_refused(make: Any, error: type[Exception], message: str) -> None:
    layer, other = MultiHeadAttention(8, 2, rng=0), MultiHeadAttention(8, 2, rng=0)
    with pytest.raises(error, match=message):
        make(layer, other(X, return_saved=True)[1])


def test_bad_calls_of_the_others_are_refused() -> None:
    bahdanau, luong = BahdanauAttention(8, 8, 3, rng=0), LuongAttention(8, 8, rng=0)
    for layer in (bahdanau, luong):
        with pytest.raises(
            ValueError, match=r"inputs: a tuple of length 1; expected a tuple \(query, key\[, value\]\)"
        ):
            layer.backward(Y, (X,))  # type: ignore[attr-defined]
        with pytest.raises(TypeError, match="inputs: None for key"):
            layer.backward(Y, (X, None))  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="grad_out: shape"):
            layer.backward(Y[:1], (X, X))  # type: ignore[attr-defined]
        with pytest.raises(TypeError, match="attn_mask: given besides"):
            layer.backward(Y, layer(X, X, return_saved=True)[1], True)  # type: ignore[operator, attr-defined]
    with pytest.raises(ValueError, match="projected_keys: shape .2, 5, 8.; expected .2, 5, 3."):
        bahdanau.backward(Y, (X, X), projected_keys=X)
    with pytest.raises(ValueError, match="grad_projected: shape .2, 5, 8.; expected .2, 5, 3."):
        bahdanau.project_keys_backward(Y, (X,))
    with pytest.raises(ValueError, match="positions: given, but align is 'global'"):
        luong.backward(Y, (X, X), positions=[0])
    with pytest.raises(ValueError, match="state: shape .2, 5, 1.; expected .2, 5, 8."):
        luong.attentional_backward(Y, (X, X), state=X[..., :1])
    with pytest.raises(ValueError, match=r"inputs: a tuple of length 1; expected a tuple \(context, query\)"):
        luong.attentional_backward(Y, (X,))  # type: ignore[arg-type]


# -- learning ----------------------------------------------------------------------------------------------------------


class Adam:
    """Kingma and Ba (2015), for the parameters of one layer."""

    def __init__(self, layer: Any, rate: float) -> None:
        self.layer, self.rate, self.step = layer, rate, 0
        self.m = {name: np.zeros_like(array) for name, array in layer.state_dict().items()}
        self.v = copy.deepcopy(self.m)

    def update(self, gradients: dict[str, Array]) -> None:
        """Take a step."""
        self.step += 1
        for name, gradient in gradients.items():
            self.m[name] = 0.9 * self.m[name] + 0.1 * gradient
            self.v[name] = 0.99 * self.v[name] + 0.01 * gradient**2
            mean, square = self.m[name] / (1 - 0.9**self.step), self.v[name] / (1 - 0.99**self.step)
            parameter = getattr(self.layer, name.replace(".", "_"))
            parameter -= self.rate * mean / (np.sqrt(square) + 1e-8)


def test_bahdanaus_attention_learns_to_copy_backwards() -> None:
    """Step t of the target wants the symbol at place L - 1 - t of the source: the layer has to find out."""
    rng, length, symbols = np.random.default_rng(0), 6, 8
    layer = BahdanauAttention(length, length + symbols, 16, rng=rng)
    states = np.eye(length, dtype=np.float32)
    adam = Adam(layer, 0.05)
    for _ in range(120):
        value = np.eye(symbols, dtype=np.float32)[rng.integers(0, symbols, (16, length))]
        key = np.concatenate([np.broadcast_to(states, (16, length, length)), value], axis=-1)
        context, saved = layer(states, key, value, return_saved=True)
        _, gradients = layer.backward(context - value[:, ::-1], saved)
        adam.update(gradients)
    value = np.eye(symbols, dtype=np.float32)[rng.integers(0, symbols, (50, length))]
    key = np.concatenate([np.broadcast_to(states, (50, length, length)), value], axis=-1)
    context, weights = layer(states, key, value, return_weights=True)
    assert (context.argmax(axis=-1) == value[:, ::-1].argmax(axis=-1)).all()
    assert weights[:, np.arange(length), length - 1 - np.arange(length)].min() > 0.8


def test_a_predicted_position_learns_where_to_look() -> None:
    """All sources score alike: what can be learned is p alone, so that the window's bell stands at the right place."""
    rng, length = np.random.default_rng(0), 24
    layer = LuongAttention(1, 4, "general", "local-p", window=6, value_dim=length, hidden_dim=16, rng=rng)
    layer.position_weight *= 10
    source, values = np.zeros((length, 4), np.float32), np.eye(length, dtype=np.float32)
    adam = Adam(layer, 0.03)

    def distance(place: Array) -> Array:
        center = layer._predict(place[:, None].astype(np.float32) / length - 0.5, np.array(length))
        return np.abs(center - place)

    places = np.arange(8, 17)
    before = distance(places).max()
    for _ in range(200):
        place = rng.integers(8, 17, 32)
        query = (place[:, None] / length - 0.5).astype(np.float32)
        context, saved = layer(query, source, values, return_saved=True)
        bell = np.exp(-((np.arange(length) - place[:, None]) ** 2) / (2 * 3.0**2)) / 13
        _, gradients = layer.backward((context - bell).astype(np.float32), saved)
        adam.update(gradients)
    assert before > 2
    assert distance(places).max() < 0.7


def test_multi_head_attention_learns_to_look_back() -> None:
    """Causal self-attention that tells the token before."""
    rng, length, tokens = np.random.default_rng(0), 10, 6
    layer = MultiHeadAttention(16, 2, rng=rng)
    places = np.broadcast_to(np.eye(length, dtype=np.float32), (32, length, length))
    adam = Adam(layer, 0.02)
    losses = []
    for _ in range(250):
        symbols = np.eye(tokens, dtype=np.float32)[rng.integers(0, tokens, (32, length))]
        x = np.concatenate([symbols, places], axis=-1)
        wanted = np.zeros_like(x)
        wanted[:, 1:, :tokens] = symbols[:, :-1]
        out, saved = layer(x, is_causal=True, return_saved=True)
        losses.append(float(((out - wanted) ** 2).mean()))
        _, gradients = layer.backward(out - wanted, saved)
        adam.update(gradients)
    assert losses[-1] < 0.1 * losses[0]
    assert (out[:, 1:, :tokens].argmax(-1) == symbols[:, :-1].argmax(-1)).mean() > 0.95
