"""A piece of a call: what depends on numbers of rows, heads, queries and keys is that of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances

import fastattn
from fastattn import reference
from fastattn.api.attention import on_cpu

BATCH, HEADS, QUERIES, KEYS = 3, 4, 70, 150
Array = np.ndarray[Any, Any]


def inputs(dtype: Any = np.float32, queries: int = QUERIES) -> tuple[Array, Array, Array]:
    """Return query, key and value."""
    rng = np.random.default_rng(0)
    shapes = [(BATCH, HEADS, queries, 16), (BATCH, HEADS, KEYS, 16), (BATCH, HEADS, KEYS, 24)]
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)  # type: ignore[return-value]


def of_piece(
    function: Any,
    query: Any,
    key: Any,
    value: Any,
    first: tuple[int, int, int, int],
    sizes: tuple[int, ...],
    **own: Any,
) -> Any:
    """Return what a function gives for a part of the arrays that begins at these numbers."""
    rows, heads, queries, keys = (slice(begin, begin + size) for begin, size in zip(first, sizes, strict=True))
    numbers = dict(zip(("first_batch", "first_head", "first_query", "first_key"), first, strict=True))
    return function(query[rows, heads, queries], key[rows, heads, keys], value[rows, heads, keys], **numbers, **own)


def by_kernels(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, seed: int | None = None, **further: Any
) -> Any:
    call = (query, key, value, None, dropout_p, False, None, False)
    return on_cpu(b"", further, *call, True, True, seed, None)  # type: ignore[arg-type]


def by_reference(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, seed: int | None = None, **further: Any
) -> Any:
    options: Any = {"return_lse": True, "return_weights": True, "rng": seed, **further}
    return reference.attention(query, key, value, None, dropout_p, **options)


PIECES = [
    ((0, 0, 0, 0), (3, 4, 70, 150)),
    ((1, 2, 17, 0), (2, 2, 30, 150)),
    ((0, 1, 3, 41), (1, 1, 64, 66)),
    ((2, 3, 69, 149), (1, 1, 1, 1)),
    ((1, 0, 20, 86), (2, 3, 3, 63)),
    ((0, 0, 0, 75), (3, 4, 70, 2)),
]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("first", "sizes"), PIECES, ids=str)
@pytest.mark.parametrize("by", [by_kernels, by_reference])
def test_dropout_of_a_piece_is_that_of_the_whole(by: Any, first: Any, sizes: Any, dtype: Any) -> None:
    arrays = inputs(dtype)
    whole = fastattn.attention(*arrays, dropout_p=0.4, rng=9, return_weights=True)[1] != 0
    place = tuple(slice(begin, begin + size) for begin, size in zip(first, sizes, strict=True))
    out, lse, weights = of_piece(by, *arrays, first, sizes, dropout_p=0.4, seed=9)
    np.testing.assert_array_equal(weights != 0, whole[place])
    # the results are those of these weights
    wanted = np.asarray(weights, np.float64) @ arrays[2][place[0], place[1], place[3]].astype(np.float64)
    np.testing.assert_allclose(out, wanted, atol=3e-3 if dtype == np.float16 else 1e-6)
    plain = of_piece(by, *arrays, first, sizes)[1]
    np.testing.assert_array_equal(lse, plain)


def numbered(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (3 * batch + 5 * head + query + 7 * key) % 4 != 0


def moved(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score + 0.1 * batch - 0.2 * head + 0.01 * query - 0.02 * key


@pytest.mark.parametrize(("first", "sizes"), PIECES, ids=str)
@pytest.mark.parametrize("by", [by_kernels, by_reference])
def test_functions_of_a_piece_are_told_numbers_of_the_whole(by: Any, first: Any, sizes: Any) -> None:
    query, key, value = inputs()
    place = tuple(slice(begin, begin + size) for begin, size in zip(first, sizes, strict=True))
    batch, head, i, j = np.ogrid[:BATCH, :HEADS, :QUERIES, :KEYS]
    added = moved(0.0, batch, head, i, j)[place]
    keep = np.broadcast_to(numbered(batch, head, i, j), (BATCH, HEADS, QUERIES, KEYS))[place]
    part = query[place[:3]], key[place[0], place[1], place[3]], value[place[0], place[1], place[3]]
    options = {"score_mod": moved, "mask_mod": numbered, "query_offset": first[2] - first[3]}
    out, lse, weights = of_piece(by, query, key, value, first, sizes, **options)
    wanted = tolerances.expected(*part, (added.astype(np.float64), keep))
    np.testing.assert_allclose(lse, wanted.lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, wanted.out, atol=1e-5)
    np.testing.assert_array_equal(weights != 0, keep)


def test_blocks_that_a_function_hides_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds of blocks are remembered, for each piece its own."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, 2, 512, 16), dtype=np.float32)

    def far(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query - key > 130) | (key - query > 190 - 120 * head)

    whole, wanted = fastattn.attention(query, key, value, mask_mod=far, return_lse=True)
    found = []
    for first in (0, 128, 256, 384):
        here = slice(first, first + 128)
        options: Any = {"mask_mod": far, "query_offset": -first, "first_key": first}
        found.append(by_kernels(query, key[..., here, :], value[..., here, :], **options)[:2])
    out, lse = fastattn.merge(*zip(*found, strict=True))
    np.testing.assert_allclose(out, whole, atol=1e-6)
    np.testing.assert_allclose(lse, wanted, rtol=1e-6)
    for head in range(2):
        half = by_kernels(*(array[:, [head]] for array in (query, key, value)), mask_mod=far, first_head=head)
        np.testing.assert_array_equal(half[0], whole[:, [head]])
