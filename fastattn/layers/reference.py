"""What the layers compute, in plain NumPy on whole matrices: read this first.

As in `fastattn.reference`, which has the softmax and what is done to scores before it, everything is evaluated in a
wider type, and returned in it: float64 for layers and arguments of float32, longdouble for float64. Shapes in the
comments: B elements of a batch, H heads of D features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.halves import cast, common_dtype, is_floating, real_of
from fastattn.call.problem import Array, Operands, Problem
from fastattn.call.score_options import FurtherOptions
from fastattn.call.shapes import describe
from fastattn.call.types import Causal, MaskLike, NumberLike, Operand
from fastattn.layers.bahdanau import BahdanauAttention
from fastattn.layers.luong import LuongAttention
from fastattn.layers.masks import as_key_mask, changed, combine, mask_of_scores
from fastattn.layers.multihead import MultiHeadAttention
from fastattn.layers.scores import one_head
from fastattn.reference.forward import evaluate, raw_scores, seen_scores, softmax, visibility, weighted_sum
from fastattn.reference.merge import merged

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["bahdanau_attention", "luong_attention", "multi_head_attention"]


@np.errstate(all="ignore")
def multi_head_attention(
    layer: MultiHeadAttention,
    query: Operand,
    key: Operand | None = None,
    value: Operand | None = None,
    attn_mask: MaskLike | None = None,
    *,
    key_mask: NumberLike | None = None,
    is_causal: Causal = False,
    **options: Unpack[FurtherOptions],
) -> tuple[Array, Array]:
    """Evaluate multi-head attention.

    Parameters
    ----------
    layer : MultiHeadAttention
    query, key, value, attn_mask, key_mask, is_causal, **options
        As the layer is called with.

    Returns
    -------
    out : ndarray, shape (..., Lq, E)
    weights : ndarray, shape (..., H, Lq, Lk), or one more with `bias_kv`
    """
    key = query if key is None else key
    value = key if value is None else value
    (q, k, v), state, real = _widened(layer, query, key, value)
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
    scores = (*np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2]), layer.num_heads, q.shape[-2], k.shape[-2])
    mask = combine(as_key_mask(key_mask, (*scores[:-3], scores[-1])), mask_of_scores(attn_mask, scores))
    grouped = layer.num_heads != layer.num_kv_heads
    q, k, v = heads
    problem, operands = describe(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped, **options)
    context, lse, weights = evaluate(replace(problem, real=real), operands)
    if layer.bias_kv:
        k, v = (state[name].reshape(layer.num_kv_heads, 1, layer.head_dim) for name in ("bias_k", "bias_v"))
        problem, operands = describe(q, k, v, enable_gqa=grouped, softcap=options.get("softcap"))
        context, weights = _with_extra_key(context, lse, weights, *evaluate(replace(problem, real=real), operands)[:2])
    context = context.swapaxes(-2, -3)  # (B, L, H, D)
    out = context.reshape(*context.shape[:-2], embed) @ state["out_proj.weight"].T
    return out + state.get("out_proj.bias", 0), weights


def _with_extra_key(context: Array, lse: Array, weights: Array, own: Array, own_lse: Array) -> tuple[Array, Array]:
    """Merge what attention to one more key is."""
    own, own_lse = np.broadcast_to(own, context.shape), np.broadcast_to(own_lse, lse.shape)
    merged_context, merged_lse = merged([(context, lse), (own, own_lse)])
    shares = [np.exp(piece - merged_lse)[..., None] for piece in (lse, own_lse)]
    return merged_context.astype(context.dtype), np.concatenate([weights * shares[0], shares[1]], axis=-1)


@np.errstate(all="ignore")
def bahdanau_attention(
    layer: BahdanauAttention,
    query: Operand,
    key: Operand,
    value: Operand | None = None,
    attn_mask: MaskLike | None = None,
    **options: Unpack[FurtherOptions],
) -> tuple[Array, Array]:
    """Evaluate Bahdanau's attention.

    Parameters
    ----------
    layer : BahdanauAttention
    query, key, value, attn_mask, **options
        As the layer is called with.

    Returns
    -------
    context : ndarray, shape (..., Lq, Dv)
    weights : ndarray, shape (..., Lq, Lk)
    """
    (q, k, v), state, real = _widened(layer, query, key, key if value is None else value)
    q, k = q @ state["query_weight"].T + state["bias"], k @ state["key_weight"].T
    problem, operands = _described(q, k, v, attn_mask, options, real)
    context, _, weights = evaluate(problem, operands, weight=state["weight"])
    return context[..., 0, :, :], weights[..., 0, :, :]


@np.errstate(all="ignore")
def luong_attention(
    layer: LuongAttention,
    query: Operand,
    key: Operand,
    value: Operand | None = None,
    attn_mask: MaskLike | None = None,
    *,
    positions: NumberLike | None = None,
    **options: Unpack[FurtherOptions],
) -> tuple[Array, Array]:
    """Evaluate Luong's attention, with the local alignments as windows cut out of the whole matrix.

    Parameters
    ----------
    layer : LuongAttention
    query, key, value, attn_mask, positions, **options
        As the layer is called with.

    Returns
    -------
    context : ndarray, shape (..., Lq, value_dim)
    weights : ndarray, shape (..., Lq, Lk)
    """
    (h, k, v), state, real = _widened(layer, query, key, key if value is None else value)
    q = h
    if layer.score == "general":
        q = h @ state["score_weight"]
    if layer.score == "concat":  # W [h; s]
        of_query, of_key = np.split(state["score_weight"], [layer.query_dim], axis=1)
        q, k = h @ of_query.T, k @ of_key.T
    problem, operands = _described(q, k, v, attn_mask, options, real)
    visible = visibility(problem, operands)

    def of_rows(given: ArrayLike | None, otherwise: int) -> Array:
        return np.broadcast_to(otherwise if given is None else given, problem.batch)[..., None, None, None, None]

    length = of_rows(options.get("key_lengths"), k.shape[-2])  # S
    j = np.arange(k.shape[-2])
    p: Array = np.arange(q.shape[-2])[:, None] + of_rows(options.get("query_offset"), 0)
    if layer.align == "local-p":
        hidden = np.tanh(h @ state["position_weight"].T) @ state["position_vector"]
        p = length / (1 + np.exp(-hidden[..., None, None, :, None]))
    elif positions is not None:
        p = np.asarray(positions)[..., None, None, :, None]
    if layer.align != "global":
        visible = visible & (np.abs(j - p) <= layer.window)
    raw = raw_scores(problem, operands, state.get("score_vector"))
    scores, visible = seen_scores(problem, operands, raw, visible)
    weights, _ = softmax(scores)
    if layer.align == "local-p":
        sigma = layer.window / 2
        weights = np.where(visible, weights * np.exp(-((j - p) ** 2) / (2 * sigma**2)), 0)
    context = weighted_sum(weights, operands.value, visible)
    return context.reshape(problem.out_shape)[..., 0, :, :], weights.reshape(problem.weights_shape)[..., 0, :, :]


def _described(
    q: Array, k: Array, v: Array, attn_mask: MaskLike | None, options: FurtherOptions, real: np.dtype[Any]
) -> tuple[Problem, Operands]:
    """Describe attention of one head; what stands in no head, (B, L, D), becomes (B, 1, L, D)."""
    scores = (*np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2]), q.shape[-2], k.shape[-2])
    mask = changed(mask_of_scores(attn_mask, scores), one_head)
    problem, operands = describe(one_head(q), one_head(k), one_head(v), mask, scale=1.0, **options)
    return replace(problem, real=real), operands


def _widened(layer: Any, *given: ArrayLike) -> tuple[list[Array], dict[str, Array], np.dtype[Any]]:
    """Return arrays and the parameters of the layer in the wider type, and the type of the layer's own call."""
    arrays = [np.asarray(array) for array in given]
    real = real_of(common_dtype(layer.dtype, *arrays))
    wide = np.dtype(np.float64 if real == np.float32 else np.longdouble)
    state = {name: cast(parameter, wide) for name, parameter in layer.state_dict().items()}
    return [cast(array, wide) if is_floating(array.dtype) else array.astype(wide) for array in arrays], state, real
