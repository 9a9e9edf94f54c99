"""One validated description of a call: every refusal of bad input lives here.

A call goes through three steps. `as_operands` makes arrays of what the user gave and settles the dtype. `describe`
settles the shapes: it returns a `Problem`, which says what is to be computed, and `Operands`, views of the arrays that
all have the same axes, so that a backend needs to know nothing of broadcasting or head groups. The ``check_*``
functions do the same for the remaining arguments; what rng may be is in `fastattn.seeds`.

What depends on shapes and options alone is worked out once and remembered, because a small call has only a few
microseconds for all of this.
"""

from __future__ import annotations

import math
import numbers
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.advice import holds_masked, is_masked, to_convert, to_make_array
from fastattn.broadcasting import check_broadcasts

__all__ = [
    "Operands",
    "Problem",
    "as_additive_operands",
    "as_operands",
    "as_upstream",
    "check_backend",
    "check_causal",
    "check_dropout",
    "check_flag",
    "check_out",
    "check_scale",
    "check_shape_of_out",
    "describe",
    "describe_additive",
    "is_causal_bias",
    "is_hollow",
    "split_shape",
]

Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = tuple[int, ...]
MaskKind: TypeAlias = Literal["none", "bool", "float"]

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)

#: Dtypes with a meaning here, but no kernels on the CPU so far.
NOT_YET = ("float16", "bfloat16")
MASK_DTYPES = ("bool", "float16", "float32", "float64")
PLAIN_MASKS = frozenset(np.dtype(name) for name in MASK_DTYPES)

# NumPy's own limit (32 axes, which is that of np.broadcast still), less the axis that splitting heads into groups adds.
MAX_RANK = 31


@dataclass(frozen=True, slots=True)
class Problem:
    """What one call computes, in numbers: everything but the data.

    Attributes
    ----------
    dtype : numpy.dtype
        float32 or float64: the type of the arithmetic, of the output and of the log-sum-exp.
    batch : tuple of int
        The axes before the head axis, broadcast.
    heads, kv_heads : int
        Query heads Hq, and the key and value heads Hk they are grouped on. Equal unless ``enable_gqa`` makes groups;
        both 1 where no operand has a head axis.
    queries, keys : int
        Lq and Lk.
    head_dim, value_dim : int
        D and Dv.
    out_shape : tuple of int
        The shape of the result, which has a head axis only if an operand has one.
    scale : float
        The factor of query · key.
    causal_offset : int or None
        The position of query 0 among the keys: query i may look at the keys up to i + causal_offset. None: at all.
    dropout_p : float
        The probability that a weight is dropped.
    mask_kind : {"none", "bool", "float"}
        What ``Operands.mask`` is.
    """

    dtype: np.dtype[Any]
    batch: Shape
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    out_shape: Shape
    scale: float
    causal_offset: int | None
    dropout_p: float
    mask_kind: MaskKind

    @property
    def group(self) -> int:
        """Query heads per key head, G."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def lse_shape(self) -> Shape:
        """Shape of the log-sum-exp: the result's, less the feature axis."""
        return self.out_shape[:-1]

    @property
    def weights_shape(self) -> Shape:
        """Shape of the weights, (..., Hq, Lq, Lk)."""
        return (*self.out_shape[:-1], self.keys)

    @property
    def rows_shape(self) -> Shape:
        """Axes of the operands before the last two: ``(*batch, Hk, G)``."""
        return (*self.batch, self.kv_heads, self.group)

    @property
    def drop_threshold(self) -> int:
        """A random 32-bit word below this drops its weight: round(dropout_p · 2**32), which 2**32 itself may be."""
        return round(self.dropout_p * 2**32)

    @property
    def keep_scale(self) -> float:
        """Factor of the weights that dropout keeps, 1 / (1 - dropout_p); 0 where it keeps none."""
        return 1.0 / (1.0 - self.dropout_p) if self.dropout_p < 1.0 else 0.0


class Operands(NamedTuple):
    """Views of the arrays of a call, with the axes of ``Problem``.

    Nothing is copied: broadcast axes have stride 0, and so has the group axis of key and value.

    Attributes
    ----------
    query : ndarray, shape (*batch, Hk, G, Lq, D)
    key : ndarray, shape (*batch, Hk, G, Lk, D)
    value : ndarray, shape (*batch, Hk, G, Lk, Dv)
    mask : ndarray, shape (*batch, Hk, G, Lq, Lk), or None
        Boolean, or float16, float32 or float64 whatever the dtype of the others.
    """

    query: Array
    key: Array
    value: Array
    mask: Array | None


# -- from what was given to arrays -------------------------------------------------------------------------------------


def as_operands(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, half: bool = False
) -> tuple[Array, Array, Array, Array | None]:
    """Make arrays of one dtype, float32 or float64, of query, key and value, and an array of the mask.

    An array that already is what is needed comes back as it is. A copy is made only to change the dtype or the byte
    order, and of arrays whose elements are not aligned in memory.

    Parameters
    ----------
    query, key, value : array_like
        Their common dtype is that of `numpy.result_type`; integers and booleans compute in float64.
    attn_mask : array_like or None
        Boolean or floating. It takes no part in the common dtype, and keeps its own.
    half : bool
        Whether float16 and bfloat16, which the CPU has no kernels for, may come and stay what they are.

    Returns
    -------
    query, key, value : ndarray
    attn_mask : ndarray or None

    Raises
    ------
    TypeError
        For a dtype that has no meaning here, for float16 and bfloat16 unless `half`, and for what cannot be made an
        array.
    ValueError
        For nested sequences of unequal lengths.
    """
    mask = None if attn_mask is None else _as_mask(attn_mask, half)
    if type(query) is type(key) is type(value) is np.ndarray:
        dtype = query.dtype
        if (
            (dtype is FLOAT32 or dtype is FLOAT64)
            and key.dtype is dtype
            and value.dtype is dtype
            and query.flags.aligned
            and key.flags.aligned
            and value.flags.aligned
        ):
            return query, key, value, mask

    query, key, value = _as_common({"query": query, "key": key, "value": value}, half)
    return query, key, value, mask


def as_additive_operands(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, weight: ArrayLike, attn_mask: ArrayLike | None = None
) -> tuple[Array, Array, Array, Array, Array | None]:
    """Make arrays of the arguments of additive attention, as `as_operands` does of those of attention.

    Parameters
    ----------
    query, key, value, weight : array_like
        All four settle the common dtype.
    attn_mask : array_like or None

    Returns
    -------
    query, key, value, weight : ndarray
    attn_mask : ndarray or None

    Raises
    ------
    TypeError, ValueError
        As `as_operands`.
    """
    mask = None if attn_mask is None else _as_mask(attn_mask)
    query, key, value, weight = _as_common({"query": query, "key": key, "value": value, "weight": weight})
    return query, key, value, weight, mask


def as_upstream(
    name: str,
    given: ArrayLike,
    dtype: np.dtype[Any],
    shape: Shape,
    of: str = "the result",
    half: bool = False,
) -> Array:
    """Make an array of the dtype of the call of what arrives at its backward pass, where something has `shape`.

    `half` is that of `as_operands`.

    Raises
    ------
    TypeError
        As `as_operands`.
    ValueError
        If it has another shape.
    """
    if type(given) is np.ndarray and given.dtype is dtype and given.flags.aligned:
        array = given
    else:
        array = _as_array(name, given)
        _check_operand(name, array, given, half)
        array = _as_plain(array, dtype)
    if array.shape != shape:
        raise ValueError(f"{name}: shape {array.shape}; expected {shape}, the shape of {of}")
    return array


def _as_common(given: dict[str, ArrayLike], half: bool = False) -> list[Array]:
    """Make arrays of their common dtype of what was given under these names."""
    arrays = {name: _as_array(name, argument) for name, argument in given.items()}
    for name, array in arrays.items():
        _check_operand(name, array, given[name], half)
    common = np.result_type(*arrays.values())
    dtype = FLOAT64 if common.kind in "biu" else common.newbyteorder("=")
    return [_as_plain(array, dtype) for array in arrays.values()]


def _as_array(name: str, given: object) -> Array:
    if given is None:
        raise TypeError(f"{name}: None; expected an array_like")
    if is_masked(given) or holds_masked(given):
        where = "" if is_masked(given) else " in a list"
        also = ", and what takes no part as attn_mask" if name in ("query", "key", "value") else ""
        raise TypeError(
            f"{name}: a numpy.ma.MaskedArray{where}, whose mask would be lost; expected an ndarray, such as its "
            f"filled(0){also}"
        )
    try:
        array = np.asarray(given)
    except MemoryError:
        raise
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(
            f"{name}: {_said(given)} cannot be made an array; expected an array_like: {error}"
            f"{to_make_array(name, given)}"
        ) from error
    if is_causal_bias(given):
        raise TypeError(f"{name}: a {type(given).__name__}, which has no numbers; expected is_causal to say the same")
    if is_hollow(given):
        raise TypeError(f"{name}: a tensor of shape {array.shape} that has no memory; expected one that has")
    return array


def is_causal_bias(given: object) -> bool:
    """Whether this is a bias of ``torch.nn.attention.bias``: a tensor in name only, whose memory means nothing."""
    bias = sys.modules.get("torch.nn.attention.bias")  # where it is not imported, there is none
    return bias is not None and isinstance(given, bias.CausalBias)


def is_hollow(given: Any) -> bool:
    """Whether this is a tensor of PyTorch's without memory, of which an array can be made all the same.

    Its memory has been let go, or its numbers are those of another tensor.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(given, torch.Tensor):
        return False
    try:
        return not given.data_ptr() and given.numel() > 0 and not given._is_zerotensor()
    except RuntimeError:  # it stands for a tensor that PyTorch finds when it makes the array
        return False


def _name_of(dtype: np.dtype[Any]) -> str:
    """``dtype.name`` of a plain dtype. NumPy imports a module for it each time, and not when Python is about to end."""
    return dtype.type.__name__.rstrip("_")  # it was "bool_" before NumPy 2


def _check_operand(name: str, array: Array, given: object, half: bool = False) -> None:
    """Refuse an array, made of what was given, of a dtype that has no meaning here."""
    dtype = array.dtype
    if dtype.kind in "biu" or dtype.type in (np.float32, np.float64) or (half and _name_of(dtype) in NOT_YET):
        return
    _check_elements(name, array)
    yet = " yet on the CPU" if _name_of(dtype) in NOT_YET else ""
    raise TypeError(
        f"{name}: dtype {dtype} is not supported{yet}; expected float32, float64 or integers"
        f"{to_convert(name, dtype, given)}"
    )


def _check_elements(name: str, array: Array) -> None:
    """Refuse an array of objects for the first of them that is no number, such as None."""
    if array.dtype.kind == "O":
        for element in array.flat:
            if not isinstance(element, numbers.Number):
                raise TypeError(
                    f"{name}: {'holds ' if array.ndim else ''}{_said(element)}; expected an array_like of numbers"
                )


def _as_mask(given: ArrayLike, half: bool = False) -> Array:
    if type(given) is np.ndarray and given.dtype in PLAIN_MASKS and given.flags.aligned:
        return given
    mask = _as_array("attn_mask", given)
    dtype = mask.dtype
    if dtype.kind in "iu" or dtype.name.startswith(("int", "uint")):  # as the narrow ones of ml_dtypes are called
        raise TypeError(
            f"attn_mask: dtype {dtype} could mean two things; expected boolean (True takes part) or a floating dtype "
            "(added to the scores)"
        )
    if half and _name_of(dtype) in NOT_YET:
        return _as_plain(mask, dtype.newbyteorder("="))
    if _name_of(dtype) not in MASK_DTYPES or dtype.type is np.longdouble:
        _check_elements("attn_mask", mask)
        yet = " yet" if _name_of(dtype) in NOT_YET else ""
        raise TypeError(
            f"attn_mask: dtype {dtype} is not supported{yet}; expected one of {', '.join(MASK_DTYPES)}"
            f"{to_convert('attn_mask', dtype, given)}"
        )
    return _as_plain(mask, dtype.newbyteorder("="))


def _as_plain(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return `array` in a native `dtype` with aligned elements: itself if it is so already."""
    if array.dtype == dtype and array.flags.aligned:
        return array
    # a signalling NaN warns when it is cast
    with np.errstate(all="ignore"):
        return array.astype(dtype, order="K", copy=True)


# -- from arrays to a problem ------------------------------------------------------------------------------------------


def describe(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool | str = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Problem, Operands]:
    """Work out what a call computes, and views of its arrays that all have the same axes.

    Parameters
    ----------
    query, key, value, attn_mask : ndarray
        As `as_operands` returns them.
    dropout_p, is_causal, scale, enable_gqa
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
    >>> from fastattn.problem import as_operands, describe
    >>> query, key = np.zeros((2, 8, 5, 64)), np.zeros((2, 2, 7, 64))
    >>> problem, operands = describe(*as_operands(query, key, key), is_causal="bottom-right", enable_gqa=True)
    >>> problem.out_shape, problem.group, problem.causal_offset, problem.scale
    ((2, 8, 5, 64), 4, 2, 0.125)
    >>> operands.key.shape
    (2, 2, 4, 7, 64)
    """
    return _describe(
        query,
        key,
        value,
        attn_mask,
        check_dropout(dropout_p),
        check_causal(is_causal),
        check_scale(scale),
        check_flag("enable_gqa", enable_gqa),
    )


def describe_additive(
    query: Array,
    key: Array,
    value: Array,
    weight: Array,
    attn_mask: Array | None = None,
    is_causal: bool | str = False,
) -> tuple[Problem, Operands]:
    """Work out what a call of additive attention computes: all of it is attention's, but the scores.

    Parameters
    ----------
    query, key, value, weight, attn_mask : ndarray
        As `as_additive_operands` returns them.
    is_causal
        As the user gave it.

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
    described = _describe(query, key, value, attn_mask, 0.0, check_causal(is_causal), 1.0, None)
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
    attn_mask: Array | None,
    dropout_p: float,
    causal: Literal["no", "top-left", "bottom-right"],
    scale: float | None,
    enable_gqa: bool | None,
) -> tuple[Problem, Operands]:
    """Do the work of `describe` with checked options; `enable_gqa` is None where it is not on offer."""
    problem, plan = _plan(
        query.dtype,
        query.shape,
        key.shape,
        value.shape,
        None if attn_mask is None else attn_mask.shape,
        attn_mask is not None and attn_mask.dtype.kind == "b",
        dropout_p,
        causal,
        scale,
        enable_gqa,
    )
    return problem, Operands(
        _view(query, plan.query),
        _view(key, plan.key),
        _view(value, plan.value),
        None if attn_mask is None or plan.mask is None else _view(attn_mask, plan.mask),
    )


class _Axes(NamedTuple):
    """How one array becomes an operand: reshaped, which is always a view here, then broadcast if it has to be."""

    split: Shape
    full: Shape | None


class _Plan(NamedTuple):
    query: _Axes
    key: _Axes
    value: _Axes
    mask: _Axes | None


def _view(array: Array, axes: _Axes) -> Array:
    view = array.reshape(axes.split)
    return view if axes.full is None else np.broadcast_to(view, axes.full)


# The key has only shapes and numbers in it, so a program has few of them; the limit is for those whose lengths wander.
@lru_cache(maxsize=1024)
def _plan(
    dtype: np.dtype[Any],
    query: Shape,
    key: Shape,
    value: Shape,
    mask: Shape | None,
    mask_is_bool: bool,
    dropout_p: float,
    causal: Literal["no", "top-left", "bottom-right"],
    scale: float | None,
    enable_gqa: bool | None,
) -> tuple[Problem, _Plan]:
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
    if scale is None:
        scale = 1.0 / math.sqrt(query[-1]) if query[-1] else 1.0
    problem = Problem(
        dtype=dtype,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=query[-1],
        value_dim=value[-1],
        out_shape=(*batch, *head_axis, queries, value[-1]),
        scale=scale,
        causal_offset={"no": None, "top-left": 0, "bottom-right": keys - queries}[causal],
        dropout_p=dropout_p,
        mask_kind="none" if mask is None else "bool" if mask_is_bool else "float",
    )
    if mask is not None:
        check_broadcasts("attn_mask", mask, problem.weights_shape, "the scores")
    return problem, _Plan(
        query=_axes(query, problem, queries),
        key=_axes(key, problem, keys, shared=True),
        value=_axes(value, problem, keys, shared=True),
        mask=None if mask is None else _axes(mask, problem, queries, keys),
    )


def _axes(shape: Shape, problem: Problem, length: int, last: int | None = None, shared: bool = False) -> _Axes:
    """Say how an array of `shape` gets the axes of an operand; `shared` if a group of query heads has it in common."""
    split = split_shape(shape, problem, shared)
    full = (*problem.rows_shape, length, split[-1] if last is None else last)
    return _Axes(split, None if split == full else full)


def split_shape(shape: Shape, problem: Problem, shared: bool = False) -> Shape:
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
        return (*batch, problem.kv_heads, problem.group, rows, columns)
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


# -- the other arguments -----------------------------------------------------------------------------------------------


def _said(given: object) -> str:
    """Say what was given, in a few words, however large it is."""
    if isinstance(given, np.ndarray):
        return f"an array of shape {given.shape} and dtype {given.dtype}"
    return f"{reprlib.repr(given)} of type {type(given).__name__}"


def _is_real(given: object) -> bool:
    return isinstance(given, numbers.Real) and not isinstance(given, bool)


def check_flag(name: str, given: object) -> bool:
    """Return a flag as a bool.

    Raises
    ------
    TypeError
        If it is neither True nor False (NumPy's included).
    """
    if given is True or given is False:
        return given
    if isinstance(given, np.bool_):
        return bool(given)
    raise TypeError(f"{name}: {_said(given)}; expected True or False")


def check_scale(given: object) -> float | None:
    """Return the scale as a float, None where the default is wanted.

    Raises
    ------
    TypeError
        If it is not a real number.
    ValueError
        If it is not finite.
    """
    if given is None:
        return None
    if not _is_real(given):
        raise TypeError(f"scale: {_said(given)}; expected a finite real number, or None for 1/sqrt(head_dim)")
    try:
        scale = float(given)  # type: ignore[arg-type]
    except OverflowError:
        scale = math.inf
    if not -math.inf < scale < math.inf:  # torch.compile can trace this, unlike math.isfinite
        raise ValueError(f"scale: {_said(given)}; expected a finite real number, or None for 1/sqrt(head_dim)")
    return scale


def check_dropout(given: object) -> float:
    """Return the dropout probability as a float.

    Raises
    ------
    TypeError
        If it is not a real number.
    ValueError
        If it is not in [0, 1].
    """
    if type(given) is float and 0.0 <= given <= 1.0:
        return given
    if not _is_real(given):
        raise TypeError(f"dropout_p: {_said(given)}; expected a real number in [0, 1]")
    # compared as given: converted to a float, a number just above 1 could become 1
    if not 0 <= given <= 1:  # type: ignore[operator]
        raise ValueError(f"dropout_p: {_said(given)}; expected a real number in [0, 1]")
    return float(given)  # type: ignore[arg-type]


def check_causal(given: object) -> Literal["no", "top-left", "bottom-right"]:
    """Return which causal mask is meant.

    Raises
    ------
    TypeError
        If it is neither a bool nor a string.
    ValueError
        If it is another string than "bottom-right".
    """
    if given is False:
        return "no"
    if given is True:
        return "top-left"
    if isinstance(given, np.bool_):
        return "top-left" if given else "no"
    if not isinstance(given, str):
        raise TypeError(f"is_causal: {_said(given)}; expected False, True or 'bottom-right'")
    if given != "bottom-right":
        raise ValueError(f"is_causal: {_said(given)}; expected False, True or 'bottom-right'")
    return "bottom-right"


def check_backend(given: object, existing: Sequence[str]) -> str | None:
    """Return the backend's name, None where the best one is wanted.

    Raises
    ------
    TypeError
        If it is neither None nor a string.
    ValueError
        If no backend has that name.
    """
    if given is None or (isinstance(given, str) and given in existing):
        return given
    kind = ValueError if isinstance(given, str) else TypeError
    raise kind(f"backend: {_said(given)}; expected None or one of {', '.join(map(repr, existing))}")


def check_out(out: object, problem: Problem) -> Array | None:
    """Return `out` if the result can be written there; it may overlap the inputs, and may have any strides.

    Raises
    ------
    TypeError
        If it is not an ndarray, or not of the result's dtype.
    ValueError
        If it is not of the result's shape, is read-only, or has elements that share memory with each other.
    """
    if out is None:
        return None
    if not isinstance(out, np.ndarray) or is_masked(out):
        raise TypeError(f"out: {_said(out)}; expected None or a numpy.ndarray")
    if out.dtype != problem.dtype:
        raise TypeError(f"out: dtype {out.dtype}; expected {problem.dtype}, the dtype of the result")
    if not out.flags.writeable:
        raise ValueError("out: the array is read-only; expected a writeable one")
    check_shape_of_out(out, problem)
    return out


def check_shape_of_out(out: Array, problem: Problem) -> None:
    """Check that `out`, or an array with its shape and strides, has a place for each element of the result.

    Raises
    ------
    ValueError
        If it has another shape, or elements that share memory with each other.
    """
    if out.shape != problem.out_shape:
        raise ValueError(f"out: shape {out.shape}; expected {problem.out_shape}, the shape of the result")
    if not out.flags.c_contiguous and _overlaps_itself(out):
        raise ValueError(
            f"out: shape {out.shape} with strides {out.strides} has elements that share memory; expected an array "
            "with a place of its own for each element"
        )


def _overlaps_itself(array: Array) -> bool:
    """Say whether two different elements share memory.

    If two do, consider the first axis on which they differ. Moved together, which leaves their distance as it is, one
    of them lies at 0 on that axis and the axes before it, the other further on: so it is enough to compare, axis by
    axis, the first slice with the others.
    """
    if array.size == 0:
        return False
    while array.ndim:
        if np.shares_memory(array[:1], array[1:]):
            return True
        array = array[0, ...]
    return False
