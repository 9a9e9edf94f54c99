"""Gradients of additive attention against the formula, to within a bound; and a few calls for checks of one ISA."""

from __future__ import annotations

from typing import Any

import numpy as np
import tolerances
from additive_cases import inputs
from strategies import Call, bias_in, bits_of, numbers

from fastattn import additive_attention, additive_attention_backward, reference
from fastattn.call.arrays import as_additive_operands
from fastattn.call.halves import cast, finfo, native
from fastattn.call.shapes import describe_additive
from fastattn.call.upstream import captured_sources, describe_upstream, folded
from fastattn.reference.backward import differentiate

Array = np.ndarray[Any, Any]
NAMES = ("query", "key", "value", "weight")


def upstream_of(
    query: Any, key: Any, value: Any, weight: Any, mask: Any = None, is_causal: Any = False, **options: Any
) -> list[Array]:
    """Return some gradient of the result, the result and the log-sum-exp."""
    out, lse = additive_attention(query, key, value, weight, mask, is_causal, **options, return_lse=True)
    rng = np.random.default_rng(out.size)
    return [numbers(rng, out.shape, out.dtype), out, lse]


def backward(arrays: Any, mask: Any = None, is_causal: Any = False, *, upstream: Any = None, **options: Any) -> Any:
    """Call the kernels, after the forward pass."""
    of_scores = {name: option for name, option in options.items() if name != "backend"}
    upstream = upstream or upstream_of(*arrays, mask, is_causal, **of_scores)
    grad_out, out, lse = upstream
    return additive_attention_backward(grad_out, *arrays, out, lse, mask, is_causal, **options)


def bounds(
    problem: Any, operands: Any, upstream: Any, weight: Array, captured: tuple[str, ...] = ()
) -> dict[str, Array]:
    """Return how far each gradient may be from that of the formula, before sums over broadcast axes, by name.

    With A the size of the terms of a score (see `tolerances`), a weight P is wrong by eps · (8 + A + |lse| + |log P|)
    of itself, and by what is too small for the dtype. What mask and slopes add counts besides: that of its own score,
    which without a function is no more than the score with it, |lse| + |log P|, and the one without; and the mean over
    all weights, by which the log-sum-exp is wrong. dS is P times a difference of size Σ |dO| |value| + Σ |dO| |out|;
    1 - t² has a few roundings of 1. Sums round as well: by the root of the number of terms, as roundings cancel. What a
    softcap makes of the errors of scores, and of dS, is said in `tolerances`, as is what a user's function does, and
    what is asked of those that have gradients of `captured` arrays.
    """
    info = np.finfo(problem.real)
    eps, tiny = float(info.eps), float(info.tiny)
    rows, out, lse, value = (
        np.abs(np.where(np.isfinite(a), a, 0)) for a in map(tolerances.in_float64, (*upstream[:3], operands.value))
    )
    weights = reference.evaluate(problem, operands, weight=weight)[2].reshape(*lse.shape, problem.keys)
    weights = np.where(np.isfinite(weights), weights, 0).astype(np.float64)
    weight_ = tolerances.in_float64(weight)
    large = np.abs(np.where(np.isfinite(weight_), weight_, 0))
    of_raw = tolerances.ADDITIVE_ROUNDINGS * float(large.sum())
    slope, blur = tolerances.slope_of_score(problem, operands, of_raw, weight)
    terms = tolerances.error_of_score(problem, of_raw, float(large.sum()))
    terms += 2 * tolerances.ROUNDINGS + np.sqrt(problem.value_dim + problem.queries + problem.keys)
    # no score with what is added to it is larger
    whole = np.minimum(lse[..., None] - np.log(np.where(weights > 0, weights, 1)), 1e300)
    errors = terms + whole
    if problem.scores.bias or "slope" in problem.scores.own:
        added = np.minimum(tolerances.size_of_added(problem, operands), 1e300)
        most = 2 * (whole + float(large.sum())) if problem.scores.score_mod is None else np.inf
        errors = errors + np.minimum(added, most) + (weights * added).sum(axis=-1, keepdims=True)
    errors = eps * errors * weights + tiny
    magnitudes = rows @ value.swapaxes(-1, -2) + (rows * out).sum(-1)[..., None]
    slopes, scores = (errors * slope + weights * blur) * magnitudes + tiny, errors * magnitudes + tiny
    of_mask, unsure, sizes = 1.0, 0.0, {}
    if problem.scores.score_mod is not None:
        raw = reference.forward.raw_scores(problem, operands, weight)
        finite = np.where(np.isnan(raw), 0, raw)
        of_mask, unsure = tolerances.slope_of_function(problem, operands, finite, eps * of_raw)
        before = reference.forward.value_of(problem, operands, raw)
        sizes = reference.captured.gradients_of_captured(problem, operands, before, scores, captured)
    return {
        "query": slopes.sum(axis=-1)[..., None] * large + tiny,
        "key": slopes.sum(axis=-2)[..., None] * large + tiny,
        "value": errors.swapaxes(-1, -2) @ rows + tiny,
        "weight": np.full(weight.shape, slopes.sum()),
        "attn_mask": scores * np.abs(of_mask) + weights * magnitudes * unsure,
        **{name: np.abs(size) for name, size in sizes.items()},
    }


def check(call: Call) -> None:
    """Assert that the gradients of a call are right, and like their arguments, and that nothing was changed."""
    arrays = (call.query, call.key, call.value, call.options["weight"])
    options = {name: option for name, option in call.options.items() if name != "weight"}
    upstream = upstream_of(*arrays, call.attn_mask, **options)
    before = call.bits, bits_of(*upstream)
    *plain, mask = as_additive_operands(*arrays, call.attn_mask)
    problem, operands = describe_additive(*plain, mask, **options)
    captured = captured_sources(problem, operands.captured)
    sources = dict(zip(NAMES, arrays, strict=True)) | captured
    if bias_in(call.attn_mask) is not None:
        sources["attn_mask"] = bias_in(call.attn_mask)
    found = backward(arrays, call.attn_mask, **options, upstream=upstream, grads=tuple(sources))
    assert (call.bits, bits_of(*upstream)) == before

    checked = describe_upstream(problem, *upstream)
    with np.errstate(all="ignore"):
        exact = differentiate(problem, operands, checked, weight=plain[3], names=tuple(captured)).named()
        allowed = bounds(problem, operands, checked, plain[3], tuple(captured))
        for (name, array), got in zip(sources.items(), found, strict=True):
            want, bound = exact[name], allowed[name]
            assert got.shape == array.shape, name
            assert got.dtype == native(array.dtype), name
            if name in ("query", "key", "value", "attn_mask"):
                shared = name in ("key", "value")
                want, bound = (folded(a, array.shape, problem, shared) for a in (want, bound))
            if name not in NAMES or problem.storage != problem.real:  # what is computed with may be wider, and rounded
                rounding, least = tolerances.roundings(got.dtype)
                most, got = float(finfo(got.dtype).max), cast(got, want.dtype)
                bound = bound + rounding * np.abs(want) + least
                want = np.where(np.abs(want) + bound >= most, got, want)
            fine = np.where(np.isfinite(want), np.abs(got - want) <= bound, ~np.isfinite(got))
            assert fine.all(), f"{name}: {got[~fine][0]}, expected {want[~fine][0]} to within {bound[~fine][0]}; {call}"


def check_calls(dtypes: tuple[Any, ...]) -> int:
    """Assert that a few calls, which reach every part of the kernel, are right; return how many there were."""
    count = 0
    for dtype in dtypes:
        for queries, keys, features in ((150, 140, 37), (3, 140, 37), (1, 5, 130)):
            for size in (1.0, 30.0):
                *arrays, weight = inputs(dtype, 2, queries, keys, features, size)
                arrays[0][:, ::7] *= 100
                arrays[1][:, ::7] *= 100
                for mask in (None, np.random.default_rng(0).random((queries, keys)) < 0.6):
                    check(Call(*arrays, mask, {"weight": weight, "is_causal": "bottom-right"}))
                    count += 1
    return count
