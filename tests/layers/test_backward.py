"""Backward passes of layers: finite differences, what is promised of gradients, and layers that learn."""

from __future__ import annotations

import copy
import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from layer_cases import ALIGNMENTS, CASES, SCORES, any_case, check, everything, luong_case, strengthened
from strategies import LAYOUTS, laid_out

import fastattn
from fastattn import BahdanauAttention, LuongAttention, MultiHeadAttention
from fastattn.layers import windows

Array = np.ndarray[Any, Any]

every_variant = pytest.mark.parametrize(("score", "align"), list(itertools.product(SCORES, ALIGNMENTS)))
every_local = pytest.mark.parametrize("align", ["local-m", "local-p"])
every_case = pytest.mark.parametrize("case", CASES)


# -- finite differences ------------------------------------------------------------------------------------------------


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
