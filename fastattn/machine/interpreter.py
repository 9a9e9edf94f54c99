"""The interpreter that fastattn is imported in: the main one of its process, with Python's global lock.

Compiled code reads objects of Python's where they lie, and threads share plans and working memory, both under that
lock. Workers are threads that never end, which only the main interpreter outlives.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["refusal", "require_usual"]


def refusal() -> str:
    """Why fastattn cannot run in this interpreter, "" where it can."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return (
            "fastattn relies on Python's global lock, without which this free-threaded Python runs: "
            "use Python's usual build; calls of several threads run side by side there, too"
        )
    if not _is_main():
        return (
            "fastattn runs in the main interpreter of a process alone, and this is another one: "
            "use threads, whose calls run side by side, or processes"
        )
    return ""


def _is_main() -> bool:
    """Whether this is the interpreter that the process began with."""
    current, main = (
        ctypes.PYFUNCTYPE(ctypes.c_void_p)((f"PyInterpreterState_{name}", ctypes.pythonapi)) for name in ("Get", "Main")
    )
    return bool(current() == main())


def require_usual() -> None:
    """Refuse what `refusal` speaks of.

    Raises
    ------
    ImportError
        With the reason.
    """
    reason = refusal()
    if reason:
        raise ImportError(reason, name="fastattn")
