"""A cache for transformers' models with room for tokens to come: a step writes one token, and copies no others.

``DynamicCache`` makes new tensors of all keys and values in every layer at every step. Here they are parts of larger
ones, in which the next token has its place; these are exchanged for twice as large ones when they are full.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils.import_utils import is_tracing

__all__ = ["GrowingCache"]

Tensor: TypeAlias = Any

LEAST_ROOM = 64  # tokens


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """A ``DynamicCache`` of transformers that copies nothing for a token that is generated.

    Parameters
    ----------
    config : transformers.PreTrainedConfig, optional
        The model's: layers with a window of theirs are what ``DynamicCache`` makes of them.

    Notes
    -----
    What a layer returns is a part of a tensor that grows, whatever attention the model has. Where a gradient may be
    asked for, and while a program is traced, it is a tensor of its own, as ``DynamicCache`` makes it.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> import torch
    >>> from fastattn.integrations import transformers as fastattn_transformers
    >>> fastattn_transformers.register()
    >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    >>> config = LlamaConfig(vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)
    >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
    >>> cache = fastattn_transformers.GrowingCache(config=model.config)
    >>> tokens = torch.tensor([[5, 6, 7]])
    >>> model.generate(tokens, cache=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
    torch.Size([1, 7])
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        self.layers: list[Any]
        self.layer_class_to_replicate: Any
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keys: Tensor
        self.values: Tensor
        self.key_room: Tensor | None = None
        self.value_room: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all there are."""
        if _must_be_apart(key_states) or _must_be_apart(value_states):
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.key_room, self.keys = _appended(self.key_room, self.keys, key_states)
        self.value_room, self.values = _appended(self.value_room, self.values, value_states)
        return self.keys, self.values


def _must_be_apart(states: Tensor) -> bool:
    """Whether these become a part of what is differentiated, or of a program."""
    return bool(is_tracing(states) or (torch.is_grad_enabled() and states.requires_grad))


def _appended(room: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor that begins with some tokens and some more, (B, H, at least as many, D), and these.

    It is `room`, if that begins with the tokens that are held, and has a place for the others.
    """
    length = held.shape[-2] if held.numel() else 0
    end = length + new.shape[-2]
    if room is None or not _fits(room, new, end) or (length and not _begins(room, held)):
        room = new.new_empty((*new.shape[:-2], max(LEAST_ROOM, 2 * end), new.shape[-1]))
        if length:
            room[..., :length, :] = held
    room[..., length:end, :] = new
    return room, room[..., :end, :]


def _fits(room: Tensor, new: Tensor, end: int) -> bool:
    """Whether tokens can be written to a tensor, up to an end."""
    alike = room.dtype == new.dtype and room.device == new.device and room.shape[:-2] == new.shape[:-2]
    return bool(alike) and room.shape[-2] >= end and (not room.is_inference() or torch.is_inference_mode_enabled())


def _begins(room: Tensor, held: Tensor) -> bool:
    """Whether a tensor begins with tokens that are held: those of another have been selected, or reordered."""
    same: bool = held.data_ptr() == room.data_ptr() and held.stride() == room.stride()
    return same and held.shape[:-2] == room.shape[:-2]
