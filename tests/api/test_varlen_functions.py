"""Packed sequences with a user's functions, and gradients by name: the batch index is the number of the sequence."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed_cases import alone, packed, padded, starts, together
from strategies import SEEDS, bits_of

import fastattn

#: Lengths of queries and keys of which some blocks of keys are all hidden, some sequences are alike, and some empty.
LENGTHS = ((5, 5), (150, 140), (0, 3), (70, 33), (4, 0), (5, 5), (1, 40))
SMALL = ((5, 5), (3, 9), (0, 2), (2, 0), (5, 5))
rng = np.random.default_rng(0)
BY_SEQUENCE, BY_DISTANCE = rng.standard_normal((len(LENGTHS), 4)), rng.standard_normal(200)
OFFSETS = np.array([0, 3, -1, 2, 0, 1, -2])


def of_sequence(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score * 1.5 + BY_SEQUENCE[batch, head] + BY_DISTANCE[abs(query - key)]


def of_distance(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return np.tanh(score) * BY_DISTANCE[abs(query - key)]


def seen_by_sequence(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key // 64 + batch) % 2 == 0 or query == key


def behind(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= key


OPTIONS: dict[str, dict[str, Any]] = {
    "score_mod": {"score_mod": of_sequence},
    "score_mod that no sequence differs in": {"score_mod": of_distance, "is_causal": "bottom-right"},
    "mask_mod": {"mask_mod": seen_by_sequence},
    "mask_mod that no sequence differs in": {"mask_mod": behind, "softcap": 3.0},
    "both, sinks and slopes": {
        "score_mod": of_sequence,
        "mask_mod": seen_by_sequence,
        "sinks": BY_SEQUENCE,
        "alibi_slopes": np.array([0.5, 0.1, 0.3, 2.0]),
    },
    "positions": {"score_mod": of_distance, "mask_mod": behind, "query_offset": OFFSETS},
    "a scale beyond float32": {"score_mod": of_sequence, "scale": 1e-60},
}
options_of_all = pytest.mark.parametrize("which", OPTIONS)
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def options_of(which: str, count: int) -> dict[str, Any]:
    """Return options for so many sequences."""
    return {
        name: given[:count] if name in ("query_offset", "sinks") else given for name, given in OPTIONS[which].items()
    }


def each_alone(arrays: tuple[Any, ...], options: dict[str, Any]) -> list[tuple[Any, Any, dict[str, Any]]]:
    """Return the arrays, options and results of each sequence, as the last row of a batch that counts up to it."""
    found = []
    for number, (*operands, own) in enumerate(alone(*arrays, **options)):
        batch = [np.broadcast_to(array, (number + 1, *array.shape)) for array in operands]
        results = fastattn.attention(*batch, **own, enable_gqa=True, return_lse=True)
        found.append((batch, results, own))
    return found


@dtypes
@options_of_all
def test_each_sequence_has_the_bits_of_its_row_of_a_batch(dtype: Any, which: str) -> None:
    arrays, options = packed(LENGTHS, dtype=dtype), options_of(which, len(LENGTHS))
    rows = each_alone(arrays, options)
    wanted = [together([results[i][-1] for _, results, _ in rows]) for i in range(2)]
    grad_out = np.random.default_rng(1).standard_normal(wanted[0].shape).astype(dtype)
    gradients: list[list[Any]] = [[], [], []]
    for at, (batch, results, own) in zip(arrays[3], rows, strict=False):
        above = np.zeros_like(results[0])
        above[-1] = grad_out[at : at + above.shape[-2]].swapaxes(0, 1)
        for kept, found in zip(
            gradients, fastattn.attention_backward(above, *batch, *results, **own, enable_gqa=True), strict=True
        ):
            kept.append(found[-1])
    wanted += map(together, gradients)
    for threads in (1, 2, 3):
        with fastattn.num_threads(threads):
            found = fastattn.attention_varlen(*arrays, **options, enable_gqa=True, return_lse=True)
            given_: Any = (grad_out, *arrays[:3], *found, *arrays[3:])
            found += fastattn.attention_varlen_backward(*given_, **options, enable_gqa=True)
        assert bits_of(*found) == bits_of(*wanted)


@options_of_all
def test_the_reference_is_close(which: str) -> None:
    arrays, options = packed(SMALL, dtype=np.float64), options_of(which, len(SMALL))
    options |= {"enable_gqa": True}
    read = ("BY_SEQUENCE", "BY_DISTANCE") if options.get("score_mod") is of_sequence else ()
    read = ("BY_DISTANCE",) if options.get("score_mod") is of_distance else read
    names = ("value", "query", "key", *(name for name in ("sinks", "alibi_slopes") if name in options), *read)
    found = []
    for backend in ("cpu", "reference"):
        out, lse = fastattn.attention_varlen(*arrays, **options, return_lse=True, backend=backend)
        grad_out = np.random.default_rng(1).standard_normal(out.shape)
        call: Any = (grad_out, *arrays[:3], out, lse, *arrays[3:])
        found.append([out, lse, *fastattn.attention_varlen_backward(*call, **options, grads=names, backend=backend)])
    for got, wanted in zip(*found, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


@dtypes
@options_of_all
def test_they_are_rows_of_the_padded_batch(dtype: Any, which: str) -> None:
    arrays, options = packed(LENGTHS, dtype=dtype), options_of(which, len(LENGTHS)) | {"enable_gqa": True}
    batch, key_lengths = padded(arrays)
    if options.get("is_causal") == "bottom-right":  # which goes by the queries of the longest
        options |= {"is_causal": True, "query_offset": key_lengths - np.diff(arrays[3])}
    whole, sums = fastattn.attention(*batch, **options, key_lengths=key_lengths, return_lse=True)
    out, lse = fastattn.attention_varlen(*arrays, **options, return_lse=True)
    for row, start in enumerate(arrays[3][:-1]):
        part = slice(start, arrays[3][row + 1])
        close = partial(np.testing.assert_allclose, rtol=0, atol=40 * np.finfo(dtype).eps)
        close(out[part].swapaxes(0, 1), whole[row, :, : part.stop - part.start])
        close(lse[part].swapaxes(0, 1), sums[row, :, : part.stop - part.start])


# -- gradients by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("scale", [None, 1e-60])
@dtypes
def test_gradients_of_what_heads_have_are_those_of_each_sequence(dtype: Any, scale: Any, by_sequence: bool) -> None:
    arrays = packed(LENGTHS, dtype=dtype)
    options: dict[str, Any] = {"alibi_slopes": np.abs(BY_SEQUENCE), "sinks": BY_SEQUENCE, "scale": scale}
    if not by_sequence:
        options |= {name: options[name][0] for name in ("alibi_slopes", "sinks")}
    names = ("sinks", "key", "alibi_slopes")
    out, lse = fastattn.attention_varlen(*arrays, **options, enable_gqa=True, return_lse=True)
    grad_out = np.random.default_rng(1).standard_normal(out.shape).astype(dtype)
    call: Any = (grad_out, *arrays[:3], out, lse, *arrays[3:])
    found = fastattn.attention_varlen_backward(*call, **options, enable_gqa=True, grads=names)
    each = []
    for at, (*operands, own) in zip(arrays[3], alone(*arrays, **options), strict=False):
        rows = slice(at, at + operands[0].shape[1])
        upstream: Any = [array[rows].swapaxes(0, 1) for array in (grad_out, out, lse)]
        told = own | {"enable_gqa": True, "grads": names}
        each.append(fastattn.attention_backward(upstream[0], *operands, *upstream[1:], **told))
    np.testing.assert_array_equal(found[1], together([gradients[1] for gradients in each]))
    for got, wanted in ((found[i], np.array([gradients[i] for gradients in each])) for i in (0, 2)):
        if by_sequence:
            np.testing.assert_array_equal(got, wanted)
        else:
            np.testing.assert_allclose(got, wanted.sum(axis=0), rtol=1e-12, atol=1e-12)


def test_gradients_come_in_the_order_of_their_names_with_bits_of_their_own(backend: str) -> None:
    arrays = packed(SMALL)
    sinks, slopes = BY_SEQUENCE[0].astype(np.float32), np.abs(BY_SEQUENCE[: len(SMALL)])
    options: dict[str, Any] = {"sinks": sinks, "alibi_slopes": slopes, "enable_gqa": True, "backend": backend}
    out, lse = fastattn.attention_varlen(*arrays, **options, return_lse=True)
    call: Any = (out, *arrays[:3], out, lse, *arrays[3:])
    names = ("sinks", "value", "alibi_slopes", "query", "key")
    found = dict(zip(names, fastattn.attention_varlen_backward(*call, **options, grads=names), strict=True))
    assert [each.shape for each in found.values()] == [(4,), arrays[2].shape, (5, 4), arrays[0].shape, arrays[1].shape]
    assert [each.dtype for each in found.values()] == [np.float32, np.float32, np.float64, np.float32, np.float32]
    for some in ((), ["key"], ("sinks",), ("alibi_slopes", "query")):
        each = fastattn.attention_varlen_backward(*call, **options, grads=some)
        assert bits_of(*each) == bits_of(*(found[name] for name in some))
    usual = fastattn.attention_varlen_backward(*call, **options)
    assert bits_of(*usual) == bits_of(*(found[name] for name in ("query", "key", "value")))


@dtypes
def test_gradients_of_captured_arrays_are_the_sums_over_the_sequences(dtype: Any) -> None:
    arrays = packed(LENGTHS, dtype=dtype)
    options: dict[str, Any] = {"score_mod": of_sequence, "mask_mod": behind}
    out, lse = fastattn.attention_varlen(*arrays, **options, enable_gqa=True, return_lse=True)
    grad_out = np.random.default_rng(1).standard_normal(out.shape).astype(dtype)
    call: Any = (grad_out, *arrays[:3], out, lse, *arrays[3:])
    names = ("BY_DISTANCE", "query", "BY_SEQUENCE")
    wanted = [np.zeros_like(BY_DISTANCE), None, np.zeros_like(BY_SEQUENCE)]
    for at, (batch, results, own) in zip(arrays[3], each_alone(arrays, options), strict=False):
        above = np.zeros_like(results[0])
        above[-1] = grad_out[at : at + above.shape[-2]].swapaxes(0, 1)
        told = own | {"enable_gqa": True, "grads": names}
        for total, gradient in zip(wanted, fastattn.attention_backward(above, *batch, *results, **told), strict=True):
            if total is not None:
                total += gradient
    bits = []
    for threads in (1, 3):
        with fastattn.num_threads(threads):
            found = fastattn.attention_varlen_backward(*call, **options, enable_gqa=True, grads=names)
        bits.append(bits_of(*found))
        for i in (0, 2):
            np.testing.assert_allclose(found[i], wanted[i], rtol=1e-9, atol=1e-9)
    assert bits[0] == bits[1]


# -- what functions read -----------------------------------------------------------------------------------------------


def test_an_index_out_of_range_in_one_sequence_is_said(backend: str) -> None:
    few = np.zeros(4)

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + few[batch]

    arrays = packed(SMALL)
    with pytest.raises(IndexError, match="score_mod: .*an index was out of range"):
        fastattn.attention_varlen(*arrays, score_mod=score_mod, enable_gqa=True, backend=backend)
    few = np.zeros(5)
    out, lse = fastattn.attention_varlen(
        *arrays, score_mod=score_mod, enable_gqa=True, return_lse=True, backend=backend
    )
    few = np.zeros(4)
    call: Any = (out, *arrays[:3], out, lse, *arrays[3:])
    with pytest.raises(IndexError, match="score_mod: .*an index was out of range"):
        fastattn.attention_varlen_backward(*call, score_mod=score_mod, enable_gqa=True, backend=backend)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), max_size=6),
    which=st.sampled_from(sorted(set(OPTIONS) - {"a scale beyond float32"})),
    threads=st.sampled_from((1, 2, 3)),
    seed=SEEDS,
)
def test_any_lengths(lengths: list[tuple[int, int]], which: str, threads: int, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    queries, keys = np.array(lengths, np.int64).reshape(-1, 2).T
    shapes = ((sum(queries), 4, 8), (sum(keys), 2, 8), (sum(keys), 2, 8))
    arrays = (*(numbers.standard_normal(shape).astype(np.float32) for shape in shapes), starts(queries), starts(keys))
    options = options_of(which, len(lengths))
    with fastattn.num_threads(threads):
        found = fastattn.attention_varlen(*arrays, **options, enable_gqa=True, return_lse=True)
        grad_out = numbers.standard_normal(found[0].shape).astype(np.float32)
        call: Any = (grad_out, *arrays[:3], *found, *arrays[3:])
        found += fastattn.attention_varlen_backward(*call, **options, enable_gqa=True)
    for at, k, (batch, results, own) in zip(*arrays[3:], each_alone(arrays, options), strict=False):
        above = np.zeros_like(results[0])
        rows, others = slice(at, at + batch[0].shape[-2]), slice(k, k + batch[1].shape[-2])
        above[-1] = grad_out[rows].swapaxes(0, 1)
        wanted = (*results, *fastattn.attention_backward(above, *batch, *results, **own, enable_gqa=True))
        for got, part, array in zip(found, (rows, rows, rows, others, others), wanted, strict=True):
            assert bits_of(got[part].swapaxes(0, 1)) == bits_of(array[-1])
