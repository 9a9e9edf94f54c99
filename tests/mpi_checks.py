"""What tests/integrations/test_mpi.py has several processes check: `mpiexec -n 2 python tests/mpi_checks.py`.

Each function here is a check, which all ranks run. The first rank prints a line of JSON for each, with what failed on
any rank.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tolerances
from mpi4py import MPI
from packed_cases import packed
from strategies import BFLOAT16, of_size

import fastattn
from fastattn.call.shares import LAYOUTS, shares
from fastattn.integrations.mpi import passes, ring_attention, ring_attention_backward, shard, unshard
from fastattn.integrations.mpi.courier import Courier, Parcel, own_communicator

COMM = MPI.COMM_WORLD
CHECKS: dict[str, Callable[[], None]] = {}
NAMES = ("query", "key", "value")
Array = np.ndarray[Any, Any]


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def inputs(
    queries: int = 90, keys: int = 90, dtype: Any = np.float32, batch: tuple[int, ...] = (2,), heads: Any = (4, 2)
) -> list[Any]:
    """Return dO, query, key and value, whole."""
    rng = np.random.default_rng(queries)
    shapes = [(heads[0], queries, 24), (heads[0], queries, 16), (heads[1], keys, 16), (heads[1], keys, 24)]
    return [rng.standard_normal((*batch, *shape)).astype(dtype) for shape in shapes]


def pause() -> None:
    """Wait for all others without taking their cores, of which there may be fewer than ranks."""
    request = COMM.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)


def by_ranks(
    arrays: list[Any], layout: str, mask: Any = None, grad_lse: Any = None, **options: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Return result, log-sum-exp and the gradients of operands, each put together; and other gradients by name."""
    pause()
    grad_out, *operands = (shard(COMM, array, layout=layout) for array in arrays)
    names = options.pop("grads", ())
    told = {"layout": layout, "enable_gqa": True, **options}
    if mask is not None:
        told["attn_mask"] = mask
    out, lse = ring_attention(COMM, *operands, return_lse=True, **told)
    if grad_lse is not None:
        told["grad_lse"] = shard(COMM, grad_lse, axis=-1, layout=layout)
    found = ring_attention_backward(COMM, grad_out, *operands, out, lse, grads=(*NAMES, *names), **told)
    whole = [unshard(COMM, array, layout=layout) for array in (out, *found[:3])]
    whole.insert(1, unshard(COMM, lse, axis=-1, layout=layout))
    return whole, dict(zip(names, found[3:], strict=True))


def same_as_one_process(arrays: list[Any], layout: str, mask: Any = None, own_mask: Any = None, **options: Any) -> None:
    """Hold what all ranks compute to the bounds of what one process computes; the first rank does."""
    names, grad_lse = options.pop("grads", ()), options.pop("grad_lse", None)
    (out, lse, *gradients), others = by_ranks(arrays, layout, own_mask, grad_lse, grads=names, **options)
    if COMM.rank != 0:
        return
    grad_out, *operands = arrays
    options["enable_gqa"] = True
    captured = tuple(name for name in names if name not in ("alibi_slopes", "sinks"))
    wanted = tolerances.expected(*operands, mask, **options)
    tolerances.check_out(out, wanted)
    tolerances.check_lse(lse, wanted)
    exact = tolerances.expected_gradients(grad_out, *operands, mask, grad_lse=grad_lse, **options)
    tolerances.check_gradients(tuple(gradients), tuple(operands), *exact)
    own = {name: found for name, found in others.items() if name not in captured}
    tolerances.check_head_gradients(own, grad_out, *operands, mask, grad_lse=grad_lse, **options)
    if captured:
        found = {name: others[name] for name in captured}
        tolerances.check_captured_gradients(found, {"TABLE": TABLE}, grad_out, *operands, mask, **options)


TABLE = np.random.default_rng(3).standard_normal((4, 181))
DOCUMENT = np.repeat(np.arange(5), 40)


@of_size(1, 6)
def relative(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score + TABLE[head, query - key + 90] + batch


def same_document(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return DOCUMENT[query] == DOCUMENT[key]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": "bottom-right", "key_lengths": np.array([80, 45])},
    "window": {"window": (12, 5), "softcap": 2.0, "scale": 0.5},
    "window_behind": {"is_causal": True, "window": (7, 0)},
    "offset": {"is_causal": True, "query_offset": np.array([20, -30]), "key_lengths": np.array([80, 45])},
    "dropout": {"dropout_p": 0.3, "rng": 5, "is_causal": True},
    "of_heads": {
        "alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4]),
        "sinks": np.array([[0.5, 1, -np.inf, 2], [0, 1, 2, 3]]),
        "grads": ("sinks", "alibi_slopes"),
    },
    "functions": {"score_mod": relative, "mask_mod": same_document, "grads": ("TABLE",)},
}


def of_options(name: str, layout: str) -> None:
    @check
    def run() -> None:
        same_as_one_process(inputs(), layout, **OPTIONS[name])

    del CHECKS["run"]
    CHECKS[f"{name}_{layout}"] = run


for _name in OPTIONS:
    for _layout in LAYOUTS:
        of_options(_name, _layout)


# -- shapes and dtypes -------------------------------------------------------------------------------------------------


@check
def other_numbers_of_queries() -> None:
    for queries, keys in ((37, 101), (101, 37), (3, 90), (90, 2), (0, 9), (9, 0), (1, 1)):
        for layout in LAYOUTS:
            same_as_one_process(inputs(queries, keys), layout, is_causal="bottom-right")


@check
def other_batches() -> None:
    same_as_one_process(inputs(33, 33, batch=()), "zigzag", is_causal=True)
    same_as_one_process(inputs(33, 33, batch=(1, 2)), "zigzag", is_causal=True)
    grad_out, query, *_ = inputs(33, 33)
    _, _, key, value = inputs(33, 33, batch=(1,), heads=(4, 1))
    same_as_one_process([grad_out, query, key, value], "zigzag", is_causal=True)


@check
def float64() -> None:
    same_as_one_process(inputs(dtype=np.float64), "zigzag", is_causal=True)


@check
def gradients_by_the_log_sum_exp() -> None:
    grad_lse = np.random.default_rng(4).standard_normal((2, 4, 90)).astype(np.float32)
    for layout in LAYOUTS:
        same_as_one_process(inputs(), layout, grad_lse=grad_lse, **OPTIONS["of_heads"])


@check
def half_precision() -> None:
    for dtype in (np.float16, BFLOAT16):
        same_as_one_process(inputs(40, 40, dtype=dtype), "zigzag", is_causal=True)


@check
def any_strides() -> None:
    """Shares that lie as (batch, length, heads, features)."""
    arrays = inputs(50, 50)
    operands = [shard(COMM, array) for array in arrays[1:]]
    wanted = ring_attention(COMM, *operands, enable_gqa=True)
    strided = [np.ascontiguousarray(each.swapaxes(1, 2)).swapaxes(1, 2) for each in operands]
    assert ring_attention(COMM, *strided, enable_gqa=True).tobytes() == wanted.tobytes()


@check
def calls_at_random() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)

        def sometimes(name: str, given: Any, rng: np.random.Generator = rng) -> dict[str, Any]:
            return {name: given} if rng.random() < 0.3 else {}

        queries, keys, batch = int(rng.integers(1, 140)), int(rng.integers(1, 140)), int(rng.integers(1, 3))
        options: dict[str, Any] = {"is_causal": bool(rng.random() < 0.5)}
        options |= sometimes("window", tuple(rng.choice([None, 0, 9, 40], 2)))
        options |= sometimes("query_offset", rng.integers(-keys, keys, batch))
        options |= sometimes("key_lengths", rng.integers(0, keys + 1, batch))
        options |= sometimes("softcap", 1.5) | sometimes("dropout_p", 0.4)
        options |= sometimes("alibi_slopes", rng.random((batch, 4))) | sometimes("sinks", rng.standard_normal(4))
        options["grads"] = tuple(name for name in ("alibi_slopes", "sinks") if name in options)
        layout = LAYOUTS[int(rng.integers(2))]
        dtype = rng.choice([np.float32, np.float64])
        same_as_one_process(inputs(queries, keys, dtype, (batch,)), layout, **options, rng=seed)


@check
def the_same_bits_each_time() -> None:
    for options in ({"is_causal": True}, {"dropout_p": 0.2, "rng": 3}):
        first, second = (by_ranks(inputs(), "zigzag", **options)[0] for _ in range(2))
        assert [array.tobytes() for array in first] == [array.tobytes() for array in second]


# -- masks -------------------------------------------------------------------------------------------------------------


@check
def masks() -> None:
    rng = np.random.default_rng(2)
    bias, keep = rng.standard_normal((1, 4, 90, 90)).astype(np.float32), rng.random((2, 1, 90, 90)) < 0.7
    for layout in LAYOUTS:
        own_bias, own_keep = (shard(COMM, mask, layout=layout) for mask in (bias, keep))
        arrays = inputs()
        same_as_one_process(arrays, layout, bias, own_bias)
        same_as_one_process(arrays, layout, keep, own_keep, is_causal=True)
        same_as_one_process(arrays, layout, (bias, keep), (own_bias, own_keep))
        same_as_one_process(arrays, layout, keep[:, :, 0:1], keep[:, :, 0:1])  # of keys alone
        same_as_one_process(arrays, layout, keep[1, 0, 0], keep[1, 0, 0])


@check
def a_rank_may_have_no_mask() -> None:
    hidden = np.ones((90, 90), bool)
    (own, *_) = shares(90, COMM.size, "contiguous")[0]
    hidden[: own.end, 5:20] = False
    same_as_one_process(inputs(), "contiguous", hidden, hidden[: own.end] if COMM.rank == 0 else None)


@check
def block_masks() -> None:
    blocks = fastattn.BlockMask.from_function(same_document, 90, 90)
    same_as_one_process(inputs(), "zigzag", block_mask=blocks, is_causal=True)
    same_as_one_process(inputs(), "contiguous", block_mask=blocks, mask_mod=same_document, query_offset=3)


# -- packed sequences --------------------------------------------------------------------------------------------------


@check
def packed_sequences() -> None:
    """As `attention_varlen` has them."""
    lengths = [5, 1, 0, 70, 33, 16, 130]
    query, key, value, cu, _ = packed([(length, length) for length in lengths], dtype=np.float64)
    slopes, sinks = np.random.default_rng(1).standard_normal((2, len(lengths), 4))
    cases: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"is_causal": "bottom-right", "window": (9, 0), "softcap": 3.0},
        {"is_causal": True, "dropout_p": 0.3, "rng": 4},
        {"alibi_slopes": slopes, "sinks": sinks, "is_causal": True, "query_offset": np.arange(len(lengths))},
        {"alibi_slopes": slopes[:1], "sinks": sinks[0]},
        {"score_mod": relative_to_sequence},
    ]
    for options in cases:
        for layout in LAYOUTS:
            same_as_packed(query, key, value, cu, layout, options)


def relative_to_sequence(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score + 0.01 * (query - key) * batch + head


def same_as_packed(query: Array, key: Array, value: Array, cu: Array, layout: str, options: dict[str, Any]) -> None:
    names = (*NAMES, *(name for name in ("alibi_slopes", "sinks") if name in options))
    out, lse = fastattn.attention_varlen(query, key, value, cu, **options, enable_gqa=True, return_lse=True)
    grad_out = np.random.default_rng(1).standard_normal(out.shape)
    wanted = fastattn.attention_varlen_backward(
        grad_out, query, key, value, out, lse, cu, **options, enable_gqa=True, grads=names
    )
    arrays = [array.swapaxes(0, 1) for array in (grad_out, query, key, value)]
    (found, sums, *gradients), others = by_ranks(arrays, layout, cu_seqlens=cu, **options, grads=names[3:])
    close = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
    close(found.swapaxes(0, 1), out)
    close(sums.swapaxes(0, 1), lse)
    for gradient, exact in zip(gradients, wanted, strict=False):
        close(gradient.swapaxes(0, 1), exact)
    for name, exact in zip(names[3:], wanted[3:], strict=True):
        close(others[name], exact)


# -- who computes and sends what ---------------------------------------------------------------------------------------


def scores_computed(layout: str, **options: Any) -> int:
    """Return how many scores that a query may look at this rank computes."""
    found = 0

    def counted(query: Array, key: Array, *args: Any, first: Any, **told: Any) -> Any:
        nonlocal found
        places = np.arange(first.query, first.query + query.shape[-2])[:, None]
        keys = np.arange(first.key, first.key + key.shape[-2])
        left = told["options"]["window"][0] if told["options"]["window"] else 10**6
        found += np.count_nonzero((keys <= places) & (keys >= places - left))
        return real(query, key, *args, first=first, **told)

    real = passes.attend
    _, *operands = (shard(COMM, array, layout=layout) for array in inputs(96, 96))
    with mock.patch.object(passes, "attend", counted):
        ring_attention(COMM, *operands, enable_gqa=True, is_causal=True, layout=layout, **options)
    return found


@check
def in_zigzag_causal_calls_are_the_same_work_for_all() -> None:
    found = COMM.allgather(scores_computed("zigzag"))
    assert len(set(found)) == 1
    assert sum(found) == 96 * 97 // 2
    contiguous = COMM.allgather(scores_computed("contiguous"))
    assert sum(contiguous) == sum(found)
    assert contiguous == sorted(set(contiguous))


def messages(**options: Any) -> list[tuple[int, int, int]]:
    """Return what each rank sends and receives, in bytes, and of how many owners it has keys."""
    couriers: list[Courier] = []

    class Kept(Courier):
        def __init__(self, comm: Any) -> None:
            super().__init__(comm)
            couriers.append(self)

    _, *operands = (shard(COMM, array, layout=options["layout"]) for array in inputs(96, 96))
    owners: list[int] = []

    def counted(call: Any, courier: Courier) -> Any:
        owners.extend(call.route.owners)
        return real(call, courier)

    real = passes.Call.blocks
    with mock.patch.object(passes, "Courier", Kept), mock.patch.object(passes.Call, "blocks", counted):
        ring_attention(COMM, *operands, enable_gqa=True, **options)
    return COMM.allgather((couriers[0].sent, couriers[0].received, len(owners)))


@check
def keys_go_around_once() -> None:
    own = 2 * 2 * (96 // COMM.size) * (16 + 24) * 4  # bytes of a share
    for layout in LAYOUTS:
        around = (COMM.size - 1) * own
        assert messages(layout=layout) == [(around, around, COMM.size)] * COMM.size


@check
def keys_out_of_reach_are_not_sent() -> None:
    own = 2 * 2 * (96 // COMM.size) * (16 + 24) * 4
    found = messages(layout="contiguous", is_causal=True, window=(5, 0))
    assert [each[1] for each in found] == [0] + [own] * (COMM.size - 1)
    assert [each[0] for each in found] == [own] * (COMM.size - 1) + [0]
    found = messages(layout="contiguous", is_causal=True)
    assert [each[2] for each in found] == list(range(1, COMM.size + 1))
    found = messages(layout="contiguous", cu_seqlens=None, is_causal=True, query_offset=-96)
    assert [each[:2] for each in found] == [(0, 0)] * COMM.size


@check
def messages_move_while_a_rank_computes() -> None:
    courier, count = Courier(own_communicator(COMM)), 1 << 22
    leaving, coming = (Parcel([(count,)], np.dtype(np.float32)) for _ in range(2))
    leaving.numbers[...] = COMM.rank
    courier.send(leaving, (COMM.rank + 1) % COMM.size, 0)
    courier.receive(coming, (COMM.rank - 1) % COMM.size, 0)
    with courier.meanwhile():
        end = time.monotonic() + 30
        while any(courier.under_way):
            assert time.monotonic() < end
            time.sleep(0.001)
    assert (coming.numbers == (COMM.rank - 1) % COMM.size).all()
    courier.finish()


@check
def messages_of_the_users_are_left_alone() -> None:
    """Of any tag and source, under way on the same communicator."""
    found = np.zeros(3)
    request = COMM.Irecv(found, MPI.ANY_SOURCE, MPI.ANY_TAG)
    by_ranks(inputs(), "zigzag", is_causal=True)
    COMM.Send(np.full(3, COMM.rank + 1.0), (COMM.rank + 1) % COMM.size, 7)
    request.Wait()
    assert (found == (COMM.rank - 1) % COMM.size + 1).all()


@check
def other_communicators() -> None:
    half = COMM.Split(COMM.rank % 2, -COMM.rank)
    arrays = inputs(30, 30)
    operands = [shard(half, array) for array in arrays[1:]]
    out = unshard(half, ring_attention(half, *operands, enable_gqa=True))
    tolerances.check_out(out, tolerances.expected(*arrays[1:], enable_gqa=True))
    assert own_communicator(half) == own_communicator(half) != own_communicator(COMM)
    half.Free()


@check
def one_seed_is_drawn_for_all() -> None:
    ones = np.ones((1, 1, 64, 8), np.float32)
    query, key, value = (shard(COMM, array, layout="contiguous") for array in (ones, ones, ones))
    with mock.patch.object(passes, "attend", wraps=passes.attend) as attend:
        ring_attention(COMM, query, key, value, dropout_p=0.5, layout="contiguous")
    seeds = {call.kwargs["seed"] for call in attend.call_args_list}
    assert len(set().union(*COMM.allgather(seeds))) == 1
    generators = [np.random.default_rng(8) for _ in range(2)]
    out = [ring_attention(COMM, query, key, value, dropout_p=0.5, rng=generator) for generator in generators]
    assert out[0].tobytes() == out[1].tobytes()


# -- shards ------------------------------------------------------------------------------------------------------------


@check
def shards_make_the_whole_again() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, BFLOAT16, np.int64, bool):
        for shape, axis in (((2, 13, 3), -2), ((13,), 0), ((13,), -1), ((3, 0, 2), 1), ((2, 3, 16), 2), ((0, 5), 1)):
            whole = (10 * rng.standard_normal(shape)).astype(dtype)
            for layout in LAYOUTS:
                found = unshard(COMM, shard(COMM, whole, axis, layout), axis, layout)
                assert found.dtype == whole.dtype
                assert found.shape == whole.shape
                assert found.tobytes() == whole.tobytes()


@check
def shards_in_zigzag_are_from_the_front_and_from_the_back() -> None:
    own = shard(COMM, np.arange(8 * COMM.size), 0)
    back = 8 * COMM.size - 4 * COMM.rank
    assert own.tolist() == [*range(4 * COMM.rank, 4 * COMM.rank + 4), *range(back - 4, back)]


# -- bad input ---------------------------------------------------------------------------------------------------------


def raises_alike(kind: type[Exception], text: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Assert that each rank raises the same, with a text in it."""
    try:
        function(COMM, *args, **options)
    except Exception as error:
        said = (type(error), str(error))
    else:
        said = (None, "nothing")
    everywhere = COMM.allgather(said)
    assert set(everywhere) == {said}, everywhere
    assert said[0] is kind, said
    assert text in said[1], said


@check
def ranks_that_disagree() -> None:
    if COMM.size == 1:
        return  # with whom?
    last = COMM.rank == COMM.size - 1
    grad_out, query, key, value = (shard(COMM, array) for array in inputs())
    call = (query, key, value)

    def differs(text: str, **options: Any) -> None:
        raises_alike(ValueError, text, ring_attention, *call, **{"enable_gqa": True, **options})

    behind = f"on rank {COMM.size - 1}; expected the same on all"
    differs(f"is_causal: False on rank 0, True {behind}", is_causal=last)
    differs(f"window: None on rank 0, (3, 0) {behind}", window=(3, 0) if last else None)
    differs(f"rng: seed 1 on rank 0, seed 2 {behind}", dropout_p=0.1, rng=2 if last else 1)
    differs("key_lengths: int64 of shape (2,)", key_lengths=np.array([9, 8 if last else 9]))
    differs("score_mod: relative, of code", score_mod=relative if not last else relative_to_sequence)
    differs("block_mask: None", block_mask=fastattn.BlockMask.from_function(same_document, 90, 90) if last else None)
    differs("layout: 'zigzag' on rank 0, 'contiguous'", layout="contiguous" if last else "zigzag")
    wide = np.float64 if last else np.float32
    raises_alike(
        ValueError, "query: shape (2, 4, 16), float32", ring_attention, *(a.astype(wide) for a in call), enable_gqa=True
    )
    fewer = [array[:, :, :-2] if last else array for array in call]
    raises_alike(ValueError, "query: length", ring_attention, *fewer, enable_gqa=True)
    raises_alike(ValueError, "key: length", ring_attention, query, *fewer[1:], enable_gqa=True)
    out, lse = ring_attention(COMM, *call, enable_gqa=True, return_lse=True)
    given = (grad_out, *call, out, lse)
    names = ("query",) if last else ("key",)
    raises_alike(ValueError, "grads: ('key',)", ring_attention_backward, *given, enable_gqa=True, grads=names)
    if last:
        raises_alike(ValueError, "function: ring_attention", ring_attention_backward, *given, enable_gqa=True)
    else:
        raises_alike(ValueError, "function: ring_attention", ring_attention, *call, enable_gqa=True)


@check
def what_is_wrong_on_one_rank_is_raised_on_all() -> None:
    if COMM.size == 1:
        return  # which is all
    last = COMM.rank == COMM.size - 1
    where = f"rank {COMM.size - 1}: "
    grad_out, query, key, value = (shard(COMM, array) for array in inputs())
    call = (query, key, value)
    told: dict[str, Any] = {"enable_gqa": True}
    raises_alike(TypeError, where + "query:", ring_attention, None if last else query, key, value, **told)
    raises_alike(ValueError, where + "value:", ring_attention, query, key, value[:, :, :3] if last else value, **told)
    rows = np.ones((3, 90), bool)
    raises_alike(ValueError, where + "attn_mask:", ring_attention, *call, rows if last else None, **told)
    columns = np.ones((1, 89), bool)
    raises_alike(ValueError, where + "attn_mask:", ring_attention, *call, columns if last else None, **told)
    out, lse = ring_attention(COMM, *call, **told, return_lse=True)
    given = (grad_out[..., :-1] if last else grad_out, *call, out, lse)
    raises_alike(ValueError, where + "grad_out:", ring_attention_backward, *given, **told)
    raises_alike(IndexError, "rank 0: score_mod: short_of_rows", ring_attention, *call, **told, score_mod=short_of_rows)


SHORT = np.zeros(80)


def short_of_rows(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score + SHORT[query]


@check
def what_is_wrong_on_all_is_said_as_by_one_process() -> None:
    grad_out, query, key, value = (shard(COMM, array) for array in inputs())
    call, told = (query, key, value), {"enable_gqa": True}
    raises_alike(
        ValueError, "layout: 'diagonal' of type str; expected 'contiguous' or", shard, query, layout="diagonal"
    )
    raises_alike(ValueError, "layout: 'diagonal' of type str; expected", ring_attention, *call, layout="diagonal")
    raises_alike(TypeError, "widow: no such option", ring_attention, *call, **told, widow=3)
    raises_alike(ValueError, "softcap", ring_attention, *call, **told, softcap=-1.0)
    raises_alike(ValueError, "key: shape", ring_attention, *call)
    raises_alike(ValueError, "key_lengths: 9 to 91", ring_attention, *call, **told, key_lengths=np.array([9, 91]))
    raises_alike(TypeError, "key_lengths", ring_attention, *call, **told, key_lengths=np.array([0.5]))
    raises_alike(ValueError, "query_offset", ring_attention, *call, **told, query_offset=np.zeros(3, int))
    raises_alike(TypeError, "block_mask: ", ring_attention, *call, **told, block_mask=3)
    blocks = fastattn.BlockMask.from_function(same_document, 80, 90)
    raises_alike(ValueError, "block_mask: ", ring_attention, *call, **told, block_mask=blocks)
    raises_alike(ValueError, "cu_seqlens", ring_attention, *call, **told, cu_seqlens=[0, 90])
    raises_alike(TypeError, "return_lse", ring_attention, *call, **told, return_lse=1)
    out, lse = ring_attention(COMM, *call, **told, return_lse=True)
    given = (grad_out, *call, out, lse)
    raises_alike(ValueError, "rng: None", ring_attention_backward, *given, **told, dropout_p=0.5)
    raises_alike(ValueError, "grads: 'attn_mask'", ring_attention_backward, *given, **told, grads=("attn_mask",))
    single = [array[0] for array in call]
    packed_told = {**told, "cu_seqlens": [0, 40, 90]}
    raises_alike(ValueError, "cu_seqlens: from 0 to 80", ring_attention, *single, **told, cu_seqlens=[0, 80])
    raises_alike(ValueError, "key_lengths: given together", ring_attention, *single, **packed_told, key_lengths=[3])
    raises_alike(ValueError, "attn_mask: given together", ring_attention, *single, np.ones(90, bool), **packed_told)
    raises_alike(ValueError, "sinks: shape (3, 4)", ring_attention, *single, **packed_told, sinks=np.zeros((3, 4)))
    raises_alike(ValueError, "axis: 3", unshard, query[0], axis=3)
    if COMM.size > 1:
        raises_alike(ValueError, "array: length", unshard, np.zeros(3 if COMM.rank else 5), axis=0)


@check
def no_communicator() -> None:
    with pytest.raises(TypeError, match="comm: NoneType; expected an mpi4py.MPI.Intracomm"):
        ring_attention(None, *inputs()[1:])


def main() -> None:
    """Run all checks, or those that are named."""
    for name in sys.argv[1:] or CHECKS:
        failure = None
        try:
            CHECKS[name]()
        except Exception:
            failure = traceback.format_exc()
        pause()
        failures = [f"rank {rank}\n{text}" for rank, text in enumerate(COMM.allgather(failure)) if text]
        if COMM.rank == 0:
            print(json.dumps({"check": name, "failures": failures}), flush=True)
    if COMM.rank == 0:
        print("all checks have run")


if __name__ == "__main__":
    main()
