"""Few queries on CUDA, whose keys are split over blocks: against the exact result, whatever the split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tolerances
from strategies import numbers, random_mask

import fastattn
from fastattn.call.shapes import describe

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from numba import cuda

from fastattn.cuda.available import SIMULATED
from fastattn.cuda.host import arrays, choice, plan
from fastattn.cuda.host import decode as decoding
from fastattn.cuda.kernels.plan import OPERANDS
from fastattn.cuda.kernels.vectors import vector_width

Array = np.ndarray[Any, Any]
Attention = Callable[..., Any]
DTYPES = [np.float32, np.float64]
STORAGES = ["float16", "bfloat16", "float32", "float64"]
KEYS = (1, 7, 8, 9, 16, 33) if SIMULATED else (1, 63, 64, 65, 300, 5000)


def inputs(
    keys: int, queries: int = 1, heads: int = 1, group: int = 1, features: int = 5, dtype: Any = np.float32
) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng([keys, queries])
    shapes = (heads * group, queries, features), (heads, keys, features), (heads, keys, features + 1)
    query, key, value = (numbers(rng, shape, dtype) for shape in shapes)
    return query, key, value


@pytest.fixture
def sixteen_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the simulator take 16 queries to a block, as a GPU does."""
    small = {"rows": 16, "keys": 8, "threads": 16, "lanes": 4, "passes": 1}
    monkeypatch.setattr(decoding, "SIMULATED_ROWS", 16)
    monkeypatch.setattr(decoding, "SMALL", small)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
@pytest.mark.parametrize("keys", KEYS)
def test_parts_of_the_keys_are_merged(cuda_attention: Attention, keys: int, is_causal: Any, dtype: Any) -> None:
    query, key, value = inputs(keys, queries=2, heads=2, dtype=dtype)
    tolerances.check_call(cuda_attention, query, key, value, is_causal=is_causal)


@pytest.mark.parametrize("group", [1, 3, 4])
def test_queries_of_a_group_share_their_keys(cuda_attention: Attention, group: int) -> None:
    query, key, value = inputs(11, heads=2, group=group)
    tolerances.check_call(cuda_attention, query, key, value, enable_gqa=True)


@pytest.mark.usefixtures("sixteen_queries")
@pytest.mark.parametrize(("queries", "group"), [(1, 5), (3, 5), (2, 8), (13, 1)])
def test_up_to_sixteen_queries(cuda_attention: Attention, queries: int, group: int) -> None:
    query, key, value = inputs(19, queries=queries, heads=2, group=group)
    mask = random_mask(np.random.default_rng(0), (2 * group, queries, 19), "float, -inf", np.float32)
    options = {"enable_gqa": True, "is_causal": "bottom-right"}
    tolerances.check_call(cuda_attention, query, key, value, mask, **options)


@pytest.mark.parametrize("kind", ["bool", "bool, few rows", "padding", "float", "float, -inf", "float, lowest"])
def test_masks(cuda_attention: Attention, kind: str) -> None:
    query, key, value = inputs(21, queries=2, heads=2)
    for shape in ((21,), (2, 1), (2, 1, 21), (2, 2, 21)):
        for dtype in (np.float16, np.float64):
            mask = random_mask(np.random.default_rng(1), shape, kind, dtype)
            tolerances.check_call(cuda_attention, query, key, value, mask)


@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout_keeps_what_the_reference_keeps(cuda_attention: Attention, dropout_p: float) -> None:
    query, key, value = inputs(21, queries=2, heads=2)
    tolerances.check_call(cuda_attention, query, key, value, dropout_p=dropout_p, rng=2**63 + 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_keys_no_queries_and_queries_that_look_at_nothing(cuda_attention: Attention, dtype: Any) -> None:
    for keys, queries in ((0, 1), (5, 0), (9, 2)):
        query, key, value = inputs(keys, queries=queries, dtype=dtype)
        mask = np.arange(queries)[:, None] != 1  # the second one looks at nothing
        tolerances.check_call(cuda_attention, query, key, value, mask)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["key", "value"])
def test_what_is_masked_leaks_nothing(cuda_attention: Attention, which: str, odd: float) -> None:
    query, key, value = inputs(17, queries=2)
    mask = np.ones((2, 17), bool)
    mask[0, 12] = False
    clean = cuda_attention(query, key, value, mask, return_lse=True)
    spoilt = (key if which == "key" else value).copy()
    spoilt[:, 12] = odd
    arguments = (query, spoilt, value, mask) if which == "key" else (query, key, spoilt, mask)
    found = cuda_attention(*arguments, return_lse=True)
    for one, other in zip(found, clean, strict=True):
        assert one[0, 0].tobytes() == other[0, 0].tobytes()
    tolerances.check_call(cuda_attention, *arguments)


def test_an_infinite_score_makes_its_row_nan(cuda_attention: Attention) -> None:
    query, key, value = inputs(17, queries=2)
    bias = np.zeros((2, 17), np.float32)
    bias[0, 3] = np.inf
    tolerances.check_call(cuda_attention, query, key, value, bias)


# -- loads of 16 bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_aligned_loads_change_no_bit(cuda_attention: Attention, storage: str) -> None:
    """The same numbers in another layout, which has to be loaded one by one."""
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if storage == "bfloat16" else np.dtype(storage)
    width = vector_width(storage)
    query, key, value = (array.astype(dtype) for array in inputs(19, queries=2, features=2 * width))
    value = np.concatenate([value, value[..., : width - 1]], axis=-1)
    turned = [np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2) for array in (key, value)]
    place = arrays.HostPlace({})
    assert all(decoding.is_aligned(place.move("key", array)) for array in (key, value))
    out = cuda_attention(query, key, value)
    # what is moved to the device becomes contiguous there, so ask with rows that have something between them
    wide = np.zeros((1, 19, 2 * width + 1), dtype)
    wide[..., :-1] = key
    moved = [cuda.to_device(array) for array in (query, wide, value)]
    if storage != "bfloat16":  # Numba's arrays do not know it
        found = fastattn.attention(moved[0], moved[1][..., :-1], moved[2]).copy_to_host()
        assert found.tobytes() == out.tobytes()
    assert cuda_attention(query, *turned).tobytes() == out.tobytes()


def test_what_is_aligned() -> None:
    place = arrays.HostPlace({})
    whole = place.move("key", np.zeros((2, 3, 8), np.float32))
    assert decoding.is_aligned(whole)
    assert not decoding.is_aligned(whole._replace(address=whole.address + 4))
    assert not decoding.is_aligned(whole._replace(strides=(24, 8, 2)))
    assert not decoding.is_aligned(whole._replace(strides=(27, 9, 1)))
    assert not decoding.is_aligned(whole._replace(shape=(2, 3, 7)))


# -- the split ---------------------------------------------------------------------------------------------------------


def test_the_split_depends_on_the_shape_of_a_row_of_the_batch_alone(cuda_attention: Attention) -> None:
    query, key, value = (np.stack([array] * 3) for array in inputs(33, queries=2, heads=2))
    query[1], key[1] = query[1] * 2, key[1] - 1
    together = cuda_attention(query, key, value, return_lse=True)
    for b in range(3):
        alone = cuda_attention(query[b], key[b], value[b], return_lse=True)
        for one, other in zip(together, alone, strict=True):
            assert one[b].tobytes() == other.tobytes()


def test_who_gets_these_kernels() -> None:
    query = np.empty((32, 1, 64), np.float32)
    for heads, queries, features, few in ((8, 1, 64, True), (32, 2, 64, True), (1, 1, 64, False), (8, 1, 257, False)):
        shape = (heads, 300, features)
        asked = np.broadcast_to(query[:, :, :1], (32, queries, features))
        problem, _ = describe(asked, *[np.broadcast_to(np.float32(0), shape)] * 2, enable_gqa=True)
        work = decoding.work_for(problem, "float32", "none", False)
        assert (work is not None) == few, (heads, queries, features)


@pytest.mark.parametrize(
    ("query", "key", "why"),
    [
        ((1, 32, 8), (1, 9, 8), "32 queries share them, more than "),
        ((32, 2, 8), (1, 9, 8), "64 queries share them, more than "),
        ((1, 1, 264), (1, 9, 264), "head size 264 is above 256"),
        ((1, 1, 8), (1, 0, 8), "there are none"),
    ],
)
def test_it_is_said_why_keys_are_not_split(query: Any, key: Any, why: str) -> None:
    given = (np.zeros(query, np.float16), np.zeros(key, np.float16), np.zeros(key, np.float16))
    problem, _ = describe(*(array.astype(np.float32) for array in given), enable_gqa=True)
    for mask, kernel in (("none", "tensor cores"), ("float64", "portable, because of a mask of float64")):
        table = plan.Table(np.zeros((OPERANDS, 32), np.int64), np.tile([0, 1], (OPERANDS, 1)), np.zeros(0))
        chosen = choice.choose_forward(choice.Facts("float16", mask, problem, table, (0,) * 4, (8, 0)))
        if query[-1] == 8:
            assert chosen.why.startswith(kernel)
        assert f"; keys are not split, as {why}" in chosen.why
    assert decoding.work_for(problem, "float16", "none", False) is None


def test_it_is_said_which_kernels_calls_get() -> None:
    assert choice.said((8, 0)) == (
        "keys split over blocks where up to 16 queries share them, tensor cores for float16 and bfloat16 of head sizes "
        "up to 128, portable for all else"
    )
    assert choice.said((7, 5)) == (
        "keys split over blocks where up to 16 queries share them, portable for all else, as tensor cores are used "
        "from compute capability 8.0 on"
    )


@pytest.mark.parametrize("storage", STORAGES)
def test_specifications_fit_a_block(storage: str) -> None:
    """48 KB of shared memory, a thread for each row, a column for each feature."""
    for rows in (1, 2, 5, 16):
        for keys in (1, 2048, 5000, 10**6):
            for features in (0, 1, 64, 80, 128, 256):
                spec = decoding.decode_for(storage, "none", False, True, rows, keys, features)
                assert spec is not None
                assert spec.columns >= features
                assert spec.threads % spec.lanes == 0
                assert spec.shared_bytes <= 48 << 10
    assert decoding.decode_for(storage, "none", False, True, 1, 1, 257) is None
