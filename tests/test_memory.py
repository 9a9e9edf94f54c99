"""Working memory does not grow with the lengths: 64 MiB at most for 131,072 keys. And nobody else's is written to."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import processes
import pytest
from marks import takes_long
from memory import MEASURE

import fastattn

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")

MEBIBYTE = 1 << 20
LENGTH = 131_072

CASE = """
def case(queries, keys):
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 1, 1, keys, 64), dtype=np.float32)
    query = rng.standard_normal((1, 1, queries, 64), dtype=np.float32)
    out = np.zeros_like(query)
    options = {"is_causal": "bottom-right"}
    boolean = np.arange(keys) % 5 != 0
    return [
        lambda: fastattn.attention(query, key, value, **options),
        lambda: fastattn.attention(query, key, value, rng.standard_normal(keys, dtype=np.float32), **options),
        lambda: fastattn.attention(query, key, value, boolean, **options),
        lambda: fastattn.attention(query, key, value, boolean, **options, out=out),
        lambda: fastattn.attention(query, key, value, **options, return_lse=True, dropout_p=0.1, rng=1),
        lambda: fastattn.attention(query[..., ::-1], key[..., ::-1], value[..., ::-1], **options),
        lambda: fastattn.attention(query, key, value, boolean, **options, out=query),
    ]
"""


def growths(queries: int, which: str, timeout: float = 120) -> list[float]:
    code = f"""
for call in case({min(queries, 200)}, 200){which}:
    call()  # compiled, and loaded
print(*[growth(call) for call in case({queries}, {LENGTH}){which}])
"""
    return [float(number) for number in processes.run(MEASURE + CASE + code, timeout=timeout).split()]


@on_linux
def test_few_queries_with_many_keys() -> None:
    """The last queries of a long causal call: the keys, and the masks over them, are all there."""
    grown = growths(256, "[:]")
    assert len(grown) == 7
    assert max(grown) < 32, grown


@on_linux
@pytest.mark.parametrize("mask", ["None", "rng.standard_normal(LENGTH, dtype=np.float32)"])
def test_a_backward_pass(mask: str) -> None:
    """Its gradients, and a block for each thread; a matrix of 16,384 x 16,384 would be a gibibyte."""
    code = f"""
def make(LENGTH, rng=np.random.default_rng(0)):
    query, key, value, out = rng.standard_normal((4, 1, 1, LENGTH, 64), dtype=np.float32)
    lse, mask = np.full((1, 1, LENGTH), 10, np.float32), {mask}
    options = dict(attn_mask=mask, is_causal=True, grad_mask=mask is not None)
    return lambda: fastattn.attention_backward(out, query, key, value, out, lse, **options)

make(200)()
print(growth(make(16384)))
"""
    gradients = 3 * 16384 * 64 * 4 / MEBIBYTE
    assert float(processes.run(MEASURE + code)) < gradients + 16


@on_linux
def test_the_measure_sees_a_copy() -> None:
    code = f"""
keys = np.ones({LENGTH * 64}, np.float32)
print(growth(lambda: keys.copy()))
"""
    assert float(processes.run(MEASURE + code)) >= 31


@on_linux
@pytest.mark.slow
@takes_long
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_as_many_queries_as_keys(which: int) -> None:
    (grown,) = growths(LENGTH, f"[{which}:{which + 1}]", timeout=1000)
    output = 0 if which == 3 else LENGTH * 64 * 4 / MEBIBYTE
    assert grown < 64 + output, grown


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("queries", [1, 7, 15, 17, 33, 70])
def test_nothing_but_out_is_written(dtype: Any, queries: int) -> None:
    """All lengths here leave lanes of the last vector, and features of the last tile, without a place in `out`."""
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, queries, 19)).astype(dtype)
    for features in (19, 16, 3):
        around = np.full((2, queries + 40, features + 2), 7, dtype)
        out = around[:, 20:-20, :features]
        fastattn.attention(query, key, value[..., :features], out=out)
        np.testing.assert_array_equal(out, fastattn.attention(query, key, value[..., :features]))
        out[:] = 7
        assert (around == 7).all()
