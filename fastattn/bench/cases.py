"""What is measured: the calls of the benchmark table, and the inputs they get."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastattn.call.halves import BITS, cast

__all__ = ["CASES", "GROUPS", "QUICK", "Arguments", "Case", "select"]

Pace = Literal["steady", "tight", "paced"]


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of attention, as NumPy arrays."""

    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    mask: NDArray[Any] | None
    causal: bool
    grad_out: NDArray[Any] | None = None  # of a backward pass


@dataclass(frozen=True)
class Case:
    """One row of the table: a call, and how often it is made.

    Parameters
    ----------
    group : str
        The question that the row belongs to, one of `GROUPS`.
    batch, heads, length, size : int
        Query, key and value all have the shape (batch, heads, length, size).
    dtype : str
        "bfloat16", "float16", "float32" or "float64".
    causal : bool
        Whether query i looks at the keys up to i only.
    mask : str
        "" for none, "float" for one number per head, query and key, "bool" for one truth value per query and key,
        "padding" for one per key.
    pace : str
        "steady": calls back to back, timed one by one. "tight": a loop of many calls, timed as a whole. "paced": a call
        every 20 ms, as in a program that does other things in between; only the call is timed.
    backward : bool
        Whether the call is that of the gradients of query, key and value, the forward pass having been made.

    Examples
    --------
    >>> from fastattn.bench.cases import Case
    >>> case = Case("float32 causal", 1, 8, 512, 64, causal=True)
    >>> case.name, case.flops
    ('float32 causal (1,8,512,64)', 268435456)
    """

    group: str
    batch: int
    heads: int
    length: int
    size: int
    dtype: str = "float32"
    causal: bool = False
    mask: Literal["", "float", "bool", "padding"] = ""
    pace: Pace = "steady"
    backward: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of query, key and value."""
        return self.batch, self.heads, self.length, self.size

    @property
    def name(self) -> str:
        """What tables and ``--case`` call it."""
        return f"{self.group} ({','.join(map(str, self.shape))})"

    @property
    def flops(self) -> int:
        """Operations of the two products, or five of a backward pass, half of them where causal: what GF/s counts."""
        whole = (10 if self.backward else 4) * self.batch * self.heads * self.length * self.length * self.size
        return whole // 2 if self.causal else whole

    @property
    def unit(self) -> str:
        """What the table shows: a rate, or for short calls the time."""
        return "GF/s" if self.pace == "steady" else "µs"

    def figure(self, seconds: float) -> float:
        """Return what the table shows, in its `unit`, of a call that takes so long."""
        return self.flops / seconds / 1e9 if self.unit == "GF/s" else seconds * 1e6

    @cached_property
    def arguments(self) -> Arguments:
        """Random inputs, the same ones every time."""
        random = np.random.default_rng(list(self.shape))
        dtype = BITS if self.dtype == "bfloat16" else np.dtype(self.dtype)
        query, key, value = (cast(random.standard_normal(self.shape), dtype) for _ in range(3))
        mask: NDArray[Any] | None = None
        if self.mask == "float":
            mask = cast(random.standard_normal((1, self.heads, self.length, self.length)), dtype)
        elif self.mask == "bool":
            mask = random.random((1, 1, self.length, self.length)) < 0.8
            mask[..., 0] = True  # no row is empty: there, the peers do not agree on the result
        elif self.mask == "padding":
            mask = np.tile(np.arange(self.length) < self.length * 3 // 4, (self.batch, 1, 1, 1))
        grad_out = cast(random.standard_normal(self.shape), dtype) if self.backward else None
        return Arguments(query, key, value, mask, self.causal, grad_out)


_FLOAT32 = ((1, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 2048, 128), (1, 2, 8192, 64), (16, 12, 128, 64))
_FLOAT64 = ((1, 8, 1024, 64), (1, 4, 2048, 128))
_BACKWARD = ((1, 8, 2048, 64), (1, 8, 2048, 128))
_BACKWARD_64 = ((1, 8, 1024, 64),)
_HALF = ((1, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 2048, 128))
_BFLOAT16 = (*_HALF, (16, 12, 128, 64))
_MASKED = (1, 8, 2048, 64)
_TINY = ((1, 4, 8, 32), (1, 1, 16, 64), (1, 8, 64, 64), (2, 4, 128, 32))
_TINY_BFLOAT16 = ((1, 8, 64, 64), (2, 4, 128, 32))
_PACED = ((1, 8, 64, 64), (1, 8, 256, 64), (1, 12, 512, 64))

CASES: tuple[Case, ...] = (
    *(Case("float32", *shape) for shape in _FLOAT32),
    *(Case("float32 causal", *shape, causal=True) for shape in _FLOAT32),
    *(Case("float64", *shape, dtype="float64") for shape in _FLOAT64),
    *(Case("float64 causal", *shape, dtype="float64", causal=True) for shape in _FLOAT64),
    *(Case("bfloat16", *shape, dtype="bfloat16") for shape in _BFLOAT16),
    *(Case("bfloat16 causal", *shape, dtype="bfloat16", causal=True) for shape in _BFLOAT16),
    *(Case("float16", *shape, dtype="float16") for shape in _HALF),
    *(Case("float16 causal", *shape, dtype="float16", causal=True) for shape in _HALF),
    Case("float mask per head", *_MASKED, mask="float"),
    Case("boolean mask", *_MASKED, mask="bool"),
    Case("key padding", *_MASKED, mask="padding"),
    *(Case("tiny, in a loop", *shape, pace="tight") for shape in _TINY),
    *(Case("tiny bfloat16, in a loop", *shape, dtype="bfloat16", pace="tight") for shape in _TINY_BFLOAT16),
    *(Case("every 20 ms", *shape, pace="paced") for shape in _PACED),
    *(Case("backward", *shape, backward=True) for shape in _BACKWARD),
    *(Case("backward causal", *shape, causal=True, backward=True) for shape in _BACKWARD),
    *(Case("backward bfloat16", *shape, dtype="bfloat16", backward=True) for shape in _BACKWARD),
    *(Case("backward bfloat16 causal", *shape, dtype="bfloat16", causal=True, backward=True) for shape in _BACKWARD),
    *(Case("backward 64-bit", *shape, dtype="float64", backward=True) for shape in _BACKWARD_64),
    *(Case("backward 64-bit causal", *shape, dtype="float64", causal=True, backward=True) for shape in _BACKWARD_64),
)
"""The whole table."""

GROUPS: tuple[str, ...] = tuple(dict.fromkeys(case.group for case in CASES))
"""The questions that the table answers, in its order."""

QUICK: tuple[Case, ...] = tuple(next(case for case in CASES if case.group == group) for group in GROUPS)
"""One case of each group."""


def select(words: list[str], cases: tuple[Case, ...] = CASES) -> tuple[Case, ...]:
    """Return the cases whose name contains one of the words, all of them if there are no words.

    Raises
    ------
    ValueError
        If a word is in no name.

    Examples
    --------
    >>> from fastattn.bench.cases import select
    >>> [case.name for case in select(["float64 causal"])]
    ['float64 causal (1,8,1024,64)', 'float64 causal (1,4,2048,128)']
    """
    for word in words:
        if not any(word in case.name for case in cases):
            raise ValueError(f"no case is called {word!r}, they are: " + "; ".join(case.name for case in cases))
    return tuple(case for case in cases if not words or any(word in case.name for word in words))
