"""The forward kernel on tensor cores: without a GPU the same source, its instructions in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import emulated_ptx as emulated
import numpy as np
import pytest
from half_cases import Halves, check, run
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.call.shapes import describe
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.host import tensor_cores
from fastattn.cuda.host.plan import make_table
from fastattn.cuda.kernels.fragments import TileShape
from fastattn.cuda.kernels.plan import OUT, QUERY

SMALL = TileShape("bfloat16", "none", width=64, warps=1, rows=16, keys=16, blocks=1)
STORAGES = ("bfloat16", "float16")


def operands(rng: Any, storage: str, query: Any, key: Any, value: Any = None) -> list[Halves]:
    return [Halves(rng.normal(size=size), storage) for size in (query, key, key if value is None else value)]


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
    shape = tensor_cores.shape_for(storage, "none", width)
    length = shape.queries + 6
    given = operands(rng, storage, (2, length, width), (1, 2 * shape.keys + 13, width))
    check(shape, *given, is_causal=causal, enable_gqa=True)


@pytest.mark.parametrize("mask", ["bool", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("width", [64, 128])
def test_masks(mask: str, width: int) -> None:
    """Each kind of mask in the shape that is used for it, some rows empty, with NaN where nobody may look."""
    rng = np.random.default_rng(1)
    shape = tensor_cores.shape_for("bfloat16", mask, width)
    query, key, value = operands(rng, "bfloat16", (20, width), (shape.keys + 20, width))
    seen = rng.random((20, shape.keys + 20)) < 0.5
    seen[3], seen[:, 5] = False, False
    given: Any = seen
    if mask != "bool":
        added = np.where(seen, rng.normal(size=seen.shape), -np.inf)
        added[7] = np.finfo(np.float32).min if mask == "float32" else -3.3895e38 if mask == "bfloat16" else -65504
        given = added.astype(np.float32) if mask == "float32" else Halves(added, mask)
        if mask == "float16":
            given.numbers = given.numbers.astype(np.float16)
    value.bits[5], value.numbers[5] = 0x7FC0, np.nan
    check(shape, query, key, value, given)


@settings(max_examples=max(20, settings().max_examples // 3))
@given(data=st.data())
def test_any_call(data: Any) -> None:
    """Any lengths, sizes, masks and tiles, and numbers that are not finite anywhere."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    storage = draw(st.sampled_from(STORAGES))
    mask = draw(st.sampled_from(["none", "none", "bool", "float32"]))
    shape = TileShape(
        storage,
        mask,
        width=draw(st.sampled_from([64, 128])),
        warps=draw(st.sampled_from([1, 2])),
        rows=draw(st.sampled_from([16, 32])),
        keys=draw(st.sampled_from([16, 32])),
        blocks=1,
    )
    sizes = st.integers(1, shape.width // 8).map(lambda n: 8 * n)
    features, columns = draw(sizes), draw(sizes)
    queries, keys = draw(st.integers(1, 50)), draw(st.integers(0, 70))
    heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    given = operands(rng, storage, (heads * group, queries, features), (heads, keys, features), (heads, keys, columns))
    for operand in given:
        odd = draw(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([np.nan, np.inf, -np.inf])), max_size=2))
        for place, number in odd:
            if operand.base.size:
                at = np.unravel_index(place % operand.base.size, operand.base.shape)
                operand.bits[at] = Halves(np.float32([number]), storage).bits[0]
                operand.numbers[at] = number
    seen: Any = None
    if mask != "none":
        seen = rng.random((queries, keys)) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    if mask == "float32":
        seen = np.where(seen, rng.normal(size=seen.shape), -np.inf).astype(np.float32)
    check(
        shape,
        *given,
        seen,
        is_causal=draw(st.sampled_from([False, True, "bottom-right"])),
        scale=draw(st.sampled_from([None, 1.0, 0.01])),
        enable_gqa=True,
    )


def test_any_strides() -> None:
    """Rows that stand backwards or apart, and operands that are broadcast."""
    rng = np.random.default_rng(2)
    query = Halves(rng.normal(size=(3, 40, 2, 80)), "bfloat16")[:, ::-2, 1, 8:72].numbers
    base = Halves(rng.normal(size=(3, 40, 2, 80)), "bfloat16")
    query, key = base[:, ::-2, 1, 8:72], Halves(rng.normal(size=(1, 30, 64)), "bfloat16")
    out, _ = check(SMALL, query, key, key)
    same = Halves(query.numbers.copy(), "bfloat16")
    np.testing.assert_array_equal(out, run(SMALL, same, key, key)[0])


def test_a_row_does_not_depend_on_others() -> None:
    """The same bits in any batch, and the same on every run."""
    rng = np.random.default_rng(3)
    given = operands(rng, "float16", (3, 20, 64), (3, 40, 64))
    shape = SMALL._replace(storage="float16")
    whole = run(shape, *given, is_causal=True)
    again = run(shape, *given, is_causal=True)
    for b in range(3):
        alone = run(shape, *(operand[b : b + 1] for operand in given), is_causal=True)
        for one, other, part in zip(whole, again, alone, strict=True):
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(one[b : b + 1], part)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_nothing_leaks(number: float) -> None:
    """A value or a key that a query may not look at changes not a bit of its result; the others do see it."""
    rng = np.random.default_rng(4)
    query, key, value = operands(rng, "bfloat16", (40, 64), (40, 64))
    clean, clean_lse = run(SMALL, query, key, value, is_causal=True)
    bits = Halves(np.float32([number]), "bfloat16").bits[0]
    for operand in (key, value):
        kept = operand.bits[20].copy(), operand.numbers[20].copy()
        operand.bits[20, 3], operand.numbers[20, 3] = bits, number
        out, lse = check(SMALL, query, key, value, is_causal=True)
        np.testing.assert_array_equal(out[:20], clean[:20])
        np.testing.assert_array_equal(lse[:20], clean_lse[:20])
        if operand is value:
            assert not np.isfinite(out[20:, 3]).any()
        operand.bits[20], operand.numbers[20] = kept


def test_no_keys() -> None:
    rng = np.random.default_rng(5)
    out, lse = run(SMALL, *operands(rng, "bfloat16", (5, 64), (0, 64)))
    assert (out == 0).all()
    assert (lse == -np.inf).all()


# -- the memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [5, 40])
def test_scores_beyond_float32_are_not_taken_for_no_keys(cuda_attention: Any, queries: int) -> None:
    query, key = np.full((queries, 8), 60000, np.float16), np.full((40, 8), 60000, np.float16)
    out, lse = cuda_attention(query, key, key, scale=9e29, is_causal=True, return_lse=True)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def conflicts(offsets: Any) -> int:
    """How often a group of 8 lanes, 16 bytes each, needs a bank of shared memory for a second word."""
    more = 0
    for lanes in np.reshape(offsets, (4, 8)):
        words = np.unique(lanes[:, None] // 4 + np.arange(4))
        more += int(np.bincount(words % 32, minlength=32).max()) - 1
    return more


@pytest.mark.skipif(not SIMULATED, reason="only the simulator tells what is accessed")
@pytest.mark.parametrize("width", [64, 128])
def test_no_bank_conflicts(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is read and written 16 bytes a lane is in all 32 banks at a time."""
    seen: list[tuple[str, Any]] = []
    monkeypatch.setattr(emulated, "accesses", seen)
    rng = np.random.default_rng(6)
    shape = tensor_cores.shape_for("bfloat16", "none", width)
    run(shape, *operands(rng, "bfloat16", (shape.queries, width), (shape.keys + 1, width)))
    assert {name for name, _ in seen} == {"ldmatrix", "cp.async", "ld.shared"}
    assert sum(conflicts(offsets) for _, offsets in seen) == 0


def test_conflicts_are_counted() -> None:
    """Rows of 128 bytes one below the other, which is what there would be without another order, are all conflicts."""
    assert conflicts(128 * np.arange(32)) == 4 * 7
    assert conflicts(16 * np.arange(32)) == 0


# -- what the kernel takes ---------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    query, out = np.zeros((2, 5, 64), np.float32), np.zeros((2, 1, 5, 64), np.float32)
    problem, views = describe(query, query, query)
    table = make_table(problem, [(row, view, 0) for row, view in zip((0, 1, 2), views[:3], strict=True)])
    table.steps[OUT], table.offsets[OUT] = (64, 1), 64 * np.arange(2)
    del out

    def against(storage="float16", mask="none", problem=problem, table=table, addresses=(0, 512), capability=(8, 0)):
        return tensor_cores.against(storage, mask, problem, table, addresses, capability)

    assert against() is None
    assert "float32" in against("float32")
    assert "7.5" in against(capability=(7, 5))
    assert "dropout" in against(problem=replace(problem, dropout_p=0.1))
    assert "float64" in against(mask="float64")
    assert "scale" in against(problem=replace(problem, scores=replace(problem.scores, scale=-1.0)))
    assert against(mask="float32", problem=replace(problem, scores=replace(problem.scores, scale=-1.0))) is None
    assert "head size 60" in against(problem=replace(problem, head_dim=60))
    assert "value size 136" in against(problem=replace(problem, value_dim=136))
    assert "16 bytes" in against(addresses=(8,))
    steps = table.steps.copy()
    steps[QUERY] = 1, 64
    assert "features" in against(table=table._replace(steps=steps))
    steps[QUERY] = 68, 1
    assert "16 bytes" in against(table=table._replace(steps=steps))
