"""What all ranks must know alike: an error of one of them, and what a call is."""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import numpy as np

from fastattn.call.blocks import Blocks
from fastattn.call.halves import name_of
from fastattn.functions.function import described

__all__ = ["agree", "in_words"]


def agree(comm: Any, failure: Exception | None, told: Any, alike: Mapping[str, str]) -> list[Any]:
    """Return what each rank tells of itself, or raise the same error on each of them. All ranks call this together.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    failure : Exception or None
        What has failed on this rank.
    told
        What may differ between ranks.
    alike : mapping of str to str
        What may not, in words, by the names of arguments.

    Raises
    ------
    ValueError
        If not all say the same; the message names the argument and two ranks.
    Exception
        If something has failed: what it was on the first of these ranks, which the message names, if it was not the
        same on all. Kinds of errors that Python does not know by itself become RuntimeError.
    """
    error = None if failure is None else (type(failure).__name__, str(failure))
    reports = comm.allgather((error, told, alike))
    failures = [(rank, report[0]) for rank, report in enumerate(reports) if report[0] is not None]
    if failures:
        rank, (kind, text) = failures[0]
        everywhere = len(failures) == len(reports) and all(each == failures[0][1] for _, each in failures)
        raise _kind(kind)(text if everywhere else f"rank {rank}: {text}") from failure
    expected = reports[0][2]
    for rank, (_, _, words) in enumerate(reports):
        for name, word in words.items():
            if word != expected.get(name):
                raise ValueError(
                    f"{name}: {expected.get(name)} on rank 0, {word} on rank {rank}; expected the same on all"
                )
    return [report[1] for report in reports]


def _kind(name: str) -> Any:
    kind = getattr(builtins, name, None)
    return kind if kind in (ValueError, TypeError, IndexError, MemoryError, NotImplementedError) else RuntimeError


def in_words(name: str, option: Any) -> str:
    """Return an option in words that are the same where it means the same, arrays by a hash of what they hold."""
    if isinstance(option, FunctionType):
        function, _ = described(name, option)
        return f"{option.__name__}, of code and captured kinds {function.identity[:12]}"
    if isinstance(option, Blocks):
        return f"{option.shape}, of code and captured kinds {option.function.identity[:12]}"
    if isinstance(option, np.generic):
        return repr(option.item())
    if isinstance(option, (list, tuple)):
        return repr(tuple(option))
    if option is None or isinstance(option, (bool, int, float, str)):
        return repr(option)
    array = np.asarray(option)
    found = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=4).hexdigest()
    return f"{name_of(array.dtype)} of shape {array.shape} and hash {found}"
