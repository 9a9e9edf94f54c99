"""The backward pass of additive attention: against autograd, finite differences and the formula; what it promises."""

from __future__ import annotations

import math
import re
import tracemalloc
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import processes
import pytest
from additive_cases import ANY_DTYPE, additive_calls, inputs, rows_of_a_batch
from additive_gradients import NAMES, backward, check, check_calls, upstream_of
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import takes_long
from rows import on_other_rows
from strategies import SEEDS, Call, causal, each, laid_out, layouts, numbers, random_mask

import fastattn
from fastattn import additive_attention, additive_attention_backward
from fastattn.call.shapes import describe_additive
from fastattn.cpu.host import additive_backward as additive_gradients
from fastattn.cpu.host import calls, pool, session
from fastattn.cpu.host.kernels import describe
from fastattn.cpu.kernels import catalogue
from fastattn.machine import libraries as kernels
from fastattn.machine import table as isa

Array = np.ndarray[Any, Any]
LIMITS = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}


@pytest.fixture(autouse=True)
def _share_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small calls be shared between threads as well."""
    for name in ("WORTH_SHARING", "WORTH_WAKING"):
        monkeypatch.setattr(pool, name, 1)


def autograd(arrays: Any, grad_out: Array, mask: Array | None = None, softcap: float | None = None) -> list[Array]:
    """Return PyTorch's gradients of the broadcasting form, in float64."""
    torch = pytest.importorskip("torch")
    given = [torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in arrays]
    query, key, value, weight = given
    scores = (weight * torch.tanh(query[..., :, None, :] + key[..., None, :, :])).sum(-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + torch.from_numpy(np.where(mask, 0, -np.inf) if mask.dtype == bool else mask)
    (scores.softmax(-1) @ value).backward(torch.from_numpy(grad_out.astype(np.float64)))
    return [array.grad.numpy() for array in given]


def check_limits(found: Any, wanted: Any) -> None:
    """Assert the promise for usual inputs: relative 2e-5 or 1e-12 of the largest gradient, or of 1."""
    for name, got, want in zip(NAMES, found, wanted, strict=True):
        assert got.shape == want.shape, name
        error = np.abs(got - want).max(initial=0)
        assert error <= LIMITS[got.dtype] * max(1, np.abs(want).max(initial=0)), f"{name}: {error}"


# -- how exact ---------------------------------------------------------------------------------------------------------


@ANY_DTYPE
@pytest.mark.parametrize("shape", [(2, 130, 140, 64), (2, 300, 33, 20), (3, 1, 150, 96), (1, 33, 300, 130)], ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_errors_against_autograd(dtype: Any, shape: tuple[int, ...], size: float) -> None:
    arrays = inputs(dtype, *shape, size)
    upstream = upstream_of(*arrays)
    for mask in (None, np.random.default_rng(0).random((shape[0], shape[1], shape[2])) < 0.6):
        if mask is not None:
            mask[..., 0] = True  # PyTorch's gradient of a row without keys is NaN
            upstream = upstream_of(*arrays, mask)
        wanted = autograd(arrays, upstream[0], mask)
        check_limits(backward(arrays, mask, upstream=upstream), wanted)
    check_limits(backward(arrays, mask, upstream=upstream, backend="reference"), wanted)


@ANY_DTYPE
@pytest.mark.parametrize(("softcap", "slope"), [(None, None), (0.5, 0.02), (3.0, None), (None, 0.02)])
@pytest.mark.parametrize("shape", [(2, 130, 140, 24), (3, 1, 150, 96), (2, 33, 300, 130)], ids=str)
def test_autograd_agrees_on_windows_lengths_softcaps_and_slopes(
    dtype: Any, shape: tuple[int, ...], softcap: float | None, slope: float | None
) -> None:
    arrays = rows_of_a_batch(dtype, *shape)
    positions, keys = np.arange(shape[1])[:, None] - 3, np.arange(shape[2])
    lengths = np.random.default_rng(0).integers(60, shape[2] + 1, shape[0])
    visible = (keys >= positions - 50) & (keys <= positions + 9) & (keys < lengths[:, None, None, None])
    visible &= (seen := np.arange(shape[2]) % 7 != 5)
    some = visible.any(-1)  # PyTorch's gradient of a row without keys is NaN
    bias = numbers(np.random.default_rng(1), shape[1:3], dtype)
    options: dict[str, Any] = {"window": (50, 9), "query_offset": -3, "key_lengths": lengths, "softcap": softcap}
    options["alibi_slopes"] = slope
    grad_out, *results = upstream_of(*arrays, (bias, seen), **options)
    grad_out = np.where(some[..., None], grad_out, 0).astype(dtype)
    added = bias - (slope or 0) * np.abs(positions - keys)
    mask = np.where(visible | ~some[..., None], added, -np.inf).astype(np.float64)
    wanted = autograd(arrays, grad_out, mask, softcap)
    for backend in ("cpu", "reference"):
        found = backward(arrays, (bias, seen), **options, upstream=[grad_out, *results], backend=backend)
        check_limits(found, wanted)
        assert not found[0][~some].any()


def test_gradients_by_hand() -> None:
    query, key, value, weight = np.array([[0.5]]), np.array([[0.25], [-2.0]]), np.array([[1.0], [3.0]]), np.array([4.0])
    tanh = np.tanh([0.75, -1.5])
    weights = np.exp(4 * tanh) / np.exp(4 * tanh).sum()
    slopes = weights * ([1, 3] - weights @ [1, 3])
    upstream = [np.ones((1, 1)), *upstream_of(query, key, value, weight)[1:]]
    for backend in ("reference", "cpu"):
        grads = backward((query, key, value, weight), upstream=upstream, backend=backend)
        np.testing.assert_allclose(grads[0], [[4 * slopes @ (1 - tanh**2)]], rtol=1e-13)
        np.testing.assert_allclose(grads[1][:, 0], 4 * slopes * (1 - tanh**2), rtol=1e-13)
        np.testing.assert_allclose(grads[2][:, 0], weights, rtol=1e-13)
        np.testing.assert_allclose(grads[3], [slopes @ tanh], rtol=1e-13)


@ANY_DTYPE
@pytest.mark.parametrize("queries", [1, 40])
def test_sums_at_and_beyond_the_reach_of_denominators(dtype: Any, queries: int) -> None:
    # far from 0, but next to each other: the derivative of tanh is near 1 there
    reach = 21.0 if dtype == np.float32 else 170.0
    rng = np.random.default_rng(0)
    for far in (reach / 2 - 1, reach / 2 + 1, reach, 50, 89, 400, 710, 1e4, float(np.finfo(dtype).max) / 4):
        query = np.full((1, queries, 5), far).astype(dtype)
        key = (rng.uniform(-1, 1, (1, 9, 5)) - far).astype(dtype)
        key[:, ::4] /= dtype(far)  # some keys of a vector are near, others are not
        weight = numbers(rng, (5,), dtype, 3)
        for signed in (1, -1):
            value = numbers(rng, (1, 9, 2), dtype)
            check(Call(query * dtype(signed), key * dtype(signed), value, None, {"weight": weight, "is_causal": False}))


@given(seed=SEEDS, queries=st.integers(1, 5), keys=st.integers(1, 6), features=st.integers(1, 9), which=causal)
def test_finite_differences(seed: int, queries: int, keys: int, features: int, which: Any) -> None:
    rng = np.random.default_rng(seed)
    shapes = ((2, queries, features), (keys, features), (2, keys, 3), (features,))  # the key is broadcast
    arrays, steps = ([rng.standard_normal(shape) for shape in shapes] for _ in range(2))
    mask = random_mask(rng, (queries, keys), "float, -inf", np.float64)
    upstream = upstream_of(*arrays, mask, which)

    def loss(step: float) -> float:
        moved = [array + step * to for array, to in zip(arrays, steps, strict=True)]
        return float((additive_attention(*moved, mask, which) * upstream[0]).sum())

    grads = backward(arrays, mask, which, upstream=upstream)
    slope = sum(float((grad * to).sum()) for grad, to in zip(grads, steps, strict=True))
    step = 1e-5
    assert abs((loss(step) - loss(-step)) / (2 * step) - slope) <= 1e-6 * max(1, abs(slope))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"sinks": 0.5}, {"softcap": 2.0}], ids=str)
def test_the_log_sum_exp_has_gradients(options: dict[str, Any], backend: str) -> None:
    rng = np.random.default_rng(3)
    arrays, steps = (
        [rng.standard_normal(shape) for shape in ((2, 4, 5), (2, 6, 5), (2, 6, 3), (5,))] for _ in range(2)
    )
    grad_out, grad_lse = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 4))

    def loss(step: float) -> float:
        moved = [array + step * to for array, to in zip(arrays, steps, strict=True)]
        out, lse = additive_attention(*moved, **options, return_lse=True)
        return float((out * grad_out).sum() + (lse * grad_lse).sum())

    results = additive_attention(*arrays, **options, return_lse=True)
    given: Any = {"grad_lse": grad_lse, "backend": backend}
    grads = fastattn.additive_attention_backward(grad_out, *arrays, *results, **options, **given)
    slope = sum(float((grad * to).sum()) for grad, to in zip(grads, steps, strict=True))
    assert abs((loss(1e-5) - loss(-1e-5)) / 2e-5 - slope) <= 1e-6 * max(1, abs(slope))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_of_the_log_sum_exp_are_those_of_the_reference(dtype: Any) -> None:
    rng = np.random.default_rng(4)
    arrays = [numbers(rng, shape, dtype) for shape in ((2, 300, 8), (2, 270, 8), (2, 270, 5), (8,))]
    out, lse = additive_attention(*arrays, sinks=0.5, return_lse=True)
    names = ("query", "key", "value", "weight", "sinks")
    given: Any = {"sinks": 0.5, "grad_lse": numbers(rng, lse.shape, dtype), "grads": names}
    found, wanted = (
        fastattn.additive_attention_backward(
            numbers(rng, out.shape, dtype) * 0, *arrays, out, lse, **given, backend=backend
        )
        for backend in ("cpu", "reference")
    )
    for name, own, other in zip(names, found, wanted, strict=True):
        limit = 1e4 * np.finfo(dtype).eps * max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(own, other, rtol=0, atol=limit, err_msg=name)


# -- whole calls -------------------------------------------------------------------------------------------------------


@given(call=additive_calls())
def test_any_call(call: Call) -> None:
    check(call)


@given(call=additive_calls(odd=True))
def test_values_that_are_not_finite(call: Call) -> None:
    check(call)


@settings(max_examples=settings().max_examples // 4)
@given(call=additive_calls(with_functions=True))
def test_any_call_with_functions(call: Call) -> None:
    check(call)


@given(call=additive_calls(odd=True, any_layout=False), names=st.tuples(*[layouts] * 8), threads=st.integers(1, 5))
def test_the_same_bits_in_any_layout_and_at_any_thread_count(call: Call, names: Any, threads: int) -> None:
    arrays = (call.query, call.key, call.value, call.options["weight"])
    options = {name: option for name, option in call.options.items() if name != "weight"}
    upstream = upstream_of(*arrays, call.attn_mask, **options)
    wanted = backward(arrays, call.attn_mask, **options, upstream=upstream)
    given = (*arrays, call.attn_mask, *upstream)
    *moved, mask, grad_out, out, lse = (each(partial(laid_out, layout=n), a) for a, n in zip(given, names, strict=True))
    with fastattn.num_threads(threads):
        found = backward(moved, mask, **options, upstream=[grad_out, out, lse])
    for got, want in zip(found, wanted, strict=True):
        assert got.tobytes() == want.tobytes()


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be many rounds."""
    row = replace(isa.host(), blocking=replace(isa.host().blocking, additive_block=32))
    monkeypatch.setattr(session.current, "_row", row)
    monkeypatch.setattr(session.current, "plans", session.Plans())
    monkeypatch.setattr(additive_gradients, "TASK_FLOPS", 1e4)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("shape", [(2, 150, 170, 8), (2, 300, 20, 8), (2, 1, 300, 8), (1, 70, 400, 40)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
def test_many_rounds(shape: tuple[int, ...], is_causal: Any) -> None:
    arrays = inputs(np.float32, *shape)
    problem, operands = describe_additive(*arrays, is_causal=is_causal)
    plan, given = additive_gradients.plan_rounds(problem, operands, operands.query, 2)
    chunks = math.isqrt(plan.tasks // shape[0])
    assert chunks >= 5
    assert given["query_blocks"][0] * chunks * 32 >= shape[1]
    options = {"weight": arrays[3], "is_causal": is_causal}
    rng = np.random.default_rng(0)
    for mask in (None, rng.random(shape[1:3]) < 0.7, rng.random((1, shape[2])) < 0.3, np.zeros((1, 1), bool)):
        check(Call(*arrays[:3], mask, options))
        bits = []
        for threads in (1, 2, 3):
            with fastattn.num_threads(threads):
                bits.append([g.tobytes() for g in backward(arrays, mask, is_causal)])
        assert bits[0] == bits[1] == bits[2]


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize(
    "options",
    [
        {"window": (40, 3), "query_offset": 30},
        {"window": (3, None), "softcap": 2.0, "alibi_slopes": 0.01},
        {"key_lengths": [9, 170]},
        {"key_lengths": [0, 130], "is_causal": "bottom-right", "softcap": 1.0},
        {"window": (60, 0), "query_offset": [-40, 20], "key_lengths": [100, 0]},
    ],
    ids=str,
)
def test_many_rounds_of_intervals(options: dict[str, Any]) -> None:
    arrays = rows_of_a_batch(np.float32, 2, 150, 170, 8)
    mask = numbers(np.random.default_rng(0), (150, 170), np.float32), np.random.default_rng(1).random((1, 170)) < 0.7
    for masks in (None, mask):
        check(Call(*arrays[:3], masks, {"weight": arrays[3], "is_causal": False} | options))
        bits = []
        for threads in (1, 2, 3):
            with fastattn.num_threads(threads):
                bits.append([g.tobytes() for g in backward(arrays, masks, **options)])
        assert bits[0] == bits[1] == bits[2]


@pytest.mark.usefixtures("_small_chunks")
@ANY_DTYPE
@pytest.mark.parametrize("options", [{}, {"window": (40, 3), "softcap": 2.0}, {"is_causal": "bottom-right"}], ids=str)
@pytest.mark.parametrize("sizes", [(1, 0, 40), (1, 130, 400), (65, 131, 500), (150, 64, 333), (300, 20, 900)], ids=str)
def test_a_padded_sequence_has_the_gradients_of_the_same_sequence_alone(
    dtype: Any, options: dict[str, Any], sizes: tuple[int, int, int]
) -> None:
    """Though what is cut into chunks depends on the number of keys."""
    queries, keys, capacity = sizes
    query, key, value, weight = rows_of_a_batch(dtype, 3, queries, capacity, 8)
    key[1, :, keys:], value[1, :, keys:] = np.nan, np.inf
    padded = {"key_lengths": [capacity, keys, capacity // 2], **options}
    alone = query[1:2], key[1:2, :, :keys], value[1:2, :, :keys]
    upstream, wanted = upstream_of(query, key, value, weight, **padded), upstream_of(*alone, weight, **options)
    wanted[0] = upstream[0][1:2]
    assert [part[1:2].tobytes() for part in upstream] == [part.tobytes() for part in wanted]
    found = backward((query, key, value, weight), **padded, upstream=upstream)
    assert not found[1][1, :, keys:].any()
    assert not found[2][1, :, keys:].any()
    exact = backward((*alone, weight), **options, upstream=wanted)
    for got, want in zip(found[:3], exact[:3], strict=True):
        assert got[1:2, :, : want.shape[-2]].tobytes() == want.tobytes()
    found = backward((query[1:2], key[1:2], value[1:2], weight), **options, key_lengths=keys, upstream=wanted)
    assert found[3].tobytes() == exact[3].tobytes()


def test_tasks_are_short_whatever_the_lengths() -> None:
    for queries, keys, features in ((20000, 30000, 256), (100, 10**7, 64), (10**7, 1, 512), (3, 5, 20000)):
        query, key = (np.broadcast_to(np.float32(0), (2, n, features)) for n in (queries, keys))
        problem, operands = describe_additive(query, key, key, np.ones(features, np.float32))
        plan, given = additive_gradients.plan_rounds(problem, operands, operands.query, 2)
        assert plan.flops / plan.tasks <= 4e9
        chunks = math.isqrt(plan.tasks // 2)
        for blocks, length in (("query_blocks", queries), ("key_blocks", keys)):
            assert given[blocks][0] * given["query_block"][0] * chunks >= length


def test_memory_grows_with_the_lengths_alone() -> None:
    peaks = []
    for length in (1000, 4000):
        arrays = inputs(np.float32, 1, length, length, 8)
        upstream = upstream_of(*arrays)
        backward(arrays, upstream=upstream)
        tracemalloc.start()
        backward(arrays, upstream=upstream)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] <= 2 * 3 * 3000 * 8 * 4  # the gradients, and as much again
    assert peaks[1] <= 4000 * 4000  # a quarter of one matrix of scores
    scratch = []
    for length in (5000, 50000):
        query = np.broadcast_to(np.float32(0), (1, length, 64))
        problem, operands = describe_additive(query, query, query, np.ones(64, np.float32))
        scratch.append(additive_gradients.plan_rounds(problem, operands, operands.query, 2)[0].memory_bytes)
    assert scratch[1] <= scratch[0]


@pytest.mark.parametrize("queries", [1, 5, 129, 300])
@pytest.mark.parametrize("sizes", [(1, 1), (33, 300), (520, 7), (0, 40), (600, 520)], ids=str)
@ANY_DTYPE
def test_working_memory_is_as_large_as_planned(
    dtype: Any, sizes: tuple[int, int], queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    guards: list[Array] = []

    class Guarded(calls.Memory):
        """Memory with something around it that nobody may write to; the last is that of the backward pass."""

        size = 0

        def of(self, size: int) -> tuple[int, Array]:
            if self.held is None or self.size != size:
                memory = np.full(size + 8192, 0xA5, np.uint8)
                start = -memory.ctypes.data % 64 + 4096
                guards[:] = memory[:start], memory[start + size :]
                self.size, self.held = size, (memory.ctypes.data + start, memory[start:])
            return self.held

    rng = np.random.default_rng(0)
    shapes = ((queries, sizes[0]), (150, sizes[0]), (150, sizes[1]), (sizes[0],))
    mask, table = rng.random((queries, 150)) < 0.5, rng.standard_normal(7)
    bias, mod = np.where(mask, dtype(0), -np.inf), {"score_mod": lambda s, b, h, q, k: s + table[(q + k) % 7]}
    arrays = [numbers(rng, shape, dtype) for shape in shapes]
    for given_mask, own, names in ((mask, {}, None), (bias, {}, ("attn_mask",)), (mask, mod, ("table",))):
        upstream = upstream_of(*arrays, given_mask, **own)
        with monkeypatch.context() as patched:
            patched.setattr(session.current, "memory", Guarded())
            backward(arrays, given_mask, **own, upstream=upstream, grads=names)
        assert len(guards) == 2
        assert all((guard == 0xA5).all() for guard in guards)


# -- the promises of attention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 40, 150])
def test_a_row_of_a_batch_is_the_call_on_that_row(queries: int) -> None:
    arrays = inputs(np.float32, 5, queries, 150, 20, 9.0)
    upstream = upstream_of(*arrays)
    found = backward(arrays, upstream=upstream)
    for row in range(5):
        one = [array[row] for array in arrays[:3]]
        alone = backward((*one, arrays[3]), upstream=[array[row] for array in upstream])
        for got, want in zip(alone[:3], found[:3], strict=True):
            assert got.tobytes() == want[row].tobytes()


@pytest.mark.parametrize("odd", [np.nan, np.inf, 1e30, 25.0])
@pytest.mark.parametrize("queries", [1, 40])
@ANY_DTYPE
def test_nothing_masked_leaks(dtype: Any, queries: int, odd: float) -> None:
    # 25 and 1e30 are out of reach: neighbours in the same vector are computed as before all the same
    arrays = inputs(dtype, 2, queries, 70, 24)
    mask = np.random.default_rng(1).random((2, 1, 70)) < 0.6
    rows = np.ones((2, queries, 1), bool)
    rows[:, queries // 2] = queries == 1  # a query that looks at nothing: its gradient reaches nobody
    for given_mask in (mask & rows, np.where(mask & rows, 0.25, -np.inf)):
        upstream = upstream_of(*arrays, given_mask)
        clean = backward(arrays, given_mask, upstream=upstream)
        query, key, value = (array.copy() for array in arrays[:3])
        grad_out = upstream[0].copy()
        key[~mask[:, 0]], value[~mask[:, 0]] = odd, odd
        query[~rows[..., 0]], grad_out[~rows[..., 0]] = odd, odd
        dirty = backward((query, key, value, arrays[3]), given_mask, upstream=[grad_out, *upstream[1:]])
        for got, wanted in zip(dirty, clean, strict=True):
            assert got.tobytes() == wanted.tobytes()
        assert not dirty[0][~rows[..., 0]].any()
        assert not dirty[1][~mask[:, 0]].any()
        assert not dirty[2][~mask[:, 0]].any()


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_reaches_who_looked(odd: float) -> None:
    arrays = inputs(np.float32, 1, 20, 30, 8)
    grad_out, out, lse = upstream_of(*arrays, None, True)
    wanted = backward(arrays, None, True, upstream=[grad_out, out, lse])
    grad_out[0, 10, 3] = odd
    grads = backward(arrays, None, True, upstream=[grad_out, out, lse])
    assert not np.isfinite(grads[0][0, 10]).any()
    assert not np.isfinite(grads[1][0, :11]).any()
    assert not np.isfinite(grads[2][0, :11, 3]).any()
    assert not np.isfinite(grads[3]).any()
    for got, want in zip(grads[:2], wanted[:2], strict=True):
        assert got[0, 11:].tobytes() == want[0, 11:].tobytes()
    assert np.isfinite(np.delete(grads[2], 3, axis=-1)).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nothing_to_look_at_and_nobody_to_look(backend: str) -> None:
    query, key, value, weight = inputs(np.float32, 2, 5, 20, 8)
    for q, k, v in ((query, key[:, :0], value[:, :0]), (query[:, :0], key, value), (query[:0], key[:0], value[:0]),
                    (query[..., :0], key[..., :0], value), (query, key, value[..., :0])):  # fmt: skip
        given = (q, k, v, weight[: q.shape[-1]])
        grads = backward(given, backend=backend)
        for got, array in zip(grads, given, strict=True):
            assert got.shape == array.shape
            assert np.isfinite(got).all()
            assert not got.any() or q.shape[-1] == 0


@ANY_DTYPE
def test_pieces_of_the_keys(dtype: Any) -> None:
    *arrays, weight = inputs(dtype, 2, 30, 200, 16)
    upstream = upstream_of(*arrays, weight)
    whole = backward((*arrays, weight), upstream=upstream)
    parts = [
        backward((arrays[0], arrays[1][:, piece], arrays[2][:, piece], weight), upstream=upstream)
        for piece in (slice(0, 90), slice(90, 200))
    ]
    grads = [np.concatenate(pair, axis=1) for pair in zip(*(part[1:3] for part in parts), strict=True)]
    check_limits([parts[0][0] + parts[1][0], *grads, parts[0][3] + parts[1][3]], whole)


def test_what_is_broadcast_is_summed() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (numbers(rng, shape, np.float64) for shape in ((3, 1, 6, 8), (2, 9, 8), (3, 1, 9, 4)))
    weight = numbers(rng, (8,), np.float64)
    full = [np.broadcast_to(array, (3, 2, *array.shape[-2:])).copy() for array in (query, key, value)]
    upstream = upstream_of(*full, weight)
    grads, whole = (backward((*arrays, weight), upstream=upstream) for arrays in ([query, key, value], full))
    check_limits(grads, [whole[0].sum(1, keepdims=True), whole[1].sum(0), whole[2].sum(1, keepdims=True), whole[3]])


def test_dtypes_are_those_of_the_arguments() -> None:
    single = np.ones((2, 3), np.float32)
    for backend in ("reference", "cpu"):
        grads = backward((single, single, single, np.ones(3)), backend=backend)
        assert [g.dtype.name for g in grads] == ["float32"] * 3 + ["float64"]
        grads = backward(([[1, 2]], [[1, 2]], [[1, 2]], [1, 2]), backend=backend)
        assert [g.dtype.name for g in grads] == ["float64"] * 4


def test_no_warnings_and_no_scratch_between_calls() -> None:
    # what an earlier call left in working memory, NaN all over, changes nothing
    arrays, other = inputs(np.float32, 1, 33, 45, 12), inputs(np.float32, 2, 140, 140, 64)
    wanted = [g.tobytes() for g in backward(arrays)]
    backward([np.full_like(array, np.nan) for array in other])
    assert [g.tobytes() for g in backward(arrays)] == wanted


# -- other machines ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=takes_long)])
@on_other_rows
def test_other_rows_of_the_table_are_right(row: isa.Isa, dtype: str) -> None:
    code = f"import numpy as np, additive_gradients; print(additive_gradients.check_calls((np.{dtype},)))"
    assert processes.run(code, timeout=300, FASTATTN_ISA=row.name) == "12\n"


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in isa.TABLE if not isa.runs_here(row)], ids=lambda row: row.name)
def test_rows_that_do_not_run_here_compile(row: isa.Isa) -> None:
    assert catalogue.build(describe("additive_backward", row.tile("float32"), row, "additive"), {"task": 3})


@pytest.mark.slow
def test_sixteen_lanes_on_any_machine(sixteen_lanes: isa.Isa) -> None:
    assert check_calls((np.float32,)) == 12
    assert any(kernel.work == "additive_backward" and kernel.row is sixteen_lanes for kernel in kernels._loaded)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones(4)}, "weight: shape (4,); expected (3,), a number for each feature of query of shape (5, "),
        ({"weight": np.ones(3, np.complex64)}, "weight: dtype complex64 is not supported"),
        ({"key": np.ones((7, 4))}, "key: shape (7, 4); expected 3 features on the last axis"),
        ({"attn_mask": np.ones((7, 5), bool)}, "attn_mask: shape (7, 5); expected one that broadcasts to (5, 7)"),
        ({"is_causal": 1}, "is_causal: 1 of type int; expected"),
        ({"window": (1, -1)}, "window: (1, -1) of type tuple; expected (left, right)"),
        ({"softcap": 0}, "softcap: 0 of type int; expected a finite real number above 0"),
        ({"key_lengths": 8}, "key_lengths: 8 to 8; expected 0 to 7, the length of key"),
        ({"query_offset": 0.5}, "query_offset: dtype float64; expected integers"),
        ({"grad_out": np.ones((5, 4))}, "grad_out: shape (5, 4); expected (5, 2), the shape of the result"),
        ({"grad_out": "abc"}, "grad_out: dtype <U3 is not supported"),
        ({"out": np.ones((7, 2))}, "out: shape (7, 2); expected (5, 2), the shape of the result"),
        ({"out": None}, "out: None; expected an array_like"),
        ({"lse": np.ones((5, 1))}, "lse: shape (5, 1); expected (5,), the shape of the log-sum-exp"),
        ({"lse": np.ones(5, np.complex128)}, "lse: dtype complex128 is not supported"),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)
def test_bad_arguments_are_named(backend: str, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "grad_out": np.ones((5, 2)),
        "query": np.ones((5, 3)),
        "key": np.ones((7, 3)),
        "value": np.ones((7, 2)),
        "weight": np.ones(3),
        "out": np.ones((5, 2)),
        "lse": np.ones(5),
    }
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        additive_attention_backward(**arguments | change, backend=backend)


def test_an_unknown_backend_is_refused() -> None:
    ones = [[1.0]]
    with pytest.raises(ValueError, match="backend: 'gpu' of type str; expected None or one of 'cpu', 'reference'"):
        additive_attention_backward(ones, ones, ones, ones, [1.0], ones, [1.0], backend="gpu")
