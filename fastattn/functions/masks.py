"""Functions that say which keys are seen, made of others: ordinary Python, compiled like a user's own.

Each takes and returns functions of (batch, head, query, key).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = [
    "all_but",
    "asked_for",
    "asked_further",
    "asked_nearer",
    "both",
    "either",
    "everything",
    "in_blocks",
    "listed",
    "within",
]

MaskMod: TypeAlias = Callable[[Any, Any, Any, Any], Any]


def everything(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Every key is seen."""
    return True


def both(first: MaskMod, second: MaskMod) -> MaskMod:
    """What two functions say yes to; where the first says no the second is not asked."""

    def seen_by_both(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return second(batch, head, query, key) if first(batch, head, query, key) else False

    return seen_by_both


def either(first: MaskMod, second: MaskMod) -> MaskMod:
    """What one of two functions says yes to; where the first does the second is not asked."""

    def seen_by_either(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return True if first(batch, head, query, key) else second(batch, head, query, key)

    return seen_by_either


def all_but(mask: MaskMod) -> MaskMod:
    """What a function says no to."""

    def not_seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return not mask(batch, head, query, key)

    return not_seen


def listed(keep: Any) -> MaskMod:
    """What an array of booleans says yes to, shape (B, H, Lq, Lk)."""

    def is_listed(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return keep[batch, head, query, key]

    return is_listed


def within(begin: Any, end: Any) -> MaskMod:
    """The keys of an interval for each query, of which arrays of shape (B, H, Lq) have the first and the end."""

    def is_within(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key >= begin[batch, head, query]) & (key < end[batch, head, query])

    return is_within


def in_blocks(kinds: Any, queries: int, keys: int, mask: MaskMod) -> MaskMod:
    """What a function says yes to in blocks of so many queries and keys that are of kind 1, and all in those of kind 2.

    `kinds` are integers of shape (B, H, blocks of queries, blocks of keys), 0 where nothing is seen.
    """

    def seen_in_block(batch: Any, head: Any, query: Any, key: Any) -> Any:
        kind = kinds[batch, head, query // queries, key // keys]
        return mask(batch, head, query, key) if kind == 1 else kind == 2

    return seen_in_block


def asked_for(mask: MaskMod, rows: bool, heads: bool) -> MaskMod:
    """The same for all rows of the batch, all heads, or both: what a function says of the first."""

    def first_of_both(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask(0, 0, query, key)

    def first_row(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask(0, head, query, key)

    def first_head(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask(batch, 0, query, key)

    return (first_of_both if heads else first_row) if rows else (first_head if heads else mask)


def asked_further(mask: MaskMod, offset: Any) -> MaskMod:
    """What a function of positions says of the numbers of queries."""
    if offset == 0:
        return mask

    def at_position(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask(batch, head, query + offset, key)

    return at_position


def asked_nearer(mask: MaskMod, offset: int, offsets: Any = None) -> MaskMod:
    """What a function of the numbers of queries says of their positions, one offset for all or one for each row."""

    def of_number(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask(batch, head, query - offset, key)

    def of_number_in_row(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask(batch, head, query - offsets[batch], key)

    if offsets is not None:
        return of_number_in_row
    return of_number if offset else mask
