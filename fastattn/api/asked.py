"""What a call is known by: a call like an earlier one finds its plan, and nothing is checked or planned again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

__all__ = ["are_same", "key_of", "masks_in"]


def key_of(signature: Hashable, threads: int, window: Any, offset: Any, *options: Any) -> Hashable | None:
    """Return a key for calls with arrays of a signature, and options, just as they were given; None if there is none.

    Their types are a part of it: True is 1 to a dictionary, and not to us.
    """
    if not signature or not (offset is None or type(offset) is int):
        return None
    kinds = tuple(map(type, options))
    if window is None:
        return signature, threads, offset, options, kinds
    if type(window) is not tuple:
        return None
    return signature, threads, offset, options, kinds, window, tuple(map(type, window))


def masks_in(attn_mask: Any) -> tuple[Any, Any]:
    """Return the two elements of a pair, or what is no pair and None."""
    return attn_mask if type(attn_mask) is tuple and len(attn_mask) == 2 else (attn_mask, None)


def are_same(arrays: Iterable[Any], others: Iterable[Any]) -> bool:
    """Whether arrays are those that were given, one by one: nothing had to be converted."""
    return all(array is other for array, other in zip(arrays, others, strict=True))
