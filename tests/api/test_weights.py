"""`attention_weights` and `attention_summary`: against the whole matrix, bit by bit, and in little memory."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
import processes
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import takes_long
from memory import MEASURE
from strategies import LAYOUTS, SIZES, Call, calls, each, laid_out, numbers, random_mask
from weight_cases import check_chosen, check_summary, cut, exact, selections, without_values

import fastattn
from fastattn import reference

MANY = 2 * settings().max_examples
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")


def bits(summary: Any) -> list[bytes]:
    return [array.tobytes() for array in summary]


# -- the summary -------------------------------------------------------------------------------------------------------

top_ks = st.sampled_from((0, 1, 2, 3, 7, 8, 9, 16, 17, 40, 200))


@settings(max_examples=MANY)
@given(call=calls(), top_k=top_ks)
def test_summary_of_any_call(call: Call, top_k: int) -> None:
    check_summary(without_values(call), call.options, top_k)


@settings(max_examples=MANY)
@given(
    call=calls(sizes=tuple(SIZES), odd=True, masks=(None, "bool", "padding", "float, -inf", "float, odd")), top_k=top_ks
)
def test_summary_of_values_that_are_not_finite(call: Call, top_k: int) -> None:
    check_summary(without_values(call), call.options, top_k)


@given(call=calls(sizes=tuple(SIZES), masks=(None, "bool", "padding", "float", "float, -inf", "float, lowest")))
def test_summary_of_extreme_sizes(call: Call) -> None:
    check_summary(without_values(call), call.options)


@pytest.mark.parametrize(
    ("scale", "of_query", "of_key"), [(1e39, 1e-19, 1e-20), (-1e60, 1e-30, 1e-30), (1e-76, 1e38, 1e38)]
)
def test_a_scale_need_not_be_a_number_of_float32(backend: str, scale: float, of_query: float, of_key: float) -> None:
    rng = np.random.default_rng(8)
    query, key = ((size * rng.standard_normal((n, 4))).astype(np.float32) for size, n in ((of_query, 60), (of_key, 90)))
    args = query, key, rng.standard_normal((60, 90), np.float32)
    summary = check_summary(args, {"scale": scale}, 3, backend)
    wanted = tolerances.expected(query, key, key, args[2], scale=scale)
    for lse in (None, summary.lse):
        found = fastattn.attention_weights(*args, scale=scale, rows=[5, 3], columns=slice(7), lse=lse, backend=backend)
        assert found.dtype == np.float32
        assert (np.abs(found - wanted.weights[[5, 3], :7]) <= wanted.weights_bound[[5, 3]] + 1e-6).all()


@given(call=calls(empty=True), top_k=top_ks)
def test_summary_of_axes_of_length_zero(backend: str, call: Call, top_k: int) -> None:
    check_summary(without_values(call), call.options, top_k, backend)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [None, "bool", "padding", "float, -inf"])
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
@pytest.mark.parametrize("length", [(3, 777), (70, 530), (150, 65)], ids=str)
def test_summary_of_many_blocks(dtype: Any, kind: str | None, is_causal: Any, length: Any) -> None:
    rng = np.random.default_rng(length)
    query, key = (numbers(rng, (heads, n, 33), dtype) for heads, n in zip((2, 1), length, strict=True))
    mask = None if kind is None else random_mask(rng, (2, *length), kind, np.float32)
    check_summary((query, key, mask), {"is_causal": is_causal, "enable_gqa": True})


#: Of two rows of a batch: windows, offsets, lengths, softcaps, slopes.
INTERVALS: list[dict[str, Any]] = [
    {"window": (70, 5), "query_offset": 9},
    {"window": (3, None), "softcap": 2.0},
    {"window": (200, 0), "is_causal": "bottom-right", "key_lengths": [130, 40]},
    {"query_offset": [-100, 60], "is_causal": True, "softcap": 5.0},
    {"window": (40, 30), "query_offset": [200, -20], "key_lengths": [257, 0]},
    {"alibi_slopes": [[0.1], [2.0**-8]], "query_offset": [-30, 40]},
]
intervals = pytest.mark.parametrize("options", INTERVALS, ids=str)


@intervals
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [None, "bool", "pair"])
@pytest.mark.parametrize("length", [(3, 777), (70, 530), (150, 257)], ids=str)
def test_summary_of_many_blocks_of_intervals(dtype: Any, kind: str | None, options: Any, length: Any) -> None:
    rng = np.random.default_rng(length)
    query, key = (numbers(rng, (2, heads, n, 33), dtype) for heads, n in zip((2, 1), length, strict=True))
    keep = None if kind is None else random_mask(rng, (2, *length), "bool", np.float32)
    mask = (numbers(rng, length, dtype), keep) if kind == "pair" else keep
    summary = check_summary((query, key, mask), {"enable_gqa": True, **options})
    visible = fastattn.attention_weights(query, key, None, enable_gqa=True, **options) != 0
    assert not summary.received[~visible.any(axis=-2)].any()
    assert not summary.entropy[~visible.any(axis=-1)].any()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_lies_outside_of_all_intervals_never_shows(backend: str, odd: float, softcap: float | None) -> None:
    query, key = np.random.default_rng(0).standard_normal((2, 2, 1, 150, 8)).astype(np.float32)
    options: dict[str, Any] = {"window": (20, None), "query_offset": 40, "key_lengths": [97, 149], "softcap": softcap}
    rows, columns = [0, 70, 149, 3], slice(10, 120)

    def everything() -> list[bytes]:
        summary = fastattn.attention_summary(query, key, **options, backend=backend)
        some = {"rows": rows, "columns": columns, "backend": backend, **options}
        weights = [fastattn.attention_weights(query, key, **some, lse=lse) for lse in (None, summary.lse)]
        return [*bits(summary), *bits(weights)]

    wanted = everything()
    key[0, :, 97:], key[1, :, 149:], key[..., :20, :] = odd, odd, odd
    assert everything() == wanted


def test_a_padded_sequence_has_the_summary_of_the_same_sequence_alone() -> None:
    query, key = np.random.default_rng(0).standard_normal((2, 3, 2, 400, 24)).astype(np.float32)
    for options in ({}, {"window": (60, 3), "softcap": 2.0}, {"is_causal": "bottom-right"}):
        for keys in (0, 1, 130, 320):
            alone = fastattn.attention_summary(query[1], key[1, :, :keys], **options)
            lengths = [400, keys, 77]
            padded = fastattn.attention_summary(query, key, **options, key_lengths=lengths)
            assert not padded.received[1, :, keys:].any()
            mine = [array[1] for array in padded]
            mine[-1] = mine[-1][:, :keys]
            assert bits(mine) == bits(alone)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("height", [-60, 60, 300])
def test_summary_of_scores_that_keep_rising(dtype: Any, height: float) -> None:
    """Each block raises m, by a little or by much, or none but the first does."""
    query, key = np.ones((1, 70, 8), dtype), np.zeros((1, 1000, 8), dtype)
    key[0, :, 0] = np.linspace(0, height, 1000)
    for is_causal in (False, "bottom-right"):
        check_summary((query, key, None), {"scale": 1, "is_causal": is_causal})


@given(
    call=calls(any_layout=False),
    names=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    threads=st.integers(1, 5),
    top_k=top_ks,
)
def test_summary_has_the_same_bits_in_any_layout_and_at_any_thread_count(
    call: Call, names: tuple[str, ...], threads: int, top_k: int
) -> None:
    args = without_values(call)
    with fastattn.num_threads(1):
        wanted = fastattn.attention_summary(*args, **call.options, top_k=top_k)
    moved = [each(partial(laid_out, layout=name), array) for array, name in zip(args, names, strict=True)]
    with fastattn.num_threads(threads):
        assert bits(fastattn.attention_summary(*moved, **call.options, top_k=top_k)) == bits(wanted)


@pytest.mark.parametrize("is_causal", [False, True])
def test_summary_of_long_calls_has_the_same_bits_at_any_thread_count_and_alone(is_causal: bool) -> None:
    query, key = np.random.default_rng(1).standard_normal((2, 3, 2, 1500, 24)).astype(np.float32)
    summaries = []
    for threads in (1, 2, 3, 7):
        with fastattn.num_threads(threads):
            summaries.append(fastattn.attention_summary(query, key, is_causal=is_causal))
    assert all(bits(summary) == bits(summaries[0]) for summary in summaries)
    alone = fastattn.attention_summary(query[1, :1], key[1, :1], is_causal=is_causal)
    assert bits(alone) == [array[1, :1].tobytes() for array in summaries[0]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["equal", "rising", "falling", "few values", "saw"])
@pytest.mark.parametrize("top_k", [1, 8, 50, 400])
def test_ties_go_to_the_lower_index(backend: str, dtype: Any, order: str, top_k: int) -> None:
    rng = np.random.default_rng(0)
    keys = 300
    heights = {
        "equal": np.zeros(keys),
        "rising": np.arange(keys) // 2,
        "falling": -(np.arange(keys) // 2),
        "few values": rng.integers(-2, 3, keys),
        "saw": np.arange(keys) % 7,
    }[order]
    query, key = np.ones((40, 2), dtype), np.stack([heights / 8, np.zeros(keys)], axis=1).astype(dtype)
    mask = rng.random((40, keys)) < 0.9
    for attn_mask in (None, mask):
        # multiples of 1/8 have exact scores, in all types
        scores = np.where(True if attn_mask is None else mask, heights, -np.inf) * np.ones((40, 1))
        wanted = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
        count = np.isfinite(scores).sum(axis=-1, keepdims=True)
        wanted = np.where(np.arange(wanted.shape[1]) < count, wanted, -1)
        summary = fastattn.attention_summary(query, key, attn_mask, scale=1, top_k=top_k, backend=backend)
        np.testing.assert_array_equal(summary.top_indices[:, :keys], wanted)
        assert (summary.top_indices[:, keys:] == -1).all()
        assert not summary.top_weights[summary.top_indices == -1].any()
        tolerances.check_summary(summary, *exact((query, key, attn_mask), {"scale": 1}, top_k))


def test_equal_keys_far_apart_are_ties() -> None:
    rng = np.random.default_rng(0)
    query, some = rng.standard_normal((1, 50, 64), np.float32), rng.standard_normal((1, 7, 64), np.float32)
    key = np.concatenate([numbers(rng, (1, 100, 64), np.float32, 0.01), some, -some, some * 0, some], axis=1)
    summary = fastattn.attention_summary(query, key, top_k=key.shape[1])
    place = np.argsort(summary.top_indices, axis=-1)
    first, again = place[..., 100:107], place[..., 121:128]
    np.testing.assert_array_equal(first + 1, again)


def test_the_reference_is_the_definition() -> None:
    query, key = np.random.default_rng(0).standard_normal((2, 4, 30, 5))
    summary = reference.attention_summary(query, key, is_causal=True, top_k=3)
    weights = reference.attention(query, key, key, is_causal=True, return_weights=True)[1]
    for head in range(4):
        for i in range(30):
            row = weights[head, i]
            some = sorted(range(i + 1), key=lambda j: (-row[j], j))[:3]
            assert summary.top_indices[head, i].tolist() == some + [-1] * (3 - len(some))
            assert summary.top_weights[head, i].tolist() == [row[j] for j in some] + [0] * (3 - len(some))
            assert summary.entropy[head, i] == pytest.approx(-sum(w * np.log(w) for w in row if w), abs=1e-14)
    np.testing.assert_allclose(summary.received, weights.sum(axis=-2), rtol=1e-13)


def test_entropy_of_uniform_and_of_single_weights(backend: str) -> None:
    query, key = np.zeros((1, 20, 4), np.float32), np.ones((1, 200, 4), np.float32)
    entropy = fastattn.attention_summary(query, key, backend=backend).entropy
    np.testing.assert_allclose(entropy, np.log(200), rtol=1e-6)
    key[0, 150] = 100
    entropy = fastattn.attention_summary(query + 50, key, backend=backend).entropy
    np.testing.assert_array_equal(entropy, 0)


def test_a_query_that_looks_at_nothing(backend: str) -> None:
    query, key = np.ones((2, 20, 4), np.float32), np.ones((2, 30, 4), np.float32)
    mask = np.ones((20, 30), bool)
    mask[[3, 17]] = False
    for attn_mask in (mask, np.where(mask, 0.5, -np.inf)):
        summary = fastattn.attention_summary(query, key, attn_mask, top_k=4, backend=backend)
        for i in (3, 17):
            assert not summary.top_weights[:, i].any()
            assert (summary.top_indices[:, i] == -1).all()
            assert not summary.entropy[:, i].any()
            assert np.isneginf(summary.lse[:, i]).all()
        np.testing.assert_allclose(summary.received, 18 / 30, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("queries", [5, 150])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_masked_never_shows(backend: str, dtype: Any, queries: int, bad: float) -> None:
    rng = np.random.default_rng(0)
    query, key = numbers(rng, (2, queries, 9), dtype), numbers(rng, (2, 300, 9), dtype)
    hidden = rng.random(300) < 0.3
    spoilt = np.where(hidden[:, None], dtype(bad), key)
    for mask in (~hidden, np.where(hidden, -np.inf, 0.25)):
        wanted = fastattn.attention_summary(query, key, mask, backend=backend)
        summary = fastattn.attention_summary(query, spoilt, mask, backend=backend)
        assert bits(summary) == bits(wanted)
        assert not summary.received[:, hidden].any()
    # the last key, in a causal call, is for queries from there on
    spoilt = key.copy()
    spoilt[:, queries - 2] = bad
    wanted = fastattn.attention_summary(query, key, is_causal=True, backend=backend)
    summary = fastattn.attention_summary(query, spoilt, is_causal=True, backend=backend)
    for array, want in zip(summary[:4], wanted[:4], strict=True):
        assert array[:, : queries - 2].tobytes() == want[:, : queries - 2].tobytes()


def test_nan_reaches_what_it_may_look_at_and_nothing_else(backend: str) -> None:
    query, key = np.random.default_rng(0).standard_normal((2, 1, 200, 8)).astype(np.float32)
    query[0, 70] = np.nan
    summary = fastattn.attention_summary(query, key, is_causal=True, backend=backend)
    others = np.arange(200) != 70
    for array in (summary.top_weights[0, 70], summary.entropy[0, 70], summary.lse[0, 70], summary.received[0, :71]):
        assert np.isnan(array).all()
    assert (summary.top_indices[0, 70] == -1).all()
    for array in (summary.top_weights[0, others], summary.entropy[0, others], summary.received[0, 71:]):
        assert np.isfinite(array).all()


def test_received_with_grouped_heads_is_per_query_head(backend: str) -> None:
    query, key = np.random.default_rng(0).standard_normal((2, 2, 6, 40, 8)).astype(np.float32)
    key = key[:, :2]
    summary = fastattn.attention_summary(query, key, enable_gqa=True, backend=backend)
    assert summary.received.shape == (2, 6, 40)
    for head in range(6):
        alone = fastattn.attention_summary(query[:, head], key[:, head // 3], backend=backend)
        np.testing.assert_array_equal(summary.received[:, head], alone.received)


# -- chosen weights ----------------------------------------------------------------------------------------------------


@st.composite
def chosen(draw: st.DrawFn, **kinds: Any) -> tuple[tuple[Any, Any, Any], Any, Any, Any]:
    """Draw a call and a choice of its rows and columns."""
    call = draw(calls(**kinds))
    return (
        without_values(call),
        call.options,
        draw(selections(call.query.shape[-2])),
        draw(selections(call.key.shape[-2])),
    )


@settings(max_examples=MANY)
@given(choice=chosen())
def test_any_choice(choice: Any) -> None:
    check_chosen(*choice)


@given(choice=chosen(sizes=tuple(SIZES), odd=True, masks=(None, "bool", "padding", "float, -inf", "float, odd")))
def test_a_choice_among_values_that_are_not_finite(choice: Any) -> None:
    check_chosen(*choice)


@given(choice=chosen(empty=True))
def test_a_choice_with_axes_of_length_zero(backend: str, choice: Any) -> None:
    check_chosen(*choice, backend)


@settings(max_examples=MANY)
@given(choice=chosen(masks=(None, None, "bool", "padding", "float, -inf", "float, lowest")))
def test_chosen_weights_have_the_bits_of_all_weights(choice: Any) -> None:
    (query, key, mask), options, rows, columns = choice
    weights = fastattn.attention(query, key, key, mask, **options, return_weights=True)[1]
    tile = fastattn.attention_weights(query, key, mask, **options, rows=rows, columns=columns)
    assert tile.tobytes() == cut(weights, rows, columns).tobytes()
    whole = fastattn.attention_weights(query, key, mask, **options)
    assert whole.tobytes() == weights.tobytes()


@intervals
@pytest.mark.parametrize("mask", [None, "bool", "pair"])
def test_what_is_chosen_keeps_its_interval(backend: str, mask: str | None, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    query, key = (numbers(rng, (2, 1, n, 8), np.float32) for n in (150, 257))
    keep = None if mask is None else rng.random((150, 257)) < 0.7
    masks = (numbers(rng, (257,), np.float32), keep) if mask == "pair" else keep
    options = {**options, "backend": backend}
    whole = fastattn.attention_weights(query, key, masks, **options)
    lse = fastattn.attention_summary(query, key, masks, **options).lse
    for rows in (slice(60, 130), [149, 3, 77], slice(140, 2, -20), -1):
        for columns in (slice(30, 160), [256, 0, 40], -1, slice(None, None, 9)):
            chosen: Any = {"rows": rows, "columns": columns}
            tile = fastattn.attention_weights(query, key, masks, **options, **chosen)
            np.testing.assert_array_equal(tile, cut(whole, rows, columns))
            given = fastattn.attention_weights(query, key, masks, **options, **chosen, lse=lse)
            np.testing.assert_allclose(given, tile, rtol=1e-5, atol=1e-7)
            np.testing.assert_array_equal(given != 0, tile != 0)


@pytest.mark.parametrize("options", [{"window": (0, 3)}, {"window": (2, None), "is_causal": True}], ids=str)
@pytest.mark.parametrize("offsets", [[0, 4], [4, 0], [-9, 500], [2**62, 1]], ids=str)
def test_a_row_of_the_batch_that_has_left_all_keys_behind_takes_none_from_others(options: Any, offsets: Any) -> None:
    query, key = (numbers(np.random.default_rng(n), (2, 1, n, 4), np.float32) for n in (5, 9))
    wanted = fastattn.reference.attention_weights(query, key, query_offset=offsets, **options)
    for rows in (None, [4, 0], slice(1, 3)):
        found = fastattn.attention_weights(query, key, query_offset=offsets, rows=rows, **options)
        np.testing.assert_allclose(found, cut(wanted, rows, None), rtol=0, atol=1e-6)


def test_rows_are_taken_some_at_a_time_where_their_masks_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = np.random.default_rng(0).standard_normal((2, 2, 300, 8)).astype(np.float32)
    mask = np.random.default_rng(1).random((300, 300)) < 0.7
    rows = np.random.default_rng(2).permutation(300)
    calls = []
    sums = fastattn.api.weights.statistics.sums
    monkeypatch.setattr("fastattn.api.weights.statistics.sums", lambda *args: calls.append(1) or sums(*args))
    for attn_mask, is_causal in ((None, True), (mask, False), (mask, True)):
        wanted = fastattn.attention_weights(query, key, attn_mask, is_causal)[:, rows, 7:9]
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr("fastattn.api.weights.MASK_ELEMENTS", 10_000)
            tile = fastattn.attention_weights(query, key, attn_mask, is_causal, rows=rows, columns=slice(7, 9))
        assert len(calls) >= 10
        np.testing.assert_array_equal(tile, wanted)
    calls.clear()
    fastattn.attention_weights(query, key, mask[0], rows=rows, columns=0)  # no mask of its own for each row
    assert len(calls) == 1


@pytest.mark.parametrize("queries", [1, 40])
def test_weights_of_a_query_with_nan_are_nan_with_lse_too(backend: str, queries: int) -> None:
    query, key = np.ones((queries, 4), np.float32), np.ones((50, 4), np.float32)
    query[0, 1] = np.inf
    lse = fastattn.attention(query, key, key, is_causal=True, return_lse=True, backend=backend)[1]
    for given_lse in (None, lse):
        weights = fastattn.attention_weights(query, key, is_causal=True, lse=given_lse, backend=backend)
        assert np.isnan(weights[0]).all()
        assert not np.isnan(weights[1:]).any()


def test_an_lse_with_nan_concerns_its_own_row_whatever_its_layout(backend: str) -> None:
    query, key = np.random.default_rng(0).standard_normal((2, 3, 4, 8)).astype(np.float32)
    lse = fastattn.attention(query, key, key, return_lse=True)[1]
    lse[1, 2] = np.nan
    for layout in LAYOUTS:
        weights = fastattn.attention_weights(query, key, lse=laid_out(lse, layout), backend=backend)
        assert np.argwhere(np.isnan(weights).any(axis=-1)).tolist() == [[1, 2]]


def test_the_greatest_weights_are_those_of_attention_weights() -> None:
    query, key = np.random.default_rng(0).standard_normal((2, 1, 100, 16)).astype(np.float32)
    summary = fastattn.attention_summary(query, key, top_k=5)
    weights = fastattn.attention_weights(query, key)
    np.testing.assert_array_equal(summary.top_weights, np.take_along_axis(weights, summary.top_indices, axis=-1))


def test_time_with_lse_is_that_of_the_tile() -> None:
    """No key but the chosen ones is read: the others are where nobody may read."""
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 1, 2000, 16)).astype(np.float32)
    lse = fastattn.attention(query, key, key, is_causal=True, return_lse=True)[1]
    wanted = fastattn.attention_weights(query, key, is_causal=True, rows=[1500, 1000], columns=[900, 3], lse=lse)
    others = ~np.isin(np.arange(2000), [1500, 1000]), ~np.isin(np.arange(2000), [900, 3])
    query[:, others[0]], key[:, others[1]], lse[:, others[0]] = np.nan, np.nan, np.nan
    tile = fastattn.attention_weights(query, key, is_causal=True, rows=[1500, 1000], columns=[900, 3], lse=lse)
    np.testing.assert_array_equal(tile, wanted)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": 20}, ValueError, "rows: 20; expected an index from -20 to 19"),
        ({"rows": -21}, ValueError, "rows: -21; "),
        ({"columns": [0, 30]}, ValueError, "columns: 30 is among them; expected indices from -30 to 29"),
        ({"columns": [0, -31]}, ValueError, "columns: -31 is among them"),
        ({"rows": 1.0}, TypeError, "rows: "),
        ({"rows": [1.0, 2.0]}, TypeError, "rows: an array of dtype float64"),
        ({"rows": True}, TypeError, "rows: True of type bool"),
        ({"rows": "1"}, TypeError, "rows: '1' of type str"),
        ({"rows": [[0, 1]]}, ValueError, "rows: an array of shape \\(1, 2\\)"),
        ({"rows": [[0, 1], [2]]}, TypeError, "rows: of type list"),
        ({"rows": np.zeros(0)}, TypeError, "rows: an array of dtype float64"),
        ({"rows": np.ones(19, bool)}, ValueError, "rows: 19 booleans; expected 20"),
        ({"rows": slice(0, 5, 0)}, ValueError, "rows: slice\\(0, 5, 0\\)"),
        ({"rows": slice(0.5, None)}, TypeError, "rows: slice\\(0.5"),
        ({"rows": np.ma.array([1, 2])}, TypeError, "rows: an array of dtype int64 and type MaskedArray"),
        ({"lse": np.zeros(20, np.float32)}, ValueError, "lse: shape \\(20,\\); expected \\(2, 20\\)"),
        ({"lse": np.zeros((2, 20), int)}, TypeError, "lse: type ndarray, dtype int64"),
        ({"lse": [[1.0], [1.0, 2.0]]}, TypeError, "lse: of type list"),
        ({"backend": "gpu"}, ValueError, "backend: 'gpu'"),
        ({"scale": np.nan}, ValueError, "scale: "),
        ({"is_causal": "left"}, ValueError, "is_causal: "),
        ({"window": (1, True)}, TypeError, "window: \\(1, True\\) of type tuple; expected \\(left, right\\)"),
        ({"alibi_slopes": np.ones(9)}, ValueError, r"alibi_slopes: shape \(9,\); expected one that broadcasts to"),
        ({"softcap": np.inf}, ValueError, "softcap: inf of type float; expected a finite real number above 0"),
        ({"key_lengths": [5]}, ValueError, "key_lengths: shape \\(1,\\); expected one that broadcasts to \\(\\)"),
        ({"query_offset": 1.0}, TypeError, "query_offset: dtype float64; expected integers"),
    ],
)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_bad_arguments_of_attention_weights(name: str, options: Any, error: Any, message: str) -> None:
    query, key = np.zeros((2, 20, 4), np.float32), np.zeros((2, 30, 4), np.float32)
    with pytest.raises(error, match=f"^{message}"):
        fastattn.attention_weights(query, key, **({"backend": name} | options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": -1}, ValueError, "top_k: -1; expected a non-negative int"),
        ({"top_k": 2.0}, TypeError, "top_k: 2.0 of type float"),
        ({"top_k": True}, TypeError, "top_k: True of type bool"),
        ({"top_k": None}, TypeError, "top_k: None of type NoneType"),
        ({"enable_gqa": 1}, TypeError, "enable_gqa: "),
        ({"attn_mask": np.zeros((20, 31), bool)}, ValueError, "attn_mask: shape \\(20, 31\\)"),
        ({"backend": 1}, TypeError, "backend: 1"),
        ({"window": 5}, TypeError, "window: 5 of type int; expected \\(left, right\\)"),
        ({"softcap": 0.0}, ValueError, "softcap: 0.0 of type float; expected a finite real number above 0"),
        ({"key_lengths": -1}, ValueError, "key_lengths: -1 to -1; expected 0 to 30, the length of key"),
    ],
)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_bad_arguments_of_attention_summary(name: str, options: Any, error: Any, message: str) -> None:
    query, key = np.zeros((2, 20, 4), np.float32), np.zeros((2, 30, 4), np.float32)
    with pytest.raises(error, match=f"^{message}"):
        fastattn.attention_summary(query, key, **({"backend": name} | options))


@pytest.mark.parametrize("function", [fastattn.attention_weights, fastattn.attention_summary])
def test_shapes_that_do_not_go_together_are_named(function: Any) -> None:
    with pytest.raises(ValueError, match="^query, key: shapes "):
        function(np.zeros((2, 1, 3, 4)), np.zeros((3, 1, 3, 4)))
    with pytest.raises(ValueError, match="^key: shape "):
        function(np.zeros((1, 3, 4)), np.zeros((1, 3, 5)))
    with pytest.raises(ValueError, match="^key: shape .*enable_gqa=True"):
        function(np.zeros((4, 3, 4)), np.zeros((2, 3, 4)))
    with pytest.raises(TypeError, match="^key: dtype complex128"):
        function(np.zeros((4, 3, 4)), np.zeros((2, 3, 4), complex))


def test_what_is_given_may_be_lists_and_integers() -> None:
    summary = fastattn.attention_summary([[1, 2]], [[1, 0], [0, 1]], top_k=np.int32(1))
    assert summary.lse.dtype == np.float64
    assert summary.top_indices.tolist() == [[1]]
    assert fastattn.attention_weights([[1, 2]], [[1, 0], [0, 1]], columns=np.array(-1)).shape == (1, 1)


# -- memory ------------------------------------------------------------------------------------------------------------

CASE = """
def inputs(queries, keys):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 1, length, 64), dtype=np.float32) for length in (queries, keys)]

def measured(call, queries, keys):
    call(*inputs(queries // 8, keys // 8))  # compiled, and loaded
    query, key = inputs(queries, keys)
    return growth(lambda: call(query, key))
"""


@on_linux
def test_few_queries_with_many_keys() -> None:
    code = """
def scattered(q, k):
    rows = np.random.default_rng(0).permutation(q.shape[-2])[:64]
    return fastattn.attention_weights(q, k, rows=rows, columns=[3, 1], is_causal=True)

boolean = np.arange(131072) % 5 != 0
print(
    measured(lambda q, k: fastattn.attention_summary(q, k, is_causal="bottom-right"), 512, 131072),
    measured(lambda q, k: fastattn.attention_summary(q, k, boolean[: k.shape[-2]]), 512, 131072),
    measured(lambda q, k: fastattn.attention_weights(q, k, rows=slice(5), columns=-1, is_causal=True), 512, 131072),
    measured(scattered, 512, 131072),
)
"""
    grown = [float(number) for number in processes.run(MEASURE + CASE + code).split()]
    assert len(grown) == 4
    assert max(grown) < 32, grown


@on_linux
@pytest.mark.slow
@takes_long
def test_a_long_causal_call() -> None:
    code = """
def mixed(q, k):
    rows = np.random.default_rng(0).permutation(q.shape[-2])
    return fastattn.attention_weights(q, k, rows=rows, columns=0, is_causal=True)

print(
    measured(lambda q, k: fastattn.attention_summary(q, k, is_causal=True), 32768, 32768),
    measured(mixed, 32768, 32768),
)
"""
    summary, weights = (float(number) for number in processes.run(MEASURE + CASE + code, timeout=200).split())
    assert summary < 64, summary
    assert weights < 64, weights


def test_a_summary_of_scores_that_are_too_large_to_tell_keys_apart() -> None:
    """The slope takes off so much that in float32 all scores are one number, and in the wider type some are not."""
    query, key = (np.random.default_rng(0).standard_normal((1, 1, n, 8)).astype(np.float32) for n in (16, 127))
    check_summary((query, key, None), {"query_offset": 2**60, "alibi_slopes": np.array([30.0])}, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sink", [0.0, -30.0, 300.0, 1e30, -1e30, -np.inf])
def test_a_summary_with_sinks_of_any_size(dtype: Any, sink: float) -> None:
    """Weights are over keys alone: they sum to less than 1, and so does what keys receive."""
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 2, 40, 8)).astype(dtype), rng.standard_normal((2, 2, 90, 8)).astype(dtype)
    for options in ({}, {"is_causal": True, "query_offset": -3}, {"key_lengths": [0, 70], "alibi_slopes": 0.1}):
        call: dict[str, Any] = {"sinks": np.array([sink, 1.0], dtype), **options}
        found = fastattn.attention_summary(query, key, **call, top_k=3)
        wanted = fastattn.attention_summary(query, key, **call, top_k=3, backend="reference")
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 if dtype == np.float32 else 1e-13)
        assert (found.received.sum(-1)[:, 1] < 40).all()
        for lse in (None, found.lse):
            for chosen in ({"rows": [3, 30, 7], "columns": [2, 1]}, {"rows": slice(5, 9)}):
                weights = fastattn.attention_weights(query, key, **call, **chosen, lse=lse)
                exact = fastattn.attention_weights(query, key, **call, **chosen, lse=lse, backend="reference")
                np.testing.assert_allclose(weights, exact, rtol=1e-5, atol=1e-6 if dtype == np.float32 else 1e-14)
