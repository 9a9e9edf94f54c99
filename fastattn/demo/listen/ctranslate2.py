"""A reader of CTranslate2's model.bin, the format in which the package has Whisper's weights.

All numbers are little-endian. A file is::

    u32 version, text name of the model's kind, u32 revision
    u32 variables; of each: text name, u8 axes, u32 length of each axis, u8 dtype, u32 bytes, and these bytes
    u32 aliases; of each: text name, text name of the variable that it is as well

and a text is its u16 length, with the zero byte at its end.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_variables"]

VERSION = 6
#: The dtypes by their numbers in the file; bfloat16, number 5, NumPy has not.
DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


class _Reader:
    """Takes one thing after another from the bytes of a file."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def number(self, kind: str) -> int:
        """An unsigned number, of struct's kind B, H or I."""
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return int(value)

    def raw(self, size: int) -> memoryview:
        """So many bytes as they lie."""
        if self.at + size > len(self.data):
            raise ValueError(f"the file ends at byte {len(self.data)}, within something of {size} bytes")
        self.at += size
        return memoryview(self.data)[self.at - size : self.at]

    def text(self) -> str:
        """A text, whose length comes first."""
        return bytes(self.raw(self.number("H"))).rstrip(b"\0").decode()


def read_variables(data: bytes) -> tuple[str, dict[str, NDArray[Any]]]:
    """Read a model from the bytes of its file.

    Returns
    -------
    kind : str
        Such as "WhisperSpec".
    variables : dict of str to ndarray
        By their names, aliases included; views of `data`, which are not to be written to.

    Raises
    ------
    ValueError
        If these bytes are no such file.
    """
    reader = _Reader(data)
    try:
        version, kind, _ = reader.number("I"), reader.text(), reader.number("I")
        if version != VERSION:
            raise ValueError(f"version {version} of the format; expected {VERSION}")
        variables = dict(_variable(reader) for _ in range(reader.number("I")))
        for _ in range(reader.number("I")):
            alias, name = reader.text(), reader.text()
            variables[alias] = variables[name]
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"no model of CTranslate2: {error}") from error
    except KeyError as error:
        raise ValueError(f"no variable or dtype {error}") from error
    return kind, variables


def _variable(reader: _Reader) -> tuple[str, NDArray[Any]]:
    name = reader.text()
    shape = [reader.number("I") for _ in range(reader.number("B"))]
    dtype = np.dtype(DTYPES[reader.number("B")])
    return name, np.frombuffer(reader.raw(reader.number("I")), dtype).reshape(shape)
