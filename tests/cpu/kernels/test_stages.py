"""Tasks that wait for others: none begins too early, at any number of threads, and Ctrl-C leaves no trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fastattn
from fastattn.cpu.host import pool, session
from fastattn.machine.libraries import Library
from fastattn.machine.table import host

Array = NDArray[Any]

# -- counters ----------------------------------------------------------------------------------------------------------

HEADS, FIRST, SECOND = 3, 4, 6  # tasks of each head in two stages
ROWS, TURNS = 3, 8
STAGED, IN_TURNS = HEADS * (FIRST + SECOND), ROWS * TURNS
COUNTERS, DONE, LAST, EARLY, BEGUN, ORDER = range(0, 6 * 512, 512)  # offsets in a call's memory


def compiled(task: Callable[..., Any]) -> Library:
    from fastattn.machine import building

    return Library(building.emit({"task": (task, 3)}, host()), host(), {"task": 3})


@pytest.fixture(scope="module")
def staged() -> Library:
    """Return tasks in two stages: those of the second count what is not done of the first, though they have waited."""
    from fastattn.cpu.kernels.stages import finish, wait_for
    from fastattn.simd import atomic_add, jit, load_i64, pause, store_i64

    @jit
    def task(call, slot, number):  # type: ignore[no-untyped-def]
        head, part = number % HEADS, number // HEADS
        done = call + DONE + 8 * head * FIRST
        if part < FIRST:
            for _ in range(5000 if slot == 1 else 100):  # one worker is always late
                pause()
            store_i64(done + 8 * part, 1)
            if finish(call + COUNTERS + 8 * head) == FIRST:
                atomic_add(call + LAST + 8 * head, 1)
        else:
            wait_for(call + COUNTERS + 8 * head, FIRST)
            for other in range(FIRST):
                atomic_add(call + EARLY, 1 - load_i64(done + 8 * other))
            atomic_add(call + BEGUN, 1)
            for _ in range(100):
                pause()

    return compiled(task)


@pytest.fixture(scope="module")
def in_turns() -> Library:
    """Return tasks that write the number of their turn behind those that were there before."""
    from fastattn.cpu.kernels.stages import finish, wait_for
    from fastattn.simd import jit, load_i64, pause, store_i64

    @jit
    def task(call, slot, number):  # type: ignore[no-untyped-def]
        row, turn = number % ROWS, number // ROWS
        wait_for(call + COUNTERS + 8 * row, turn)
        before = load_i64(call + ORDER + 8 * row)
        for _ in range(2000 if slot == 1 else 50):
            pause()
        store_i64(call + ORDER + 8 * row, 10 * before + turn)
        finish(call + COUNTERS + 8 * row)

    return compiled(task)


class Call:
    """A call of such tasks: its memory, which it begins with zeros in."""

    def __init__(self, library: Library, tasks: int) -> None:
        self.library, self.tasks = library, tasks
        self.memory = np.zeros(6 * 512 // 8, np.int64)

    def words(self, offset: int, count: int) -> list[int]:
        return self.memory[offset // 8 : offset // 8 + count].tolist()

    def run(self, workers: pool.Pool, others: int, turn: int = 1000) -> None:
        """Run it with others, which nobody else keeps from that."""
        self.memory[:] = 0
        assert workers.run(self.library, self.memory.ctypes.data, self.tasks, turn, others), "the pool is taken"

    def check_stages(self) -> None:
        assert self.words(EARLY, 1) == [0], "a task of the second stage came too early"
        assert self.words(BEGUN, 1) == [HEADS * SECOND]
        assert self.words(LAST, HEADS) == [1] * HEADS, "one task of the first stage is the last"


WORKERS = pytest.mark.parametrize("others", [0, 1, 3, 7])


@WORKERS
@pytest.mark.parametrize("spins", [1, 3000])
def test_a_stage_begins_when_the_one_before_has_ended(
    monkeypatch: pytest.MonkeyPatch, staged: Library, others: int, spins: int
) -> None:
    monkeypatch.setattr(pool, "SPINS", spins)
    workers, call = pool.Pool(), Call(staged, STAGED)
    for _ in range(200):
        call.run(workers, others)
        call.check_stages()


@WORKERS
def test_each_task_has_its_turn(in_turns: Library, others: int) -> None:
    workers, call = pool.Pool(), Call(in_turns, IN_TURNS)
    for _ in range(200):
        call.run(workers, others)
        assert call.words(ORDER, ROWS) == [1234567] * ROWS


class Interrupting:
    """The compiled scheduler, with Ctrl-C behind the first turn of the caller's after which `happened`."""

    def __init__(self, native: Library, happened: Callable[[], bool]) -> None:
        self.native, self.happened = native, happened

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.native, name)

        def interrupted(*args: int) -> Any:
            state = function(*args)
            if name in ("start", "take_part") and state != pool.DONE and self.happened():
                raise KeyboardInterrupt
            return state

        return interrupted


@pytest.mark.parametrize("others", [1, 3])
def test_ctrl_c_in_the_second_stage_leaves_the_pool_usable(staged: Library, others: int) -> None:
    workers, call = pool.Pool(), Call(staged, STAGED)
    workers.grow(others)
    native, interrupted = workers.native, 0
    for _ in range(1000):
        workers.native = Interrupting(native, lambda: call.words(BEGUN, 1) != [0])
        try:
            call.run(workers, others, turn=1)
        except KeyboardInterrupt:
            interrupted += 1
            then = call.memory.copy()
            time.sleep(0.001)
            assert (call.memory == then).all(), "a task ran after the call was given up"
            assert call.words(EARLY, 1) == [0]
        workers.native = native
        call.run(workers, others)
        call.check_stages()
        if interrupted == 20:
            break
    assert interrupted == 20


# -- calls -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tasks as small as can be, and shared; the caller looks at Python's signals after each."""
    row = replace(host(), blocking=replace(host().blocking, additive_block=32, gradient_state_bytes=1))
    fresh = session.Session(row)
    monkeypatch.setattr(session, "current", fresh)
    for name in ("WORTH_SHARING", "WORTH_WAKING"):
        monkeypatch.setattr(pool, name, 0)
    monkeypatch.setattr(pool, "TURN_FLOPS", 1)
    for module in ("backward", "additive_backward"):
        monkeypatch.setattr(f"fastattn.cpu.host.{module}.TASK_FLOPS", 1)


def inputs(*shape: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((4, *shape), dtype=np.float32)


def summary(seed: int) -> Callable[[], tuple[Array, ...]]:
    query, key, *_ = inputs(1, 400, 16, seed=seed)
    return lambda: fastattn.attention_summary(query, key, is_causal=seed == 1)


def backward(seed: int) -> Callable[[], tuple[Array, ...]]:
    grad_out, *arrays = inputs(1, 400, 16, seed=seed)
    out, lse = fastattn.attention(*arrays, is_causal=seed == 1, return_lse=True)
    return lambda: fastattn.attention_backward(grad_out, *arrays, out, lse, is_causal=seed == 1)


def additive(seed: int) -> Callable[[], tuple[Array, ...]]:
    """Two chunks: there a task comes next to those that it waits for."""
    grad_out, *arrays = inputs(1, 64, 16, seed=seed)
    weight = np.ones(16, np.float32)
    out, lse = fastattn.additive_attention(*arrays, weight, return_lse=True)
    return lambda: fastattn.additive_attention_backward(grad_out, *arrays, weight, out, lse)


def additive_lengths(seed: int) -> Callable[[], tuple[Array, ...]]:
    """Rows of a batch that are cut into chunks of their own."""
    grad_out, *arrays = inputs(3, 1, 150, 16, seed=seed)
    options: dict[str, Any] = {"key_lengths": [150, 1, 70], "is_causal": seed == 1}
    weight = np.ones(16, np.float32)
    out, lse = fastattn.additive_attention(*arrays, weight, return_lse=True, **options)
    return lambda: fastattn.additive_attention_backward(grad_out, *arrays, weight, out, lse, **options)


CALLS = pytest.mark.parametrize("make", [summary, backward, additive, additive_lengths])


def bits(results: tuple[Array, ...]) -> list[bytes]:
    return [array.tobytes() for array in results]


@pytest.mark.usefixtures("_many_tasks")
@CALLS
def test_the_same_bits_with_more_threads_than_cpus(make: Callable[[int], Callable[[], tuple[Array, ...]]]) -> None:
    """By turns with another call, which leaves other numbers in memory."""
    calls = [make(seed) for seed in (0, 1)]
    with fastattn.num_threads(1):
        wanted = [bits(call()) for call in calls]
    for threads in (2, 4, 8):
        with fastattn.num_threads(threads):
            for _ in range(30):
                assert [bits(call()) for call in calls] == wanted, threads


@pytest.mark.usefixtures("_many_tasks")
@CALLS
def test_the_same_bits_after_ctrl_c_in_any_stage(make: Callable[[int], Callable[[], tuple[Array, ...]]]) -> None:
    call, workers = make(0), session.current.pool
    with fastattn.num_threads(2):
        wanted, native = bits(call()), workers.native
        turns = 0

        def is_over() -> bool:
            nonlocal left
            left -= 1
            return left < 0

        while True:
            left = turns
            workers.native = Interrupting(native, is_over)
            try:
                call()
                break
            except KeyboardInterrupt:
                turns += 1
            finally:
                workers.native = native
            assert bits(call()) == wanted
    assert turns > 0
