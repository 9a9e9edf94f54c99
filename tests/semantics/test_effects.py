"""What a call leaves alone."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from semantic_cases import INF, NAN, Attention, dtypes, inputs, normal
from strategies import LAYOUTS, laid_out, with_odd


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_never_written_to(attention: Attention, layout: str) -> None:
    arrays = [laid_out(array, layout) for array in (*inputs((33, 70)), normal(33, 70, seed=4))]
    before = [array.tobytes() for array in arrays]
    attention(*arrays, is_causal=True, dropout_p=0.2, return_lse=True, return_weights=True)
    assert [array.tobytes() for array in arrays] == before


def test_masks_offsets_and_lengths_are_never_written_to(attention: Attention) -> None:
    query, key, value = inputs((33, 70), (2, 1))
    given = [normal(33, 70), normal(33, 70) > 0, np.array([0.5]), np.array([3, 70]), np.array([1, 50])]
    given += [np.array([-3, 2**63 - 1])]
    for array in given:
        array.flags.writeable = False
    before = [array.tobytes() for array in given]
    bias, keep, slopes, *numbers = given
    for offsets in numbers[1:]:
        options: Any = {"key_lengths": numbers[0], "query_offset": offsets, "window": (30, 2), "softcap": 2.0}
        options |= {"alibi_slopes": slopes, "sinks": slopes}
        attention(query, key, value, (bias, keep), **options, return_lse=True, return_weights=True)
    assert [array.tobytes() for array in given] == before


@dtypes
@pytest.mark.parametrize("length", [(1, 1), (9, 9), (65, 65), (200, 200), (400, 400)], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_out_may_be_an_input(
    attention: Attention, dtype: Any, length: tuple[int, int], which: int, is_causal: bool
) -> None:
    for flags in ({}, {"return_lse": True, "return_weights": True}):
        arrays = inputs(length, (1, 2), dtype=dtype)
        wanted = attention(*arrays, is_causal=is_causal, **flags)
        results = attention(*arrays, is_causal=is_causal, **flags, out=arrays[which])
        out = results[0] if flags else results
        assert out is arrays[which]
        for result, want in zip(results if flags else [out], wanted if flags else [wanted], strict=True):
            np.testing.assert_array_equal(result, want)


@pytest.mark.parametrize("shift", [(0, 3), (1, 0), (5, 5)], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_out_may_overlap_an_input(attention: Attention, shift: tuple[int, int], which: int) -> None:
    place = normal(2, 210, 32)
    arrays = list(inputs((200, 200)))
    arrays[which] = place[:, 5:205, 8:24]
    wanted = attention(*arrays)
    out = place[:, 5 - shift[0] : 205 - shift[0], 8 - shift[1] : 24 - shift[1]]
    np.testing.assert_array_equal(attention(*arrays, out=out), wanted)


def test_out_may_overlap_the_mask(attention: Attention) -> None:
    query, key, value = inputs((200, 200), (1,), 200)
    mask = normal(1, 200, 200)
    wanted = attention(query, key, value, mask)
    np.testing.assert_array_equal(attention(query, key, value, mask, out=mask), wanted)


def test_out_may_be_one_array_with_all_inputs(attention: Attention) -> None:
    array = normal(2, 150, 16)
    wanted = attention(array, array, array)
    np.testing.assert_array_equal(attention(array, array, array, out=array), wanted)
    heads = normal(4, 150, 16)
    shared = heads[:1]
    wanted = attention(heads, shared, shared)
    np.testing.assert_array_equal(attention(heads, shared, shared, out=heads), wanted)


@dtypes
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("read-only", "byte-swapped")])
def test_out_may_have_any_strides(attention: Attention, dtype: Any, layout: str) -> None:
    query, key, value = inputs((65, 70), (2, 3), dtype=dtype)
    wanted = attention(query, key, value, is_causal=True)
    out = laid_out(np.full(wanted.shape, NAN, dtype), layout)
    lies_in = out if out.base is None else out.base
    assert attention(query, key, value, is_causal=True, out=out) is out
    np.testing.assert_array_equal(out, wanted)
    if layout in ("every second", "every third feature", "inside NaN"):
        # nothing around it was touched
        assert np.count_nonzero(~np.isnan(lies_in)) == wanted.size


@pytest.mark.parametrize("rank", [2, 3])
def test_out_with_lse_and_weights(attention: Attention, rank: int) -> None:
    query, key, value = inputs((33, 70), (2,) * (rank - 2))
    wanted = attention(query, key, value, return_lse=True, return_weights=True)
    out = np.empty_like(query)
    results = attention(query, key, value, out=out, return_lse=True, return_weights=True)
    assert results[0] is out
    for result, want in zip(results, wanted, strict=True):
        np.testing.assert_array_equal(result, want)


def test_no_call_warns(attention: Attention) -> None:
    rng = np.random.default_rng(0)
    odd = (NAN, INF, -INF, 1e-42, 0.0, 3e38, -3e38)
    with warnings.catch_warnings(), np.errstate(all="warn"):
        warnings.simplefilter("error")
        for array in (np.zeros((60, 5)), np.full((60, 5), INF), np.full((60, 5), NAN), np.full((60, 5), 1e300)):
            attention(array, array, array, return_lse=True, return_weights=True)
        for dtype in (np.float32, np.float64):
            arrays = [with_odd(rng, array, odd, 0.1) for array in inputs((60, 60), dtype=dtype)]
            for mask in (None, np.full(60, -INF), np.full(60, -1e300), with_odd(rng, np.zeros((60, 60)), odd, 0.1)):
                for dropout_p in (0, 0.5, 1):
                    attention(*arrays, mask, dropout_p, return_lse=True, return_weights=True)
            for softcap in (1e-60, 2.0, 1e60):
                for window in (None, (3, 5), (10**30, 0)):
                    options: Any = {"softcap": softcap, "window": window, "query_offset": np.int64(2**63 - 1)}
                    attention(*arrays, **options, key_lengths=33, return_lse=True, return_weights=True)
                    attention(*arrays, **options, alibi_slopes=-1e300, return_lse=True, return_weights=True)
        # a signalling NaN, which NumPy itself warns of when it is cast
        signalling = np.full((60, 5), 0x7FA00000, np.uint32).view(np.float32)
        attention(signalling, np.zeros((60, 5)), np.zeros((60, 5)), np.zeros(60, np.float32))


def test_no_call_changes_the_floating_point_settings(attention: Attention) -> None:
    before = np.geterr()
    query, key, value = inputs()
    attention(query, key, value)
    assert np.geterr() == before
    # denormal numbers are still numbers: no flushing to zero has been left on
    assert np.float32(1e-38) * np.float32(0.1) > 0
