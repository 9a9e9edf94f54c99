"""Threads that cannot be started: calls go on with those there are, and nothing waits for one that was not born."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import processes
import pytest

import fastattn
from fastattn import bench
from fastattn.cpu.host import peak, pool
from fastattn.machine import os_threads

PREAMBLE = """
import os, threading, time
import numpy as np
import fastattn
from fastattn.cpu.host import pool, session
pool.WORTH_SHARING = pool.WORTH_WAKING = 0
x = np.random.default_rng(0).standard_normal((4, 1, 8, 300, 32), dtype=np.float32)
usual = threading.stack_size()

def none_may_start():
    threading.stack_size(1 << 46)  # more than there is
    try:
        threading.Thread(target=print).start()
    except RuntimeError:
        return
    print("a thread of any size may start here")
    os._exit(0)

def calls():
    out, lse = fastattn.attention(*x[:3], return_lse=True)
    return out, *fastattn.attention_backward(x[3], *x[:3], out, lse)

with fastattn.num_threads(1):
    wanted = calls()

def is_right():
    return all(np.array_equal(*pair) for pair in zip(calls(), wanted))
"""


def run(code: str) -> None:
    """Run code in a process that can be kept from starting threads."""
    if processes.run(PREAMBLE + code, timeout=60) != "":
        pytest.skip("the system starts threads of any size")


def test_a_system_that_starts_no_thread() -> None:
    run("""
none_may_start()
fastattn.set_num_threads(1024)
for _ in range(3):
    assert is_right()
assert session.current.pool.staff == 0
""")


def test_a_system_that_starts_some() -> None:
    run("""
fastattn.set_num_threads(3)
assert is_right() and session.current.pool.staff == 2
none_may_start()
fastattn.set_num_threads(100)
for _ in range(20):
    assert is_right()
    time.sleep(0.001)  # workers sleep, and are woken: those that are not there are not
assert session.current.pool.staff == 2
""")


def test_threads_that_may_start_later() -> None:
    """The system is asked again after a while, not with every call."""
    run("""
none_may_start()
fastattn.set_num_threads(4)
assert is_right() and session.current.pool.staff == 0
threading.stack_size(usual)
asked = pool.os_threads.start_new_thread
pool.os_threads.start_new_thread = None
assert is_right() and session.current.pool.staff == 0
pool.os_threads.start_new_thread = asked
session.current.pool.try_again = time.perf_counter_ns()
assert is_right() and session.current.pool.staff == 3
""")


def test_a_forked_child_that_starts_no_thread() -> None:
    if not hasattr(pool.os, "fork"):
        pytest.skip("the system has no fork")
    run("""
fastattn.set_num_threads(3)
assert is_right()
none_may_start()
pid = os.fork()
if not pid:
    os._exit(0 if is_right() and session.current.pool.staff == 0 else 7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert is_right()
""")


def test_as_many_threads_as_can_be() -> None:
    """Even if the system has room for but some of them: results are right, and the process ends."""
    run("""
fastattn.set_num_threads(1024)
big = np.random.default_rng(0).standard_normal((3, 32, 32, 40, 16), dtype=np.float32)
got = fastattn.attention(*big)
assert session.current.pool.staff > 0
with fastattn.num_threads(1):
    assert np.array_equal(got, fastattn.attention(*big))
""")


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_the_peak_is_that_of_the_threads_there_are(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    start = threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        if threading.active_count() > before:
            raise error
        start(thread)

    before = threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", start_one)
    assert peak.measure(threads=8, seconds=0.01) > 0
    assert threading.active_count() == before


# -- interruptions while threads are started ---------------------------------------------------------------------------


class Lives:
    """Instead of `_live`: notes which worker each thread would be, and waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.end = threading.Event()
        self.workers: list[int] = []
        monkeypatch.setattr(pool, "load", lambda kernel: self)
        self.addresses = {"start": 0}

    def work(self, address: int, worker: int, spins: int) -> None:
        """Note who works."""
        self.workers.append(worker)
        self.end.wait()
        raise SystemExit

    def are(self, *workers: int) -> bool:
        """Whether these and no others come to work."""
        end = time.monotonic() + 10
        while len(self.workers) < len(workers) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)
        return sorted(self.workers) == list(workers)


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Yield workers that wait until the test ends."""
    made = Lives(monkeypatch)
    yield made
    made.end.set()


def disturbed(monkeypatch: pytest.MonkeyPatch, disturb: Callable[[], None], when: int) -> None:
    """Have `disturb` called right after the `when`-th thread is started."""
    start = os_threads.start_new_thread
    started = 0

    def start_then(*args: Any) -> None:
        nonlocal started
        start(*args)
        started += 1
        if started == when:
            disturb()

    monkeypatch.setattr(os_threads, "start_new_thread", start_then)


@pytest.mark.parametrize("when", [1, 2])
def test_ctrl_c_while_threads_are_started(monkeypatch: pytest.MonkeyPatch, lives: Lives, when: int) -> None:
    """No two threads are the same worker, and none is missing."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    workers = pool.Pool()
    disturbed(monkeypatch, interrupt, when)
    with pytest.raises(KeyboardInterrupt):
        workers.grow(3)
    workers.grow(3)
    assert lives.are(0, 1, 2)
    assert workers.staff == len(workers.locks) == 3


@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_a_signal_handler_calls_while_threads_are_started(
    monkeypatch: pytest.MonkeyPatch, lives: Lives, wanted: int
) -> None:
    workers = pool.Pool()
    disturbed(monkeypatch, lambda: bool(workers.grow(wanted)), 2)
    workers.grow(3)
    assert workers.staff == len(workers.locks) == max(3, wanted)
    assert lives.are(*range(workers.staff))


def test_a_thread_that_is_gone_is_moved_nowhere(lives: Lives) -> None:
    """The system may have given its number to another one, or to another process."""
    workers = pool.Pool()
    workers.grow(2)
    assert lives.are(0, 1)
    assert sorted(workers.threads) == [0, 1]
    lives.end.set()
    end = time.monotonic() + 10
    while workers.threads and time.monotonic() < end:
        time.sleep(0.001)
    assert not workers.threads
    workers._move(0, 0, frozenset({0, 1}))


def test_bench_refuses_what_no_call_may_have(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        bench.main(["--quick", "--threads", "99999"])
    assert status.value.code == 2
    assert "--threads: '99999' is not a number of threads from 1 to 1024" in capsys.readouterr().err


def test_numbers_that_nobody_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.cpu.host.threads._threads", None)
    for number in (pool.MOST + 1, 99999, 10**30):
        with pytest.raises(ValueError, match="expected 1 to 1024"):
            fastattn.set_num_threads(number)
    assert np.isfinite(fastattn.get_num_threads())
