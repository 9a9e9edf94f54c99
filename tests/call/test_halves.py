"""Conversions of half precision: every number of bfloat16, and roundings to it from wider dtypes."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import processes
import pytest

from fastattn.call.halves import BITS, cast, common_dtype, finfo, is_bfloat16, is_floating, name_of, real_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16, FLOAT32, FLOAT64 = (np.dtype(kind) for kind in (np.float16, np.float32, np.float64))
EVERY = np.arange(1 << 16, dtype=np.uint16)


def values(bits: Any) -> Any:
    """Return the numbers of bfloat16 with these bits, in float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("kind", [BFLOAT16, BITS], ids=["ml_dtypes", "bits"])
@pytest.mark.parametrize("wide", [FLOAT32, FLOAT64, np.dtype(np.longdouble)], ids=str)
def test_every_number_there_and_back(kind: np.dtype[Any], wide: np.dtype[Any]) -> None:
    numbers = cast(EVERY.view(kind), wide)
    assert numbers.dtype == wide
    with np.errstate(invalid="ignore"):  # signalling NaNs
        np.testing.assert_array_equal(numbers, values(EVERY).astype(wide))
    back = cast(numbers, kind).view(np.uint16)
    nan = np.isnan(numbers)
    np.testing.assert_array_equal(back[~nan], EVERY[~nan])
    assert np.isnan(cast(back[nan].view(kind), FLOAT32)).all()


@pytest.mark.parametrize("wide", [FLOAT32, FLOAT64, np.dtype(np.longdouble)], ids=str)
def test_numbers_are_rounded_to_the_nearest_and_halves_to_even(wide: np.dtype[Any]) -> None:
    finite = values(EVERY[:0x7F80])
    above = np.append(finite[1:], 2.0**128)
    middle = ((finite + above) / 2).astype(wide)
    even = np.where(EVERY[:0x7F80] % 2, EVERY[:0x7F80] + 1, EVERY[:0x7F80])
    np.testing.assert_array_equal(cast(middle, BFLOAT16).view(np.uint16), even)
    np.testing.assert_array_equal(cast(-middle, BFLOAT16).view(np.uint16), even | 0x8000)
    # a bit to either side, which a rounding to float32 in between would not know of
    for toward, wanted in ((0, EVERY[:0x7F80]), (np.inf, EVERY[1:0x7F81])):
        near = np.nextafter(middle, wide.type(toward))
        np.testing.assert_array_equal(cast(near, BFLOAT16).view(np.uint16), wanted)


def test_what_bfloat16_has_no_room_for() -> None:
    numbers = np.array([1e39, -1e300, 3.4e38, np.inf, -np.inf, 1e-46, -1e-300, 0.0, -0.0])
    wanted = np.array([np.inf, -np.inf, np.inf, np.inf, -np.inf, 0.0, -0.0, 0.0, -0.0])
    found = cast(cast(numbers, BITS), FLOAT64)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16, BITS], ids=["float16", "ml_dtypes", "bits"])
def test_layouts(kind: np.dtype[Any]) -> None:
    numbers = np.random.default_rng(0).integers(-8, 9, (3, 4, 5)).astype(np.float32)
    for array in (
        numbers,
        numbers.T,
        numbers[::-1, ::2],
        numbers[:, :, :0],
        numbers[0, 0, 0, ...],
        numbers.swapaxes(0, 1),
    ):
        narrow = cast(array, kind)
        assert (narrow.dtype, narrow.shape) == (kind, array.shape)
        np.testing.assert_array_equal(cast(narrow, FLOAT32), array)
        assert cast(narrow, kind) is narrow
    repeated = np.broadcast_to(numbers[:, :1], (3, 4, 5))
    assert cast(repeated, kind).strides[1] == 0
    assert cast(cast(repeated, kind), FLOAT64).strides[1] == 0
    swapped = cast(numbers, kind).byteswap().view(kind.newbyteorder()) if kind != BITS else cast(numbers, kind)
    np.testing.assert_array_equal(cast(swapped, FLOAT32), numbers)


def test_what_there_is_to_know_of_dtypes() -> None:
    for kind in (BFLOAT16, BITS):
        assert is_bfloat16(kind)
        assert is_floating(kind)
        assert name_of(kind) == "bfloat16"
        assert real_of(kind) == FLOAT32
        for name in ("eps", "max", "min", "tiny", "smallest_subnormal"):
            assert getattr(finfo(kind), name) == float(getattr(ml_dtypes.finfo(BFLOAT16), name))
    for other in ("f2", "f4", "V2", "u2", [("bfloat16", "f2")], ml_dtypes.float8_e5m2, ml_dtypes.int4):
        assert not is_bfloat16(np.dtype(other))
    assert not is_floating(np.dtype(ml_dtypes.float8_e5m2))
    assert common_dtype(BITS, BITS) == BITS
    assert common_dtype(BITS, FLOAT16) == FLOAT32
    assert common_dtype(np.ones(3), BFLOAT16) == FLOAT64


def test_ml_dtypes_is_never_imported() -> None:
    code = """
import sys
import numpy as np
import fastattn
from fastattn.call.halves import BITS, cast
arrays = [cast(np.ones((4, 8), np.float32), BITS)] * 3
assert fastattn.attention(*arrays).dtype == BITS
assert fastattn.attention(*(array.astype(np.float16) for array in np.ones((3, 4, 8)))).dtype == np.float16
print("ml_dtypes" in sys.modules)
"""
    assert processes.run(code).strip() == "False"
