"""``attn_implementation="fastattn"`` for the models of Hugging Face's transformers.

A model asks twice: for a mask, once for all its layers, and then in each layer for attention. sdpa's mask says for
every query which keys it may look at, Lq x Lk booleans for each row of the batch. Where a mask is causality, a window
and padding, and nothing else, `padding_mask` returns that: an interval for the kernel, with the lengths of a batch that
is padded at its end, and one boolean for each key where padding lies elsewhere.

Any model can be made with the name of any attention, also one whose layers compute attention themselves, from the mask.
A class of models whose layers all do so is refused when a model is made, see `fastattn.integrations.model_code`; where
some do, or where the model computes with the mask, that is eager's to them, see `fastattn.integrations.masks`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

from fastattn.call.advice import to_install

try:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask
    from transformers.utils import output_capturing
    from transformers.utils.import_utils import is_tracing
except ImportError as error:
    raise ImportError(
        f"fastattn.integrations.transformers needs PyTorch and transformers 5.24 or later: {to_install('transformers')}"
    ) from error

from fastattn.call.scores import Scores
from fastattn.integrations import intervals, masks
from fastattn.integrations.growing import GrowingCache
from fastattn.integrations.masks import EVERYTHING, Visible
from fastattn.integrations.model_code import refusal
from fastattn.integrations.torch import attention_varlen, attention_with_lse

__all__ = ["GrowingCache", "attention", "padding_mask", "register"]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed

#: What is meant without a mask, where a layer says that it is causal.
CAUSAL = Visible(Scores(right=0))

EVERY_ROW = slice(None)

#: What flash-attention's layers are told of several sequences in one: where each ends, and the longest length.
OF_SEQUENCES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

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
        "position_ids",  # where they begin anew, so do sequences: the mask says so
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

    Raises
    ------
    TypeError
        If `name` is no string.

    Notes
    -----
    Outputs, gradients and what ``generate`` returns are those of "eager", to rounding. What a model passes that cannot
    be computed raises a ValueError: it is never ignored. ``output_attentions=True`` in a call of the model returns the
    weights, which PyTorch then computes.

    A model whose layers compute attention themselves raises a ValueError with the name of its class when it is made.
    For this, ``PreTrainedModel.get_correct_attn_implementation`` is replaced by one that asks the class as well, of
    the names that are registered here alone.

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
    softcap: float | None = None,
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
    softcap : float, optional
        Scores become softcap · tanh(score / softcap) before anything is added.
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
    ValueError
        If the model passes what is not computed here.
    """
    bias, visible = None, EVERYTHING
    if attention_mask is not None:
        bias, visible = masks.read(attention_mask, query.shape[2], key.shape[2])
    elif query.shape[2] > 1 and (getattr(module, "is_causal", False) if is_causal is None else is_causal):
        visible = CAUSAL
    if bias is None:
        visible = masks.by_ends(visible, [others.get(name) for name in OF_SEQUENCES], query, key)
    _refuse(module, others, query, key, bias, visible, sliding_window)
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        bias = position_bias if bias is None else position_bias + bias

    scores = functools.partial(_scores, query, key, scaling, softcap, bias)
    if output_attentions or _captured():
        out, weights = _with_weights(scores(), value, visible, dropout, s_aux)
        return out.transpose(1, 2).contiguous(), weights
    grouped = query.shape[1] != key.shape[1]
    options = {"scale": scaling, "enable_gqa": grouped, "softcap": softcap, "sinks": s_aux, **visible.options()}
    if visible.sequences is not None and bias is None:
        out, lse = _packed(query, key, value, visible, dropout, options)
    else:
        kept = visible.kept if visible.sequences is None else visible.matrix(query.shape[2], key.shape[2], query.device)
        out, lse = attention_with_lse(query, key, value, kept if bias is None else (bias, kept), dropout, **options)
    if attention_mask is not None and s_aux is None:  # to a sink, a query that may look at no key gives all
        out = _as_eager(out, lse, value, scores)
    return out.transpose(1, 2).contiguous(), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: Any = "cpu",
    **others: Any,
) -> Tensor | None:
    """Return the mask of a model's layers, as transformers' ``eager_mask`` does, but without its numbers.

    Those of Lq x Lk booleans are needed only where something else than causality, a window and padding is in the mask.

    Parameters
    ----------
    batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, \
allow_is_causal_skip, allow_is_bidirectional_skip, device, **others
        As transformers passes them.

    Returns
    -------
    torch.Tensor or None
        Shape (B, 1, Lq, Lk): a `fastattn.integrations.masks.Mask`, or eager's own while the model is traced. None:
        nothing is hidden.
    """
    counted = isinstance(q_offset, torch.Tensor)  # by a static cache, for a program that is compiled
    traced = is_tracing(attention_mask) or (counted and is_tracing(q_offset))
    if counted and not traced:
        q_offset = int(q_offset)
    given = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        "device": device,
    }
    if traced:
        return eager_mask(**given, **others)
    shape, dtype = (batch_size, 1, q_length, kv_length), others.get("dtype", torch.float32)
    packed = intervals.packed(mask_function)
    if packed is not None and q_length == kv_length and q_offset == kv_offset and attention_mask is None:
        numbers, (left, right) = packed
        return masks.compact(Visible(Scores(left=left, right=right), sequences=numbers), shape, dtype, device)
    reach = intervals.reach(mask_function, max(q_offset + q_length, kv_offset + kv_length))
    if reach is None:
        matrix = sdpa_mask(**given, allow_is_causal_skip=False, **others)
        return None if matrix is None else masks.compact(Visible(kept=matrix), shape, dtype, device)
    interval = Scores(left=reach[0], right=reach[1], offset=q_offset - kv_offset)
    if interval.span(0, q_length - 1, kv_length) == (0, 0, kv_length, kv_length):
        interval = Scores()
    kept, lengths = intervals.padding(attention_mask, kv_length, kv_offset)
    skip = allow_is_bidirectional_skip or (allow_is_causal_skip and q_length == 1)
    if skip and not interval.bounded and kept is None and lengths is None:
        return None
    return masks.compact(Visible(interval, lengths, kept), shape, dtype, device)


def _refuse(
    module: Any,
    others: dict[str, Any],
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    visible: Visible,
    sliding_window: int | None,
) -> None:
    """Refuse what would change the result and is not computed.

    Raises
    ------
    ValueError
        With the name of the layer's class, which has the model's, and of the option.
    """
    layer = type(module).__name__
    packed = [others.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    numbered = others.pop("seq_idx", None)
    whole = any(mask is not None and mask.shape[-2] == query.shape[2] for mask in (bias, visible.kept))
    if not whole and visible.sequences is None:
        several = any(ends is not None and ends.numel() > 2 for ends in packed)
        if several or (numbered is not None and bool((numbered != numbered.flatten()[0]).any())):
            raise ValueError(
                f"{layer}: cu_seq_lens_q, cu_seq_lens_k, seq_idx: several sequences in one, and no mask that keeps "
                "them apart; expected position_ids that begin anew with each sequence, which transformers makes one "
                f"of, or {', '.join(OF_SEQUENCES)} together, the same for queries and keys, with neither padding nor a "
                "cache"
            )
    for name, given in others.items():
        if given is not None and given is not False and name not in HARMLESS:
            raise ValueError(
                f"{layer}: {name}: the model passes it to attention, and fastattn does not compute it; expected None, "
                'or another attn_implementation, such as "eager"'
            )
    windowed = whole or visible.interval.left is not None
    if sliding_window is not None and not windowed and key.shape[2] > sliding_window:
        raise ValueError(
            f"{layer}: sliding_window: {sliding_window} with {key.shape[2]} keys and no mask that says so; expected a "
            f"mask of {query.shape[2]} x {key.shape[2]}"
        )


def _scores(
    query: Tensor,
    key: Tensor,
    scaling: float | None,
    softcap: float | None,
    bias: Tensor | None,
    rows: Tensor | slice = EVERY_ROW,
) -> Tensor:
    """Return the matrix of scores, or some of its rows, before anything is hidden."""
    query, key = query[:, :, rows], key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if bias is None:
        return scores
    return scores + (bias if bias.shape[-2] == 1 else bias[..., rows, :])


def _packed(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Compute attention of several sequences in one, without a matrix that keeps them apart."""
    batch, _, length, _ = query.shape
    q, k, v = (
        tensor[0].transpose(0, 1) if batch == 1 else tensor.transpose(1, 2).flatten(0, 1)
        for tensor in (query, key, value)
    )
    out, lse = attention_varlen(q, k, v, visible.cu_seqlens(), dropout_p=dropout, **options)
    return out.unflatten(0, (batch, length)).transpose(1, 2), lse.unflatten(0, (batch, length)).transpose(1, 2)


def _as_eager(out: Tensor, lse: Tensor, value: Tensor, scores: Callable[..., Tensor]) -> Tensor:
    """Return what attention found, and for a query that may look at no key what eager's attention has there.

    Its masks add a lowest number, so all keys are the same to such a query, which gets the mean of the values. It is
    what padding computes, and what a model generates that was given its padding at the end.
    """
    blind = lse.detach() == -math.inf
    if is_tracing(out):
        means = value.mean(-2, keepdim=True).repeat_interleave(out.shape[1] // value.shape[1], 1)
        return torch.where(blind[..., None], means.to(out.dtype), out)
    if not blind.any():
        return out
    rows = blind.any(1).any(0)
    value = value.repeat_interleave(out.shape[1] // value.shape[1], 1)
    if out.requires_grad:
        means = (scores(rows=rows) + torch.finfo(out.dtype).min).softmax(-1) @ value
    else:
        means = value.mean(-2, keepdim=True)
    found = out.clone()
    found[:, :, rows] = torch.where(blind[:, :, rows, None], means.to(out.dtype), out[:, :, rows])
    return found


def _captured() -> bool:
    """Whether the model is asked for its weights, and does not tell its layers (GPT-2 does not)."""
    collector = getattr(output_capturing, "_active_collector", None)
    collected = None if collector is None else collector.get()
    return any("attentions" in name for name in collected or ())


def _with_weights(
    scores: Tensor, value: Tensor, visible: Visible, dropout: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute attention in PyTorch, from a matrix of weights that can be looked at, and differentiated."""
    batch, heads, queries, keys = scores.shape
    seen = visible.matrix(queries, keys, scores.device) & (scores != -math.inf)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(batch, -1, queries, 1).to(scores.dtype)), -1)
    weights = scores.softmax(-1)[..., :keys]
    weights = torch.nn.functional.dropout(weights, dropout)
    return weights @ value.repeat_interleave(heads // value.shape[1], 1), weights
