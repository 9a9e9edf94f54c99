"""From arrays to a problem: shapes that go together, and views that all have the same axes.

`describe` returns a `Problem`, which says what is to be computed, and `Operands`: a backend needs to know nothing of
broadcasting or head groups. What depends on shapes and options alone is worked out once and remembered, because a small
call has only a few microseconds for all of this.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastattn.call.broadcasting import check_broadcasts
from fastattn.call.halves import real_of
from fastattn.call.options import check_dropout, check_flag
from fastattn.call.problem import Array, Mask, Operands, Problem, Shape
from fastattn.call.rounding import saturated
from fastattn.call.score_options import FurtherOptions, PieceOptions, ScoreOptions, check_names, scores_from
from fastattn.call.types import Causal, Number

if TYPE_CHECKING:
    from typing_extensions import Unpack

# NumPy's own limit (32 axes, which is that of np.broadcast still), less the axis that splitting heads into groups adds.
MAX_RANK = 31


def describe(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Mask = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    **options: Unpack[PieceOptions],
) -> tuple[Problem, Operands]:
    """Work out what a call computes, and views of its arrays that all have the same axes.

    Parameters
    ----------
    query, key, value, attn_mask : ndarray
        As `as_operands` returns them.
    dropout_p, is_causal, scale, enable_gqa, **options
        As the user gave them.

    Returns
    -------
    problem : Problem
    operands : Operands

    Raises
    ------
    ValueError, TypeError
        Where shapes do not go together or an option is out of its range. The message names the argument, what it was
        and what was expected.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn.call.arrays import as_operands
    >>> from fastattn.call.shapes import describe
    >>> query, key = np.zeros((2, 8, 5, 64)), np.zeros((2, 2, 7, 64))
    >>> problem, operands = describe(*as_operands(query, key, key), is_causal="bottom-right", enable_gqa=True)
    >>> problem.out_shape, problem.group, problem.scores.offset, problem.scores.scale
    ((2, 8, 5, 64), 4, 2, 0.125)
    >>> operands.key.shape
    (2, 2, 4, 7, 64)
    """
    dropout_p, enable_gqa = check_dropout(dropout_p), check_flag("enable_gqa", enable_gqa)
    check_names(options)
    scores: ScoreOptions = {"is_causal": is_causal, "scale": scale, **options}
    return _describe(query, key, value, attn_mask, dropout_p, enable_gqa, scores)


def describe_additive(
    query: Array,
    key: Array,
    value: Array,
    weight: Array,
    attn_mask: Mask = None,
    is_causal: Causal = False,
    **options: Unpack[FurtherOptions],
) -> tuple[Problem, Operands]:
    """Work out what a call of additive attention computes: all of it is attention's, but the scores.

    Parameters
    ----------
    query, key, value, weight, attn_mask : ndarray
        As `as_additive_operands` returns them.
    is_causal, **options
        As the user gave them.

    Returns
    -------
    problem : Problem
        Its scale is 1. There are no groups of heads.
    operands : Operands

    Raises
    ------
    ValueError, TypeError
        As `describe`, and where `weight` has another shape than (D,).
    """
    check_names(options)
    scores: ScoreOptions = {"is_causal": is_causal, "scale": 1.0, **options}  # type: ignore[typeddict-item]
    described = _describe(query, key, value, attn_mask, 0.0, None, scores)
    if weight.shape != query.shape[-1:]:
        raise ValueError(
            f"weight: shape {weight.shape}; expected {query.shape[-1:]}, a number for each feature of query of shape "
            f"{query.shape}"
        )
    return described


def _describe(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Mask,
    dropout_p: float,
    enable_gqa: bool | None,
    options: ScoreOptions,
) -> tuple[Problem, Operands]:
    """Do the work of `describe`; `enable_gqa` is None where it is not on offer."""
    bias, keep = masks_of(attn_mask)
    sizes, axes = _sizes(
        query.shape,
        key.shape,
        value.shape,
        None if bias is None else bias.shape,
        None if keep is None else keep.shape,
        enable_gqa,
    )
    scores, heads, captured = scores_from(options, *sizes[:2], *sizes[3:6], bias is not None, keep is not None)
    real = real_of(query.dtype)
    problem = Problem(query.dtype, real, *sizes, dropout_p, scores)
    if heads is not None:
        with np.errstate(all="ignore"):  # a sink counts as the call's dtype has it, as scores do
            heads["sink"] = saturated(heads["sink"], real).astype(real)
    return problem, Operands(
        _view(query, axes.query),
        _view(key, axes.key),
        _view(value, axes.value),
        None if bias is None or axes.bias is None else _view(bias, axes.bias),
        None if keep is None or axes.keep is None else _view(keep, axes.keep),
        heads,
        captured,
    )


def shapes_of_results(
    query: Shape,
    key: Shape,
    value: Shape,
    bias: Shape | None,
    keep: Shape | None,
    enable_gqa: bool = False,
    **options: Unpack[ScoreOptions],
) -> tuple[Shape, Shape]:
    """Return the shapes of the result and of the log-sum-exp, for arrays of which nothing but the shapes is known.

    Raises
    ------
    ValueError, TypeError
        As `describe`.
    """
    sizes, _ = _sizes(query, key, value, bias, keep, check_flag("enable_gqa", enable_gqa))
    scores_from(options, *sizes[:2], *sizes[3:6], bias is not None, keep is not None)
    return sizes.out_shape, sizes.out_shape[:-1]


def masks_of(attn_mask: Mask) -> tuple[Array | None, Array | None]:
    """Return the floating mask and the boolean one of what `as_operands` made of an argument."""
    if isinstance(attn_mask, tuple):
        return attn_mask
    if attn_mask is None or attn_mask.dtype.kind != "b":
        return attn_mask, None
    return None, attn_mask


class _Axes(NamedTuple):
    """How one array becomes an operand: reshaped, which is always a view here, then broadcast if it has to be."""

    split: Shape
    full: Shape | None


class _AllAxes(NamedTuple):
    query: _Axes
    key: _Axes
    value: _Axes
    bias: _Axes | None
    keep: _Axes | None


class _Sizes(NamedTuple):
    """The fields of a `Problem` that shapes say, in its order."""

    batch: Shape
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    out_shape: Shape

    @property
    def rows_shape(self) -> Shape:
        """The leading axes of an operand."""
        return (*self.batch, self.kv_heads, self.heads // self.kv_heads if self.kv_heads else 1)


def _view(array: Array, axes: _Axes) -> Array:
    view = array.reshape(axes.split)
    return view if axes.full is None else np.broadcast_to(view, axes.full)


# The key has only shapes and numbers in it, so a program has few of them; the limit is for those whose lengths wander.
@lru_cache(maxsize=1024)
def _sizes(
    query: Shape, key: Shape, value: Shape, bias: Shape | None, keep: Shape | None, enable_gqa: bool | None
) -> tuple[_Sizes, _AllAxes]:
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if not 2 <= len(shape) <= MAX_RANK:
            raise ValueError(
                f"{name}: shape {shape} has rank {len(shape)}; expected (..., heads, length, features), or without "
                f"the axes on the left, of rank 2 to {MAX_RANK}"
            )
    if key[-1] != query[-1]:
        raise ValueError(f"key: shape {key}; expected {query[-1]} features on the last axis, as query of shape {query}")
    if value[-2] != key[-2]:
        raise ValueError(f"value: shape {value}; expected length {key[-2]} on axis -2, as key of shape {key}")

    heads, kv_heads = _heads(query, key, value, enable_gqa)
    batch = _batch(query, key, value)
    head_axis: Shape = (heads,) if max(len(query), len(key), len(value)) > 2 else ()
    queries, keys = query[-2], key[-2]
    out_shape = (*batch, *head_axis, queries, value[-1])
    sizes = _Sizes(batch, heads, kv_heads, queries, keys, query[-1], value[-1], out_shape)
    for mask in (bias, keep):
        if mask is not None:
            check_broadcasts("attn_mask", mask, (*out_shape[:-1], keys), "the scores")
    return sizes, _AllAxes(
        query=_axes(query, sizes, queries),
        key=_axes(key, sizes, keys, shared=True),
        value=_axes(value, sizes, keys, shared=True),
        bias=None if bias is None else _axes(bias, sizes, queries, keys),
        keep=None if keep is None else _axes(keep, sizes, queries, keys),
    )


def _axes(shape: Shape, sizes: _Sizes, length: int, last: int | None = None, shared: bool = False) -> _Axes:
    """Say how an array of `shape` gets the axes of an operand; `shared` if a group of query heads has it in common."""
    split = split_shape(shape, sizes, shared)
    full = (*sizes.rows_shape, length, split[-1] if last is None else last)
    return _Axes(split, None if split == full else full)


def split_shape(shape: Shape, problem: Problem | _Sizes, shared: bool = False) -> Shape:
    """Return the shape that an array of `shape` has with the head axis split, (..., Hk or 1, G or 1, rows, columns).

    Parameters
    ----------
    shape : tuple of int
        Of query, key, value or mask.
    problem : Problem
    shared : bool
        Whether a group of query heads has the array in common: True for key and value.
    """
    shape = (1,) * (3 - len(shape)) + shape
    *batch, heads, rows, columns = shape
    if shared:
        return (*batch, heads, 1, rows, columns)
    if heads == problem.heads:
        return (*batch, *problem.rows_shape[-2:], rows, columns)
    return (*batch, 1, 1, rows, columns)


def _heads(query: Shape, key: Shape, value: Shape, enable_gqa: bool | None) -> tuple[int, int]:
    """Return the number of query heads and of the key heads that they are grouped on."""
    hq, hk, hv = (shape[-3] if len(shape) > 2 else 1 for shape in (query, key, value))
    if hk != hv and 1 not in (hk, hv):
        raise ValueError(f"value: shape {value} has {hv} heads; expected {hk}, as key of shape {key}, or 1")
    kv = hv if hk == 1 else hk
    if enable_gqa and kv and hq % kv == 0:
        return hq, kv
    if hq == kv or 1 in (hq, kv):
        heads = kv if hq == 1 else hq
        return heads, heads
    if enable_gqa:
        wanted = "expected the number of query heads to be a multiple of it"
    elif enable_gqa is not None and kv and hq % kv == 0:
        wanted = f"expected {hq} or 1, or enable_gqa=True, which lets groups of {hq // kv} query heads share one"
    else:
        wanted = f"expected {hq} or 1"
    name, shape = ("key", key) if hk == kv else ("value", value)
    if kv and hq % kv and query[-2] == key[-2] and hk == hv:  # as lengths and heads they would go together
        wanted += ", or .swapaxes(-3, -2) of all three if their axes are (..., length, heads, features)"
    raise ValueError(f"{name}: shape {shape} has {kv} heads, and query of shape {query} has {hq}; {wanted}")


def _batch(query: Shape, key: Shape, value: Shape) -> Shape:
    try:
        return np.broadcast_shapes(query[:-3], key[:-3], value[:-3])
    except ValueError:
        raise ValueError(
            f"query, key, value: shapes {query}, {key}, {value}; expected the axes on the left of the head axis, "
            f"{query[:-3]}, {key[:-3]}, {value[:-3]}, to broadcast"
        ) from None
