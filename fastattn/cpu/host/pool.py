"""Threads: Python threads that claim tasks inside compiled code, and the calls that open tasks to them.

The protocol is in `fastattn.cpu.kernels.schedule`. Workers are threads that keep no process from its end. One that has
found nothing for a while sleeps on a lock; a call that is worth it wakes the sleepers it wants and works itself. A
second call that finds the pool taken runs its tasks in its own thread. A forked child has no workers, and starts its
own when it needs them. Where the system gives no more threads, those there are do the work.
"""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from sys import is_finalizing
from typing import Any

import numpy as np

from fastattn.cpu.host import processors
from fastattn.cpu.host.kernels import load
from fastattn.cpu.host.processors import MOST
from fastattn.cpu.kernels.records import (
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
from fastattn.machine import os_threads
from fastattn.machine.kernel import Kernel
from fastattn.machine.libraries import Library
from fastattn.machine.objects import address_of
from fastattn.machine.table import host

SPIN = 25  # nanoseconds that a round of waiting takes, or more
SPINS = 8000  # rounds of waiting before a worker sleeps
TURN_FLOPS = 2e9  # work the caller does between two looks at Python's signals
WORTH_SHARING = 4e6  # operations: below this, sharing the work with a worker that is awake brings nothing
WORTH_WAKING = 12e6  # and below this, with one that has to be woken
WARM = 1_000_000  # nanoseconds after a call in which workers are taken to be awake, or the next call to be near
LONGEST_PAUSE = 100_000_000  # nanoseconds between calls that come regularly
TRY_AGAIN = 1_000_000_000  # nanoseconds after which a system that had no more threads is asked again


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
        if now > _known.old:
            processors.look()  # for the calls to come
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
        self.growing = os_threads.RLock()  # a signal handler may call while this very thread grows the pool
        self.native: Any = None
        self.staff = 0  # workers: as many as threads were started
        self.beds: list[os_threads.Lock] = []  # one per worker: it sleeps by waiting for it
        self.unborn: set[os_threads.Lock] = set()  # the beds of those whose threads have not begun to run
        self.threads: dict[int, int | None] = {}  # by worker, the system's number of its thread, while that lives
        self.avoided: list[object] = []  # one per worker: the CPU that it keeps off, and those the caller could run on
        self.try_again = 0  # when the system may be asked for more threads

    def _write(self, offset: int, number: int) -> None:
        self.memory[(self.address - address_of(self.memory) + offset) // 8] = number

    def grow(self, workers: int) -> bool:
        """Have at least so many workers, or as many as the system allows; False if nothing can be shared any more.

        That is when the interpreter ends: no thread is born then, and one that held a lock may be gone.
        """
        if is_finalizing():
            return self.native is not None
        with self.growing:
            if self.native is None:
                native = load(Kernel("schedule", host()))
                self._write(START, native.addresses["start"])
                self._write(WOKEN, address_of(self.woken))
                self._write(SPINS_AT, SPINS)
                self.native = native
            if self.staff < workers and time.perf_counter_ns() >= self.try_again:
                self._start(workers)
        return True

    def _start(self, workers: int) -> None:
        """Start threads until there are so many workers.

        A worker counts from when its thread was started. After an interruption in between, another thread is started
        for the same worker, and the later one ends at once.
        """
        while self.staff < workers:
            worker = self.staff
            if len(self.beds) == worker:
                bed = os_threads.allocate_lock()
                bed.acquire()
                self.avoided.append(None)
                self.unborn.add(bed)
                self.beds.append(bed)  # which gives the worker its number
            try:
                os_threads.start_new_thread(_live, (self, self.beds[worker]))
            except (RuntimeError, MemoryError):  # too many threads, or too little memory, or a subinterpreter
                self.try_again = time.perf_counter_ns() + TRY_AGAIN
                return
            self.staff = max(self.staff, worker + 1)
            self._write(STAFF, self.staff)

    def run(self, kernels: Library, call: int, tasks: int, flops: float, workers: int) -> bool:
        """Run the tasks of a call with up to `workers` others; False if another call has the pool."""
        if not self.grow(workers):
            return False
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
                os_threads.give_way()  # to the worker that we wait for, if it waits for this CPU
            state = self.native.take_part(self.address, most)
        return state

    def _wake(self, count: int) -> None:
        """Wake those that are on the list."""
        processors.look_if_old()
        place = _current_cpu(), _known.cpus
        for worker in self.woken[:count].tolist():
            if self.avoided[worker] != place:
                self.avoided[worker] = place
                self._move(worker, *place)
            _wake(self.beds[worker])

    def _move(self, worker: int, cpu: int, allowed: frozenset[int]) -> None:
        """Let a sleeping worker wake up on another CPU than the caller's, where it would wait for the caller to end.

        Schedulers like to wake a thread where its waker runs; on small machines it may stay there for milliseconds. It
        may be any other CPU that the caller could run on: what restricts one caller does not restrict workers for good.
        """
        thread = self.threads.get(worker)
        # As the interpreter ends, threads do, unseen; what had the number of one may be anything.
        if cpu < 0 or thread is None or len(allowed) < 2 or is_finalizing():
            return
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setaffinity(thread, allowed - {cpu})

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


def _wake(bed: os_threads.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # not locked: it has been woken, and has yet to notice
        bed.release()


def _live(pool: _Pool, bed: os_threads.Lock) -> None:
    """A worker's life. Its frame keeps shared memory and compiled code alive, also while the interpreter exits."""
    try:
        pool.unborn.remove(bed)
    except KeyError:  # another thread lives it
        return
    work, worker = pool.native.work, pool.beds.index(bed)
    pool.threads[worker] = os_threads.get_native_id()
    spins = SPINS
    try:
        while True:
            work(pool.address, worker, spins)
            spins = SPINS
            seconds = rhythm.seconds_of_sleep()
            if seconds == 0 or worker >= rhythm.workers:
                bed.acquire()
            elif not bed.acquire(timeout=seconds):
                spins += 2 * rhythm.early // SPIN
    finally:
        pool.threads.pop(worker)  # the system may give its number to others


def _find_current_cpu() -> Callable[[], int]:
    """The C library's sched_getcpu, or where there is none, or no way to move a thread, a function that gives -1."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError, AttributeError):
            function: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
            return function
    return lambda: -1


_current_cpu = _find_current_cpu()
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
) -> bool:
    """The same for a call that `shared`, a builtin, opens: given `objects`, it writes the record at `call`.

    False if nothing can be shared any more, and nothing has been done.
    """
    pool = _pool
    if pool.staff < workers and not pool.grow(workers):
        return False
    try:
        state = shared(pool.memory, *objects)
        if state != DONE:
            state = pool.finish(state, most)
    except BaseException:
        pool.cancel(call)
        raise
    if state == TAKEN:
        _run_alone(kernels, call, tasks, flops)
    return True


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
