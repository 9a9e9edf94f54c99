"""`attention`: arguments to a Problem, Problem to a backend."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import reference
from fastattn.cpu.attention import Prepared
from fastattn.cpu.pool import get_num_threads
from fastattn.problem import as_operands, check_backend, check_flag, check_out, describe, seed_from

BACKENDS = ("cpu", "reference")


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool | str = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: bool = False,
    return_weights: bool = False,
    rng: int | np.random.Generator | None = None,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> Any:
    """Scaled dot-product attention.
    """
    check_backend(backend, BACKENDS)
    if backend == "reference":
        return reference.attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            return_lse=return_lse,
            return_weights=return_weights,
            rng=rng,
            out=out,
        )
    arrays = as_operands(query, key, value, attn_mask)
    problem, operands = describe(*arrays, dropout_p, is_causal, scale, enable_gqa)
    check_flag("return_lse", return_lse)
    check_flag("return_weights", return_weights)
    seed = seed_from(rng, problem.dropout_p > 0)
    check_out(out, problem)
    result = np.empty(problem.out_shape, problem.dtype) if out is None else out
    lse = np.empty(problem.lse_shape, problem.dtype) if return_lse else None
    prepared = Prepared(problem, operands, result, get_num_threads())
    prepared(
        operands.query.ctypes.data,
        operands.key.ctypes.data,
        operands.value.ctypes.data,
        0 if operands.mask is None else operands.mask.ctypes.data,
        result.ctypes.data,
        0 if lse is None else lse.ctypes.data,
        seed,
    )
    wanted = [result] + ([lse] if return_lse else [])
    return result if len(wanted) == 1 else tuple(wanted)
