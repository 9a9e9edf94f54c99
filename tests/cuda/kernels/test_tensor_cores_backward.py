"""The backward pass on tensor cores: without a GPU the same source, its instructions in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import emulated_ptx as emulated
import numpy as np
import pytest
from half_cases import Halves
from half_gradients import check, operands, run
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.call.shapes import describe
from fastattn.cuda.available import SIMULATED, Device
from fastattn.cuda.host import backward
from fastattn.cuda.host import tensor_cores_backward as tensor_cores
from fastattn.cuda.host.plan import Table
from fastattn.cuda.kernels import gradient_fragments
from fastattn.cuda.kernels.fragments import TileShape

STORAGES = ("bfloat16", "float16")
SMALL = TileShape("bfloat16", "none", width=64, warps=1, rows=16, keys=16, blocks=1)


@pytest.mark.parametrize(
    ("storage", "width", "causal"),
    [
        ("bfloat16", 64, False),
        ("float16", 64, "bottom-right"),
        ("float16", 128, False),
        ("bfloat16", 128, "bottom-right"),
    ],
)
def test_shapes_that_are_used(storage: str, width: int, causal: bool | str) -> None:
    """Two query heads to a key head, and lengths that no tile divides."""
    rng = np.random.default_rng(width)
    shape = tensor_cores.spec_for(storage, "none", width, of_keys=True).shape
    given = operands(rng, storage, (2, shape.queries + 6, width), (1, shape.queries + 13, width))
    check(shape, given, is_causal=causal, enable_gqa=True)


@pytest.mark.parametrize("mask", ["bool", "float16", "bfloat16", "float32"])
def test_masks(mask: str) -> None:
    """Each kind of mask, some rows empty, with NaN where nobody may look."""
    rng = np.random.default_rng(1)
    shape = SMALL._replace(mask=mask)
    given = operands(rng, "bfloat16", (20, 64), (36, 64))
    seen = rng.random((20, 36)) < 0.5
    seen[3], seen[:, 5] = False, False
    added: Any = seen
    if mask != "bool":
        numbers = np.where(seen, rng.normal(size=seen.shape), -np.inf)
        numbers[7, seen[7]] = -65504
        added = Halves(numbers, mask) if mask == "bfloat16" else numbers.astype(mask)
    for operand, row in ((given[0], 3), (given[1], 3), (given[2], 5), (given[3], 5)):
        operand.bits[row, 2], operand.numbers[row, 2] = 0x7FC0, np.nan
    found = check(shape, given, added, apart=mask in ("bool", "float16"))
    assert not found[0][3].any()
    assert not found[1][5].any()
    assert not found[2][5].any()


@settings(max_examples=max(20, settings().max_examples // 3))
@given(data=st.data())
def test_any_call(data: Any) -> None:
    """Any lengths, sizes and tiles, and numbers that are not finite anywhere."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    storage = draw(st.sampled_from(STORAGES))
    shape = TileShape(
        storage,
        draw(st.sampled_from(["none", "none", "bool", "float32"])),
        width=draw(st.sampled_from([64, 128])),
        warps=draw(st.sampled_from([1, 2])),
        rows=16,
        keys=draw(st.sampled_from([16, 32])),
        blocks=1,
    )
    sizes = st.integers(1, shape.width // 8).map(lambda n: 8 * n)
    features, columns = draw(sizes), draw(sizes)
    queries, keys = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    given = operands(rng, storage, (heads * group, queries, features), (heads, keys, features), columns)
    for operand in given:
        odd = draw(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([np.nan, np.inf, -np.inf])), max_size=1))
        for place, number in odd:
            at = np.unravel_index(place % operand.base.size, operand.base.shape)
            operand.bits[at] = Halves(np.float32([number]), storage).bits[0]
            operand.numbers[at] = number
    seen: Any = None
    if shape.mask != "none":
        seen = rng.random((queries, keys)) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    if shape.mask == "float32":
        seen = np.where(seen, rng.normal(size=seen.shape), -np.inf).astype(np.float32)
    causal = draw(st.sampled_from([False, True, "bottom-right"]))
    apart = draw(st.booleans())
    check(shape, given, seen, apart, is_causal=causal, scale=draw(st.sampled_from([None, 1.0, 0.01])), enable_gqa=True)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["query", "key", "value", "grad_out"])
def test_nothing_leaks(number: float, which: str) -> None:
    """What is not finite changes not a bit of the gradients of those that do not look at it."""
    rng = np.random.default_rng(4)
    given = operands(rng, "bfloat16", (40, 64), (40, 64))
    clean, _ = run(SMALL, given, is_causal=True)
    operand = given[("grad_out", "query", "key", "value").index(which)]
    operand.bits[20, 3], operand.numbers[20, 3] = Halves(np.float32([number]), "bfloat16").bits[0], number
    found = check(SMALL, given, is_causal=True)
    if which in ("key", "value"):
        np.testing.assert_array_equal(found[0][:20], clean[0][:20])
    else:
        for one, other in zip(found[1:], clean[1:], strict=True):
            np.testing.assert_array_equal(one[21:], other[21:])


def test_the_same_bits_every_time_and_in_any_batch() -> None:
    rng = np.random.default_rng(3)
    given = operands(rng, "bfloat16", (2, 20, 64), (2, 40, 64))
    whole, again = (run(SMALL, given, is_causal=True)[0] for _ in range(2))
    alone = run(SMALL, [operand[1:] for operand in given], is_causal=True)[0]
    for one, other, part in zip(whole, again, alone, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one[1:], part)


@pytest.mark.skipif(not SIMULATED, reason="only the simulator tells what is stored where")
def test_bytes_of_a_gradient_that_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Any] = []
    monkeypatch.setattr(gradient_fragments, "global_address", lambda array, at: emulated.Address(array, at * 2))
    monkeypatch.setattr(gradient_fragments, "store_pair", lambda place, word, when: places.append(place.offset))
    shape, thread = SMALL._replace(width=128), np.arange(32, dtype=np.int32)
    store = emulated.unrolled(gradient_fragments.store, shape)
    problem = describe(*(np.zeros((1, 16, 128), np.float32),) * 3)[0]
    none = Table(np.zeros((8, 1), np.int64), np.tile(np.int64([128, 1]), (8, 1)), np.zeros(8, np.int64))
    for count in (2**22, 2**23 - 2**12, 2**23 + 16):
        places.clear()
        store([np.zeros(32, np.float32)] * 64, 1.0, None, 0, count - 16, count, 128, thread)
        right = np.max(places) == count * 256 - 4
        large = replace(problem, keys=count)
        against = tensor_cores.against("float16", "none", large, none, (0,), (8, 0))
        assert (against is None) == right == (count < 2**23), against


def test_calls_that_suit_them_get_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public function, on a GPU of compute capability 8.0 that is not there; near the exact ones."""
    rng = np.random.default_rng(5)
    shapes = [(2, 20, 16), (2, 20, 16), (1, 19, 16), (1, 19, 16)]
    arrays = [rng.normal(size=shape).astype(np.float16) for shape in shapes]
    out, lse = fastattn.attention(*(array.astype(np.float32) for array in arrays[1:]), enable_gqa=True, return_lse=True)
    given = (*arrays, out.astype(np.float16), lse)
    wide = [array.astype(np.float32) for array in given]
    exact = fastattn.attention_backward(*wide, enable_gqa=True, backend="reference")
    monkeypatch.setattr(backward, "_plans", {})
    monkeypatch.setattr(backward, "device", lambda: Device(0, "one that is not there", (8, 0), "none"))
    queued: list[Any] = []
    queue = backward.queue_tensor_cores
    monkeypatch.setattr(backward, "queue_tensor_cores", lambda *a: (queued.append(a), queue(*a)))
    found = fastattn.attention_backward(*given, enable_gqa=True, backend="cuda")
    assert len(queued) == 1
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == np.float16
        np.testing.assert_allclose(one.astype(float), other.astype(float), atol=2e-2)
    # the gradient of a query that two heads share is a sum over both
    twice = [array.repeat(2, axis=0) for array in arrays[2:]]
    few = [array[:, :3] for array in (arrays[0], arrays[1][:1], *twice, *given[4:])]
    fastattn.attention_backward(*few, backend="cuda")
    assert len(queued) == 1
