"""`attention_paged`: a row whose keys lie in pages is what the same row is in arrays of its own."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed_cases import row_of, starts
from paged_cases import Cache, cache, paged, queries
from strategies import (
    ALL_DTYPES,
    BFLOAT16,
    MASKS,
    SEEDS,
    bits_of,
    causal,
    functions,
    laid_out,
    layouts,
    masks_of,
    numbers,
    rarely,
    scales,
    score_options,
)

import fastattn
from fastattn import reference
from fastattn.call.halves import cast, finfo
from fastattn.call.shapes import describe

NAN = np.nan
LENGTHS = (600, 0, 1, 70, 256)


def some_keys(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query + key) % 3 != head % 3


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": "bottom-right"},
    {"is_causal": "bottom-right", "window": (50, None), "softcap": 3.0},
    {"is_causal": True, "query_offset": np.arange(len(LENGTHS)) * 40},
    {"alibi_slopes": np.array([0.5, 0.1, 0.3, 2.0]), "scale": -0.3},
    {"sinks": np.linspace(-4, 4, 4 * len(LENGTHS)).reshape(-1, 4), "window": (9, 4)},
    {"scale": 1e-60},
    {"mask_mod": some_keys},
)
options_of_all = pytest.mark.parametrize("options", OPTIONS, ids=", ".join)
page_sizes = pytest.mark.parametrize("page", [1, 3, 16, 256])
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


def alone(query: Any, held: Cache, options: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Return what `attention` gives of each row alone, with the axes of `attention_paged`: (Lq, Hq, ...)."""
    found = []
    for number, rows in enumerate(query):
        own = row_of(options, number)
        results = fastattn.attention(rows.swapaxes(0, 1), *held.row(number), **own, enable_gqa=True, return_lse=True)
        found.append(tuple(each.swapaxes(0, 1) for each in results))
    return found


def with_an_empty_row(held: Cache) -> tuple[Any, Any, Any, Any]:
    """Return what `attention_paged` takes behind the query, with one more row, that has no keys."""
    table, lengths = np.pad(held.page_table, ((0, 1), (0, 0)), constant_values=-1), np.append(held.key_lengths, 0)
    return held.key_pages, held.value_pages, table, lengths


# -- bits --------------------------------------------------------------------------------------------------------------


@options_of_all
@page_sizes
@pytest.mark.parametrize("count", [1, 3, 40])
def test_each_row_has_the_bits_of_the_same_row_alone(count: int, page: int, options: dict[str, Any]) -> None:
    held, query = cache(LENGTHS, page), queries(len(LENGTHS), count, 4, 16)
    wanted = alone(query, held, options)
    for threads in (1, 2):
        with fastattn.num_threads(threads):
            out, lse = fastattn.attention_paged(query, *held.args, **options, return_lse=True)
        assert out.shape == (len(LENGTHS), count, 4, 8)
        assert lse.shape == (len(LENGTHS), count, 4)
        for number, results in enumerate(wanted):
            assert bits_of(out[number], lse[number]) == bits_of(*results)


@page_sizes
@pytest.mark.parametrize("dtype", [np.float64, np.float16, BFLOAT16])
@pytest.mark.parametrize("count", [1, 12, 40])
def test_each_row_has_these_bits_in_any_dtype(count: int, page: int, dtype: Any) -> None:
    held, query = cache(LENGTHS, page, dtype=dtype), queries(len(LENGTHS), count, 6, 16, dtype=dtype)
    options: dict[str, Any] = {"is_causal": "bottom-right"}
    out, lse = fastattn.attention_paged(query, *held.args, **options, return_lse=True)
    assert out.dtype == dtype
    for number, results in enumerate(alone(query, held, options)):
        assert bits_of(out[number], lse[number]) == bits_of(*results)


@options_of_all
@pytest.mark.parametrize("page", [5, 256])
def test_packed_queries_have_the_bits_of_each_row_alone(page: int, options: dict[str, Any]) -> None:
    held, counts = cache(LENGTHS, page), (1, 20, 0, 1, 70)
    cu_seqlens = starts(counts)
    query = queries(sum(counts), 4, 16)
    for threads in (1, 2):
        with fastattn.num_threads(threads):
            found = fastattn.attention_paged(query, *held.args, cu_seqlens, **options, return_lse=True)
        for number, (start, end) in enumerate(pairwise(cu_seqlens)):
            own = row_of(options, number)
            rows = query[start:end].swapaxes(0, 1)
            wanted = fastattn.attention(rows, *held.row(number), **own, enable_gqa=True, return_lse=True)
            assert bits_of(*(each[start:end].swapaxes(0, 1) for each in found)) == bits_of(*wanted)


def test_many_rows_that_decode_and_a_prompt() -> None:
    lengths = np.random.default_rng(0).integers(1, 700, 50)
    held, counts = cache(lengths, 16), [1] * 49 + [130]
    query, cu_seqlens = queries(sum(counts), 4, 16), starts(counts)
    out = fastattn.attention_paged(query, *held.args, cu_seqlens, is_causal="bottom-right")
    decoded = fastattn.attention_paged(
        query[:49, None], *(held.args[0], held.args[1], *(a[:49] for a in held.args[2:]))
    )
    np.testing.assert_array_equal(out[:49], decoded[:, 0])
    rows = query[49:].swapaxes(0, 1)
    alone_ = fastattn.attention(rows, *held.row(49), is_causal="bottom-right", enable_gqa=True)
    np.testing.assert_array_equal(out[49:], alone_.swapaxes(0, 1))


@pytest.mark.parametrize("count", [1, 3])
def test_packed_queries_that_are_as_many_for_each_row_are_a_batch(count: int) -> None:
    held, query = cache(LENGTHS, 16), queries(len(LENGTHS), count, 4, 16)
    cu_seqlens = np.arange(len(LENGTHS) + 1) * count
    for options in (*OPTIONS, {"dropout_p": 0.3, "rng": 5}):
        batch = fastattn.attention_paged(query, *held.args, **options, return_lse=True)
        for whole in (query, laid_out(query, "every second"), np.asfortranarray(query)):
            packed = whole.reshape(-1, 4, 16)
            found = fastattn.attention_paged(packed, *held.args, cu_seqlens, **options, return_lse=True)
            assert bits_of(*found) == bits_of(*(each.reshape(-1, *each.shape[2:]) for each in batch))
            out = laid_out(np.zeros_like(found[0]), "every second")
            assert fastattn.attention_paged(packed, *held.args, cu_seqlens, **options, out=out) is out
            assert bits_of(out) == bits_of(found[0])


def test_packed_queries_whose_keys_are_cut_among_threads() -> None:
    lengths = (1024, 4000, 1025, 8000, 512, 4096)
    held = cache(lengths, 256, heads=1, features=(64, 64))
    query, call = queries(len(lengths), 16, 64), with_an_empty_row(held)
    cu_seqlens = [*range(len(lengths) + 1), len(lengths)]
    for threads in (1, 2, 4):
        with fastattn.num_threads(threads):
            found = fastattn.attention_paged(query, *call, cu_seqlens, return_lse=True)
        for number, results in enumerate(alone(query[:, None], held, {})):
            assert bits_of(*(each[number] for each in found)) == bits_of(*(each[0] for each in results))


@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("page", [7, 256])
def test_where_pages_lie_changes_no_bit(page: int, count: int) -> None:
    query = queries(len(LENGTHS), count, 4, 16)
    results = [
        fastattn.attention_paged(query, *cache(LENGTHS, page, how=how).args, is_causal="bottom-right")
        for how in ("contiguous", "shuffled", "heads first")
    ]
    held = cache(LENGTHS, page)
    for layout in ("Fortran", "reversed", "every second", "every third feature", "unaligned"):
        pages = [laid_out(array, layout) for array in (held.key_pages, held.value_pages)]
        results.append(fastattn.attention_paged(query, *pages, *held.args[2:], is_causal="bottom-right"))
    assert len({bits_of(each)[0] for each in results}) == 1


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
@pytest.mark.parametrize("page", [16, 256])
@pytest.mark.parametrize("count", [1, 12, 40])
def test_pages_of_half_precision_are_for_queries_in_float32_too(count: int, page: int, dtype: Any) -> None:
    held, query = cache(LENGTHS, page, dtype=dtype), queries(len(LENGTHS), count, 4, 16)
    out = fastattn.attention_paged(query, *held.args, is_causal="bottom-right")
    assert out.dtype == np.float32
    wide = [cast(array, np.dtype(np.float32)) for array in (held.key_pages, held.value_pages)]
    wanted = fastattn.attention_paged(query, *wide, *held.args[2:], is_causal="bottom-right")
    np.testing.assert_array_equal(out, wanted)


# -- what is read ------------------------------------------------------------------------------------------------------


@backends
def test_rows_may_share_pages(backend: str) -> None:
    held, query = cache((40,), 16), queries(3, 2, 4, 16)
    table, lengths = np.repeat(held.page_table, 3, 0), np.array([40, 20, 33])
    out = fastattn.attention_paged(query, *held.args[:2], table, lengths, backend=backend)
    for number, length in enumerate(lengths):
        key, value = (array[0, :, :length] for array in (held.key, held.value))
        rows = query[number].swapaxes(0, 1)
        wanted = fastattn.attention(rows, key, value, enable_gqa=True, backend=backend)
        np.testing.assert_array_equal(out[number], wanted.swapaxes(0, 1))


def test_all_pages_may_be_the_same_memory() -> None:
    key, value = (queries(4, 1, 16)[None], queries(5, 1, 8)[None, :4])
    query, table = queries(1, 1, 4, 16), [[3, 0, 1]]
    pages = [np.broadcast_to(array, (5, *array.shape[1:])) for array in (key, value)]
    out = fastattn.attention_paged(query, *pages, table, [10])
    rows = [np.tile(array[0], (3, 1, 1))[:10].swapaxes(0, 1) for array in (key, value)]
    wanted = fastattn.attention(query[0].swapaxes(0, 1), *rows, enable_gqa=True)
    np.testing.assert_array_equal(out[0], wanted.swapaxes(0, 1))


@backends
@pytest.mark.parametrize("page", [4, 256])
@pytest.mark.parametrize("count", [1, 40])
def test_nothing_leaks_that_no_row_has(backend: str, page: int, count: int) -> None:
    lengths, query = (30, 300, 0), queries(3, count, 4, 16)
    options: dict[str, Any] = {"is_causal": "bottom-right", "backend": backend, "return_lse": True}
    results = []
    for fill in (0.0, NAN, np.inf, 1e30):
        held = cache(lengths, page)
        held = paged(held.key, held.value, lengths, page, np.random.default_rng(1), fill=fill)
        results.append(bits_of(*fastattn.attention_paged(query, *held.args, **options)))
    assert all(each == results[0] for each in results)


@pytest.mark.parametrize("count", [1, 40])
def test_what_hidden_keys_hold_does_not_leak(count: int) -> None:
    held, query = cache((300,), 16), queries(1, count, 4, 16)
    wanted = fastattn.attention_paged(query, *held.args, is_causal="bottom-right", window=(20, 0))
    for array in (held.key_pages, held.value_pages):
        array[held.page_table[0, :14]] = NAN  # keys up to 224
    out = fastattn.attention_paged(query, *held.args, is_causal="bottom-right", window=(20, 0))
    np.testing.assert_array_equal(out, wanted)


def test_what_stands_behind_the_pages_that_are_needed_is_not_read(backend: str) -> None:
    if backend == "cuda":
        pytest.skip("no kernel of CUDA reads pages")
    held, query = cache((30, 17, 0), 16), queries(3, 1, 4, 16)
    wanted = fastattn.attention_paged(query, *held.args, backend=backend)
    for number in (-1, 10**6, -(2**31)):
        table = held.page_table.copy()
        table[0, 2:], table[1, 2:], table[2] = number, number, number
        out = fastattn.attention_paged(query, *held.args[:2], table, held.key_lengths, backend=backend)
        np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8, np.uint32, ">i4"])
def test_tables_and_lengths_of_any_integers_in_any_layout(kind: Any) -> None:
    held, query = cache((30, 17, 200), 16), queries(3, 1, 4, 16)
    wanted = fastattn.attention_paged(query, *held.args)
    table = np.maximum(held.page_table, 0).astype(kind)
    lengths = held.key_lengths.astype(kind)
    for laid in (table, np.asfortranarray(table), np.repeat(table, 2, 1)[:, ::2], table[:, ::-1].copy()[:, ::-1]):
        for _ in range(2):
            out = fastattn.attention_paged(query, *held.args[:2], laid, np.repeat(lengths, 3)[::3])
            np.testing.assert_array_equal(out, wanted)
    as_lists = fastattn.attention_paged(query, *held.args[:2], table.tolist(), lengths.tolist())
    np.testing.assert_array_equal(as_lists, wanted)


def test_arguments_may_be_read_only_and_are_not_written_to() -> None:
    held, query = cache((30, 17, 200), 16), queries(3, 1, 4, 16)
    before = bits_of(query, *held.args)
    for array in (query, *held.args):
        array.flags.writeable = False
    for cu_seqlens in (None, [0, 1, 2, 3]):
        rows = query if cu_seqlens is None else query[:, 0]
        fastattn.attention_paged(rows, *held.args, cu_seqlens)
    assert bits_of(query, *held.args) == before


def test_pages_are_not_copied() -> None:
    pages = np.zeros((64, 16, 8, 64), np.float32)  # 2 MiB
    query, table = queries(4, 1, 8, 64), np.arange(64).reshape(4, 16)
    call = (query, pages, pages, table, np.array([256, 250, 3, 0]))
    fastattn.attention_paged(*call)
    tracemalloc.start()
    fastattn.attention_paged(*call)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 19


# -- what is given back ------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("packed", [False, True])
def test_out_is_written_to_and_may_be_the_query(backend: str, packed: bool) -> None:
    held = cache((30, 17, 0), 16, features=(8, 8))
    query = queries(3, 4, 8) if packed else queries(3, 1, 4, 8)
    call = (*held.args, [0, 1, 2, 3] if packed else None)
    wanted = fastattn.attention_paged(query, *call, backend=backend)
    for _ in range(2):
        target = np.empty_like(query)
        result, lse = fastattn.attention_paged(query, *call, out=target, return_lse=True, backend=backend)
        assert result is target
        assert lse.shape == query.shape[:-1]
        np.testing.assert_array_equal(target, wanted)
        own = query.copy()
        assert fastattn.attention_paged(own, *call, out=own, backend=backend) is own
        np.testing.assert_array_equal(own, wanted)


def test_out_may_overlap_pages() -> None:
    held, query = cache((16, 9), 16, features=(8, 8)), queries(2, 1, 2, 8)
    wanted = fastattn.attention_paged(query, *held.args)
    for _ in range(2):
        pages = held.value_pages.copy()
        out = pages[0, :2, :, :][:, None]
        found = fastattn.attention_paged(query, held.key_pages, pages, *held.args[2:], out=out)
        assert found is out
        np.testing.assert_array_equal(out, wanted)


def test_the_result_of_half_precision_before_it_is_rounded() -> None:
    held, query = cache((30, 17), 16, dtype=np.float16), queries(2, 1, 4, 16, dtype=np.float16)
    out = np.empty((2, 1, 4, 8), np.float32)
    fastattn.attention_paged(query, *held.args, out=out)
    assert bits_of(out.astype(np.float16)) == bits_of(fastattn.attention_paged(query, *held.args))


@backends
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_where_there_is_no_key(backend: str, packed: bool, lengths: Any) -> None:
    held = cache(lengths, 4)
    query = np.ones((len(lengths), 3, 2, 16), np.float32)
    if packed:
        query = query.reshape(-1, 2, 16)
    cu_seqlens = [3 * number for number in range(len(lengths) + 1)] if packed else None
    none = [np.empty((0, 4, 2, size), np.float32) for size in (16, 8)]
    for pages in (held.args[:2], none):
        out, lse = fastattn.attention_paged(query, *pages, *held.args[2:], cu_seqlens, return_lse=True, backend=backend)
        np.testing.assert_array_equal(out, np.zeros((*query.shape[:-1], 8)))
        np.testing.assert_array_equal(lse, np.full(query.shape[:-1], -np.inf))


@backends
@pytest.mark.parametrize("features", [(0, 8), (16, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("page", [16, 256, 300])
def test_where_there_are_no_features(backend: str, page: int, features: tuple[int, int]) -> None:
    held = cache((3, 300), page, features=features, how="heads first")
    query = queries(2, 1, 4, features[0])
    values = [held.row(row)[1].mean(axis=1).repeat(2, axis=0) for row in range(2)]  # every score is 0
    for cu_seqlens in (None, [0, 1, 2], [0, 0, 2]):
        rows = query if cu_seqlens is None else query.reshape(2, *query.shape[2:])
        out = fastattn.attention_paged(rows, *held.args, cu_seqlens, backend=backend)
        assert out.shape == (*rows.shape[:-1], features[1])
        wanted = [values[1]] * 2 if cu_seqlens == [0, 0, 2] else values
        np.testing.assert_allclose(out.reshape(2, 4, features[1]), wanted, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"is_causal": "bottom-right"}], ids=str)
def test_dropout_keeps_what_it_keeps_in_the_padded_batch(options: dict[str, Any]) -> None:
    held, query = cache((30, 300, 17), 16), queries(3, 1, 4, 16)
    options = {**options, "dropout_p": 0.4, "rng": 2**63 + 5}
    rows, lengths = query.swapaxes(1, 2), held.key_lengths
    wanted = fastattn.attention(rows, held.key, held.value, **options, key_lengths=lengths, enable_gqa=True)
    for backend in ("cpu", "reference"):
        out = fastattn.attention_paged(query, *held.args, **options, backend=backend)
        np.testing.assert_allclose(out, wanted.swapaxes(1, 2), rtol=0, atol=1e-6)
        for call, cu_seqlens in ((held.args, [0, 1, 2, 3]), (with_an_empty_row(held), [0, 1, 2, 3, 3])):
            packed = fastattn.attention_paged(query[:, 0], *call, cu_seqlens, **options, backend=backend)
            np.testing.assert_allclose(packed, out[:, 0], rtol=0, atol=1e-6)


# -- a call like an earlier one ----------------------------------------------------------------------------------------


def test_a_call_like_an_earlier_one_is_told_of_other_lengths_and_pages() -> None:
    held, query = cache((600, 300), 16), queries(2, 1, 4, 16)
    for how in ({}, {"is_causal": "bottom-right", "window": (100, 0)}):
        for lengths in ((600, 300), (599, 2), (0, 300), (17, 16)):
            for order in ((0, 1), (1, 0)):
                taken = replace(
                    held, page_table=held.page_table[list(order)], key_lengths=np.array(lengths)[list(order)]
                )
                taken = replace(taken, key=held.key[list(order)], value=held.value[list(order)])
                out = fastattn.attention_paged(query, *taken.args, **how)
                for number, (wanted, _) in enumerate(alone(query, taken, how)):
                    np.testing.assert_array_equal(out[number], wanted)


def test_a_call_like_an_earlier_one_is_refused_what_it_was() -> None:
    held, query = cache((40, 30), 16), queries(2, 1, 4, 16)
    out = np.empty((2, 1, 4, 8), np.float32)
    for _ in range(3):
        fastattn.attention_paged(query, *held.args, out=out)
    count = len(held.key_pages)
    for number in (count, -1, 2**31 - 1):
        table = held.page_table.copy()
        table[1, 1] = number
        with pytest.raises(ValueError, match=rf"page_table: {number} in row 1 at 1, .* from 0 to {count - 1}"):
            fastattn.attention_paged(query, *held.args[:2], table, held.key_lengths, out=out)
    for lengths in ([40, -1], [16 * held.page_table.shape[1] + 1, 3]):
        with pytest.raises(ValueError, match="key_lengths: "):
            fastattn.attention_paged(query, *held.args[:3], np.array(lengths), out=out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: the array is read-only"):
        fastattn.attention_paged(query, *held.args, out=out)
    with pytest.raises(TypeError, match="return_lse: "):
        fastattn.attention_paged(query, *held.args, return_lse=1)  # type: ignore[arg-type]


# -- what is refused ---------------------------------------------------------------------------------------------------

PAGES = np.ones((3, 4, 2, 8))
REFUSED: tuple[tuple[dict[str, Any], Any, str], ...] = (
    (
        {"query": np.ones((2, 2, 8))},
        ValueError,
        r"query: shape \(2, 2, 8\); expected \(rows, length, heads, features\)",
    ),
    ({"query": np.ones((2, 1, 2, 7))}, ValueError, r"query: shape .* expected 8 features on the last axis"),
    ({"query": np.ones((2, 1, 3, 8))}, ValueError, r"query: shape .* has 3 heads; expected a multiple of 2"),
    ({"query": np.ones((3, 1, 2, 8))}, ValueError, r"page_table: 2 rows; expected 3, one for each row of query"),
    ({"query": "a"}, TypeError, "query: dtype <U1"),
    ({"key_pages": PAGES[0]}, ValueError, r"key_pages: shape \(4, 2, 8\); expected \(pages, keys of a page, heads"),
    ({"key_pages": PAGES[:, :0], "value_pages": PAGES[:, :0]}, ValueError, r"key_pages: shape \(3, 0, 2, 8\)"),
    ({"key_pages": PAGES.astype(int)}, TypeError, "key_pages: dtype int64; expected a floating one"),
    ({"key_pages": PAGES.astype(complex)}, TypeError, "key_pages: dtype complex128"),
    ({"key_pages": PAGES.astype("f4")}, TypeError, "value_pages: dtype float64; expected float32, as key_pages has"),
    ({"value_pages": PAGES[:2]}, ValueError, r"value_pages: shape \(2, 4, 2, 8\); expected \(3, 4, 2\)"),
    ({"value_pages": PAGES[:, :, :1]}, ValueError, r"value_pages: shape \(3, 4, 1, 8\); expected \(3, 4, 2\)"),
    (
        {"key_pages": PAGES.astype("f4"), "value_pages": PAGES.astype("f4")},
        TypeError,
        "query: dtype float64; expected float32, as key_pages has, which is not converted",
    ),
    ({"page_table": [0, 1]}, ValueError, r"page_table: shape \(2,\); expected \(rows, pages of a row\)"),
    ({"page_table": [[0.0], [1.0]]}, TypeError, "page_table: dtype float64; expected integers"),
    (
        {"page_table": [[0]], "key_lengths": [3]},
        ValueError,
        "page_table: 1 rows; expected 2, one for each row of query",
    ),
    ({"page_table": [[0, 3], [1, 2]]}, ValueError, "page_table: 3 in row 0 at 1, .* from 0 to 2"),
    ({"page_table": [[0, 2], [-1, 2]]}, ValueError, "page_table: -1 in row 1 at 0, of which 3 keys need 1 pages"),
    ({"page_table": None}, TypeError, "page_table: None"),
    ({"key_lengths": [9, 1]}, ValueError, "key_lengths: 1 to 9; expected 0 to 8, the keys of 2 pages of 4"),
    ({"key_lengths": [-1, 1]}, ValueError, "key_lengths: -1 to 1; expected 0 to 8"),
    ({"key_lengths": [1]}, ValueError, r"key_lengths: shape \(1,\); expected \(2,\), one for each row of page_table"),
    ({"key_lengths": 3}, ValueError, r"key_lengths: shape \(\); expected \(rows,\)"),
    ({"key_lengths": [1.0, 2.0]}, TypeError, "key_lengths: dtype float64"),
    ({"attn_mask": np.ones((2, 1, 1, 5), bool)}, ValueError, r"attn_mask: shape .* at least 6 keys"),
    ({"attn_mask": np.ones((2, 2, 1, 2, 6), bool)}, ValueError, "attn_mask: shape"),
    ({"block_mask": 3}, TypeError, "block_mask: 3 of type int"),
    ({"cu_seqlens_q": [0, 1, 2]}, ValueError, r"query: shape .* expected \(all lengths together, heads, features\)"),
    ({"query": np.ones((2, 2, 8)), "cu_seqlens_q": [0, 1]}, ValueError, "cu_seqlens_q: from 0 to 1"),
    ({"query": np.ones((2, 2, 8)), "cu_seqlens_q": [0, 2]}, ValueError, "page_table: 2 rows; expected 1, one for each"),
    (
        {"query": np.ones((2, 2, 8)), "cu_seqlens_q": [0, 1, 2], "attn_mask": np.ones(6, bool)},
        ValueError,
        "attn_mask: given together with cu_seqlens_q",
    ),
    ({"window": 3}, TypeError, "window"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"scale": "1"}, TypeError, "scale"),
    ({"dropout_p": 2.0}, ValueError, "dropout_p"),
    ({"is_causal": 1}, TypeError, "is_causal"),
    ({"query_offset": 1, "is_causal": "bottom-right"}, ValueError, "query_offset"),
    ({"query_offset": [1.5, 2.0]}, TypeError, "query_offset: dtype float64"),
    ({"alibi_slopes": [1.0, 2.0, 3.0]}, ValueError, "alibi_slopes"),
    ({"sinks": [1.0, 2.0, 3.0]}, ValueError, "sinks"),
    ({"score_mod": 1}, TypeError, "score_mod: int; expected a Python function"),
    ({"return_lse": 1}, TypeError, "return_lse"),
    ({"rng": -1}, ValueError, "rng"),
    ({"out": np.ones((2, 2, 1, 8))}, ValueError, r"out: shape \(2, 2, 1, 8\); expected \(2, 1, 2, 8\)"),
    ({"out": np.ones((2, 1, 2, 8), np.float32)}, TypeError, "out: dtype float32"),
    ({"out": [1]}, TypeError, "out: .* of type list"),
    ({"enable_gqa": True}, TypeError, "enable_gqa"),
    ({"backend": "cuda"}, ValueError, "backend: 'cuda'"),
)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=str)
def test_what_is_refused(backend: str, change: dict[str, Any], error: Any, message: str) -> None:
    call: dict[str, Any] = {"query": np.ones((2, 1, 2, 8)), "key_pages": PAGES, "value_pages": PAGES}
    call |= {"page_table": [[0, 2], [1, 2]], "key_lengths": [6, 3], "backend": backend}
    with pytest.raises(error, match=message):
        fastattn.attention_paged(**(call | change))


# -- at random ---------------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, Cache, Any, dict[str, Any]]:
    """Draw a batch whose keys are in pages: queries, heads first, pages, a mask and options."""
    rows = draw(st.integers(1, 4))
    kv_heads, group = draw(st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 2), (1, 8))))
    count = draw(st.one_of(st.integers(1, 5), st.integers(1, 40)))
    longest = draw(st.one_of(st.integers(0, 20), st.integers(0, 300), st.sampled_from((256, 257, 512))))
    features = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    dtype, rng = draw(ALL_DTYPES), np.random.default_rng(draw(SEEDS))
    lengths = rng.integers(0, longest + 1, rows)
    lengths[rng.integers(rows)] = longest
    shapes = [(rows, kv_heads * group, count), *[(rows, kv_heads, longest)] * 2]
    sizes = (features[0], *features)
    query, key, value = (numbers(rng, (*shape, size), dtype) for shape, size in zip(shapes, sizes, strict=True))
    page = draw(st.sampled_from((1, 2, 5, 16, 64, 100, 256, 512)))
    held = paged(key, value, lengths, page, rng, draw(st.sampled_from(("contiguous", "shuffled", "heads first"))))
    pages = [laid_out(array, draw(layouts)) for array in (held.key_pages, held.value_pages)]
    held = replace(held, key_pages=pages[0], value_pages=pages[1])
    is_causal = draw(causal)
    problem, _ = describe(query, key, value, enable_gqa=True)
    options = {"is_causal": is_causal, "scale": draw(scales), **draw(score_options(problem, is_causal))}
    options.pop("key_lengths", None)
    mask = draw(masks_of(rng, problem.weights_shape, (None, None, *MASKS[:-1])))[0]
    if draw(rarely):
        options |= draw(functions(problem))
    if draw(rarely):
        options |= {"dropout_p": 0.5, "rng": draw(st.integers(0, 2**64 - 1))}
    return laid_out(query, draw(layouts)), held, mask, options


@given(call=calls(), threads=st.sampled_from((1, 2, 3)))
def test_any_call(call: tuple[Any, Cache, Any, dict[str, Any]], threads: int) -> None:
    query, held, mask, options = call
    rows, before = query.swapaxes(1, 2), bits_of(query, *held.args)
    padded: dict[str, Any] = {**options, "key_lengths": held.key_lengths, "enable_gqa": True, "return_lse": True}
    wanted = fastattn.attention(query, held.key, held.value, mask, **padded)
    with fastattn.num_threads(threads):
        for _ in range(2):
            found = fastattn.attention_paged(rows, *held.args, None, mask, **options, return_lse=True)
            assert bits_of(*(each.swapaxes(1, 2) for each in found)) == bits_of(*wanted)
        if mask is None and "block_mask" not in options:
            packed, ends = rows.reshape(-1, *rows.shape[2:]), np.arange(len(rows) + 1) * rows.shape[1]
            for call, cu_seqlens in ((held.args, ends), (with_an_empty_row(held), [*ends, ends[-1]])):
                own = by_row(options, len(call[3]), query.shape)
                alike = fastattn.attention_paged(packed, *call, cu_seqlens, **own, return_lse=True)
                assert bits_of(*alike) == bits_of(*(each.reshape(-1, *each.shape[2:]) for each in found))
    exact = reference.attention_paged(rows, *held.args, None, mask, **options, return_lse=True)
    of_arrays = reference.attention(query, held.key, held.value, mask, **padded)
    for got, exactly in zip(exact, of_arrays, strict=True):
        eps = float(finfo(got.dtype).eps)
        wide = [cast(each, np.dtype(np.float64)) for each in (got.swapaxes(1, 2), exactly)]
        np.testing.assert_allclose(*wide, rtol=eps, atol=eps)
    assert bits_of(query, *held.args) == before


def by_row(options: dict[str, Any], rows: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return options of which each of so many rows has its own, where any has: those beyond the batch have zeros."""
    found = dict(options)
    for name, full in (("query_offset", shape[:1]), ("alibi_slopes", shape[:2]), ("sinks", shape[:2])):
        if isinstance(found.get(name), np.ndarray):
            own = np.broadcast_to(found[name], full)
            found[name] = np.concatenate([own, np.zeros((rows - len(own), *full[1:]), own.dtype)])
    return found
