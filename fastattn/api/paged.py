"""`attention_paged`: keys and values in pages to `Pages`, a call on them to a backend."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastattn import reference
from fastattn.api.asked import ends_of, is_free, key_of_others, plain
from fastattn.api.attention import attention
from fastattn.api.backends import BACKENDS
from fastattn.api.varlen import attention_varlen
from fastattn.call.blocks import Blocks
from fastattn.call.halves import BITS
from fastattn.call.options import check_backend, check_flag
from fastattn.call.out import check_out, delivered, target_for
from fastattn.call.packed import as_starts
from fastattn.call.packed_pages import describe_packed_pages
from fastattn.call.pages import PACKED, PADDED, Pages, as_pages, as_query, describe_paged, refuse_masks
from fastattn.call.problem import Array
from fastattn.call.score_options import FurtherOptions, MaskMod, RowOptions, ScoreMod
from fastattn.call.seeds import Rng, seed_from
from fastattn.call.types import Backend, Causal, IntegerLike, MaskLike, Number, NumberLike, Operand, Scalar
from fastattn.call.widening import exceeds_float32
from fastattn.cpu.host import paged as cpu
from fastattn.cpu.host import session
from fastattn.cpu.host.builtin import in_default_mode, signatures
from fastattn.cpu.host.threads import get_num_threads, threads_of_call

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention_paged", "on_pages"]

#: Options with something that a signature cannot say.
NOT_ASKED = ("alibi_slopes", "sinks", "score_mod", "mask_mod", "block_mask")


# fmt: off
@overload
def attention_paged(
    query: Operand[Scalar], key_pages: Operand[Scalar], value_pages: Operand[Scalar], page_table: IntegerLike,
    key_lengths: IntegerLike, cu_seqlens_q: IntegerLike | None = ..., attn_mask: MaskLike | None = ..., *,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., return_lse: Literal[False] = ...,
    rng: Rng | None = ..., out: NDArray[Scalar] | None = ..., backend: Backend | None = ...,
    **further: Unpack[RowOptions],
) -> NDArray[Scalar]: ...
@overload
def attention_paged(
    query: Operand[Scalar], key_pages: Operand[Scalar], value_pages: Operand[Scalar], page_table: IntegerLike,
    key_lengths: IntegerLike, cu_seqlens_q: IntegerLike | None = ..., attn_mask: MaskLike | None = ..., *,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., return_lse: Literal[True],
    rng: Rng | None = ..., out: NDArray[Scalar] | None = ..., backend: Backend | None = ...,
    **further: Unpack[RowOptions],
) -> tuple[NDArray[Scalar], NDArray[Any]]: ...
@overload
def attention_paged(
    query: Operand[Scalar], key_pages: Operand[Scalar], value_pages: Operand[Scalar], page_table: IntegerLike,
    key_lengths: IntegerLike, cu_seqlens_q: IntegerLike | None = ..., attn_mask: MaskLike | None = ..., *,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., return_lse: bool = ...,
    rng: Rng | None = ..., out: NDArray[Scalar] | None = ..., backend: Backend | None = ...,
    **further: Unpack[RowOptions],
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
    window: tuple[int | None, int | None] | None = None,
    query_offset: IntegerLike | None = None,
    softcap: Number | None = None,
    alibi_slopes: NumberLike | None = None,
    sinks: NumberLike | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: Blocks | None = None,
    return_lse: bool = False,
    rng: Rng | None = None,
    out: NDArray[Any] | None = None,
    backend: Backend | None = None,
) -> Any:
    """Attention on keys and values that lie in pages, as caches for language models keep them.

    Layout and arguments are those of ``flash_attn_with_kvcache`` and, with `cu_seqlens_q`, of
    ``flash_attn_varlen_func`` with a block table [1]_. Pages are read where they lie [2]_; there are no gradients.

    Parameters
    ----------
    query : array_like, shape (B, Lq, Hq, D)
        Of the pages' dtype, or what promotes to it, or to float32 where the pages are of half precision. Hq is any
        multiple of Hk: query head h reads key head h // (Hq / Hk). With `cu_seqlens_q` the shape is (T, Hq, D).
    key_pages : array_like, shape (n, page, Hk, D)
        float16, bfloat16, float32 or float64: pages of so many keys, of any size. Any strides do.
    value_pages : array_like, shape (n, page, Hk, Dv)
        Of the same dtype.
    page_table : array_like of int, shape (B, pages of a row)
        Key j of row b is ``key_pages[page_table[b, j // page], j % page]``. Rows may share pages. What lies behind the
        pages that a row's length needs is not read, and may be anything.
    key_lengths : array_like of int, shape (B,)
        How many keys each row has: those of the queries themselves included, if they are in the cache already.
    cu_seqlens_q : array_like of int, shape (B + 1,), optional
        Given, queries are packed: 0, then where those of each row end, T at last. Rows may have as many queries as they
        like, prompts and decoding rows in one call; there is no attn_mask then, and no block_mask.
    attn_mask : array_like, broadcasting to (B, Hq, Lq, Lk), optional
        As in `attention`, heads first. Lk may be anything from the largest of `key_lengths` on.
    dropout_p, scale, window, softcap : optional
        As in `attention`.
    is_causal : bool or "bottom-right"
        "bottom-right" is what a cache wants: the last query of a row stands at its last key. True: query 0 stands at
        key 0, or at `query_offset`.
    query_offset : int or array_like of int, shape (B,), optional
        The position of query 0 of each row among its keys.
    alibi_slopes, sinks : array_like of real numbers, shape (Hq,) or (B, Hq), optional
    score_mod, mask_mod : function, optional
        As in `attention`: `batch` is the number of the row, and `key` that of the key in its row.
    block_mask : BlockMask, optional
        Made for Lq and for at least as many keys as the longest row has.
    return_lse : bool
        Return the natural logarithm of the sum of exp(score) over the keys as well.
    rng : int or numpy.random.Generator, optional
        Decides which weights are dropped.
    out : ndarray, shape (B, Lq, Hq, Dv) or (T, Hq, Dv), optional
        Where to write the result, as in `attention`; it may overlap the arguments, as in ``out=query``.
    backend : {None, "cpu", "reference"}
        None is "cpu".

    Returns
    -------
    out : ndarray, shape (B, Lq, Hq, Dv) or (T, Hq, Dv)
        Of the query's dtype. Or a tuple of this and the log-sum-exp, if that was asked for. A query that may look at no
        key gives 0.
    lse : ndarray, shape (B, Lq, Hq) or (T, Hq)
        If `return_lse`; -inf, or the sink, for a query that may look at no key.

    Raises
    ------
    TypeError
        If an argument is of a kind or dtype that has no meaning here; pages are not converted.
    ValueError
        If shapes do not go together, a row has more keys than its pages hold, or a page that it needs does not exist.
        The message names the argument.
    IndexError
        If a function reads an array out of range, for a key that the query may look at.

    Notes
    -----
    Each row has the bits of `attention` of the same row alone, whatever the size of the pages is, wherever they lie,
    and at any thread count. Pages of a multiple of 256 keys are read in place; of smaller ones, 256 keys at a time are
    brought together first.

    vLLM's cache of values is (n, Hk, Dv, page) and that of keys (n, Hk, D / x, page, x), where x elements have 16
    bytes. Values are a view of that: ``value_cache.transpose(0, 3, 1, 2)``. Keys have to be laid out anew:
    ``key_cache.transpose(0, 3, 1, 2, 4).reshape(n, page, Hk, D)``, which copies, once.

    References
    ----------
    .. [1] Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023,
       arXiv 2307.08691.
    .. [2] Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023,
       arXiv 2309.06180.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> key_pages, value_pages = rng.standard_normal((2, 6, 16, 2, 64), dtype=np.float32)  # 6 pages of 16 keys
    >>> page_table, key_lengths = [[4, 0, 2], [5, -1, -1]], [40, 7]
    >>> query = rng.standard_normal((2, 1, 8, 64), dtype=np.float32)  # one query of each of two rows
    >>> cache = (key_pages, value_pages, page_table, key_lengths)
    >>> out = fastattn.attention_paged(query, *cache, is_causal="bottom-right")
    >>> out.shape
    (2, 1, 8, 64)
    >>> key, value = (pages[[4, 0, 2]].reshape(48, 2, 64)[:40].swapaxes(0, 1) for pages in (key_pages, value_pages))
    >>> alone = fastattn.attention(query[0].swapaxes(0, 1), key, value, enable_gqa=True)
    >>> bool((alone.swapaxes(0, 1) == out[0]).all())
    True
    """
    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod, "block_mask": block_mask,
    }  # fmt: skip
    call = (query, key_pages, value_pages, page_table, key_lengths, cu_seqlens_q, attn_mask)
    options: Any = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    wanted: Any = {"return_lse": return_lse, "rng": rng, "out": out}
    if check_backend(backend, BACKENDS) == "reference":
        return reference.attention_paged(*call, **{**options, **wanted, **further})
    rows, pages = _as_pages(query, key_pages, value_pages, page_table, key_lengths, cu_seqlens_q is not None)
    if cu_seqlens_q is not None:
        refuse_masks(attn_mask=attn_mask, block_mask=further.pop("block_mask"))
        if not _are_alike(rows, pages, cu_seqlens_q, out):
            return _on_packed(rows, pages, cu_seqlens_q, options, further, **wanted)
        return _as_batch(rows, pages, options, further, **wanted)
    return on_pages(rows, pages, attn_mask, length_first=True, **options, **wanted, further=further)


def _as_pages(
    query: Any, key_pages: Any, value_pages: Any, page_table: Any, key_lengths: Any, packed: bool
) -> tuple[Array, Pages]:
    """Return the queries, and a description of the pages, both checked: of arrays like earlier ones, their contents."""
    given = query, key_pages, value_pages, page_table, key_lengths
    asked = signatures.of(packed, *given)
    if asked and session.current.plans.get(("pages", asked)):
        count, page = key_pages.shape[:2]
        lengths = key_lengths.astype(np.int64, copy=False)
        if signatures.longest(page_table, page_table.itemsize, lengths, count, page) >= 0:
            return query, Pages(key_pages, value_pages, page_table, lengths)
    pages = as_pages(key_pages, value_pages, page_table, key_lengths)
    rows = as_query(query, pages, PACKED if packed else PADDED)
    made = rows, pages.key, pages.value, pages.table
    as_given = all(array is other for array, other in zip(made, given, strict=False))
    if asked and as_given and BITS not in (rows.dtype, pages.key.dtype):  # whose signature others have
        session.current.plans.keep(("pages", asked), True)
    return rows, pages


def on_pages(
    query: Array,
    pages: Pages,
    attn_mask: MaskLike | None = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    *,
    further: FurtherOptions,
    length_first: bool = False,
    return_lse: bool = False,
    rng: Rng | None = None,
    out: NDArray[Any] | None = None,
) -> Any:
    """Compute attention on the CPU, for pages that have been checked.

    Parameters
    ----------
    query : ndarray, shape (B, Hq, Lq, D)
        Of the pages' dtype, or of float32 where that is half precision.
    pages : Pages
    attn_mask, dropout_p, is_causal, scale, further, return_lse, rng, out
        As the user gave them.
    length_first : bool
        Whether the axis of the length comes before that of the heads, in the query and in all results.

    Returns
    -------
    out : ndarray, shape (B, Hq, Lq, Dv)
    lse : ndarray, shape (B, Hq, Lq)
        If asked for.
    """
    asked: Hashable = b""
    is_plain = attn_mask is rng is None and not any(further.get(name) is not None for name in NOT_ASKED)
    if is_plain and isinstance(return_lse, bool) and not isinstance(further.get("query_offset"), np.ndarray):
        window = further.get("window")
        left, right = (None, None) if window is None else ends_of(window)
        causal = is_causal if is_causal is False else plain(is_causal)
        arguments = (
            threads_of_call(), length_first, dropout_p, causal, scale, left, right, further.get("query_offset"),
            further.get("softcap"), query, pages.key, pages.value, pages.table, out,
        )  # fmt: skip
        asked = signatures.of(*arguments) or key_of_others(*arguments)
        again = cpu.recalled(asked, pages) if asked else None
        if again is not None and (
            out is None or is_free(out, query, pages.key, pages.value, pages.table, pages.lengths)
        ):
            target = np.empty((*query.shape[:-1], pages.value.shape[3]), query.dtype) if out is None else out
            arrays = (query.swapaxes(1, 2), target.swapaxes(1, 2)) if length_first else (query, target)
            lse = cpu.attention_again(again, arrays[0], pages, arrays[1], bool(return_lse))
            if lse is None:
                return target
            return target, lse.swapaxes(1, 2) if length_first else lse
    call = (attn_mask, dropout_p, is_causal, scale)
    return _on_pages(asked, query, pages, call, further, length_first, return_lse, rng, out)


@in_default_mode
def _on_pages(
    asked: Hashable,
    query: Array,
    pages: Pages,
    call: tuple[Any, Any, Any, Any],
    further: FurtherOptions,
    length_first: bool,
    return_lse: bool,
    rng: Rng | None,
    out: NDArray[Any] | None,
) -> Any:
    """Plan a call and run it; one like it, of which the same is `asked`, finds the plan."""
    rows = query.swapaxes(1, 2) if length_first else query
    problem, operands = describe_paged(rows, pages, *call, **further)
    return_lse, seed = check_flag("return_lse", return_lse), seed_from(rng, problem.dropout_p > 0)
    result = replace(problem, out_shape=(*query.shape[:-1], problem.value_dim))
    out = check_out(out, result)
    target = target_for(out, result, (query, pages.key, pages.value, operands.bias, operands.keep))
    first = target.swapaxes(1, 2) if length_first else target
    lse: Any
    if exceeds_float32(problem):
        key, value = (pages.gathered(array, problem.keys) for array in (pages.key, pages.value))
        wanted: Any = {"key_lengths": pages.lengths, "return_lse": True, "rng": seed, "out": first}
        lse = attention(rows, key, value, *call, True, **{**further, **wanted}, backend="cpu")[1]
    else:
        if problem.dropout_p > 0 or (out is not None and target is not out):
            asked = b""
        lse = cpu.attention(problem, operands, pages, first, return_lse, seed, get_num_threads(), asked)
    if not return_lse:
        return delivered(target, target, out)
    return delivered((target, lse.swapaxes(1, 2) if length_first else lse), target, out)


def _are_alike(query: Array, pages: Pages, cu_seqlens_q: IntegerLike, out: object) -> bool:
    """Whether packed queries are as many for each row, as they are where all rows decode: then they are a batch."""
    count, total = len(pages.table), len(query)
    if not count or not total or total % count:
        return False
    if out is not None and not (isinstance(out, np.ndarray) and out.shape == (*query.shape[:2], pages.value.shape[3])):
        return False
    return np.array_equal(
        as_starts("cu_seqlens_q", cu_seqlens_q, "query", total), np.arange(count + 1) * (total // count)
    )


def _as_batch(
    query: Array,
    pages: Pages,
    options: dict[str, Any],
    further: FurtherOptions,
    return_lse: bool,
    rng: Rng | None,
    out: NDArray[Any] | None,
) -> Any:
    """Compute attention of packed queries that are as many for each row."""
    count, total = len(pages.table), len(query)
    split = count, total // count
    rows, target = (None if array is None else array.reshape(*split, *array.shape[1:]) for array in (query, out))
    wanted: Any = {"return_lse": return_lse, "rng": rng, "out": target}
    found = on_pages(rows, pages, length_first=True, **options, **wanted, further=further)  # type: ignore[arg-type]
    results = found if isinstance(found, tuple) else (found,)
    packed = [array.reshape(total, *array.shape[2:]) for array in results]
    if out is not None:
        packed[0] = out
    return tuple(packed) if len(packed) > 1 else packed[0]


@in_default_mode
def _on_packed(
    query: Array,
    pages: Pages,
    cu_seqlens_q: IntegerLike,
    options: dict[str, Any],
    further: FurtherOptions,
    return_lse: bool,
    rng: Rng | None,
    out: NDArray[Any] | None,
) -> Any:
    """Compute attention of packed queries on the CPU."""
    whole = describe_packed_pages(query, pages, cu_seqlens_q, **options, further=further)
    problem = whole.problem
    return_lse, seed = check_flag("return_lse", return_lse), seed_from(rng, problem.dropout_p > 0)
    out = check_out(out, problem)
    if exceeds_float32(problem):
        ends = np.concatenate([[0], np.cumsum(pages.lengths)])
        wanted: Any = {**options, **further, "return_lse": return_lse, "rng": seed, "out": out, "enable_gqa": True}
        key, value = whole.gathered()
        return attention_varlen(query, key, value, cu_seqlens_q, ends, **wanted, backend="cpu")
    target = target_for(out, problem, (query, pages.key, pages.value))
    lse = cpu.packed(whole, target, return_lse, seed, get_num_threads())
    return delivered(target if lse is None else (target, lse), target, out)
