"""Attention for JAX on CPUs: a callback into fastattn's kernels, with their derivative."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import numpy as np

try:
    import jax
except ImportError as error:
    raise ImportError("fastattn.integrations.jax needs JAX: pip install jax, or fastattn[jax]") from error

import fastattn
from fastattn.call.advice import to_convert
from fastattn.call.arrays import as_operands
from fastattn.call.problem import Problem
from fastattn.call.shapes import describe

__all__ = ["attention"]

OPTIONS = ("is_causal", "scale", "enable_gqa")
ARRAYS = (jax.Array, np.ndarray, np.generic)
Array: TypeAlias = Any  # JAX's types are not known where it is not installed


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    is_causal: bool | str = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """Scaled dot-product attention: `fastattn.attention`, differentiable once in reverse mode.

    Works under ``jit``, ``grad`` and ``vmap``, on the CPU. Layouts are fastattn's, heads before lengths.

    Parameters
    ----------
    query : jax.Array, shape (..., Hq, Lq, D)
        float32, or float64 where JAX has that enabled.
    key : jax.Array, shape (..., Hk, Lk, D)
    value : jax.Array, shape (..., Hk, Lk, Dv)
    attn_mask : jax.Array, broadcasting to (..., Hq, Lq, Lk), optional
        Boolean, where True takes part, or floating, added to the scores.
    is_causal : bool or "bottom-right"
        True: query i looks at the keys up to i. "bottom-right": up to i + Lk - Lq, as in decoding.
    scale : float, optional
        Factor of query · key, 1/sqrt(D) unless given.
    enable_gqa : bool
        Grouped queries: Hq is a multiple of Hk.

    Returns
    -------
    jax.Array, shape (..., Hq, Lq, Dv)

    Raises
    ------
    TypeError
        If an argument is no array, or query, key and value are not all float32, or all float64.
    ValueError
        If shapes do not go together. The message names the argument.

    Examples
    --------
    >>> import jax
    >>> from fastattn.integrations.jax import attention
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 8, 16, 64))
    >>> jax.jit(jax.grad(lambda query: attention(query, key, value).sum()))(query).shape
    (2, 8, 16, 64)
    """
    return _forward(query, key, value, attn_mask, is_causal, scale, enable_gqa)[0]


def _problem(arrays: tuple[Array, Array, Array, Array | None], *options: Any) -> Problem:
    """Check a call while it is traced, when there are shapes and no numbers yet."""
    for name, array in zip(("query", "key", "value", "attn_mask"), arrays, strict=True):
        if not isinstance(array, ARRAYS) and not (array is None and name == "attn_mask"):
            raise TypeError(f"{name}: {type(array).__name__}; expected a jax.Array")
    for name, array in zip(("query", "key", "value"), arrays, strict=False):
        if array.dtype not in (np.float32, np.float64) or array.dtype != arrays[0].dtype:
            plain = array.dtype in (np.float32, np.float64) or not np.can_cast(array.dtype, np.float32)
            narrow = "" if plain else to_convert(name, array.dtype, array)
            raise TypeError(f"{name}: dtype {array.dtype}; expected float32 or float64, the same for all three{narrow}")
    blank = [None if a is None else np.broadcast_to(np.zeros((), a.dtype), a.shape) for a in arrays]
    return describe(*as_operands(blank[0], blank[1], blank[2], blank[3]), 0.0, *options)[0]  # type: ignore[arg-type]


def _called(function: Any, results: Any, *arrays: Any) -> Any:
    """Call with NumPy arrays, outside of JAX; a batch of vmap one by one."""
    return jax.pure_callback(
        lambda *given: function(*(None if a is None else np.asarray(a) for a in given)),
        results,
        *arrays,
        vmap_method="sequential",
    )


def _forward(*args: Any) -> tuple[Array, tuple[Array, ...]]:
    arrays, options = args[:4], args[4:]
    problem = _problem(arrays, *options)
    results: list[Any] = [
        jax.ShapeDtypeStruct(shape, problem.dtype) for shape in (problem.out_shape, problem.lse_shape)
    ]
    named = dict(zip(OPTIONS, options, strict=True))
    out, lse = _called(lambda *a: list(fastattn.attention(*a, **named, return_lse=True)), results, *arrays)
    return out, (*arrays, out, lse)


def _backward(*args: Any) -> tuple[Array | None, ...]:
    *options, (*arrays, attn_mask, out, lse), grad_out = args
    with_mask = attn_mask is not None and attn_mask.dtype != bool
    sources = [*arrays, attn_mask] if with_mask else arrays

    named = dict(zip(OPTIONS, options, strict=True))

    def backward(*given: Any) -> list[Any]:
        return list(fastattn.attention_backward(*given, **named, grad_mask=with_mask))

    results: list[Any] = [jax.ShapeDtypeStruct(source.shape, source.dtype) for source in sources]
    gradients = _called(backward, results, grad_out, *arrays, out, lse, attn_mask)
    return (*gradients,) if with_mask else (*gradients, None)


attention.defvjp(_forward, _backward)
