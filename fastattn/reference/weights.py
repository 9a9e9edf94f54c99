"""What can be read off the weights of attention: some of them, and a summary of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn.call.halves import cast
from fastattn.call.problem import Operands, Problem
from fastattn.call.rounding import coarser
from fastattn.call.score_options import FurtherOptions
from fastattn.call.selection import Choice, as_selection, check_lse, check_top_k, describe_scores, positions
from fastattn.call.types import Causal, MaskLike, Number, Operand, Scalar
from fastattn.reference.forward import evaluate, raw_scores, seen_scores, weights_from, with_sinks

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AttentionSummary", "attention_summary", "attention_weights", "summarise"]


def attention_weights(
    query: Operand[Scalar],
    key: Operand[Scalar],
    attn_mask: MaskLike | None = None,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    rows: Choice = None,
    columns: Choice = None,
    lse: Operand | None = None,
    **options: Unpack[FurtherOptions],
) -> NDArray[Scalar]:
    """Return the weights of chosen queries and keys: `fastattn.attention_weights`, cut out of the whole matrix.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> reference.attention_weights(np.eye(2), np.eye(3, 2), is_causal=True, rows=-1, columns=slice(0, 2)).round(2)
    array([[0.33, 0.67]])
    """
    problem, operands = describe_scores(query, key, attn_mask, is_causal, scale, enable_gqa, **options)
    chosen, keys = as_selection("rows", rows, problem.queries), as_selection("columns", columns, problem.keys)
    with np.errstate(all="ignore"):
        if lse is None:
            weights = evaluate(problem, operands)[2]
        else:
            scores = with_sinks(problem, operands, seen_scores(problem, operands, raw_scores(problem, operands))[0])
            given, rounded = check_lse(lse, problem).reshape(scores.shape[:-1]), coarser(lse, problem.real)
            weights = weights_from(scores, given, rounded, problem.head_dim)[..., : problem.keys]
            weights = weights.reshape(problem.weights_shape)
    result: NDArray[Any] = weights[..., positions(chosen)[:, None], positions(keys)]
    return cast(result, problem.storage)


class AttentionSummary(NamedTuple):
    """What `fastattn.attention_summary` returns.

    Attributes
    ----------
    top_weights : ndarray, shape (..., Hq, Lq, top_k)
        The greatest weights of each query, in falling order. Where there are fewer keys whose score is above -inf, the
        rest is 0.
    top_indices : ndarray of int64, shape (..., Hq, Lq, top_k)
        The keys that these belong to; of equal scores the lower key comes first. -1 where there is none.
    entropy : ndarray, shape (..., Hq, Lq)
        -Σ w ln w of the weights of each query, in nats: 0 for one that looks at one key only, or at none.
    lse : ndarray, shape (..., Hq, Lq)
        The log-sum-exp of the scores, as `fastattn.attention` returns it.
    received : ndarray, shape (..., Hq, Lk)
        The weight that each key receives from the queries of each query head, summed over the queries. With grouped
        heads, add up those of a group for what the key head receives.

    Notes
    -----
    A query with a score of NaN or +inf has weights of NaN: so are its `top_weights`, which have no order and so
    no keys (-1), its entropy, its lse, and what is received by the keys that it looks at, unless their score is -inf.
    """

    top_weights: NDArray[Any]
    top_indices: NDArray[np.int64]
    entropy: NDArray[Any]
    lse: NDArray[Any]
    received: NDArray[Any]


def attention_summary(
    query: Operand,
    key: Operand,
    attn_mask: MaskLike | None = None,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    top_k: int = 8,
    **options: Unpack[FurtherOptions],
) -> AttentionSummary:
    """Return what the weights say in short: `fastattn.attention_summary`, read off the whole matrix.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> summary = reference.attention_summary(np.eye(2), np.eye(3, 2), is_causal=True, top_k=2)
    >>> summary.top_indices
    array([[ 0, -1],
           [ 1,  0]])
    >>> summary.received.round(2)
    array([1.33, 0.67, 0.  ])
    """
    problem, operands = describe_scores(query, key, attn_mask, is_causal, scale, enable_gqa, **options)
    summary = summarise(problem, operands, check_top_k(top_k))
    with np.errstate(all="ignore"):
        return AttentionSummary(*(a if a.dtype == np.int64 else a.astype(problem.real) for a in summary))


@np.errstate(all="ignore")
def summarise(problem: Problem, operands: Operands, top_k: int) -> AttentionSummary:
    """Read the summary off the weights in the wider type, and do not round it to the type of the call."""
    _, lse, weights = evaluate(problem, operands)
    scores = seen_scores(problem, operands, raw_scores(problem, operands))[0].reshape(weights.shape)

    top_indices = np.full((*lse.shape, top_k), -1, np.int64)
    top_weights = np.zeros((*lse.shape, top_k), weights.dtype)
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :top_k]
    counts = np.take_along_axis(scores, best, axis=-1) > -np.inf
    top_indices[..., : best.shape[-1]] = np.where(counts, best, -1)
    top_weights[..., : best.shape[-1]] = np.where(counts, np.take_along_axis(weights, best, axis=-1), 0)
    odd = np.isnan(lse) & (scores != -np.inf).any(axis=-1)
    top_indices[odd], top_weights[odd] = -1, np.nan

    entropy = -np.where(weights == 0, 0, weights * np.log(weights)).sum(axis=-1)
    received = np.where(scores == -np.inf, 0, weights).sum(axis=-2)
    return AttentionSummary(top_weights, top_indices, entropy, lse, received)
