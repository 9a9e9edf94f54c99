"""Dask arrays: chunks of any kind give what the whole gives, lazily, and with no task for what nobody sees."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import processes
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, bias_in, calls, each, of_size

import fastattn
from fastattn import BlockMask
from fastattn.call.advice import to_install

dask = pytest.importorskip("dask", reason="Dask is not installed")
da = pytest.importorskip("dask.array", reason="Dask is not installed")

from fastattn.api import pieces  # noqa: E402
from fastattn.integrations import tasks  # noqa: E402
from fastattn.integrations.dask import attention, attention_backward  # noqa: E402

INF = np.inf
Array = np.ndarray[Any, Any]
#: Of rows, heads, queries and keys; those of the heads of keys are half as many.
CUTS: dict[str, tuple[Any, Any, Any, Any]] = {
    "one chunk": (2, 4, 9, 60),
    "keys": (2, 4, 9, 7),
    "queries": (2, 4, (2, 3, 4), 60),
    "heads": (2, 2, 9, 60),
    "all": (1, 2, (4, 5), (1, 29, 30)),
}


@pytest.fixture(autouse=True)
def synchronous() -> Any:
    """Compute in the thread of the test, unless it says otherwise."""
    with dask.config.set(scheduler="synchronous"):
        yield


def inputs(keys: int = 60, dtype: Any = np.float32) -> tuple[Any, Any, Any]:
    """Return query, key and value: two rows of a batch, of four heads that share two of keys."""
    rng = np.random.default_rng(0)
    shapes = (2, 4, 9, 8), (2, 2, keys, 8), (2, 2, keys, 5)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)  # type: ignore[return-value]


def chunked(query: Array, key: Array, value: Array, cut: tuple[Any, Any, Any, Any]) -> list[Any]:
    """Return the same in chunks: features are cut as well, which is undone."""
    rows, heads, queries, keys = cut
    return [
        da.from_array(query, chunks=(rows, heads, queries, 5)),
        da.from_array(key, chunks=(rows, heads // 2, keys, 8)),
        da.from_array(value, chunks=(rows, heads // 2, keys, 4)),
    ]


def half(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key + batch + head) % 2 == 0


@of_size(steepest=0.5, largest=8.0)
def sloped(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score * 0.5 - (query - key) * (head + 1) / 64


BIAS, KEEP = np.linspace(-1, 1, 9 * 60).reshape(9, 60), np.arange(60) % 7 != 0
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True, "query_offset": 30},
    "bottom-right": {"is_causal": "bottom-right"},
    "rows of their own": {"window": (7, 3), "query_offset": np.array([40, -3]), "key_lengths": [50, 20]},
    "bottom-right of lengths": {"is_causal": "bottom-right", "key_lengths": np.array([33, 0]), "window": (20, None)},
    "softcap, slopes, sinks": {
        "softcap": 1.5,
        "alibi_slopes": [0.1, 0.2, 0.3, 0.4],
        "sinks": np.array([0, 1.0, 2, -INF]),
    },
    "heads of rows": {"alibi_slopes": np.linspace(0, 1, 8).reshape(2, 4), "sinks": np.array([[1.0], [2.0]])},
    "boolean mask": {"attn_mask": KEEP},
    "floating mask": {"attn_mask": da.from_array(BIAS, chunks=(2, 11))},
    "a mask of one column": {"attn_mask": BIAS[:, :1]},
    "both masks": {"attn_mask": (BIAS, da.from_array(KEEP, chunks=13))},
    "functions": {"score_mod": sloped, "mask_mod": half, "query_offset": 5},
    "block mask": {"block_mask": BlockMask.from_function(half, 9, 60, 2, 4), "query_offset": np.array([3])},
    "dropout": {"dropout_p": 0.4, "rng": 3},
    "nothing is seen": {"window": (0, 0), "query_offset": 1000, "sinks": np.ones(4)},
    "scaled": {"scale": 0.3},
}


def in_memory(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with arrays of NumPy's alone."""
    return {name: dask.compute(option)[0] if name == "attn_mask" else option for name, option in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_chunks_are_the_whole(options: dict[str, Any], cut: Any) -> None:
    arrays = inputs()
    options = {"enable_gqa": True, **options}
    wanted = tolerances.expected(*arrays, **in_memory(options))
    out, lse = attention(*chunked(*arrays, cut), return_lse=True, **options)
    assert (out.dtype, lse.dtype) == (np.float32, np.float32)
    assert (out.shape, lse.shape) == (wanted.out.shape, wanted.lse.shape)
    results = dask.compute(out, lse)
    assert [type(each) for each in results] == [np.ndarray] * 2
    tolerances.check_out(results[0], wanted)
    tolerances.check_lse(results[1], wanted)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cut", [CUTS["one chunk"], CUTS["all"]], ids=["one chunk", "all"])
def test_gradients_of_chunks_are_those_of_the_whole(options: dict[str, Any], cut: Any) -> None:
    arrays = inputs()
    grad_out = np.random.default_rng(1).standard_normal((2, 4, 9, 5)).astype(np.float32)
    options = {"enable_gqa": True, **options}
    told = in_memory(options)
    of_lse = np.ones((2, 4, 9), np.float32)
    out, lse = fastattn.attention(*arrays, **told, return_lse=True)
    has_bias = options.get("attn_mask") is not None and options["attn_mask"] is not KEEP
    names = ["value", "query", "key", *(["attn_mask"] if has_bias else [])]
    names += [name for name in ("sinks", "alibi_slopes") if name in options]
    wanted = fastattn.attention_backward(
        grad_out, *arrays, out, lse, **told, grad_lse=of_lse, grads=names, backend="reference"
    )
    upstream = [da.from_array(each, chunks=3) for each in (out, lse)]
    found = attention_backward(grad_out, *chunked(*arrays, cut), *upstream, grad_lse=of_lse, grads=names, **options)
    for name, lazy, want in zip(names, found, wanted, strict=True):
        grad = lazy.compute()
        assert (lazy.dtype, lazy.shape) == (grad.dtype, grad.shape) == (want.dtype, want.shape), name
        np.testing.assert_allclose(grad, want, atol=2e-5 * max(1, abs(want).max()), err_msg=name)


def cut_anywhere(data: st.DataObject) -> Any:
    """Return what makes of an array one in chunks of lengths that are drawn, up to three along each axis."""

    def cut(array: Array) -> Any:
        least = [max(1, -(-length // 3)) for length in array.shape]
        chunks = [data.draw(st.integers(few, max(few, length))) for few, length in zip(least, array.shape, strict=True)]
        return da.from_array(array, chunks=tuple(chunks))

    return cut


@given(call=calls(further=True, dropout=True, with_functions=True, empty=True), data=st.data())
def test_any_call(call: Call, data: st.DataObject) -> None:
    query, key, value, mask = (each(cut_anywhere(data), array) for array in call.args)
    wanted = tolerances.expected(*call.args, **call.options)
    out, lse = attention(query, key, value, mask, **call.options, return_lse=True, split_every=2)
    results = dask.compute(out, lse)
    assert [(array.dtype, array.shape) for array in (out, lse)] == [(array.dtype, array.shape) for array in results]
    tolerances.check_out(results[0], wanted)
    tolerances.check_lse(results[1], wanted)


MASKS = (None, None, "bool", "padding", "float", "float, -inf")


@given(call=calls(further=True, dropout=True, masks=MASKS), data=st.data())
def test_any_gradient(call: Call, data: st.DataObject) -> None:
    query, key, value, mask = (each(cut_anywhere(data), array) for array in call.args)
    out, lse = fastattn.attention(*call.args, **call.options, return_lse=True)
    rng = np.random.default_rng(0)
    grad_out, grad_lse = (rng.standard_normal(array.shape).astype(array.dtype) for array in (out, lse))
    names = ["query", "key", "value", *(["attn_mask"] if bias_in(call.args[3]) is not None else [])]
    of_heads = [name for name in ("alibi_slopes", "sinks") if call.options.get(name) is not None]
    upstream = map(cut_anywhere(data), (out, lse))
    options = {**call.options, "grad_lse": cut_anywhere(data)(grad_lse), "grads": (*names, *of_heads)}
    lazy = attention_backward(cut_anywhere(data)(grad_out), query, key, value, *upstream, mask, **options)
    found = dask.compute(*lazy)
    assert [(array.dtype, array.shape) for array in lazy] == [(array.dtype, array.shape) for array in found]
    wanted = tolerances.expected_gradients(grad_out, *call.args, grad_lse=grad_lse, **call.options)
    tolerances.check_gradients(found[: len(names)], call.args, *wanted)
    heads = dict(zip(of_heads, found[len(names) :], strict=True))
    tolerances.check_head_gradients(heads, grad_out, *call.args, grad_lse=grad_lse, **call.options)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((0, 2, 3, 4), (0, 2, 5, 4)),
        ((1, 0, 3, 4), (1, 0, 5, 4)),
        ((1, 2, 0, 4), (1, 2, 5, 4)),
        ((1, 2, 3, 4), (1, 2, 0, 4)),
        ((1, 2, 3, 0), (1, 2, 5, 0)),
    ],
    ids=["batch", "heads", "queries", "keys", "features"],
)
def test_axes_of_length_zero(queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    query, key, of_heads = np.ones(queries), np.ones(keys), np.ones(queries[1])
    options: dict[str, Any] = {"sinks": of_heads, "alibi_slopes": of_heads, "is_causal": True}
    cut = [da.from_array(array, chunks=2) for array in (query, key, key)]
    wanted = fastattn.attention(query, key, key, **options, return_lse=True)
    found = attention(*cut, **options, return_lse=True)
    told: dict[str, Any] = {**options, "grad_lse": wanted[1]}
    told["grads"] = ("query", "key", "value", "sinks", "alibi_slopes")
    wanted += fastattn.attention_backward(wanted[0], query, key, key, *wanted, **told)
    found += attention_backward(wanted[0], *cut, *found, **told)
    for lazy, want in zip(found, wanted, strict=True):
        assert (lazy.dtype, lazy.shape) == (want.dtype, want.shape)
        np.testing.assert_allclose(lazy.compute(), want, atol=1e-12)


def test_gradients_of_what_a_function_captures() -> None:
    arrays = inputs()
    table, slope = np.linspace(-1, 1, 70, dtype=np.float32), np.array(0.3)

    def relative(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[key - query + 9] * (head + 1) - slope * batch

    options: dict[str, Any] = {"score_mod": relative, "enable_gqa": True}
    out, lse = fastattn.attention(*arrays, **options, return_lse=True)
    names = ("table", "slope", "query")
    wanted = fastattn.attention_backward(out, *arrays, out, lse, **options, grads=names)
    found = attention_backward(out, *chunked(*arrays, CUTS["all"]), out, lse, **options, grads=names)
    for lazy, want in zip(found, wanted, strict=True):
        assert (lazy.dtype, lazy.shape) == (want.dtype, want.shape)
        np.testing.assert_allclose(lazy.compute(), want, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int32])
def test_results_have_the_dtype_of_the_call_and_parts_that_of_sums(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []

    def noted(*arguments: Any, **options: Any) -> Any:
        parts.append(pieces.attend(*arguments, **options))
        return parts[-1]

    monkeypatch.setattr(tasks, "attend", noted)
    arrays = [3 * array.astype(np.float32) for array in inputs()]
    arrays = [array.astype(dtype) for array in arrays]
    wanted = tolerances.expected(*arrays, enable_gqa=True)
    out, lse = attention(*chunked(*arrays, CUTS["keys"]), enable_gqa=True, return_lse=True)
    storage, real = {2: (dtype, np.float32)}.get(np.dtype(dtype).itemsize, (np.float64, np.float64))
    results = dask.compute(out, lse)
    assert [each.dtype for each in (out, lse, *results)] == [storage, real] * 2
    assert out._meta.dtype == storage
    tolerances.check_out(results[0], wanted)
    tolerances.check_lse(results[1], wanted)
    assert len(parts) == 9
    assert {each.dtype for part in parts for each in part} == {np.dtype(real)}

    grad_out = np.ones((2, 4, 9, 5), np.float32)
    grads = attention_backward(grad_out, *chunked(*arrays, CUTS["keys"]), out, lse, enable_gqa=True)
    assert {each.dtype for each in (*grads, *dask.compute(*grads))} == {np.dtype(storage)}


def test_dtypes_that_differ_are_one() -> None:
    query, key, value = inputs()
    given = query.astype(np.float16), key, value.astype(np.float64)
    out = attention(*chunked(*given, CUTS["all"]), enable_gqa=True)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, fastattn.attention(*given, enable_gqa=True), atol=1e-6)


def rows_in_two_axes(dtype: Any = np.float32) -> list[Array]:
    """Return query, key and value with a batch of 2 x 3, of which key has the last axis alone."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in [(2, 3, 2, 5, 8), (3, 1, 20, 8), (2, 1, 2, 20, 8)]]


@pytest.mark.parametrize("options", [{"mask_mod": half}, {"dropout_p": 0.5, "rng": 1}], ids=["function", "dropout"])
@pytest.mark.parametrize("rows", [(2, 2), (1, 2), (2, 3), (1, 3)], ids=str)
def test_numbers_of_rows_are_those_of_the_whole_batch(options: dict[str, Any], rows: tuple[int, int]) -> None:
    query, key, value = rows_in_two_axes()
    value = np.broadcast_to(np.eye(20, dtype=np.float32), (2, 1, 2, 20, 20))  # the result is the weights
    wanted = fastattn.attention(query, key, value, **options)
    cut = da.from_array(query, chunks=(*rows, 1, 5, 8)), da.from_array(key, chunks=(rows[1], 1, 7, 8)), value
    found = attention(*cut, **options).compute()
    np.testing.assert_array_equal(found == 0, wanted == 0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_heads_are_cut_between_groups_and_one_head_of_keys_is_shared_by_any() -> None:
    rng = np.random.default_rng(0)
    query, key, one = (rng.standard_normal((heads, 6, 4)) for heads in (6, 2, 1))
    cut = da.from_array(query, chunks=((1, 1, 2, 2), 6, 4))
    assert attention(cut, key, key, enable_gqa=True).chunks[0] == (6,)
    assert attention(cut[:, :, ::2], key[..., ::2], key, enable_gqa=True).chunks == ((6,), (6,), (4,))
    assert attention(cut, da.from_array(key, chunks=1), key, enable_gqa=True).chunks[0] == (3, 3)
    shared = attention(cut, one, one, enable_gqa=True)
    assert shared.chunks[0] == (1, 1, 2, 2)
    np.testing.assert_allclose(shared, fastattn.attention(query, one, one), atol=1e-12)


# -- the graph ---------------------------------------------------------------------------------------------------------


def read_never(*given: Any, **keywords: Any) -> Any:
    raise AssertionError("a chunk has been computed")


def pieces_in(array: Any) -> int:
    """How many tasks of a graph attend to keys."""
    return sum("piece" in key[0] for key in dict(array.dask) if isinstance(key, tuple))


def test_nothing_is_computed_while_the_graph_is_made() -> None:
    query, key, value = (each.map_blocks(read_never, meta=each._meta) for each in chunked(*inputs(), CUTS["all"]))
    mask = da.from_array(KEEP, chunks=7).map_blocks(read_never, meta=np.empty(0, bool))
    out, lse = attention(query, key, value, mask, 0.1, "bottom-right", enable_gqa=True, return_lse=True, rng=0)
    grads = attention_backward(out, query, key, value, out, lse, mask, 0.1, "bottom-right", enable_gqa=True, rng=0)
    for array in (out, lse, *grads):
        with pytest.raises(AssertionError, match="a chunk has been computed"):
            array.compute()


def test_no_chunk_of_keys_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(query: Array, key: Array, value: Array, *rest: Any, **options: Any) -> Any:
        seen.append((query.shape[-2], key.shape[-2]))
        return pieces.attend(query, key, value, *rest, **options)

    monkeypatch.setattr(tasks, "attend", noted)
    query, key, value = inputs()
    arrays = [da.from_array(array, chunks=(2, -1, size, -1)) for array, size in ((query, 5), (key, 20), (value, 30))]
    attention(*arrays, enable_gqa=True).compute()
    assert sorted(seen) == sorted((queries, keys) for queries in (4, 5) for keys in (10, 10, 20, 20))


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        ({}, 36),
        ({"is_causal": True}, 21),
        ({"window": (10, 0)}, 11),
        ({"window": (9, 9)}, 16),
        ({"key_lengths": np.array(21)}, 18),
        ({"is_causal": True, "query_offset": 9, "key_lengths": [60, 0]}, 26),
        ({"window": (0, 0), "query_offset": 1000}, 0),
        ({"block_mask": BlockMask.from_intervals(np.zeros(60, int), np.full(60, 3), 60)}, 36),
    ],
    ids=str,
)
def test_what_nobody_sees_is_no_task(options: dict[str, Any], pieces: int) -> None:
    query = da.random.default_rng(0).standard_normal((2, 1, 60, 4), chunks=(2, 1, 10, 4))
    found = attention(query, query, query, **options)
    assert pieces_in(found) == pieces
    given = query.compute()
    np.testing.assert_allclose(found, fastattn.attention(given, given, given, **options), atol=1e-6)


def test_blocks_that_are_empty_are_no_task() -> None:
    mask = BlockMask.from_function(lambda batch, head, query, key: query // 64 == key // 64, 256, 256)
    query = da.random.default_rng(0).standard_normal((1, 256, 4), chunks=(1, 64, 4))
    assert pieces_in(attention(query, query, query, block_mask=mask)) == 4


def test_queries_that_see_nothing_give_zero() -> None:
    query, key, value = chunked(*inputs(), CUTS["all"])
    out, lse = attention(
        query, key, value, enable_gqa=True, key_lengths=[0, 60], sinks=[1, 2, 3, -INF], return_lse=True
    )
    assert not out[0].compute().any()
    np.testing.assert_array_equal(lse[0, :, 0], np.array([1, 2, 3, -INF], np.float32))


def test_many_results_are_merged_some_at_a_time() -> None:
    cut = chunked(*inputs(), (2, 4, 9, 5))

    def merges(**options: Any) -> list[int]:
        graph = dict(attention(*cut, enable_gqa=True, **options).dask)
        return sorted(len(task[1]) for key, task in graph.items() if isinstance(key, tuple) and "merged" in key[0])

    assert merges() == [3, 4, 4, 4]
    assert merges(split_every=2) == [2] * 11
    with dask.config.set(split_every=12):
        assert merges() == [12]


def test_the_same_call_has_the_same_names() -> None:
    cut = chunked(*inputs(), CUTS["all"])
    options: dict[str, Any] = {"enable_gqa": True, "score_mod": sloped, "dropout_p": 0.1}
    first, again, other = (attention(*cut, rng=rng, **options) for rng in (1, 1, 2))
    assert first.name == again.name
    assert first.name != other.name
    assert attention(*cut, enable_gqa=True).name != attention(*cut, enable_gqa=True, softcap=3.0).name


# -- bad input ---------------------------------------------------------------------------------------------------------


def unknown() -> Any:
    query = da.zeros((60, 8), chunks=(20, 8))
    return query[query[:, 0] > 0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lengths of chunks": ({"key": unknown()}, "key: chunks of lengths that are not known.* key.compute_chunk_sizes"),
    "shapes": ({"value": da.zeros((59, 8))}, "value: shape .59, 8.; expected length 60 on axis -2"),
    "mask": ({"attn_mask": da.zeros((8, 60))}, "attn_mask: shape .8, 60.; expected one that broadcasts"),
    "mask of integers": ({"attn_mask": da.zeros((9, 60), dtype=int)}, "attn_mask: dtype int64 could mean two things"),
    "dtype": ({"query": da.zeros((9, 8), dtype=complex)}, "query: dtype complex128 is not supported"),
    "no array": ({"query": None}, "query: None; expected an array_like"),
    "delayed": ({"query": dask.delayed(np.zeros)((9, 8))}, "query: .*; expected a dask.array.Array"),
    "a list of chunks": ({"key": [da.zeros(8)] * 60}, "key: .*; expected a dask.array.Array"),
    "masked": ({"query": da.ma.masked_equal(da.zeros((9, 8)), 1)}, "query: a numpy.ma.MaskedArray"),
    "lengths in chunks": ({"key_lengths": da.ones(1, dtype=int)}, "key_lengths: .*; expected an array in memory"),
    "option": ({"window": 3}, "window: 3"),
    "block mask": ({"block_mask": BlockMask.from_array(np.ones((9, 59), bool))}, "block_mask: made for"),
    "split_every": ({"split_every": 1}, "split_every: 1; expected 2 or more"),
    "threads": ({"num_threads": 0}, "num_threads: 0; expected 1 or more"),
    "threads in words": ({"num_threads": "all"}, "num_threads: 'all'.*; expected an int"),
    "flag": ({"return_lse": 1}, "return_lse: 1"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_while_the_graph_is_made(given: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"query": da.zeros((9, 8)), "key": da.zeros((60, 8)), "value": da.zeros((60, 8)), **given}
    with pytest.raises((TypeError, ValueError), match=message):
        attention(**call)


def test_what_arrives_at_a_backward_pass_is_checked() -> None:
    query, key, value = (da.zeros(shape) for shape in ((2, 9, 8), (2, 60, 8), (2, 60, 5)))
    out, lse = attention(query, key, value, return_lse=True)
    with pytest.raises(ValueError, match="grad_out: shape .2, 9, 8.; expected .2, 9, 5."):
        attention_backward(query, query, key, value, out, lse)
    with pytest.raises(ValueError, match="lse: shape .2, 9, 5.; expected .2, 9."):
        attention_backward(out, query, key, value, out, out)
    with pytest.raises(TypeError, match="out: None"):
        attention_backward(out, query, key, value, None, lse)
    with pytest.raises(TypeError, match="lse: None"):
        attention_backward(out, query, key, value, out, None)
    with pytest.raises(ValueError, match="grads: 'sinks', but the call has none"):
        attention_backward(out, query, key, value, out, lse, grads=("sinks",))
    with pytest.raises(ValueError, match="rng: None with dropout_p"):
        attention_backward(out, query, key, value, out, lse, dropout_p=0.5)


def test_without_dask_one_line_says_what_is_missing() -> None:
    printed = processes.run("""
import sys
sys.modules["dask"] = None
try:
    import fastattn.integrations.dask
except ImportError as error:
    print(error)
""")
    assert printed == f"fastattn.integrations.dask needs Dask: {to_install('dask')}\n"
