"""Masks of layers: of queries and keys, of keys alone, and of both together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastattn.call.arrays import as_array, as_masks
from fastattn.call.broadcasting import check_broadcasts
from fastattn.call.problem import Array, Mask, Shape
from fastattn.call.shapes import masks_of
from fastattn.call.types import MaskLike, NumberLike

__all__ = ["as_key_mask", "changed", "combine", "mask_of_scores"]


def mask_of_scores(attn_mask: MaskLike | None, scores: Shape) -> Mask:
    """Return what `fastattn.attention` takes as a mask, of arrays that broadcast to the shape of the scores.

    Raises
    ------
    TypeError, ValueError
        If it is not one that `fastattn.attention` takes.
    """
    if attn_mask is None:
        return None
    mask = as_masks(attn_mask)
    for one in masks_of(mask):
        if one is not None:
            check_broadcasts("attn_mask", one.shape, scores)
    return mask


def as_key_mask(key_mask: NumberLike | None, keys: Shape) -> Array | None:
    """Return an array of a mask that says which keys take part, with axes of heads and queries: (..., 1, 1, Lk).

    Parameters
    ----------
    key_mask : array_like of bool, or None
        Broadcasting to `keys`.
    keys : tuple of int
        (..., Lk)

    Raises
    ------
    TypeError
        If it is not boolean.
    ValueError
        If its shape does not broadcast.
    """
    if key_mask is None:
        return None
    mask = as_array("key_mask", key_mask)
    if mask.dtype.kind != "b":
        raise TypeError(f"key_mask: dtype {mask.dtype}; expected boolean, where True takes part")
    check_broadcasts("key_mask", mask.shape, keys)
    return np.atleast_1d(mask)[..., None, None, :]


def combine(visible: Array | None, mask: Mask) -> Mask:
    """Return a mask that hides what a boolean one hides, and what any other does."""
    bias, keep = masks_of(mask)
    if visible is not None:
        keep = visible if keep is None else keep & visible
    if bias is None or keep is None:
        return keep if bias is None else bias
    return bias, keep


def changed(mask: Mask, change: Callable[[Array], Array]) -> Mask:
    """Return what a change makes of each array of a mask."""
    if mask is None:
        return None
    bias, keep = (None if one is None else change(one) for one in masks_of(mask))
    return combine(keep, bias)
