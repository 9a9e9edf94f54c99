"""Shapes, dtypes, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tolerances
from semantic_cases import (
    INF,
    NAN,
    OTHER_HALF,
    Array,
    Attention,
    assert_empty,
    close,
    dtypes,
    halves,
    halves_of,
    inputs,
    lengths,
    normal,
    seen,
    softmax_attention,
)
from strategies import BFLOAT16, HALVES

import fastattn
from fastattn.call.halves import finfo


@pytest.mark.parametrize(
    ("query", "key", "value", "out"),
    [
        ((5, 3), (7, 3), (7, 2), (5, 2)),
        ((4, 5, 3), (4, 7, 3), (4, 7, 2), (4, 5, 2)),
        ((2, 4, 5, 3), (2, 4, 7, 3), (2, 4, 7, 2), (2, 4, 5, 2)),
        ((3, 2, 4, 5, 3), (3, 2, 4, 7, 3), (3, 2, 4, 7, 2), (3, 2, 4, 5, 2)),
        ((4, 5, 3), (7, 3), (7, 2), (4, 5, 2)),
        ((5, 3), (4, 7, 3), (1, 7, 2), (4, 5, 2)),
        ((2, 1, 4, 5, 3), (3, 1, 7, 3), (4, 7, 2), (2, 3, 4, 5, 2)),
        ((1, 1, 5, 3), (3, 4, 7, 3), (4, 7, 2), (3, 4, 5, 2)),
    ],
)
def test_leading_axes_broadcast_as_in_numpy(attention: Attention, query: Any, key: Any, value: Any, out: Any) -> None:
    arrays = normal(*query), normal(*key), normal(*value)
    result = attention(*arrays)
    assert result.shape == out
    full = [np.broadcast_to(array, (*out[:-2], *array.shape[-2:])).copy() for array in arrays]
    np.testing.assert_array_equal(result, attention(*full))
    close(result, softmax_attention(full[0], full[1], full[2], scale=1 / math.sqrt(3)))


@pytest.mark.parametrize("shape", [(), (1,), (70,), (60, 1), (60, 70), (3, 1, 70), (1, 60, 70), (2, 1, 1, 70)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_broadcast_as_in_numpy(attention: Attention, shape: tuple[int, ...], kind: str) -> None:
    query, key, value = inputs((60, 70), (2, 3))
    mask: Array = np.asarray(normal(*shape, 1)[..., 0])
    mask = np.asarray(mask > -0.5) if kind == "bool" else mask
    result = attention(query, key, value, mask)
    np.testing.assert_array_equal(result, attention(query, key, value, np.broadcast_to(mask, (2, 3, 60, 70)).copy()))


@pytest.mark.parametrize("mask", [True, False, 0.5, [True, False, True], [[0.0], [1.0]]])
def test_masks_may_be_array_likes(attention: Attention, mask: Any) -> None:
    query, key, value = inputs((2, 3))
    np.testing.assert_array_equal(attention(query, key, value, mask), attention(query, key, value, np.array(mask)))


@pytest.mark.parametrize("mask_dtype", [np.int64, np.int8, np.uint8])
def test_masks_of_integers_are_refused(attention: Attention, mask_dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"attn_mask: .*boolean"):
        attention(*inputs(), np.ones((7, 9), mask_dtype))


@dtypes
@pytest.mark.parametrize("mask_dtype", [np.bool_, np.float16, np.float32, np.float64])
def test_masks_take_no_part_in_promotion(attention: Attention, dtype: Any, mask_dtype: Any) -> None:
    query, key, value = inputs(dtype=dtype)
    results = attention(query, key, value, np.ones((7, 9), mask_dtype), return_lse=True, return_weights=True)
    assert [result.dtype for result in results] == [dtype] * 3


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_rank_is_two_at_least(attention: Attention, shape: tuple[int, ...], which: int) -> None:
    arrays = [normal(3, 3) for _ in range(3)]
    arrays[which] = np.ones(shape, np.float32)
    with pytest.raises(ValueError, match=("query", "key", "value")[which] + ": .* rank"):
        attention(*arrays)


def test_head_counts_differ_only_with_enable_gqa(attention: Attention) -> None:
    query, key, value = normal(2, 6, 5, 3), normal(2, 2, 7, 3), normal(2, 2, 7, 3)
    with pytest.raises(ValueError, match=r"key: .*enable_gqa=True"):
        attention(query, key, value)
    assert attention(query, key, value, enable_gqa=True).shape == (2, 6, 5, 3)
    with pytest.raises(ValueError, match=r"key: .*multiple"):
        attention(query[:, :5], key, value, enable_gqa=True)


@dtypes
@pytest.mark.parametrize("heads", [(2, 1), (6, 2), (8, 1), (4, 4), (12, 3)], ids=str)
@pytest.mark.parametrize("length", [(1, 130), (7, 60), (65, 90)], ids=str)
def test_query_head_h_reads_key_head_h_over_group(
    attention: Attention, dtype: Any, heads: tuple[int, int], length: tuple[int, int]
) -> None:
    hq, hk = heads
    query = normal(2, hq, length[0], 16, dtype=dtype)
    key, value = normal(2, hk, length[1], 16, dtype=dtype, seed=2), normal(2, hk, length[1], 16, dtype=dtype, seed=3)
    out, lse, weights = tolerances.check_call(attention, query, key, value, enable_gqa=True, is_causal="bottom-right")
    for h in range(hq):
        alone = (query[:, h], key[:, h // (hq // hk)], value[:, h // (hq // hk)])
        wanted = tolerances.expected(*(array[:, None] for array in alone), is_causal="bottom-right")
        tolerances.check_all((out[:, h : h + 1], lse[:, h : h + 1], weights[:, h : h + 1]), wanted)


@pytest.mark.parametrize("shape", [(3, 1, 7, 9), (2, 2, 7, 9), (2, 1, 1, 7, 9), (1, 1, 1, 1, 1)])
def test_a_mask_may_not_enlarge_the_batch(attention: Attention, shape: tuple[int, ...]) -> None:
    query, key, value = inputs(heads=(1, 2) if shape[0] != 2 else (1, 1))
    with pytest.raises(ValueError, match=r"attn_mask: shape .* broadcasts to"):
        attention(query, key, value, np.ones(shape, bool))


@dtypes
@lengths
def test_without_features_every_score_is_zero(attention: Attention, dtype: Any, length: tuple[int, int]) -> None:
    query, key = np.ones((2, length[0], 0), dtype), np.ones((2, length[1], 0), dtype)
    value = normal(2, length[1], 5, dtype=dtype)
    out, lse, weights = attention(query, key, value, return_lse=True, return_weights=True)
    close(out, np.broadcast_to(value.mean(-2, keepdims=True, dtype=np.float64), out.shape), dtype)
    close(lse, math.log(length[1]), dtype)
    close(weights, 1 / length[1], dtype)


@pytest.mark.parametrize(
    ("query", "key", "value", "out"),
    [
        ((2, 0, 3), (2, 7, 3), (2, 7, 4), (2, 0, 4)),
        ((2, 5, 3), (2, 7, 3), (2, 7, 0), (2, 5, 0)),
        ((0, 2, 5, 3), (0, 2, 7, 3), (0, 2, 7, 4), (0, 2, 5, 4)),
        ((0, 5, 3), (0, 7, 3), (0, 7, 4), (0, 5, 4)),
        ((2, 0, 0), (2, 0, 0), (2, 0, 0), (2, 0, 0)),
        ((2, 5, 0), (2, 0, 0), (2, 0, 4), (2, 5, 4)),
    ],
)
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
def test_any_axis_may_be_of_length_zero(
    attention: Attention, query: Any, key: Any, value: Any, out: Any, is_causal: Any
) -> None:
    arrays = normal(*query), normal(*key), normal(*value)
    results = tolerances.check_call(attention, *arrays, is_causal=is_causal)
    assert results[0].shape == out


@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, NAN])
def test_dropout_is_a_probability(attention: Attention, dropout_p: float) -> None:
    with pytest.raises(ValueError, match=r"dropout_p: .*\[0, 1\]"):
        attention(*inputs(), dropout_p=dropout_p)


def test_array_likes_are_accepted(attention: Attention) -> None:
    class Wrapped:
        def __init__(self, array: Array) -> None:
            self.array = array

        def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
            return self.array

    query, key, value = inputs(dtype=np.float64)
    wanted = attention(query, key, value)
    np.testing.assert_array_equal(attention(query.tolist(), key.tolist(), value.tolist()), wanted)
    np.testing.assert_array_equal(attention(Wrapped(query), Wrapped(key), Wrapped(value)), wanted)
    np.testing.assert_array_equal(attention(query[0].tolist(), Wrapped(key[0]), tuple(value[0])), wanted[0])


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.uint64, bool])
def test_integers_compute_in_float64(attention: Attention, dtype: Any) -> None:
    query, key, value = (np.random.default_rng(i).integers(0, 2, (2, 7, 5)).astype(dtype) for i in range(3))
    results = attention(query, key, value, return_lse=True, return_weights=True)
    assert [result.dtype for result in results] == [np.float64] * 3
    wanted = attention(*(array.astype(np.float64) for array in (query, key, value)))
    np.testing.assert_array_equal(results[0], wanted)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("other", [np.float64, np.int8, np.int64, ">f4"])
def test_mixed_dtypes_promote_as_in_numpy(attention: Attention, which: int, other: Any) -> None:
    arrays = [np.round(array) for array in inputs()]
    arrays[which] = arrays[which].astype(other)
    out = attention(*arrays)
    common = np.result_type(*arrays)
    assert out.dtype == common
    np.testing.assert_array_equal(out, attention(*(array.astype(common) for array in arrays)))


@halves
@lengths
def test_half_precision_stays_itself_outside_and_is_float32_inside(
    attention: Attention, dtype: Any, length: tuple[int, int]
) -> None:
    arrays = halves_of(dtype, *inputs(length))
    results = attention(*arrays, return_lse=True, return_weights=True)
    assert [result.dtype for result in results] == [dtype, np.float32, dtype]
    wide = attention(*halves_of(np.float32, *arrays), return_lse=True, return_weights=True)
    tolerances.check_all(results, tolerances.expected(*arrays))
    tolerances.check_lse(results[1], tolerances.expected(*halves_of(np.float32, *arrays)))
    np.testing.assert_allclose(wide[1], results[1], rtol=0, atol=1e-5)


@halves
def test_half_precision_promotes(attention: Attention, dtype: Any) -> None:
    arrays = halves_of(dtype, *inputs())
    other = OTHER_HALF[dtype]
    for kind, common in ((other, np.float32), (np.float32, np.float32), (np.float64, np.float64), (np.int8, dtype)):
        for which in range(3):
            mixed = list(arrays)
            mixed[which] = np.round(np.asarray(arrays[which], np.float32)).astype(kind)
            out = attention(*mixed)
            assert out.dtype == common
            same = [np.asarray(array, np.float32).astype(common) for array in mixed]
            assert out.tobytes() == attention(*same).tobytes()


@halves
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_may_have_the_dtype_of_the_sums(backend: str, dtype: Any) -> None:
    query, key, value = halves_of(dtype, *inputs((60, 90)))
    out = np.empty(query.shape, np.float32)
    assert fastattn.attention(query, key, value, out=out, backend=backend) is out
    assert fastattn.attention(query, key, value, backend=backend).tobytes() == out.astype(dtype).tobytes()
    # that is what pieces are merged of
    pieces = [np.empty_like(out), np.empty_like(out)]
    sums = [
        fastattn.attention(query, key[:, part], value[:, part], out=piece, return_lse=True, backend=backend)[1]
        for part, piece in zip((slice(40), slice(40, None)), pieces, strict=True)
    ]
    merged, lse = fastattn.merge(pieces, sums)
    # weights may be rounded, those of the pieces and of the whole (tolerances.py)
    allowed = float(finfo(np.dtype(dtype)).eps) * float(np.abs(value.astype(np.float32)).max())
    np.testing.assert_allclose(merged, out, rtol=0, atol=allowed)
    assert merged.dtype == lse.dtype == np.float32
    for wrong in (np.float64, OTHER_HALF[dtype]):
        with pytest.raises(TypeError, match="out: dtype .*, the dtype of the result, or float32, that of its sums"):
            fastattn.attention(query, key, value, out=np.empty(query.shape, wrong), backend=backend)


@halves
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_have_their_inputs_dtype(backend: str, dtype: Any) -> None:
    query, key, value, mask = halves_of(dtype, *inputs((20, 30)), normal(20, 30))
    sinks, slopes = normal(2).astype(dtype), normal(2)
    options = {"attn_mask": mask, "sinks": sinks, "alibi_slopes": slopes, "backend": backend}
    out, lse = fastattn.attention(query, key, value, return_lse=True, **options)
    names = ("query", "key", "value", "attn_mask", "sinks", "alibi_slopes")
    for grad_out in (np.ones_like(out), np.ones(out.shape, np.float32)):
        call = grad_out, query, key, value, out, lse
        found = fastattn.attention_backward(*call, grads=names, **options)
        assert [gradient.dtype for gradient in found] == [dtype] * 5 + [np.float32]
        # so they are where only one array is of half precision
        mixed = grad_out, query.astype(np.float32), key, value.astype(np.float64), out.astype(np.float64), lse
        found = fastattn.attention_backward(*mixed, **options)
        assert [gradient.dtype for gradient in found] == [np.float32, dtype, np.float64]


@halves
def test_weights_have_the_dtype_of_the_result_and_summaries_that_of_the_sums(dtype: Any) -> None:
    query, key, value = halves_of(dtype, *inputs((20, 30)))
    for backend in ("cpu", "reference"):
        lse = fastattn.attention(query, key, value, return_lse=True, backend=backend)[1]
        for given in (None, lse, lse.astype(dtype)):
            assert fastattn.attention_weights(query, key, lse=given, backend=backend).dtype == dtype
        summary = fastattn.attention_summary(query, key, backend=backend)
        kinds = np.float32, np.int64, np.float32, np.float32, np.float32
        assert [array.dtype for array in summary] == list(kinds)


@halves
@lengths
def test_in_half_precision_what_is_masked_never_leaks_and_an_empty_row_is_zero(
    attention: Attention, dtype: Any, length: tuple[int, int]
) -> None:
    query, key, value = halves_of(dtype, *inputs(length))
    visible = np.random.default_rng(0).random(length) < 0.5
    visible[:, -1], visible[0] = False, False
    clean = attention(query, key, value, visible, return_lse=True, return_weights=True)
    assert_empty(clean, 0)
    key[:, -1], value[:, -1] = INF, NAN
    for mask in (visible, np.where(visible, 0, -INF).astype(dtype)):
        results = attention(query, key, value, mask, return_lse=True, return_weights=True)
        tolerances.check_all(results, tolerances.expected(query, key, value, mask))
        assert_empty(results, 0)
    found = attention(query, key, value, visible, return_lse=True, return_weights=True)
    assert [array.tobytes() for array in found] == [array.tobytes() for array in clean]
    value[:, 0] = NAN
    tolerances.check_call(attention, query, key, value, visible)


@halves
@pytest.mark.parametrize("scale", [1.0, 1e-30, -3e25, 1e39])
def test_in_half_precision_large_numbers_and_scales_are_finite_work(
    attention: Attention, dtype: Any, scale: float
) -> None:
    size = 1e18 if dtype is BFLOAT16 else 1e4
    query, key, value = halves_of(dtype, *(array * size for array in inputs((20, 30))[:2]), inputs((20, 30))[2])
    tolerances.check_call(attention, query, key, value, scale=scale)


@pytest.mark.parametrize("dtype", [*HALVES, np.float32])
@pytest.mark.parametrize("scale", [1.0, 1.38, 1.5])
def test_large_values_have_room_where_scores_rise(attention: Attention, dtype: Any, scale: float) -> None:
    # weights grow, and sums of values with them, until the reference follows: by 2^8 at most
    size = 1e36 if dtype is not np.float16 else 6e4
    query, key, value = np.ones((40, 1)), np.zeros((1500, 1)), np.ones((1500, 17))
    for rise in np.linspace(4, 8, 17):
        key[-1], value[-1] = rise, size
        arrays = halves_of(dtype, query, key, value)
        tolerances.check_out(attention(*arrays, scale=scale), tolerances.expected(*arrays, scale=scale))


@pytest.mark.parametrize("options", [{"attn_mask": np.zeros(1500)}, {"alibi_slopes": 1e-30}], ids=["mask", "slopes"])
def test_large_values_have_as_much_room_where_something_is_added(attention: Attention, options: dict[str, Any]) -> None:
    query, key, value = np.ones((40, 1)), np.zeros((1500, 1)), np.ones((1500, 17))
    for rise in np.linspace(4, 8, 17):
        key[-1], value[-1] = rise, 1e36
        arrays = [array.astype(np.float32) for array in (query, key, value)]
        tolerances.check_out(attention(*arrays, **options), tolerances.expected(*arrays, **options))


@halves
@pytest.mark.parametrize("mask_dtype", HALVES)
@lengths
def test_in_half_precision_the_lowest_number_of_a_mask_stays_finite(
    attention: Attention, dtype: Any, mask_dtype: Any, length: tuple[int, int]
) -> None:
    query, key, value = halves_of(dtype, *inputs(length))
    mask = np.zeros(length, mask_dtype)
    mask[::2] = finfo(mask.dtype).min
    _, lse, weights = tolerances.check_call(attention, query, key, value, mask, scale=0)
    assert np.isfinite(lse).all()
    close(np.asarray(weights[:, ::2], np.float32), 1 / length[1], dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("keys", [300, 700, 1500])
def test_hundreds_of_nearly_equal_scores(attention: Attention, dtype: Any, keys: int) -> None:
    # their weights are rounded alike wherever they are added
    query, key, value = inputs((40, keys), dtype=dtype)
    tolerances.check_call(attention, query * dtype(1e-5), key, value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_over_thousands_of_keys_lose_no_more_digits_than_over_some(attention: Attention, dtype: Any) -> None:
    # where weights and values are alike, so are the roundings of a long sum
    query, key, value = inputs((40, 5000), dtype=dtype)
    tolerances.check_call(attention, query * dtype(1e-2), key, 1 + value * dtype(0.1))


def test_float64_is_float64_throughout(attention: Attention) -> None:
    query, key, value = inputs((70, 130), dtype=np.float64)
    query[..., 0] += 1e-12
    close(attention(query, key, value), softmax_attention(query, key, value, 0.25), np.float64)


@pytest.mark.parametrize("dtype", [complex, object, "U3", np.longdouble, "M8[s]"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_other_dtypes_are_refused(attention: Attention, dtype: Any, which: int) -> None:
    arrays: list[Any] = list(inputs())
    arrays[which] = np.ones(arrays[which].shape, dtype)
    with pytest.raises(TypeError, match=("query", "key", "value")[which] + ": dtype .* is not supported"):
        attention(*arrays)


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [
        ({"scale": INF}, ValueError, "scale"),
        ({"scale": "1"}, TypeError, "scale"),
        ({"is_causal": "top"}, ValueError, "is_causal"),
        ({"is_causal": None}, TypeError, "is_causal"),
        ({"enable_gqa": 1}, TypeError, "enable_gqa"),
        ({"return_lse": 1}, TypeError, "return_lse"),
        ({"return_weights": None}, TypeError, "return_weights"),
        ({"dropout_p": "0"}, TypeError, "dropout_p"),
        ({"rng": -1}, ValueError, "rng"),
        ({"rng": 0.5}, TypeError, "rng"),
        ({"out": np.zeros((2, 7, 16))}, TypeError, "out"),
        ({"out": np.zeros((2, 7, 15), np.float32)}, ValueError, "out"),
        ({"out": np.broadcast_to(np.float32(0), (2, 7, 16))}, ValueError, "out"),
        ({"out": [0]}, TypeError, "out"),
    ],
)
def test_options_that_are_refused(
    attention: Attention, options: dict[str, Any], kind: type[Exception], word: str
) -> None:
    with pytest.raises(kind, match=f"^{word}: .*expected"):
        attention(*inputs(), **options)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend: 'abacus' .*'cpu'.*'reference'|backend: .*'reference'.*'cpu'"):
        fastattn.attention(*inputs(), backend="abacus")


def test_no_backend_is_the_best_one() -> None:
    query, key, value = inputs()
    np.testing.assert_array_equal(
        fastattn.attention(query, key, value), fastattn.attention(query, key, value, backend="cpu")
    )


def test_positional_order_is_that_of_pytorch(attention: Attention) -> None:
    query, key, value = normal(4, 7, 16), normal(2, 9, 16), normal(2, 9, 16)
    mask = normal(7, 9)
    by_position = attention(query, key, value, mask, 0.0, True, 0.5, True)
    by_name = attention(
        query=query, key=key, value=value, attn_mask=mask, dropout_p=0.0, is_causal=True, scale=0.5, enable_gqa=True
    )
    np.testing.assert_array_equal(by_position, by_name)
    with pytest.raises(TypeError):
        attention(query, key, value, mask, 0.0, True, 0.5, True, True)


@dtypes
@pytest.mark.parametrize("scale", [1, 1e-3])
def test_scores_of_1e36_are_finite_work(attention: Attention, dtype: Any, scale: float) -> None:
    query, key, value = inputs((60, 130), dtype=dtype)
    query, key = query * dtype(3e17), key * dtype(3e17)
    lse = tolerances.check_call(attention, query, key, value, scale=scale)[1]
    assert np.abs(lse).max() > 1e36 * scale
    # one key wins by far: the result is its value
    key[:, 77] = 0
    key[:, 77, 0] = np.abs(key).max() * 30
    query[..., 0] = 1e18
    out = attention(query, key, value, scale=1e-2)
    np.testing.assert_array_equal(out, np.broadcast_to(value[:, 77:78], out.shape))


#: Magnitudes of a scale, of queries and of keys, whose product is 1; those of float64 exceed float32.
BEYOND = [(1e39, 1e-19, 1e-20), (1e60, 1e-30, 1e-30), (1e39, 1e-39, 1.0), (1e-76, 1e38, 1e38), (1e-40, 1e35, 1e5)]


@dtypes
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize(("scale", "of_query", "of_key"), BEYOND)
def test_a_scale_need_not_be_a_number_of_float32(
    attention: Attention, dtype: Any, mask: str | None, scale: float, of_query: float, of_key: float
) -> None:
    query, key, value = (array[..., :4] for array in inputs((50, 70)))
    query, key, value = (query * of_query).astype(dtype), (key * of_key).astype(dtype), value.astype(dtype)
    bias = normal(50, 70, seed=4).astype(dtype)
    given = None if mask is None else bias > 0 if mask == "bool" else bias
    for sign in (1, -1):
        options: Any = {"scale": sign * scale, "dropout_p": 0.2, "rng": 5}
        results = tolerances.check_call(attention, query, key, value, given, **options)
        assert np.isfinite(results[1]).all()
        out = np.empty_like(results[0])
        assert attention(query, key, value, given, **options, out=out) is out
        assert out.tobytes() == results[0].tobytes()


@dtypes
@pytest.mark.parametrize(("scale", "softcap"), [(1e39, 2.0), (0.25, 1e-30), (1e-40, 1e30), (0.25, None)])
def test_such_a_scale_or_softcap_comes_with_windows_lengths_and_pairs_of_masks(
    backend: str, attention: Attention, dtype: Any, scale: float, softcap: float | None
) -> None:
    size = {1e39: 1e-20, 1e-40: 1e20}.get(scale, 1.0)
    query, key, value = ((size * array).astype(dtype) for array in inputs((50, 70), (2, 1)))
    pair = normal(50, 70, seed=4), normal(50, 70, seed=5) > -1
    options: Any = {"window": (30, 4), "query_offset": [-5, 30], "key_lengths": [70, 41]}
    options |= {"scale": scale, "softcap": softcap}
    out, lse, weights = tolerances.check_call(attention, query, key, value, pair, **options)
    visible = np.stack([seen((50, 70), 30, 4, -5, 70), seen((50, 70), 30, 4, 30, 41)])[:, None] & pair[1]
    np.testing.assert_array_equal(weights != 0, visible)
    grad_out = normal(2, 1, 50, 16, dtype=dtype, seed=6)
    found = fastattn.attention_backward(
        grad_out, query, key, value, out, lse, pair, **options, grad_mask=True, backend=backend
    )
    wanted = tolerances.expected_gradients(grad_out, query, key, value, pair, **options)
    tolerances.check_gradients(found, (query, key, value, pair), *wanted)


@dtypes
def test_a_scale_beyond_float32_may_leave_no_score_that_is_finite(attention: Attention, dtype: Any) -> None:
    """All of a row at -3e38 and a score far below it: the first share the row, as with any scale."""
    lowest = np.finfo(np.float32).min
    query, key, value = np.ones((1, 1), dtype), np.array([[0.0], [0], [-1]], dtype), np.eye(3, dtype=dtype)
    out, lse = attention(query, key, value, np.full(3, lowest), scale=1e39, return_lse=True)
    np.testing.assert_allclose(out, [[0.5, 0.5, 0]])
    assert np.isfinite(lse).all()
