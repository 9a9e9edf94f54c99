"""What cannot be compiled is refused, with the line of the user's function; nothing is changed or half understood."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest

import fastattn

QUERY, KEY = np.zeros((3, 2, 5, 4), np.float32), np.zeros((3, 2, 6, 4), np.float32)
HEAD = "def function(score, batch, head, query, key):\n    "
table, names, text = np.arange(12.0).reshape(3, 4), {1: 2.0}, "causal"


class Thing:
    """What is no number."""

    factor = 2.0

    def __call__(self, score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score

    def method(self, score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score


thing, with_bound = Thing(), functools.partial(np.clip, a_min=0.0)


def helped(x: Any, y: Any = 1) -> Any:
    """Have one argument that need not be given."""
    return x * y


def refused(function: Any, error: type[Exception] = TypeError, role: str = "score_mod") -> str:
    """Return what is said when a function is refused."""
    before = table.tobytes()
    with pytest.raises(error, match=f"^{role}: ") as caught:
        fastattn.attention(QUERY, KEY, KEY, **{role: function})
    assert table.tobytes() == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "line", "what"),
    [
        ("return np.linalg.norm(score)", 2, "the module numpy.linalg"),
        ("return np.random.power(score)", 2, "the module numpy.random"),
        ("print(score)\n    return score", 2, "print"),
        ("return score + 'x'", 2, "str"),
        ("return f'{score}'", 2, "format|str"),
        ("return score + 1j", 2, "complex"),
        ("return score + 10**30 * key", 2, "64 bits"),
        ("x = [score, 1.0]\n    return x[0]", 2, "a list"),
        ("x = {1: score}\n    return x[1]", 2, "dictionary"),
        ("return {score, 1}", 2, "set"),
        ("return sum(x for x in (1, 2))", 2, "sum"),
        ("return (lambda x: x)(score)", 2, "made inside"),
        ("def inner(x):\n        return x\n    return inner(score)", 2, "made inside"),
        ("x = 1\n    table[0, 0] = 1.0\n    return score", 3, "an assignment to an element"),
        ("table[0, 0] += 1.0\n    return score", 2, "an assignment to an element"),
        ("thing.factor = 1.0\n    return score", 2, "an assignment to an attribute"),
        ("return score * thing.factor", 2, "thing"),
        ("return thing(score, 0, 0, 0, 0)", 2, "thing"),
        ("return with_bound(score)", 2, "with_bound"),
        ("raise ValueError", 2, "raise"),
        ("if key > 3:\n        raise IndexError\n    return score", 3, "raise"),
        ("assert key < 3\n    return score", 2, "raise, or assert,"),
        ("global changed\n    changed = 1\n    return score", 1, "STORE_GLOBAL"),
        ("with thing:\n        return score", 2, "with"),
        ("import math\n    return math.exp(score)", 1, "IMPORT_NAME"),
        ("return helped(score)", 2, "helped cannot be called with 1"),
        ("return helped(x=score, y=1)", 2, "by keyword"),
        ("return helped(*(score, 1))", 2, "by \\*"),
        ("if query > 3:\n        x = 1.0\n    return score + x", 4, "x may have no value"),
        ("if query > 3:\n        return score", 1, "returns nothing"),
        ("return score, 1", 1, "a tuple"),
        ("return table", 1, "a captured array"),
        ("return table[0:2]", 2, "slice"),
        ("return table[head]", 1, "a captured array"),
        ("return table[score, key]", 2, "float"),
        ("return table[query > key, key]", 2, "bool"),
        ("return table[head, query, key]", 2, "array of float64 with 2 axes"),
        ("return table.sum()", 2, r"\.sum"),
        ("return (query - key).cumsum()", 2, r"\.cumsum"),
        ("return table + score", 2, "array of float64"),
        ("return score if text == 'causal' else 0.0", 2, "text"),
        ("return score if head in (1, 2) else 0.0", 2, "contains"),
        ("return score if table is None else 0.0", 2, "is_"),
        ("return score + ((query > key) + (query > 3))", 2, "bool, bool"),
        ("return score - (query > key) - (-(query > 3))", 2, "bool"),
        ("return np.max(score, 0)", 2, "numpy.max"),
        ("return np.float16(score)", 2, "float16"),
        ("total = 0\n    for x in range(0, query, head):\n        total += x\n    return total", 3, "a range"),
        ("total = 0\n    for x in table:\n        total += 1\n    return total", 3, "array of float64"),
        ("return np.clip(score, minimum=1.0)", 2, "minimum"),
        ("return np.where(query > key, score)", 2, ""),
        ("return ~score", 2, "float32"),
        ("return score | 1", 2, "float32"),
        ("return table @ table", 2, "matmul"),
    ],
)
def test_what_cannot_be_compiled_names_the_line(body: str, line: int, what: str) -> None:
    around = dict(globals())
    exec(HEAD + body, around)
    said = refused(around["function"])
    assert re.match(f"score_mod: function, line {line} of <string>", said), said
    assert re.search(what, said), said


def test_the_text_of_the_line_is_there_if_the_source_is() -> None:
    def function(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        x = score + 1
        return np.linalg.norm(x)

    said = refused(function)
    assert "test_refusals.py" in said
    assert "'return np.linalg.norm(x)'" in said
    assert f"line {function.__code__.co_firstlineno + 2} " in said


def test_a_fault_in_a_function_that_is_called_names_its_line() -> None:
    def inner(x: Any) -> Any:
        return np.cumsum(x)

    said = refused(lambda score, batch, head, query, key: inner(score))
    assert f"line {inner.__code__.co_firstlineno + 1} " in said
    assert "np.cumsum(x)" in said


def _calls_itself(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return _calls_itself(score, batch, head, query, key)


def _reads_what_is_not_there(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score + not_there  # type: ignore[name-defined]  # noqa: F821


async def _later(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score


def _yields(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    yield score


@pytest.mark.parametrize(
    "function",
    [
        *(1, "x", thing, thing.method, functools.partial(helped, 1), np.exp, print, Thing),
        *(_calls_itself, _reads_what_is_not_there, _later, _yields),
        lambda score, batch, head, query: score,
        lambda score, batch, head, query, key, more=1: score,
        lambda *arguments: arguments[0],
        lambda score, batch, head, query, key, **options: score,
        lambda score, batch, head, query, key, *, more=1: score,
        lambda score, batch, head, query, key: score * names[1],
        lambda score, batch, head, query, key: re.escape(score),  # a module of another kind
    ],
)
def test_what_is_no_function_of_scores(function: Any) -> None:
    refused(function)


def test_what_is_captured_is_numbers_of_64_bits() -> None:
    for captured, error in (
        (2**70, ValueError),
        (np.array([2**63], np.uint64), ValueError),
        (np.array([1j]), TypeError),
        (np.array(["x"]), TypeError),
        (np.ma.masked_array([1.0, 2.0], [True, False]), TypeError),
        (np.longdouble([1, 2]), TypeError),
        (object(), TypeError),
    ):
        assert "captures captured" in refused(lambda s, b, h, q, k: captured, error)  # noqa: B023


def test_a_variable_around_it_that_has_no_value_yet() -> None:
    def function(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score * later

    assert "later, which has no value yet" in refused(function)
    later = 1.0


def test_what_stands_around_a_function_is_not_assigned() -> None:
    count = 0

    def function(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        nonlocal count
        count = count + 1
        return score * count

    assert "an assignment to count" in refused(function)
    assert count == 0


def test_mask_mod_is_named_and_has_four_arguments() -> None:
    refused(lambda score, batch, head, query, key: True, role="mask_mod")
    said = refused(lambda batch, head, query, key: "x", role="mask_mod")
    assert "mask_mod" in said
