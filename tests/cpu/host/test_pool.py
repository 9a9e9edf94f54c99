"""Threads: how many, the same bits with any number of them, and what else a process may do meanwhile."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from numpy.typing import NDArray

import fastattn
from fastattn.cpu.host import pool, processors, session
from fastattn.cpu.host.kernels import load
from fastattn.cpu.kernels.records import MORE
from fastattn.machine.kernel import Kernel
from fastattn.machine.libraries import Library
from fastattn.machine.table import host

Array = NDArray[Any]


def inputs(*shape: int, dtype: Any = np.float32, seed: int = 0) -> tuple[Array, Array, Array]:
    query, key, value = np.random.default_rng(seed).standard_normal((3, *shape)).astype(dtype)
    return query, key, value


@pytest.fixture
def _any_work_is_worth_waking(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORTH_SHARING", "WORTH_WAKING"):
        monkeypatch.setattr(pool, name, 0)
    monkeypatch.setattr(session.current, "plans", session.Plans())


# -- how many ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_NUM_THREADS", raising=False)
    monkeypatch.setattr("fastattn.cpu.host.threads._threads", None)


@pytest.mark.usefixtures("_as_at_the_start")
def test_the_default_is_the_cpus_this_process_may_use() -> None:
    assert fastattn.get_num_threads() == processors.look()


@pytest.mark.usefixtures("_as_at_the_start")
def test_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_NUM_THREADS", "3")
    assert fastattn.get_num_threads() == 3
    fastattn.set_num_threads(5)
    assert fastattn.get_num_threads() == 5


@pytest.mark.usefixtures("_as_at_the_start")
@pytest.mark.parametrize("text", ["0", "-1", "1025", "two", "1.5", " "])
def test_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FASTATTN_NUM_THREADS", text)
    for _ in range(2):  # it is refused every time, not only the first
        with pytest.raises(ValueError, match="FASTATTN_NUM_THREADS.*expected .*1 to 1024"):
            fastattn.attention(*inputs(1, 2, 4, 8))


@pytest.mark.usefixtures("_as_at_the_start")
@pytest.mark.parametrize("n", [0, -1, 1025, np.int64(0)])
def test_numbers_out_of_range_are_refused(n: Any) -> None:
    with pytest.raises(ValueError, match=f"n: {n}; expected 1 to 1024"):
        fastattn.set_num_threads(n)
    with pytest.raises(ValueError, match=f"n: {n}; expected 1 to 1024"), fastattn.num_threads(n):
        pass
    assert fastattn.get_num_threads() == processors.look()


@pytest.mark.usefixtures("_as_at_the_start")
@pytest.mark.parametrize("n", [1.0, "2", None, True, [1]])
def test_what_is_no_number_is_refused(n: Any) -> None:
    with pytest.raises(TypeError, match="n: .* of type .*; expected an int"):
        fastattn.set_num_threads(n)
    with pytest.raises(TypeError, match="n: .* of type .*; expected an int"), fastattn.num_threads(n):
        pass
    assert fastattn.get_num_threads() == processors.look()


@pytest.mark.usefixtures("_as_at_the_start")
def test_a_context_ends_also_by_an_exception() -> None:
    fastattn.set_num_threads(np.int32(4))
    with fastattn.num_threads(2):
        with suppress(ZeroDivisionError), fastattn.num_threads(7):
            assert fastattn.get_num_threads() == 7
            raise ZeroDivisionError
        assert fastattn.get_num_threads() == 2
    assert fastattn.get_num_threads() == 4


@pytest.mark.usefixtures("_as_at_the_start")
def test_a_context_concerns_its_own_thread_and_task_alone() -> None:
    fastattn.set_num_threads(4)
    with fastattn.num_threads(2), ThreadPoolExecutor() as others:
        assert others.submit(fastattn.get_num_threads).result() == 4
        fastattn.set_num_threads(3)  # concerns all, except where a context says otherwise
        assert others.submit(fastattn.get_num_threads).result() == 3
        assert fastattn.get_num_threads() == 2

    async def in_context(n: int) -> int:
        with fastattn.num_threads(n):
            await asyncio.sleep(0)
            return fastattn.get_num_threads()

    async def both() -> list[int]:
        return await asyncio.gather(in_context(5), in_context(6))

    assert asyncio.run(both()) == [5, 6]
    assert fastattn.get_num_threads() == 3


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_any_work_is_worth_waking")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 70, 40), {}),
        ((1, 2, 300, 64), {"is_causal": True, "return_lse": True}),
        ((5, 1, 9, 16), {"dropout_p": 0.3, "rng": 1, "return_weights": True}),
        ((1, 1, 200, 24), {"attn_mask": np.random.default_rng(1).random(200) < 0.5, "return_weights": True}),
        ((1, 1, 1, 8), {}),
    ],
)
def test_the_same_bits_at_any_number_of_threads(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    def bits(threads: int) -> list[bytes]:
        with fastattn.num_threads(threads):
            results = fastattn.attention(*inputs(*shape), **options)
        return [array.tobytes() for array in (results if isinstance(results, tuple) else (results,))]

    one = bits(1)
    for threads in (2, 3, 7):
        assert bits(threads) == one, threads


# -- many callers ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_any_work_is_worth_waking")
def test_eight_threads_call_at_once() -> None:
    shapes = [(1, 1 + i % 3, 20 + 30 * i, 8 * (1 + i % 4)) for i in range(8)]
    arrays = [inputs(*shape, seed=i) for i, shape in enumerate(shapes)]
    with fastattn.num_threads(1):
        wanted = [fastattn.attention(*each, is_causal=True) for each in arrays]
    for got, each in zip(wanted, arrays, strict=True):
        np.testing.assert_allclose(got, fastattn.attention(*each, is_causal=True, backend="reference"), atol=1e-5)
    together = threading.Barrier(8)

    def call(i: int) -> bool:
        together.wait()
        results = [fastattn.attention(*arrays[i], is_causal=True) for _ in range(40)]
        return all(np.array_equal(result, wanted[i]) for result in results)

    with ThreadPoolExecutor(8) as callers:
        assert all(callers.map(call, range(8)))


@pytest.mark.usefixtures("_any_work_is_worth_waking")
def test_eight_threads_call_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One head, and tasks as small as can be: the most there is to wait for, with more threads than CPUs."""
    monkeypatch.setattr("fastattn.cpu.host.backward.TASK_FLOPS", 1)
    cases = []
    for i in range(8):
        query, key, value = inputs(1, 200 + 50 * i, 8 * (1 + i % 4), seed=i)
        out, lse = fastattn.attention(query, key, value, is_causal=i % 2 == 0, return_lse=True)
        cases.append(((out, query, key, value, out, lse), {"is_causal": i % 2 == 0}))
    with fastattn.num_threads(1):
        wanted = [fastattn.attention_backward(*args, **options) for args, options in cases]
    together = threading.Barrier(8)

    def call(i: int) -> bool:
        together.wait()
        with fastattn.num_threads(1 + i % 5):
            args, options = cases[i]
            results = [fastattn.attention_backward(*args, **options) for _ in range(20)]
        return all(np.array_equal(a, b) for result in results for a, b in zip(result, wanted[i], strict=True))

    with ThreadPoolExecutor(8) as callers:
        assert all(callers.map(call, range(8)))


@pytest.mark.usefixtures("_any_work_is_worth_waking")
def test_an_exception_in_one_call_harms_no_other() -> None:
    query, key, value = inputs(1, 2, 100, 16)
    wanted = fastattn.attention(query, key, value)
    together = threading.Barrier(4)

    def right() -> bool:
        together.wait()
        return all(np.array_equal(fastattn.attention(query, key, value), wanted) for _ in range(60))

    def wrong() -> bool:
        together.wait()
        for _ in range(60):
            with pytest.raises(ValueError, match="key"):
                fastattn.attention(query, key[..., :5], value)
        return True

    with ThreadPoolExecutor(4) as callers:
        assert all(future.result() for future in [callers.submit(f) for f in (right, wrong, right, wrong)])


# -- the protocol ------------------------------------------------------------------------------------------------------

TASKS = 7
COUNTS, BUSY, SLOTS, FAULTS = 0, 1024, 2048, 3072  # offsets in a call's memory


@pytest.fixture(scope="module")
def counting() -> Library:
    """Return a task that counts how often it ran, by number and by slot, and sees when a slot is used twice at once."""
    from fastattn.machine import building as build
    from fastattn.simd import jit
    from fastattn.simd.atomics import atomic_add, atomic_exchange, pause

    @jit
    def task(call, slot, number):  # type: ignore[no-untyped-def]
        if atomic_exchange(call + BUSY + 8 * slot, 1) != 0:
            atomic_add(call + FAULTS, 1)
        for _ in range(5000 if slot == 2 else 100):  # one worker is always late
            pause()
        atomic_add(call + COUNTS + 8 * number, 1)
        atomic_add(call + SLOTS + 8 * slot, 1)
        atomic_exchange(call + BUSY + 8 * slot, 0)

    return Library(build.emit({"task": (task, 3)}, host()), host(), {"task": 3})


class Counted:
    """A call whose tasks count."""

    def __init__(self, counting: Library) -> None:
        self.counting = counting
        self.memory = np.zeros(512, np.int64)
        self.address = self.memory.ctypes.data

    def run(self, workers: pool.Pool, others: int) -> bool:
        return workers.run(self.counting, self.address, TASKS, pool.tasks_at_a_time(TASKS, 1e6), others)

    def alone(self) -> None:
        for number in range(TASKS):
            self.counting.task(self.address, 0, number)

    def check(self) -> Array:
        """Assert that every task ran once; return the tasks by slot."""
        slots = self.memory[SLOTS // 8 :][:8].copy()
        assert self.memory[:TASKS].tolist() == [1] * TASKS, self.memory[:TASKS]
        assert slots.sum() == TASKS
        assert not self.memory[BUSY // 8 :][:8].any()
        assert self.memory[FAULTS // 8] == 0, "two threads in one slot"
        self.memory[:] = 0
        return slots


def until(happened: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happened():
            return True
    return False


@pytest.mark.parametrize("spins", [1, 100, 3000])
def test_every_task_runs_once(monkeypatch: pytest.MonkeyPatch, counting: Library, spins: int) -> None:
    """Many short calls from many callers, while workers fall asleep and are woken all the time, and one is slow."""
    monkeypatch.setattr(pool, "SPINS", spins)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    workers = pool.Pool()
    shared: list[int] = []

    def caller(others: int) -> None:
        call, here = Counted(counting), 0
        for _ in range(1700):
            if call.run(workers, others):
                here += int(call.check()[1:].sum())
            else:
                call.alone()
                assert call.check()[0] == TASKS
        shared.append(here)

    try:
        with ThreadPoolExecutor(4) as callers:
            for future in [callers.submit(caller, others) for others in (3, 1, 2, 3)]:
                future.result()
    finally:
        sys.setswitchinterval(before)
    assert sum(shared) > 0, "workers took no part"
    assert len(workers.locks) == 3


class Interrupting:
    """The compiled scheduler, with Ctrl-C right behind some call of one of its functions."""

    def __init__(self, native: Library, name: str) -> None:
        self.native, self.name = native, name

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.native, name)

        def interrupted(*args: int) -> int:
            function(*args)
            self.name = ""
            raise KeyboardInterrupt

        return interrupted if name == self.name else function


@pytest.mark.parametrize("name", ["start", "take_part"])
def test_the_pool_is_as_good_as_new_after_ctrl_c(monkeypatch: pytest.MonkeyPatch, counting: Library, name: str) -> None:
    monkeypatch.setattr(pool, "SPINS", 1)
    workers = pool.Pool()
    native = load(Kernel("schedule", host()))
    call = Counted(counting)

    def both_take_part() -> bool:
        assert call.run(workers, 2), "the pool is still taken"
        return bool((call.check()[1:3] > 0).all())

    def is_interrupted() -> bool:
        """Whether the function was called: `take_part` is not where workers are awake and do it all."""
        workers.native = Interrupting(native, name)
        try:
            call.run(workers, 2)
        except KeyboardInterrupt:
            return True
        call.check()
        return False

    assert until(both_take_part)
    for _ in range(20):
        assert until(is_interrupted)
        done = call.memory[:TASKS].copy()
        assert (done <= 1).all()
        time.sleep(0.001)
        assert (call.memory[:TASKS] == done).all(), "a task ran after the call was given up"
        call.memory[:] = 0
        workers.native = native
    assert until(both_take_part)


def test_a_call_that_ended_cancels_no_other(counting: Library) -> None:
    workers = pool.Pool()
    native = load(Kernel("schedule", host()))
    workers.grow(1)
    first, second = Counted(counting), Counted(counting)
    task = counting.addresses["task"]
    assert native.start(workers.address, task, first.address, TASKS, 0, 0) == MORE
    assert native.start(workers.address, task, second.address, TASKS, 0, 0) == pool.TAKEN
    native.cancel(workers.address, second.address)
    assert native.take_part(workers.address, TASKS) == pool.DONE
    first.check()
    assert native.start(workers.address, task, second.address, TASKS, 0, 0) == MORE
    native.cancel(workers.address, first.address)
    assert native.take_part(workers.address, TASKS) == pool.DONE
    second.check()


def test_regular_calls_are_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10**12
    monkeypatch.setattr(pool.time, "perf_counter_ns", lambda: now)
    rhythm = pool.Rhythm()

    def call(pause_ms: float, heeds: bool = True) -> bool:
        """Call after a pause; whether workers were expected to be awake. `heeds`: one looks at the clock then."""
        nonlocal now
        now += int(pause_ms * 1e6)
        awake = rhythm.begin(1e9)
        now += 300_000
        told.append(rhythm.end(1))
        if heeds:
            rhythm.seconds_of_sleep()
        return awake

    told: list[bool] = []
    assert [call(pause) for pause in (20, 20, 20.2, 20.2)] == [False, False, False, True]
    assert told == [False, False, True, False], "at first, a worker has to be told"
    assert [call(20.2, heeds=False), call(20.2), call(20.2)] == [True, False, True], "a worker that sleeps is not up"
    assert rhythm.seconds_of_sleep() == pytest.approx(0.0202 * 31 / 32, abs=1e-6)
    now += 19_600_000
    assert rhythm.seconds_of_sleep() == 0, "it is time to be up"
    now += 10_000_000
    assert rhythm.seconds_of_sleep() == 0, "the call did not come"
    assert [call(pause) for pause in (5, 40, 13)] == [False, False, False]
    assert rhythm.seconds_of_sleep() == 0, "no two pauses were alike"
    assert [call(pause) for pause in (150, 150, 150)] == [False, False, False], "too long to wait for"
    assert [call(pause) for pause in (0.01, 0.5)] == [True, True], "workers do not sleep yet"


def test_small_calls_are_shared_in_a_burst_and_never_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10**12
    monkeypatch.setattr(pool.time, "perf_counter_ns", lambda: now)
    rhythm = pool.Rhythm()

    def call(pause_us: float) -> bool:
        nonlocal now
        now += int(pause_us * 1e3)
        awake = rhythm.begin(pool.WORTH_WARMING / 2)
        now += 10_000
        assert not rhythm.end(1)
        return awake

    assert [call(pause) for pause in (500, 5, 50, 5)] == [False, False, True, True]
    assert [call(pause) for pause in (500, 5, 5)] == [False, False, True], "workers may sleep by then"
    assert not any(call(20_000) for _ in range(9))
    assert rhythm.seconds_of_sleep() == 0


def test_workers_get_up_before_a_regular_call(monkeypatch: pytest.MonkeyPatch, counting: Library) -> None:
    monkeypatch.setattr(pool, "SPINS", 1)
    rhythm = pool.Rhythm()
    workers, call = pool.Pool(), Counted(counting)
    workers.rhythm = rhythm
    woken: list[int] = []
    wake = workers._wake

    def waking(count: int) -> None:
        woken.append(count)
        wake(count)

    monkeypatch.setattr(workers, "_wake", waking)

    def is_there_unwoken() -> bool:
        """Whether the worker took part in a call although nobody had woken it."""
        time.sleep(0.02)
        woken.clear()
        rhythm.begin(1e9)
        assert call.run(workers, 1)
        if rhythm.end(1):
            pool._wake(workers.locks[0])
        return bool(call.check()[1] > 0) and rhythm.early > 0 and not woken

    assert until(is_there_unwoken)
    rhythm.due = 0


def test_without_more_threads_the_caller_does_the_work(monkeypatch: pytest.MonkeyPatch, counting: Library) -> None:
    def start(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pool.os_threads, "start_new_thread", start)
    workers, call = pool.Pool(), Counted(counting)
    assert call.run(workers, 3)
    assert call.check()[0] == TASKS


# -- processes ---------------------------------------------------------------------------------------------------------

PREAMBLE = """
import os, signal, sys, threading, time
import numpy as np
import fastattn
from fastattn.cpu.host import pool, session
pool.WORTH_SHARING = pool.WORTH_WAKING = 0
fastattn.set_num_threads(3)
rng = np.random.default_rng(0)
query, key, value = rng.standard_normal((3, 1, 4, 300, 32), dtype=np.float32)
wanted = fastattn.attention(query, key, value)
assert abs(wanted - fastattn.attention(query, key, value, backend="reference")).max() < 1e-5
assert len(session.current.pool.locks) == 2

def is_right():
    return np.array_equal(fastattn.attention(query, key, value), wanted)

def after_ctrl_c(call):
    "How long a call went on after Ctrl-C, in a list; an empty one if it had ended before."
    def interrupt():
        global sent
        time.sleep(0.4)
        sent = time.perf_counter()
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    waits = []
    try:
        call()
    except KeyboardInterrupt:
        waits.append(time.perf_counter() - sent)
    thread.join()
    return waits

def in_child():
    pid = os.fork()
    if not pid:
        signal.alarm(30)
        right = all(is_right() for _ in range(5)) and len(session.current.pool.locks) == 2
        os._exit(0 if right else 7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
needs_fork = pytest.mark.skipif(not hasattr(pool.os, "fork"), reason="the system has no fork")
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="the system has no such signals")


def run(code: str, **options: Any) -> str:
    return processes.run(PREAMBLE + code, PYTHONWARNINGS="ignore::DeprecationWarning", **options)


@needs_fork
def test_fork_after_use() -> None:
    run("""
assert in_child() == 0
assert is_right()
assert in_child() == 0
""")


@needs_fork
def test_fork_while_another_thread_is_in_a_call() -> None:
    run("""
pool.TURN_FLOPS = 1e6
stop = threading.Event()
long = rng.standard_normal((3, 1, 2, 3000, 64), dtype=np.float32)
def calls():
    while not stop.is_set():
        fastattn.attention(*long)
thread = threading.Thread(target=calls)
thread.start()
for _ in range(8):
    time.sleep(0.03)
    assert in_child() == 0
stop.set()
thread.join()
assert is_right()
""")


@needs_fork
def test_fork_while_another_thread_compiles() -> None:
    run("""
from fastattn.machine import libraries as kernels, uninterrupted
holds = threading.Event()
def compile():
    with uninterrupted._lock:
        holds.set()
        time.sleep(0.3)
thread = threading.Thread(target=compile)
thread.start()
holds.wait()
kernels._loaded.clear()
assert in_child() == 0
thread.join()
""")


@needs_fork
def test_fork_while_another_thread_compiles_and_is_about_to_take_the_lock_of_logging() -> None:
    run("""
import logging
from fastattn.machine import uninterrupted
holds = threading.Event()
def compile():
    with uninterrupted._lock:
        holds.set()
        time.sleep(0.3)
        logging.getLogger("of a module that is imported now")
thread = threading.Thread(target=compile, daemon=True)
thread.start()
holds.wait()
assert in_child() == 0
thread.join()
""")


@needs_fork
def test_fork_while_another_thread_looks_at_blocks_of_a_mask() -> None:
    run("""
from fastattn import BlockMask
from fastattn.api import block_mask
one, other = (BlockMask.from_function(lambda batch, head, query, key: query >= key, 200, 200) for _ in range(2))
holds, look_at = threading.Event(), block_mask.look_at
def slowly(*arguments):
    holds.set()
    time.sleep(1)
    return look_at(*arguments)
block_mask.look_at = slowly
thread = threading.Thread(target=lambda: one.kinds)
thread.start()
holds.wait()
block_mask.look_at = look_at
pid = os.fork()
if not pid:
    signal.alarm(30)
    os._exit(other.kinds.shape != (1, 1, 4, 4))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
thread.join()
""")


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing_pools(method: str, tmp_path: Path) -> None:
    import multiprocessing
    import subprocess

    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("the system has no such method")
    script = tmp_path / "script.py"
    script.write_text(f"""
import multiprocessing
import numpy as np
import fastattn

def call(seed):
    arrays = np.random.default_rng(seed).standard_normal((3, 2, 4, 200, 64), dtype=np.float32)
    return fastattn.attention(*arrays, is_causal=True)

if __name__ == "__main__":
    fastattn.set_num_threads(2)
    wanted = [call(seed) for seed in range(4)]
    with multiprocessing.get_context({method!r}).Pool(2) as processes:
        assert all(np.array_equal(*pair) for pair in zip(wanted, processes.map(call, range(4), chunksize=1)))
""")
    environment = processes.environment(PYTHONWARNINGS="ignore::DeprecationWarning")
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=120)


@needs_signals
def test_ctrl_c_stops_a_long_call() -> None:
    """It does so within 0.3 s, the library stays usable, and what of `out` was written is right."""
    printed = run("""
for _ in range(2):  # what looks whether `out` overlaps is compiled when a call comes again
    fastattn.attention(query, key, value, out=np.empty_like(query))
long = rng.standard_normal((3, 1, 2, 60000, 64), dtype=np.float32)
out = np.full((1, 2, 60000, 64), np.nan, np.float32)
waits = []
for threads in (2, 1, 3, 2):
    fastattn.set_num_threads(threads)
    waits += after_ctrl_c(lambda: fastattn.attention(*long, out=out))
    assert is_right()
    time.sleep(0.01)
rows = ~np.isnan(out).all(axis=-1)
assert not np.isnan(out[rows]).any()
assert not rows.all()
for head, row in np.argwhere(rows[0])[:: max(1, rows.sum() // 5)]:
    right = fastattn.attention(*(array[0, head][place] for array, place in zip(long, ([row], ..., ...))))
    assert abs(right[0] - out[0, head, row]).max() < 1e-5
fastattn.set_num_threads(3)
assert is_right()
print(len(waits), min(waits), max(waits))
""")
    count, least, _ = printed.split()
    assert count == "4"
    assert float(least) < 0.3  # the least: on a busy machine, a process may wait for its turn


@needs_signals
def test_ctrl_c_stops_a_long_backward_pass() -> None:
    printed = run("""
long = rng.standard_normal((4, 1, 1, 40000, 64), dtype=np.float32)
lse = np.full(long.shape[1:-1], 10, np.float32)
forward = dict(zip(("query", "key", "value"), (query, key, value)), is_causal=True)
out, sums = fastattn.attention(**forward, return_lse=True)
grads = fastattn.attention_backward(out, out=out, lse=sums, **forward)
waits = []
for threads in (2, 1, 3, 2):
    fastattn.set_num_threads(threads)
    waits += after_ctrl_c(lambda: fastattn.attention_backward(long[3], *long[:3], long[3], lse))
    again = fastattn.attention_backward(out, out=out, lse=sums, **forward)
    assert all(np.array_equal(*pair) for pair in zip(grads, again))
print(len(waits), min(waits))
""")
    count, least = printed.split()
    assert count == "4"
    assert float(least) < 0.3


@needs_signals
def test_a_signal_handler_calls() -> None:
    """Its call runs in the middle of another one, of the same thread, and uses more working memory."""
    run("""
pool.TURN_FLOPS = 1e6
inner = rng.standard_normal((3, 1, 3, 200, 256), dtype=np.float32)
outer = rng.standard_normal((3, 1, 4, 1000, 16), dtype=np.float32)
wanted_inner, wanted_outer = fastattn.attention(*inner), fastattn.attention(*outer)
calls = []
def handler(number, frame):
    calls.append(np.array_equal(fastattn.attention(*inner), wanted_inner))
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.003, 0.02)
end = time.monotonic() + 20
while len(calls) < 25 and time.monotonic() < end:
    assert np.array_equal(fastattn.attention(*outer), wanted_outer)
signal.setitimer(signal.ITIMER_REAL, 0)
assert all(calls) and len(calls) >= 25, calls
""")


def test_idle_workers_do_not_keep_the_process() -> None:
    run("time.sleep(0.1)", timeout=30)


def test_exit_while_workers_spin() -> None:
    run("pool.SPINS = 1 << 40\nassert is_right()", timeout=30)


def test_exit_while_a_daemon_thread_is_in_a_call() -> None:
    run(
        """
long = rng.standard_normal((3, 1, 2, 60000, 64), dtype=np.float32)
threading.Thread(target=fastattn.attention, args=tuple(long), daemon=True).start()
time.sleep(0.2)
""",
        timeout=30,
    )


def test_a_call_at_exit() -> None:
    printed = run("""
import atexit
atexit.register(lambda: print(is_right(), flush=True))
session.forget()  # new threads are wanted then, and may not be had
""")
    assert printed == "True\n"
