"""Rows of numbers as a cache keeps them, and what they are off by."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastattn.call.halves import cast
from fastattn.kv_cache.formats import BLOCK, FORMATS, joined, parts

FLOAT32, FLOAT64, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16)
numbers = hnp.arrays(
    st.sampled_from([np.float32, np.float64]),
    st.tuples(st.integers(1, 3), st.integers(1, 70)),
    elements=st.one_of(
        st.floats(-4, 4, width=32), st.floats(-(2.0**22), 2.0**22, width=32), st.floats(-(2.0**-17), 2.0**-17, width=32)
    ),
)


def of_int8(array: Any, dtype: Any = FLOAT64) -> Any:
    """Return what is left of numbers that are kept in int8."""
    kept = FORMATS["int8"]
    encoded = kept.encode(array)
    assert encoded.shape == (*array.shape[:-1], kept.width(array.shape[-1]))
    return kept.decode(encoded, array.shape[-1], dtype)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 40), (3, 0), (0, 0)], ids=str)
def test_rows_may_be_none_or_have_no_numbers(shape: tuple[int, ...]) -> None:
    assert of_int8(np.zeros(shape, np.float32)).shape == shape


@given(numbers)
def test_numbers_in_int8_are_off_by_half_a_scale_at_most(array: Any) -> None:
    off = np.abs(of_int8(array) - array.astype(np.float64))
    assert (off <= tolerances.off_in_int8(array)).all()


@given(numbers)
def test_what_has_been_in_int8_stays_what_it_is(array: Any) -> None:
    once = of_int8(array)
    np.testing.assert_array_equal(of_int8(once), once)


@given(numbers)
def test_scale_and_whole_number_have_an_exact_product_in_float32(array: Any) -> None:
    np.testing.assert_array_equal(of_int8(array, FLOAT32), of_int8(array))


def test_the_largest_of_a_block_is_127_scales() -> None:
    array = np.linspace(-1, 1, BLOCK, dtype=np.float32)
    scales, numbers = parts(FORMATS["int8"].encode(array), BLOCK)
    assert numbers.min() == -127
    assert numbers.max() == 127
    assert 127 * np.float64(scales[0]) >= 1


def test_blocks_have_scales_of_their_own() -> None:
    array = np.concatenate([np.full(BLOCK, 1e-3), np.full(BLOCK, 1e3), np.full(5, 1.0)])
    np.testing.assert_allclose(of_int8(array), array, rtol=2.0**-9)
    assert parts(FORMATS["int8"].encode(array), len(array))[0].shape == (3,)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_block_with_what_is_not_finite_is_nan_and_no_other_is(dtype: Any, wrong: float) -> None:
    array = np.ones(3 * BLOCK, dtype)
    array[BLOCK + 3] = wrong
    found = of_int8(array)
    assert np.isnan(found[BLOCK : 2 * BLOCK]).all()
    np.testing.assert_allclose(found[[*range(BLOCK), *range(2 * BLOCK, 3 * BLOCK)]], 1, rtol=2.0**-9)


def test_what_is_beyond_the_largest_scale_is_the_largest_number() -> None:
    np.testing.assert_array_equal(of_int8(np.array([1e38, -3e38, 1e3])), np.array([127, -127, 0]) * 65504.0)


def test_zeros_are_zeros() -> None:
    np.testing.assert_array_equal(of_int8(np.zeros((2, 40), np.float32)), 0)


def test_parts_of_rows_make_rows_again() -> None:
    array = np.random.default_rng(0).standard_normal((3, 41))
    encoded = FORMATS["int8"].encode(array)
    np.testing.assert_array_equal(joined(*parts(encoded, 41)), encoded)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_rows_are_rounded_once(name: str, dtype: Any) -> None:
    array = np.random.default_rng(0).standard_normal((3, 41)).astype(dtype)
    kept = FORMATS[name]
    np.testing.assert_array_equal(kept.decode(kept.encode(array), 41, FLOAT64), cast(cast(array, kept.dtype), FLOAT64))


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("features", [1, 15, 32, 40, 128])
def test_compiled_code_writes_what_numpy_does(dtype: Any, name: str, features: int) -> None:
    rng = np.random.default_rng(features)
    array = rng.standard_normal((3, 7, features)) * 2.0 ** rng.integers(-30, 30, (3, 7, features))
    array[0, 0], array[0, 1, 0], array[1, 2, -1], array[2, 3] = 0, np.nan, np.inf, 1e38
    array[1, :, 0] = 2.0**-24 * np.arange(7) * 127.2
    array = cast(array, np.dtype(dtype))
    kept = FORMATS[name]
    for rows in (array, np.asfortranarray(array), array[::-1, ::2]):
        with np.errstate(all="ignore"):
            wanted = kept.encode(rows)
        found = np.zeros(wanted.shape, wanted.dtype)
        kept.write(rows, found)
        assert found.tobytes() == np.ascontiguousarray(wanted).tobytes()
