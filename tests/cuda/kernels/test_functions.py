"""Functions of the user's in the language of GPUs: their PTX, run by a machine in NumPy, computes what Python does."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import processes
import ptx_machine
import pytest

from fastattn.cuda.available import SIMULATED
from fastattn.functions.function import described, record_of

pytestmark = pytest.mark.skipif(not SIMULATED, reason="a GPU runs the kernels themselves")

#: What both this process and the one that compiles know: functions of each kind of thing that there may be in one.
FUNCTIONS = """
import numpy as np

table = np.linspace(-2, 2, 24, dtype=np.float32).reshape(3, 8)
halves = np.linspace(1, 2, 9).astype(np.float16)[::2]
numbers, number, least = np.arange(-4, 5, dtype=np.int16), 1.25, 3

def arithmetic(score, batch, head, query, key):
    return (score * number - 2.0) / (batch + 2) + abs(query - key) - -score

def indices(score, batch, head, query, key):
    return score + table[head, query - key] * halves[key] + numbers[-1 - key]

def branches(score, batch, head, query, key):
    if query > key:
        return score * score
    if numbers[query] == numbers[key] or head == 1:
        return max(score, 0.5)
    return -score

def whole_numbers(score, batch, head, query, key):
    return score * (1 + query % least) + (key - 7) // 2 + np.where(query & 1, 1, score)

def exponentials(score, batch, head, query, key):
    return np.exp(score) + 20 * np.tanh(score / 20) + 1 / (1 + np.exp(-score)) + np.expm1(score * 0.01)

def logarithms(score, batch, head, query, key):
    return np.log(abs(score) + 0.1) + np.log2(abs(score) + 3) + np.log1p(score * score) + np.sqrt(score * score + 1)

def powers(score, batch, head, query, key):
    return score**2 + score**3 + (abs(score) + 1) ** 1.5

def steps(score, batch, head, query, key):
    return np.floor(score) + np.ceil(score) + np.rint(score) + np.minimum(score, 1) + np.sign(score)

def branches_of_array(score, batch, head, query, key):
    return score * table[head, key] if query > key else score

def seen(batch, head, query, key):
    return (query >= key) & (numbers[query] != numbers[-key]) | (not head == 1)
"""
#: Functions that are differentiated by an array that they capture, and its number.
ELEMENTS = (("indices", 0), ("indices", 1), ("branches_of_array", 0))
NAMES = ("arithmetic", "indices", "branches", "whole_numbers", "exponentials", "logarithms", "powers", "steps", "seen")
COMPILE = """
import json, types as python_types
import numpy as np
import numba.cuda.dispatcher as numba_dispatcher
from numba import cuda, types
from fastattn.cuda.kernels.functions import byte_at, calling
from fastattn.functions.function import described

numba_dispatcher.get_current_device = lambda: python_types.SimpleNamespace(compute_capability=(8, 0))

def score_kernel(call):
    def kernel(scores, places, values, others, captured):
        i = cuda.blockIdx.x
        given = (scores[i], places[i, 0], places[i, 1], places[i, 2], places[i, 3])
        values[i, 0], values[i, 1], others[i] = call(given, captured, 1)
    return kernel

def seen_kernel(call):
    def kernel(scores, places, values, others, captured):
        i = cuda.blockIdx.x
        values[i, 0], others[i] = call((places[i, 0], places[i, 1], places[i, 2], places[i, 3]), captured, 1)
    return kernel

def element_kernel(call):
    def kernel(scores, places, values, others, captured):
        i = cuda.blockIdx.x
        given = (scores[i], places[i, 0], places[i, 1], places[i, 2], places[i, 3])
        values[i, 0], values[i, 1], element, times, inside = call(given, captured, 1)
        others[i] = 100 * element + 10 * times + inside
    return kernel

def byte_kernel(scores, places, values, others, captured):
    others[cuda.blockIdx.x] = byte_at(captured[0] + cuda.blockIdx.x)

words = types.int64
made = {}
def compiled(kernel):
    arrays = [(types.float32, 1), (words, 2), (types.float32, 2), (words, 1), (words, 1)]
    arguments = tuple(types.Array(kind, rank, "C") for kind, rank in arrays)
    text, _ = cuda.compile(kernel, arguments, device=False, abi="numba", cc=(8, 0), output="ptx")
    return text if isinstance(text, str) else text.decode()

for name in NAMES:
    is_score = name != "seen"
    function, _ = described("score_mod" if is_score else "mask_mod", globals()[name])
    kernel = (score_kernel if is_score else seen_kernel)(calling(function, np.float32, is_score))
    made[name] = compiled(kernel)
for name, by in ELEMENTS:
    function, _ = described("score_mod", globals()[name])
    made[f"{name} by {by}"] = compiled(element_kernel(calling(function, np.float32, by=(by, 0))))
made["bytes"] = compiled(byte_kernel)
print(json.dumps(made))
"""


@cache
def texts() -> dict[str, str]:
    """The PTX of a kernel for each function, which it calls for the score of its block."""
    made: dict[str, str] = json.loads(
        processes.run(
            f"{FUNCTIONS}\nNAMES, ELEMENTS = {NAMES!r}, {ELEMENTS!r}\n{COMPILE}",
            timeout=300,
            NUMBA_ENABLE_CUDASIM="0",
        )
    )
    return made


@cache
def functions() -> dict[str, Callable[..., Any]]:
    """The functions themselves."""
    around: dict[str, Any] = {}
    exec(FUNCTIONS, around)
    return {name: around[name] for name in (*NAMES, *(name for name, _ in ELEMENTS))}


def run(name: str, scores: Any, places: Any, by: int | None = None) -> tuple[Any, Any]:
    """Run the kernel of a function: what it returns, and whether indices were in range, or what of elements is said."""
    function, captured = described("mask_mod" if name == "seen" else "score_mod", functions()[name])
    captured = tuple(each.copy() if isinstance(each, np.ndarray) else each for each in captured)  # without gaps
    arrays = [each for each in captured if isinstance(each, np.ndarray)]
    count = len(scores)
    values, others, words = np.zeros((count, 2), np.float32), np.zeros(count, np.int64), np.zeros(100, np.int64)
    given = [scores, places, values, others, words]
    memory = ptx_machine.Memory(*given, *arrays)
    where = {id(array): memory.address(len(given) + number) for number, array in enumerate(arrays)}
    record = record_of(function, captured, lambda array: where[id(array)])
    memory.array(4, words)[1 : 1 + len(record)] = record
    parameters: list[Any] = []
    for number, array in enumerate(given):
        parameters += [0, 0, array.size, array.itemsize, memory.address(number), *array.shape, *array.strides]
    ptx_machine.launch(texts()[name if by is None else f"{name} by {by}"], count, 1, memory, parameters)
    return memory.array(2, values), memory.array(3, others)


def cases() -> tuple[Any, Any]:
    """Scores, and batch, head, query and key of each."""
    rng = np.random.default_rng(5)
    places = np.stack(np.broadcast_arrays(1, [[0], [2], [1]], [[3, 0, 1, 4, 2]], [[1, 4, 1, 0, 3]]), -1).reshape(-1, 4)
    return rng.normal(scale=2, size=len(places)).astype(np.float32), places.astype(np.int64)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_ptx_computes_what_python_does(name: str) -> None:
    """Values, and slopes: differences in float64."""
    scores, places = cases()
    found, inside = run(name, scores, places)
    function = functions()[name]
    wide = [np.float64(score) for score in scores]
    wanted = [function(score, *map(int, place)) for score, place in zip(wide, places, strict=True)]
    ends = [
        [function(score + step, *map(int, place)) for score, place in zip(wide, places, strict=True)]
        for step in (1e-6, -1e-6)
    ]
    assert inside.all()
    np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[:, 1], np.subtract(*ends) / 2e-6, rtol=1e-4, atol=1e-4)


def test_ptx_says_what_is_seen() -> None:
    scores, places = cases()
    found, inside = run("seen", scores, places)
    assert inside.all()
    assert found[:, 0].tolist() == [functions()["seen"](*map(int, place)) for place in places]


def test_ptx_knows_the_ends_of_arrays() -> None:
    """Key 5 is behind the halves, query 9 behind the table; -8 is its first column, and -9 before it."""
    scores = np.zeros(5, np.float32)
    places = np.array([[0, 2, 0, 4], [0, 2, 0, 5], [0, 2, 9, 0], [0, 0, -4, 4], [0, 0, -5, 4]], np.int64)
    found, inside = run("indices", scores, places)
    assert inside.tolist() == [1, 0, 0, 1, 0]
    assert found[3, 0] == -2 * 2 + 0  # numbers[-5] is 0


def test_ptx_differentiates_by_elements() -> None:
    """With which element was read, in an array without gaps, and how often: not at all on another way."""
    scores, places = cases()
    table, halves = (functions()["indices"].__globals__[name] for name in ("table", "halves"))
    _, head, query, key = places.T
    elements = head * 8 + (query - key) % 8
    value, said = run("indices", scores, places, by=0)
    np.testing.assert_array_equal(value[:, 1], halves[key].astype(np.float32))
    np.testing.assert_array_equal(said, 100 * elements + 11)
    value, said = run("indices", scores, places, by=1)
    np.testing.assert_array_equal(value[:, 1], table.reshape(-1)[elements])
    np.testing.assert_array_equal(said, 100 * key + 11)
    value, said = run("branches_of_array", scores, places, by=0)
    np.testing.assert_array_equal(value[:, 0], np.where(query > key, scores * table[head, key], scores))
    np.testing.assert_array_equal(value[:, 1], np.where(query > key, scores, 0))
    assert set(said[query <= key] % 100) == {1}
    np.testing.assert_array_equal(said[query > key], (100 * (head * 8 + key) + 11)[query > key])


def test_ptx_reads_bytes() -> None:
    kinds, numbers = np.array([0, 255, 1, 2, 128], np.uint8), np.zeros(5, np.int64)
    given = [np.zeros(1, np.float32), np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32), numbers]
    words = np.zeros(1, np.int64)
    memory = ptx_machine.Memory(*given, words, kinds)
    memory.array(4, words)[0] = memory.address(5)
    parameters: list[Any] = []
    for number, array in enumerate((*given, words)):
        parameters += [0, 0, array.size, array.itemsize, memory.address(number), *array.shape, *array.strides]
    ptx_machine.launch(texts()["bytes"], len(kinds), 1, memory, parameters)
    np.testing.assert_array_equal(memory.array(3, numbers), kinds)
