"""The reference against something simpler still: the formula one number at a time, known answers, and PyTorch."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, calls

from fastattn import reference
from fastattn.call import problem
from fastattn.call.arrays import as_operands
from fastattn.call.halves import cast
from fastattn.call.problem import Problem
from fastattn.call.shapes import describe


def intervals(call: Call, problem: Problem) -> tuple[float, float, Any, Any]:
    """Return how far a query sees to either side, and for each row of the batch an offset and a number of keys."""
    options = call.options
    reaches = options.get("window", (None, None))
    left, right = (math.inf if reach is None else reach for reach in reaches)
    numbers = np.broadcast_to(options.get("key_lengths", problem.keys), problem.batch)
    offsets = np.broadcast_to(np.asarray(options.get("query_offset", 0), object), problem.batch)
    if options["is_causal"]:
        right = 0
    if options["is_causal"] == "bottom-right":
        offsets = numbers - problem.queries
    return left, right, offsets, numbers


def one_by_one(call: Call) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Evaluate a call without dropout with Python's numbers, one query, one key and one feature at a time."""
    problem, operands = describe(*as_operands(*call.args), **call.options)
    rows = problem.rows_shape
    out = np.zeros((*rows, problem.queries, problem.value_dim))
    lse = np.zeros((*rows, problem.queries))
    weights = np.zeros((*rows, problem.queries, problem.keys))
    softcap, slopes = call.options.get("softcap"), call.options.get("alibi_slopes", 0.0)
    slopes = np.broadcast_to(np.float64(slopes), (*problem.batch, problem.heads)).reshape(rows)
    sinks = np.broadcast_to(np.float64(call.options.get("sinks", -np.inf)), (*problem.batch, problem.heads))
    sinks = sinks.reshape(rows)
    left, right, offsets, numbers = intervals(call, problem)
    limit = float(np.finfo(problem.real).max)
    for index in np.ndindex(*rows, problem.queries):
        position, number = index[-1] + int(offsets[index[:-3]]), int(numbers[index[:-3]])
        q, k, v = operands.query[index], operands.key[index[:-1]], operands.value[index[:-1]]
        looked_at, scores = [], []
        for j in range(problem.keys):
            score = problem.scores.scale * math.fsum(float(a) * float(b) for a, b in zip(q, k[j], strict=True))
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            if operands.bias is not None:
                bias = operands.bias[(*index, j)]
                score += float(bias) if math.isinf(bias) else min(max(float(bias), -limit), limit)
            score -= min(max(float(slopes[index[:-1]]) * abs(position - j), -limit), limit)
            if operands.keep is not None and not operands.keep[(*index, j)]:
                score = -math.inf
            if not position - left <= j <= position + right or j >= number:
                score = -math.inf
            if score > -math.inf:
                looked_at.append(j)
                scores.append(score)
        sink = float(sinks[index[:-1]])
        sink = sink if math.isinf(sink) else float(problem.real.type(min(max(sink, -limit), limit)))
        if not looked_at:
            lse[index] = sink
            continue
        highest = max(*scores, sink)
        total = math.fsum(math.exp(score - highest) for score in (*scores, sink))
        lse[index] = highest + math.log(total)
        for j, score in zip(looked_at, scores, strict=True):
            weights[(*index, j)] = math.exp(score - highest) / total
        for c in range(problem.value_dim):
            out[(*index, c)] = math.fsum(weights[(*index, j)] * float(v[j, c]) for j in looked_at)
    return (
        cast(out.reshape(problem.out_shape), problem.storage),
        lse.reshape(problem.lse_shape).astype(problem.real),
        cast(weights.reshape(problem.weights_shape), problem.storage),
    )


SMALL = 6_000


@given(st.one_of(calls(), calls(empty=True)))
def test_one_number_at_a_time(call: Call) -> None:
    problem = describe(*as_operands(*call.args), **call.options)[0]
    if math.prod((*problem.rows_shape, problem.queries, problem.keys)) > SMALL:
        return
    wanted = tolerances.expected(*call.args, **call.options)
    tolerances.check_all(one_by_one(call), wanted)
    results = reference.attention(*call.args, **call.options, return_lse=True, return_weights=True)
    tolerances.check_all(results, wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_computes_in_a_wider_type(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 9, 33)).astype(dtype) for _ in range(3))
    out = reference.attention(query, key, value)
    wide = reference.attention(query.astype(np.float64), key.astype(np.float64), value.astype(np.float64))
    assert out.dtype == dtype
    # the nearest number of the type, nothing else
    np.testing.assert_array_equal(out, wide.astype(dtype))


def imports(file: str) -> set[str | None]:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return found | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_it_imports_nothing_but_numpy_and_the_checks_of_arguments() -> None:
    plain = {"__future__", "typing", "typing_extensions", "numpy", "numpy.typing"}
    plain |= {"builtins", "collections.abc", "math", "types"}  # what a Python function is made of
    described = {"fastattn.functions.function", "fastattn.functions.masks"}  # functions in words: nothing is compiled
    for module in described:
        below = {name for name in imports(sys.modules[module].__file__ or "") if name and name.startswith("fastattn")}
        assert below <= {"fastattn.functions", "fastattn.machine.digest", "fastattn.machine.objects"}, module
    parts = {f"fastattn.reference.{name}" for name in ("forward", "backward", "captured", "dropout", "functions")}
    for module in parts:
        own = imports(sys.modules[module].__file__ or "") - plain - parts - described
        assert all(name and name.startswith("fastattn.call.") for name in own), module
    for file in Path(problem.__file__).parent.glob("*.py"):
        needs = {name for name in imports(str(file)) if name and name.startswith("fastattn")}
        needs -= described | ({"fastattn.machine.objects"} if file.name in ("advice.py", "out.py") else set())
        assert all(name.startswith("fastattn.call.") for name in needs), file.name


# -- the tolerances ----------------------------------------------------------------------------------------------------


def plain(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute softmax(query keyᵀ / √D) value in the type of the arrays, as anyone would."""
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.dtype.type(query.shape[-1]))
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    weights /= total
    return weights @ value, (highest + np.log(total))[..., 0], weights


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 3), (2, 50, 64), (300, 20)])
def test_the_tolerances_let_plain_arithmetic_pass(dtype: Any, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    tolerances.check_all(plain(query, key, value), tolerances.expected(query, key, value))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_tolerances_bite(dtype: Any, which: int) -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((20, 8)).astype(dtype) for _ in range(3))
    wanted = tolerances.expected(query, key, value)
    for wrong in (200 * np.finfo(dtype).eps, np.nan, np.inf):
        results = list(plain(query, key, value))
        results[which][7, ...] += wrong
        with pytest.raises(AssertionError, match=r"of .* elements are wrong"):
            tolerances.check_all((results[0], results[1], results[2]), wanted)
    results = list(plain(query, key, value))
    results[which] = results[which].astype(np.float16)
    with pytest.raises(AssertionError, match="dtype float16"):
        tolerances.check_all((results[0], results[1], results[2]), wanted)


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: Any, key: tuple[int, int], words: str) -> None:
    assert " ".join(f"{int(word):08x}" for word in reference.philox(counter, key)) == words


def test_counters_broadcast_and_wrap() -> None:
    many = reference.philox((np.arange(6), np.arange(3)[:, None], 2**32 + 5, -1), (1, 2))
    assert many.shape == (3, 6, 4)
    np.testing.assert_array_equal(many[2, 4], reference.philox((4, 2, 5, 2**32 - 1), (1, 2)))


def test_keep_mask_is_as_documented() -> None:
    seed, p = 0x123456789ABCDEF0, 0.3
    kept = reference.keep_mask(seed, 2, 3, 5, 11, p)
    assert kept.shape == (5, 11)
    for i in range(5):
        for j in range(11):
            word = reference.philox((j // 4, i, 3, 2), (0x9ABCDEF0, 0x12345678))[j % 4]
            assert kept[i, j] == (int(word) >= round(p * 2**32))


def test_keep_mask_broadcasts() -> None:
    many = reference.keep_mask(1, np.arange(2)[:, None], np.arange(3), 4, 5, 0.5)
    assert many.shape == (2, 3, 4, 5)
    np.testing.assert_array_equal(many[1, 2], reference.keep_mask(1, 1, 2, 4, 5, 0.5))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_mask_drops_as_many_as_it_should(p: float) -> None:
    kept = reference.keep_mask(7, 0, 0, 400, 500, p)
    deviation = math.sqrt(p * (1 - p) / kept.size)
    assert abs(kept.mean() - (1 - p)) < 5 * deviation
    # and rows, columns and neighbours have nothing to do with each other
    assert np.abs(kept.mean(axis=0) - (1 - p)).max() < 6 * math.sqrt(p * (1 - p) / 400)
    assert np.abs(kept.mean(axis=1) - (1 - p)).max() < 6 * math.sqrt(p * (1 - p) / 500)
    together = (kept[:, 1:] & kept[:, :-1]).mean()
    assert abs(together - (1 - p) ** 2) < 6 * deviation


def test_keep_mask_at_the_ends() -> None:
    assert reference.keep_mask(7, 0, 0, 50, 50, 0.0).all()
    assert not reference.keep_mask(7, 0, 0, 50, 50, 1.0).any()
    assert reference.keep_mask(7, 0, 0, 0, 5, 0.5).shape == (0, 5)
    assert reference.keep_mask(7, 0, 0, 5, 0, 0.5).shape == (5, 0)
