"""Layers with what `fastattn.attention` is told of scores: windows, offsets, lengths, softcaps and pairs of masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import ALIGNMENTS, SCORES, check, strengthened
from layer_torch import torch_bahdanau, torch_luong, torch_multi_head
from strategies import SEEDS

from fastattn import BahdanauAttention, LuongAttention, MultiHeadAttention
from fastattn.layers.reference import bahdanau_attention, luong_attention, multi_head_attention

Array = np.ndarray[Any, Any]

BATCH, QUERIES, KEYS = 3, 7, 12

LAYERS: dict[str, Any] = {
    "multi-head": lambda: MultiHeadAttention(12, 3, rng=0, dtype=np.float64),
    "multi-head, grouped": lambda: MultiHeadAttention(12, 6, num_kv_heads=2, rng=0, dtype=np.float64),
    "bahdanau": lambda: BahdanauAttention(12, 12, 6, rng=0, dtype=np.float64),
} | {
    f"luong, {score}, {align}": lambda score=score, align=align: LuongAttention(
        12, 12, score, align, window=3, hidden_dim=4, rng=0, dtype=np.float64
    )
    for score in SCORES
    for align in ALIGNMENTS
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_align = pytest.mark.parametrize("align", ALIGNMENTS)


def arrays_of(rng: np.random.Generator) -> tuple[Array, Array]:
    """Return queries and keys."""
    return rng.standard_normal((BATCH, QUERIES, 12)), rng.standard_normal((BATCH, KEYS, 12))


def seen(options: dict[str, Any], batch: tuple[int, ...], queries: int, keys: int) -> Array:
    """Say which query may look at which key, shape (*batch, Lq, Lk), as positions and lengths have it."""

    def of_rows(name: str, otherwise: int) -> Array:
        given = options.get(name)
        return np.broadcast_to(otherwise if given is None else given, batch)[..., None, None]

    p = np.arange(queries)[:, None] + of_rows("query_offset", 0)
    j = np.arange(keys)
    left, right = options.get("window") or (None, None)
    visible = j < of_rows("key_lengths", keys)
    if left is not None:
        visible = visible & (j >= p - left)
    if right is not None or options.get("is_causal"):
        visible = visible & (j <= p + min(keys if right is None else right, 0 if options.get("is_causal") else keys))
    return np.broadcast_to(visible, (*batch, queries, keys))


def for_heads(layer: Any, mask: Array) -> Array:
    """Return a mask of (B, Lq, Lk) for a layer, which may have heads."""
    return mask[..., None, :, :] if isinstance(layer, MultiHeadAttention) else mask


# -- what each option means --------------------------------------------------------------------------------------------

INTERVALS: dict[str, dict[str, Any]] = {
    "a window": {"window": (2, 1)},
    "what lies behind": {"window": (None, 2)},
    "an offset": {"window": (3, 0), "query_offset": 4},
    "an offset of each row": {"window": (1, 2), "query_offset": np.array([4, -2, 40])},
    "lengths": {"key_lengths": [12, 0, 5]},
    "all of them": {"window": (4, 1), "query_offset": [3, 0, 1], "key_lengths": [12, 9, 3]},
}


@every_layer
@pytest.mark.parametrize("options", INTERVALS.values(), ids=INTERVALS)
def test_an_interval_is_what_a_mask_of_it_says(name: str, options: dict[str, Any]) -> None:
    layer, rng = LAYERS[name](), np.random.default_rng(0)
    query, key = arrays_of(rng)
    # offsets and lengths move the windows of Luong's as well
    moving = {"local-m": "query_offset", "local-p": "key_lengths"}.get(name.rpartition(" ")[-1])
    own: dict[str, Any] = {option: options[option] for option in options if option == moving}
    mask = for_heads(layer, seen(options, (BATCH,), QUERIES, KEYS))
    out, weights, saved = layer(query, key, **options, return_weights=True, return_saved=True)
    wanted, wanted_weights, wanted_saved = layer(
        query, key, attn_mask=mask, **own, return_weights=True, return_saved=True
    )
    check([out, weights], [wanted, wanted_weights])
    assert not weights[np.broadcast_to(~mask, weights.shape)].any()
    found, found_parameters = layer.backward(out, saved)
    exact, exact_parameters = layer.backward(wanted, wanted_saved)
    check([*found, *found_parameters.values()], [*exact, *exact_parameters.values()])


@every_layer
def test_what_lies_behind_the_length_never_shows(name: str) -> None:
    layer, rng = LAYERS[name](), np.random.default_rng(0)
    query, key = arrays_of(rng)
    lengths = np.array([12, 0, 5])
    clean, saved = layer(query, key, key_lengths=lengths, return_saved=True)
    wanted = layer.backward(clean, saved)
    padding = np.arange(KEYS) >= lengths[:, None]
    key[padding] = np.nan
    dirty, saved = layer(query, key, key_lengths=lengths, return_saved=True)
    (_, grad_key), gradients = layer.backward(dirty, saved)
    assert np.array_equal(dirty, clean)
    assert not grad_key[padding].any()
    check([grad_key, *gradients.values()], [wanted[0][1], *wanted[1].values()])


@pytest.mark.parametrize("name", ["multi-head", "multi-head, grouped", "bahdanau"])
def test_a_decoder_that_goes_step_by_step_says_which_step_it_is(name: str) -> None:
    layer, rng = LAYERS[name](), np.random.default_rng(0)
    x = rng.standard_normal((BATCH, QUERIES, 12))
    options: dict[str, Any] = {"window": (2, 0), "softcap": 3.0}
    whole = layer(x, x, **options)
    for step in range(QUERIES):
        state, cache = x[:, step : step + 1], x[:, : step + 1]
        check([layer(state, cache, **options, query_offset=step)], [whole[:, step : step + 1]])


def test_an_offset_moves_causality() -> None:
    layer, x = LAYERS["multi-head"](), np.random.default_rng(0).standard_normal((BATCH, KEYS, 12))
    whole = layer(x, is_causal=True)
    check([layer(x[:, 5:8], x, is_causal=True, query_offset=5)], [whole[:, 5:8]])
    check([layer(x[:, 9:], x, is_causal=True, query_offset=[9, 9, 9])], [whole[:, 9:]])
    check([layer(x[:, 9:], x, is_causal="bottom-right")], [whole[:, 9:]])
    lengths = [12, 10, 4]  # bottom-right: the last query is at the last key of its own row
    found = layer(x[:, :3], x, is_causal="bottom-right", key_lengths=lengths)
    check([found], [layer(x[:, :3], x, is_causal=True, key_lengths=lengths, query_offset=np.array(lengths) - 3)])


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.endswith("local-p")])
def test_a_softcap_bounds_scores_before_a_mask_is_added(name: str) -> None:
    layer, rng = strengthened(LAYERS[name](), 4.0), np.random.default_rng(0)
    query, key = arrays_of(rng)
    level = layer(query, key, softcap=1e-3, return_weights=True)[1]
    visible = level > 0
    assert np.abs(level - 1 / visible.sum(axis=-1, keepdims=True))[visible].max() < 1e-3
    bias = np.where(np.arange(KEYS) == 4, 30.0, 0)
    weights = layer(query, key, attn_mask=bias, softcap=1e-3, return_weights=True)[1]
    assert weights[..., 4][visible[..., 4]].min() > 0.99, "a bias is not capped"
    check([layer(query, key, softcap=1e9)], [layer(query, key)])


@every_layer
def test_a_bias_and_a_boolean_mask_both_hold(name: str) -> None:
    layer, rng = LAYERS[name](), np.random.default_rng(0)
    query, key = arrays_of(rng)
    bias, keep = rng.standard_normal((QUERIES, KEYS)), rng.random((BATCH, QUERIES, KEYS)) < 0.6
    keep[1, 2] = False
    pair = (bias, for_heads(layer, keep))
    one = for_heads(layer, np.where(keep, bias, -np.inf))
    for options in ({}, {"key_lengths": [12, 3, 7], "window": (5, 2)}):
        found = layer(query, key, attn_mask=pair, **options, return_saved=True)
        wanted = layer(query, key, attn_mask=one, **options, return_saved=True)
        check(found[:1], wanted[:1])
        grads, gradients = layer.backward(found[0], found[1])
        exact, exact_gradients = layer.backward(wanted[0], wanted[1])
        check([*grads, *gradients.values()], [*exact, *exact_gradients.values()])


@pytest.mark.parametrize("mask", [None, "bool", "float", "pair"])
def test_a_mask_of_keys_goes_with_all(mask: str | None) -> None:
    layer, rng = LAYERS["multi-head"](), np.random.default_rng(0)
    query, key = arrays_of(rng)
    keep, bias = rng.random((QUERIES, KEYS)) < 0.7, rng.standard_normal((QUERIES, KEYS))
    attn_mask: Any = {None: None, "bool": keep, "float": bias, "pair": (bias, keep)}[mask]
    key_mask = rng.random((BATCH, KEYS)) < 0.7
    options: dict[str, Any] = {"window": (3, 3), "key_lengths": [12, 7, 9], "softcap": 5.0}
    found = layer(query, key, attn_mask=attn_mask, key_mask=key_mask, **options)
    visible = seen(options, (BATCH,), QUERIES, KEYS) & key_mask[:, None]
    visible = visible & keep if mask in ("bool", "pair") else visible
    exact: Any = (bias, visible[:, None]) if mask in ("float", "pair") else visible[:, None]
    check([found], [multi_head_attention(layer, query, key, attn_mask=exact, softcap=5.0)[0].astype(float)])


@pytest.mark.parametrize("name", ["multi-head", "multi-head, grouped"])
def test_slopes_are_of_heads(name: str) -> None:
    layer, rng = LAYERS[name](), np.random.default_rng(0)
    query, key = arrays_of(rng)
    slopes = rng.standard_normal(layer.num_heads) / 4
    away = np.abs(np.arange(QUERIES)[:, None] + 2 - np.arange(KEYS))
    options: dict[str, Any] = {"query_offset": 2, "key_lengths": [12, 9, 3], "softcap": 3.0}
    found = layer(query, key, alibi_slopes=slopes, **options, return_saved=True)
    wanted = layer(query, key, attn_mask=-slopes[:, None, None] * away, **options, return_saved=True)
    check([found[0]], [wanted[0]])
    (grads, gradients), (exact, exact_gradients) = (layer.backward(out, saved) for out, saved in (found, wanted))
    check([*grads, *gradients.values()], [*exact, *exact_gradients.values()])


@pytest.mark.parametrize("name", ["multi-head", "multi-head, grouped"])
def test_sinks_are_of_heads(name: str) -> None:
    """As one more key, whose score is the sink, and whose value is 0."""
    layer, rng = LAYERS[name](), np.random.default_rng(0)
    query, key = arrays_of(rng)
    sinks = rng.standard_normal(layer.num_heads)
    options: dict[str, Any] = {"key_lengths": [12, 9, 3], "softcap": 3.0}
    out, saved = layer(query, key, sinks=sinks, **options, return_saved=True)
    check([out], [multi_head_attention(layer, query, key, sinks=sinks, **options)[0].astype(float)])
    grads, gradients = layer.backward(out, saved)
    direction, step = rng.standard_normal(query.shape), 1e-5
    losses = [float((layer(query + h * direction, key, sinks=sinks, **options) ** 2).sum()) / 2 for h in (step, -step)]
    np.testing.assert_allclose((losses[0] - losses[1]) / (2 * step), (grads[0] * direction).sum(), rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@every_layer
def test_what_a_call_has_saved_says_the_options(name: str) -> None:
    layer, rng = LAYERS[name](), np.random.default_rng(0)
    query, key = arrays_of(rng)
    options: dict[str, Any] = {"window": (4, 1), "query_offset": 3, "key_lengths": [12, 9, 3], "softcap": 2.0}
    out, saved = layer(query, key, **options, return_saved=True)
    grads, gradients = layer.backward(out, saved)
    again, gradients_again = layer.backward(out, (query, key), **options)
    assert all(map(np.array_equal, (*grads, *gradients.values()), (*again, *gradients_again.values())))
    for option in options:
        with pytest.raises(TypeError, match=f"{option}: given besides what a call has saved"):
            layer.backward(out, saved, **{option: options[option]})


# -- Luong's windows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("offset", [None, 0, 5, -4, 100, np.array([0, 8, -3])], ids=str)
@pytest.mark.parametrize("window", [1, 4, 50])
def test_windows_around_targets_are_those_around_positions_given(score: Any, offset: Any, window: int) -> None:
    """What is one call with an interval is the same as what is gathered."""
    rng = np.random.default_rng(0)
    layer = strengthened(LuongAttention(5, 5, score, "local-m", window=window, rng=rng, dtype=np.float64))
    query, key, value = (rng.standard_normal((3, length, 5)) for length in (9, 40, 40))
    shift = np.broadcast_to(0 if offset is None else offset, 3)
    positions = np.arange(9) + shift[:, None]
    mask = rng.random((9, 40)) < 0.8
    options: dict[str, Any] = {"attn_mask": mask, "key_lengths": [40, 0, 11], "softcap": 4.0}
    for inputs in ((query, key), (query, key, value)):
        found = layer(*inputs, **options, query_offset=offset, return_weights=True, return_saved=True)
        exact = layer(*inputs, **options, positions=positions, return_weights=True, return_saved=True)
        check(found[:2], exact[:2])
        grads, gradients = layer.backward(found[0], found[2])
        wanted, wanted_gradients = layer.backward(exact[0], exact[2])
        check([*grads, *gradients.values()], [*wanted, *wanted_gradients.values()])


@pytest.mark.parametrize("score", SCORES)
def test_a_monotonic_decoder_goes_step_by_step(score: Any) -> None:
    layer = LuongAttention(5, 5, score, "local-m", window=2, rng=0, dtype=np.float64)
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((3, 9, 5)), rng.standard_normal((3, 20, 5))
    whole = layer(query, key, key_lengths=[20, 4, 7])
    for step in range(9):
        check(
            [layer(query[:, step : step + 1], key, key_lengths=[20, 4, 7], query_offset=step)],
            [whole[:, step : step + 1]],
        )


@every_align
def test_a_source_has_to_be_in_both_windows(align: Any) -> None:
    layer = LuongAttention(12, 12, "dot", align, window=3, rng=0, dtype=np.float64)
    query, key = arrays_of(np.random.default_rng(0))
    own = layer(query, key, return_weights=True)[1] > 0
    options: dict[str, Any] = {"window": (1, 5), "query_offset": 0}
    both = layer(query, key, **options, return_weights=True)[1] > 0
    assert np.array_equal(both, own & seen(options, (BATCH,), QUERIES, KEYS))


def test_positions_given_are_where_targets_look_and_an_offset_is_where_they_stand() -> None:
    layer = LuongAttention(12, 12, "dot", "local-m", window=1, rng=0, dtype=np.float64)
    query, key = arrays_of(np.random.default_rng(0))
    positions = np.full(QUERIES, 6.0)
    weights = layer(query, key, positions=positions, query_offset=3, window=(None, 0), return_weights=True)[1]
    j, i = np.arange(KEYS), np.arange(QUERIES)[:, None]
    assert np.array_equal(weights[0] > 0, (j >= 5) & (j <= 7) & (j <= 3 + i))


@pytest.mark.parametrize("offset", [None, np.array([0, 70, 10, -5])], ids=["none", "of each row"])
@pytest.mark.parametrize("align", ["global", "local-m"])
def test_a_sentence_alone_gives_the_same_bits(align: Any, offset: Any) -> None:
    """Where nothing is BLAS's, whose bits depend on the shape of a product."""
    layer = LuongAttention(16, 16, "dot", align, window=10, rng=0)
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((4, 50, 16), dtype=np.float32), rng.standard_normal((4, 300, 16), dtype=np.float32)
    lengths = np.array([300, 0, 57, 120])

    def call(rows: Any, keys: int) -> Any:
        options: dict[str, Any] = {} if offset is None else {"query_offset": offset[rows], "window": (20, 20)}
        return layer(query[rows], key[rows, :keys], key_lengths=lengths[rows], **options)

    together = call(slice(None), 300)
    for b in range(4):
        assert np.array_equal(call(slice(b, b + 1), 300)[0], together[b])
        assert np.array_equal(call(slice(b, b + 1), int(lengths[b]))[0], together[b]), "padding changes nothing"


def test_weights_outside_of_the_window_of_a_query_with_nan_are_0() -> None:
    layer = LuongAttention(12, 12, "dot", "local-m", window=2, rng=0)
    query, key = arrays_of(np.random.default_rng(0))
    query[:, 3] = np.nan
    weights = layer(query, key, key_lengths=[12, 0, 3], return_weights=True)[1]
    assert np.isnan(weights[0, 3, 1:6]).all()
    assert not weights[0, 3, 6:].any()
    assert not weights[1].any()
    assert np.flatnonzero(np.isnan(weights[2, 3])).tolist() == [1, 2]


# -- all of it at random -----------------------------------------------------------------------------------------------


@st.composite
def options_of_scores(draw: st.DrawFn, rng: np.random.Generator, batch: tuple[int, ...], keys: int) -> dict[str, Any]:
    """Draw options for queries and keys of a batch."""
    options: dict[str, Any] = {}
    reach = st.one_of(st.none(), st.integers(0, keys + 2))
    if draw(st.booleans()):
        options["window"] = (draw(reach), draw(reach))
    rows = draw(st.sampled_from((batch, batch[1:], (1,) * len(batch))))
    if draw(st.booleans()):
        single = draw(st.booleans())
        options["query_offset"] = draw(st.integers(-5, keys + 5)) if single else rng.integers(-5, keys + 5, rows)
    if draw(st.booleans()):
        options["key_lengths"] = rng.integers(0, keys + 1, rows)
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from((0.5, 3, 40.0)))
    return options


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, list[Array], dict[str, Any]]:
    """Draw a layer in float64, query, key and perhaps value, and options; some inputs broadcast."""
    rng = np.random.default_rng(draw(SEEDS))
    name = draw(st.sampled_from(list(LAYERS)))
    layer = strengthened(LAYERS[name](), draw(st.sampled_from((1.0, 3.0))))
    batch = draw(st.sampled_from(((), (3,), (2, 2))))
    queries, keys = draw(st.integers(1, 10)), draw(st.integers(1, 40))
    shapes = [(*batch, queries, 12), (*draw(st.sampled_from((batch, batch[1:]))), keys, 12), (*batch, keys, 12)]
    inputs = [rng.standard_normal(shape) for shape in shapes[: draw(st.sampled_from((2, 3)))]]
    options = draw(options_of_scores(rng, batch, keys))
    if isinstance(layer, MultiHeadAttention):
        options["is_causal"] = draw(st.booleans())
        if draw(st.booleans()):
            options["key_mask"] = rng.random((*batch, keys)) < 0.7
    elif isinstance(layer, LuongAttention) and layer.align == "local-m" and draw(st.booleans()):
        options["positions"] = rng.uniform(-5, keys + 5, (*batch, queries))
    kind = draw(st.sampled_from((None, "bool", "float", "pair")))
    if kind is not None:
        shape = (queries, keys) if draw(st.booleans()) else for_heads(layer, np.empty((*batch, queries, keys))).shape
        keep, bias = rng.random(shape) < 0.8, rng.standard_normal((queries, keys))
        options["attn_mask"] = {"bool": keep, "float": bias, "pair": (bias, keep)}[kind]
    return layer, inputs, options


@given(calls())
def test_the_reference_gives_the_same(call: tuple[Any, list[Array], dict[str, Any]]) -> None:
    layer, inputs, options = call
    kinds: dict[Any, Any] = {
        MultiHeadAttention: multi_head_attention,
        BahdanauAttention: bahdanau_attention,
        LuongAttention: luong_attention,
    }
    out, weights = layer(*inputs, **options, return_weights=True)
    exact, exact_weights = kinds[type(layer)](layer, *inputs, **options)
    check([out, weights], [exact.astype(float), exact_weights.astype(float)])
    assert np.array_equal(out, layer(*inputs, **options))


@given(calls())
def test_autograd_gives_the_same(call: tuple[Any, list[Array], dict[str, Any]]) -> None:
    """PyTorch's, of the papers' formulas under explicit masks."""
    torch = pytest.importorskip("torch")
    layer, inputs, options = call
    batch, queries, keys = inputs[0].shape[:-2], inputs[0].shape[-2], inputs[1].shape[-2]
    visible, added = seen(options, batch, queries, keys), np.zeros((queries, keys))
    if "key_mask" in options:
        visible = visible & options["key_mask"][..., None, :]
    visible = for_heads(layer, visible)
    for mask in options["attn_mask"] if isinstance(options.get("attn_mask"), tuple) else (options.get("attn_mask"),):
        if mask is not None and mask.dtype == bool:
            visible = visible & mask
        elif mask is not None:
            added = mask
    tensors = [torch.tensor(array, requires_grad=True) for array in inputs]
    w = {name: torch.tensor(array, requires_grad=True) for name, array in layer.state_dict().items()}
    masks = torch.from_numpy(np.array(visible)), torch.from_numpy(added)
    given, softcap = (*tensors[:2], tensors[-1]), options.get("softcap")
    if isinstance(layer, MultiHeadAttention):
        out = torch_multi_head(torch, layer, w, *given, *masks, softcap)
    elif isinstance(layer, BahdanauAttention):
        out = torch_bahdanau(torch, w, *given, *masks, softcap)
    else:
        lengths = np.broadcast_to(options.get("key_lengths", keys), batch)[..., None, None]
        standing = np.arange(queries) + np.broadcast_to(options.get("query_offset", 0), batch)[..., None]
        t = torch.from_numpy(np.asarray(options.get("positions", standing), np.float64))
        out = torch_luong(torch, layer, w, *given, *masks, t, torch.from_numpy(np.array(lengths)), softcap)
    grad_out = np.random.default_rng(0).standard_normal(tuple(out.shape))
    out.backward(torch.from_numpy(grad_out))

    found, saved = layer(*inputs, **options, return_saved=True)
    grads, gradients = layer.backward(grad_out, saved)
    check([found, *grads], [out.detach().numpy(), *(tensor.grad.numpy() for tensor in tensors)])
    check(gradients.values(), [np.zeros(one.shape) if one.grad is None else one.grad.numpy() for one in w.values()])


# -- arguments ---------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": (1, -1)}, ValueError, "window: .*expected .left, right."),
        ({"window": 3}, TypeError, "window: 3 of type int"),
        ({"softcap": 0}, ValueError, "softcap: 0 of type int; expected a finite real number above 0"),
        ({"query_offset": 1.5}, TypeError, "query_offset: dtype float64; expected integers"),
        ({"query_offset": [1, 2]}, ValueError, "query_offset: shape .2,.; .*broadcasts to .3,."),
        ({"key_lengths": [13, 0, 1]}, ValueError, "key_lengths: 0 to 13; expected 0 to 12, the length of key"),
        ({"key_lengths": [1, 2]}, ValueError, "key_lengths: shape .2,.; .*broadcasts to .3,."),
        ({"attn_mask": (np.zeros(12, bool), np.zeros(12))}, TypeError, "attn_mask: a pair of dtypes bool, float64"),
        ({"attn_mask": (np.zeros(12), np.zeros((4, 12), bool))}, ValueError, "attn_mask: shape .4, 12."),
        ({"windows": (1, 1)}, TypeError, "windows"),
    ],
)
def test_bad_options_are_refused(name: str, options: Any, error: type[Exception], message: str) -> None:
    layer = LAYERS[name]()
    query, key = arrays_of(np.random.default_rng(0))
    with pytest.raises(error, match=message):
        layer(query, key, **options)
    with pytest.raises(error, match=message):
        layer.backward(query, (query, key), **options)


def test_options_that_gathered_windows_cannot_have_are_refused() -> None:
    layer = LAYERS["luong, dot, local-p"]()
    query, key = arrays_of(np.random.default_rng(0))
    with pytest.raises(TypeError, match="slopes: given where each query has a window of its own"):
        layer(query, key, slopes=np.ones(1))
    assert np.array_equal(layer(query, key, slopes=None), layer(query, key))
