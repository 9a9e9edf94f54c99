"""What is said of all keys of a call, said of those of a piece: masks, lengths, and where queries stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastattn.call.arrays import as_integers
from fastattn.call.blocks import Blocks, check_blocks
from fastattn.call.broadcasting import check_broadcasts
from fastattn.call.options import check_causal
from fastattn.call.problem import Array, Mask, Problem
from fastattn.call.score_options import FurtherOptions, PieceOptions, check_window, held, held_within
from fastattn.functions.masks import asked_nearer, both

__all__ = ["Whole", "of_piece"]


class Whole:
    """A call whose keys come in pieces.

    Attributes
    ----------
    query : ndarray
    keys : int or None
        How many keys there are; None where it shows at the end.
    reach : tuple of two numbers
        The first key that any query may look at, if there is one, and an end of those; it may be infinite.
    """

    def __init__(self, query: Array, keys: int | None, mask: Mask, causal: Any, options: FurtherOptions):
        self.query, self.keys = query, keys
        self.masks = mask if isinstance(mask, tuple) else (mask,)
        self.is_pair = isinstance(mask, tuple)
        self.options: dict[str, Any] = dict(options)
        self.causal, self.done = check_causal(causal), 0
        self.offset: Any = self._offset()
        if isinstance(self.offset, int):
            self._hold(self.offset)
        lengths = self.options.pop("key_lengths")
        self.lengths = None if lengths is None else held_within(as_integers("key_lengths", lengths))
        self._check_lengths()
        if self.causal == "bottom-right":  # of a pair, whose number of keys is known
            whole: Any = keys if self.lengths is None else self.lengths
            self.offset = whole - self._queries()
        self.reach = self.reach_of(0, self._queries())

    def _queries(self) -> int:
        return self.query.shape[-2] if self.query.ndim > 1 else 1

    def _offset(self) -> Any:
        given = self.options.pop("query_offset")
        if self.causal == "bottom-right":
            if given is not None:
                raise ValueError(
                    "query_offset: given together with is_causal='bottom-right', which sets it; expected None"
                )
            if self.keys is None:
                raise ValueError(
                    "is_causal: 'bottom-right' with blocks that are iterated, whose number of keys is not known; "
                    "expected a pair of arrays, or is_causal=True with query_offset=Lk - Lq"
                )
        if given is None or (isinstance(given, int) and not isinstance(given, bool)):
            return given or 0
        return held_within(as_integers("query_offset", given))

    def _hold(self, first: int) -> None:
        """Have the first position be one that 64 bits hold, and the window end where it did, which may be near."""
        left, right = check_window(self.options["window"])
        self.offset = held(first)
        if self.offset != first:
            ends = (None if left is None else held(first - left)), (None if right is None else held(first + right))
            self.options["window"] = (
                None if ends[0] is None else self.offset - ends[0],
                None if ends[1] is None else ends[1] - self.offset,
            )

    def _check_lengths(self) -> None:
        """Check what is known of the lengths so far."""
        lengths = self.lengths
        if lengths is None or not lengths.size:
            return
        most = math.inf if self.keys is None else self.keys
        if lengths.min() < 0 or lengths.max() > most:
            expected = "0 and more" if self.keys is None else f"0 to {self.keys}, the length of key"
            raise ValueError(f"key_lengths: {lengths.min()} to {lengths.max()}; expected {expected}")

    def reach_of(self, first: int, count: int) -> tuple[int, float]:
        """Return the first key that any of some queries may look at, if there is one, and an end of those."""
        left, right = check_window(self.options["window"])
        right = 0 if self.causal != "no" else right
        offset = np.asarray(self.offset) + first
        begin, end = 0, math.inf if self.keys is None else self.keys
        if offset.size and count:
            if left is not None:
                begin = max(0, int(offset.min()) - left)
            if right is not None:
                end = min(end, max(0, int(offset.max()) + count + right))
        if self.lengths is not None:
            end = min(end, int(self.lengths.max(initial=0)))
        return begin, end

    def check(self, problem: Problem) -> None:
        """Check what goes by the shape of the call, which the first block says.

        Raises
        ------
        TypeError, ValueError
            If a block mask is for another, a mask has another number of keys than a pair, or there is not one offset
            for each row of the batch.
        """
        if np.ndim(self.offset):
            check_broadcasts("query_offset", np.shape(self.offset), problem.batch, "the batch")
            self.offset = np.broadcast_to(self.offset, problem.batch)
        blocks, keys = self.options["block_mask"], self.keys
        if blocks is not None:
            if keys is None:  # which shows at the end
                keys = blocks.shape[3] if isinstance(blocks, Blocks) else 0
            check_blocks(blocks, problem.batch, problem.heads, problem.queries, keys)
        if self.keys is not None:
            self._check_keys(self.keys, exactly=True)

    def passed(self, end: int) -> None:
        """Note that all keys before a number have been read."""
        self.done = max(self.done, end)

    def check_all(self) -> None:
        """Check what goes by the number of keys, where that is known at the end alone."""
        if self.keys is None:
            self._check_keys(self.done, exactly=self.done < self.reach[1])

    def _check_keys(self, keys: int, exactly: bool) -> None:
        said = {f"attn_mask: shape {mask.shape}": _columns(mask) for mask in self.masks if mask is not None}
        blocks = self.options["block_mask"]
        if isinstance(blocks, Blocks):
            said[f"block_mask: made for {blocks.shape} rows, heads, queries and keys"] = blocks.shape[3]
        if self.lengths is not None and self.keys is None and exactly and self.lengths.max(initial=0) > keys:
            raise ValueError(f"key_lengths: {self.lengths.max()} is among them; expected 0 to {keys}, all keys")
        for what, own in said.items():
            if own is not None and (own != keys if exactly else own < keys):
                raise ValueError(f"{what}; expected {keys} keys, as all blocks have together")

    def piece(self, first: int, count: int) -> tuple[Mask, bool, dict[str, Any]]:
        """Return the mask of some keys, whether they are causal, and all other options; sinks go with the first."""
        masks = tuple(None if mask is None else _columns_of(mask, first, count) for mask in self.masks)
        options = self.of_all()
        self.options["sinks"] = None  # one score of all pieces
        return masks if self.is_pair else masks[0], self.causal != "no", options  # type: ignore[return-value]

    def of_all(self) -> dict[str, Any]:
        """Return all other options, in positions among all keys; a block mask as a function of these."""
        options = dict(self.options)
        blocks: Any = options.pop("block_mask")
        if blocks is not None:
            own = asked_nearer(blocks.function.python, *self._offsets())
            options["mask_mod"] = own if options["mask_mod"] is None else both(own, options["mask_mod"])
        options["query_offset"] = self.offset
        options["key_lengths"] = self.lengths
        return options

    def _offsets(self) -> tuple[int, Array | None]:
        """The position of query 0, one for all rows of a batch or one for each."""
        offset = np.asarray(self.offset)
        return (int(offset), None) if offset.ndim == 0 else (0, offset.reshape(-1))


def _columns(mask: Array) -> int | None:
    """How many keys a mask speaks of; None where it is the same for all."""
    return mask.shape[-1] if mask.ndim and mask.shape[-1] != 1 else None


def _columns_of(mask: Array, first: int, count: int) -> Array:
    """What a mask says of some keys."""
    if _columns(mask) is None:
        return mask
    part = mask[..., first : first + count]
    if part.shape[-1] != count:
        raise ValueError(f"attn_mask: shape {mask.shape}; expected at least {first + count} keys, as blocks have them")
    return part


def of_piece(options: Mapping[str, Any], first: Sequence[int], keys: int, drops: bool) -> PieceOptions:
    """Return what options of a whole are for a piece of it.

    Parameters
    ----------
    options : mapping
        `FurtherOptions` in the whole's positions, those of rows and heads cut to the piece's.
    first : sequence of four int
        The numbers of its first row of the batch, head, query and key.
    keys : int
        How many it has.
    drops : bool
        Whether weights are dropped.
    """
    own: Any = {**options}
    offset, lengths = own.get("query_offset"), own.get("key_lengths")
    own["query_offset"] = (0 if offset is None else offset) + (first[2] - first[3])
    if lengths is not None:
        own["key_lengths"] = np.clip(lengths - np.int64(first[3]), 0, keys)
    if drops or own.get("score_mod") is not None or own.get("mask_mod") is not None:
        # a plan is made for these numbers: without need each piece would have one of its own
        own |= zip(("first_batch", "first_head", "first_query", "first_key"), first, strict=True)
    return own  # type: ignore[no-any-return]
