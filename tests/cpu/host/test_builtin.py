"""How a call reaches compiled code: what it reads of objects."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.api import additive
from fastattn.api import attention as api
from fastattn.call.halves import BITS, cast
from fastattn.cpu.host import builtin, calls, session
from fastattn.cpu.kernels.entry import MOST_OBJECTS
from fastattn.cpu.kernels.records import PLAN
from fastattn.machine.table import host


def inputs(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal((3, *shape), dtype=np.float32)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Forget what is known about calls; return the plans that are made from now on."""
    monkeypatch.setattr(session.current, "plans", session.Plans())
    return session.current.plans


# -- builtins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2, 5, 8), (2, 4, 300, 64)], ids=["one call", "in tasks"])
def test_where_objects_look_different_there_are_no_builtins(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, plans: dict[Any, Any]
) -> None:
    query, key, value = inputs(*shape)
    mask = np.random.default_rng(1).random(shape[-2:-1]) < 0.8

    def results() -> list[Any]:
        weighted = fastattn.attention(query, key, value, mask, return_lse=True, return_weights=True)
        dropped = fastattn.attention(query, key, value, dropout_p=0.5, rng=2**64 - 1)
        weight = query[0, 0, 0]
        return [
            fastattn.attention(query, key, value),
            fastattn.attention(query, key, value),  # known by now
            dropped,
            *weighted,
            fastattn.additive_attention(query, key, value, weight),
            fastattn.additive_attention(query, key, value, weight),
        ]

    wanted = results()
    assert builtin.objects_are_as_expected()
    assert all(plan.calls.shared for plan in plans.values())
    plans.clear()
    calls.calls_of.cache_clear()
    for module in (calls, builtin):
        monkeypatch.setattr(module, "objects_are_as_expected", lambda: False)
    signatures = builtin.Signatures()
    for module in (api, additive):
        monkeypatch.setattr(module, "signatures", signatures)
    for array, other in zip(results(), wanted, strict=True):
        np.testing.assert_array_equal(array, other)
    assert not any(plan.calls.shared for plan in plans.values())
    calls.calls_of.cache_clear()
    assert isinstance(signatures.of(query), tuple)


class Subclass(np.ndarray[Any, Any]):
    pass


def test_signatures_tell_apart_what_plans_depend_on() -> None:
    array = np.zeros((4, 6), np.float32)
    different = [
        array,
        array.T,
        array[:2],
        array[:, ::2],
        array[:, ::-1],
        array[None],
        array.reshape(6, 4),
        array.astype(np.float64),
        array.astype(">f4"),
        array.astype(np.int32),
        array.astype(np.uint32),
        array.astype(np.float16),
        np.zeros((), np.float32),
        np.zeros((4, 0), np.float32),
        np.broadcast_to(array[:1], (4, 6)),
        np.zeros((1,) * 32, np.float32),
        array.astype(np.uint16).view(BITS),
        array.astype(np.uint16).view([("other", np.uint16)]),
        None,
    ]
    of = builtin.signatures.of
    found = {(of(a, array), of(array, a)) for a in different}
    assert len(found) == len(different)
    assert len({of(None, array), of(array, None), of(array), of(array, array), of()}) == 5
    again = pickle.loads(pickle.dumps(array))
    assert of(again, array.T.copy().T) == of(array, array.T.copy().T)


@pytest.mark.skipif(int(np.__version__.partition(".")[0]) < 2, reason="this NumPy has 32 axes at most")
def test_an_array_of_very_many_axes_has_no_signature() -> None:
    array = np.zeros((1,) * 33, np.float32)
    assert builtin.signatures.of(array, array) == b""
    assert builtin.signatures.of(array[0], array[0]) != b""


def test_every_argument_may_be_an_array_of_many_axes() -> None:
    array = np.zeros((1,) * 32, np.float32)
    assert len(builtin.signatures.of(*[array] * MOST_OBJECTS)) == MOST_OBJECTS * (3 + 2 * 32) * 8
    names = ("dropout_p", "scale", "softcap", "is_causal", "enable_gqa", "return_lse")
    numbers = dict.fromkeys(("query_offset", "key_lengths", "alibi_slopes", "sinks"), array)
    with pytest.raises(TypeError):
        fastattn.attention(array, array, array, array, **dict.fromkeys(names, array), **numbers, window=(array, array))


def test_signatures_tell_options_apart() -> None:
    array = np.zeros((2, 3), np.float32)
    options = [None, False, True, 0, 1, -1, 2, 2**63 - 1, -(2**63), 0.0, -0.0, 1.0, -1.0, 0.5, np.inf, array]
    of = builtin.signatures.of
    assert len({(of(array, option), of(option, array)) for option in options}) == len(options)
    assert len({builtin._described(option) for option in (None, False, 0, 0.0, True, 1, 1.0, array)}) == 8


def test_what_is_neither_has_no_signature() -> None:
    array = np.zeros((2, 3), np.float32)
    others = (
        array.view(Subclass),
        np.ma.masked_array(array),
        [[1.0]],
        (1, 2),
        np.float64(3),
        np.True_,
        "text",
        object(),
    )
    for other in (*others, type, 1j):
        assert builtin.signatures.of(array, other) == b""
        assert builtin._described(array, other) == b""
    for other in (2**63, -(2**63) - 1, 10**30):
        assert builtin.signatures.of(array, other) == b""


@pytest.mark.parametrize(
    "same",
    [
        {"scale": 1},
        {"scale": np.float64(0.5)},
        {"scale": np.float32(0.5), "softcap": np.float32(2)},
        {"is_causal": np.True_},
        {"is_causal": "bottom-right"},
        {"backend": "cpu"},
        {"return_lse": True},
        {"window": (2, None)},
        {"window": (np.int64(2), 0), "query_offset": np.int32(1)},
        {"dropout_p": 0},
        {"enable_gqa": np.False_},
    ],
    ids=str,
)
def test_a_call_like_an_earlier_one_is_not_described_again(
    same: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = inputs(1, 2, 9, 8)
    out = np.empty_like(query)
    wanted = fastattn.attention(query, key, value, **same)
    fastattn.attention(query, key, value, **same, out=out)
    monkeypatch.setattr("fastattn.api.attention.describe", None)
    np.testing.assert_array_equal(fastattn.attention(query, key, value, **same)[0], wanted[0])
    np.testing.assert_array_equal(fastattn.attention(query, key, value, **same, out=out)[0], wanted[0])


def test_bits_of_bfloat16_are_known_again_and_no_other_structures(
    monkeypatch: pytest.MonkeyPatch, plans: dict[Any, Any]
) -> None:
    query, key, value = (cast(x, BITS) for x in inputs(1, 2, 9, 8))
    wanted = fastattn.attention(query, key, value)
    same, other = ([x.view([(name, np.uint16)]) for x in (query, key, value)] for name in ("bfloat16", "other"))
    assert same[0].dtype is not BITS
    fastattn.attention(*same)
    assert len(plans) == 2  # one by what it is, and one by what was asked, with `BITS` itself
    monkeypatch.setattr("fastattn.api.attention.describe", None)
    assert fastattn.attention(query, key, value).tobytes() == wanted.tobytes()
    with pytest.raises(TypeError, match="query"):
        fastattn.attention(*other)


def test_offsets_of_rows_are_those_of_each_call() -> None:
    """An array of them has a shape and a dtype, as others have: that is not what a call is known by."""
    query, key, value = inputs(2, 1, 9, 8)
    weight = query[0, 0, 0]
    for dtype in (np.int64, np.int32):
        for offsets in ([0, 3], [5, 1], [-2, 9], [0, 3]):
            for given in (np.array(offsets, dtype), offsets, np.array(offsets[0], dtype), dtype(offsets[1])):
                options: dict[str, Any] = {"is_causal": True, "query_offset": given}
                wanted = fastattn.attention(query, key, value, **options, backend="reference")
                np.testing.assert_allclose(fastattn.attention(query, key, value, **options), wanted, atol=1e-6)
                wanted = fastattn.additive_attention(query, key, value, weight, **options, backend="reference")
                found = fastattn.additive_attention(query, key, value, weight, **options)
                np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"is_causal": True}, {"is_causal": 1}),
        ({"is_causal": False}, {"is_causal": 0.0}),
        ({"scale": 1.0}, {"scale": True}),
        ({"enable_gqa": True}, {"enable_gqa": 1}),
        ({"window": (1, 0)}, {"window": (True, False)}),
        ({"query_offset": 1}, {"query_offset": True}),
        ({"query_offset": 1}, {"query_offset": 1.0}),
        ({"return_lse": True}, {"return_lse": 1}),
        ({"is_causal": "bottom-right"}, {"is_causal": None}),
    ],
    ids=str,
)
def test_a_call_that_is_only_equal_to_an_earlier_one_is_refused(right: dict[str, Any], wrong: dict[str, Any]) -> None:
    query, key, value = inputs(1, 2, 9, 8)
    fastattn.attention(query, key, value, **right)
    fastattn.attention(query, key, value, **right)
    with pytest.raises(TypeError, match=next(iter(wrong))):
        fastattn.attention(query, key, value, **wrong)


def test_a_read_only_out_is_refused_after_calls_that_were_right() -> None:
    query, key, value = inputs(2, 5, 8)
    pages, table, lengths = key[:, :, None], np.arange(2)[:, None], np.array([5, 3])
    for call in (
        lambda out: fastattn.attention(query, key, value, out=out),
        lambda out: fastattn.additive_attention(query, key, value, query[0, 0], out=out),
        lambda out: fastattn.attention_paged(query[:, :, None], pages, pages, table, lengths, out=out[:, :, None]),
    ):
        out, frozen = np.zeros_like(query), np.zeros_like(query)
        frozen.flags.writeable = False
        for _ in range(2):
            call(out)
        assert out.any()
        with pytest.raises(ValueError, match="out: the array is read-only"):
            call(frozen)
        assert not frozen.any()


def test_builtins_take_seeds_of_64_bits(plans: dict[Any, Any]) -> None:
    query, key, value = inputs(1, 2, 9, 8)
    for seed in (0, 1, 2**63, 2**64 - 1):
        out, weights = fastattn.attention(query, key, value, dropout_p=0.5, rng=seed, return_weights=True)
        alone = fastattn.attention(query, key, value, dropout_p=0.5, rng=seed)
        np.testing.assert_array_equal(alone, out)
        np.testing.assert_allclose(weights @ value, out, rtol=1e-5, atol=1e-6)


# -- options that are arrays, and functions ----------------------------------------------------------------------------


def decoding(batch: int = 3, heads: int = 4, keys: int = 40) -> Any:
    """Return query, key and value of one decoded token."""
    rng = np.random.default_rng(0)
    shapes = (batch, heads, 1, 8), *[(batch, heads, keys, 8)] * 2
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def of_both(*args: Any, **options: Any) -> bytes:
    return b"".join(array.tobytes() for array in fastattn.attention(*args, **options, return_lse=True))


def twice(monkeypatch: pytest.MonkeyPatch, arrays: Any, first: Any, then: Any, **options: Any) -> None:
    """Call with some options, then with others like these, which have the results of a call that is described."""
    wanted = of_both(*arrays, **then, **options)
    session.current.plans.clear()
    of_both(*arrays, **first, **options)
    with monkeypatch.context() as context:
        context.setattr("fastattn.api.attention.describe", None)
        assert of_both(*arrays, **then, **options) == wanted


KINDS_OF_NUMBERS = [
    {"key_lengths": np.array([40, 7, 0])},
    {"key_lengths": np.array([40, 7, 0], np.uint8), "is_causal": "bottom-right"},
    {"key_lengths": np.array(13), "window": (5, 0), "query_offset": np.array([3, -2, 60], np.int16), "is_causal": True},
    {"query_offset": np.array([3, -2, 60])[::-1], "is_causal": True},
    {"query_offset": np.array([-(2**63), 2**63 - 1, 5]), "window": (3, 3)},
    {"query_offset": np.array([3, 2, 60], np.uint32)},  # which changes nothing
    {"sinks": np.array([-1.0, 2.0, -np.inf, 1e300])},
    {"sinks": np.array([-1.0, 2.0, np.inf, np.nan], np.float16)},
    {"sinks": np.arange(12, dtype=np.int8).reshape(3, 4) - 6, "alibi_slopes": np.array([1, -2, 3, 2**40])},
    {"sinks": np.float32(0.5) * np.ones(1, np.float32), "alibi_slopes": np.linspace(0, 1, 8)[::2]},
    {"alibi_slopes": np.array([6e-8, -6.1e-5, 65504, 0.3], np.float16), "query_offset": np.array([50])},
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", KINDS_OF_NUMBERS, ids=lambda options: " ".join(options))
def test_numbers_of_heads_are_those_of_each_call(
    options: dict[str, Any], dtype: Any, monkeypatch: pytest.MonkeyPatch, plans: dict[Any, Any]
) -> None:
    arrays = [x.astype(dtype) for x in decoding()]
    others = {name: np.zeros_like(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    for name, x in options.items():
        if isinstance(x, np.ndarray):  # laid out as the other is
            others[name] = np.lib.stride_tricks.as_strided(np.zeros(64, x.dtype)[32:], x.shape, x.strides)
    twice(monkeypatch, arrays, others, options)


def test_numbers_of_heads_in_bfloat16(monkeypatch: pytest.MonkeyPatch, plans: dict[Any, Any]) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    sinks, slopes = np.array([[1.5, -np.inf, 3e38, np.nan], [0.1, 0.2, 0.3, 1e-40]]).astype(bfloat16)
    options = {"sinks": sinks, "alibi_slopes": slopes}
    twice(monkeypatch, decoding(), {name: np.zeros_like(x) for name, x in options.items()}, options)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ({"key_lengths": np.array([1, 2, 3])}, {"key_lengths": np.array([1, -2, 3])}, "key_lengths: -2 to 3"),
        ({"key_lengths": np.array([1, 2, 40])}, {"key_lengths": np.array([1, 2, 41])}, "key_lengths: 1 to 41"),
        ({"key_lengths": np.array([1, 2, 3], np.int8)}, {"key_lengths": np.array([1, 2, 99], np.int8)}, "1 to 99"),
        ({"alibi_slopes": np.ones(4)}, {"alibi_slopes": np.array([0, 1, np.inf, 3])}, "alibi_slopes: inf"),
        ({"alibi_slopes": np.ones(4)}, {"alibi_slopes": np.array([0, 1, 2, np.nan])}, "alibi_slopes: nan"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_numbers_out_of_range_are_refused_by_name_after_calls_that_were_right(
    right: Any, wrong: Any, message: str
) -> None:
    arrays = decoding()
    for _ in range(2):
        fastattn.attention(*arrays, **right)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            fastattn.attention(*arrays, **wrong)
    fastattn.attention(*arrays, **right)


def test_what_is_no_array_of_such_numbers_is_looked_at_each_time(plans: dict[Any, Any]) -> None:
    arrays = decoding()
    for given in ([40, 3, 1], 7, np.array([1, 2, 3], ">i8"), np.array([1, 2, 3], np.uint64)):
        wanted = of_both(*arrays, key_lengths=np.broadcast_to(given, 3).astype(np.int64))
        assert of_both(*arrays, key_lengths=given) == of_both(*arrays, key_lengths=given) == wanted
    for wrong in (True, np.array([1.0, 2, 3]), np.array(["1"]), np.ma.masked_array([1, 2, 3])):
        with pytest.raises(TypeError, match="key_lengths"):
            fastattn.attention(*arrays, key_lengths=wrong)


def test_what_functions_capture_is_that_of_each_call(monkeypatch: pytest.MonkeyPatch, plans: dict[Any, Any]) -> None:
    table, last, here = np.linspace(0, 1, 40), 30, 0.5

    def score(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + here * np.sqrt(table[key]) + head

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key < last

    def found() -> bytes:
        return of_both(*decoding(), score_mod=score, mask_mod=seen)

    found()
    for change in range(4):
        if change == 0:
            table[3] = 7
        elif change == 1:
            table = np.arange(80.0)[::2]
        elif change == 2:
            last = 11
        else:
            here = -0.25
        with monkeypatch.context() as context:
            context.setattr("fastattn.api.attention.describe", None)
            quick = found()
        session.current.plans.clear()
        assert found() == quick
    last = 12.5  # type: ignore[assignment]  # of another kind: described, and then known
    wanted = of_both(*decoding(), np.arange(40) < last, score_mod=score)
    assert found() == wanted
    monkeypatch.setattr("fastattn.api.attention.describe", None)
    assert found() == wanted


def test_functions_of_the_same_code_are_known_by_what_stands_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def window(size: Any) -> Any:
        return lambda batch, head, query, key: key >= size

    wanted = {size: of_both(*decoding(), np.arange(40) >= size) for size in (3, 8, 20)}
    of_both(*decoding(), mask_mod=window(5))
    monkeypatch.setattr("fastattn.api.attention.describe", None)
    for size, result in wanted.items():
        assert of_both(*decoding(), mask_mod=window(size)) == result


def helper(number: Any) -> Any:
    return 2 * number


def test_functions_that_call_others_are_described_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return helper(score)

    first = of_both(*decoding(), score_mod=score)
    assert of_both(*decoding(), score_mod=score) == first
    monkeypatch.setitem(globals(), "helper", lambda number: 3 * number)
    assert of_both(*decoding(), score_mod=score) != first


def test_a_function_that_reads_out_of_range_is_refused_after_calls_in_which_it_did_not() -> None:
    table = np.zeros(40)

    def score(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[key]

    for _ in range(2):
        fastattn.attention(*decoding(), score_mod=score)
    table = np.zeros(39)
    with pytest.raises(IndexError, match="score"):
        fastattn.attention(*decoding(), score_mod=score)
    table = np.zeros((40, 1))  # which has one axis more
    with pytest.raises(TypeError):
        fastattn.attention(*decoding(), score_mod=score)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_asking_ahead_changes_nothing(
    threads: int, causal: bool, monkeypatch: pytest.MonkeyPatch, plans: dict[Any, Any]
) -> None:
    query, key, value = inputs(3, 5, 70, 40)
    key, value = key[:, ::-1], value[..., ::-1, :]  # the next head is before this one, the next key as well
    with fastattn.num_threads(threads):
        wanted = fastattn.attention(query, key, value, is_causal=causal)
        row = replace(host(), blocking=replace(host().blocking, cached_bytes=0))  # as for a large call
        monkeypatch.setattr(session.current, "_row", row)
        plans.clear()
        np.testing.assert_array_equal(fastattn.attention(query, key, value, is_causal=causal), wanted)
        record = next(iter(plans.values())).record
        assert record[: PLAN.itemsize].view(PLAN)["prefetch_distance"][0] == threads


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("lanes", ["here", "sixteen"])
def test_keys_and_values_may_lie_anyhow(lanes: str, dtype: Any, causal: bool, request: pytest.FixtureRequest) -> None:
    """Rows next to each other, far apart, not contiguous, in reverse, all the same: the same bits."""
    if lanes == "sixteen":
        request.getfixturevalue("sixteen_lanes")
    query, key, value = (x.astype(dtype) for x in inputs(1, 2, 150, 37))

    def far(x: Any) -> Any:
        wide = np.full((1, 2, 150, 1200), np.nan, dtype)
        wide[..., 5:42] = x
        return wide[..., 5:42]

    def strided(x: Any) -> Any:
        wide = np.full((1, 2, 150, 37, 3), np.nan, dtype)
        wide[..., 1] = x
        return wide[..., 1]

    layouts = (
        far,
        strided,
        lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
        lambda x: np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2),
        lambda x: np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :],
        lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    )
    wanted = fastattn.attention(query, key, value, is_causal=causal, return_lse=True)
    np.testing.assert_allclose(wanted[0], fastattn.reference.attention(query, key, value, is_causal=causal), atol=1e-5)
    received = fastattn.attention_summary(query, key, is_causal=causal).received
    for of_keys in layouts:
        for of_values in layouts[:3]:
            found = fastattn.attention(query, of_keys(key), of_values(value), is_causal=causal, return_lse=True)
            for array, other in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(array, other)
        again = fastattn.attention_summary(query, of_keys(key), is_causal=causal).received
        np.testing.assert_array_equal(again, received)
    same = np.broadcast_to(key[..., :1, :], key.shape), np.broadcast_to(value[..., :1, :], value.shape)
    expected = fastattn.attention(query, *map(np.ascontiguousarray, same), is_causal=causal)
    np.testing.assert_array_equal(fastattn.attention(query, *same, is_causal=causal), expected)
