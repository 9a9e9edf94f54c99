"""`attention_weights` of chosen rows and columns: a function sees the positions of the whole call."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import reference

LENGTH = 90
RNG = np.random.default_rng(0)
QUERY, KEY = RNG.standard_normal((2, 2, 3, LENGTH, 8)).astype(np.float32)
TABLE = RNG.standard_normal((3, 3 * LENGTH)).astype(np.float32)


def added(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Depend on everything."""
    return score + TABLE[head, query + key] - abs(query - key) * 0.05 * batch


def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Hide some."""
    return (query + key) % 5 != batch


OPTIONS: tuple[dict[str, Any], ...] = (
    {"score_mod": added},
    {"mask_mod": seen},
    {"score_mod": added, "mask_mod": seen, "is_causal": True, "key_lengths": [LENGTH, LENGTH // 2]},
    {"score_mod": added, "window": (20, 3), "query_offset": np.array([4, 7]), "softcap": 5.0},
)
CHOICES: tuple[Any, ...] = (None, 3, slice(5, 60), slice(0, None, 7), [9, 3, 4, 5, -1], [], slice(80, 3, -9), [4, 4])


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options))
def test_chosen_rows_and_columns(options: dict[str, Any], with_lse: bool) -> None:
    whole = reference.attention_weights(QUERY, KEY, **options)
    lse = reference.attention_summary(QUERY, KEY, **options).lse if with_lse else None
    for rows in CHOICES:
        for columns in CHOICES:
            places = [
                np.arange(LENGTH)[slice(None) if chosen is None else np.atleast_1d(chosen).astype(int)]
                if not isinstance(chosen, slice)
                else np.arange(LENGTH)[chosen]
                for chosen in (rows, columns)
            ]
            found = fastattn.attention_weights(QUERY, KEY, **options, rows=rows, columns=columns, lse=lse)
            np.testing.assert_allclose(found, whole[..., places[0][:, None], places[1]], atol=3e-6)


def test_memory_is_that_of_the_part_asked_for() -> None:
    length = 3000
    query = RNG.standard_normal((1, length, 8)).astype(np.float32)

    def call() -> Any:
        return fastattn.attention_weights(query, query, rows=slice(0, None, 300), columns=[5, 900], score_mod=local)

    def local(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score - abs(query - key) * 0.01

    call()
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < length * length


def test_an_index_out_of_range_where_nothing_was_asked_for_means_nothing() -> None:
    table = np.zeros(40)

    def function(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[key]

    lse = np.zeros((2, 3, LENGTH), np.float32)
    fastattn.attention_weights(QUERY, KEY, score_mod=function, columns=[0, 39], lse=lse)
    with pytest.raises(IndexError, match="score_mod: .*function"):
        fastattn.attention_weights(QUERY, KEY, score_mod=function, columns=[0, 41], lse=lse)
