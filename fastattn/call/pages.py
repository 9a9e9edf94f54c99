"""Keys and values in pages: which pages the keys of each row of a batch lie in, and a call on them described."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.arrays import as_array, as_integers, as_masks, as_plain, check_operand
from fastattn.call.blocks import Blocks
from fastattn.call.halves import common_dtype, is_floating, native
from fastattn.call.problem import FLOAT32, Array, Mask, Operands, Problem, Shape
from fastattn.call.score_options import PieceOptions
from fastattn.call.shapes import describe, masks_of
from fastattn.call.types import Causal, MaskLike, Number

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PACKED", "PADDED", "Pages", "as_pages", "as_query", "describe_paged", "refuse_masks", "room_for"]

#: Calls with fewer keys than this are planned as if they had so many: plans are for powers of two.
FEW_KEYS = 256
#: The axes of queries, and of results: rows of a batch, or packed sequences.
PADDED, PACKED = "(rows, length, heads, features)", "(all lengths together, heads, features)"
TABLE_DTYPES = (np.dtype(np.int32), np.dtype(np.int64))


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys and values in pages, checked.

    Attributes
    ----------
    key : ndarray, shape (n, page, Hk, D)
        Of any strides, as is `value`.
    value : ndarray, shape (n, page, Hk, Dv)
    table : ndarray of int32 or int64, shape (B, pages of a row)
        The numbers of each row's pages, in the order of its keys. What lies behind its last key means nothing.
    lengths : ndarray of int64, shape (B,)
        How many keys each row has.
    """

    key: Array
    value: Array
    table: Array
    lengths: Array

    @property
    def page(self) -> int:
        """Keys in a page."""
        return int(self.key.shape[1])

    @property
    def longest(self) -> int:
        """The keys of the row that has the most."""
        return max(self.lengths.tolist(), default=0)  # for one row, or some, faster than NumPy's

    def row(self, number: int) -> Pages:
        """Return a row of the batch, as a batch of its own."""
        rows = slice(number, number + 1)
        return replace(self, table=self.table[rows], lengths=self.lengths[rows])

    def operand(self, array: Array, problem: Problem) -> Array:
        """Return a view of one page of keys or values, with the axes of an operand, (*batch, Hk, G, page, features)."""
        one = array[0] if len(array) else np.zeros(array.shape[1:], array.dtype)
        split = one.swapaxes(0, 1)[:, None]
        return np.broadcast_to(split, (*problem.rows_shape, *split.shape[-2:]))

    def gathered(self, array: Array, keys: int) -> Array:
        """Return a copy of the keys or the values of all rows, (B, Hk, keys, features): 0 behind the last of a row."""
        rows = np.zeros((len(self.lengths), keys, *array.shape[2:]), array.dtype)
        for row, table, length in zip(rows, self.table, self.lengths.tolist(), strict=True):
            used = array[table[: -(-length // self.page)]]
            row[:length] = used.reshape(len(used) * self.page, *array.shape[2:])[:length]
        return rows.swapaxes(1, 2)


def as_pages(key_pages: ArrayLike, value_pages: ArrayLike, page_table: ArrayLike, key_lengths: ArrayLike) -> Pages:
    """Make a description of what the user gave.

    Raises
    ------
    TypeError
        If something is no array, or of a dtype that has no meaning there.
    ValueError
        If shapes do not go together, a length is out of range, or the number of a page that is needed. The message
        names the argument.
    """
    key, value = _as_pages("key_pages", key_pages), _as_pages("value_pages", value_pages)
    if value.dtype != key.dtype:
        raise TypeError(f"value_pages: dtype {value.dtype}; expected {key.dtype}, as key_pages has")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value_pages: shape {value.shape}; expected {key.shape[:3]} on the first three axes, as key_pages of "
            f"shape {key.shape}"
        )
    table = _as_integers("page_table", page_table, "the numbers of pages", 2)
    if table.dtype not in TABLE_DTYPES or not table.flags.aligned:
        table = table.astype(np.int64)
    lengths = _as_integers("key_lengths", key_lengths, "one for each row", 1)
    if len(lengths) != len(table):
        raise ValueError(
            f"key_lengths: shape {lengths.shape}; expected {(len(table),)}, one for each row of page_table"
        )
    check_numbers(key.shape, table, lengths)
    return Pages(key, value, table, lengths.astype(np.int64, copy=False))


def check_numbers(shape: Shape, table: Array, lengths: Array) -> None:
    """Check that all pages exist that rows of such lengths need, where all of them have a shape.

    Raises
    ------
    ValueError
        With a row that has too many keys, or needs a page that does not exist.
    """
    if not lengths.size:
        return
    (count, page), least, most = shape[:2], int(lengths.min()), int(lengths.max())
    if least < 0 or most > table.shape[1] * page:
        raise ValueError(
            f"key_lengths: {least} to {most}; expected 0 to {table.shape[1] * page}, the keys of {table.shape[1]} "
            f"pages of {page}"
        )
    used = table[:, : -(-most // page)]
    if not used.size or (used.min() >= 0 and used.max() < count):
        return
    needed = np.arange(used.shape[1]) * page < lengths[:, None]
    wrong = np.argwhere(((used < 0) | (used >= count)) & needed)
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"page_table: {used[row, column]} in row {row} at {column}, of which {lengths[row]} keys need "
            f"{-(-int(lengths[row]) // page)} pages; expected a number from 0 to {count - 1}"
        )


def as_query(query: ArrayLike, pages: Pages, axes: str) -> Array:
    """Return an array of the queries, of the dtype of the pages, or of float32 where that is half precision.

    `axes`: what the axes are, the last three of which are length, heads and features.

    Raises
    ------
    TypeError, ValueError
        If they do not go together with the pages.
    """
    array = as_array("query", query)
    check_operand("query", array, query)
    kind = pages.key.dtype
    dtype = native(common_dtype(array, kind))
    if dtype != kind and not (dtype == FLOAT32 and kind.itemsize == 2):
        raise TypeError(f"query: dtype {array.dtype}; expected {kind}, as key_pages has, which is not converted")
    if array.ndim != axes.count(",") + 1:
        raise ValueError(f"query: shape {array.shape}; expected {axes}")
    *_, heads, features = array.shape
    kv_heads = pages.key.shape[2]
    if features != pages.key.shape[3]:
        raise ValueError(
            f"query: shape {array.shape}; expected {pages.key.shape[3]} features on the last axis, as key_pages of "
            f"shape {pages.key.shape}"
        )
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"query: shape {array.shape} has {heads} heads; expected a multiple of {kv_heads}, those of key_pages of "
            f"shape {pages.key.shape}"
        )
    return as_plain(array, dtype)


def describe_paged(
    query: Array,
    pages: Pages,
    attn_mask: MaskLike | None = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    **options: Unpack[PieceOptions],
) -> tuple[Problem, Operands]:
    """Work out what a call computes on keys in pages.

    Parameters
    ----------
    query : ndarray, shape (B, Hq, Lq, D)
        Heads first, as `fastattn.attention` has them.
    pages : Pages
    attn_mask, dropout_p, is_causal, scale, **options
        As the user gave them. A mask is of as many keys as the longest row has, or more.

    Returns
    -------
    problem : Problem
        With room for more keys than there are, so that calls of about the same lengths are alike.
    operands : Operands
        Keys and values are one page of them.

    Raises
    ------
    ValueError, TypeError
        As `fastattn.call.shapes.describe`.
    """
    if len(query) != len(pages.table):
        raise ValueError(f"page_table: {len(pages.table)} rows; expected {len(query)}, one for each row of query")
    mask = None if attn_mask is None else as_masks(attn_mask)
    keys = _keys_of_call(pages.longest, mask, options.get("block_mask"))
    heads = pages.key.shape[2]
    nothing = np.zeros((), query.dtype)
    key, value = (np.broadcast_to(nothing, (heads, keys, array.shape[3])) for array in (pages.key, pages.value))
    options["key_lengths"] = pages.lengths
    problem, operands = describe(query, key, value, mask, dropout_p, is_causal, scale, True, **options)
    key, value = pages.operand(pages.key, problem), pages.operand(pages.value, problem)
    return problem, operands._replace(key=key, value=value)


def refuse_masks(**given: object) -> None:
    """Refuse what has rows of queries and keys where queries are packed.

    Raises
    ------
    ValueError
        With the name of it.
    """
    for name, mask in given.items():
        if mask is not None:
            raise ValueError(
                f"{name}: given together with cu_seqlens_q; expected None: packed queries have no such rows"
            )


def _keys_of_call(longest: int, mask: Mask, blocks: Any) -> int:
    """Return the length of the key axis: what masks have, or else a power of two with room for the longest row."""
    masks = [each.shape for each in masks_of(mask) if each is not None]
    shapes = [("attn_mask", shape) for shape in masks if shape and shape[-1] != 1]  # others are broadcast
    if isinstance(blocks, Blocks):
        shapes.append(("block_mask", blocks.shape))
    for name, shape in shapes:
        if shape[-1] < longest:
            raise ValueError(f"{name}: shape {shape}; expected at least {longest} keys, the largest of key_lengths")
    return int(shapes[0][1][-1]) if shapes else room_for(longest)


def room_for(longest: int) -> int:
    """Return how many keys a call is planned for of which the longest row has so many: for many calls the same."""
    return max(FEW_KEYS, 1 << (longest - 1).bit_length())


def _as_pages(name: str, given: ArrayLike) -> Array:
    array = as_array(name, given)
    check_operand(name, array, given)
    if not is_floating(array.dtype):
        raise TypeError(f"{name}: dtype {array.dtype}; expected a floating one: pages are not converted")
    if array.ndim != 4 or not array.shape[1]:
        raise ValueError(f"{name}: shape {array.shape}; expected (pages, keys of a page, heads, features)")
    return as_plain(array, native(array.dtype))


def _as_integers(name: str, given: ArrayLike, what: str, rank: int) -> Array:
    """Return an array of integers of so many axes."""
    array = as_integers(name, given, what)
    if array.ndim != rank:
        expected = "(rows, pages of a row)" if rank == 2 else "(rows,)"
        raise ValueError(f"{name}: shape {array.shape}; expected {expected}")
    return array
