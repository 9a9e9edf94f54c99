"""`merge`: what is computed over pieces of the keys is what is computed over all of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, bits_of, calls, each

import fastattn
from fastattn import reference

INF, NAN = np.inf, np.nan
Merge = Callable[..., Any]


@pytest.fixture(params=[fastattn.merge, reference.merge], ids=["fastattn", "reference"])
def merge(request: pytest.FixtureRequest) -> Merge:
    """Return the function, and the reference."""
    return request.param  # type: ignore[no-any-return]


def inputs(dtype: Any = np.float32) -> tuple[Any, Any, Any]:
    """Return query, key and value, of 30 keys."""
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((2, n, 8)).astype(dtype) for n in (7, 30, 30))  # type: ignore[return-value]


def in_pieces(query: Any, key: Any, value: Any, cuts: list[int], **options: Any) -> tuple[Any, Any]:
    """Return the results, and their log-sum-exps, over the keys between the cuts."""
    found = [
        fastattn.attention(query, key[..., a:b, :], value[..., a:b, :], return_lse=True, **options)
        for a, b in pairwise([0, *cuts, key.shape[-2]])
    ]
    outs, lses = zip(*found, strict=True)
    return outs, lses


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cuts", [[], [0], [12], [1, 2, 3], [30], [15, 15], list(range(1, 30))], ids=str)
def test_results_over_pieces_make_the_result_over_all_keys(merge: Merge, dtype: Any, cuts: list[int]) -> None:
    query, key, value = inputs(dtype)
    wanted = tolerances.expected(query, key, value)
    out, lse = merge(*in_pieces(query, key, value, cuts))
    tolerances.check_out(out, wanted)
    tolerances.check_lse(lse, wanted)


def test_one_piece_is_itself(merge: Merge) -> None:
    out, lse = fastattn.attention(*inputs(), return_lse=True)
    merged = merge([out], [lse])
    np.testing.assert_array_equal(merged[0], out)
    np.testing.assert_array_equal(merged[1], lse)
    assert merged[0] is not out
    assert merged[1] is not lse


def test_merged_results_may_be_merged_again(merge: Merge) -> None:
    query, key, value = inputs()
    outs, lses = in_pieces(query, key, value, [5, 9, 20])
    left, right = merge(outs[:2], lses[:2]), merge(outs[2:], lses[2:])
    out, lse = merge((left[0], right[0]), (left[1], right[1]))
    wanted = tolerances.expected(query, key, value)
    tolerances.check_out(out, wanted)
    tolerances.check_lse(lse, wanted)


def test_a_piece_without_keys_counts_for_nothing_whatever_it_holds(merge: Merge) -> None:
    out, lse = fastattn.attention(*inputs(), return_lse=True)
    for bad in (NAN, INF, 5.0):
        merged = merge([np.full_like(out, bad), out], [np.full_like(lse, -INF), lse])
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_array_equal(merged[1], lse)


def test_a_query_without_keys_in_a_piece_has_nothing_of_it_whatever_it_holds(merge: Merge) -> None:
    out, lse = fastattn.attention(*inputs(), return_lse=True)
    wanted = merge([out, out], [lse, lse])
    unseen = lse.copy()
    unseen[..., ::2] = -INF
    for bad in (NAN, INF, 5.0):
        held = np.where((unseen == -INF)[..., None], np.float32(bad), out)
        merged = merge([held, out], [unseen, lse])
        for found, alone, both in zip(merged, (out, lse), wanted, strict=True):
            np.testing.assert_array_equal(found[:, ::2], alone[:, ::2])
            np.testing.assert_array_equal(found[:, 1::2], both[:, 1::2])


def test_a_query_that_sees_no_key_of_any_piece_is_zero(merge: Merge) -> None:
    lse = np.array([[0.5, -INF, 1.0]], np.float32)
    out, merged = merge([np.full((1, 3, 4), 7.0, np.float32)] * 2, [lse, lse])
    np.testing.assert_array_equal(out[0, 1], 0)
    assert merged[0, 1] == -INF
    assert np.isfinite(merged[0, ::2]).all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_plus_infinity_make_their_row_nan_and_no_other(merge: Merge, bad: float) -> None:
    outs, lses = in_pieces(*inputs(), cuts=[11])
    odd = lses[0].copy()
    odd[1, 3] = bad
    out, lse = merge(outs, [odd, lses[1]])
    wanted = merge(outs, lses)
    hit = np.zeros(lse.shape, bool)
    hit[1, 3] = True
    assert np.isnan(out[hit]).all()
    assert np.isnan(lse[hit]).all()
    np.testing.assert_array_equal(out[~hit], wanted[0][~hit])
    np.testing.assert_array_equal(lse[~hit], wanted[1][~hit])


def test_nan_in_a_result_that_counts_shows_in_its_feature(merge: Merge) -> None:
    outs, lses = in_pieces(*inputs(), cuts=[11])
    odd = outs[0].copy()
    odd[1, 3, 2] = NAN
    out, _ = merge([odd, outs[1]], lses)
    assert np.isnan(out[1, 3, 2])
    assert np.count_nonzero(np.isnan(out)) == 1


@pytest.mark.parametrize("size", [1e30, -1e30, 3e38, -3e38])
def test_log_sum_exps_may_be_of_any_magnitude(merge: Merge, size: float) -> None:
    lse = np.full((1, 2), size, np.float32)
    out, merged = merge([np.zeros((1, 2, 1), np.float32), np.ones((1, 2, 1), np.float32)], [lse, lse])
    np.testing.assert_array_equal(out, 0.5)
    np.testing.assert_array_equal(merged, lse)
    out, _ = merge([np.zeros((1, 2, 1)), np.ones((1, 2, 1))], [lse, np.zeros_like(lse)])
    np.testing.assert_array_equal(out, float(size < 0))


def test_dtypes_promote_and_half_precision_is_merged_in_float32(merge: Merge) -> None:
    out, lse = fastattn.attention(*inputs(), return_lse=True)
    half = out.astype(np.float16)
    for outs, lses, dtype in (
        ([out, out], [lse, lse], np.float32),
        ([half, half], [lse, lse], np.float32),
        ([half], [lse.astype(np.float16)], np.float32),
        ([out, out.astype(np.float64)], [lse, lse], np.float64),
        ([out], [lse.astype(np.float64)], np.float64),
        ([np.ones((2, 3), int)], [np.ones(2, int)], np.float64),
    ):
        results = merge(outs, lses)
        assert [result.dtype for result in results] == [dtype, dtype]


def test_pieces_are_any_iterables_of_array_likes(merge: Merge) -> None:
    outs, lses = in_pieces(*inputs(np.float64), cuts=[11])
    wanted = merge(outs, lses)
    for given_outs, given_lses in (
        (np.stack(outs), np.stack(lses)),
        (iter(outs), iter(lses)),
        ([out.tolist() for out in outs], [lse.tolist() for lse in lses]),
    ):
        np.testing.assert_array_equal(merge(given_outs, given_lses)[0], wanted[0])
    out, lse = merge([[1.0, 2.0]], [3.0])  # a row alone
    np.testing.assert_array_equal(out, [1, 2])
    assert lse == 3


def test_inputs_are_not_written_to_and_nothing_warns(merge: Merge) -> None:
    outs, lses = in_pieces(*inputs(), cuts=[11])
    lses[0][0] = -INF
    before = bits_of(*outs, *lses)
    merge(outs, lses)
    assert bits_of(*outs, *lses) == before


def test_gradients_of_pieces_with_the_merged_result_are_those_of_the_whole() -> None:
    query, key, value = inputs(np.float64)
    grad_out = np.random.default_rng(1).standard_normal(query.shape)
    out, lse = fastattn.merge(*in_pieces(query, key, value, [11]))
    wanted = fastattn.attention_backward(
        grad_out, query, key, value, *fastattn.attention(query, key, value, return_lse=True)
    )
    parts = [
        fastattn.attention_backward(grad_out, query, key[:, a:b], value[:, a:b], out, lse)
        for a, b in ((0, 11), (11, 30))
    ]
    np.testing.assert_allclose(parts[0][0] + parts[1][0], wanted[0], atol=1e-12)
    for i in (1, 2):
        np.testing.assert_allclose(np.concatenate([part[i] for part in parts], axis=1), wanted[i], atol=1e-12)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "outs: nothing in it"),
        (3, [], TypeError, "outs: 3 of type int; expected an iterable"),
        ([np.ones((2, 3))], None, TypeError, "lses: None"),
        ([np.ones((2, 3))], [], ValueError, "lses: 0 in it; expected 1"),
        ([np.ones((2, 3)), np.ones((2, 4))], [np.ones(2)] * 2, ValueError, r"outs\[1\]: shape \(2, 4\)"),
        ([np.ones((2, 3))] * 2, [np.ones(2), np.ones(3)], ValueError, r"lses\[1\]: shape \(3,\); expected \(2,\)"),
        ([np.ones((2, 3))] * 2, [np.ones(2), None], TypeError, r"lses\[1\]: None"),
        ([np.ones((2, 3)), np.ones((2, 3), complex)], [np.ones(2)] * 2, TypeError, r"outs\[1\]: dtype complex128"),
        ([1.0], [1.0], ValueError, r"outs\[0\]: shape \(\)"),
    ],
)
def test_what_is_refused(merge: Merge, outs: Any, lses: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        merge(outs, lses)


@given(call=calls(odd=True, further=False, masks=(None, "bool", "float", "float, -inf", "float, odd")), data=st.data())
def test_any_call_in_pieces(call: Call, data: st.DataObject) -> None:
    keys = max(np.shape(call.key)[-2], 0)
    cuts = sorted(data.draw(st.lists(st.integers(0, keys), max_size=4)))
    options = {**call.options, "is_causal": False}
    outs, lses = [], []
    for a, b in pairwise([0, *cuts, keys]):

        def part(mask: Any, a: int = a, b: int = b) -> Any:
            return mask if not np.ndim(mask) or mask.shape[-1] == 1 else mask[..., a:b]

        operands = call.query, call.key[..., a:b, :], call.value[..., a:b, :], each(part, call.attn_mask)
        out, lse = fastattn.attention(*operands, **options, return_lse=True)
        outs.append(out)
        lses.append(lse)
    exact, exact_lse = reference.merge(outs, lses)
    out, lse = fastattn.merge(outs, lses)
    eps = float(np.finfo(out.dtype).eps)
    bound = 4 * (len(outs) + 2) * eps * max(map(tolerances.largest, outs))
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(out[~finite], exact[~finite])
    assert (np.abs(out[finite] - exact[finite]) <= bound).all()
    np.testing.assert_allclose(lse, exact_lse, rtol=4 * eps, atol=4 * eps)
