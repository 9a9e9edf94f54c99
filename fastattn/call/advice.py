"""What a message says of an argument that is refused, and what to do about it: only where that is certain."""

from __future__ import annotations

import importlib.metadata
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.machine.objects import masked_arrays

__all__ = ["holds_masked", "is_masked", "is_tensor", "said", "to_convert", "to_install", "to_make_array"]


def to_convert(name: str, dtype: np.dtype[Any], given: object) -> str:
    """Say how to get a dtype that is supported: of half precision and other narrow numbers, float32.

    Parameters
    ----------
    name : str
        Of the argument.
    dtype : numpy.dtype
        The one that is not supported.
    given : object
        The argument: an array, or of which an array has been made.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn.call.advice import to_convert
    >>> to_convert("query", np.dtype(np.float16), np.ones(3, np.float16))
    ': query.astype(np.float32)'
    >>> to_convert("query", np.dtype(np.complex64), np.ones(3, np.complex64))
    ''
    """
    if not np.can_cast(dtype, np.longdouble):
        return ""
    if is_tensor(given):
        return f": {name}.float()"
    wide = f"np.{'float32' if np.can_cast(dtype, np.float32) else 'float64'}"
    return f": {name}.astype({wide})" if hasattr(given, "astype") else f": np.asarray({name}, {wide})"


def to_make_array(name: str, given: object) -> str:
    """Say what to do with a tensor of PyTorch that NumPy makes no array of."""
    if not is_tensor(given):
        return ""
    if getattr(given, "requires_grad", False):
        differentiable = " (fastattn.integrations.torch differentiates attention of tensors)"
        return differentiable if name in ("query", "key", "value") else ""
    return f": {name}.float()" if getattr(given, "is_cpu", False) else ""


def to_install(extra: str) -> str:
    """Say how to get what a part of fastattn needs besides.

    pip knows the name of a package that is installed, from wherever it came. A clone that is not installed, and is used
    where it lies, is named by its folder.

    Parameters
    ----------
    extra : str
        One of ``project.optional-dependencies`` in ``pyproject.toml``.
    """
    package, clone = "fastattn", Path(__file__).parents[2]
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        if (clone / "pyproject.toml").is_file():
            return f'pip install --editable "{clone}[{extra}]"'
    return f'pip install "{package}[{extra}]"'


def is_masked(given: object) -> bool:
    """Whether this is a ``np.ma.MaskedArray``."""
    return _is_kind_masked(type(given))


def _is_kind_masked(kind: type) -> bool:
    return kind is not np.ndarray and issubclass(kind, np.ndarray) and issubclass(kind, masked_arrays())


def holds_masked(given: object) -> bool:
    """Whether this is a list, or a tuple, with a masked array in it: NumPy would use what is masked."""
    if not isinstance(given, (list, tuple)):
        return False
    kinds = set(map(type, given))
    if any(map(_is_kind_masked, kinds)):
        return True
    return any(issubclass(kind, (list, tuple)) for kind in kinds) and any(map(holds_masked, given))


def is_tensor(given: object) -> bool:
    """Whether this is PyTorch's, which is not imported to ask."""
    return any(kind.__module__.partition(".")[0] == "torch" for kind in type(given).__mro__)


def said(given: object) -> str:
    """Say what was given, in a few words, however large it is."""
    if isinstance(given, np.ndarray):
        return f"an array of shape {given.shape} and dtype {given.dtype}"
    return f"{reprlib.repr(given)} of type {type(given).__name__}"
