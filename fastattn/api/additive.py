"""`additive_attention`: the attention of Bahdanau, Cho and Bengio, with a score that is a sum and not a product."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastattn import reference
from fastattn.api.asked import ends_of, is_free, key_of_others, masks_in
from fastattn.api.attention import rounded
from fastattn.api.backends import BACKENDS
from fastattn.call.arrays import as_additive_operands
from fastattn.call.blocks import Blocks
from fastattn.call.options import check_backend, check_flag
from fastattn.call.out import check_out
from fastattn.call.score_options import FurtherOptions, MaskMod, ScoreMod
from fastattn.call.shapes import describe_additive
from fastattn.call.types import Backend, Causal, IntegerLike, MaskLike, Number, NumberLike, Operand, Scalar
from fastattn.call.widening import reads_halves, widened
from fastattn.cpu.host import forward as cpu
from fastattn.cpu.host import session
from fastattn.cpu.host.builtin import in_default_mode, signatures
from fastattn.cpu.host.threads import threads_of_call

if TYPE_CHECKING:
    from typing_extensions import Unpack

ADDITIVE = None  # in front of a signature: that of attention has an int there


# fmt: off
@overload
def additive_attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], weight: Operand[Scalar],
    attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *, return_lse: Literal[False] = ...,
    return_weights: Literal[False] = ..., out: NDArray[Scalar] | None = ..., backend: Backend | None = ...,
    **further: Unpack[FurtherOptions],
) -> NDArray[Scalar]: ...
@overload
def additive_attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], weight: Operand[Scalar],
    attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *, return_lse: Literal[True],
    return_weights: Literal[False] = ..., out: NDArray[Scalar] | None = ..., backend: Backend | None = ...,
    **further: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Any]]: ...
@overload
def additive_attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], weight: Operand[Scalar],
    attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *, return_lse: Literal[False] = ...,
    return_weights: Literal[True], out: NDArray[Scalar] | None = ..., backend: Backend | None = ...,
    **further: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Scalar]]: ...
@overload
def additive_attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], weight: Operand[Scalar],
    attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *, return_lse: Literal[True],
    return_weights: Literal[True], out: NDArray[Scalar] | None = ..., backend: Backend | None = ...,
    **further: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Any], NDArray[Scalar]]: ...
@overload
def additive_attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], weight: Operand[Scalar],
    attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *, return_lse: bool = ..., return_weights: bool = ...,
    out: NDArray[Scalar] | None = ..., backend: Backend | None = ..., **further: Unpack[FurtherOptions],
) -> NDArray[Scalar] | tuple[NDArray[Any], ...]: ...
# fmt: on
def additive_attention(
    query: Operand,
    key: Operand,
    value: Operand,
    weight: Operand,
    attn_mask: MaskLike | None = None,
    is_causal: Causal = False,
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
    return_weights: bool = False,
    out: NDArray[Any] | None = None,
    backend: Backend | None = None,
) -> Any:
    """Additive attention: softmax over the keys of Σ_d weight[d] · tanh(query[i, d] + key[j, d]), times value.

    The scores of Bahdanau, Cho and Bengio [1]_, after the projections of query and key. Where they are written with
    NumPy or PyTorch as they stand, an array of Lq x Lk x D exists; here it never does.

    Parameters
    ----------
    query : array_like, shape (..., Lq, D)
        float16, bfloat16, float32 or float64, or integers, which compute in float64. The axes before the last two may
        be missing, and broadcast as in NumPy.
    key : array_like, shape (..., Lk, D)
    value : array_like, shape (..., Lk, Dv)
    weight : array_like, shape (D,)
        The paper's v, Keras' ``use_scale`` vector.
    attn_mask : array_like, broadcasting to (..., Lq, Lk), optional
        Boolean, where True takes part, or of such a floating dtype, added to the scores; or one of each, as a tuple
        (bias, keep).
    is_causal : bool or "bottom-right"
        True: query i looks at the keys up to i. "bottom-right": up to i + Lk - Lq, as in decoding.
    window, query_offset, key_lengths, softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask : optional
        As in `fastattn.attention`; the axis before the length, if there is one, is that of the heads.
    return_lse : bool
        Return the natural logarithm of the sum of exp(score) over the keys as well.
    return_weights : bool
        Return the weights as well. Only then does a matrix of Lq x Lk exist.
    out : ndarray, shape (..., Lq, Dv), optional
        Where to write the result; it may overlap the arguments, as in ``out=query``.
    backend : {None, "cpu", "reference"}
        None is the best one. "reference" is `fastattn.reference.additive_attention`.

    Returns
    -------
    out : ndarray, shape (..., Lq, Dv)
        Or a tuple of this and of what else was asked for, in this order. A query that may look at no key gives 0.
    lse : ndarray, shape (..., Lq)
        If `return_lse`; -inf for a query that may look at no key.
    weights : ndarray, shape (..., Lq, Lk)
        If `return_weights`.

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
    Masks, queries that may look at no key, and what is promised of results are as in `attention`. The dtypes of all of
    query, key, value and weight are promoted together. Scores are exact for any finite query and key, however large.

    References
    ----------
    .. [1] Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", 2014,
       arXiv 1409.0473.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 8, 16, 64), dtype=np.float32)
    >>> weight = rng.standard_normal(64, dtype=np.float32)
    >>> fastattn.additive_attention(query, key, value, weight).shape
    (8, 16, 64)
    """
    asked: Any = b""
    if (
        return_weights is False
        and (backend is None or backend == "cpu")
        and key_lengths is alibi_slopes is sinks is score_mod is mask_mod is block_mask is None  # type: ignore[comparison-overlap]
        and (query_offset is None or not isinstance(query_offset, np.ndarray))
    ):
        mask, keep = masks_in(attn_mask) if isinstance(attn_mask, tuple) else (attn_mask, None)
        left, right = (None, None) if window is None else ends_of(window)
        arrays: Any = query, key, value, weight, mask, keep, out
        options = is_causal, left, right, query_offset, softcap, return_lse
        asked = signatures.of(ADDITIVE, threads_of_call(), *options, *arrays)
        if not asked:
            asked = key_of_others(ADDITIVE, threads_of_call(), *options, *arrays)
        plan = session.current.plans.get(asked)
        if plan is not None and (out is None or is_free(out, query, key, value, weight, mask, keep)):
            given: Any = query, key, value, mask, keep, None, None, out, return_lse, None, weight
            return cpu.attention(plan, *given)

    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "key_lengths": key_lengths, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
        "block_mask": block_mask,
    }  # fmt: skip
    call = (query, key, value, weight, attn_mask, is_causal)
    check_backend(backend, BACKENDS)
    if backend == "reference":
        wanted: Any = {"return_lse": return_lse, "return_weights": return_weights, "out": out}
        return reference.additive_attention(*call, **wanted, **further)
    return _on_cpu(asked, *call, return_lse, return_weights, out, further)


@in_default_mode
def _on_cpu(
    asked: Hashable,
    query: Any,
    key: Any,
    value: Any,
    weight: Any,
    attn_mask: Any,
    is_causal: Causal,
    return_lse: bool,
    return_weights: bool,
    out: NDArray[Any] | None,
    further: FurtherOptions,
) -> Any:
    """Plan a call and run it; one like it, of which the same is `asked`, finds the plan."""
    arrays = as_additive_operands(query, key, value, weight, attn_mask)
    problem, operands = describe_additive(*arrays, is_causal, **further)
    weight_ = np.ascontiguousarray(arrays[3])
    return_lse = check_flag("return_lse", return_lse)
    return_weights = check_flag("return_weights", return_weights)
    checked = check_out(out, problem)
    if not reads_halves(problem, "additive"):
        target = checked if checked is not None and checked.dtype == problem.real else None
        wanted: Any = {"return_lse": True, "return_weights": return_weights, "out": target}
        call: Any = (*widened(*arrays[:4], mask=arrays[4], to=problem.real), is_causal)
        return rounded(problem, checked, return_lse, *additive_attention(*call, **wanted, **further))
    made = (*arrays[:3], weight_, *masks_in(arrays[4]))
    given = (query, key, value, weight, *masks_in(attn_mask))
    wanted = checked, return_lse, return_weights, None, weight_
    return cpu.evaluate(asked, problem, operands, made, given, *wanted, options=further)
