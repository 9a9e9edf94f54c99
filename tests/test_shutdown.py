"""The last moments of an interpreter: calls at exit, and of objects that go with it, when nothing can be imported."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest

PREAMBLE = """
import atexit, sys, threading, time
import numpy as np
import fastattn
from fastattn.cpu.host import pool, session
pool.WORTH_SHARING = pool.WORTH_WAKING = 0
fastattn.set_num_threads(3)
query, key, value = np.random.default_rng(0).standard_normal((3, 1, 4, 40, 16), dtype=np.float32)
weight = np.ones(16, np.float32)
tri = np.tri(40, dtype=bool)
heads = fastattn.MultiHeadAttention(32, 4, rng=0)

def every_call():
    "All results there are, of shapes that nothing else has, in one list."
    results = []
    for n in (1, 9, 40):
        given = query[..., :n, :], key, value
        out, lse = fastattn.attention(*given, return_lse=True)
        results += [out, lse, fastattn.attention(*given, tri[:n], is_causal=True)]
        results += fastattn.attention(*given, dropout_p=0.5, rng=1, return_weights=True)
        results += fastattn.attention_backward(out, *given, out, lse)
        floats = tri[:n].astype(np.float16)
        results += fastattn.attention_backward(out, *given, out, lse, floats, grad_mask=True)
        results += [fastattn.attention_weights(*given[:2]), fastattn.attention_weights(*given[:2], lse=lse)]
        results += [fastattn.attention_weights(*given[:2], rows=[0], columns=slice(2, 5))]
        results += [fastattn.attention_summary(*given[:2], top_k=2).entropy]
        out, lse = fastattn.additive_attention(*given, weight, return_lse=True)
        results += [out, *fastattn.additive_attention_backward(out, *given, weight, out, lse)]
        results += [fastattn.attention(query.astype(np.float64)[..., :n, :].tolist(), key, value.astype(">f8"))]
        results += [fastattn.attention(*given, out=np.empty_like(given[0])), heads(np.ones((2, n, 32), np.float32))]
        results += [fastattn.attention(*given, backend="reference"), fastattn.rotary(query, np.arange(40) + n)]
    return results

class Last:
    "Calls when it goes, and says so."

    def __init__(self, call):
        self.call = call

    def __del__(self):
        print(sys.is_finalizing(), self.call(), flush=True)
"""
# the kernels have to be there: they cannot be compiled any more
KERNELS = """
wanted = every_call()
from fastattn.cpu.host import session
from fastattn.machine import libraries as kernels
session.current.plans = session.Plans()  # shapes are new again

def are_right():
    return all(np.array_equal(*pair) for pair in zip(every_call(), wanted, strict=True))
"""
# what a daemon thread does, with names of its own: it would keep those of this program, and what has a finaliser, alive
DAEMON = """
apart = {}
exec(daemon, apart)
begun = threading.Event()
threading.Thread(target=apart["run"], args=(begun,), daemon=True).start()
begun.wait()
del apart
"""


def run(code: str, **changes: str) -> str:
    """Run code in a process that should end soon after."""
    return processes.run(PREAMBLE + code, timeout=120, **changes)


def test_every_function_in_a_last_finaliser() -> None:
    assert run(KERNELS + "last = Last(are_right)\n") == "True True\n"


def test_kernels_that_are_found_on_disk_in_a_last_finaliser() -> None:
    run("every_call()")
    code = """
fastattn.attention(query[..., :3], key[..., :3], value)  # one call: all else is new
last = Last(lambda: len(every_call()))
"""
    assert run(code) == "True 78\n"


def test_new_threads_in_a_last_finaliser() -> None:
    """None can be started."""
    assert run(KERNELS + "session.forget()\nlast = Last(are_right)\n") == "True True\n"
    more = "fastattn.set_num_threads(1)\n" + KERNELS + "fastattn.set_num_threads(7)\nlast = Last(are_right)\n"
    assert run(more) == "True True\n"


def test_a_kernel_that_cannot_be_had_any_more(tmp_path: Path) -> None:
    """The message says what to do."""
    printed = run(
        """
def call():
    try:
        fastattn.attention(query, key, value)
    except RuntimeError as error:
        return error
last = Last(call)
""",
        FASTATTN_CACHE_DIR=str(tmp_path),
    )
    assert printed.startswith("True the kernel ")
    assert "fastattn.warmup" in printed


@pytest.mark.slow
def test_a_kernel_is_compiled_at_exit(tmp_path: Path) -> None:
    code = "atexit.register(lambda: print(fastattn.attention(query, key, value).shape))"
    assert run(code, FASTATTN_CACHE_DIR=str(tmp_path)) == "(1, 4, 40, 16)\n"


@pytest.mark.parametrize("new_threads", [False, True])
def test_every_function_at_exit(new_threads: bool) -> None:
    forget = "session.forget()\n" if new_threads else ""
    assert run(KERNELS + forget + "atexit.register(lambda: print(are_right(), flush=True))") == "True\n"


def test_at_exit_while_daemon_threads_call() -> None:
    """They end in the middle of calls, with locks of theirs, and the pool."""
    code = """
daemon = '''
import numpy as np
import fastattn
def run(begun):
    long = np.ones((1, 2, 1000, 64), np.float32)
    while True:
        fastattn.attention(long, long, long)
        begun.set()
'''
"""
    assert run(KERNELS + code + DAEMON + DAEMON + "last = Last(are_right)\n") == "True True\n"


@pytest.mark.parametrize("lock", ["uninterrupted._lock", "session.current.pool.growing"])
def test_a_daemon_thread_that_ends_with_a_lock(lock: str) -> None:
    """Nobody waits for what it will never give back."""
    code = f"""
daemon = '''
import time
from fastattn.machine import uninterrupted
from fastattn.cpu.host import pool, session
def run(begun):
    with {lock}:
        begun.set()
        time.sleep(1000)
'''
{DAEMON}
fastattn.set_num_threads(9)
kernels._loaded.clear()
last = Last(are_right)
"""
    assert run(KERNELS + code) == "True True\n"
