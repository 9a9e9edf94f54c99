"""The derivative of attention in plain NumPy, on whole matrices and in the wider type.

With the weights P = exp(scores - lse), whatever of lse was lost when it was rounded (`fastattn.call.rounding`), the
factors Z of dropout (1 without), out = (P · Z) value, and the gradient dO of the result, the chain rule gives

    dvalue  = (P · Z)ᵀ dO
    dP      = Z · (dO valueᵀ)
    dscores = P · (dP - Σ_j P dP) = P · (dP - rowsum(dO · out))
    dmask   = dscores · slope                                            1, or that of a user's function
    draw    = dmask · slope                                              1, or what a softcap's derivative is there
    dquery  = scale · draw key          dkey = scale · drawᵀ query
    dalibi  = -Σ_ij dscores · |position - j|
    dsink   = -Σ_i exp(sink - lse) · rowsum(dO · out)                    a key whose value is 0, and of which dP is 0
    dc      = Σ_ij dscores · ∂score/∂c                                   of an element c that a user's function reads

The derivative of lse by the scores is P, so that a gradient of lse is subtracted from the row's sum. What a query may
not look at takes no part, whatever it is: 0 · NaN does not arise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from fastattn.call.arrays import as_additive_operands, as_operands
from fastattn.call.halves import cast
from fastattn.call.problem import Operands, Problem
from fastattn.call.score_options import FurtherOptions
from fastattn.call.seeds import Rng
from fastattn.call.selection import places_of
from fastattn.call.shapes import describe, describe_additive
from fastattn.call.types import Causal, MaskLike, Number, OfKey, OfQuery, OfValue, OfWeight, Operand
from fastattn.call.upstream import (
    Names,
    Upstream,
    as_given,
    captured_sources,
    describe_upstream,
    seed_of_forward,
    sources_of,
    wanted_gradients,
)
from fastattn.reference.captured import gradients_of_captured
from fastattn.reference.dropout import kept_weights
from fastattn.reference.forward import (
    SUM_ELEMENTS,
    raw_scores,
    seen_scores,
    slope_of,
    value_of,
    weighted_sum,
    weights_from,
    with_sinks,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Gradients", "additive_attention_backward", "attention_backward", "differentiate"]


class Gradients(NamedTuple):
    """Gradients in the wider type, with the axes of the operands, before any sum over those that were broadcast.

    Attributes
    ----------
    query : ndarray, shape (*batch, Hk, G, Lq, D)
    key : ndarray, shape (*batch, Hk, G, Lk, D)
    value : ndarray, shape (*batch, Hk, G, Lk, Dv)
    scores : ndarray, shape (*batch, Hk, G, Lq, Lk)
        That of a floating mask, which a user's function comes after.
    slopes, sinks : ndarray, shape (*batch, Hk, G), or None
        Where heads have some.
    weight : ndarray, shape (D,), or None
        Of additive attention alone.
    captured : dict of str to ndarray
        Of the arrays that the function of scores captures, those that were named.
    """

    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    scores: NDArray[Any]
    slopes: NDArray[Any] | None
    sinks: NDArray[Any] | None
    weight: NDArray[Any] | None
    captured: dict[str, NDArray[Any]]

    def named(self) -> dict[str, NDArray[Any] | None]:
        """Return them by the names of the arguments."""
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "attn_mask": self.scores,
            "alibi_slopes": self.slopes,
            "sinks": self.sinks,
            "weight": self.weight,
            **self.captured,
        }


# fmt: off
@overload
def attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], out: Operand,
    lse: Operand, attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., *, rng: Rng | None = ..., grad_lse: Operand | None = ...,
    grad_mask: Literal[False] = ..., grads: None = ..., **options: Unpack[FurtherOptions],
) -> tuple[NDArray[OfQuery], NDArray[OfKey], NDArray[OfValue]]: ...
@overload
def attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], out: Operand,
    lse: Operand, attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., *, rng: Rng | None = ..., grad_lse: Operand | None = ...,
    grad_mask: Literal[True], grads: None = ..., **options: Unpack[FurtherOptions],
) -> tuple[NDArray[OfQuery], NDArray[OfKey], NDArray[OfValue], NDArray[Any]]: ...
@overload
def attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], out: Operand,
    lse: Operand, attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., *, rng: Rng | None = ..., grad_lse: Operand | None = ...,
    grad_mask: bool = ..., grads: Names = ..., **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Any], ...]: ...
# fmt: on
def attention_backward(
    grad_out: Operand,
    query: Operand,
    key: Operand,
    value: Operand,
    out: Operand,
    lse: Operand,
    attn_mask: MaskLike | None = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    rng: Rng | None = None,
    grad_lse: Operand | None = None,
    grad_mask: bool = False,
    grads: Names = None,
    **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Any], ...]:
    """Return the gradients of query, key and value: `fastattn.attention_backward`, from the whole matrix of weights.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> query, key, value = np.eye(2), np.eye(3, 2), np.arange(3.0)[:, None]
    >>> out, lse = reference.attention(query, key, value, return_lse=True)
    >>> grad_out = np.ones((2, 1))
    >>> _, _, grad_value = reference.attention_backward(grad_out, query, key, value, out, lse)
    >>> grad_value.ravel().round(2)  # the weight that each key receives
    array([0.75, 0.75, 0.5 ])
    """
    arrays = as_operands(query, key, value, attn_mask)
    problem, operands = describe(*arrays, dropout_p, is_causal, scale, enable_gqa, **options)
    upstream = describe_upstream(problem, grad_out, out, lse, grad_lse)
    sources = sources_of(query, key, value, attn_mask, options) | captured_sources(problem, operands.captured)
    names = wanted_gradients(grads, sources, grad_mask, arrays[3])
    gradients = differentiate(problem, operands, upstream, seed_of_forward(rng, problem), names=names)
    return as_given(problem, names, gradients.named(), sources)


# fmt: off
@overload
def additive_attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], weight: Operand[OfWeight],
    out: Operand, lse: Operand, attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *,
    grad_lse: Operand | None = ..., grad_mask: Literal[False] = ..., grads: None = ...,
    **options: Unpack[FurtherOptions],
) -> tuple[NDArray[OfQuery], NDArray[OfKey], NDArray[OfValue], NDArray[OfWeight]]: ...
@overload
def additive_attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], weight: Operand[OfWeight],
    out: Operand, lse: Operand, attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *,
    grad_lse: Operand | None = ..., grad_mask: Literal[True], grads: None = ..., **options: Unpack[FurtherOptions],
) -> tuple[NDArray[OfQuery], NDArray[OfKey], NDArray[OfValue], NDArray[OfWeight], NDArray[Any]]: ...
@overload
def additive_attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], weight: Operand[OfWeight],
    out: Operand, lse: Operand, attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *,
    grad_lse: Operand | None = ..., grad_mask: bool = ..., grads: Names = ..., **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Any], ...]: ...
# fmt: on
def additive_attention_backward(
    grad_out: Operand,
    query: Operand,
    key: Operand,
    value: Operand,
    weight: Operand,
    out: Operand,
    lse: Operand,
    attn_mask: MaskLike | None = None,
    is_causal: Causal = False,
    *,
    grad_lse: Operand | None = None,
    grad_mask: bool = False,
    grads: Names = None,
    **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Any], ...]:
    """Return the gradients of query, key, value and weight: `fastattn.additive_attention_backward`, in plain NumPy.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> query, key, value, weight = np.zeros((1, 2)), np.array([[0.0, 1], [3, 1]]), np.eye(2), np.array([1.0, 5])
    >>> out, lse = reference.additive_attention(query, key, value, weight, return_lse=True)
    >>> grad_out = np.array([[1.0, 0.0]])
    >>> gradients = reference.additive_attention_backward(grad_out, query, key, value, weight, out, lse)
    >>> gradients[3].round(3) + 0.0  # the first key would weigh more, had weight[0] been smaller
    array([-0.196,  0.   ])
    """
    arrays = as_additive_operands(query, key, value, weight, attn_mask)
    problem, operands = describe_additive(*arrays, is_causal, **options)
    upstream = describe_upstream(problem, grad_out, out, lse, grad_lse)
    sources = sources_of(query, key, value, attn_mask, options, weight) | captured_sources(problem, operands.captured)
    names = wanted_gradients(grads, sources, grad_mask, arrays[4])
    gradients = differentiate(problem, operands, upstream, weight=arrays[3], names=names)
    return as_given(problem, names, gradients.named(), sources)


@np.errstate(all="ignore")
def differentiate(
    problem: Problem,
    operands: Operands,
    upstream: Upstream,
    seed: int = 0,
    weight: NDArray[Any] | None = None,
    names: Sequence[str] = (),
) -> Gradients:
    """Evaluate the gradients in the wider type, and do not round them to the type of the call.

    Parameters
    ----------
    problem : Problem
    operands : Operands
    upstream : Upstream
        Its out and lse are taken for what they say: they may belong to more keys than these.
    seed : int
        In [0, 2**64): what decided which weights were dropped.
    weight : ndarray, shape (D,), optional
        Given, the score is that of additive attention.
    names : sequence of str
        Those of the gradients that are wanted. All are evaluated but for what a function captures, which is evaluated
        where it is among these.
    """
    raw = raw_scores(problem, operands, weight)
    scores, visible = seen_scores(problem, operands, raw)
    wide = scores.dtype
    grad_out, out, lse = (array.astype(wide) for array in upstream[:3])
    visible = visible & (lse != -np.inf)[..., None]
    weights = weights_from(with_sinks(problem, operands, scores), lse, upstream.rounded, problem.head_dim)
    weights, of_sinks = np.where(visible, weights[..., : problem.keys], 0), weights[..., problem.keys :]
    kept: Any = kept_weights(problem, seed) * problem.keep_scale if problem.dropout_p > 0 else 1
    row_sums = (grad_out * out).sum(axis=-1)
    if upstream.grad_lse is not None:
        row_sums = row_sums - upstream.grad_lse.astype(wide)

    query, key, value = (cast(array, wide) for array in operands[:3])
    grad_value = weighted_sum((weights * kept).swapaxes(-1, -2), grad_out, visible.swapaxes(-1, -2))
    grad_weights = (grad_out @ value.swapaxes(-1, -2)) * kept
    by_added, by_raw = slope_of(problem, operands, raw)
    grad_seen = np.where(visible, weights * (grad_weights - row_sums[..., None]), 0)
    captured = gradients_of_captured(problem, operands, value_of(problem, operands, raw), grad_seen, names)
    grad_scores = np.where(visible, grad_seen * by_added, 0)
    grad_raw = np.where(visible, grad_scores * by_raw, 0)
    of_heads = _of_slopes(problem, operands, grad_scores), _of_sinks(problem, operands, of_sinks, row_sums)
    if weight is not None:
        grad_query, grad_key, grad_weight = _through_tanh(query, key, cast(weight, wide), grad_raw)
        return Gradients(grad_query, grad_key, grad_value, grad_scores, *of_heads, grad_weight, captured)
    # Where a query or a key that may be looked at is not finite, neither is the score: its gradient says all.
    grad_query = problem.scores.scale * (grad_raw @ np.where(np.isfinite(key), key, 0))
    grad_key = problem.scores.scale * (grad_raw.swapaxes(-1, -2) @ np.where(np.isfinite(query), query, 0))
    return Gradients(grad_query, grad_key, grad_value, grad_scores, *of_heads, None, captured)


def _of_slopes(problem: Problem, operands: Operands, grad_scores: NDArray[Any]) -> NDArray[Any] | None:
    """Return the gradients of ALiBi's slopes, each of which is what scores lose for a position."""
    if "slope" not in problem.scores.own:
        return None
    places = places_of(problem, operands, range(problem.queries), range(problem.keys))
    distance = np.abs(places.query + places.head["offset"] - places.key).astype(grad_scores.dtype)
    gradient: NDArray[Any] = -(grad_scores * distance).sum(axis=(-1, -2))
    return gradient


def _of_sinks(
    problem: Problem, operands: Operands, weights: NDArray[Any], row_sums: NDArray[Any]
) -> NDArray[Any] | None:
    """Return the gradients of the sinks, whose weights in each row have shape (..., Lq, 1); 0 where there is none."""
    if operands.heads is None or "sink" not in problem.scores.own:
        return None
    there = operands.heads["sink"].reshape(problem.rows_shape) != -np.inf
    return np.where(there, -(weights[..., 0] * row_sums).sum(axis=-1), 0)


def _through_tanh(
    query: NDArray[Any], key: NDArray[Any], weight: NDArray[Any], grad_scores: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the gradients of query, key and weight, whose scores are Σ_d weight[d] · tanh(query[i, d] + key[j, d])."""
    grad_query, grad_key, grad_weight = np.zeros_like(query), np.zeros_like(key), np.zeros_like(weight)
    taken = (grad_scores != 0)[..., None]
    step = max(1, SUM_ELEMENTS // max(1, grad_scores.size))
    for first in range(0, weight.size, step):
        part = slice(first, first + step)
        tanh = np.tanh(query[..., :, None, part] + key[..., None, :, part])
        along = np.where(taken, grad_scores[..., None] * tanh, 0)
        inner = np.where(taken, grad_scores[..., None] * (1 - tanh * tanh), 0) * weight[part]
        grad_query[..., part] = inner.sum(axis=-2)
        grad_key[..., part] = inner.sum(axis=-3)
        grad_weight[part] = along.sum(axis=tuple(range(along.ndim - 1)))
    return grad_query, grad_key, grad_weight
