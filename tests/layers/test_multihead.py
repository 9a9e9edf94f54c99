"""Layers: what they share; multi-head attention against PyTorch and the formula."""

from __future__ import annotations

import copy
import math
import pickle
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import torch_masks
from strategies import DTYPES, LAYOUTS, SEEDS, laid_out
from tolerances import layer_bound

import fastattn
from fastattn import BahdanauAttention, LuongAttention, MultiHeadAttention
from fastattn.layers.projections import project
from fastattn.layers.reference import multi_head_attention

Array = np.ndarray[Any, Any]


def bound_of(layer: MultiHeadAttention, *arrays: Array, mask: float = 0.0) -> float:
    """Return the bound for a layer's results and weights: its formula, with the magnitudes of everything."""
    size = copy.deepcopy(layer)
    size.load_state_dict({name: np.abs(array) for name, array in layer.state_dict().items()})
    q, k, v = project(size, *(np.abs(array).astype(np.float64) for array in arrays))
    scores = q @ np.repeat(k, layer.num_heads // layer.num_kv_heads, axis=-3).swapaxes(-1, -2)
    values = size.out_proj_weight.sum(axis=1).max() * v.max(initial=0)
    dtype = np.result_type(layer.dtype, *arrays)
    return layer_bound(dtype, scores.max(initial=0) / math.sqrt(layer.head_dim) + mask, values)


def random_layer(rng: np.random.Generator, *args: Any, **options: Any) -> MultiHeadAttention:
    """Return a layer whose biases are not 0."""
    layer = MultiHeadAttention(*args, **options, rng=rng)
    for name in ("in_proj_bias", "out_proj_bias"):
        if layer.bias:
            getattr(layer, name)[:] = rng.standard_normal(getattr(layer, name).shape)
    return layer


# -- what layers share -------------------------------------------------------------------------------------------------

LAYERS: dict[str, Any] = {
    "packed": lambda **options: MultiHeadAttention(8, 2, **options),
    "separate, no bias": lambda **options: MultiHeadAttention(8, 4, num_kv_heads=2, kdim=3, bias=False, **options),
    "concat, predictive": lambda **options: LuongAttention(4, 6, "concat", "local-p", value_dim=2, **options),
    "bahdanau": lambda **options: BahdanauAttention(4, 6, 5, **options),
    "dot": lambda **options: LuongAttention(4, 4, "dot", "local-m", window=3, **options),
}


@pytest.fixture(params=LAYERS, name="make")
def _make(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param]


def same(first: Any, second: Any) -> bool:
    """Whether two layers have the same shape, dtype and bits."""
    states = first.state_dict(), second.state_dict()
    return (
        repr(first) == repr(second)
        and list(states[0]) == list(states[1])
        and all(a.dtype == b.dtype and (a == b).all() for a, b in zip(*(s.values() for s in states), strict=True))
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_layer_survives_pickling_copying_and_saving(make: Any, dtype: Any, tmp_path: Path) -> None:
    layer = make(dtype=dtype)
    assert same(layer, pickle.loads(pickle.dumps(layer)))
    other = copy.deepcopy(layer)
    assert same(layer, other)
    other.state_dict()[next(iter(other.state_dict()))][...] = 7  # a copy: the layer does not change
    assert same(layer, other)
    pytest.importorskip("safetensors")
    layer.save(tmp_path / "layer.safetensors")
    assert same(layer, type(layer).load(tmp_path / "layer.safetensors"))


def test_what_is_saved_has_the_names_of_the_state_dict(make: Any, tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.numpy").load_file
    layer = make()
    for name in layer.state_dict():
        attribute = name.replace(".", "_")
        setattr(
            layer, attribute, np.asfortranarray(getattr(layer, attribute))
        )  # written as it is meant, not as it lies
    layer.save(tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    assert set(state) == set(layer.state_dict())
    other = make()
    other.load_state_dict(state)
    assert same(layer, other)


def test_other_files_are_refused(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "file"
    numpy.save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no layer; expected a MultiHeadAttention that save"):
        MultiHeadAttention.load(path)
    LAYERS["dot"]().save(path)
    with pytest.raises(ValueError, match="holds LuongAttention; expected a MultiHeadAttention"):
        MultiHeadAttention.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a safetensors file"):
        MultiHeadAttention.load(path)
    with pytest.raises(FileNotFoundError):
        MultiHeadAttention.load(tmp_path / "none")


@pytest.mark.parametrize(
    "arguments",
    [
        None,
        "{",
        "3",
        "[]",
        "{}",
        "[" * 10**5,
        '{"embed_dim": 8, "num_heads": "2"}',
        '{"embed_dim": 1000000, "num_heads": 2}',
    ],
    ids=range(8),
)
def test_what_a_file_says_of_a_layer_is_checked_before_anything_is_made(tmp_path: Path, arguments: str | None) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "file"
    said = {"layer": "MultiHeadAttention"} | ({} if arguments is None else {"arguments": arguments})
    numpy.save_file(MultiHeadAttention(8, 2, rng=0).state_dict(), path, said)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"^path: {path} holds no MultiHeadAttention that can be read: "):
        MultiHeadAttention.load(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 22


def test_saving_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        LAYERS["dot"]().save(tmp_path / "file")
    with pytest.raises(ImportError, match="pip install safetensors"):
        LuongAttention.load(tmp_path / "file")


def test_the_same_seed_makes_the_same_layer(make: Any) -> None:
    assert same(make(rng=3), make(rng=np.int64(3)))
    assert same(make(rng=3), make(rng=np.random.default_rng(3)))
    assert not same(make(rng=3), make(rng=4))
    assert not same(make(), make())
    rng = np.random.default_rng(3)
    assert not same(make(rng=rng), make(rng=rng)), "a generator moves on"
    wide, narrow = make(rng=3, dtype=np.float64).state_dict(), make(rng=3).state_dict()
    assert all((narrow[name] == wide[name].astype(np.float32)).all() for name in wide)


def test_initial_parameters_are_as_large_as_they_should_be() -> None:
    layer = MultiHeadAttention(64, 4, rng=0)
    for weight, limit in ((layer.in_proj_weight, math.sqrt(6 / (4 * 64))), (layer.out_proj_weight, 1 / 8)):
        assert 0.98 * limit < np.abs(weight).max() <= limit
        assert abs(weight.mean()) < 0.02 * limit
    assert not layer.in_proj_bias.any()
    assert not layer.out_proj_bias.any()
    assert 0.09 < np.abs(LuongAttention(32, 32, rng=0).score_weight).max() <= np.float32(0.1)


def test_the_shapes_are_shown() -> None:
    text = repr(MultiHeadAttention(8, 4, num_kv_heads=2, kdim=3, rng=0, dtype=np.float64))
    assert text.splitlines() == [
        "MultiHeadAttention(embed_dim=8, num_heads=4, num_kv_heads=2, kdim=3, vdim=8, bias=True, dtype=float64)",
        "  q_proj_weight: (8, 8)",
        "  k_proj_weight: (4, 3)",
        "  v_proj_weight: (4, 8)",
        "  in_proj_bias: (16,)",
        "  out_proj.weight: (8, 8)",
        "  out_proj.bias: (8,)",
    ]


def test_a_state_dict_that_does_not_fit_changes_nothing(make: Any) -> None:
    layer = make(rng=0)
    before, state = copy.deepcopy(layer), make(rng=1).state_dict()
    *_, last = state
    wrong: list[tuple[Any, type[Exception], str]] = [
        (
            {**state, last: state[last][..., :-1]},
            ValueError,
            f"{last}: shape .*; expected {re.escape(str(state[last].shape))}",
        ),
        (
            {**state, last: state[last].astype(int)},
            TypeError,
            f"{last}: dtype int64; expected float16, float32 or float64",
        ),
        ({**state, last: state[last] + 1j}, TypeError, f"{last}: dtype complex64"),
        ({**state, last: state[last].astype(np.longdouble)}, TypeError, f"{last}: dtype"),
        (
            {**state, last: np.full(state[last].shape, 1e300)},
            ValueError,
            f"{last}: .* 1e.300; expected one that float32",
        ),
        ({**state, "bias_k": 0}, ValueError, "state: a mapping with 'bias_k'; expected the names '"),
        ({name: state[name] for name in state if name != last}, ValueError, f"state: a mapping without '{last}'"),
        (list(state), TypeError, "state: .* of type list; expected a mapping"),
    ]
    for given_state, error, message in wrong:
        with pytest.raises(error, match=message):
            layer.load_state_dict(given_state)
        assert same(layer, before)
    layer.load_state_dict(state)
    assert same(layer, make(rng=1))
    state[last][...] = 7  # what was loaded is a copy
    assert same(layer, make(rng=1))


def test_what_is_assigned_to_a_parameter_is_checked() -> None:
    layer = MultiHeadAttention(4, 2, rng=0)
    weight = np.ones((4, 4), np.float32)
    layer.out_proj_weight = weight
    assert layer.out_proj_weight is weight
    layer.out_proj_weight = weight.astype(np.float64)
    assert layer.out_proj_weight.dtype == np.float32
    with pytest.raises(ValueError, match="out_proj_weight: shape .3,.; expected .4, 4."):
        layer.out_proj_weight = np.ones(3)
    with pytest.raises(TypeError, match="out_proj_weight: None; expected an array_like"):
        layer.out_proj_weight = None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MultiHeadAttention(6, 4), ValueError, "embed_dim: 6; expected a multiple of num_heads, which is 4"),
        (lambda: MultiHeadAttention(8, 4, num_kv_heads=3), ValueError, "num_kv_heads: 3; expected a divisor"),
        (lambda: MultiHeadAttention(8.0, 4), TypeError, "embed_dim: 8.0 of type float; expected an int"),
        (lambda: MultiHeadAttention(8, True), TypeError, "num_heads: True"),
        (lambda: MultiHeadAttention(8, 0), ValueError, "num_heads: 0; expected at least 1"),
        (lambda: MultiHeadAttention(8, 2, kdim=0), ValueError, "kdim: 0"),
        (lambda: MultiHeadAttention(8, 2, vdim="8"), TypeError, "vdim: '8' of type str"),
        (lambda: MultiHeadAttention(8, 2, bias=1), TypeError, "bias: 1 of type int; expected True or False"),
        (lambda: MultiHeadAttention(8, 2, rng=-1), ValueError, "rng: -1"),
        (lambda: MultiHeadAttention(8, 2, rng=1.0), TypeError, "rng: 1.0 of type float"),
        (
            lambda: MultiHeadAttention(8, 2, dtype=np.longdouble),
            TypeError,
            "dtype: .*longdouble.*; expected float16, bfloat16, float32 or float64",
        ),
        (lambda: MultiHeadAttention(8, 2, dtype="no"), TypeError, "dtype: 'no' of type str"),
        (lambda: MultiHeadAttention(8, 2, dtype=None), TypeError, "dtype: None"),
    ],
)
def test_bad_constructions_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# -- multi-head attention: PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("self", {}),
        ("cross", {}),
        ("key is not value", {}),
        ("query is key", {}),
        ("kdim", {"kdim": 12}),
        ("vdim", {"vdim": 20}),
        ("both", {"kdim": 12, "vdim": 20}),
    ],
)
@pytest.mark.parametrize("mask", [None, "bool", "float", "heads", "padding", "both", "causal"])
def test_torch_computes_the_same(form: str, options: dict[str, int], mask: str | None, bias: bool) -> None:
    torch = pytest.importorskip("torch")
    batch, queries, keys, embed, heads = 3, 9, 9 if form in ("self", "query is key") or mask == "causal" else 14, 24, 4
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(embed, heads, bias=bias, batch_first=True, dtype=torch.float64, **options)
    theirs = theirs.eval().requires_grad_(False)
    if bias:
        theirs.in_proj_bias.normal_(0, 0.3)
        theirs.out_proj.bias.normal_(0, 0.3)
    layer = MultiHeadAttention(embed, heads, bias=bias, dtype=np.float64, **options)
    layer.load_state_dict(theirs.state_dict())
    assert list(layer.state_dict()) == list(theirs.state_dict())

    query = rng.standard_normal((batch, queries, embed))
    key = query if form in ("self", "query is key") else rng.standard_normal((batch, keys, layer.kdim))
    value = key
    if form not in ("self", "cross"):
        value = rng.standard_normal((batch, keys, layer.vdim))

    ours, their = torch_masks(rng, mask, batch, heads, queries, keys)

    arguments = {"self": (query,), "cross": (query, key)}.get(form, (query, key, value))
    out, weights = layer(*arguments, **ours, return_weights=True)
    tensors = (torch.from_numpy(array) for array in (query, key, value))
    their_out, their_weights = theirs(*tensors, **their, average_attn_weights=False)
    bound = 2 * bound_of(layer, query, key, value, mask=5.0 if mask in ("float", "heads") else 0.0)  # both may be wrong
    assert bound < 1e-11
    assert np.abs(out - their_out.numpy()).max() <= bound
    assert np.abs(weights - their_weights.numpy()).max() <= bound
    assert np.array_equal(out, layer(*arguments, **ours))


def test_torch_parameters_can_be_loaded_in_float32() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.nn.MultiheadAttention(24, 4, batch_first=True).eval().requires_grad_(False)
    layer = MultiHeadAttention(24, 4)
    layer.load_state_dict(theirs.state_dict())
    x = np.random.default_rng(0).standard_normal((9, 24), dtype=np.float32)
    tensor = torch.from_numpy(x)
    assert np.abs(layer(x) - theirs(tensor, tensor, tensor)[0].numpy()).max() <= 2 * bound_of(layer, x, x, x)
    trained = torch.nn.MultiheadAttention(24, 4)
    with pytest.raises(TypeError, match="in_proj_weight: .* cannot be made an array.*detach"):
        layer.load_state_dict(dict(trained.named_parameters()))


# -- multi-head attention: the formula ---------------------------------------------------------------------------------


@st.composite
def multi_head_calls(draw: st.DrawFn) -> tuple[MultiHeadAttention, list[Array], dict[str, Any]]:
    """Draw a layer, query, key and value, and masks."""
    rng = np.random.default_rng(draw(SEEDS))
    kv_heads, group, head_dim = draw(
        st.sampled_from(((1, 1, 5), (2, 1, 8), (4, 1, 3), (1, 3, 4), (2, 2, 8), (2, 4, 1)))
    )
    heads = kv_heads * group
    embed = heads * head_dim
    kdim, vdim = (draw(st.sampled_from((None, 1, 7))) for _ in range(2))
    options = {"num_kv_heads": kv_heads, "kdim": kdim, "vdim": vdim, "bias": draw(st.booleans()), "dtype": draw(DTYPES)}
    layer = random_layer(rng, embed, heads, **options)
    queries, keys = draw(st.integers(1, 20)), draw(st.integers(0, 20))
    batch = draw(st.sampled_from(((), (3,), (2, 2))))
    dtype = draw(DTYPES)
    arrays = [
        laid_out(rng.standard_normal((*batch, length, features)).astype(dtype), draw(st.sampled_from(LAYOUTS)))
        for length, features in ((queries, embed), (keys, layer.kdim), (keys, layer.vdim))
    ]
    masks: dict[str, Any] = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        masks["key_mask"] = rng.random((*batch, keys)) < 0.6
    if (kind := draw(st.sampled_from((None, "bool", "float")))) is not None:
        shape = draw(st.sampled_from(((queries, keys), (heads, 1, keys), (*batch, heads, queries, keys))))
        mask = rng.random(shape) < 0.6
        masks["attn_mask"] = mask if kind == "bool" else np.where(mask, rng.standard_normal(shape).clip(-3, 3), -np.inf)
    return layer, arrays, masks


@given(multi_head_calls())
def test_the_formula_gives_the_same(call: tuple[MultiHeadAttention, list[Array], dict[str, Any]]) -> None:
    layer, arrays, masks = call
    before = [array.copy() for array in arrays]
    out, weights = layer(*arrays, **masks, return_weights=True)
    exact, exact_weights = multi_head_attention(layer, *arrays, **masks)
    assert out.dtype == weights.dtype == np.result_type(layer.dtype, arrays[0]).newbyteorder("=")
    assert out.shape == exact.shape
    assert weights.shape == exact_weights.shape
    bound = bound_of(layer, *arrays, mask=3.0)
    assert np.abs(out - exact).max(initial=0) <= bound
    assert np.abs(weights - exact_weights).max(initial=0) <= bound
    assert all(np.array_equal(array, old) for array, old in zip(arrays, before, strict=True))


def test_key_and_value_default_to_what_is_given() -> None:
    layer, rng = random_layer(np.random.default_rng(0), 8, 2), np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 5, 8), dtype=np.float32)
    assert np.array_equal(layer(x), layer(x, x, x))
    assert np.array_equal(layer(x, y), layer(x, y, y))
    # other products, other roundings
    assert np.abs(layer(x, x.copy(), x.copy()) - layer(x)).max() <= 2 * bound_of(layer, x, x, x)
    with pytest.raises(TypeError, match="value: given without key"):
        layer(x, value=y)


def test_integers_compute_in_float64_and_dtypes_promote() -> None:
    layer = MultiHeadAttention(4, 2, rng=0)
    x = np.arange(12).reshape(3, 4)
    assert layer(x).dtype == np.float64
    assert layer(x.tolist()).dtype == np.float64
    assert layer(x.astype(np.float32)).dtype == np.float32
    assert layer(x.astype(np.float64), x.astype(np.float32)).dtype == np.float64
    assert MultiHeadAttention(4, 2, dtype=np.float64)(x.astype(np.float32)).dtype == np.float64
    assert np.array_equal(layer(x), layer(x.astype(np.float64)))


def test_a_query_without_a_key_gives_the_last_bias() -> None:
    layer = random_layer(np.random.default_rng(0), 8, 2)
    x = np.random.default_rng(1).standard_normal((2, 5, 8), dtype=np.float32)
    out, weights = layer(x, key_mask=[[True] * 5, [False] * 5], return_weights=True)
    assert (out[1] == layer.out_proj_bias).all()
    assert not weights[1].any()
    assert np.allclose(weights[0].sum(axis=-1), 1)
    assert (layer(x, x[:, :0]) == layer.out_proj_bias).all()
    assert layer(x[:, :0]).shape == (2, 0, 8)
    assert layer(x[:0]).shape == (0, 5, 8)


@pytest.mark.parametrize("attn_mask", [None, np.ones((5, 5), bool)], ids=["none", "bool"])
def test_a_key_mask_of_rank_0_is_that_of_all_keys(attn_mask: Array | None) -> None:
    layer = random_layer(np.random.default_rng(0), 8, 2)
    x = np.random.default_rng(1).standard_normal((2, 5, 8), dtype=np.float32)
    assert np.array_equal(layer(x, attn_mask=attn_mask, key_mask=True), layer(x))
    assert (layer(x, attn_mask=attn_mask, key_mask=np.bool_(False)) == layer.out_proj_bias).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("attn_mask", [None, np.ones((5, 5), bool), np.zeros((5, 5))], ids=["none", "bool", "float"])
def test_padding_does_not_leak(bad: float, attn_mask: Array | None) -> None:
    layer = random_layer(np.random.default_rng(0), 8, 2)
    x = np.random.default_rng(1).standard_normal((2, 5, 8), dtype=np.float32)
    key_mask = np.arange(5) < [[5], [3]]
    clean = layer(x, attn_mask=attn_mask, key_mask=key_mask)
    x[1, 3:] = bad
    dirty = layer(x, attn_mask=attn_mask, key_mask=key_mask)
    assert np.array_equal(dirty[0], clean[0])
    assert np.array_equal(dirty[1, :3], clean[1, :3])
    assert np.isnan(dirty[1, 3:]).all(), "what is not masked shows: these are queries as well"


def test_a_mask_of_keys_is_not_expanded() -> None:
    length, layer = 4096, MultiHeadAttention(8, 1, rng=0)
    x, key_mask = np.zeros((2, length, 8), np.float32), np.ones((2, length), bool)
    layer(x[:, :64], key_mask=key_mask[:, :64])
    tracemalloc.start()
    try:
        layer(x, key_mask=key_mask)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * x.nbytes < length * length


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_in_any_layout(layout: str) -> None:
    rng = np.random.default_rng(0)
    layer, x, y = MultiHeadAttention(64, 4, rng=0), *rng.standard_normal((2, 3, 70, 64), dtype=np.float32)
    assert np.array_equal(layer(laid_out(x, layout)), layer(x))
    assert np.array_equal(layer(laid_out(x[0], layout)), layer(x[0]))
    assert np.array_equal(layer(laid_out(x, layout), laid_out(y, layout)), layer(x, y))
    other = copy.deepcopy(layer)
    other.in_proj_weight = laid_out(layer.in_proj_weight, layout)
    assert np.array_equal(other(x), layer(x))


def test_the_same_bits_at_any_thread_count() -> None:
    layer = MultiHeadAttention(64, 4, rng=0)
    x = np.random.default_rng(0).standard_normal((4, 300, 64), dtype=np.float32)
    with fastattn.num_threads(1):
        alone = layer(x)
    with fastattn.num_threads(3):
        assert np.array_equal(layer(x), alone)


def test_grouped_heads_are_repeated_ones() -> None:
    rng = np.random.default_rng(0)
    grouped = random_layer(rng, 24, 6, num_kv_heads=2, dtype=np.float64)
    whole = MultiHeadAttention(24, 6, dtype=np.float64)
    kv = [
        np.repeat(w.reshape(2, 4, -1), 3, axis=0).reshape(24, -1)
        for w in (grouped.k_proj_weight, grouped.v_proj_weight)
    ]
    biases = np.split(grouped.in_proj_bias, [24, 32])
    whole.in_proj_weight = np.concatenate([grouped.q_proj_weight, *kv])
    whole.in_proj_bias = np.concatenate(
        [biases[0], *(np.repeat(bias.reshape(2, 4), 3, axis=0).ravel() for bias in biases[1:])]
    )
    whole.out_proj_weight, whole.out_proj_bias = grouped.out_proj_weight, grouped.out_proj_bias
    x = rng.standard_normal((2, 7, 24))
    assert np.abs(grouped(x) - whole(x)).max() <= 2 * bound_of(whole, x, x, x)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (((2, 5, 7),), {}, ValueError, "query: shape .2, 5, 7.; expected .*length, 8"),
        (((8,),), {}, ValueError, "query: shape .8,.; expected .*length, 8"),
        (((1,) * 30 + (8,),), {}, ValueError, "query: shape .* has rank 31; expected 2 to 30"),
        (((5, 8), (6, 3)), {}, ValueError, "key: shape .6, 3.; expected .*length, 8"),
        (((5, 8), (6, 8), (7, 8)), {}, ValueError, "value: shape .7, 8.; expected length 6"),
        (((2, 5, 8), (3, 6, 8)), {}, ValueError, "query, key, value: shapes .* to broadcast"),
        (((5, 8),), {"key_mask": np.ones(5)}, TypeError, "key_mask: dtype float64; expected boolean"),
        (((5, 8),), {"key_mask": np.ones(4, bool)}, ValueError, "key_mask: shape .4,.; expected .*broadcasts to .5,"),
        (((5, 8),), {"key_mask": np.ones((2, 5), bool)}, ValueError, "key_mask: shape .2, 5."),
        (((5, 8),), {"attn_mask": np.ones((5, 5), int)}, TypeError, "attn_mask: dtype int64 could mean two things"),
        (((5, 8),), {"attn_mask": np.ones((3, 5, 5))}, ValueError, "attn_mask: shape .3, 5, 5.; .* .2, 5, 5."),
        (((5, 8),), {"is_causal": "up"}, ValueError, "is_causal: 'up'"),
        (((5, 8),), {"return_weights": 1}, TypeError, "return_weights: 1"),
    ],
)
def test_bad_calls_are_refused(arguments: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = MultiHeadAttention(8, 2, rng=0)
    with pytest.raises(error, match=message):
        layer(*(np.zeros(shape, np.float32) for shape in arguments), **options)
    with pytest.raises(TypeError, match="query: dtype complex128 is not supported"):
        layer(np.zeros((5, 8), complex))
