"""How far a result may be from the exact one: one policy, derived here and used by every test.

The exact result is the formula evaluated in a wider type, by `fastattn.reference`. Write eps for the spacing of numbers
at 1 in the type of the call, and A for the largest Σ|q||k| · |scale|, which is how large the terms are whose sum is a
score. Then:

- A score is a sum of D terms of total size A. Its error is about eps · A where roundings cancel, and eps/2 · D · A at
  the worst (Higham, "Accuracy and stability of numerical algorithms", section 3.1), which terms that are all alike come
  near. The first is the promise for results, the second what a log-sum-exp or a single weight is held to. Where a
  floating mask is added, the sum is rounded once more, at the size of the mask: A of a row grows by the largest |mask|
  among the keys that have a weight there. (A mask of -1e9 next to others of 0 costs nothing: keys under it have no
  weight that could be wrong.)
- A weight is w = exp(s - lse), so its error is w times that of s - lse, and a constant number of roundings for exp, the
  sum and the division: eps · (8 + A), as w ≤ 1.
- The result is Σ w v with Σ w = 1: the errors of the weights sum to the same, times the largest value. Hence
  eps · (8 + A) · max(1, max|v|). A call may also be as wrong as twice PyTorch on the same arguments.
- The log-sum-exp has the error of the scores, and is rounded at its own size: eps · (8 + D/2 · A + |lse|).
- Weights are never negative and sum to 1, however large the scores and their errors: whatever A says, no weight is
  above 1 and no result further from 0 than the largest value, but for the roundings of two sums over Lk keys.
- In additive attention the terms of a score are weight · tanh. A is 7 Σ|weight|: the error of one term is at most 7 eps
  times its weight (2 from that of exp(2q) and exp(2k), which are right to 2 units in the last place each, and change
  2 / (1 + exp(2q) exp(2k)) by at most half as much; the rest from the roundings of this quotient, which is up to 2).
- Dropout multiplies weights, and with them their errors, by 1 / (1 - p).

What is not finite must be the same, with one exception: where the exact result is infinite, because a value is, the
weight of that value may be 0 in the narrower type, and 0 · inf is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn import reference
from fastattn.problem import Problem, as_additive_operands, as_operands, describe, describe_additive, seed_from

Array = NDArray[Any]

#: Roundings of one term of an additive score.
ADDITIVE_ROUNDINGS = 7
#: Roundings of one result that do not depend on the size of the scores: exp, sum, division, products with the values.
ROUNDINGS = 8


@dataclass(frozen=True)
class Expected:
    """The exact results of a call, and how far each element of what is computed may be from them."""

    problem: Problem
    out: Array
    lse: Array
    weights: Array
    out_bound: Array
    lse_bound: Array
    weights_bound: Array
    largest_weight: float
    largest_out: float


def expected(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *, weight: Any = None, rng: Any = None, **options: Any
) -> Expected:
    """Evaluate a call in a wider type, with the bounds for it.

    Parameters are those of `fastattn.attention`; `options` are dropout_p, is_causal, scale and enable_gqa. Given a
    weight, those of `fastattn.additive_attention`.
    """
    if weight is None:
        problem, operands = describe(*as_operands(query, key, value, attn_mask), **options)
    else:
        query, key, value, weight, attn_mask = as_additive_operands(query, key, value, weight, attn_mask)
        problem, operands = describe_additive(query, key, value, weight, attn_mask, **options)
    out, lse, weights = reference.evaluate(problem, operands, seed_from(rng, draw=problem.dropout_p > 0), weight)
    undropped = weights
    if problem.dropout_p > 0:
        undropped = reference.evaluate(replace(problem, dropout_p=0.0), operands)[2]
    with np.errstate(all="ignore"):
        eps = float(np.finfo(problem.dtype).eps)
        if weight is None:
            terms = score_size(operands.query, operands.key, problem.scale)
        else:
            terms = ADDITIVE_ROUNDINGS * float(np.abs(weight[np.isfinite(weight)], dtype=np.float64).sum())
        size: Any = ROUNDINGS + terms
        if operands.mask is not None and problem.mask_kind == "float":
            # not finite: the row is not finite either, or the key has no part in it
            counts = (undropped > eps**2) & np.isfinite(operands.mask).reshape(undropped.shape)
            masks = np.where(counts, np.abs(operands.mask, dtype=np.float64).reshape(counts.shape), 0)
            size = size + np.minimum(masks, np.finfo(problem.dtype).max).max(axis=-1, initial=0)
        size = np.broadcast_to(size, problem.lse_shape)
        out_bound = eps * size * max(1.0, problem.keep_scale) * max(1.0, largest(operands.value))
        size = size + terms * max(0.0, problem.head_dim / 2 - 1)
        weight_bound = eps * size * max(1.0, problem.keep_scale)
        most = max(1.0, problem.keep_scale) * (1 + ROUNDINGS * eps)
        most_out = most * (1 + problem.keys * eps) * largest(operands.value)
        return Expected(
            problem=problem,
            out=out,
            lse=lse,
            weights=weights,
            out_bound=out_bound[..., None],
            lse_bound=eps * (size + np.abs(lse)),
            weights_bound=weight_bound[..., None],
            largest_weight=most,
            largest_out=most_out * (problem.keys if problem.dropout_p else 1),
        )


def score_size(query: Array, key: Array, scale: float) -> float:
    """Return A, the largest Σ|q||k| · |scale| of the finite values."""
    query, key = (np.abs(np.where(np.isfinite(array), array, 0), dtype=np.float64) for array in (query, key))
    return float((query @ key.swapaxes(-1, -2)).max(initial=0) * abs(scale))


def largest(values: Array) -> float:
    """Return the largest magnitude of the finite values, 0 if there are none."""
    return float(np.abs(np.where(np.isfinite(values), values, 0)).max(initial=0))


def check_out(out: Array, wanted: Expected, peer: Array | None = None) -> None:
    """Assert that a result is right; `peer` is PyTorch's on the same call, whose error may be the yardstick."""
    bound = wanted.out_bound
    if peer is not None:
        error = np.abs(peer.astype(np.float64) - wanted.out)
        bound = np.maximum(bound, 2 * error[np.isfinite(error)].max(initial=0))
    _check("out", out, wanted.out, bound, wanted.problem)
    odd = ~np.isfinite(wanted.out)
    assert (odd | (np.abs(out) <= wanted.largest_out)).all(), f"out: {np.nanmax(np.abs(out))} is above all values"


def check_lse(lse: Array, wanted: Expected) -> None:
    """Assert that a log-sum-exp is right."""
    _check("lse", lse, wanted.lse, wanted.lse_bound, wanted.problem)


def check_weights(weights: Array, wanted: Expected) -> None:
    """Assert that weights are right."""
    _check("weights", weights, wanted.weights, wanted.weights_bound, wanted.problem)
    fine = np.isnan(wanted.weights) | ((weights >= 0) & (weights <= wanted.largest_weight))
    assert fine.all(), f"weights: {weights[~fine][0]} is none"


def check_all(results: tuple[Array, Array, Array], wanted: Expected) -> None:
    """Assert that what a call with return_lse and return_weights returned is right."""
    out, lse, weights = results
    check_out(out, wanted)
    check_lse(lse, wanted)
    check_weights(weights, wanted)


def check_call(attention: Any, *args: Any, rng: Any = None, **options: Any) -> tuple[Array, Array, Array]:
    """Make a call that returns everything, assert that all of it is right, and return it."""
    results: tuple[Array, Array, Array] = attention(*args, **options, rng=rng, return_lse=True, return_weights=True)
    check_all(results, expected(*args, rng=rng, **options))
    return results


def _check(name: str, got: Array, exact: Array, bound: Array, problem: Problem) -> None:
    assert isinstance(got, np.ndarray), name
    assert got.dtype == problem.dtype, f"{name}: dtype {got.dtype}, expected {problem.dtype}"
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    with np.errstate(all="ignore"):
        finite, infinite = np.isfinite(exact), np.isinf(exact)
        fine = np.where(finite, np.abs(got.astype(exact.dtype) - exact) <= bound, np.isnan(exact) & np.isnan(got))
        fine |= infinite & (got == exact)
        if name == "out":
            fine |= infinite & np.isnan(got)
        else:
            # a result may overflow where dropout enlarges it, but never these two
            assert not np.isposinf(exact).any(), name
    if not fine.all():
        worst = np.unravel_index(np.argmin(fine), fine.shape)
        limit = np.broadcast_to(bound, fine.shape)
        with np.errstate(all="ignore"):
            excess = np.nanmax(np.where(finite & ~fine, np.abs(got - exact) / limit, 0), initial=0)
        raise AssertionError(
            f"{name}: {np.count_nonzero(~fine)} of {fine.size} elements are wrong; the first, at "
            f"{tuple(map(int, worst))}, is {got[worst]!r}, expected {exact[worst]!r} to within {limit[worst]:.3g}; "
            f"the worst is {excess:.3g} times its bound away; {problem}"
        )


# -- layers ------------------------------------------------------------------------------------------------------------


def layer_bound(dtype: Any, score_terms: float, value_terms: float) -> float:
    """Return how far a result of a layer may be from the exact one.

    A layer multiplies before it attends: queries and keys are sums of products already, and each of the two has an
    error of eps times the size of its terms, as the score of the two has. With A the size of the terms of a score once
    all sums in it are multiplied out, its error is 3 eps · A. The result is a weighted mean of sums that may go through
    one more product: V is the size of its terms, multiplied out as well, and each of the three operations rounds once.

    Parameters
    ----------
    dtype
        Of the computation.
    score_terms, value_terms : float
        A and V: what the formula gives for the magnitudes of everything in it.
    """
    return float(np.finfo(dtype).eps) * (ROUNDINGS + 3 * score_terms) * max(1.0, value_terms)
