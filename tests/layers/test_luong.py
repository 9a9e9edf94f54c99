"""Luong's attention: three scores and three alignments against the paper's formulas; windows, and what they cost."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, SEEDS, laid_out
from tolerances import layer_bound

import fastattn
from fastattn import LuongAttention
from fastattn.layers import windows
from fastattn.layers.reference import luong_attention
from fastattn.layers.scores import Concat, Dot

Array = np.ndarray[Any, Any]

SCORES = ("dot", "general", "concat")
ALIGNMENTS = ("global", "local-m", "local-p")
VARIANTS = list(itertools.product(SCORES, ALIGNMENTS))
every_variant = pytest.mark.parametrize(("score", "align"), VARIANTS)
every_local = pytest.mark.parametrize("align", ["local-m", "local-p"])


def strong(layer: LuongAttention, factor: float = 8.0) -> LuongAttention:
    """Make parameters large: weights far from uniform, predicted positions all over the sentence."""
    for name, array in layer.state_dict().items():
        setattr(layer, name, array * layer.dtype.type(factor))
    return layer


def bound_of(layer: LuongAttention, query: Array, key: Array, value: Array, mask: float = 0.0) -> float:
    """Return the bound for results and weights: the formula of the score, with the magnitudes of everything."""
    q, k, v = (np.abs(array).astype(np.float64) for array in (query, key, value))
    if layer.score == "concat":
        # tanh and its derivative are at most 1: an error inside of it comes out no larger
        inside = np.abs(layer.score_weight).sum(axis=1).max() * max(q.max(initial=0), k.max(initial=0))
        terms = np.abs(layer.score_vector).sum() * (1 + inside)
    else:
        if layer.score == "general":
            q = q @ np.abs(layer.score_weight).astype(np.float64)
        terms = (q @ k.swapaxes(-1, -2)).max(initial=0)
    if layer.align == "local-p":
        # the factor is exp(lse' - lse), each as large and as wrong as a score
        terms = 2 * terms + math.log(k.shape[-2] + 1)
    return layer_bound(np.result_type(layer.dtype, query, key, value), terms + mask, v.max(initial=0))


# -- the formulas ------------------------------------------------------------------------------------------------------


def paper(layer: LuongAttention, query: Array, key: Array, value: Array, length: int, t: float) -> tuple[Array, Array]:
    """Evaluate section 3 of the paper for one target state, word by word."""
    scores = np.empty(length)
    for s in range(length):
        if layer.score == "dot":
            scores[s] = query @ key[s]
        elif layer.score == "general":
            scores[s] = query @ layer.score_weight @ key[s]
        else:
            scores[s] = layer.score_vector @ np.tanh(layer.score_weight @ np.concatenate([query, key[s]]))
    p = t
    if layer.align == "local-p":
        p = length * (1 / (1 + math.exp(-(layer.position_vector @ np.tanh(layer.position_weight @ query)))))
    weights, context = np.zeros(len(key)), np.zeros(value.shape[-1])
    window = [s for s in range(length) if layer.align == "global" or p - layer.window <= s <= p + layer.window]
    total = sum(math.exp(scores[s]) for s in window)
    for s in window:
        weights[s] = math.exp(scores[s]) / total
        if layer.align == "local-p":
            weights[s] *= math.exp(-((s - p) ** 2) / (2 * (layer.window / 2) ** 2))
        context += weights[s] * value[s]
    return context, weights


@every_variant
@pytest.mark.parametrize("own_value", [False, True], ids=["value is key", "own value"])
def test_the_formulas_of_the_paper(score: str, align: str, own_value: bool) -> None:
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {"value_dim": 7} if own_value else {}
    key_dim = 6 if score == "dot" else 5
    layer = strong(
        LuongAttention(6, key_dim, score, align, window=4, hidden_dim=9, rng=rng, dtype=np.float64, **options)
    )
    lengths = np.array([40, 0, 3, 17, 33])
    query, key = rng.standard_normal((5, 12, 6)), rng.standard_normal((5, 40, key_dim))
    value = rng.standard_normal((5, 40, 7)) if own_value else key
    positions = rng.uniform(-6, 46, (5, 12)) if align == "local-m" and own_value else None

    context, weights = layer(query, key, value, key_lengths=lengths, positions=positions, return_weights=True)
    assert context.shape == (5, 12, 7 if own_value else key_dim)
    assert weights.shape == (5, 12, 40)
    for b, t in itertools.product(range(5), range(12)):
        at = t if positions is None else positions[b, t]
        wanted, wanted_weights = paper(layer, query[b, t], key[b], value[b], lengths[b], at)
        assert np.abs(context[b, t] - wanted).max() <= 1e-12
        assert np.abs(weights[b, t] - wanted_weights).max() <= 1e-12
        assert not weights[b, t][wanted_weights == 0].any()
    assert np.array_equal(context, layer(query, key, value, key_lengths=lengths, positions=positions))
    if not own_value:
        assert np.array_equal(context, layer(query, key, key_lengths=lengths, positions=positions))


def test_the_attentional_state() -> None:
    layer = strong(LuongAttention(6, 5, value_dim=4, hidden_dim=3, rng=0, dtype=np.float64))
    context, query = np.random.default_rng(0).standard_normal((2, 7, 6))
    state = layer.attentional(context[:, :4], query)
    assert state.shape == (7, 3)
    for c, h, result in zip(context[:, :4], query, state, strict=True):
        assert np.abs(result - np.tanh(layer.combine_weight @ np.concatenate([c, h]))).max() <= 1e-14
    assert layer.attentional(context[0, :4], query).shape == (7, 3)
    with pytest.raises(ValueError, match="context: shape .7, 6.; expected .*4"):
        layer.attentional(context, query)
    with pytest.raises(ValueError, match="query: shape .7, 4.; expected .*6"):
        layer.attentional(context[:, :4], query[:, :4])
    with pytest.raises(ValueError, match="context, query: shapes .3, 4., .7, 6.; .*broadcast"):
        layer.attentional(context[:3, :4], query)


@st.composite
def calls(draw: st.DrawFn) -> tuple[LuongAttention, list[Array], dict[str, Any]]:
    """Draw a layer, query, key and value, and options."""
    rng = np.random.default_rng(draw(SEEDS))
    score, align = draw(st.sampled_from(VARIANTS))
    query_dim, key_dim, value_dim = (draw(st.sampled_from((1, 3, 8, 17))) for _ in range(3))
    if score == "dot":
        key_dim = query_dim
    window = draw(st.sampled_from((1, 2, 10, 70)))
    layer = LuongAttention(
        query_dim, key_dim, score, align, window=window, value_dim=value_dim, hidden_dim=5, rng=rng, dtype=draw(DTYPES)
    )
    strong(layer)
    queries, keys = draw(st.sampled_from((0, 1, 2, 9, 40, 70))), draw(st.sampled_from((0, 1, 7, 40, 200)))
    batch = draw(st.sampled_from(((), (1,), (3,), (2, 2))))
    dtype = draw(DTYPES)
    arrays = [
        laid_out(rng.standard_normal((*shape, length, n)).astype(dtype), draw(st.sampled_from(LAYOUTS)))
        for shape, length, n in (
            (batch, queries, query_dim),
            (draw(st.sampled_from((batch, batch[1:], ()))), keys, key_dim),
            (batch, keys, value_dim),
        )
    ]
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["key_lengths"] = rng.integers(0, keys + 1, batch)
    if align == "local-m" and draw(st.booleans()):
        positions = rng.uniform(-window - 2, keys + window + 2, draw(st.sampled_from(((queries,), (*batch, queries)))))
        options["positions"] = draw(st.sampled_from((positions, positions.round(), positions.astype(int))))
    if (kind := draw(st.sampled_from((None, "bool", "float")))) is not None:
        shape = draw(st.sampled_from(((queries, keys), (keys,), (*batch, queries, keys))))
        mask = rng.random(shape) < draw(st.sampled_from((0.1, 0.7)))
        added = rng.standard_normal(shape).clip(-3, 3)
        options["attn_mask"] = mask if kind == "bool" else np.where(mask, added, -np.inf)
    return layer, arrays, options


@given(calls())
def test_the_reference_gives_the_same(call: tuple[LuongAttention, list[Array], dict[str, Any]]) -> None:
    layer, arrays, options = call
    before = [array.copy() for array in arrays]
    context, weights = layer(*arrays, **options, return_weights=True)
    exact, exact_weights = luong_attention(layer, *arrays, **options)
    assert context.dtype == weights.dtype == np.result_type(layer.dtype, arrays[0]).newbyteorder("=")
    assert context.shape == exact.shape
    assert weights.shape == exact_weights.shape
    bound = bound_of(layer, *arrays, mask=3.0)
    assert np.abs(context - exact).max(initial=0) <= bound
    assert np.abs(weights - exact_weights).max(initial=0) <= bound
    assert not weights[exact_weights == 0].any()
    assert all(np.array_equal(array, old) for array, old in zip(arrays, before, strict=True))


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "length", "seen"),
    [
        (5, 20, range(3, 8)),
        (5.5, 20, range(4, 8)),
        (4.999, 20, range(3, 7)),
        (5.001, 20, range(4, 8)),
        (0, 20, range(3)),
        (-2, 20, range(1)),
        (-2.001, 20, []),
        (21, 20, range(19, 20)),
        (21.5, 20, []),
        (5, 6, range(3, 6)),
        (5, 3, []),
        (5, 0, []),
        (-1e300, 20, []),
        (1e300, 20, []),
    ],
)
def test_which_keys_a_window_holds(position: float, length: int, seen: Any) -> None:
    layer = LuongAttention(3, 3, "dot", "local-m", window=2, dtype=np.float64)
    query, key = np.zeros((1, 1, 3)), np.ones((1, 20, 3))
    context, weights = layer(query, key, key_lengths=[length], positions=[position], return_weights=True)
    assert np.flatnonzero(weights).tolist() == list(seen)
    assert np.allclose(weights[weights > 0], 1 / max(len(seen), 1))
    assert np.allclose(context, 1 if len(seen) else 0)


def test_a_predicted_window_has_both_ends() -> None:
    layer = LuongAttention(3, 3, "dot", "local-p", window=2, dtype=np.float64, rng=0)
    weights = layer(np.zeros((1, 3)), np.ones((20, 3)), return_weights=True)[1]
    # p = 20 · sigmoid(0) = 10, σ = 1, and the Gaussian is not normalised
    assert np.abs(weights[0, 8:13] - np.exp([-2, -0.5, 0, -0.5, -2]) / 5).max() <= 1e-15
    assert np.count_nonzero(weights) == 5


def test_positions_are_predicted_in_float64() -> None:
    layer = strong(LuongAttention(6, 6, align="local-p", rng=0))
    query = np.random.default_rng(0).standard_normal((50, 6), dtype=np.float32)
    wide = LuongAttention(6, 6, align="local-p", dtype=np.float64)
    wide.load_state_dict(layer.state_dict())
    hidden = np.tanh(query.astype(np.float64) @ wide.position_weight.T) @ wide.position_vector
    assert np.abs(layer._predict(query, np.array([100_000])) - 100_000 / (1 + np.exp(-hidden))).max() <= 1e-9


@every_local
@pytest.mark.parametrize("score", SCORES)
def test_what_lies_outside_of_the_window_never_shows(score: str, align: str) -> None:
    rng = np.random.default_rng(0)
    layer = strong(LuongAttention(4, 4, score, align, window=3, rng=rng, dtype=np.float64))
    query, key = rng.standard_normal((2, 30, 4)), rng.standard_normal((2, 60, 4))
    clean, weights = layer(query, key, key_lengths=[60, 25], return_weights=True)
    for j in (0, 10, 24, 25, 59):
        poisoned = key.copy()
        poisoned[:, j] = np.nan
        dirty = layer(query, poisoned, key_lengths=[60, 25])
        sees = weights[..., j] > 0
        assert np.array_equal(dirty[~sees], clean[~sees])
        assert np.isnan(dirty[sees]).all()


@every_local
def test_a_query_with_nan_gives_nan_alone(align: str) -> None:
    layer = LuongAttention(4, 4, "dot", align, window=3, rng=0)
    query, key = np.random.default_rng(0).standard_normal((2, 3, 20, 4), dtype=np.float32)
    clean = layer(query, key, key_lengths=[20, 0, 15])
    query[:, 2, 1] = np.nan
    dirty, weights = layer(query, key, key_lengths=[20, 0, 15], return_weights=True)
    others = np.arange(20) != 2
    assert np.array_equal(dirty[:, others], clean[:, others])
    assert np.isnan(dirty[[0, 2], 2]).all()
    assert not dirty[1].any()
    assert not weights[1].any()
    assert not weights[2, :, 15:].any()


@every_local
@pytest.mark.parametrize(
    "mask", [np.arange(20) >= 15, np.where(np.arange(20) < 15, -np.inf, 1.0)], ids=["bool", "float"]
)
def test_a_query_with_nan_that_may_look_at_no_key_gives_0(align: str, mask: Array) -> None:
    layer = LuongAttention(4, 4, "dot", align, window=30, rng=0)
    query, key = np.random.default_rng(0).standard_normal((2, 2, 20, 4), dtype=np.float32)
    query[:, 3] = np.nan
    out, weights = layer(query, key, attn_mask=mask, key_lengths=[20, 15], return_weights=True)
    assert np.isnan(out[0, 3]).all()
    assert not out[1].any()
    assert not weights[1].any()


@every_local
@pytest.mark.parametrize("score", SCORES)
def test_cost_does_not_grow_with_the_keys(score: str, align: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A billion keys in one place of memory: who touched each would not come back."""
    work = 0
    kind = {"dot": Dot, "general": Dot, "concat": Concat}[score]
    attend = kind.attend

    def counted(self: Dot, query: Array, key: Array, value: Array, mask: Any, options: Any, *rest: Any) -> Any:
        nonlocal work
        keys, window = key.shape[-2], options.get("window")
        if window is not None:  # what lies outside of it costs the call nothing
            keys = min(keys, sum(window) + 1)
        work += math.prod(np.broadcast_shapes(query.shape[:-2], key.shape[:-2])) * query.shape[-2] * keys
        return attend(self, query, key, value, mask, options, *rest)

    monkeypatch.setattr(kind, "attend", counted)
    layer = LuongAttention(4, 4, score, align, window=10, rng=0)
    query = np.random.default_rng(0).standard_normal((3, 100, 4), dtype=np.float32)
    row = np.random.default_rng(1).standard_normal((1, 1, 4), dtype=np.float32)
    key = np.broadcast_to(row, (3, 1_000_000_000, 4))
    lengths = [1_000_000_000, 500, 999_999_999]
    mask = np.broadcast_to(np.array([[True]]), (100, 1_000_000_000))
    layer(query, key, attn_mask=mask, key_lengths=lengths)  # what is compiled, or loaded, is so by now
    work = 0
    tracemalloc.start()
    try:
        context = layer(query, key, attn_mask=mask, key_lengths=lengths)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    # every query at its window, those of a block at all windows of the block, a block at most twice its queries
    passes = 2 if align == "local-p" else 1
    assert 0 < work <= passes * 3 * 2 * 100 * (2 * 10 + 1 + windows.REACH)
    if align == "local-m":
        assert np.abs(context - row).max() <= 1e-6


@pytest.mark.parametrize("window", [3, 10, 90])
@every_local
def test_a_sentence_alone_gives_the_same_bits(window: int, align: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How queries are taken together depends on their own sentence; predicted positions are BLAS's, so given here."""
    rng = np.random.default_rng(0)
    layer = LuongAttention(16, 16, "dot", align, window=window, rng=0)
    query, key = rng.standard_normal((4, 50, 16), dtype=np.float32), rng.standard_normal((4, 300, 16), dtype=np.float32)
    centers = [np.arange(50) * 5.0, np.full(50, 150.0), rng.uniform(0, 300, 50), rng.normal(100, 20, 50)]
    lengths = [300, 200, 299, 120]

    def call(rows: Any) -> Any:
        at = np.array(centers)[rows]
        monkeypatch.setattr(LuongAttention, "_predict", lambda *_: at)
        positions = at if align == "local-m" else None
        return layer(
            query[rows], key[rows], key_lengths=np.array(lengths)[rows], positions=positions, return_weights=True
        )

    together = call([0, 1, 2, 3])
    for b in range(4):
        for whole, alone in zip(together, call([b]), strict=True):
            assert np.array_equal(whole[b], alone[0])
    with fastattn.num_threads(1):
        for whole, single in zip(together, call([0, 1, 2, 3]), strict=True):
            assert np.array_equal(whole, single)


def test_many_queries_at_one_place_are_split() -> None:
    layer = LuongAttention(4, 4, "dot", "local-m", window=2, rng=0, dtype=np.float64)
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((1, 100, 4)), rng.standard_normal((1, 50, 4))
    exact = luong_attention(layer, query, key, positions=np.full(100, 20))[0]
    assert np.abs(layer(query, key, positions=np.full(100, 20)) - exact).max() <= 1e-14


def test_the_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LuongAttention(4, 4, "general", "local-p", window=5, rng=0)
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 3, 80, 4), dtype=np.float32)
    whole = layer(query, key)
    monkeypatch.setattr(windows, "CHUNK_BYTES", 1)
    assert np.array_equal(layer(query, key), whole)


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_a_parameter_that_a_variant_lacks_is_none() -> None:
    present = {
        (score, align): {
            name
            for name in ("score_weight", "score_vector", "position_weight", "position_vector", "combine_weight")
            if getattr(LuongAttention(4, 4, score, align), name) is not None  # type: ignore[arg-type]
        }
        for score, align in VARIANTS
    }
    for (score, align), names in present.items():
        assert ("score_weight" in names) == (score != "dot")
        assert ("score_vector" in names) == (score == "concat")
        assert ("position_weight" in names) == ("position_vector" in names) == (align == "local-p")
        assert "combine_weight" in names


def test_dimensions_have_defaults() -> None:
    layer = LuongAttention(6, 5, "concat", "local-p")
    shapes = {name: array.shape for name, array in layer.state_dict().items()}
    assert shapes == {
        "score_weight": (6, 11),
        "score_vector": (6,),
        "position_weight": (6, 6),
        "position_vector": (6,),
        "combine_weight": (6, 11),
    }


@every_variant
def test_odd_values_are_no_reason_to_warn(score: str, align: str) -> None:
    layer = strong(LuongAttention(4, 4, score, align, window=2, rng=0), 1e6)
    rng = np.random.default_rng(0)
    odd = np.array([np.nan, np.inf, -np.inf, 3e38, 1e-45, 0], np.float32)
    query, key = rng.choice(odd, (2, 5, 4)), rng.choice(odd, (2, 9, 4))
    with np.errstate(all="raise"):
        layer(query, key, key_lengths=[9, 4], return_weights=True)
        layer.attentional(query, query)


@every_local
def test_no_queries_no_keys_no_batch(align: str) -> None:
    layer = LuongAttention(4, 4, "general", align, rng=0)
    for batch, queries, keys in ((2, 0, 5), (2, 3, 0), (0, 3, 5)):
        query, key = np.ones((batch, queries, 4), np.float32), np.ones((batch, keys, 4), np.float32)
        context, weights = layer(query, key, return_weights=True)
        assert context.shape == (batch, queries, 4)
        assert weights.shape == (batch, queries, keys)
        assert not context.any()


CALL = {"query": np.zeros((2, 3, 4)), "key": np.zeros((2, 7, 5))}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query": np.zeros((2, 3, 5))}, ValueError, "query: shape .2, 3, 5.; expected .*length, 4"),
        ({"key": np.zeros((2, 7, 4))}, ValueError, "key: shape .2, 7, 4.; expected .*length, 5"),
        ({"key": np.zeros((3, 7, 5))}, ValueError, "query, key, value: shapes "),
        ({"value": np.zeros((2, 6, 5))}, ValueError, "value: shape .2, 6, 5.; expected length 7"),
        ({"key": np.zeros((2, 7, 5), complex)}, TypeError, "key: dtype complex128"),
        ({"attn_mask": np.zeros((2, 3, 6))}, ValueError, "attn_mask: shape .2, 3, 6.; .* .2, 3, 7."),
        ({"attn_mask": np.zeros((3, 7), int)}, TypeError, "attn_mask: dtype int64"),
        ({"key_lengths": [7, 8]}, ValueError, "key_lengths: 7 to 8; expected 0 to 7"),
        ({"key_lengths": [-1, 7]}, ValueError, "key_lengths: -1 to 7"),
        ({"key_lengths": [1.0, 7.0]}, TypeError, "key_lengths: dtype float64; expected integers"),
        ({"key_lengths": [1, 2, 3]}, ValueError, "key_lengths: shape .3,.; .* .2,."),
        ({"positions": [0, 1]}, ValueError, "positions: shape .2,.; .* .2, 3."),
        ({"positions": [0, 1, np.nan]}, ValueError, "positions: some are NaN or infinite"),
        ({"return_weights": None}, TypeError, "return_weights: None"),
    ],
)
def test_bad_calls_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LuongAttention(4, 5, align="local-m")(**{**CALL, **options})


@pytest.mark.parametrize("align", ["global", "local-p"])
def test_positions_are_for_the_monotonic_alignment(align: Any) -> None:
    with pytest.raises(ValueError, match=f"positions: given, but align is '{align}'"):
        LuongAttention(4, 5, align=align)(**CALL, positions=[0, 1, 2])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: LuongAttention(4, 5, "dot"),
            ValueError,
            "key_dim: 5; expected 4, as query_dim, where the score is 'dot'",
        ),
        (
            lambda: LuongAttention(4, 4, "cosine"),
            ValueError,
            "score: 'cosine'.*expected one of 'dot', 'general', 'concat'",
        ),
        (
            lambda: LuongAttention(4, 4, "dot", "local"),
            ValueError,
            "align: 'local'.*expected one of 'global', 'local-m'",
        ),
        (lambda: LuongAttention(4, 4, None), TypeError, "score: None"),
        (lambda: LuongAttention(4, 4, window=0), ValueError, "window: 0; expected at least 1"),
        (lambda: LuongAttention(4, 4, window=2.5), TypeError, "window: 2.5 of type float"),
        (lambda: LuongAttention(0, 4), ValueError, "query_dim: 0"),
        (lambda: LuongAttention(4, 4, hidden_dim=0), ValueError, "hidden_dim: 0"),
    ],
)
def test_bad_constructions_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
