"""Packed sequences on the device: each is what it is alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import tolerances
from numpy.typing import NDArray

import fastattn

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from numba import cuda

attention_varlen = partial(fastattn.attention_varlen, backend="cuda")
attention_varlen_backward = partial(fastattn.attention_varlen_backward, backend="cuda")

QUERIES, KEYS = [0, 3, 3, 8, 9, 19], [0, 5, 6, 6, 11, 18]
BY_SEQUENCE = np.linspace(-1, 1, 20).reshape(5, 4)


def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score * 0.5 + BY_SEQUENCE[batch, head]


def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query + 2 * key + batch) % 3 != 0


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": "bottom-right"},
    "window and softcap": {"window": (2, 1), "softcap": 1.5},
    "offsets and slopes": {"query_offset": [0, 1, -2, 3, 0], "is_causal": True, "alibi_slopes": [0.5, 0.0, 1.0, 0.1]},
    "dropout": {"dropout_p": 0.4, "rng": 2**60 + 3},
    "sinks": {"sinks": [0.5, -np.inf, 1.0, -2.0]},
    "sinks of sequences and functions": {"sinks": BY_SEQUENCE, "score_mod": score_mod, "mask_mod": mask_mod},
}


def inputs(dtype: Any = np.float32) -> tuple[NDArray[Any], ...]:
    """Return query, key, value, and the gradient of the result."""
    rng = np.random.default_rng(0)
    shapes = (QUERIES[-1], 4, 6), (KEYS[-1], 2, 6), (KEYS[-1], 2, 3), (QUERIES[-1], 4, 3)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def on_device(*arrays: NDArray[Any]) -> list[Any]:
    """Move arrays to the device."""
    return [cuda.to_device(array) for array in arrays]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("which", OPTIONS)
def test_packed_sequences_are_the_reference(dtype: Any, which: str) -> None:
    *arrays, grad_out = inputs(dtype)
    options: dict[str, Any] = {"enable_gqa": True, **OPTIONS[which]}
    lengths = QUERIES, KEYS
    out, lse = attention_varlen(*arrays, *lengths, **options, return_lse=True)
    exact = fastattn.attention_varlen(*arrays, *lengths, **options, return_lse=True, backend="reference")
    bound = 100 * float(np.finfo(dtype).eps)
    for got, wanted in zip((out, lse), exact, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, wanted, rtol=bound, atol=bound)
    call = (grad_out, *arrays, out, lse, *lengths)
    grad_lse = grad_out[..., 0] / 2
    found = attention_varlen_backward(*call, **options, grad_lse=grad_lse)
    gradients = fastattn.attention_varlen_backward(*call, **options, grad_lse=grad_lse, backend="reference")
    for got, wanted in zip(found, gradients, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("by_sequence", [False, True])
def test_gradients_by_name_are_the_reference(by_sequence: bool, dtype: Any) -> None:
    *arrays, grad_out = inputs(dtype)
    slopes = np.abs(BY_SEQUENCE if by_sequence else BY_SEQUENCE[0])
    sinks = (BY_SEQUENCE[1] if by_sequence else BY_SEQUENCE).astype(np.float32)
    options: dict[str, Any] = {"enable_gqa": True, "alibi_slopes": slopes, "sinks": sinks, "mask_mod": mask_mod}
    options |= {"score_mod": score_mod} if by_sequence else {}
    results = attention_varlen(*arrays, QUERIES, KEYS, **options, return_lse=True)
    call = (grad_out, *arrays, *results, QUERIES, KEYS)
    options["grads"] = ("sinks", "value", "alibi_slopes")
    found = attention_varlen_backward(*call, **options)
    exact = fastattn.attention_varlen_backward(*call, **options, backend="reference")
    bound = 400 * float(np.finfo(dtype).eps)
    for got, wanted in zip(found, exact, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=bound, atol=max(bound, 1e-6 if got.dtype == np.float32 else 0))


def test_arrays_in_device_memory_stay_there() -> None:
    arrays = inputs()
    query, key, value, grad_out = on_device(*arrays)
    options: dict[str, Any] = {"enable_gqa": True, "is_causal": True}
    out, lse = fastattn.attention_varlen(query, key, value, QUERIES, KEYS, **options, return_lse=True)
    assert type(out) is type(lse) is type(query)
    found = fastattn.attention_varlen_backward(grad_out, query, key, value, out, lse, QUERIES, KEYS, **options)
    moved = [each.copy_to_host() for each in (out, lse, *found)]
    wanted = attention_varlen(*arrays[:3], QUERIES, KEYS, **options, return_lse=True)
    wanted += attention_varlen_backward(arrays[3], *arrays[:3], *wanted, QUERIES, KEYS, **options)
    for got, same in zip(moved, wanted, strict=True):
        np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize("which", [None, 0, 1])
def test_out_in_device_memory_may_be_an_argument(which: int | None) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((9, 2, 4)).astype(np.float32) for _ in range(3)]
    lengths = [0, 6, 9], [0, 2, 9]
    wanted = attention_varlen(*arrays, *lengths)
    given = on_device(*arrays)
    (out,) = on_device(np.zeros_like(wanted)) if which is None else [given[which]]
    assert fastattn.attention_varlen(*given, *lengths, out=out) is out
    np.testing.assert_array_equal(out.copy_to_host(), wanted)


def test_half_precision() -> None:
    *arrays, grad_out = (array.astype(np.float16) for array in inputs())
    options: dict[str, Any] = {"enable_gqa": True, "is_causal": True}
    out, lse = attention_varlen(*arrays, QUERIES, KEYS, **options, return_lse=True)
    assert (out.dtype, lse.dtype) == (np.float16, np.float32)
    for number in range(len(QUERIES) - 1):
        rows, keys = slice(*QUERIES[number : number + 2]), slice(*KEYS[number : number + 2])
        own = [
            array[part].swapaxes(0, 1).astype(np.float32)
            for array, part in zip(arrays, (rows, keys, keys), strict=True)
        ]
        wanted = tolerances.expected(*own, **options)
        np.testing.assert_allclose(out[rows].swapaxes(0, 1), wanted.out, atol=4e-3)
        np.testing.assert_allclose(lse[rows].swapaxes(0, 1), wanted.lse, atol=4e-3)
    found = attention_varlen_backward(grad_out, *arrays, out, lse, QUERIES, KEYS, **options)
    assert [each.dtype for each in found] == [np.float16] * 3


def test_what_is_refused() -> None:
    query, key, value, _ = inputs()
    with pytest.raises(TypeError, match="key: numpy.ndarray in host memory"):
        fastattn.attention_varlen(*on_device(query), key, value, QUERIES, KEYS)
    with pytest.raises(ValueError, match="cu_seqlens_q: from 0 to 9"):
        attention_varlen(query, key, value, QUERIES[:-1], KEYS[:-1], enable_gqa=True)
    given = on_device(query, key, value)
    with pytest.raises(ValueError, match=r"lse: shape \(4, 19\); expected \(19, 4\)"):
        attention_varlen_backward(
            *on_device(query[..., :3].copy()), *given, *on_device(query[..., :3].copy(), np.ones((4, 19), np.float32)),
            QUERIES, KEYS, enable_gqa=True,
        )  # fmt: skip
