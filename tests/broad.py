"""A few calls that reach every part of the kernels, for checks of one ISA: tails, masks, dropout, layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import tolerances

import fastattn


def cases(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments and the options of each call."""
    rng = np.random.default_rng(0)

    def arrays(heads: int, queries: int, keys: int, features: int, value_features: int) -> tuple[Any, ...]:
        shapes = (heads, queries, features), (heads, keys, features), (heads, keys, value_features)
        return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)

    long, short, odd = arrays(2, 150, 300, 40, 24), arrays(3, 3, 140, 16, 16), arrays(1, 67, 35, 7, 13)
    booleans = rng.random((150, 300)) < 0.6
    booleans[5] = False
    floats = np.where(booleans, rng.standard_normal((150, 300)), -np.inf)
    leaky = arrays(1, 40, 60, 8, 8)
    leaky[2][:, 30:33] = np.nan
    return [
        (long, {}),
        (long, {"is_causal": True, "scale": -0.7}),
        (long, {"is_causal": "bottom-right", "attn_mask": booleans}),
        (long, {"attn_mask": floats.astype(np.float32)}),
        (long, {"attn_mask": floats, "is_causal": True}),
        (long, {"attn_mask": floats[:, ::-1].astype(np.float16)}),
        (long, {"attn_mask": booleans[:, :1]}),
        (long, {"dropout_p": 0.4, "rng": 7}),
        (short, {"attn_mask": booleans[0, :140], "is_causal": "bottom-right"}),
        (short, {"attn_mask": floats[:3, :140]}),
        (odd, {"is_causal": True}),
        (odd, {"attn_mask": floats[:67, :35]}),
        (tuple(array[..., ::-1] for array in odd), {"dropout_p": 0.2, "rng": 1}),
        (tuple(100 * array for array in odd), {}),
        (leaky, {"attn_mask": np.arange(60) < 30}),
        (leaky, {"is_causal": True}),
    ]


def intervals(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the same of calls whose queries have intervals of keys, and of a pair of masks."""
    rng = np.random.default_rng(1)
    long, short = (
        tuple(rng.standard_normal((2, 1, length, 40)).astype(dtype) for length in lengths)
        for lengths in ((150, 300, 300), (3, 140, 140))
    )
    pair = rng.standard_normal((150, 300)).astype(np.float32), rng.random((150, 300)) < 0.6
    leaky = long[0], long[1], np.where(np.arange(300)[:, None] < 131, long[2], dtype(np.nan))
    return [
        (long, {"window": (50, 7), "query_offset": 20}),
        (long, {"window": (3, None), "attn_mask": pair}),
        (long, {"key_lengths": [131, 300], "is_causal": "bottom-right"}),
        (leaky, {"key_lengths": [131, 77], "window": (90, 0), "query_offset": [5, -30]}),
        (short, {"window": (30, 2), "query_offset": 100, "key_lengths": [99, 140]}),
    ]


def check(dtypes: tuple[Any, ...] = (np.float32, np.float64), threads: int = 2, of: Any = cases) -> int:
    """Assert that all calls are right; return how many there were."""
    count = 0
    with fastattn.num_threads(threads):
        for dtype in dtypes:
            for arrays, options in of(dtype):
                wanted = tolerances.expected(*arrays, **options)
                out, lse = fastattn.attention(*arrays, **options, return_lse=True)
                tolerances.check_out(out, wanted)
                tolerances.check_lse(lse, wanted)
                count += 1
    return count
