"""Coming from PyTorch, JAX and flash-attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances
from semantic_cases import INF, Array, Attention, close, dtypes, grouped, inputs, normal, softmax_attention

import fastattn


def torch_attention(query: Array, key: Array, value: Array, mask: Array | None, options: dict[str, Any]) -> Array:
    """Call PyTorch's scaled_dot_product_attention, its causal mask made part of the mask where there is one."""
    torch = pytest.importorskip("torch")
    options = dict(options)
    is_causal = options.pop("is_causal", False)
    lengths = query.shape[-2], key.shape[-2]
    if is_causal and (mask is not None or is_causal == "bottom-right"):
        causal = np.tri(*lengths, k=0 if is_causal is True else lengths[1] - lengths[0], dtype=bool)
        if mask is None:
            mask = causal
        else:
            mask = causal & mask if mask.dtype == bool else np.where(causal, mask, -INF).astype(mask.dtype)
        is_causal = False
    arrays = [torch.from_numpy(array) for array in (query, key, value)]
    return np.asarray(
        torch.nn.functional.scaled_dot_product_attention(
            *arrays, None if mask is None else torch.from_numpy(mask), is_causal=is_causal, **options
        )
    )


@dtypes
@pytest.mark.parametrize(
    ("length", "features"),
    [((1, 1), 64), ((8, 8), 5), ((1, 300), 128), ((70, 60), 64), ((65, 150), 5), ((65, 150), 128)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
def test_coming_from_pytorch(
    attention: Attention, dtype: Any, length: tuple[int, int], features: int, kind: str, is_causal: Any
) -> None:
    query, key, value = inputs(length, (2, 2), features, dtype=dtype)
    mask = None if kind == "none" else normal(2, *length, dtype=dtype, seed=4)
    mask = mask > 0 if mask is not None and kind == "bool" else mask
    options = {"is_causal": is_causal, "scale": 0.2}
    peer = torch_attention(query, key, value, mask, options)
    wanted = tolerances.expected(query, key, value, mask, **options)
    tolerances.check_out(attention(query, key, value, mask, **options), wanted, peer)
    # and PyTorch means the same
    tolerances.check_out(peer, wanted, peer)


@dtypes
def test_coming_from_pytorch_with_groups(attention: Attention, dtype: Any) -> None:
    query, key, value = grouped(((2, 6), (2, 2), (50, 70)), dtype)
    peer = torch_attention(query, key, value, None, {"enable_gqa": True, "is_causal": True})
    wanted = tolerances.expected(query, key, value, enable_gqa=True, is_causal=True)
    tolerances.check_out(attention(query, key, value, is_causal=True, enable_gqa=True), wanted, peer)
    np.testing.assert_allclose(peer, wanted.out, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("features", [64, 128])
def test_results_and_gradients_of_float32_are_as_exact_as_pytorchs(features: int, size: float, is_causal: bool) -> None:
    """By the root mean square of their errors, which no few numbers make up; `size` is that of the scores."""
    torch = pytest.importorskip("torch")
    query, key, value, grad_out = (normal(1, 2, 600, features, seed=i) for i in range(4))
    query *= np.float32(size)
    out, lse = fastattn.attention(query, key, value, is_causal=is_causal, return_lse=True)
    ours = out, *fastattn.attention_backward(grad_out, query, key, value, out, lse, is_causal=is_causal)

    leaves = [torch.from_numpy(array).requires_grad_() for array in (query, key, value)]
    result = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=is_causal)
    theirs = result.detach(), *torch.autograd.grad(result, leaves, torch.from_numpy(grad_out))

    wide = [array.astype(np.float64) for array in (grad_out, query, key, value)]
    exact = fastattn.attention(*wide[1:], is_causal=is_causal, return_lse=True, backend="reference")
    gradients = fastattn.attention_backward(*wide, *exact, is_causal=is_causal, backend="reference")
    for our, their, right in zip(ours, theirs, (exact[0], *gradients), strict=True):
        error, peer = (float(np.sqrt(np.mean((np.asarray(x, np.float64) - right) ** 2))) for x in (our, their))
        assert error <= 1.25 * peer


def test_coming_from_jax_and_flash_attention_axes_are_swapped_without_a_copy(attention: Attention) -> None:
    query, key, value = (normal(2, 33, 4, 16, seed=i).swapaxes(-3, -2) for i in range(3))
    out = attention(query, key, value)
    close(out, softmax_attention(query, key, value, 0.25))


def test_coming_from_torch_tensors(attention: Attention) -> None:
    torch = pytest.importorskip("torch")
    arrays = inputs()
    np.testing.assert_array_equal(attention(*map(torch.from_numpy, arrays)), attention(*arrays))
    with pytest.raises(TypeError, match=r"query: .*Tensor.*requires grad"):
        attention(torch.zeros(3, 4, requires_grad=True), *arrays[1:])
