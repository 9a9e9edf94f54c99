"""Attention of packed sequences: that of each of them alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastattn.call.arrays import as_operands
from fastattn.call.halves import cast
from fastattn.call.options import check_flag
from fastattn.call.out import check_out
from fastattn.call.packed import as_given, describe_packed, heads_first, sources_of_packed
from fastattn.call.score_options import PackedOptions
from fastattn.call.seeds import Rng, seed_from
from fastattn.call.types import Causal, IntegerLike, Number, OfKey, OfQuery, OfValue, Operand, Scalar
from fastattn.call.upstream import (
    OF_HEADS,
    SHARED,
    Names,
    arrived,
    captured_sources,
    folded,
    seed_of_forward,
    wanted_gradients,
)
from fastattn.reference.backward import differentiate
from fastattn.reference.forward import evaluate

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention_varlen", "attention_varlen_backward"]


# fmt: off
@overload
def attention_varlen(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], cu_seqlens_q: IntegerLike,
    cu_seqlens_k: IntegerLike | None = ..., *, dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., return_lse: Literal[False] = ..., rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., **options: Unpack[PackedOptions],
) -> NDArray[Scalar]: ...
@overload
def attention_varlen(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], cu_seqlens_q: IntegerLike,
    cu_seqlens_k: IntegerLike | None = ..., *, dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., return_lse: Literal[True], rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., **options: Unpack[PackedOptions],
) -> tuple[NDArray[Scalar], NDArray[Any]]: ...
@overload
def attention_varlen(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], cu_seqlens_q: IntegerLike,
    cu_seqlens_k: IntegerLike | None = ..., *, dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., return_lse: bool = ..., rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., **options: Unpack[PackedOptions],
) -> NDArray[Scalar] | tuple[NDArray[Scalar], NDArray[Any]]: ...
# fmt: on
def attention_varlen(
    query: Operand,
    key: Operand,
    value: Operand,
    cu_seqlens_q: IntegerLike,
    cu_seqlens_k: IntegerLike | None = None,
    *,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    rng: Rng | None = None,
    out: NDArray[Any] | None = None,
    **options: Unpack[PackedOptions],
) -> Any:
    """Return attention of packed sequences: `fastattn.attention_varlen`, one sequence after the other.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> query = key = np.zeros((3, 1, 2))  # a sequence of length 2, and one of length 1
    >>> value = np.array([1.0, 2.0, 5.0])[:, None, None]
    >>> reference.attention_varlen(query, key, value, [0, 2, 3]).ravel()
    array([1.5, 1.5, 5. ])
    """
    arrays = as_operands(query, key, value)[:3]
    further: Any = options
    packed = describe_packed(*arrays, cu_seqlens_q, cu_seqlens_k, dropout_p, is_causal, scale, enable_gqa, further)
    problem = packed.problem
    out = check_out(out, problem)
    return_lse = check_flag("return_lse", return_lse)
    seed = seed_from(rng, draw=problem.dropout_p > 0)
    result = np.empty(problem.out_shape, problem.storage) if out is None else out
    lse = np.empty(problem.lse_shape, problem.real)
    rows = [evaluate(*packed.sequence(number), seed)[:2] for number in range(len(packed.queries))]  # out may be query
    for queries, of_sequence in zip(packed.queries, rows, strict=True):
        for whole, own in zip((result, lse), map(heads_first, of_sequence), strict=True):
            whole[queries] = cast(own, whole.dtype)
    return (result, lse) if return_lse else result


# fmt: off
@overload
def attention_varlen_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], out: Operand,
    lse: Operand, cu_seqlens_q: IntegerLike, cu_seqlens_k: IntegerLike | None = ..., *, dropout_p: Number = ...,
    is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., rng: Rng | None = ...,
    grad_lse: Operand | None = ..., grads: None = ..., **options: Unpack[PackedOptions],
) -> tuple[NDArray[OfQuery], NDArray[OfKey], NDArray[OfValue]]: ...
@overload
def attention_varlen_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], out: Operand,
    lse: Operand, cu_seqlens_q: IntegerLike, cu_seqlens_k: IntegerLike | None = ..., *, dropout_p: Number = ...,
    is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., rng: Rng | None = ...,
    grad_lse: Operand | None = ..., grads: Names = ..., **options: Unpack[PackedOptions],
) -> tuple[NDArray[Any], ...]: ...
# fmt: on
def attention_varlen_backward(
    grad_out: Operand,
    query: Operand,
    key: Operand,
    value: Operand,
    out: Operand,
    lse: Operand,
    cu_seqlens_q: IntegerLike,
    cu_seqlens_k: IntegerLike | None = None,
    *,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    rng: Rng | None = None,
    grad_lse: Operand | None = None,
    grads: Names = None,
    **options: Unpack[PackedOptions],
) -> tuple[NDArray[Any], ...]:
    """Return the gradients of query, key and value: `fastattn.attention_varlen_backward`, sequence after sequence.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> query = key = np.zeros((3, 1, 2))
    >>> value = np.array([1.0, 2.0, 5.0])[:, None, None]
    >>> out, lse = reference.attention_varlen(query, key, value, [0, 2, 3], return_lse=True)
    >>> reference.attention_varlen_backward(np.ones((3, 1, 1)), query, key, value, out, lse, [0, 2, 3])[2].ravel()
    array([1., 1., 1.])
    """
    arrays = as_operands(query, key, value)[:3]
    further: Any = options
    packed = describe_packed(*arrays, cu_seqlens_q, cu_seqlens_k, dropout_p, is_causal, scale, enable_gqa, further)
    upstream = arrived(packed.problem, grad_out, out, lse, grad_lse)
    seed = seed_of_forward(rng, packed.problem)
    of_function = captured_sources(packed.problem, packed.captured)
    sources = sources_of_packed(query, key, value, further) | of_function
    names = wanted_gradients(grads, sources)
    found: dict[str, Any] = {}
    for name, array in zip(("query", "key", "value"), arrays, strict=True):
        found[name] = np.zeros(array.shape, np.longdouble)
    of_heads = [name for name in names if name in OF_HEADS]
    found |= {name: np.zeros((len(packed.queries), packed.problem.heads), np.longdouble) for name in of_heads}
    found |= {name: np.zeros(np.shape(of_function[name]), np.longdouble) for name in names if name in of_function}
    for number, (queries, keys) in enumerate(zip(packed.queries, packed.keys, strict=True)):
        problem, operands = packed.sequence(number)
        gradients = differentiate(problem, operands, packed.upstream(number, upstream), seed, names=names).named()
        with np.errstate(all="ignore"):
            for name, total in found.items():
                gradient: Any = gradients[name]
                if name in OF_HEADS:
                    total[number] = gradient.reshape(-1)
                elif name in of_function:
                    total += gradient
                else:
                    own = heads_first(total[queries if name == "query" else keys])
                    own[...] = folded(gradient, own.shape, problem, name in SHARED)
    return as_given(packed, names, found, sources)
