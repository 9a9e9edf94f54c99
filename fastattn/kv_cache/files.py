"""Files of tensors in the format of safetensors: a header of JSON with names, dtypes, shapes and places, then the data.

Eight bytes, little-endian, say how long the header is.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fastattn.call.advice import said
from fastattn.call.halves import BITS
from fastattn.call.problem import Array, Shape

__all__ = ["Path", "Tensor", "read", "write"]

Path: TypeAlias = "str | os.PathLike[str]"

#: The dtypes of such files, by their names there.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": BITS,
    "F16": np.dtype(np.float16),
    "I64": np.dtype(np.int64),
    "I8": np.dtype(np.int8),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
WORD = 8
LONGEST_HEADER = 100_000_000  # bytes, as others have it


class Tensor(NamedTuple):
    """An array, in parts along its first axis, of which no more than one is there at a time."""

    dtype: np.dtype[Any]
    shape: Shape
    parts: Iterable[Array]

    @property
    def nbytes(self) -> int:
        """Bytes of it all."""
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Array:
        """Return the array."""
        array = np.empty(self.shape, self.dtype)
        for number, part in enumerate(self.parts):
            array[number] = part
        return array


def as_path(given: object) -> str:
    """Return the path of a file as a word.

    Raises
    ------
    TypeError
        If it is none: the number of an open file, for instance.
    """
    try:
        return os.fsdecode(given)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"path: {said(given)}; expected a str or an os.PathLike") from None


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors; what was there before is replaced when all has been written."""
    header: dict[str, Any] = {METADATA: dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % WORD)
    path = as_path(path)
    unfinished = os.path.join(os.path.dirname(path), f".{secrets.token_hex(WORD)}.tmp")
    try:
        with open(unfinished, "xb") as file:  # a new file, and none that somebody else's link leads to
            file.write(len(content).to_bytes(WORD, "little") + content)
            for tensor in tensors.values():
                for part in tensor.parts:
                    file.write(_little_endian(part).tobytes())
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the tensors of a file, and its metadata.

    Raises
    ------
    ValueError
        If it is no such file, or has tensors of other dtypes.
    """
    path = as_path(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(WORD), "little")
        if size > min(LONGEST_HEADER, os.fstat(file.fileno()).st_size):  # room would be made for all of it
            raise ValueError(f"path: {path!r} has no header; expected a file of the format safetensors")
        content, data = file.read(size), np.fromfile(file, np.uint8)
    try:
        header = json.loads(content)
        metadata = header.pop(METADATA, {})
        return {name: _tensor(data, **said) for name, said in header.items()}, metadata
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"path: {path!r} cannot be read; expected a file of the format safetensors: {error}"
        ) from error


def _tensor(data: Array, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
    begin, end = data_offsets
    kind = DTYPES[dtype]
    if not 0 <= begin <= end <= len(data):
        raise ValueError(f"data from {begin} to {end}, of {len(data)} bytes")
    if len(data[begin:end]) != math.prod(shape) * kind.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"{end - begin} bytes of {dtype}, shape {shape}")
    return _little_endian(data[begin:end].view(kind).reshape(shape))


def _little_endian(array: Array) -> Array:
    """Return an array as it lies in a file, or one from there."""
    return array.byteswap() if sys.byteorder == "big" else array
