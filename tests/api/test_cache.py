"""`KVCache`: what it gives is attention on the keys and values that were appended, and memory is what it says."""

from __future__ import annotations

import copy
import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tolerances
from numpy.typing import NDArray
from strategies import bits_of

import fastattn
from fastattn import KVCache
from fastattn.call.halves import cast
from fastattn.kv_cache import files
from fastattn.kv_cache.pages import PAGE

Array = NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}
floating = pytest.mark.parametrize("name", DTYPES)


def arrays(rows: int, tokens: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, dtype: Any = np.float32) -> Any:
    """Return query, key and value of so many tokens."""
    rng = np.random.default_rng(0)
    shapes = [(rows, each, tokens, dim) for each in (heads, kv_heads, kv_heads)]
    return tuple(cast(rng.standard_normal(shape, np.float32), np.dtype(dtype)) for shape in shapes)


def filled(key: Any, value: Any, lengths: Any = None, **options: Any) -> KVCache:
    """Return a cache of some keys and values."""
    cache = KVCache(len(key), key.shape[1], key.shape[-1], value.shape[-1], **options)
    cache.append(key, value, lengths)
    return cache


def alone(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """Return what attention gives of queries that stand at the last of the keys."""
    options = {"is_causal": "bottom-right", **options}
    return fastattn.attention(query, key, value, enable_gqa=True, **options)


def assert_same_bits(found: Any, wanted: Any) -> None:
    """Check that two results, or tuples of results, are the same."""
    pair = (found, wanted) if isinstance(found, tuple) else ((found,), (wanted,))
    for one, other in zip(*pair, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert bits_of(one) == bits_of(other)


# -- what it gives -----------------------------------------------------------------------------------------------------


@floating
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_result_is_that_of_attention_to_the_bit(name: str, queries: int) -> None:
    query, key, value = arrays(2, 300, dtype=DTYPES[name])
    cache = filled(key, value, dtype=name)
    query = query[:, :, -queries:]
    assert_same_bits(cache.attention(query), alone(query, key, value))
    assert_same_bits(cache.attention(query, return_lse=True), alone(query, key, value, return_lse=True))


@floating
@pytest.mark.parametrize("queries", [1, 40])
def test_how_tokens_were_appended_changes_no_bit(name: str, queries: int) -> None:
    query, key, value = arrays(1, 270, dtype=DTYPES[name])
    query, once = query[:, :, :queries], filled(key, value, dtype=name)
    one_by_one, in_pieces = (KVCache(1, 2, 8, dtype=name) for _ in range(2))
    for token in range(270):
        one_by_one.append(key[:, :, token : token + 1], value[:, :, token : token + 1])
    for first in range(0, 270, 70):
        in_pieces.append(key[:, :, first : first + 70], value[:, :, first : first + 70])
    for cache in (one_by_one, in_pieces):
        assert_same_bits(cache.attention(query), once.attention(query))


@floating
def test_rows_of_any_length_are_as_if_alone(name: str) -> None:
    query, key, value = arrays(4, 600, dtype=DTYPES[name])
    lengths = [600, 1, 0, 257]
    cache = filled(key, value, lengths, dtype=name)
    assert cache.lengths.tolist() == lengths
    out, lse = cache.attention(query[:, :, :1], return_lse=True)
    for row, length in enumerate(lengths):
        here = slice(row, row + 1)
        own = alone(query[here, :, :1], key[here, :, :length], value[here, :, :length], return_lse=True)
        assert_same_bits((out[here], lse[here]), own)


def test_a_call_like_an_earlier_one_is_told_of_new_lengths_and_pages() -> None:
    query, key, value = arrays(2, 260)
    cache = filled(key[:, :, :254], value[:, :, :254], [254, 100], dtype="float32")
    lengths = [254, 100]
    for token in range(254, 260):
        at = slice(token, token + 1)
        cache.append(key[:, :, at], value[:, :, at], [1, 0])
        lengths[0] += 1
        out = cache.attention(query[:, :, :1])
        for row, length in enumerate(lengths):
            here = slice(row, row + 1)
            assert_same_bits(out[here], alone(query[here, :, :1], key[here, :, :length], value[here, :, :length]))


def test_prompts_of_different_lengths_need_no_padding_in_front() -> None:
    query, key, value = arrays(3, 50)
    lengths = [50, 13, 1]
    cache = filled(key, value, lengths, dtype="float32")
    out = cache.attention(query, query_lengths=lengths)
    for row, length in enumerate(lengths):
        here = slice(row, row + 1)
        own = alone(*(array[here, :, :length] for array in (query, key, value)))
        np.testing.assert_allclose(out[here, :, :length], own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (np.float32, "bfloat16"),
        (np.float32, "int8"),
        (np.float32, ("int8", "float16")),
        (np.float64, ("bfloat16", "int8")),
        (np.float64, ("float32", "float16")),
        (np.float16, "int8"),
        (np.float16, ("float16", "bfloat16")),
        (BFLOAT16, "float32"),
        (BFLOAT16, ("float32", "int8")),
    ],
    ids=str,
)
@pytest.mark.parametrize("queries", [1, 40])
def test_queries_of_any_dtype_meet_keys_and_values_of_any(dtype: Any, kept: Any, queries: int) -> None:
    query, key, value = arrays(2, 300, dtype=np.float64)
    query = cast(query[:, :, -queries:], np.dtype(dtype))
    cache = filled(key, value, dtype=kept)
    assert cache.dtype == kept
    out, lse = cache.attention(query, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    check_kept(query, cache, out, lse)


def numbers_in(cache: KVCache, dtype: Any = np.float64) -> tuple[Array, Array]:
    """Return the keys and values that a cache has kept, (B, Hk, L, ·), exactly."""
    return cache._sequences.gathered(np.dtype(dtype), np.dtype(dtype))


def check_kept(query: Any, cache: KVCache, out: Any, lse: Any) -> None:
    """Check a result against the exact one of the numbers that a cache has kept."""
    real = np.dtype(np.float64 if query.dtype == np.float64 else np.float32)
    own = cast(query, real), *numbers_in(cache, real)
    wanted = tolerances.expected(*own, enable_gqa=True, is_causal="bottom-right", key_lengths=cache.lengths)
    tolerances.check_lse(lse, wanted)
    if query.dtype.itemsize == 2:
        rounding, least = tolerances.roundings(query.dtype)
        room = rounding * (np.abs(wanted.out) + np.abs(own[2]).max()) + least
        wanted = replace(
            wanted, out_bound=wanted.out_bound + room, problem=replace(wanted.problem, storage=query.dtype)
        )
        assert out.dtype == query.dtype
        out, wanted = cast(out, real), replace(wanted, problem=replace(wanted.problem, storage=real))
    tolerances.check_out(out, wanted)


@pytest.mark.parametrize("kept", ["int8", ("int8", "float32"), ("float32", "int8")])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_int8_is_as_far_from_the_exact_result_as_is_said(kept: Any, size: float) -> None:
    query, key, value = arrays(2, 300, dim=70, dtype=np.float64)
    value *= size
    out = filled(key, value, dtype=kept).attention(query[:, :, -20:])
    wanted = alone(query[:, :, -20:], key, value)
    of_keys, of_values = (each == "int8" for each in ((kept, kept) if isinstance(kept, str) else kept))
    bound = tolerances.change_in_int8(query, key, value, 70**-0.5, of_keys, of_values)
    error = np.abs(out - wanted).max()
    assert 0 < error <= bound + 1e-5 * size
    if of_values and not of_keys:
        assert error > bound / 100  # the bound says something


def test_scales_of_int8_are_those_of_the_numbers_in_any_byte_order() -> None:
    numbers = np.full((1, 2, 1, 8), 2.7808381186573636)  # a step of float16 times 127, and less than float32 tells more
    found = [filled(each, each, dtype="int8") for each in (numbers, numbers.astype(">f8"))]
    for one, other in zip(*map(numbers_in, found), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_blocks_of_int8_have_scales_of_their_own_in_kernels(queries: int) -> None:
    query, key, value = arrays(1, 300, dim=160)
    for array in (key, value):
        array *= np.repeat([1e-3, 1.0, 30.0, 0.1, 2.0], 32).astype(np.float32)
    cache = filled(key, value, dtype="int8")
    check_kept(query[:, :, -queries:], cache, *cache.attention(query[:, :, -queries:], return_lse=True))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("dim", [32, 48, 64, 160])
def test_rows_that_share_keys_of_int8_are_exact(rows: int, dim: int) -> None:
    query, key, value = arrays(1, 300, heads=2 * rows, dim=dim)
    cache, query = filled(key, value, dtype="int8"), query[:, :, -1:]
    check_kept(query, cache, *cache.attention(query, return_lse=True))


@pytest.mark.parametrize("queries", [1, 4])
def test_large_queries_of_int8_do_not_overflow_on_the_way(queries: int) -> None:
    query, key, value = arrays(1, 50, dim=64)
    query, key = np.full_like(query, 3e37), np.abs(key) * np.float32(1e-4)
    cache, query = filled(key, value, dtype="int8"), query[:, :, -queries:]
    check_kept(query, cache, *cache.attention(query, return_lse=True))


@pytest.mark.parametrize("queries", [2, 3, 4])
def test_hidden_nan_in_int8_changes_no_bit(queries: int) -> None:
    query, key, value = arrays(1, 300, heads=2, dim=64)
    kept = filled(key, value, dtype="int8").attention(query[:, :, -queries:])
    value[0, :, -1, 3] = np.nan
    out = filled(key, value, dtype="int8").attention(query[:, :, -queries:])
    assert np.isnan(out[:, :, -1, :32]).all(), "the last query sees a block of it"
    out[:, :, -1, :32] = kept[:, :, -1, :32]
    assert_same_bits(out, kept)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("queries", [2, 40])
def test_nan_in_int8_reaches_those_that_see_it_alone(wrong: float, queries: int) -> None:
    query, key, value = arrays(1, 300, dim=40)
    value[0, :, -1, 3] = wrong
    out = filled(key, value, dtype="int8").attention(query[:, :, -queries:])
    assert np.isfinite(out[:, :, :-1]).all()
    assert np.isnan(out[:, :, -1, :32]).all()
    assert np.isfinite(out[:, :, -1, 32:]).all()


def test_all_of_the_options_of_attention() -> None:
    query, key, value = arrays(2, 40)
    lengths = np.array([40, 23])
    cache = filled(key, value, lengths, dtype="float32")
    rng = np.random.default_rng(1)
    last, own = query[:, :, :3], {"key_lengths": lengths, "is_causal": "bottom-right", "enable_gqa": True}
    mask, slopes = rng.standard_normal((2, 4, 3, 40), dtype=np.float32), np.array([0.5, 0.25, 0.125, 0.0])
    every: list[dict[str, Any]] = [
        {"attn_mask": mask},
        {"attn_mask": mask > 0},
        {"attn_mask": (mask, mask > -1)},
        {"dropout_p": 0.5, "rng": 3},
        {"scale": 0.3, "softcap": 2.0},
        {"window": (5, 0)},
        {"window": (None, 0)},
        {"alibi_slopes": slopes, "sinks": np.array([0.0, 1.0, -np.inf, 2.0])},
        {"score_mod": lambda score, batch, head, query, key: score - 0.1 * (query - key)},
        {"mask_mod": lambda batch, head, query, key: key % 3 != 0},
        {"return_weights": True},
        {"return_lse": True, "return_weights": True},
    ]
    for options in every:
        assert_same_bits(cache.attention(last, **options), fastattn.attention(last, key, value, **own, **options))


def test_positions_may_be_said(backend: str) -> None:
    query, key, value = arrays(2, 40)
    cache = filled(key, value, [40, 23], dtype="float32")
    last, own = query[:, :, :3], {"key_lengths": [40, 23], "enable_gqa": True, "backend": backend}
    for options in ({"query_offset": [7, 2]}, {"query_offset": 5}):
        wanted = fastattn.attention(last, key, value, is_causal=True, **own, **options)
        assert_same_bits(cache.attention(last, **options, backend=backend), wanted)
    for causal in (True, False):
        wanted = fastattn.attention(last, key, value, is_causal=causal, **own)
        assert_same_bits(cache.attention(last, is_causal=causal, backend=backend), wanted)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_result_may_be_written_somewhere(dtype: Any) -> None:
    query, key, value = arrays(2, 40)
    query = query[:, :, :3].astype(dtype)
    cache = filled(key, value, dtype="bfloat16")
    out = np.empty_like(query)
    wanted = cache.attention(query)
    assert cache.attention(query, out=out) is out
    assert_same_bits(out, wanted)
    sums = np.empty(query.shape, np.float32)
    assert cache.attention(query, out=sums) is sums
    np.testing.assert_allclose(sums, wanted, rtol=1e-3, atol=1e-5)
    with pytest.raises(TypeError, match="out: dtype float64"):
        cache.attention(query, out=np.empty(query.shape))
    with pytest.raises(ValueError, match="out: shape"):
        cache.attention(query, out=out[:1])


def test_keys_and_values_of_different_sizes() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 2, 30, dim), dtype=np.float32) for dim in (5, 5, 11))
    cache = filled(key, value, dtype="float32")
    assert (cache.head_dim, cache.value_dim) == (5, 11)
    assert_same_bits(cache.attention(query), alone(query, key, value))


def test_a_cache_without_tokens_or_rows_gives_zeros() -> None:
    query = np.ones((2, 4, 3, 8), np.float32)
    cache = KVCache(2, 2, 8)
    np.testing.assert_array_equal(cache.attention(query), np.zeros_like(query))
    cache.select([])
    assert cache.batch == 0
    assert cache.attention(query[:0]).shape == (0, 4, 3, 8)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_what_is_taken_back_is_as_if_it_had_never_been() -> None:
    query, key, value = arrays(2, 600)
    cache = filled(key, value, dtype="float32")
    cache.truncate([520, 3])
    assert cache.lengths.tolist() == [520, 3]
    cache.append(key[:, :, 100:110], value[:, :, 100:110])
    for row, length in enumerate([520, 3]):
        here = slice(row, row + 1)
        own = [np.concatenate([each[here, :, :length], each[here, :, 100:110]], 2) for each in (key, value)]
        one = filled(*own, dtype="float32")
        assert_same_bits(cache.attention(query[:, :, :4])[here], one.attention(query[here, :, :4]))


def test_one_prompt_for_many_answers_shares_its_pages() -> None:
    query, key, value = arrays(1, 600)
    cache = filled(key, value, dtype="float32")
    before = cache.nbytes
    cache.select([0] * 5)
    assert cache.nbytes < 1.01 * before
    query, more, others = arrays(5, 1)
    cache.append(more, others)
    page = cache._sequences.layout.page_bytes
    assert cache.nbytes <= before + 5 * page + 1000
    out = cache.attention(query)
    for row in range(5):
        here = slice(row, row + 1)
        own = [np.concatenate([one, many[here]], 2) for one, many in ((key, more), (value, others))]
        assert_same_bits(out[here], alone(query[here], *own))


def test_rows_that_shared_a_page_are_parted_when_one_writes() -> None:
    query, key, value = arrays(1, 10)
    cache = filled(key, value, dtype="float32")
    cache.select([0, 0])
    cache.append(np.ones((2, 2, 1, 8), np.float32), np.full((2, 2, 1, 8), 100.0), lengths=[1, 0])
    own = cache.attention(np.concatenate([query[:, :, :1]] * 2))
    assert_same_bits(own[1:], alone(query[:, :, :1], key, value))
    assert not np.array_equal(own[0], own[1])
    cache.append(np.zeros((2, 2, 1, 8), np.float32), np.zeros((2, 2, 1, 8), np.float32), lengths=[0, 1])
    keys, values = numbers_in(cache)
    np.testing.assert_array_equal(values[0, :, 10], 100)
    np.testing.assert_array_equal(values[1, :, 10], 0)
    np.testing.assert_array_equal(keys[:, :, :10], np.concatenate([key, key]))


def test_a_part_of_a_shared_row_that_is_written_anew_is_its_own() -> None:
    _, key, value = arrays(1, 300)
    cache = filled(key, value, dtype="float32")
    cache.select([0, 0])
    cache.truncate([20, 300])
    cache.append(key[:, :, :1].repeat(2, 0), value[:, :, :1].repeat(2, 0))
    keys, _ = numbers_in(cache)
    np.testing.assert_array_equal(keys[1, :, :300], key[0])
    np.testing.assert_array_equal(keys[0, :, 20], key[0, :, 0])


def test_rows_are_put_in_another_order() -> None:
    query, key, value = arrays(3, 20)
    cache = filled(key, value, [5, 20, 11], dtype="float32")
    cache.select([2, 0])
    assert cache.lengths.tolist() == [11, 5]
    whole = filled(key, value, [5, 20, 11], dtype="float32").attention(query[:, :, :1])
    assert_same_bits(cache.attention(query[[2, 0], :, :1]), whole[[2, 0]])


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_small_cache_is_small_and_a_large_one_no_larger_than_what_it_holds() -> None:
    cache = KVCache(1, 2, 8, dtype="float32")
    assert cache.nbytes < 100
    token = np.zeros((1, 2, 1, 8), np.float32)
    cache.append(token, token)
    assert cache.nbytes < 1.1 * PAGE * 2 * 2 * 8 * 4
    for _ in range(30):
        cache.append(*[np.zeros((1, 2, PAGE, 8), np.float32)] * 2)
        assert cache.nbytes < 1.3 * (cache.lengths[0] + 2 * PAGE) * 2 * 2 * 8 * 4


def test_int8_takes_little_more_than_half_of_what_bfloat16_takes() -> None:
    _, key, value = arrays(1, 1024, dim=128)
    bytes_of = {name: filled(key, value, dtype=name).nbytes for name in ("int8", "bfloat16")}
    assert 0.53 <= bytes_of["int8"] / bytes_of["bfloat16"] < 0.54


def test_growing_copies_nothing() -> None:
    token = np.zeros((1, 2, 1, 8), np.float32)
    cache = KVCache(1, 2, 8)
    cache.append(token, token)
    first = cache._sequences.rows[0][0]
    assert first is not None
    for _ in range(10):
        cache.append(*[np.zeros((1, 2, PAGE, 8), np.float32)] * 2)
    assert cache._sequences.rows[0][0] is first


def test_a_window_drops_what_nobody_can_see() -> None:
    query, key, value = arrays(1, 3000)
    cache = KVCache(1, 2, 8, dtype="float32", window=(99, 0))
    most = 0
    for token in range(3000):
        at = slice(token, token + 1)
        cache.append(key[:, :, at], value[:, :, at])
        most = max(most, cache.nbytes)
        if token % 100 == 99:
            seen = slice(0, token + 1)
            wanted = alone(query[:, :, at], key[:, :, seen], value[:, :, seen], window=(99, 0))
            assert_same_bits(cache.attention(query[:, :, at]), wanted)
    assert most <= 4 * cache._sequences.layout.page_bytes
    assert cache.lengths.tolist() == [3000]


def test_queries_of_what_was_appended_at_once_still_find_their_keys() -> None:
    query, key, value = arrays(1, 1500)
    cache = KVCache(1, 2, 8, dtype="float32", window=(300, 0))
    for first in range(0, 1500, 500):
        at = slice(first, first + 500)
        cache.append(key[:, :, at], value[:, :, at])
        seen = slice(0, first + 500)
        wanted = alone(query[:, :, at], key[:, :, seen], value[:, :, seen], window=(300, 0))
        assert_same_bits(cache.attention(query[:, :, at]), wanted)


def test_guesses_in_a_window_may_be_taken_back() -> None:
    query, key, value = arrays(1, 1030)
    cache = KVCache(1, 2, 8, dtype="float32", window=(255, 0))
    cache.append(key[:, :, :1020], value[:, :, :1020])
    cache.append(key[:, :, 1020:], value[:, :, 1020:])
    cache.truncate(1020)
    cache.append(key[:, :, :1], value[:, :, :1])
    own = [np.concatenate([each[:, :, :1020], each[:, :, :1]], 2) for each in (key, value)]
    assert_same_bits(cache.attention(query[:, :, :1]), alone(query[:, :, :1], *own, window=(255, 0)))
    with pytest.raises(ValueError, match="lengths: 700 of row 0; expected 0, or 767 to 1021: keys before 512"):
        cache.truncate(700)
    cache.truncate(0)
    cache.append(key[:, :, :7], value[:, :, :7])
    assert_same_bits(cache.attention(query[:, :, :7]), alone(query[:, :, :7], key[:, :, :7], value[:, :, :7]))


def test_what_has_been_dropped_cannot_be_asked_for() -> None:
    query, key, value = arrays(1, 1030)
    cache = KVCache(1, 2, 8, window=(255, 0))
    for at in (slice(0, 1000), slice(1000, 1030)):
        cache.append(key[:, :, at], value[:, :, at])
    for options in ({"window": (None, 0)}, {"window": (600, 0)}, {"query_offset": 700}, {"is_causal": False}):
        with pytest.raises(ValueError, match="window: a query of row 0, at position .* before 512, which"):
            cache.attention(query[:, :, :1], **options)
    assert cache.attention(query[:, :, :1], window=(3, 0)).shape == (1, 4, 1, 8)


@pytest.mark.parametrize("tokens", [3, 600])
@pytest.mark.parametrize(
    ("offset", "error", "message"),
    [
        ([1, 2, 3], ValueError, r"query_offset: shape \(3,\); expected one that broadcasts to \(2,\)"),
        ([[1], [2]], ValueError, r"query_offset: shape \(2, 1\); expected one that broadcasts to \(2,\)"),
        ("x", TypeError, "query_offset: dtype <U1; expected integers"),
        (object(), TypeError, "query_offset: "),
        (True, TypeError, "query_offset: "),
        ([True, False], TypeError, "query_offset: dtype bool; expected integers"),
        (1.0, TypeError, "query_offset: dtype float64; expected integers"),
    ],
    ids=str,
)
def test_positions_that_are_none_are_named_whatever_has_been_dropped(
    tokens: int, offset: Any, error: Any, message: str
) -> None:
    query, key, value = arrays(2, tokens + 1)
    cache = KVCache(2, 2, 8, dtype="float32", window=(4, 0))
    for some in (slice(tokens), slice(tokens, tokens + 1)):
        cache.append(key[:, :, some], value[:, :, some])
    with pytest.raises(error, match=message):
        cache.attention(query[:, :, :1], query_offset=offset)


# -- files and copies --------------------------------------------------------------------------------------------------


def through_a_file(cache: KVCache, path: Path) -> KVCache:
    """Save a cache, and load it."""
    cache.save(path)
    return KVCache.load(path)


COPIES = {
    "file": through_a_file,
    "pickle": lambda cache, path: pickle.loads(pickle.dumps(cache)),
    "copy": lambda cache, path: copy.copy(cache),
    "deepcopy": lambda cache, path: copy.deepcopy(cache),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8"])
def test_a_copy_is_the_same_and_shares_nothing(tmp_path: Path, way: str, kept: Any) -> None:
    query, key, value = arrays(3, 700, dim=40)
    cache = KVCache(3, 2, 40, dtype=kept, window=(299, 0), capacity=2000)
    cache.append(key[:, :, :600], value[:, :, :600], [600, 0, 41])
    cache.append(key[:, :, 600:], value[:, :, 600:], [100, 100, 0])
    cache.select([0, 1, 2, 0])
    query = query[[0, 1, 2, 0], :, :1]
    wanted = cache.attention(query)
    other = COPIES[way](cache, tmp_path / "cache")
    assert repr(other) == repr(cache)
    assert other.nbytes <= cache.nbytes  # shares pages, where that does
    assert_same_bits(other.attention(query), wanted)
    other.append(key[[0, 1, 2, 0], :, :9], value[[0, 1, 2, 0], :, :9])
    other.truncate(other.lengths - 3)
    assert_same_bits(cache.attention(query), wanted)
    cache.append(key[[0, 1, 2, 0], :, :6], value[[0, 1, 2, 0], :, :6])
    assert_same_bits(cache.attention(query), other.attention(query))


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_row_whose_pages_have_all_been_dropped(tmp_path: Path, way: str) -> None:
    query, key, value = arrays(1, PAGE + 2)
    cache = KVCache(1, 2, 8, dtype="float32", window=(0, 0))
    for tokens in (slice(PAGE), slice(PAGE, PAGE + 1)):
        cache.append(key[:, :, tokens], value[:, :, tokens])
    cache.truncate(PAGE)
    other = COPIES[way](cache, tmp_path / "cache")
    assert repr(other) == repr(cache)
    for each in (cache, other):
        each.append(key[:, :, -1:], value[:, :, -1:])
    assert_same_bits(other.attention(query[:, :, -1:]), cache.attention(query[:, :, -1:]))


def test_a_file_holds_nothing_but_what_was_appended(tmp_path: Path) -> None:
    _, key, value = arrays(1, 300)
    cache = filled(key, value, dtype="float32")
    cache.truncate(2)
    cache.save(tmp_path / "cache")
    content = (tmp_path / "cache").read_bytes()
    assert key[0, 0, 1].tobytes() in content
    assert key[0, 0, 2].tobytes() not in content


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_others_read_the_file(tmp_path: Path, kept: str) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    _, key, value = arrays(1, 300, dim=40)
    filled(key, value, dtype=kept).save(tmp_path / "cache")
    tensors = safetensors.load_file(tmp_path / "cache")
    assert tensors["keys"].shape == (2, 2, PAGE, 40)
    assert tensors["page_table"].tolist() == [[0, 1]]
    assert tensors["lengths"].tolist() == [300]
    keys = tensors["keys"].astype(np.float32)
    if kept == "int8":
        keys *= tensors["key_scales"].astype(np.float32).repeat(32, -1)[..., :40]
    np.testing.assert_allclose(keys[0], key[0, :, :PAGE], rtol=0.02, atol=0.02)


def test_a_file_without_a_cache_is_refused(tmp_path: Path) -> None:
    files.write(tmp_path / "other", {}, {})
    with pytest.raises(ValueError, match="path: .* holds no KVCache"):
        KVCache.load(tmp_path / "other")
    cache = filled(*arrays(1, 300)[1:])
    cache.save(tmp_path / "cache")
    tensors, metadata = files.read(tmp_path / "cache")
    for name, wrong in (("page_table", [[0, 5]]), ("page_table", [[0, -1]]), ("lengths", [3000]), ("lengths", [3, 3])):
        changed = {**tensors, name: np.array(wrong)}
        parts = {key: files.Tensor(each.dtype, each.shape, each) for key, each in changed.items()}
        files.write(tmp_path / "wrong", parts, metadata)
        with pytest.raises(ValueError, match="path: .* holds no KVCache"):
            KVCache.load(tmp_path / "wrong")


@pytest.mark.parametrize("name", ["keys", "values", "key_scales", "page_table", "lengths"])
def test_tensors_of_other_dtypes_and_shapes_are_no_cache(tmp_path: Path, name: str) -> None:
    filled(*arrays(2, 300, dim=40)[1:], dtype=("int8", "float16")).save(tmp_path / "cache")
    tensors, metadata = files.read(tmp_path / "cache")
    own = tensors[name]
    others = np.zeros(own.shape, np.float32), own[None], own[..., :1], own.reshape(-1), np.zeros((10**9, 0), own.dtype)
    for other in (each for each in others if each.shape != own.shape or each.dtype != own.dtype):
        changed = {**tensors, name: other}
        parts = {key: files.Tensor(each.dtype, each.shape, each) for key, each in changed.items()}
        files.write(tmp_path / "wrong", {**parts, name: files.Tensor(other.dtype, other.shape, [other])}, metadata)
        with pytest.raises(ValueError, match="path: .* holds no KVCache"):
            KVCache.load(tmp_path / "wrong")


@pytest.mark.parametrize(
    "said",
    [
        {"shape": None},
        {"shape": [-1, 256, 8]},
        {"shape": [2**62, 4]},
        {"shape": [1.0]},
        {"dtype": "U8"},
        {"dtype": []},
        {"data_offsets": [0, 10**30]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [0]},
        {"offsets": [0, 8]},
        [],
    ],
    ids=str,
)
def test_a_header_that_says_nonsense_is_refused(tmp_path: Path, said: Any) -> None:
    filled(*arrays(1, 300)[1:], dtype="float32").save(tmp_path / "cache")
    content = (tmp_path / "cache").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["keys"] = said if isinstance(said, list) else header["keys"] | said
    refuse_header(json.dumps(header), content[end:], tmp_path)


@pytest.mark.parametrize("header", ["[" * 100_000, '{"a":' * 100_000, "null", "{"], ids=["list", "dict", "null", "end"])
def test_what_is_no_header_is_refused(tmp_path: Path, header: str) -> None:
    refuse_header(header, b"", tmp_path)


def refuse_header(header: str, content: bytes, path: Path) -> None:
    """Check that a file with this header is refused."""
    (path / "wrong").write_bytes(len(header).to_bytes(8, "little") + header.encode() + content)
    with pytest.raises(ValueError, match="path: .* expected a file of the format safetensors"):
        KVCache.load(path / "wrong")


def test_what_is_no_path_is_refused_and_any_name_of_a_file_will_do(tmp_path: Path) -> None:
    cache = filled(*arrays(1, 3)[1:])
    for wrong in (None, 0, 1.5, True, ["a"]):
        for use in (cache.save, KVCache.load):
            with pytest.raises(TypeError, match="path: .*; expected a str or an os.PathLike"):
                use(wrong)
    for name in ("a" * 250, ".b", "ü ".encode()):
        path = os.path.join(os.fsencode(tmp_path), name) if isinstance(name, bytes) else tmp_path / name
        cache.save(path)  # type: ignore[arg-type]
        assert repr(KVCache.load(path)) == repr(cache)  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 3


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_may_save_to_one_file(tmp_path: Path) -> None:
    caches = [filled(*arrays(1, 1 + 100 * number)[1:]) for number in range(8)]
    with ThreadPoolExecutor(len(caches)) as threads:
        for _ in range(20):
            for saved in [threads.submit(cache.save, tmp_path / "cache") for cache in caches]:
                saved.result()
            assert repr(KVCache.load(tmp_path / "cache")) in map(repr, caches)
    assert len(list(tmp_path.iterdir())) == 1


def test_threads_may_read_at_once() -> None:
    query, key, value = arrays(2, 600)
    cache = filled(key, value, [600, 311])
    wanted = [cache.attention(query[:, :, :count]) for count in (1, 30)]
    wrong: list[Any] = []

    def reads() -> None:
        for _ in range(20):
            for result, count in zip(wanted, (1, 30), strict=True):
                if not np.array_equal(cache.attention(query[:, :, :count]), result):
                    wrong.append(count)

    threads = [threading.Thread(target=reads) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- misuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((-1, 2, 8), {}, ValueError, "batch: -1; expected an int of at least 0"),
        ((1.0, 2, 8), {}, TypeError, "batch: 1.0 of type float; expected an int"),
        ((1, 0, 8), {}, ValueError, "kv_heads: 0; expected an int of at least 1"),
        ((1, 10**20, 8), {}, ValueError, "kv_heads: 1000.*; expected an int of at most 16777216"),
        ((1, 1, 2**62), {}, ValueError, "head_dim: 4611686018427387904; expected an int of at most 16777216"),
        ((1, 1, 8, 2**40), {}, ValueError, "value_dim: 1099511627776; expected an int of at most 16777216"),
        ((1, 2, True), {}, TypeError, "head_dim: True"),
        ((1, 2, 8, 0), {}, ValueError, "value_dim: 0"),
        (
            (1, 2, 8),
            {"dtype": "float64"},
            ValueError,
            "dtype: 'float64'; expected one of float32, bfloat16, float16, int8",
        ),
        ((1, 2, 8), {"dtype": np.float64}, ValueError, "dtype: .*float64"),
        ((1, 2, 8), {"dtype": None}, TypeError, "dtype: None"),
        ((1, 2, 8), {"dtype": ("int8",)}, ValueError, "dtype: .*a pair"),
        ((1, 2, 8), {"dtype": ("int8", "int4")}, ValueError, "dtype: 'int4'"),
        ((1, 2, 8), {"window": 5}, TypeError, "window: 5"),
        ((1, 2, 8), {"window": (-1, 0)}, ValueError, "window: "),
        ((1, 2, 8), {"capacity": -1}, ValueError, "capacity: -1"),
        ((1, 2, 8), {"capacity": "many"}, TypeError, "capacity: 'many'"),
    ],
)
def test_a_cache_that_cannot_be(arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        KVCache(*arguments, **options)


@pytest.mark.parametrize(
    "dtype", [np.float32, "float32", np.dtype("f4"), np.float16, BFLOAT16, ml_dtypes.bfloat16, np.int8]
)
def test_dtypes_may_be_said_as_numpy_says_them(dtype: Any) -> None:
    assert KVCache(1, 2, 8, dtype=dtype).dtype == np.dtype(dtype).name
    assert KVCache(1, 2, 8, dtype=(dtype, "int8")).dtype in (("int8", "int8"), "int8", (np.dtype(dtype).name, "int8"))


@pytest.mark.parametrize(
    ("key", "value", "lengths", "error", "message"),
    [
        ((2, 2, 3), (2, 2, 3, 8), None, ValueError, r"key: shape \(2, 2, 3\); expected \(2, 2, n, 8\)"),
        ((1, 2, 3, 8), (1, 2, 3, 8), None, ValueError, "key: shape"),
        ((2, 3, 2, 8), (2, 2, 3, 8), None, ValueError, r"key: shape .*: .swapaxes\(1, 2\)"),
        ((2, 4, 3, 8), (2, 4, 3, 8), None, ValueError, "key: shape"),
        ((2, 2, 3, 8), (2, 2, 3, 9), None, ValueError, "value: shape"),
        ((2, 2, 3, 8), (2, 2, 4, 8), None, ValueError, "value: shape .* expected 3 tokens"),
        ((2, 2, 3, 8), (2, 2, 3, 8), [1, 4], ValueError, "lengths: 4 of row 1; expected 0 to 3"),
        ((2, 2, 3, 8), (2, 2, 3, 8), [1, -1], ValueError, "lengths: -1 of row 1"),
        ((2, 2, 3, 8), (2, 2, 3, 8), [1], ValueError, r"lengths: shape \(1,\); expected \(2,\)"),
        ((2, 2, 3, 8), (2, 2, 3, 8), [1.0, 1.0], TypeError, "lengths: dtype float64"),
        ((2, 2, 9, 8), (2, 2, 9, 8), None, ValueError, "key: 9 tokens for row 0, which has 2; expected at most 8"),
        ((2, 2, 9, 8), (2, 2, 9, 8), [0, 9], ValueError, "key: 9 tokens for row 1"),
    ],
)
def test_what_cannot_be_appended(key: Any, value: Any, lengths: Any, error: Any, message: str) -> None:
    cache = KVCache(2, 2, 8, capacity=10)
    cache.append(*[np.ones((2, 2, 2, 8))] * 2)
    with pytest.raises(error, match=message):
        cache.append(np.zeros(key), np.zeros(value), lengths)
    assert cache.lengths.tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [np.int64, np.complex64, np.longdouble, bool, object])
def test_keys_of_no_floating_dtype_are_refused(dtype: Any) -> None:
    cache = KVCache(1, 2, 8)
    fine, wrong = np.zeros((1, 2, 3, 8)), np.zeros((1, 2, 3, 8), dtype)
    with pytest.raises(TypeError, match="key: dtype"):
        cache.append(wrong, fine)
    with pytest.raises(TypeError, match="value: dtype"):
        cache.append(fine, wrong)
    with pytest.raises(TypeError, match="key: None"):
        cache.append(None, fine)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 4, 8), (1, 4, 1, 8), (2, 3, 1, 8), (2, 4, 1, 7)])
def test_queries_that_do_not_go_with_the_cache(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"query: shape .*; expected \(2, Hq, Lq, 8\)"):
        KVCache(2, 2, 8).attention(np.zeros(shape, np.float32))


def test_lengths_and_rows_that_are_not_there() -> None:
    cache = filled(*arrays(2, 5)[1:])
    query = np.zeros((2, 4, 3, 8), np.float32)
    with pytest.raises(ValueError, match="lengths: 6 of row 1; expected 0 to 5, its length"):
        cache.truncate([0, 6])
    with pytest.raises(TypeError, match="lengths: dtype float64"):
        cache.truncate(2.0)
    with pytest.raises(ValueError, match="rows: 2; expected 0 to 1"):
        cache.select([0, 2])
    with pytest.raises(ValueError, match="rows: -1; expected 0 to 1"):
        cache.select([-1])
    with pytest.raises(TypeError, match=r"rows: dtype bool.*np.flatnonzero"):
        cache.select(np.array([True, False]))
    with pytest.raises(ValueError, match=r"rows: shape \(\)"):
        cache.select(0)
    with pytest.raises(ValueError, match="query_lengths: 4 of row 0; expected 0 to 3"):
        cache.attention(query, query_lengths=4)
    with pytest.raises(ValueError, match="query_lengths: given together with query_offset"):
        cache.attention(query, query_lengths=1, query_offset=0)
    with pytest.raises(ValueError, match="query_lengths: given together with is_causal=False"):
        cache.attention(query, query_lengths=1, is_causal=False)
    with pytest.raises(ValueError, match="query_offset: given together with is_causal='bottom-right'"):
        cache.attention(query, query_offset=1, is_causal="bottom-right")
    assert cache.lengths.tolist() == [5, 5]
