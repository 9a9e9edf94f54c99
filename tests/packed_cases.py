"""Packed sequences for tests, each of them alone, and all of them padded."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Lengths of queries and keys that fill vectors and blocks, leave something over, or are 0.
LENGTHS = ((5, 5), (1, 40), (0, 3), (70, 33), (4, 0), (0, 0), (130, 200), (5, 5), (16, 16))


def starts(lengths: Any) -> Any:
    """Return cumulative lengths."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def packed(
    lengths: Any = LENGTHS,
    heads: tuple[int, int] = (4, 2),
    dtype: Any = np.float32,
    features: tuple[int, int] = (16, 8),
) -> tuple[Any, ...]:
    """Return query, key, value and the cumulative lengths of queries and keys."""
    rng = np.random.default_rng(len(lengths))
    queries, keys = np.array(lengths).reshape(-1, 2).T
    shapes = (
        (sum(queries), heads[0], features[0]),
        (sum(keys), heads[1], features[0]),
        (sum(keys), heads[1], features[1]),
    )
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    return *arrays, starts(queries), starts(keys)


def row_of(options: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the options of a sequence alone."""
    by_row = {"query_offset": 1, "alibi_slopes": 2, "sinks": 2}
    return {
        name: given[min(number, len(given) - 1)] if name in by_row and np.ndim(given) == by_row[name] else given
        for name, given in options.items()
    }


def alone(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, **options: Any) -> list[tuple[Any, ...]]:
    """Return query, key, value and options of each sequence, as a call of `attention`."""
    return [
        (*(array[part].swapaxes(0, 1) for array, part in ((query, q), (key, k), (value, k))), row_of(options, number))
        for number, (q, k) in enumerate(
            zip(map(slice, cu_q[:-1], cu_q[1:]), map(slice, cu_k[:-1], cu_k[1:]), strict=True)
        )
    ]


def together(parts: list[Any]) -> Any:
    """Return results of sequences, packed."""
    return np.concatenate([part.swapaxes(0, 1) for part in parts])


def padded(arrays: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """Return query, key and value as rows of a batch, and the lengths of the keys."""
    rows = []
    for array, cu in zip(arrays[:3], (arrays[3], *arrays[4:] * 2), strict=True):
        lengths = np.diff(cu)
        batch = np.full((len(lengths), array.shape[1], max(lengths), array.shape[2]), np.nan, array.dtype)
        for row, (start, length) in enumerate(zip(cu, lengths, strict=False)):
            batch[row, :, :length] = array[start : start + length].swapaxes(0, 1)
        rows.append(batch)
    return rows, np.diff(arrays[4])
