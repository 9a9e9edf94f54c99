"""Masks of transformers that leave each query an interval of keys, found by reading what they are made of.

A mask is asked for with a function of the numbers of a query and a key, put together of a few functions that
transformers has for causality, windows and chunks, and of what a model adds. Those of transformers are known by their
code, whatever numbers they were made with. A function that is not known is nothing that can be read, and such a mask is
made with its Lq x Lk numbers.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    packed_sequence_mask_function,
    prepare_padding_mask,
    remap_positions_for_packed_sequence,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

__all__ = ["packed", "padding", "reach"]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed
Reach: TypeAlias = "tuple[int | None, int | None]"

BOTH = and_masks().__code__
SLIDING = sliding_window_overlay(1).__code__
SLIDING_BOTH_WAYS = sliding_window_bidirectional_overlay(1).__code__
CHUNKED = chunked_overlay(1, None).__code__
OF_ONE_SEQUENCE = packed_sequence_mask_function(None).__code__
BY_POSITIONS = remap_positions_for_packed_sequence(None, None).__code__


def reach(function: Any, positions: int) -> Reach | None:
    """Return how many keys a query may look at before its position, and behind it; None if that is not all.

    Parameters
    ----------
    function : callable
        A mask function, of batch, head, query and key.
    positions : int
        How many positions there are, from 0 on.

    Returns
    -------
    left, right : int or None
        As the window of `fastattn.attention`.
    """
    if function is causal_mask_function:
        return None, 0
    if function is bidirectional_mask_function:
        return None, None
    code = getattr(function, "__code__", None)
    if code is BOTH:
        return _within_all([reach(part, positions) for part in _inside(function, "mask_functions")])
    if code is SLIDING:
        window = _inside(function, "sliding_window")
        return (window - 1, None) if isinstance(window, int) and window > 0 else None
    if code is SLIDING_BOTH_WAYS:
        window = _inside(function, "sliding_window")
        return (window, window) if isinstance(window, int) and window >= 0 else None
    if code is CHUNKED and positions <= _inside(function, "chunk_size"):
        return None, None  # all are in the first chunk, or are padding before it
    return None


def packed(function: Any) -> tuple[Tensor, Reach] | None:
    """Return the number of each token's sequence, and how many keys of that a query may look at before and behind it.

    Several sequences lie in one where the positions that a model is given begin anew. None if that is not all that the
    function says.
    """
    if getattr(function, "__code__", None) is not BOTH:
        return None
    parts = _inside(function, "mask_functions")
    if [getattr(part, "__code__", None) for part in parts] != [BY_POSITIONS, OF_ONE_SEQUENCE]:
        return None
    positions, numbers = _inside(parts[0], "position_ids"), _inside(parts[1], "packed_sequence_mask")
    if bool((positions < 0).any()):
        return None
    found = reach(_inside(parts[0], "mask_function"), int(positions.max()) + 1)
    return None if found is None else (numbers, found)


def _inside(function: Any, name: str) -> Any:
    """Return what a function within a function has of this name."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _within_all(reaches: list[Reach | None]) -> Reach | None:
    """Return the interval that several have in common."""
    if None in reaches:
        return None
    left, right = (min((end for end in ends if end is not None), default=None) for ends in zip(*reaches, strict=True))
    return left, right


def padding(attention_mask: Tensor | None, keys: int, offset: int) -> tuple[Tensor | None, Tensor | None]:
    """Return which keys of each row of a batch are no padding, as a mask or, if all of that is behind, as lengths.

    Parameters
    ----------
    attention_mask : torch.Tensor, shape (B, length), or None
        Not 0 where there is a token, of a whole text.
    keys, offset : int
        How many keys there are, and the number of the first of them in the text.

    Returns
    -------
    kept : torch.Tensor of bool, shape (B, 1, 1, Lk), or None
    lengths : torch.Tensor of int64, shape (B,), or None
    """
    kept = prepare_padding_mask(attention_mask, keys, offset)
    if kept is None:
        return None, None
    kept = kept[:, offset : offset + keys].bool()
    lengths = kept.sum(-1)
    if bool((kept[:, 1:] <= kept[:, :-1]).all()):
        return None, None if bool((lengths == keys).all()) else lengths
    return kept[:, None, None, :], None
