"""Signals, and forks, while kernels are compiled: nobody waits for ever afterwards, and nothing is half done."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest

from fastattn.machine import uninterrupted as module
from fastattn.machine.uninterrupted import uninterrupted

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="the system has no such signals")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

PREAMBLE = """
import faulthandler, os, signal, sys, threading, time
import numpy as np
import fastattn
from fastattn.cpu.host.kernels import load
from fastattn.machine.kernel import Kernel
from fastattn.machine.table import host
faulthandler.dump_traceback_later(500, exit=True)  # for who waits for ever

def kernel(name):
    return load(Kernel(name, host()))

def in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(kernel("overlaps")))
    thread.start()
    thread.join()
    return hasattr(found[0], "overlaps")
"""
LOCKS = {
    "numba": "from numba.core.compiler_lock import _CompilerLock as Lock\nname = 'acquire'",
    "llvmlite": "from llvmlite.binding.ffi import _LLVMLock as Lock\nname = '__enter__'",
}


def run(code: str, **changes: str) -> str:
    return processes.run(PREAMBLE + code, timeout=600, PYTHONWARNINGS="ignore::DeprecationWarning", **changes)


@pytest.fixture
def alarm() -> Iterator[None]:
    """Have SIGALRM raise KeyboardInterrupt in the main thread."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# -- the piece of work -------------------------------------------------------------------------------------------------


def test_another_thread_works_and_the_caller_gets_what_it_returns() -> None:
    assert uninterrupted("thread", threading.get_ident) != threading.get_ident()


def test_the_caller_gets_what_it_raises() -> None:
    def work() -> None:
        raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work") as caught:
        uninterrupted("error", work)
    assert [entry.name for entry in caught.traceback][-1] == "work"
    assert not module._under_way


def test_work_within_work_is_done_in_its_thread() -> None:
    first, second = uninterrupted("outer", lambda: (threading.get_ident(), uninterrupted("inner", threading.get_ident)))
    assert first == second


def test_without_more_threads_the_caller_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module.os_threads, "start_new_thread", start)
    assert uninterrupted("here", threading.get_ident) == threading.get_ident()
    assert not module._here.works


@needs_signals
def test_who_waits_is_interrupted_and_who_asks_next_gets_what_has_gone_on(alarm: None) -> None:
    begun: list[int] = []

    def work() -> int:
        begun.append(1)
        time.sleep(1)
        return len(begun)

    for _ in range(3):
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            uninterrupted("slow", work)
    assert uninterrupted("slow", work) == 1


@needs_signals
def test_a_handler_asks_for_more_work_meanwhile() -> None:
    found = []
    before = signal.signal(signal.SIGALRM, lambda *_: found.append(uninterrupted("of the handler", lambda: 2)))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        found.append(uninterrupted("slow", lambda: time.sleep(0.3) or 1))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert sorted(found) == [1, 2]


@needs_fork
def test_a_handler_forks_meanwhile_and_the_child_goes_on() -> None:
    """The child has no thread that works: it has to begin again."""
    run("""
from fastattn.machine import os_threads
from fastattn.machine.uninterrupted import uninterrupted
real, children = os_threads.start_new_thread, []
def late(function, arguments):  # so that the work has not begun when the process forks
    return real(lambda: (time.sleep(0.5), function(*arguments)), ())
os_threads.start_new_thread = late
signal.signal(signal.SIGALRM, lambda *_: children.append(os.fork()))
signal.setitimer(signal.ITIMER_REAL, 0.1)
assert uninterrupted("process", os.getpid) == os.getpid()
if not children[0]:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
""")


@needs_fork
def test_a_fork_that_is_interrupted_waits_all_the_same() -> None:
    """A child would have the lock as the thread that works has it: taken for ever."""
    code = """
from fastattn.machine import uninterrupted
holds = threading.Event()
def work():
    holds.set()
    time.sleep(1)
threading.Thread(target=uninterrupted.uninterrupted, args=("slow", work)).start()
holds.wait()
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
sys.unraisablehook = lambda told: None  # Python says that there was an interrupt
pid = os.fork()
signal.setitimer(signal.ITIMER_REAL, 0)
if not pid:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(20)
    os._exit(uninterrupted.uninterrupted("quick", lambda: 0))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
print(uninterrupted.uninterrupted("in the parent", lambda: "goes on"))
"""
    assert run(code) == "goes on\n"


def test_the_process_ends_after_the_work_that_it_has_left() -> None:
    """A compiler whose library is taken down meanwhile may crash."""
    code = """
from fastattn.machine.uninterrupted import uninterrupted
begun = threading.Event()
def work():
    begun.set()
    time.sleep(1)
    print("done", flush=True)
threading.Thread(target=uninterrupted, args=("slow", work), daemon=True).start()
begun.wait()
"""
    assert run(code) == "done\n"


# -- compilers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_signals
@pytest.mark.parametrize("lock", LOCKS)
def test_an_interrupt_leaves_no_lock_of_a_compiler_taken(lock: str, tmp_path: Path) -> None:
    """Numba and llvmlite take theirs in Python: there is a moment when they have them, and are not yet prepared."""
    code = f"""
{LOCKS[lock]}
real, sent = getattr(Lock, name), []
def acquire(self):
    real(self)
    if not sent:
        sent.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
setattr(Lock, name, acquire)
try:
    kernel("schedule")
except KeyboardInterrupt:
    print("interrupted")
print(in_a_thread())
"""
    assert run(code, FASTATTN_CACHE_DIR=str(tmp_path)) == "interrupted\nTrue\n"


@pytest.mark.slow
@needs_signals
def test_an_interrupt_leaves_no_module_half_imported(tmp_path: Path) -> None:
    """Numba is imported when the first kernel is compiled, which takes a second."""
    code = """
signal.signal(signal.SIGALRM, signal.default_int_handler)
for _ in range(20):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        kernel("schedule")
    except KeyboardInterrupt:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
print(in_a_thread())
"""
    assert run(code, FASTATTN_CACHE_DIR=str(tmp_path)) == "True\n"


@pytest.mark.slow
def test_nothing_of_llvms_goes_in_the_main_thread(tmp_path: Path) -> None:
    """What goes takes llvmlite's lock, wherever the garbage collector runs, and that is where signals interrupt."""
    code = """
import gc
from llvmlite.binding import ffi
real, main, names = ffi._lib_fn_wrapper.__call__, threading.get_ident(), set()
def call(self, *args):
    if threading.get_ident() == main:
        names.add(self._cfn.__name__)
    return real(self, *args)
ffi._lib_fn_wrapper.__call__ = call
kernel("schedule")
arrays = np.ones((3, 1, 2, 40, 16), np.float32)
try:
    fastattn.attention(*arrays, score_mod=lambda score, batch, head, query, key: score + open(key))
except TypeError:
    gc.collect()
    print(names or "none")
"""
    assert run(code, FASTATTN_CACHE_DIR=str(tmp_path)) == "none\n"
