"""What the layers compute, in plain NumPy on whole matrices: read this first.

As in `fastattn.reference`, everything is evaluated in a wider type, and returned in it: float64 for layers and
arguments of float32, longdouble for float64. Shapes in the comments: B elements of a batch, H heads of D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.problem import Array
from fastattn.layers.luong import LuongAttention
from fastattn.layers.multihead import MultiHeadAttention
from fastattn.reference.forward import weighted_sum

__all__ = ["luong_attention", "multi_head_attention"]


@np.errstate(all="ignore")
def multi_head_attention(
    layer: MultiHeadAttention,
    query: ArrayLike,
    key: ArrayLike | None = None,
    value: ArrayLike | None = None,
    attn_mask: ArrayLike | None = None,
    *,
    key_mask: ArrayLike | None = None,
    is_causal: bool = False,
) -> tuple[Array, Array]:
    """Evaluate multi-head attention.

    Parameters
    ----------
    layer : MultiHeadAttention
    query, key, value, attn_mask, key_mask, is_causal
        As the layer is called with; causal from the top left only.

    Returns
    -------
    out : ndarray, shape (..., Lq, E)
    weights : ndarray, shape (..., H, Lq, Lk)
    """
    key = query if key is None else key
    value = key if value is None else value
    q, k, v, *parameters = _widened(layer, query, key, value)
    state = dict(zip(layer.state_dict(), parameters, strict=True))
    embed, kv = layer.embed_dim, layer.num_kv_heads * layer.head_dim
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    matrices = np.split(state["in_proj_weight"], 3) if "in_proj_weight" in state else [state[name] for name in names]
    biases = np.split(state["in_proj_bias"], [embed, embed + kv]) if layer.bias else [0, 0, 0]

    heads = []
    for x, matrix, bias in zip((q, k, v), matrices, biases, strict=True):
        projected = x @ matrix.T + bias
        heads.append(
            projected.reshape(*x.shape[:-1], len(matrix) // layer.head_dim, layer.head_dim).swapaxes(-2, -3)
        )  # (B, H, L, D)
    group = layer.num_heads // layer.num_kv_heads
    q, k, v = heads[0], *(np.repeat(array, group, axis=-3) for array in heads[1:])

    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.dtype.type(layer.head_dim))
    visible = np.ones(scores.shape, bool)
    if key_mask is not None:
        visible &= np.asarray(key_mask)[..., None, None, :]
    if is_causal:
        visible &= np.tri(*scores.shape[-2:], dtype=np.bool_)
    weights, visible = _softmax(scores, visible, attn_mask)
    context = weighted_sum(weights, v, visible).swapaxes(-2, -3)  # (B, L, H, D)
    out = context.reshape(*context.shape[:-2], embed) @ state["out_proj.weight"].T
    return out + state.get("out_proj.bias", 0), weights


@np.errstate(all="ignore")
def luong_attention(
    layer: LuongAttention,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike | None = None,
    attn_mask: ArrayLike | None = None,
    *,
    key_lengths: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Evaluate Luong's attention, with the local alignments as windows cut out of the whole matrix.

    Parameters
    ----------
    layer : LuongAttention
    query, key, value, attn_mask, key_lengths, positions
        As the layer is called with.

    Returns
    -------
    context : ndarray, shape (..., Lq, value_dim)
    weights : ndarray, shape (..., Lq, Lk)
    """
    q, k, v, *parameters = _widened(layer, query, key, key if value is None else value)
    state = dict(zip(layer.state_dict(), parameters, strict=True))
    length = np.asarray(k.shape[-2] if key_lengths is None else key_lengths)[..., None, None]  # S
    j = np.arange(k.shape[-2])

    if layer.score == "dot":
        scores = q @ k.swapaxes(-1, -2)
    elif layer.score == "general":
        scores = q @ state["score_weight"] @ k.swapaxes(-1, -2)
    else:
        q_and_k = np.concatenate(_pairs(q, k), axis=-1)  # (B, Lq, Lk, query_dim + key_dim)
        scores = np.tanh(q_and_k @ state["score_weight"].T) @ state["score_vector"]
    visible = np.broadcast_to(j < length, scores.shape)

    p = np.arange(q.shape[-2])[:, None] if positions is None else np.asarray(positions)[..., None]
    if layer.align == "local-p":
        hidden = np.tanh(q @ state["position_weight"].T) @ state["position_vector"]
        p = length / (1 + np.exp(-hidden[..., None]))
    if layer.align != "global":
        visible = visible & (np.abs(j - p) <= layer.window)
    weights, visible = _softmax(scores, visible, attn_mask)
    if layer.align == "local-p":
        sigma = layer.window / 2
        weights = np.where(visible, weights * np.exp(-((j - p) ** 2) / (2 * sigma**2)), 0)
    return weighted_sum(weights, v, visible), weights


def _widened(layer: Any, *arrays: ArrayLike) -> Any:
    """Return the arrays, then the parameters of the layer, in the wider type."""
    parameters = layer.state_dict().values()
    given = [np.asarray(array) for array in arrays]
    narrow = np.result_type(layer.dtype, *given)
    wide: Any = np.float64 if narrow == np.float32 else np.longdouble
    return [array.astype(wide) for array in (*given, *parameters)]


def _pairs(q: Array, k: Array) -> tuple[Array, Array]:
    """Return each query beside each key, shapes (..., Lq, Lk, features)."""
    batch = np.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    rows, columns = q.shape[-2], k.shape[-2]
    return (
        np.broadcast_to(q[..., :, None, :], (*batch, rows, columns, q.shape[-1])),
        np.broadcast_to(k[..., None, :, :], (*batch, rows, columns, k.shape[-1])),
    )


def _softmax(scores: Array, visible: Array, attn_mask: ArrayLike | None) -> tuple[Array, Array]:
    """Return softmaxed scores under a mask, and what is visible in the end; a row with nothing visible is 0."""
    if attn_mask is not None:
        mask = np.asarray(attn_mask)
        if mask.dtype.kind == "b":
            visible = visible & mask
        else:
            visible, scores = visible & (mask != -np.inf), scores + mask
    scores = np.where(visible, scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    empty = highest == -np.inf
    weights = np.exp(scores - np.where(empty, 0, highest))
    return np.where(empty, 0, weights / np.where(empty, 1, weights.sum(axis=-1, keepdims=True))), visible
