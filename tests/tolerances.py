"""How far a result may be from the exact one: one policy, derived here and used by every test.

The exact result is the formula evaluated in a wider type, by `fastattn.reference`. Write eps for the spacing of numbers
at 1 in the type of the call, and A for the largest Σ|q||k| · |scale|, which is how large the terms are whose sum is a
score. Then:

- A score is a sum of D terms of total size A. Its error is about eps · A where roundings cancel, and eps/2 · D · A at
  the worst (Higham, "Accuracy and stability of numerical algorithms", section 3.1), which terms that are all alike come
  near. The first is the promise for results, the second what a log-sum-exp or a single weight is held to. Where a
  floating mask is added, the sum is rounded once more, at the size of the mask: A of a row grows by the largest |mask|
  among the keys that have a weight there. (A mask of -1e9 next to others of 0 costs nothing: keys under it have no
  weight that could be wrong; where it is w it is at most |lse| + |log w|, and with a sink all may be small.) What a
  slope of ALiBi takes off, a product that is rounded itself, counts twice.
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
- A softcap c makes c · tanh(s / c) of a score s, whose slope is at most 1: the error of the score becomes no greater,
  and no error is above 2 c. The result, no larger than c or than the score, is rounded some times more
  (`CAP_ROUNDINGS`): the factor 1 / c, the product with it, which tanh makes no worse relative to itself, tanh (2 for
  that of exp(x) - 1, 1 each for the sum and the quotient), and the product with c.
- Roundings of the terms of a sum go either way, and `ROUNDINGS` stands for what is left of them. Where all keys are
  one key, as in an array with a stride of 0, or a scale of 0 makes all scores one, terms are alike, and so are their
  roundings, which add up: to (Lk - 1) / 2 in the sum of the weights, and as many in that of the values. Where the
  features of each query and of each key are one number, so are the roundings of a score, and results are held to what
  log-sum-exps are.
- Dropout multiplies weights, and with them their errors, by 1 / (1 - p).
- In the backward pass a weight is exp(score - lse) with both rounded, and what is multiplied by it, and summed, is
  rounded as often as the sum is long. A gradient is a sum of such products: its error is at most eps times the number
  of roundings on the way, times the sum of the magnitudes. `expected_gradients` evaluates just that. A log-sum-exp is
  subtracted from a finished score, and rounded at its own size.
- With a softcap the gradient of a score is multiplied by its slope, 1 - tanh(s / c)². That has the roundings of tanh,
  and an error d of the score changes it by a factor of up to exp(2 d / c), as its logarithm has a slope of up to 2 / c.
  Where tanh is 1 in the call's type, the slope need not become smaller any more (`LEAST_SLOPE`).
- Half precision is accumulated in float32: eps above is float32's, whatever the arrays are. Write h for half of the
  spacing of their numbers at 1, 2^-11 or 2^-8. The result is rounded to one of them, by h of itself, and so are weights
  before they are multiplied by the values, where a kernel does that: h · max|v|, as they sum to 1. Sums of weights, and
  so the log-sum-exp, are of those that are not rounded. In the backward pass gradients of scores are rounded likewise
  before they are multiplied, gradients at the end, and the result that arrives has been: the row sum Σ dO out is wrong
  by h Σ |dO out|. A number near 0 is rounded by half of the least one that there is. Where pairs of bfloat16 are
  multiplied, those below 2^-126 count as 0: weights, gradients of scores times the scale, and what sums have come to.
- A function of the user's makes an error of a score as much larger as its slope is steep, and rounds some times
  (`FUNCTION_ROUNDINGS`) at the size of the score or of what it adds. What these are, and its second derivative, which
  an error of a score changes the slope by, the functions of the tests say (`strategies.of_size`). The reference has the
  slope from differences, of which it says how wrong they may be.
- In a cache of int8 a number of a block of 32 is off by at most half of the scale. That is the least number of float16
  of which 127 reach the largest of the block: a 127th of it, or more by 2^-10 of that, or by 2^-24 (`off_in_int8`).
  Values change the result by what they are off by, as weights sum to 1. Keys change a score by d = Σ|q| |off| |scale|,
  and its weight, relative to the others, by a factor within exp(±2d): what that does to the result is at most
  exp(2d) - 1 times the largest value (`change_in_int8`).

What is not finite must be the same, with one exception: where the exact result is infinite, because a value is, the
weight of that value may be 0 in the narrower type, and 0 · inf is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn import reference
from fastattn.call.arrays import as_additive_operands, as_operands
from fastattn.call.halves import cast, finfo, is_bfloat16, is_floating, native
from fastattn.call.problem import Operands, Problem
from fastattn.call.seeds import seed_from
from fastattn.call.selection import places_of
from fastattn.call.shapes import describe, describe_additive
from fastattn.call.upstream import Upstream, bias_of, folded, summed_to

Array = NDArray[Any]

#: Roundings of one term of an additive score.
ADDITIVE_ROUNDINGS = 7
#: Roundings of one result that do not depend on the size of the scores: exp, sum, division, products with the values.
ROUNDINGS = 8
#: Roundings of a score that a softcap makes, at the size that it then has.
CAP_ROUNDINGS = 7
#: Roundings of a score that a function of the tests makes.
FUNCTION_ROUNDINGS = 8
#: A slope below this may be any other.
LEAST_SLOPE = {np.dtype(np.float32): 2.0**-56, np.dtype(np.float64): 2.0**-450}


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

    Parameters are those of `fastattn.attention`; `options` are dropout_p, is_causal, scale, enable_gqa and what else
    there is to say of scores. Given a weight, those of `fastattn.additive_attention`.
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
        eps = float(np.finfo(problem.real).eps)
        if weight is None:
            largest_score = terms = score_size(operands.query, operands.key, problem.scores.scale)
            if problem.scores.softcap is not None and any(np.isinf(in_float64(each)).any() for each in operands[:2]):
                largest_score = np.inf  # which the softcap makes as large as itself
        else:
            largest_score = float(np.abs(in_float64(weight)[np.isfinite(in_float64(weight))]).sum())
            terms = ADDITIVE_ROUNDINGS * largest_score
        worst = terms * max(1.0, problem.head_dim / 2)
        if weight is None and all(map(terms_alike, operands[:2])):
            terms = worst
        size: Any = ROUNDINGS + error_of_score(problem, terms, largest_score)
        if problem.scores.adds:
            factor = 1 if problem.scores.score_mod is None else FUNCTION_ROUNDINGS * steepness(problem)
            added = factor * size_of_added(problem, operands).reshape(undropped.shape)
            added = np.where(undropped > eps**2, added, 0)
            size = size + added.max(axis=-1, initial=0)
        size = np.broadcast_to(size + alike(operands.key, largest_score <= eps), problem.lse_shape)
        out_bound = eps * size * max(1.0, problem.keep_scale) * max(1.0, largest(operands.value))
        if np.isfinite(terms):
            size = size + error_of_score(problem, worst, largest_score) - error_of_score(problem, terms, largest_score)
        weight_bound = eps * size * max(1.0, problem.keep_scale)
        most = max(1.0, problem.keep_scale) * (1 + ROUNDINGS * eps)
        out_bound = out_bound[..., None]
        if problem.storage != problem.real:
            rounding, least = roundings(problem.storage)
            own = rounding * max(1.0, problem.keep_scale) * largest(operands.value)
            near_0 = least * (1 + problem.keys * largest(operands.value))
            out_bound = out_bound + own + near_0 + rounding * np.abs(np.where(np.isfinite(out), out, 0))
            most *= 1 + 2 * rounding
        most_out = most * (1 + problem.keys * eps) * largest(operands.value)
        # what numbers near 0 are rounded to
        most_out += problem.keys * float(np.finfo(problem.real).smallest_subnormal)
        return Expected(
            problem=problem,
            out=out,
            lse=lse,
            weights=weights,
            out_bound=out_bound,
            lse_bound=eps * (size + np.abs(lse)),
            weights_bound=weight_bound[..., None],
            largest_weight=most,
            largest_out=most_out * (problem.keys if problem.dropout_p else 1),
        )


def in_float64(array: Array) -> Array:
    """Return numbers in float64, which bounds are computed in."""
    return cast(array, np.dtype(np.float64))


def roundings(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return how far a number is from the nearest one of a dtype: relative to itself, and near 0, at most."""
    return float(finfo(dtype).eps) / 2, float(finfo(dtype).smallest_subnormal) / 2


def alike(key: Array, level: bool) -> int:
    """Return how many roundings add up where all keys are the same one, or all scores are `level`."""
    same = level or np.array_equal(key, np.broadcast_to(key[..., :1, :], key.shape))
    return key.shape[-2] - 1 if key.shape[-2] > 1 and same else 0


def terms_alike(array: Array) -> bool:
    """Whether the features of each row are one number: then the terms of a score are alike, and their roundings."""
    return array.shape[-1] > 1 and np.array_equal(array, np.broadcast_to(array[..., :1], array.shape), equal_nan=True)


def score_size(query: Array, key: Array, scale: float) -> float:
    """Return A, the largest Σ|q||k| · |scale| of the finite values."""
    query, key = (np.abs(np.where(np.isfinite(array), array, 0)) for array in map(in_float64, (query, key)))
    return float((query @ key.swapaxes(-1, -2)).max(initial=0) * abs(scale))


def size_of_added(problem: Problem, operands: Operands) -> Array:
    """Return the size of what is added to each score, 0 where that is not finite.

    There the row is not finite either, or the key has no part in it. The sum is as wrong as each of its terms: the
    mask, and twice what ALiBi takes off.
    """
    size = np.zeros((*problem.rows_shape, problem.queries, problem.keys))
    limit = float(np.finfo(problem.real).max)
    if operands.bias is not None:
        bias = np.abs(in_float64(operands.bias))
        size += np.where(np.isfinite(bias), np.minimum(bias, limit), 0)
    if "slope" in problem.scores.own:
        places = places_of(problem, operands, range(problem.queries), range(problem.keys))
        distance = np.abs(places.query + places.head["offset"] - places.key)
        size += np.minimum(2 * np.abs(places.head["slope"] * distance), limit)
    return size


def error_of_score(problem: Problem, terms: float, largest_score: float) -> float:
    """Return the error of a score, in eps, where that of scale · (query · key) is `terms`."""
    softcap = problem.scores.softcap
    if softcap is not None:
        most = 2 * softcap / float(np.finfo(problem.real).eps)
        largest_score = min(softcap, largest_score)
        terms = min(terms, most) + CAP_ROUNDINGS * largest_score
    if problem.scores.score_mod is None:
        return terms
    own = problem.scores.score_mod.python.largest  # type: ignore[attr-defined]
    return steepness(problem) * terms + FUNCTION_ROUNDINGS * (own + max(1.0, steepness(problem)) * largest_score)


def steepness(problem: Problem) -> float:
    """Return how large the slope of the user's function is at most; 1 where there is none."""
    score_mod = problem.scores.score_mod
    return 1.0 if score_mod is None else float(score_mod.python.steepest)  # type: ignore[attr-defined]


def slope_of_score(problem: Problem, operands: Operands, terms: float, weight: Array | None = None) -> tuple[Any, Any]:
    """Return what a gradient of scores is multiplied by, and its error, where that of raw scores is eps · terms."""
    softcap, score_mod = problem.scores.softcap, problem.scores.score_mod
    if softcap is None and score_mod is None:
        return 1.0, 0.0
    eps = float(np.finfo(problem.real).eps)
    raw = reference.forward.raw_scores(problem, operands, weight)
    raw = np.where(np.isnan(raw), 0, raw)  # NaN is hidden, or all of the row is
    slope, blur = np.ones(1), np.zeros(1)
    if softcap is not None:
        slope = problem.scores.slope(raw).astype(np.float64)
        blur = slope * (np.expm1(min(2 * eps * terms / softcap, 700.0)) + eps * CAP_ROUNDINGS)
        blur = np.minimum(1.0, blur + LEAST_SLOPE[problem.real])
    if score_mod is None:
        return slope, blur
    own, error = slope_of_function(problem, operands, raw, eps * terms)
    return np.abs(own) * slope, np.abs(own) * blur + error * slope


def slope_of_function(problem: Problem, operands: Operands, raw: Array, error: float) -> tuple[Array, Array]:
    """Return the slope of the user's function, and its error, where that of a score is `error` before a softcap."""
    score_mod = problem.scores.score_mod
    assert score_mod is not None
    where = reference.functions.where_all(problem, operands.heads)
    before = reference.forward.value_of(problem, operands, raw)
    before = np.where(np.isfinite(before), before, 0)  # the key is hidden, or all of the row is odd
    slope, unsure = reference.functions.slopes_of_function(score_mod, before, where)
    eps, bend = float(np.finfo(problem.real).eps), score_mod.python.bend  # type: ignore[attr-defined]
    blur = eps * FUNCTION_ROUNDINGS * max(1.0, steepness(problem))
    blur = blur + bend * (error + eps * (np.abs(before) + size_of_added(problem, operands)))
    slope, unsure = (np.where(np.isfinite(array), array, 0).astype(np.float64) for array in (slope, unsure))
    return slope, np.minimum(blur, 2 * steepness(problem)) + unsure


def largest(values: Array) -> float:
    """Return the largest magnitude of the finite values, 0 if there are none."""
    values = in_float64(values)
    return float(np.abs(np.where(np.isfinite(values), values, 0)).max(initial=0))


def check_out(out: Array, wanted: Expected, peer: Array | None = None) -> None:
    """Assert that a result is right; `peer` is PyTorch's on the same call, whose error may be the yardstick."""
    bound = wanted.out_bound
    if peer is not None:
        error = np.abs(in_float64(peer) - wanted.out)
        bound = np.maximum(bound, 2 * error[np.isfinite(error)].max(initial=0))
    _check("out", out, wanted.out, bound, wanted.problem, wanted.problem.storage)
    odd, size = ~np.isfinite(wanted.out), np.abs(in_float64(out))
    if wanted.problem.dropout_p > 0:
        odd |= size == np.inf  # for which `_check` has found room to be
    assert (odd | (size <= wanted.largest_out)).all(), f"out: {np.nanmax(size)} is above all values"


def check_lse(lse: Array, wanted: Expected) -> None:
    """Assert that a log-sum-exp is right."""
    _check("lse", lse, wanted.lse, wanted.lse_bound, wanted.problem)


def check_weights(weights: Array, wanted: Expected) -> None:
    """Assert that weights are right."""
    bound, storage = wanted.weights_bound, wanted.problem.storage
    if storage != wanted.problem.real:
        rounding, least = roundings(storage)
        bound = bound + rounding * np.abs(np.where(np.isfinite(wanted.weights), wanted.weights, 0)) + least
    _check("weights", weights, wanted.weights, bound, wanted.problem, storage)
    weights = in_float64(weights)
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


def _check(name: str, got: Array, exact: Array, bound: Array, problem: Problem, dtype: Any = None) -> None:
    dtype = problem.real if dtype is None else dtype
    assert isinstance(got, np.ndarray), name
    assert got.dtype == dtype, f"{name}: dtype {got.dtype}, expected {dtype}"
    got = cast(got, exact.dtype)
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    with np.errstate(all="ignore"):
        finite, infinite = np.isfinite(exact), np.isinf(exact)
        fine = np.where(finite, np.abs(got - exact) <= bound, np.isnan(exact) & np.isnan(got))
        fine |= infinite & (got == exact)
        fine |= finite & np.isinf(got) & (np.abs(exact) + bound >= float(finfo(dtype).max)) & (got * exact > 0)
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


def check_summary(summary: Any, exact: Any, wanted: Expected) -> None:
    """Assert that an AttentionSummary is right; `exact` is the one that `reference.summarise` reads off the weights.

    With d the error of a score that a single weight is held to:

    - The r-th greatest weight moves no further than any weight does.
    - The entropy has the derivatives -w (ln w + H), whose sizes add up to 2 H at most, and H is at most ln Lk. It is
      computed as ln l - ln 2 · Σ 2^x x / l, of terms of no more than 8 + 2 · log2 Lk, which are rounded.
    - A weight w changes by a factor of up to exp(2 d), since its score and the log-sum-exp do by d each, and by that of
      the difference, log w, which is rounded: beside a sink all of a query may be small. A weight that is 0 in the
      wider type may be as large as the least number there is, before it changes, and where d is large be any. What a
      key receives is a sum of Lq of them, in which d has the roundings of each.
    """
    problem = wanted.problem
    eps = float(np.finfo(problem.real).eps)
    with np.errstate(all="ignore"):
        error = wanted.weights_bound.astype(np.float64)
        most = np.log2(max(2, problem.keys))
        entropy_bound = error[..., 0] * (1 + 2 * most) + eps * ROUNDINGS * (8 + 2 * most)
        weights = np.where(np.isfinite(wanted.weights), wanted.weights, 0).astype(np.float64)
        there = np.maximum(weights, np.finfo(np.float64).smallest_subnormal)
        factor = 2 * error - eps * np.log(there)
        moved = np.where(factor < 700, there * np.expm1(factor), np.exp(np.minimum(0, np.log(there) + factor)))
        moved = np.minimum(1.0, moved + np.finfo(problem.real).tiny)
        received_bound = moved.sum(axis=-2) + eps / 2 * problem.queries * weights.sum(axis=-2)
    check_lse(summary.lse, wanted)
    _check("entropy", summary.entropy, exact.entropy, entropy_bound, problem)
    _check("received", summary.received, exact.received, received_bound, problem)
    _check("top_weights", summary.top_weights, exact.top_weights, error, problem)

    entropy, top, indices = summary.entropy, summary.top_weights, summary.top_indices
    shares = max(1, problem.keys + ("sink" in problem.scores.own))
    assert (np.isnan(entropy) | ((entropy >= 0) & (entropy <= np.log(shares) + entropy_bound))).all()
    assert indices.dtype == np.int64
    assert indices.shape == exact.top_indices.shape
    np.testing.assert_array_equal((indices >= 0).sum(axis=-1), (exact.top_indices >= 0).sum(axis=-1))
    assert ((top[..., 1:] <= top[..., :-1]) | np.isnan(top[..., 1:])).all()
    assert (np.isnan(top) | ((top >= 0) & (top <= 1))).all()
    taken = indices >= 0
    in_order = np.sort(np.where(taken, indices, -1 - np.arange(indices.shape[-1])), axis=-1)
    assert (np.diff(in_order, axis=-1) > 0).all(), "a key stands twice"
    if problem.keys:
        own = np.take_along_axis(wanted.weights, np.maximum(indices, 0), axis=-1)
        fine = ~taken | (np.abs(own - top) <= error)
        assert fine.all(), f"top_indices: {np.count_nonzero(~fine)} are those of other weights"
    assert not taken[np.isnan(top)].any()


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


# -- gradients ---------------------------------------------------------------------------------------------------------

#: What is promised for numbers of usual size, relative to the largest gradient, or to 1.
GRADIENT_PROMISE = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}


def expected_gradients(
    grad_out: Array,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    *,
    rng: Any = None,
    grad_lse: Array | None = None,
    captured: tuple[str, ...] = (),
    **options: Any,
) -> tuple[Problem, list[Array], list[Array]]:
    """Evaluate the gradients of query, key, value and mask in a wider type, and how far from them a result may be.

    The arguments are those of `fastattn.attention_backward`, less out and lse, which are evaluated in the wider type.
    Behind these stand the gradients of `captured` arrays. A score's derivative by an element does not depend on the
    score, nor does its sign depend on anything: so are the functions of the tests.

    Returns
    -------
    problem : Problem
    gradients, bounds : list of ndarray
        With the axes of the operands, the fourth one those of the scores.
    """
    problem, operands = describe(*as_operands(query, key, value, attn_mask), **options)
    seed = seed_from(rng, draw=problem.dropout_p > 0)
    out, lse, kept = reference.evaluate(problem, operands, seed)
    whole = kept if problem.dropout_p == 0 else reference.evaluate(replace(problem, dropout_p=0.0), operands)[2]
    rows = problem.rows_shape
    upstream = Upstream(
        in_float64(grad_out).reshape(*rows, problem.queries, problem.value_dim),
        out.reshape(*rows, problem.queries, problem.value_dim),
        lse.reshape(*rows, problem.queries),
        None if grad_lse is None else grad_lse.reshape(*rows, problem.queries),
        problem.real,
    )
    exact = reference.differentiate(problem, operands, upstream, seed, names=captured)
    with np.errstate(all="ignore"):
        # the same sums, of magnitudes: |dP| + |row sum| in place of their difference; float64 does for bounds
        whole, kept = (weights.reshape(exact.scores.shape).astype(np.float64) for weights in (whole, kept))
        q, k, v, g = (np.abs(in_float64(array)) for array in (*operands[:3], upstream.grad_out))
        sums = (g * np.abs(upstream.out, dtype=np.float64)).sum(-1, keepdims=True)
        if upstream.grad_lse is not None:
            sums = sums + np.abs(upstream.grad_lse, dtype=np.float64)[..., None]
        magnitudes = whole * (max(1.0, problem.keep_scale) * (g @ v.swapaxes(-1, -2)) + sums)
        eps = float(np.finfo(problem.real).eps)
        largest_score = score_size(operands.query, operands.key, problem.scores.scale)
        of_raw = largest_score * max(1.0, problem.head_dim / 2)
        slope, blur = slope_of_score(problem, operands, of_raw)
        of_mask, unsure = 1.0, 0.0
        if problem.scores.score_mod is not None:
            raw = reference.forward.raw_scores(problem, operands)
            of_mask, unsure = slope_of_function(problem, operands, np.where(np.isnan(raw), 0, raw), eps * of_raw)
        terms = error_of_score(problem, of_raw, largest_score)
        largest_mask = size_of_added(problem, operands).max(initial=0)
        # of one weight, whatever is multiplied by it
        row = np.where(np.isfinite(upstream.lse), np.abs(upstream.lse), 0)[..., None].astype(np.float64)
        # what is added where a weight is w is at most |lse| + |log w| and the score: beside a sink all may be small
        added = row + terms - np.log(np.where(whole > 0, np.minimum(whole, 1), 1))
        row = 2 * ROUNDINGS + terms + row + np.minimum(largest_mask, added)
        row = row + problem.head_dim + problem.value_dim + max(problem.queries, problem.keys)
        row = np.where(magnitudes > 0, row, 0)
        rounded, near_0, arrived, lost = 0.0, 0.0, 0.0, 0.0
        if problem.storage != problem.real:
            rounded, near_0 = roundings(problem.storage)
            arrived = whole * (rounded * sums + near_0 * g.sum(-1, keepdims=True))
            if is_bfloat16(problem.storage):
                near_0 = lost = float(finfo(problem.storage).tiny)
                arrived = arrived + whole * lost * problem.value_dim
        scores = (np.minimum(eps * row, 1e30) + rounded) * magnitudes + near_0 * (magnitudes > 0) + arrived
        kept = (np.minimum(eps * row, 1e30) + rounded) * kept + near_0 * (kept > 0)
        raw, seen = scores * slope + magnitudes * blur, (magnitudes > 0) * lost
        bounds = [
            abs(problem.scores.scale) * (raw @ k) + seen @ k + lost * problem.keys,
            abs(problem.scores.scale) * (raw.swapaxes(-1, -2) @ q) + seen.swapaxes(-1, -2) @ q + lost * problem.queries,
            kept.swapaxes(-1, -2) @ g + lost * problem.queries,
            scores * np.abs(of_mask) + magnitudes * unsure,
        ]
        if captured:
            before = reference.forward.value_of(problem, operands, reference.forward.raw_scores(problem, operands))
            sizes = reference.captured.gradients_of_captured(problem, operands, before, scores, captured)
            bounds += [np.abs(sizes[name]) for name in captured]
        bounds = [bound + float(np.finfo(problem.real).tiny) * (1 + bound) for bound in bounds]
    of_arrays = [exact.captured[name] for name in captured]
    return problem, [exact.query, exact.key, exact.value, exact.scores, *of_arrays], bounds


def check_gradients(
    gradients: tuple[Array, ...], given: tuple[Any, ...], problem: Problem, exact: list[Array], bounds: list[Array]
) -> None:
    """Assert that gradients are right, and of the shapes and dtypes of what was given; without a mask's, if none is."""
    names = ("grad_query", "grad_key", "grad_value", "grad_mask")
    arguments = (*given[:3], *map(bias_of, given[3:]))
    for name, gradient, argument, wide, bound in zip(names, gradients, arguments, exact, bounds, strict=False):
        shared = name in ("grad_key", "grad_value")
        shape, dtype = np.shape(argument), np.asarray(argument).dtype
        assert gradient.shape == shape, name
        assert gradient.dtype == (native(dtype) if is_floating(dtype) else problem.real), name
        with np.errstate(all="ignore"):
            want, limit = folded(wide, shape, problem, shared), folded(bound, shape, problem, shared)
            kind = finfo(gradient.dtype)
            limit = limit + 2 * float(kind.eps) * np.abs(want) + float(kind.smallest_subnormal)
            gradient = cast(gradient, want.dtype)
            fine = np.abs(gradient - want) <= limit
            fine |= ~np.isfinite(want) & ~np.isfinite(gradient)
            fine |= np.isinf(gradient) & (np.abs(want) + limit >= float(kind.max)) & (gradient * want > 0)
        assert fine.all(), (
            f"{name}: {np.count_nonzero(~fine)} of {fine.size} elements are wrong, by up to "
            f"{np.nanmax(np.abs(gradient - want)):.3g}, {np.nanmax(np.abs(gradient - want) / limit):.3g} times the "
            f"bound; {problem}"
        )


def check_head_gradients(
    found: dict[str, Array], grad_out: Array, *args: Any, grad_lse: Array | None = None, rng: Any = None, **options: Any
) -> None:
    """Assert that gradients of sinks and slopes are right, and of the shapes and dtypes of what was given.

    - That of a slope is a sum of scores' gradients times distances: so is its bound, of their bounds.
    - A row gives a sink weight · (Σ dO out - dlse). The weight is exp(sink - lse), wrong by the error of lse, and never
      above 1; sums of products round as in any other gradient.
    """
    problem, operands = describe(*as_operands(*args), **options)
    _, gradients, bounds = expected_gradients(grad_out, *args, grad_lse=grad_lse, rng=rng, **options)
    wanted = expected(*args, rng=rng, **options)
    rows = problem.rows_shape
    with np.errstate(all="ignore"):
        for name, got in found.items():
            given = np.asarray(options[name])
            if name == "alibi_slopes":
                places = places_of(problem, operands, range(problem.queries), range(problem.keys))
                distance = np.abs(places.query + places.head["offset"] - places.key).astype(np.float64)
                exact = -(gradients[3].astype(np.float64) * distance).sum(axis=(-1, -2))
                bound = (bounds[3] * distance).sum(axis=(-1, -2))
            else:
                lse, lse_bound = (a.reshape(*rows, problem.queries) for a in (wanted.lse, wanted.lse_bound))
                sinks = operands.heads["sink"].reshape(*rows, 1) if operands.heads is not None else -np.inf
                weight = np.exp(sinks - np.where(lse == -np.inf, np.inf, lse)).astype(np.float64)
                given_out = in_float64(grad_out).reshape(*lse.shape, problem.value_dim)
                products = (given_out * wanted.out.reshape(given_out.shape)).astype(np.float64)
                size, delta = np.abs(products).sum(-1), products.sum(-1)
                if grad_lse is not None:
                    size, delta = size + np.abs(grad_lse.reshape(lse.shape)), delta - grad_lse.reshape(lse.shape)
                moved = np.minimum(1.0, weight * np.expm1(np.minimum(lse_bound.astype(np.float64), 700.0)))
                out_error = np.abs(given_out).sum(-1) * float(np.max(wanted.out_bound, initial=0))
                rounding = float(np.finfo(problem.real).eps) * (2 * ROUNDINGS + problem.value_dim + problem.queries)
                exact = -(weight * delta).sum(-1)
                tiny = float(np.finfo(problem.real).tiny)  # a weight below is 0
                bound = ((moved + tiny) * size + weight * (out_error + rounding * size) + tiny).sum(-1)
            shape = (*problem.batch, problem.heads)
            want, limit = (summed_to(a.reshape(shape), given.shape) for a in (exact, bound))
            kind, dtype = finfo(got.dtype), got.dtype
            limit = limit + 4 * float(kind.eps) * np.abs(want) + float(kind.smallest_subnormal)
            got = cast(got, want.dtype)
            fine = (np.abs(got - want) <= limit) | (~np.isfinite(want) & ~np.isfinite(got))
            assert got.shape == given.shape, name
            assert dtype == (native(given.dtype) if is_floating(given.dtype) else problem.real), name
            assert fine.all(), f"{name}: {got[~fine]}, expected {want[~fine]} to within {limit[~fine]}; {problem}"


def check_captured_gradients(
    found: dict[str, Array], sources: dict[str, Array], grad_out: Array, *args: Any, **options: Any
) -> None:
    """Assert that gradients of captured arrays are right, and of the shapes and dtypes of these."""
    problem, exact, bounds = expected_gradients(grad_out, *args, captured=tuple(found), **options)
    for (name, got), want, limit in zip(found.items(), exact[4:], bounds[4:], strict=True):
        with np.errstate(all="ignore"):
            kind = np.finfo(got.dtype)
            limit = limit + 4 * float(kind.eps) * np.abs(want) + float(kind.smallest_subnormal)
            fine = (np.abs(got - want) <= limit) | (~np.isfinite(want) & ~np.isfinite(got))
        assert got.shape == sources[name].shape, name
        assert got.dtype == sources[name].dtype.newbyteorder("="), name
        assert fine.all(), f"{name}: {got[~fine]}, expected {want[~fine]} to within {limit[~fine]}; {problem}"


def check_promise(gradients: tuple[Array, ...], exact: Any, dtype: Any) -> None:
    """Assert that gradients are as near to the exact ones as is promised for numbers of usual size."""
    for gradient, want in zip(gradients, exact, strict=True):
        error = float(np.abs(gradient - want).max(initial=0))
        assert error <= GRADIENT_PROMISE[np.dtype(dtype)] * max(1.0, float(np.abs(want).max(initial=0))), error


# -- int8 --------------------------------------------------------------------------------------------------------------


def off_in_int8(array: Any) -> Array:
    """Return how far each number may be from what is left of it in a cache of int8, which holds up to 127 · 65504."""
    numbers = np.abs(in_float64(np.asarray(array)))
    features = numbers.shape[-1]
    padded = np.zeros((*numbers.shape[:-1], -(-features // 32) * 32))
    padded[..., :features] = numbers
    largest = padded.reshape(*numbers.shape[:-1], -1, 32).max(axis=-1)
    scales = largest / 127 * (1 + 2.0**-10) + 2.0**-24
    return np.repeat(scales / 2, 32, axis=-1)[..., :features]


def change_in_int8(query: Any, key: Any, value: Any, scale: float, keys: bool = True, values: bool = True) -> float:
    """Return how far a result may move where keys, or values, or both are kept in int8."""
    change, largest = 0.0, float(np.abs(in_float64(np.asarray(value))).max(initial=0.0))
    if values:
        off = float(off_in_int8(value).max(initial=0.0))
        change, largest = off, largest + off
    if keys:
        group = query.shape[-3] // key.shape[-3]
        away = np.repeat(off_in_int8(key), group, axis=-3)
        d = np.abs(in_float64(query)) @ away.swapaxes(-1, -2) * abs(scale)
        change += float(np.expm1(2 * d.max(initial=0.0))) * largest
    return change
