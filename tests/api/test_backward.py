"""The backward pass of attention: against the derivative in a wider type, PyTorch, and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BFLOAT16, LAYOUTS, Call, bias_in, bits_of, calls, each, laid_out, numbers, random_mask

import fastattn
from fastattn import reference
from fastattn.cpu.host import backward as cpu
from fastattn.cpu.host import session
from fastattn.cpu.host.kernels import PLAIN, STEPS
from fastattn.machine import libraries as kernels
from fastattn.machine import table as isa

Array = np.ndarray[Any, Any]
Arrays = tuple[Array, ...]
DTYPES = [np.float32, np.float64]
AND_PAIRS = [*DTYPES, BFLOAT16]  # of which some machines multiply pairs


def inputs(*shapes: tuple[int, ...], dtype: Any = np.float64, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def gradients(grad_out: Array, *args: Any, rng: Any = None, **options: Any) -> Arrays:
    """Run forward and backward; `options` are those of both, and grad_lse, grad_mask and backend."""
    query, key, value, *mask = args
    own = {name: options.pop(name) for name in ("grad_lse", "grad_mask") if name in options}
    out, lse = fastattn.attention(query, key, value, *mask, **options, rng=rng, return_lse=True)
    results: Arrays = fastattn.attention_backward(
        grad_out, query, key, value, out, lse, *mask, **options, rng=rng, **own
    )
    return results


def same_bits(some: Arrays, others: Arrays) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.tobytes() == other.tobytes()


# -- whole calls -------------------------------------------------------------------------------------------------------


def check(call: Call, seed: int, with_lse: bool, grad_layout: str = "contiguous") -> None:
    rng = np.random.default_rng(seed)
    query, key, value, mask = call.args
    out, lse = fastattn.attention(*call.args, **call.options, return_lse=True)
    grad_out = laid_out(rng.standard_normal(out.shape).astype(out.dtype), grad_layout)
    grad_lse = rng.standard_normal(lse.shape).astype(lse.dtype) if with_lse else None
    grad_mask = bias_in(mask) is not None
    before = call.bits, bits_of(out, lse, grad_out)
    found = fastattn.attention_backward(
        grad_out, query, key, value, out, lse, mask, **call.options, grad_lse=grad_lse, grad_mask=grad_mask
    )
    assert (call.bits, bits_of(out, lse, grad_out)) == before
    assert len(found) == 3 + grad_mask
    wanted = tolerances.expected_gradients(grad_out, *call.args, grad_lse=grad_lse, **call.options)
    tolerances.check_gradients(found, call.args, *wanted)


MASKS = (None, None, "bool", "bool, few rows", "padding", "float", "float, -inf", "float, lowest")


@settings(max_examples=2 * settings().max_examples)
@given(call=calls(masks=MASKS), seed=st.integers(0, 99), with_lse=st.booleans(), layout=st.sampled_from(LAYOUTS))
def test_any_call(call: Call, seed: int, with_lse: bool, layout: str) -> None:
    check(call, seed, with_lse, layout)


@given(call=calls(dropout=True, masks=MASKS), seed=st.integers(0, 99), with_lse=st.booleans())
def test_dropout(call: Call, seed: int, with_lse: bool) -> None:
    check(call, seed, with_lse)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_dropout_in_each_dtype(dtype: Any) -> None:
    rng, options = np.random.default_rng(0), {"dropout_p": 0.5, "rng": 3}
    sizes = ((1, 2, 70, 40), (1, 2, 90, 40), (1, 2, 90, 24), (1, 2, 70, 24))
    *args, grad_out = (rng.standard_normal(size).astype(dtype) for size in sizes)
    found = gradients(grad_out, *args, **options)
    tolerances.check_gradients(found, args, *tolerances.expected_gradients(grad_out, *args, **options))


@given(call=calls(empty=True, masks=MASKS), seed=st.integers(0, 99))
def test_axes_of_length_zero(call: Call, seed: int) -> None:
    check(call, seed, True)


LENGTHS = ((1, 700), (65, 64), (130, 257), (197, 262), (300, 65))


@pytest.mark.parametrize("dtype", AND_PAIRS)
@pytest.mark.parametrize("kind", [None, "bool", "padding", "float, -inf"])
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_many_blocks(dtype: Any, kind: str | None, is_causal: Any, lengths: tuple[int, int]) -> None:
    rng = np.random.default_rng(lengths)
    features = int(rng.choice((16, 33, 64)))
    query, key, value = (
        numbers(rng, (heads, n, features), dtype) for heads, n in zip((2, 1, 1), (*lengths, lengths[1]), strict=True)
    )
    mask = None if kind is None else random_mask(rng, (2, *lengths), kind, np.float32)
    grad_out, grad_lse = numbers(rng, (2, lengths[0], features), dtype), numbers(rng, (2, lengths[0]), dtype)
    options = {"is_causal": is_causal, "enable_gqa": True}
    grad_mask = mask is not None and mask.dtype.kind == "f"
    found = gradients(grad_out, query, key, value, mask, grad_lse=grad_lse, grad_mask=grad_mask, **options)
    wanted = tolerances.expected_gradients(grad_out, query, key, value, mask, grad_lse=grad_lse, **options)
    tolerances.check_gradients(found, (query, key, value, mask), *wanted)


#: Of two rows of a batch: windows, offsets, lengths, softcaps, slopes.
INTERVALS: list[dict[str, Any]] = [
    {"window": (70, 5), "query_offset": 9},
    {"window": (3, None), "is_causal": False, "softcap": 2.0},
    {"window": (200, 0), "is_causal": "bottom-right", "key_lengths": [130, 40]},
    {"query_offset": [-100, 60], "is_causal": True, "softcap": 5.0},
    {"window": (40, 30), "query_offset": [200, -20], "key_lengths": [257, 0]},
    {"is_causal": False, "alibi_slopes": [[0.25], [-(2.0**-8)]], "key_lengths": [257, 99], "softcap": 9.0},
]


@pytest.mark.parametrize("dtype", AND_PAIRS)
@pytest.mark.parametrize("kind", [None, "bool", "float, -inf", "pair"])
@pytest.mark.parametrize("options", INTERVALS, ids=str)
@pytest.mark.parametrize("lengths", [(1, 700), (65, 257), (197, 262)], ids=str)
def test_many_blocks_of_intervals(
    dtype: Any, kind: str | None, options: dict[str, Any], lengths: tuple[int, int]
) -> None:
    rng = np.random.default_rng(lengths)
    query, key, value = (
        numbers(rng, (2, heads, n, 33), dtype) for heads, n in zip((2, 1, 1), (*lengths, lengths[1]), strict=True)
    )
    mask: Any = None
    if kind is not None:
        mask = random_mask(rng, (2, *lengths), "float" if kind == "pair" else kind, np.float32)
        mask = (mask, random_mask(rng, lengths, "bool", np.float32)) if kind == "pair" else mask
    grad_out, grad_lse = numbers(rng, (2, 2, lengths[0], 33), dtype), numbers(rng, (2, 2, lengths[0]), dtype)
    options = {"enable_gqa": True, **options}
    found = gradients(
        grad_out, query, key, value, mask, grad_lse=grad_lse, grad_mask=bias_in(mask) is not None, **options
    )
    wanted = tolerances.expected_gradients(grad_out, query, key, value, mask, grad_lse=grad_lse, **options)
    tolerances.check_gradients(found, (query, key, value, mask), *wanted)


# -- other oracles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 300, 64), (2, 3, 77, 128), (1, 1, 40, 7)], ids=str)
def test_pytorch_differentiates_the_same(dtype: Any, is_causal: bool, shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    arrays = inputs(*[shape] * 4, dtype=dtype)
    found = gradients(arrays[0], *arrays[1:], is_causal=is_causal)
    grad_out, *leaves = (torch.from_numpy(array.astype(np.float64)) for array in arrays)
    for leaf in leaves:
        leaf.requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=is_causal)
    exact = torch.autograd.grad(out, leaves, grad_out)
    tolerances.check_promise(found, [gradient.numpy() for gradient in exact], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorch_differentiates_by_a_mask_and_through_groups(dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    shapes = [(2, 6, 50, 24), (2, 6, 50, 24), (2, 3, 70, 24), (1, 3, 70, 24), (6, 1, 70)]
    arrays = inputs(*shapes, dtype=dtype)
    found = gradients(arrays[0], *arrays[1:], enable_gqa=True, grad_mask=True)
    grad_out, query, key, value, mask = (torch.from_numpy(a.astype(np.float64)).requires_grad_() for a in arrays)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value.expand(2, -1, -1, -1), mask.expand(6, 50, 70), enable_gqa=True
    )
    exact = torch.autograd.grad(out, (query, key, value, mask), grad_out.detach())
    tolerances.check_promise(found, [gradient.numpy() for gradient in exact], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("softcap", [None, 0.3, 4.0])
@pytest.mark.parametrize("window", [(None, None), (20, 5), (None, 0)], ids=str)
@pytest.mark.parametrize("slopes", [None, [0.5, 0.01, -0.02]], ids=str)
def test_pytorch_differentiates_by_softcaps_windows_slopes_and_pairs_of_masks(
    dtype: Any, backend: str, softcap: float | None, window: Any, slopes: Any
) -> None:
    """Composed by hand: PyTorch's function has none of these."""
    torch = pytest.importorskip("torch")
    shapes = [(2, 3, 70, 16), (2, 3, 70, 24), (2, 3, 90, 24), (2, 3, 90, 16), (3, 70, 90), (2, 3, 70)]
    grad_out, query, key, value, bias, grad_lse = inputs(*shapes, dtype=dtype)
    keep, offsets, lengths = np.arange(90) % 9 != 4, np.array([-10, 15]), np.array([90, 61])
    positions = np.arange(70)[:, None] + offsets[:, None, None, None]
    left, right = (1000 if reach is None else reach for reach in window)
    visible = (np.arange(90) >= positions - left) & (np.arange(90) <= positions + right) & keep
    visible &= np.arange(90) < lengths[:, None, None, None]
    empty = np.broadcast_to(~visible.any(-1), grad_lse.shape)
    assert empty.any() == (window != (None, None))

    leaves = [torch.from_numpy(array.astype(np.float64)).requires_grad_() for array in (query, key, value, bias)]
    scores = leaves[0] @ leaves[1].mT * 0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - torch.from_numpy(np.reshape(slopes, (3, 1, 1)) * np.abs(positions - np.arange(90)))
    scores = (scores + leaves[3]).masked_fill(torch.from_numpy(~visible), -1e300)
    there = torch.from_numpy(~empty)  # a row of nothing but -inf would have gradients of NaN in PyTorch
    out = (scores.softmax(-1) @ leaves[2])[there]
    loss = (out * torch.from_numpy(grad_out)[there]).sum()
    loss = loss + (scores.logsumexp(-1)[there] * torch.from_numpy(grad_lse)[there]).sum()
    exact = [gradient.numpy() for gradient in torch.autograd.grad(loss, leaves)]
    options: dict[str, Any] = {
        "scale": 0.5,
        "softcap": softcap,
        "window": window,
        "query_offset": offsets,
        "key_lengths": lengths,
        "alibi_slopes": slopes,
        "backend": backend,
    }
    found = gradients(grad_out, query, key, value, (bias, keep), grad_lse=grad_lse, grad_mask=True, **options)
    tolerances.check_promise(found, exact, dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@settings(max_examples=max(5, settings().max_examples // 3))
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 4),
    is_causal=st.sampled_from((False, True, "bottom-right")),
    dropout_p=st.sampled_from((0.0, 0.3)),
    seed=st.integers(0, 2**32 - 1),
)
def test_finite_differences(backend: str, sizes: tuple[int, ...], is_causal: Any, dropout_p: float, seed: int) -> None:
    """Moved a little along a direction, a loss changes by what its gradient says; all of them at once."""
    queries, keys, features, value_features = sizes
    shapes = [(2, queries, features), (2, keys, features), (2, keys, value_features), (queries, keys)]
    shapes += [(2, queries, value_features), (2, queries)]
    *arguments, grad_out, grad_lse = inputs(*shapes, seed=seed)
    directions = inputs(*shapes[:4], seed=seed + 1)
    options: dict[str, Any] = {"is_causal": is_causal, "dropout_p": dropout_p, "rng": seed, "backend": backend}

    def loss(step: float) -> float:
        moved = (a + step * d for a, d in zip(arguments, directions, strict=True))
        out, lse = fastattn.attention(*moved, **options, return_lse=True)
        return float((out * grad_out).sum() + (np.where(np.isfinite(lse), lse, 0) * grad_lse).sum())

    found = gradients(grad_out, *arguments, **options, grad_lse=grad_lse, grad_mask=True)
    slope = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
    # fourth order: what is left of the series is some h⁴, the roundings of the loss some eps / h
    h = 2e-3
    measured = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    size = sum(float(np.abs(g * d).sum()) for g, d in zip(found, directions, strict=True))
    assert abs(measured - slope) <= 1e-6 * max(1.0, size)


# -- what it means -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_keys_give_and_get_nothing(dtype: Any) -> None:
    query, key, value, grad_out = inputs((70, 16), (90, 16), (90, 16), (70, 16), dtype=dtype)
    mask = np.ones((70, 90), bool)
    mask[[3, 17, 69]] = False
    odd = grad_out.copy()
    odd[[3, 17, 69]] = np.nan
    for wrong in (query, grad_out, None):
        found = gradients(odd if wrong is grad_out else grad_out, query, key, value, mask)
        assert not found[0][[3, 17, 69]].any()
        assert all(np.isfinite(gradient).all() for gradient in found)
    others = np.flatnonzero(mask.any(axis=1))
    wanted = gradients(grad_out[others], query[others], key, value, mask[others])
    tolerances.check_promise((found[0][others], *found[1:]), wanted, dtype)
    nothing = gradients(grad_out, query, key, value, np.zeros(90, bool), grad_lse=np.ones(70))
    assert not any(gradient.any() for gradient in nothing)


ODD = (np.nan, np.inf, -np.inf)


@pytest.mark.parametrize("dtype", AND_PAIRS)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("which", ["key", "value", "query", "grad_out"])
@pytest.mark.parametrize("how", ["boolean", "padding", "float", "causal"])
def test_what_is_masked_leaks_nothing(dtype: Any, odd: float, which: str, how: str) -> None:
    """Bit for bit the gradients of everyone else are what they would be without it."""
    names = ("query", "key", "value", "grad_out")
    arrays = dict(zip(names, inputs((200, 24), (300, 24), (300, 24), (200, 24), dtype=dtype), strict=True))
    rows, columns = [5, 40, 199], [0, 130, 299]
    mask: Any = np.random.default_rng(1).random((200, 300)) < 0.9
    options: dict[str, Any] = {}
    touched = rows if which in ("query", "grad_out") else columns
    if how == "causal":
        # the last keys are ahead of all queries, and the first queries look at no key
        options["is_causal"] = True
        mask, touched = None, [250, 299]
        if which in ("query", "grad_out"):
            options["is_causal"] = "bottom-right"
            arrays["query"], arrays["grad_out"] = inputs((300, 24), (300, 24), dtype=dtype, seed=2)
            arrays["key"], arrays["value"] = inputs((200, 24), (200, 24), dtype=dtype, seed=3)
            touched = [0, 99]
    elif how == "padding":
        mask = np.arange(300) < 270
        touched = [270, 299]
        if which in ("query", "grad_out"):
            pytest.skip("padding hides keys")
    else:
        mask[rows] = False
        mask[:, columns] = False
        if how == "float":
            mask = np.where(mask, 0.5, -np.inf)

    def found(value: float) -> Arrays:
        changed = {name: array.copy() for name, array in arrays.items()}
        changed[which][touched, 3:5] = value
        return gradients(changed["grad_out"], changed["query"], changed["key"], changed["value"], mask, **options)

    wanted = found(0.25)
    same_bits(found(odd), wanted)
    index = 0 if which in ("query", "grad_out") else 1
    assert not wanted[index][touched].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", AND_PAIRS)
def test_a_log_sum_exp_of_nan_has_nan_for_scores_of_minus_infinity_too(dtype: Any, masked: bool) -> None:
    """An infinite query makes scores of both signs: of those of -inf, no gradient is 0 as that of a hidden key is."""
    grad_out, query, key, value = inputs((40, 16), (40, 16), (50, 16), (50, 16), dtype=dtype)
    query[33, 7] = np.inf
    mask = np.zeros((40, 50), np.float32) if masked else None
    out, lse = fastattn.attention(query, key, value, mask, return_lse=True)
    found = fastattn.attention_backward(grad_out, query, key, value, out, lse, mask)
    assert np.isnan(lse[33])
    for gradient, rows in zip(found, ([33], range(50), range(50)), strict=True):
        touched = np.zeros(gradient.shape, bool)
        touched[rows] = True
        assert np.array_equal(np.isnan(gradient.astype(np.float64)), touched)


@pytest.mark.parametrize("odd", ODD)
def test_gradients_that_are_not_finite_go_where_their_query_looks(odd: float) -> None:
    query, key, value, grad_out = inputs((100, 8), (150, 8), (150, 8), (100, 8))
    grad_out[7, 2] = odd
    found = gradients(grad_out, query, key, value, is_causal=True)
    out, lse = reference.attention(query, key, value, is_causal=True, return_lse=True)
    wanted = reference.attention_backward(grad_out, query, key, value, out, lse, is_causal=True)
    for gradient, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.isfinite(gradient), np.isfinite(want))
    np.testing.assert_array_equal(np.isfinite(found[2][:, 2]), np.arange(150) > 7)
    assert np.isfinite(np.delete(found[2], 2, axis=1)).all()


def test_the_sums_of_broadcast_arguments() -> None:
    query, key, value, mask = inputs((2, 1, 4, 33, 8), (3, 4, 40, 8), (4, 40, 5), (3, 1, 1, 40))
    (grad_out,) = inputs((2, 3, 4, 33, 5), seed=1)
    found = gradients(grad_out, query, key, value, mask, grad_mask=True)
    assert [gradient.shape for gradient in found] == [a.shape for a in (query, key, value, mask)]
    whole = [np.broadcast_to(a, (2, 3, 4, *a.shape[-2:])) for a in (query, key, value, mask)]
    each = gradients(grad_out, *whole[:3], np.broadcast_to(whole[3], (2, 3, 4, 33, 40)), grad_mask=True)
    wanted = (
        each[0].sum(1, keepdims=True),
        each[1].sum(0),
        each[2].sum((0, 1)),
        each[3].sum((0, 2, 3), keepdims=True)[0],
    )
    tolerances.check_promise(found, wanted, np.float64)


def test_views_that_repeat_an_element_have_a_gradient_for_each() -> None:
    key, value, query, grad_out = inputs((1, 8), (50, 8), (20, 8), (20, 8))
    repeated = np.broadcast_to(key, (50, 8))
    same_bits(gradients(grad_out, query, repeated, value), gradients(grad_out, query, repeated.copy(), value))


def test_dtypes_are_those_of_the_arguments() -> None:
    query, key, value = (np.ones(shape, dtype) for shape, dtype in (((3, 2), "f4"), ((4, 2), "f8"), ((4, 2), int)))
    found = gradients(np.ones((3, 2)), query, key, value, np.zeros(4, np.float16), grad_mask=True)
    assert [gradient.dtype.name for gradient in found] == ["float32", "float64", "float64", "float16"]


def test_pieces_of_a_long_sequence() -> None:
    """With the result and the log-sum-exp of all keys, the gradients of some are the parts of these."""
    query, key, value, grad_out = inputs((90, 16), (400, 16), (400, 16), (90, 16))
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    whole = fastattn.attention_backward(grad_out, query, key, value, out, lse)
    parts = [
        fastattn.attention_backward(grad_out, query, key[some], value[some], out, lse)
        for some in (slice(0, 130), slice(130, 400))
    ]
    joined = (parts[0][0] + parts[1][0], *(np.concatenate(both) for both in list(zip(*parts, strict=True))[1:]))
    tolerances.check_promise(joined, whole, np.float64)


def test_what_arrives_in_float32_is_not_rounded_to_bfloat16() -> None:
    query, key, value = (array.astype(BFLOAT16) for array in inputs((2, 8), (1, 8), (1, 4)))
    found = gradients(np.float32([[1 + 2.0**-9] * 4, [-1] * 4]), query, key, value)
    np.testing.assert_array_equal(found[2].astype(np.float32), 2.0**-9)


@pytest.mark.parametrize("scale", [None, 0.3, -2.0, 0.0, 2.0**-17])
@pytest.mark.parametrize("features", [32, 64, 128])
def test_gradients_of_bfloat16_are_no_less_exact_than_pytorchs(scale: float | None, features: int) -> None:
    torch = pytest.importorskip("torch")
    arrays = inputs(*[(1, 2, n, features) for n in (190, 190, 300, 300)], dtype=BFLOAT16)  # what it computes in blocks
    found, errors = gradients(*arrays, scale=scale), []
    for dtype in (torch.float64, torch.bfloat16):
        grad_out, *leaves = (torch.from_numpy(array.astype(np.float64)).to(dtype) for array in arrays)
        for leaf in leaves:
            leaf.requires_grad_()
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, scale=scale)
        errors.append([gradient.double().numpy() for gradient in torch.autograd.grad(out, leaves, grad_out)])
    for own, exact, their in zip(found, *errors, strict=True):
        rounding = float(np.abs(exact).max()) * 2.0**-8
        assert np.abs(own.astype(np.float64) - exact).max() <= max(2 * np.abs(their - exact).max(), rounding)


def test_scores_of_any_size() -> None:
    # the weight of the greatest score is 1, whatever the roundings of scores of 1e36 say
    query, key, value, grad_out = inputs((40, 8), (60, 8), (60, 8), (40, 8), dtype=np.float32)
    found = gradients(grad_out, query * np.float32(1e18), key * np.float32(1e18), value)
    assert all(np.isfinite(gradient).all() for gradient in found)
    assert np.abs(found[2]).max() <= np.abs(grad_out).sum(axis=0).max()


@pytest.mark.parametrize("dtype", AND_PAIRS)
def test_no_weight_exceeds_one(dtype: Any) -> None:
    # of a single key it is 1, whatever the roundings of a score of 100 and of its logarithm say
    query, key, value, grad_out = (
        np.linspace(60, 120, 300)[:, None],
        np.ones((1, 1)),
        np.ones((1, 1)),
        np.ones((300, 1)),
    )
    arguments = [array.astype(dtype) for array in (grad_out, query, key, value)]
    grad_value = gradients(*arguments, scale=1)[2]
    assert 300 * (1 - 1e-4) < grad_value[0, 0] <= 300


# -- the same bits -----------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"is_causal": "bottom-right", "dropout_p": 0.2, "rng": 3},
    {"window": (100, 40), "query_offset": 350},
    {"window": (90, 0), "query_offset": [0, 400], "key_lengths": [500, 650], "softcap": 3.0},
    {"alibi_slopes": [0.5, 0.25, 0.125, 0], "is_causal": True, "query_offset": 400},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", AND_PAIRS)
def test_the_same_bits_however_the_work_is_split(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, options: dict[str, Any]
) -> None:
    shapes = [(2, 4, 300, 32), (2, 4, 300, 32), (2, 2, 700, 32), (2, 2, 700, 32), (1, 4, 1, 700)]
    arguments = inputs(*shapes, dtype=dtype)
    monkeypatch.setattr("fastattn.cpu.host.pool.WORTH_SHARING", 0)
    found = []
    for threads, state, flops in (
        (1, 1 << 30, 1e30),
        (1, 1, 1),
        (2, 1 << 18, 3e6),
        (3, 1, 1),
        (5, 1 << 17, 1),
        (8, 1, 1),
    ):
        row = replace(isa.host(), blocking=replace(isa.host().blocking, gradient_state_bytes=state))
        monkeypatch.setattr(session.current, "_row", row)
        monkeypatch.setattr(session.current, "plans", session.Plans())
        monkeypatch.setattr(cpu, "TASK_FLOPS", flops)
        with fastattn.num_threads(threads):
            found.append(gradients(*arguments, enable_gqa=True, grad_mask=True, **options))
    for others in found[1:]:
        same_bits(found[0], others)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_a_row_of_a_batch_alone(dtype: Any, options: dict[str, Any]) -> None:
    arguments = inputs(*[(3, 4, 150, 32)] * 4, dtype=dtype)
    found = gradients(*arguments, **options)
    alone = gradients(*(argument[1:2, 2:3] for argument in arguments), **options)
    same_bits(tuple(gradient[1:2, 2:3] for gradient in found), alone)


@given(call=calls(any_layout=False, masks=MASKS), names=st.tuples(*[st.sampled_from(LAYOUTS)] * 5))
def test_the_same_bits_in_any_layout(call: Call, names: tuple[str, ...]) -> None:
    out = fastattn.attention(*call.args, **call.options)
    grad_out = np.random.default_rng(0).standard_normal(out.shape).astype(out.dtype)
    moved = [each(partial(laid_out, layout=n), a) for a, n in zip((grad_out, *call.args), names, strict=True)]
    found = gradients(*moved, **call.options)
    assert all(gradient.flags.c_contiguous for gradient in found)
    same_bits(found, gradients(grad_out, *call.args, **call.options))


@pytest.mark.slow
def test_sixteen_lanes_on_any_machine(sixteen_lanes: isa.Isa) -> None:
    shapes = [(2, 3, 150, 40), (2, 3, 150, 40), (2, 3, 200, 40), (2, 3, 200, 40), (3, 1, 200)]
    grad_out, query, key, value, mask = inputs(*shapes, dtype=np.float32)
    for options in ({}, {"is_causal": True}, {"attn_mask": mask, "grad_mask": True, "is_causal": True}):
        attn_mask = options.get("attn_mask")
        own = {name: option for name, option in options.items() if name != "attn_mask"}
        found = gradients(grad_out, query, key, value, attn_mask, **own)
        own.pop("grad_mask", None)
        wanted = tolerances.expected_gradients(grad_out, query, key, value, attn_mask, **own)
        tolerances.check_gradients(found, (query, key, value, attn_mask), *wanted)
    loaded = {(kernel.work, kernel.steps) for kernel in kernels._loaded if kernel.row is sixteen_lanes}
    assert {("backward", PLAIN), ("backward", STEPS), ("mask_gradient", STEPS)} <= loaded


# -- arguments ---------------------------------------------------------------------------------------------------------


def call_with(**changed: Any) -> Callable[[], Any]:
    query, key, value, grad_out = inputs((5, 4), (7, 4), (7, 3), (5, 3))
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    given = {"grad_out": grad_out, "query": query, "key": key, "value": value, "out": out, "lse": lse} | changed
    return lambda: fastattn.attention_backward(**given)


MASK = np.zeros((5, 7))
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"grad_out": np.ones((5, 4))},
        ValueError,
        r"grad_out: shape \(5, 4\); expected \(5, 3\), the shape of the result",
    ),
    ({"out": np.ones(5)}, ValueError, r"out: shape \(5,\); expected \(5, 3\)"),
    ({"lse": np.ones((5, 1))}, ValueError, r"lse: shape \(5, 1\); expected \(5,\), the shape of the log-sum-exp"),
    ({"grad_lse": np.ones(4)}, ValueError, r"grad_lse: shape \(4,\); expected \(5,\)"),
    ({"grad_out": np.ones((5, 3), complex)}, TypeError, "grad_out: dtype complex128"),
    ({"lse": "no"}, TypeError, "lse: dtype <U2"),
    ({"grad_mask": True}, ValueError, "grad_mask: True without attn_mask"),
    ({"grad_mask": True, "attn_mask": MASK == 0}, TypeError, "grad_mask: True for an attn_mask of dtype bool"),
    ({"grad_mask": 1}, TypeError, "grad_mask: 1 of type int; expected True or False"),
    ({"dropout_p": 0.5}, ValueError, "rng: None with dropout_p=0.5; expected what the forward pass was given"),
    ({"key": np.ones((7, 5))}, ValueError, "key: shape"),
    ({"window": (1, -1)}, ValueError, r"window: \(1, -1\) of type tuple; expected \(left, right\)"),
    ({"alibi_slopes": np.nan}, ValueError, "alibi_slopes: nan is among them; expected finite numbers"),
    ({"softcap": -1.0}, ValueError, "softcap: -1.0 of type float; expected a finite real number above 0"),
    ({"key_lengths": 8}, ValueError, "key_lengths: 8 to 8; expected 0 to 7, the length of key"),
    ({"query_offset": "no"}, TypeError, "query_offset: dtype <U2; expected integers"),
    ({"query_offset": 1, "is_causal": "bottom-right"}, ValueError, "query_offset: given together with is_causal"),
    (
        {"attn_mask": (MASK == 0, MASK)},
        TypeError,
        r"attn_mask: a pair of dtypes bool, float64; expected \(bias, keep\)",
    ),
    ({"grad_mask": True, "attn_mask": (None, MASK == 0)}, TypeError, "grad_mask: True for an attn_mask of dtype bool"),
    ({"backend": "gpu"}, ValueError, "backend: 'gpu'"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("changed", "error", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_bad_input(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call_with(**({"backend": backend} | changed))()


def test_a_generator_in_the_state_that_it_had() -> None:
    query, key, value, grad_out = inputs(*[(30, 8)] * 4)
    out, lse = fastattn.attention(query, key, value, dropout_p=0.4, rng=np.random.default_rng(7), return_lse=True)
    found = fastattn.attention_backward(
        grad_out, query, key, value, out, lse, dropout_p=0.4, rng=np.random.default_rng(7)
    )
    other = fastattn.attention_backward(
        grad_out, query, key, value, out, lse, dropout_p=0.4, rng=np.random.default_rng(8)
    )
    out, _, weights = fastattn.attention(
        query, key, value, dropout_p=0.4, rng=np.random.default_rng(7), return_lse=True, return_weights=True
    )
    tolerances.check_promise(found[2:], [weights.T @ grad_out], np.float64)
    assert (found[2] != other[2]).any()


def test_lists_and_integers() -> None:
    found = fastattn.attention_backward([[1, 2]], [[1, 0]], [[1, 2], [0, 1]], [[1, 2], [3, 4]], [[2, 3]], [1])
    assert [gradient.dtype.name for gradient in found] == ["float64"] * 3
    assert call_with(grad_out=np.ones((5, 3), np.float32))()[0].dtype == np.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, "padding", "float, -inf"])
@pytest.mark.parametrize(
    ("scale", "of_query", "of_key"), [(1e39, 1e-19, 1e-20), (-1e60, 1e-30, 1e-30), (1e-76, 1e38, 1e38)]
)
def test_a_scale_need_not_be_a_number_of_float32(
    dtype: Any, kind: str | None, scale: float, of_query: float, of_key: float
) -> None:
    rng = np.random.default_rng(8)
    query, key = (
        (of_query * rng.standard_normal((70, 4))).astype(dtype),
        (of_key * rng.standard_normal((90, 4))).astype(dtype),
    )
    value, grad_out = (rng.standard_normal((n, 5)).astype(dtype) for n in (90, 70))
    mask = None if kind is None else random_mask(rng, (70, 90), kind, np.float32)
    with_mask = mask is not None and mask.dtype.kind == "f"
    found = gradients(grad_out, query, key, value, mask, scale=scale, grad_mask=with_mask)
    wanted = tolerances.expected_gradients(grad_out, query, key, value, mask, scale=scale)
    tolerances.check_gradients(found, (query, key, value, mask), *wanted)


@pytest.mark.parametrize("scale", [1e300, -1.7e308])
@pytest.mark.parametrize("masked", [False, True])
def test_the_largest_scales_make_nothing_infinite(scale: float, masked: bool) -> None:
    """Scores of 0 are 0 under any scale, however large the queries: in every function."""
    query, key = np.full((3, 2), 1e10, np.float32), np.zeros((4, 2), np.float32)
    value, grad_out = np.eye(4, dtype=np.float32), np.ones((3, 4), np.float32)
    mask = np.zeros((3, 4), np.float32) if masked else None
    out, lse = fastattn.attention(query, key, value, mask, scale=scale, return_lse=True)
    np.testing.assert_array_equal(out, 0.25)
    np.testing.assert_allclose(lse, np.log(4), rtol=1e-6)
    grads = fastattn.attention_backward(grad_out, query, key, value, out, lse, mask, scale=scale)
    for gradient, wanted in zip(grads, (0, 0, 0.75), strict=True):
        np.testing.assert_array_equal(gradient, wanted)
    np.testing.assert_array_equal(fastattn.attention_weights(query, key, mask, scale=scale, lse=lse), 0.25)
    summary = fastattn.attention_summary(query, key, mask, scale=scale)
    np.testing.assert_allclose(summary.entropy, np.log(4), rtol=1e-6)


@pytest.mark.parametrize("dtype", AND_PAIRS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("features", [0, 3, 40])
def test_values_without_features_have_no_gradients_but_0(dtype: Any, backend: str, mask: bool, features: int) -> None:
    """Whatever the memory that is worked in has been left with."""
    rng = np.random.default_rng(9)
    before = rng.standard_normal((2, 600, 64)).astype(dtype)
    gradients(before, before, before, before)
    query, key = (rng.standard_normal((2, n, features)).astype(dtype) for n in (70, 300))
    value, grad_out = np.zeros((2, 300, 0), dtype), np.zeros((2, 70, 0), dtype)
    bias = rng.standard_normal((70, 300)).astype(dtype) if mask else None
    out, lse = fastattn.attention(query, key, value, bias, return_lse=True)
    found = fastattn.attention_backward(grad_out, query, key, value, out, lse, bias, grad_mask=mask, backend=backend)
    for gradient in found:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", AND_PAIRS)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_row_of_nan_does_not_reach_keys_that_it_may_not_look_at(dtype: Any, kind: str, backend: str) -> None:
    rng = np.random.default_rng(10)
    grad_out, query, key, value = (rng.standard_normal((n, 4)).astype(dtype) for n in (70, 70, 300, 300))
    visible = rng.random((70, 300)) < 0.01
    visible[5, 7] = True
    key[7, 0] = np.nan
    mask = visible if kind == "bool" else np.where(visible, 0, -np.inf).astype(dtype)
    out, lse = fastattn.attention(query, key, value, mask, return_lse=True)
    assert np.isnan(lse[5])
    _, grad_key, grad_value = fastattn.attention_backward(grad_out, query, key, value, out, lse, mask, backend=backend)
    reached = visible[np.isnan(lse)].any(axis=0)
    for gradient in (grad_key, grad_value):
        np.testing.assert_array_equal(np.isnan(gradient).any(axis=-1), reached)
