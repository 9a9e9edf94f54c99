"""`fastattn.call.score_options`: what may be said of scores, and what is refused, with which words."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.call.arrays import as_operands
from fastattn.call.score_options import check_softcap, check_window, scores_from
from fastattn.call.scores import FARTHEST, HEAD, Scores

Array = np.ndarray[Any, Any]
BIAS, KEEP = np.zeros((5, 7)), np.ones((5, 7), bool)


def scores_of(
    queries: int = 5, keys: int = 7, batch: tuple[int, ...] = (), heads: int = 1, **options: Any
) -> tuple[Scores, Array | None]:
    """Return what is made of options, for 4 features."""
    return scores_from(options, batch, heads, queries, keys, 4, False, False)[:2]  # type: ignore[arg-type]


def interval(**options: Any) -> tuple[int | None, int | None, int]:
    """Return the left and the right reach, and the offset."""
    scores, _ = scores_of(**options)
    return scores.left, scores.right, scores.offset


# -- what they come to -------------------------------------------------------------------------------------------------


def test_nothing_said_is_the_default() -> None:
    assert scores_of() == (Scores(scale=0.5), None)
    given = {"is_causal": False, "scale": None, "window": None, "query_offset": None, "key_lengths": None}
    assert scores_of(**given, softcap=None) == (Scores(scale=0.5), None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"is_causal": True}, (None, 0, 0)),
        ({"is_causal": "bottom-right"}, (None, 0, 2)),
        ({"is_causal": "bottom-right", "queries": 9}, (None, 0, -2)),
        ({"window": (3, 4)}, (3, 4, 0)),
        ({"window": (None, 4)}, (None, 4, 0)),
        ({"window": [0, None]}, (0, None, 0)),
        ({"window": (None, None)}, (None, None, 0)),
        ({"window": (3, 4), "is_causal": True}, (3, 0, 0)),
        ({"window": (3, None), "is_causal": "bottom-right"}, (3, 0, 2)),
        ({"query_offset": 6, "is_causal": True}, (None, 0, 6)),
        ({"query_offset": -6, "window": (1, 2)}, (1, 2, -6)),
        ({"query_offset": np.int8(6), "window": (1, 2)}, (1, 2, 6)),
        ({"query_offset": np.array(6), "window": (1, 2)}, (1, 2, 6)),
        ({"query_offset": 6}, (None, None, 0)),  # of no effect
    ],
    ids=str,
)
def test_causality_windows_and_offsets_come_to_an_interval(options: Any, expected: Any) -> None:
    assert interval(**options) == expected


@pytest.mark.parametrize("offset", [0, 5, -(10**30), 10**30, 2**62, -(2**62)])
@pytest.mark.parametrize("window", [(0, 0), (3, 7), (10**30, 10**30), (10**30 + 2, 4), (2**62 - 1, 2**62 + 1)], ids=str)
def test_numbers_without_end_say_the_same_in_64_bits(offset: int, window: tuple[int, int]) -> None:
    left, right, at = interval(window=window, query_offset=offset)
    assert left is not None
    assert right is not None
    assert left >= 0
    assert right >= 0
    for number in (left, right, at, at - left - FARTHEST, at + right + FARTHEST):
        assert -(2**63) <= number < 2**63
    for keys in (range(-50, 50), range(FARTHEST // 2, FARTHEST // 2 + 5)):
        for i in range(0, 40, 7):
            exact = [i + offset - window[0] <= j <= i + offset + window[1] for j in keys]
            assert [i + at - left <= j <= i + at + right for j in keys] == exact


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint64, ">i2", list])
def test_a_number_for_each_row_of_the_batch(kind: Any) -> None:
    given = [[1, 0, 3]] if kind is list else np.array([[1, 0, 3]], kind)
    for name, field in (("query_offset", "offset"), ("key_lengths", "keys")):
        scores, own = scores_of(batch=(2, 3), heads=2, is_causal=True, **{name: given})
        assert scores.own == (field,)
        assert own is not None
        assert own.dtype == HEAD
        assert own.flags.c_contiguous
        assert own[field].tolist() == [1, 1, 0, 0, 3, 3, 1, 1, 0, 0, 3, 3]
        assert own["keys" if field == "offset" else "offset"].tolist() == [7 if field == "offset" else 0] * 12


def test_offsets_of_rows_that_mean_nothing_are_not_kept() -> None:
    assert scores_of(batch=(2,), query_offset=[1, 2]) == (Scores(scale=0.5), None)
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):  # of which the narrow do not reach to the farthest
        own = scores_of(batch=(2,), query_offset=np.array([1, 2], dtype), window=(1, 1))[1]
        assert own is not None
        assert own["offset"][:: len(own) // 2].tolist() == [1, 2]
    scores, own = scores_of(batch=(2,), query_offset=[1, 2], key_lengths=[3, 4])
    assert scores.own == ("keys",)
    assert own is not None
    assert own["offset"].tolist() == [0, 0]


def test_offsets_of_rows_are_held_where_positions_end() -> None:
    for given in (np.array([2**63 - 1, -(2**63)]), np.array([2**64 - 1, 5], np.uint64)):
        own = scores_of(batch=(2,), is_causal=True, query_offset=given)[1]
        assert own is not None
        wanted = [min(max(number, -FARTHEST), FARTHEST) for number in given.tolist()]
        assert own["offset"].tolist() == wanted


def test_bottom_right_of_each_row_ends_at_its_length() -> None:
    scores, own = scores_of(batch=(3,), is_causal="bottom-right", key_lengths=[7, 0, 5])
    assert own is not None
    assert own["offset"].tolist() == [2, -5, 0]
    assert own["keys"].tolist() == [7, 0, 5]
    assert (scores.offset, scores.right) == (0, 0)


def test_a_batch_of_none_has_no_numbers() -> None:
    for given in ([], np.zeros(0, int), np.zeros((3, 0), int)):
        found = scores_of(batch=(3, 0), key_lengths=given, query_offset=given)
        assert found[1] is not None
        assert found[1].size == 0


def test_slopes_are_of_heads() -> None:
    scores, own = scores_of(batch=(2,), heads=3, alibi_slopes=np.float32([[0.5], [2]]), query_offset=4)
    assert scores.own == ("slope",)
    assert (scores.left, scores.right, scores.offset) == (None, None, 4)  # where queries stand matters
    assert scores.adds
    assert scores.placed
    assert not scores.bounded
    assert own is not None
    assert own["slope"].tolist() == [0.5] * 3 + [2] * 3
    assert own["offset"].tolist() == [4] * 6


def test_sinks_are_of_heads() -> None:
    scores, own = scores_of(batch=(2,), heads=3, sinks=np.float32([0.5, -np.inf, np.inf]), query_offset=4)
    assert scores.own == ("sink",)
    assert scores.offset == 0  # where queries stand does not matter
    assert not scores.adds
    assert not scores.placed
    assert own is not None
    np.testing.assert_array_equal(own["sink"], [0.5, -np.inf, np.nan] * 2)
    assert np.isneginf(scores.head(5)["sink"]).all()


# -- what is refused ---------------------------------------------------------------------------------------------------

EXPECTED = r"; expected \(left, right\), each a non-negative int or None, or None for no window$"


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (3, TypeError),
        ("33", TypeError),
        ({3, 4}, TypeError),
        (np.array([3, 4]), TypeError),
        ((True, 3), TypeError),
        ((3, np.True_), TypeError),
        ((3.0, 4), TypeError),
        ((3, np.float64(4)), TypeError),
        ((3, "4"), TypeError),
        (((3,), 4), TypeError),
        ((), ValueError),
        ((3,), ValueError),
        ((3, 4, 5), ValueError),
        ((-1, 4), ValueError),
        ((None, -1), ValueError),
        ((np.int64(-5), 0), ValueError),
    ],
    ids=str,
)
def test_windows_that_are_refused(given: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="^window: .*" + EXPECTED):
        check_window(given)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (0, ValueError),
        (0.0, ValueError),
        (-0.0, ValueError),
        (-1.0, ValueError),
        (np.nan, ValueError),
        (np.inf, ValueError),
        (10**400, ValueError),
        (Fraction(1, 10**400), ValueError),
        ("1", TypeError),
        (True, TypeError),
        (1j, TypeError),
        ([1.0], TypeError),
        (np.ones(1), TypeError),
    ],
    ids=lambda given: str(given)[:20],
)
def test_softcaps_that_are_refused(given: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="^softcap: .*expected a finite real number above 0, or None$"):
        check_softcap(given)


@pytest.mark.parametrize("given", [2, 2.0, np.float32(2), np.int8(2), Fraction(4, 2)], ids=repr)
def test_softcaps_of_any_kind_of_number(given: Any) -> None:
    found = check_softcap(given)
    assert type(found) is float
    assert found == 2.0


#: Whatever is given for a number for each row.
NO_INTEGERS: list[tuple[Any, type[Exception], str]] = [
    (1.0, TypeError, "dtype float64; expected integers, one for each row of the batch"),
    ([1.0, 2.0], TypeError, "dtype float64; expected integers"),
    (True, TypeError, "dtype bool; expected integers"),
    (np.ones(2, bool), TypeError, "dtype bool; expected integers"),
    ("1", TypeError, "dtype <U1; expected integers"),
    ([None, 1], TypeError, "dtype object; expected integers"),
    (np.zeros(0), TypeError, "dtype float64; expected integers"),
    ([[1], [1, 2]], ValueError, "of type list cannot be made an array"),
    (np.ma.array([1, 2]), TypeError, "a numpy.ma.MaskedArray"),
    ([1, 2, 3], ValueError, r"shape \(3,\); expected one that broadcasts to \(2,\), the shape of the batch"),
    ([[1, 2]], ValueError, r"shape \(1, 2\); expected one that broadcasts to \(2,\)"),
]


@pytest.mark.parametrize("name", ["query_offset", "key_lengths"])
@pytest.mark.parametrize(("given", "kind", "message"), NO_INTEGERS, ids=lambda value: str(value)[:30])
def test_what_is_no_integer_for_each_row_is_refused(name: str, given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"(?s)^{name}: .*{message}"):
        scores_of(batch=(2,), **{name: given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (-1, "-1 to -1; expected 0 to 7, the length of key"),
        (8, "8 to 8; expected 0 to 7, the length of key"),
        ([3, 9], "3 to 9; expected 0 to 7, the length of key"),
        (np.array([-(2**63), 2**63 - 1]), "-9223372036854775808 to 9223372036854775807; expected 0 to 7"),
        (np.array([2**64 - 1], np.uint64), "18446744073709551615 to 18446744073709551615; expected 0 to 7"),
        (10**30, "dtype object; expected integers"),
    ],
    ids=str,
)
def test_lengths_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^key_lengths: {message}"):
        scores_of(batch=(2,), key_lengths=given)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (True, TypeError, "dtype bool; expected real numbers, one for each query head"),
        ([1j], TypeError, "dtype complex128; expected real numbers"),
        ("0.5", TypeError, "dtype <U3; expected real numbers"),
        (np.zeros(3, np.longdouble), TypeError, "dtype .*; expected real numbers"),
        (np.ma.array([0.5] * 3), TypeError, "a numpy.ma.MaskedArray"),
        ([0.5, np.nan, 1], ValueError, "nan is among them; expected finite numbers"),
        (-np.inf, ValueError, "-inf is among them; expected finite numbers"),
        (
            [0.5] * 4,
            ValueError,
            r"shape \(4,\); expected one that broadcasts to \(2, 3\), the shape of the query heads",
        ),
        (np.ones((1, 1, 3)), ValueError, r"shape \(1, 1, 3\); expected one that broadcasts to \(2, 3\)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_slopes_that_are_refused(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^alibi_slopes: .*{message}"):
        scores_of(batch=(2,), heads=3, alibi_slopes=given)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ([1j], TypeError, "dtype complex128; expected real numbers"),
        ([True] * 3, TypeError, "dtype bool; expected real numbers"),
        (np.zeros(3, np.longdouble), TypeError, "dtype .*; expected real numbers"),
        (
            [0.5] * 4,
            ValueError,
            r"shape \(4,\); expected one that broadcasts to \(2, 3\), the shape of the query heads",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_sinks_that_are_refused(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^sinks: .*{message}"):
        scores_of(batch=(2,), heads=3, sinks=given)


@pytest.mark.parametrize("given", [0, 2, [1, 2]])
def test_an_offset_and_bottom_right_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="^query_offset: given together with is_causal='bottom-right', which sets it"):
        scores_of(batch=(2,), is_causal="bottom-right", query_offset=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((KEEP, BIAS), "a pair of dtypes bool, float64; expected \\(bias, keep\\), a floating and a boolean array"),
        ((BIAS, BIAS[0]), "a pair of dtypes float64, float64; expected"),
        ((KEEP[0], KEEP), "a pair of dtypes bool, bool; expected"),
        ((None, BIAS), "a pair of dtypes None, float64; expected"),
        ((KEEP, None), "a pair of dtypes bool, None; expected"),
        ((BIAS, KEEP[0].astype(int)), "dtype int64 could mean two things"),
        ((BIAS.astype(complex), KEEP), "dtype complex128 is not supported"),
        ((BIAS, "no"), "dtype <U2 is not supported"),
        ((np.ma.array(BIAS), KEEP), "a numpy.ma.MaskedArray"),
    ],
)
def test_pairs_of_masks_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^attn_mask: {message}"):
        as_operands(np.zeros((5, 3)), np.zeros((7, 3)), np.zeros((7, 3)), given)


@pytest.mark.parametrize("which", [0, 1])
def test_each_mask_of_a_pair_broadcasts_to_the_scores(which: int) -> None:
    pair = [BIAS, KEEP]
    pair[which] = pair[which].T
    with pytest.raises(ValueError, match=r"^attn_mask: shape \(7, 5\); expected one that broadcasts to \(5, 7\)"):
        fastattn.attention(np.zeros((5, 3)), np.zeros((7, 3)), np.zeros((7, 3)), tuple(pair))


def test_two_rows_of_a_mask_are_no_pair() -> None:
    query, key = np.zeros((2, 3)), np.zeros((2, 3))
    for rows in ((BIAS[0, :2], BIAS[1, :2]), ([True, False], [True, True]), ((0.0, 1.0), (2.0, 3.0)), (0.5, 0.25)):
        mask = as_operands(query, key, key, rows)[3]
        assert isinstance(mask, np.ndarray)
        np.testing.assert_array_equal(mask, np.array(rows))


# -- in every function -------------------------------------------------------------------------------------------------


def functions() -> dict[str, Any]:
    """Return every function that takes these options, of nothing but them."""
    query, key, value, weight = np.zeros((2, 1, 5, 3)), np.zeros((2, 1, 7, 3)), np.zeros((2, 1, 7, 4)), np.zeros(3)
    out, lse = np.zeros((2, 1, 5, 4)), np.zeros((2, 1, 5))
    return {
        "attention": lambda **o: fastattn.attention(query, key, value, **o),
        "attention_backward": lambda **o: fastattn.attention_backward(out, query, key, value, out, lse, **o),
        "attention_weights": lambda **o: fastattn.attention_weights(query, key, **o),
        "attention_summary": lambda **o: fastattn.attention_summary(query, key, **o),
        "additive_attention": lambda **o: fastattn.additive_attention(query, key, value, weight, **o),
        "additive_attention_backward": lambda **o: fastattn.additive_attention_backward(
            out, query, key, value, weight, out, lse, **o
        ),
    }


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize("name", functions())
def test_every_function_takes_and_refuses_the_same(name: str, backend: str | None) -> None:
    call = functions()[name]
    call(window=(3, None), query_offset=[1, -1], key_lengths=np.array([3, 7]), softcap=2, backend=backend)
    call(attn_mask=(BIAS, KEEP), is_causal="bottom-right", key_lengths=5, backend=backend)
    for wrong, kind in (
        ({"window": 3}, TypeError),
        ({"window": (3, -1)}, ValueError),
        ({"query_offset": 1.5}, TypeError),
        ({"query_offset": [1, 2, 3]}, ValueError),
        ({"key_lengths": 8}, ValueError),
        ({"key_lengths": [1.0, 2.0]}, TypeError),
        ({"softcap": 0}, ValueError),
        ({"softcap": "2"}, TypeError),
        ({"attn_mask": (KEEP, BIAS)}, TypeError),
    ):
        with pytest.raises(kind, match=f"^{next(iter(wrong))}: .*expected"):
            call(**wrong, backend=backend)
    with pytest.raises(ValueError, match="^query_offset: "):
        call(query_offset=0, is_causal="bottom-right", backend=backend)
