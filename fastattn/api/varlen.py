"""`attention_varlen` and its gradients: packed sequences to a `Packed`, that to a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from numpy.typing import NDArray

from fastattn import reference
from fastattn.api.attention import rounded
from fastattn.api.backends import backend_of_attention
from fastattn.call.arrays import as_operands
from fastattn.call.options import check_flag
from fastattn.call.out import check_out
from fastattn.call.packed import as_given, describe_packed, sources_of_packed
from fastattn.call.score_options import FurtherOptions, MaskMod, PackedOptions, ScoreMod
from fastattn.call.seeds import Rng, seed_from
from fastattn.call.types import (
    Causal,
    DeviceBackend,
    IntegerLike,
    Number,
    NumberLike,
    OfKey,
    OfQuery,
    OfValue,
    OnDevice,
    Operand,
    Scalar,
)
from fastattn.call.upstream import Names, arrived, captured_sources, own_dtype, seed_of_forward, wanted_gradients
from fastattn.call.widening import scale_in_float64, widened, wider_type
from fastattn.cpu.host import varlen as cpu
from fastattn.cpu.host.builtin import in_default_mode
from fastattn.cpu.host.threads import get_num_threads

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention_varlen", "attention_varlen_backward"]


# fmt: off
@overload
def attention_varlen(
    query: OnDevice, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any = ..., *, dropout_p: Number = ...,
    is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., return_lse: bool = ...,
    rng: Rng | None = ..., out: Any = ..., backend: DeviceBackend | None = ..., **further: Unpack[PackedOptions],
) -> Any: ...
@overload
def attention_varlen(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], cu_seqlens_q: IntegerLike,
    cu_seqlens_k: IntegerLike | None = ..., *, dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., return_lse: Literal[False] = ..., rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., backend: DeviceBackend | None = ..., **further: Unpack[PackedOptions],
) -> NDArray[Scalar]: ...
@overload
def attention_varlen(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], cu_seqlens_q: IntegerLike,
    cu_seqlens_k: IntegerLike | None = ..., *, dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., return_lse: Literal[True], rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., backend: DeviceBackend | None = ..., **further: Unpack[PackedOptions],
) -> tuple[NDArray[Scalar], NDArray[Any]]: ...
@overload
def attention_varlen(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], cu_seqlens_q: IntegerLike,
    cu_seqlens_k: IntegerLike | None = ..., *, dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., return_lse: bool = ..., rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., backend: DeviceBackend | None = ..., **further: Unpack[PackedOptions],
) -> NDArray[Scalar] | tuple[NDArray[Scalar], NDArray[Any]]: ...
# fmt: on
def attention_varlen(
    query: Operand | OnDevice,
    key: Operand | OnDevice,
    value: Operand | OnDevice,
    cu_seqlens_q: IntegerLike,
    cu_seqlens_k: IntegerLike | None = None,
    *,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    window: tuple[int | None, int | None] | None = None,
    query_offset: IntegerLike | None = None,
    softcap: Number | None = None,
    alibi_slopes: NumberLike | None = None,
    sinks: NumberLike | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    return_lse: bool = False,
    rng: Rng | None = None,
    out: NDArray[Any] | None = None,
    backend: DeviceBackend | None = None,
) -> Any:
    """Attention of packed sequences: one behind the other on one axis, each looking at its own keys alone.

    Sequences of different lengths need neither padding nor a mask. Names and layout are those of
    ``flash_attn_varlen_func`` [1]_; the longest lengths need not be said.

    Parameters
    ----------
    query : array_like, shape (T, Hq, D)
        Those of all sequences, T in all. Dtypes are those of `attention`.
    key : array_like, shape (S, Hk, D)
    value : array_like, shape (S, Hk, Dv)
    cu_seqlens_q : array_like of int, shape (B + 1,)
        Cumulative lengths of the B sequences: 0, then where each of them ends, T at last. A sequence may be empty.
    cu_seqlens_k : array_like of int, shape (B + 1,), optional
        Those of the keys, up to S; unless given the same as `cu_seqlens_q`.
    dropout_p, scale, enable_gqa, window, softcap : optional
        As in `attention`.
    is_causal : bool or "bottom-right"
        As in `attention`, of each sequence: "bottom-right" ends with its last query at its last key.
    query_offset : int or array_like of int, shape (B,), optional
        The position of query 0 of each sequence among its keys.
    alibi_slopes, sinks : array_like of real numbers, shape (Hq,) or (B, Hq), optional
    score_mod, mask_mod : function, optional
        As in `attention`, of each sequence: `batch` is its number, and `query` and `key` are positions of its own.
    return_lse : bool
        Return the natural logarithm of the sum of exp(score) over the keys as well.
    rng : int or numpy.random.Generator, optional
        Decides which weights are dropped: the same ones as of the padded batch whose row b is sequence b.
    out : ndarray, shape (T, Hq, Dv), optional
        Where to write the result, as in `attention`; it may overlap the arguments, as in ``out=query``.
    backend : {None, "cpu", "cuda", "reference"}
        As in `attention`.

    Returns
    -------
    out : ndarray, shape (T, Hq, Dv)
        Or a tuple of this and the log-sum-exp, if that was asked for. A query that may look at no key gives 0.
    lse : ndarray, shape (T, Hq)
        If `return_lse`; -inf, or the sink, for a query that may look at no key.

    Raises
    ------
    TypeError
        If an argument is of a kind or dtype that has no meaning here.
    ValueError
        If shapes or lengths do not go together, or a number is out of range. The message names the argument.
    IndexError
        If a function reads an array out of range, for a key that the query may look at.

    Notes
    -----
    Each sequence has the bits of the same sequence alone, whatever its neighbours are, at any thread count. Nothing is
    copied, and no memory is needed that grows with the lengths.

    References
    ----------
    .. [1] Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023,
       arXiv 2307.08691.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 12, 8, 64), dtype=np.float32)
    >>> cu_seqlens = [0, 5, 12]  # a sequence of length 5, and one of length 7
    >>> out = fastattn.attention_varlen(query, key, value, cu_seqlens, is_causal=True)
    >>> out.shape
    (12, 8, 64)
    >>> first = [array[:5].swapaxes(0, 1) for array in (query, key, value)]
    >>> bool((fastattn.attention(*first, is_causal=True) == out[:5].swapaxes(0, 1)).all())
    True
    """
    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
    }  # fmt: skip
    backend = backend_of_attention(backend, query, key, value, out)
    call: Any = (query, key, value, cu_seqlens_q, cu_seqlens_k)
    options: Any = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if backend == "cuda":
        from fastattn.cuda.host import varlen as cuda  # imports numba-cuda, which nothing else needs

        return cuda.attention(call[:3], call[3:], options | {"further": further}, return_lse, rng, out)
    if backend == "reference":
        wanted: Any = {"return_lse": return_lse, "rng": rng, "out": out}
        return reference.attention_varlen(*call, **options | wanted | further)
    return _on_cpu(call, options | {"further": further}, return_lse, rng, out)


@in_default_mode
def _on_cpu(
    call: tuple[Any, ...], options: dict[str, Any], return_lse: bool, rng: Rng | None, out: NDArray[Any] | None
) -> Any:
    arrays, lengths = as_operands(*call[:3])[:3], call[3:]
    packed = describe_packed(*arrays, *lengths, **options)
    problem = packed.problem
    return_lse = check_flag("return_lse", return_lse)
    seed = seed_from(rng, problem.dropout_p > 0)
    checked = check_out(out, problem)
    wide = wider_type(problem, "forward")
    if wide is None:
        return cpu.attention(packed, checked, return_lse, seed, get_num_threads())
    target = checked if checked is not None and checked.dtype == wide else None
    arrays = widened(*arrays, mask=None, to=wide)[:3]
    results = _on_cpu((*arrays, *lengths), options | {"scale": scale_in_float64(problem)}, True, seed, target)
    return rounded(problem, checked, return_lse, *results)


# fmt: off
@overload
def attention_varlen_backward(
    grad_out: Any, query: OnDevice, key: Any, value: Any, out: Any, lse: Any, cu_seqlens_q: Any,
    cu_seqlens_k: Any = ..., *, dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ...,
    enable_gqa: bool = ..., rng: Rng | None = ..., grad_lse: Operand | None = ..., grads: Names = ...,
    backend: DeviceBackend | None = ..., **further: Unpack[PackedOptions],
) -> tuple[Any, ...]: ...
@overload
def attention_varlen_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], out: Operand,
    lse: Operand, cu_seqlens_q: IntegerLike, cu_seqlens_k: IntegerLike | None = ..., *, dropout_p: Number = ...,
    is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., rng: Rng | None = ...,
    grad_lse: Operand | None = ..., grads: None = ..., backend: DeviceBackend | None = ...,
    **further: Unpack[PackedOptions],
) -> tuple[NDArray[OfQuery], NDArray[OfKey], NDArray[OfValue]]: ...
@overload
def attention_varlen_backward(
    grad_out: Operand, query: Operand[OfQuery], key: Operand[OfKey], value: Operand[OfValue], out: Operand,
    lse: Operand, cu_seqlens_q: IntegerLike, cu_seqlens_k: IntegerLike | None = ..., *, dropout_p: Number = ...,
    is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., rng: Rng | None = ...,
    grad_lse: Operand | None = ..., grads: Names = ..., backend: DeviceBackend | None = ...,
    **further: Unpack[PackedOptions],
) -> tuple[NDArray[Any], ...]: ...
# fmt: on
def attention_varlen_backward(
    grad_out: Operand,
    query: Operand | OnDevice,
    key: Operand | OnDevice,
    value: Operand | OnDevice,
    out: Operand,
    lse: Operand,
    cu_seqlens_q: IntegerLike,
    cu_seqlens_k: IntegerLike | None = None,
    *,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    window: tuple[int | None, int | None] | None = None,
    query_offset: IntegerLike | None = None,
    softcap: Number | None = None,
    alibi_slopes: NumberLike | None = None,
    sinks: NumberLike | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    rng: Rng | None = None,
    grad_lse: Operand | None = None,
    grads: Names = None,
    backend: DeviceBackend | None = None,
) -> tuple[NDArray[Any], ...]:
    """Gradients of `fastattn.attention_varlen` by its arguments.

    Parameters
    ----------
    grad_out : array_like, shape (T, Hq, Dv)
        The gradient of a number, usually a loss, by the result.
    query, key, value, cu_seqlens_q, cu_seqlens_k : array_like
        What `attention_varlen` was given.
    dropout_p, is_causal, scale, enable_gqa, window, query_offset, softcap : optional
        What it was given.
    alibi_slopes, sinks, score_mod, mask_mod : optional
        What it was given.
    out : array_like, shape (T, Hq, Dv)
        What it returned.
    lse : array_like, shape (T, Hq)
        What it returned with ``return_lse=True``.
    rng : int or numpy.random.Generator, optional
        What it was given: the seed, or a Generator in the state that it had then. Needed with dropout alone.
    grad_lse : array_like, shape (T, Hq), optional
        The gradient by the log-sum-exp, where the loss depends on that as well.
    grads : sequence of str, optional
        Names of the arguments whose gradients to return, as in `attention_backward`.
    backend : {None, "cpu", "cuda", "reference"}
        As in `attention`.

    Returns
    -------
    grad_query, grad_key, grad_value : ndarray
        Each with the shape and, if that is floating, the dtype of its argument. Or those that `grads` names, in its
        order.

    Raises
    ------
    TypeError
        If an argument is of a kind or dtype that has no meaning here.
    ValueError
        If shapes or lengths do not go together, or a number is out of range. The message names the argument.

    Notes
    -----
    The gradients of a sequence are those of `attention_backward` of the same sequence alone, to the bit. What sequences
    have in common gets the sum over them, in their order.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value, grad_out = rng.standard_normal((4, 12, 8, 64), dtype=np.float32)
    >>> out, lse = fastattn.attention_varlen(query, key, value, [0, 5, 12], return_lse=True)
    >>> grads = fastattn.attention_varlen_backward(grad_out, query, key, value, out, lse, [0, 5, 12])
    >>> [grad.shape for grad in grads]
    [(12, 8, 64), (12, 8, 64), (12, 8, 64)]
    """
    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
    }  # fmt: skip
    backend = backend_of_attention(backend, grad_out, query, key, value, out, lse, grad_lse)
    call: Any = (grad_out, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k)
    options: Any = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if backend == "cuda":
        from fastattn.cuda.host import varlen as cuda  # imports numba-cuda, which nothing else needs

        upstream = {"grad_out": grad_out, "out": out, "lse": lse, "grad_lse": grad_lse}
        return cuda.backward(call[1:4], upstream, call[6:], options | {"further": further}, rng, grads)
    if backend == "reference":
        wanted = {"rng": rng, "grad_lse": grad_lse, "grads": grads}
        return reference.attention_varlen_backward(*call, **options | wanted | further)
    return _backward_on_cpu(call, options | {"further": further}, rng, grad_lse, grads)


@in_default_mode
def _backward_on_cpu(
    call: tuple[Any, ...], options: dict[str, Any], rng: Rng | None, grad_lse: Operand | None, grads: Names
) -> tuple[NDArray[Any], ...]:
    grad_out, query, key, value, out, lse, *lengths = call
    arrays = as_operands(query, key, value)[:3]
    packed = describe_packed(*arrays, *lengths, **options)
    problem = packed.problem
    upstream = arrived(problem, grad_out, out, lse, grad_lse)
    sources = sources_of_packed(query, key, value, options["further"]) | captured_sources(problem, packed.captured)
    names = wanted_gradients(grads, sources)
    seed = seed_of_forward(rng, problem)
    wide = wider_type(problem, "backward")
    if wide is not None:
        sums = lse if wide == problem.real else upstream.lse
        wider = (grad_out, *widened(*arrays, mask=None, to=wide)[:3], out, sums, *lengths)
        options = options | {"scale": scale_in_float64(problem)}
        gradients = dict(zip(names, _backward_on_cpu(wider, options, seed, grad_lse, names), strict=True))
        return tuple(own_dtype(each, sources[name], problem.real) for name, each in gradients.items())
    found = cpu.backward(packed, upstream, names, seed, get_num_threads())
    return as_given(packed, names, found, sources)
