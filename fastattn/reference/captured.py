"""The gradients of arrays that a function of scores captures, as differences: element by element, score by score.

Python runs the function for each score that has a gradient, and notes which elements of the array it reads. The score
is differentiated by each of these: some twenty calls of the function, with another number in the element's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.problem import Operands, Problem
from fastattn.functions.function import Function
from fastattn.reference.functions import Where, derivatives, in_numpy, where_all

__all__ = ["gradients_of_captured"]

Array = NDArray[Any]


class _Watched:
    """An array of which it is noted which elements are read, by their numbers."""

    def __init__(self, values: Array, numbers: NDArray[np.int64], read: set[int]) -> None:
        self.values, self.numbers, self.read = values, numbers, read
        self.shape = values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        part, numbers = self.values[index], self.numbers[index]
        if np.ndim(part):
            return _Watched(part, numbers, self.read)
        self.read.add(int(numbers))
        return part


@np.errstate(all="ignore")
def gradients_of_captured(
    problem: Problem, operands: Operands, scores: Array, grads: Array, names: Sequence[str]
) -> dict[str, Array]:
    """Return the gradients of those captured arrays that are among some names.

    Parameters
    ----------
    problem : Problem
    operands : Operands
    scores : ndarray, shape (*batch, Hk, G, Lq, Lk)
        What the function is given.
    grads : ndarray, of this shape
        The gradient of what it returns, 0 for a hidden key.
    names : sequence of str

    Returns
    -------
    dict of str to ndarray
        In the dtype of the scores, each with the shape of its array.
    """
    function, captured = problem.scores.score_mod, operands.captured
    if function is None or captured is None:
        return {}
    where = where_all(problem, operands.heads)
    named = {each.name: value for each, value in zip(function.captured, captured.score, strict=True)}
    return {name: _gradient(function, name, named[name], scores, where, grads) for name in names if name in named}


def _gradient(function: Function, name: str, array: Array, scores: Array, where: Where, grads: Array) -> Array:
    wide, values = scores.dtype.type, array.astype(scores.dtype, order="C")
    readers = [reader for reader, own in function.own_names.items() if own == name]
    reads = list(_reads(function, readers, values, scores, where, grads))
    gradient, numbers = np.zeros_like(values), np.array([number for _, number in reads], np.int64)

    def scores_with(elements: Array) -> Array:
        """Return the score of each read, with another number in the place of what is read."""
        # an array without axes is a number, and these are all alike
        stands = values if values.ndim else elements[0]
        call, found = in_numpy(function.python, wide, dict.fromkeys(readers, stands)), np.empty_like(elements)
        for i, (place, number) in enumerate(reads):
            own = values.flat[number]
            values.flat[number] = elements[i]
            found[i] = call(scores[place], *(argument[place] for argument in where))
            values.flat[number] = own
        return found

    if reads:
        slopes, _ = derivatives(scores_with, values.reshape(-1)[numbers])
        of_reads = slopes * [grads[place] for place, _ in reads]
        np.add.at(gradient.reshape(-1), numbers, np.where(slopes == 0, 0, of_reads))  # not read: not even NaN
    return gradient


def _reads(
    function: Function, readers: Sequence[Any], values: Array, scores: Array, where: Where, grads: Array
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Go through the scores that have a gradient, and the numbers of the elements that each of them reads."""
    watched = _Watched(values, np.arange(values.size).reshape(values.shape), set())
    stands = watched if values.ndim else values[()]
    call = in_numpy(function.python, scores.dtype.type, dict.fromkeys(readers, stands))
    for place in zip(*np.nonzero(grads), strict=True):
        watched.read.clear()
        call(scores[place], *(argument[place] for argument in where))
        for number in sorted(watched.read) if values.ndim else (0,):
            yield place, number
