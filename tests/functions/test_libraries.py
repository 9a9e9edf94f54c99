"""When a function is compiled, and that a compiled one is always the right one: changes, processes, threads, forks."""

from __future__ import annotations

import os
import pickle
import threading
from typing import Any

import numpy as np
import processes
import pytest

import fastattn
from fastattn import reference
from fastattn.machine import building

RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.standard_normal((2, 3, length, 8)).astype(np.float32) for length in (20, 30, 30))


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the kernels that are asked for and are neither in memory nor on disk meanwhile, as they come."""
    found: list[Any] = []
    emit = building.emit

    def counted(*args: Any, **options: Any) -> bytes:
        found.append(args)
        return emit(*args, **options)

    monkeypatch.setattr(building, "emit", counted)
    return found


def right(function: Any, **options: Any) -> Any:
    """Assert that a call with a function is what the reference has; return the result."""
    out = fastattn.attention(QUERY, KEY, VALUE, score_mod=function, **options)
    np.testing.assert_allclose(out, reference.attention(QUERY, KEY, VALUE, score_mod=function, **options), atol=1e-5)
    return out


def made(table: Any, factor: Any) -> Any:
    """Return a function that captures an array and a number."""
    return lambda score, batch, head, query, key: score * factor + table[query % len(table)]


def test_changes_of_what_is_captured_compile_nothing(compilations: list[Any]) -> None:
    right(made(np.arange(5.0), 0.5))
    compilations.clear()
    for table, factor in (
        (np.arange(5.0) * 2, 0.5),
        (np.arange(9.0)[::-1], -1.5),
        (np.arange(40.0)[::2], np.float64(3)),
    ):
        right(made(table, factor))
    table = np.zeros(5)
    function = made(table, 1.0)
    before = right(function)
    table[:] = np.arange(5.0) ** 2
    assert not np.array_equal(right(function), before)
    fastattn.attention(QUERY[:, :, :19], KEY[:, :, :9], VALUE[:, :, :9], score_mod=function)
    assert not compilations


def test_a_function_that_is_defined_twice_is_compiled_once(compilations: list[Any]) -> None:
    source = "def function(score, batch, head, query, key):\n    return score + 0.125 * key\n"
    for _ in range(2):
        around: dict[str, Any] = {}
        exec(source, around)
        right(around["function"])
        compilations[1:] = []
    count = len(compilations)
    exec("\n\n" + source, around)  # elsewhere in a file
    right(around["function"])
    assert len(compilations) == count


def test_other_code_is_another_function() -> None:
    def function(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + key

    def other(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score - key

    first = right(function)
    function.__code__ = other.__code__
    assert not np.array_equal(right(function), first)


def test_other_kinds_of_what_is_captured_are_other_functions() -> None:
    factor: Any = 2

    def function(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + (query // factor) * 0.25

    for factor in (2, 2.5, np.float32(1.5), np.int8(3)):  # noqa: B007
        right(function)


def test_functions_that_are_called_may_change() -> None:
    around: dict[str, Any] = {"helped": lambda x: x * 2}
    exec("def function(score, batch, head, query, key): return helped(score)", around)
    first = right(around["function"])
    around["helped"] = lambda x: x * 3
    assert not np.array_equal(right(around["function"]), first)


def test_functions_of_one_name_capture_what_is_their_own() -> None:
    def times(factor: Any) -> Any:
        return lambda x: x * factor

    two, three, factor = times(2.0), times(3.0), 5.0
    right(lambda score, batch, head, query, key: two(score) + three(score) * 0.25 - factor)


def test_a_name_means_what_it_is_in_its_module() -> None:
    import math

    table = np.arange(10.0)
    right(lambda score, batch, head, query, key: table[math.floor(key * 0.25)] + score)
    around: dict[str, Any] = {"floor": np.floor, "np": np}
    exec("def function(score, batch, head, query, key): return score + floor(key * 0.25)", around)
    right(around["function"])
    around["floor"] = np.ceil
    right(around["function"])


def test_torch_names_mean_what_they_do_in_numpy() -> None:
    torch = pytest.importorskip("torch")
    table = torch.arange(5.0)

    def function(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        score = torch.where(query >= key, score, torch.clamp(score, min=-0.5, max=0.5))
        return score + torch.sigmoid(table[torch.abs(query - key) % 5]) + torch.relu(score) * torch.tanh(score)

    right(function)


def test_a_function_may_be_pickled() -> None:
    right(pickle.loads(pickle.dumps(_of_a_module)))
    cloudpickle = pytest.importorskip("cloudpickle")
    right(pickle.loads(cloudpickle.dumps(made(np.arange(4.0), 2.0))))


def _of_a_module(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score + 0.5 * batch


CALL = """
import numpy as np, fastattn
from fastattn.machine import building
def refuse(*args, **options):
    raise AssertionError("compiled once more")
{refuse}
query = np.ones((1, 5, 4), np.float32)
print(fastattn.attention(query, query, query, score_mod=lambda s, b, h, q, k: s - {number} * k).shape)
"""


def test_another_process_finds_it_on_disk() -> None:
    number = float(RNG.uniform())
    for refuse in ("", "building.emit = refuse"):
        assert processes.run(CALL.format(refuse=refuse, number=number)) == "(1, 5, 4)\n"


def test_threads_with_functions_that_capture_other_values() -> None:
    wanted = [reference.attention(QUERY, KEY, VALUE, score_mod=made(np.arange(4.0) * n, n / 3)) for n in range(4)]
    wrong: list[Any] = []

    def work(n: int) -> None:
        function = made(np.arange(4.0) * n, n / 3)
        for _ in range(20):
            out = fastattn.attention(QUERY, KEY, VALUE, score_mod=function)
            if not np.allclose(out, wanted[n], atol=1e-5):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork() -> None:
    code = """
import os, numpy as np, fastattn
query = np.ones((1, 5, 4), np.float32)
call = lambda: fastattn.attention(query, query, query, score_mod=lambda s, b, h, q, k: s - 0.75 * k).tobytes()
before = call()
child = os.fork()
if child == 0:
    os._exit(0 if call() == before else 1)
print(os.waitpid(child, 0)[1], call() == before)
"""
    assert processes.run(code) == "0 True\n"
