"""`attention_paged`: keys and values in pages to `Pages`, a call on them to a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import reference
from fastattn.api.attention import attention
from fastattn.api.backends import BACKENDS
from fastattn.api.varlen import attention_varlen
from fastattn.call.options import check_backend, check_flag
from fastattn.call.out import check_out, delivered, target_for
from fastattn.call.packed_pages import describe_packed_pages
from fastattn.call.pages import PACKED, PADDED, Pages, as_pages, as_query, describe_paged, refuse_masks
from fastattn.call.problem import Array
from fastattn.call.score_options import FurtherOptions, MaskMod, ScoreMod
from fastattn.call.seeds import Rng, seed_from
from fastattn.call.widening import exceeds_float32
from fastattn.cpu.host import paged as cpu
from fastattn.cpu.host.builtin import in_default_mode
from fastattn.cpu.host.threads import get_num_threads

__all__ = ["attention_paged", "on_pages"]


def attention_paged(
    query: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    key_lengths: ArrayLike,
    cu_seqlens_q: ArrayLike | None = None,
    attn_mask: ArrayLike | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool | str = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    query_offset: ArrayLike | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    return_lse: bool = False,
    rng: Rng | None = None,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> Any:
    """Attention on a cache of keys and values in pages."""
    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
    }  # fmt: skip
    call = (query, key_pages, value_pages, page_table, key_lengths, cu_seqlens_q, attn_mask)
    options: Any = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    wanted: Any = {"return_lse": return_lse, "rng": rng, "out": out}
    if check_backend(backend, BACKENDS) == "reference":
        return reference.attention_paged(*call, **{**options, **wanted, **further})
    pages = as_pages(key_pages, value_pages, page_table, key_lengths)
    if cu_seqlens_q is not None:
        refuse_masks(attn_mask=attn_mask)
        return _on_packed(as_query(query, pages, PACKED), pages, cu_seqlens_q, options, further, **wanted)
    rows = as_query(query, pages, PADDED)
    return on_pages(rows, pages, attn_mask, length_first=True, **options, **wanted, further=further)


@in_default_mode
def on_pages(
    query: Array,
    pages: Pages,
    attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool | str = False,
    scale: float | None = None,
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
    call = (attn_mask, dropout_p, is_causal, scale)
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
        lse = cpu.attention(problem, operands, pages, first, return_lse, seed, get_num_threads())
    if not return_lse:
        return delivered(target, target, out)
    return delivered((target, lse.swapaxes(1, 2) if length_first else lse), target, out)


@in_default_mode
def _on_packed(
    query: Array,
    pages: Pages,
    cu_seqlens_q: ArrayLike,
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
