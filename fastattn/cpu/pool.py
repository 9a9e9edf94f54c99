"""Threads: Python threads that claim tasks inside compiled code, and the calls that open tasks to them.

The protocol is in `fastattn.cpu.claim`. Workers are daemon threads. One that has found nothing for a while sleeps on a
lock; a call that is worth it wakes the sleepers it wants and works itself. A second call that finds the pool taken runs
its tasks in its own thread. A forked child has no workers, and starts its own when it needs them.
"""

import contextlib
import ctypes
import os
import threading
import time
from _thread import LockType, allocate_lock
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np

from fastattn.cpu.kernels import Library, library
from fastattn.cpu.layout import (
    ASLEEP,
    DONE,
    SPINS_AT,
    STAFF,
    START,
    TAKEN,
    WAITING,
    WOKEN,
    WORKER_BYTES,
    WORKERS,
)
from fastattn.cpu.objects import address_of

SPIN = 25  # nanoseconds that a round of waiting takes, or more
SPINS = 8000  # rounds of waiting before a worker sleeps
TURN_FLOPS = 2e9  # work the caller does between two looks at Python's signals
WORTH_SHARING = 4e6  # operations: below this, sharing the work with a worker that is awake brings nothing
WORTH_WAKING = 12e6  # and below this, with one that has to be woken
WARM = 1_000_000  # nanoseconds after a call in which workers are taken to be awake, or the next call to be near
LONGEST_PAUSE = 100_000_000  # nanoseconds between calls that come regularly
MOST = 1024  # threads


def available_cpus() -> int:
    """The number of CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this platform
        return os.cpu_count() or 1


def _checked(name: str, n: object) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"{name}: {n!r} of type {type(n).__name__}; expected an int")
    if not 1 <= n <= MOST:
        raise ValueError(f"{name}: {n}; expected 1 to {MOST}")
    return int(n)


def _initial() -> int:
    given = os.environ.get("FASTATTN_NUM_THREADS", "")
    if not given:
        return min(available_cpus(), MOST)
    try:
        number = int(given)
    except ValueError:
        raise ValueError(f"FASTATTN_NUM_THREADS: {given!r}; expected a whole number from 1 to {MOST}") from None
    return _checked("FASTATTN_NUM_THREADS", number)


_threads: int | None = None
_override: ContextVar[int | None] = ContextVar("fastattn.num_threads", default=None)


def get_num_threads() -> int:
    """The number of threads that a call in this context uses.

    Returns
    -------
    int
        What `num_threads` or `set_num_threads` said, else ``FASTATTN_NUM_THREADS``, else the CPUs this process may use.
    """
    global _threads
    override = _override.get()
    if override is not None:
        return override
    if _threads is None:
        _threads = _initial()
    return _threads


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


class Rhythm:
    """When calls come. After two pauses of the same length the next call is foreseen, and workers get up in time.

    A worker that sleeps when a call comes is late by 100 to 300 µs, as much as a small call takes. One that gets up
    early waits for the call: for 1/16 of a pause, at most, and if no call comes, once.
    """

    ended = 0  # when the last call did; all times in nanoseconds
    pause = 0  # before the last call
    due = 0  # when the next call is foreseen; 0: it is not
    early = 0  # how long before that workers are up, and after
    workers = 0  # how many
    heeded = -1  # the `due` that a worker has set itself an alarm for

    def begin(self) -> bool:
        """Note that a call begins; whether workers are awake, or the next call is near."""
        now = time.perf_counter_ns()
        pause = now - self.ended
        regular = abs(pause - self.pause) < pause >> 4 and WARM < pause < LONGEST_PAUSE
        self.early = pause >> 5 if regular else 0
        self.pause = pause
        return pause < WARM or (self.heeded == self.due and abs(now - self.due) < self.early)

    def end(self, workers: int) -> bool:
        """Note that a call for so many workers has ended.

        Returns whether the next one is foreseen, and workers sleep that do not know.
        """
        self.workers = workers
        self.ended = now = time.perf_counter_ns()
        is_new = self.early > 0 and self.heeded != self.due
        self.due = now + self.pause if self.early else 0
        return is_new

    def seconds_of_sleep(self) -> float:
        """How long a worker may sleep until the next call is near; 0 if none is foreseen."""
        due = self.due
        seconds = (due - self.early - time.perf_counter_ns()) / 1e9
        if seconds <= 0:
            return 0.0
        self.heeded = due
        return seconds


class _Pool:
    """The workers of one process."""

    def __init__(self) -> None:
        self.memory = np.zeros(WORKERS // 8 + MOST * WORKER_BYTES // 8 + 8, np.int64)
        address = address_of(self.memory)
        self.address = address + -address % 64
        self.woken = np.zeros(MOST, np.int64)
        self.beds: list[LockType] = []  # one per worker: it sleeps by waiting for it
        self.avoided: list[int] = []  # one per worker: the CPU that it keeps off, -1 for none
        self.growing = threading.RLock()  # a signal handler may call while this very thread grows the pool
        self.threads: list[threading.Thread] = []
        self.native: Any = None

    def _write(self, offset: int, number: int) -> None:
        self.memory[(self.address - address_of(self.memory) + offset) // 8] = number

    def grow(self, workers: int) -> None:
        """Have at least so many workers, or as many as the system allows."""
        if len(self.beds) >= workers:
            return
        with self.growing:
            if self.native is None:
                self.native = library("schedule")
                self._write(START, self.native.addresses["start"])
                self._write(WOKEN, address_of(self.woken))
                self._write(SPINS_AT, SPINS)
            while len(self.beds) < workers:
                bed = allocate_lock()
                bed.acquire()
                # First the list, which gives the worker its number: no interruption may make two of the same.
                self.avoided.append(-1)
                self.beds.append(bed)
                self._write(STAFF, len(self.beds))
                try:
                    thread = threading.Thread(target=_live, args=(self, bed), name="fastattn", daemon=True)
                    self.threads.append(thread)
                    thread.start()
                except RuntimeError:  # too many threads, or the interpreter is about to exit: tasks do not wait for it
                    return

    def run(self, kernels: Library, call: int, tasks: int, flops: float, workers: int) -> bool:
        """Run the tasks of a call with up to `workers` others; False if another call has the pool."""
        self.grow(workers)
        task, most = kernels.addresses["task"], tasks_at_a_time(tasks, flops)
        try:
            state = self.native.start(self.address, task, call, tasks, workers, most)
            return self.finish(state, most) != TAKEN
        except BaseException:
            self.cancel(call)
            raise

    def finish(self, state: int, most: int) -> int:
        """Go on with a call that was opened in this state, until all is done; not if it is TAKEN."""
        if state > ASLEEP:
            self._wake(state - ASLEEP)
        while state not in (DONE, TAKEN):
            if state == WAITING:
                _yield()  # to the worker that we wait for, if it waits for this CPU
            state = self.native.take_part(self.address, most)
        return state

    def _wake(self, count: int) -> None:
        """Wake those that are on the list."""
        cpu = _current_cpu()
        for worker in self.woken[:count].tolist():
            if self.avoided[worker] != cpu:
                self._avoid(worker, cpu)
            _wake(self.beds[worker])

    def _avoid(self, worker: int, cpu: int) -> None:
        """Let a sleeping worker wake up on another CPU than the caller's, where it would wait for the caller to end.

        Schedulers like to wake a thread where its waker runs; on small machines it may stay there for milliseconds.
        """
        self.avoided[worker] = cpu
        thread = self.threads[worker].native_id if worker < len(self.threads) else None
        if cpu < 0 or thread is None:
            return
        try:
            allowed = os.sched_getaffinity(0)
            if len(allowed) > 1:
                os.sched_setaffinity(thread, allowed - {cpu})
        except OSError:  # a sandbox may forbid it
            pass

    def cancel(self, call: int) -> None:
        """After Ctrl-C, withdraw the tasks of a call, since what they write to is about to be given up."""
        while True:
            try:
                self.native.cancel(self.address, call)
                # `start` may have counted on wake-ups that were not reached. For all others it is a false alarm.
                for bed in self.beds:
                    _wake(bed)
                return
            except KeyboardInterrupt:
                continue


def _wake(bed: LockType) -> None:
    with contextlib.suppress(RuntimeError):  # not locked: it has been woken, and has yet to notice
        bed.release()


def _live(pool: _Pool, bed: LockType) -> None:
    """A worker's life. Its frame keeps shared memory and compiled code alive, also while the interpreter exits."""
    work, worker = pool.native.work, pool.beds.index(bed)
    spins = SPINS
    while True:
        work(pool.address, worker, spins)
        spins = SPINS
        seconds = rhythm.seconds_of_sleep()
        if seconds == 0 or worker >= rhythm.workers:
            bed.acquire()
        elif not bed.acquire(timeout=seconds):
            spins += 2 * rhythm.early // SPIN


def _find_current_cpu() -> Callable[[], int]:
    """The C library's sched_getcpu, or where there is none, or no way to move a thread, a function that gives -1."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError, AttributeError):
            function: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
            return function
    return lambda: -1


_current_cpu = _find_current_cpu()
_yield: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))
_pool = _Pool()
rhythm = Rhythm()


def _forget() -> None:
    global _pool, rhythm
    _pool, rhythm = _Pool(), Rhythm()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run(kernels: Library, call: int, tasks: int, flops: float, threads: int) -> None:
    """Run a call's tasks, on up to `threads` threads, and return when all are done."""
    workers = min(threads, tasks) - 1
    if workers <= 0 or not _pool.run(kernels, call, tasks, flops, workers):
        _run_alone(kernels, call, tasks, flops)


def share(
    kernels: Library,
    shared: Callable[..., int],
    objects: tuple[Any, ...],
    call: int,
    tasks: int,
    flops: float,
    workers: int,
    most: int,
) -> None:
    """The same for a call that `shared`, a builtin, opens: given `objects`, it writes the record at `call`."""
    pool = _pool
    if len(pool.beds) < workers:
        pool.grow(workers)
    try:
        state = shared(pool.memory, *objects)
        if state != DONE:
            state = pool.finish(state, most)
    except BaseException:
        pool.cancel(call)
        raise
    if state == TAKEN:
        _run_alone(kernels, call, tasks, flops)


def _run_alone(kernels: Library, call: int, tasks: int, flops: float) -> None:
    step = tasks if flops <= TURN_FLOPS else tasks_at_a_time(tasks, flops)
    for first in range(0, tasks, step):
        kernels.alone(call, first, min(first + step, tasks))


def tasks_at_a_time(tasks: int, flops: float) -> int:
    """How many tasks a thread does between two looks at Python's signals."""
    return max(1, int(TURN_FLOPS * tasks / max(flops, 1.0)))


def rouse(workers: int) -> None:
    """Wake so many workers, to look at the clock."""
    for bed in _pool.beds[:workers]:
        _wake(bed)


def concurrency(tasks: int, flops: float, threads: int) -> int:
    """The number of threads that `run` may use: how many pieces of working memory it needs."""
    return min(threads, tasks) if flops >= WORTH_SHARING else 1
