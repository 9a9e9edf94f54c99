"""Gradients by name in the backward pass of layers: of what a call was given besides its inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from differences import central_differences
from strategies import bits_of

import fastattn
from fastattn import BahdanauAttention, LuongAttention, MultiHeadAttention
from fastattn.layers.reference import luong_attention

Array = np.ndarray[Any, Any]
QUERIES, KEYS, FEATURES, STEP = 5, 8, 8, 1e-6
rng = np.random.default_rng(0)
QUERY, KEY = rng.standard_normal((2, QUERIES, FEATURES)), rng.standard_normal((2, KEYS, FEATURES))
TABLE = rng.standard_normal(5)

luong = partial(LuongAttention, FEATURES, FEATURES, hidden_dim=6, rng=0, dtype=np.float64)
LAYERS: dict[str, Any] = {
    "multi-head": partial(MultiHeadAttention, FEATURES, 4, rng=0, dtype=np.float64),
    "multi-head, grouped, bias_kv": partial(
        MultiHeadAttention, FEATURES, 4, num_kv_heads=2, bias_kv=True, rng=0, dtype=np.float64
    ),
    "bahdanau": partial(BahdanauAttention, FEATURES, FEATURES, 6, rng=0, dtype=np.float64),
    **{f"luong, {score}": partial(luong, score=score) for score in ("dot", "general", "concat")},
    "luong, local-m": partial(luong, score="general", align="local-m", window=3),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def read_from(table: Array) -> Any:
    """A bias for some distances, and scores that are halved."""
    return lambda score, batch, head, query, key: score * 0.5 + table[(query - key) % 5]


def told(given: dict[str, Array]) -> dict[str, Any]:
    """Return options of a call, in which a table is one that a function of scores reads."""
    options: dict[str, Any] = {name: array for name, array in given.items() if name != "table"}
    return options | ({"score_mod": read_from(given["table"])} if "table" in given else {})


def check(layer: Any, given: dict[str, Array], **options: Any) -> None:
    """Compare gradients of what is given with differences."""
    out, saved = layer(QUERY, KEY, **told(given), **options, return_saved=True)
    grad_out = np.random.default_rng(1).standard_normal(out.shape)
    grad_inputs, gradients, named = layer.backward(grad_out, saved, grads=tuple(given))
    again = layer.backward(grad_out, (QUERY, KEY), **told(given), **options, grads=list(given))
    assert bits_of(*again[0], *again[1].values(), *again[2]) == bits_of(*grad_inputs, *gradients.values(), *named)
    plain = layer.backward(grad_out, saved)
    assert len(plain) == 2
    assert bits_of(*plain[0], *plain[1].values()) == bits_of(*grad_inputs, *gradients.values())

    def loss(name: str, array: Array) -> float:
        return float((layer(QUERY, KEY, **told({**given, name: array}), **options) * grad_out).sum())

    for (name, array), found in zip(given.items(), named, strict=True):
        wanted = central_differences(partial(loss, name), array, STEP)
        assert found.shape == array.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7, err_msg=name)


def of_heads(layer: Any) -> dict[str, Array]:
    """Return sinks and slopes for the heads of a layer."""
    heads = getattr(layer, "num_heads", 1)
    own = np.random.default_rng(2)
    return {"sinks": own.standard_normal(heads), "alibi_slopes": own.uniform(0, 0.5, heads)}


@every_layer
@pytest.mark.parametrize("shape", [(QUERIES, KEYS), (QUERIES, 1), (KEYS,), ()], ids=str)
def test_they_are_those_of_differences(shape: tuple[int, ...], name: str) -> None:
    layer = LAYERS[name]()
    check(layer, {**of_heads(layer), "attn_mask": rng.standard_normal(shape)}, softcap=3.0)
    # where keys that no query looks at are cut off
    check(layer, {"attn_mask": rng.standard_normal(shape), **of_heads(layer)}, window=(2, 0), query_offset=4)


@every_layer
def test_those_of_captured_arrays(name: str) -> None:
    layer = LAYERS[name]()
    check(layer, {"table": TABLE, **of_heads(layer)})
    check(layer, {"attn_mask": rng.standard_normal((QUERIES, KEYS)), "table": TABLE}, window=(2, 0), query_offset=4)


def test_masks_of_batches_and_heads_and_pairs() -> None:
    layer = LAYERS["multi-head"]()
    for shape in ((2, 1, QUERIES, KEYS), (4, 1, KEYS), (2, 4, QUERIES, KEYS)):
        check(layer, {"attn_mask": rng.standard_normal(shape)}, key_mask=np.arange(KEYS) < [[KEYS], [3]])
    bias, seen = rng.standard_normal((QUERIES, KEYS)), rng.random((QUERIES, KEYS)) < 0.5
    for name in ("multi-head", "bahdanau"):
        out, saved = LAYERS[name]()(QUERY, KEY, attn_mask=(bias, seen), return_saved=True)
        *_, (found,) = saved.layer.backward(out, saved, grads=("attn_mask",))
        assert found.shape == bias.shape
        assert not found[~seen].any()
    check(LAYERS["bahdanau"](), {"attn_mask": rng.standard_normal((2, QUERIES, KEYS))})


def test_dtypes_are_those_of_what_was_given() -> None:
    layer = MultiHeadAttention(FEATURES, 4, rng=0)
    sinks, bias = np.zeros(4), np.zeros((QUERIES, KEYS), np.float16)
    options: dict[str, Any] = {"attn_mask": bias, "sinks": sinks}
    out, saved = layer(QUERY.astype(np.float32), KEY.astype(np.float32), **options, return_saved=True)
    *_, named = layer.backward(out, saved, grads=("attn_mask", "sinks"))
    assert [array.dtype for array in named] == [np.float16, np.float64]
    assert layer.backward(out, saved, grads=())[2] == ()


@pytest.mark.parametrize("name", ["multi-head", "bahdanau", "luong, dot"])
def test_names_that_are_refused(name: str) -> None:
    layer = LAYERS[name]()
    out, saved = layer(QUERY, KEY, score_mod=read_from(TABLE), return_saved=True)
    for names, message in (
        (("query",), "'query' is among them; expected some of 'attn_mask', 'alibi_slopes', 'sinks', 'table'"),
        (("sinks",), "'sinks', but the call has none"),
        (("attn_mask",), "'attn_mask', but the call has none"),
        (("table", "table"), "'table' more than once"),
    ):
        with pytest.raises(ValueError, match=f"^grads: {message}"):
            layer.backward(out, saved, grads=names)
    with pytest.raises(TypeError, match="^grads: 'table' of type str"):
        layer.backward(out, saved, grads="table")
    out, saved = layer(QUERY, KEY, attn_mask=np.ones((QUERIES, KEYS), bool), return_saved=True)
    with pytest.raises(TypeError, match="^grads: 'attn_mask' for an attn_mask of dtype bool"):
        layer.backward(out, saved, grads=("attn_mask",))


@pytest.mark.parametrize("positions", [True, False])
def test_windows_of_queries_of_their_own_have_none(positions: bool) -> None:
    layer = luong(score="dot", align="local-m" if positions else "local-p", window=2)
    given: dict[str, Any] = {"positions": np.zeros(QUERIES)} if positions else {}
    out, saved = layer(QUERY, KEY, attn_mask=np.zeros((QUERIES, KEYS)), **given, return_saved=True)
    with pytest.raises(ValueError, match="^grads: given where each query has a window of its own"):
        layer.backward(out, saved, grads=("attn_mask",))


@pytest.mark.parametrize("align", ["global", "local-m"])
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_functions_are_asked_by_the_numbers_of_keys_where_some_are_cut_off(score: Any, align: Any) -> None:
    layer, table = luong(score=score, align=align, window=2), rng.standard_normal(KEYS)
    mods: dict[str, Any] = {
        "score_mod": lambda score, batch, head, query, key: score + table[key],
        "mask_mod": lambda batch, head, query, key: key % 2 == 0,
        "block_mask": fastattn.BlockMask.from_array(np.arange(KEYS) % 3 > np.zeros((QUERIES, 1))),
    }
    for name, mod in mods.items():
        options: dict[str, Any] = {name: mod, "window": (1, 2), "query_offset": 4}
        wanted = luong_attention(layer, QUERY, KEY, **options)[0]
        np.testing.assert_allclose(layer(QUERY, KEY, **options), wanted.astype(float), rtol=1e-12, atol=1e-12)
