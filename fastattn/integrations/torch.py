"""Attention for PyTorch's tensors: PyTorch's signature, fastattn's kernels, forward and backward.

Tensors and options are checked here. What is called then is an operator, see `fastattn.integrations.operators`, or its
kernel, see `fastattn.integrations.eager`.
"""

from __future__ import annotations

from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("fastattn.integrations.torch needs PyTorch: pip install torch, or fastattn[torch]") from error

from fastattn.call.arrays import is_causal_bias
from fastattn.call.options import check_causal, check_dropout, check_flag, check_scale
from fastattn.integrations import eager

__all__ = ["additive_attention", "attention_with_lse", "scaled_dot_product_attention"]

Tensor = Any  # PyTorch's types are not known where it is not installed

DTYPES = (torch.float32, torch.float64)
MASK_DTYPES = (torch.bool, torch.float16, torch.float32, torch.float64)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool | str = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention on tensors: ``torch.nn.functional.scaled_dot_product_attention`` by fastattn.

    Differentiable once in query, key, value and a floating attn_mask. What each argument means, and what is promised
    of the result, is as in `fastattn.attention`.

    Parameters
    ----------
    query : torch.Tensor, shape (..., Hq, Lq, D)
        float32 or float64, on the CPU. The tensor's memory is read where it lies, whatever its strides.
    key : torch.Tensor, shape (..., Hk, Lk, D)
    value : torch.Tensor, shape (..., Hk, Lk, Dv)
    attn_mask : torch.Tensor, broadcasting to (..., Hq, Lq, Lk), optional
        Boolean, where True takes part, or float16, float32 or float64, added to the scores. It may be given together
        with `is_causal`. ``torch.nn.attention.bias.causal_upper_left(Lq, Lk)`` and ``causal_lower_right(Lq, Lk)`` mean
        ``is_causal=True`` and ``is_causal="bottom-right"``.
    dropout_p : float
        Probability that a weight is dropped. Which ones, ``torch.manual_seed`` determines.
    is_causal : bool or "bottom-right"
        True: query i looks at the keys up to i. "bottom-right": up to i + Lk - Lq, as in decoding.
    scale : float, optional
        Factor of query · key, 1/sqrt(D) unless given.
    enable_gqa : bool
        Grouped queries: Hq is a multiple of Hk, and query head h reads key head h // (Hq / Hk).

    Returns
    -------
    torch.Tensor, shape (..., Hq, Lq, Dv)
        Where query is a transposed (B, L, H, D), as a projection leaves it, so is this.

    Raises
    ------
    TypeError
        If an argument is no tensor, is not on the CPU, or has a dtype that is not supported: half precision is not. If
        it is nested, sparse, or of a subclass that does not let fastattn's operators be called.
    ValueError
        If shapes do not go together, or a number is out of range. The message names the argument.
    NotImplementedError
        If a second derivative is asked for, or a derivative in forward mode.

    Notes
    -----
    Works under ``torch.compile``, ``torch.func``, ``no_grad`` and ``inference_mode``. Under CPU autocast it computes in
    float32, as PyTorch's own operations do that need it. At most ``torch.get_num_threads()`` threads are used, and no
    more than `fastattn.get_num_threads`; results do not depend on that. A subclass of ``torch.Tensor`` is handed to the
    operator ``fastattn::attention``, and may have its own idea of it.

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
    return attention_with_lse(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)[0]


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool | str = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention`, and the log-sum-exp of the scores, which is differentiable as well.

    Parameters
    ----------
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        As `scaled_dot_product_attention`.

    Returns
    -------
    out : torch.Tensor, shape (..., Hq, Lq, Dv)
    lse : torch.Tensor, shape (..., Hq, Lq)
        -inf for a query that may look at no key.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `scaled_dot_product_attention`.

    Examples
    --------
    An attention sink [1]_, a score that each query has without a key, takes its share of the weights:

    >>> import torch
    >>> from fastattn.integrations.torch import attention_with_lse
    >>> query, key, value = torch.zeros(1, 2), torch.zeros(3, 2), torch.ones(3, 1)
    >>> out, lse = attention_with_lse(query, key, value)
    >>> sink = torch.tensor(0.0)
    >>> out * torch.sigmoid(lse - sink)[..., None]
    tensor([[0.7500]])

    References
    ----------
    .. [1] Xiao et al., "Efficient streaming language models with attention sinks", 2023, arXiv 2309.17453.
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value, attn_mask = map(_autocast, (query, key, value, attn_mask))
    _check(query=query, key=key, value=value)
    attn_mask, causal = _mask_and_causality(attn_mask, check_causal(is_causal), query, key)
    dropout_p, scale, enable_gqa = check_dropout(dropout_p), check_scale(scale), check_flag("enable_gqa", enable_gqa)
    seed = _draw_seed() if dropout_p > 0 else None
    results: tuple[Tensor, Tensor] = eager.attention(
        query, key, value, attn_mask, dropout_p, causal, scale, enable_gqa, seed
    )
    return results


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool | str = False,
) -> Tensor:
    """Additive attention [1]_ on tensors: `fastattn.additive_attention`, differentiable once.

    Parameters
    ----------
    query : torch.Tensor, shape (..., Lq, D)
        float32 or float64, on the CPU. The tensor's memory is read where it lies, whatever its strides.
    key : torch.Tensor, shape (..., Lk, D)
    value : torch.Tensor, shape (..., Lk, Dv)
    weight : torch.Tensor, shape (D,)
    attn_mask : torch.Tensor, broadcasting to (..., Lq, Lk), optional
        Boolean, where True takes part, or float16, float32 or float64, added to the scores. It has no gradient. A
        ``torch.nn.attention.bias`` means causality, as in `scaled_dot_product_attention`.
    is_causal : bool or "bottom-right"
        True: query i looks at the keys up to i. "bottom-right": up to i + Lk - Lq.

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
        If attn_mask requires grad, if a second derivative is asked for, or a derivative in forward mode.

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
    if torch.is_autocast_enabled("cpu"):
        query, key, value, weight, attn_mask = map(_autocast, (query, key, value, weight, attn_mask))
    _check(query=query, key=key, value=value, weight=weight)
    attn_mask, causal = _mask_and_causality(attn_mask, check_causal(is_causal), query, key)
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "attn_mask: requires grad; expected one that does not: additive attention has no gradient of its mask"
        )
    return eager.additive_attention(query, key, value, weight, attn_mask, causal)[0]


# -- checks ------------------------------------------------------------------------------------------------------------


def _check(**tensors: Tensor) -> None:
    """Refuse what the kernels cannot read.

    Raises
    ------
    TypeError
        With the argument's name.
    """
    dtype = None
    for name, tensor in tensors.items():
        _check_memory(name, tensor)
        if dtype is None:
            dtype = tensor.dtype
            if dtype not in DTYPES:
                raise TypeError(
                    f"{name}: dtype {dtype} is not supported; expected torch.float32 or torch.float64"
                    f"{_to_convert(name, tensor)}"
                )
        elif tensor.dtype != dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype}; expected {dtype}, as query")


def _mask_and_causality(mask: Tensor | None, causal: str, query: Tensor, key: Tensor) -> tuple[Tensor | None, str]:
    """Return the mask, checked, and the word for causality; a bias of PyTorch's that means causality is no mask.

    Raises
    ------
    TypeError
        If the mask is none that the kernels can read.
    ValueError
        If a bias is for other lengths than there are.
    """
    if mask is None:
        return None, causal
    if _is_causal_bias(mask):
        return None, _with_bias(causal, mask, query, key)
    _check_memory("attn_mask", mask)
    if mask.dtype not in MASK_DTYPES:
        wanted = ", ".join(map(str, MASK_DTYPES))
        raise TypeError(
            f"attn_mask: dtype {mask.dtype} is not supported; expected one of {wanted}{_to_convert('attn_mask', mask)}"
        )
    return mask, causal


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


def _to_convert(name: str, tensor: Tensor) -> str:
    """Say how to get float32 of half precision."""
    return f": {name}.float()" if tensor.dtype.is_floating_point else ""


def _check_memory(name: str, tensor: Tensor) -> None:
    if type(tensor) not in eager.PLAIN:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: {type(tensor).__name__}; expected a torch.Tensor")
        _check_subclass(name, tensor)
    if tensor.is_nested:
        raise TypeError(
            f"{name}: a nested tensor; expected one of a single shape, which torch.nested.to_padded_tensor makes, and "
            "an attn_mask that hides the padding"
        )
    if not tensor.is_cpu:
        raise TypeError(f"{name}: a tensor on device {tensor.device}; expected one on the CPU")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: a tensor of layout {tensor.layout}; expected torch.strided")


def _check_subclass(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that does not say what it is: one that has no shape yet, or whose class tells nothing."""
    if _is_causal_bias(tensor):
        raise TypeError(f"{name}: a {type(tensor).__name__}, which has no numbers; expected it as attn_mask")
    for attribute in ("is_nested", "is_cpu", "layout", "dtype", "shape", "requires_grad"):
        try:
            getattr(tensor, attribute)
        except Exception as error:
            raise TypeError(
                f"{name}: a {type(tensor).__name__} whose {attribute} cannot be read; expected a torch.Tensor: {error}"
            ) from error


def _is_causal_bias(tensor: Any) -> bool:
    return type(tensor) not in eager.PLAIN and is_causal_bias(tensor)


def _autocast(tensor: Any) -> Any:
    """Make half precision float32, as autocast does for operations that need it."""
    if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.float()
    return tensor


def _draw_seed() -> Tensor:
    """Draw from PyTorch's generator what decides which weights are dropped."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
