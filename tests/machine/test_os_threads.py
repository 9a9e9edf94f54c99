"""In a process whose threads are green: gevent and eventlet replace Python's functions; and asyncio, which does not."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import processes
import pytest

PATCHES = {
    "gevent": "import gevent.monkey; gevent.monkey.patch_all()",
    # what it says on stderr of other libraries' locks is none of our business
    "eventlet": "import contextlib, io, warnings; warnings.simplefilter('ignore'); import eventlet\n"
    "with contextlib.redirect_stderr(io.StringIO()): eventlet.monkey_patch()",
    # whoever it is: functions that are not for fastattn
    "another": """
import _thread, functools, sys, threading, time

def replaced(function):
    @functools.wraps(function)
    def replacement(*args, **options):
        assert not sys._getframe(1).f_globals["__name__"].startswith("fastattn"), function
        return function(*args, **options)
    return replacement

for module, names in (
    (_thread, ("start_new_thread", "allocate_lock", "RLock", "get_ident", "get_native_id")),
    (threading, ("_start_new_thread", "Lock", "RLock", "Condition", "Event", "get_ident", "get_native_id")),
    (time, ("sleep",)),
):
    for name in names:
        setattr(module, name, replaced(getattr(module, name)))
""",
}
PREAMBLE = """
import os, sys
import numpy as np
import fastattn
from fastattn.cpu.host import pool, session
pool.WORTH_SHARING = pool.WORTH_WAKING = 0
rng = np.random.default_rng(0)
x = rng.standard_normal((3, 1, 4, 300, 32), dtype=np.float32)
"""
CALLS = """
cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
fastattn.set_num_threads(3)
wanted = fastattn.attention(*x)
assert abs(wanted - fastattn.attention(*x, backend="reference")).max() < 1e-5

def is_right():
    return np.array_equal(fastattn.attention(*x), wanted)

"""


@pytest.fixture(params=PATCHES)
def patch(request: pytest.FixtureRequest) -> str:
    """Return the code that replaces Python's threads, in one way after the other."""
    if request.param != "another" and find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return PATCHES[request.param]


@pytest.fixture(params=["before the import", "after the import", "after a call"])
def patched(request: pytest.FixtureRequest, patch: str) -> str:
    """Return code that replaces Python's threads, and calls."""
    if request.param == "before the import":
        return patch + PREAMBLE + CALLS
    if request.param == "after the import":
        return PREAMBLE + patch + CALLS
    return PREAMBLE + "fastattn.attention(*x)\n" + patch + CALLS


def test_workers_are_threads_of_the_system(patched: str) -> None:
    """And what binds workers to CPUs binds nobody else."""
    processes.run(
        patched
        + """
import ctypes
from fastattn.machine import os_threads
slow = ctypes.CDLL(None).usleep if os.name == "posix" else lambda microseconds: None
for _ in range(30):  # calls that wake workers, since they sleep meanwhile
    assert is_right()
    slow(1000)
assert session.current.pool.staff == 2
threads = set(session.current.pool.threads.values())
assert len(threads) == 2 and os_threads.get_native_id() not in threads
assert cpus is None or os.sched_getaffinity(0) == cpus
"""
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_fork(patched: str) -> None:
    """The child says what it found: gevent's `os.waitpid` may miss the end of a child, whoever forked it."""
    processes.run(
        patched
        + """
ours, its = os.pipe()
if not os.fork():
    os.write(its, b"right" if is_right() and session.current.pool.staff == 2 else b"wrong")
    os._exit(0)
os.close(its)
assert os.read(ours, 5) == b"right"
"""
    )


SPAWN = {
    "gevent": """
import gevent
from gevent.threadpool import ThreadPool
def all_of(function, count):
    jobs = [gevent.spawn(function, i) for i in range(count)]
    gevent.joinall(jobs, raise_error=True)
    return [job.value for job in jobs]
def in_threads(function, count):
    return ThreadPool(count).map(function, range(count))
""",
    "eventlet": """
import eventlet
from eventlet import tpool
def all_of(function, count):
    return list(eventlet.GreenPool().imap(function, range(count)))
def in_threads(function, count):
    return list(eventlet.GreenPool().imap(lambda i: tpool.execute(function, i), range(count)))
""",
}


@pytest.mark.parametrize("how", ["all_of", "in_threads"])
@pytest.mark.parametrize("library", SPAWN)
def test_many_green_threads_call(library: str, how: str) -> None:
    """And threads of the library's, at once, with shapes that are new to all of them."""
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    processes.run(
        PATCHES[library]
        + PREAMBLE
        + CALLS
        + SPAWN[library]
        + f"""
import time
shapes = [(1, 1 + i % 3, 20 + 30 * i, 8 * (1 + i % 4)) for i in range(8)]
arrays = [rng.standard_normal((3, *shape), dtype=np.float32) for shape in shapes]
def calls(i):
    with fastattn.num_threads(1 + i % 4):
        time.sleep(0.001)  # others have their turn
        results = []
        for _ in range(10):
            results.append(fastattn.attention(*arrays[i]))
            if {how!r} == "all_of":
                time.sleep(0.001)
        assert fastattn.get_num_threads() == 1 + i % 4, "what is said in one context is heard in another"
    return all(np.array_equal(result, results[0]) for result in results) and results[0]
for result, given in zip({how}(calls, 8), arrays):
    assert abs(result - fastattn.attention(*given, backend="reference")).max() < 1e-5
assert fastattn.get_num_threads() == 3
assert cpus is None or os.sched_getaffinity(0) == cpus
"""
    )


@pytest.mark.skipif(find_spec("gevent") is None, reason="gevent is not installed")
@pytest.mark.skipif(sys.platform == "win32", reason="the system has no such signals")
def test_ctrl_c_under_gevent() -> None:
    processes.run(
        PATCHES["gevent"]
        + PREAMBLE
        + CALLS
        + """
import io, signal
import gevent
gevent.get_hub().exception_stream = io.StringIO()  # it would print what a greenlet ends by
long = rng.standard_normal((3, 1, 2, 60000, 64), dtype=np.float32)
for in_another in (False, True):
    signal.setitimer(signal.ITIMER_REAL, 0.4)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        gevent.spawn(fastattn.attention, *long).join() if in_another else fastattn.attention(*long)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("the call went on")
    assert is_right()
"""
    )


def test_asyncio() -> None:
    """Calls in threads of asyncio's, while the loop goes round."""
    processes.run(
        PREAMBLE
        + CALLS
        + """
import asyncio

async def main():
    turns = 0
    calls = asyncio.gather(*(asyncio.to_thread(is_right) for _ in range(40)))
    while not calls.done():
        turns += 1
        await asyncio.sleep(0)
    assert all(await calls)
    assert turns > 1
    with fastattn.num_threads(2):  # a context goes along
        assert await asyncio.to_thread(fastattn.get_num_threads) == 2

asyncio.run(main())
assert cpus is None or os.sched_getaffinity(0) == cpus
"""
    )
