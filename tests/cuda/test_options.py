"""What may be said of scores: windows, offsets, lengths, softcaps, pairs of masks; scales and softcaps of any size."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from strategies import Call, bias_in, calls, numbers, of_size

import fastattn
from fastattn.call.problem import Problem
from fastattn.call.shapes import describe
from fastattn.cuda.host import decode as decoding
from fastattn.cuda.host import tensor_cores
from fastattn.cuda.host.plan import Table, is_extreme, make_table, own_of, sizes_of
from fastattn.cuda.kernels import scores as kernels

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from numba import cuda

Array = np.ndarray[Any, Any]
attention = partial(fastattn.attention, backend="cuda")
attention_backward = partial(fastattn.attention_backward, backend="cuda")

FEW = max(10, settings().max_examples // 8)

TABLE, HIDDEN = np.linspace(-1, 1, 34).reshape(2, 17), np.arange(9) % 4 == 3


@of_size(steepest=1, largest=1, bend=0.4)
def biased(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A function of the user's, with a bias by distance, and branches."""
    if batch == 1 and query > key:
        score = 2 * np.tanh(score / 2)
    return score + TABLE[head, query - key]


def dotted(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A function of the user's, of which query 2 sees nothing."""
    return (not HIDDEN[key] or head == 0) and query != 2


#: One of each option, and some together, for 7 queries, 9 keys and two rows of a batch: blocks of 4 and what is over.
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": (2, 1)},
    "window to the left": {"window": (3, None)},
    "window to the right": {"window": (None, 2)},
    "window of one key": {"window": (0, 0), "query_offset": 1},
    "window of no key": {"window": (1, 1), "query_offset": -7},
    "causal window": {"window": (2, None), "is_causal": True},
    "offset": {"query_offset": 3, "is_causal": True},
    "offset before all keys": {"query_offset": -5, "is_causal": True},
    "far offset": {"query_offset": 2**70, "is_causal": True},
    "offsets": {"query_offset": [2, -3], "is_causal": True},
    "offsets and a window": {"query_offset": [2**62, 4], "window": (5, 1)},
    "offsets that mean nothing": {"query_offset": [1, 2]},
    "lengths": {"key_lengths": [4, 9]},
    "lengths of none": {"key_lengths": [0, 5]},
    "causal lengths": {"key_lengths": [5, 9], "is_causal": "bottom-right"},
    "softcap": {"softcap": 0.75},
    "wide softcap": {"softcap": 50},
    "slopes": {"alibi_slopes": [0.5, 0.01]},
    "slopes by positions": {"alibi_slopes": [[0.5, 0.0], [-0.1, 0.25]], "query_offset": [3, -4], "window": (4, 2)},
    "slopes of any size": {"alibi_slopes": [1e300, -3e38], "query_offset": 1},
    "slopes that make up for a mask": {"attn_mask": "lowest", "alibi_slopes": [0.5, -1e38], "query_offset": 1000},
    "sinks": {"sinks": [0.5, -3.0]},
    "sinks of rows without keys": {"sinks": [[0.5, -np.inf], [1e30, -1e300]], "key_lengths": [0, 5]},
    "pair": {"attn_mask": "pair"},
    "pair without bias": {"attn_mask": "keep"},
    "pair without keep": {"attn_mask": "bias"},
    "function of scores": {"score_mod": biased},
    "function of what is seen": {"mask_mod": dotted},
    "functions and positions": {"score_mod": biased, "mask_mod": dotted, "query_offset": [1, -2], "is_causal": True},
    "functions and all else": {
        "attn_mask": "pair",
        "softcap": 1.5,
        "window": (4, 2),
        "query_offset": [1, 3],
        "key_lengths": [8, 6],
        "alibi_slopes": [0.5, 0.1],
        "score_mod": biased,
        "mask_mod": dotted,
    },
    "pair and all else": {
        "attn_mask": "pair",
        "softcap": 1.5,
        "window": (4, 2),
        "query_offset": [1, 3],
        "key_lengths": [8, 6],
        "alibi_slopes": [0.5, 0.1],
        "sinks": [0.5, 3.0],
    },
}


def pair_of(kind: str | None) -> Any:
    """Return (bias, keep), either None unless the kind says so."""
    if kind is None:
        return None
    if kind == "lowest":
        return np.full((7, 9), np.finfo(np.float32).min), None
    rng = np.random.default_rng(5)
    bias, keep = rng.standard_normal((7, 9)).astype(np.float32), rng.random((2, 1, 9)) < 0.8
    bias[rng.random((7, 9)) < 0.1] = -np.inf
    return bias if kind != "keep" else None, keep if kind != "bias" else None


def heads(dtype: Any, queries: int = 7) -> list[Array]:
    """Return dO, query, key and value: two rows of a batch, of two heads that share one of keys."""
    rng = np.random.default_rng(2)
    shapes = [(2, 2, queries, 6), (2, 2, queries, 5), (2, 1, 9, 5), (2, 1, 9, 6)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def check_both(grad_out: Array, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> None:
    """Check a call, and its gradients, that of a floating mask included."""
    out, lse, _ = tolerances.check_call(attention, query, key, value, mask, **options)
    grad_mask = bias_in(mask) is not None
    found = attention_backward(grad_out, query, key, value, out, lse, mask, **options, grad_mask=grad_mask)
    assert len(found) == 3 + grad_mask
    given = (query, key, value, mask)
    tolerances.check_gradients(found, given, *tolerances.expected_gradients(grad_out, *given, **options))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dropped", [False, True])
def test_gradients_of_sinks_and_slopes(dtype: Any, dropped: bool) -> None:
    grad_out, query, key, value = heads(dtype)
    grad_lse = np.linspace(-1, 1, 28).astype(dtype).reshape(2, 2, 7)
    options: dict[str, Any] = {"enable_gqa": True, "softcap": 2.0, "query_offset": [3, -4], "key_lengths": [9, 0]}
    options |= {"sinks": np.array([0.5, 300.0], dtype), "alibi_slopes": np.array([[0.25, 0.1], [0.0, 1.0]], dtype)}
    options |= {"dropout_p": 0.3, "rng": 5} if dropped else {}
    out, lse = attention(query, key, value, **options, return_lse=True)
    names = ("sinks", "value", "alibi_slopes")
    given = (query, key, value)
    found = attention_backward(grad_out, *given, out, lse, **options, grad_lse=grad_lse, grads=names)
    each = dict(zip(names, found, strict=True))
    plain = attention_backward(grad_out, *given, out, lse, **options, grad_lse=grad_lse)
    assert each.pop("value").tobytes() == plain[2].tobytes()
    tolerances.check_head_gradients(each, grad_out, *given, grad_lse=grad_lse, **options)
    there = [cuda.to_device(array) for array in (grad_out, *given, out, lse)]
    onward = attention_backward(*there, **options, grad_lse=cuda.to_device(grad_lse), grads=names)
    assert [array.copy_to_host().tobytes() for array in onward] == [array.tobytes() for array in found]


# -- what is said of scores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_both_ways(dtype: Any, name: str) -> None:
    options = dict(OPTIONS[name])
    grad_out, *arrays = heads(dtype)
    check_both(grad_out, *arrays, pair_of(options.pop("attn_mask", None)), enable_gqa=True, **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sink_far_above_the_scores_is_the_lse_to_the_last_digits(dtype: Any) -> None:
    """It is not told by way of the largest score."""
    _, query, key, value = heads(dtype)
    mask = np.full((query.shape[-2], key.shape[-2]), -70, dtype)
    sinks = np.linspace(6, 7, query.shape[-3]).astype(dtype)
    _, lse = attention(query, key, value, mask, sinks=sinks, enable_gqa=True, return_lse=True)
    np.testing.assert_allclose(lse, np.broadcast_to(sinks[:, None], lse.shape), rtol=3 * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    "name", ["window", "offsets", "lengths", "softcap", "slopes", "pair", "pair and all else", "functions and all else"]
)
def test_few_queries_and_dropout(name: str) -> None:
    options = dict(OPTIONS[name])
    grad_out, *arrays = heads(np.float32, queries=1)
    mask = pair_of(options.pop("attn_mask", None))
    mask = mask and (mask[0][:1], mask[1])
    check_both(grad_out, *arrays, mask, enable_gqa=True, dropout_p=0.3, rng=7, **options)


@settings(max_examples=2 * FEW)
@given(call=calls(small=True, further=True))
def test_any_call(call: Call) -> None:
    before = call.bits
    tolerances.check_call(attention, *call.args, **call.options)
    assert call.bits == before


@settings(max_examples=FEW)
@given(call=calls(small=True, further=True, dropout=True))
def test_any_gradients(call: Call) -> None:
    wanted = tolerances.expected(*call.args, **call.options)
    rng = np.random.default_rng(3)
    grad_out = numbers(rng, wanted.problem.out_shape, call.query.dtype)
    check_both(grad_out, *call.args, **call.options)


@settings(max_examples=FEW)
@given(call=calls(small=True, further=True, dropout=True, with_functions=True))
def test_any_functions(call: Call) -> None:
    wanted = tolerances.expected(*call.args, **call.options)
    grad_out = numbers(np.random.default_rng(3), wanted.problem.out_shape, call.query.dtype)
    check_both(grad_out, *call.args, **call.options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{"key_lengths": [5, 5]}, {"window": (None, 1), "query_offset": -3}])
def test_what_is_outside_of_the_interval_never_leaks(bad: float, options: dict[str, Any]) -> None:
    """The keys from 5 on are behind the lengths, and behind the window of the last query."""
    grad_out, query, key, value = heads(np.float32)
    clean = call_and_gradients(grad_out, query, key, value, **options)
    key, value = key.copy(), value.copy()
    key[..., 5:, :], value[..., 5:, :] = bad, bad
    spoilt = call_and_gradients(grad_out, query, key, value, **options)
    assert [array.tobytes() for array in spoilt] == [array.tobytes() for array in clean]


def call_and_gradients(grad_out: Array, query: Any, key: Any, value: Any, mask: Any = None, **options: Any) -> Any:
    """Return all that comes of a call and of its backward pass."""
    out, lse, weights = attention(
        query, key, value, mask, enable_gqa=True, return_lse=True, return_weights=True, **options
    )
    return out, lse, weights, *attention_backward(
        grad_out, query, key, value, out, lse, mask, enable_gqa=True, **options
    )  # fmt: skip


def test_a_padded_sequence_has_the_bits_of_the_same_alone() -> None:
    grad_out, query, key, value = heads(np.float32)
    lengths, options = [6, 3], {"is_causal": "bottom-right", "softcap": 2.0}
    together = call_and_gradients(grad_out, query, key, value, key_lengths=lengths, **options)
    for row, length in enumerate(lengths):
        arrays = (grad_out[row], query[row], key[row, :, :length], value[row, :, :length])
        out, lse, _, *gradients = call_and_gradients(*arrays, key_lengths=length, **options)
        assert out.tobytes() == together[0][row].tobytes()
        assert lse.tobytes() == together[1][row].tobytes()
        for alone, padded in zip(gradients, together[3:], strict=True):
            assert alone.tobytes() == padded[row, :, : alone.shape[-2]].tobytes()
            assert not padded[row, :, alone.shape[-2] :].any()


def test_lengths_belong_to_a_call_and_not_to_its_plan() -> None:
    _, query, key, value = heads(np.float32)
    for lengths in ([4, 9], [9, 1], [0, 0]):
        given = (query, key, value, None)
        tolerances.check_call(attention, *given, enable_gqa=True, key_lengths=lengths, query_offset=lengths[::-1])


@pytest.mark.parametrize("name", ["offsets", "causal lengths", "pair", "pair without bias", "pair and all else"])
def test_arrays_in_device_memory(name: str) -> None:
    options = dict(OPTIONS[name])
    mask, arrays = pair_of(options.pop("attn_mask", None)), heads(np.float32)
    wanted = call_and_gradients(*arrays, mask, **options)
    if mask is not None:
        mask = tuple(each if each is None else cuda.to_device(each) for each in mask)
    for which in ("query_offset", "key_lengths"):
        if which in options:
            options[which] = cuda.to_device(np.array(options[which]))
    found = call_and_gradients(*map(cuda.to_device, arrays), mask, **options)
    assert [array.copy_to_host().tobytes() for array in found] == [array.tobytes() for array in wanted]


def test_what_is_refused_in_device_memory() -> None:
    _, *arrays = map(cuda.to_device, heads(np.float32))
    bias, keep = pair_of("pair")
    bias_there, keep_there = cuda.to_device(bias), cuda.to_device(keep)
    for pair in ((keep_there, bias_there), (None, bias_there), (keep_there, None)):
        with pytest.raises(TypeError, match=r"attn_mask: a pair of dtypes .*; expected \(bias, keep\)"):
            attention(*arrays, pair, enable_gqa=True)
    with pytest.raises(TypeError, match=r"attn_mask\[1\]: numpy.ndarray in host memory"):
        attention(*arrays, (bias_there, keep), enable_gqa=True)
    with pytest.raises(ValueError, match=r"key_lengths: 1 to 10; expected 0 to 9"):
        attention(*arrays, enable_gqa=True, key_lengths=cuda.to_device(np.array([1, 10])))
    with pytest.raises(TypeError, match=r"query_offset: dtype float64; expected integers"):
        attention(*arrays, enable_gqa=True, query_offset=cuda.to_device(np.array([1.0, 2.0])))


@pytest.mark.parametrize("softcap", [5e-324, 1e-300, 1e-30, 1e30, 1e300, 1.7e308])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_finite_softcap(dtype: Any, softcap: float) -> None:
    grad_out, *arrays = heads(dtype)
    check_both(grad_out, *arrays, None, enable_gqa=True, softcap=softcap)


def test_which_calls_are_for_the_portable_kernels_alone() -> None:
    array, few = np.zeros((2, 1, 16, 8), np.float32), np.zeros((2, 1, 1, 8), np.float32)
    table = Table(np.zeros((9, 2), np.int64), np.ones((9, 2), np.int64), np.zeros(0, np.int64))
    table.steps[:, 0] = 8

    def reasons(mask: Any = None, **options: Any) -> tuple[str | None, str | None]:
        problem, _ = describe(array, array, array, mask, **options)
        kind = "none" if mask is None else "float32"
        on_tensor_cores = tensor_cores.against("float16", kind, problem, table, (0,) * 4, (8, 0))
        return on_tensor_cores, decoding.against(describe(few, array, array, **options)[0])

    for options in ({}, {"is_causal": True, "query_offset": 3}, {"window": (None, 2)}, {"query_offset": 5}):
        assert reasons(**options) == (None, None)
    for options, reason in (
        ({"window": (2, None)}, "a window to the left"),
        ({"query_offset": [1, 2], "is_causal": True}, "what heads have of their own: offset"),
        ({"key_lengths": [1, 2]}, "what heads have of their own: keys"),
        ({"softcap": 30.0}, "a softcap"),
    ):
        assert reasons(**options) == (reason, f"there is {reason}")
    pair = np.zeros((16, 16), np.float32), np.ones((16, 16), bool)
    assert reasons(pair)[0] == "a pair of masks"


@pytest.mark.parametrize("left", [None, 0, 2])
@pytest.mark.parametrize("right", [None, 0, 3])
@pytest.mark.parametrize("length", [0, 5, 11])
def test_blocks_outside_of_the_interval_are_skipped(left: int | None, right: int | None, length: int) -> None:
    """No block before the first key that is looked at, nor behind the last, and all between; the same of queries."""
    queries, keys, block = 10, 11, 4
    for offset in (-12, -2, 0, 3, 12):
        array = np.zeros((1, 1, queries, 1), np.float32), np.zeros((1, 1, keys, 1), np.float32)
        options: Any = {"window": (left, right), "query_offset": [offset], "key_lengths": [length]}
        problem, operands = describe(*array, array[1], **options)
        tables, own = make_table(problem, []), own_of(problem, np.float32, False, operands.heads)
        head = kernels.head_of(0, tables.offsets, tables.steps, sizes_of(problem, operands.heads).tolist(), own, None)
        i, j = np.ogrid[:queries, :keys]
        seen = problem.scores.sees(i, j, length, offset)
        assert [[kernels.sees(head, a, b) for b in range(keys)] for a in range(queries)] == seen.tolist()
        for start in range(0, queries, block):
            looked_at = np.flatnonzero(seen[start : start + block].any(0))
            begin, end = kernels.keys_of_queries(head, start, min(queries, start + block) - 1, block)
            check_range(begin, end, looked_at, block)
        for start in range(0, keys, block):
            looking = np.flatnonzero(seen[:, start : start + block].any(1))
            begin, end = kernels.queries_of_keys(head, start, min(keys, start + block) - 1, block)
            check_range(begin, end, looking, block)


def check_range(begin: int, end: int, wanted: Array, block: int) -> None:
    """Assert that these numbers, and no blocks without any, are in a range of whole blocks."""
    if wanted.size:
        assert (begin, end) == (wanted[0] // block * block, wanted[-1] + 1)
    else:
        assert begin >= end


# -- values that float64 holds, and float32 does not, or hardly --------------------------------------------------------

#: Scales, and the sizes of queries and keys that make usual scores of them.
FACTORS = {
    np.float32: [
        (1e39, 1e-19, 1e-20),
        (-1e39, 1e-38, 1e-1),
        (1e60, 1e-30, 1e-30),
        (1e-40, 1e20, 1e20),
        (-1e-50, 1e25, 1e25),
        (1e-70, 1e36, 1e34),
    ],
    np.float64: [(1.5e308, 1e-150, 1e-158), (-1.5e308, 1e-300, 1e-8), (5e-324, 1e165, 1e158), (1e-310, 1e5, 1e305)],
}
CASES = [(dtype, *factors) for dtype, cases in FACTORS.items() for factors in cases]


def operands(dtype: Any, query_size: float, key_size: float, queries: int = 7) -> list[Array]:
    """Return dO, query, key and value; some are subnormal."""
    rng = np.random.default_rng(0)
    shapes = [(2, queries, 3), (2, queries, 5), (2, 9, 5), (2, 9, 3)]
    arrays = [rng.standard_normal(shape) for shape in shapes]
    arrays[1], arrays[2] = arrays[1] * query_size, arrays[2] * key_size
    return [array.astype(dtype) for array in arrays]


@pytest.mark.parametrize(("dtype", "scale", "query_size", "key_size"), CASES)
@pytest.mark.parametrize("kind", ["none", "bool", "float", "few queries", "dropout"])
def test_any_finite_scale(dtype: Any, scale: float, query_size: float, key_size: float, kind: str) -> None:
    grad_out, query, key, value = operands(dtype, query_size, key_size, 2 if kind == "few queries" else 7)
    rng = np.random.default_rng(1)
    seen = rng.random((7, 9)) < 0.8
    mask = {"bool": seen, "float": np.where(seen, rng.standard_normal((7, 9)), -np.inf)}.get(kind)
    options: Any = {"scale": scale, "is_causal": kind == "none"}
    if kind == "dropout":
        options.update(dropout_p=0.3, rng=4)
    out, lse, _ = tolerances.check_call(attention, query, key, value, mask, **options)
    given = (query, key, value, mask)
    found = attention_backward(grad_out, query, key, value, out, lse, mask, **options, grad_mask=kind == "float")
    tolerances.check_gradients(found, given, *tolerances.expected_gradients(grad_out, *given, **options))
    assert all(np.isfinite(one).all() and one.any() for one in (out, lse, *found))


@pytest.mark.parametrize(("scale", "query_size", "key_size"), [(1e39, 1e10, 1e-44), (1e84, 1e-42, 1e-42)])
@pytest.mark.parametrize("queries", [2, 7])
def test_scores_whose_gradients_are_beyond_float32(
    scale: float, query_size: float, key_size: float, queries: int
) -> None:
    _, query, key, value = operands(np.float32, query_size, key_size, queries)
    out, lse, _ = tolerances.check_call(attention, query, key, value, scale=scale)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("scale", [1e39, 1e60])
def test_large_scores_of_an_extreme_scale(scale: float) -> None:
    """Such that float32 holds, but not their differences: the log-sum-exp has lost what tells weights apart."""
    size = 1e20 / scale
    query, key = np.array([[size], [-size]], np.float32), np.array([[1.0], [1.0], [-1.0]], np.float32)
    value = np.array([[1.0], [3.0], [5.0]], np.float32)
    out, lse, weights = attention(query, key, value, scale=scale, return_lse=True, return_weights=True)
    np.testing.assert_allclose(out, [[2.0], [5.0]])
    np.testing.assert_allclose(lse, 1e20, rtol=1e-5)  # a query of 1e-40 is subnormal
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0], [0, 0, 1]])
    grad_value = attention_backward(np.ones((2, 1), np.float32), query, key, value, out, lse, scale=scale)[2]
    np.testing.assert_allclose(grad_value, [[0.5], [0.5], [1]])


def test_scores_beyond_float32_are_told_apart() -> None:
    """The log-sum-exp saturates, as a mask does."""
    query, key, value = np.ones((1, 1), np.float32), np.array([[1.0], [2.0]], np.float32), np.eye(2, dtype=np.float32)
    out, lse = attention(query, key, value, scale=1e300, return_lse=True)
    assert out.tolist() == [[0, 1]]
    assert lse == np.finfo(np.float32).max
    grad_value = attention_backward(np.ones((1, 2), np.float32), query, key, value, out, lse, scale=1e300)[2]
    assert grad_value.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("scale", [1e300, -1.7e308])
def test_the_largest_scales_make_nothing_infinite(scale: float) -> None:
    """Scores of 0 are 0 under any scale, however large the queries."""
    query, key, value = np.full((3, 2), 1e10, np.float32), np.zeros((4, 2), np.float32), np.eye(4, dtype=np.float32)
    out, lse, weights = attention(query, key, value, scale=scale, return_lse=True, return_weights=True)
    np.testing.assert_array_equal(out, weights)
    np.testing.assert_allclose(weights, np.full((3, 4), 0.25), rtol=1e-6)
    np.testing.assert_allclose(lse, np.log(4), rtol=1e-6)
    gradients = attention_backward(np.ones((3, 4), np.float32), query, key, value, out, lse, scale=scale)
    np.testing.assert_allclose(gradients[2], np.full((4, 4), 0.75), rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_a_float64_mask_saturates_beside_an_extreme_scale() -> None:
    query, key, value = np.zeros((5, 2), np.float32), np.zeros((6, 2), np.float32), np.eye(6, dtype=np.float32)
    mask = np.full((5, 6), -1e300)
    mask[:, 2:4] = [1e300, 2e300]
    out, lse, weights = attention(query, key, value, mask, scale=1e39, return_lse=True, return_weights=True)
    wanted = np.broadcast_to([0, 0, 0.5, 0.5, 0, 0], (5, 6))
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(weights, wanted)
    assert (lse == np.finfo(np.float32).max).all()


def test_half_precision() -> None:
    _, query, key, value = operands(np.float16, 1e-3, 1e-3)
    for scale in (1e-31, 1e31):
        wide = (array.astype(np.float32) for array in (query, key, value))
        out = attention(query, key, value, scale=scale)
        assert out.dtype == np.float16
        wanted = fastattn.attention(*wide, scale=scale, backend="reference")
        np.testing.assert_allclose(out, wanted, rtol=1e-3, atol=1e-3)


def with_scale(problem: Problem, scale: float, dtype: Any = np.float32) -> Problem:
    """Return a problem with another scale, in another dtype."""
    return replace(problem, real=np.dtype(dtype), scores=replace(problem.scores, scale=scale))


def test_which_scales_are_extreme() -> None:
    array = np.zeros((2, 2), np.float32)
    problem = describe(array, array, array)[0]
    for dtype, extreme, usual in (
        (np.float32, (1e39, -1e39, 1e31, 1e-31, -1e-300), (0.0, 1.0, -1.0, 1e30, 1e-30)),
        (np.float64, (1.1e300, -1.7e308), (0.0, 1.0, 1e-320, -1e300)),
    ):
        for scale in extreme:
            assert is_extreme(with_scale(problem, scale, dtype))
        for scale in usual:
            assert not is_extreme(with_scale(problem, scale, dtype))
    problem = with_scale(problem, 1e39)
    assert "extreme" in (decoding.against(problem) or "")
    table = Table(np.zeros((8, 1), np.int64), np.ones((8, 2), np.int64), np.zeros(8, np.int64))
    assert "scale" in (tensor_cores.against("float16", "float32", problem, table, (0,), (8, 0)) or "")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dropout_p", [1e-300, 5e-324, 1 - 2.0**-33, 1 - 2.0**-53, 1.0])
def test_any_probability_of_dropout(dtype: Any, dropout_p: float) -> None:
    grad_out, query, key, value = operands(dtype, 1, 1)
    options: Any = {"dropout_p": dropout_p, "rng": 3}
    out, lse, _ = tolerances.check_call(attention, query, key, value, **options)
    found = attention_backward(grad_out, query, key, value, out, lse, **options)
    given = (query, key, value, None)
    tolerances.check_gradients(found, given, *tolerances.expected_gradients(grad_out, *given, **options))
    assert all(np.isfinite(one).all() for one in (out, lse, *found))
