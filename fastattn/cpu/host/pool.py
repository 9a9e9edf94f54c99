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
from collections.abc import Callable
from sys import is_finalizing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.cpu.host import processors
from fastattn.cpu.host.calls import Memory, Plan
from fastattn.cpu.host.kernels import load
from fastattn.cpu.host.processors import MOST
from fastattn.cpu.kernels.records import (
    ASLEEP,
    DONE,
    SPINS_AT,
    STAFF,
    START,
    TAKEN,
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
WORTH_SHARING = 1e6  # operations: below this, sharing the work brings nothing even with a worker that waits for it
WORTH_WARMING = 4e6  # and below this, with one that may have gone to sleep
WORTH_WAKING = 12e6  # and below this, with one that has to be woken
AWAKE = 100_000  # nanoseconds after a call in which workers have not gone to sleep
WARM = 1_000_000  # nanoseconds after a call in which workers are taken to be awake, or the next call to be near
LONGEST_PAUSE = 100_000_000  # nanoseconds between calls that come regularly
TRY_AGAIN = 1_000_000_000  # nanoseconds after which a system that had no more threads is asked again

Array = NDArray[Any]


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
    answered = -1  # the `due` that a worker has set itself an alarm for

    def begin(self, flops: float) -> bool:
        """Note that a call begins; whether workers are awake for it, or the next one is near.

        A small call is of no use to others: it is shared where calls follow each other at once, and never foreseen.
        """
        now = time.perf_counter_ns()
        if now > processors.known.old:
            processors.look()  # for the calls to come
        pause = now - self.ended
        if flops < WORTH_WARMING:
            is_burst = pause < AWAKE and self.pause < AWAKE
            self.early, self.pause = 0, pause
            return is_burst
        regular = abs(pause - self.pause) < pause >> 4 and WARM < pause < LONGEST_PAUSE
        self.early = pause >> 5 if regular else 0
        self.pause = pause
        return pause < WARM or (self.answered == self.due and abs(now - self.due) < self.early)

    def end(self, workers: int) -> bool:
        """Note that a call for so many workers has ended.

        Returns whether the next one is foreseen, and workers sleep that do not know.
        """
        self.workers = workers
        self.ended = now = time.perf_counter_ns()
        is_new = self.early > 0 and self.answered != self.due
        self.due = now + self.pause if self.early else 0
        return is_new

    def seconds_of_sleep(self) -> float:
        """How long a worker may sleep until the next call is near; 0 if none is foreseen."""
        due = self.due
        seconds = (due - self.early - time.perf_counter_ns()) / 1e9
        if seconds <= 0:
            return 0.0
        self.answered = due
        return seconds


class Pool:
    """The workers of one process."""

    def __init__(self) -> None:
        self.memory = np.zeros(WORKERS // 8 + MOST * WORKER_BYTES // 8 + 8, np.int64)
        address = address_of(self.memory)
        self.address = address + -address % 64
        self.woken = np.zeros(MOST, np.int64)
        self.growing = os_threads.RLock()  # a signal handler may call while this very thread grows the pool
        self.native: Any = None
        self.staff = 0  # workers: as many as threads were started
        self.locks: list[os_threads.Lock] = []  # one per worker: it sleeps by waiting for it
        self.unborn: set[os_threads.Lock] = set()  # the locks of those whose threads have not begun to run
        self.threads: dict[int, int | None] = {}  # by worker, the system's number of its thread, while that lives
        self.avoided: list[object] = []  # one per worker: the CPU that it keeps off, and those the caller could run on
        self.try_again = 0  # when the system may be asked for more threads
        self.rhythm = Rhythm()

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
            if len(self.locks) == worker:
                lock = os_threads.allocate_lock()
                lock.acquire()
                self.avoided.append(None)
                self.unborn.add(lock)
                self.locks.append(lock)  # which gives the worker its number
            try:
                os_threads.start_new_thread(_live, (self, self.locks[worker]))
            except (RuntimeError, MemoryError):  # too many threads, or too little memory
                self.try_again = time.perf_counter_ns() + TRY_AGAIN
                return
            self.staff = max(self.staff, worker + 1)
            self._write(STAFF, self.staff)

    def serve(self, plan: Plan, memory: Memory, objects: tuple[Any, ...]) -> None:
        """Run a call for more than one thread, with others if that is worth it.

        Much work is always shared, less only while workers are awake or will be wanted again soon.
        """
        others = plan.threads - 1
        if self.rhythm.begin(plan.flops) or plan.flops >= WORTH_WAKING:
            taken = memory.take(plan.memory_bytes)
            if not self.share(plan, *taken, objects):
                plan.calls.in_turns(taken[1], plan, objects)
            memory.held = taken
        else:
            plan.calls.quick(memory.of(plan.memory_bytes)[1], plan.record, *objects)
        if self.rhythm.end(others):
            for lock in self.locks[:others]:
                _wake(lock)  # to look at the clock

    def share(self, plan: Plan, at: int, held: Array, objects: tuple[Any, ...]) -> bool:
        """Run a call's tasks with others; False if another call has the pool, or nothing can be shared any more."""
        workers = plan.threads - 1
        if self.staff < workers and not self.grow(workers):
            return False
        if plan.calls.shared is None:
            call = plan.calls.note(held, plan.record, *objects)
            return self.run(plan.calls.kernel, call, plan.tasks, plan.turn, workers)
        try:
            state = plan.calls.shared(self.memory, held, plan.record, *objects)
            return state == DONE or self.finish(state, plan.turn) != TAKEN
        except BaseException:
            self.cancel(at)
            raise

    def run(self, kernel: Library, call: int, tasks: int, turn: int, workers: int) -> bool:
        """The same for a call whose record is written."""
        if not self.grow(workers):
            return False
        try:
            state = self.native.start(self.address, kernel.addresses["task"], call, tasks, workers, turn)
            return self.finish(state, turn) != TAKEN
        except BaseException:
            self.cancel(call)
            raise

    def finish(self, state: int, turn: int) -> int:
        """Go on with a call that was opened in this state, until all is done; not if it is TAKEN."""
        if state > ASLEEP:
            self._wake(state - ASLEEP)
        while state not in (DONE, TAKEN):
            state = self.native.take_part(self.address, turn)
        return state

    def _wake(self, count: int) -> None:
        """Wake those that are on the list."""
        processors.look_if_old()
        place = _current_cpu(), processors.known.cpus
        for worker in self.woken[:count].tolist():
            if self.avoided[worker] != place:
                self.avoided[worker] = place
                self._move(worker, *place)
            _wake(self.locks[worker])

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
                for lock in self.locks:
                    _wake(lock)
                return
            except KeyboardInterrupt:
                continue


def _wake(lock: os_threads.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # not locked: it has been woken, and has yet to notice
        lock.release()


def _live(pool: Pool, lock: os_threads.Lock) -> None:
    """A worker's life. Its frame keeps shared memory and compiled code alive, also while the interpreter exits."""
    try:
        pool.unborn.remove(lock)
    except KeyError:  # another thread lives it
        return
    work, worker = pool.native.work, pool.locks.index(lock)
    pool.threads[worker] = os_threads.get_native_id()
    spins = SPINS
    try:
        while True:
            work(pool.address, worker, spins)
            spins = SPINS
            seconds = pool.rhythm.seconds_of_sleep()
            if seconds == 0 or worker >= pool.rhythm.workers:
                lock.acquire()
            elif not lock.acquire(timeout=seconds):
                spins += 2 * pool.rhythm.early // SPIN
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


def tasks_at_a_time(tasks: int, flops: float) -> int:
    """How many tasks a thread does between two looks at Python's signals."""
    return max(1, int(TURN_FLOPS * tasks / max(flops, 1.0)))


def concurrency(tasks: int, flops: float, threads: int) -> int:
    """The number of threads that a call may use: how many pieces of working memory it needs."""
    return min(threads, tasks) if flops >= WORTH_SHARING else 1
