"""Attention of queries to a cache: where its keys and values lie, or to copies of them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from fastattn.api.asked import ends_of, is_free, key_of_others
from fastattn.api.attention import attention, rounded
from fastattn.call.arrays import as_plain
from fastattn.call.halves import BITS, cast, name_of, native, real_of
from fastattn.call.options import check_flag
from fastattn.call.out import check_out, delivered, target_for
from fastattn.call.pages import describe_paged
from fastattn.call.problem import FLOAT64, Array
from fastattn.call.score_options import FurtherOptions
from fastattn.call.seeds import Rng, seed_from
from fastattn.call.shapes import describe
from fastattn.call.types import DeviceBackend
from fastattn.call.widening import exceeds_float32
from fastattn.cpu.host import paged as cpu
from fastattn.cpu.host.builtin import in_default_mode, signatures
from fastattn.cpu.host.threads import get_num_threads, threads_of_call
from fastattn.kv_cache.arguments import as_lengths, check_dropped
from fastattn.kv_cache.sequences import Sequences

__all__ = ["again", "asked", "on_copies", "on_pages", "positions"]

NAMES = "attn_mask", "dropout_p", "is_causal", "scale"


def positions(
    sequences: Sequences, queries: int, is_causal: Any, query_lengths: Any, query_offset: Any
) -> tuple[bool | str, Any]:
    """Return `is_causal` and `query_offset` for `fastattn.attention`, the last unless it is 0.

    Raises
    ------
    TypeError, ValueError
        If positions are given twice, or are none.
    """
    rows = len(sequences.rows)
    if query_offset is not None:
        if query_lengths is not None:
            raise ValueError("query_lengths: given together with query_offset, which they set; expected None")
        return (True if is_causal is None else is_causal), query_offset
    if is_causal is not None and is_causal != "bottom-right":
        if query_lengths is not None:
            raise ValueError(f"query_lengths: given together with is_causal={is_causal!r}; expected None")
        return is_causal, None
    counts = [queries] * rows
    if query_lengths is not None:
        counts = as_lengths(query_lengths, rows, counts, "the length of query", "query_lengths")
    return True, np.array(sequences.lengths, np.int64) - np.array(counts, np.int64)


def asked(sequences: Sequences, query: Any, window: Any, *options: Any) -> Hashable:
    """Return what calls have in common that are alike; b"" if nothing is known of them."""
    left, right = (None, None) if window is None else ends_of(window)
    arguments = threads_of_call(), left, right, *options, query, *sequences.views, sequences.table
    return signatures.of(*arguments) or key_of_others(*arguments)


def again(asked: Hashable, sequences: Sequences, query: Any, window: Any, return_lse: bool, out: Any) -> Any:
    """Compute a call like an earlier one, of which the same was asked; None if there has been none."""
    pages = sequences.pages()
    found = cpu.recalled(asked, pages) if asked else None
    if found is None or (out is not None and not is_free(out, query)):
        return None
    if any(sequences.dropped):
        check_dropped(sequences, pages.lengths - query.shape[2], None if window is None else window[0])
    target = np.empty(found.plan.out_shape, found.plan.storage) if out is None else out
    lse = cpu.attention_again(found, query, pages, target, return_lse)
    return target if lse is None else (target, lse)


@in_default_mode
def on_pages(
    asked: Hashable,
    sequences: Sequences,
    query: Array,
    call: Any,
    further: FurtherOptions,
    return_lse: bool,
    rng: Rng | None,
    out: Array | None,
) -> Any:
    """Compute it on the CPU, where keys and values lie; one like it, of which the same is `asked`, finds the plan."""
    pages = sequences.pages()
    given, dtype = query, FLOAT64 if query.dtype.kind in "biu" else native(query.dtype)
    query = as_plain(query, dtype)
    problem, operands = describe_paged(query, pages, *call, **further)
    return_lse, seed = check_flag("return_lse", return_lse), seed_from(rng, problem.dropout_p > 0)
    out = check_out(out, problem)
    if exceeds_float32(problem):
        return on_copies(sequences, query, call, further, {"return_lse": return_lse, "rng": seed}, out, "cpu")
    target = target_for(out, problem, (query, operands.bias, operands.keep))
    is_plain = query is given and dtype != BITS and problem.dropout_p == 0  # with a signature of its own
    asked = asked if is_plain and (out is None or target is out) else b""
    lse = cpu.attention(problem, operands, pages, target, return_lse, seed, get_num_threads(), asked)
    return delivered(target if lse is None else (target, lse), target, out)


@in_default_mode
def on_copies(
    sequences: Sequences, query: Array, options: Any, further: Any, wanted: Any, out: Any, backend: DeviceBackend | None
) -> Any:
    """Compute it from copies of keys and values: in the dtype of the queries, if the cache has that, or wider."""
    layout = sequences.layout
    dtype = FLOAT64 if query.dtype.kind in "biu" else native(query.dtype)
    is_alike = name_of(dtype) == layout.key_format.name == layout.value_format.name
    common = dtype if is_alike else real_of(dtype)
    keys, values = sequences.gathered(common, common)
    call: Any = {**dict(zip(NAMES, options, strict=True)), **further, "enable_gqa": True}
    call["key_lengths"] = np.array(sequences.lengths, np.int64)
    if common == dtype:
        return attention(cast(query, dtype), keys, values, **call, **wanted, out=out, backend=backend)
    problem, _ = describe(query, _of_dtype(keys, dtype), _of_dtype(values, dtype), enable_gqa=True)
    checked = check_out(out, problem)
    target = checked if checked is not None and checked.dtype == common else None
    return_lse = check_flag("return_lse", wanted["return_lse"])
    results = attention(
        cast(query, common), keys, values, **call, **{**wanted, "return_lse": True}, out=target, backend=backend
    )
    return rounded(problem, checked, return_lse, *results)


def _of_dtype(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return an array with the shape of another, and nothing in it."""
    return np.broadcast_to(np.zeros((), dtype), array.shape)
