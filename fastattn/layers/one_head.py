"""Attention to arrays without a head axis, (..., length, features), as the layers of Bahdanau and Luong have them.

`fastattn.attention` takes the axis before the last two for that of the heads. What it is told of each row of a batch,
such as `key_lengths`, has the axes before that one. In these layers there is one head, and all of those axes are the
batch's: arrays get an axis of length 1 here, and results lose it.
"""

from __future__ import annotations

from typing import Any

from fastattn.api.additive import additive_attention
from fastattn.api.attention import attention
from fastattn.api.backward import additive_attention_backward, attention_backward
from fastattn.call.problem import Array, Mask
from fastattn.call.score_options import FurtherOptions
from fastattn.layers.masks import changed

__all__ = ["attend", "attend_backward", "one_head"]


def one_head(array: Array) -> Array:
    """Return an array, or a mask, with an axis of one head before its last two; a mask may lack these."""
    return array if array.ndim < 2 else array[..., None, :, :]


def attend(
    query: Array,
    key: Array,
    value: Array,
    weight: Array | None,
    mask: Mask,
    options: FurtherOptions,
    return_weights: bool = False,
) -> tuple[Array, Array, Array | None]:
    """Attend.

    Parameters
    ----------
    query, key, value : ndarray, shapes (..., Lq, D), (..., Lk, D), (..., Lk, Dv)
    weight : ndarray, shape (D,), or None
        Given, the score is that of additive attention, else the product of query and key.
    mask : ndarray, pair of them, or None
        Broadcasting to (..., Lq, Lk).
    options : FurtherOptions
    return_weights : bool

    Returns
    -------
    out : ndarray, shape (..., Lq, Dv)
    lse : ndarray, shape (..., Lq)
    weights : ndarray, shape (..., Lq, Lk), or None
    """
    wanted: Any = {"return_lse": True, "return_weights": return_weights, **options}
    given = (one_head(query), one_head(key), one_head(value))
    attn_mask: Any = changed(mask, one_head)
    if weight is None:
        out, lse, *weights = attention(*given, attn_mask, scale=1.0, **wanted)
    else:
        out, lse, *weights = additive_attention(*given, weight, attn_mask, **wanted)
    return out[..., 0, :, :], lse[..., 0, :], weights[0][..., 0, :, :] if weights else None


def attend_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    weight: Array | None,
    out: Array,
    lse: Array,
    mask: Mask,
    options: FurtherOptions,
) -> tuple[Array, ...]:
    """Return the gradients of query, key and value, and of the weight if there is one.

    Parameters
    ----------
    grad_out : ndarray, shape (..., Lq, Dv)
    query, key, value, weight, mask, options
        What `attend` was given.
    out, lse : ndarray
        What it returned.
    """
    grad, q, k, v, result = map(one_head, (grad_out, query, key, value, out))
    attn_mask: Any = changed(mask, one_head)
    if weight is None:
        found = attention_backward(grad, q, k, v, result, lse[..., None, :], attn_mask, scale=1.0, **options)
    else:
        found = additive_attention_backward(grad, q, k, v, weight, result, lse[..., None, :], attn_mask, **options)
    return (*(gradient[..., 0, :, :] for gradient in found[:3]), *found[3:])
