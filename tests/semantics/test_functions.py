"""Functions of the user's: when they are asked, of what, and what they hide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from semantic_cases import INF, NAN, Attention, close, dtypes, inputs, lengths, normal

import fastattn


def identity(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Leave a score what it is."""
    return score


@dtypes
@lengths
def test_a_score_mod_is_asked_after_softcap_mask_and_slopes(
    attention: Attention, dtype: Any, length: tuple[int, int]
) -> None:
    query, key, value = inputs(length, heads=(2, 2), dtype=dtype)
    bias, slopes = normal(*length, seed=4), np.array([0.25, 0.5])
    out = attention(
        query, key, value, bias, softcap=2.0, alibi_slopes=slopes, score_mod=lambda score, b, h, q, k: score * 0.5 + h
    )
    scores = query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) / 4
    scores = 2 * np.tanh(scores / 2) + bias
    scores = scores - slopes[:, None, None] * np.abs(np.arange(length[0])[:, None] - np.arange(length[1]))
    weights = np.exp(scores * 0.5)
    close(out, weights / weights.sum(-1, keepdims=True) @ value, dtype)


def test_functions_are_given_batch_head_position_and_key(attention: Attention) -> None:
    query, key, value = inputs((4, 9), heads=(2, 3, 2))
    offsets = np.array([[0, 1, 2], [5, 6, 7]])
    told = np.random.default_rng(0).standard_normal((6, 2, 12, 9))
    options: dict[str, Any] = {"query_offset": offsets, "is_causal": True}
    out = attention(query, key, value, score_mod=lambda s, b, h, q, k: s + told[b, h, q, k], **options)
    rows = (np.arange(4) + offsets[..., None])[:, :, None, :, None]
    added = told.reshape(2, 3, 2, 12, 9)[
        np.arange(2)[:, None, None, None, None],
        np.arange(3)[:, None, None, None],
        np.arange(2)[:, None, None],
        rows,
        np.arange(9),
    ]
    close(out, attention(query, key, value, added, **options))


@dtypes
@lengths
def test_a_mask_mod_says_which_keys_take_part(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    seen = (np.arange(length[0])[:, None] + 2 * np.arange(length[1])) % 3 > 0
    out, lse = attention(query, key, value, mask_mod=lambda b, h, q, k: (q + 2 * k) % 3 > 0, return_lse=True)
    wanted, wanted_lse = attention(query, key, value, seen, return_lse=True)
    close(out, wanted, dtype)
    close(lse, wanted_lse, dtype)


def test_a_mask_mod_hides_blocks_of_keys_parts_of_some_and_nothing_of_others(attention: Attention) -> None:
    query, key, value = inputs((150, 700))

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        kind = (query // 64 + key // 64) % 3
        return kind == 2 or (kind == 1 and (query + key) % 5 > 1)

    kind = (np.arange(150)[:, None] // 64 + np.arange(700) // 64) % 3
    seen = (kind == 2) | ((kind == 1) & ((np.arange(150)[:, None] + np.arange(700)) % 5 > 1))
    for _ in range(2):  # what is known of blocks by then
        close(attention(query, key, value, mask_mod=mask_mod), attention(query, key, value, seen))


@pytest.mark.parametrize("length", [(5, 9), (70, 200)])
def test_minus_infinity_from_a_score_mod_is_the_same_as_false(attention: Attention, length: tuple[int, int]) -> None:
    query, key, value = inputs(length)
    key[:, 4], value[:, 4], value[:, 3] = NAN, INF, NAN

    def hiding(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return -np.inf if key == 3 or key == 4 or query == 2 else score

    out = attention(query, key, value, score_mod=hiding)
    seen = (np.arange(length[1]) != 3) & (np.arange(length[1]) != 4) & (np.arange(length[0]) != 2)[:, None]
    close(out, attention(query, key, value, seen))
    assert not out[:, 2].any()


@pytest.mark.parametrize("length", [(5, 9), (70, 200)])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_a_function_hides_or_is_asked_about_in_vain_never_leaks(
    attention: Attention, bad: float, length: tuple[int, int]
) -> None:
    query, key, value = inputs(length)
    wanted = attention(query[:, :, :], key[:, 1:], value[:, 1:], score_mod=lambda s, b, h, q, k: s * 0.5)
    key[:, 0] = value[:, 0] = bad
    options: dict[str, Any] = {"score_mod": lambda s, b, h, q, k: s * 0.5 if k > 0 else bad}
    close(attention(query, key, value, mask_mod=lambda b, h, q, k: k > 0, **options), wanted)
    close(attention(query, key, value, np.arange(length[1]) > 0, **options), wanted)


@lengths
def test_what_a_floating_mask_hides_no_function_shows(attention: Attention, length: tuple[int, int]) -> None:
    query, key, value = inputs(length)
    bias = normal(*length, seed=4)
    bias[(np.arange(length[0])[:, None] + np.arange(length[1])) % 3 == 1] = -INF
    scores = 2 * np.tanh(query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) / 4 + bias)
    weights = np.where(bias == -INF, 0, np.exp(scores))
    out = attention(query, key, value, bias, score_mod=lambda s, b, h, q, k: 2 * np.tanh(s))
    close(out, weights / weights.sum(-1, keepdims=True) @ value)


def test_what_is_hidden_by_its_score_does_not_leak(attention: Attention) -> None:
    query, key, value = inputs((70, 90))
    clean = attention(query, key, value, score_mod=lambda s, b, h, q, k: s if s > 0 else -np.inf)
    hidden = query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) < 0
    value[:, 3] = NAN
    out = attention(query, key, value, score_mod=lambda s, b, h, q, k: s if s > 0 else -np.inf)
    np.testing.assert_array_equal(np.isnan(out).any(-1), ~hidden[..., 3])
    close(out[hidden[..., 3]], clean[hidden[..., 3]])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("length", [(5, 9), (70, 200)])
def test_what_is_hidden_by_its_score_does_not_leak_into_gradients(
    backend: str, length: tuple[int, int], bad: float, softcap: float | None
) -> None:
    query, key, value = inputs(length)
    key[:, 4], value[:, 4] = NAN, INF
    bias, table = normal(*length, seed=4), normal(length[1], seed=6)
    scores = query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) / 4
    scores = (scores if softcap is None else softcap * np.tanh(scores / softcap)) + bias
    names = ("query", "key", "value", "attn_mask", *(("table",) if backend == "cpu" else ()))
    options: dict[str, Any] = {
        "attn_mask": bias,
        "softcap": softcap,
        "score_mod": lambda s, b, h, q, k: s + table[k] if s > 0.1 else -np.inf,
        "backend": backend,
    }
    out, lse = fastattn.attention(query, key, value, **options, return_lse=True)
    grad_out = normal(*out.shape, seed=5)
    call: Any = (query, key, value, out, lse)
    clean = dict(zip(names, fastattn.attention_backward(grad_out, *call, **options, grads=names), strict=True))
    grad_out[:, 2, 3] = bad
    found = dict(zip(names, fastattn.attention_backward(grad_out, *call, **options, grads=names), strict=True))
    seen = scores > 0.1
    for name, looks in (("query", np.arange(length[0]) == 2), ("key", seen[:, 2]), ("value", seen[:, 2])):
        looks = np.broadcast_to(looks, found[name].shape[:-1])
        columns = found[name][..., 3:4] if name == "value" else found[name]
        np.testing.assert_array_equal(np.isfinite(columns).any(-1), ~looks)
        np.testing.assert_array_equal(found[name][~looks], clean[name][~looks])
    looks = (np.arange(length[0]) == 2)[:, None] & seen.any(axis=0)
    np.testing.assert_array_equal(np.isfinite(found["attn_mask"]), ~looks)
    if backend == "cpu":
        np.testing.assert_array_equal(np.isfinite(found["table"]), ~seen[:, 2].any(axis=0))


@pytest.mark.parametrize("length", [(5, 9), (70, 200)])
def test_what_a_score_mod_hides_never_leaks_into_gradients_of_additive_attention(
    backend: str, length: tuple[int, int]
) -> None:
    backend = "cpu" if backend == "cuda" else backend
    query, key, value = inputs(length)
    arrays = [*(0.3 * query[0], 0.3 * key[0], value[0]), normal(query.shape[-1], seed=7)]

    def hiding(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return -np.inf if key == 3 or key == 4 or query == 2 or (query + key) % 5 == 0 else score

    def gradients(*arrays: Any) -> Any:
        options: dict[str, Any] = {"score_mod": hiding, "backend": backend}
        out, lse = fastattn.additive_attention(*arrays, return_lse=True, **options)
        grad_out = normal(*out.shape, seed=5)
        grad_out[2], grad_out[1] = INF, np.where(np.arange(out.shape[-1]) == 3, NAN, grad_out[1])
        return fastattn.additive_attention_backward(grad_out, *arrays, out, lse, **options)

    clean = gradients(*arrays)
    seen = np.isin(np.arange(length[1]), (3, 4), invert=True) & ((1 + np.arange(length[1])) % 5 != 0)
    np.testing.assert_array_equal(np.isnan(clean[2][:, 3]), seen)
    assert np.isfinite(np.delete(clean[2], 3, axis=-1)).all()
    np.testing.assert_array_equal(np.isnan(clean[1]).any(-1), seen)
    for array in arrays[1:3]:
        array[3], array[4] = NAN, INF
    arrays[0][2] = NAN
    for found, wanted in zip(gradients(*map(np.asarray, arrays)), clean, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("length", [(20, 30), (70, 130)])
def test_a_key_that_a_mask_mod_lets_through_is_looked_at_whatever_its_score(
    attention: Attention, length: tuple[int, int]
) -> None:
    query, key, value = inputs(length)
    query[..., 0], key[..., 7, 0], value[..., 7, :] = 1.0, -np.inf, np.nan  # a weight of 0, and a value of NaN
    out = attention(query, key, value, mask_mod=lambda b, h, q, k: (k != 7) | (q % 3 > 0))
    assert np.isfinite(out[..., ::3, :]).all()
    assert np.isnan(out[..., 1::3, :]).all()
    assert np.isnan(out[..., 2::3, :]).all()


def test_where_a_mask_mod_hides_everything_out_is_zero(attention: Attention) -> None:
    query, key, value = inputs((70, 90))
    out, lse = attention(query, key, value, mask_mod=lambda b, h, q, k: False, return_lse=True)
    assert not out.any()
    assert (lse == -INF).all()


def test_an_index_counts_from_the_end_or_is_an_error_where_the_query_may_look(attention: Attention) -> None:
    query, key, value = inputs((6, 9))
    table = normal(5)

    def relative(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[query - key]

    near = {"window": (4, 4)}  # from table[-4] to table[4]
    added = table[np.clip(np.arange(6)[:, None] - np.arange(9), -4, 4)]
    close(attention(query, key, value, score_mod=relative, **near), attention(query, key, value, added, **near))
    with pytest.raises(IndexError, match="score_mod: .*relative: an index was out of range"):
        attention(query, key, value, score_mod=relative, window=(5, 4))
    with pytest.raises(IndexError, match="mask_mod"):
        attention(query, key, value, mask_mod=lambda b, h, q, k: table[k] > 0)
    attention(query, key, value, mask_mod=lambda b, h, q, k: table[k] > 0, key_lengths=5)


@pytest.mark.parametrize(
    "captured", [np.float64(0.5), np.float16(0.5), 0.5, np.full(3, 0.5), np.full(3, 0.5, np.float16)]
)
def test_a_score_has_the_dtype_of_accumulation_whatever_is_captured(attention: Attention, captured: Any) -> None:
    query, key, value = inputs()
    if np.ndim(captured):
        out = attention(query, key, value, score_mod=lambda s, b, h, q, k: s * captured[k % 3])
    else:
        out = attention(query, key, value, score_mod=lambda s, b, h, q, k: s * captured)
    assert out.dtype == np.float32
    close(out, attention(query, key, value, scale=0.125))


def test_a_function_that_leaves_scores_what_they_are_changes_nothing(attention: Attention) -> None:
    query, key, value = inputs((70, 90))
    options: dict[str, Any] = {"score_mod": identity, "mask_mod": lambda b, h, q, k: True}
    close(attention(query, key, value, **options, is_causal=True), attention(query, key, value, is_causal=True))


def test_with_functions_a_padded_sequence_has_the_bits_of_the_same_sequence_alone(cpu_attention: Attention) -> None:
    query, key, value = inputs((80, 150), heads=(3, 2))
    options: dict[str, Any] = {
        "score_mod": lambda s, b, h, q, k: s - 0.125 * abs(q - k) * (h + 1),
        "mask_mod": lambda b, h, q, k: (q // 16 == k // 16) | (k < 7),
    }
    lengths = [150, 101, 8]
    out = cpu_attention(query, key, value, key_lengths=lengths, **options)
    for row, length in enumerate(lengths):
        alone = cpu_attention(query[row], key[row, :, :length], value[row, :, :length], **options)
        assert alone.tobytes() == out[row].tobytes()
