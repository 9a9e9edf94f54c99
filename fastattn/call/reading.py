"""Keys and values that come in blocks: cut from arrays that need not be in memory, or one after the other.

Each block is read in a thread of its own while the one before it is computed.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from fastattn.call.advice import said
from fastattn.call.arrays import as_array
from fastattn.call.problem import Array, Shape

__all__ = ["Block", "Source", "source_of"]

#: Bytes of keys and values in a block, about, where nothing else is said: as many again are read meanwhile.
BLOCK_BYTES = 1 << 25
#: The size of blocks is a multiple of this, where arrays have no chunks.
STEP = 256
PAGE_BYTES = 4096


class Block(NamedTuple):
    """Some keys and their values: which block it is, the number of its first key, and the arrays."""

    number: int
    first: int
    key: Array
    value: Array


class Source(NamedTuple):
    """Where blocks come from.

    Attributes
    ----------
    given : tuple or iterable
        A pair of array-likes, or blocks.
    keys : int or None
        How many keys there are; None where that is known at the end alone.
    size : int
        Keys of a block that is cut from a pair.
    """

    given: Any
    keys: int | None
    size: int

    def read(self, begin: int, end: float) -> Iterator[Block]:
        """Yield the blocks in which keys from one number to another are, the next of them being read meanwhile.

        Of an iterable also those before, which have to be passed, and the first in any case.
        """
        if self.keys is None:
            yield from _ahead(_checked(self.given, end))
            return
        cut = _cut(self.given, self.size, begin, min(end, self.keys))
        yield from cut if all(type(each) is np.ndarray and not _is_mapped(each) for each in self.given) else _ahead(cut)

    def nothing(self) -> Block:
        """A block without keys, where no other has been read.

        Raises
        ------
        ValueError
            If blocks are iterated: there was none.
        """
        if self.keys is None:
            raise ValueError("blocks: nothing in it; expected at least one (key, value)")
        key, value = self.given
        return Block(0, 0, _part("key", key, 0, 0), _part("value", value, 0, 0))


def source_of(given: Any, size: object = None) -> Source:
    """Return where blocks come from: a tuple of two objects with a shape is a pair, all else is iterated.

    Parameters
    ----------
    given : pair of array_like, or iterable of such pairs
    size : int, optional
        How many keys of a pair are a block.

    Raises
    ------
    TypeError, ValueError
        If it is neither, or the shapes of a pair do not go together, or the size is no positive number.
    """
    if size is not None and (isinstance(size, (bool, np.bool_)) or not isinstance(size, (int, np.integer))):
        raise TypeError(f"block_size: {said(size)}; expected a positive int, or None")
    if size is not None and size < 1:
        raise ValueError(f"block_size: {size}; expected a positive int, or None")
    if not _is_pair_of_arrays(given):
        if not isinstance(given, Iterable):
            expected = "expected an iterable of (key, value), or a tuple of two arrays"
            raise TypeError(f"blocks: {said(given)}; {expected}")
        if size is not None:
            raise ValueError(f"block_size: {size}, with blocks that are iterated; expected None, as they have a size")
        return Source(iter(given), None, 0)
    shapes = [_shape(each) for each in given]
    if any(len(shape) < 2 for shape in shapes) or shapes[0][-2] != shapes[1][-2]:
        raise ValueError(
            f"blocks: a key of shape {shapes[0]} and a value of shape {shapes[1]}; expected (..., Hk, Lk, D) and "
            "(..., Hk, Lk, Dv)"
        )
    return Source(given, shapes[0][-2], _size(given, shapes) if size is None else int(size))


def _is_pair_of_arrays(given: object) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(_shape(each) is not None for each in given)


def _shape(given: Any) -> Any:
    """The shape of what may be an array; a slice of safetensors is asked for it."""
    shape = getattr(given, "shape", None)
    if shape is None and hasattr(given, "get_shape"):
        shape = given.get_shape()
    if shape is None:
        return None
    try:
        sizes = tuple(int(size) for size in shape)
    except (TypeError, ValueError):
        sizes = (-1,)
    if min(sizes, default=0) < 0:
        raise ValueError(f"blocks: shape {shape!r} of a {type(given).__name__}; expected whole numbers")
    return sizes


def _size(given: tuple[Any, Any], shapes: list[Shape]) -> int:
    """How many keys of a pair are a block: whole chunks, where these are how the arrays are stored."""
    bytes_of_key = 0
    for each, shape in zip(given, shapes, strict=True):
        itemsize = getattr(getattr(each, "dtype", None), "itemsize", 8)
        bytes_of_key += math.prod(shape) // max(1, shape[-2]) * itemsize
    wanted = max(STEP, BLOCK_BYTES // max(1, bytes_of_key))
    chunks = [_chunk(each) for each in given]
    step = math.lcm(*(size for size in chunks if size)) if any(chunks) else STEP
    if step > 4 * wanted:
        step = STEP
    return max(1, wanted // step) * step


def _chunk(given: Any) -> int:
    """Rows of a chunk, as Zarr, HDF5 and Dask have them; 0 where there are none."""
    chunks = getattr(given, "chunks", None)
    if not isinstance(chunks, tuple) or len(chunks) < 2:
        return 0
    rows = max(chunks[-2], default=0) if isinstance(chunks[-2], tuple) else chunks[-2]
    return max(int(rows), 0) if isinstance(rows, (int, np.integer)) else 0


def _cut(pair: tuple[Any, Any], size: int, begin: int, end: float) -> Iterator[Block]:
    """The blocks of a pair, from multiples of their size to others."""
    key, value = pair
    for first in range(begin - begin % size, math.ceil(end), size):
        last = min(first + size, _shape(key)[-2])
        yield Block(first // size, first, _part("key", key, first, last), _part("value", value, first, last))


def _part(name: str, given: Any, first: int, end: int) -> Array:
    """Some rows of an array-like, in memory."""
    *others, _, features = shape = _shape(given)
    everything = (slice(None),) * len(others)
    array = as_array(f"blocks: {name}", given[(*everything, slice(first, end), slice(None))])
    expected = (*others, end - first, features)
    if array.shape != expected:
        raise ValueError(
            f"blocks: {name}: shape {array.shape} of keys {first} to {end}; expected {expected}, as it says that its "
            f"shape is {shape}"
        )
    if _is_mapped(array):
        _touch(array)
    return array


def _is_mapped(array: Any) -> bool:
    """Whether an array is a file that is mapped into memory."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)


def _touch(array: Array) -> None:
    """Have the system read a file that is mapped into memory, by a look at each page of it."""
    rows, columns = (max(1, PAGE_BYTES // max(1, abs(stride))) for stride in array.strides[-2:])
    array[..., :: min(rows, array.shape[-2] or 1), :: min(columns, array.shape[-1] or 1)].copy()


def _checked(given: Iterator[Any], end: float) -> Iterator[Block]:
    """The blocks of an iterable, as arrays; none but the first that begins behind an end."""
    number, first, wanted = 0, 0, None
    while first < end or number == 0:
        try:
            element = next(given)
        except StopIteration:
            return
        key, value = _as_pair(number, element)
        here = [(*array.shape[:-2], array.shape[-1], array.dtype) for array in (key, value)]
        wanted = here if wanted is None else wanted
        if here != wanted or key.shape[-2] != value.shape[-2]:
            shapes = f"{key.dtype} {key.shape} and {value.dtype} {value.shape}"
            alike = "as many keys as values" if here == wanted else "dtypes, and shapes but for Lk, as of blocks[0]"
            raise ValueError(f"blocks[{number}]: {shapes}; expected {alike}")
        yield Block(number, first, key, value)
        number, first = number + 1, first + key.shape[-2]


def _as_pair(number: int, element: Any) -> tuple[Array, Array]:
    """One element of an iterable."""
    expected = "expected a tuple (key, value)"
    if not isinstance(element, (tuple, list)):
        raise TypeError(f"blocks[{number}]: {said(element)}; {expected}")
    if len(element) != 2:
        raise ValueError(f"blocks[{number}]: a {type(element).__name__} of {len(element)}; {expected}")
    arrays = []
    for name, size, given in zip(("key", "value"), ("D", "Dv"), element, strict=True):
        array = as_array(f"blocks[{number}]: {name}", given)
        if array.ndim < 2:
            raise ValueError(f"blocks[{number}]: {name}: shape {array.shape}; expected (..., Hk, Lk, {size})")
        if _is_mapped(array):
            _touch(array)
        arrays.append(array)
    return arrays[0], arrays[1]


def _ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same blocks, each read in another thread while the one before it is with the caller."""
    with ThreadPoolExecutor(1, "fastattn-reading") as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block
            del block
