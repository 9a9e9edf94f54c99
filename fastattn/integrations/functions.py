"""Functions of scores that were written for PyTorch's tensors, and its block masks, as fastattn takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from types import FunctionType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fastattn.api.block_mask import BlockMask
from fastattn.call.problem import Array
from fastattn.call.score_options import FurtherOptions
from fastattn.functions import masks
from fastattn.functions.function import described, rebuilt
from fastattn.integrations.tensors import array_of, check_memory

__all__ = ["FUNCTIONS", "Functions", "adapted", "has_functions"]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed

#: The options that are functions, or made of some.
FUNCTIONS = ("score_mod", "mask_mod", "block_mask")

#: Where PyTorch has its block masks, which takes long to import: whoever has one has imported it.
MODULE = "torch.nn.attention.flex_attention"
#: What it makes of several functions, by their qualified names, with the variable that these are in.
COMBINED = {
    "and_masks.<locals>.and_mask": ("mask_mods", masks.both),
    "or_masks.<locals>.or_mask": ("mask_mods", masks.either),
}

# What was made of PyTorch's block masks, as long as these live.
_known: WeakKeyDictionary[Any, BlockMask] = WeakKeyDictionary()


def has_functions(options: FurtherOptions) -> bool:
    """Whether options are given that are functions, or made of some."""
    return any(options.get(name) is not None for name in FUNCTIONS)


class Functions:
    """Those of the options that are functions, on their way to a kernel.

    Attributes
    ----------
    tensors : list of torch.Tensor
        What the function of scores captures, each once: autograd looks after these.
    """

    def __init__(self, options: FurtherOptions) -> None:
        self._given = {name: options.get(name) for name in FUNCTIONS if options.get(name) is not None}
        self.tensors: list[Tensor] = []
        self._labels: list[str] = []
        self._places: dict[int, Array] = {}  # an array for each, by the tensor's id
        self._outline: FunctionType | None = None
        score_mod = self._given.get("score_mod")
        if isinstance(score_mod, FunctionType):
            self._outline = rebuilt("score_mod", _known_function(score_mod), self._collect)

    def _collect(self, name: str, value: Any) -> Any:
        if isinstance(value, FunctionType):
            return _known_function(value)
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._places:
            self.tensors.append(check_memory(f"score_mod: captures {name}", value))
            self._labels.append(name)
            self._places[id(value)] = np.zeros(1)
        return self._places[id(value)]

    @property
    def names(self) -> list[tuple[str, ...]]:
        """By which names fastattn knows each of the tensors: several, if the function has."""
        if self._outline is None:
            return []
        function, values = described("score_mod", self._outline)
        named = [(each.name, value) for each, value in zip(function.captured, values, strict=True)]
        return [tuple(name for name, value in named if value is place) for place in self._places.values()]

    def on(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Return the functions on arrays, given the tensors as a kernel gets them, with no transform at work."""
        given = zip(self.tensors, tensors, self._labels, strict=True)
        arrays = {id(own): _array(f"score_mod: captures {name}", tensor) for own, tensor, name in given}
        return {
            name: _of_theirs(given) if type(given).__module__ == MODULE else _on_arrays(name, given, arrays)
            for name, given in self._given.items()
        }


def adapted(options: FurtherOptions) -> tuple[Any, ...]:
    """Return `Functions`, and the tensors that these capture, as the last arguments of a kernel.

    Raises
    ------
    TypeError
        If a captured tensor is none in the memory of the CPU.
    """
    functions = Functions(options)
    return functions, *functions.tensors


def _on_arrays(role: str, given: Any, arrays: Mapping[int, Array] | None = None) -> Any:
    """Return a function that captures arrays in place of tensors: `arrays`, by the ids of some, or their own."""
    known = arrays or {}
    if not isinstance(given, FunctionType):
        return given

    def change(name: str, value: Any) -> Any:
        if isinstance(value, FunctionType):
            return _known_function(value)
        if not isinstance(value, torch.Tensor):
            return value
        found = known.get(id(value))
        return _array(f"{role}: captures {name}", value) if found is None else found

    return rebuilt(role, _known_function(given), change)


def _array(label: str, given: Tensor) -> Array:
    """Return a captured tensor's memory; a copy of one of bfloat16, of which NumPy has no arrays."""
    tensor = check_memory(label, given).detach()
    return array_of(label, tensor.float() if tensor.dtype is torch.bfloat16 else tensor)


def _known_function(function: FunctionType) -> FunctionType:
    """Return what means the same as a function of PyTorch's, of those that go with its block masks."""
    if function.__module__ != MODULE:
        return function
    if function.__qualname__ == "noop_mask":
        return masks.everything  # type: ignore[return-value]
    if function.__qualname__ in COMBINED:
        name, combine = COMBINED[function.__qualname__]
        parts = (function.__closure__ or ())[function.__code__.co_freevars.index(name)].cell_contents
        return reduce(combine, map(_known_function, parts))  # type: ignore[arg-type]
    return function


def _of_theirs(given: Any) -> BlockMask:
    """Return what means the same as a block mask of PyTorch's: its function where its blocks ask it.

    Raises
    ------
    ValueError
        If it was sliced, and so has lost its function.
    """
    found = _known.get(given)
    if found is not None:
        return found
    if getattr(given.mask_mod, "__qualname__", "") == "_sliced_mask_mod_error":
        raise ValueError("block_mask: a part of a BlockMask, which has no mask_mod; expected a whole one")
    kinds = _kinds_of_theirs(given)
    mask = _on_arrays("block_mask", given.mask_mod)
    queries, keys = given.seq_lengths
    rows, heads = (None if size == 1 else size for size in kinds.shape[:2])
    mask = masks.in_blocks(kinds.numpy(), given.BLOCK_SIZE[0], given.BLOCK_SIZE[1], mask)
    found = _known[given] = BlockMask.from_function(mask, queries, keys, rows, heads)
    return found


def _kinds_of_theirs(given: Any) -> Tensor:
    """Of which kind its blocks are: 0 for those that are not listed, 1 where its function is asked, 2 for full ones."""
    some = _listed(given.kv_num_blocks, given.kv_indices)
    if given.full_kv_num_blocks is None:
        return some
    return torch.maximum(some, 2 * _listed(given.full_kv_num_blocks, given.full_kv_indices))


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Return 1 for each block that is in a list, of which the first so many elements count."""
    check_memory("block_mask", counts)
    columns = indices.size(-1)
    counted = torch.arange(columns) < counts[..., None]
    listed = torch.zeros((*counts.shape, columns + 1), dtype=torch.uint8)
    listed.scatter_(-1, torch.where(counted, indices, columns).long(), 1)
    return listed[..., :columns]
