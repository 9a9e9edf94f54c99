"""The formula of attention in plain NumPy: read this first.

`attention` here is the formula itself, on whole matrices and in a wider type than the fast backends: float64 for
float32 arguments, longdouble for float64. It supports every option they do, and is what they are tested against.
`additive_attention` differs from it in the score alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastattn.call.arrays import as_additive_operands, as_operands
from fastattn.call.halves import cast
from fastattn.call.options import check_flag
from fastattn.call.out import check_out
from fastattn.call.problem import FLOAT64, Operands, Problem
from fastattn.call.rounding import is_of_these_keys, saturated, slack
from fastattn.call.score_options import FurtherOptions
from fastattn.call.seeds import Rng, seed_from
from fastattn.call.selection import (
    in_intervals,
    places_of,
)
from fastattn.call.shapes import describe, describe_additive
from fastattn.call.types import Causal, MaskLike, Number, Operand, Scalar
from fastattn.reference.dropout import kept_weights
from fastattn.reference.functions import (
    out_of_range,
    scores_of_function,
    seen_by_function,
    slopes_of_function,
    where_all,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "additive_attention",
    "attention",
    "evaluate",
]

#: Elements of query + key that additive attention has at a time.
SUM_ELEMENTS = 1 << 20


# fmt: off
@overload
def attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], attn_mask: MaskLike | None = ...,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *,
    return_lse: Literal[False] = ..., return_weights: Literal[False] = ..., rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., **options: Unpack[FurtherOptions],
) -> NDArray[Scalar]: ...
@overload
def attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], attn_mask: MaskLike | None = ...,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *,
    return_lse: Literal[True], return_weights: Literal[False] = ..., rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Any]]: ...
@overload
def attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], attn_mask: MaskLike | None = ...,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *,
    return_lse: Literal[False] = ..., return_weights: Literal[True], rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Scalar]]: ...
@overload
def attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], attn_mask: MaskLike | None = ...,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *,
    return_lse: Literal[True], return_weights: Literal[True], rng: Rng | None = ..., out: NDArray[Scalar] | None = ...,
    **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Any], NDArray[Scalar]]: ...
@overload
def attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], attn_mask: MaskLike | None = ...,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *,
    return_lse: bool = ..., return_weights: bool = ..., rng: Rng | None = ..., out: NDArray[Scalar] | None = ...,
    **options: Unpack[FurtherOptions],
) -> NDArray[Scalar] | tuple[NDArray[Any], ...]: ...
# fmt: on
def attention(
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: MaskLike | None = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: bool = False,
    return_weights: bool = False,
    rng: Rng | None = None,
    out: NDArray[Any] | None = None,
    **options: Unpack[FurtherOptions],
) -> Any:
    """Scaled dot-product attention, softmax(query keyᵀ · scale + mask) value.

    Parameters
    ----------
    query : array_like, shape (..., Hq, Lq, D)
    key : array_like, shape (..., Hk, Lk, D)
    value : array_like, shape (..., Hk, Lk, Dv)
    attn_mask : array_like, broadcasting to (..., Hq, Lq, Lk), optional
        Boolean, where True takes part, or floating, which is added to the scores.
    dropout_p : float
        Probability that a weight becomes 0; those that stay are multiplied by 1 / (1 - dropout_p).
    is_causal : bool or "bottom-right"
        True: query i looks at the keys up to i. "bottom-right": up to i + Lk - Lq.
    scale : float, optional
        Factor of query · key, 1/sqrt(D) unless given.
    enable_gqa : bool
        Let query head h read key head h // (Hq / Hk).
    return_lse, return_weights : bool
        Return the log-sum-exp of the scores, and the weights, as well.
    rng : int or numpy.random.Generator, optional
        What decides which weights are dropped.
    out : ndarray, shape (..., Hq, Lq, Dv), optional
        Where to write the result; it may overlap the arguments.

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
    lse : ndarray, shape (..., Hq, Lq)
        If asked for.
    weights : ndarray, shape (..., Hq, Lq, Lk)
        If asked for; after dropout.

    Raises
    ------
    ValueError, TypeError
        As `fastattn.call` says, which checks all arguments.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> query, key, value = np.eye(2), np.eye(3, 2), np.arange(3.0)[:, None]
    >>> reference.attention(query, key, value, is_causal=True, return_weights=True)[1].round(2)
    array([[1.  , 0.  , 0.  ],
           [0.33, 0.67, 0.  ]])
    """
    arrays = as_operands(query, key, value, attn_mask)
    problem, operands = describe(*arrays, dropout_p, is_causal, scale, enable_gqa, **options)
    out = check_out(out, problem)
    return_lse = check_flag("return_lse", return_lse)
    return_weights = check_flag("return_weights", return_weights)
    seed = seed_from(rng, draw=problem.dropout_p > 0)
    return _returned(problem, evaluate(problem, operands, seed), return_lse, return_weights, out)


# fmt: off
@overload
def additive_attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], weight: Operand[Scalar],
    attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *, return_lse: Literal[False] = ...,
    return_weights: Literal[False] = ..., out: NDArray[Scalar] | None = ..., **options: Unpack[FurtherOptions],
) -> NDArray[Scalar]: ...
@overload
def additive_attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], weight: Operand[Scalar],
    attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *, return_lse: Literal[True],
    return_weights: Literal[False] = ..., out: NDArray[Scalar] | None = ..., **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Any]]: ...
@overload
def additive_attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], weight: Operand[Scalar],
    attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *, return_lse: Literal[False] = ...,
    return_weights: Literal[True], out: NDArray[Scalar] | None = ..., **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Scalar]]: ...
@overload
def additive_attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], weight: Operand[Scalar],
    attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *, return_lse: Literal[True],
    return_weights: Literal[True], out: NDArray[Scalar] | None = ..., **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Any], NDArray[Scalar]]: ...
@overload
def additive_attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], weight: Operand[Scalar],
    attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *, return_lse: bool = ..., return_weights: bool = ...,
    out: NDArray[Scalar] | None = ..., **options: Unpack[FurtherOptions],
) -> NDArray[Scalar] | tuple[NDArray[Any], ...]: ...
# fmt: on
def additive_attention(
    query: Operand,
    key: Operand,
    value: Operand,
    weight: Operand,
    attn_mask: MaskLike | None = None,
    is_causal: Causal = False,
    *,
    return_lse: bool = False,
    return_weights: bool = False,
    out: NDArray[Any] | None = None,
    **options: Unpack[FurtherOptions],
) -> Any:
    """Additive attention: the score of query i and key j is Σ_d weight[d] · tanh(query[i, d] + key[j, d]).

    Parameters
    ----------
    query : array_like, shape (..., Lq, D)
    key : array_like, shape (..., Lk, D)
    value : array_like, shape (..., Lk, Dv)
    weight : array_like, shape (D,)
    attn_mask : array_like, broadcasting to (..., Lq, Lk), optional
        Boolean, where True takes part, or floating, which is added to the scores.
    is_causal : bool or "bottom-right"
        True: query i looks at the keys up to i. "bottom-right": up to i + Lk - Lq.
    return_lse, return_weights : bool
        Return the log-sum-exp of the scores, and the weights, as well.
    out : ndarray, shape (..., Lq, Dv), optional
        Where to write the result; it may overlap the arguments.

    Returns
    -------
    out : ndarray, shape (..., Lq, Dv)
    lse : ndarray, shape (..., Lq)
        If asked for.
    weights : ndarray, shape (..., Lq, Lk)
        If asked for.

    Raises
    ------
    ValueError, TypeError
        As `fastattn.call` says, which checks all arguments.

    References
    ----------
    .. [1] Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", 2014,
       arXiv 1409.0473.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> query, key, value = np.zeros((1, 2)), np.array([[0, 1], [3, 1]]), np.eye(2)
    >>> reference.additive_attention(query, key, value, [1, 5]).round(2)
    array([[0.27, 0.73]])
    """
    query, key, value, weight, mask = as_additive_operands(query, key, value, weight, attn_mask)
    problem, operands = describe_additive(query, key, value, weight, mask, is_causal, **options)
    out = check_out(out, problem)
    return_lse = check_flag("return_lse", return_lse)
    return_weights = check_flag("return_weights", return_weights)
    return _returned(problem, evaluate(problem, operands, weight=weight), return_lse, return_weights, out)


def _returned(
    problem: Problem, results: tuple[Any, Any, Any], return_lse: bool, return_weights: bool, out: NDArray[Any] | None
) -> Any:
    """Return what was asked for of what `evaluate` gave, in the type of the call."""
    # inf and NaN are values like others here, and no reason for a warning
    with np.errstate(all="ignore"):
        kinds = (problem.storage if out is None else out.dtype, problem.real, problem.storage)
        result, lse, weights = map(cast, results, kinds)
    if out is None:
        out = result
    else:
        out[...] = result
    if not (return_lse or return_weights):
        return out
    return (out, *((lse,) if return_lse else ()), *((weights,) if return_weights else ()))


@np.errstate(all="ignore")
def evaluate(
    problem: Problem, operands: Operands, seed: int = 0, weight: NDArray[Any] | None = None
) -> tuple[Any, Any, Any]:
    """Evaluate the formula in the wider type, and do not round the results to the type of the call.

    Parameters
    ----------
    problem : Problem
    operands : Operands
    seed : int
        In [0, 2**64): what decides which weights are dropped.
    weight : ndarray, shape (D,), optional
        Given, the score is that of additive attention.

    Returns
    -------
    out : ndarray, shape problem.out_shape
    lse : ndarray, shape problem.lse_shape
        Finite ones are within the range of the type of the call.
    weights : ndarray, shape problem.weights_shape
    """
    scores, visible = seen_scores(problem, operands, raw_scores(problem, operands, weight))
    empty = np.all(scores == -np.inf, axis=-1, keepdims=True)
    weights, lse = softmax(with_sinks(problem, operands, scores))
    weights = np.where(empty, 0, weights[..., : problem.keys])

    if problem.dropout_p > 0:
        weights = weights * kept_weights(problem, seed) * problem.keep_scale
    out = np.where(empty, 0, weighted_sum(weights, cast(operands.value, weights.dtype), visible))
    return (
        out.reshape(problem.out_shape),
        saturated(lse, problem.real).reshape(problem.lse_shape),
        weights.reshape(problem.weights_shape),
    )


def softmax(scores: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the softmax of the scores of each query, and its log-sum-exp; 0 and -inf where all are -inf."""
    highest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    highest = np.where(highest == -np.inf, 0, highest)
    powers = np.exp(scores - highest)
    total = powers.sum(axis=-1, keepdims=True)
    return np.where(total == 0, 0, powers / total), (highest + np.log(total))[..., 0]


def with_sinks(problem: Problem, operands: Operands, scores: NDArray[Any]) -> NDArray[Any]:
    """Return scores with that of one more key behind the others, the sink of the head, if heads have sinks."""
    if operands.heads is None or "sink" not in problem.scores.own:
        return scores
    sinks = operands.heads["sink"].reshape(*problem.rows_shape, 1, 1).astype(scores.dtype)
    return np.concatenate([scores, np.broadcast_to(sinks, (*scores.shape[:-1], 1))], axis=-1)


def weights_from(scores: NDArray[Any], lse: NDArray[Any], rounded: np.dtype[Any], features: int) -> NDArray[Any]:
    """Return exp(scores - lse) for an lse `rounded` to a dtype, which may be that of more keys than these.

    Where it is not, the weights are the softmax itself, of which nothing is lost to the rounding.
    """
    weights, own = softmax(scores)
    given = lse.astype(scores.dtype)
    # of a sum of exp(score) no score takes more than all of it
    taken = np.minimum(np.exp(scores - np.where(given == -np.inf, np.inf, given)[..., None]), 1)
    whole = is_of_these_keys(given, saturated(own, rounded), slack(rounded, features))
    return np.where(whole[..., None], weights, taken)


def value_of(problem: Problem, operands: Operands, raw: Any) -> Any:
    """Return what becomes of all scores, before a user's function is asked, or anything is hidden."""
    places = places_of(problem, operands, range(problem.queries), range(problem.keys))
    return problem.scores.value(raw, operands.bias, problem.real, places)


def seen_scores(
    problem: Problem, operands: Operands, raw: Any, visible: NDArray[np.bool_] | None = None
) -> tuple[Any, NDArray[np.bool_]]:
    """Return what becomes of all scores, -inf where a query may not look, and where it may.

    A user's function hides a key with a score of -inf. Its index may be out of range where a key is hidden anyway:
    where `visible` says no, that of the call unless it is given.

    Raises
    ------
    IndexError
        If an index is out of range elsewhere.
    """
    scores = value_of(problem, operands, raw)
    visible = visibility(problem, operands) if visible is None else visible
    score_mod, mask_mod = problem.scores.score_mod, problem.scores.mask_mod
    inside = np.ones(visible.shape, bool)
    where = where_all(problem, operands.heads)
    if mask_mod is not None:
        seen = seen_by_function(mask_mod, where, scores.dtype.type)
        visible, inside = visible & seen.values, seen.inside
    if score_mod is not None:
        found = scores_of_function(score_mod, scores, where)
        scores, inside = found.values, inside & found.inside
        visible = visible & ~(found.inside & (scores == -np.inf))
    if not inside[visible].all():
        out_of_range(score_mod, mask_mod)
    return np.where(visible, scores, -np.inf), visible


def slope_of(problem: Problem, operands: Operands, raw: Any) -> tuple[Any, Any]:
    """Return the derivatives of all scores by what a mask adds to them, and of that by `raw`."""
    by_raw = problem.scores.slope(raw)
    if problem.scores.score_mod is None:
        return 1.0, by_raw
    where = where_all(problem, operands.heads)
    return slopes_of_function(problem.scores.score_mod, value_of(problem, operands, raw), where)[0], by_raw


def raw_scores(problem: Problem, operands: Operands, weight: NDArray[Any] | None = None) -> Any:
    """Return what scores are made of: scale · (query · key), or the sum that additive attention has instead."""
    wide = np.dtype(np.float64 if problem.real == np.float32 else np.longdouble)
    query, key = cast(operands.query, wide), cast(operands.key, wide)
    if weight is None:
        return problem.scores.scale * (query @ key.swapaxes(-1, -2))
    return _additive_scores(query, key, cast(weight, wide))


def _additive_scores(query: NDArray[Any], key: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    """Return Σ_d weight[d] · tanh(query[i, d] + key[j, d]), shape (..., Lq, Lk), some features at a time."""
    scores = np.zeros((*query.shape[:-1], key.shape[-2]), query.dtype)
    step = max(1, SUM_ELEMENTS // max(1, scores.size))
    for first in range(0, weight.size, step):
        part = slice(first, first + step)
        scores += np.tanh(query[..., :, None, part] + key[..., None, :, part]) @ weight[part]
    return scores


def visibility(problem: Problem, operands: Operands) -> NDArray[np.bool_]:
    """Say which query may look at which key, shape (..., Lq, Lk), before a user's function is asked.

    -inf in a floating mask is the same as False.
    """
    visible = np.ones((*problem.rows_shape, problem.queries, problem.keys), dtype=bool)
    visible &= in_intervals(problem, operands, range(problem.queries), range(problem.keys))
    if operands.keep is not None:
        visible &= operands.keep
    if operands.bias is not None:
        visible &= cast(operands.bias, FLOAT64) != -np.inf
    return visible


def weighted_sum(weights: NDArray[Any], value: NDArray[Any], visible: NDArray[np.bool_]) -> NDArray[Any]:
    """Return weights @ value, but with nothing in it of a value that may not be looked at.

    A weight of 0 is not enough for that: 0 · NaN is NaN. So the keys that have a value which is not finite are taken
    out of the product, and added one by one to the queries that see them.
    """
    finite = np.isfinite(value)
    result = weights @ np.where(finite, value, 0)
    for j in np.flatnonzero(~finite.all(axis=tuple(axis for axis in range(value.ndim) if axis != value.ndim - 2))):
        odd = np.where(finite[..., j, :], 0, value[..., j, :])
        result += np.where(visible[..., :, j, None], weights[..., :, j, None] * odd[..., None, :], 0)
    return result
