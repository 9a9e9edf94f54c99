"""Attention for PyTorch's tensors: PyTorch's signature, fastattn's kernels, forward and backward.

Tensors and options are checked here. What is called then is an operator, see `fastattn.integrations.operators`, or its
kernel, see `fastattn.integrations.eager`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from fastattn.call.advice import to_install

try:
    import torch
except ImportError as error:
    raise ImportError(f"fastattn.integrations.torch needs PyTorch: {to_install('torch')}") from error

from fastattn.call.options import check_causal, check_dropout, check_flag, check_scale
from fastattn.call.score_options import FurtherOptions, ScoreMod
from fastattn.call.types import Causal, Number
from fastattn.integrations import eager
from fastattn.integrations.functions import has_functions
from fastattn.integrations.keywords import flattened
from fastattn.integrations.tensors import check_mask, check_operands, draw_seed, in_autocast, is_bias
from fastattn.integrations.varlen import attention_varlen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Unpack

__all__ = [
    "additive_attention",
    "attention_varlen",
    "attention_with_lse",
    "flex_attention",
    "scaled_dot_product_attention",
]

Tensor: TypeAlias = torch.Tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    **options: Unpack[FurtherOptions],
) -> Tensor:
    """Scaled dot-product attention on tensors: ``torch.nn.functional.scaled_dot_product_attention`` by fastattn.

    Differentiable once in query, key, value, a floating attn_mask, and what score_mod captures. What each argument
    means, and what is promised of the result, is as in `fastattn.attention`.

    Parameters
    ----------
    query : torch.Tensor, shape (..., Hq, Lq, D)
        float16, bfloat16, float32 or float64, on the CPU. The tensor's memory is read where it lies, whatever its
        strides.
    key : torch.Tensor, shape (..., Hk, Lk, D)
    value : torch.Tensor, shape (..., Hk, Lk, Dv)
    attn_mask : torch.Tensor, broadcasting to (..., Hq, Lq, Lk), optional
        Boolean, where True takes part, or of such a dtype, added to the scores. It may be given together with
        `is_causal`. ``torch.nn.attention.bias.causal_upper_left(Lq, Lk)`` and ``causal_lower_right(Lq, Lk)`` mean
        ``is_causal=True`` and ``is_causal="bottom-right"``. Or one of each, as a tuple (bias, keep).
    dropout_p : float
        Probability that a weight is dropped. Which ones, ``torch.manual_seed`` determines.
    is_causal : bool or "bottom-right"
        True: query i looks at the keys up to i. "bottom-right": up to i + Lk - Lq, as in decoding.
    scale : float, optional
        Factor of query · key, 1/sqrt(D) unless given.
    enable_gqa : bool
        Grouped queries: Hq is a multiple of Hk, and query head h reads key head h // (Hq / Hk).
    **options
        What `fastattn.attention` takes by keyword: ``window=(left, right)``, ``query_offset``, an int or a tensor of
        integers, ``key_lengths``, a tensor of integers, ``softcap``, ``alibi_slopes`` and ``sinks``, tensors that have
        gradients, and ``score_mod``, ``mask_mod`` and ``block_mask``, see `flex_attention`.

    Returns
    -------
    torch.Tensor, shape (..., Hq, Lq, Dv)
        Where query is a transposed (B, L, H, D), as a projection leaves it, so is this.

    Raises
    ------
    TypeError
        If an argument is no tensor, is not on the CPU, or has a dtype that is not supported. If it is nested, sparse,
        or of a subclass that does not let fastattn's operators be called.
    ValueError
        If shapes do not go together, or a number is out of range. The message names the argument.
    NotImplementedError
        If a second derivative is asked for, or a derivative in forward mode.

    Notes
    -----
    Works under ``torch.compile``, ``torch.func``, ``no_grad`` and ``inference_mode``. Under CPU autocast operands of
    float32 become those of its dtype, and so is the result, as with PyTorch's own function. At most
    ``torch.get_num_threads()`` threads are used, and no more than `fastattn.get_num_threads`; results do not depend on
    that. A subclass of ``torch.Tensor`` is handed to the operator ``fastattn::attention``, and may have its own idea of
    it.

    Examples
    --------
    >>> import torch
    >>> from fastattn.integrations.torch import scaled_dot_product_attention
    >>> query, key, value = (torch.randn(2, 8, 16, 64, requires_grad=True) for _ in range(3))
    >>> out = scaled_dot_product_attention(query, key, value, is_causal=True)
    >>> out.sum().backward()
    >>> query.grad.shape
    torch.Size([2, 8, 16, 64])
    """
    return attention_with_lse(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **options)[0]


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    **options: Unpack[FurtherOptions],
) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention`, and the log-sum-exp of the scores, which is differentiable as well.

    Parameters
    ----------
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **options
        As `scaled_dot_product_attention`.

    Returns
    -------
    out : torch.Tensor, shape (..., Hq, Lq, Dv)
    lse : torch.Tensor, shape (..., Hq, Lq)
        Of half precision it is float32. With sinks over these as well. -inf, or the sink, for a query that may look at
        no key.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `scaled_dot_product_attention`.

    Examples
    --------
    Attention to some keys, and to others, is attention to all of them, each with the share that its sum has:

    >>> import torch
    >>> from fastattn.integrations.torch import attention_with_lse
    >>> query, key, value = torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([[1.0], [4.0], [1.0]])
    >>> out, lse = attention_with_lse(query, key[:1], value[:1])
    >>> other, other_lse = attention_with_lse(query, key[1:], value[1:])
    >>> share = torch.sigmoid(lse - other_lse)[..., None]
    >>> (out * share + other * (1 - share)).round(decimals=4)
    tensor([[2.]])
    """
    if torch.compiler.is_compiling() and has_functions(options):
        given = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        apart: tuple[Tensor, Tensor] = eager.apart(attention_with_lse, *given, **options)
        return apart
    if torch.is_autocast_enabled("cpu"):
        query, key, value = map(in_autocast, (query, key, value))
    check_operands(query=query, key=key, value=value)
    mask, keep, causal = _masks_and_causality(attn_mask, check_causal(is_causal), query, key)
    dropout_p, scale, enable_gqa = check_dropout(dropout_p), check_scale(scale), check_flag("enable_gqa", enable_gqa)
    seed = draw_seed() if dropout_p > 0 else None
    further = (keep, *flattened(options)) if options or keep is not None else ()
    told = (dropout_p, causal, scale, enable_gqa)
    results: tuple[Tensor, Tensor] = eager.call("attention", query, key, value, mask, *told, seed, *further)
    return results


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    is_causal: Causal = False,
    **options: Unpack[FurtherOptions],
) -> Tensor:
    """Additive attention [1]_ on tensors: `fastattn.additive_attention`, differentiable once.

    Parameters
    ----------
    query : torch.Tensor, shape (..., Lq, D)
        float16, bfloat16, float32 or float64, on the CPU. The tensor's memory is read where it lies, whatever its
        strides.
    key : torch.Tensor, shape (..., Lk, D)
    value : torch.Tensor, shape (..., Lk, Dv)
    weight : torch.Tensor, shape (D,)
    attn_mask : torch.Tensor, broadcasting to (..., Lq, Lk), optional
        Boolean, where True takes part, or of such a dtype, added to the scores, or one of each, as a tuple
        (bias, keep). A floating one has a gradient. A ``torch.nn.attention.bias`` means causality, as in
        `scaled_dot_product_attention`.
    is_causal : bool or "bottom-right"
        True: query i looks at the keys up to i. "bottom-right": up to i + Lk - Lq.
    **options
        As in `scaled_dot_product_attention`.

    Returns
    -------
    torch.Tensor, shape (..., Lq, Dv)

    Raises
    ------
    TypeError
        If an argument is no tensor, is not on the CPU, has a dtype that is not supported, is nested or sparse, or of a
        subclass that does not let fastattn's operators be called.
    ValueError
        If shapes do not go together. The message names the argument.
    NotImplementedError
        If a second derivative is asked for, or a derivative in forward mode.

    References
    ----------
    .. [1] Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", 2014,
       arXiv 1409.0473.

    Examples
    --------
    >>> import torch
    >>> from fastattn.integrations.torch import additive_attention
    >>> query, key, value = (torch.randn(8, 16, 64, requires_grad=True) for _ in range(3))
    >>> weight = torch.randn(64, requires_grad=True)
    >>> additive_attention(query, key, value, weight).sum().backward()
    >>> weight.grad.shape
    torch.Size([64])
    """
    if torch.compiler.is_compiling() and has_functions(options):
        return eager.apart(additive_attention, query, key, value, weight, attn_mask, is_causal, **options)
    if torch.is_autocast_enabled("cpu"):
        query, key, value, weight = map(in_autocast, (query, key, value, weight))
    check_operands(query=query, key=key, value=value, weight=weight)
    mask, keep, causal = _masks_and_causality(attn_mask, check_causal(is_causal), query, key)
    further = (keep, *flattened(options)) if options or keep is not None else ()
    return eager.call("additive_attention", query, key, value, weight, mask, causal, *further)[0]


# fmt: off
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: ScoreMod | None = ..., block_mask: Any = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., return_lse: Literal[False] = ...,
    kernel_options: Mapping[str, Any] | None = ..., *, return_aux: None = ...,
) -> Tensor: ...
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: ScoreMod | None = ..., block_mask: Any = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., *, return_lse: Literal[True],
    kernel_options: Mapping[str, Any] | None = ..., return_aux: None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: ScoreMod | None = ..., block_mask: Any = ...,
    scale: Number | None = ..., enable_gqa: bool = ..., return_lse: bool = ...,
    kernel_options: Mapping[str, Any] | None = ..., *, return_aux: Any = ...,
) -> Any: ...
# fmt: on
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: Any = None,
    scale: Number | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """``torch.nn.attention.flex_attention.flex_attention`` by fastattn, on the CPU, with a backward pass.

    Parameters
    ----------
    query : torch.Tensor, shape (..., Hq, Lq, D)
        This, key, value, scale and enable_gqa as in `scaled_dot_product_attention`.
    key : torch.Tensor, shape (..., Hk, Lk, D)
    value : torch.Tensor, shape (..., Hk, Lk, Dv)
    score_mod : function, optional
        Of (score, batch, head, query, key), which returns what becomes of a score. It is compiled, not run: ordinary
        Python on numbers, with functions of ``torch``, ``numpy`` or ``math``, and methods such as ``score.tanh()``.
        What it captures may be numbers, and tensors of any real dtype, as they are at the time of the call.
    block_mask : BlockMask, optional
        PyTorch's, or `fastattn.BlockMask`. Of PyTorch's, what it and its function say when it first comes here.
    scale : float, optional
    enable_gqa : bool
    return_lse : bool
        Return the log-sum-exp of the scores as well.
    kernel_options : dict, optional
        Ignored: these choose among Triton's kernels.
    return_aux : AuxRequest, optional
        ``AuxRequest(lse=True)`` returns the log-sum-exp in an ``AuxOutput``.

    Returns
    -------
    out : torch.Tensor, shape (..., Hq, Lq, Dv)
    lse : torch.Tensor, shape (..., Hq, Lq)
        If `return_lse`; or an ``AuxOutput`` that has it, if `return_aux`.

    Raises
    ------
    TypeError
        If an argument is of a kind that has no meaning here, or a function uses something that cannot be compiled.
    ValueError
        If shapes do not go together, or if a block mask was made for other lengths. The message names the argument.
    IndexError
        If a function reads a tensor out of range, for a key that the query may look at.
    NotImplementedError
        If ``max_scores`` are asked for, if a second derivative is, or one in forward mode, and under ``vmap``.

    Notes
    -----
    Differentiable once, in query, key and value, and in floating tensors that score_mod captures. A program that is
    compiled by ``torch.compile`` is interrupted here.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> from fastattn.integrations.torch import flex_attention
    >>> query, key, value = (torch.randn(1, 4, 256, 32, requires_grad=True) for _ in range(3))
    >>> document = torch.arange(256) // 100
    >>> def same_document(batch, head, query, key):
    ...     return document[query] == document[key]
    >>> def softcap(score, batch, head, query, key):
    ...     return 20 * torch.tanh(score / 20)
    >>> block_mask = create_block_mask(same_document, None, None, 256, 256, device="cpu")
    >>> flex_attention(query, key, value, softcap, block_mask).sum().backward()
    >>> query.grad.shape
    torch.Size([1, 4, 256, 32])
    """
    if return_lse and return_aux is not None:
        raise ValueError("return_lse: given together with return_aux; expected one of them")
    if return_aux is not None and return_aux.max_scores:
        raise NotImplementedError("return_aux: max_scores=True, which is not computed; expected AuxRequest(lse=True)")
    functions: FurtherOptions = {"score_mod": score_mod, "block_mask": block_mask}
    out, lse = attention_with_lse(query, key, value, scale=scale, enable_gqa=enable_gqa, **functions)
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


# -- masks -------------------------------------------------------------------------------------------------------------


def _masks_and_causality(
    given: Any, causal: str, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None, str]:
    """Return the mask, checked, the boolean one if there are two, and the word for causality.

    A bias of PyTorch's that means causality is no mask.

    Raises
    ------
    TypeError
        If the mask is none that the kernels can read.
    ValueError
        If a bias is for other lengths than there are.
    """
    if given is None:
        return None, None, causal
    if isinstance(given, tuple) and len(given) == 2:
        return (*_pair(*given), causal)
    if is_bias(given):
        return None, None, _with_bias(causal, given, query, key)
    check_mask(given)
    return given, None, causal


def _pair(bias: Tensor | None, keep: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return a floating and a boolean mask, the first alone if there are not both."""
    for mask in (bias, keep):
        if mask is not None:
            check_mask(mask)
    if (bias is not None and bias.dtype == torch.bool) or (keep is not None and keep.dtype != torch.bool):
        kinds = ", ".join("None" if mask is None else str(mask.dtype) for mask in (bias, keep))
        raise TypeError(f"attn_mask: a pair of dtypes {kinds}; expected (bias, keep), a floating and a boolean tensor")
    return (keep, None) if bias is None else (bias, keep)


def _with_bias(causal: str, bias: Tensor, query: Tensor, key: Tensor) -> str:
    """Return the word for a bias of PyTorch's together with what is_causal said: of two, the one that hides more."""
    lengths = (*query.shape[-2:-1], *key.shape[-2:-1])
    if (bias.seq_len_q, bias.seq_len_kv) != lengths:
        raise ValueError(
            f"attn_mask: a {type(bias).__name__} for {bias.seq_len_q} queries and {bias.seq_len_kv} keys; expected "
            f"lengths {lengths}, those of query and key"
        )
    meant = {"UPPER_LEFT": "top-left", "LOWER_RIGHT": "bottom-right"}[bias.variant.name]
    if causal in ("no", meant):
        return meant
    return "top-left" if lengths[0] <= lengths[1] else "bottom-right"
