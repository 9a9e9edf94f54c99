"""Gradients by small steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def central_differences(loss: Callable[[Array], float], array: Array, step: float) -> Array:
    """Return the gradient of a number by each element of an array, from a step up and a step down."""
    found = np.zeros(array.shape)
    for place in np.ndindex(array.shape):
        ends = []
        for way in (step, -step):
            moved = array.copy()
            moved[place] += way
            ends.append(loss(moved))
        found[place] = (ends[0] - ends[1]) / (2 * step)
    return found
