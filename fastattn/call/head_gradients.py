"""Gradients of what query heads have of their own, sinks and slopes of ALiBi, summed from numbers of the rows.

A sink is one more key of each row, with the value 0. So the gradient of its score in a row is, as that of any key,
weight · (0 - delta), with delta = Σ_p dO[p] · out[p] - dlse; that of the sink is the sum over the rows.

Sums are in float64, of rows that lie one after the other, head by head: neither layouts nor threads change their bits.
"""

from __future__ import annotations

import math

import numpy as np

from fastattn.call.problem import Array, Operands, Problem
from fastattn.call.upstream import Upstream

__all__ = ["gradient_of_sinks", "gradient_of_slopes"]


def gradient_of_slopes(sums: Array, factor: float) -> Array:
    """Return the gradients of slopes, from each query's sum over the keys of its scores' gradients times the distance.

    Parameters
    ----------
    sums : ndarray, shape (*batch, Hk, G, Lq)
    factor : float
        What these gradients are multiplied by.
    """
    summed: Array = np.ascontiguousarray(sums, np.float64).sum(axis=-1) / -factor
    return summed


def gradient_of_sinks(problem: Problem, operands: Operands, upstream: Upstream, weights: Array) -> Array:
    """Return the gradients of sinks, shape (*batch, Hk, G).

    Parameters
    ----------
    problem : Problem
    operands : Operands
    upstream : Upstream
    weights : ndarray, shape (*batch, Hk, G, Lq)
        Those of the sinks in rows whose log-sum-exp has lost digits, NaN in others, whose log-sum-exp tells them.
    """
    assert operands.heads is not None
    sinks = operands.heads["sink"]
    shape = math.prod(problem.rows_shape), problem.queries
    lse, known = upstream.lse.reshape(shape), weights.reshape(shape)
    grad_out, out = upstream.grad_out, upstream.out
    found = np.zeros(shape[0])
    for number, place in enumerate(np.ndindex(problem.rows_shape)):
        if sinks[number] == -np.inf:
            continue
        products = np.multiply(grad_out[place], out[place], dtype=np.float64, order="C")
        deltas = products.sum(axis=-1)
        if upstream.grad_lse is not None:
            deltas -= upstream.grad_lse[place]
        total = lse[number].astype(np.float64)
        # of a sum that has the sink among its terms, that is no more than all
        shares = np.minimum(np.exp(sinks[number] - np.where(total == -np.inf, np.inf, total)), 1.0)
        found[number] = -(np.where(np.isnan(known[number]), shares, known[number]) * deltas).sum()
    return found.reshape(problem.rows_shape)
