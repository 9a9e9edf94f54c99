"""What tests of weights and summaries share: calls without values, choices of rows and columns, and what they give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tolerances
from hypothesis import strategies as st
from strategies import Call, bits_of

import fastattn
from fastattn import reference
from fastattn.call.selection import describe_scores
from fastattn.call.shapes import describe


def without_values(call: Call) -> tuple[Any, Any, Any]:
    """Return query, key and mask of a call; the query has all batch axes, which the values alone may have given."""
    problem, _ = describe(call.query, call.key, call.value, None, **call.options)
    query = np.broadcast_to(call.query, (*problem.out_shape[:-2], *call.query.shape[-2:]))
    return query, call.key, call.attn_mask


def exact(args: tuple[Any, Any, Any], options: Any, top_k: int = 8) -> tuple[Any, tolerances.Expected]:
    """Return the exact summary, and the exact weights with their bounds."""
    query, key, mask = args
    problem, operands = describe_scores(
        query, key, mask, **({"is_causal": False, "scale": None, "enable_gqa": False} | options)
    )
    return reference.summarise(problem, operands, top_k), tolerances.expected(query, key, key, mask, **options)


def check_summary(args: tuple[Any, Any, Any], options: Any, top_k: int = 8, backend: str = "cpu") -> Any:
    """Assert that the summary of a call is right, and return it."""
    before = bits_of(*args)
    summary = fastattn.attention_summary(*args, **options, top_k=top_k, backend=backend)
    assert bits_of(*args) == before
    tolerances.check_summary(summary, *exact(args, options, top_k))
    return summary


@st.composite
def selections(draw: st.DrawFn, length: int) -> Any:
    """Draw what a user may give for rows or columns."""
    kind = draw(st.sampled_from(("all", "int", "slice", "slice", "array", "list", "near", "bools")))
    if kind == "all":
        return None
    if kind == "int" and length:
        return draw(st.sampled_from((int, np.int32)))(draw(st.integers(-length, length - 1)))
    if kind == "slice":
        bound = st.one_of(st.none(), st.integers(-length - 3, length + 3))
        return slice(draw(bound), draw(bound), draw(st.sampled_from((None, 1, 1, 2, 5, -1, -3))))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    if kind == "near" and length:
        return np.arange(draw(st.integers(0, length - 1)), length)
    if kind == "bools":
        return rng.random(length) < 0.4
    indices = rng.integers(-length, length, draw(st.integers(0, 20))) if length else np.zeros(0, int)
    return indices.tolist() if kind == "list" else indices


def full(selection: Any) -> Any:
    """Return the selection as an index that keeps its axis."""
    if selection is None:
        return slice(None)
    if isinstance(selection, (int, np.integer)):
        return slice(selection, selection + 1 or None)
    return np.array(selection, int) if isinstance(selection, list) else selection


def cut(weights: Any, rows: Any, columns: Any) -> Any:
    """Return the weights of chosen rows and columns."""
    return weights[..., full(rows), :][..., full(columns)]


def check_chosen(args: Any, options: Any, rows: Any, columns: Any, backend: str = "cpu") -> None:
    """Assert that weights of chosen rows and columns are right, with the sums given and without."""
    before = bits_of(*args)
    query, key, mask = args
    wanted = tolerances.expected(query, key, key, mask, **options)
    with np.errstate(all="ignore"):
        part = replace(
            wanted,
            weights=cut(wanted.weights, rows, columns),
            weights_bound=wanted.weights_bound[..., full(rows), :],
        )
    tile = fastattn.attention_weights(*args, **options, rows=rows, columns=columns, backend=backend)
    tolerances.check_weights(tile, part)
    lse = fastattn.attention(query, key, key, mask, **options, return_lse=True, backend=backend)[1]
    with np.errstate(all="ignore"):  # the log-sum-exp, its error, and its product with log2(e) are rounded
        more = np.where(np.isfinite(wanted.lse), 2 * wanted.lse_bound, 0)[..., None]
    part = replace(part, weights_bound=part.weights_bound + more[..., full(rows), :])
    given_lse = fastattn.attention_weights(*args, **options, rows=rows, columns=columns, lse=lse, backend=backend)
    tolerances.check_weights(given_lse, part)
    assert bits_of(*args) == before
