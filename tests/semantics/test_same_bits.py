"""The same bits every time."""

from __future__ import annotations

from typing import Any

import floating_modes
import numpy as np
import pytest
from semantic_cases import NAN, Array, Attention, dtypes, grouped, halves, halves_of, inputs, normal
from strategies import LAYOUTS, each, laid_out

import fastattn
from fastattn.call.halves import finfo

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"is_causal": "bottom-right", "scale": -0.3},
    {"window": (70, 5), "query_offset": 9},
    {"window": (50, None), "is_causal": True, "softcap": 3.0},
    {"alibi_slopes": 0.125, "window": (300, None)},
    {"dropout_p": 0.3, "rng": 3},
)
SHAPES = (((2, 6), (2, 2), (1, 130)), ((3, 4), (3, 4), (65, 300)), ((1, 2), (1, 1), (600, 700)))


def assert_same(one: Any, other: Any) -> None:
    """Assert that results are the same bits."""
    for first, second in zip(one, other, strict=True):
        assert first.tobytes() == second.tobytes()


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_at_any_thread_count(
    cpu_attention: Attention, dtype: Any, options: dict[str, Any], shape: Any
) -> None:
    arrays = grouped(shape, dtype)
    mask = normal(*arrays[0].shape[-2:-1], arrays[1].shape[-2], seed=4)
    options = {**options, "enable_gqa": True, "return_lse": True, "return_weights": True}
    for args in (arrays, (*arrays, mask), (*arrays, mask > 0)):
        with fastattn.num_threads(1):
            alone = cpu_attention(*args, **options)
        for threads in (2, 3, 7):
            with fastattn.num_threads(threads):
                for _ in range(3):
                    assert_same(cpu_attention(*args, **options), alone)


@floating_modes.needs_modes
def test_the_same_bits_in_any_floating_point_mode() -> None:
    assert floating_modes.check(np.float32, names=["attention", "masked", "backward"]) == 3 * len(floating_modes.MODES)


@dtypes
@pytest.mark.parametrize("options", OPTIONS[:-1], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_in_any_batch(cpu_attention: Attention, dtype: Any, options: dict[str, Any], shape: Any) -> None:
    query, key, value = (np.concatenate([array, array[::-1], array]) for array in grouped(shape, dtype))
    mask = normal(len(query), 1, query.shape[-2], key.shape[-2], seed=4)
    options = {**options, "enable_gqa": True, "return_lse": True, "return_weights": True}
    for masks in (None, mask, mask > 0):
        together = cpu_attention(query, key, value, masks, **options)
        for b in range(len(query)):
            row = None if masks is None else masks[b]
            assert_same([result[b] for result in together], cpu_attention(query[b], key[b], value[b], row, **options))


#: Lengths of sequences, and those that their arrays are padded to.
PADDED = (
    ((1, 0), (1, 40)),
    ((1, 130), (1, 400)),
    ((65, 64), (65, 65)),
    ((65, 131), (65, 500)),
    ((150, 300), (150, 333)),
)


def alone_and_padded(queries: int, keys: int, capacity: int, dtype: Any) -> tuple[list[Array], list[Array], Array]:
    """Return a sequence, the same with NaN behind it, in a batch with others, and a mask of all that capacity."""
    arrays = grouped(((1, 4), (1, 2), (queries, capacity)), dtype)
    others = [np.concatenate([array, array[:, ::-1], array]) for array in arrays]
    for array in others[1:]:
        array[0, :, keys:] = NAN
    short = [arrays[0], *(array[..., :keys, :] for array in arrays[1:])]
    return short, others, normal(1, queries, capacity, seed=4)


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", PADDED, ids=str)
def test_a_padded_sequence_has_the_bits_of_the_same_sequence_alone(
    cpu_attention: Attention, dtype: Any, options: dict[str, Any], lengths: Any
) -> None:
    (queries, keys), (_, capacity) = lengths
    short, others, mask = alone_and_padded(queries, keys, capacity, dtype)
    options = {**options, "enable_gqa": True, "return_lse": True, "return_weights": True}
    for masks in (None, mask, mask > 0, (mask, mask > -1)):
        cut = each(lambda given: given[..., :keys], masks)
        alone = cpu_attention(*short, cut, **options)
        for threads in (1, 3):
            with fastattn.num_threads(threads):
                padded = cpu_attention(*others, masks, **options, key_lengths=[keys, capacity, capacity // 2])
            assert_same([padded[0][:1], padded[1][:1], padded[2][:1, ..., :keys]], alone)
            assert not padded[2][0, ..., keys:].any()


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", PADDED, ids=str)
def test_a_padded_sequence_has_the_gradients_of_the_same_sequence_alone(
    cpu_attention: Attention, dtype: Any, options: dict[str, Any], lengths: Any
) -> None:
    (queries, keys), (_, capacity) = lengths
    short, others, mask = alone_and_padded(queries, keys, capacity, dtype)
    options = {**options, "enable_gqa": True}

    def gradients(args: Any, masks: Any, **lengths: Any) -> Any:
        out, lse = cpu_attention(*args, masks, **options, **lengths, return_lse=True)
        grad_out = np.broadcast_to(normal(*out.shape[1:], dtype=dtype, seed=5), out.shape)
        grad_lse = np.broadcast_to(normal(*lse.shape[1:], dtype=dtype, seed=6), lse.shape)
        return fastattn.attention_backward(
            grad_out, *args, out, lse, masks, **options, **lengths, grad_lse=grad_lse, backend="cpu"
        )

    for masks in (None, (mask, mask > -1)):
        alone = gradients(short, each(lambda given: given[..., :keys], masks))
        for threads in (1, 3):
            with fastattn.num_threads(threads):
                padded = gradients(others, masks, key_lengths=[keys, capacity, capacity // 2])
            assert_same([padded[0][:1], *(gradient[:1, :, :keys] for gradient in padded[1:])], alone)
            assert not any(gradient[0, :, keys:].any() for gradient in padded[1:])


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_in_any_memory_layout(
    cpu_attention: Attention, dtype: Any, options: dict[str, Any], layout: str
) -> None:
    arrays = grouped(SHAPES[1], dtype)
    masks = normal(4, 65, 300, seed=4), normal(4, 65, 300, seed=4) > 0
    options = {**options, "enable_gqa": True, "return_lse": True, "return_weights": True}
    for mask in masks:
        wanted = cpu_attention(*arrays, mask, **options)
        for which in range(4):
            args = [*arrays, mask]
            args[which] = laid_out(args[which], layout)
            assert_same(cpu_attention(*args, **options), wanted)
        assert_same(cpu_attention(*(laid_out(array, layout) for array in (*arrays, mask)), **options), wanted)


@halves
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_of_the_least_numbers_in_any_memory_layout(
    cpu_attention: Attention, dtype: Any, layout: str
) -> None:
    # times the scale, queries are rounded to subnormal numbers, or from there to the least normal one
    info = finfo(np.dtype(dtype))
    size = float(info.tiny) * (2 - float(info.eps))
    query, key, value = inputs((40, 70), features=32)
    arrays = halves_of(dtype, np.where(query > 0, size, -size), key / size, value)
    wanted = cpu_attention(*arrays, scale=0.4, return_lse=True)
    assert_same(cpu_attention(*(laid_out(array, layout) for array in arrays), scale=0.4, return_lse=True), wanted)


def test_the_same_bits_of_broadcast_and_repeated_arrays(cpu_attention: Attention) -> None:
    query, key, value = normal(2, 3, 65, 24), normal(65, 24, seed=1), normal(65, 24, seed=2)
    full = [np.broadcast_to(array, query.shape) for array in (key, value)]
    wanted = cpu_attention(query, *(array.copy() for array in full))
    assert_same([cpu_attention(query, *full)], [wanted])
    assert_same([cpu_attention(query, key, value)], [wanted])
    one = np.broadcast_to(np.float32(0.7), query.shape)
    assert_same([cpu_attention(one, *full)], [cpu_attention(one.copy(), *full)])
    mask = np.broadcast_to(normal(65), (2, 3, 65, 65))
    assert_same([cpu_attention(query, *full, mask)], [cpu_attention(query, *full, mask.copy())])


def test_the_same_bits_whatever_else_is_asked_for(cpu_attention: Attention) -> None:
    query, key, value = grouped(SHAPES[2], np.float32)
    out = cpu_attention(query, key, value, is_causal=True)
    with_lse = cpu_attention(query, key, value, is_causal=True, return_lse=True)
    with_both = cpu_attention(query, key, value, is_causal=True, return_lse=True, return_weights=True)
    assert_same([out], with_lse[:1])
    assert_same(with_lse, with_both[:2])
