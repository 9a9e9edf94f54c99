"""Which arrays are on a GPU: asked at every call, so nothing of CUDA is imported for it."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["any_on_device", "is_on_device", "library_of"]

HOST = (np.ndarray, list, tuple, int, float, type(None))
STREAMING = ("torch", "cupy")  # libraries that say on which stream they work, though not by the interface
CUDA_DEVICES = (2, 13)  # kDLCUDA and kDLCUDAManaged of DLPack


def is_on_device(given: Any) -> bool:
    """Whether this is an array in the memory of a GPU."""
    if isinstance(given, HOST):
        return False
    if library_of(given) == "torch":
        return bool(getattr(given, "is_cuda", False))
    if getattr(given, "__cuda_ndarray__", False):
        return True
    try:
        if getattr(given, "__cuda_array_interface__", None) is not None:
            return True
    except Exception:  # of a dtype that the interface does not know
        return hasattr(given, "__dlpack__")
    asked = getattr(given, "__dlpack_device__", None)
    return asked is not None and int(asked()[0]) in CUDA_DEVICES


def any_on_device(*given: Any) -> bool:
    """Whether one of these is an array in the memory of a GPU."""
    return any(is_on_device(one) for one in given)


def library_of(given: Any) -> str:
    """The library that the type of an array, or one that it is derived from, comes from."""
    own, *bases = (kind.__module__.partition(".")[0] for kind in type(given).__mro__)
    return next((library for library in bases if library in STREAMING), own)
