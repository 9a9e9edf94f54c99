"""Pieces of a call, cut along every axis: what they give together is what the whole gives."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import tolerances

import fastattn
from fastattn.api.pieces import First, attend, differentiate

HEADS, KV_HEADS, QUERIES, KEYS = 4, 2, 40, 90
CUTS = [(0, 1, 2), (0, 1, 2), (0, 13, 40), (0, 30, 51, 90)]  # of rows, heads of keys, queries, keys
Array = np.ndarray[Any, Any]


def inputs(dtype: Any) -> list[Array]:
    """Return dO, query, key and value."""
    rng = np.random.default_rng(0)
    shapes = [(HEADS, QUERIES, 24), (HEADS, QUERIES, 16), (KV_HEADS, KEYS, 16), (KV_HEADS, KEYS, 24)]
    return [rng.standard_normal((2, *shape)).astype(dtype) for shape in shapes]


def near(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score - abs(query - key) * (head + 1) * 0.01 + batch * 0.5


def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query * 3 + key + head) % 5 != batch


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "positions": {"window": (30, 8), "query_offset": np.array([20, 50]), "key_lengths": np.array([80, 45])},
    "causal": {"causal": True, "query_offset": 50, "softcap": 2.0},
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "functions": {"score_mod": near, "mask_mod": seen, "query_offset": 3},
    "slopes": {"alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4])},
}


def of_whole(options: dict[str, Any]) -> dict[str, Any]:
    """The options as `attention` takes them."""
    return {{"causal": "is_causal", "seed": "rng"}.get(name, name): given for name, given in options.items()}


def pieces() -> Any:
    """Where each piece is: slices of rows, heads, heads of keys, queries and keys, and the numbers of its first."""
    for ends in product(*map(pairwise, CUTS)):
        rows, kv_heads, queries, keys = (slice(*each) for each in ends)
        heads = slice(2 * kv_heads.start, 2 * kv_heads.stop)
        yield (rows, heads, kv_heads, queries, keys), First(rows.start, heads.start, queries.start, keys.start)


def cut(options: dict[str, Any], rows: slice, heads: slice) -> dict[str, Any]:
    """The options of a piece: the same, but for what rows and heads have of their own."""
    plain = {name: options[name] for name in ("causal", "dropout_p", "seed") if name in options}
    further = {name: given for name, given in options.items() if name not in plain}
    for name, place in (("query_offset", rows), ("key_lengths", rows), ("alibi_slopes", heads)):
        if isinstance(further.get(name), np.ndarray):
            further[name] = further[name][place]
    return {**plain, "options": further, "enable_gqa": True}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_pieces_make_the_whole(options: dict[str, Any], dtype: Any) -> None:
    grad_out, query, key, value = inputs(dtype)
    told: dict[str, Any] = {"enable_gqa": True, **of_whole(options)}
    whole, wanted_lse = fastattn.attention(query, key, value, **told, return_lse=True)
    parts: dict[Any, list[Any]] = {}
    for (rows, heads, kv_heads, queries, keys), first in pieces():
        own = (query[rows, heads, queries], key[rows, kv_heads, keys], value[rows, kv_heads, keys])
        parts.setdefault((rows.start, heads.start, queries.start), []).append(
            ((rows, heads, queries), attend(*own, first=first, **cut(options, rows, heads)))
        )
    out, lse = np.empty(whole.shape, np.float32), np.empty(wanted_lse.shape, np.float32)
    for found in parts.values():
        place = found[0][0]
        out[place], lse[place] = fastattn.merge(*zip(*(part for _, part in found), strict=True))
    np.testing.assert_allclose(out, whole, atol=2e-3 if dtype == np.float16 else 2e-6)
    np.testing.assert_allclose(lse, wanted_lse, atol=2e-6)

    wanted = fastattn.attention_backward(grad_out, query, key, value, whole, wanted_lse, **told)
    sums = [np.zeros(array.shape, np.float32) for array in (query, key, value)]
    for (rows, heads, kv_heads, queries, keys), first in pieces():
        own = (query[rows, heads, queries], key[rows, kv_heads, keys], value[rows, kv_heads, keys])
        places = (rows, heads, queries), (rows, kv_heads, keys), (rows, kv_heads, keys)
        given = (grad_out[places[0]], *own, out[places[0]], lse[places[0]])
        found = differentiate(*given, first=first, **cut(options, rows, heads))
        for total, place, part in zip(sums, places, found, strict=True):
            assert part.dtype == np.float32
            total[place] += part
    for total, grad in zip(sums, wanted, strict=True):
        np.testing.assert_allclose(total, grad, atol=1e-2 if dtype == np.float16 else 2e-5)


def test_sums_of_pieces_are_those_of_the_reference() -> None:
    """Cut by keys alone, against tolerances that are derived."""
    _, query, key, value = inputs(np.float32)
    wanted = tolerances.expected(query, key, value, enable_gqa=True)
    found = [
        attend(query, key[..., a:b, :], value[..., a:b, :], enable_gqa=True, first=First(key=a), options={})
        for a, b in pairwise((0, 1, 40, 90))
    ]
    out, lse = fastattn.merge(*zip(*found, strict=True))
    tolerances.check_out(out, wanted)
    tolerances.check_lse(lse, wanted)
