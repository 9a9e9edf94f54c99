"""Gradients by name, and those of what query heads have of their own: sinks and slopes of ALiBi."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Call, calls, numbers

import fastattn
from fastattn.call.shapes import describe

Array = np.ndarray[Any, Any]
FEW = max(10, settings().max_examples // 4)
DTYPES = (np.float32, np.float64)
USUAL = ("query", "key", "value")


def inputs(*shapes: tuple[int, ...], dtype: Any = np.float64, seed: int = 0) -> list[Array]:
    """Return normally distributed arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return [numbers(rng, shape, dtype) for shape in shapes]


def gradients(
    grads: Any,
    grad_out: Array,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    *,
    backend: Any = None,
    **given: Any,
) -> dict[str, Array]:
    """Return the gradients with these names, after a forward pass."""
    options = {name: option for name, option in given.items() if name != "grad_lse"}
    out, lse = fastattn.attention(query, key, value, mask, **options, return_lse=True)
    arrays = (grad_out, query, key, value, out, lse, mask)
    return dict(zip(grads, fastattn.attention_backward(*arrays, **given, grads=grads, backend=backend), strict=True))


# -- by name -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_come_in_the_order_of_their_names(backend: str) -> None:
    grad_out, query, key, value, bias = inputs((2, 3, 70, 8), (2, 3, 70, 8), (2, 3, 90, 8), (2, 3, 90, 8), (70, 90))
    options: dict[str, Any] = {"sinks": np.zeros(3), "alibi_slopes": np.full(3, 0.25), "backend": backend}
    names = ("sinks", "attn_mask", "value", "alibi_slopes", "query", "key")
    found = gradients(names, grad_out, query, key, value, bias, **options)
    assert [array.shape for array in found.values()] == [(3,), (70, 90), value.shape, (3,), query.shape, key.shape]
    for some in ((), ["key"], ("sinks",), ("alibi_slopes", "query"), ("attn_mask",), USUAL):
        each = gradients(some, grad_out, query, key, value, bias, **options)
        for name, array in each.items():
            assert array.tobytes() == found[name].tobytes()


def test_without_names_all_is_as_it_was() -> None:
    grad_out, query, key, value, bias = inputs((70, 8), (70, 8), (90, 8), (90, 8), (70, 90))
    out, lse = fastattn.attention(query, key, value, bias, return_lse=True)
    for backend in ("cpu", "reference"):
        call: Any = (grad_out, query, key, value, out, lse, bias)
        plain = fastattn.attention_backward(*call, grad_mask=True, backend=backend)
        named = fastattn.attention_backward(*call, grads=(*USUAL, "attn_mask"), backend=backend)
        assert [array.tobytes() for array in plain] == [array.tobytes() for array in named]
        assert len(fastattn.attention_backward(*call, backend=backend)) == 3


REFUSED: list[tuple[type[Exception], str, Any]] = [
    (ValueError, "'bias' is among them; expected some of 'query', 'key', 'value', 'attn_mask'", ("bias",)),
    (ValueError, "'weight' is among them", ("weight",)),
    (ValueError, "'key' more than once", ("key", "query", "key")),
    (ValueError, "'sinks', but the call has none", ("sinks",)),
    (ValueError, "'alibi_slopes', but the call has none", ("query", "alibi_slopes")),
    (TypeError, "'query' of type str; expected some of", "query"),
    (TypeError, "expected some of", (1,)),
    (TypeError, "expected some of", True),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("kind", "message", "names"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_names_that_are_refused(backend: str, kind: Any, message: str, names: Any) -> None:
    query, key, value = inputs((5, 4), (6, 4), (6, 4))
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    with pytest.raises(kind, match=f"^grads: .*{message}"):
        fastattn.attention_backward(out, query, key, value, out, lse, grads=names, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masks_that_have_no_gradient(backend: str) -> None:
    query, key, value = inputs((5, 4), (6, 4), (6, 4))
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    call: Any = (out, query, key, value, out, lse)
    with pytest.raises(ValueError, match="^grads: 'attn_mask', but the call has none"):
        fastattn.attention_backward(*call, grads=("attn_mask",), backend=backend)
    for mask in (np.ones((5, 6), bool), (None, np.ones(6, bool))):
        with pytest.raises((TypeError, ValueError), match="^grads: 'attn_mask'"):
            fastattn.attention_backward(*call, mask, grads=("attn_mask",), backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^grads: given together with grad_mask=True"):
        fastattn.attention_backward(*call, np.zeros((5, 6)), grads=("key",), grad_mask=True, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_of_additive_attention_by_name(backend: str) -> None:
    grad_out, query, key, value = inputs((2, 30, 8), (2, 30, 8), (2, 40, 8), (2, 40, 8))
    weight, options = np.ones(8), {"sinks": np.zeros((2,)), "alibi_slopes": np.array(0.25)}
    out, lse = fastattn.additive_attention(query, key, value, weight, **options, return_lse=True)
    call: Any = (grad_out, query, key, value, weight, out, lse)
    names = ("sinks", "weight", "alibi_slopes", "query")
    found = fastattn.additive_attention_backward(*call, **options, grads=names, backend=backend)
    assert [array.shape for array in found] == [(2,), (8,), (), query.shape]
    plain = fastattn.additive_attention_backward(*call, **options, backend=backend)
    assert found[1].tobytes() == plain[3].tobytes()
    with pytest.raises(ValueError, match="^grads: 'attn_mask', but the call has none"):
        fastattn.additive_attention_backward(*call, **options, grads=("attn_mask",), backend=backend)


# -- what they are -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_pytorch_differentiates_by_sinks_and_slopes(backend: str, dtype: Any, softcap: float | None) -> None:
    """With the sinks as one more column of scores, and the slopes as a bias."""
    torch = pytest.importorskip("torch")
    shapes = (2, 3, 70, 8), (2, 3, 90, 8), (2, 3, 90, 8)
    query, key, value, grad_out, grad_lse = inputs(*shapes, (2, 3, 70, 8), (2, 3, 70), dtype=dtype)
    sinks, slopes = np.array([0.5, -3.0, 4.0], dtype), np.array([[0.1, 0.0, -0.02], [1.0, 0.5, 0.25]], dtype)
    away = torch.from_numpy(np.abs(np.arange(70)[:, None] + 5 - np.arange(90)))
    arrays = (query, key, value, sinks, slopes)
    leaves = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]
    scores = leaves[0] @ leaves[1].mT * 8**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores - leaves[4][..., None, None] * away
    scores = torch.cat((scores, leaves[3][:, None, None].expand(2, 3, 70, 1)), -1)
    loss = (scores.softmax(-1)[..., :-1] @ leaves[2] * torch.from_numpy(grad_out)).sum()
    loss = loss + (scores.logsumexp(-1) * torch.from_numpy(grad_lse)).sum()
    exact = [gradient.numpy() for gradient in torch.autograd.grad(loss, leaves)]
    options: dict[str, Any] = {"sinks": sinks, "alibi_slopes": slopes, "query_offset": 5, "softcap": softcap}
    names = (*USUAL, "sinks", "alibi_slopes")
    found = gradients(names, grad_out, query, key, value, grad_lse=grad_lse, backend=backend, **options)
    tolerances.check_promise(tuple(found.values()), exact, dtype)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_slope_has_gradients_of_next_to_no_weights(softcap: float | None) -> None:
    """In float64 a number of 1e-50 is not small, as it is in float32."""
    call = inputs((1, 1, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8), dtype=np.float64)
    options: Any = {"alibi_slopes": [30.0], "sinks": [30.0], "query_offset": 9, "softcap": softcap}
    out, lse = fastattn.attention(*call, **options, return_lse=True)
    found = fastattn.attention_backward(call[0], *call, out, lse, **options, grads=("alibi_slopes",))
    assert 0 < abs(found[0][0]) < 1e-38
    options["alibi_slopes"], options["sinks"] = (np.array(options[name]) for name in ("alibi_slopes", "sinks"))
    tolerances.check_head_gradients({"alibi_slopes": found[0]}, call[0], *call, **options)


@settings(max_examples=FEW)
@given(call=calls(masks=(None, "bool", "float"), any_layout=False), dropped=st.booleans(), seed=st.integers(0, 999))
def test_any_call(call: Call, dropped: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    options = dict(call.options)
    problem, _ = describe(*call.args[:3], enable_gqa=options["enable_gqa"])
    options.setdefault("sinks", numbers(rng, (problem.heads,), call.query.dtype, 3.0))
    if np.max(np.abs(options.get("alibi_slopes", 1e9))) > 1e6:  # beyond, nothing is left of gradients
        options["alibi_slopes"] = np.abs(numbers(rng, (problem.heads,), call.query.dtype))
    if isinstance(options.get("query_offset"), int):
        options["query_offset"] = min(max(options["query_offset"], -1000), 1000)
    if dropped:
        options |= {"dropout_p": 0.3, "rng": 5}
    out, lse = fastattn.attention(*call.args, **options, return_lse=True)
    grad_out, grad_lse = numbers(rng, out.shape, out.dtype), numbers(rng, lse.shape, lse.dtype)
    names = ("sinks", "alibi_slopes")
    found = gradients(names, grad_out, *call.args, grad_lse=grad_lse, **options)
    tolerances.check_head_gradients(found, grad_out, *call.args, grad_lse=grad_lse, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_lse_of_a_row_without_keys_goes_to_the_sink(dtype: Any) -> None:
    query, key, value, grad_out = inputs((2, 5, 8), (2, 7, 8), (2, 7, 8), (2, 5, 8), dtype=dtype)
    grad_lse = np.arange(10, dtype=dtype).reshape(2, 5)
    for sink in (0.0, -1e9, 1e30, -1e30):
        options: dict[str, Any] = {"sinks": np.full(2, sink, dtype), "key_lengths": np.array(0)}
        for backend in ("cpu", "reference"):
            found = gradients(
                ("sinks", "query"), grad_out, query, key, value, grad_lse=grad_lse, backend=backend, **options
            )
            np.testing.assert_array_equal(found["sinks"], grad_lse.sum(-1))
            assert not found["query"].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [-1e9, 1e6, 300.0])
def test_a_sink_has_its_share_where_the_lse_has_lost_digits(dtype: Any, size: float) -> None:
    """A row of equal scores and a sink that is as large: all weights are 1 / (Lk + 1), the sink's as well."""
    keys, rows = 63, 5
    query, key = np.zeros((2, rows, 4), dtype), np.zeros((2, keys, 4), dtype)
    value, grad_out = inputs((2, keys, 4), (2, rows, 4), dtype=dtype)
    options: dict[str, Any] = {"sinks": np.full(2, size, dtype), "attn_mask": np.full((rows, keys), size, dtype)}
    mask = options.pop("attn_mask")
    out = fastattn.attention(query, key, value, mask, **options)
    exact = value.astype(np.float64).sum(-2, keepdims=True) / (keys + 1)
    np.testing.assert_allclose(out, np.broadcast_to(exact, out.shape), rtol=1e-5, atol=1e-6)
    for backend in ("cpu", "reference"):
        found = gradients(("sinks", "value"), grad_out, query, key, value, mask, backend=backend, **options)
        wanted = -(grad_out.astype(np.float64) * exact).sum((-1, -2)) / (keys + 1)
        np.testing.assert_allclose(found["sinks"], wanted, rtol=1e-5)
        shares = np.broadcast_to(grad_out.astype(np.float64).sum(-2, keepdims=True) / (keys + 1), value.shape)
        np.testing.assert_allclose(found["value"], shares, rtol=1e-5, atol=1e-6)


def test_a_scale_of_0_leaves_slopes_their_gradient() -> None:
    query, key, value, grad_out = inputs((2, 40, 8), (2, 50, 8), (2, 50, 8), (2, 40, 8))
    for scale in (0.0, 1e-300, -1e-15):
        options: dict[str, Any] = {"alibi_slopes": np.array([0.1, 0.02]), "scale": scale}
        found = gradients((*USUAL, "alibi_slopes"), grad_out, query, key, value, **options)
        wanted = gradients((*USUAL, "alibi_slopes"), grad_out, query, key, value, backend="reference", **options)
        for name, array in found.items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-11, atol=1e-13 * abs(scale) ** (name in USUAL[:2]))


# -- the same answer every time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_same_bits_at_any_thread_count_and_for_a_row_alone(dtype: Any, softcap: float | None) -> None:
    query, key, value, grad_out = inputs(
        (3, 4, 300, 16), (3, 2, 700, 16), (3, 2, 700, 16), (3, 4, 300, 16), dtype=dtype
    )
    sinks, slopes = inputs((3, 4), (3, 4), dtype=dtype, seed=2)
    names = ("sinks", "alibi_slopes", "query")
    options: dict[str, Any] = {"enable_gqa": True, "is_causal": "bottom-right", "softcap": softcap}
    arrays = (grad_out, query, key, value)
    wanted = gradients(names, *arrays, sinks=sinks, alibi_slopes=slopes, **options)
    for threads in (1, 2, 3, 5):
        with fastattn.num_threads(threads):
            found = gradients(names, *arrays, sinks=sinks, alibi_slopes=slopes, **options)
        assert [array.tobytes() for array in found.values()] == [array.tobytes() for array in wanted.values()]
    strided = [np.asfortranarray(array) for array in arrays]
    found = gradients(names, *strided, sinks=sinks, alibi_slopes=slopes, **options)
    assert [array.tobytes() for array in found.values()] == [array.tobytes() for array in wanted.values()]
    for b in range(3):
        row = [array[b] for array in arrays]
        found = gradients(names, *row, sinks=sinks[b], alibi_slopes=slopes[b], **options)
        for name in names:
            assert found[name].tobytes() == wanted[name][b].tobytes()


def test_what_is_hidden_never_leaks() -> None:
    query, key, value, grad_out = inputs((2, 40, 8), (2, 50, 8), (2, 50, 8), (2, 40, 8))
    names = ("sinks", "alibi_slopes")
    for softcap in (None, 2.0):
        options: dict[str, Any] = {"sinks": np.zeros(2), "alibi_slopes": np.full(2, 0.1), "softcap": softcap}
        options["key_lengths"] = np.array(30)
        mask = np.arange(50) % 3 != 0
        wanted = gradients(names, grad_out, query, key, value, mask, **options)
        spoilt_key, spoilt = key.copy(), value.copy()
        for hidden in (slice(30, None), slice(None, None, 3)):
            spoilt_key[:, hidden], spoilt[:, hidden] = np.inf, np.nan
        found = gradients(names, grad_out, query, spoilt_key, spoilt, mask, **options)
        for name in names:
            assert found[name].tobytes() == wanted[name].tobytes()
