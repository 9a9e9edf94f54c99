"""``attn_implementation="fastattn"`` for the models of Hugging Face's transformers.

A model asks twice: for a mask, once for all its layers, and then in each layer for attention. sdpa's mask says for
every query which keys it may look at, Lq x Lk booleans for each row of the batch. Where a mask is no more than padding,
`padding_mask` returns that alone, one boolean for each key, and leaves causality to the kernel.

Any model can be made with the name of any attention, also one whose layers compute attention themselves, from the mask.
A class of models whose layers all do so is refused when a model is made, see `fastattn.integrations.model_code`; where
some do, or where the model computes with the mask, that is eager's to them, see `fastattn.integrations.masks`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

try:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        eager_mask,
        prepare_padding_mask,
        sdpa_mask,
    )
    from transformers.utils import output_capturing
    from transformers.utils.import_utils import is_tracing
except ImportError as error:
    raise ImportError(
        "fastattn.integrations.transformers needs PyTorch and transformers 5.24 or later: "
        "pip install torch 'transformers>=5.24', or fastattn[transformers]"
    ) from error

from fastattn.integrations import masks
from fastattn.integrations.model_code import refusal
from fastattn.integrations.torch import attention_with_lse

__all__ = ["attention", "padding_mask", "register"]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed

#: The names that are registered.
NAMES: set[str] = set()

#: What a model may hand on to its layers that changes nothing about attention.
HARMLESS = frozenset(
    (
        "cache_position",
        "deterministic",  # results always are
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",  # sequences packed into one have a mask of their own
        "return_dict",
        "use_cache",
    )
)


def register(name: str = "fastattn") -> None:
    """Let models be made with ``attn_implementation=name``.

    Parameters
    ----------
    name : str
        The name of the implementation.

    Notes
    -----
    Outputs, gradients and what ``generate`` returns are those of "eager", to rounding. What a model passes that cannot
    be computed raises a ValueError: it is never ignored. ``output_attentions=True`` in a call of the model returns the
    weights, which PyTorch then computes.

    A model whose layers compute attention themselves raises a ValueError with the name of its class when it is made.
    For this, ``PreTrainedModel.get_correct_attn_implementation`` is replaced by one that asks the class as well, of
    the names that are registered here alone.

    Raises
    ------
    TypeError
        If `name` is no string.

    Examples
    --------
    >>> from fastattn.integrations import transformers as fastattn_transformers
    >>> fastattn_transformers.register()
    >>> from transformers import BertConfig, BertModel
    >>> import torch
    >>> from transformers import AutoModel, ViTConfig
    >>> config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8)
    >>> model = AutoModel.from_config(config, attn_implementation="fastattn")
    >>> model(torch.zeros(2, 3, 32, 32)).last_hidden_state.shape
    torch.Size([2, 17, 32])
    """
    if not isinstance(name, str):
        raise TypeError(f"name: {name!r} of type {type(name).__name__}; expected a string")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, padding_mask)
    if not NAMES:
        PreTrainedModel.get_correct_attn_implementation = _refusing(PreTrainedModel.get_correct_attn_implementation)
    NAMES.add(name)


def _refusing(get_correct_attn_implementation: Any) -> Any:
    """Return the method that every model asks whether it may have an attention, asking its class as well.

    transformers looks at the class for the names of its own attentions, and lets any other pass.
    """

    @functools.wraps(get_correct_attn_implementation)
    def asked(self: Any, *args: Any, **options: Any) -> str:
        implementation: str = get_correct_attn_implementation(self, *args, **options)
        reason = refusal(type(self), implementation) if implementation in NAMES else None
        if reason is not None:
            raise ValueError(reason)
        return implementation

    return asked


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention as a layer of a model asks for it.

    Parameters
    ----------
    module : torch.nn.Module
        The layer; its ``is_causal`` counts, if it has one, where neither `is_causal` nor a mask is given.
    query : torch.Tensor, shape (B, Hq, Lq, D)
    key : torch.Tensor, shape (B, Hk, Lk, D)
    value : torch.Tensor, shape (B, Hk, Lk, Dv)
    attention_mask : torch.Tensor, broadcasting to (B, Hq, Lq, Lk), or None
        What `padding_mask` returned, or the user's own: boolean, or added to the scores.
    dropout : float
        Probability that a weight is dropped.
    scaling : float, optional
        Factor of query · key.
    is_causal : bool, optional
        Whether query i looks at the keys up to i, where there is no mask.
    position_bias : torch.Tensor, broadcasting to (B, Hq, Lq, Lk), optional
        Added to the scores; differentiable.
    s_aux : torch.Tensor, shape (Hq,), optional
        Attention sinks: scores that each query has without a key.
    sliding_window : int, optional
        What the mask keeps to. Without a mask it must not matter.
    output_attentions : bool, optional
        Whether to return the weights.
    **others
        What else the model passes.

    Returns
    -------
    out : torch.Tensor, shape (B, Lq, Hq, Dv)
    weights : torch.Tensor, shape (B, Hq, Lq, Lk), or None

    Raises
    ------
    TypeError
        If the model computes in half precision, and not under autocast.
    ValueError
        If the model passes what is not computed here.
    """
    causal: bool | str = False
    if attention_mask is None:
        causal = query.shape[2] > 1 and bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    else:
        attention_mask, to_the_end = masks.read(attention_mask, query.shape[2], key.shape[2])
        causal = "bottom-right" if to_the_end else False
    _refuse(module, others, query, key, attention_mask, sliding_window)
    if position_bias is not None:
        attention_mask = _biased(position_bias[..., : key.shape[2]], attention_mask)

    if output_attentions or _captured():
        out, weights = _with_weights(query, key, value, attention_mask, dropout, scaling, causal, s_aux)
        return out.transpose(1, 2).contiguous(), weights
    grouped = query.shape[1] != key.shape[1]
    out, lse = attention_with_lse(query, key, value, attention_mask, dropout, causal, scaling, grouped)
    if attention_mask is not None:
        out = _as_eager(out, lse, query, key, value, scaling)
    if s_aux is not None:
        out = out * torch.sigmoid(lse - s_aux[:, None].to(lse.dtype))[..., None]
    return out.transpose(1, 2).contiguous(), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: Any = "cpu",
    **others: Any,
) -> Tensor | None:
    """Return the mask of a model's layers, as transformers' ``eager_mask`` does, but padding alone where that will do.

    It does where the mask is bidirectional, or causal with the last query at the last key, and nothing else is in it. A
    window, or a chunk, is nothing else where it is longer than the keys are.

    Parameters
    ----------
    batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, \
allow_is_causal_skip, allow_is_bidirectional_skip, device, **others
        As transformers passes them.

    Returns
    -------
    torch.Tensor or None
        Shape (B, 1, Lq, Lk): a `fastattn.integrations.masks.Mask`, or eager's own while the model is traced, or where
        its cache is made for that. None: nothing is hidden.
    """
    given = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        "device": device,
    }
    if is_tracing(attention_mask) or not isinstance(q_offset, int):
        return eager_mask(**given, **others)
    shape, dtype = (batch_size, 1, q_length, kv_length), others.get("dtype", torch.float32)
    plain = local_size is None or max(q_length, kv_length) < local_size
    causal = allow_is_causal_skip and (mask_function is causal_mask_function or local_size is not None)
    both_ways = allow_is_bidirectional_skip and (mask_function is bidirectional_mask_function or local_size is not None)
    at_the_end = q_offset + q_length == kv_offset + kv_length
    if not plain or not (both_ways or (causal and at_the_end)):
        visible = sdpa_mask(**given, allow_is_causal_skip=False, **others)
        return None if visible is None else masks.compact(visible, False, shape, dtype, device)
    causal = not both_ways and q_length > 1
    kept = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if kept is not None:
        kept = kept[:, kv_offset : kv_offset + kv_length].bool()[:, None, None, :]
    if kept is None or kept.all():
        return masks.compact(None, True, shape, dtype, device) if causal else None
    return masks.compact(kept, causal, shape, dtype, device)


def _refuse(
    module: Any,
    others: dict[str, Any],
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
) -> None:
    """Refuse what would change the result and is not computed.

    Raises
    ------
    TypeError, ValueError
        With the name of the layer's class, which has the model's, and of the option.
    """
    layer = type(module).__name__
    if query.dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled("cpu"):
        raise TypeError(f"{layer}: a query of {query.dtype}; expected a model in float32 or float64: model.float()")
    packed = [others.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    numbered = others.pop("seq_idx", None)
    whole = attention_mask is not None and attention_mask.shape[-2] == query.shape[2]
    if not whole:
        several = any(ends is not None and ends.numel() > 2 for ends in packed)
        if several or (numbered is not None and bool((numbered != numbered.flatten()[0]).any())):
            raise ValueError(
                f"{layer}: cu_seq_lens_q, cu_seq_lens_k, seq_idx: several sequences in one, and no mask that keeps "
                "them apart; expected position_ids that begin anew with each sequence, which transformers makes one of"
            )
    for name, given in others.items():
        if given is not None and given is not False and name not in HARMLESS:
            raise ValueError(
                f"{layer}: {name}: the model passes it to attention, and fastattn does not compute it; expected None, "
                'or another attn_implementation, such as "eager"'
            )
    if sliding_window is not None and not whole and key.shape[2] > sliding_window:
        raise ValueError(
            f"{layer}: sliding_window: {sliding_window} with {key.shape[2]} keys and no mask that says so; expected a "
            f"mask of {query.shape[2]} x {key.shape[2]}"
        )


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Return one floating mask for a bias and a mask."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else bias + mask


def _as_eager(out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Return what attention found, and for a query that may look at no key what eager's attention has there.

    Its masks add a lowest number, so all keys are the same to such a query, which gets the mean of the values. It is
    what padding computes, and what a model generates that was given its padding at the end.
    """
    blind = lse.detach() == -math.inf
    if is_tracing(query):
        means = value.mean(-2, keepdim=True).repeat_interleave(out.shape[1] // value.shape[1], 1)
        return torch.where(blind[..., None], means, out)
    if not blind.any():
        return out
    groups = out.shape[1] // value.shape[1]
    rows = blind.any(1).any(0)
    value = value.repeat_interleave(groups, 1)
    if query.requires_grad or key.requires_grad:
        scores = query[:, :, rows] @ key.repeat_interleave(groups, 1).transpose(-1, -2)
        scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        means = (scores + torch.finfo(scores.dtype).min).softmax(-1) @ value
    else:
        means = value.mean(-2, keepdim=True)
    found = out.clone()
    found[:, :, rows] = torch.where(blind[:, :, rows, None], means, out[:, :, rows])
    return found


def _captured() -> bool:
    """Whether the model is asked for its weights, and does not tell its layers (GPT-2 does not)."""
    collector = getattr(output_capturing, "_active_collector", None)
    collected = None if collector is None else collector.get()
    return any("attentions" in name for name in collected or ())


def _with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool | str,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute attention in PyTorch, from a matrix of weights that can be looked at, and differentiated."""
    queries, keys = query.shape[2], key.shape[2]
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    visible = torch.ones((queries, keys), dtype=torch.bool)
    if causal:
        visible = visible.tril(keys - queries if causal == "bottom-right" else 0)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores, visible = scores + mask, visible & (mask != -math.inf)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(len(scores), -1, queries, 1).to(scores.dtype)), -1)
    weights = scores.softmax(-1)[..., :keys]
    weights = torch.nn.functional.dropout(weights, dropout)
    return weights @ value, weights
