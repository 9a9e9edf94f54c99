"""Part of the weights: which rows and columns are meant, and the smaller call that gives just these.

A chosen row keeps its position. A smaller call whose queries or keys do not follow each other therefore has no interval
of keys for each query: what that says is written into a mask, of the size of the part asked for.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.call.advice import holds_masked, is_masked, to_convert
from fastattn.call.arrays import as_operands, as_plain
from fastattn.call.broadcasting import once
from fastattn.call.halves import is_floating
from fastattn.call.problem import Operands, Problem
from fastattn.call.score_options import FurtherOptions
from fastattn.call.scores import FARTHEST, Places, Scores
from fastattn.call.shapes import describe
from fastattn.call.types import Causal, Chosen, MaskLike, Number

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Choice",
    "Selection",
    "as_selection",
    "check_lse",
    "check_top_k",
    "describe_scores",
    "follow",
    "in_intervals",
    "last_key",
    "mask_elements",
    "part",
    "piece",
    "places_of",
    "positions",
    "runs",
    "take",
]

Array: TypeAlias = NDArray[Any]
#: What a user may give for rows or columns.
Choice: TypeAlias = SupportsIndex | slice | Chosen | None
#: What that means: a range, which needs no copy of what it chooses, or non-negative indices in any order.
Selection: TypeAlias = "range | NDArray[np.intp]"


def describe_scores(
    query: ArrayLike,
    key: ArrayLike,
    attn_mask: MaskLike | None,
    is_causal: Causal,
    scale: Number | None,
    enable_gqa: bool,
    **options: Unpack[FurtherOptions],
) -> tuple[Problem, Operands]:
    """Work out a call that has no values; the keys stand for them, so that it is split as if they were as wide.

    Raises
    ------
    ValueError, TypeError
        As `fastattn.call.shapes.describe`.
    """
    query, key, _, mask = as_operands(query, key, key, attn_mask)
    if query.ndim > 3 and key.ndim > 3:
        try:
            np.broadcast_shapes(query.shape[:-3], key.shape[:-3])
        except ValueError:
            raise ValueError(
                f"query, key: shapes {query.shape}, {key.shape}; expected the axes on the left of the head axis, "
                f"{query.shape[:-3]}, {key.shape[:-3]}, to broadcast"
            ) from None
    return describe(query, key, key, mask, 0.0, is_causal, scale, enable_gqa, **options)


def as_selection(name: str, given: Choice, length: int) -> Selection:
    """Return which of `length` rows or columns are meant.

    Parameters
    ----------
    name : str
        "rows" or "columns".
    given : None, int, slice or array_like
        None is all. An array has one axis, of integers, negative ones counted from the end, or of `length` booleans.
    length : int

    Returns
    -------
    range or ndarray of intp

    Raises
    ------
    TypeError
        If it is something else.
    ValueError
        If an index is out of range, or an array has another shape.
    """
    expected = "expected None, an int, a slice or an array of indices with one axis"
    if given is None:
        return range(length)
    if isinstance(given, slice):
        try:
            return range(length)[given]
        except TypeError as error:
            raise TypeError(f"{name}: {given}; expected a slice of whole numbers") from error
        except ValueError as error:
            raise ValueError(f"{name}: {given}; expected a slice with a step other than 0") from error
    if isinstance(given, (bool, np.bool_, str, bytes)):
        raise TypeError(f"{name}: {given!r} of type {type(given).__name__}; {expected}")
    if hasattr(given, "__index__") and not isinstance(given, np.ndarray):
        first = operator.index(cast(SupportsIndex, given))
        if not -length <= first < length:
            raise ValueError(f"{name}: {first}; expected an index from {-length} to {length - 1}")
        return range(first % length, first % length + 1)
    try:
        array = np.asarray(given)
    except Exception as error:
        raise TypeError(f"{name}: of type {type(given).__name__}, which cannot be made an array; {expected}") from error
    if array.size == 0 and not isinstance(given, np.ndarray):
        array = array.astype(np.intp)  # an empty list has no integers to tell its type by
    if is_masked(given) or holds_masked(given) or array.dtype.kind not in "biu":
        raise TypeError(f"{name}: an array of dtype {array.dtype} and type {type(given).__name__}; {expected}")
    if array.ndim == 0 and array.dtype.kind != "b":
        return as_selection(name, int(array), length)
    if array.ndim != 1:
        raise ValueError(f"{name}: an array of shape {array.shape}; {expected}")
    if array.dtype.kind == "b":
        if array.size != length:
            raise ValueError(f"{name}: {array.size} booleans; expected {length}, one for each of the {name}")
        return _indices(np.flatnonzero(array))
    outside = array[(array >= length) | (array < -length)]
    if outside.size:
        raise ValueError(f"{name}: {outside[0]} is among them; expected indices from {-length} to {length - 1}")
    array = array.astype(np.intp)
    return _indices(np.where(array < 0, array + length, array))


def _indices(indices: NDArray[np.intp]) -> Selection:
    """Return a range where indices follow each other."""
    if indices.size and (np.diff(indices) == 1).all():
        return range(int(indices[0]), int(indices[-1]) + 1)
    return indices


def check_top_k(given: object) -> int:
    """Return how many weights of a query are wanted.

    Raises
    ------
    TypeError
        If it is not a whole number.
    ValueError
        If it is negative.
    """
    if isinstance(given, (bool, np.bool_)) or not isinstance(given, (int, np.integer)):
        raise TypeError(f"top_k: {given!r} of type {type(given).__name__}; expected a non-negative int")
    if given < 0:
        raise ValueError(f"top_k: {given}; expected a non-negative int")
    return int(given)


def check_lse(given: ArrayLike, problem: Problem) -> Array:
    """Return the log-sum-exps of all queries, in the dtype of the call.

    Raises
    ------
    TypeError
        If they are no real floating numbers.
    ValueError
        If their shape is another than that of the queries.
    """
    try:
        lse = np.asarray(given)
    except Exception as error:
        raise TypeError(f"lse: of type {type(given).__name__}; expected an array of floating dtype") from error
    if is_masked(given) or holds_masked(given) or not is_floating(lse.dtype):
        narrow = to_convert("lse", lse.dtype, given) if lse.dtype.isbuiltin == 2 else ""
        raise TypeError(
            f"lse: type {type(given).__name__}, dtype {lse.dtype}; expected an array of floating dtype{narrow}"
        )
    if lse.shape != problem.lse_shape:
        raise ValueError(f"lse: shape {lse.shape}; expected {problem.lse_shape}, one for each query")
    return as_plain(lse, problem.real)


def take(array: Array, axis: int, chosen: Selection) -> Array:
    """Return what is chosen of an axis, counted from the end: a view for a range, and no copy of a broadcast axis."""
    if isinstance(chosen, range):
        stop = chosen.stop if chosen.stop >= 0 else None
        places: Any = slice(chosen.start, stop, chosen.step) if len(chosen) else slice(0, 0)
        return array[(..., places, *[slice(None)] * (-axis - 1))]
    shape = list(array.shape)
    shape[axis] = len(chosen)
    core = once(array)
    if core.shape[axis] == array.shape[axis]:
        core = np.take(core, chosen, axis)
    return np.broadcast_to(core, shape)


def part(problem: Problem, operands: Operands, rows: Selection, columns: Selection) -> tuple[Problem, Operands]:
    """Return the smaller call whose scores are those of the chosen rows and columns.

    Where these follow each other so do their positions. Elsewhere what depends on positions becomes masks; a user's
    functions do not, and want parts that follow each other (`runs`).
    """
    query, key = take(operands.query, -2, rows), take(operands.key, -2, columns)
    bias, keep = (
        None if mask is None else take(take(mask, -2, rows), -1, columns) for mask in (operands.bias, operands.keep)
    )
    scores, heads = problem.scores, operands.heads
    if scores.placed:
        if follow(rows) and follow(columns):
            first = _first(columns)
            shift = _first(rows) - first
            scores = replace(scores, offset=scores.offset + shift, first_key=scores.first_key + first)
            if heads is not None:
                heads = heads.copy()
                heads["offset"] += shift
                heads["keys"] = (heads["keys"] - first).clip(0, len(columns))
        else:
            assert not scores.has_functions
            shape = (*problem.rows_shape, len(rows), len(columns))
            visible = in_intervals(problem, operands, rows, columns)
            keep = np.broadcast_to(visible if keep is None else once(keep) & visible, shape)
            if scores.adds:
                added = None if bias is None else once(bias)
                with np.errstate(all="ignore"):
                    places = places_of(problem, operands, rows, columns)
                    added = scores.value(np.zeros(1, problem.real), added, problem.real, places)
                bias = np.broadcast_to(added, shape)
            kept = Scores(scores.scale, scores.softcap, bias=scores.adds, keep=True)
            scores, heads = _with_sinks(kept, heads, len(columns))
    elif heads is not None:
        scores, heads = _with_sinks(scores, heads, len(columns))
    smaller = replace(
        problem,
        queries=len(rows),
        keys=len(columns),
        out_shape=(*problem.out_shape[:-2], len(rows), problem.value_dim),
        scores=scores,
    )
    return smaller, Operands(query, key, key, bias, keep, heads, operands.captured)


def _with_sinks(scores: Scores, heads: Array | None, keys: int) -> tuple[Scores, Array | None]:
    """Return scores that depend on no position, and of what heads have of their own the sinks, if they have any."""
    if heads is None or np.isneginf(heads["sink"]).all():
        return replace(scores, own=()), None
    own = scores.head(keys).repeat(len(heads))
    own["sink"] = heads["sink"]
    return replace(scores, own=("sink",)), own


def in_intervals(problem: Problem, operands: Operands, rows: Selection, columns: Selection) -> NDArray[np.bool_]:
    """Say which keys lie in the intervals of which queries, with the axes of a mask, of which some are 1."""

    query, key, head = places_of(problem, operands, rows, columns)
    offset, keys = problem.scores.offset, problem.keys
    if head is not None:  # those of a row of the batch are the same for its heads
        head = head[..., :1, :1, :, :]
        offset, keys = head["offset"], head["keys"]
    visible: NDArray[np.bool_] = problem.scores.sees(query, key, keys, offset)
    return visible


def places_of(problem: Problem, operands: Operands, rows: Selection, columns: Selection) -> Places:
    """Return where the scores of chosen rows and columns stand."""
    own = operands.heads
    head = None if own is None else own.reshape(*problem.rows_shape, 1, 1)
    return Places(positions(rows)[:, None], positions(columns), head)


def mask_elements(problem: Problem, operands: Operands, rows: Selection) -> int:
    """Return of how many elements a row of the masks is, at most, that `part` makes or copies; 0 if it makes none."""
    masks = [mask for mask in (operands.bias, operands.keep) if mask is not None]
    copied = not isinstance(rows, range) and any(once(mask).shape[-2] == problem.queries for mask in masks)
    made = problem.scores.placed and not problem.scores.has_functions and not follow(rows)
    return math.prod(problem.rows_shape) * problem.keys if copied or made else 0


def follow(chosen: Selection) -> bool:
    """Whether each of the chosen ones is followed by its neighbour."""
    return len(chosen) < 2 or (isinstance(chosen, range) and chosen.step == 1)


def runs(problem: Problem, chosen: Selection) -> list[slice]:
    """Return the places of what is chosen in pieces: one, or with a user's functions those that follow each other."""
    if follow(chosen) or not problem.scores.has_functions:
        return [slice(0, len(chosen))]
    ends = [*(np.flatnonzero(np.diff(positions(chosen)) != 1) + 1).tolist(), len(chosen)]
    return [slice(first, end) for first, end in zip([0, *ends[:-1]], ends, strict=True)]


def piece(chosen: Selection, places: slice) -> Selection:
    """Return some of what is chosen."""
    some = chosen[places]
    return some if isinstance(some, range) else _indices(some)


def positions(chosen: Selection) -> NDArray[np.intp]:
    """Return an array of what is chosen."""
    return np.arange(chosen.start, chosen.stop, chosen.step) if isinstance(chosen, range) else chosen


def last_key(problem: Problem, operands: Operands, rows: Selection) -> int:
    """Return an end of the keys that the chosen queries, of which there are some, look at: behind it there is none."""
    scores = problem.scores
    if scores.right is None:
        return problem.keys
    highest = max(rows[0], rows[-1]) if isinstance(rows, range) else int(rows.max())
    # the farthest of all rows of the batch, whether or not this one still looks at a key
    offset = scores.offset if operands.heads is None else int(operands.heads["offset"].max(initial=-FARTHEST))
    return min(max(highest + offset + scores.right + 1, 0), problem.keys)


def _first(chosen: Selection) -> int:
    return int(chosen[0]) if len(chosen) else 0
