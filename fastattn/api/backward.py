"""`attention_backward` and `additive_attention_backward`: from the gradient of the result to those of the arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastattn import reference
from fastattn.api.backends import BACKENDS, backend_of_attention
from fastattn.call.arrays import as_additive_operands, as_operands
from fastattn.call.blocks import Blocks
from fastattn.call.options import check_backend
from fastattn.call.score_options import FurtherOptions, MaskMod, PieceOptions, ScoreMod
from fastattn.call.seeds import Rng
from fastattn.call.shapes import describe, describe_additive
from fastattn.call.types import (
    Backend,
    Causal,
    DeviceBackend,
    IntegerLike,
    MaskLike,
    Number,
    NumberLike,
    OfKey,
    OfQuery,
    OfValue,
    OfWeight,
    OnDevice,
    Operand,
)
from fastattn.call.upstream import (
    Names,
    as_given,
    captured_sources,
    describe_upstream,
    own_dtype,
    seed_of_forward,
    sources_of,
    wanted_gradients,
)
from fastattn.call.widening import reads_halves, scale_in_float64, widened, wider_type
from fastattn.cpu.host import additive_backward as additive_gradients
from fastattn.cpu.host import backward as cpu
from fastattn.cpu.host.builtin import in_default_mode
from fastattn.cpu.host.threads import get_num_threads

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["additive_attention_backward", "attention_backward"]


# fmt: off
@overload
def attention_backward(
    grad_out: Any, query: OnDevice, key: Any, value: Any, out: Any, lse: Any, attn_mask: Any = ...,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *,
    rng: Rng | None = ..., grad_lse: Operand | None = ..., grad_mask: bool = ..., grads: Names = ...,
    backend: DeviceBackend | None = ..., **further: Unpack[FurtherOptions],
) -> tuple[Any, ...]: ...
@overload
def attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], out: Operand,
    lse: Operand, attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., *, rng: Rng | None = ..., grad_lse: Operand | None = ...,
    grad_mask: Literal[False] = ..., grads: None = ..., backend: DeviceBackend | None = ...,
    **further: Unpack[FurtherOptions],
) -> tuple[NDArray[OfQuery], NDArray[OfKey], NDArray[OfValue]]: ...
@overload
def attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], out: Operand,
    lse: Operand, attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., *, rng: Rng | None = ..., grad_lse: Operand | None = ...,
    grad_mask: Literal[True], grads: None = ..., backend: DeviceBackend | None = ..., **further: Unpack[FurtherOptions],
) -> tuple[NDArray[OfQuery], NDArray[OfKey], NDArray[OfValue], NDArray[Any]]: ...
@overload
def attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], out: Operand,
    lse: Operand, attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., *, rng: Rng | None = ..., grad_lse: Operand | None = ...,
    grad_mask: bool = ..., grads: Names = ..., backend: DeviceBackend | None = ..., **further: Unpack[FurtherOptions],
) -> tuple[NDArray[Any], ...]: ...
# fmt: on
def attention_backward(
    grad_out: Operand,
    query: Operand | OnDevice,
    key: Operand | OnDevice,
    value: Operand | OnDevice,
    out: Operand,
    lse: Operand,
    attn_mask: MaskLike | None = None,
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
    grad_lse: Operand | None = None,
    grad_mask: bool = False,
    grads: Names = None,
    backend: DeviceBackend | None = None,
) -> tuple[NDArray[Any], ...]:
    """Gradients of `fastattn.attention` by its arguments.

    The weights are computed again, tile by tile, from the log-sum-exp: their matrix never exists.

    Parameters
    ----------
    grad_out : array_like, shape (..., Hq, Lq, Dv)
        The gradient of a number, usually a loss, by the result of attention.
    query, key, value : array_like
        What attention was given.
    attn_mask, dropout_p, is_causal, scale, enable_gqa, window, query_offset, key_lengths : optional
        What attention was given.
    softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask : optional
        What attention was given.
    out : array_like, shape (..., Hq, Lq, Dv)
        What attention returned.
    lse : array_like, shape (..., Hq, Lq)
        What it returned with ``return_lse=True``.
    rng : int or numpy.random.Generator, optional
        What attention was given: the seed, or a Generator in the state that it had then. Needed with dropout alone.
    grad_lse : array_like, shape (..., Hq, Lq), optional
        The gradient by the log-sum-exp, where the loss depends on that as well.
    grad_mask : bool
        Return the gradient by `attn_mask`, a floating one, as well; of (bias, keep), that by the bias.
    grads : sequence of str, optional
        Names of the arguments whose gradients to return, in this order, and of no others: of "query", "key", "value",
        "attn_mask", "alibi_slopes" and "sinks" those that the call was given; and, but for CUDA, of the floating
        arrays that score_mod captures, as it calls them.
    backend : {None, "cpu", "cuda", "reference"}
        None is the best one for where the arrays are. "reference" is `fastattn.reference.attention_backward`.

    Returns
    -------
    grad_query, grad_key, grad_value : ndarray
        Each with the shape and, if that is floating, the dtype of its argument: where an argument was broadcast, or a
        key head shared by a group of query heads, it is the sum. What nobody looks at has gradient 0.
    grad_mask : ndarray, with the shape of `attn_mask`, or of its bias
        If asked for.

        Or those that `grads` names, in its order.

    Raises
    ------
    TypeError
        If an argument is of a kind or dtype that has no meaning here.
    ValueError
        If shapes do not go together, a number is out of range, or there is no gradient of a name. The message names
        the argument.
    IndexError
        If a function reads an array out of range, for a key that the query may look at.

    Notes
    -----
    `out` and `lse` are taken for what they say. With those of attention to more keys than these, the gradients are the
    part of these keys: so may long sequences be worked on in pieces.

    Results are the same bits at any thread count, for any strides of the same values, and for a row of a batch alone.
    NaN and infinity in what a query may not look at reach neither its gradient nor that of others.

    References
    ----------
    .. [1] Dao et al., "FlashAttention: fast and memory-efficient exact attention with IO-awareness", 2022,
       arXiv 2205.14135, appendix B.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value, grad_out = rng.standard_normal((4, 1, 8, 16, 64), dtype=np.float32)
    >>> out, lse = fastattn.attention(query, key, value, is_causal=True, return_lse=True)
    >>> grads = fastattn.attention_backward(grad_out, query, key, value, out, lse, is_causal=True)
    >>> [grad.shape for grad in grads]
    [(1, 8, 16, 64), (1, 8, 16, 64), (1, 8, 16, 64)]
    >>> table = np.zeros((8, 16), np.float32)  # a bias for each head and distance, to be learned
    >>> def relative(score, batch, head, query, key):
    ...     return score + table[head, query - key]
    >>> options = {"is_causal": True, "score_mod": relative}
    >>> out, lse = fastattn.attention(query, key, value, return_lse=True, **options)
    >>> call = (grad_out, query, key, value, out, lse)
    >>> (grad_table,) = fastattn.attention_backward(*call, grads=("table",), **options)
    >>> grad_table.shape
    (8, 16)
    """
    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "key_lengths": key_lengths, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
        "block_mask": block_mask,
    }  # fmt: skip
    backend = backend_of_attention(backend, grad_out, query, key, value, out, lse, attn_mask, grad_lse)
    call: Any = (grad_out, query, key, value, out, lse, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    wanted: Any = {"rng": rng, "grad_lse": grad_lse, "grad_mask": grad_mask, "grads": grads}
    if backend == "cuda":
        from fastattn.cuda.host import backward as cuda  # imports numba-cuda, which nothing else needs

        return cuda.attention_backward(*call, **wanted, **further)
    if backend == "reference":
        return reference.attention_backward(*call, **wanted, **further)
    return on_cpu(further, *call, **wanted)  # type: ignore[arg-type]  # options of a piece may be missing


@in_default_mode
def on_cpu(
    further: PieceOptions,
    grad_out: Operand,
    query: Operand,
    key: Operand,
    value: Operand,
    out: Operand,
    lse: Operand,
    attn_mask: MaskLike | None,
    dropout_p: Number,
    is_causal: Causal,
    scale: Number | None,
    enable_gqa: bool,
    rng: Rng | None,
    grad_lse: Operand | None,
    grad_mask: bool,
    grads: Names,
) -> tuple[NDArray[Any], ...]:
    """Gradients of a call, or of a piece of one."""
    arrays = as_operands(query, key, value, attn_mask)
    problem, operands = describe(*arrays, dropout_p, is_causal, scale, enable_gqa, **further)
    upstream = describe_upstream(problem, grad_out, out, lse, grad_lse)
    sources = sources_of(query, key, value, attn_mask, further) | captured_sources(problem, operands.captured)
    names = wanted_gradients(grads, sources, grad_mask, arrays[3])
    seed = seed_of_forward(rng, problem)
    wide = wider_type(problem, "backward")
    if wide is not None:
        *wider, mask = widened(*arrays[:3], mask=arrays[3], to=wide)
        sums = lse if wide == problem.real else upstream.lse.reshape(problem.lse_shape)
        given: Any = (grad_out, *wider, out, sums, mask, dropout_p, is_causal, scale_in_float64(problem), enable_gqa)
        wanted: Any = {"rng": seed, "grad_lse": grad_lse, "grad_mask": False, "grads": names}
        gradients = dict(zip(names, on_cpu(further, *given, **wanted), strict=True))
        return tuple(own_dtype(each, sources[name], problem.real) for name, each in gradients.items())
    shapes = {name: np.shape(sources[name]) for name in ("key", "value", "attn_mask") if sources[name] is not None}
    found = cpu.attention_backward(problem, operands, upstream, shapes, names, seed, get_num_threads())
    return as_given(problem, names, found, sources)


# fmt: off
@overload
def additive_attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], weight: Operand[OfWeight],
    out: Operand, lse: Operand, attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *,
    grad_lse: Operand | None = ..., grad_mask: Literal[False] = ..., grads: None = ..., backend: Backend | None = ...,
    **further: Unpack[FurtherOptions],
) -> tuple[NDArray[OfQuery], NDArray[OfKey], NDArray[OfValue], NDArray[OfWeight]]: ...
@overload
def additive_attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], weight: Operand[OfWeight],
    out: Operand, lse: Operand, attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *,
    grad_lse: Operand | None = ..., grad_mask: Literal[True], grads: None = ..., backend: Backend | None = ...,
    **further: Unpack[FurtherOptions],
) -> tuple[NDArray[OfQuery], NDArray[OfKey], NDArray[OfValue], NDArray[OfWeight], NDArray[Any]]: ...
@overload
def additive_attention_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], weight: Operand[OfWeight],
    out: Operand, lse: Operand, attn_mask: MaskLike | None = ..., is_causal: Causal = ..., *,
    grad_lse: Operand | None = ..., grad_mask: bool = ..., grads: Names = ..., backend: Backend | None = ...,
    **further: Unpack[FurtherOptions],
) -> tuple[NDArray[Any], ...]: ...
# fmt: on
def additive_attention_backward(
    grad_out: Operand,
    query: Operand,
    key: Operand,
    value: Operand,
    weight: Operand,
    out: Operand,
    lse: Operand,
    attn_mask: MaskLike | None = None,
    is_causal: Causal = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    query_offset: IntegerLike | None = None,
    key_lengths: IntegerLike | None = None,
    softcap: Number | None = None,
    alibi_slopes: NumberLike | None = None,
    sinks: NumberLike | None = None,
    grad_lse: Operand | None = None,
    grad_mask: bool = False,
    grads: Names = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: Blocks | None = None,
    backend: Backend | None = None,
) -> tuple[NDArray[Any], ...]:
    """Gradients of `fastattn.additive_attention` by its arguments.

    Parameters
    ----------
    grad_out : array_like, shape (..., Lq, Dv)
        The gradient of a number, usually a loss, by the result of attention.
    query, key, value, weight : array_like
        What attention was given.
    attn_mask, is_causal, window, query_offset, key_lengths : optional
        What attention was given.
    softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask : optional
        What attention was given.
    out : array_like, shape (..., Lq, Dv)
        What attention returned.
    lse : array_like, shape (..., Lq)
        What it returned with ``return_lse=True``.
    grad_lse : array_like, shape (..., Lq), optional
        The gradient by the log-sum-exp, where the loss depends on that as well.
    grad_mask : bool
        Return the gradient by `attn_mask`, a floating one, as well; of (bias, keep), that by the bias.
    grads : sequence of str, optional
        Names of the arguments whose gradients to return, in this order, and of no others: of "query", "key", "value",
        "weight", "attn_mask", "alibi_slopes" and "sinks" those that the call was given, and of the floating arrays that
        score_mod captures, as it calls them.
    backend : {None, "cpu", "reference"}
        None is the best one.

    Returns
    -------
    grad_query, grad_key, grad_value, grad_weight : ndarray
        Each with the shape and, if that is floating, the dtype of its argument: where that was broadcast, it is the
        sum. What nobody looks at has gradient 0.
    grad_mask : ndarray, with the shape of `attn_mask`, or of its bias
        If asked for.

        Or those that `grads` names, in its order.

    Raises
    ------
    TypeError
        If an argument is of a kind or dtype that has no meaning here.
    ValueError
        If shapes do not go together, or there is no gradient of that name. The message names the argument.
    IndexError
        If a function reads an array out of range, for a key that the query may look at.

    Notes
    -----
    No array of Lq x Lk x D exists, and none of Lq x Lk but for the gradient of such a mask. What is said at
    `attention_backward` of `out` and `lse`, of bits, of NaN and infinity, holds here, too.

    References
    ----------
    .. [1] Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", 2014,
       arXiv 1409.0473.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value, grad_out = rng.standard_normal((4, 8, 16, 64), dtype=np.float32)
    >>> weight = rng.standard_normal(64, dtype=np.float32)
    >>> out, lse = fastattn.additive_attention(query, key, value, weight, return_lse=True)
    >>> grads = fastattn.additive_attention_backward(grad_out, query, key, value, weight, out, lse)
    >>> [grad.shape for grad in grads]
    [(8, 16, 64), (8, 16, 64), (8, 16, 64), (64,)]
    """
    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "key_lengths": key_lengths, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
        "block_mask": block_mask,
    }  # fmt: skip
    call = (grad_out, query, key, value, weight, out, lse, attn_mask, is_causal)
    check_backend(backend, BACKENDS)
    if backend == "reference":
        wanted: Any = {"grad_lse": grad_lse, "grad_mask": grad_mask, "grads": grads}
        return reference.additive_attention_backward(*call, **wanted, **further)
    return _additive_on_cpu(*call, grad_lse, grad_mask, grads, further)


@in_default_mode
def _additive_on_cpu(
    grad_out: Operand,
    query: Operand,
    key: Operand,
    value: Operand,
    weight: Operand,
    out: Operand,
    lse: Operand,
    attn_mask: MaskLike | None,
    is_causal: Causal,
    grad_lse: Operand | None,
    grad_mask: bool,
    grads: Names,
    further: FurtherOptions,
) -> tuple[NDArray[Any], ...]:
    arrays = as_additive_operands(query, key, value, weight, attn_mask)
    problem, operands = describe_additive(*arrays, is_causal, **further)
    upstream = describe_upstream(problem, grad_out, out, lse, grad_lse)
    sources = sources_of(query, key, value, attn_mask, further, weight)
    sources |= captured_sources(problem, operands.captured)
    names = wanted_gradients(grads, sources, grad_mask, arrays[4])
    if not reads_halves(problem, "additive_backward"):
        *wider, mask = widened(*arrays[:4], mask=arrays[4], to=problem.real)
        given: Any = (grad_out, *wider, out, lse, mask, is_causal)
        wanted: Any = {"grad_lse": grad_lse, "grads": names}
        gradients = dict(zip(names, additive_attention_backward(*given, **wanted, **further), strict=True))
        return tuple(own_dtype(each, sources[name], problem.real) for name, each in gradients.items())
    shapes = {"attn_mask": np.shape(sources["attn_mask"])}
    found = additive_gradients.backward(problem, operands, arrays[3], upstream, shapes, names, get_num_threads())
    return as_given(problem, names, found, sources)
