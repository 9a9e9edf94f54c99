"""Sequences that are packed, keys in pages, keys in pieces."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import tolerances
from semantic_cases import INF, NAN, Array, Attention, close, dtypes, inputs, lengths, normal

import fastattn

# -- packed sequences --------------------------------------------------------------------------------------------------


def packed_inputs(dtype: Any = np.float32, heads: tuple[int, int] = (2, 2)) -> tuple[list[Array], list[int], list[int]]:
    """Return query, key and value of four sequences, and the cumulative lengths of queries and keys."""
    queries, keys = [0, 15, 15, 60, 61], [0, 10, 30, 80, 150]
    arrays = [
        normal(length, n, 16, dtype=dtype, seed=i)
        for i, (length, n) in enumerate(((61, heads[0]), (150, heads[1]), (150, heads[1])))
    ]
    return arrays, queries, keys


def in_batch(arrays: list[Array], queries: list[int], keys: list[int]) -> tuple[list[Array], list[int], list[int]]:
    """Return packed sequences as rows of a padded batch, and their lengths."""
    ends = [(queries, 45), (keys, 70), (keys, 70)]
    batch = [
        np.zeros((4, array.shape[1], most, 16), array.dtype) for array, (_, most) in zip(arrays, ends, strict=True)
    ]
    for rows, array, (cu, _) in zip(batch, arrays, ends, strict=True):
        for row in range(4):
            rows[row, :, : cu[row + 1] - cu[row]] = array[cu[row] : cu[row + 1]].swapaxes(0, 1)
    return batch, np.diff(queries).tolist(), np.diff(keys).tolist()


@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window": (3, 2)},
        {"query_offset": [3, 0, -2, 9], "is_causal": True},
        {"alibi_slopes": [[0.5, 1.0], [0.0, 0.1], [2.0, 0.25], [1.0, 1.0]]},
        {"alibi_slopes": [0.5, 0.125], "softcap": 2.0, "scale": -0.5},
        {"dropout_p": 0.5, "rng": 3},
    ],
    ids=str,
)
def test_packed_sequences_are_the_rows_of_the_padded_batch(backend: str, dtype: Any, options: dict[str, Any]) -> None:
    arrays, queries, keys = packed_inputs(dtype)
    batch, query_lengths, key_lengths = in_batch(arrays, queries, keys)
    out, lse = fastattn.attention_varlen(*arrays, queries, keys, **options, return_lse=True, backend=backend)
    padded: Any = {**options, "key_lengths": key_lengths, "return_lse": True, "backend": backend}
    whole, sums = fastattn.attention(*batch, **padded)
    for row, length in enumerate(query_lengths):
        part = slice(queries[row], queries[row + 1])
        close(out[part].swapaxes(0, 1), whole[row, :, :length], dtype)
        close(lse[part].swapaxes(0, 1), sums[row, :, :length], dtype)


def test_bottom_right_is_that_of_each_packed_sequence(backend: str) -> None:
    arrays, queries, keys = packed_inputs()
    offsets = [keys[row + 1] - keys[row] - (queries[row + 1] - queries[row]) for row in range(4)]
    out = fastattn.attention_varlen(*arrays, queries, keys, is_causal="bottom-right", backend=backend)
    wanted = fastattn.attention_varlen(*arrays, queries, keys, is_causal=True, query_offset=offsets, backend=backend)
    close(out, wanted)


@dtypes
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_packed_sequence_has_the_bits_of_the_same_sequence_alone(dtype: Any, threads: int) -> None:
    arrays, queries, keys = packed_inputs(dtype, (4, 2))
    options: dict[str, Any] = {"enable_gqa": True, "is_causal": "bottom-right"}
    with fastattn.num_threads(threads):
        out, lse = fastattn.attention_varlen(*arrays, queries, keys, **options, return_lse=True)
        gradients = fastattn.attention_varlen_backward(out, *arrays, out, lse, queries, keys, **options)
    for row in range(4):
        own, others = slice(queries[row], queries[row + 1]), slice(keys[row], keys[row + 1])
        alone = [array[part].swapaxes(0, 1) for array, part in zip(arrays, (own, others, others), strict=True)]
        results = fastattn.attention(*alone, **options, return_lse=True)
        found = fastattn.attention_backward(results[0], *alone, *results, **options)
        for packed, array, part in zip(
            (out, lse, *gradients), (*results, *found), (own, own, own, others, others), strict=True
        ):
            np.testing.assert_array_equal(packed[part].swapaxes(0, 1), array)


# -- keys in pages -----------------------------------------------------------------------------------------------------


def in_pages(array: Any, lengths: Any, page: int, table: Any) -> Any:
    """Return rows of a batch, (B, H, L, D), in pages, where those of a table say; elsewhere is NaN."""
    pages = np.full((table.max() + 1, page, array.shape[1], array.shape[3]), np.nan, array.dtype)
    for row, length in enumerate(lengths):
        for j in range(length):
            pages[table[row, j // page], j % page] = array[row, :, j]
    return pages


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("queries", [1, 30])
def test_a_cached_sequence_has_the_bits_of_the_same_sequence_alone(queries: int, threads: int) -> None:
    rng, lengths = np.random.default_rng(0), np.array([300, 33, 0])
    query = rng.standard_normal((3, 4, queries, 16)).astype(np.float32)
    key, value = rng.standard_normal((2, 3, 2, 300, 16)).astype(np.float32)
    options: dict[str, Any] = {"is_causal": "bottom-right", "return_lse": True}
    for page, spare in ((1, 0), (7, 30), (16, 0), (256, 3), (1000, 0)):  # pages of any size, and room for more keys
        table = rng.permutation(3 * (-(-300 // page) + spare)).reshape(3, -1)
        pages = [in_pages(array, lengths, page, table) for array in (key, value)]
        with fastattn.num_threads(threads):
            found = fastattn.attention_paged(query.swapaxes(1, 2), *pages, table, lengths, **options)
        for row, length in enumerate(lengths):
            own = (array[row, :, :length] for array in (key, value))
            alone = fastattn.attention(query[row], *own, **options, enable_gqa=True)
            for whole, wanted in zip(found, alone, strict=True):
                np.testing.assert_array_equal(whole[row].swapaxes(0, 1), wanted)


# -- keys in pieces ----------------------------------------------------------------------------------------------------


@dtypes
@lengths
def test_merged_pieces_are_attention_to_all_keys(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key, value = inputs(length, dtype=dtype)
    cuts = sorted({0, length[1] // 3, length[1] // 2, length[1]})
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    pieces = [attention(query, key[:, part], value[:, part], return_lse=True) for part in parts]
    out, lse = fastattn.merge(*zip(*pieces, strict=True))
    wanted = tolerances.expected(query, key, value)
    close(out, wanted.out, dtype)
    close(lse, wanted.lse, dtype)


def test_an_empty_piece_counts_for_nothing(attention: Attention) -> None:
    query, key, value = inputs()
    out, lse = attention(query, key, value, return_lse=True)
    empty = attention(query, key[:, :0], value[:, :0], return_lse=True)
    for nothing in (empty[0], np.full_like(out, NAN)):
        merged = fastattn.merge([nothing, out], [empty[1], lse])
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_array_equal(merged[1], lse)
    merged = fastattn.merge([empty[0]] * 2, [empty[1]] * 2)
    np.testing.assert_array_equal(merged[0], 0)
    np.testing.assert_array_equal(merged[1], -INF)
