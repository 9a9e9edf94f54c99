"""Few queries: pieces of the keys, merged; a row's bits depend on its own keys alone, and on no other row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances
from numpy.typing import NDArray
from strategies import BFLOAT16

import fastattn
from fastattn.call.arrays import as_operands
from fastattn.call.halves import BITS, cast
from fastattn.call.shapes import describe
from fastattn.cpu.host import decode, forward, plan, session
from fastattn.cpu.host.kernels import load
from fastattn.cpu.kernels.records import PLAN

Array = NDArray[Any]

PIECE = decode.PIECE
DTYPES = (np.float32, np.float64, BFLOAT16)  # of the last some machines multiply pairs
OR_PAIRS = (np.float32, BFLOAT16)


def inputs(shape: tuple[int, ...], keys: int, kv_heads: int, dtype: Any = np.float32, seed: int = 0) -> list[Array]:
    """Return query of a shape (B, H, Lq, D), key and value, whose rows have five features more than keys."""
    rng = np.random.default_rng(seed)
    sizes = shape, (shape[0], kv_heads, keys, shape[-1]), (shape[0], kv_heads, keys, shape[-1] + 5)
    return [rng.standard_normal(size).astype(dtype) for size in sizes]


def of_both(*args: Any, **options: Any) -> bytes:
    """Return the bits of a result and its log-sum-exp."""
    return b"".join(array.tobytes() for array in fastattn.attention(*args, **options, return_lse=True, enable_gqa=True))


def in_pairs(query: Array) -> bool:
    """Whether pairs of the features of bfloat16 are multiplied."""
    return session.current.row.pairs and query.dtype == BITS and query.shape[-1] % 2 == 0


def plan_of(query: Array, key: Array, value: Array, threads: int) -> Any:
    problem, operands = describe(*as_operands(query, key, value, None), enable_gqa=True)
    return forward.plan_forward(problem, operands, np.empty(problem.out_shape, problem.real), threads)


@pytest.fixture(params=["here", "sixteen"])
def lanes(request: pytest.FixtureRequest) -> Any:
    """Have calls use the lanes that this machine has, and sixteen."""
    if request.param == "sixteen":
        request.getfixturevalue("sixteen_lanes")
    return request.param


# -- which calls these are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_half_a_vector_of_queries_decides(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[str] = []
    monkeypatch.setattr(plan, "load", lambda kernel: works.append(kernel.work) or load(kernel))
    few = session.current.row.tile(np.dtype(dtype).name).lanes // 2
    for batch, heads, keys in ((1, 1, 3), (7, 3, 3), (1, 3, 5000)):  # and nothing else
        for queries in (few, few + 1):
            plan_of(*inputs((batch, heads, queries, 17), keys, 1, dtype), threads=2)
            assert works.pop() == ("decode" if queries == few else "forward")


def test_long_sequences_are_shared_by_threads() -> None:
    long, short = inputs((1, 1, 1, 64), 40_000, 1), inputs((1, 1, 1, 64), PIECE, 1)
    assert plan_of(*long, threads=2).tasks > 4
    assert plan_of(*long, threads=1).partials_bytes == 0
    assert plan_of(*short, threads=2).tasks == 1


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "queries"), [(1, 1), (2, 1), (8, 1), (6, 3)])
def test_the_same_bits_in_any_batch_capacity_and_thread_count(lanes: str, dtype: Any, heads: int, queries: int) -> None:
    lengths = np.array([1, 17, PIECE - 1, PIECE, PIECE + 1, 9 * PIECE + 100])
    query, key, value = inputs((len(lengths), heads, queries, 40), 12 * PIECE, heads // 2 or 1, dtype)
    for row, length in enumerate(lengths):
        key[row, :, length:] = value[row, :, length:] = np.nan  # padding
    options: Any = {"is_causal": "bottom-right"}
    found = []
    for threads in (1, 2, 5):
        with fastattn.num_threads(threads):
            found.append(of_both(query, key, value, key_lengths=lengths, **options))
    assert found[0] == found[1] == found[2]
    out, lse = fastattn.attention(query, key, value, key_lengths=lengths, return_lse=True, enable_gqa=True, **options)
    for row, length in enumerate(lengths):
        alone = query[row : row + 1], key[row : row + 1, :, :length], value[row : row + 1, :, :length]
        assert of_both(*alone, **options) == out[row].tobytes() + lse[row].tobytes()
    packed = [np.concatenate([x[row, :, :n].swapaxes(0, 1) for row, n in enumerate(lengths)]) for x in (key, value)]
    cu_seqlens = (
        np.concatenate([[0], np.cumsum(np.full(len(lengths), queries))]),
        np.concatenate([[0], lengths.cumsum()]),
    )
    rows = query.swapaxes(1, 2).reshape(-1, heads, 40)
    with fastattn.num_threads(3):
        of_packed = fastattn.attention_varlen(rows, *packed, *cu_seqlens, enable_gqa=True, **options)
    assert of_packed.tobytes() == out.swapaxes(1, 2).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 3, 4, 5, 6, 7])
def test_heads_that_share_keys_are_computed_as_if_they_had_their_own(lanes: str, dtype: Any, group: int) -> None:
    features = 66 if dtype == BFLOAT16 else 67
    query, key, value = inputs((2, 2 * group, 1, features), 2 * PIECE + 9, 2, dtype)
    repeated = [np.repeat(array, group, axis=1) for array in (key, value)]
    assert of_both(query, key, value) == of_both(query, *repeated)
    assert of_both(query, key, value, window=(300, 0), query_offset=500) == of_both(
        query, *repeated, window=(300, 0), query_offset=500
    )


@pytest.mark.parametrize("queries", [1, 2])
def test_heads_that_share_keys_have_empty_blocks_of_their_own(lanes: str, queries: int) -> None:
    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key // 128 % 4 == head

    query, key, value = inputs((1, 4, queries, 17), 3 * PIECE, 1)
    blocks = fastattn.BlockMask.from_function(seen, queries, key.shape[2], heads=4)
    for options in ({"block_mask": blocks}, {"mask_mod": seen}):
        tolerances.check_call(fastattn.attention, query, key, value, enable_gqa=True, **options)


@pytest.mark.parametrize("options", [{}, {"window": (PIECE + 3, 0)}, {"softcap": 2.0}, {"sinks": np.arange(4) / 3}])
@pytest.mark.parametrize("dtype", OR_PAIRS)
def test_queries_together_are_as_one_after_the_other(lanes: str, dtype: Any, options: Any) -> None:
    """What is decoded ahead, and checked at once, has the bits of what is decoded step by step."""
    few, keys = session.current.row.tile("float32").lanes // 2, 2 * PIECE + 50
    query, key, value = inputs((1, 4, few, 64), keys, 2, dtype)
    out = fastattn.attention(query, key, value, is_causal="bottom-right", enable_gqa=True, **options)
    for i in range(few):
        seen = keys - few + 1 + i
        step = query[:, :, i : i + 1], key[:, :, :seen], value[:, :, :seen]
        alone = fastattn.attention(*step, is_causal="bottom-right", enable_gqa=True, **options)
        assert alone.tobytes() == out[:, :, i : i + 1].tobytes()


@pytest.mark.parametrize("first_key", [0, 3, PIECE - 1, PIECE, PIECE + 60])
@pytest.mark.parametrize("dtype", OR_PAIRS)
def test_hidden_keys_of_a_piece_change_no_bit(lanes: str, dtype: Any, first_key: int) -> None:
    query, key, value = inputs((1, 3, 2, 34), 2 * PIECE + 70, 1, dtype)
    keep = np.arange(key.shape[2]) >= first_key
    keep[[first_key + 5, -3]] = False
    keep[len(keep) - first_key :] = False
    wanted = of_both(query, key, value, keep)
    value[:, :, ~keep, ::2] = np.nan
    key[:, :, ~keep] = np.inf
    assert of_both(query, key, value, keep) == wanted
    hides: Any = keep.astype(np.int32)

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return hides[key] == 1

    assert of_both(query, key, value, mask_mod=seen) == wanted


@pytest.mark.parametrize("dtype", OR_PAIRS)
@pytest.mark.parametrize("keys", [PIECE + 40, PIECE + 39])
def test_a_value_that_is_not_finite_reaches_those_that_look_at_it(lanes: str, dtype: Any, keys: int) -> None:
    query, key, value = inputs((1, 2, 2, 16), keys, 1, dtype)
    value[0, 0, keys - 1, 3] = np.nan
    value[0, 0, 7, 4] = np.inf
    out = fastattn.attention(query, key, value, is_causal="bottom-right", enable_gqa=True).astype(np.float32)
    assert np.isnan(out[0, :, 1, 3]).all()
    assert np.isposinf(out[..., 4]).all()
    assert np.isfinite(np.delete(out, (3, 4), axis=-1)).all()
    assert np.isfinite(out[0, :, 0, 3]).all()


@pytest.mark.parametrize("storage", [np.dtype(np.float16), BITS], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("heads", [1, 2, 7])
@pytest.mark.parametrize("features", [99, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_half_precision_is_computed_with_as_its_numbers_in_float32(
    lanes: str, storage: Any, heads: int, features: int, softcap: float | None
) -> None:
    """It is widened as it is read: nothing else is different, until the result is rounded.

    Where pairs of bfloat16 are multiplied, scores are summed up in another order, and weights are rounded.
    """
    query, key, value = (cast(x, storage) for x in inputs((2, 2 * heads, 2, features), 2 * PIECE + 21, 2))
    lengths = np.array([PIECE + 5, 2 * PIECE + 21])
    value.view(np.uint16)[0, :, lengths[0] :] = 0xFFFF  # NaN
    options: Any = {"key_lengths": lengths, "is_causal": "bottom-right", "softcap": softcap}
    wide = [cast(x, np.dtype(np.float32)) for x in (query, key, value)]
    given = [x.view(BFLOAT16) for x in (query, key, value)] if in_pairs(query) else wide
    right = tolerances.expected(*given, **options, enable_gqa=True)
    wanted = b"" if in_pairs(query) else of_both(*wide, **options)
    columns, rows = np.repeat(key, 2, axis=-1)[..., ::2], value[..., ::-1, :].copy()[..., ::-1, :]
    for keys, values in ((key, value), (columns, rows), (columns, np.repeat(value, 2, axis=-1)[..., ::2])):
        problem, operands = describe(*as_operands(query, keys, values), enable_gqa=True)
        record = forward.plan_forward(problem, operands, np.empty(problem.out_shape, storage), 1).record
        assert bool(record[: PLAN.itemsize].view(PLAN)["key_bytes"][0]) == (keys is columns)
        out = np.empty((*query.shape[:-1], value.shape[-1]), storage if in_pairs(query) else np.float32)
        _, lse = fastattn.attention(query, keys, values, **options, enable_gqa=True, out=out, return_lse=True)
        tolerances.check_out(out.view(BFLOAT16) if in_pairs(query) else out, right)
        tolerances.check_lse(lse, right)
        wanted = wanted or out.tobytes() + lse.tobytes()
        assert out.tobytes() + lse.tobytes() == wanted


@pytest.mark.parametrize("features", [2, 6, 64, 66, 128, 160, 256, 322])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 9])
def test_a_row_has_the_same_bits_with_others_and_alone_in_bfloat16(lanes: str, heads: int, features: int) -> None:
    query, key, value = (cast(x, BITS) for x in inputs((1, heads, 2, features), PIECE + 37, 1))
    scaled = {"scale": 0.3, "softcap": 3.0}
    for options in ({}, scaled):
        together = fastattn.attention(query, key, value, **options, enable_gqa=True)
        for head in range(heads):
            for i in range(2):
                row = query[:, head : head + 1, i : i + 1]
                alone = fastattn.attention(row, key, value, **options)
                assert alone.tobytes() == together[:, head : head + 1, i : i + 1].tobytes()


@pytest.mark.parametrize("dtype", OR_PAIRS)
@pytest.mark.parametrize("first", [1, 2, 15, PIECE - 1, PIECE + 1])
def test_a_piece_begins_at_any_key(lanes: str, dtype: Any, first: int) -> None:
    keys = 2 * PIECE
    query, key, value = inputs((1, 5, 1, 64), keys, 1, dtype)
    options: Any = {"window": (keys - 1 - first, 0), "query_offset": keys - 1}
    tolerances.check_call(fastattn.attention, query, key, value, enable_gqa=True, **options)
    together = fastattn.attention(query, key, value, enable_gqa=True, **options)
    for head in range(5):
        alone = fastattn.attention(query[:, head : head + 1], key, value, **options)
        assert alone.tobytes() == together[:, head : head + 1].tobytes()


# -- right results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 5, 16, 64, 130])
def test_pieces_are_merged(lanes: str, dtype: Any, features: int) -> None:
    query, key, value = inputs((1, 5, 1, features), 3 * PIECE + 33, 1, dtype)
    for rising in (1, -1):  # the maximum is that of the last piece, or of the first
        key[0, 0, :, 0] = rising * np.linspace(-20, 20, key.shape[2])
        query[..., 0] = np.abs(query[..., 0]) + 1
        for threads in (1, 4):
            with fastattn.num_threads(threads):
                tolerances.check_call(fastattn.attention, query, key, value, enable_gqa=True)


def test_pieces_without_a_key_that_is_seen() -> None:
    query, key, value = inputs((1, 2, 1, 64), 5 * PIECE, 1)
    bias = np.full(key.shape[2], -np.inf, np.float32)
    bias[[2 * PIECE, 4 * PIECE + 1]] = 0.5, -1
    tolerances.check_call(fastattn.attention, query, key, value, bias, enable_gqa=True)
    bias[:] = -np.inf
    out, lse = fastattn.attention(query, key, value, bias, enable_gqa=True, return_lse=True)
    assert not out.any()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("position", [4, 6, PIECE + 2, PIECE + 13])
@pytest.mark.parametrize("dtype", OR_PAIRS)
def test_dropout_under_a_window_is_that_of_its_keys(lanes: str, dtype: Any, position: int) -> None:
    query, key, value = inputs((2, 4, 2, 8), 2 * PIECE, 2, dtype)
    options: Any = {"window": (3, 1), "query_offset": position, "dropout_p": 0.5, "rng": 1}
    tolerances.check_call(fastattn.attention, query, key, value, enable_gqa=True, **options)
