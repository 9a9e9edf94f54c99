"""What the demos' models have in common, in NumPy: linear maps, the norm of a layer, GELU."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "gelu", "layer_norm", "linear"]

Floats = NDArray[np.float32]


def linear(x: Floats, matrix: Floats, bias: Floats) -> Floats:
    """A linear map of each row of `x`; the matrix is [out][in]."""
    y: Floats = x @ matrix.T
    y += bias
    return y


def layer_norm(x: Floats, gain: Floats, bias: Floats, epsilon: float = 1e-12) -> Floats:
    """Bring each row of `x` to mean 0 and variance 1, then scale and shift it; `x` is overwritten."""
    x -= x.mean(axis=-1, keepdims=True)
    x *= 1 / np.sqrt(np.einsum("...e,...e->...", x, x)[..., None] / np.float32(x.shape[-1]) + np.float32(epsilon))
    x *= gain
    x += bias
    return x


# erf(x) ≈ x P(x²) / Q(x²) for |x| ≤ 4, where float32 cannot tell it from ±1 any more. NumPy has no erf.
_ERF_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
          -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)  # fmt: skip
_ERF_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
          -1.42647390514189e-02)  # fmt: skip
_GELU_BLOCK = 16384


def gelu(x: Floats) -> Floats:
    """x · Φ(x) with the exact normal distribution, Φ(x) = (1 + erf(x / √2)) / 2; `x` is overwritten.

    NumPy has no erf. This one is off by at most 5e-7 (a test holds it to that), a few roundings of float32.
    """
    flat = x.reshape(-1)
    for start in range(0, flat.size, _GELU_BLOCK):  # in blocks that stay in the cache
        block = flat[start : start + _GELU_BLOCK]
        z = np.clip(block * np.float32(math.sqrt(0.5)), -4, 4)
        square = z * z
        z *= _polynomial(_ERF_P, square)
        z /= _polynomial(_ERF_Q, square)
        z += 1
        z *= np.float32(0.5)
        block *= z
    return x


def _polynomial(coefficients: tuple[float, ...], x: Floats) -> Floats:
    """Horner's rule, highest power first."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += np.float32(coefficient)
    return value
