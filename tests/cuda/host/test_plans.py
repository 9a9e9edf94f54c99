"""Plans are remembered: for calls of the same layout, and for no others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastattn

Attention = Callable[..., Any]
HALF, SINGLE = np.float16, np.float32


def some(*shape: int, dtype: Any = SINGLE) -> Any:
    """Return an array of numbers."""
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def close(found: Any, wanted: Any, dtype: Any) -> None:
    np.testing.assert_allclose(np.float64(found), wanted, rtol=0, atol=16 * np.finfo(dtype).eps)


@pytest.mark.parametrize("queries", [2, 6], ids=["few queries", "many"])
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("which", ["key", "value", "attn_mask"])
def test_an_axis_that_is_broadcast_is_no_axis_of_rows(
    cuda_attention: Attention, which: str, dtype: Any, queries: int
) -> None:
    # an axis of length 1 has the stride that the same axis of length 2 has, and the result the same shape
    for batch in (1, 2):
        lead = dict.fromkeys(("key", "value", "attn_mask"), 2) | {which: batch}
        query = some(2, 1, queries, 8, dtype=dtype)
        key, value = (some(lead[name], 1, 7, 8, dtype=dtype) for name in ("key", "value"))
        mask = some(lead["attn_mask"], 1, queries, 7) > 0
        wanted = fastattn.attention(*map(np.float64, (query, key, value)), mask)
        close(cuda_attention(query, key, value, mask), wanted, dtype)


def test_masks_of_other_types_have_other_gradients() -> None:
    query, key, value = some(1, 5, 8, dtype=HALF), some(1, 7, 8, dtype=HALF), some(1, 7, 8, dtype=HALF)
    backward = partial(fastattn.attention_backward, backend="cuda")
    for dtype in (np.float32, np.float64, np.float16):
        mask = some(5, 7).astype(dtype)
        wide = [np.float64(array) for array in (query, key, value, mask)]
        out, lse = fastattn.attention(*wide, return_lse=True)
        wanted = fastattn.attention_backward(np.ones_like(out), *wide[:3], out, lse, wide[3])
        found = backward(np.ones_like(out, HALF), query, key, value, HALF(out), np.float32(lse), mask)
        for one, other in zip(found, wanted, strict=True):
            close(one, other, HALF)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("which", ["query", "key"])
def test_gradients_of_what_an_empty_batch_shares_are_zero(which: str, dtype: Any) -> None:
    shapes = {name: (0 if name == which else 1, 1, 5, 8) for name in ("query", "key")}
    query, key = (some(*shapes[name], dtype=dtype) for name in ("query", "key"))
    out, lse = fastattn.attention(query, key, key, return_lse=True, backend="cuda")
    found = fastattn.attention_backward(np.ones_like(out), query, key, key, out, lse, backend="cuda")
    assert [gradient.shape for gradient in found] == [query.shape, key.shape, key.shape]
    assert not any(gradient.any() for gradient in found)
