"""Calls, right and wrong, and the types of what right ones return: for type checkers, and to be run (test_types.py).

A line that ends in `# wrong` is one that type checkers refuse. All others pass, and what `assert_type` says of them is
so when they are run.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn import reference
from fastattn.layers.backward import Saved

if sys.version_info >= (3, 11):
    from typing import assert_type
else:
    from typing_extensions import assert_type

Halves = NDArray[np.float16]
Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]

rng = np.random.default_rng(0)
flag: bool = bool(rng.integers(1, 2))  # nothing is known of it but that it is one
x: Singles = rng.standard_normal((2, 4, 8), dtype=np.float32)
h: Halves = x.astype(np.float16)
d: Doubles = x.astype(np.float64)
i: Integers = np.ones((2, 4, 8), np.int64)
c: NDArray[Any] = x.astype(ml_dtypes.bfloat16)
u: NDArray[Any] = x
floating: NDArray[np.floating[Any]] = x
weight: Singles = x[0, 0]
keep: NDArray[np.bool_] = np.ones((4, 4), np.bool_)
lists: list[list[float]] = [[1.0, 2.0], [3.0, 4.0]]


def alibi(score: float, batch: int, head: int, query: int, key: int) -> float:
    return score - abs(query - key) * 0.5


def near(batch: int, head: int, query: int, key: int) -> bool:
    return query - key < 2


def attention() -> None:
    assert_type(fastattn.attention(x, x, x), Singles)
    assert_type(fastattn.attention(h, h, h), Halves)
    assert_type(fastattn.attention(d, d, d, None, 0.0, True, 0.5, False), Doubles)
    assert_type(fastattn.attention(x, x, x, return_lse=True)[0], Singles)
    assert_type(fastattn.attention(x, x, x, return_lse=True), tuple[Singles, NDArray[Any]])
    assert_type(fastattn.attention(h, h, h, return_weights=True), tuple[Halves, Halves])
    assert_type(fastattn.attention(h, h, h, return_lse=False), Halves)
    assert_type(
        fastattn.attention(d, d, d, return_lse=True, return_weights=True), tuple[Doubles, NDArray[Any], Doubles]
    )
    assert_type(fastattn.attention(x, x, x, return_lse=flag), Singles | tuple[NDArray[Any], ...])
    assert_type(fastattn.attention(x, x, x, out=x.copy()), Singles)
    out, lse = fastattn.attention(x, x, x, is_causal="bottom-right", return_lse=True)
    assert_type(out, Singles)
    assert_type(lse, NDArray[Any])


def attention_of_what_is_not_known() -> None:
    assert_type(fastattn.attention(u, u, u), NDArray[Any])
    assert_type(fastattn.attention(u, u, u, return_lse=True), tuple[NDArray[Any], NDArray[Any]])
    assert_type(fastattn.attention(u, u, u, return_weights=True), tuple[NDArray[Any], NDArray[Any]])
    assert_type(fastattn.attention(c, c, c), NDArray[Any])
    fastattn.attention(i, i, i)  # of float64, which types do not say
    assert_type(fastattn.attention(lists, lists, [[1], [2]]), NDArray[Any])
    assert_type(fastattn.attention(((1, 2), (3, 4)), [[True, False]], [[np.float32(1)]]), NDArray[Any])
    assert_type(fastattn.attention(floating, floating, floating), NDArray[np.floating[Any]])
    fastattn.attention(x.astype(ml_dtypes.bfloat16), c, c)
    mixed: NDArray[np.generic] = fastattn.attention(x, d, h)
    assert mixed.dtype == np.float64
    anything: Any = x
    fastattn.attention(anything, anything, anything, return_lse=True)


def options() -> None:
    made = fastattn.BlockMask.from_function(near, 4, 4) & fastattn.BlockMask.from_array(keep)
    assert_type(made, fastattn.BlockMask)
    assert_type(made.dense(), NDArray[np.bool_])
    assert_type(fastattn.attention(x, x, x, score_mod=alibi, mask_mod=near, block_mask=made), Singles)
    assert_type(fastattn.attention(x, x, x, keep, window=(2, None), softcap=5, scale=np.float32(0.5)), Singles)
    assert_type(fastattn.attention(x, x, x, (None, keep), alibi_slopes=[1.0, 2], sinks=np.zeros(2)), Singles)
    assert_type(fastattn.attention(x, x, x, dropout_p=0.5, rng=np.random.default_rng(0)), Singles)
    assert_type(fastattn.attention(x, x, x, query_offset=np.int64(3), is_causal=True, backend="cpu"), Singles)
    assert_type(fastattn.attention(x[None], x[None], x[None], key_lengths=[3], backend="reference"), Singles)
    assert_type(fastattn.attention(x[None], x[None], x[None], key_lengths=np.array([3])), Singles)


def wrong_options() -> None:
    fastattn.attention("a", x, x)  # wrong
    fastattn.attention(x, "a", x)  # wrong
    fastattn.attention(["a"], x, x)  # wrong
    fastattn.attention(b"a", x, x)  # wrong
    fastattn.attention(1.5, x, x)  # wrong
    fastattn.attention({1: 2.0}, x, x)  # wrong
    fastattn.attention([[1j]], x, x)  # wrong
    fastattn.attention(x, x)  # wrong
    fastattn.attention(x, x, x, is_causal="bottom-left")  # wrong
    fastattn.attention(x, x, x, is_causal=None)  # wrong
    fastattn.attention(x, x, x, causal=True)  # wrong
    fastattn.attention(x, x, x, backend="gpu")  # wrong
    fastattn.attention(x, x, x, "mask")  # wrong
    fastattn.attention(x, x, x, scale="0.5")  # wrong
    fastattn.attention(x, x, x, window=3)  # wrong
    fastattn.attention(x, x, x, window=(1.5, 0))  # wrong
    fastattn.attention(x, x, x, key_lengths=[3.5])  # wrong
    fastattn.attention(x, x, x, key_lengths=np.zeros(2))  # wrong
    fastattn.attention(x, x, x, alibi_slopes="steep")  # wrong
    fastattn.attention(x, x, x, score_mod=near)  # wrong
    fastattn.attention(x, x, x, mask_mod=alibi)  # wrong
    fastattn.attention(x, x, x, block_mask=keep)  # wrong
    fastattn.attention(x, x, x, return_lse=1)  # wrong
    fastattn.attention(x, x, x, rng="seed")  # wrong
    fastattn.attention(x, x, x, out=lists)  # wrong
    fastattn.attention(x, x, x).no_such_method()  # wrong
    _, _, _ = fastattn.attention(x, x, x, return_lse=True)  # wrong
    assert_type(fastattn.attention(d, d, d), Singles)  # wrong


def additive_attention() -> None:
    assert_type(fastattn.additive_attention(x, x, x, weight), Singles)
    assert_type(fastattn.additive_attention(x, x, x, weight, return_lse=True), tuple[Singles, NDArray[Any]])
    assert_type(fastattn.additive_attention(x, x, x, weight, return_weights=True), tuple[Singles, Singles])
    assert_type(fastattn.additive_attention(x, x, x, weight, return_lse=flag), Singles | tuple[NDArray[Any], ...])
    assert_type(fastattn.additive_attention(d, d, d, np.ones(8), is_causal="bottom-right", backend="cpu"), Doubles)
    assert_type(fastattn.additive_attention(u, u, u, u.ravel()[:8], return_lse=True), tuple[NDArray[Any], NDArray[Any]])
    fastattn.additive_attention(x, x, x, "weight")  # wrong
    fastattn.additive_attention(x, x, x, weight, backend="cuda")  # wrong
    fastattn.additive_attention(x, x, x, weight, dropout_p=0.5)  # wrong


def gradients() -> None:
    out, lse = fastattn.attention(h, x, d, return_lse=True)
    given = fastattn.attention_backward(d, h, x, d, out, lse)
    assert_type(given, tuple[Halves, Singles, Doubles])
    with_mask = fastattn.attention_backward(d, h, x, d, out, lse, np.zeros((4, 4)), grad_mask=True)
    assert_type(with_mask, tuple[Halves, Singles, Doubles, NDArray[Any]])
    assert_type(fastattn.attention_backward(u, u, u, u, u, u[..., 0]), tuple[NDArray[Any], NDArray[Any], NDArray[Any]])
    (grad_key,) = fastattn.attention_backward(d, h, x, d, out, lse, grads=("key",))
    assert_type(grad_key, NDArray[Any])
    fastattn.attention_backward(d, h, x, d, out, lse, grads="key")  # wrong
    fastattn.attention_backward(d, h, x, d, out, "lse")  # wrong
    _, _ = fastattn.attention_backward(d, h, x, d, out, lse)  # wrong

    out, lse = fastattn.additive_attention(x, x, x, weight, return_lse=True)
    of_weight = fastattn.additive_attention_backward(x, x, x, x, weight, out, lse)
    assert_type(of_weight, tuple[Singles, Singles, Singles, Singles])
    named = fastattn.additive_attention_backward(x, x, x, x, weight, out, lse, grads=["weight", "query"])
    assert_type(named, tuple[NDArray[Any], ...])


def packed() -> None:
    ends = [0, 1, 2]
    assert_type(fastattn.attention_varlen(x, x, x, np.array(ends)), Singles)
    assert_type(fastattn.attention_varlen(x, x, x, ends, return_lse=True), tuple[Singles, NDArray[Any]])
    assert_type(fastattn.attention_varlen(h, h, h, ends, return_lse=flag), Halves | tuple[Halves, NDArray[Any]])
    out, lse = fastattn.attention_varlen(x, x, x, ends, ends, is_causal="bottom-right", return_lse=True)
    assert_type(fastattn.attention_varlen_backward(x, x, x, x, out, lse, ends), tuple[Singles, Singles, Singles])
    of_query = fastattn.attention_varlen_backward(x, x, x, x, out, lse, ends, grads=("query",))
    assert_type(of_query, tuple[NDArray[Any], ...])
    fastattn.attention_varlen(x, x, x, [0.5, 1])  # wrong
    fastattn.attention_varlen(x, x, x, ends, key_lengths=[1, 1])  # wrong
    fastattn.attention_varlen(x, x, x, ends, return_weights=True)  # wrong


def pages() -> None:
    pages = rng.standard_normal((3, 2, 4, 8), dtype=np.float32)
    query: Singles = pages[:1]
    assert_type(fastattn.attention_paged(query, pages, pages, [[2, 0]], [3]), Singles)
    lengths = np.array([3])
    assert_type(
        fastattn.attention_paged(query, pages, pages, [[2, 0]], lengths, return_lse=True), tuple[Singles, NDArray[Any]]
    )
    packed: Singles = query[0]
    assert_type(fastattn.attention_paged(packed, pages, pages, [[2, 0]], lengths, [0, 2]), Singles)
    fastattn.attention_paged(query, pages, pages, "table", lengths)  # wrong
    fastattn.attention_paged(query, pages, pages, [[2, 0]], lengths, enable_gqa=True)  # wrong


def blocks() -> None:
    pieces = ((x[:, begin : begin + 2], x[:, begin : begin + 2]) for begin in (0, 2))
    assert_type(fastattn.attention_blocks(x, pieces), Singles)
    assert_type(fastattn.attention_blocks(x, (x, x), return_lse=True), tuple[Singles, NDArray[Any]])
    progress: list[int] = []
    fastattn.attention_blocks(x, (x, x), is_causal="bottom-right", progress=lambda done, keys: progress.append(done))
    fastattn.attention_blocks(x, x, block_size="big")  # wrong

    first = fastattn.attention(x, x[:, :2], x[:, :2], return_lse=True)
    second = fastattn.attention(x, x[:, 2:], x[:, 2:], return_lse=True)
    assert_type(fastattn.merge([first[0], second[0]], [first[1], second[1]]), tuple[NDArray[Any], NDArray[Any]])
    assert_type(fastattn.merge([h], [np.zeros((2, 4))]), tuple[NDArray[Any], NDArray[Any]])
    fastattn.merge([first[0]])  # wrong


def cache() -> None:
    cache = fastattn.KVCache(1, 2, 8, dtype=("int8", np.dtype(np.float16)), window=(3, 0))
    assert_type(cache.append(x[None], d[None], lengths=[4]), None)
    assert_type(cache.lengths, Integers)
    assert_type(cache.attention(x[None]), Singles)
    assert_type(cache.attention(h[None], return_lse=True), tuple[Halves, NDArray[Any]])
    assert_type(cache.attention(h[None], return_weights=True), tuple[Halves, Halves])
    assert_type(cache.attention(x[None], return_weights=flag), Singles | tuple[NDArray[Any], ...])
    assert_type(cache.attention(u[None], return_lse=True), tuple[NDArray[Any], NDArray[Any]])
    cache.truncate(np.array([4]))
    cache.select([0, 0])
    fastattn.KVCache(1, 2, 8, dtype="int4")  # wrong
    cache.append(x[None], "value")  # wrong
    cache.attention(x[None], is_causal="top-left")  # wrong
    cache.attention(x[None], key_lengths=[3])  # wrong
    cache.truncate([1.5])  # wrong


def weights() -> None:
    assert_type(fastattn.attention_weights(x, x), Singles)
    assert_type(fastattn.attention_weights(d, d, rows=[1, 2], columns=slice(2), is_causal=True), Doubles)
    assert_type(fastattn.attention_weights(u, u), NDArray[Any])
    summary = fastattn.attention_summary(x, x, top_k=2)
    assert_type(summary, fastattn.AttentionSummary)
    assert_type(summary.top_indices, Integers)
    fastattn.attention_weights(x, x, rows="all")  # wrong
    fastattn.attention_summary(x, x, top_k=2.5)  # wrong


def layers() -> None:
    layer = fastattn.MultiHeadAttention(8, 2, rng=0)
    assert_type(layer(x), NDArray[Any])
    assert_type(layer(x, x, return_weights=True), tuple[NDArray[Any], NDArray[Any]])
    out, saved = layer(x, is_causal=True, return_saved=True)
    assert_type(saved, Saved)
    assert_type(layer(x, return_weights=True, return_saved=True), tuple[NDArray[Any], NDArray[Any], Saved])
    assert_type(layer(x, return_weights=flag), NDArray[Any] | tuple[Any, ...])
    assert_type(layer.backward(out, saved), tuple[tuple[NDArray[Any], ...], dict[str, NDArray[Any]]])
    _, gradients, (grad_sinks,) = layer.backward(out, (x,), is_causal=True, sinks=np.zeros(2), grads=("sinks",))
    assert_type(gradients["in_proj_weight"], NDArray[Any])
    assert_type(grad_sinks, NDArray[Any])
    assert_type(layer.state_dict(), dict[str, NDArray[Any]])
    fastattn.MultiHeadAttention(8, heads=2)  # wrong
    layer("x")  # wrong
    layer(x, is_causal="bottom-left")  # wrong
    layer(x, window=3)  # wrong

    bahdanau = fastattn.BahdanauAttention(8, 8, 5, rng=0, dtype="float64")
    assert_type(bahdanau(x, x), NDArray[Any])
    assert_type(bahdanau(x, x, projected_keys=bahdanau.project_keys(x), return_saved=True), tuple[NDArray[Any], Saved])
    bahdanau(x)  # wrong

    luong = fastattn.LuongAttention(8, 8, "dot", "local-m", rng=0)
    assert_type(luong(x, x, return_weights=True), tuple[NDArray[Any], NDArray[Any]])
    (grad_query, _), _ = luong.backward(luong(x, x), (x, x))
    assert_type(grad_query, NDArray[Any])
    fastattn.LuongAttention(8, 8, "cosine")  # wrong


def positions() -> None:
    assert_type(fastattn.rotary(h, np.arange(4)), Halves)
    assert_type(fastattn.rotary(x, angles=(np.ones((4, 4)), np.zeros((4, 4)))), Singles)
    assert_type(fastattn.sinusoidal_positions(3, 4), Doubles)
    assert_type(fastattn.sinusoidal_positions(3, 4, dtype=np.float32), Singles)
    assert_type(fastattn.sinusoidal_positions(3, 4, dtype="float32"), NDArray[Any])
    fastattn.rotary("x", [0])  # wrong
    fastattn.sinusoidal_positions(3.5, 4)  # wrong


def process() -> None:
    before = fastattn.get_num_threads()
    assert_type(before, int)
    with fastattn.num_threads(1):
        fastattn.set_num_threads(before)
    if TYPE_CHECKING:  # it takes a while
        fastattn.warmup(progress=lambda done, total, label: print(done, total, label), dtypes=["float16"])
    fastattn.warmup(dtypes=["float8"])  # wrong
    fastattn.set_num_threads("all")  # wrong


def references() -> None:
    assert_type(reference.attention(x, x, x, is_causal="bottom-right"), Singles)
    assert_type(reference.attention(x, x, x, return_lse=True), tuple[Singles, NDArray[Any]])
    assert_type(reference.attention(x, x, x, return_weights=True), tuple[Singles, Singles])
    assert_type(reference.additive_attention(x, x, x, weight), Singles)
    assert_type(reference.attention_weights(d, d), Doubles)
    assert_type(reference.attention_summary(x, x), fastattn.AttentionSummary)
    assert_type(reference.attention_varlen(x, x, x, [0, 2]), Singles)
    out, lse = reference.attention(x, x, x, return_lse=True)
    assert_type(reference.attention_backward(x, x, x, x, out, lse), tuple[Singles, Singles, Singles])
    assert_type(reference.merge([out], [lse]), tuple[NDArray[Any], NDArray[Any]])
    reference.attention("a", x, x)  # wrong
    reference.attention(x, x, x, is_causal="bottom-left")  # wrong
    reference.attention(x, x, x, backend="cpu")  # wrong
