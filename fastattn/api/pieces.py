"""Attention of a piece of a call, for what computes one in many places: `attention_blocks`, Dask, MPI.

A piece is some rows of the batch, heads, queries and keys of a whole. Its options are those of the whole, with what is
one for each row, head, query or key cut likewise: positions and lengths stay those of the whole, and `first` says where
the piece begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastattn.api import attention, backward
from fastattn.call.arrays import as_common
from fastattn.call.halves import cast
from fastattn.call.positions import of_piece
from fastattn.call.problem import Array, Mask, Problem
from fastattn.call.shapes import describe
from fastattn.call.types import Number

__all__ = ["First", "attend", "differentiate"]


class First(NamedTuple):
    """The numbers that the first row of the batch, head, query and key of a piece have in the whole."""

    batch: int = 0
    head: int = 0
    query: int = 0
    key: int = 0


WHOLE = First()


def attend(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Mask = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    first: First = WHOLE,
    seed: int | None = None,
    out: Array | None = None,
    options: Mapping[str, Any],
) -> tuple[Array, Array]:
    """Return the result over a piece and its log-sum-exp, both in the dtype that sums have.

    Parameters
    ----------
    query, key, value, attn_mask, dropout_p, causal, scale, enable_gqa
        As those of `fastattn.attention`; what "bottom-right" means in the whole is said by query_offset.
    first : First
    seed : int, optional
        As `fastattn.call.seeds.seed_from` returns it.
    out : ndarray, optional
        Where to write the result, of that dtype.
    options : mapping
        `fastattn.call.score_options.FurtherOptions` without a block mask. Sinks belong to one piece alone of those that
        are merged.
    """
    further = of_piece(options, first, key.shape[-2], dropout_p > 0)
    if out is None:
        problem = _problem(query, key, value, enable_gqa)
        out = np.empty(problem.out_shape, problem.real)
    call: Any = (query, key, value, attn_mask, dropout_p, causal, scale, enable_gqa)
    wanted: Any = {"return_lse": True, "return_weights": False, "rng": seed, "out": out}
    result: tuple[Array, Array] = attention.on_cpu(b"", further, *call, **wanted)
    return result


def differentiate(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    attn_mask: Mask = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    first: First = WHOLE,
    seed: int | None = None,
    grad_lse: Array | None = None,
    grads: Sequence[str] = ("query", "key", "value"),
    options: Mapping[str, Any],
) -> tuple[Array, ...]:
    """Return gradients that a piece has a part in, those by query, key and value in the dtype that sums have.

    `grad_out`, `out`, `lse` and `grad_lse` are those of its queries in the whole. The parts of pieces with the same
    queries, or the same keys, add up. All else is as in `attend`. The gradient of sinks does not depend on keys: it is
    that of one of the pieces with the same queries.
    """
    further = of_piece(options, first, key.shape[-2], dropout_p > 0)
    real = _problem(query, key, value, enable_gqa).real
    arrays = [cast(array, real) for array in (query, key, value)]
    call: Any = (grad_out, *arrays, out, lse, attn_mask, dropout_p, causal, scale, enable_gqa)
    wanted: Any = {"rng": seed, "grad_lse": grad_lse, "grad_mask": False, "grads": grads}
    return backward.on_cpu(further, *call, **wanted)


def _problem(query: Array, key: Array, value: Array, enable_gqa: bool) -> Problem:
    """What shapes and dtypes say of a piece."""
    query, key, value = as_common({"query": query, "key": key, "value": value})
    return describe(query, key, value, enable_gqa=enable_gqa)[0]
