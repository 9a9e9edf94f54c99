"""Additive attention: gradients of a floating mask, and of the arrays that a function of scores captures."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from additive_cases import ANY_DTYPE, inputs, rows_of_a_batch
from additive_gradients import backward, upstream_of
from strategies import bits_of

import fastattn
from fastattn import additive_attention_backward
from fastattn.call.upstream import summed_to
from fastattn.cpu.host import pool, session
from fastattn.machine import table as isa

Array = np.ndarray[Any, Any]
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
rng = np.random.default_rng(0)
TABLE, FACTOR = rng.standard_normal((2, 7)), np.array(1.25)


@pytest.fixture(autouse=True)
def _share_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small calls be shared between threads as well."""
    for name in ("WORTH_SHARING", "WORTH_WAKING"):
        monkeypatch.setattr(pool, name, 1)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be many blocks."""
    row = replace(isa.host(), blocking=replace(isa.host().blocking, additive_block=32))
    monkeypatch.setattr(session.current, "_row", row)
    monkeypatch.setattr(session.current, "plans", session.Plans())


def relative(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A bias for each head and distance."""
    return score * FACTOR + TABLE[head % 2, (query - key) % 7]


def added(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A bias for each second row of the batch and distance."""
    return score + TABLE[batch % 2, (query - key) % 7]


# -- what they are -----------------------------------------------------------------------------------------------------

SHAPES = ((2, 3, 20, 30), (20, 30), (3, 1, 30), (2, 1, 20, 1), (1, 1, 20, 30), (30,), (1, 1), (2, 3, 1, 1), ())


@backends
@ANY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_autograd_agrees(softcap: float | None, shape: tuple[int, ...], dtype: Any, backend: str) -> None:
    torch = pytest.importorskip("torch")
    query, key, value, grad_out = (rng.standard_normal((2, 3, n, 8)).astype(dtype) for n in (20, 30, 30, 20))
    weight, bias = rng.standard_normal(8).astype(dtype), rng.standard_normal(shape).astype(dtype)
    table = rng.standard_normal((3, 7)).astype(dtype)

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return np.tanh(score) * table[head, (query + key) % 7]

    options: dict[str, Any] = {"score_mod": score_mod, "softcap": softcap, "grads": ("table", "attn_mask")}
    arrays = (query, key, value, weight)
    upstream = upstream_of(*arrays, bias, score_mod=score_mod, softcap=softcap)
    found = backward(arrays, bias, **options, upstream=[grad_out, *upstream[1:]], backend=backend)

    q, k, v, w, g = (torch.from_numpy(array.astype(np.float64)) for array in (*arrays, grad_out))
    leaves = [torch.from_numpy(array.astype(np.float64)).requires_grad_() for array in (table, bias)]
    scores = (w * torch.tanh(q[..., :, None, :] + k[..., None, :, :])).sum(-1)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    places = torch.arange(20)[:, None] + torch.arange(30)
    scores = torch.tanh(scores + leaves[1]) * leaves[0][:, places % 7]
    wanted = torch.autograd.grad(scores.softmax(-1) @ v, leaves, g)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert got.shape == want.shape
        limit = {np.float32: 2e-5, np.float64: 1e-12}[dtype] * max(1.0, float(want.abs().max()))
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=limit)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": "bottom-right"},
    "window": {"window": (9, 40)},
    "lengths": {"key_lengths": np.array([97, 0, 140])},
    "offsets": {"query_offset": np.array([3, -20, 300]), "is_causal": True},
    "softcap, slopes and sinks": {"softcap": 2.0, "alibi_slopes": np.array([0.05]), "sinks": np.array([1.0])},
    "mask_mod": {"mask_mod": lambda batch, head, query, key: (query + key) % 3 > 0},
}


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("shape", [(3, 1, 70, 140), (70, 140), (3, 1, 1, 140), (70, 1), ()], ids=str)
def test_many_blocks(shape: tuple[int, ...], which: str) -> None:
    """A table that is added has the gradients of a whole mask, each where the element was read."""
    arrays, options = rows_of_a_batch(np.float64, 3, 70, 140, 5), dict(OPTIONS[which])
    bias, seen, is_causal = rng.standard_normal(shape), rng.random((70, 140)) < 0.9, options.pop("is_causal", False)
    bias[...] = np.where(rng.random(shape) < 0.1, -np.inf, bias)
    upstream = upstream_of(*arrays, (bias, seen), is_causal, **options, score_mod=added)
    told: dict[str, Any] = {"score_mod": added, "grads": ("attn_mask", "TABLE"), "upstream": upstream}
    found = backward(arrays, (bias, seen), is_causal, **options, **told)

    offsets = np.broadcast_to(options.get("query_offset", 70 if is_causal == "bottom-right" else 0), 3)
    query, key = offsets[:, None, None, None] + np.arange(70)[:, None], np.arange(140)
    place = np.broadcast_arrays(np.arange(3)[:, None, None, None] % 2, (query - key) % 7)
    whole = np.broadcast_to(bias, (3, 1, 70, 140)) + TABLE[tuple(place)]
    told = {"upstream": upstream, "grads": ("attn_mask",), "backend": "reference"}
    (wanted,) = backward(arrays, (whole, seen), is_causal, **options, **told)
    table = np.zeros_like(TABLE)
    np.add.at(table, tuple(place), wanted)
    for got, want in zip(found, (summed_to(wanted, shape), table), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * max(1, np.abs(want).max()))


@backends
@ANY_DTYPE
@pytest.mark.parametrize("size", [-1e9, 1e6, 300.0])
def test_equal_scores_where_the_lse_has_lost_digits(size: float, dtype: Any, backend: str) -> None:
    """All weights of a row are 1 / Lk, however large the mask is; each element of the table belongs to half of them."""
    keys, table = 62, np.zeros(2, dtype)
    query, key = np.zeros((5, 4), dtype), np.zeros((keys, 4), dtype)
    value, grad_out = rng.standard_normal((keys, 3)).astype(dtype), rng.standard_normal((5, 3)).astype(dtype)
    arrays, bias = (query, key, value, np.ones(4, dtype)), np.full((5, keys), size, dtype)
    mod = {"score_mod": lambda score, batch, head, query, key: score + table[key % 2]}
    _, out, lse = upstream_of(*arrays, bias, **mod)
    told: dict[str, Any] = {"upstream": [grad_out, out, lse], "grads": ("attn_mask", "table"), "backend": backend}
    found = backward(arrays, bias, **mod, **told)
    exact = grad_out.astype(np.float64) @ (value - value.mean(0, dtype=np.float64)).T / keys
    np.testing.assert_allclose(found[0], exact, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found[1], exact.reshape(5, -1, 2).sum((0, 1)), rtol=0, atol=2e-5)


# -- how they are asked for --------------------------------------------------------------------------------------------


@backends
def test_grad_mask_is_the_gradient_by_the_name_of_the_mask(backend: str) -> None:
    arrays = inputs(np.float32, 2, 20, 30, 8)
    bias, seen = rng.standard_normal((20, 30)).astype(np.float16), rng.random((20, 30)) < 0.5
    for mask in (bias, (bias, seen)):
        upstream = upstream_of(*arrays, mask)
        told: dict[str, Any] = {"upstream": upstream, "backend": backend}
        usual = backward(arrays, mask, **told, grad_mask=True)
        named = backward(arrays, mask, **told, grads=("query", "key", "value", "weight", "attn_mask"))
        assert bits_of(*usual) == bits_of(*named)
        assert bits_of(*usual[:4]) == bits_of(*backward(arrays, mask, **told))
        assert usual[4].dtype == np.float16
        assert not usual[4][~seen].any() or mask is bias


@backends
def test_masks_that_have_no_gradient(backend: str) -> None:
    arrays, seen = inputs(np.float32, 2, 5, 6, 8), np.ones((5, 6), bool)
    told: dict[str, Any] = {"upstream": upstream_of(*arrays), "backend": backend}
    with pytest.raises(ValueError, match="^grads: 'attn_mask', but the call has none"):
        backward(arrays, **told, grads=("attn_mask",))
    with pytest.raises(TypeError, match="^grads: 'attn_mask' for an attn_mask of dtype bool"):
        backward(arrays, seen, **told, grads=("attn_mask",))
    with pytest.raises(ValueError, match="^grad_mask: True without attn_mask"):
        backward(arrays, **told, grad_mask=True)
    with pytest.raises(TypeError, match="^grad_mask: True for an attn_mask of dtype bool"):
        backward(arrays, seen, **told, grad_mask=True)
    with pytest.raises(ValueError, match="^grads: given together with grad_mask=True"):
        backward(arrays, np.zeros((5, 6)), **told, grad_mask=True, grads=("key",))


@backends
def test_an_index_that_is_out_of_range(backend: str) -> None:
    arrays, table = inputs(np.float64, 2, 9, 12, 8), rng.standard_normal(11)
    mod: dict[str, Any] = {"score_mod": lambda score, batch, head, query, key: score + table[key]}
    short = mod | {"window": (None, 2)}  # of which no query looks at the last key
    told: dict[str, Any] = {"upstream": upstream_of(*arrays, **short), "backend": backend}
    for names in (None, ("table",)):
        with pytest.raises(IndexError, match="^score_mod: .*an index was out of range"):
            backward(arrays, **mod, **told, grads=names)
        for gradient in backward(arrays, **short, **told, grads=names):
            assert np.isfinite(gradient).all()


def test_nothing_to_look_at_and_nobody_to_look() -> None:
    for queries, keys in ((0, 9), (9, 0)):
        arrays = inputs(np.float32, 2, queries, keys, 8)
        bias, names = np.zeros((1, keys)), ("attn_mask", "TABLE", "FACTOR")
        upstream = upstream_of(*arrays, bias, score_mod=relative)
        found = backward(arrays, bias, score_mod=relative, upstream=upstream, grads=names)
        assert [array.shape for array in found] == [(1, keys), (2, 7), ()]
        assert not any(array.any() for array in found)


# -- the promises of attention -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_blocks")
@ANY_DTYPE
@pytest.mark.parametrize("shape", [(3, 1, 90, 150), (90, 150), (150,)], ids=str)
def test_the_same_bits_at_any_thread_count_and_for_any_strides(shape: tuple[int, ...], dtype: Any) -> None:
    arrays, bias = rows_of_a_batch(dtype, 3, 90, 150, 20), rng.standard_normal(shape)
    told: dict[str, Any] = {"score_mod": relative, "grads": ("attn_mask", "TABLE", "FACTOR")}
    upstream = upstream_of(*arrays, bias, score_mod=relative)
    wanted = bits_of(*backward(arrays, bias, **told, upstream=upstream))
    for threads in (1, 2, 3, 5):
        with fastattn.num_threads(threads):
            assert bits_of(*backward(arrays, bias, **told, upstream=upstream)) == wanted
    strided = [np.asfortranarray(array) for array in (*arrays, bias, *upstream)]
    assert bits_of(*backward(strided[:4], strided[4], **told, upstream=strided[5:])) == wanted


def test_a_row_of_a_batch_has_the_gradient_of_its_own_mask() -> None:
    arrays, bias = rows_of_a_batch(np.float32, 3, 40, 150, 20), rng.standard_normal((3, 1, 40, 150))
    upstream = upstream_of(*arrays, bias)
    (found,) = backward(arrays, bias, upstream=upstream, grads=("attn_mask",))
    for row in range(3):
        one, own = [array[row] for array in arrays[:3]], [array[row] for array in upstream]
        (alone,) = backward((*one, arrays[3]), bias[row], upstream=own, grads=("attn_mask",))
        assert alone.tobytes() == found[row].tobytes()


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@ANY_DTYPE
def test_nothing_masked_leaks(dtype: Any, odd: float) -> None:
    query, key, value, weight = inputs(dtype, 2, 40, 50, 8)
    bias, names = rng.standard_normal((40, 50)).astype(dtype), ("attn_mask", "TABLE", "FACTOR")
    bias[:, ::3] = -np.inf
    upstream = upstream_of(query, key, value, weight, bias, score_mod=relative)
    told: dict[str, Any] = {"score_mod": relative, "grads": names, "upstream": upstream}
    wanted = backward((query, key, value, weight), bias, **told)
    key[:, ::3], value[:, ::3] = odd, odd
    found = backward((query, key, value, weight), bias, **told)
    assert bits_of(*found) == bits_of(*wanted)
    assert not found[0][:, ::3].any()


def test_memory_grows_with_the_lengths_alone() -> None:
    peaks = []
    for length in (1000, 3000):
        arrays, bias = inputs(np.float32, 1, length, length, 8), np.zeros(length, np.float32)
        upstream = upstream_of(*arrays, bias, score_mod=relative)
        tracemalloc.start()
        grad_out, out, lse = upstream
        additive_attention_backward(
            grad_out, *arrays, out, lse, bias, score_mod=relative, grads=("attn_mask", "TABLE", "FACTOR")
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] <= 4 * 3 * 2000 * 8 * 4  # a quarter of a matrix of scores would be 8 million more
