"""Gradients of the arrays that a function of scores captures: against finite differences, and sentence by sentence."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from differences import central_differences

import fastattn

Array = np.ndarray[Any, Any]
ROWS, HEADS, QUERIES, KEYS, FEATURES = 2, 4, 9, 11, 8
STEP = 1e-5
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


def inputs(dtype: Any = np.float64, kv_heads: int = HEADS, rows: int = ROWS) -> tuple[list[Array], Array, Array]:
    """Return (query, key, value), and gradients that arrive at the result and the log-sum-exp."""
    rng = np.random.default_rng(0)
    shapes = ((HEADS, QUERIES), (kv_heads, KEYS), (kv_heads, KEYS))
    arrays = [rng.standard_normal((rows, *shape, FEATURES)).astype(dtype) for shape in shapes]
    grad_out = rng.standard_normal((rows, HEADS, QUERIES, FEATURES)).astype(dtype)
    return arrays, grad_out, rng.standard_normal((rows, HEADS, QUERIES)).astype(dtype)


def gradients(
    names: Any, arrays: list[Array], grad_out: Array, grad_lse: Any = None, backend: Any = None, **options: Any
) -> list[Array]:
    """Return the gradients with these names, after a forward pass."""
    out, lse = fastattn.attention(*arrays, **options, return_lse=True)
    wanted: Any = {"grad_lse": grad_lse, "grads": tuple(names), "backend": backend}
    return list(fastattn.attention_backward(grad_out, *arrays, out, lse, **options, **wanted))


def check(make: Any, captured: dict[str, Array], kv_heads: int = HEADS, backend: Any = None, **options: Any) -> None:
    """Compare with differences: `make` returns the function of scores, given the captured arrays by name."""
    arrays, grad_out, grad_lse = inputs(kv_heads=kv_heads)

    def loss(name: str, array: Array) -> float:
        mod = make(**{**captured, name: array})
        out, lse = fastattn.attention(*arrays, score_mod=mod, **options, return_lse=True)
        seen = lse > -np.inf
        return float((out * grad_out).sum() + (lse * grad_lse)[seen].sum())

    grad_lse = np.where(
        fastattn.attention(*arrays, score_mod=make(**captured), **options, return_lse=True)[1] > -np.inf, grad_lse, 0
    )
    found = gradients(captured, arrays, grad_out, grad_lse, backend, score_mod=make(**captured), **options)
    for (name, array), gradient in zip(captured.items(), found, strict=True):
        assert gradient.shape == array.shape
        assert gradient.dtype == array.dtype
        wanted = central_differences(partial(loss, name), array, STEP)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-8)


def relative(table: Array) -> Any:
    """A bias for each distance."""
    return lambda score, batch, head, query, key: score + table[query - key]


def normal(*shape: int, dtype: Any = np.float64) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


# -- what they are -----------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window": (3, 1)},
        {"softcap": 2.0},
        {"alibi_slopes": np.array([0.5, 0.25, 0.0, 1.0])},
        {"sinks": np.array([0.5, -1.0, 2.0, 0.0])},
        {"dropout_p": 0.3, "rng": 5},
        {"key_lengths": np.array([11, 4])},
        {"query_offset": 2, "is_causal": True},
        {"mask_mod": lambda batch, head, query, key: (query + key) % 3 != head % 3},
        {"attn_mask": np.arange(KEYS) % 4 != 1},
        {"attn_mask": np.linspace(-1, 1, QUERIES * KEYS).reshape(QUERIES, KEYS), "scale": -0.7},
        {"enable_gqa": True, "kv_heads": 2},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_they_are_those_of_differences(options: dict[str, Any], backend: str) -> None:
    check(relative, {"table": normal(2 * KEYS + 3)}, backend=backend, **options)


@backends
def test_several_arrays_and_several_places(backend: str) -> None:
    """Of which one is read in two places, one by a function that is called, and one has no axes."""
    nodes = np.arange(KEYS)[::-1] % 5

    def make(bias: Array, slopes: Array, factor: Array) -> Any:
        def away(head: Any, distance: Any) -> Any:
            return slopes[head] * np.abs(distance)

        def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
            score = np.tanh(score * factor) + bias[head, nodes[key]] * slopes[-1]
            row = bias[head]
            return score - away(head, query - key) if query > key else score * row[batch] + factor**2

        return score_mod

    check(
        make,
        {"bias": normal(HEADS, 5), "slopes": normal(HEADS), "factor": np.array(0.75)},
        backend=backend,
        softcap=3.0,
    )


@backends
def test_pytorch_agrees(backend: str) -> None:
    torch = pytest.importorskip("torch")
    arrays, grad_out, _ = inputs()
    bias = normal(HEADS, QUERIES, KEYS)
    options = {"score_mod": lambda s, b, h, q, k: s * bias[h, q, k], "backend": backend}
    (found,) = gradients(["bias"], arrays, grad_out, **options)
    query, key, value = map(torch.from_numpy, arrays)
    leaf = torch.from_numpy(bias).requires_grad_()
    out = torch.softmax(query @ key.mT * FEATURES**-0.5 * leaf, -1) @ value
    (wanted,) = torch.autograd.grad(out, leaf, torch.from_numpy(grad_out))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-12, atol=1e-14)


def test_they_are_sums_over_the_batch() -> None:
    arrays, grad_out, _ = inputs()
    mod = relative(normal(2 * KEYS))
    (found,) = gradients(["table"], arrays, grad_out, score_mod=mod)
    rows = [gradients(["table"], [each[b] for each in arrays], grad_out[b], score_mod=mod)[0] for b in range(ROWS)]
    np.testing.assert_allclose(found, sum(rows), rtol=1e-13, atol=1e-15)


@backends
def test_what_is_read_for_hidden_keys_alone_has_gradient_0(backend: str) -> None:
    arrays, grad_out, _ = inputs()
    table = normal(KEYS)
    table[7:] = np.nan, np.inf, -np.inf, np.nan
    arrays[1][..., 7:, :], arrays[2][..., 7:, :] = np.nan, np.inf
    options = {"score_mod": lambda s, b, h, q, k: s + table[k], "backend": backend}
    (found,) = gradients(["table"], arrays, grad_out, key_lengths=7, **options)
    assert not found[7:].any()
    short = [arrays[0], *(array[..., :7, :] for array in arrays[1:])]
    (wanted,) = gradients(["table"], short, grad_out, **options)
    np.testing.assert_array_equal(found[:7], wanted[:7])
    assert np.isfinite(found).all()


@backends
def test_arrays_that_no_score_depends_on_have_gradient_0(backend: str) -> None:
    arrays, grad_out, _ = inputs()
    table, other = normal(5), normal(3)
    found = gradients(
        ["table", "other"],
        arrays,
        grad_out,
        score_mod=lambda s, b, h, q, k: s * len(table) + (other[k % 3] > 0),
        backend=backend,
    )
    assert [array.tolist() for array in found] == [[0.0] * 5, [0.0] * 3]


@backends
def test_no_keys_and_no_queries(backend: str) -> None:
    arrays, grad_out, _ = inputs()
    mod = relative(normal(2 * KEYS))
    for some in ([arrays[0], *(array[..., :0, :] for array in arrays[1:])], [arrays[0][..., :0, :], *arrays[1:]]):
        rows = some[0].shape[-2]
        (found,) = gradients(["table"], some, grad_out[..., :rows, :], score_mod=mod, backend=backend)
        assert found.shape == (2 * KEYS,)
        assert not found.any()


# -- the same answer every time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_bits_at_any_thread_count_and_for_any_strides(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 4, 150, 16)).astype(dtype) for _ in range(3)]
    grad_out = rng.standard_normal((2, 4, 150, 16)).astype(dtype)
    bias = rng.standard_normal((4, 20)).astype(dtype)

    def found(bias: Array) -> bytes:
        def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
            return score + bias[head, (query - key) % 20]

        return gradients(["bias"], arrays, grad_out, score_mod=score_mod)[0].tobytes()

    with fastattn.num_threads(1):
        wanted = found(bias)
    with fastattn.num_threads(2):
        assert found(bias) == wanted
    spread = np.zeros((8, 60), dtype)[::2, ::3]
    spread[:] = bias
    for same in (np.asfortranarray(bias), bias[::-1, ::-1].copy()[::-1, ::-1], spread):
        assert found(same) == wanted


ROUNDINGS = {"bfloat16": 2e-2, "float16": 2e-3, "float32": 1e-5, "float64": 1e-5}


@pytest.mark.parametrize("captured", ROUNDINGS)
def test_each_has_the_dtype_of_its_array(captured: Any) -> None:
    tolerance = ROUNDINGS[captured]
    if captured == "bfloat16":
        captured = pytest.importorskip("ml_dtypes").bfloat16
    arrays, grad_out, _ = inputs(np.float32)
    table = normal(2 * KEYS, dtype=captured)
    (found,) = gradients(["table"], arrays, grad_out, score_mod=relative(table))
    assert found.dtype == captured
    wide = [array.astype(np.float64) for array in arrays]
    (wanted,) = gradients(["table"], wide, grad_out.astype(np.float64), score_mod=relative(table.astype(np.float64)))
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=tolerance, atol=1e-5)


# -- refusals ----------------------------------------------------------------------------------------------------------


def in_a_loop(table: Array) -> Any:
    """An element for each turn of a loop."""

    def in_a_loop(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        for i in range(2):
            score = score + table[(key + i) % 7]
        return score

    return in_a_loop


def called_twice(table: Array) -> Any:
    """Two elements, which may be the same, by a function that is called."""

    def read(key: Any) -> Any:
        return table[key]

    def called_twice(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + read(key) * read(query)

    return called_twice


def as_often_as_it_says(table: Array) -> Any:
    """As many elements as the key says, each a factor of the next."""

    def as_often_as_it_says(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        for i in range(key % 4):
            score = score * table[i] + table[(query + i) % 7]
        return score

    return as_often_as_it_says


@backends
@pytest.mark.parametrize("make", [in_a_loop, called_twice, as_often_as_it_says])
def test_an_array_may_be_read_several_times_at_one_place(make: Any, backend: str) -> None:
    check(make, {"table": normal(KEYS)}, backend=backend)


@backends
def test_an_index_that_is_out_of_range(backend: str) -> None:
    arrays, grad_out, _ = inputs()
    table = normal(KEYS - 1)
    options: dict[str, Any] = {"score_mod": lambda s, b, h, q, k: s + table[k]}
    out, lse = fastattn.attention(*arrays, **options, key_lengths=KEYS - 1, return_lse=True)
    call: Any = (grad_out, *arrays, out, lse)
    with pytest.raises(IndexError, match="^score_mod: .*an index was out of range"):
        fastattn.attention_backward(*call, grads=("table",), **options, backend=backend)
    options |= {"key_lengths": KEYS - 1, "backend": backend}
    (found,) = fastattn.attention_backward(*call, grads=("table",), **options)
    assert np.isfinite(found).all()


@backends
def test_names_of_what_has_no_gradient_are_refused(backend: str) -> None:
    arrays, grad_out, _ = inputs()
    whole, number, table = np.arange(KEYS), 0.5, normal(KEYS)
    options = {"score_mod": lambda s, b, h, q, k: s * number + whole[k] + table[k]}
    for name in ("whole", "number", "nothing"):
        with pytest.raises(ValueError, match=f"^grads: '{name}' is among them; expected some of .*'table'"):
            gradients([name], arrays, grad_out, backend=backend, **options)
    seen = {"mask_mod": lambda b, h, q, k: table[k] > -9}
    with pytest.raises(ValueError, match="^grads: 'table' is among them"):
        gradients(["table"], arrays, grad_out, backend=backend, **seen)


@backends
def test_an_array_that_is_called_as_an_argument_goes_by_the_name_of_the_function_too(backend: str) -> None:
    arrays, grad_out, _ = inputs()
    key = table = normal(2 * KEYS)

    def score_mod(score: Any, batch: Any, head: Any, i: Any, j: Any) -> Any:
        return score + key[i - j]

    found = gradients(["key of score_mod", "key"], arrays, grad_out, score_mod=score_mod, backend=backend)
    (wanted,) = gradients(["table"], arrays, grad_out, score_mod=relative(table), backend=backend)
    np.testing.assert_array_equal(found[0], wanted)
    assert found[1].shape == arrays[1].shape
