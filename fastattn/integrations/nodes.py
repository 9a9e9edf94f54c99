"""What nodes of ONNX give to their attention, checked: inputs, attributes, and arrays in the layout of fastattn.

All refusals are ValueErrors: ONNX's evaluator gives any other error a message of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastattn.call.arrays import DTYPES
from fastattn.call.broadcasting import check_broadcasts
from fastattn.call.halves import cast, real_of
from fastattn.call.problem import FLOAT64, Array

__all__ = [
    "as_lengths",
    "as_mask",
    "check_arrays",
    "check_attributes",
    "check_shapes",
    "heads_first",
    "in_wider_type",
    "with_past",
]


#: Types of numbers, by ONNX's numbers for them.
FLOAT, FLOAT16, DOUBLE, BFLOAT16 = 1, 10, 11, 16

#: What an attribute may be, and how to say that.
WORDS: dict[str, tuple[set[int | None], str]] = {
    "is_causal": ({0, 1}, "0 or 1"),
    "qk_matmul_output_mode": ({0, 1, 2, 3}, "0, 1, 2 or 3"),
    "softmax_precision": (
        {None, FLOAT, FLOAT16, DOUBLE, BFLOAT16},
        f"{FLOAT} (FLOAT), {FLOAT16} (FLOAT16), {DOUBLE} (DOUBLE) or {BFLOAT16} (BFLOAT16)",
    ),
}
ATTRIBUTES = (
    *WORDS,
    *("q_num_heads", "kv_num_heads", "scale", "softcap", "left_window_size", "right_window_size"),
    *("score_mod", "prob_mod"),
)


def check_attributes(attributes: Mapping[str, Any]) -> None:
    """Check the attributes of a node; numbers of heads are checked with the arrays.

    Raises
    ------
    ValueError
        If there is no such attribute, or it has no such value.
    """
    for name in attributes:
        if name not in ATTRIBUTES:
            raise ValueError(f"{name}: no such attribute; expected one of {', '.join(ATTRIBUTES)}")
    for name, (meant, expected) in WORDS.items():
        if name in attributes and attributes[name] not in meant:
            raise ValueError(f"{name}: {attributes[name]}; expected {expected}")
    for name in ("left_window_size", "right_window_size"):
        if attributes.get(name, -1) < -1:
            raise ValueError(f"{name}: {attributes[name]}; expected a number of keys, or -1 for no limit")
    if not 0 <= attributes.get("softcap", 0) < math.inf:
        raise ValueError(f"softcap: {attributes['softcap']}; expected a finite number, 0 for none")
    if attributes.get("scale") is not None and not math.isfinite(attributes["scale"]):
        raise ValueError(f"scale: {attributes['scale']}; expected a finite number")


def check_arrays(ranks: tuple[int, ...], **arrays: Array) -> None:
    """Check the dtypes of arrays, and that all have one rank, which is one of some.

    Raises
    ------
    ValueError
        If one has not.
    """
    first = next(iter(arrays))
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ValueError(f"{name}: dtype {array.dtype}; expected one of {', '.join(DTYPES)}")
        if array.ndim not in ranks:
            raise ValueError(f"{name}: rank {array.ndim}, shape {array.shape}; expected {' or '.join(map(str, ranks))}")
        if array.ndim != arrays[first].ndim:
            raise ValueError(f"{name}: rank {array.ndim}; expected {arrays[first].ndim}, that of {first}")


def heads_first(name: str, array: Array, attribute: str, heads: int | None) -> Array:
    """Return a view of shape (B, heads, L, D) of an array of that shape, or of shape (B, L, heads · D).

    Raises
    ------
    ValueError
        If the number of heads, the value of an attribute, is missing or another one.
    """
    if array.ndim == 4:
        if heads is not None and heads != array.shape[1]:
            raise ValueError(f"{attribute}: {heads}; expected {array.shape[1]}, the heads of {name}, or none")
        return array
    batch, length, width = array.shape
    if heads is None or heads < 1 or width % heads:
        raise ValueError(f"{attribute}: {heads}; expected the number of heads in {width}, the last axis of {name}")
    return array.reshape(batch, length, heads, width // heads).swapaxes(1, 2)


def check_shapes(query: Array, key: Array, value: Array) -> None:
    """Check that the shapes of operands, heads first, go together.

    Raises
    ------
    ValueError
        If they do not.
    """
    batch, heads, _, features = query.shape
    if key.shape != (batch, *key.shape[1:3], features):
        raise ValueError(f"K: shape {key.shape}, heads first; expected ({batch}, heads, keys, {features}), as Q")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"V: shape {value.shape}, heads first; expected ({', '.join(map(str, key.shape[:3]))}, …), as K"
        )
    if heads != key.shape[1] and (not key.shape[1] or heads % key.shape[1]):
        raise ValueError(f"K: {key.shape[1]} heads; expected a number that divides {heads}, that of Q")


def with_past(past_key: Array | None, past_value: Array | None, key: Array, value: Array) -> tuple[Array, Array]:
    """Return keys and values behind those of a past.

    Raises
    ------
    ValueError
        If there is a past of one of them alone, or one of other shapes.
    """
    if past_key is None or past_value is None:
        name = "past_key" if past_key is None else "past_value"
        raise ValueError(f"{name}: missing; expected past_key and past_value, or none of them")
    length = past_key.shape[2] if past_key.ndim == 4 else 0
    for name, past, new in (("past_key", past_key, key), ("past_value", past_value, value)):
        expected = (*new.shape[:2], length, new.shape[3])
        if past.dtype != new.dtype or past.shape != expected:
            raise ValueError(f"{name}: shape {past.shape}, dtype {past.dtype}; expected {expected}, {new.dtype}")
    return np.concatenate((past_key, key), axis=2), np.concatenate((past_value, value), axis=2)


def as_lengths(given: Array, batch: int, keys: int) -> Array:
    """Return how many of its keys each row of the batch has.

    Raises
    ------
    ValueError
        If that is no integer for each, from 0 to all of them.
    """
    if given.dtype.kind not in "iu" or given.shape != (batch,):
        raise ValueError(
            f"nonpad_kv_seqlen: shape {given.shape}, dtype {given.dtype}; expected ({batch},) integers, one for each "
            "row of the batch"
        )
    if given.size and not 0 <= given.min() <= given.max() <= keys:
        raise ValueError(
            f"nonpad_kv_seqlen: {given.min()} to {given.max()}; expected 0 to {keys}, the keys that there are"
        )
    return given.astype(np.int64)


def as_mask(given: Array, full: tuple[int, ...], pads: bool) -> tuple[Array, int]:
    """Return a mask as fastattn takes it, and how many keys, from the first on, it does not hide.

    Parameters
    ----------
    given : ndarray
        Boolean, or numbers that are added: integers, too.
    full : tuple of int
        (B, Hq, Lq, Lk).
    pads : bool
        Whether a mask may have fewer keys than there are, of which it hides the others.

    Raises
    ------
    ValueError
        If it has another dtype, or does not broadcast.
    """
    if given.dtype.kind not in "biu" and given.dtype.name not in DTYPES:
        raise ValueError(f"attn_mask: dtype {given.dtype}; expected bool, integers or one of {', '.join(DTYPES)}")
    keys = min(given.shape[-1], full[-1]) if pads and given.ndim else full[-1]
    check_broadcasts("attn_mask", given.shape, (*full[:3], keys), "the scores")
    return given.astype(np.float64) if given.dtype.kind in "iu" else given, keys


def in_wider_type(array: Array, double: bool = False) -> Array:
    """Return half precision as float32, and, if asked for, all numbers as float64."""
    return cast(array, FLOAT64 if double else real_of(array.dtype))
