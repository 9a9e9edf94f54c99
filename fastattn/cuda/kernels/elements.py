"""Device functions that all kernels share: elements of memory to numbers and back, exponentials, random words.

`device` makes a device function. Nothing here asks `cuda` for anything, so that the simulator may call these from the
kernels of any module as the Python functions that they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from fastattn.cuda.available import SIMULATED
from fastattn.cuda.kernels.plan import DROP_BELOW, FIRST_BATCH, HEADS

#: The types that operands are stored in, and the NumPy types of the arrays in which a kernel sees them.
STORAGE = {
    "float16": np.float16,
    "bfloat16": np.uint16,  # its bits
    "float32": np.float32,
    "float64": np.float64,
}
#: The same for masks.
MASKS = {"bool": np.uint8, **STORAGE}

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL_0, WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
ROUNDS = 10


def device(function: Callable[..., Any]) -> Any:
    """A function for kernels to call, always inlined; in the simulator the function itself."""
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def real_of(storage: str, extreme: bool = False) -> Any:
    """The NumPy type that a kernel computes in: float64 for float64, and where the scale is extreme, else float32."""
    return np.float64 if storage == "float64" or extreme else np.float32


# -- elements ----------------------------------------------------------------------------------------------------------


@device
def from_bfloat16(bits):
    """The float32 number whose upper half these 16 bits are."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@device
def to_bfloat16(x):
    """The bits of the bfloat16 number nearest to x, ties to even; NaN stays NaN."""
    bits = np.float32(x).view(np.uint32)
    if x != x:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x0040))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


def loader(storage: str, real: Any) -> Any:
    """A device function of an element in memory: the number, of type `real`."""
    if storage == "bfloat16":

        def load(element):
            return real(from_bfloat16(element))

    else:

        def load(element):
            return real(element)

    return device(load)


def storer(storage: str) -> Any:
    """A device function of a number: what stands in memory for it."""
    if storage == "bfloat16":
        return to_bfloat16
    kind = STORAGE[storage]

    def store(x):
        return kind(x)

    return device(store)


def mask_loader(storage: str, real: Any, narrow: Any) -> Any:
    """A device function of an element of a floating mask: the number, of type `real`, held in the range of `narrow`."""
    return holder(real, narrow) if storage == "float64" else loader(storage, real)


def holder(real: Any, narrow: Any) -> Any:
    """A device function of a number: the same, of type `real`, but no finite one is beyond the range of `narrow`."""
    if narrow is np.float64:
        return loader("float64", real)
    limit = float(np.finfo(narrow).max)

    def hold(element):
        if element > limit and element < math.inf:
            return real(limit)
        if element < -limit and element > -math.inf:
            return real(-limit)
        return real(element)

    return device(hold)


def minus_zero_test(real: Any) -> Any:
    """A device function of a number of type `real`: whether it is -0.0, and not 0.0."""
    bits, minus_zero = (np.uint64, np.uint64(1 << 63)) if real is np.float64 else (np.uint32, np.uint32(1 << 31))

    def is_minus_zero(x):
        return x.view(bits) == minus_zero

    return device(is_minus_zero)


# -- exponentials ------------------------------------------------------------------------------------------------------


if SIMULATED:
    exp2 = np.exp2
    log2 = np.log2
else:

    @device
    def exp2(x):
        """2^x in the type of x; 0 for -inf, NaN for NaN."""
        return math.exp2(x)

    @device
    def log2(x):
        """The logarithm to base 2, in the type of x > 0."""
        return math.log2(x)


# -- dropout -----------------------------------------------------------------------------------------------------------


@device
def philox(group, query, head, batch, seed_low, seed_high):
    """The four random 32-bit words, as uint64, of keys 4 · group to 4 · group + 3: Philox4x32-10.

    The words are those that `fastattn.reference.keep_mask` describes.
    """
    c0, c1, c2, c3 = np.uint64(group) & LOW, np.uint64(query) & LOW, np.uint64(head) & LOW, np.uint64(batch) & LOW
    k0, k1 = np.uint64(seed_low), np.uint64(seed_high)
    for _ in range(ROUNDS):
        product_0, product_1 = MULTIPLIER_0 * c0, MULTIPLIER_1 * c2
        c0, c1 = (product_1 >> HALF) ^ c1 ^ k0, product_1 & LOW
        c2, c3 = (product_0 >> HALF) ^ c3 ^ k1, product_0 & LOW
        k0, k1 = (k0 + WEYL_0) & LOW, (k1 + WEYL_1) & LOW
    return c0, c1, c2, c3


@device
def keeps(slice_number, sizes, query, key, seed_low, seed_high):
    """Whether dropout keeps one weight, of a slice as `fastattn.cuda.kernels.plan` counts them."""
    batch, head = sizes[FIRST_BATCH] + slice_number // sizes[HEADS], slice_number % sizes[HEADS]
    w0, w1, w2, w3 = philox(key // 4, query, head, batch, seed_low, seed_high)
    place, word = key % 4, w0
    if place == 1:
        word = w1
    elif place == 2:
        word = w2
    elif place == 3:
        word = w3
    return word >= np.uint64(sizes[DROP_BELOW])
