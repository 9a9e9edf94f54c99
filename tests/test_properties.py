"""Whole calls that Hypothesis makes up, on the fast backend, against the exact result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, MASKS, SIZES, Call, calls, each, laid_out, numbers, random_mask

import fastattn
from fastattn.call.halves import finfo

Attention = Callable[..., Any]

#: For the tests that everything else rests on: more examples than the profile gives.
MANY = 4 * settings().max_examples


def check(attention: Attention, call: Call) -> None:
    """Assert that a call is right, that it changed nothing, and gives the same when less is asked for."""
    before = call.bits
    out, lse, _ = tolerances.check_call(attention, *call.args, **call.options)
    assert call.bits == before
    only_out = attention(*call.args, **call.options)
    assert only_out.tobytes() == out.tobytes()
    assert attention(*call.args, **call.options, return_lse=True)[1].tobytes() == lse.tobytes()


@settings(max_examples=MANY)
@given(call=calls())
def test_any_call(cpu_attention: Attention, call: Call) -> None:
    check(cpu_attention, call)


@settings(max_examples=MANY)
@given(call=calls(sizes=tuple(SIZES), odd=True, masks=(None, "bool", "padding", "float, -inf", "float, odd")))
def test_values_that_are_not_finite(cpu_attention: Attention, call: Call) -> None:
    check(cpu_attention, call)


@given(call=calls(sizes=tuple(SIZES), masks=(None, "bool", "padding", "float", "float, -inf")))
def test_extreme_sizes(cpu_attention: Attention, call: Call) -> None:
    check(cpu_attention, call)


@given(call=calls(empty=True))
def test_axes_of_length_zero(attention: Attention, call: Call) -> None:
    check(attention, call)


@given(call=calls(dropout=True))
def test_dropout(cpu_attention: Attention, call: Call) -> None:
    check(cpu_attention, call)
    weights = cpu_attention(*call.args, **call.options, return_weights=True)[1]
    exact = tolerances.expected(*call.args, **call.options).weights
    # the same set: a weight so small that before it is divided it may be 0 in the narrower type says nothing
    told = np.abs(exact) * (1 - call.options["dropout_p"]) > 2 * float(finfo(weights.dtype).tiny)
    np.testing.assert_array_equal(weights[told] != 0, exact[told] != 0)
    assert not weights[exact == 0].any()


@given(
    call=calls(any_layout=False),
    names=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    threads=st.integers(1, 5),
)
def test_the_same_bits_in_any_layout_and_at_any_thread_count(
    cpu_attention: Attention, call: Call, names: tuple[str, ...], threads: int
) -> None:
    wanted = cpu_attention(*call.args, **call.options, return_lse=True, return_weights=True)
    moved = [each(partial(laid_out, layout=name), array) for array, name in zip(call.args, names, strict=True)]
    with fastattn.num_threads(threads):
        results = cpu_attention(*moved, **call.options, return_lse=True, return_weights=True)
    for result, want in zip(results, wanted, strict=True):
        assert result.tobytes() == want.tobytes()


@given(call=calls(any_layout=False))
def test_calls_like_earlier_ones(cpu_attention: Attention, call: Call) -> None:
    # without a backend named, and with nothing but arrays, a call that is like an earlier one takes a shorter way
    for options in (call.options, call.options | {"return_lse": True}):
        wanted = [cpu_attention(*call.args, **options)]
        with_new_values = [each(partial(np.roll, shift=1), a) for a in call.args]
        wanted.append(cpu_attention(*with_new_values, **options))
        unaligned = [each(partial(laid_out, layout="unaligned"), a) for a in call.args]
        wanted.append(wanted[0])
        for _ in range(2):
            for args, want in zip((call.args, with_new_values, unaligned), wanted, strict=True):
                assert _bits(fastattn.attention(*args, **options)) == _bits(want)
        with fastattn.num_threads(3):
            assert _bits(fastattn.attention(*call.args, **options)) == _bits(wanted[0])


def _bits(results: Any) -> list[bytes]:
    return [array.tobytes() for array in (results if isinstance(results, tuple) else (results,))]


@given(call=calls(any_layout=False), data=st.data())
def test_out_anywhere(cpu_attention: Attention, call: Call, data: st.DataObject) -> None:
    wanted = cpu_attention(*call.args, **call.options)
    names = [name for name in LAYOUTS if name not in ("read-only", "byte-swapped")]
    out = laid_out(np.full_like(wanted, np.nan), data.draw(st.sampled_from(names), label="layout of out"))
    assert cpu_attention(*call.args, **call.options, out=out) is out
    assert out.tobytes() == wanted.tobytes()
    same = [array for array in call.args[:3] if array.shape == wanted.shape and array.dtype == wanted.dtype]
    if same:
        out = data.draw(st.sampled_from(same), label="out is an input")
        assert cpu_attention(*call.args, **call.options, out=out).tobytes() == wanted.tobytes()


#: Several blocks of queries and of keys, and some over; as short as that allows, since a wide type takes its time.
LONG = ((1, 1000), (3, 777), (129, 390), (300, 300), (197, 530), (400, 65))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [None, *MASKS[:-1]])
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
@pytest.mark.parametrize("length", LONG, ids=str)
def test_many_blocks(cpu_attention: Attention, dtype: Any, kind: str | None, is_causal: Any, length: Any) -> None:
    rng = np.random.default_rng([length[0], length[1]])
    features = int(rng.choice((16, 33, 64)))
    query, key, value = (
        numbers(rng, (heads, n, features), dtype)
        for heads, n in zip((2, 1, 1), (length[0], *length[1:] * 2), strict=True)
    )
    mask = None if kind is None else random_mask(rng, (2, *length), kind, np.float32)
    tolerances.check_call(cpu_attention, query, key, value, mask, is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rising", [False, True])
def test_a_maximum_that_keeps_rising_or_never_does(cpu_attention: Attention, dtype: Any, rising: bool) -> None:
    # each block raises the maximum of every row and so rescales what came before, or none but the first does
    keys = 1500
    query = np.ones((1, 100, 8), dtype)
    slope = np.linspace(0, 300, keys, dtype=dtype)
    key = np.zeros((1, keys, 8), dtype)
    key[0, :, 0] = slope if rising else slope[::-1]
    value = numbers(np.random.default_rng(0), (1, keys, 8), dtype)
    tolerances.check_call(cpu_attention, query, key, value, scale=1)
    tolerances.check_call(cpu_attention, query, key, value, scale=1, is_causal=True)
