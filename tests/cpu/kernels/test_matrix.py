"""Both passes on a matrix unit, emulated where the processor has none: right, as exact as float32's kernels are, and
the same bits whatever stands beside a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import emulated_amx
import numpy as np
import pytest
import tolerances
from hypothesis import HealthCheck, given, settings
from marks import takes_long
from numpy.typing import NDArray
from strategies import BFLOAT16, LAYOUTS, SIZES, Call, calls, laid_out

import fastattn
from fastattn.call.halves import cast
from fastattn.cpu.host import peak, plan, pool, session
from fastattn.cpu.host.kernels import describe
from fastattn.machine import libraries
from fastattn.machine.table import Isa

Array = NDArray[Any]

DTYPES = (np.float32, np.float16, BFLOAT16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
INF, NAN = np.inf, np.nan


@pytest.fixture(scope="module")
def on_matrix(amx: Isa) -> Iterator[None]:
    """Have calls use the matrix unit, however few features they have; query blocks of a head share a task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "TASKS_PER_THREAD", 1)
        patch.setattr(session, "current", session.Session(emulated_amx.for_any_features(amx)))
        yield


def inputs(shape: tuple[int, ...], keys: int, values: int, dtype: Any = np.float32, seed: int = 0) -> list[Array]:
    """Return query of a shape (B, H, Lq, D), key and value."""
    rng = np.random.default_rng(seed)
    sizes = shape, (*shape[:2], keys, shape[-1]), (*shape[:2], keys, values)
    return [cast(rng.standard_normal(size), np.dtype(dtype)) for size in sizes]


def used() -> set[tuple[str, str]]:
    """Return the work and the dtypes of the kernels on a matrix unit that have been loaded."""
    return {(kernel.work, kernel.storage) for kernel in libraries._loaded if kernel.reads == "matrix"}


def error(result: Array, *arrays: Array, **options: Any) -> float:
    """Return the root mean square of what a result is off by."""
    exact = fastattn.attention(*(each.astype(np.float64) for each in arrays), **options, backend="reference")
    return float(np.sqrt(np.mean((result.astype(np.float64) - exact) ** 2)))


# -- right -------------------------------------------------------------------------------------------------------------


def with_and_without() -> tuple[Isa, Isa]:
    """Return the row in use, and the same without a matrix unit."""
    return session.current.row, replace(session.current.row, matrix=False)


def computed(row: Isa, *args: Array, **options: Any) -> Array:
    """Return the result, on a row of the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "current", session.Session(row))
        return np.asarray(fastattn.attention(*args, **options))


def differentiated(row: Isa, grad_out: Array, *args: Array, **options: Any) -> tuple[Array, ...]:
    """Return the gradients of query, key and value, on a row of the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "current", session.Session(row))
        out, lse = fastattn.attention(*args, **options, return_lse=True)
        found: tuple[Array, ...] = fastattn.attention_backward(grad_out, *args, out, lse, **options)
        return found


def gradients(grad_out: Array, *args: Array, **options: Any) -> tuple[Array, ...]:
    """Return the gradients of query, key and value, of which all is right."""
    found = differentiated(session.current.row, grad_out, *args, **options)
    tolerances.check_gradients(found, args, *tolerances.expected_gradients(grad_out, *args, **options))
    return found


anything = settings(suppress_health_check=[*HealthCheck])


@takes_long
@anything
@given(call=calls(sizes=tuple(SIZES)))
def test_any_call(on_matrix: None, call: Call) -> None:
    """More of them than here: `make test ARGS="--matrix-unit tests/test_properties.py"`."""
    before = call.bits
    tolerances.check_call(fastattn.attention, *call.args, **call.options)
    assert call.bits == before


@dtypes
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths_that_fill_tiles_and_that_do_not(on_matrix: None, dtype: Any, is_causal: bool) -> None:
    for queries, keys, features, values in ((64, 128, 64, 64), (33, 65, 33, 17), (70, 300, 100, 31), (17, 15, 32, 48)):
        arrays = inputs((1, 2, queries, features), keys, values, dtype)
        tolerances.check_call(fastattn.attention, *arrays, is_causal=is_causal)
    assert ("forward", np.dtype(dtype).name) in used()


@dtypes
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients(on_matrix: None, dtype: Any, is_causal: bool) -> None:
    for queries, keys, features, values in ((64, 128, 64, 64), (33, 65, 33, 17), (70, 300, 100, 31), (3, 15, 32, 48)):
        query, key, value = inputs((1, 2, queries, features), keys, values, dtype)
        grad_out = inputs((1, 2, queries, values), 1, 1, dtype, seed=1)[0]
        gradients(grad_out, query, key, value, is_causal=is_causal)
    assert ("backward", np.dtype(dtype).name) in used()


@dtypes
def test_windows_begin_at_any_key(on_matrix: None, dtype: Any) -> None:
    """Not with the tiles of keys alone."""
    query, key, value = inputs((1, 1, 200, 40), 300, 40, dtype)
    for window in ((17, 0), (40, 30), (5, 5)):
        tolerances.check_call(fastattn.attention, query, key, value, window=window, query_offset=80)
        gradients(cast(np.ones(query.shape), query.dtype), query, key, value, window=window, query_offset=80)


@dtypes
def test_dropped_weights(on_matrix: None, dtype: Any) -> None:
    """Behind the last key that a query block looks at there are others."""
    arrays = inputs((1, 1, 70, 40), 100, 40, dtype)
    tolerances.check_call(fastattn.attention, *arrays, is_causal=True, dropout_p=0.4, rng=3)


def test_query_blocks_that_look_at_no_key_of_a_block(on_matrix: None) -> None:
    """Scores of a query block are formed beneath the weights of the one before it, if that has any."""
    arrays = inputs((1, 2, 200, 32), 400, 32, BFLOAT16)

    def mask_mod(batch: int, head: int, query: int, key: int) -> bool:
        return (query // 64 * 5 + key // 128 * 3) % 4 != 0  # in the second block only the first and the last queries

    tolerances.check_call(fastattn.attention, *arrays, mask_mod=mask_mod)


def test_few_features_are_not_worth_it(amx: Isa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel a call gets, its features decide, its queries, and the size of its scale."""
    monkeypatch.setattr(session, "current", session.Session(amx))
    least = amx.blocking.matrix_features
    for queries, features, values, scale, matrix in (
        (17, least, least, 0.1, True),
        (16, least, least, 0.1, False),
        (64, least - 1, least, 0.1, False),
        (64, least, least - 1, 0.1, False),
        (64, least, least, 1e-6, False),
        (64, least, least, 0, True),
    ):
        before = dict(libraries._loaded)
        monkeypatch.setattr(libraries, "_loaded", {})
        arrays = inputs((1, 1, queries, features), 40, values)
        tolerances.check_call(fastattn.attention, *arrays, scale=scale)
        assert (("forward", "float32") in used()) == matrix, (queries, features, values, scale)
        monkeypatch.setattr(libraries, "_loaded", before | libraries._loaded)


def test_what_is_computed_in_float64_or_kept_in_int8_is_not_for_it(amx: Isa) -> None:
    """Whatever the other arrays are: a cache may have another dtype than its queries."""
    for real, kept, reads in (
        ("float32", "float32", "matrix"),
        ("float32", "bfloat16", "matrix"),
        ("float64", "float32", "rows"),
        ("float32", "int8", "rows"),
    ):
        kernel = describe("forward", amx.tile(real), amx, storage=kept, queries=real, values=kept, pages=kept)
        assert kernel.reads == reads
        assert reads == "rows" or kernel.terms == 3


def test_the_peak_of_the_unit(on_matrix: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which calls are measured beside: of products, not of terms."""
    monkeypatch.setattr(peak, "host", lambda: session.current.row)
    assert all(peak.measure(dtype, seconds=0.001) > 0 for dtype in ("bfloat16", "float16", "float32", "float64"))


# -- numbers that terms of bfloat16 have no room for -------------------------------------------------------------------


def test_scores_of_huge_and_of_tiny_numbers(on_matrix: None) -> None:
    """The unit takes low terms of 1e-36 for 0; times 1e36 they are not."""
    query, key, value = inputs((1, 1, 64, 32), 100, 32)
    huge, tiny = np.float32(1e36), np.float32(1e-36)
    for q, k in ((query * huge, key * tiny), (query * tiny, key * huge), (query * tiny, key)):
        tolerances.check_call(fastattn.attention, q, k, value)
    key[..., 70, :], query[..., 3, :] = key[..., 70, :] * huge, query[..., 3, :] * tiny
    tolerances.check_call(fastattn.attention, query, key, value)


@dtypes
@pytest.mark.parametrize("odd", [INF, -INF, NAN])
def test_a_key_or_query_that_is_not_finite(on_matrix: None, dtype: Any, odd: float) -> None:
    """Scores of -inf are those of keys without weight, beside whichever features."""
    query, key, value = inputs((1, 2, 40, 48), 150, 32, dtype)
    query[...] = np.abs(query)
    query[..., 5, :] = -query[..., 5, :]
    key[0, 0, 77, 3] = odd
    tolerances.check_call(fastattn.attention, query, key, value)
    tolerances.check_call(fastattn.attention, query, key, value, is_causal=True)
    query, key, value = inputs((1, 2, 40, 48), 150, 32, dtype)
    query[0, 1, 33, 47] = odd
    tolerances.check_call(fastattn.attention, query, key, value)


@dtypes
@pytest.mark.parametrize("odd", [1e4, 1e30, NAN])
def test_an_odd_query_changes_no_bit_of_others(on_matrix: None, dtype: Any, odd: float) -> None:
    query, key, value = inputs((1, 1, 40, 32), 150, 32, dtype)
    clean = fastattn.attention(query, key, value)
    query[0, 0, 7, 3] = odd if np.dtype(dtype) != np.float16 else min(odd, 6e4)
    got = fastattn.attention(query, key, value)
    assert np.delete(got, 7, 2).tobytes() == np.delete(clean, 7, 2).tobytes()


@dtypes
@pytest.mark.parametrize("odd", [INF, NAN])
def test_a_value_that_is_not_finite(on_matrix: None, dtype: Any, odd: float) -> None:
    """It reaches its own feature of the queries that look at it, and no other number."""
    query, key, value = inputs((1, 1, 80, 32), 150, 40, dtype)
    clean = fastattn.attention(query, key, value, is_causal="bottom-right")
    value[0, 0, 100, 7] = odd
    got = fastattn.attention(query, key, value, is_causal="bottom-right")
    tolerances.check_call(fastattn.attention, query, key, value, is_causal="bottom-right")
    touched = np.zeros(got.shape, bool)
    touched[0, 0, 30:, 7] = True  # query i looks at the keys up to i + 70
    assert not np.isfinite(got[touched]).any()
    assert got[~touched].tobytes() == clean[~touched].tobytes()


def test_float32_to_its_last_bit(on_matrix: None) -> None:
    """Numbers whose lowest bits are all that differs: three terms have them all."""
    last = np.float32(2.0**-23)
    query, key = np.ones((1, 1, 32, 32), np.float32), np.ones((1, 1, 64, 32), np.float32)
    key[..., :, 0] += np.float32(2.0**-8) + last * np.arange(64)  # the first and the second term are the same in all
    query[...] = 0
    query[..., 0] = 2.0**22
    _, lse = fastattn.attention(query, key, key, scale=1.0, return_lse=True)
    scores = (query.astype(np.float64) @ key.swapaxes(-1, -2).astype(np.float64))[0, 0, 0]
    top = scores.max()
    assert abs(lse[0, 0, 0] - (top + np.log(np.exp(scores - top).sum()))) <= 2.0**22 * 2.0**-23


@pytest.mark.parametrize("case", ["usual", "large scores", "cancelling", "near overflow", "mixed sizes", "small"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_float32_is_as_exact_as_multiply_adds_are(on_matrix: None, case: str, is_causal: bool) -> None:
    """The same calls, on the row without a matrix unit."""
    arrays = query, key, value = inputs((1, 4, 128, 64), 600, 64)
    if case == "large scores":
        query *= 8
    elif case == "cancelling":
        query[..., 1::2], key[..., 1::2] = query[..., ::2], -key[..., ::2] * np.float32(1.001)
    elif case == "near overflow":
        value *= np.float32(1e37)
    elif case == "mixed sizes":
        value *= np.float32(10) ** np.random.default_rng(1).integers(-6, 7, value.shape).astype(np.float32)
    elif case == "small":
        value *= np.float32(1e-30)
    ours, plain = (computed(row, *arrays, is_causal=is_causal) for row in with_and_without())
    # near 1: neither is right to all digits, and both are rounded at the end
    assert error(ours, *arrays, is_causal=is_causal) <= 1.05 * error(plain, *arrays, is_causal=is_causal)


@pytest.mark.parametrize("odd", [INF, NAN])
@pytest.mark.parametrize("which", ["grad_out", "query", "key", "value"])
def test_gradients_of_what_is_not_finite(on_matrix: None, which: str, odd: float) -> None:
    """They are where multiply-adds have them, and no bit elsewhere is another."""
    names = ("grad_out", "query", "key", "value")
    arrays = dict(zip(names, (*inputs((1, 2, 40, 48), 1, 1)[:1], *inputs((1, 2, 40, 48), 70, 48, seed=1)), strict=True))
    arrays["query"][..., 7] = np.abs(arrays["query"][..., 7])  # no score is -inf, which would change others
    clean = gradients(*arrays.values(), is_causal=True)
    arrays[which][0, 1, 33, 7] = odd
    found, others = (differentiated(row, *arrays.values(), is_causal=True) for row in with_and_without())
    for got, before, other in zip(found, clean, others, strict=True):
        touched = ~np.isfinite(other)
        assert np.array_equal(~np.isfinite(got), touched)
        assert got[~touched].tobytes() == before[~touched].tobytes()


def test_gradients_of_huge_and_of_tiny_numbers(on_matrix: None) -> None:
    query, key, value = inputs((1, 1, 40, 48), 70, 48)
    grad_out = inputs((1, 1, 40, 48), 1, 1, seed=1)[0]
    huge, tiny = np.float32(1e30), np.float32(1e-30)
    gradients(grad_out, query * huge, key * tiny, value)
    gradients(grad_out * tiny, query, key, value * huge)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_float32_are_as_exact_as_multiply_adds_are(on_matrix: None, is_causal: bool) -> None:
    arrays = inputs((1, 4, 128, 64), 300, 64)
    grad_out = inputs((1, 4, 128, 64), 1, 1, seed=1)[0]
    wide = [each.astype(np.float64) for each in (grad_out, *arrays)]
    exact = fastattn.attention(*wide[1:], is_causal=is_causal, return_lse=True, backend="reference")
    wanted = fastattn.attention_backward(*wide, *exact, is_causal=is_causal, backend="reference")
    errors = []
    for row in with_and_without():
        found = differentiated(row, grad_out, *arrays, is_causal=is_causal)
        errors.append([np.sqrt(np.mean((one - other) ** 2)) for one, other in zip(found, wanted, strict=True)])
    assert (np.array(errors[0]) <= errors[1]).all()


# -- the same bits -----------------------------------------------------------------------------------------------------


@dtypes
def test_the_same_bits_beside_others_padded_and_at_any_number_of_threads(
    on_matrix: None, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORTH_SHARING", "WORTH_WAKING"):
        monkeypatch.setattr(pool, name, 0)
    query, key, value = inputs((3, 2, 150, 40), 200, 40, dtype)
    both = fastattn.attention(query, key, value, key_lengths=np.array([200, 77, 130]), return_lse=True)
    for threads in (1, 3):
        with fastattn.num_threads(threads):
            for row, keys in enumerate((200, 77, 130)):
                alone = fastattn.attention(query[row], key[row, :, :keys], value[row, :, :keys], return_lse=True)
                for one, of_all in zip(alone, both, strict=True):
                    assert one.tobytes() == of_all[row].tobytes()


@dtypes
def test_the_same_bits_in_any_layout(on_matrix: None, dtype: Any) -> None:
    query, key, value = inputs((1, 2, 50, 40), 90, 40, dtype)
    got = fastattn.attention(query, key, value, window=(20, 5))
    for layout in LAYOUTS:
        other = (laid_out(each, layout) for each in (query, key, value))
        assert fastattn.attention(*other, window=(20, 5)).tobytes() == got.tobytes(), layout


@dtypes
def test_the_same_gradients_beside_others_and_at_any_number_of_threads(
    on_matrix: None, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORTH_SHARING", "WORTH_WAKING"):
        monkeypatch.setattr(pool, name, 0)
    query, key, value = inputs((2, 2, 150, 40), 200, 40, dtype)
    grad_out = inputs((2, 2, 150, 40), 1, 1, dtype, seed=1)[0]
    every = gradients(grad_out, query, key, value)
    for threads in (1, 3):
        with fastattn.num_threads(threads):
            for row in range(2):
                alone = gradients(grad_out[row], query[row], key[row], value[row])
                for one, of_all in zip(alone, every, strict=True):
                    assert one.tobytes() == of_all[row].tobytes()
