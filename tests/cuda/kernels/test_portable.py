"""The portable kernels against the exact result: whole calls that Hypothesis makes up, and what each sentence says.

Without a GPU the same source runs in Numba's simulator, thread by thread, on tiles of 4 queries and 4 keys: so shapes
are small here. Where there is a GPU, tests/semantics runs on it as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from numpy.typing import NDArray
from strategies import LAYOUTS, SIZES, Call, calls, laid_out, numbers, random_mask

import fastattn
from fastattn import reference
from fastattn.call.halves import finfo
from fastattn.call.rounding import PRECISE

Array = NDArray[Any]
Attention = Callable[..., Any]

INF, NAN = np.inf, np.nan
FEW = max(12, settings().max_examples // 5)  # a call takes the simulator a tenth of a second
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def inputs(queries: int = 6, keys: int = 9, heads: tuple[int, ...] = (), dtype: Any = np.float32) -> tuple[Array, ...]:
    """Return query, key and value: 5 features, of which 4 fit a tile, and 6 columns of the result, likewise."""
    rng = np.random.default_rng([queries, keys])
    shapes = ((*heads, queries, 5), (*heads, keys, 5), (*heads, keys, 6))
    query, key, value = (numbers(rng, shape, dtype) for shape in shapes)
    return query, key, value


def bits(results: tuple[Array, ...]) -> list[bytes]:
    """Return the bits of results."""
    return [array.tobytes() for array in results]


# -- any call ----------------------------------------------------------------------------------------------------------


@settings(max_examples=2 * FEW)
@given(call=calls(small=True))
def test_any_call(cuda_attention: Attention, call: Call) -> None:
    before = [None if array is None else array.tobytes() for array in call.args]
    out, lse, _ = tolerances.check_call(cuda_attention, *call.args, **call.options)
    assert [None if array is None else array.tobytes() for array in call.args] == before
    assert bits(cuda_attention(*call.args, **call.options, return_lse=True)) == bits((out, lse))


@settings(max_examples=2 * FEW)
@given(
    call=calls(small=True, sizes=tuple(SIZES), odd=True, masks=(None, "bool", "padding", "float, -inf", "float, odd"))
)
def test_values_that_are_not_finite(cuda_attention: Attention, call: Call) -> None:
    tolerances.check_call(cuda_attention, *call.args, **call.options)


@settings(max_examples=FEW)
@given(call=calls(small=True, empty=True))
def test_axes_of_length_zero(cuda_attention: Attention, call: Call) -> None:
    tolerances.check_call(cuda_attention, *call.args, **call.options)


@settings(max_examples=FEW)
@given(call=calls(small=True, dropout=True))
def test_dropout_keeps_the_set_that_the_reference_keeps(cuda_attention: Attention, call: Call) -> None:
    weights = tolerances.check_call(cuda_attention, *call.args, **call.options)[2]
    exact = tolerances.expected(*call.args, **call.options).weights
    told = np.abs(exact) > finfo(weights.dtype).tiny
    np.testing.assert_array_equal(weights[told] != 0, exact[told] != 0)
    assert not weights[exact == 0].any()


# -- half precision ----------------------------------------------------------------------------------------------------


def half_types() -> list[Any]:
    """Return float16, and bfloat16 where a package gives NumPy that."""
    try:
        import ml_dtypes
    except ImportError:
        return [np.float16]
    return [np.float16, ml_dtypes.bfloat16]


def check_half(attention: Attention, query: Array, key: Array, value: Array, mask: Any = None, **options: Any) -> None:
    """Assert that a call in half precision is right: float32's arithmetic, and one rounding to half at the end."""
    dtype = query.dtype
    out, lse, weights = attention(query, key, value, mask, **options, return_lse=True, return_weights=True)
    assert (out.dtype, lse.dtype, weights.dtype) == (dtype, np.float32, dtype)
    wide = [array.astype(np.float32) for array in (query, key, value)]
    mask = mask if mask is None or mask.dtype != dtype else mask.astype(np.float32)
    wanted = tolerances.expected(*wide, mask, **options)
    tolerances.check_lse(lse, wanted)
    spacing = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype.name]
    for got, exact, bound in (
        (out, wanted.out, wanted.out_bound),
        (weights, wanted.weights, wanted.weights_bound),
    ):
        error = np.abs(got.astype(np.float64) - exact)
        assert ((error <= bound + spacing * np.abs(exact) + 2.0**-25) | (np.isnan(exact) & np.isnan(got))).all()


@pytest.mark.parametrize("dtype", half_types())
@pytest.mark.parametrize("kind", [None, "bool", "float, -inf", "its own"])
def test_half_precision_accumulates_in_float32(cuda_attention: Attention, dtype: Any, kind: str | None) -> None:
    query, key, value = (array.astype(dtype) for array in inputs(heads=(2,)))
    rng = np.random.default_rng(0)
    mask = None if kind is None else random_mask(rng, (6, 9), "float" if kind == "its own" else kind, np.float32)
    if kind == "its own":
        mask = mask.astype(dtype)
    check_half(cuda_attention, query, key, value, mask, is_causal=True)


@pytest.mark.parametrize("dtype", half_types())
def test_half_precision_rounds_to_the_nearest_and_keeps_what_is_not_finite(
    cuda_attention: Attention, dtype: Any
) -> None:
    # one key: the result is its value, through float32 and back
    value = np.array([[1.0, -2.5, 0.0, 65504.0, INF, -INF, NAN, 6e-8]], dtype)
    result = cuda_attention(np.zeros((1, 1), dtype), np.zeros((1, 1), dtype), value)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.astype(np.float32), value.astype(np.float32))
    # two keys of the same weight: the mean of neighbours lies between them, and goes to the even one
    low, step = np.array(1, dtype).view(np.uint16), np.uint16(1)
    pairs = np.array([[low, low + step], [low + step, low + step + step]]).view(dtype)
    means = cuda_attention(np.zeros((1, 1), dtype), np.zeros((2, 1), dtype), np.ascontiguousarray(pairs.T))
    np.testing.assert_array_equal(means.view(np.uint16), [[low, low + step + step]])


def test_half_precision_promotes_with_float32(cuda_attention: Attention) -> None:
    query, key, value = inputs()
    assert cuda_attention(query.astype(np.float16), key, value).dtype == np.float32
    assert cuda_attention([[1, 2]], [[3, 4]], [[5]]).dtype == np.float64


# -- what the sentences say --------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
@pytest.mark.parametrize("length", [(1, 9), (9, 1), (4, 4), (5, 9), (9, 5), (8, 8)], ids=str)
def test_causal_both_ways(cuda_attention: Attention, dtype: Any, is_causal: Any, length: tuple[int, int]) -> None:
    tolerances.check_call(cuda_attention, *inputs(*length, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("mask_dtype", [np.bool_, np.float16, np.float32, np.float64])
def test_masks_broadcast_from_any_rank(cuda_attention: Attention, rank: int, mask_dtype: Any) -> None:
    query, key, value = inputs(3, 6, heads=(2, 2))
    rng = np.random.default_rng(rank)
    shape = (2, 2, 3, 6)[4 - rank :]
    mask = random_mask(rng, shape, "bool" if mask_dtype is np.bool_ else "float, -inf", mask_dtype)
    tolerances.check_call(cuda_attention, query, key, value, mask)


@dtypes
@pytest.mark.parametrize("mask_dtype", [np.float16, np.float32, np.float64])
def test_the_lowest_mask_is_a_number_and_gives_the_mean(cuda_attention: Attention, dtype: Any, mask_dtype: Any) -> None:
    query, key, value = inputs(3, 6, dtype=dtype)
    mask = np.full((3, 6), np.finfo(mask_dtype).min, mask_dtype)
    mask[1, 2] = 0
    if mask_dtype is np.float16:
        tolerances.check_call(cuda_attention, query, key, value, mask)
        return
    if np.finfo(mask_dtype).max < np.finfo(dtype).max:
        mask = mask.astype(dtype)
    out, weights = cuda_attention(query, key, value, mask, return_weights=True)
    np.testing.assert_allclose(out[0], value.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(out[1], value[2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights, [np.full(6, 1 / 6), np.arange(6) == 2, np.full(6, 1 / 6)], rtol=0, atol=1e-6)


@dtypes
def test_a_query_that_may_look_at_no_key(cuda_attention: Attention, dtype: Any) -> None:
    query, key, value = inputs(9, 3, dtype=dtype)
    for mask in (np.zeros((9, 3), bool), np.full((9, 3), -INF)):
        out, lse, weights = cuda_attention(query, key, value, mask, return_lse=True, return_weights=True)
        assert not out.any()
        assert not weights.any()
        assert (lse == -INF).all()
    out, lse = cuda_attention(query, key, value, is_causal="bottom-right", return_lse=True)
    assert not out[:6].any()
    assert (lse[:6] == -INF).all()
    assert np.isfinite(lse[6:]).all()


@pytest.mark.parametrize(
    ("dtype", "bad"), [(np.float32, NAN), (np.float32, INF), (np.float32, -INF), (np.float64, NAN)]
)
@pytest.mark.parametrize("how", ["bool", "float", "causal"])
@pytest.mark.parametrize("which", ["key", "value"])
def test_what_is_masked_never_leaks(cuda_attention: Attention, dtype: Any, bad: float, how: str, which: str) -> None:
    query, key, value = inputs(6, 6, dtype=dtype)
    mask = np.ones((6, 6), bool)
    mask[:, 2], mask[3:, 4] = False, False
    visible = mask & np.tri(6, dtype=bool) if how == "causal" else mask
    given = mask if how != "float" else np.where(mask, 0, -INF)
    options = {"is_causal": how == "causal", "return_lse": True, "return_weights": True}
    wanted = cuda_attention(query, key, value, given, **options)
    for j in (2, 4):
        poisoned = {"key": key.copy(), "value": value.copy()}
        poisoned[which][j] = bad
        got = cuda_attention(query, poisoned["key"], poisoned["value"], given, **options)
        unseen = ~visible[:, j]
        for result, want in zip(got, wanted, strict=True):
            assert result[unseen].tobytes() == want[unseen].tobytes()


def test_what_is_not_masked_does_reach_the_result(cuda_attention: Attention) -> None:
    query, key, value = inputs(2, 6)
    value[1, 0] = NAN
    out = cuda_attention(query, key, value)
    assert np.isnan(out[:, 0]).all()
    assert np.isfinite(out[:, 1:]).all()
    query[0], key[:] = 1, 0
    key[3, 0] = INF
    out, lse, weights = cuda_attention(query, key, value, return_lse=True, return_weights=True)
    assert np.isnan(out[0]).all()
    assert np.isnan(lse[0])
    assert np.isnan(weights[0]).all()


def test_a_float64_mask_saturates_in_a_float32_call(cuda_attention: Attention) -> None:
    query, key, value = inputs(3, 6)
    mask = np.zeros((3, 6))
    mask[0], mask[1, 1], mask[2, 2] = -1e300, 1e300, -1e300
    tolerances.check_call(cuda_attention, query, key, value, mask)


@dtypes
def test_dropout_keeps_the_set_that_the_cpu_keeps(cuda_attention: Attention, dtype: Any) -> None:
    query, key, value = inputs(5, 6, heads=(2, 2), dtype=dtype)
    for seed, p in ((0, 0.5), (2**63 + 12345, 0.1), (99, 1.0), (99, 2.0**-32))[: 4 if dtype is np.float32 else 1]:
        options = {"dropout_p": p, "rng": seed, "return_weights": True}
        kept = cuda_attention(query, key, value, **options)[1] != 0
        if dtype is np.float32:
            on_cpu = fastattn.attention(query, key, value, **options, backend="cpu")[1]
            np.testing.assert_array_equal(kept, on_cpu != 0)
        batch, head = np.arange(2)[:, None], np.arange(2)
        np.testing.assert_array_equal(kept, reference.keep_mask(seed, batch, head, 5, 6, p))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_the_same_bits_in_any_layout(cuda_attention: Attention, layout: str) -> None:
    query, key, value = inputs(5, 6, heads=(2,))
    mask = random_mask(np.random.default_rng(0), (2, 5, 6), "float, -inf", np.float32)
    wanted = cuda_attention(query, key, value, mask, return_lse=True)
    moved = [laid_out(array, layout) for array in (query, key, value, mask)]
    assert bits(cuda_attention(*moved, return_lse=True)) == bits(wanted)


def test_the_same_bits_in_any_batch_and_on_every_run(cuda_attention: Attention) -> None:
    query, key, value = inputs(5, 9, heads=(2, 2))
    together = cuda_attention(query, key, value, is_causal=True, return_lse=True)
    assert bits(cuda_attention(query, key, value, is_causal=True, return_lse=True)) == bits(together)
    for b in range(2):
        alone = cuda_attention(query[b], key[b], value[b], is_causal=True, return_lse=True)
        assert bits(alone) == bits(tuple(result[b] for result in together))


def test_groups_share_a_head_of_keys(cuda_attention: Attention) -> None:
    # with fewer queries, those of a group might be so few together that the keys are split
    query = inputs(5, 5, heads=(2, 6))[0]
    _, key, value = inputs(5, 5, heads=(2, 2))
    out = cuda_attention(query, key, value, enable_gqa=True)
    repeated = cuda_attention(query, *(array.repeat(3, axis=-3) for array in (key, value)))
    assert out.tobytes() == repeated.tobytes()


@dtypes
@pytest.mark.parametrize("kind", [None, "float"])
def test_no_weight_is_above_one(cuda_attention: Attention, dtype: Any, kind: str | None) -> None:
    # of a single key each weight is 1, and the log-sum-exp the score: rounded on its way, by more than a weight's share
    most = PRECISE[np.dtype(dtype).name]
    query = np.linspace(most / 2, most * 0.99, 40, dtype=dtype)[:, None]
    mask = None if kind is None else np.zeros((40, 1), dtype)
    weights = cuda_attention(query, np.ones((1, 1), dtype), np.ones((1, 1), dtype), mask, return_weights=True)[1]
    assert (weights <= 1).all()
    np.testing.assert_allclose(weights, 1, rtol=0, atol=2 * most * np.finfo(dtype).eps)


def test_scores_too_large_for_float32_before_the_scale(cuda_attention: Attention) -> None:
    query, key, value = inputs(3, 6)
    tolerances.check_call(cuda_attention, query * np.float32(1e20), key * np.float32(1e20), value, scale=3e-38)


def test_out_may_be_an_argument(cuda_attention: Attention) -> None:
    array = inputs(6, 6)[0]
    wanted = cuda_attention(array, array, array)
    assert cuda_attention(array, array, array, out=array) is array
    assert array.tobytes() == wanted.tobytes()


def test_no_call_emits_a_warning(cuda_attention: Attention) -> None:
    query, key, value = (array * np.float32(1e38) for array in inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda_attention(query, key, value, return_lse=True, return_weights=True, scale=1e300)
