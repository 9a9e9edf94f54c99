"""Positions: causal limits, windows, offsets and lengths of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances
from semantic_cases import LENGTHS, Array, Attention, dtypes, inputs, normal, seen


@dtypes
@pytest.mark.parametrize("length", [*LENGTHS, (129, 129), (257, 300)], ids=str)  # a query's own key begins a block
def test_causal_keeps_keys_up_to_the_query(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    weights = tolerances.check_call(attention, query, key, value, is_causal=True)[2]
    np.testing.assert_array_equal(weights != 0, np.broadcast_to(np.tri(*length, dtype=bool), weights.shape))


@dtypes
@pytest.mark.parametrize("length", [*LENGTHS, (130, 65), (300, 100), (4, 3)], ids=str)
def test_causal_bottom_right_ends_with_the_last_query_at_the_last_key(
    attention: Attention, dtype: Any, length: tuple[int, int]
) -> None:
    query, key, value = inputs(length, dtype=dtype)
    weights = tolerances.check_call(attention, query, key, value, is_causal="bottom-right")[2]
    kept = np.tri(*length, k=length[1] - length[0], dtype=bool)
    np.testing.assert_array_equal(weights != 0, np.broadcast_to(kept, weights.shape))
    assert (weights[:, -1] != 0).all()


def test_one_new_query_at_the_end_sees_all_keys(attention: Attention) -> None:
    query, key, value = inputs((1, 200))
    np.testing.assert_array_equal(attention(query, key, value, is_causal="bottom-right"), attention(query, key, value))


def check_seen(
    attention: Attention, arrays: tuple[Array, Array, Array], visible: Array, **options: Any
) -> tuple[Array, Array, Array]:
    """Assert that a call is what it would be under a boolean mask; return its results."""
    query, key, value = arrays
    results: tuple[Array, Array, Array] = attention(*arrays, **options, return_lse=True, return_weights=True)
    tolerances.check_all(results, tolerances.expected(query, key, value, visible))
    np.testing.assert_array_equal(results[2] != 0, np.broadcast_to(visible, results[2].shape))
    return results


WINDOWS = ((0, 0), (3, 0), (0, 3), (5, 70), (64, 63), (None, 4), (4, None), (0, None), (1000, 1000))
some_windows = pytest.mark.parametrize("window", WINDOWS, ids=str)


@dtypes
@some_windows
@pytest.mark.parametrize("length", [*LENGTHS, (300, 100), (257, 300)], ids=str)
def test_a_window_keeps_the_keys_around_the_position(
    attention: Attention, dtype: Any, window: Any, length: tuple[int, int]
) -> None:
    check_seen(attention, inputs(length, dtype=dtype), seen(length, *window), window=window)


@some_windows
@pytest.mark.parametrize("is_causal", [True, "bottom-right"])
@pytest.mark.parametrize("length", [(5, 3), (65, 130), (300, 100)], ids=str)
def test_causal_and_a_window_both_hold(
    attention: Attention, window: Any, is_causal: Any, length: tuple[int, int]
) -> None:
    offset = 0 if is_causal is True else length[1] - length[0]
    visible = seen(length, window[0], 0, offset)
    check_seen(attention, inputs(length), visible, window=window, is_causal=is_causal)


def test_a_sliding_window_of_w_keys_has_w_keys(attention: Attention) -> None:
    query, key, value = inputs((200, 200))
    weights = attention(query, key, value, window=(49, 0), return_weights=True)[1]
    np.testing.assert_array_equal((weights != 0).sum(-1)[0], np.minimum(np.arange(200) + 1, 50))


def test_a_window_without_ends_is_none(attention: Attention) -> None:
    query, key, value = inputs((60, 90))
    np.testing.assert_array_equal(attention(query, key, value, window=(None, None)), attention(query, key, value))
    wanted = attention(query, key, value, is_causal=True)
    for window in ((None, None), (None, 0), [None, 50], (10**30, 10**30)):
        np.testing.assert_array_equal(attention(query, key, value, window=window, is_causal=True), wanted)


@pytest.mark.parametrize("window", [[3, 5], (np.int8(3), np.uint64(5)), (np.int64(3), 5)], ids=str)
def test_windows_may_be_lists_and_numpys_integers(attention: Attention, window: Any) -> None:
    query, key, value = inputs((60, 90))
    np.testing.assert_array_equal(
        attention(query, key, value, window=window), attention(query, key, value, window=(3, 5))
    )


@dtypes
@pytest.mark.parametrize("offset", [-200, -64, -7, -1, 1, 8, 20, 65, 129, 200])
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (5, 20)}, {"window": (70, None)}], ids=str)
def test_query_i_stands_at_i_plus_the_offset(
    attention: Attention, dtype: Any, offset: int, options: dict[str, Any]
) -> None:
    left, right = options.get("window", (None, 0))
    visible = seen((65, 130), left, right, offset)
    check_seen(attention, inputs((65, 130), dtype=dtype), visible, query_offset=offset, **options)


def test_an_offset_without_causality_and_window_changes_nothing(attention: Attention) -> None:
    query, key, value = inputs((60, 90))
    for offset in (-100, 7, 10**30, np.array(3)):
        np.testing.assert_array_equal(attention(query, key, value, query_offset=offset), attention(query, key, value))


@pytest.mark.parametrize("length", [(1, 1), (1, 200), (65, 130), (300, 100)], ids=str)
def test_bottom_right_is_an_offset_of_keys_less_queries(attention: Attention, length: tuple[int, int]) -> None:
    arrays = inputs(length)
    for window in (None, (20, 3)):
        moved = attention(*arrays, is_causal=True, query_offset=length[1] - length[0], window=window)
        np.testing.assert_array_equal(attention(*arrays, is_causal="bottom-right", window=window), moved)


FAR = 10**30
#: Offsets and windows as far as integers go, and the (left, right, offset) that says the same near by.
FAR_AWAY = [
    (FAR, (None, 0), (None, None, 0)),
    (2**63, (None, 0), (None, None, 0)),
    (np.int64(2**63 - 1), (None, 0), (None, None, 0)),
    (np.uint64(2**64 - 1), (None, 0), (None, None, 0)),
    (-FAR, (None, 0), None),
    (np.int64(-(2**63)), (None, 0), None),
    (FAR, (5, None), None),
    (FAR, (FAR, 0), (0, None, 0)),
    (FAR, (FAR + 3, 5), (3, None, 0)),
    (FAR, (10 * FAR, 10 * FAR), (None, None, 0)),
    (-FAR, (7, FAR), (None, 0, 0)),
    (-FAR, (7, FAR - 3), (None, 0, -3)),
    (3, (FAR, FAR), (None, None, 0)),
]


@pytest.mark.parametrize(("offset", "window", "near"), FAR_AWAY, ids=str)
def test_offsets_and_windows_reach_as_far_as_integers_go(
    attention: Attention, offset: Any, window: Any, near: Any
) -> None:
    length = (65, 130)
    visible = np.zeros(length, bool) if near is None else seen(length, *near)
    check_seen(attention, inputs(length), visible, query_offset=offset, window=window)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", [np.int64, np.int8, ">i4", list])
def test_each_row_of_a_batch_may_have_an_offset(attention: Attention, shape: tuple[int, ...], kind: Any) -> None:
    query, key, value = inputs((40, 70), (2, 3, 2))
    offsets = np.random.default_rng(0).integers(-45, 75, shape)
    given = offsets.tolist() if kind is list else offsets.astype(kind)
    options: dict[str, Any] = {"is_causal": True, "window": (30, 0)}
    whole = attention(query, key, value, query_offset=given, **options)
    for index, offset in np.ndenumerate(np.broadcast_to(offsets, (2, 3))):
        alone = attention(query[index], key[index], value[index], query_offset=int(offset), **options)
        np.testing.assert_array_equal(whole[index], alone)


def test_offsets_of_rows_reach_far_as_well(attention: Attention) -> None:
    query, key, value = inputs((40, 70), (4, 1))
    offsets = np.array([-(2**63), -3, 3, 2**63 - 1])
    weights = attention(query, key, value, is_causal=True, query_offset=offsets, return_weights=True)[1]
    for row, offset in enumerate(offsets.tolist()):
        np.testing.assert_array_equal(weights[row, 0] != 0, seen((40, 70), None, 0, offset))


LENGTHS_OF_ROWS = [[0, 70, 1], [64, 65, 63], [70, 70, 70], [0, 0, 0], [33, 0, 69]]


@dtypes
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 3)}, {"window": (None, 9)}], ids=str)
@pytest.mark.parametrize("key_lengths", LENGTHS_OF_ROWS, ids=str)
def test_keys_behind_the_length_of_a_row_take_no_part(
    attention: Attention, dtype: Any, options: dict[str, Any], key_lengths: list[int]
) -> None:
    left, right = options.get("window", (None, 0 if options else None))
    visible = np.stack([seen((60, 70), left, right, 0, keys) for keys in key_lengths])[:, None]
    check_seen(attention, inputs((60, 70), (3, 2), dtype=dtype), visible, key_lengths=key_lengths, **options)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", [np.int64, np.uint8, ">u4", list])
def test_lengths_broadcast_to_the_batch(attention: Attention, shape: tuple[int, ...], kind: Any) -> None:
    query, key, value = inputs((20, 70), (2, 3, 2))
    numbers = np.random.default_rng(1).integers(0, 71, shape)
    given = numbers.tolist() if kind is list else numbers.astype(kind)
    visible = np.stack([seen((20, 70), keys=int(n)) for n in np.broadcast_to(numbers, (2, 3)).flat])
    check_seen(attention, (query, key, value), visible.reshape(2, 3, 1, 20, 70), key_lengths=given)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("keys", [0, 1, 33, 70])
def test_without_a_batch_there_is_one_length(attention: Attention, rank: int, keys: int) -> None:
    arrays = inputs((20, 70), (2,) * (rank - 2))
    for given in (keys, np.int32(keys), np.array(keys)):
        check_seen(attention, arrays, seen((20, 70), keys=keys), key_lengths=given)


@dtypes
@pytest.mark.parametrize("window", [None, (9, 5), (None, 3)], ids=str)
@pytest.mark.parametrize("queries", [1, 40])
def test_bottom_right_ends_at_the_last_key_of_each_row(
    attention: Attention, dtype: Any, queries: int, window: Any
) -> None:
    arrays, key_lengths = inputs((queries, 70), (5, 2), dtype=dtype), [0, 1, 35, 64, 70]
    left = None if window is None else window[0]
    visible = np.stack([seen((queries, 70), left, 0, keys - queries, keys) for keys in key_lengths])[:, None]
    check_seen(attention, arrays, visible, is_causal="bottom-right", key_lengths=key_lengths, window=window)


def test_groups_of_heads_share_positions_and_lengths(attention: Attention) -> None:
    query, key, value = normal(2, 6, 40, 16), normal(2, 2, 70, 16, seed=2), normal(2, 2, 70, 16, seed=3)
    options: dict[str, Any] = {"key_lengths": [33, 70], "query_offset": [3, -5], "window": (20, 1), "softcap": 4.0}
    whole = tolerances.check_call(attention, query, key, value, enable_gqa=True, **options)
    for h in range(6):
        some = slice(h, h + 1), slice(h // 3, h // 3 + 1)
        alone = attention(query[:, some[0]], key[:, some[1]], value[:, some[1]], **options)
        np.testing.assert_array_equal(whole[0][:, some[0]], alone)
