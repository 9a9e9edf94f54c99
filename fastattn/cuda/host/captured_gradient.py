"""The gradients of arrays that a user's function captures: their parts, and the sums of these."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastattn.call.halves import name_of
from fastattn.call.problem import Problem
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.host.arrays import Given, Place
from fastattn.cuda.host.compile import kernel, launch
from fastattn.cuda.kernels.captured_gradient import Parts as Spec
from fastattn.cuda.kernels.captured_gradient import sum_parts
from fastattn.functions.scalar import number_of_places

MOST_PARTS, MOST_ELEMENTS = 2 if SIMULATED else 256, 1 << 22  # of the work on an array, and of its sums together
THREADS = 4 if SIMULATED else 128  # of a block that adds parts up


class Parts:
    """The parts of the gradient of one captured array: as many on whatever device, fewer where it is large.

    Attributes
    ----------
    name : str
    count : int
        How many parts there are.
    elements : int
        Of the array.
    memory : Given
        One part after the other, in float64.
    fresh : bool
        Whether nothing has been written there yet.
    """

    def __init__(self, name: str, array: Any, place: Place):
        self.name, self.shape, self.elements, self.fresh = name, np.shape(array), math.prod(np.shape(array)), True
        if self.elements >= 1 << 31:
            raise ValueError(f"grads: {name!r} has {self.elements} elements; expected fewer than 2**31")
        self.count = max(2, min(MOST_PARTS, MOST_ELEMENTS // max(1, self.elements)))
        self.storage = name_of(np.asarray(array).dtype)
        self.memory = place.new(f"parts of {name}", (self.count * self.elements,), "float64")

    def reads(self, problem: Problem, real: Any) -> Iterator[tuple[int, int]]:
        """The number of the array, and that of each place where the function of scores reads it."""
        function = problem.scores.score_mod
        assert function is not None
        number = next(i for i, each in enumerate(function.captured) if each.name == self.name)
        for place in range(number_of_places(function, np.dtype(real).name, self.name)):
            yield number, place

    def sums(self, place: Place) -> Given:
        """Queue the sums of the parts; the gradient."""
        result = place.new(f"gradient of {self.name}", self.shape, self.storage)
        if self.elements:
            made = kernel(sum_parts, Spec(self.storage))
            count = 0 if self.fresh else self.count
            arguments = (self.memory.memory(), count, self.elements, result.memory())
            launch(made, -(-self.elements // THREADS), (THREADS, 1), place.stream, arguments)
        return result


def parts_among(names: Sequence[str], arrays: Mapping[str, Any], place: Place) -> list[Parts]:
    """The parts of what functions capture that is among the names."""
    return [Parts(name, arrays[name], place) for name in names if name in arrays]
