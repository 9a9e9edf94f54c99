"""The arguments of a call by their names, and what they say of it before anything is computed.

Of a pair of masks, (bias, keep), the floating one is called attn_mask here, and the boolean one `KEEP`. A boolean mask
alone is attn_mask, however it was given.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastattn.call.arrays import as_operands, is_pair
from fastattn.call.halves import name_of
from fastattn.call.problem import Captures, Operands, Problem
from fastattn.call.shapes import describe, masks_of
from fastattn.call.types import Causal, Number
from fastattn.cuda.host.arrays import Given, on_host, read
from fastattn.cuda.kernels.elements import real_of

#: The name of the boolean mask of a pair.
KEEP = "attn_mask[1]"

Options = dict[str, Any]


def named(query: Any, key: Any, value: Any, attn_mask: Any) -> dict[str, Any]:
    """The arrays of a call, as they were given; `KEEP` is among the names if masks come in a pair."""
    given = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    if attn_mask is not None and is_pair(attn_mask):
        given["attn_mask"], given[KEEP] = attn_mask
    return given


def options_of(
    dropout_p: Number, is_causal: Causal, scale: Number | None, enable_gqa: bool, further: dict[str, Any]
) -> Options:
    """What `fastattn.call.shapes.describe` is told besides arrays; offsets and lengths come from wherever they are."""
    own = {name: on_host(option) for name, option in further.items()}
    return {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, **own}


# -- in host memory ----------------------------------------------------------------------------------------------------


def checked(given: dict[str, Any], options: Options) -> tuple[dict[str, Any], Problem, Captures | None]:
    """Make NumPy arrays of the arguments, and describe the call, and what functions capture, before all is moved."""
    query, key, value, mask = given["query"], given["key"], given["value"], given["attn_mask"]
    *made, masks = as_operands(query, key, value, (mask, given[KEEP]) if KEEP in given else mask)
    bias, keep = masks_of(masks)
    arrays: dict[str, Any] = {**dict(zip(given, made, strict=False)), "attn_mask": keep if bias is None else bias}
    if bias is not None and keep is not None:
        arrays[KEEP] = keep
    real = real_of(name_of(arrays["query"].dtype))
    shapes: dict[str, Any] = {
        name: np.broadcast_to(np.empty((), np.bool_ if array.dtype == np.bool_ else real), array.shape)
        for name, array in arrays.items()
        if array is not None
    }
    problem, operands = described(shapes, options)
    return arrays, problem, operands.captured


# -- in device memory --------------------------------------------------------------------------------------------------


def read_arrays(given: dict[str, Any]) -> dict[str, Given]:
    """Read what there is to know of the arrays of a call in device memory.

    Raises
    ------
    TypeError
        If a pair of masks is not a floating and a boolean one.
    """
    givens = {name: read(name.partition("[")[0], array) for name, array in given.items() if array is not None}
    if KEEP in given:
        bias, keep = (givens[name].storage if name in givens else None for name in ("attn_mask", KEEP))
        if bias == "bool" or keep not in (None, "bool"):
            raise TypeError(
                f"attn_mask: a pair of dtypes {bias}, {keep}; expected (bias, keep), a floating and a boolean array"
            )
        if bias is None and keep is not None:
            givens["attn_mask"] = givens.pop(KEEP)
    return givens


def common_storage(givens: dict[str, Given]) -> str:
    """What query, key and value are stored in.

    Raises
    ------
    TypeError
        If they differ: what is in device memory is not converted.
    """
    storage = givens["query"].storage
    for name in ("key", "value"):
        if givens[name].storage != storage:
            raise TypeError(
                f"{name}: dtype {givens[name].storage}; expected {storage}, as query has: arrays in device memory are "
                "not converted"
            )
    return storage


def carriers_of(givens: dict[str, Given], storage: str) -> dict[str, Any]:
    """Views without memory of query, key, value and masks, for shapes to be checked by."""
    real = real_of(storage)
    return {name: given.carrier(np.bool_ if given.storage == "bool" else real) for name, given in givens.items()}


def described(arrays: dict[str, Any], options: Options) -> tuple[Problem, Operands]:
    """Describe a call by views without memory."""
    mask = arrays.get("attn_mask")
    masks = (mask, arrays[KEEP]) if KEEP in arrays else mask
    return describe(arrays["query"], arrays["key"], arrays["value"], masks, **options)
