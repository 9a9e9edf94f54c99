"""`ring_attention` and its gradients: keys and values go around, queries stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from numpy.typing import NDArray

from fastattn.call.options import check_flag
from fastattn.call.score_options import FurtherOptions
from fastattn.call.seeds import Rng
from fastattn.call.shares import Layout
from fastattn.call.types import Causal, IntegerLike, MaskLike, Number, Operand, Scalar
from fastattn.call.upstream import Names
from fastattn.integrations.mpi.call import Asked, Share, call_of
from fastattn.integrations.mpi.passes import Backward, Forward

if TYPE_CHECKING:
    from mpi4py import MPI
    from typing_extensions import Unpack

__all__ = ["ring_attention", "ring_attention_backward"]


# fmt: off
@overload
def ring_attention(
    comm: MPI.Intracomm, query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar],
    attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ...,
    enable_gqa: bool = ..., *, layout: Layout = ..., cu_seqlens: IntegerLike | None = ...,
    return_lse: Literal[False] = ..., rng: Rng | None = ..., **options: Unpack[FurtherOptions],
) -> NDArray[Scalar]: ...
@overload
def ring_attention(
    comm: MPI.Intracomm, query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar],
    attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ...,
    enable_gqa: bool = ..., *, layout: Layout = ..., cu_seqlens: IntegerLike | None = ..., return_lse: Literal[True],
    rng: Rng | None = ..., **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Any]]: ...
@overload
def ring_attention(
    comm: MPI.Intracomm, query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar],
    attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ...,
    enable_gqa: bool = ..., *, layout: Layout = ..., cu_seqlens: IntegerLike | None = ..., return_lse: bool = ...,
    rng: Rng | None = ..., **options: Unpack[FurtherOptions],
) -> NDArray[Scalar] | tuple[NDArray[Scalar], NDArray[Any]]: ...
# fmt: on
def ring_attention(
    comm: MPI.Intracomm,
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: MaskLike | None = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    layout: Layout = "zigzag",
    cu_seqlens: IntegerLike | None = None,
    return_lse: bool = False,
    rng: Rng | None = None,
    **options: Unpack[FurtherOptions],
) -> Any:
    """`fastattn.attention` of a sequence that is dealt out to ranks. All ranks call this together.

    Each rank has a share of the queries and of the keys and values, as `shard` cuts them, and gets that share of the
    result. Keys and values go around a ring [1]_; while a rank computes with some of them the next come.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    query : array_like, shape (..., Hq, lq, D)
        This rank's. Axes before the lengths are whole, and the same on all ranks.
    key : array_like, shape (..., Hk, lk, D)
    value : array_like, shape (..., Hk, lk, Dv)
    attn_mask : array_like, optional
        What it says of the queries of this rank, lq or 1 of them, and of all keys of the whole, in their order there.
        Ranks may have different ones, and some none.
    dropout_p, is_causal, scale, enable_gqa
        As those of `fastattn.attention`, of the whole.
    layout : {"zigzag", "contiguous"}
        As that of `shard`. In zigzag causal calls are the same work for all ranks.
    cu_seqlens : array_like of int, shape (sequences + 1,), optional
        Where each of several sequences begins that lie one behind the other along the lengths of the whole [2]_, and
        the end of the last: a query looks at keys of its own sequence, and positions count from its beginning. Arrays
        have three axes, and there is neither mask nor lengths of keys. As in `fastattn.attention_varlen` options have
        something for each sequence, where they would for each row of a batch.
    return_lse : bool
        Return the natural logarithm of the sum of exp(score) over the keys as well.
    rng : int or numpy.random.Generator, optional
        Decides which weights are dropped: those that one process would drop. The same on all ranks; None is one seed
        that the first of them draws.
    **options
        What `fastattn.attention` takes by keyword, said of the whole: window, query_offset, key_lengths, softcap,
        alibi_slopes, sinks, score_mod, mask_mod, block_mask. Functions are told positions in the whole.

    Returns
    -------
    out : ndarray, shape (..., Hq, lq, Dv)
        This rank's.
    lse : ndarray, shape (..., Hq, lq)
        If `return_lse`.

    Raises
    ------
    TypeError, ValueError, IndexError
        On every rank the same, whichever of them is given what has no meaning, or fails while it computes, or if they
        are not given the same. Arrays that functions capture are compared by their kinds, not by what they hold.

    Notes
    -----
    Keys that no query of a rank may look at do not come to it, and are not waited for. Each share of keys is attended
    to with its log-sum-exp, and these are merged with sums in float64: results depend on the number of ranks and the
    layout by roundings, and are the same bits each time.

    Memory: this rank's arrays, a result in float64, and two shares of keys and values besides its own; more only while
    the next rank has not yet taken what is sent to it.

    What happens when a rank dies is MPI's word: as a rule all are ended.

    References
    ----------
    .. [1] Liu, Zaharia and Abbeel, "Ring attention with blockwise transformers for near-infinite context", 2023,
       arXiv 2310.01889.
    .. [2] Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023,
       arXiv 2307.08691; ``flash_attn_varlen_func`` of its code.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from fastattn.integrations.mpi import ring_attention, shard, unshard
    >>> rng = np.random.default_rng(0)
    >>> whole = rng.standard_normal((3, 1, 8, 16, 64), dtype=np.float32)
    >>> query, key, value = (shard(MPI.COMM_WORLD, array) for array in whole)
    >>> out = ring_attention(MPI.COMM_WORLD, query, key, value, is_causal=True)
    >>> unshard(MPI.COMM_WORLD, out).shape
    (1, 8, 16, 64)
    """
    asked = Asked(attn_mask, dropout_p, is_causal, scale, enable_gqa, layout, cu_seqlens, rng, options)

    def check(share: Share) -> dict[str, str]:
        check_flag("return_lse", return_lse)
        return {"function": "ring_attention"}

    call = call_of(comm, query, key, value, asked, check)
    out, lse = Forward(call).run()
    return (out, lse) if return_lse else out


def ring_attention_backward(
    comm: MPI.Intracomm,
    grad_out: Operand,
    query: Operand,
    key: Operand,
    value: Operand,
    out: Operand,
    lse: Operand,
    attn_mask: MaskLike | None = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    layout: Layout = "zigzag",
    cu_seqlens: IntegerLike | None = None,
    rng: Rng | None = None,
    grad_lse: Operand | None = None,
    grads: Names = None,
    **options: Unpack[FurtherOptions],
) -> tuple[NDArray[Any], ...]:
    """Gradients of `ring_attention`. All ranks call this together.

    Keys and values go around once more, and their gradients after them, until these are with their owners.

    Parameters
    ----------
    comm, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout, cu_seqlens, **options
        What `ring_attention` was given.
    grad_out : array_like, shape (..., Hq, lq, Dv)
        The gradient of a number, usually a loss, by the result of this rank.
    out : array_like, shape (..., Hq, lq, Dv)
        What `ring_attention` returned.
    lse : array_like, shape (..., Hq, lq)
        What it returned with ``return_lse=True``.
    rng : int or numpy.random.Generator
        What it was given: the seed, or a Generator in the state that it had then. Needed with dropout alone.
    grad_lse : array_like, shape (..., Hq, lq), optional
        The gradient by the log-sum-exp of this rank, where that is used, too; ranks may have none.
    grads : sequence of str, optional
        Names of the arguments whose gradients to return, in this order: of "query", "key", "value", "alibi_slopes",
        "sinks" and the floating arrays that score_mod captures. The same on all ranks.

    Returns
    -------
    grad_query, grad_key, grad_value : ndarray
        Of this rank's share each, with its dtype.

        Or those that `grads` names, in its order. What ranks have in common has one gradient, the sum over all ranks.

    Raises
    ------
    TypeError, ValueError, IndexError
        On every rank the same, as in `ring_attention`.

    Notes
    -----
    Gradients of keys and values are summed in the order of the ring, that of their owner last, and what ranks have in
    common in the order of ranks: the same bits each time.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from fastattn.integrations.mpi import ring_attention, ring_attention_backward
    >>> rng = np.random.default_rng(0)
    >>> query, key, value, grad_out = rng.standard_normal((4, 1, 8, 16, 64), dtype=np.float32)
    >>> call = (query, key, value)
    >>> out, lse = ring_attention(MPI.COMM_SELF, *call, is_causal=True, return_lse=True)
    >>> grads = ring_attention_backward(MPI.COMM_SELF, grad_out, *call, out, lse, is_causal=True)
    >>> [grad.shape for grad in grads]
    [(1, 8, 16, 64), (1, 8, 16, 64), (1, 8, 16, 64)]
    """
    asked = Asked(attn_mask, dropout_p, is_causal, scale, enable_gqa, layout, cu_seqlens, rng, options)
    found: dict[str, Any] = {}

    def check(share: Share) -> dict[str, str]:
        found.update(Backward.check(share, grad_out, out, lse, grad_lse, grads))
        return {"function": "ring_attention_backward", "grads": repr(found["names"])}

    call = call_of(comm, query, key, value, asked, check)
    return Backward(call, (query, key, value), **found).run()
