"""From what was given to arrays: the dtypes that have a meaning here, and what is no array of numbers."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.advice import holds_masked, is_masked, said, to_convert, to_make_array
from fastattn.call.halves import cast, common_dtype, is_bfloat16, name_of, native
from fastattn.call.problem import FLOAT32, FLOAT64, Array, Mask, Shape
from fastattn.call.types import MaskLike

DTYPES = ("float16", "bfloat16", "float32", "float64")

MASK_DTYPES = ("bool", *DTYPES)

PLAIN_MASKS = frozenset(np.dtype(name) for name in ("bool", "float16", "float32", "float64"))


def as_operands(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: MaskLike | None = None
) -> tuple[Array, Array, Array, Mask]:
    """Make arrays of one floating dtype of query, key and value, and an array of the mask.

    An array that already is what is needed comes back as it is. A copy is made only to change the dtype or the byte
    order, and of arrays whose elements are not aligned in memory.

    Parameters
    ----------
    query, key, value : array_like
        Their common dtype is that of `fastattn.call.halves.common_dtype`; integers and booleans compute in float64.
    attn_mask : array_like, pair of array_like, or None
        Boolean or floating, or one of each: (bias, keep). It takes no part in the common dtype, and keeps its own.

    Returns
    -------
    query, key, value : ndarray
    attn_mask : ndarray, pair of them, or None

    Raises
    ------
    TypeError
        For a dtype that has no meaning here, and for what cannot be made an array.
    ValueError
        For nested sequences of unequal lengths.
    """
    mask = None if attn_mask is None else as_masks(attn_mask)
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

    query, key, value = as_common({"query": query, "key": key, "value": value})
    return query, key, value, mask


def as_additive_operands(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, weight: ArrayLike, attn_mask: MaskLike | None = None
) -> tuple[Array, Array, Array, Array, Mask]:
    """Make arrays of the arguments of additive attention, as `as_operands` does of those of attention.

    Parameters
    ----------
    query, key, value, weight : array_like
        All four settle the common dtype.
    attn_mask : array_like or None

    Returns
    -------
    query, key, value, weight : ndarray
    attn_mask : ndarray, pair of them, or None

    Raises
    ------
    TypeError, ValueError
        As `as_operands`.
    """
    mask = None if attn_mask is None else as_masks(attn_mask)
    query, key, value, weight = as_common({"query": query, "key": key, "value": value, "weight": weight})
    return query, key, value, weight, mask


def as_upstream(name: str, given: ArrayLike, dtype: np.dtype[Any], shape: Shape, of: str = "the result") -> Array:
    """Make an array of the dtype of the call of what arrives at its backward pass, where something has `shape`.

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
        array = as_array(name, given)
        check_operand(name, array, given)
        array = as_plain(array, dtype)
    if array.shape != shape:
        raise ValueError(f"{name}: shape {array.shape}; expected {shape}, the shape of {of}")
    return array


def as_common(given: Mapping[str, ArrayLike], also: np.dtype[Any] | None = None) -> list[Array]:
    """Make arrays of one dtype of what was given under these names.

    Parameters
    ----------
    given : mapping of str to array_like
        Where one object is given twice, it comes back as one array.
    also : numpy.dtype or None
        One more that has a part in the common dtype.

    Returns
    -------
    list of ndarray

    Raises
    ------
    TypeError, ValueError
        As `as_operands`.
    """
    arrays = {name: as_array(name, argument) for name, argument in given.items()}
    for name, array in arrays.items():
        check_operand(name, array, given[name])
    common = common_dtype(*arrays.values(), *([] if also is None else [also]))
    dtype = FLOAT64 if common.kind in "biu" else native(common)
    converted = {id(given[name]): as_plain(array, dtype) for name, array in arrays.items()}
    return [converted[id(argument)] for argument in given.values()]


def as_array(name: str, given: object) -> Array:
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
            f"{name}: {said(given)} cannot be made an array; expected an array_like: {error}"
            f"{to_make_array(name, given)}"
        ) from error
    if is_causal_bias(given):
        raise TypeError(f"{name}: a {type(given).__name__}, which has no numbers; expected is_causal to say the same")
    if is_hollow(given):
        raise TypeError(f"{name}: a tensor of shape {array.shape} that has no memory; expected one that has")
    return array


def as_integers(name: str, given: ArrayLike, what: str = "one for each row of the batch") -> Array:
    """Return an array of integers; `what` says what they are.

    Raises
    ------
    TypeError
        If it is of another dtype.
    """
    integers = as_array(name, given)
    if integers.size == 0 and not isinstance(given, np.ndarray):
        integers = integers.astype(np.int64)  # an empty list has no integers to tell its type by
    if integers.dtype.kind not in "iu":
        raise TypeError(f"{name}: dtype {integers.dtype}; expected integers, {what}")
    return integers


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


def check_operand(name: str, array: Array, given: object) -> None:
    """Refuse an array, made of what was given, of a dtype that has no meaning here."""
    dtype = array.dtype
    if dtype.kind in "biu" or dtype.type in (np.float16, np.float32, np.float64) or is_bfloat16(dtype):
        return
    _check_elements(name, array)
    raise TypeError(
        f"{name}: dtype {dtype} is not supported; expected {', '.join(DTYPES)} or integers"
        f"{to_convert(name, dtype, given)}"
    )


def _check_elements(name: str, array: Array) -> None:
    """Refuse an array of objects for the first of them that is no number, such as None."""
    if array.dtype.kind == "O":
        for element in array.flat:
            if not isinstance(element, numbers.Number):
                raise TypeError(
                    f"{name}: {'holds ' if array.ndim else ''}{said(element)}; expected an array_like of numbers"
                )


def as_masks(given: Any) -> Mask:
    """Return the mask that was given, or where that is (bias, keep), the floating and the boolean one."""
    if not is_pair(given):
        return as_mask(given)
    bias, keep = (None if each is None else as_mask(each) for each in given)
    if (bias is not None and bias.dtype.kind == "b") or (keep is not None and keep.dtype.kind != "b"):
        kinds = ", ".join("None" if mask is None else str(mask.dtype) for mask in (bias, keep))
        raise TypeError(f"attn_mask: a pair of dtypes {kinds}; expected (bias, keep), a floating and a boolean array")
    return bias, keep


def is_pair(given: object) -> bool:
    """Whether this is (bias, keep), and not rows of one mask: those are alike."""
    if not (isinstance(given, tuple) and len(given) == 2):
        return False
    if given[0] is None or given[1] is None:
        return True
    if any(isinstance(each, (tuple, list)) for each in given) and not any(hasattr(each, "shape") for each in given):
        return False  # rows
    shapes, kinds = zip(*((np.shape(each), _is_boolean(each)) for each in given), strict=True)
    return bool(kinds[0] != kinds[1] or shapes[0] != shapes[1])


def _is_boolean(given: Any) -> bool:
    return "bool" in str(given.dtype) if hasattr(given, "dtype") else bool(np.asarray(given).dtype.kind == "b")


def as_mask(given: ArrayLike) -> Array:
    if type(given) is np.ndarray and given.dtype in PLAIN_MASKS and given.flags.aligned:
        return given
    mask = as_array("attn_mask", given)
    dtype = mask.dtype
    if dtype.kind in "iu" or dtype.name.startswith(("int", "uint")):  # as the narrow ones of ml_dtypes are called
        raise TypeError(
            f"attn_mask: dtype {dtype} could mean two things; expected boolean (True takes part) or a floating dtype "
            "(added to the scores)"
        )
    if name_of(dtype) not in MASK_DTYPES or dtype.type is np.longdouble:
        _check_elements("attn_mask", mask)
        raise TypeError(
            f"attn_mask: dtype {dtype} is not supported; expected one of {', '.join(MASK_DTYPES)}"
            f"{to_convert('attn_mask', dtype, given)}"
        )
    return as_plain(mask, native(dtype))


def as_plain(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return `array` in a native `dtype` with aligned elements: itself if it is so already."""
    if array.dtype == dtype and array.flags.aligned:
        return array
    return array.copy(order="K") if array.dtype == dtype else cast(array, dtype)
