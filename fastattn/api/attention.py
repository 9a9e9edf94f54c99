"""`attention`: arguments to a Problem, Problem to a backend."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Literal, overload

from numpy.typing import NDArray

from fastattn import reference
from fastattn.api.asked import ends_of, is_free, key_of_others, masks_in, number_in, plain, with_functions
from fastattn.api.backends import backend_of_attention
from fastattn.call.arrays import as_operands
from fastattn.call.blocks import Blocks
from fastattn.call.options import check_flag
from fastattn.call.out import check_out
from fastattn.call.problem import Array, Problem
from fastattn.call.score_options import FurtherOptions, MaskMod, PieceOptions, ScoreMod
from fastattn.call.seeds import Rng, seed_from
from fastattn.call.shapes import describe
from fastattn.call.types import (
    Causal,
    DeviceBackend,
    IntegerLike,
    MaskLike,
    Number,
    NumberLike,
    OnDevice,
    Operand,
    Scalar,
)
from fastattn.call.widening import narrowed, scale_in_float64, widened, wider_type
from fastattn.cpu.host import forward as cpu
from fastattn.cpu.host import session
from fastattn.cpu.host.builtin import in_default_mode, signatures
from fastattn.cpu.host.threads import threads_of_call

if TYPE_CHECKING:
    from typing_extensions import Unpack


# fmt: off
@overload
def attention(
    query: OnDevice, key: Any, value: Any, attn_mask: Any = ..., dropout_p: Number = ..., is_causal: Causal = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., *, return_lse: bool = ..., return_weights: bool = ...,
    rng: Rng | None = ..., out: Any = ..., backend: DeviceBackend | None = ..., **further: Unpack[FurtherOptions],
) -> Any: ...
@overload
def attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], attn_mask: MaskLike | None = ...,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *,
    return_lse: Literal[False] = ..., return_weights: Literal[False] = ..., rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., backend: DeviceBackend | None = ..., **further: Unpack[FurtherOptions],
) -> NDArray[Scalar]: ...
@overload
def attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], attn_mask: MaskLike | None = ...,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *,
    return_lse: Literal[True], return_weights: Literal[False] = ..., rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., backend: DeviceBackend | None = ..., **further: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Any]]: ...
@overload
def attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], attn_mask: MaskLike | None = ...,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *,
    return_lse: Literal[False] = ..., return_weights: Literal[True], rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., backend: DeviceBackend | None = ..., **further: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Scalar]]: ...
@overload
def attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], attn_mask: MaskLike | None = ...,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *,
    return_lse: Literal[True], return_weights: Literal[True], rng: Rng | None = ..., out: NDArray[Scalar] | None = ...,
    backend: DeviceBackend | None = ..., **further: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Any], NDArray[Scalar]]: ...
@overload
def attention(
    query: Operand[Scalar], key: Operand[Scalar], value: Operand[Scalar], attn_mask: MaskLike | None = ...,
    dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *,
    return_lse: bool = ..., return_weights: bool = ..., rng: Rng | None = ..., out: NDArray[Scalar] | None = ...,
    backend: DeviceBackend | None = ..., **further: Unpack[FurtherOptions],
) -> NDArray[Scalar] | tuple[NDArray[Any], ...]: ...
# fmt: on
def attention(
    query: Operand | OnDevice,
    key: Operand | OnDevice,
    value: Operand | OnDevice,
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
    return_lse: bool = False,
    return_weights: bool = False,
    rng: Rng | None = None,
    out: NDArray[Any] | None = None,
    backend: DeviceBackend | None = None,
) -> Any:
    """Scaled dot-product attention, softmax(query keyᵀ · scale + mask) value.

    A drop-in for ``torch.nn.functional.scaled_dot_product_attention`` on NumPy arrays: exact, blocked, in memory that
    does not grow with the lengths.

    Parameters
    ----------
    query : array_like, shape (..., Hq, Lq, D)
        float16, bfloat16, float32 or float64, or integers, which compute in float64. Half precision is accumulated in
        float32. The axes before the last two may be missing, and broadcast as in NumPy.
    key : array_like, shape (..., Hk, Lk, D)
    value : array_like, shape (..., Hk, Lk, Dv)
    attn_mask : array_like, broadcasting to (..., Hq, Lq, Lk), optional
        Boolean, where True takes part, or of such a floating dtype, added to the scores; or one of each, as a tuple
        (bias, keep). A mask of keys for each element of a batch, (B, Lk), is ``mask[:, None, None]``.
    dropout_p : float
        Probability that a weight becomes 0; those that stay are multiplied by 1 / (1 - dropout_p).
    is_causal : bool or "bottom-right"
        True: query i looks at the keys up to its position, i. "bottom-right": up to i + Lk - Lq, as in decoding, or
        with key_lengths up to i + key_lengths - Lq.
    scale : float, optional
        Factor of query · key, any finite number, 1/sqrt(D) unless given.
    enable_gqa : bool
        Grouped queries: Hq is a multiple of Hk, and query head h reads key head h // (Hq / Hk).
    window : (left, right), optional
        A query at position p looks at the keys from p - left to p + right, both included. Each is a non-negative int,
        or None: no limit. A sliding window of W keys is ``(W - 1, 0)``.
    query_offset : int or array_like of int, shape (B,), optional
        The position of query 0 among the keys, 0 unless given: query i stands at i + query_offset. One for each row of
        the batch broadcasts to the axes before the head axis.
    key_lengths : array_like of int, shape (B,), optional
        How many of its keys each row of the batch has; what lies behind is padding, and is not read.
    softcap : float, optional
        Scores become softcap · tanh(score / softcap) before a mask is added.
    alibi_slopes : array_like of real numbers, shape (Hq,), optional
        What a score loses for each position that its key is away from the query, by heads: attention with linear biases
        [3]_. One for each head of each row of the batch broadcasts to the axes before the length.
    sinks : array_like of real numbers, shape (Hq,), optional
        One more score of each query, by heads, that has a share of the weights and no key: exp(sink) is in the
        denominator of the softmax [4]_. It broadcasts as alibi_slopes does. -inf is no sink.
    score_mod : function, optional
        Of (score, batch, head, query, key), ordinary Python, which returns another score: after softcap, floating mask
        and slopes, before anything is hidden. `query` is the position of the query. It is compiled once; arrays and
        numbers around it that it reads are those of the call, see Notes.
    mask_mod : function, optional
        Of (batch, head, query, key), True where the query may look at the key. Blocks of 64 x 64 that it hides are
        found once, and skipped.
    block_mask : BlockMask, optional
        The same, made beforehand and kept: see `fastattn.BlockMask`.
    return_lse : bool
        Return the natural logarithm of the sum of exp(score) over the keys as well.
    return_weights : bool
        Return the weights as well, after dropout. Only then does a matrix of Lq x Lk exist.
    rng : int or numpy.random.Generator, optional
        Decides which weights are dropped: the same set for the same seed, on every backend. A RandomState, or another
        of numpy.random's, does as well: see `fastattn.call.seeds.seed_from`.
    out : ndarray, shape (..., Hq, Lq, Dv), optional
        Where to write the result; it may overlap the arguments, as in ``out=query``. Of half precision it may be
        float32 on the CPU, which gets the result before it is rounded.
    backend : {None, "cpu", "cuda", "reference"}
        None is the best one for where the arrays are: in device memory "cuda", else "cpu". "cuda" moves NumPy arrays
        to the GPU and back. "reference" is `fastattn.reference.attention`.

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
        Or a tuple of this and of what else was asked for, in this order. A query that may look at no key gives 0.
    lse : ndarray, shape (..., Hq, Lq)
        If `return_lse`, of half precision in float32; with sinks over these as well. -inf, or the sink, for a query
        that may look at no key.
    weights : ndarray, shape (..., Hq, Lq, Lk)
        If `return_weights`.

        In device memory, and of the library that the query is of, where the arguments are there.

    Raises
    ------
    TypeError
        If an argument is of a kind or dtype that has no meaning here, or a function cannot be compiled: then the
        message has the line of it.
    ValueError
        If shapes do not go together, or a number is out of range. The message names the argument.
    IndexError
        If a function reads an array out of range, for a key that the query may look at.
    RuntimeError
        If CUDA is asked for and cannot be used: the message says what is missing.

    Notes
    -----
    Results are the same bits at any thread count, for any strides of the same values, and for a row of a batch alone.
    NaN and infinity in keys and values that a query may not look at do not reach it.

    Functions may have ``if`` and ``else``, loops over ``range``, operators, functions of numbers of `numpy`, `math` and
    Python's own, and functions of yours that they call. Arrays around them of booleans, integers and real numbers may
    be indexed, by negative integers from the end. Other arrays and numbers, and other lengths, compile nothing.

    References
    ----------
    .. [1] Vaswani et al., "Attention is all you need", 2017, arXiv 1706.03762.
    .. [2] Dao et al., "FlashAttention: fast and memory-efficient exact attention with IO-awareness", 2022,
       arXiv 2205.14135.
    .. [3] Press, Smith and Lewis, "Train short, test long: attention with linear biases enables input length
       extrapolation", 2021, arXiv 2108.12409.
    .. [4] Xiao et al., "Efficient streaming language models with attention sinks", 2023, arXiv 2309.17453.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 1, 8, 16, 64), dtype=np.float32)
    >>> fastattn.attention(query, key, value, is_causal=True).shape
    (1, 8, 16, 64)
    >>> out, weights = fastattn.attention(query, key, value, return_weights=True)
    >>> np.allclose(weights.sum(-1), 1)
    True
    >>> table = rng.standard_normal((8, 31), dtype=np.float32)  # a bias for each head and distance
    >>> def relative(score, batch, head, query, key):
    ...     return score + table[head, query - key + 15]
    >>> fastattn.attention(query, key, value, score_mod=relative).shape
    (1, 8, 16, 64)
    """
    asked: Any = b""
    if return_weights is False and (backend is None or backend == "cpu") and block_mask is None:
        mask, keep = masks_in(attn_mask) if isinstance(attn_mask, tuple) else (attn_mask, None)
        left, right = (None, None) if window is None else ends_of(window)
        causal = is_causal if is_causal is False else plain(is_causal)
        numbers: Any = number_in(query_offset), key_lengths, alibi_slopes, sinks
        # fmt: off
        described: Any = (
            threads_of_call(), dropout_p, causal, scale, enable_gqa, left, right, softcap, return_lse, *numbers,
            query, key, value, mask, keep, out,
        )
        # fmt: on
        asked = signatures.of(*described) or key_of_others(*described)
        found, captured = asked, ((), ())
        if score_mod is not None or mask_mod is not None:
            found, captured = with_functions(asked, score_mod, mask_mod)
        plan = session.current.plans.get(found)
        if plan is not None and (out is None or is_free(out, query, key, value, mask, keep)):
            seed = seed_from(rng, plan.drops) if plan.drops or rng is not None else None
            arrays: Any = query, key, value, mask, keep  # what has a signature is an array
            result = cpu.again(plan, numbers, captured, arrays, out, return_lse, seed)
            if result is not None:
                return result

    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "key_lengths": key_lengths, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
        "block_mask": block_mask,
    }  # fmt: skip
    call = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    wanted: Any = {"return_lse": return_lse, "return_weights": return_weights, "rng": rng, "out": out}
    return _on_backend(backend, asked, call, wanted, further)


def _on_backend(
    backend: str | None, asked: Hashable, call: tuple[Any, ...], wanted: Any, further: FurtherOptions
) -> Any:
    """Have the backend compute it that was named, or is the best one for where the arrays are."""
    backend = backend_of_attention(backend, *call[:4], wanted["out"])
    if backend == "cuda":
        from fastattn.cuda.host import attention as cuda  # imports numba-cuda, which nothing else needs

        return cuda.attention(*call, **wanted, **further)
    if backend == "reference":
        return reference.attention(*call, **wanted, **further)
    return on_cpu(asked, further, *call, **wanted)  # type: ignore[arg-type]  # options of a piece may be missing


@in_default_mode
def on_cpu(
    asked: Hashable,
    further: PieceOptions,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Number,
    is_causal: Causal,
    scale: Number | None,
    enable_gqa: bool,
    return_lse: bool,
    return_weights: bool,
    rng: Rng | None,
    out: NDArray[Any] | None,
) -> Any:
    """Plan a call and run it; one like it, of which the same is `asked`, finds the plan."""
    arrays = as_operands(query, key, value, attn_mask)
    problem, operands = describe(*arrays, dropout_p, is_causal, scale, enable_gqa, **further)
    return_lse = check_flag("return_lse", return_lse)
    return_weights = check_flag("return_weights", return_weights)
    seed = seed_from(rng, problem.dropout_p > 0)
    checked = check_out(out, problem)
    wide = wider_type(problem, "forward", *(("weights",) if return_weights else ()))
    if wide is not None:
        target = checked if checked is not None and checked.dtype == wide else None
        options = (dropout_p, is_causal, scale_in_float64(problem), enable_gqa)
        call: Any = (*widened(*arrays[:3], mask=arrays[3], to=wide), *options)
        wanted: Any = {"return_lse": True, "return_weights": return_weights, "rng": seed, "out": target}
        return rounded(problem, checked, return_lse, *on_cpu(b"", further, *call, **wanted))
    made, given = (*arrays[:3], *masks_in(arrays[3])), (query, key, value, *masks_in(attn_mask))
    return cpu.evaluate(
        asked, problem, operands, made, given, checked, return_lse, return_weights, seed, options=further
    )


def rounded(problem: Problem, target: Array | None, return_lse: bool, out: Any, lse: Any, *weights: Any) -> Any:
    """Return what a call in a wider type gave in the dtypes of the call, the result in `target`, if there is one."""
    out = narrowed(out, problem.storage if target is None else target.dtype)
    if target is not None and out is not target:
        target[...] = out
        out = target
    sums = (narrowed(lse, problem.real, within=True),) if return_lse else ()
    results = (out, *sums, *(narrowed(matrix, problem.storage) for matrix in weights))
    return results if len(results) > 1 else out
