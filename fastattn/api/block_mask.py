"""`BlockMask`: which keys queries may look at, found out once and kept, for calls that skip what nobody sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.advice import said
from fastattn.call.arrays import as_array, as_integers
from fastattn.call.blocks import Blocks
from fastattn.call.score_options import MaskMod
from fastattn.call.types import IntegerLike, NumberLike
from fastattn.cpu.host.functions import look_at, seen
from fastattn.functions import masks
from fastattn.functions.function import described, rebuilt
from fastattn.functions.kinds import EMPTY

__all__ = ["BlockMask"]

Array = NDArray[Any]


class BlockMask(Blocks):
    """Which keys queries may look at: a function, and of which kind each block of 64 queries and 64 keys is.

    Made by `from_function`, `from_array` or `from_intervals`, and given to `fastattn.attention` and the others as
    ``block_mask=``. Blocks that nobody sees are skipped, and of those that all see nothing is asked. What a mask is
    made of is copied: it stays what it is.

    A mask speaks of queries and keys by their numbers in the call, from 0, as an `attn_mask` does: a query_offset does
    not move it. With ``&``, ``|`` and ``~`` masks become others.

    Attributes
    ----------
    shape : tuple of int
        (B, H, Lq, Lk), 1 where it is the same for all rows of a batch, or for all heads.
    density : float
        The share of blocks that are not empty, which are computed.
    kinds : ndarray of uint8, shape (B, H, ⌈Lq / 64⌉, ⌈Lk / 64⌉)
        0 of an empty block, 1 of a partial one, and 2 of a full one.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> causal = fastattn.BlockMask.from_function(lambda batch, head, query, key: query >= key, 256, 256)
    >>> near = fastattn.BlockMask.from_function(lambda batch, head, query, key: query - key < 64, 256, 256)
    >>> causal & near
    BlockMask(shape=(1, 1, 256, 256), density=0.438)
    >>> x = np.random.default_rng(0).standard_normal((3, 1, 2, 256, 16))
    >>> np.allclose(fastattn.attention(*x, block_mask=causal & near), fastattn.attention(*x, window=(63, 0)))
    True
    """

    @classmethod
    def from_function(
        cls,
        mask_mod: MaskMod,
        queries: int,
        keys: int,
        batch: int | None = None,
        heads: int | None = None,
        *,
        query_offset: int = 0,
    ) -> BlockMask:
        """Make a mask of a function, as `fastattn.attention` takes it as ``mask_mod=``.

        Parameters
        ----------
        mask_mod : function
            Of (batch, head, query, key), ordinary Python, which says True where the query may look at the key. Arrays
            that it captures are copied.
        queries, keys : int
            Lq and Lk.
        batch, heads : int, optional
            How many rows of a batch and heads there are. None: it is the same for all, and asked for number 0.
        query_offset : int
            The position of query 0, which the function is asked for.

        Raises
        ------
        TypeError
            If it is no Python function of four arguments, or captures what cannot be compiled.
        ValueError
            If a number is negative.
        """
        described("mask_mod", mask_mod)  # which refuses what is none
        sizes = {"queries": queries, "keys": keys, "batch": batch, "heads": heads}
        for name, size in sizes.items():
            _check_size(name, size, optional=name in ("batch", "heads"))
        if isinstance(query_offset, bool) or not isinstance(query_offset, (int, np.integer)):
            raise TypeError(f"query_offset: {said(query_offset)}; expected an int")
        kept = rebuilt("mask_mod", mask_mod, lambda name, value: _copied(value))  # type: ignore[arg-type]
        shape = (1 if batch is None else int(batch), 1 if heads is None else int(heads), int(queries), int(keys))
        return cls._of(masks.asked_further(kept, int(query_offset)), shape)

    @classmethod
    def from_array(cls, keep: NumberLike) -> BlockMask:
        """Make a mask of booleans.

        Parameters
        ----------
        keep : array_like of bool, shape (Lq, Lk), (H, Lq, Lk) or (..., H, Lq, Lk)
            True where the query may look at the key. An axis of length 1 before the last two is the same for all.

        Raises
        ------
        TypeError
            If it is of another dtype.
        ValueError
            If it has fewer than two axes.
        """
        array = as_array("keep", keep)
        if array.dtype != bool:
            raise TypeError(f"keep: dtype {array.dtype}; expected bool, True where the query may look at the key")
        if array.ndim < 2:
            raise ValueError(f"keep: shape {array.shape}; expected (..., heads, queries, keys), or fewer axes")
        rows = _with_rows_and_heads(array, 2)
        return cls._of(masks.listed(rows), rows.shape)

    @classmethod
    def from_intervals(cls, begin: IntegerLike, end: IntegerLike, keys: int) -> BlockMask:
        """Make a mask of an interval of keys for each query, from `begin` to `end`, which is not one of them.

        Parameters
        ----------
        begin, end : array_like of int, shape (Lq,), (H, Lq) or (..., H, Lq)
            They broadcast to each other. An axis of length 1 before the last is the same for all.
        keys : int
            Lk. Ends may be beyond, and begins negative.

        Raises
        ------
        TypeError
            If they are of another dtype.
        ValueError
            If they do not broadcast to each other, or have no axis.

        Examples
        --------
        Two texts in one sequence, of 3 and 5 tokens:

        >>> import fastattn
        >>> mask = fastattn.BlockMask.from_intervals([0, 0, 0, 3, 3, 3, 3, 3], [3, 3, 3, 8, 8, 8, 8, 8], 8)
        >>> mask.dense().sum()
        np.int64(34)
        """
        _check_size("keys", keys)
        ends = {
            name: as_integers(name, given, "one for each query") for name, given in (("begin", begin), ("end", end))
        }
        try:
            first, last = np.broadcast_arrays(*ends.values())
        except ValueError:
            raise ValueError(f"end: shape {ends['end'].shape}; expected one that broadcasts to {ends['begin'].shape}, "
                             "as begin") from None  # fmt: skip
        if first.ndim < 1:
            raise ValueError("begin: a single number; expected one for each query, shape (queries,)")
        first, last = (_with_rows_and_heads(array, 1).clip(0, keys).astype(np.int64) for array in (first, last))
        return cls._of(masks.within(first, last), (*first.shape, int(keys)))

    @classmethod
    def _of(cls, mask: MaskMod, shape: tuple[int, ...]) -> BlockMask:
        """Make a mask of a function that captures what nobody changes."""
        rows, heads, queries, keys = shape
        return cls(*described("mask_mod", masks.asked_for(mask, rows == 1, heads == 1)), (rows, heads, queries, keys))

    # -- masks of masks ------------------------------------------------------------------------------------------------

    def __and__(self, other: object) -> BlockMask:
        return self._with(masks.both, other)

    def __or__(self, other: object) -> BlockMask:
        return self._with(masks.either, other)

    def __invert__(self) -> BlockMask:
        return self._of(masks.all_but(self.function.python), self.shape)

    def _with(self, combine: Callable[[MaskMod, MaskMod], MaskMod], other: object) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented  # type: ignore[no-any-return]
        try:
            lead = np.broadcast_shapes(self.shape[:2], other.shape[:2])
        except ValueError:
            lead = ()
        if not lead or self.shape[2:] != other.shape[2:]:
            raise ValueError(
                f"block_mask: of shape {self.shape}, with another of {other.shape}; expected the same, or 1 for rows "
                "or heads"
            )
        return self._of(combine(self.function.python, other.function.python), (*lead, *self.shape[2:]))

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> NDArray[np.uint8]:
        """Of which kind each block is: found out when a call, or somebody else, first asks."""
        own = vars(self)
        if "_kinds" not in own:  # functools.cached_property has a lock, which a forked child may find taken
            own["_kinds"] = look_at(self.function, self.captured, self.shape)
        kinds: NDArray[np.uint8] = own["_kinds"]
        return kinds

    @property
    def density(self) -> float:
        """The share of blocks that are not empty."""
        return float((self.kinds != EMPTY).mean()) if self.kinds.size else 0.0

    def dense(self) -> NDArray[np.bool_]:
        """Return the mask as booleans of its shape, in memory that grows with both lengths."""
        return seen(self.function, self.captured, self.shape)

    def __repr__(self) -> str:
        return f"BlockMask(shape={self.shape}, density={self.density:.3g})"


def _check_size(name: str, given: object, optional: bool = False) -> None:
    if given is None and optional:
        return
    expected = "expected a non-negative int" + (", or None" if optional else "")
    if isinstance(given, (bool, np.bool_)) or not isinstance(given, (int, np.integer)):
        raise TypeError(f"{name}: {said(given)}; {expected}")
    if given < 0:
        raise ValueError(f"{name}: {given}; {expected}")


def _copied(value: Any) -> Any:
    """What nobody changes, in place of an array or a list."""
    return np.array(value) if hasattr(value, "__array__") or isinstance(value, (list, tuple)) else value


def _with_rows_and_heads(array: Array, rank: int) -> Array:
    """Return a copy with an axis of rows and one of heads before the last so many, further axes flattened into rows."""
    own = array.shape[array.ndim - rank :]
    lead = (1, 1, *array.shape[: array.ndim - rank])
    return np.array(array).reshape(math.prod(lead[:-1]), lead[-1], *own)
