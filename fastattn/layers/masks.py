"""Masks of layers: of queries and keys, of keys alone, and of both together."""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.arrays import as_array, as_mask
from fastattn.call.broadcasting import check_broadcasts
from fastattn.call.problem import Array, Shape

__all__ = ["as_key_mask", "as_lengths", "combine", "mask_of_scores", "per_head"]


def mask_of_scores(attn_mask: ArrayLike | None, scores: Shape) -> Array | None:
    """Return an array of a mask that broadcasts to the shape of the scores.

    Raises
    ------
    TypeError, ValueError
        If it is not one that `fastattn.attention` takes.
    """
    if attn_mask is None:
        return None
    mask = as_mask(attn_mask)
    check_broadcasts("attn_mask", mask.shape, scores)
    return mask


def as_key_mask(key_mask: ArrayLike | None, keys: Shape) -> Array | None:
    """Return an array of a mask that says which keys take part, and broadcasts to (..., Lk).

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
    return np.atleast_1d(mask)


def as_lengths(given: ArrayLike, batch: Shape, keys: int) -> Array:
    """Return the lengths of sources of up to so many keys as int64.

    Raises
    ------
    TypeError
        If they are no integers.
    ValueError
        If their shape does not broadcast to `batch`, or one is not in [0, keys].
    """
    lengths = as_array("key_lengths", given)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"key_lengths: dtype {lengths.dtype}; expected integers")
    check_broadcasts("key_lengths", lengths.shape, batch)
    if lengths.size and not (lengths.min() >= 0 and lengths.max() <= keys):
        raise ValueError(f"key_lengths: {lengths.min()} to {lengths.max()}; expected 0 to {keys}, the length of key")
    return lengths.astype(np.int64)


@overload
def combine(visible: Array, mask: Array | None) -> Array: ...
@overload
def combine(visible: Array | None, mask: Array | None) -> Array | None: ...
def combine(visible: Array | None, mask: Array | None) -> Array | None:
    """Return one mask of a boolean one and any other, which broadcast: what either hides is hidden."""
    if visible is None or mask is None:
        return mask if visible is None else visible
    if mask.dtype.kind == "b":
        both: Array = mask & visible
    else:
        both = np.where(visible, mask, mask.dtype.type(-np.inf))
    return both


def per_head(key_mask: Array | None) -> Array | None:
    """Give a mask of keys, (..., Lk), the axes of heads and queries: (..., 1, 1, Lk)."""
    return None if key_mask is None else key_mask[..., None, None, :]
