"""Whether an argument broadcasts to a shape, and which other shape of it would: the first error of many a mask."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any, TypeAlias

from numpy.typing import NDArray

__all__ = ["broadcasts", "check_broadcasts", "once", "reshaped"]

Shape: TypeAlias = tuple[int, ...]

#: Axes of the largest shape that ways to place others in are tried for: there are many, and people have few axes.
MOST_AXES = 8


def once(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array without its repetitions: axes that are broadcast have length 1."""
    alike = (stride == 0 and length > 1 for stride, length in zip(array.strides, array.shape, strict=True))
    return array[tuple(slice(0, 1) if repeated else slice(None) for repeated in alike)]


def broadcasts(shape: Shape, full: Shape) -> bool:
    """Whether an array of `shape` broadcasts to `full`, and does not enlarge it."""
    return len(shape) <= len(full) and all(
        own in (1, other) for own, other in zip(reversed(shape), reversed(full), strict=False)
    )


def check_broadcasts(name: str, shape: Shape, full: Shape, of: str = "") -> None:
    """Check that an argument broadcasts to the shape of something, and does not enlarge it.

    Raises
    ------
    ValueError
        If it does not. Where it would with axes of length 1 put in or left out, the message says which.
    """
    if not broadcasts(shape, full):
        others = " or ".join(f"{name}.reshape{other}" for other in reshaped(shape, full))
        raise ValueError(
            f"{name}: shape {shape}; expected one that broadcasts to {full}{of and ', the shape of '}{of}"
            f"{others and ', as does '}{others}"
        )


def reshaped(shape: Shape, full: Shape) -> list[Shape]:
    """Return the shapes that an array of `shape` may be meant to have, where it does not broadcast to `full`.

    They have the same axes in the same order, and the last one, that of the keys, where it is, but axes of length 1 are
    put in or left out. Or the first axis is what all axes but the last two are in one, as PyTorch's
    ``MultiheadAttention`` has a mask for each head.

    Examples
    --------
    >>> from fastattn.call.broadcasting import reshaped
    >>> reshaped((2, 7), (2, 8, 5, 7))  # for each element of a batch, its keys
    [(2, 1, 1, 7)]
    >>> reshaped((2, 5, 7), (2, 8, 5, 7))
    [(2, 1, 5, 7)]
    >>> reshaped((2 * 8, 5, 7), (2, 8, 5, 7))
    [(2, 8, 5, 7)]
    >>> reshaped((7, 2), (2, 8, 5, 7))
    []
    """
    if len(full) > MOST_AXES or not shape:
        return []
    lengths = tuple(length for length in shape if length != 1)
    found = []
    for places in combinations(range(len(full)), len(lengths)):
        last_stays = (len(full) - 1 in places) == (shape[-1] != 1)
        if last_stays and tuple(full[place] for place in places) == lengths:
            found.append(tuple(full[place] if place in places else 1 for place in range(len(full))))
    heads, rows = full[:-2], shape[1:]
    if not found and len(heads) > 1 and len(shape) == 3 and shape[0] == math.prod(heads):
        found = [(*heads, *rows)] if broadcasts(rows, full[-2:]) else []
    return found
