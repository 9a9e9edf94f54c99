"""What a call is known by: a call like an earlier one finds its plan, and nothing is checked or planned again."""

from __future__ import annotations

import struct
from collections.abc import Hashable
from typing import Any

import numpy as np

from fastattn.cpu.host.builtin import signatures

__all__ = ["ends_of", "key_of_others", "masks_in"]

#: Stands for "bottom-right" in a key: a NaN that no arithmetic makes.
BOTTOM_RIGHT = struct.unpack("=d", struct.pack("=Q", 0x7FF8_B077_0312_1647))[0]


def key_of_others(*arguments: Any) -> Hashable:
    """Return a signature of arguments of which some are scalars of NumPy's, or words; b"" if they have none."""
    return signatures.of(*map(_plain, arguments))


def _plain(argument: Any) -> Any:
    """What an option means, if that is something that a signature can be made of."""
    if isinstance(argument, (np.bool_, np.floating, np.integer)):
        return argument.item()
    return BOTTOM_RIGHT if type(argument) is str and argument == "bottom-right" else argument


def ends_of(window: Any) -> tuple[Any, Any]:
    """Return the elements of a window; of what is no pair, something that has no signature."""
    return window if type(window) is tuple and len(window) == 2 else (window, window)


def masks_in(attn_mask: Any) -> tuple[Any, Any]:
    """Return the two elements of a pair, or what is no pair and None."""
    return attn_mask if type(attn_mask) is tuple and len(attn_mask) == 2 else (attn_mask, None)
