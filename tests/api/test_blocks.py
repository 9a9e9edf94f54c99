"""`attention_blocks`: keys that come in blocks, and never are in memory together."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, bits_of, calls, of_size

import fastattn
from fastattn import BlockMask, attention_blocks
from fastattn.call import reading

INF, NAN = np.inf, np.nan


def inputs(keys: int = 60, dtype: Any = np.float32) -> tuple[Any, Any, Any]:
    """Return query, key and value: two rows of a batch, of four heads that share two of keys."""
    rng = np.random.default_rng(0)
    shapes = (2, 4, 9, 8), (2, 2, keys, 8), (2, 2, keys, 5)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)  # type: ignore[return-value]


def cut(key: Any, value: Any, cuts: list[int]) -> Iterator[tuple[Any, Any]]:
    """The keys and values between cuts."""
    for first, end in pairwise([0, *cuts, key.shape[-2]]):
        yield key[..., first:end, :], value[..., first:end, :]


def half(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key + batch + head) % 2 == 0


@of_size(steepest=0.5, largest=8.0)
def sloped(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score * 0.5 - (query - key) * (head + 1) / 64


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True, "query_offset": 30},
    "bottom-right": {"is_causal": "bottom-right"},
    "rows of their own": {"window": (7, 3), "query_offset": np.array([40, -3]), "key_lengths": np.array([50, 20])},
    "bottom-right of lengths": {"is_causal": "bottom-right", "key_lengths": np.array([33, 0]), "window": (20, None)},
    "softcap, slopes, sinks": {"softcap": 1.5, "alibi_slopes": np.full(4, 0.1), "sinks": np.array([0.0, 1, 2, -INF])},
    "boolean mask": {"attn_mask": np.arange(60) % 3 == 0},
    "floating mask": {"attn_mask": np.linspace(-1, 1, 9 * 60).reshape(9, 60)},
    "a mask of one column": {"attn_mask": np.linspace(-1, 1, 9)[:, None]},
    "both masks": {"attn_mask": (np.linspace(-1, 1, 9 * 60).reshape(9, 60), np.arange(60) % 7 != 0)},
    "functions": {"score_mod": sloped, "mask_mod": half, "query_offset": 5},
    "block mask": {"block_mask": BlockMask.from_function(half, 9, 60, 2, 4), "query_offset": np.array([3, 9])},
    "block mask, one offset": {"block_mask": BlockMask.from_function(half, 9, 60, 2, 4), "query_offset": np.array([3])},
    "dropout": {"dropout_p": 0.4, "rng": 3},
    "nothing is seen": {"window": (0, 0), "query_offset": 1000, "sinks": np.ones(4)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cuts", [[], [0], [1, 2, 3], [30, 30], [17, 41], [60]], ids=str)
def test_an_iterable_of_blocks_is_all_keys(options: dict[str, Any], cuts: list[int]) -> None:
    query, key, value = inputs()
    options = {"enable_gqa": True, **options}
    wanted = tolerances.expected(query, key, value, **options)
    if options.get("is_causal") == "bottom-right":
        options["is_causal"] = True
        options["query_offset"] = options.get("key_lengths", 60) - 9
    out, lse = attention_blocks(query, cut(key, value, cuts), return_lse=True, **options)
    tolerances.check_out(out, wanted)
    tolerances.check_lse(lse, wanted)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", [1, 13, 60, None])
def test_a_pair_is_cut_into_blocks(options: dict[str, Any], size: int | None) -> None:
    query, key, value = inputs()
    options = {"enable_gqa": True, **options}
    wanted = tolerances.expected(query, key, value, **options)
    out, lse = attention_blocks(query, (key, value), return_lse=True, block_size=size, **options)
    tolerances.check_out(out, wanted)
    tolerances.check_lse(lse, wanted)


@given(call=calls(further=True, dropout=True, with_functions=True, empty=True), data=st.data())
def test_any_call(call: Call, data: st.DataObject) -> None:
    query, key, value, mask = call.args
    before = bits_of(query, key, value, mask)
    wanted = tolerances.expected(*call.args, **call.options)
    size = data.draw(st.integers(1, max(1, key.shape[-2])))
    out, lse = attention_blocks(query, (key, value), mask, block_size=size, **call.options, return_lse=True)
    tolerances.check_out(out, wanted)
    tolerances.check_lse(lse, wanted)
    assert bits_of(query, key, value, mask) == before


FAR = 10**30


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"block_mask": BlockMask.from_function(half, 9, 60, 2, 4)}], ids=list
)
@pytest.mark.parametrize("window", [None, (FAR, FAR), (FAR - 2, None), (None, FAR - 40), (FAR, 0)], ids=str)
@pytest.mark.parametrize("offset", [FAR, -FAR, FAR + 30, -FAR + 30])
def test_windows_of_queries_that_stand_far_away_end_where_they_do(offset: int, window: Any, options: Any) -> None:
    query, key, value = inputs()
    options = {"enable_gqa": True, "query_offset": offset, "window": window, **options}
    wanted = tolerances.expected(query, key, value, **options)
    out, lse = attention_blocks(query, (key, value), return_lse=True, block_size=13, **options)
    tolerances.check_out(out, wanted)
    tolerances.check_lse(lse, wanted)


@pytest.mark.parametrize("offset", [FAR, -FAR, np.array([-(2**63), 2**63 - 1])], ids=str)
def test_functions_see_the_positions_that_queries_far_away_have_in_the_whole(offset: Any) -> None:
    query, key, value = inputs()
    options: Any = {"enable_gqa": True, "query_offset": offset, "return_lse": True}
    options["mask_mod"] = lambda batch, head, query, key: (query - key) % 3 < 2
    wanted = fastattn.attention(query, key, value, **options)
    for found, exact in zip(attention_blocks(query, (key, value), block_size=13, **options), wanted, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_dropout_drops_what_it_drops_of_all_keys() -> None:
    query, key, _ = inputs(61)
    one = np.eye(61, dtype=np.float32)[None, None].repeat(2, 0).repeat(2, 1)  # the result is the weights
    options: Any = {"dropout_p": 0.5, "rng": 7, "enable_gqa": True}
    wanted = fastattn.attention(query, key, one, **options)
    for cuts in ([], [3], [5, 18, 39], [1, 2, 6]):
        found = attention_blocks(query, cut(key, one, cuts), **options)
        np.testing.assert_array_equal(found == 0, wanted == 0)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


# -- what is read ------------------------------------------------------------------------------------------------------


class Sliced:
    """What can be sliced, and notes it, like an array that is stored in chunks."""

    def __init__(self, array: Any, chunks: tuple[int, ...] | None = None):
        self.array, self.shape, self.dtype, self.chunks, self.read = array, array.shape, array.dtype, chunks, []

    def __getitem__(self, place: Any) -> Any:
        self.read.append((place[-2].start, place[-2].stop))
        return self.array[place]


class SliceOfSafetensors:
    """As `safe_open(...).get_slice(...)` is: it says its shape when asked."""

    def __init__(self, array: Any):
        self.array = array

    def get_shape(self) -> list[int]:
        return list(self.array.shape)

    def __getitem__(self, place: Any) -> Any:
        return self.array[place]


def test_array_likes_are_sliced() -> None:
    query, key, value = inputs()
    wanted = fastattn.attention(query, key, value, enable_gqa=True)
    for kind in (Sliced, SliceOfSafetensors):
        found = attention_blocks(query, (kind(key), kind(value)), enable_gqa=True, block_size=13)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({}, [(0, 16), (16, 32), (32, 48), (48, 60)]),
        ({"is_causal": True}, [(0, 16)]),
        ({"window": (2, 2), "query_offset": 24}, [(16, 32), (32, 48)]),
        ({"key_lengths": [20, 31]}, [(0, 16), (16, 32)]),
        ({"window": (0, 0), "query_offset": -100}, [(0, 0)]),
    ],
    ids=str,
)
def test_what_no_query_may_look_at_is_not_read(options: dict[str, Any], read: list[tuple[int, int]]) -> None:
    query, key, value = inputs()
    pair = Sliced(key), Sliced(value)
    found = attention_blocks(query, pair, enable_gqa=True, block_size=16, **options)
    assert pair[0].read == pair[1].read == read
    np.testing.assert_allclose(found, fastattn.attention(query, key, value, enable_gqa=True, **options), atol=1e-6)


def test_an_iterable_is_advanced_no_further_than_needed() -> None:
    query, key, value = inputs()
    asked = []

    def blocks() -> Iterator[Any]:
        for first in range(0, 60, 10):
            asked.append(first)
            yield key[..., first : first + 10, :], value[..., first : first + 10, :]

    attention_blocks(query, blocks(), enable_gqa=True, is_causal=True, query_offset=10)
    assert asked == [0, 10]


def test_whole_chunks_are_blocks() -> None:
    key = Sliced(np.empty((8, 1 << 20, 64), np.float32), (1, 1000, 64))
    source = reading.source_of((key, key))
    assert source.size % 1000 == 0
    assert 1 << 24 <= source.size * 8 * 2 * 64 * 4 <= 1 << 25
    assert reading.source_of((Sliced(key.array), Sliced(key.array))).size == 8192
    chunks: Any
    for chunks in ((1, None, 64), (1, -5, 64), ((8,), (), (64,)), ((8,), (np.nan, np.nan), (64,))):  # say nothing
        assert reading.source_of((Sliced(key.array, chunks), Sliced(key.array))).size == 8192


def test_the_next_block_is_read_meanwhile_and_no_other_kept() -> None:
    query, key, value = inputs()
    alive: list[Any] = []
    most = 0

    class Owned(np.ndarray[Any, Any]):
        pass

    def blocks() -> Iterator[Any]:
        nonlocal most
        assert threading.current_thread() is not threading.main_thread()
        for first in range(0, 60, 6):
            pair = [array[..., first : first + 6, :].copy().view(Owned) for array in (key, value)]
            alive.append(weakref.ref(pair[0]))
            most = max(most, sum(each() is not None for each in alive))
            yield tuple(pair)
            del pair

    attention_blocks(query, blocks(), enable_gqa=True)
    assert most <= 3  # the one that is computed, the next, and the one after it as it is made


def test_progress_is_told() -> None:
    query, key, value = inputs()
    told: list[Any] = []
    attention_blocks(query, (key, value), enable_gqa=True, block_size=25, progress=lambda *args: told.append(args))
    attention_blocks(query, cut(key, value, [7]), enable_gqa=True, progress=lambda *args: told.append(args))
    assert told == [(25, 60), (50, 60), (60, 60), (7, None), (60, None)]


def test_more_keys_than_memory(tmp_path: Path) -> None:
    """A process that may have 500 MB of memory attends to keys and values of 1.2 GB, that are in a file."""
    keys, path = 1_200_000, tmp_path / "keys"
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(12):
            rng.standard_normal((keys // 12, 128), dtype=np.float32).tofile(file)
            rng.standard_normal((keys // 12, 128), dtype=np.float32).tofile(file)
    assert path.stat().st_size > 1_200_000_000
    printed = processes.run(f"""
import resource
import numpy as np
import fastattn
query = np.ones((3, 128), np.float32)
fastattn.attention(query, query, query)
def half(at):
    return np.fromfile({str(path)!r}, np.float32, 12_800_000, offset=at * 51_200_000).reshape(-1, 128)
def blocks():
    for i in range(12):
        yield half(2 * i), half(2 * i + 1)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000,) * 2)
try:
    np.ones(1_200_000_000, np.uint8)
    print("there is room")
except MemoryError:
    pass
out, lse = fastattn.attention_blocks(query, blocks(), return_lse=True)
print(np.isfinite(out).all(), float(lse[0]))
""")
    assert printed.split()[0] == "True"


def test_files_that_are_mapped(tmp_path: Path) -> None:
    query, key, value = inputs()
    for name, array in (("key", key), ("value", value)):
        np.save(tmp_path / f"{name}.npy", array)
    pair = tuple(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("key", "value"))
    found = attention_blocks(query, pair, enable_gqa=True, block_size=20)
    np.testing.assert_allclose(found, fastattn.attention(query, key, value, enable_gqa=True), atol=1e-6)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_out_is_written(dtype: Any) -> None:
    query, key, value = inputs(dtype=dtype)
    out = np.full((2, 4, 9, 5), NAN, dtype)
    found = attention_blocks(query, (key, value), enable_gqa=True, block_size=7, out=out)
    assert found is out
    tolerances.check_out(out, tolerances.expected(query, key, value, enable_gqa=True))


def test_halves_are_rounded_once() -> None:
    query, key, value = inputs(dtype=np.float16)
    wide = np.empty((2, 4, 9, 5), np.float32)
    attention_blocks(query, (key, value), enable_gqa=True, block_size=7, out=wide)
    found = attention_blocks(query, (key, value), enable_gqa=True, block_size=7)
    np.testing.assert_array_equal(found, wide.astype(np.float16))


def test_nan_of_hidden_keys_stays_there() -> None:
    query, key, value = inputs()
    key[..., 10:20, :] = value[..., 10:20, :] = NAN
    keep = (np.arange(60) < 10) | (np.arange(60) >= 20)
    for size in (7, 10, 60):
        assert np.isfinite(attention_blocks(query, (key, value), keep, enable_gqa=True, block_size=size)).all()
        assert np.isnan(attention_blocks(query, (key, value), enable_gqa=True, block_size=size)).all()


# -- what is refused ---------------------------------------------------------------------------------------------------

QUERY, KEY, VALUE = inputs()


class Shaped(Sliced):
    """What says that it has another shape than it has."""

    def __init__(self, array: Any, shape: Any):
        super().__init__(array)
        self.shape = shape


@pytest.mark.parametrize(
    ("blocks", "options", "error", "message"),
    [
        (3, {}, TypeError, "blocks: 3 of type int; expected an iterable of"),
        ([], {}, ValueError, "blocks: nothing in it"),
        ([KEY], {}, TypeError, r"blocks\[0\]: .* expected a tuple \(key, value\)"),
        ([(KEY,)], {}, ValueError, r"blocks\[0\]: a tuple of 1"),
        ([(KEY, VALUE), (KEY, VALUE[..., :7, :])], {}, ValueError, r"blocks\[1\]: .* as many keys as values"),
        ([(KEY, VALUE), (KEY[..., :7], VALUE)], {}, ValueError, r"blocks\[1\]: .* as of blocks\[0\]"),
        ([(KEY, VALUE), (KEY.astype(float), VALUE)], {}, ValueError, r"blocks\[1\]: float64 .* as of blocks\[0\]"),
        ([(KEY[0, 0, 0], VALUE)], {}, ValueError, r"blocks\[0\]: key: shape \(8,\)"),
        ((KEY, VALUE[..., :7, :]), {}, ValueError, "blocks: a key of shape"),
        (
            [(KEY, VALUE)],
            {"is_causal": "bottom-right"},
            ValueError,
            "is_causal: 'bottom-right' with blocks that are it",
        ),
        ((KEY, VALUE), {"is_causal": "bottom-right", "query_offset": 3}, ValueError, "query_offset: given together"),
        ([(KEY, VALUE)], {"block_size": 3}, ValueError, "block_size: 3, with blocks that are iterated"),
        ((KEY, VALUE), {"progress": "bar"}, TypeError, "progress: 'bar' of type str; expected a callable"),
        ((Shaped(KEY, 3), VALUE), {}, ValueError, "blocks: shape 3 of a Shaped; expected whole numbers"),
        ((Shaped(KEY, (2, 2, None, 8)), VALUE), {}, ValueError, r"blocks: shape \(2, 2, None, 8\) of a Shaped"),
        ((Shaped(KEY, (2, 2, -1, 8)), VALUE), {}, ValueError, r"blocks: shape \(2, 2, -1, 8\) of a Shaped"),
        (
            (Shaped(KEY, (2, 2, 99, 8)), Shaped(VALUE, (2, 2, 99, 5))),
            {},
            ValueError,
            r"blocks: key: shape \(2, 2, 60, 8\) of keys 0 to 99; expected \(2, 2, 99, 8\)",
        ),
        ((KEY, VALUE), {"block_size": 0}, ValueError, "block_size: 0; expected a positive int"),
        ((KEY, VALUE), {"block_size": 1.5}, TypeError, "block_size: 1.5"),
        ((KEY, VALUE), {"query_offset": [1, 2, 3]}, ValueError, r"query_offset: shape \(3,\)"),
        ((KEY, VALUE), {"key_lengths": [61, 0]}, ValueError, "key_lengths: 0 to 61; expected 0 to 60"),
        ([(KEY, VALUE)], {"key_lengths": [61, 0]}, ValueError, "key_lengths: 61 is among them; expected 0 to 60"),
        ([(KEY, VALUE)], {"key_lengths": [-1, 0]}, ValueError, "key_lengths: -1 to 0"),
        ((KEY, VALUE), {"attn_mask": np.zeros(59)}, ValueError, r"attn_mask: shape \(59,\); expected 60 keys"),
        ([(KEY, VALUE)], {"attn_mask": np.zeros(59)}, ValueError, r"attn_mask: shape \(59,\); expected at least 60"),
        ([(KEY, VALUE)], {"attn_mask": np.zeros(61)}, ValueError, r"attn_mask: shape \(61,\); expected 60 keys"),
        ((KEY, VALUE), {"block_mask": BlockMask.from_function(half, 9, 61)}, ValueError, "block_mask: made for"),
        ([(KEY, VALUE)], {"block_mask": BlockMask.from_function(half, 9, 61)}, ValueError, "block_mask: made for"),
        ((KEY, VALUE), {"block_mask": 3}, TypeError, "block_mask: 3 of type int"),
        ((KEY, VALUE), {"scale": "a"}, TypeError, "scale: "),
        ((KEY, VALUE), {"window": (3,)}, ValueError, "window: "),
        ((KEY, VALUE), {"enable_gqa": False}, ValueError, "heads"),
        ((KEY, VALUE), {"return_lse": 3}, TypeError, "return_lse: 3"),
        ((KEY, VALUE), {"out": np.empty(3, np.float32)}, ValueError, r"out: shape \(3,\)"),
    ],
)
def test_bad_input_is_named(blocks: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_blocks(QUERY, blocks, **{"enable_gqa": True, **options})


def test_what_goes_wrong_while_reading_is_what_the_caller_sees() -> None:
    def blocks() -> Iterator[Any]:
        yield KEY, VALUE
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        attention_blocks(QUERY, blocks(), enable_gqa=True)
