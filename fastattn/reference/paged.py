"""Attention on keys and values in pages: that of the keys that are in them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastattn.call.halves import cast
from fastattn.call.options import check_flag
from fastattn.call.out import check_out
from fastattn.call.packed_pages import describe_packed_pages
from fastattn.call.pages import PACKED, PADDED, Pages, as_pages, as_query, describe_paged, refuse_masks
from fastattn.call.problem import Array, Operands, Problem
from fastattn.call.score_options import RowOptions
from fastattn.call.seeds import Rng, seed_from
from fastattn.call.types import Causal, IntegerLike, MaskLike, Number, Operand, Scalar
from fastattn.reference.forward import evaluate

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention_paged"]


# fmt: off
@overload
def attention_paged(
    query: Operand[Scalar], key_pages: Operand[Scalar], value_pages: Operand[Scalar], page_table: IntegerLike,
    key_lengths: IntegerLike, cu_seqlens_q: IntegerLike | None = ..., attn_mask: MaskLike | None = ..., *,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., return_lse: Literal[False] = ...,
    rng: Rng | None = ..., out: NDArray[Scalar] | None = ..., **options: Unpack[RowOptions],
) -> NDArray[Scalar]: ...
@overload
def attention_paged(
    query: Operand[Scalar], key_pages: Operand[Scalar], value_pages: Operand[Scalar], page_table: IntegerLike,
    key_lengths: IntegerLike, cu_seqlens_q: IntegerLike | None = ..., attn_mask: MaskLike | None = ..., *,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., return_lse: Literal[True],
    rng: Rng | None = ..., out: NDArray[Scalar] | None = ..., **options: Unpack[RowOptions],
) -> tuple[NDArray[Scalar], NDArray[Any]]: ...
@overload
def attention_paged(
    query: Operand[Scalar], key_pages: Operand[Scalar], value_pages: Operand[Scalar], page_table: IntegerLike,
    key_lengths: IntegerLike, cu_seqlens_q: IntegerLike | None = ..., attn_mask: MaskLike | None = ..., *,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., return_lse: bool = ...,
    rng: Rng | None = ..., out: NDArray[Scalar] | None = ..., **options: Unpack[RowOptions],
) -> NDArray[Scalar] | tuple[NDArray[Scalar], NDArray[Any]]: ...
# fmt: on
def attention_paged(
    query: Operand,
    key_pages: Operand,
    value_pages: Operand,
    page_table: IntegerLike,
    key_lengths: IntegerLike,
    cu_seqlens_q: IntegerLike | None = None,
    attn_mask: MaskLike | None = None,
    *,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    return_lse: bool = False,
    rng: Rng | None = None,
    out: NDArray[Any] | None = None,
    **options: Unpack[RowOptions],
) -> Any:
    """Return attention on pages: `fastattn.attention_paged`, of each row's keys, gathered.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> query, key_pages = np.zeros((1, 1, 1, 2)), np.zeros((3, 2, 1, 2))  # three pages of two keys
    >>> value_pages = np.arange(6.0).reshape(3, 2, 1, 1)
    >>> reference.attention_paged(query, key_pages, value_pages, [[2, 0]], [3]).ravel()  # values 4, 5 and 0
    array([3.])
    """
    pages = as_pages(key_pages, value_pages, page_table, key_lengths)
    further: Any = options
    call = (dropout_p, is_causal, scale)
    if cu_seqlens_q is None:
        array = as_query(query, pages, PADDED)
        problem, operands = describe_paged(array.swapaxes(1, 2), pages, attn_mask, *call, **options)
        parts = [(slice(None), problem, operands, pages)]
    else:
        refuse_masks(attn_mask=attn_mask, block_mask=options.get("block_mask"))
        array = as_query(query, pages, PACKED)
        whole = describe_packed_pages(array, pages, cu_seqlens_q, *call, further=further)
        problem = whole.problem
        parts = [(rows, *whole.rows([number]), pages.row(number)) for number, rows in enumerate(whole.queries)]
    shape = array.shape[:-1]
    of_result = replace(problem, out_shape=(*shape, problem.value_dim))
    out = check_out(out, of_result)
    return_lse = check_flag("return_lse", return_lse)
    seed = seed_from(rng, draw=problem.dropout_p > 0)
    result = np.empty(of_result.out_shape, problem.storage) if out is None else out
    lse = np.empty(shape, problem.real)
    found = [_evaluate(one, operands, own, seed) for _, one, operands, own in parts]  # out may be the query
    for (rows, *_), of_part in zip(parts, found, strict=True):
        for whole_array, own in zip((result, lse), of_part, strict=True):
            whole_array[rows] = cast(own.swapaxes(1, 2).reshape(whole_array[rows].shape), whole_array.dtype)
    return (result, lse) if return_lse else result


def _evaluate(problem: Problem, operands: Operands, pages: Pages, seed: int) -> tuple[Array, Array]:
    """Return the result and its log-sum-exp of rows of a batch, heads first."""
    key, value = (pages.gathered(array, problem.keys)[:, :, None] for array in (pages.key, pages.value))
    shape = (*problem.rows_shape, problem.keys)
    key, value = (np.broadcast_to(array, (*shape, array.shape[-1])) for array in (key, value))
    out, lse, _ = evaluate(problem, operands._replace(key=key, value=value), seed)
    return out, lse
