"""Dask arrays: chunks of any kind give what the whole gives, lazily, and with no task for what nobody sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances
from strategies import of_size

import fastattn
from fastattn import BlockMask

dask = pytest.importorskip("dask", reason="Dask is not installed")
da = pytest.importorskip("dask.array", reason="Dask is not installed")

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
