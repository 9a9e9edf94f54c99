"""What a user may say of scores, checked: causality, scale, softcap, window, offset, lengths, slopes and sinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypedDict

import numpy as np

from fastattn.call.advice import said, to_convert
from fastattn.call.arrays import as_array, as_integers
from fastattn.call.blocks import Blocks, check_blocks
from fastattn.call.broadcasting import check_broadcasts
from fastattn.call.halves import cast, is_bfloat16
from fastattn.call.options import check_causal, check_scale, finite_real
from fastattn.call.problem import FLOAT64, Array, Captures, Shape
from fastattn.call.scores import FARTHEST, Scores
from fastattn.call.types import Causal, IntegerLike, Number, NumberLike
from fastattn.functions.function import Function, described
from fastattn.functions.masks import asked_nearer, both

__all__ = [
    "FurtherOptions",
    "PackedOptions",
    "PieceOptions",
    "RowOptions",
    "ScoreOptions",
    "check_names",
    "check_window",
    "held_within",
    "scores_from",
]


#: A function of (score, batch, head, query, key), and one of (batch, head, query, key) that says which keys are seen.
ScoreMod: TypeAlias = Callable[[Any, Any, Any, Any, Any], Any]
MaskMod: TypeAlias = Callable[[Any, Any, Any, Any], Any]


class PackedOptions(TypedDict, total=False):
    """What a user may say of the scores of several sequences by keyword alone."""

    window: tuple[int | None, int | None] | None
    query_offset: IntegerLike | None
    softcap: Number | None
    alibi_slopes: NumberLike | None
    sinks: NumberLike | None
    score_mod: ScoreMod | None
    mask_mod: MaskMod | None


class RowOptions(PackedOptions, total=False):
    """And of rows whose lengths are known."""

    block_mask: Blocks | None


class FurtherOptions(RowOptions, total=False):
    """What a user may say of scores by keyword alone."""

    key_lengths: IntegerLike | None


class PieceOptions(FurtherOptions, total=False):
    """And what the package itself says of a call that is a piece of another."""

    first_batch: int  # the number of its first row of the batch there
    first_head: int
    first_query: int  # positions are said by query_offset, which counts from the first key of the piece
    first_key: int


class ScoreOptions(PieceOptions, total=False):
    """What a user may say of scores, besides masks, by the names of arguments."""

    is_causal: Causal
    scale: Number | None


def scores_from(
    options: ScoreOptions, batch: Shape, heads: int, queries: int, keys: int, head_dim: int, bias: bool, keep: bool
) -> tuple[Scores, Array | None, Captures | None]:
    """Return what was asked of scores, checked, what heads have of their own, and what functions capture.

    Parameters
    ----------
    options : ScoreOptions
        As the user gave them.
    batch : tuple of int
        The axes before the head axis.
    heads, queries, keys, head_dim : int
    bias, keep : bool
        Which masks there are.

    Returns
    -------
    scores : Scores
    own : ndarray of `fastattn.call.scores.HEAD`, shape (B · heads,), or None
        For each query head of each row of the batch, its axes flattened.
    captured : Captures or None

    Raises
    ------
    TypeError, ValueError
        If an option is of a kind that has no meaning here, or out of its range. The message names it.
    """
    causal = check_causal(options.get("is_causal", False))
    scale = check_scale(options.get("scale"))
    left, right = check_window(options.get("window"))
    lengths = _as_lengths(options.get("key_lengths"), batch, keys)
    shift = options.get("first_query", 0) - options.get("first_key", 0)  # positions are held in those of the whole
    offset, offsets = _as_offset(options.get("query_offset"), batch, shift)
    slopes = _as_slopes(options.get("alibi_slopes"), batch, heads)
    sinks = _as_sinks(options.get("sinks"), batch, heads)
    if causal == "bottom-right":
        if options.get("query_offset") is not None:
            raise ValueError("query_offset: given together with is_causal='bottom-right', which sets it; expected None")
        offset, offsets = (keys - queries, None) if lengths is None else (0, lengths - queries)
    if causal != "no":
        right = 0
    first, offset = offset, held(offset - shift) + shift
    left = None if left is None else offset - held(first - left)
    right = None if right is None else held(first + right) - offset
    blocks = options.get("block_mask")
    if blocks is not None:
        blocks = check_blocks(blocks, batch, heads, queries, keys)
    (score_mod, mask_mod), captured = functions_in(options, blocks, offset, offsets)
    if left is None and right is None and slopes is None and captured is None:  # nothing depends on positions
        offset, offsets = 0, None
    given = {"offset": offsets, "keys": lengths, "slope": slopes, "sink": sinks}
    own = {name: numbers for name, numbers in given.items() if numbers is not None}
    scores = Scores(
        scale=(1.0 / math.sqrt(head_dim) if head_dim else 1.0) if scale is None else scale,
        softcap=check_softcap(options.get("softcap")),
        bias=bias,
        keep=keep,
        left=left,
        right=right,
        offset=offset,
        own=tuple(own),
        score_mod=score_mod,
        mask_mod=mask_mod,
        first_batch=options.get("first_batch", 0),
        first_head=options.get("first_head", 0),
        first_query=options.get("first_query", 0),
        first_key=options.get("first_key", 0),
    )
    if not own:
        return scores, None, captured
    table = np.tile(scores.head(keys), (math.prod(batch), heads))
    for name, numbers in own.items():
        table[name] = numbers
    return scores, table.reshape(-1), captured


def functions_in(
    options: ScoreOptions, blocks: Blocks | None, offset: int, offsets: Array | None
) -> tuple[tuple[Function | None, Function | None], Captures | None]:
    """Return the user's functions, described, and what they capture, if there are any.

    Of a function and a block mask, which speaks of the numbers of queries, one function is made of positions.

    Raises
    ------
    TypeError
        If one is no Python function of the right arguments, or captures what has no meaning in compiled code.
    """
    score, seen = options.get("score_mod"), options.get("mask_mod")
    if score is None and seen is None and blocks is None:
        return (None, None), None
    score_mod, of_score = (None, ()) if score is None else described("score_mod", score)
    mask_mod, of_seen = (None, ()) if seen is None else described("mask_mod", seen)
    if blocks is None:
        return (score_mod, mask_mod), Captures(of_score, of_seen)
    own: Any = asked_nearer(blocks.function.python, offset, None if offsets is None else offsets[:, 0])
    if mask_mod is not None:
        mask_mod, of_seen = described("mask_mod", both(own, mask_mod.python))
        return (score_mod, mask_mod), Captures(of_score, of_seen)
    if own is blocks.function.python:
        return (score_mod, blocks.function), Captures(of_score, blocks.captured, blocks)
    mask_mod, of_seen = described("mask_mod", own)
    return (score_mod, mask_mod), Captures(of_score, of_seen, blocks)


def check_names(options: Mapping[str, object]) -> None:
    """Refuse options by keyword that do not exist.

    Raises
    ------
    TypeError
        With the name of one.
    """
    for name in options:
        if name not in PieceOptions.__annotations__:
            raise TypeError(f"{name}: no such option; expected one of {', '.join(FurtherOptions.__annotations__)}")


def check_softcap(given: object) -> float | None:
    """Return the softcap as a float, None where there is none.

    Raises
    ------
    TypeError
        If it is not a real number.
    ValueError
        If it is not finite, or not above 0.
    """
    if given is None:
        return None
    return finite_real("softcap", given, "expected a finite real number above 0, or None", above=0.0)


def check_window(given: object) -> tuple[int | None, int | None]:
    """Return how many keys a query may look at before its position, and behind it.

    Raises
    ------
    TypeError
        If it is not a pair, or has something else than whole numbers and None in it.
    ValueError
        If it has more or fewer than two elements, or a negative one.
    """
    if given is None:
        return None, None
    expected = "expected (left, right), each a non-negative int or None, or None for no window"
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"window: {said(given)}; {expected}")
    if len(given) != 2:
        raise ValueError(f"window: {said(given)}; {expected}")
    for reach in given:
        if reach is not None and (isinstance(reach, (bool, np.bool_)) or not isinstance(reach, (int, np.integer))):
            raise TypeError(f"window: {said(given)}; {expected}")
        if reach is not None and reach < 0:
            raise ValueError(f"window: {said(given)}; {expected}")
    left, right = (None if reach is None else int(reach) for reach in given)
    return left, right


def held(position: int) -> int:
    """Return a position, or the farthest one on its side."""
    return min(max(position, -FARTHEST), FARTHEST)


def _as_lengths(given: IntegerLike | None, batch: Shape, keys: int) -> Array | None:
    """Return the number of keys of each row of a batch."""
    if given is None:
        return None
    lengths = as_integers("key_lengths", given)
    check_broadcasts("key_lengths", lengths.shape, batch, "the batch")
    if lengths.size and not (lengths.min() >= 0 and lengths.max() <= keys):
        raise ValueError(f"key_lengths: {lengths.min()} to {lengths.max()}; expected 0 to {keys}, the length of key")
    return _of_rows(lengths, batch)


def _as_offset(given: IntegerLike | None, batch: Shape, shift: int) -> tuple[int, Array | None]:
    """Return the position of query 0: one for all rows of a batch, or one for each, held within 64 bits."""
    if given is None:
        return 0, None
    if isinstance(given, int) and not isinstance(given, bool):
        return given, None
    offsets = as_integers("query_offset", given)
    check_broadcasts("query_offset", offsets.shape, batch, "the batch")
    if offsets.ndim == 0:
        return int(offsets), None
    return 0, _of_rows(held_within(offsets, shift), batch)


def _as_slopes(given: NumberLike | None, batch: Shape, heads: int) -> Array | None:
    """Return the slope of each head of each row of a batch."""
    if given is None:
        return None
    slopes = _of_heads("alibi_slopes", given, batch, heads)
    if not np.isfinite(slopes).all():
        raise ValueError(f"alibi_slopes: {slopes[~np.isfinite(slopes)][0]} is among them; expected finite numbers")
    return slopes


def _as_sinks(given: NumberLike | None, batch: Shape, heads: int) -> Array | None:
    """Return the sink of each head of each row of a batch; +inf as NaN, which a score of +inf makes of its row."""
    if given is None:
        return None
    sinks = _of_heads("sinks", given, batch, heads)
    return np.where(sinks == np.inf, np.nan, sinks)


def _of_heads(name: str, given: NumberLike, batch: Shape, heads: int) -> Array:
    """Return an array with a real number for each head of each row of a batch, its axes flattened to two."""
    numbers = as_array(name, given)
    if not (numbers.dtype.kind in "fiu" or is_bfloat16(numbers.dtype)) or numbers.dtype.itemsize > 8:
        narrow = to_convert(name, numbers.dtype, given) if numbers.dtype.kind == "V" else ""
        raise TypeError(f"{name}: dtype {numbers.dtype}; expected real numbers, one for each query head{narrow}")
    check_broadcasts(name, numbers.shape, (*batch, heads), "the query heads")
    return np.broadcast_to(cast(numbers, FLOAT64), (*batch, heads)).reshape(math.prod(batch), heads)


def held_within(integers: Array, shift: int = 0) -> Array:
    """Return integers of 64 bits, none farther than the farthest position, counted from a shifted one."""
    if integers.dtype == np.uint64:
        integers = np.minimum(integers, np.uint64(2 * FARTHEST))
    return integers.astype(np.int64).clip(shift - FARTHEST, shift + FARTHEST)


def _of_rows(integers: Array, batch: Shape) -> Array:
    """Return an array with a number for each row of a batch, as a column."""
    return np.broadcast_to(integers, batch).reshape(-1, 1).astype(np.int64)
