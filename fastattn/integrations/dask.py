"""Attention of Dask arrays: a graph of tasks, one for each piece that has something to see, and a tree of merges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from fastattn.call.advice import to_install

try:
    import dask.array
except ImportError as error:
    raise ImportError(f"fastattn.integrations.dask needs Dask: {to_install('dask')}") from error

from fastattn.call.blocks import Blocks
from fastattn.call.options import check_flag
from fastattn.call.score_options import FurtherOptions, MaskMod, ScoreMod
from fastattn.call.seeds import Rng
from fastattn.call.types import Causal, IntegerLike, Number, NumberLike, Operand
from fastattn.call.upstream import Names
from fastattn.integrations.chunked import Plan, differentiate, forward

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention", "attention_backward"]

Chunked: TypeAlias = dask.array.Array | Operand


# fmt: off
@overload
def attention(
    query: Chunked, key: Chunked, value: Chunked, attn_mask: Any = ..., dropout_p: Number = ...,
    is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *, return_lse: Literal[False] = ...,
    rng: Rng | None = ..., split_every: int | None = ..., num_threads: int = ..., **further: Unpack[FurtherOptions],
) -> dask.array.Array: ...
@overload
def attention(
    query: Chunked, key: Chunked, value: Chunked, attn_mask: Any = ..., dropout_p: Number = ...,
    is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *, return_lse: Literal[True],
    rng: Rng | None = ..., split_every: int | None = ..., num_threads: int = ..., **further: Unpack[FurtherOptions],
) -> tuple[dask.array.Array, dask.array.Array]: ...
@overload
def attention(
    query: Chunked, key: Chunked, value: Chunked, attn_mask: Any = ..., dropout_p: Number = ...,
    is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *, return_lse: bool = ...,
    rng: Rng | None = ..., split_every: int | None = ..., num_threads: int = ..., **further: Unpack[FurtherOptions],
) -> dask.array.Array | tuple[dask.array.Array, dask.array.Array]: ...
# fmt: on
def attention(
    query: Chunked,
    key: Chunked,
    value: Chunked,
    attn_mask: Any = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    query_offset: IntegerLike | None = None,
    key_lengths: IntegerLike | None = None,
    softcap: Number | None = None,
    alibi_slopes: NumberLike | None = None,
    sinks: NumberLike | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: Blocks | None = None,
    return_lse: bool = False,
    rng: Rng | None = None,
    split_every: int | None = None,
    num_threads: int = 1,
) -> Any:
    """`fastattn.attention` of Dask arrays, chunked in any way along the batch, heads, queries and keys.

    Lazy: nothing is computed but a graph. A task of it attends to one chunk of keys with one of queries, and what tasks
    with the same queries return is merged, by a tree. Chunks of keys are never put together, and what causality, a
    window, lengths or a block mask hide as a whole is no task at all.

    Parameters
    ----------
    query : dask.array.Array, shape (..., Hq, Lq, D)
    key : dask.array.Array, shape (..., Hk, Lk, D)
    value : dask.array.Array, shape (..., Hk, Lk, Dv)
        Where one is cut the others are, too. Heads of queries are cut between groups, and features made one chunk. What
        is no Dask array, such as a query in memory, is one chunk to begin with.
    attn_mask : dask.array.Array or array_like, broadcasting to (..., Hq, Lq, Lk), optional
        As in `fastattn.attention`, or (bias, keep): it is cut as the scores are.
    dropout_p, is_causal, scale, enable_gqa, window, query_offset, key_lengths, softcap : optional
        As in `fastattn.attention`, of the whole arrays: positions and numbers are those among all rows, heads, queries
        and keys. Arrays among them are in memory, and go to each task.
    alibi_slopes, sinks, score_mod, mask_mod, block_mask : optional
        Likewise.
    return_lse : bool
        Return the natural logarithm of the sum of exp(score) over the keys as well.
    rng : int or numpy.random.Generator, optional
        Decides which weights are dropped: the same as in `fastattn.attention`, however arrays are cut.
    split_every : int, optional
        How many results one task merges, 2 or more; unless given, ``split_every`` of Dask's configuration, or 4.
    num_threads : int
        Threads of fastattn's that a task uses: 1, as Dask runs a task for each core. More is for a scheduler that runs
        fewer tasks at once than it has cores.

    Returns
    -------
    out : dask.array.Array, shape (..., Hq, Lq, Dv)
        In the common dtype of query, key and value, with the chunks of the queries.
    lse : dask.array.Array, shape (..., Hq, Lq)
        If `return_lse`, of half precision in float32.

    Raises
    ------
    TypeError
        If an argument is of a kind or dtype that has no meaning here.
    ValueError
        If shapes do not go together, lengths of chunks are not known, or a number is out of range. The message names
        the argument. All this is found when the graph is made.

    Notes
    -----
    What tasks return is in the dtype that sums have, float32 of half precision, until the result is rounded at the end.
    How arrays are cut changes results by roundings alone [1]_.

    A function, and arrays that it captures, are sent to the workers by pickling. A lost result is computed again by
    Dask, and is the same, bit by bit.

    References
    ----------
    .. [1] Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn.integrations.dask import attention
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 8, 1000, 64))
    >>> cut = [da.from_array(array, chunks=(4, 300, 64)) for array in (query, key, value)]
    >>> out = attention(*cut, is_causal=True)
    >>> out.chunks
    ((4, 4), (300, 300, 300, 100), (64,))
    >>> np.allclose(out.compute(), fastattn.attention(query, key, value, is_causal=True))
    True
    """
    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "key_lengths": key_lengths, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
        "block_mask": block_mask,
    }  # fmt: skip
    plain = (dropout_p, is_causal, scale, enable_gqa)
    plan = Plan({"query": query, "key": key, "value": value}, attn_mask, plain, further, split_every, num_threads)
    wanted = ("out", "lse") if check_flag("return_lse", return_lse) else ("out",)
    results = forward(plan, rng, wanted)
    return results if return_lse else results[0]


def attention_backward(
    grad_out: Chunked,
    query: Chunked,
    key: Chunked,
    value: Chunked,
    out: Chunked,
    lse: Chunked,
    attn_mask: Any = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    query_offset: IntegerLike | None = None,
    key_lengths: IntegerLike | None = None,
    softcap: Number | None = None,
    alibi_slopes: NumberLike | None = None,
    sinks: NumberLike | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: Blocks | None = None,
    rng: Rng | None = None,
    grad_lse: Chunked | None = None,
    grad_mask: bool = False,
    grads: Names = None,
    split_every: int | None = None,
    num_threads: int = 1,
) -> Any:
    """Gradients of `attention` by its arguments: `fastattn.attention_backward` of Dask arrays.

    Lazy, and by the same pieces: parts of a gradient that belong to the same chunk are added, by a tree.

    Parameters
    ----------
    grad_out : dask.array.Array, shape (..., Hq, Lq, Dv)
        The gradient of a number by the result of attention.
    query, key, value : dask.array.Array
        What attention was given.
    attn_mask, dropout_p, is_causal, scale, enable_gqa, window, query_offset, key_lengths : optional
        What attention was given.
    softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask : optional
        What attention was given.
    out : dask.array.Array, shape (..., Hq, Lq, Dv)
        What attention returned.
    lse : dask.array.Array, shape (..., Hq, Lq)
        What it returned with ``return_lse=True``.
    rng : int or numpy.random.Generator, optional
        What attention was given: the seed, or a Generator in the state that it had then. Needed with dropout alone.
    grad_lse : dask.array.Array, shape (..., Hq, Lq), optional
        The gradient by the log-sum-exp, where the loss depends on that as well.
    grad_mask, grads
        As in `fastattn.attention_backward`: which gradients to return.
    split_every, num_threads
        As in `attention`.

    Returns
    -------
    grad_query, grad_key, grad_value : dask.array.Array
        Or those that `grads` names, in its order: each with the shape and, if that is floating, the dtype of its
        argument, chunked as pieces are.

    Raises
    ------
    TypeError, ValueError
        As `attention` and `fastattn.attention_backward`, when the graph is made.

    Notes
    -----
    Parts are in the dtype that sums have, and their sum is rounded once [1]_; those by half-precision arrays that
    `score_mod` captures are in the dtype of the array.

    References
    ----------
    .. [1] Dao et al., "FlashAttention: fast and memory-efficient exact attention with IO-awareness", 2022,
       arXiv 2205.14135, appendix B.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastattn.integrations.dask import attention, attention_backward
    >>> query, key, value, grad_out = da.random.default_rng(0).standard_normal((4, 8, 1000, 64), chunks=(1, 4, 300, 64))
    >>> out, lse = attention(query, key, value, return_lse=True)
    >>> grads = attention_backward(grad_out, query, key, value, out, lse)
    >>> [grad.shape for grad in grads]
    [(8, 1000, 64), (8, 1000, 64), (8, 1000, 64)]
    """
    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "key_lengths": key_lengths, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
        "block_mask": block_mask,
    }  # fmt: skip
    plain = (dropout_p, is_causal, scale, enable_gqa)
    plan = Plan({"query": query, "key": key, "value": value}, attn_mask, plain, further, split_every, num_threads)
    plan.receive(grad_out=grad_out, out=out, lse=lse, grad_lse=grad_lse)
    return differentiate(plan, rng, grad_mask, grads)
