"""Gradients of the arrays that a function of scores captures, on the device: the CPU's, in an order of their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from strategies import Call, calls, numbers

import fastattn
from fastattn.call.arrays import as_operands
from fastattn.call.shapes import describe
from fastattn.call.upstream import captured_sources
from fastattn.cuda.host import captured_gradient

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from numba import cuda

Array = np.ndarray[Any, Any]

ROWS, HEADS, QUERIES, KEYS = 2, 4, 7, 9
FEW = max(10, settings().max_examples // 8)


def inputs(dtype: Any = np.float64, kv_heads: int = 2) -> tuple[list[Array], Array, Array]:
    """Return (query, key, value), and gradients that arrive at the result and the log-sum-exp."""
    rng = np.random.default_rng(0)
    shapes = ((HEADS, QUERIES), (kv_heads, KEYS), (kv_heads, KEYS))
    arrays = [rng.standard_normal((ROWS, *shape, 3)).astype(dtype) for shape in shapes]
    arriving = [rng.standard_normal((ROWS, HEADS, QUERIES, *last)).astype(dtype) for last in ((3,), ())]
    return arrays, arriving[0], arriving[1]


def gradients(
    names: Any, arrays: Any, grad_out: Any, grad_lse: Any = None, backend: str | None = "cuda", **options: Any
) -> list[Any]:
    """Return the gradients with these names, after a forward pass."""
    options = {"enable_gqa": True, "backend": backend, **options}
    out, lse = fastattn.attention(*arrays, **options, return_lse=True)
    return list(
        fastattn.attention_backward(grad_out, *arrays, out, lse, **options, grad_lse=grad_lse, grads=tuple(names))
    )


def normal(*shape: int, dtype: Any = np.float64) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def relative(table: Array) -> Any:
    """A bias for each distance."""
    return lambda score, batch, head, query, key: score + table[query - key]


def check(score_mod: Any, *names: str, **options: Any) -> None:
    """Compare with the CPU's, which differences agree with."""
    for dtype, bound in ((np.float64, 1e-12), (np.float32, 1e-4)):
        arrays, grad_out, grad_lse = inputs(dtype)
        found = gradients(names, arrays, grad_out, grad_lse, score_mod=score_mod, **options)
        arrays, grad_out, grad_lse = inputs()
        wanted = gradients(names, arrays, grad_out, grad_lse, backend="cpu", score_mod=score_mod, **options)
        for one, other in zip(found, wanted, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert other.any()
            np.testing.assert_allclose(one, other, rtol=bound, atol=bound)


# -- what they are -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "query_offset": [2, -1]},
        {"window": (3, 1), "softcap": 2.0},
        {"alibi_slopes": np.array([0.5, 0.25, 0.0, 1.0]), "sinks": np.array([0.5, -1.0, 2.0, 0.0])},
        {"dropout_p": 0.3, "rng": 5, "key_lengths": np.array([9, 4])},
        {"mask_mod": lambda batch, head, query, key: (query + key) % 3 != head % 3},
        {"attn_mask": np.arange(KEYS) % 4 != 1},
        {"attn_mask": np.linspace(-1, 1, QUERIES * KEYS).reshape(QUERIES, KEYS), "scale": 1e-40},
    ],
    ids=", ".join,
)
def test_they_are_the_cpus(options: dict[str, Any]) -> None:
    check(relative(normal(2 * KEYS + 3)), "table", **options)


@pytest.mark.parametrize("elements", [4, 5])
def test_differences_agree(elements: int) -> None:
    """Of as many elements as there are threads, each has one, and holds it to the end; of more, others follow it."""
    arrays, grad_out, grad_lse = inputs()
    options: dict[str, Any] = {"softcap": 1.5, "window": (4, 3), "enable_gqa": True}

    def factor(table: Array) -> Any:
        return lambda score, batch, head, query, key: score * table[(query - key) % elements] + table[key % elements]

    def loss(table: Array) -> float:
        told: dict[str, Any] = {"score_mod": factor(table), "backend": "cuda", **options}
        out, lse = fastattn.attention(*arrays, **told, return_lse=True)
        return float((out * grad_out).sum() + (lse * grad_lse).sum())

    table, step = normal(elements), 1e-5
    (found,) = gradients(["table"], arrays, grad_out, grad_lse, score_mod=factor(table), **options)
    wanted = [(loss(table + step * each) - loss(table - step * each)) / (2 * step) for each in np.eye(elements)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)


def test_several_arrays_and_several_places() -> None:
    """Of which one is read in two places, one by a function that is called, and one has no axes."""
    nodes = np.arange(KEYS)[::-1] % 5
    bias, slopes, factor = normal(HEADS, 5), normal(HEADS), np.array(0.75)

    def away(head: Any, distance: Any) -> Any:
        return slopes[head] * np.abs(distance)

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        score = np.tanh(score * factor) + bias[head, nodes[key]] * slopes[-1]
        row = bias[head]
        return score - away(head, query - key) if query > key else score * row[batch] + factor**2

    check(score_mod, "factor", "slopes", "bias", softcap=3.0)


def test_an_element_for_each_score_and_one_for_all() -> None:
    """Each thread has elements of its own, and one thread has all that there is."""
    each, one = normal(HEADS, QUERIES, KEYS), normal(1)
    check(lambda score, batch, head, query, key: score * each[head, query, key], "each")
    check(lambda score, batch, head, query, key: score * one[0], "one")


def test_other_gradients_beside_them_are_what_they_are_alone() -> None:
    arrays, grad_out, _ = inputs(np.float32)
    table, options = normal(2 * KEYS), {"sinks": np.zeros(HEADS, np.float32)}
    names = ("sinks", "table", "key")
    found = gradients(names, arrays, grad_out, score_mod=relative(table), **options)
    for name, each in zip(names, found, strict=True):
        (alone,) = gradients([name], arrays, grad_out, score_mod=relative(table), **options)
        assert alone.tobytes() == each.tobytes()


def test_what_no_score_depends_on_has_gradient_0() -> None:
    """Neither what is not read, nor what is read for hidden keys alone, whatever stands there."""
    arrays, grad_out, _ = inputs()
    table, other, last = normal(5), normal(3), normal(KEYS)
    last[4:] = np.nan
    arrays[1][..., 4:, :], arrays[2][..., 4:, :] = np.nan, np.inf

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score * len(table) + (other[key % 3] > 0) + last[key]

    found = gradients(["table", "other", "last"], arrays, grad_out, score_mod=score_mod, key_lengths=4)
    assert [array.tolist() for array in found[:2]] == [[0.0] * 5, [0.0] * 3]
    assert found[2][:4].all()
    assert np.isfinite(found[2][:4]).all()
    assert not found[2][4:].any()


def test_no_keys_no_queries_and_no_elements() -> None:
    arrays, grad_out, _ = inputs()
    table, empty = normal(2 * KEYS), np.zeros((0, 3))
    for some in ([arrays[0], *(array[..., :0, :] for array in arrays[1:])], [arrays[0][..., :0, :], *arrays[1:]]):
        rows = some[0].shape[-2]
        found = gradients(["table"], some, grad_out[..., :rows, :], score_mod=relative(table))[0]
        assert found.shape == table.shape
        assert not found.any()
    mod = lambda score, batch, head, query, key: score + len(empty)  # noqa: E731
    (found,) = gradients(["empty"], arrays, grad_out, score_mod=mod)
    assert (found.shape, found.dtype) == ((0, 3), np.float64)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, "bfloat16"])
def test_each_has_the_dtype_of_its_array(dtype: Any) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    arrays, grad_out, _ = inputs(np.float32)
    table = normal(2 * KEYS).astype(dtype)
    (found,) = gradients(["table"], arrays, grad_out, score_mod=relative(table))
    assert found.dtype == dtype
    (wanted,) = gradients(["table"], arrays, grad_out, score_mod=relative(table.astype(np.float32)), backend="cpu")
    bound = 1e-5 if np.dtype(dtype).itemsize > 2 else 1e-2
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=bound, atol=1e-5)


@settings(max_examples=FEW)
@given(call=calls(small=True, further=True, dropout=True, with_functions=True))
def test_any_call(call: Call) -> None:
    options = {name: given for name, given in call.options.items() if name != "rng"}
    problem, operands = describe(*as_operands(*call.args), **options)
    names = tuple(captured_sources(problem, operands.captured))
    assume(names)
    rng = np.random.default_rng(3)
    grad_out, mask = numbers(rng, problem.out_shape, call.query.dtype), {"attn_mask": call.args[3]}
    found = gradients(names, call.args[:3], grad_out, **mask, **call.options)
    wanted = gradients(names, call.args[:3], grad_out, backend="cpu", **mask, **call.options)
    for one, other in zip(found, wanted, strict=True):
        size = np.abs(other[np.isfinite(other)]).max(initial=1) if other.size else 1
        bound = 2e3 * float(np.finfo(problem.real).eps) * float(size)
        np.testing.assert_allclose(one, other, rtol=bound, atol=bound)


# -- the same answer every time ----------------------------------------------------------------------------------------


def test_the_same_bits_every_time_and_for_any_strides() -> None:
    arrays, grad_out, _ = inputs(np.float32)
    table = normal(2 * KEYS, dtype=np.float32)
    (wanted,) = gradients(["table"], arrays, grad_out, score_mod=relative(table))
    for same in (table, table[::-1].copy()[::-1], table.repeat(3)[::3]):
        (found,) = gradients(["table"], arrays, grad_out, score_mod=relative(same))
        assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("elements", [1, 20, 1 << 21, 1 << 30])
def test_how_many_parts_there_are_depends_on_the_array_alone(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_gradient, "MOST_PARTS", 256)
    place = type("Nowhere", (), {"new": lambda self, *described: None})()
    parts = captured_gradient.Parts("table", np.broadcast_to(np.float32(0), elements), place)
    assert parts.count == {1: 256, 20: 256, 1 << 21: 2, 1 << 30: 2}[elements]


def test_an_array_that_no_number_of_32_bits_counts() -> None:
    with pytest.raises(ValueError, match="grads: 'table' has 2147483648 elements"):
        captured_gradient.Parts("table", np.broadcast_to(np.float32(0), 1 << 31), None)  # type: ignore[arg-type]


def test_any_number_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, grad_out, _ = inputs()
    table = normal(2 * KEYS)
    (wanted,) = gradients(["table"], arrays, grad_out, score_mod=relative(table))
    for most in (3, 7, 40):
        monkeypatch.setattr(captured_gradient, "MOST_PARTS", most)
        (found,) = gradients(["table"], arrays, grad_out, score_mod=relative(table))
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)


def test_arrays_in_device_memory() -> None:
    arrays, grad_out, grad_lse = inputs(np.float32)
    options: dict[str, Any] = {"score_mod": relative(normal(2 * KEYS, dtype=np.float32)), "is_causal": True}
    wanted = gradients(["table", "query"], arrays, grad_out, grad_lse, **options)
    there = list(map(cuda.to_device, (*arrays, grad_out, grad_lse)))
    found = gradients(["table", "query"], there[:3], *there[3:], backend=None, **options)
    assert [array.copy_to_host().tobytes() for array in found] == [array.tobytes() for array in wanted]


# -- packed sequences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_packed_sequences(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    starts, table, scales = [0, 3, 3, 12], normal(2 * KEYS), normal(3)
    arrays = [rng.standard_normal((12, HEADS, 3)).astype(dtype) for _ in range(4)]

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score * scales[batch] + table[query - key]

    def found(backend: str) -> Any:
        told: dict[str, Any] = {"score_mod": score_mod, "is_causal": True, "backend": backend}
        out, lse = fastattn.attention_varlen(*arrays[:3], starts, **told, return_lse=True)
        call = (arrays[3], *arrays[:3], out, lse, starts)
        return fastattn.attention_varlen_backward(*call, **told, grads=("scales", "query", "table"))

    bound = 1e-4 if dtype == np.float32 else 1e-12
    for one, other in zip(found("cuda"), found("cpu"), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, rtol=bound, atol=bound)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_an_array_that_is_read_several_times_at_one_place_is_refused() -> None:
    arrays, grad_out, _ = inputs()
    table = normal(KEYS)

    def in_a_loop(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        for i in range(2):
            score = score + table[(key + i) % 7]
        return score

    with pytest.raises(ValueError, match=r"^grads: score_mod: .*in_a_loop reads an array more than once"):
        gradients(["table"], arrays, grad_out, score_mod=in_a_loop)
    assert gradients(["query"], arrays, grad_out, score_mod=in_a_loop)[0].any()


def test_names_of_what_is_not_captured_and_indices_out_of_range() -> None:
    arrays, grad_out, _ = inputs()
    table, whole = normal(KEYS - 1), np.arange(KEYS)
    out, lse = fastattn.attention(*arrays, enable_gqa=True, return_lse=True)
    backward = partial(fastattn.attention_backward, grad_out, *arrays, out, lse, enable_gqa=True, backend="cuda")

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[whole[key]]

    for name in ("whole", "tables"):
        with pytest.raises(ValueError, match=f"grads: '{name}' is among them; expected some of .*'table'"):
            backward(score_mod=score_mod, grads=(name,))
    with pytest.raises(IndexError, match="score_mod: .*an index was out of range"):
        backward(score_mod=score_mod, grads=("table",))
    assert backward(score_mod=score_mod, grads=("table",), key_lengths=KEYS - 1)[0].any()
