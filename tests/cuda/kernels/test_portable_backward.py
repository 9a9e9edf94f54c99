"""The backward pass on CUDA against the derivative in a wider type; small cases, since a simulator may run them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, laid_out, numbers, random_mask

import fastattn
from fastattn import reference
from fastattn.call.shapes import describe
from fastattn.call.upstream import Upstream

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from numba import cuda

Array = np.ndarray[Any, Any]
Arrays = tuple[Array, ...]
DTYPES = [np.float32, np.float64]
backward = partial(fastattn.attention_backward, backend="cuda")


def inputs(*shapes: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def gradients(grad_out: Array, *args: Any, rng: Any = None, **options: Any) -> Arrays:
    """Run the forward pass of the reference, and the backward pass on CUDA."""
    query, key, value, *mask = args
    own = {name: options.pop(name) for name in ("grad_lse", "grad_mask") if name in options}
    out, lse = fastattn.attention(query, key, value, *mask, **options, rng=rng, return_lse=True, backend="reference")
    results: Arrays = backward(grad_out, query, key, value, out, lse, *mask, **options, rng=rng, **own)
    return results


def same_bits(some: Arrays, others: Arrays) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.tobytes() == other.tobytes()


def check(grad_out: Array, *args: Any, grad_mask: bool = False, **options: Any) -> Arrays:
    """Check the gradients of a call, and return them."""
    found = gradients(grad_out, *args, grad_mask=grad_mask, **options)
    assert len(found) == 3 + grad_mask
    tolerances.check_gradients(found, args, *tolerances.expected_gradients(grad_out, *args, **options))
    return found


# -- whole calls -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """Shapes of query, key, value and mask, and whether heads are grouped."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: tuple[int, ...]
    enable_gqa: bool


@st.composite
def small_shapes(draw: st.DrawFn) -> Shapes:
    """Draw shapes whose lengths are about those of a tile, or two."""
    batch = draw(st.sampled_from(((), (), (2,), (2, 1))))
    kv_heads, group = draw(st.sampled_from(((1, 1), (2, 1), (1, 2), (2, 2))))
    queries, keys, features, value_features = (draw(st.integers(1, most)) for most in (9, 9, 5, 5))
    heads = kv_heads * group

    def some(axes: tuple[int, ...]) -> tuple[int, ...]:
        axes = tuple(1 if draw(st.integers(0, 3)) == 0 else axis for axis in axes)
        return axes[draw(st.sampled_from((0, 0, len(axes)))) :]

    # a query of one head beside groups would be another case: broadcasting
    query = (*batch, heads) if group > 1 else some((*batch, heads))
    return Shapes(
        (*query, queries, features),
        (*some((*batch, kv_heads)), keys, features),
        (*some((*batch, kv_heads)), keys, value_features),
        some((*batch, heads, queries, keys)),
        group > 1,
    )


MASKS = (None, None, "bool", "bool, few rows", "padding", "float", "float, -inf", "float, lowest")


@settings(max_examples=max(20, settings().max_examples // 2))
@given(
    shapes=small_shapes(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(MASKS),
    is_causal=st.sampled_from((False, True, "bottom-right")),
    dropout_p=st.sampled_from((0.0, 0.0, 0.4, 1.0)),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_call(
    shapes: Shapes, dtype: Any, kind: str | None, is_causal: Any, dropout_p: float, layout: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    query, key, value = (laid_out(numbers(rng, s, dtype), layout) for s in (shapes.query, shapes.key, shapes.value))
    options = {"is_causal": is_causal, "enable_gqa": shapes.enable_gqa, "dropout_p": dropout_p}
    problem, _ = describe(query, key, value, **options)
    mask = None
    if kind is not None:
        scores = problem.weights_shape
        fits = len(shapes.mask) <= len(scores) and all(
            own in (1, full) for own, full in zip(reversed(shapes.mask), reversed(scores), strict=False)
        )
        mask = random_mask(rng, shapes.mask if fits else scores, kind, rng.choice((np.float16, np.float32, np.float64)))
    grad_out = laid_out(numbers(rng, problem.out_shape, dtype), layout)
    grad_lse = numbers(rng, problem.lse_shape, dtype) if seed % 2 else None
    grad_mask = mask is not None and mask.dtype.kind == "f"
    check(grad_out, query, key, value, mask, grad_mask=grad_mask, grad_lse=grad_lse, rng=seed, **options)


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys", "head_dim", "value_dim"])
def test_axes_of_length_zero(empty: str) -> None:
    size = {"batch": 2, "heads": 2, "queries": 3, "keys": 5, "head_dim": 2, "value_dim": 3, empty: 0}
    batch, heads, queries, keys, head_dim, value_dim = size.values()
    shapes = [(batch, heads, queries, value_dim), (batch, heads, queries, head_dim)]
    shapes += [(1, heads, keys, head_dim), (batch, heads, keys, value_dim), (1, 1, queries, keys)]
    check(*inputs(*shapes), grad_mask=True)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((np.float32, s) for s in [(), (1,), (7,), (6, 1), (6, 7), (2, 1, 1), (2, 6, 7), (3, 1, 1, 7), (3, 2, 6, 7)]),
        *((np.float64, s) for s in [(2, 1, 1), (3, 2, 6, 7)]),
    ],
)
def test_gradient_of_a_mask(dtype: Any, shape: tuple[int, ...]) -> None:
    """It is summed over every axis along which the mask was broadcast."""
    arrays = inputs((3, 2, 6, 3), (3, 2, 6, 2), (2, 7, 2), (3, 1, 7, 3), shape, dtype=dtype)
    check(*arrays, grad_mask=True, is_causal="bottom-right")


def test_groups_and_broadcast_axes_are_summed() -> None:
    shapes = [(2, 6, 5, 3), (1, 6, 5, 2), (2, 2, 7, 2), (2, 1, 7, 3)]
    found = check(*inputs(*shapes), enable_gqa=True)
    assert [gradient.shape for gradient in found] == shapes[1:]


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision(storage: str, is_causal: bool) -> None:
    """Sums are float32 inside: a gradient is that of the rounded arguments, rounded once."""
    dtype = np.dtype(np.float16) if storage == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    eps = 2.0 ** {"float16": -10, "bfloat16": -7}[storage]
    shapes = [(4, 9, 6), (4, 9, 5), (2, 11, 5), (2, 11, 6)]
    half = [array.astype(dtype) for array in inputs(*shapes)]
    options: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": True, "dropout_p": 0.2, "rng": 7}
    grad_out, query, key, value = (array.astype(np.float32) for array in half)
    mask = np.random.default_rng(1).standard_normal((9, 11)).astype(np.float16)
    out, lse = reference.attention(query, key, value, mask, **options, return_lse=True)
    rounded = out.astype(dtype)
    found = backward(*half, rounded, lse, mask, **options, grad_mask=True)

    problem, _, bounds = tolerances.expected_gradients(grad_out, query, key, value, mask, **options)
    operands = describe(query, key, value, mask, 0.2, is_causal, None, True)[1]
    rows = problem.rows_shape
    upstream = Upstream(
        grad_out.reshape(*rows, 9, 6),
        rounded.astype(np.float32).reshape(*rows, 9, 6),
        lse.reshape(*rows, 9),
        None,
        lse.dtype,
    )
    exact = reference.differentiate(problem, operands, upstream, 7)
    wanted = (exact.query, exact.key, exact.value, exact.scores)
    for gradient, argument, want, bound in zip(found, (*half[1:], mask), wanted, bounds, strict=True):
        assert gradient.dtype == argument.dtype
        shared = argument is half[2] or argument is half[3]
        want, bound = (tolerances.folded(array, argument.shape, problem, shared) for array in (want, bound))
        near = bound + (2.0**-10 if argument is mask else eps) * np.abs(want)
        assert (np.abs(gradient.astype(np.float64) - want) <= near + 1e-7).all()


# -- what it means -----------------------------------------------------------------------------------------------------


def test_queries_without_keys_give_and_get_nothing() -> None:
    grad_out, query, key, value = inputs((7, 3), (7, 2), (9, 2), (9, 3))
    mask = np.ones((7, 9), bool)
    mask[[1, 6]] = False
    odd = grad_out.copy()
    odd[[1, 6]] = np.nan
    found = gradients(odd, query, key, value, mask)
    assert not found[0][[1, 6]].any()
    assert all(np.isfinite(gradient).all() for gradient in found)
    nothing = gradients(grad_out, query, key, value, np.zeros(9, bool), grad_lse=np.ones(7))
    assert not any(gradient.any() for gradient in nothing)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["key", "value", "query", "grad_out"])
@pytest.mark.parametrize("how", ["boolean", "float", "causal"])
def test_what_is_masked_leaks_nothing(odd: float, which: str, how: str) -> None:
    """Bit for bit the gradients of everyone else are what they would be without it."""
    arrays = dict(zip(("grad_out", "query", "key", "value"), inputs((6, 3), (6, 2), (6, 2), (6, 3)), strict=True))
    of_query = which in ("query", "grad_out")
    mask: Array | None = None
    options: dict[str, Any] = {}
    if how == "causal":  # key 5 is seen by query 5 alone, query 0 sees key 0 alone
        row, options = 0 if of_query else 5, {"is_causal": True}
        sees = np.arange(6) == row
    else:
        row, sees = 2, np.arange(6) < 3
        mask = np.ones((6, 6), bool)
        mask[(row, ~sees) if of_query else (~sees, row)] = False
        if how == "float":
            mask = np.where(mask, 0, -np.inf)
    clean = gradients(arrays["grad_out"], arrays["query"], arrays["key"], arrays["value"], mask, **options)
    spoilt = {name: array.copy() for name, array in arrays.items()}
    spoilt[which][row] = odd
    found = gradients(spoilt["grad_out"], spoilt["query"], spoilt["key"], spoilt["value"], mask, **options)
    own = slice(1, None) if of_query else slice(1)  # the gradients of those that see it, or that it sees
    same_bits(tuple(g[~sees] for g in found[own]), tuple(g[~sees] for g in clean[own]))
    if np.isnan(odd):
        assert not all(np.isfinite(g[sees]).all() for g in found[own])


def test_a_weight_of_zero_is_not_a_mask() -> None:
    """The weight of a key that may be looked at is 0 after dropout, or for its score: 0 · infinity is NaN."""
    grad_out, query, key, value = inputs((5, 3), (5, 2), (5, 2), (5, 3))
    grad_out[2, 1] = np.inf
    _, _, grad_value = gradients(grad_out, query, key, value, dropout_p=1.0, rng=0)
    assert np.isnan(grad_value[:, 1]).all()
    assert not grad_value[:, [0, 2]].any()


# -- the same answer every time ----------------------------------------------------------------------------------------


def test_the_same_bits_every_time_for_any_strides_and_in_any_batch() -> None:
    grad_out, query, key, value = inputs((2, 2, 7, 3), (2, 2, 7, 3), (2, 2, 9, 3), (2, 2, 9, 3))
    first = gradients(grad_out, query, key, value, is_causal=True)
    same_bits(first, gradients(grad_out, query, key, value, is_causal=True))
    turned = [np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2) for array in (grad_out, query, key, value)]
    same_bits(first, gradients(*turned, is_causal=True))
    alone = gradients(grad_out[1], query[1], key[1], value[1], is_causal=True)
    same_bits(tuple(gradient[1] for gradient in first), alone)


# -- arrays in device memory -------------------------------------------------------------------------------------------


def test_arrays_in_device_memory_give_such() -> None:
    arrays = inputs((2, 5, 3), (2, 5, 3), (2, 6, 3), (2, 6, 3))
    out, lse = fastattn.attention(*arrays[1:], return_lse=True, backend="reference")
    wanted = backward(*arrays, out, lse)
    grad_out, query, key, value, out, lse = map(cuda.to_device, (*arrays, out, lse))
    found = fastattn.attention_backward(grad_out, query, key, value, out, lse)
    same_bits(tuple(gradient.copy_to_host() for gradient in found), wanted)


def test_a_wrong_array_in_device_memory_is_named() -> None:
    arrays = inputs((2, 5, 3), (2, 5, 3), (2, 6, 3), (2, 6, 3))
    out, lse = fastattn.attention(*arrays[1:], return_lse=True, backend="reference")
    moved = list(map(cuda.to_device, (*arrays, out, lse)))
    wrong = [*moved[:5], cuda.to_device(lse.astype(np.float64))]
    with pytest.raises(TypeError, match="lse: dtype float64; expected float32"):
        backward(*wrong)
    with pytest.raises(ValueError, match="grad_out: shape .*; expected"):
        backward(moved[2], *moved[1:])
    with pytest.raises(TypeError, match="out: numpy.ndarray in host memory"):
        backward(*moved[:4], out, moved[5])
    with pytest.raises(ValueError, match="rng: None"):
        backward(*moved, dropout_p=0.1)
