"""JAX: the callback against JAX's own formula, under its transforms."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import tolerances

import fastattn

jax = pytest.importorskip("jax", reason="JAX is not installed")

from fastattn.integrations.jax import attention  # noqa: E402

GRADIENT = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}


def arrays(*shapes: tuple[int, ...], dtype: Any = np.float32) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def formula(query: Any, key: Any, value: Any, mask: Any = None, causal: bool = False, groups: int = 1) -> Any:
    """Attention as JAX computes it, of no empty row."""
    key, value = (jax.numpy.repeat(array, groups, axis=-3) for array in (key, value))
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    if mask is not None:
        scores = jax.numpy.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if causal:
        scores = jax.numpy.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    return jax.nn.softmax(scores, axis=-1) @ value


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
def test_output_and_gradients_under_jit(dtype: Any, mask: str | None, causal: bool) -> None:
    given: list[Any] = arrays((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 5), dtype=dtype)
    if mask == "bool":
        given.append(np.random.default_rng(1).random((2, 1, 1, 9)) < 0.7)
        given[-1][..., 0] = True
    elif mask == "float":
        given += arrays((1, 4, 9, 9), dtype=dtype)
    with jax.enable_x64(True):
        out = jax.jit(lambda *args: attention(*args, is_causal=causal, enable_gqa=True))(*given)
        wanted = tolerances.expected(*given, is_causal=causal, enable_gqa=True)
        tolerances.check_out(np.asarray(out), wanted)

        argnums = (0, 1, 2, 3) if mask == "float" else (0, 1, 2)
        padded = [*given, None][:4]

        def ours(*args: Any) -> Any:
            return jax.numpy.sin(attention(*args, causal, None, True)).sum()

        def theirs(*args: Any) -> Any:
            return jax.numpy.sin(formula(*args, causal, 2)).sum()

        exact = [a.astype(np.float64) if a is not None and a.dtype.kind == "f" else a for a in padded]
        found = jax.jit(jax.grad(ours, argnums))(*padded)
        for mine, their in zip(found, jax.grad(theirs, argnums)(*exact), strict=True):
            bound = GRADIENT[np.dtype(dtype)] * max(1.0, float(abs(their).max()))
            assert mine.dtype == dtype
            assert float(abs(np.asarray(mine, np.float64) - their).max()) <= bound


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    query, key, value, mask = (
        jax.numpy.asarray(array, dtype) for array in arrays((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 5), (4, 9, 9))
    )
    call = partial(attention, enable_gqa=True, return_lse=True)
    out, lse = jax.jit(call)(query, key, value, mask)
    given = [np.asarray(array) for array in (query, key, value, mask)]
    wanted = tolerances.expected(*given, enable_gqa=True)
    tolerances.check_out(np.asarray(out), wanted)
    tolerances.check_lse(np.asarray(lse), wanted)

    def loss(*args: Any) -> Any:
        out, lse = call(*args)
        return out.astype(np.float32).sum() + lse.sum()

    found = [np.asarray(each) for each in jax.jit(jax.grad(loss, (0, 1, 2, 3)))(query, key, value, mask)]
    ones = np.ones(out.shape, np.float32), np.ones(lse.shape, np.float32)
    exact = tolerances.expected_gradients(ones[0], *given, grad_lse=ones[1], enable_gqa=True)
    tolerances.check_gradients(tuple(found), tuple(given), *exact)


def test_gradients_of_each_sample_by_vmap() -> None:
    query, key, value = arrays((3, 2, 5, 8), (2, 6, 8), (3, 2, 6, 8))

    def loss(attend: Any) -> Any:
        return jax.vmap(jax.grad(lambda *args: jax.numpy.sin(attend(*args)).sum(), (0, 1, 2)), (0, None, 0))

    for mine, their in zip(loss(attention)(query, key, value), loss(formula)(query, key, value), strict=True):
        assert mine.shape == their.shape
        np.testing.assert_allclose(mine, their, rtol=0, atol=1e-5)


def test_large_arrays_arrive() -> None:
    """Some JAX versions wait for themselves where a callback asks for a large array."""
    query, key, value = arrays((1, 4, 1024, 64), (1, 4, 1024, 64), (1, 4, 1024, 64))
    out = jax.jit(attention)(query * 2, key + 0, value)
    np.testing.assert_array_equal(out, fastattn.attention(query * 2, key, value))


def test_what_is_refused_is_refused_while_tracing() -> None:
    query, key, value = arrays((2, 5, 8), (2, 6, 8), (2, 6, 8))
    with pytest.raises(
        TypeError, match="query: dtype float8_e5m2; expected one of float16, bfloat16, float32, float64"
    ):
        attention(*(jax.numpy.asarray(array, jax.numpy.float8_e5m2) for array in (query, key, value)))
    with pytest.raises(TypeError, match="value: dtype int32; expected one of .*, the same"):
        attention(query, key, np.ones((2, 6, 8), np.int32))
    with pytest.raises(ValueError, match="key: shape"):
        jax.jit(attention)(query, key[..., 1:], value)
    with pytest.raises(ValueError, match="is_causal: 'top'"):
        attention(query, key, value, None, "top")


@pytest.mark.parametrize("place", range(4))
def test_what_is_no_array_is_refused_by_name(place: int) -> None:
    """JAX takes a sparse array, or a list, for a tree of arrays."""
    from jax.experimental import sparse

    given: list[Any] = [*arrays((2, 5, 8), (2, 6, 8), (2, 6, 8)), None]
    name = ("query", "key", "value", "attn_mask")[place]
    for other, kind in ((sparse.BCOO.fromdense(given[0]), "BCOO"), (given[0].tolist(), "list")):
        given[place] = other
        for attend in (attention, jax.jit(attention)):
            with pytest.raises(TypeError, match=f"{name}: {kind}; expected a jax.Array"):
                attend(*given)


RANKS: dict[str, tuple[tuple[int, ...], ...]] = {
    "key and value of rank 5": ((2, 3, 5, 8), (4, 1, 3, 7, 8), (4, 1, 3, 7, 8)),
    "query of rank 2": ((5, 8), (2, 3, 7, 8), (3, 7, 6)),
    "mask of rank 0": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), ()),
    "mask of rank 1": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (7,)),
}


@pytest.mark.parametrize("name", RANKS)
def test_arrays_of_any_ranks_broadcast(name: str) -> None:
    given = [np.asarray(array) for array in arrays(*RANKS[name])]
    for attend in (attention, jax.jit(attention)):
        np.testing.assert_array_equal(attend(*given), fastattn.attention(*given))
    gradients = jax.grad(lambda *args: attention(*args).sum(), tuple(range(len(given))))(*given)
    assert [gradient.shape for gradient in gradients] == [*RANKS[name]]


# -- windows, offsets, lengths, softcaps and pairs of masks ------------------------------------------------------------

CALLS: dict[str, dict[str, Any]] = {
    "window": {"window": (3, 1)},
    "sliding window": {"window": [4, None], "query_offset": 2, "is_causal": True},
    "offsets": {"query_offset": np.array([2, -3]), "is_causal": True},
    "lengths": {"key_lengths": np.array([4, 9], np.int32)},
    "lengths, bottom-right": {"key_lengths": np.array([8, 3]), "is_causal": "bottom-right"},
    "softcap": {"softcap": 0.7},
    "slopes": {"alibi_slopes": np.array([0.5, 0.25, 0.0, -0.1]), "query_offset": np.array([2, -3]), "is_causal": True},
    "sinks": {"sinks": np.array([0.5, -2.0, 0.0, 3.0]), "key_lengths": np.array([0, 9])},
    "all": {"softcap": 0.5, "window": (2, 2), "query_offset": np.array([0, 4]), "key_lengths": np.array([9, 6])},
}
QUERIES, KEYS = 7, 9


def by_hand(query: Any, key: Any, value: Any, mask: Any = None, **options: Any) -> tuple[Any, Any]:
    """Return attention as JAX computes it and its log-sum-exp; a query that sees nothing gives 0."""
    bias, keep = mask if isinstance(mask, tuple) else (mask, None)
    key, value = (jax.numpy.repeat(array, query.shape[-3] // key.shape[-3], axis=-3) for array in (key, value))
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    if "softcap" in options:
        scores = options["softcap"] * jax.numpy.tanh(scores / options["softcap"])
    scores = scores if bias is None else scores + bias
    causal, lengths = options.get("is_causal", False), options.get("key_lengths", np.full(2, KEYS))
    offset = lengths - QUERIES if causal == "bottom-right" else np.broadcast_to(options.get("query_offset", 0), 2)
    position = np.arange(QUERIES)[:, None] + offset[:, None, None, None]
    slopes = np.reshape(options.get("alibi_slopes", 0.0), (-1, 1, 1))
    scores = scores - slopes * np.abs(position - np.arange(KEYS))
    left, right = (KEYS * 2 if end is None else end for end in options.get("window", (None, None)))
    seen = np.arange(KEYS) < lengths[:, None, None, None]
    seen = seen & (np.arange(KEYS) >= position - left) & (np.arange(KEYS) <= position + (0 if causal else right))
    seen = seen if keep is None else seen & keep
    empty = ~seen.any(-1, keepdims=True)
    if "sinks" in options:
        column = jax.numpy.broadcast_to(jax.numpy.reshape(options["sinks"], (-1, 1, 1)), (*scores.shape[:-1], 1))
        scores = jax.numpy.concatenate([jax.numpy.where(seen, scores, -np.inf), column], -1)
        return jax.nn.softmax(scores, axis=-1)[..., :-1] @ value, jax.nn.logsumexp(scores, axis=-1)
    scores = jax.numpy.where(seen | empty, scores, -np.inf)
    out = jax.numpy.where(empty, 0, jax.nn.softmax(scores, axis=-1) @ value)
    return out, jax.numpy.where(empty[..., 0], -np.inf, jax.nn.logsumexp(scores, axis=-1))


def sums(results: tuple[Any, Any]) -> Any:
    """Return a number that depends on all results, on a log-sum-exp of -inf not."""
    out, lse = results
    return jax.numpy.sin(out).sum() + jax.numpy.cos(jax.numpy.where(lse == -np.inf, 0.0, lse)).sum()


@pytest.mark.parametrize("masks", ["none", "bias", "both"])
@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_by_hand(name: str, masks: str) -> None:
    tensors = arrays((2, 4, QUERIES, 8), (2, 2, KEYS, 8), (2, 2, KEYS, 5), dtype=np.float64)
    (bias,), keep = (
        arrays((1, 4, QUERIES, KEYS), dtype=np.float64),
        np.random.default_rng(1).random((2, 1, 1, KEYS)) < 0.7,
    )
    with jax.enable_x64(True):

        def ours(*given: Any) -> Any:
            mask = {"none": None, "bias": given[3], "both": (given[3], keep)}[masks]
            return attention(*given[:3], mask, enable_gqa=True, return_lse=True, **CALLS[name])

        def theirs(*given: Any) -> Any:
            mask = {"none": None, "bias": given[3], "both": (given[3], keep)}[masks]
            return by_hand(*given[:3], mask, **CALLS[name])

        given = (*tensors, bias)
        found, wanted = jax.jit(ours)(*given), theirs(*given)
        gradients = [jax.jit(jax.grad(lambda *g: sums(of(*g)), (0, 1, 2, 3)))(*given) for of in (ours, theirs)]  # noqa: B023
        for mine, their in zip((*found, *gradients[0]), (*wanted, *gradients[1]), strict=True):
            np.testing.assert_allclose(mine, their, rtol=0, atol=1e-11)


def test_offsets_and_lengths_may_be_traced_and_mapped_over() -> None:
    query, key, value = arrays((2, 4, QUERIES, 8), (2, 4, KEYS, 8), (2, 4, KEYS, 5))
    offsets, lengths = np.array([2, -3]), np.array([9, 5])

    def attend(query: Any, key: Any, value: Any, offset: Any, length: Any) -> Any:
        return attention(query, key, value, window=(3, 0), query_offset=offset, key_lengths=length)

    wanted = attend(query, key, value, offsets, lengths)
    for way in (jax.jit(attend), jax.vmap(attend)):
        np.testing.assert_array_equal(way(query, key, value, offsets, lengths), wanted)
    grad = jax.grad(lambda *given: jax.numpy.sin(attend(*given)).sum(), (0, 1, 2))
    for mine, their in zip(
        jax.jit(grad)(query, key, value, offsets, lengths), grad(query, key, value, offsets, lengths), strict=True
    ):
        np.testing.assert_array_equal(mine, their)
    same = attention(query, key, value, window=(3, 0), query_offset=np.int64(1))
    np.testing.assert_array_equal(jax.jit(attend)(query, key, value, 1, np.full(2, KEYS)), same)


def test_the_log_sum_exp_is_returned() -> None:
    query, key, value = arrays((2, 5, 8), (2, 6, 8), (2, 6, 8))
    out, lse = attention(query, key, value, return_lse=True)
    np.testing.assert_array_equal(out, attention(query, key, value))
    np.testing.assert_array_equal(lse, fastattn.attention(query, key, value, return_lse=True)[1])


def test_gradients_of_slopes_and_sinks() -> None:
    query, key, value = arrays((2, 4, QUERIES, 8), (2, 4, KEYS, 8), (2, 4, KEYS, 5), dtype=np.float64)
    given = np.array([0.5, 0.25, 0.0, 1.0]), np.array([0.5, -2.0, 0.0, 3.0])
    with jax.enable_x64(True):

        def loss(function: Any, slopes: Any, sinks: Any) -> Any:
            options = {"alibi_slopes": slopes, "sinks": sinks, "softcap": 2.0, "is_causal": True}
            return sums(function(query, key, value, **options))

        ours = jax.jit(jax.grad(partial(loss, partial(attention, return_lse=True)), (0, 1)))(*given)
        for mine, their in zip(ours, jax.grad(partial(loss, by_hand), (0, 1))(*given), strict=True):
            np.testing.assert_allclose(mine, their, rtol=0, atol=1e-11)


def test_a_gradient_may_be_stopped() -> None:
    query, key, value = arrays((2, 4, QUERIES, 8), (2, 4, KEYS, 8), (2, 4, KEYS, 5))

    def loss(slopes: Any) -> Any:
        return attention(query, key, value, alibi_slopes=jax.lax.stop_gradient(slopes)).sum()

    assert not jax.grad(loss)(jax.numpy.array([0.5, 0.25, 0.0, 1.0])).any()


TABLE = np.random.default_rng(2).standard_normal((4, QUERIES + KEYS)).astype(np.float32)


def biased(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return jax.numpy.where(query >= key, jax.numpy.tanh(score) + TABLE[head, query - key], 0.5 * score)


def near(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return jax.numpy.logical_or(np.abs(query - key) < 3, key == batch)


def test_functions_of_scores_written_with_either_numpy() -> None:
    query, key, value = arrays((2, 4, QUERIES, 8), (2, 4, KEYS, 8), (2, 4, KEYS, 5))
    options: Any = {"score_mod": biased, "mask_mod": near}
    out, lse = jax.jit(lambda *given: attention(*given, return_lse=True, **options))(query, key, value)
    wanted = fastattn.attention(query, key, value, return_lse=True, **options)
    np.testing.assert_array_equal(out, wanted[0])
    np.testing.assert_array_equal(lse, wanted[1])

    def loss(*given: Any) -> Any:
        return attention(*given, **options).sum()

    by_hand = fastattn.attention_backward(np.ones_like(out), query, key, value, *wanted, **options)
    for way in (jax.grad(loss, (0, 1, 2)), jax.jit(jax.grad(loss, (0, 1, 2)))):
        for mine, their in zip(way(query, key, value), by_hand, strict=True):
            np.testing.assert_array_equal(mine, their)


def test_what_a_function_captures_is_read_when_a_call_runs() -> None:
    query, key, value = arrays((4, QUERIES, 8), (4, KEYS, 8), (4, KEYS, 5))
    table, slope = jax.numpy.asarray(TABLE), 0.5

    def modified(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[head, query - key] - slope * abs(query - key)

    attend = jax.jit(lambda *given: attention(*given, score_mod=modified))
    before = attend(query, key, value)
    np.testing.assert_array_equal(before, fastattn.attention(query, key, value, score_mod=modified))
    table, slope = table + 1.5 * jax.numpy.arange(QUERIES + KEYS), 0.25
    after = attend(query, key, value)
    np.testing.assert_array_equal(after, fastattn.attention(query, key, value, score_mod=modified))
    assert (after != before).any()


def test_each_call_of_vmap_counts_its_own_batch() -> None:
    given = arrays((2, 4, QUERIES, 8), (2, 4, KEYS, 8), (2, 4, KEYS, 5))

    def first(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score * (1 + batch)

    mapped = jax.vmap(lambda *given: attention(*given, score_mod=first))(*given)
    np.testing.assert_allclose(mapped, attention(*given), rtol=1e-4, atol=1e-6)


def with_table(table: Any, slope: Any) -> Any:
    """Return a function of scores that reads what it captures by several names."""

    def away(head: Any, distance: Any) -> Any:
        return slope * np.abs(distance) * table[head, 0]

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return jax.numpy.tanh(score) * table[head, query - key] - away(head, query - key)

    return score_mod


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("jit", [False, True])
def test_gradients_of_what_a_function_captures(jit: bool, dtype: Any) -> None:
    query, key, value = arrays((2, 4, QUERIES, 8), (2, 4, KEYS, 8), (2, 4, KEYS, 5), dtype=dtype)
    table, slope = TABLE.astype(dtype), np.asarray(0.25, dtype)

    def loss(query: Any, table: Any, slope: Any) -> Any:
        out, lse = attention(query, key, value, score_mod=with_table(table, slope), return_lse=True)
        return jax.numpy.sin(out).sum() + jax.numpy.cos(lse).sum()

    def by_hand(query: Any, table: Any, slope: Any) -> Any:
        away = np.arange(QUERIES)[:, None] - np.arange(KEYS)
        scores = jax.numpy.tanh(query @ key.swapaxes(-1, -2) / np.sqrt(8)) * table[:, away]
        scores = scores - slope * np.abs(away) * table[:, :1, None]
        out = jax.nn.softmax(scores, axis=-1) @ value
        return jax.numpy.sin(out).sum() + jax.numpy.cos(jax.scipy.special.logsumexp(scores, axis=-1)).sum()

    with jax.enable_x64(True), jax.checking_leaks():
        given = [jax.numpy.asarray(array) for array in (query, table, slope)]
        gradient = jax.grad(loss, (0, 1, 2))
        found = (jax.jit(gradient) if jit else gradient)(*given)
        for mine, their in zip(found, jax.grad(by_hand, (0, 1, 2))(*given), strict=True):
            assert mine.dtype == dtype
            assert mine.shape == their.shape
            limit = GRADIENT[np.dtype(dtype)] * max(1.0, float(np.abs(their).max()))
            np.testing.assert_allclose(mine, their, rtol=0, atol=limit)


def test_what_is_captured_may_be_traced_under_vmap_and_have_no_gradient() -> None:
    query, key, value = arrays((4, QUERIES, 8), (4, KEYS, 8), (4, KEYS, 5))
    tables = jax.numpy.stack([TABLE, 2 * TABLE])
    seen = np.random.default_rng(0).random((2, QUERIES, KEYS)) < 0.7

    def call(table: Any, seen: Any, attend: Any = attention) -> Any:
        options: dict[str, Any] = {
            "score_mod": lambda score, b, head, q, k: score + table[head, q - k],
            "mask_mod": lambda b, head, q, k: seen[q, k] | (k == 0),
        }
        return attend(query, key, value, **options)

    wanted = np.stack(
        [call(np.asarray(table), own, fastattn.attention) for table, own in zip(tables, seen, strict=True)]
    )
    np.testing.assert_array_equal(jax.jit(jax.vmap(call))(tables, seen), wanted)
    gradients = jax.vmap(jax.grad(lambda table, seen: call(table, seen).sum()))(tables, seen)
    for own, table, mask in zip(gradients, tables, seen, strict=True):
        np.testing.assert_array_equal(own, jax.grad(lambda table, mask=mask: call(table, mask).sum())(table))

    def hidden(limit: Any) -> Any:
        return attention(query, key, value, mask_mod=lambda b, head, q, k: (k == 0) | (q - k > limit)).sum()

    assert jax.grad(hidden)(1.5) == 0


def test_a_list_in_which_something_is_traced_is_refused() -> None:
    query, key, value = arrays((4, QUERIES, 8), (4, KEYS, 8), (4, KEYS, 5))

    def loss(table: Any) -> Any:
        tables = [table, table]
        return attention(query, key, value, score_mod=lambda score, b, head, q, k: score + tables[0][head, q - k]).sum()

    for transform in (jax.jit, jax.grad):
        with pytest.raises(TypeError, match=r"score_mod: captures tables, .* in no list"):
            transform(loss)(jax.numpy.asarray(TABLE))


REFUSED: list[tuple[Any, str, dict[str, Any]]] = [
    (TypeError, "windows", {"windows": (1, 1)}),
    (TypeError, "window: 3 of type int; expected", {"window": 3}),
    (ValueError, "softcap: 0.0", {"softcap": 0.0}),
    (ValueError, r"alibi_slopes: shape \(3,\)", {"alibi_slopes": np.ones(3)}),
    (TypeError, "softcap: an array", {"softcap": np.ones(())}),
    (TypeError, "query_offset: dtype float32; expected integers", {"query_offset": np.ones(2, np.float32)}),
    (ValueError, "key_lengths: 3 to 10; expected 0 to 9", {"key_lengths": np.array([3, 10])}),
    (ValueError, r"key_lengths: shape \(3,\)", {"key_lengths": np.array([3, 3, 3])}),
    (ValueError, "query_offset: given together with", {"query_offset": 1, "is_causal": "bottom-right"}),
    (TypeError, "attn_mask: a pair of dtypes bool, None", {"attn_mask": (np.ones(9, bool), None)}),
    (TypeError, "attn_mask: a pair of dtypes bool, bool", {"attn_mask": (np.ones(9, bool), np.ones((7, 9), bool))}),
    (TypeError, "attn_mask: a pair of dtypes bool, bool", {"attn_mask": (np.ones(9, bool), np.ones(9, bool))}),
    (TypeError, "attn_mask: a pair of dtypes float32, float32", {"attn_mask": (np.ones(9, "f"), np.ones(9, "f"))}),
    (TypeError, "attn_mask: str; expected a jax.Array", {"attn_mask": (np.ones(9), "keep")}),
    (TypeError, "attn_mask: dtype int32 could mean two things", {"attn_mask": np.ones(9, np.int32)}),
    (TypeError, "return_lse: 1", {"return_lse": 1}),
    (TypeError, "score_mod: int; expected", {"score_mod": 3}),
    (TypeError, "mask_mod: .*expected 4 arguments", {"mask_mod": lambda query, key: query > key}),
]


@pytest.mark.parametrize(("kind", "message", "options"), REFUSED, ids=[message[:30] for _, message, _ in REFUSED])
def test_options_are_refused_while_tracing(kind: Any, message: str, options: dict[str, Any]) -> None:
    tensors = arrays((2, 4, QUERIES, 8), (2, 4, KEYS, 8), (2, 4, KEYS, 5))
    for attend in (attention, jax.jit(lambda *given, **rest: attention(*given, **rest, **options))):
        with pytest.raises(kind, match=message):
            attend(*tensors, **(options if attend is attention else {}))
