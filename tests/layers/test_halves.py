"""Layers of half precision: those in float32 of the same parameters, their results rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import processes
import pytest

import fastattn
from fastattn.call.halves import cast

Array = np.ndarray[Any, Any]
DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
FLOAT32 = np.dtype(np.float32)
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "multi-head": (lambda dtype: fastattn.MultiHeadAttention(16, 4, rng=0, dtype=dtype), {"is_causal": True}),
    "grouped": (lambda dtype: fastattn.MultiHeadAttention(16, 4, num_kv_heads=2, rng=0, dtype=dtype), {}),
    "bias_kv": (lambda dtype: fastattn.MultiHeadAttention(16, 4, bias_kv=True, rng=0, dtype=dtype), {}),
    "bahdanau": (lambda dtype: fastattn.BahdanauAttention(16, 16, hidden_dim=8, rng=0, dtype=dtype), {}),
    "general": (lambda dtype: fastattn.LuongAttention(16, 16, rng=0, dtype=dtype), {}),
    "concat": (lambda dtype: fastattn.LuongAttention(16, 16, score="concat", hidden_dim=8, rng=0, dtype=dtype), {}),
    "local-p": (lambda dtype: fastattn.LuongAttention(16, 16, align="local-p", window=2, rng=0, dtype=dtype), {}),
}


def inputs(dtype: np.dtype[Any]) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    query, key = (cast(rng.standard_normal((2, length, 16)), dtype) for length in (5, 9))
    return query, key


def both(name: str, dtype: np.dtype[Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return a layer of half precision, and one in float32 of the same parameters."""
    make, options = LAYERS[name]
    narrow, wide = make(dtype), make(FLOAT32)
    wide.load_state_dict(narrow.state_dict())
    return narrow, wide, options


def same_rounded(narrow: Array, wide: Array, dtype: np.dtype[Any]) -> None:
    assert narrow.dtype == dtype
    assert narrow.tobytes() == cast(wide, dtype).tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients_are_rounded_once(name: str, dtype: np.dtype[Any]) -> None:
    narrow, wide, options = both(name, dtype)
    given = inputs(dtype)
    widened = [cast(each, FLOAT32) for each in given]
    out, weights, saved = narrow(*given, **options, return_weights=True, return_saved=True)
    wanted, wanted_weights = wide(*widened, **options, return_weights=True)
    same_rounded(out, wanted, dtype)
    same_rounded(weights, wanted_weights, dtype)
    grad_out = np.ones_like(out)
    found, of_parameters = narrow.backward(grad_out, saved)
    again, _ = narrow.backward(grad_out, given, **options)
    gradients, of_wide = wide.backward(cast(grad_out, FLOAT32), tuple(widened), **options)
    for one, other, exact in zip(found, again, gradients, strict=True):
        same_rounded(one, exact, dtype)
        assert one.tobytes() == other.tobytes()
    for parameter, gradient in of_parameters.items():
        same_rounded(gradient, of_wide[parameter], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_promote(dtype: np.dtype[Any]) -> None:
    narrow, wide, _ = both("multi-head", dtype)
    query, key = inputs(FLOAT32)
    np.testing.assert_array_equal(narrow(query, key), wide(query, key))
    assert narrow(query.astype(np.float64), key).dtype == np.float64
    assert wide(*inputs(dtype)).dtype == FLOAT32
    other = next(each for each in DTYPES if each != dtype)
    assert narrow(*inputs(other)).dtype == FLOAT32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_methods(dtype: np.dtype[Any]) -> None:
    query, key = inputs(dtype)
    wide_query, wide_key = inputs(dtype)[0].astype(np.float32), inputs(dtype)[1].astype(np.float32)
    bahdanau, wide, _ = both("bahdanau", dtype)
    projected = bahdanau.project_keys(key)
    same_rounded(projected, wide.project_keys(wide_key), dtype)
    assert bahdanau(query, key, projected_keys=projected).dtype == dtype
    (gradient,), of_parameters = bahdanau.project_keys_backward(projected, (key,))
    assert gradient.dtype == of_parameters["key_weight"].dtype == dtype
    luong, wide, _ = both("general", dtype)
    context = luong(query, key)
    state = luong.attentional(context, query)
    same_rounded(state, wide.attentional(context.astype(np.float32), wide_query), dtype)
    found, of_parameters = luong.attentional_backward(state, (context, query))
    assert {each.dtype for each in (*found, *of_parameters.values())} == {dtype}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary(dtype: np.dtype[Any]) -> None:
    query, _ = inputs(dtype)
    same_rounded(fastattn.rotary(query, np.arange(5)), fastattn.rotary(query.astype(np.float32), np.arange(5)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpoints(dtype: np.dtype[Any], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    narrow, wide, options = both("multi-head", dtype)
    narrow.save(tmp_path / "layer")
    again = fastattn.MultiHeadAttention.load(tmp_path / "layer")
    assert again.dtype == dtype
    given = inputs(dtype)
    assert again(*given, **options).tobytes() == narrow(*given, **options).tobytes()
    # into a layer of any dtype
    state = safetensors.load_file(tmp_path / "layer")
    wide.load_state_dict(state)
    np.testing.assert_array_equal(wide.in_proj_weight, narrow.in_proj_weight.astype(np.float32))
    again.load_state_dict(wide.state_dict())
    assert again.in_proj_weight.tobytes() == narrow.in_proj_weight.tobytes()


def test_what_a_dtype_cannot_hold_is_refused() -> None:
    layer = fastattn.MultiHeadAttention(16, 4, rng=0, dtype="float16")
    with pytest.raises(ValueError, match="out_proj_bias: the largest magnitude is 70000.0; expected one that float16"):
        layer.out_proj_bias = np.full(16, 7e4)


def test_bfloat16_by_its_name_needs_ml_dtypes(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    assert fastattn.MultiHeadAttention(16, 4, rng=0, dtype="bfloat16").dtype == ml_dtypes.bfloat16
    fastattn.MultiHeadAttention(16, 4, rng=0, dtype="bfloat16").save(tmp_path / "layer")
    code = f"""
import sys
import fastattn
for make in (
    lambda: fastattn.MultiHeadAttention(16, 4, dtype="bfloat16"),
    lambda: fastattn.MultiHeadAttention.load({str(tmp_path / "layer")!r}),
):
    try:
        make()
    except TypeError as error:
        print(error)
assert "ml_dtypes" not in sys.modules
"""
    first, second = processes.run(code).splitlines()
    assert first.endswith(
        "'bfloat16' of type str, which NumPy knows once ml_dtypes is imported; expected float16, bfloat16, float32 or "
        "float64"
    )
    assert "holds bfloat16, of which NumPy makes arrays once ml_dtypes is imported" in second
