"""How many threads a call uses: what the user said, else the processors that the caller may use."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

import numpy as np

from fastattn.cpu.host import processors
from fastattn.cpu.host.processors import MOST


def _checked(name: str, n: object) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"{name}: {n!r} of type {type(n).__name__}; expected an int")
    if not 1 <= n <= MOST:
        raise ValueError(f"{name}: {n}; expected 1 to {MOST}")
    return int(n)


def _from_environment() -> int:
    given = os.environ.get("FASTATTN_NUM_THREADS", "")
    if not given:
        return BY_PROCESSORS
    try:
        number = int(given)
    except ValueError:
        raise ValueError(f"FASTATTN_NUM_THREADS: {given!r}; expected a whole number from 1 to {MOST}") from None
    return _checked("FASTATTN_NUM_THREADS", number)


BY_PROCESSORS = 0  # as many threads as the caller may use CPUs
_threads: int | None = None  # None: the environment has yet to be asked
_override: ContextVar[int | None] = ContextVar("fastattn.num_threads", default=None)
_known = processors.known


def get_num_threads() -> int:
    """The number of threads that a call in this context uses.

    Returns
    -------
    int
        What `num_threads` or `set_num_threads` said, else ``FASTATTN_NUM_THREADS``, else the CPUs that the calling
        thread may use now: those of its affinity, or fewer where a container has a quota.
    """
    if not _threads:
        processors.look()
    return threads_of_call()


def threads_of_call() -> int:
    """The same by what is known of the calling thread. A call that takes its time looks again, for those to come."""
    global _threads
    override = _override.get()
    if override is not None:
        return override
    if _threads is None:
        _threads = _from_environment()
    return _threads or _known.count or processors.look()


def set_num_threads(n: int) -> None:
    """Set the number of threads that calls use from now on, the caller's own included.

    Parameters
    ----------
    n : int
        From 1 to 1024. Results do not depend on it, by a single bit.

    Raises
    ------
    TypeError, ValueError
        If it is not a whole number, or out of range.
    """
    global _threads
    _threads = _checked("n", n)


@contextlib.contextmanager
def num_threads(n: int) -> Iterator[None]:
    """A context in which calls use `n` threads; other Python threads are not concerned.

    Parameters
    ----------
    n : int
        From 1 to 1024.

    Examples
    --------
    >>> import fastattn
    >>> with fastattn.num_threads(1):
    ...     fastattn.get_num_threads()
    1
    """
    token = _override.set(_checked("n", n))
    try:
        yield
    finally:
        _override.reset(token)
