"""One more key and value, which every query looks at, behind those of the sequence: what PyTorch calls `add_bias_kv`.

Masks, positions and lengths say nothing of it. So it is a piece of the keys by itself: attention to it is merged with
attention to the others, and its gradients are those of that piece.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastattn.api.attention import attention
from fastattn.api.backward import attention_backward
from fastattn.api.merge import merge
from fastattn.call.problem import Array
from fastattn.call.upstream import summed_to

__all__ = ["attend", "attend_backward"]


@np.errstate(all="ignore")
def attend(
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    weights: Array | None,
    softcap: float | None,
    grouped: bool,
) -> tuple[Array, Array | None]:
    """Add the extra key to attention to the others.

    Parameters
    ----------
    query : ndarray, shape (..., H, Lq, D)
    key, value : ndarray, shape (Hk, 1, D)
    out : ndarray, shape (..., H, Lq, D)
        The result over the other keys, in whose place that over all comes to be.
    lse : ndarray, shape (..., H, Lq)
    weights : ndarray, shape (..., H, Lq, Lk), or None
    softcap, grouped
        As `fastattn.attention` is given them.

    Returns
    -------
    lse : ndarray, shape (..., H, Lq)
    weights : ndarray, shape (..., H, Lq, Lk + 1), or None
    """
    options: Any = {"softcap": softcap, "enable_gqa": grouped, "return_lse": True}
    own, own_lse = attention(query, key, value, **options)
    own, own_lse = np.broadcast_to(own, out.shape), np.broadcast_to(own_lse, lse.shape)
    merged, merged_lse = merge((out, own), (lse, own_lse))
    out[...] = merged
    if weights is None:
        return merged_lse, None
    share, own_share = (np.exp(piece - merged_lse)[..., None] for piece in (lse, own_lse))
    kept = np.where(share == 0, 0, weights * share)
    return merged_lse, np.concatenate([kept, own_share], axis=-1, dtype=weights.dtype)


def attend_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    softcap: float | None,
    grouped: bool,
) -> tuple[Array, Array, Array]:
    """Return the gradients of the extra key and value, and the part of the queries' that they bring.

    Parameters
    ----------
    grad_out, out : ndarray, shape (..., H, Lq, D)
        `out`, as `lse`, is that over all keys.
    query, key, value, softcap, grouped
        What `attend` was given.
    lse : ndarray, shape (..., H, Lq)

    Returns
    -------
    grad_query, grad_key, grad_value : ndarray
    """
    queries = np.broadcast_to(query, (*out.shape[:-1], query.shape[-1]))
    options: Any = {"softcap": softcap, "enable_gqa": grouped}
    grad_query, grad_key, grad_value = attention_backward(grad_out, queries, key, value, out, lse, **options)
    return summed_to(grad_query, query.shape), grad_key, grad_value
