"""Blocks of keys that a function hides whole, or not at all: known to the kernels, skipped, and not asked about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Call, bias_in, calls, numbers

import fastattn
from fastattn import BlockMask
from fastattn.call.shapes import describe
from fastattn.cpu.host import functions as cpu_functions
from fastattn.cuda.host import functions as host
from fastattn.cuda.host.arrays import HostPlace
from fastattn.cuda.kernels import kinds as kernels
from fastattn.cuda.kernels import scores
from fastattn.functions.kinds import EMPTY, FULL, PARTIAL

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from numba import cuda

from fastattn.cuda.available import SIMULATED

pytestmark = pytest.mark.skipif(not SIMULATED, reason="blocks are as large as tiles of the simulator's kernels")

Array = np.ndarray[Any, Any]
ROWS, HEADS, QUERIES, KEYS, SIZE = 2, 2, 10, 14, 4
FEW = max(10, settings().max_examples // 8)

DOCUMENTS, TABLE = np.arange(20) // 4, np.linspace(-1, 1, 2 * 30).reshape(2, 30)


@contextmanager
def small_blocks(least: int = 1) -> Iterator[None]:
    """Blocks of so few queries and keys as tiles of the simulator have, looked at from calls of `least` on."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (host, kernels, scores, cpu_functions):
            for name in ("KIND_QUERIES", "KIND_KEYS"):
                patch.setattr(module, name, SIZE)
        patch.setattr(host, "WORTH_LOOKING", least)
        patch.setattr(host, "_kinds", {})
        yield


def documents(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return DOCUMENTS[query] == DOCUMENTS[key]


def causal_of_head(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key <= query + 2 if head == 0 else key < 3


def of_row(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query // 4 + key // 4 + batch) % 3 != 0


def nothing(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return False


def all_of_it(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return True


def relative(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score + TABLE[head, query - key]


MASK_MODS = {each.__name__: each for each in (documents, causal_of_head, of_row, nothing, all_of_it)}


def inputs(dtype: Any = np.float32) -> list[Array]:
    """Return dO, query, key and value: two rows of a batch, of two heads that share one of keys."""
    rng = np.random.default_rng(3)
    shapes = [(HEADS, QUERIES, 3), (HEADS, QUERIES, 2), (1, KEYS, 2), (1, KEYS, 3)]
    return [rng.standard_normal((ROWS, *shape)).astype(dtype) for shape in shapes]


def all_of(grad_out: Any, query: Any, key: Any, value: Any, names: tuple[str, ...] = (), **options: Any) -> list[Any]:
    """Return all that comes of a call, and gradients."""
    options = {"enable_gqa": True, "backend": "cuda", **options}
    results = fastattn.attention(query, key, value, return_lse=True, return_weights=True, **options)
    call = (grad_out, query, key, value, *results[:2])
    return [*results, *fastattn.attention_backward(*call, grads=("query", "key", "value", *names), **options)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "positions": {"query_offset": [3, -2], "is_causal": True, "key_lengths": [14, 9]},
    "dropout": {"dropout_p": 0.3, "rng": 4, "window": (5, 4)},
    "all else": {
        "attn_mask": np.linspace(-1, 1, QUERIES * KEYS, dtype=np.float32).reshape(QUERIES, KEYS),
        "alibi_slopes": np.array([0.5, 0.25]),
        "sinks": np.array([0.5, 1]),
        "score_mod": relative,
        "softcap": 2.0,
        "names": ("attn_mask", "alibi_slopes", "sinks", "TABLE"),
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MASK_MODS)
def test_nothing_changes(name: str, options: dict[str, Any]) -> None:
    """Every bit is what it is where all blocks are computed, and all keys asked about."""
    call, told = inputs(), {"mask_mod": MASK_MODS[name], **options}
    with small_blocks(least=1000):
        wanted = all_of(*call, **told)
        assert not host._kinds
    with small_blocks():
        found = all_of(*call, **told)
        assert len(host._kinds) == 1
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=FEW)
@given(data=st.data())
def test_any_call(data: st.DataObject) -> None:
    with small_blocks():  # those of a BlockMask, too, which is made as the call is drawn
        call: Call = data.draw(calls(small=True, further=True, dropout=True, with_functions=True))
        wanted = tolerances.expected(*call.args, **call.options)
        grad_out = numbers(np.random.default_rng(3), wanted.problem.out_shape, call.query.dtype)
        query, key, value, mask = call.args
        attention = partial(fastattn.attention, backend="cuda")
        out, lse, _ = tolerances.check_call(attention, query, key, value, mask, **call.options)
        found = fastattn.attention_backward(
            grad_out, query, key, value, out, lse, mask, **call.options, grad_mask=bias_in(mask) is not None,
            backend="cuda",
        )  # fmt: skip
    tolerances.check_gradients(found, call.args, *tolerances.expected_gradients(grad_out, *call.args, **call.options))


# -- what is found out -------------------------------------------------------------------------------------------------


def kinds_of(mask_mod: Any, shape: tuple[int, int, int, int], starts: Any) -> Array:
    """Of which kind each block is, for so many rows, heads, queries and keys."""
    rows, heads, queries, keys = shape
    found = np.empty((rows, heads, -(-queries // SIZE), -(-keys // SIZE)), np.uint8)
    for row, head, i, j in np.ndindex(found.shape):
        seen = [
            bool(mask_mod(row, head, starts[row] + query, key))
            for query in range(i * SIZE, min(queries, (i + 1) * SIZE))
            for key in range(j * SIZE, min(keys, (j + 1) * SIZE))
        ]
        found[row, head, i, j] = FULL if all(seen) else PARTIAL if any(seen) else EMPTY
    return found


@pytest.mark.parametrize("offsets", [0, 3, [3, 1]])
@pytest.mark.parametrize("name", MASK_MODS)
def test_what_is_found_out_is_kept_once_for_all_that_are_alike(name: str, offsets: Any) -> None:
    """For rows of the batch only if the function asks for them, or they have offsets of their own; so for heads."""
    array = np.zeros((ROWS, HEADS, QUERIES, 1), np.float32), np.zeros((ROWS, HEADS, KEYS, 1), np.float32)
    mask_mod = MASK_MODS[name]
    problem, operands = describe(*array, array[1], mask_mod=mask_mod, query_offset=offsets)
    assert operands.captured is not None
    with small_blocks():
        words = host.Words(problem, operands.captured, HostPlace({}))
        words.look(problem, operands, np.float32)
        (found,) = host._kinds.values()
    rows = ROWS if name == "of_row" or isinstance(offsets, list) else 1
    shape = (rows, HEADS if name == "causal_of_head" else 1, QUERIES, KEYS)
    wanted = kinds_of(mask_mod, shape, np.broadcast_to(offsets, ROWS))
    assert found.copy_to_host().tolist() == wanted.ravel().tolist()


def test_the_map_of_usual_blocks_is_the_cpus() -> None:
    mask = BlockMask.from_function(lambda batch, head, query, key: abs(query - key) < 40 + 30 * head, 130, 150, None, 2)
    array = np.zeros((2, 130, 1), np.float32), np.zeros((2, 150, 1), np.float32)
    problem, operands = describe(*array, array[1], mask_mod=mask.function.python)
    assert operands.captured is not None
    words = host.Words(problem, operands.captured, HostPlace({}))
    before = set(host._kinds)
    words.look(problem, operands, np.float32)
    (new,) = set(host._kinds) - before
    assert host._kinds[new].copy_to_host().tolist() == mask.kinds.ravel().tolist()
    assert set(mask.kinds.ravel()) == {EMPTY, PARTIAL, FULL}


def test_what_is_known_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _, query, key, value = inputs()
    attention = partial(fastattn.attention, query, key, value, enable_gqa=True, backend="cuda")
    firsts = np.arange(QUERIES) // 2

    def later(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key >= firsts[query]

    with small_blocks():
        first = attention(mask_mod=later)
        monkeypatch.setattr(host, "launch", lambda *_: pytest.fail("looked at again"))
        assert attention(mask_mod=later).tobytes() == first.tobytes()
        monkeypatch.undo()
        firsts[:] = 0
        assert attention(mask_mod=later).tobytes() == attention(mask_mod=all_of_it).tobytes()
        assert len(host._kinds) == 3


def test_few_queries_are_not_worth_it() -> None:
    _, query, key, value = inputs()
    with small_blocks(least=QUERIES + 1):
        fastattn.attention(query, key, value, enable_gqa=True, mask_mod=documents, backend="cuda")
        assert not host._kinds


@pytest.mark.parametrize("offsets", [2, np.zeros(0, np.int64)])
def test_an_empty_batch(offsets: Any) -> None:
    call = [array[:0] for array in inputs()]
    with small_blocks():
        found = all_of(*call, mask_mod=of_row, query_offset=offsets)
    assert [array.size for array in found] == [0] * 6


def test_an_index_out_of_range_is_said_where_it_matters() -> None:
    _, query, key, value = inputs()
    short = np.ones(KEYS - 3)
    attention = partial(fastattn.attention, query, key, value, enable_gqa=True, backend="cuda")

    def listed(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return short[key] > 2

    with small_blocks():
        with pytest.raises(IndexError, match="mask_mod: .*listed: an index was out of range"):
            attention(mask_mod=listed)
        assert not attention(mask_mod=listed, key_lengths=KEYS - 3).any()


# -- what is known is believed -----------------------------------------------------------------------------------------


def mask_of(seen: Array, kind: int) -> BlockMask:
    """A mask of booleans, all blocks of which are said to be of one kind."""
    mask = BlockMask.from_array(seen)
    mask.__dict__["_kinds"] = np.full((1, 1, -(-QUERIES // SIZE), -(-KEYS // SIZE)), kind, np.uint8)
    return mask


@pytest.mark.parametrize("names", [(), ("attn_mask", "alibi_slopes", "TABLE")])
def test_a_full_block_is_not_asked_about_and_an_empty_one_is_skipped(names: tuple[str, ...]) -> None:
    """A mask that is told otherwise than it says."""
    call = inputs()
    options = {"names": names, **({} if not names else OPTIONS["all else"])}
    options["names"] = names
    with small_blocks():
        nothing_seen, all_seen = np.zeros((QUERIES, KEYS), bool), np.ones((QUERIES, KEYS), bool)
        full = all_of(*call, block_mask=mask_of(nothing_seen, FULL), **options)
        for one, other in zip(full, all_of(*call, **options), strict=True):
            np.testing.assert_array_equal(one, other)
        empty = all_of(*call, block_mask=mask_of(all_seen, EMPTY), **options)
        for one, other in zip(empty, all_of(*call, block_mask=mask_of(nothing_seen, PARTIAL), **options), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_masks_of_rows_and_heads(shape: tuple[int, int]) -> None:
    """Each has its own blocks: a kind that were read of another's would show."""
    call = inputs()
    keep = np.random.default_rng(5).random((*shape, -(-QUERIES // SIZE), -(-KEYS // SIZE))) < 0.6
    seen = keep.repeat(SIZE, -2).repeat(SIZE, -1)[..., :QUERIES, :KEYS].copy()
    seen[..., 1, 1] ^= True
    with small_blocks():
        mask = BlockMask.from_array(seen)
        assert set(mask.kinds.ravel()) == {EMPTY, PARTIAL, FULL}
        found = all_of(*call, block_mask=mask)
        moved = all_of(*call, block_mask=mask, query_offset=3)
    wanted = all_of(*call, attn_mask=seen)
    for each in (found, moved):
        for one, other in zip(each, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_arrays_in_device_memory() -> None:
    call = inputs()
    with small_blocks():
        wanted = all_of(*call, mask_mod=documents)
        found = all_of(*map(cuda.to_device, call), mask_mod=documents, backend=None)
    assert [array.copy_to_host().tobytes() for array in found] == [array.tobytes() for array in wanted]


def test_packed_sequences_have_maps_of_their_own() -> None:
    rng = np.random.default_rng(2)
    starts, table = [0, 3, 14, 15, 27], np.linspace(-1, 1, 40)
    arrays = [rng.standard_normal((27, HEADS, 3)).astype(np.float32) for _ in range(4)]

    def near(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return abs(query - key) <= batch

    def biased(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[query - key]

    told: dict[str, Any] = {"mask_mod": near, "score_mod": biased, "backend": "cuda"}

    def found() -> list[Array]:
        out, lse = fastattn.attention_varlen(*arrays[:3], starts, **told, return_lse=True)
        call = (arrays[3], *arrays[:3], out, lse, starts)
        return [out, lse, *fastattn.attention_varlen_backward(*call, **told, grads=("query", "key", "value", "table"))]

    wanted = found()
    with small_blocks(least=4):
        for one, other in zip(found(), wanted, strict=True):
            np.testing.assert_array_equal(one, other)
        assert len(host._kinds) == 2  # the others have fewer queries
