"""The gradient of an array that a user's function captures: the sum of its parts.

The parts are what `fastattn.cuda.kernels.portable_backward.captured_parts` writes, in float64, one after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from fastattn.cuda.kernels.elements import storer

__all__ = ["Parts", "sum_parts"]


class Parts(NamedTuple):
    """What a kernel of their sums is compiled for: the storage of the gradient."""

    storage: str


def sum_parts(spec: Parts) -> Any:
    """The kernel of the sums: a thread for each element, which adds up its parts in order."""
    store = storer(spec.storage)

    def kernel(parts, count, elements, result):
        element = cuda.grid(1)
        if element < elements:
            total = np.float64(0.0)
            for part in range(count):
                total += parts[part * elements + element]
            result[element] = store(total)

    return kernel
