"""Additive attention: the formula against PyTorch, the kernels against the formula; Bahdanau's layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import processes
import pytest
import tolerances
from additive_cases import ANY_DTYPE, additive_calls, check_calls, inputs, rows_of_a_batch
from hypothesis import given
from hypothesis import strategies as st
from rows import on_other_rows
from strategies import (
    LAYOUTS,
    Call,
    each,
    laid_out,
    layouts,
    numbers,
)

import fastattn
from fastattn import BahdanauAttention, additive_attention, reference
from fastattn.call.shapes import describe_additive
from fastattn.cpu.host import forward, pool
from fastattn.cpu.host.kernels import describe
from fastattn.cpu.kernels import catalogue
from fastattn.machine import libraries as kernels
from fastattn.machine import table as isa

Array = np.ndarray[Any, Any]
ANY_QUERIES = pytest.mark.parametrize("queries", [1, 3, 40])  # features in the lanes, or queries


@pytest.fixture(autouse=True)
def _share_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small calls be shared between threads as well."""
    for name in ("WORTH_SHARING", "WORTH_WAKING"):
        monkeypatch.setattr(pool, name, 1)


def attend(query: Any, key: Any, value: Any, mask: Any = None, *, weight: Any, rng: Any = None, **options: Any) -> Any:
    """Call the kernels, with the arguments as the tests of attention have them."""
    return additive_attention(query, key, value, weight, mask, **options, backend="cpu")


def formula(query: Array, key: Array, value: Array, weight: Array) -> Any:
    """Return PyTorch's result of the broadcasting form, in float64."""
    torch = pytest.importorskip("torch")
    q, k, v, w = (torch.from_numpy(np.asarray(array, np.float64)) for array in (query, key, value, weight))
    scores = (w * torch.tanh(q[..., :, None, :] + k[..., None, :, :])).sum(-1)
    return (scores.softmax(-1) @ v).numpy(), scores.logsumexp(-1).numpy(), scores.softmax(-1).numpy()


# -- the meaning -------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, weight = inputs(np.float64, 3, 5, 7, 11)
    wanted = formula(query, key, value, weight)
    for elements in (1 << 20, 1, 500):  # all features at a time, one, and some
        monkeypatch.setattr(reference.forward, "SUM_ELEMENTS", elements)
        results = reference.additive_attention(query, key, value, weight, return_lse=True, return_weights=True)
        for result, want in zip(results, wanted, strict=True):
            np.testing.assert_allclose(result, want, rtol=0, atol=1e-14)


def test_a_score_by_hand() -> None:
    query, key, value = np.array([[0.5]]), np.array([[0.25], [-2.0]]), np.array([[1.0], [3.0]])
    scores = 4 * np.tanh([0.75, -1.5])
    weights = np.exp(scores) / np.exp(scores).sum()
    for backend in ("reference", "cpu"):
        out, lse, given = additive_attention(
            query, key, value, [4.0], return_lse=True, return_weights=True, backend=backend
        )
        np.testing.assert_allclose(given[0], weights, rtol=1e-14)
        np.testing.assert_allclose(out[0, 0], weights @ [1, 3], rtol=1e-14)
        np.testing.assert_allclose(lse[0], np.log(np.exp(scores).sum()), rtol=1e-14)


@ANY_DTYPE
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("queries", [1, 3, 70])
@pytest.mark.parametrize("softcap", [None, 0.5, 4.0])
@pytest.mark.parametrize("slope", [None, 0.03])
def test_windows_lengths_softcaps_slopes_and_pairs_of_masks_by_the_formula(
    backend: str, dtype: Any, queries: int, softcap: float | None, slope: float | None
) -> None:
    query, key, value, weight = rows_of_a_batch(dtype, 2, queries, 150, 24)
    bias, keep = numbers(np.random.default_rng(0), (queries, 150), dtype), np.arange(150) % 5 != 3
    positions, keys, lengths = np.arange(queries)[:, None] + 60, np.arange(150), [131, 140]
    visible = (
        (keys >= positions - 40) & (keys <= positions + 6) & (keys < np.array(lengths)[:, None, None, None]) & keep
    )
    scores = (weight * np.tanh(query[..., :, None, :] + key[..., None, :, :]).astype(np.float64)).sum(-1)
    scores = (scores if softcap is None else softcap * np.tanh(scores / softcap)) + bias
    scores = scores - (slope or 0) * np.abs(positions - keys)
    weights = np.where(visible, np.exp(scores), 0)
    wanted = weights / weights.sum(-1, keepdims=True)
    out, lse, found = additive_attention(
        query,
        key,
        value,
        weight,
        (bias, keep),
        window=(40, 6),
        query_offset=60,
        key_lengths=lengths,
        softcap=softcap,
        alibi_slopes=slope,
        return_lse=True,
        return_weights=True,
        backend=backend,
    )
    limit = 1e-5 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(found, wanted, rtol=0, atol=limit)
    np.testing.assert_allclose(out, wanted @ value.astype(np.float64), rtol=0, atol=5 * limit)
    np.testing.assert_allclose(lse, np.log(weights.sum(-1)), rtol=limit, atol=limit)
    np.testing.assert_array_equal(found != 0, visible)


@ANY_DTYPE
@pytest.mark.parametrize("features", [0, 5])
@pytest.mark.parametrize("softcap", [5e-324, 1e-40, 1e-18, 1e18, 1e40, 1.7e308])
def test_a_softcap_is_any_finite_number_above_0(dtype: Any, features: int, softcap: float) -> None:
    query, key, value, weight = inputs(dtype, 2, 40, 70, features)
    out, lse, _ = tolerances.check_call(attend, query, key, value, weight=weight, softcap=softcap)
    other = weight * 0 if softcap < 1 else weight
    wanted = additive_attention(query, key, value, other, return_lse=True)
    for found, want in zip((out, lse), wanted, strict=True):
        np.testing.assert_allclose(found, want, rtol=0, atol=5e-6 if dtype == np.float32 else 1e-14)


# -- how exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "limit"), [(1, 2e-5), (100, 2e-4), (10, 2e-4), (1e30, 2e-4)])
def test_errors_in_float32(size: float, limit: float) -> None:
    query, key, value, weight = inputs(np.float32, 4, 256, 256, 256, size)
    out = additive_attention(query, key, value, weight)
    some = slice(None, None, 8)  # the formula takes its time
    assert np.abs(out[:, some] - formula(query[:, some], key, value, weight)[0]).max() <= limit


@pytest.mark.parametrize("size", [1, 30, 1e5])
@ANY_QUERIES
def test_errors_in_float64(queries: int, size: float) -> None:
    query, key, value, weight = inputs(np.float64, 2, queries, 70, 256, size)
    out = additive_attention(query, key, value, weight)
    assert np.abs(out - formula(query, key, value, weight)[0]).max() <= 1e-12


@ANY_DTYPE
@ANY_QUERIES
def test_sums_at_and_beyond_the_reach_of_denominators(dtype: Any, queries: int) -> None:
    # far from 0, but next to each other: all that a tanh near 0 depends on is lost if one of the two saturates
    info = np.finfo(dtype)
    reach = 21.0 if dtype == np.float32 else 170.0
    rng = np.random.default_rng(0)
    for far in (reach / 2 - 1, reach / 2 + 1, reach - 1, reach, 2 * reach, 44, 89, 360, 710, 1e4, float(info.max) / 4):
        near = rng.uniform(-1, 1, (1, 9, 5))
        query = np.full((1, queries, 5), far).astype(dtype)
        key = (near - far).astype(dtype)
        value = numbers(rng, (1, 9, 2), dtype)
        tolerances.check_call(attend, query, key, value, weight=numbers(rng, (5,), dtype))
        tolerances.check_call(attend, -query, key, value, weight=numbers(rng, (5,), dtype, 40))
        # a large denominator and a small one: their product overflows, and the small one matters
        mixed_query, mixed_key = query.copy(), -key
        mixed_query[..., 1::2] = mixed_key[..., 1::2] = 1.5
        tolerances.check_call(attend, mixed_query, mixed_key, value, weight=numbers(rng, (5,), dtype))
        tolerances.check_call(attend, key, np.broadcast_to(query[:, :1], key.shape), value, weight=np.ones(5, dtype))


@ANY_DTYPE
@ANY_QUERIES
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 100.0, 1e20, 1e35])
def test_weights_of_any_size(dtype: Any, queries: int, size: float) -> None:
    query, key, value, weight = inputs(dtype, 1, queries, 33, 6)
    tolerances.check_call(attend, query, key, value, weight=(weight * dtype(size)).astype(dtype))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@ANY_QUERIES
def test_what_is_not_finite(queries: int, odd: float) -> None:
    for features in (1, 6, 70):
        for place in range(4):
            arrays = inputs(np.float32, 1, queries, 33, features)
            arrays[place][..., features // 2] = odd
            arrays[place][..., -1] = odd
            query, key, value, weight = arrays
            tolerances.check_call(attend, query, key, value, weight=weight)
            if place < 2:
                arrays[place][..., : arrays[place].shape[-2] // 2, :] = 0.5
                tolerances.check_call(attend, query, key, value, weight=weight)


# -- whole calls -------------------------------------------------------------------------------------------------------


def check(call: Call) -> None:
    """Assert that a call is right, that it changed nothing, and gives the same when less is asked for."""
    before = call.bits
    out, lse, _ = tolerances.check_call(attend, *call.args, **call.options)
    assert call.bits == before
    assert attend(*call.args, **call.options).tobytes() == out.tobytes()
    assert attend(*call.args, **call.options, return_lse=True)[1].tobytes() == lse.tobytes()


@given(call=additive_calls())
def test_any_call(call: Call) -> None:
    check(call)


@given(call=additive_calls(odd=True))
def test_values_that_are_not_finite(call: Call) -> None:
    check(call)


@given(call=additive_calls(odd=True, any_layout=False), names=st.tuples(*[layouts] * 5), threads=st.integers(1, 5))
def test_the_same_bits_in_any_layout_and_at_any_thread_count(call: Call, names: Any, threads: int) -> None:
    wanted = attend(*call.args, **call.options, return_lse=True, return_weights=True)
    given = (*call.args, call.options["weight"])
    *moved, weight = (each(partial(laid_out, layout=name), a) for a, name in zip(given, names, strict=True))
    with fastattn.num_threads(threads):
        results = attend(*moved, **call.options | {"weight": weight}, return_lse=True, return_weights=True)
    for result, want in zip(results, wanted, strict=True):
        assert result.tobytes() == want.tobytes()


@given(call=additive_calls(any_layout=False), data=st.data())
def test_out_anywhere(call: Call, data: st.DataObject) -> None:
    wanted = attend(*call.args, **call.options)
    names = [name for name in LAYOUTS if name not in ("read-only", "byte-swapped")]
    out = laid_out(np.full_like(wanted, np.nan), data.draw(st.sampled_from(names), label="layout of out"))
    assert attend(*call.args, **call.options, out=out) is out
    assert out.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("place", range(4))
@ANY_QUERIES
def test_out_over_an_input(queries: int, place: int) -> None:
    query, key, value, weight = inputs(np.float32, 1, queries, queries, 16)
    wanted = additive_attention(query, key, value, weight)
    memory = np.zeros(4 * query.size + 16, np.float32)
    # all four beside each other, and out over one of them and a part of its neighbours
    views, at = [], 0
    for array in (query, key, value, weight):
        view = memory[at : at + array.size].reshape(array.shape)
        view[...] = array
        views.append(view)
        at += array.size
    start = min(place * query.size + 3 * (place > 0), memory.size - query.size)
    out = memory[start : start + query.size].reshape(query.shape)
    assert additive_attention(*views, out=out) is out
    assert out.tobytes() == wanted.tobytes()


def test_calls_like_earlier_ones() -> None:
    for mask in (None, np.tri(20, 30, dtype=bool)):
        for seed in range(3):  # the second finds the plan of the first, and has other numbers
            rng = np.random.default_rng(seed)
            query, key, value, weight = (numbers(rng, n, np.float32) for n in ((20, 8), (30, 8), (30, 4), (8,)))
            wanted = attend(query, key, value, mask, weight=weight, return_lse=True)
            results = additive_attention(query, key, value, weight, mask, return_lse=True)
            assert [a.tobytes() for a in results] == [a.tobytes() for a in wanted]
            strided = np.repeat(weight, 2)[::2]
            assert additive_attention(query, key, value, strided, mask).tobytes() == wanted[0].tobytes()
            wide = additive_attention(query, key, value, weight.astype(np.float64), mask)
            assert wide.dtype == np.float64


# -- the promises of attention -----------------------------------------------------------------------------------------


@ANY_QUERIES
def test_a_row_of_a_batch_is_the_call_on_that_row(queries: int) -> None:
    query, key, value, weight = inputs(np.float32, 7, queries, 50, 20, 9.0)
    out = additive_attention(query, key, value, weight)
    for row in range(7):
        alone = additive_attention(query[row], key[row], value[row], weight)
        assert alone.tobytes() == out[row].tobytes()


@pytest.mark.parametrize("odd", [np.nan, np.inf, 1e30, 25.0])
@ANY_QUERIES
@ANY_DTYPE
def test_nothing_masked_leaks(dtype: Any, queries: int, odd: float) -> None:
    # 25 and 1e30 are out of reach: neighbours in the same panel are computed as before all the same
    query, key, value, weight = inputs(dtype, 2, queries, 70, 24)
    mask = np.random.default_rng(1).random((2, 1, 70)) < 0.6
    bias = np.where(mask, 0.25, -np.inf)
    for given_mask in (mask, bias):
        clean = additive_attention(query, key, value, weight, given_mask, return_lse=True)
        dirty_key, dirty_value = key.copy(), value.copy()
        dirty_key[~mask[:, 0]], dirty_value[~mask[:, 0]] = odd, odd
        dirty = additive_attention(query, dirty_key, dirty_value, weight, given_mask, return_lse=True)
        for got, wanted in zip(dirty, clean, strict=True):
            assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("odd", [np.nan, np.inf, 1e30, 25.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
@ANY_QUERIES
@ANY_DTYPE
def test_nothing_outside_of_an_interval_leaks(dtype: Any, queries: int, odd: float, softcap: float | None) -> None:
    query, key, value, weight = rows_of_a_batch(dtype, 2, queries, 170, 24)
    hidden = np.stack([(np.arange(170) >= 101) | (np.arange(170) < 20), np.arange(170) < 20])[:, None]
    options: dict[str, Any] = {"window": (10, None), "query_offset": 30, "key_lengths": [101, 170], "softcap": softcap}
    clean = additive_attention(query, key, value, weight, **options, return_lse=True)
    key[hidden], value[hidden] = odd, odd
    dirty = additive_attention(query, key, value, weight, **options, return_lse=True)
    for got, wanted in zip(dirty, clean, strict=True):
        assert got.tobytes() == wanted.tobytes()


@ANY_DTYPE
@pytest.mark.parametrize(
    "options", [{"alibi_slopes": 0.1}, {"window": (40, 3), "softcap": 2.0}, {"is_causal": "bottom-right"}], ids=str
)
@pytest.mark.parametrize("sizes", [(1, 0, 40), (1, 130, 400), (65, 131, 500), (150, 300, 333)], ids=str)
def test_a_padded_sequence_has_the_bits_of_the_same_sequence_alone(
    dtype: Any, options: dict[str, Any], sizes: tuple[int, int, int]
) -> None:
    queries, keys, capacity = sizes
    query, key, value, weight = rows_of_a_batch(dtype, 3, queries, capacity, 24, 9.0)
    options = {**options, "return_lse": True, "return_weights": True}
    alone = additive_attention(query[1], key[1, :, :keys], value[1, :, :keys], weight, **options)
    key[1, :, keys:], value[1, :, keys:] = np.nan, np.inf
    lengths = [capacity, keys, capacity // 2]
    out, lse, weights = additive_attention(query, key, value, weight, **options, key_lengths=lengths)
    assert [a.tobytes() for a in (out[1], lse[1], weights[1, ..., :keys])] == [a.tobytes() for a in alone]
    assert not weights[1, ..., keys:].any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@ANY_QUERIES
def test_queries_that_may_look_at_no_key(backend: str, queries: int) -> None:
    query, key, value, weight = inputs(np.float32, 2, queries, 20, 8)
    mask = np.ones((2, queries, 20), bool)
    mask[:, -1] = False
    for none in (mask, np.where(mask, 0, -np.inf)):
        out, lse, weights = additive_attention(
            query, key, value, weight, none, return_lse=True, return_weights=True, backend=backend
        )
        assert not out[:, -1].any()
        assert not weights[:, -1].any()
        assert (lse[:, -1] == -np.inf).all()
    out, lse = additive_attention(query, key[:, :0], value[:, :0], weight, return_lse=True, backend=backend)
    assert out.shape == (2, queries, 8)
    assert not out.any()
    assert (lse == -np.inf).all()


def test_memory_does_not_grow_with_the_lengths() -> None:
    sizes = []
    for length in (5000, 50000):
        query = np.broadcast_to(np.float32(0), (1, length, 64))
        _, operands = described = describe_additive(query, query, query, np.ones(64, np.float32))
        out = np.empty((1, length, 64), np.float32)
        sizes.append(forward.plan_forward(*described, out, 2, "additive").memory_bytes)
        assert operands.query.shape == (1, 1, length, 64)
    assert sizes[1] <= sizes[0]


@pytest.mark.slow
@on_other_rows
def test_other_rows_of_the_table_are_right(row: isa.Isa) -> None:
    code = "import numpy as np, additive_cases; print(additive_cases.check_calls((np.float32,)))"
    assert processes.run(code, FASTATTN_ISA=row.name) == "12\n"


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in isa.TABLE if not isa.runs_here(row)], ids=lambda row: row.name)
def test_rows_that_do_not_run_here_compile(row: isa.Isa) -> None:
    for work in ("forward", "weights"):
        assert catalogue.build(describe(work, row.tile("float32"), row, "additive"), {"task": 3})


@pytest.mark.slow
def test_sixteen_lanes_on_any_machine(sixteen_lanes: isa.Isa) -> None:
    assert check_calls((np.float32,)) == 12
    assert any(kernel.score == "additive" and kernel.row is sixteen_lanes for kernel in kernels._loaded)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones(4)}, "weight: shape (4,); expected (3,), a number for each feature of query of shape (5, "),
        ({"weight": np.ones((1, 3))}, "weight: shape (1, 3); expected (3,)"),
        ({"weight": "abc"}, "weight: dtype <U3 is not supported"),
        ({"weight": np.ones(3, np.complex64)}, "weight: dtype complex64 is not supported"),
        ({"weight": None}, "weight: None; expected an array_like"),
        ({"query": np.ones(3)}, "query: shape (3,) has rank 1"),
        ({"key": np.ones((7, 4))}, "key: shape (7, 4); expected 3 features on the last axis"),
        ({"value": np.ones((6, 3))}, "value: shape (6, 3); expected length 7 on axis -2"),
        ({"query": np.ones((4, 5, 3)), "key": np.ones((2, 7, 3))}, "has 2 heads, and query of shape (4, 5, 3) has 4; "
         "expected 4 or 1"),
        ({"attn_mask": np.ones((7, 5), bool)}, "attn_mask: shape (7, 5); expected one that broadcasts to (5, 7)"),
        ({"attn_mask": np.ones((5, 7), int)}, "attn_mask: dtype int64 could mean two things"),
        ({"is_causal": 1}, "is_causal: 1 of type int; expected"),
        ({"window": (1, -1)}, "window: (1, -1) of type tuple; expected (left, right)"),
        ({"softcap": 0}, "softcap: 0 of type int; expected a finite real number above 0"),
        ({"key_lengths": 8}, "key_lengths: 8 to 8; expected 0 to 7, the length of key"),
        ({"query_offset": 0.5}, "query_offset: dtype float64; expected integers"),
        ({"return_lse": 1}, "return_lse: 1 of type int; expected True or False"),
        ({"return_weights": "yes"}, "return_weights: 'yes' of type str"),
        ({"out": np.ones((5, 3), np.float32)}, "out: dtype float32; expected float64"),
        ({"out": np.ones((5, 4))}, "out: shape (5, 4); expected (5, 3)"),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)  # fmt: skip
def test_bad_arguments_are_named(backend: str, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "query": np.ones((5, 3)),
        "key": np.ones((7, 3)),
        "value": np.ones((7, 3)),
        "weight": np.ones(3),
    }
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as raised:
        additive_attention(**arguments | change, backend=backend)
    assert "enable_gqa" not in str(raised.value)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend: 'gpu' of type str; expected None or one of 'cpu', 'reference'"):
        additive_attention([[1.0]], [[1.0]], [[1.0]], [1.0], backend="gpu")


def test_dtypes_promote_together() -> None:
    single = np.ones((2, 3), np.float32)
    assert additive_attention(single, single, single, np.ones(3, np.float32)).dtype == np.float32
    assert additive_attention(single, single, single, np.ones(3)).dtype == np.float64
    assert additive_attention([[1, 2]], [[1, 2]], [[1, 2]], [1, 2]).dtype == np.float64


# -- Bahdanau's layer --------------------------------------------------------------------------------------------------


def decode(layer: BahdanauAttention, query: Array, key: Array, value: Array, mask: Any = None) -> Any:
    """Return context and weights by the paper's formula, in float64."""
    w, u, b, v = (array.astype(np.float64) for array in layer.state_dict().values())
    hidden = np.tanh((query @ w.T + b)[..., :, None, :] + (key @ u.T)[..., None, :, :])
    scores = hidden @ v
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights @ value, weights


@ANY_DTYPE
def test_bahdanau_is_the_papers_formula(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    layer = BahdanauAttention(12, 7, 20, rng=1, dtype=dtype)
    query, key, value = (numbers(rng, shape, dtype) for shape in ((3, 5, 12), (3, 9, 7), (3, 9, 4)))
    mask = np.arange(9) < np.array([9, 4, 1])[:, None, None]
    for values in (None, value):
        context, weights = layer(query, key, values, mask, return_weights=True)
        wanted = decode(layer, query, key, key if values is None else value, mask)
        size = tolerances.ADDITIVE_ROUNDINGS * np.abs(layer.weight).sum() + np.abs(query).sum(-1).max()
        bound = tolerances.layer_bound(dtype, float(size), float(np.abs(wanted[0]).max()))
        assert context.dtype == weights.dtype == dtype
        assert np.abs(context - wanted[0]).max() <= bound
        assert np.abs(weights - wanted[1]).max() <= bound


def test_projected_keys_serve_every_step() -> None:
    rng = np.random.default_rng(0)
    layer = BahdanauAttention(8, 6, 10, rng=0)
    states, source = numbers(rng, (4, 5, 8), np.float32), numbers(rng, (4, 11, 6), np.float32)
    projected = layer.project_keys(source)
    assert projected.shape == (4, 11, 10)
    for step in range(5):
        state = states[:, step : step + 1]
        want = layer(state, source)
        assert layer(state, source, projected_keys=projected).tobytes() == want.tobytes()
    # they are used, and not made again
    other = layer(state, source, projected_keys=np.zeros_like(projected))
    np.testing.assert_allclose(other, source.mean(axis=1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_bahdanau_starts_from_the_seed() -> None:
    first, again, other = (BahdanauAttention(8, 6, 10, rng=rng) for rng in (3, 3, 4))
    for name, array in first.state_dict().items():
        assert array.tobytes() == again.state_dict()[name].tobytes()
        assert (array != other.state_dict()[name]).any()
    for name, fan_in in (("query_weight", 8), ("key_weight", 6), ("bias", 8), ("weight", 10)):
        assert np.abs(getattr(first, name)).max() <= fan_in**-0.5
        assert np.abs(getattr(first, name)).max() > 0.6 * fan_in**-0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(np.ones((2, 9)), np.ones((3, 6))), "query: shape (2, 9); expected (..., length, 8)"),
        (lambda f: f(np.ones((2, 8)), np.ones((3, 7))), "key: shape (3, 7); expected (..., length, 6)"),
        (lambda f: f(np.ones((2, 8)), np.ones((3, 6)), np.ones((4, 6))), "value: shape (4, 6); expected length 3"),
        (lambda f: f(np.ones((2, 8)), np.ones((3, 6)), np.ones(3)), "value: shape (3,); expected (..., length, 3)"),
        (
            lambda f: f(np.ones((2, 8)), np.ones((3, 6)), projected_keys=np.ones((2, 10))),
            "projected_keys: shape (2, 10); expected (3, 10), what project_keys returns for key of shape (3, 6)",
        ),
        (lambda f: f(np.ones((2, 8)), np.ones((3, 6)), None, np.ones((3, 2), bool)), "attn_mask: shape (3, 2)"),
        (lambda f: f(np.ones((2, 8)), np.ones((3, 6)), return_weights=2), "return_weights: 2 of type int"),
        (lambda f: f.project_keys(np.ones((3, 8))), "key: shape (3, 8); expected (..., 6)"),
        (lambda f: f.project_keys("word"), "key: dtype <U4 is not supported"),
        (lambda _: BahdanauAttention(8, 6, 0), "hidden_dim: 0; expected at least 1"),
    ],
)
def test_bad_arguments_of_bahdanau_are_named(call: Callable[[BahdanauAttention], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        call(BahdanauAttention(8, 6, 10, rng=0))
