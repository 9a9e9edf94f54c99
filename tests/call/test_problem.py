"""What `fastattn.call.problem` makes of arguments, and what it refuses, with which words."""

from __future__ import annotations

import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from strategies import Call, calls, laid_out

from fastattn.call.arrays import as_operands
from fastattn.call.halves import BITS, cast
from fastattn.call.options import check_backend, check_causal, check_dropout, check_flag, check_scale
from fastattn.call.out import check_out
from fastattn.call.problem import Problem
from fastattn.call.scores import Scores
from fastattn.call.shapes import MAX_RANK, describe, masks_of


def problem_of(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...] | None = None, **options: Any
) -> Problem:
    """Describe a call on arrays of these shapes."""
    mask = options.pop("attn_mask", None)
    arrays = np.zeros(query), np.zeros(key), np.zeros(key if value is None else value)
    return describe(*as_operands(*arrays, mask), **options)[0]


def refused(message: str, kind: type[Exception] = ValueError) -> Any:
    """Expect an exception whose message has these words, in this order."""
    return pytest.raises(kind, match=r"(?s)" + message)


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_a_plain_call() -> None:
    problem = problem_of((2, 8, 5, 64), (2, 8, 7, 64), (2, 8, 7, 32))
    assert problem == Problem(
        storage=np.dtype(np.float64),
        real=np.dtype(np.float64),
        batch=(2,),
        heads=8,
        kv_heads=8,
        queries=5,
        keys=7,
        head_dim=64,
        value_dim=32,
        out_shape=(2, 8, 5, 32),
        dropout_p=0.0,
        scores=Scores(scale=0.125),
    )
    assert problem.group == 1
    assert problem.lse_shape == (2, 8, 5)
    assert problem.weights_shape == (2, 8, 5, 7)
    assert problem.rows_shape == (2, 8, 1)


@pytest.mark.parametrize(
    ("query", "key", "value", "out"),
    [
        ((5, 3), (7, 3), (7, 2), (5, 2)),
        ((4, 5, 3), (7, 3), (7, 2), (4, 5, 2)),
        ((5, 3), (4, 7, 3), (7, 2), (4, 5, 2)),
        ((5, 3), (7, 3), (1, 7, 2), (1, 5, 2)),
        ((2, 1, 4, 5, 3), (3, 1, 7, 3), (4, 7, 2), (2, 3, 4, 5, 2)),
        ((0, 4, 5, 3), (1, 4, 7, 3), (4, 7, 2), (0, 4, 5, 2)),
        ((1, 5, 3), (0, 7, 3), (0, 7, 2), (0, 5, 2)),
        ((4, 0, 3), (4, 7, 3), (4, 7, 2), (4, 0, 2)),
        ((4, 5, 3), (4, 0, 3), (4, 0, 2), (4, 5, 2)),
        ((4, 5, 0), (4, 7, 0), (4, 7, 0), (4, 5, 0)),
    ],
)
def test_shape_of_the_result(query: Any, key: Any, value: Any, out: Any) -> None:
    assert problem_of(query, key, value).out_shape == out


@pytest.mark.parametrize(
    ("heads", "enable_gqa", "expected"),
    [
        ((8, 8, 8), False, (8, 8)),
        ((8, 8, 8), True, (8, 8)),
        ((8, 1, 1), False, (8, 8)),
        ((8, 1, 1), True, (8, 1)),
        ((8, 1, 8), True, (8, 8)),
        ((8, 2, 2), True, (8, 2)),
        ((8, 2, 1), True, (8, 2)),
        ((8, 1, 4), True, (8, 4)),
        ((1, 4, 4), False, (4, 4)),
        ((1, 4, 4), True, (4, 4)),
        ((1, 1, 4), False, (4, 4)),
        ((0, 0, 0), True, (0, 0)),
        ((0, 2, 2), True, (0, 2)),
        ((0, 1, 1), False, (0, 0)),
    ],
)
def test_heads(heads: tuple[int, int, int], enable_gqa: bool, expected: tuple[int, int]) -> None:
    query, key, value = ((1, n, 3, 4) for n in heads)
    problem = problem_of(query, key, value, enable_gqa=enable_gqa)
    assert (problem.heads, problem.kv_heads) == expected
    assert problem.heads == problem.kv_heads * problem.group


@given(calls())
def test_operands_are_views_of_the_arguments(call: Call) -> None:
    arrays = as_operands(*call.args)
    options = {name: option for name, option in call.options.items() if name != "rng"}
    problem, operands = describe(*arrays, **options)
    lengths = {
        "query": (problem.queries, problem.head_dim),
        "key": (problem.keys, problem.head_dim),
        "value": (problem.keys, problem.value_dim),
        "bias": (problem.queries, problem.keys),
        "keep": (problem.queries, problem.keys),
    }
    given = (*arrays[:3], *masks_of(arrays[3]))
    for (name, last), operand, array in zip(lengths.items(), operands[:5], given, strict=True):
        if operand is not None:
            assert operand.shape == (*problem.rows_shape, *last), name
            assert np.may_share_memory(operand, array), name
            if name in ("key", "value") and problem.group > 1:
                assert operand.strides[-3] == 0, name
    assert problem.out_shape == (*problem.lse_shape, problem.value_dim)


def test_query_heads_of_a_group_are_neighbours() -> None:
    query = np.arange(8.0)[None, :, None, None]
    operands = describe(query, np.zeros((1, 2, 3, 1)), np.zeros((1, 2, 3, 1)), enable_gqa=True)[1]
    assert operands.query[0, :, :, 0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 1), (5, 7), (4, 1, 7), (1, 5, 7), (2, 1, 1, 1), (2, 4, 5, 7)])
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    mask = np.random.default_rng(0).random(shape)
    problem, operands = describe(np.zeros((2, 4, 5, 3)), np.zeros((2, 2, 7, 3)), np.zeros((2, 2, 7, 3)), mask,
                                 enable_gqa=True)  # fmt: skip
    assert operands.bias is not None
    assert problem.scores.bias
    assert np.shares_memory(operands.bias, mask)
    np.testing.assert_array_equal(operands.bias.reshape(2, 4, 5, 7), np.broadcast_to(mask, (2, 4, 5, 7)))


@pytest.mark.parametrize(
    ("is_causal", "offset"), [(False, None), (True, 0), ("bottom-right", 2), (np.True_, 0), (np.False_, None)]
)
def test_causal_offset(is_causal: Any, offset: int | None) -> None:
    scores = problem_of((5, 3), (7, 3), is_causal=is_causal).scores
    assert (scores.right, scores.offset) == ((None, 0) if offset is None else (0, offset))


def test_equal_arguments_that_mean_different_things_are_told_apart() -> None:
    assert problem_of((5, 3), (7, 3), is_causal=True).scores.offset == 0
    with refused("is_causal: 1 of type int", TypeError):
        problem_of((5, 3), (7, 3), is_causal=1)
    assert problem_of((5, 3), (7, 3), scale=1.0).scores.scale == 1.0
    with refused("scale: True of type bool", TypeError):
        problem_of((5, 3), (7, 3), scale=True)


def test_the_highest_rank_is_no_empty_promise() -> None:
    ones = np.ones((1,) * (MAX_RANK - 2) + (2, 3))
    assert describe(ones, ones, ones, np.ones((*ones.shape[:-1], 2), bool))[0].out_shape == ones.shape


@pytest.mark.parametrize(
    ("query", "key", "value", "message"),
    [
        ((3,), (7, 3), (7, 3), r"query: shape \(3,\) has rank 1; expected .* rank 2"),
        ((5, 3), (), (7, 3), r"key: shape \(\) has rank 0"),
        ((5, 3), (7, 3), (7,), r"value: shape \(7,\) has rank 1"),
        ((1,) * (MAX_RANK + 1), (7, 1), (7, 3), f"query: .* has rank {MAX_RANK + 1}; expected .* to {MAX_RANK}"),
        ((5, 3), (7, 4), (7, 3), r"key: shape \(7, 4\); expected 3 features .* query of shape \(5, 3\)"),
        ((5, 3), (7, 3), (6, 3), r"value: shape \(6, 3\); expected length 7 .* key of shape \(7, 3\)"),
        ((2, 4, 5, 3), (3, 4, 7, 3), (4, 7, 3), r"query, key, value: .*\(2, 4, 5, 3\).* expected .*\(2,\), \(3,\)"),
        ((4, 5, 3), (3, 7, 3), (3, 7, 3), r"key: shape \(3, 7, 3\) has 3 heads, .*\(4, 5, 3\) has 4; expected 4 or 1$"),
        ((4, 5, 3), (2, 7, 3), (2, 7, 3), r"key: .* 2 heads, .* enable_gqa=True, .* groups of 2 query heads"),
        ((4, 5, 3), (7, 3), (2, 7, 3), r"value: .* 2 heads, .* enable_gqa=True"),
        ((4, 5, 3), (4, 7, 3), (2, 7, 3), r"value: shape \(2, 7, 3\) has 2 heads; expected 4, .* or 1"),
        ((4, 5, 3), (0, 7, 3), (0, 7, 3), r"key: .* has 0 heads"),
    ],
)
def test_shapes_that_do_not_go_together(query: Any, key: Any, value: Any, message: str) -> None:
    with refused(message):
        problem_of(query, key, value)


def test_groups_that_do_not_divide() -> None:
    with refused(r"key: .* 3 heads, .* has 4; expected .* multiple"):
        problem_of((4, 5, 3), (3, 7, 3), enable_gqa=True)


@pytest.mark.parametrize("shape", [(6,), (4, 7), (3, 5, 7), (3, 1, 1, 1), (1, 2, 4, 5, 7), (0,), (5, 0)])
def test_masks_that_do_not_broadcast(shape: tuple[int, ...]) -> None:
    with refused(r"attn_mask: shape .*; expected one that broadcasts to \(2, 4, 5, 7\)"):
        problem_of((2, 4, 5, 3), (2, 4, 7, 3), attn_mask=np.ones(shape, bool))


def test_a_mask_may_not_enlarge_the_batch() -> None:
    for shape in ((2, 1, 5, 7), (1, 4, 5, 7)):
        with refused(r"attn_mask: .* \(1, 1, 5, 7\)"):
            problem_of((1, 1, 5, 3), (1, 1, 7, 3), attn_mask=np.ones(shape, bool))
    with refused(r"attn_mask: .* \(5, 7\)"):
        problem_of((5, 3), (7, 3), attn_mask=np.ones((1, 5, 7), bool))
    with refused(r"attn_mask: .* \(1, 7\)"):
        problem_of((1, 3), (7, 3), attn_mask=np.ones((5, 7), bool))


# -- dtypes ------------------------------------------------------------------------------------------------------------

DTYPES = ("float16", "float32", "float64", "int8", "uint8", "int32", "int64", "uint64", "bool", ">f4", ">f8", ">i2")


@pytest.mark.parametrize("second", DTYPES)
@pytest.mark.parametrize("first", DTYPES)
def test_mixed_dtypes_promote(first: str, second: str) -> None:
    query, key = np.ones((5, 3), first), np.ones((7, 3), second)
    common = np.result_type(query, key, key)
    expected = np.dtype(np.float64) if common.kind in "biu" else common
    for operand in as_operands(query, key, key)[:3]:
        assert operand.dtype == expected.newbyteorder("=")
        assert operand.dtype.isnative


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_that_need_nothing_come_back_themselves(dtype: Any) -> None:
    arrays = np.ones((5, 3), dtype), np.ones((7, 3), dtype), np.ones((7, 3), dtype), np.ones((5, 7), np.float16)
    assert all(operand is array for operand, array in zip(as_operands(*arrays), arrays, strict=True))
    # an equal dtype that is another object, as one that was unpickled
    other = np.ones((7, 3), pickle.loads(pickle.dumps(np.dtype(dtype, metadata={"a": 1}))))
    assert as_operands(arrays[0], other, other)[1] is other


def test_lists_and_scalars_of_lists() -> None:
    query, key, value, mask = as_operands([[1, 2]], [[1.5, 2]], ((True, False),), True)
    assert query.dtype == key.dtype == value.dtype == np.float64
    assert mask is not None
    assert mask.shape == ()


@pytest.mark.parametrize("layout", ["unaligned", "byte-swapped"])
def test_what_kernels_cannot_read_is_copied(layout: str) -> None:
    array = laid_out(np.arange(15, dtype=np.float32).reshape(5, 3), layout)
    mask = laid_out(np.arange(25, dtype=np.float64).reshape(5, 5), layout)
    for operand, given_ in zip(as_operands(array, array, array, mask), (array, array, array, mask), strict=True):
        assert operand is not None
        assert operand.flags.aligned
        assert operand.dtype.isnative
        np.testing.assert_array_equal(operand, given_)


def test_a_field_of_packed_records_is_copied() -> None:
    records = np.zeros((5, 3), np.dtype([("byte", "u1"), ("number", "f4")]))
    records["number"] = np.arange(15).reshape(5, 3)
    operand = as_operands(records["number"], np.ones((7, 3), "f4"), np.ones((7, 3), "f4"))[0]
    assert operand.flags.aligned
    np.testing.assert_array_equal(operand, records["number"])


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((5, 3), np.complex64), "dtype complex64 is not supported; expected float16, bfloat16, float32"),
        (np.ones((5, 3), object), "dtype object is not supported"),
        (np.ones((5, 3), "U3"), "dtype <U3 is not supported"),
        (np.ones((5, 3), "S3"), r"dtype .*S3.* is not supported"),
        (np.ones((5, 3), np.longdouble), "is not supported"),
        (np.ones((5, 3), "M8[s]"), r"dtype datetime64\[s\] is not supported"),
        (np.ones((5, 3), "m8[s]"), r"dtype timedelta64\[s\] is not supported"),
        (np.zeros((5, 3), [("a", "f4")]), "is not supported"),
        (None, "None; expected an array_like"),
        ("text", "dtype <U4 is not supported"),
        ([[2**70, 1]], "dtype object is not supported"),
        (np.ma.ones((5, 3)), "numpy.ma.MaskedArray"),
    ],
)
def test_dtypes_that_are_refused(array: Any, message: str, position: int) -> None:
    arrays: list[Any] = [np.ones((5, 3), np.float32)] * 3
    arrays[position] = array
    with refused(("query", "key", "value")[position] + ": .*" + message, TypeError):
        as_operands(*arrays)


@pytest.mark.parametrize("own", ["ml_dtypes", "bits"])
def test_bfloat16_promotes_as_float16_does(own: str) -> None:
    bfloat16 = BITS if own == "bits" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    narrow = cast(np.ones((5, 3), np.float32), bfloat16)
    for other in DTYPES:
        array, expected = np.ones((7, 3), other), np.result_type(np.float16, other)
        if expected == np.float16:
            expected = np.dtype(np.float32) if other == "float16" else bfloat16
        for query, key in ((narrow, array), (array, narrow)):
            assert [operand.dtype for operand in as_operands(query, key, key)[:3]] == [expected] * 3
        assert as_operands(array, array, array, narrow)[3] is narrow
    assert [operand.dtype for operand in as_operands(narrow, narrow, narrow)[:3]] == [bfloat16] * 3


def test_other_small_floats_are_refused() -> None:
    dtype = pytest.importorskip("ml_dtypes").float8_e4m3fn
    with refused("query: dtype float8_e4m3fn is not supported;", TypeError):
        as_operands(np.ones((5, 3), dtype), np.ones((5, 3)), np.ones((5, 3)))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((5, 5), np.int64), "dtype int64 could mean two things; expected boolean"),
        (np.ones((5, 5), np.uint8), "dtype uint8 could mean two things"),
        (1, "could mean two things"),
        (np.ones((5, 5), complex), "dtype complex128 is not supported; expected one of bool, float16"),
        (np.ones((5, 5), np.longdouble), "is not supported"),
        (np.ones((5, 5), object), "dtype object is not supported"),
        ("causal", "dtype <U6 is not supported"),
        (np.ma.ones((5, 5)), "MaskedArray"),
    ],
)
def test_masks_that_are_refused(mask: Any, message: str) -> None:
    array = np.ones((5, 3))
    with refused("attn_mask: .*" + message, TypeError):
        as_operands(array, array, array, mask)


def test_ragged_lists() -> None:
    with refused(r"key: \[\[1, 2\], \[3\]\] of type list cannot be made an array; expected an array_like"):
        as_operands([[1, 2]], [[1, 2], [3]], [[1, 2]])


def test_what_fails_to_become_an_array() -> None:
    class Broken:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            raise RuntimeError("detach it first")

    with refused("value: .*Broken.* expected an array_like: detach it first", TypeError):
        as_operands([[1.0]], [[1.0]], Broken())


def test_a_long_argument_is_told_in_few_words() -> None:
    for bad in ("x" * 10_000, np.ones((500, 500))):
        with pytest.raises(TypeError) as caught:
            check_scale(bad)
        assert len(str(caught.value)) < 200


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, -0.5, 0.0, np.float32(0.5), np.int8(-3), Fraction(1, 4), 1e300, -(10**300)])
def test_scales(number: Any) -> None:
    scale = check_scale(number)
    assert type(scale) is float
    assert scale == float(number)


def test_the_default_scale() -> None:
    assert check_scale(None) is None
    assert problem_of((5, 16), (7, 16)).scores.scale == 0.25
    assert problem_of((5, 0), (7, 0), (7, 3)).scores.scale == 1.0


@pytest.mark.parametrize(
    ("given_", "kind"),
    [
        (True, TypeError),
        (np.True_, TypeError),
        ("0.5", TypeError),
        (1j, TypeError),
        (np.complex64(1), TypeError),
        ([0.5], TypeError),
        (np.ones(3), TypeError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (-np.float32(np.inf), ValueError),
        (10**400, ValueError),
    ],
)
def test_scales_that_are_refused(given_: Any, kind: type[Exception]) -> None:
    with refused("scale: .*expected a finite real number", kind):
        check_scale(given_)


@pytest.mark.parametrize("number", [0, 1, 0.0, 1.0, 0.25, np.float32(0.5), np.int64(1), Fraction(1, 3)])
def test_dropouts(number: Any) -> None:
    dropout_p = check_dropout(number)
    assert type(dropout_p) is float
    assert dropout_p == float(number)


@pytest.mark.parametrize(
    ("given_", "kind"),
    [
        (-1e-9, ValueError),
        (1.0000001, ValueError),
        (Fraction(10**30 + 1, 10**30), ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (None, TypeError),
        (False, TypeError),
        ("0", TypeError),
        (np.zeros(1), TypeError),
    ],
)
def test_dropouts_that_are_refused(given_: Any, kind: type[Exception]) -> None:
    with refused(r"dropout_p: .*expected a real number in \[0, 1\]", kind):
        check_dropout(given_)


def test_dropout_in_numbers() -> None:
    assert (problem_of((1, 1), (1, 1)).drop_threshold, problem_of((1, 1), (1, 1)).keep_scale) == (0, 1)
    quarter = problem_of((1, 1), (1, 1), dropout_p=0.25)
    assert (quarter.drop_threshold, quarter.keep_scale) == (2**30, 1 / 0.75)
    everything = problem_of((1, 1), (1, 1), dropout_p=1)
    assert (everything.drop_threshold, everything.keep_scale) == (2**32, 0)


@pytest.mark.parametrize("given_", [None, 0, 1, 1.0, "yes", np.ones(1, bool), [True]])
def test_flags_that_are_refused(given_: Any) -> None:
    with refused("return_lse: .*expected True or False", TypeError):
        check_flag("return_lse", given_)
    with refused("enable_gqa: .*expected True or False", TypeError):
        problem_of((5, 3), (7, 3), enable_gqa=given_)


def test_flags() -> None:
    for given_ in (True, False, np.True_, np.False_):
        assert check_flag("return_lse", given_) is bool(given_)


@pytest.mark.parametrize(
    ("given_", "kind"),
    [("top-left", ValueError), ("", ValueError), (None, TypeError), (1, TypeError), (np.ones(1, bool), TypeError)],
)
def test_causal_masks_that_are_refused(given_: Any, kind: type[Exception]) -> None:
    with refused("is_causal: .*expected False, True or 'bottom-right'", kind):
        check_causal(given_)


def test_backends() -> None:
    assert check_backend(None, ("cpu", "reference")) is None
    assert check_backend("cpu", ("cpu", "reference")) == "cpu"
    with refused("backend: 'gpu' of type str; expected None or one of 'cpu', 'reference'"):
        check_backend("gpu", ("cpu", "reference"))
    with refused("backend: 3 of type int; expected None or one of", TypeError):
        check_backend(3, ("cpu", "reference"))


# -- out ---------------------------------------------------------------------------------------------------------------

PROBLEM = problem_of((2, 4, 5, 3), (2, 4, 7, 3))


def test_outs() -> None:
    assert check_out(None, PROBLEM) is None
    for layout in (
        "contiguous",
        "Fortran",
        "length before heads",
        "reversed",
        "every second",
        "inside NaN",
        "unaligned",
    ):
        out = laid_out(np.zeros((2, 4, 5, 3)), layout)
        assert check_out(out, PROBLEM) is out
    # elements of two axes interleaved, with none of them in the same place
    woven = np.lib.stride_tricks.as_strided(np.zeros(30), (5, 6), (8 * 6, 8))[:, ::2]
    assert check_out(woven, problem_of((5, 3), (7, 3))) is woven
    odd = np.lib.stride_tricks.as_strided(np.zeros(30), (2, 3), (8 * 3, 8 * 2))
    assert check_out(odd, problem_of((2, 3), (7, 3))) is odd


def test_outs_of_no_elements() -> None:
    out = np.broadcast_to(np.zeros((5, 1)), (5, 0))
    assert not out.size
    assert check_out(np.zeros((5, 0)), problem_of((5, 3), (7, 3), (7, 0))) is not None


@pytest.mark.parametrize(
    ("out", "kind", "message"),
    [
        ([[0.0]], TypeError, r"out: \[\[0.0\]\] of type list; expected None or a numpy.ndarray"),
        (np.ma.zeros((2, 4, 5, 3)), TypeError, "out: .* expected None or a numpy.ndarray"),
        (np.zeros((2, 4, 5, 3), np.float32), TypeError, "out: dtype float32; expected float64"),
        (np.zeros((2, 4, 5, 3), ">f8"), TypeError, "out: dtype >f8; expected float64"),
        (np.zeros((1, 4, 5, 3)), ValueError, r"out: shape \(1, 4, 5, 3\); expected \(2, 4, 5, 3\)"),
        (laid_out(np.zeros((2, 4, 5, 3)), "read-only"), ValueError, "out: .*read-only"),
    ],
)
def test_outs_that_are_refused(out: Any, kind: type[Exception], message: str) -> None:
    with refused(message, kind):
        check_out(out, PROBLEM)


@pytest.mark.parametrize("strides", [(0, 8), (8, 0), (8, 8), (8, 4), (4, 40), (16, 8), (-8, 8), (24, 16 + 8)])
def test_outs_whose_elements_share_memory(strides: tuple[int, int]) -> None:
    place = np.zeros(100)[50:]
    out = np.lib.stride_tricks.as_strided(place, (5, 3), strides)
    with refused("out: .*share memory"):
        check_out(out, problem_of((5, 3), (7, 3)))
