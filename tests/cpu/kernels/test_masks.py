"""Masks as they lie: whatever their dtype and layout, and beside whatever interval, the bits are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances
from numpy.typing import NDArray
from strategies import BFLOAT16

import fastattn

Array = NDArray[Any]

HEADS, QUERIES, KEYS = 2, 100, 170  # some tiles of queries and blocks of keys are whole, some are not
# query 64 looks at all but the last of the first 128 keys
INTERVALS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True, "query_offset": 62},
    {"is_causal": True, "window": (20, 0), "query_offset": 62},
    {"window": (40, 60)},
)
interval = pytest.mark.parametrize("options", INTERVALS, ids=["all", "causal", "causal window", "window"])
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16], ids=["float32", "float64", "bfloat16"])


def inputs(dtype: Any) -> list[Array]:
    rng = np.random.default_rng(0)
    sizes = (1, HEADS, QUERIES, 24), (1, HEADS, KEYS, 24), (1, HEADS, KEYS, 24)
    return [rng.standard_normal(size).astype(dtype) for size in sizes]


def layouts(mask: Array) -> list[Array]:
    """Return the same numbers with rows apart, that begin anywhere in a cache line, and with apart numbers of a row."""
    apart, askew, strided = (
        np.zeros((*mask.shape[:-1], size), mask.dtype) for size in (KEYS + 106, KEYS + 3, 2 * KEYS)
    )
    views = [apart[..., :KEYS], askew[..., 3:], strided[..., ::2]]
    for view in views:
        view[...] = mask
    return [mask, *views, np.asfortranarray(mask)]


@dtypes
@interval
def test_a_floating_mask_gives_the_same_bits_in_any_dtype_and_layout(dtype: Any, options: dict[str, Any]) -> None:
    arrays = inputs(dtype)
    mask = np.random.default_rng(1).integers(-64, 64, (HEADS, QUERIES, KEYS)) / 16  # numbers of all dtypes
    mask[:, 1::5, ::7] = -np.inf
    outs = [
        fastattn.attention(*arrays, layout, **options).tobytes()
        for kind in (np.float32, np.float64, np.float16, BFLOAT16)
        for layout in layouts(mask.astype(kind))
    ]
    assert len(set(outs)) == 1


@dtypes
@interval
def test_a_boolean_mask_gives_the_same_bits_in_any_layout(dtype: Any, options: dict[str, Any]) -> None:
    arrays = inputs(dtype)
    mask = np.random.default_rng(1).random((HEADS, QUERIES, KEYS)) < 0.8
    assert len({fastattn.attention(*arrays, layout, **options).tobytes() for layout in layouts(mask)}) == 1


@dtypes
@interval
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, bool])
def test_one_row_for_all_queries_gives_the_bits_of_as_many_rows(kind: Any, dtype: Any, options: dict[str, Any]) -> None:
    arrays, rng = inputs(dtype), np.random.default_rng(3)
    row = rng.random((HEADS, 1, KEYS)) < 0.8 if kind is bool else rng.standard_normal((HEADS, 1, KEYS)).astype(kind)
    if kind is not bool:
        row[..., ::7] = -np.inf
        row[..., 1] = np.finfo(kind).min
    rows = np.repeat(row, QUERIES, axis=1)
    outs = {
        fastattn.attention(*arrays, mask, **options).tobytes() for mask in (row, rows, row[..., ::-1].copy()[..., ::-1])
    }
    assert len(outs) == 1


@interval
@pytest.mark.parametrize("slopes", [None, np.array([0.125, 0.5], np.float32)], ids=["", "slopes"])
@pytest.mark.parametrize("kinds", ["floating", "boolean", "both"])
def test_masks_and_intervals_meet_in_any_square(kinds: str, slopes: Array | None, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    query, key, value = inputs(np.float32)
    floating = rng.standard_normal((HEADS, QUERIES, KEYS), dtype=np.float32)
    boolean = rng.random((QUERIES, KEYS)) < 0.8
    mask = {"floating": floating, "boolean": boolean, "both": (floating, boolean)}[kinds]
    tolerances.check_call(fastattn.attention, query, key, value, mask, alibi_slopes=slopes, **options)
