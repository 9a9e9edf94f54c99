"""What a fused kernel leaves out, without the matrix: the weights of some rows and columns, and a summary of all."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn import reference
from fastattn.api.backends import BACKENDS
from fastattn.call.blocks import Blocks
from fastattn.call.options import check_backend
from fastattn.call.problem import Operands, Problem
from fastattn.call.rounding import coarser, is_of_these_keys, is_precise, limit_of, saturated, slack
from fastattn.call.score_options import FurtherOptions, MaskMod, ScoreMod
from fastattn.call.selection import (
    Choice,
    Selection,
    as_selection,
    check_lse,
    check_top_k,
    describe_scores,
    last_key,
    mask_elements,
    part,
    piece,
    runs,
    take,
)
from fastattn.call.types import Backend, Causal, IntegerLike, MaskLike, Number, NumberLike, Operand, Scalar
from fastattn.call.widening import narrowed, scale_in_float64, widened, wider_type
from fastattn.cpu.host import summary as statistics
from fastattn.cpu.host.builtin import in_default_mode
from fastattn.cpu.host.threads import get_num_threads
from fastattn.reference import AttentionSummary

__all__ = ["AttentionSummary", "attention_summary", "attention_weights"]

Array = NDArray[Any]

MASK_ELEMENTS = 1 << 22  # of a mask that is made, or copied, for some of the rows at a time


def attention_weights(
    query: Operand[Scalar],
    key: Operand[Scalar],
    attn_mask: MaskLike | None = None,
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
    rows: Choice = None,
    columns: Choice = None,
    lse: Operand | None = None,
    backend: Backend | None = None,
) -> NDArray[Scalar]:
    """Return exact attention weights of chosen queries and keys, and compute no others.

    Parameters
    ----------
    query : array_like, shape (..., Hq, Lq, D)
        This and the following as in `fastattn.attention`.
    key : array_like, shape (..., Hk, Lk, D)
    attn_mask : array_like, broadcasting to (..., Hq, Lq, Lk), optional
        The mask of the whole call, as is all that follows: what is chosen keeps its position.
    is_causal : bool or "bottom-right"
    scale : float, optional
    enable_gqa : bool
    window, query_offset, key_lengths, softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask : optional
    rows, columns : int, slice or array_like with one axis, optional
        Which queries and which keys, as in indexing a NumPy array: integers in any order, negative ones counted from
        the end, or booleans. None is all. An int keeps its axis, with length 1.
    lse : array_like, shape (..., Hq, Lq), optional
        What ``attention(..., return_lse=True)`` or `attention_summary` returned for the same call. With it, the time is
        proportional to the number of weights; without it, the sums of the chosen rows are computed first, which
        takes about half as long as `fastattn.attention` does for these rows.
    backend : {None, "cpu", "reference"}
        None is the best one.

    Returns
    -------
    ndarray, shape (..., Hq, n_rows, n_columns)

    Raises
    ------
    TypeError
        If an argument is of a kind or dtype that has no meaning here.
    ValueError
        If shapes do not go together, or an index or a number is out of range. The message names the argument.
    IndexError
        If a function reads an array out of range, for a key that the query may look at.

    Notes
    -----
    A weight is exp(score - lse). Without `lse` the sums keep more digits than an lse of the call's dtype has room for;
    given one, a weight is as exact as that is: to about eps · abs(lse), relative. Where that is more than 1e-5, or
    1e-12 in float64, the sums of these rows are computed all the same.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 8, 1000, 64), dtype=np.float32)
    >>> fastattn.attention_weights(query, key, is_causal=True, rows=-1, columns=slice(990, None)).shape
    (8, 1, 10)
    >>> out, lse = fastattn.attention(query, key, value, is_causal=True, return_lse=True)
    >>> fastattn.attention_weights(query, key, is_causal=True, rows=[10, 500], columns=[3, 4, 5], lse=lse).shape
    (8, 2, 3)
    """
    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "key_lengths": key_lengths, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
        "block_mask": block_mask,
    }  # fmt: skip
    call = (query, key, attn_mask, is_causal, scale, enable_gqa)
    check_backend(backend, BACKENDS)
    if backend == "reference":
        return reference.attention_weights(*call, rows=rows, columns=columns, lse=lse, **further)
    return _weights_on_cpu(*call, rows, columns, lse, further)


@in_default_mode
def _weights_on_cpu(
    query: Operand,
    key: Operand,
    attn_mask: MaskLike | None,
    is_causal: Causal,
    scale: Number | None,
    enable_gqa: bool,
    rows: Choice,
    columns: Choice,
    lse: Operand | None,
    further: FurtherOptions,
) -> Array:
    problem, operands = describe_scores(query, key, attn_mask, is_causal, scale, enable_gqa, **further)
    wide = wider_type(problem, "known_weights", *(("summary",) if lse is None else ()))
    if wide is not None:
        call: Any = (*widened(query, key, mask=attn_mask, to=wide), is_causal, scale_in_float64(problem), enable_gqa)
        given = lse if lse is None or wide == problem.real else check_lse(lse, problem)
        chosen: Any = {"rows": rows, "columns": columns, "lse": given, "backend": "cpu"}
        return narrowed(attention_weights(*call, **chosen, **further), problem.storage)
    chosen, keys = as_selection("rows", rows, problem.queries), as_selection("columns", columns, problem.keys)
    threads = get_num_threads()
    if lse is None:
        m, l = _sums(problem, operands, chosen, threads)
    else:
        given = take(check_lse(lse, problem), -1, chosen)
        m, l = _sums_from(problem, operands, given, coarser(lse, problem.real), chosen, threads)
    return _weigh(problem, operands, chosen, keys, threads, m, l)


def _weigh(
    problem: Problem, operands: Operands, rows: Selection, columns: Selection, threads: int, m: Array, l: Array
) -> Array:
    """Return the weights of chosen rows and columns, for given sums of the rows."""
    pieces = [(of_rows, of_columns) for of_rows in runs(problem, rows) for of_columns in runs(problem, columns)]
    if len(pieces) == 1:
        return statistics.weigh(*part(problem, operands, rows, columns), threads, m, l)
    weights = np.empty((*problem.lse_shape[:-1], len(rows), len(columns)), problem.real)
    for of_rows, of_columns in pieces:
        smaller = part(problem, operands, piece(rows, of_rows), piece(columns, of_columns))
        sums = (np.ascontiguousarray(array[..., of_rows]) for array in (m, l))
        weights[..., of_rows, of_columns] = statistics.weigh(*smaller, threads, *sums)
    return weights


def _sums_from(
    problem: Problem, operands: Operands, lse: Array, rounded: np.dtype[Any], rows: Selection, threads: int
) -> tuple[Array, Array]:
    """Return m and l of the chosen rows, made of their log-sum-exps.

    Where these have lost digits, `rounded` to a dtype, m and l are those of `_sums`, unless an lse is that of more keys
    than these.
    """
    m, l = statistics.sums_from(problem, lse)
    lost = ~is_precise(lse, limit_of(problem.real, rounded))
    some = np.flatnonzero(lost.any(axis=tuple(range(lse.ndim - 1))))
    if some.size:
        places = (..., some)
        own_m, own_l = _sums(problem, operands, as_selection("rows", np.asarray(rows)[some], problem.queries), threads)
        with np.errstate(all="ignore"):
            to_base_e = statistics.log_of_base(problem)
            own = saturated(own_m.astype(np.float64) * to_base_e + np.log(own_l.astype(np.float64)), rounded)
            given = lse[places].astype(np.float64)
            known = lost[places] & is_of_these_keys(given, own, slack(rounded, problem.head_dim))
        m[places], l[places] = np.where(known, own_m, m[places]), np.where(known, own_l, l[places])
    return m, l


def _sums(problem: Problem, operands: Operands, rows: Selection, threads: int) -> tuple[Array, Array]:
    """Return m and l of the chosen rows.

    Where their masks have to be made or copied, some rows at a time, so that no mask of all rows and keys comes to be.
    """
    elements = mask_elements(problem, operands, rows)
    step = max(1, MASK_ELEMENTS // elements if elements else len(rows))
    shape = (*problem.lse_shape[:-1], len(rows))
    m, l = np.empty(shape, problem.real), np.empty(shape, problem.real)
    for run in runs(problem, rows):
        for start in range(run.start, run.stop, step):
            places = slice(start, min(start + step, run.stop))
            some = piece(rows, places)
            end = last_key(problem, operands, some)  # further keys, nobody looks at
            found = statistics.sums(*part(problem, operands, some, range(end)), threads)
            m[..., places], l[..., places] = found
    return m, l


def attention_summary(
    query: Operand,
    key: Operand,
    attn_mask: MaskLike | None = None,
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
    top_k: int = 8,
    backend: Backend | None = None,
) -> AttentionSummary:
    """Return what the matrix of attention weights says, in memory for some numbers per query and key.

    Parameters
    ----------
    query : array_like, shape (..., Hq, Lq, D)
        This and the following as in `fastattn.attention`.
    key : array_like, shape (..., Hk, Lk, D)
    attn_mask : array_like, broadcasting to (..., Hq, Lq, Lk), optional
    is_causal : bool or "bottom-right"
    scale : float, optional
    enable_gqa : bool
    window, query_offset, key_lengths, softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask : optional
    top_k : int
        How many of its greatest weights to return for each query; 0 is allowed, and so is more than there are keys.
    backend : {None, "cpu", "reference"}
        None is the best one.

    Returns
    -------
    AttentionSummary

    Raises
    ------
    TypeError
        If an argument is of a kind or dtype that has no meaning here.
    ValueError
        If shapes do not go together, or a number is out of range. The message names the argument.
    IndexError
        If a function reads an array out of range, for a key that the query may look at.

    Notes
    -----
    The scores are computed twice, since what a key receives is known only after the sums of all queries: as much work
    as in `fastattn.attention`. Results are the same bits at any thread count, for any strides of the same values, and
    for a row of a batch alone.

    References
    ----------
    .. [1] Zhang et al., "H2O: heavy-hitter oracle for efficient generative inference of large language models", 2023,
       arXiv 2306.14048: what the weight that a key receives is good for.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query, key = np.eye(3), np.array([[8.0, 0, 0], [0, 8, 8], [4, 0, 1], [0, 0, 8]])
    >>> summary = fastattn.attention_summary(query, key, top_k=2)
    >>> summary.top_indices
    array([[0, 2],
           [1, 0],
           [1, 3]])
    >>> summary.top_weights.round(2)
    array([[0.89, 0.09],
           [0.97, 0.01],
           [0.49, 0.49]])
    >>> summary.entropy.round(2), summary.received.round(2)
    (array([0.4 , 0.16, 0.76]), array([0.91, 1.47, 0.11, 0.51]))
    """
    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "key_lengths": key_lengths, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
        "block_mask": block_mask,
    }  # fmt: skip
    call = (query, key, attn_mask, is_causal, scale, enable_gqa)
    check_backend(backend, BACKENDS)
    if backend == "reference":
        return reference.attention_summary(*call, top_k=top_k, **further)
    return _summary_on_cpu(*call, top_k, further)


@in_default_mode
def _summary_on_cpu(
    query: Operand,
    key: Operand,
    attn_mask: MaskLike | None,
    is_causal: Causal,
    scale: Number | None,
    enable_gqa: bool,
    top_k: int,
    further: FurtherOptions,
) -> AttentionSummary:
    problem, operands = describe_scores(query, key, attn_mask, is_causal, scale, enable_gqa, **further)
    wide = wider_type(problem, "summary")
    if wide is not None:
        call: Any = (*widened(query, key, mask=attn_mask, to=wide), is_causal, scale_in_float64(problem), enable_gqa)
        found = attention_summary(*call, top_k=top_k, backend="cpu", **further)
        narrow = {name: narrowed(getattr(found, name), problem.real) for name in ("top_weights", "entropy", "received")}
        return found._replace(**narrow, lse=narrowed(found.lse, problem.real, within=True))
    return AttentionSummary(*statistics.summarise(problem, operands, get_num_threads(), check_top_k(top_k)))
