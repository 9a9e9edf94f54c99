"""`attention_varlen` and its gradients: packed sequences are what each of them is alone."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from packed_cases import LENGTHS, alone, packed, padded, starts, together
from strategies import (
    ALL_DTYPES,
    BFLOAT16,
    SEEDS,
    bits_of,
    causal,
    laid_out,
    layouts,
    numbers,
    of_heads,
    rarely,
    scales,
    sinks,
    slopes,
    softcaps,
    windows,
)

import fastattn
from fastattn import reference
from fastattn.call.halves import cast, finfo

INF, NAN = np.inf, np.nan

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"is_causal": "bottom-right"},
    {"window": (9, 4), "softcap": 3.0},
    {"is_causal": True, "query_offset": 3, "window": (20, None)},
    {"is_causal": True, "query_offset": np.arange(len(LENGTHS)) - 2},
    {"alibi_slopes": np.array([0.5, 0.1, 0.3, 2.0]), "is_causal": "bottom-right"},
    {"alibi_slopes": np.linspace(0, 1, 4 * len(LENGTHS)).reshape(-1, 4), "scale": -0.3},
    {"scale": 1e-60},
    {"sinks": np.array([0.5, -np.inf, -3.0, 40.0]), "window": (9, 4)},
    {"sinks": np.linspace(-4, 4, 4 * len(LENGTHS)).reshape(-1, 4), "softcap": 3.0},
)
options_of_all = pytest.mark.parametrize("options", OPTIONS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@dtypes
@options_of_all
def test_each_sequence_is_what_it_is_alone(backend: str, dtype: Any, options: dict[str, Any]) -> None:
    arrays = packed(dtype=dtype)
    out, lse = fastattn.attention_varlen(*arrays, **options, enable_gqa=True, return_lse=True, backend=backend)
    assert out.shape == (len(arrays[0]), 4, 8)
    assert lse.shape == (len(arrays[0]), 4)
    assert out.dtype == lse.dtype == dtype
    for at, (query, key, value, own) in zip(arrays[3], alone(*arrays, **options), strict=False):
        wanted = tolerances.expected(query, key, value, **own, enable_gqa=True)
        part = slice(at, at + query.shape[1])
        tolerances.check_out(out[part].swapaxes(0, 1), wanted)
        tolerances.check_lse(lse[part].swapaxes(0, 1), wanted)


@dtypes
@options_of_all
def test_each_sequence_has_the_bits_of_the_same_sequence_alone(dtype: Any, options: dict[str, Any]) -> None:
    arrays = packed(dtype=dtype)
    results = [
        fastattn.attention(*operands, **own, enable_gqa=True, return_lse=True)
        for *operands, own in alone(*arrays, **options)
    ]
    wanted = [together(list(each)) for each in zip(*results, strict=True)]
    rng = np.random.default_rng(1)
    grad_out, grad_lse = (rng.standard_normal(array.shape).astype(dtype) for array in wanted)
    gradients = [
        fastattn.attention_backward(
            grad_out[at : at + query.shape[1]].swapaxes(0, 1),
            query,
            key,
            value,
            *result,
            **own,
            enable_gqa=True,
            grad_lse=grad_lse[at : at + query.shape[1]].swapaxes(0, 1),
        )
        for at, (query, key, value, own), result in zip(arrays[3], alone(*arrays, **options), results, strict=False)
    ]
    wanted += [together(list(each)) for each in zip(*gradients, strict=True)]
    for threads in (1, 2, 3):
        with fastattn.num_threads(threads):
            found = fastattn.attention_varlen(*arrays, **options, enable_gqa=True, return_lse=True)
            given: Any = (grad_out, *arrays[:3], *found, *arrays[3:])
            found += fastattn.attention_varlen_backward(*given, **options, enable_gqa=True, grad_lse=grad_lse)
        assert bits_of(*found) == bits_of(*wanted)


@dtypes
@options_of_all
def test_gradients_are_those_of_each_sequence(backend: str, dtype: Any, options: dict[str, Any]) -> None:
    arrays = packed(dtype=dtype)
    out, lse = fastattn.attention_varlen(*arrays, **options, enable_gqa=True, return_lse=True)
    grad_out = np.random.default_rng(1).standard_normal(out.shape).astype(dtype)
    call: Any = (grad_out, *arrays[:3], out, lse, *arrays[3:])
    found = fastattn.attention_varlen_backward(*call, **options, enable_gqa=True, backend=backend)
    assert [each.shape for each in found] == [array.shape for array in arrays[:3]]
    for at, k, (query, key, value, own) in zip(arrays[3], arrays[4], alone(*arrays, **options), strict=False):
        rows, keys = slice(at, at + query.shape[1]), slice(k, k + key.shape[1])
        upstream = grad_out[rows].swapaxes(0, 1)
        wanted = tolerances.expected_gradients(upstream, query, key, value, **own, enable_gqa=True)
        parts = tuple(array[part].swapaxes(0, 1) for array, part in zip(found, (rows, keys, keys), strict=True))
        tolerances.check_gradients(parts, (query, key, value), *wanted)


def test_neighbours_and_their_order_change_no_bit() -> None:
    arrays = packed(LENGTHS, heads=(3, 3))
    order = np.random.default_rng(0).permutation(len(LENGTHS))
    cut = [np.split(array, cu[1:-1]) for array, cu in zip(arrays[:3], (arrays[3], *arrays[4:] * 2), strict=True)]
    moved = [np.concatenate([parts[i] for i in order]) for parts in cut]
    cu = [starts(np.diff(each)[order]) for each in arrays[3:]]
    out = np.split(fastattn.attention_varlen(*arrays, is_causal=True), arrays[3][1:-1])
    other = np.split(fastattn.attention_varlen(*moved, *cu, is_causal=True), cu[0][1:-1])
    assert bits_of(*(out[i] for i in order)) == bits_of(*other)


@dtypes
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"is_causal": True}], ids=str)
def test_dropout_keeps_what_it_keeps_in_the_padded_batch(backend: str, dtype: Any, options: dict[str, Any]) -> None:
    arrays = packed(dtype=dtype)
    options = {**options, "enable_gqa": True, "dropout_p": 0.4, "rng": 2**63 + 5, "backend": backend}
    batch, key_lengths = padded(arrays)
    whole, sums = fastattn.attention(*batch, **options, key_lengths=key_lengths, return_lse=True)
    out, lse = fastattn.attention_varlen(*arrays, **options, return_lse=True)
    grad_out = np.random.default_rng(1).standard_normal(out.shape).astype(dtype)
    found = fastattn.attention_varlen_backward(grad_out, *arrays[:3], out, lse, *arrays[3:], **options)
    lengths = np.diff(arrays[3])
    for row, (start, length) in enumerate(zip(arrays[3], lengths, strict=False)):
        part = slice(start, start + length)
        close = partial(np.testing.assert_allclose, rtol=0, atol=16 * np.finfo(dtype).eps)
        close(out[part].swapaxes(0, 1), whole[row, :, :length])
        close(lse[part].swapaxes(0, 1), sums[row, :, :length])
    assert all(np.isfinite(each).all() for each in found)


def test_gradients_with_dropout_are_those_of_the_padded_batch() -> None:
    arrays = packed([(9, 12), (30, 12), (1, 12)], dtype=np.float64)
    options: dict[str, Any] = {"enable_gqa": True, "dropout_p": 0.4, "rng": 7}
    out, lse = fastattn.attention_varlen(*arrays, **options, return_lse=True)
    grad_out = np.random.default_rng(1).standard_normal(out.shape)
    found = fastattn.attention_varlen_backward(grad_out, *arrays[:3], out, lse, *arrays[3:], **options)
    for row, start in enumerate(arrays[3][:-1]):
        part = slice(start, arrays[3][row + 1])
        length, keys = part.stop - part.start, slice(12 * row, 12 * row + 12)
        batch = [np.zeros((3, 4, length, 16)), np.zeros((3, 2, 12, 16)), np.zeros((3, 2, 12, 8))]
        for each, array, rows in zip(batch, arrays, (part, keys, keys), strict=False):
            each[row] = array[rows].swapaxes(0, 1)
        above = np.zeros((3, 4, length, 8))
        above[row] = grad_out[part].swapaxes(0, 1)
        results = fastattn.attention(*batch, **options, return_lse=True)
        wanted = fastattn.attention_backward(above, *batch, *results, **options)
        for gradient, whole, rows in zip(found, wanted, (part, keys, keys), strict=True):
            np.testing.assert_array_equal(gradient[rows].swapaxes(0, 1), whole[row])


@pytest.mark.parametrize("heads", [(4, 4, 4), (1, 3, 3), (3, 1, 1), (3, 1, 3), (3, 3, 1), (1, 1, 1)], ids=str)
def test_heads_broadcast_as_they_do_alone(heads: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((50, n, 8)).astype(np.float32) for n in heads)
    cu = [0, 20, 50]
    out, lse = fastattn.attention_varlen(query, key, value, cu, return_lse=True)
    grad_out = rng.standard_normal(out.shape).astype(np.float32)
    found = fastattn.attention_varlen_backward(grad_out, query, key, value, out, lse, cu)
    wanted: list[Any] = [[], [], []]
    for start, stop in ((0, 20), (20, 50)):
        rows = [array[start:stop].swapaxes(0, 1) for array in (grad_out, query, key, value)]
        results = fastattn.attention(*rows[1:], return_lse=True)
        np.testing.assert_array_equal(out[start:stop].swapaxes(0, 1), results[0])
        for kept, gradient in zip(wanted, fastattn.attention_backward(*rows, *results), strict=True):
            kept.append(gradient)
    assert bits_of(*found) == bits_of(*map(together, wanted))


@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 5), (0, 0)], [(3, 0), (2, 0)]], ids=str)
def test_where_there_is_no_query_or_no_key(backend: str, lengths: Any) -> None:
    arrays = packed(lengths, heads=(2, 2))
    out, lse = fastattn.attention_varlen(*arrays, return_lse=True, backend=backend)
    np.testing.assert_array_equal(out, np.zeros((len(arrays[0]), 2, 8)))
    np.testing.assert_array_equal(lse, np.full((len(arrays[0]), 2), -INF))
    found = fastattn.attention_varlen_backward(out, *arrays[:3], out, lse, *arrays[3:], backend=backend)
    for gradient, array in zip(found, arrays, strict=False):
        np.testing.assert_array_equal(gradient, np.zeros_like(array))


def test_nothing_of_a_neighbour_leaks(backend: str) -> None:
    arrays = packed([(20, 20)] * 3, heads=(2, 2))
    wanted = fastattn.attention_varlen(*arrays, backend=backend)
    for bad in (NAN, INF):
        odd = [array.copy() for array in arrays[:3]]
        for array in odd:
            array[20:40] = bad
        out = fastattn.attention_varlen(*odd, *arrays[3:], backend=backend)
        np.testing.assert_array_equal(np.delete(out, np.s_[20:40], 0), np.delete(wanted, np.s_[20:40], 0))


@pytest.mark.parametrize("which", [None, 0, 1, 2])
def test_out_is_written_to_and_may_be_an_argument(backend: str, which: int | None) -> None:
    arrays = packed([(20, 20), (7, 7), (50, 50)], heads=(2, 2), features=(8, 8))
    wanted = fastattn.attention_varlen(*arrays, backend=backend)
    given = [array.copy() for array in arrays[:3]]
    out = np.empty_like(wanted) if which is None else given[which]
    result, lse = fastattn.attention_varlen(*given, *arrays[3:], out=out, return_lse=True, backend=backend)
    assert result is out
    assert lse.shape == out.shape[:2]
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("layout", ["Fortran", "reversed", "every second", "every third feature", "unaligned"])
def test_the_same_bits_in_any_memory_layout(layout: str) -> None:
    arrays = packed(LENGTHS)
    options: Any = {"enable_gqa": True, "is_causal": True}
    results = fastattn.attention_varlen(*arrays, **options, return_lse=True)
    given = [laid_out(array, layout) for array in arrays[:3]]
    out = laid_out(np.zeros_like(results[0]), layout if layout != "unaligned" else "reversed")
    found = fastattn.attention_varlen(*given, *arrays[3:], **options, return_lse=True, out=out)
    assert bits_of(*found) == bits_of(*results)
    grad_out = np.random.default_rng(0).standard_normal(out.shape).astype(np.float32)
    wanted = fastattn.attention_varlen_backward(grad_out, *arrays[:3], *results, *arrays[3:], **options)
    upstream = [laid_out(array, layout) for array in (grad_out, *results)]
    gradients = fastattn.attention_varlen_backward(upstream[0], *given, *upstream[1:], *arrays[3:], **options)
    assert bits_of(*gradients) == bits_of(*wanted)


def test_dtypes_and_array_likes_are_those_of_attention(backend: str) -> None:
    query = np.arange(6).reshape(3, 1, 2)
    out, lse = fastattn.attention_varlen(query.tolist(), query, query, [0, 1, 3], return_lse=True, backend=backend)
    assert out.dtype == lse.dtype == np.float64
    call: Any = (np.ones_like(out), query.astype(np.float32), query, query, out, lse, (0, 1, 3))
    found = fastattn.attention_varlen_backward(*call, backend=backend)
    assert [each.dtype for each in found] == [np.float32, np.float64, np.float64]


def test_inputs_are_not_written_to() -> None:
    arrays = packed()
    before = bits_of(*arrays)
    out, lse = fastattn.attention_varlen(*arrays, enable_gqa=True, return_lse=True)
    more = bits_of(out, lse)
    fastattn.attention_varlen_backward(out, *arrays[:3], out, lse, *arrays[3:], enable_gqa=True)
    assert bits_of(*arrays) == before
    assert bits_of(out, lse) == more


def test_many_short_sequences() -> None:
    lengths = np.random.default_rng(0).integers(0, 9, 500)
    cu = starts(lengths)
    rng = np.random.default_rng(1)
    query, key, value = (rng.standard_normal((cu[-1], 2, 8)).astype(np.float32) for _ in range(3))
    out, lse = fastattn.attention_varlen(query, key, value, cu, is_causal=True, return_lse=True)
    gradients = fastattn.attention_varlen_backward(value, query, key, value, out, lse, cu, is_causal=True)
    for start, stop in pairwise(cu):
        rows = [array[start:stop].swapaxes(0, 1) for array in (query, key, value)]
        results = fastattn.attention(*rows, is_causal=True, return_lse=True)
        own = fastattn.attention_backward(rows[2], *rows, *results, is_causal=True)
        for packed_array, array in zip((out, lse, *gradients), (*results, *own), strict=True):
            np.testing.assert_array_equal(packed_array[start:stop].swapaxes(0, 1), array)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": np.ones((4, 8))}, ValueError, r"query: shape \(4, 8\)"),
        ({"key": np.ones((1, 4, 2, 8))}, ValueError, r"key: shape \(1, 4, 2, 8\)"),
        ({"value": np.ones((5, 2, 8))}, ValueError, r"value: shape \(5, 2, 8\); expected length 4"),
        ({"key": np.ones((4, 2, 7))}, ValueError, r"key: shape .* expected 8 features"),
        ({"key": np.ones((4, 3, 8)), "value": np.ones((4, 3, 8))}, ValueError, r"key: shape \(4, 3, 8\) has 3 heads"),
        ({"query": np.ones((4, 4, 8))}, ValueError, r"key: shape \(4, 2, 8\) has 2 heads.*enable_gqa"),
        ({"cu_seqlens_q": [1, 4]}, ValueError, "cu_seqlens_q: from 1 to 4; expected cumulative lengths"),
        ({"cu_seqlens_q": [0, 3]}, ValueError, "cu_seqlens_q: from 0 to 3; .* the last one 4, the length of query"),
        ({"cu_seqlens_q": [0, 3, 2, 4]}, ValueError, "cu_seqlens_q: 3 before 2"),
        ({"cu_seqlens_q": []}, ValueError, r"cu_seqlens_q: shape \(0,\)"),
        ({"cu_seqlens_q": [[0, 4]]}, ValueError, r"cu_seqlens_q: shape \(1, 2\)"),
        ({"cu_seqlens_q": [0.0, 4.0]}, TypeError, "cu_seqlens_q: dtype float64"),
        ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q: None"),
        ({"cu_seqlens_k": [0, 1, 4]}, ValueError, "cu_seqlens_k: 3 numbers; expected 2"),
        ({"cu_seqlens_k": [0, 5]}, ValueError, "cu_seqlens_k: from 0 to 5"),
        ({"query": np.ones((3, 2, 8)), "cu_seqlens_q": [0, 3]}, ValueError, "cu_seqlens_k: None"),
        ({"query_offset": [1, 2]}, ValueError, r"query_offset: shape \(2,\); expected \(1, ...\)"),
        ({"query_offset": [1.5]}, TypeError, "query_offset: dtype float64"),
        ({"query_offset": 1, "is_causal": "bottom-right"}, ValueError, "query_offset"),
        ({"alibi_slopes": [1.0, 2.0, 3.0]}, ValueError, "alibi_slopes"),
        ({"alibi_slopes": np.ones((2, 2))}, ValueError, r"alibi_slopes: shape \(2, 2\); expected \(1, ...\)"),
        ({"sinks": [1.0, 2.0, 3.0]}, ValueError, "sinks"),
        ({"sinks": np.ones((2, 2))}, ValueError, r"sinks: shape \(2, 2\); expected \(1, ...\)"),
        ({"score_mod": 1}, TypeError, "score_mod: int; expected a Python function"),
        ({"mask_mod": lambda query, key: True}, TypeError, "mask_mod: <lambda> takes"),
        ({"block_mask": None}, TypeError, "block_mask"),
        ({"window": 3}, TypeError, "window"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"scale": "1"}, TypeError, "scale"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p"),
        ({"is_causal": 1}, TypeError, "is_causal"),
        ({"enable_gqa": 1}, TypeError, "enable_gqa"),
        ({"return_lse": 1}, TypeError, "return_lse"),
        ({"rng": -1}, ValueError, "rng"),
        ({"out": np.ones((4, 2, 7))}, ValueError, r"out: shape \(4, 2, 7\); expected \(4, 2, 8\)"),
        ({"out": np.ones((4, 2, 8), np.float32)}, TypeError, "out: dtype float32"),
        ({"attn_mask": None}, TypeError, "attn_mask"),
        ({"key_lengths": [1]}, TypeError, "key_lengths"),
        ({"backend": "gpu"}, ValueError, "backend"),
    ],
    ids=str,
)
def test_what_is_refused(change: dict[str, Any], error: Any, message: str) -> None:
    call: dict[str, Any] = {"query": np.ones((4, 2, 8)), "key": np.ones((4, 2, 8)), "value": np.ones((4, 2, 8))}
    with pytest.raises(error, match=message):
        fastattn.attention_varlen(**(call | {"cu_seqlens_q": [0, 4]} | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_out": np.ones((4, 2, 7))}, ValueError, r"grad_out: shape \(4, 2, 7\); expected \(4, 2, 8\)"),
        ({"lse": np.ones((2, 4))}, ValueError, r"lse: shape \(2, 4\); expected \(4, 2\)"),
        ({"grad_lse": np.ones(4)}, ValueError, "grad_lse: shape"),
        ({"dropout_p": 0.5}, ValueError, "rng: None with dropout_p"),
        ({"cu_seqlens_q": [0, 5]}, ValueError, "cu_seqlens_q"),
        ({"grads": "query"}, TypeError, "grads: 'query' of type str; expected some of 'query', 'key', 'value', 'al"),
        ({"grads": ("sinks",)}, ValueError, "grads: 'sinks', but the call has none"),
        ({"grads": ("attn_mask",)}, ValueError, "grads: 'attn_mask' is among them"),
    ],
    ids=str,
)
def test_what_is_refused_of_the_backward_pass(change: dict[str, Any], error: Any, message: str) -> None:
    array = np.ones((4, 2, 8))
    call: dict[str, Any] = dict.fromkeys(("grad_out", "query", "key", "value", "out"), array)
    with pytest.raises(error, match=message):
        fastattn.attention_varlen_backward(**(call | {"lse": np.ones((4, 2)), "cu_seqlens_q": [0, 4]} | change))


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    """Draw packed arrays and cumulative lengths, and options."""
    length = st.one_of(st.integers(0, 5), st.integers(0, 70))
    lengths = draw(st.lists(st.tuples(length, length), max_size=5))
    kv_heads, group = draw(st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 2))))
    features = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    dtype = draw(ALL_DTYPES)
    rng = np.random.default_rng(draw(SEEDS))
    queries, keys = (sum(each) for each in zip(*lengths, strict=True)) if lengths else (0, 0)
    arrays: list[Any] = [
        laid_out(numbers(rng, shape, dtype), draw(layouts))
        for shape in (
            (queries, kv_heads * group, features[0]),
            (keys, kv_heads, features[0]),
            (keys, kv_heads, features[1]),
        )
    ]
    options: dict[str, Any] = {"enable_gqa": group > 1, "is_causal": draw(causal), "scale": draw(scales)}
    if draw(rarely):
        options["window"] = draw(windows(20))
    if draw(rarely):
        options["softcap"] = draw(softcaps)
    if draw(rarely):
        options["alibi_slopes"] = draw(of_heads((len(lengths),), kv_heads * group, slopes))
    if draw(rarely):
        options["sinks"] = draw(of_heads((len(lengths),), kv_heads * group, sinks))
    if options["is_causal"] != "bottom-right" and draw(rarely):
        options["query_offset"] = draw(st.sampled_from((-3, 4, rng.integers(-5, 9, len(lengths)))))
    if draw(rarely):
        options |= {"dropout_p": 0.5, "rng": draw(st.integers(0, 2**64 - 1))}
    cu = [starts([pair[i] for pair in lengths]) for i in range(2)]
    return [*arrays, *cu], options


def close(found: Any, exact: Any, roundings: int) -> None:
    """Assert that results agree to so many roundings of what they are computed in, and one more of their own."""
    for got, wanted in zip(found, exact, strict=True):
        assert got.dtype == wanted.dtype
        own = float(finfo(got.dtype).eps)
        eps = max(own, roundings * min(own, 2.0**-23))
        got, wanted = (cast(each, np.dtype(np.float64)) for each in (got, wanted))
        np.testing.assert_allclose(got, wanted, rtol=eps, atol=eps)


@given(call=calls(), threads=st.sampled_from((1, 2, 3)))
def test_any_call(call: tuple[list[Any], dict[str, Any]], threads: int) -> None:
    arrays, options = call
    before = bits_of(*arrays)
    exact = reference.attention_varlen(*arrays, **options, return_lse=True)
    with fastattn.num_threads(threads):
        found = fastattn.attention_varlen(*arrays, **options, return_lse=True)
        close(found, exact, 400)
        grad_out = np.random.default_rng(0).standard_normal(found[0].shape).astype(found[0].dtype)
        backward: Any = (grad_out, *arrays[:3], *found, *arrays[3:])
        gradients = fastattn.attention_varlen_backward(*backward, **options)
    if found[0].dtype != BFLOAT16:  # of which weights may be rounded, too
        close(gradients, reference.attention_varlen_backward(*backward, **options), 4000)
    if "dropout_p" in options:
        return
    for number, (*operands, own) in enumerate(alone(*arrays, **options)):
        part, keys = (slice(cu[number], cu[number + 1]) for cu in arrays[3:])
        alone_ = fastattn.attention(*operands, **own, return_lse=True)
        assert bits_of(*(array[part].swapaxes(0, 1) for array in found)) == bits_of(*alone_)
        parts = (gradient[rows].swapaxes(0, 1) for gradient, rows in zip(gradients, (part, keys, keys), strict=True))
        wanted = tolerances.expected_gradients(grad_out[part].swapaxes(0, 1), *operands, **own)
        tolerances.check_gradients(tuple(parts), tuple(operands), *wanted)
    assert bits_of(*arrays) == before
