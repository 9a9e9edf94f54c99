"""What a call is told of keys by blocks: a function that says which are seen, and of which kind each block of it is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from fastattn.call.advice import said
from fastattn.call.problem import Array, Shape
from fastattn.functions.function import Function

__all__ = ["Blocks", "check_blocks"]


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(ABC):
    """Which keys queries may look at, by the numbers of both, whatever the positions of queries.

    Attributes
    ----------
    function : Function
        What says so of single keys.
    captured : tuple
        The values that it captures, which nobody changes.
    shape : tuple of int
        (B, H, Lq, Lk): 1 where it is the same for all rows of a batch, or for all heads.
    """

    function: Function
    captured: tuple[Any, ...]
    shape: tuple[int, int, int, int]

    @property
    @abstractmethod
    def kinds(self) -> Array:
        """Of which kind each block of 64 queries and 64 keys is, shape (B, H, blocks of queries, blocks of keys)."""


def check_blocks(given: object, batch: Shape, heads: int, queries: int, keys: int) -> Blocks:
    """Return a block mask that is for a call of this shape.

    Raises
    ------
    TypeError
        If it is none.
    ValueError
        If it was made for other lengths, or for other numbers of rows or heads.
    """
    if not isinstance(given, Blocks):
        raise TypeError(f"block_mask: {said(given)}; expected a fastattn.BlockMask, or None")
    called = (math.prod(batch), heads, queries, keys)
    fits = all(own in (1, size) for own, size in zip(given.shape[:2], called[:2], strict=True))
    if not fits or given.shape[2:] != called[2:]:
        raise ValueError(
            f"block_mask: made for {given.shape} rows, heads, queries and keys; expected {called}, those of the call, "
            "or 1 for rows or heads"
        )
    return given
