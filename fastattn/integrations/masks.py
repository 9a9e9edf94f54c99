"""Masks that say no more than they must, and that are eager's to everybody but fastattn's attention.

A model asks twice: for a mask, once for all its layers, and then in each layer for attention. Some models cut and
extend the mask in between, and some layers do not ask for attention, but compute it, and add the mask to their scores.
They were written for eager's, Lq x Lk numbers for each row of the batch. A mask that means something else, such as one
that is boolean, or leaves causality to the kernel, would silently be wrong there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.utils._pytree import tree_map_only
from transformers.utils.import_utils import is_tracing

from fastattn.call.scores import Scores

__all__ = ["EVERYTHING", "Mask", "Visible", "as_eager", "by_ends", "compact", "read"]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed

#: What asks a tensor for its shape, dtype or device, or for itself there, and not for its numbers.
LOOKS = frozenset(("__get__", "__getitem__", "__len__", "dim", "is_floating_point", "numel", "size", "stride", "to"))

#: Of these, what may have the mask itself as its result.
KEEP = frozenset(("__getitem__", "to"))


#: An interval of all keys.
ANY = Scores()


@dataclass(frozen=True, eq=False)
class Visible:
    """Which keys a query may look at: those of an interval that a mask does not hide.

    Attributes
    ----------
    interval : Scores
        What is said by positions: its reach and its offset.
    lengths : torch.Tensor of int64, shape (B,), or None
        How many keys each row of the batch has.
    kept : torch.Tensor of bool, broadcasting to (B, Hq, Lq, Lk), or None
    sequences : torch.Tensor of int64, shape (B, L), or None
        Of as many queries as keys, the number of the sequence that each is of, in rising order.
    """

    interval: Scores = ANY
    lengths: Tensor | None = None
    kept: Tensor | None = None
    sequences: Tensor | None = None

    def matrix(self, queries: int, keys: int, device: Any) -> Tensor:
        """Return a boolean for each query and key, which broadcasts to (B, Hq, Lq, Lk)."""
        ends = keys if self.lengths is None else self.lengths[:, None, None, None]
        query, key = (torch.arange(length, device=device) for length in (queries, keys))
        visible = self.interval.sees(query[:, None], key, ends)
        if self.sequences is not None:
            visible = visible & (self.sequences[:, None, :, None] == self.sequences[:, None, None, :])
        return visible if self.kept is None else visible & self.kept

    def cu_seqlens(self) -> Tensor:
        """Return the cumulative lengths of the sequences, the rows of the batch one behind the other."""
        assert self.sequences is not None
        begins = torch.ones_like(self.sequences, dtype=torch.bool)
        begins[:, 1:] = self.sequences[:, 1:] != self.sequences[:, :-1]
        starts = begins.flatten().nonzero()[:, 0]
        return torch.cat((starts, starts.new_tensor([begins.numel()])))

    def options(self) -> dict[str, Any]:
        """Return what `fastattn.integrations.torch.attention_with_lse` is to be told, besides of the mask."""
        left, right, offset = self.interval.left, self.interval.right, self.interval.offset
        options: dict[str, Any] = {} if self.lengths is None else {"key_lengths": self.lengths}
        if (left, right, offset) == (None, 0, 0):
            return options | {"is_causal": True}
        if (left, right) == (None, None):
            return options
        return options | {"window": (left, right)} | ({"query_offset": offset} if offset else {})


EVERYTHING = Visible()


class Mask(torch.Tensor):  # type: ignore[misc]  # PyTorch's types are not known here
    """A mask of the shape and dtype of eager's, whose numbers are made when something computes with them.

    What lies in its memory is one NaN: what reads that by a way that is not foreseen here does not go unnoticed.
    """

    visible: Visible  #: what it says
    numbers: Tensor | None  #: eager's mask, once it has been made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of PyTorch with eager's mask, if it wants more than to look."""
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                found = function(*args, **kwargs)
            if not isinstance(found, torch.Tensor):
                return found
            if function.__name__ in KEEP and isinstance(args[0], cls) and _is_all_of(args[0], found):
                return args[0]
        args, kwargs = tree_map_only(cls, as_eager, (args, kwargs))
        return function(*args, **kwargs)


def compact(visible: Visible, shape: tuple[int, ...], dtype: Any, device: Any) -> Mask:
    """Return a mask of eager's shape and dtype."""
    mask: Mask = torch.full((), torch.nan, dtype=dtype, device=device).expand(shape).as_subclass(Mask)
    mask.visible, mask.numbers = visible, None
    return mask


def as_eager(mask: Mask) -> Tensor:
    """Return the numbers that eager's attention adds to its scores: 0, or the lowest one.

    They are made once. The mask is then that tensor, for whoever has it may write to it.
    """
    if mask.numbers is None:
        queries, keys = mask.shape[-2:]
        visible = mask.visible.matrix(queries, keys, mask.device)
        numbers = torch.zeros(mask.shape, dtype=mask.dtype, device=mask.device)
        mask.numbers = numbers.masked_fill(~visible, torch.finfo(mask.dtype).min)
    return mask.numbers


def read(mask: Tensor, queries: int, keys: int) -> tuple[Tensor | None, Visible]:
    """Return what a mask adds to scores, and which keys it leaves to queries."""
    if isinstance(mask, Mask):
        found: tuple[Tensor | None, Visible] = _read(mask, queries, keys)
        return found
    return (None, Visible(kept=mask)) if mask.dtype == torch.bool else (mask, EVERYTHING)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled layer of a model that is not compiled comes here: a whole one has eager's masks
def _read(mask: Mask, queries: int, keys: int) -> tuple[Tensor | None, Visible]:
    if mask.numbers is not None or mask.shape[-2:] != (queries, keys):
        return as_eager(mask), EVERYTHING
    return None, mask.visible


def by_ends(visible: Visible, told: list[Any], query: Tensor, key: Tensor) -> Visible:
    """Return which keys are left where a model says in numbers where sequences end, as flash-attention takes it.

    That is all of (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k), and of two cumulative lengths that are
    the same, of all rows of the batch one behind the other. What flash-attention would not go by changes nothing: less
    than all of these, or a mask besides that has padding.
    """
    rows, _, length, _ = query.shape
    masked = any(each is not None for each in (visible.lengths, visible.kept, visible.sequences))
    if masked or any(each is None for each in told) or is_tracing(query):
        return visible
    ends, others = (each.long() for each in told[:2])
    if length != key.shape[2] or visible.interval.offset or not torch.equal(ends, others):
        return visible
    tokens = torch.arange(rows * length, device=ends.device)
    starts = tokens[::length]
    if ends[0] != 0 or ends[-1] != rows * length or bool((ends.diff() < 0).any()) or not torch.isin(starts, ends).all():
        return visible
    numbers = torch.searchsorted(ends[1:].contiguous(), tokens, right=True)
    return replace(visible, sequences=numbers.unflatten(0, (rows, length)))


def _is_all_of(mask: Mask, found: Tensor) -> bool:
    """Whether what an index or a move made of a mask is that mask, as long as it has no numbers of its own."""
    looks = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in (mask, found)]
    return mask.numbers is None and looks[0] == looks[1]
