"""What Hypothesis writes: the source of a user's function, of numbers of all kinds, captured arrays and branches.

Functions of one draw belong together: one of many branches, by `head`, so that a single compilation tries them all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

__all__ = ["AROUND", "made", "sources"]


def _tables() -> dict[str, Any]:
    """Captured arrays of all dtypes, and numbers."""
    rng = np.random.default_rng(7)
    whole = {
        f"t_{np.dtype(dtype).name}": rng.integers(0 if np.dtype(dtype).kind == "u" else -99, 99, (5, 7)).astype(dtype)
        for dtype in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)
    }
    floating = {
        f"t_{np.dtype(dtype).name}": rng.standard_normal((5, 7)).astype(dtype)
        for dtype in (np.float16, np.float32, np.float64)
    }
    odd = {
        "backwards": np.arange(35.0)[::-1].reshape(5, 7),
        "columns": rng.standard_normal((7, 5)).T,
        "strided": np.arange(140).reshape(10, 14)[::2, ::-2],
        "repeated": np.broadcast_to(np.float32(0.75), (5, 7)),
    }
    return {**whole, **floating, **odd, "t_bool": rng.random((5, 7)) < 0.5, "scalar": np.array(2.5)}


AROUND = {
    **_tables(),
    "np": np,
    "math": math,
    "count": 6,
    "least": -3,
    "zero": 0,
    "long": 2**40 + 3,
    "half": 0.5,
    "far": 1e30,
    "nothing": float("nan"),
    "endless": float("inf"),
    "flag": True,
}
WHOLE = [name for name in AROUND if name.startswith(("t_i", "t_u"))] + ["strided"]
FLOATING = ["t_float16", "t_float32", "t_float64", "backwards", "columns", "repeated"]


def _of(*templates: str) -> Any:
    return st.sampled_from(templates)


#: Expressions of whole numbers, floating ones and booleans: the smallest ones, and those that are made of others.
LEAVES = {
    "w": ("batch", "head", "query", "key", "1", "2", "-3", "7", "count", "least", "zero", "long", "len(columns)"),
    "f": ("score", "score", "score", "0.5", "-1.25", "3.0", "half", "far", "nothing", "endless", "0.0", "np.pi"),
    "b": ("(query >= key)", "flag", "True", "(score > 0)", "(head == 1)"),
}
SHAPES = {
    "w": (
        *("({w} + {w})", "({w} - {w})", "({w} * {w})", "({w} // {w})", "({w} % {w})", "({w} & {w})", "({w} | {w})"),
        *("({w} ^ {w})", "({w} << ({w} % 8))", "({w} >> ({w} % 8))", "(-{w})", "(~{w})", "abs({w})", "({w} ** 2)"),
        *(
            "min({w}, {w})",
            "max({w}, {w}, {w})",
            "np.maximum({w}, {w})",
            "int({f})",
            "math.floor({f})",
            "round({f})",
        ),
        *(
            "math.ceil({f})",
            "np.sign({w})",
            "({w} if {b} else {w})",
            "np.where({b}, {w}, {w})",
            "int({b})",
            "helped({w})",
        ),
        *(
            "np.clip({w}, -2, {w})",
            "{I}",
            "{I}",
            "({w} & {b})",
            "np.abs({w})",
            "columns.shape[1]",
            "np.where({b}, {w}, 3)",
        ),
        *("np.square({w})", "np.int32({w})", "({w}, {w})[1]", "(+{w})"),
    ),
    "f": (
        *("({f} + {f})", "({f} - {f})", "({f} * {f})", "({f} / {f})", "({f} // {f})", "({f} % {f})", "({f} + {w})"),
        *("({f} * {w})", "({w} - {f})", "({w} / {w})", "({f} / {w})", "({w} // {f})", "({f} % {w})", "(-{f})"),
        *(
            "abs({f})",
            "np.abs({f})",
            "min({f}, {f})",
            "max({f}, {w}, {f})",
            "np.minimum({f}, {f})",
            "np.fmax({f}, {f})",
        ),
        *("np.exp({f})", "np.exp2({f})", "np.expm1({f})", "np.tanh({f})", "np.sqrt({f})", "np.square({f})"),
        *("np.log({f})", "np.log2({f})", "np.log10({f})", "np.log1p({f})", "math.sin({f})", "np.cos({f})"),
        *("np.floor({f})", "np.ceil({f})", "np.trunc({f})", "np.rint({f})", "np.sign({f})", "np.reciprocal({f})"),
        *("({f} if {b} else {f})", "({f} if {b} else {w})", "np.where({b}, {f}, {f})", "np.clip({f}, -1.5, {f})"),
        *(
            "({f} ** 2)",
            "({f} ** 3.0)",
            "({f} ** {f})",
            "(2 ** (-{w} % 9))",
            "(abs({w}) ** 0.5)",
            "float({w})",
            "{F}",
            "{F}",
        ),
        *(
            "({f} * {b})",
            "({f} + {b})",
            "np.where({b}, {f}, {w})",
            "helped({f})",
            "np.power({f}, 2)",
            "(2.0 ** {w})",
        ),
        *("({f} * scalar)",),
    ),
    "b": (
        *(
            "({w} < {w})",
            "({w} <= {w})",
            "({w} == {w})",
            "({w} != {w})",
            "({f} < {f})",
            "({f} >= {f})",
            "({f} == {f})",
        ),
        *("({f} != {f})", "({w} < {f})", "({f} > {w})", "({w} < {w} <= {w})", "({b} and {b})", "({b} or {b})"),
        *("(not {b})", "({b} & {b})", "({b} | {b})", "({b} ^ {b})", "(~(query > {w}))", "bool({w})", "bool({f})"),
        *("np.logical_and({w}, {b})", "np.logical_or({f}, {b})", "np.logical_not({b})", "({b} * {b})", "(not {w})"),
        *("({b} if {b} else {b})", "({b} == {b})", "({w} and {b})", "{B}"),
    ),
}


class _Writer:
    """Draws expressions of three kinds: "w"hole numbers, "f"loating ones and "b"ooleans."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def index(self, whole: str) -> str:
        """Draw an index of an axis of so many elements: in range mostly."""
        return self.draw(_of("{w} % {n}", "{w} % {n}", "-1 - {w} % {n}", "{w}")).replace("{w}", whole)

    def item(self, names: list[str], depth: int) -> str:
        """Draw an element of an array."""
        first = self.index(self.written("w", depth - 1)).replace("{n}", "5")
        second = self.index(self.written("w", depth - 1)).replace("{n}", "7")
        return self.draw(st.sampled_from(names)) + self.draw(_of("[{0}, {1}]", "[{0}][{1}]")).format(first, second)

    def written(self, kind: str, depth: int) -> str:
        """Draw an expression."""
        if depth <= 0 or not self.draw(st.integers(0, 3)):
            return str(self.draw(st.sampled_from(LEAVES[kind])))
        text = self.draw(st.sampled_from(SHAPES[kind]))
        for names, mark in ((WHOLE, "{I}"), (FLOATING, "{F}"), (["t_bool"], "{B}")):
            if text == mark:
                return self.item(names, depth)
        while "{" in text:
            place = text.index("{")
            text = text[:place] + self.written(text[place + 1], depth - 1) + text[place + 3 :]
        return str(text)

    def body(self, margin: str) -> list[str]:
        """Draw the statements of one branch."""
        lines = []
        if self.draw(st.booleans()):
            kind = self.draw(st.sampled_from("wf"))
            lines += [f"x = {self.written(kind, 2)}"]
            if self.draw(st.booleans()):
                lines += [f"if {self.written('b', 2)}:", f"    x = {self.written(kind, 2)}"]
            if self.draw(st.booleans()):
                loop = f"for r in range({self.draw(_of('3', 'query % 4', '1, count', '4, 0, -1'))}):"
                lines += [loop, f"    x += r * {self.written(kind, 1)}"]
            lines += [f"return x + {self.written('f', 2)}"]
        else:
            lines += [f"return {self.written(self.draw(_of('w', 'f', 'f', 'f', 'b')), 4)}"]
        return [margin + line for line in lines]


@st.composite
def sources(draw: st.DrawFn, branches: int = 6) -> str:
    """Draw the source of a function of scores."""
    writer = _Writer(draw)
    lines = ["def helped(x):", "    return x if x > 1 else -x", "def function(score, batch, head, query, key):"]
    for branch in range(branches):
        lines += [f"    if head == {branch}:", *writer.body("        ")]
    return "\n".join([*lines, "    return score", ""])


def made(source: str) -> Any:
    """Return the function of a source."""
    around = dict(AROUND)
    exec(source, around)
    return around["function"]
