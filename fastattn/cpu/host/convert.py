"""Rows of numbers, converted by compiled code to what a cache keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from fastattn.cpu.host import session
from fastattn.cpu.host.builtin import bind
from fastattn.cpu.host.kernels import load
from fastattn.machine.kernel import Kernel
from fastattn.machine.objects import objects_are_as_expected

__all__ = ["converter"]


@cache
def converter(given: str, kept: str) -> Callable[..., Any] | None:
    """Return what writes rows of one dtype, (heads, n, features), as those of another; None where NumPy does.

    It takes two arrays, from and to, of which the second has contiguous rows. Nothing is rounded from float64.
    """
    if given == kept or given not in ("float16", "bfloat16", "float32") or not objects_are_as_expected():
        return None
    row = session.current.row
    kernel = Kernel("convert", row, row.wide_tile("float32"), storage=given, queries=kept)
    return bind(load(kernel), "convert")
