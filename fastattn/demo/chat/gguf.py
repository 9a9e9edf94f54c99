"""GGUF files, in which language models are kept: what a file says about itself, and its tensors.

The file begins with numbers and strings by name, such as the number of layers and all tokens of the vocabulary; then
comes a list of tensors, and then their data. Most are quantised: in blocks of 32 numbers that share a scale.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GGUF"]

#: Kinds of numbers, as `struct` spells them.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
BLOCK = 32
MOST_AXES = 4  # of a tensor, in all such files

Q4_1 = np.dtype([("scale", "<f2"), ("least", "<f2"), ("pairs", "u1", BLOCK // 2)])
Q8_0 = np.dtype([("scale", "<f2"), ("numbers", "i1", BLOCK)])


def _from_q4_1(blocks: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers from blocks of four bits: the lower halves of the bytes are the first 16, the upper halves the rest."""
    result = np.empty((len(blocks), BLOCK), np.float32)
    np.bitwise_and(blocks["pairs"], 15, out=result[:, : BLOCK // 2], casting="unsafe")
    np.right_shift(blocks["pairs"], 4, out=result[:, BLOCK // 2 :], casting="unsafe")
    result *= blocks["scale"].astype(np.float32)[:, None]
    result += blocks["least"].astype(np.float32)[:, None]
    return result


def _from_q8_0(blocks: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers from blocks of eight bits."""
    result: NDArray[np.float32] = blocks["numbers"] * blocks["scale"].astype(np.float32)[:, None]
    return result


#: How the data of a tensor lie, by the file's number for it: what they are made of, how many numbers each holds, and
#: what turns them into float32.
FORMATS: dict[int, tuple[np.dtype[Any], int, Callable[[NDArray[Any]], NDArray[np.float32]]]] = {
    0: (np.dtype("<f4"), 1, lambda numbers: numbers.astype(np.float32)),
    3: (Q4_1, BLOCK, _from_q4_1),
    8: (Q8_0, BLOCK, _from_q8_0),
}


class GGUF:
    """A file, mapped into memory: a tensor is read when it is asked for.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    facts : dict of str to number, str or list
        What the file says about the model.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is not such a file, or ends too early.
    """

    def __init__(self, path: Path) -> None:
        self._data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        self._bytes = memoryview(self._data)  # type: ignore[arg-type]
        self._at = 4
        try:
            if bytes(self._bytes[:4]) != b"GGUF" or self._number("I") not in VERSIONS:
                raise ValueError("it is not a GGUF file of version 2 or 3")
            tensors, facts = self._number("Q"), self._number("Q")
            self.facts: dict[str, Any] = {self._string(): self._value(self._number("I")) for _ in range(facts)}
            self._tensors = {self._string(): self._where() for _ in range(tensors)}
        except struct.error as error:
            raise ValueError("it ends in the middle") from error
        except RecursionError:
            raise ValueError("it holds lists of lists, one in another without end") from None
        alignment = self.facts.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its tensors begin at multiples of {alignment!r:.40}")
        self._begin = -(-self._at // alignment) * alignment

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32; its last axis is the one that is contiguous, as NumPy has it.

        Raises
        ------
        KeyError
            If there is none of this name.
        ValueError
            If its format is not among `FORMATS`, its shape is none, or the file ends before it does.
        """
        shape, number, offset = self._tensors[name]
        if number not in FORMATS:
            raise ValueError(f"{name} is in format {number}, which is not read here")
        dtype, block, numbers = FORMATS[number]
        count, over = divmod(math.prod(shape), block)
        if over or not count or len(shape) > MOST_AXES:
            raise ValueError(f"{name} has shape {shape}, which is none of blocks of {block} numbers")
        begin = self._begin + offset
        data = self._data[begin : begin + count * dtype.itemsize]
        if data.size < count * dtype.itemsize:
            raise ValueError(f"it ends before {name} does")
        with np.errstate(all="ignore"):  # what is no number stays none
            return numbers(data.view(dtype)).reshape(shape)

    def _number(self, kind: str) -> Any:
        layout = "<" + kind
        (value,) = struct.unpack_from(layout, self._bytes, self._at)
        self._at += struct.calcsize(layout)
        return value

    def _string(self) -> str:
        (text,) = struct.unpack_from(f"{self._number('Q')}s", self._bytes, self._at)
        self._at += len(text)
        return str(text, "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, count = self._number("I"), self._number("Q")
            return [self._value(inner) for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"it holds a value of the unknown kind {kind}")
        return self._number(NUMBERS[kind])

    def _where(self) -> tuple[tuple[int, ...], int, int]:
        """The shape of a tensor, which the file lists from the last axis to the first, its format, and its place."""
        axes = [self._number("Q") for _ in range(self._number("I"))]
        return tuple(reversed(axes)), self._number("I"), self._number("Q")
