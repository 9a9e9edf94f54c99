"""Work that no signal interrupts, and no fork cuts short: a thread of its own does it, while those wait who want it.

Python runs the handlers of signals in its main thread, between any two steps, and what a handler raises goes on from
there. A compiler that is left like that may keep a lock for ever, since Numba's and llvmlite's are taken by functions
in Python, and half of what it was about to note; and a handler that makes calls would enter it a second time. In
another thread nothing of the kind happens. Who waits may be interrupted, as always; the work goes on meanwhile, and
whoever asks for the same again finds it.
"""

import atexit
import logging  # noqa: F401  # whose lock compilers take: a fork has to take it after the one here
import os
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from contextvars import copy_context
from sys import is_finalizing
from typing import Any, TypeVar

from fastattn.machine import os_threads

__all__ = ["uninterrupted"]

T = TypeVar("T")

LOOK_AGAIN = 0.5  # seconds after which those who wait look whether there is still something to wait for

_lock = os_threads.RLock()  # whoever has it works


class _Here(os_threads.local):
    """What is known of the calling thread."""

    works = False  # whether it is one of those that are started here


class _Job:
    """Some work for a thread, and what has become of it."""

    def __init__(self, key: Hashable, work: Callable[[], Any]) -> None:
        self.key, self.work, self.process = key, work, os.getpid()
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self.ended = os_threads.allocate_lock()  # locked until it is done
        self.ended.acquire()

    def run(self) -> None:
        """Do the work: a thread lives for this."""
        _here.works = True
        _under_way[self.key] = self
        try:
            with _lock:
                self.result = self.work()
        except BaseException as error:  # without this frame, through which the error would keep itself
            self.error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        self.is_done = True
        if _under_way.get(self.key) is self:
            del _under_way[self.key]
        self.ended.release()

    def wait(self) -> None:
        """Wait until it is done; not in a forked child, which has no such thread.

        Somebody who has waited may be interrupted before the lock is given back, so others do not rely on it.
        """
        while not self.is_done and self.process == os.getpid():
            if self.ended.acquire(timeout=LOOK_AGAIN):
                self.ended.release()


_here = _Here()
_under_way: dict[Hashable, _Job] = {}  # by what they are for


def uninterrupted(key: Hashable, work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise what it raises. Whoever gives the same key while it goes on gets the same.

    One piece of work is done at a time. Work that it asks for itself is done in the same thread; so is all work by who
    asks for it if the system has no more threads, or if the interpreter is about to end, when nothing interrupts.
    """
    while not (_here.works or is_finalizing()):
        job = _under_way.get(key)
        if job is None or job.process != os.getpid():
            job = _Job(key, work)
            try:
                os_threads.start_new_thread(copy_context().run, (job.run,))
            except (RuntimeError, MemoryError):
                break
        job.wait()
        if job.error is not None:
            raise job.error
        if job.is_done:
            found: T = job.result
            return found
    return _here_and_now(work)


def _here_and_now(work: Callable[[], T]) -> T:
    """Work in the calling thread. What a handler of a signal wants meanwhile is done there, too."""
    before = _here.works
    # As the interpreter ends nobody else needs the lock, but a thread may have gone that held it.
    with nullcontext() if is_finalizing() else _lock:
        try:
            _here.works = True
            return work()
        finally:
            _here.works = before


@atexit.register
def _wait_for_all() -> None:
    """Wait for what nobody waits for any more: a compiler has to have ended before the libraries that it is in."""
    for job in tuple(_under_way.values()):
        job.wait()


class _Fork:
    """A fork waits for work to end: a child could never finish it.

    Handlers of signals run while it waits, and may raise. Python drops what comes out of here, and forks all the same,
    so that the lock is taken first.
    """

    within = False  # whether the thread that forks had the lock before

    def begin(self) -> None:
        """Take the lock."""
        self.within, raised = _is_mine(), None
        while not _is_mine():
            try:
                _lock.acquire()
            except BaseException as error:
                raised = error
        if raised is not None:
            raise raised

    def end(self) -> None:
        """Give it back, in the parent and in the child."""
        if _is_mine() and not self.within:
            _lock.release()


_fork = _Fork()
_is_mine: Callable[[], bool] = _lock._is_owned  # type: ignore[attr-defined]  # as `threading.Condition` asks a lock
# What was registered last is taken first, so modules with such locks that compilers use have been imported above.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_fork.begin, after_in_parent=_fork.end, after_in_child=_fork.end)
