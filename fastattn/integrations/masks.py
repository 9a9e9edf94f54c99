"""Masks that transformers' models carry from where they ask for one to attention, and that nothing else can read.

A model asks twice: for a mask, once for all its layers, and then in each layer for attention. Some layers do not ask for
attention, but compute it, from the mask that the model has: eager's would do, which is added to the scores. A mask that
means something else, such as one that leaves causality to the kernel, or that is boolean, would silently be wrong there.
So what a mask means is in its dtype, one of those that PyTorch stores and does not compute with, and what fails for it is
retold in a sentence with the model's name.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed

#: The dtype of a mask that says for each key, and perhaps for each query, whether it is looked at.
VISIBLE = torch.bits8
#: Of one that says for each key whether it is padding; that the last query stands at the last key, and that no query
#: looks at the keys behind it, goes without saying.
CAUSAL_PADDING = torch.bits4x2
#: Of one that says only the latter.
CAUSAL = torch.bits2x4


class Mask(torch.Tensor):
    """A mask of one of these dtypes, which can be cut, repeated and moved, and which only `read` reads."""

    model: str

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what PyTorch does with any dtype, and say whose code asks for more."""
        try:
            result = super().__torch_function__(function, types, args, kwargs or {})
        except Exception as error:
            raise ValueError(
                f"{_model_of(args, kwargs)}: the model computes with the mask itself ({_name(function)}), and the one that "
                'fastattn makes is for its own attention alone; expected another attn_implementation, such as "eager"'
            ) from error
        if isinstance(result, cls):
            result.model = _model_of(args, kwargs)
        return result


def written(mask: Tensor, meaning: torch.dtype, model: str) -> Mask:
    """Return a boolean mask in one of the dtypes above."""
    found = mask.contiguous().view(meaning).as_subclass(Mask)
    found.model = model
    return found


def read(mask: Tensor | None) -> tuple[Tensor | None, bool]:
    """Return a mask that attention takes, and whether the last query stands at the last key, causally."""
    if mask is None or mask.dtype not in (VISIBLE, CAUSAL_PADDING, CAUSAL):
        return mask, False
    if mask.dtype == CAUSAL:
        return None, True
    return mask.as_subclass(torch.Tensor).view(torch.bool), mask.dtype == CAUSAL_PADDING


def _model_of(args: Any, kwargs: Any) -> str:
    """Return the name of the model whose mask is among the arguments of a function."""
    for argument in (*args, *(kwargs or {}).values()):
        for entry in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(entry, Mask):
                return getattr(entry, "model", "a model")
    return "a model"


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))
