"""What a call is known by: a call like an earlier one finds its plan, and nothing is checked or planned again."""

from __future__ import annotations

import struct
from collections.abc import Hashable
from typing import Any

import numpy as np

from fastattn.cpu.host.builtin import signatures
from fastattn.functions.recall import recalled

__all__ = ["ends_of", "is_free", "key_of_others", "masks_in", "number_in", "plain", "with_functions"]

#: Stands for "bottom-right" in a key: a NaN that no arithmetic makes.
BOTTOM_RIGHT = struct.unpack("=d", struct.pack("=Q", 0x7FF8_B077_0312_1647))[0]


def key_of_others(*arguments: Any) -> Hashable:
    """Return a signature of arguments of which some are scalars of NumPy's, or words; b"" if they have none."""
    return signatures.of(*map(plain, arguments))


def plain(argument: Any) -> Any:
    """Return what an option means, if that is something that a signature can be made of."""
    if isinstance(argument, (np.bool_, np.floating, np.integer)):
        return argument.item()
    return BOTTOM_RIGHT if type(argument) is str and argument == "bottom-right" else argument


def number_in(option: Any) -> Any:
    """Return the number in an array without axes; else the option."""
    return option.item() if type(option) is np.ndarray and option.ndim == 0 else option


def with_functions(asked: Hashable, score_mod: Any, mask_mod: Any) -> tuple[Hashable, tuple[Any, Any]]:
    """Return what calls with the user's functions are known by, and what these capture; b"" where they are new."""
    score, seen = recalled("score_mod", score_mod), recalled("mask_mod", mask_mod)
    if not asked or score is None or seen is None:
        return b"", ((), ())
    return (asked, score[0], seen[0]), (score[1], seen[1])


def is_free(out: Any, *read: Any) -> bool:
    """Whether results may be written to an array while others are read; the first of these may be the same."""
    return bool(out.flags.writeable) and not signatures.overlap(out, *read)


def ends_of(window: Any) -> tuple[Any, Any]:
    """Return the elements of a window; of what is no pair, something that has no signature."""
    return window if type(window) is tuple and len(window) == 2 else (window, window)


def masks_in(attn_mask: Any) -> tuple[Any, Any]:
    """Return the two elements of a pair, or what is no pair and None."""
    return attn_mask if type(attn_mask) is tuple and len(attn_mask) == 2 else (attn_mask, None)
