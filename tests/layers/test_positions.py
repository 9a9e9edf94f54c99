"""Sinusoidal and rotary positions, against other ways to write them."""

from __future__ import annotations

import cmath
import math
from typing import Any

import numpy as np
import pytest

from fastattn import rotary, sinusoidal_positions

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("dim", [1, 2, 5, 6, 64])
def test_sinusoidal_positions_are_those_of_the_paper(dim: int) -> None:
    result = sinusoidal_positions(40, dim)
    for position in range(40):
        for feature in range(dim):
            angle = position / 10000 ** (2 * (feature // 2) / dim)
            wanted = math.cos(angle) if feature % 2 else math.sin(angle)
            assert abs(result[position, feature] - wanted) <= 40 * np.finfo(float).eps
    assert result.dtype == np.float64
    assert np.array_equal(sinusoidal_positions(40, dim, dtype=np.float32), result.astype(np.float32))
    assert sinusoidal_positions(0, dim).shape == (0, dim)


def rotated(x: Array, positions: Any, base: float) -> Array:
    """Multiply complex numbers, made of neighbouring features, by powers of e."""
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    dim = x.shape[-1]
    turns = np.array([[cmath.exp(1j * t * base ** (-2 * i / dim)) for i in range(dim // 2)] for t in positions])
    product = pairs * turns
    return np.stack([product.real, product.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("base", [10000.0, 500000, 2.5])
def test_rotary_multiplies_by_complex_numbers(dtype: Any, base: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 6, 10)).astype(dtype)
    positions = [0, 1, 2.5, -7, 1000, 2**24 + 1]  # the last one is no float32
    before = x.copy()
    result = rotary(x, positions, base=base, interleaved=True)
    assert result.dtype == dtype
    # angles as large as the last position in float64, then three roundings
    bound = (4 * np.finfo(dtype).eps + 4 * 2**24 * np.finfo(float).eps) * np.abs(x).max()
    exact = rotated(x.astype(np.float64), positions, base)
    assert np.abs(result - exact).max() <= bound
    halves = rotary(np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1), positions, base=base)
    assert np.array_equal(halves, np.concatenate([result[..., 0::2], result[..., 1::2]], axis=-1))
    assert np.array_equal(x, before)


def test_rotary_is_that_of_llama() -> None:
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 2, 4, 50, 16))
    angles = np.arange(50)[:, None] * 10000.0 ** (-np.arange(0, 16, 2) / 16)
    angles = torch.from_numpy(np.concatenate([angles, angles], axis=-1))[None]
    theirs = llama.apply_rotary_pos_emb(torch.from_numpy(query), torch.from_numpy(key), angles.cos(), angles.sin())
    for array, wanted in zip((query, key), theirs, strict=True):
        assert np.abs(rotary(array, np.arange(50)) - wanted.numpy()).max() <= 1e3 * np.finfo(float).eps


def test_rotary_positions_broadcast() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 8))
    each = np.arange(30).reshape(2, 3, 5)
    result = rotary(x, each)
    for b in range(2):
        for h in range(3):
            assert np.array_equal(result[b, h], rotary(x[b, h], each[b, h]))
    assert np.array_equal(rotary(x, np.arange(5)), rotary(x, np.broadcast_to(np.arange(5), (2, 3, 5))))
    assert np.array_equal(rotary(x, 4), rotary(x, np.full(5, 4)))
    assert rotary(x[..., :0], np.arange(5)).shape == (2, 3, 5, 0)
    assert rotary(np.ones((2, 2), int), [0, 1]).dtype == np.float64
    with np.errstate(all="raise"):
        assert np.isnan(rotary(np.full((1, 2), np.inf, np.float32), [1])).any()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_part_of_the_features_turns_and_the_rest_stays(interleaved: bool, dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 9)).astype(dtype)
    before = x.copy()
    for turning in (0, 2, 6, 8):
        result = rotary(x, np.arange(5), rotary_dim=turning, interleaved=interleaved)
        own = rotary(x[..., :turning], np.arange(5), interleaved=interleaved)
        assert np.array_equal(result, np.concatenate([own, x[..., turning:]], axis=-1))
    assert np.array_equal(x, before)


@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_may_be_given_in_place_of_positions(interleaved: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, 8))
    angles = np.arange(5)[:, None] * 10000.0 ** (-np.arange(0, 6, 2) / 6)
    wanted = rotary(x, np.arange(5), rotary_dim=6, interleaved=interleaved)
    close = np.finfo(float).eps * 20
    for given in (angles, angles.tolist(), (np.cos(angles), np.sin(angles))):
        for turning in (None, 6):
            result = rotary(x, angles=given, rotary_dim=turning, interleaved=interleaved)
            assert np.abs(result - wanted).max() <= close
    each = rng.standard_normal((2, 5, 3))  # those of a batch
    result = rotary(x, angles=each[:, None], interleaved=interleaved)
    for b in range(2):
        assert np.array_equal(result[b], rotary(x[b], angles=each[b], interleaved=interleaved))
    doubled = rotary(x, angles=(2 * np.cos(angles), 2 * np.sin(angles)), interleaved=interleaved)
    assert np.abs(doubled[..., :6] - 2 * wanted[..., :6]).max() <= 4 * close


def test_rotary_is_that_of_gptj_and_gpt_neox() -> None:
    torch = pytest.importorskip("torch")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 3, 12))  # (batch, length, heads, features)
    angles = np.arange(7)[:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    sine, cosine = (torch.from_numpy(np.broadcast_to(of, (2, 7, 4)).copy()) for of in (np.sin(angles), np.cos(angles)))
    turned = gptj.apply_rotary_pos_emb(torch.from_numpy(x[..., :8].copy()), sine, cosine)
    wanted = np.concatenate([turned.numpy(), x[..., 8:]], axis=-1).swapaxes(1, 2)
    found = rotary(x.swapaxes(1, 2), np.arange(7), rotary_dim=8, interleaved=True)
    assert np.abs(found - wanted).max() <= 100 * np.finfo(float).eps
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    query = torch.from_numpy(x.swapaxes(1, 2).copy())
    both = torch.cat([cosine, cosine], -1), torch.cat([sine, sine], -1)
    theirs = neox.apply_rotary_pos_emb(query, query, *both)[0].numpy()
    found = rotary(x.swapaxes(1, 2), np.arange(7), rotary_dim=8)
    assert np.abs(found - theirs).max() <= 100 * np.finfo(float).eps


@pytest.mark.parametrize("turns", ["positions", "angles", "cosine and sine"])
def test_a_gradient_goes_back_through_the_opposite_rotation(turns: str) -> None:
    rng = np.random.default_rng(0)
    x, grad = rng.standard_normal((2, 4, 7))
    angles = rng.standard_normal((4, 3))
    there, back = {
        "positions": ({"positions": np.arange(4), "rotary_dim": 6}, {"positions": -np.arange(4), "rotary_dim": 6}),
        "angles": ({"angles": angles}, {"angles": -angles}),
        "cosine and sine": (
            {"angles": (np.cos(angles), np.sin(angles))},
            {"angles": (np.cos(angles), -np.sin(angles))},
        ),
    }[turns]
    step = 1e-6 * rng.standard_normal(x.shape)
    change = (grad * (rotary(x + step, **there) - rotary(x - step, **there)) / 2).sum()
    assert abs(change - (rotary(grad, **back) * step).sum()) <= 1e-12
    assert np.abs(rotary(rotary(x, **there), **back) - x).max() <= 1e-14


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sinusoidal_positions(-1, 4), ValueError, "length: -1; expected at least 0"),
        (lambda: sinusoidal_positions(3, 0), ValueError, "dim: 0; expected at least 1"),
        (lambda: sinusoidal_positions(3.0, 4), TypeError, "length: 3.0 of type float"),
        (lambda: sinusoidal_positions(3, 4, dtype=np.float16), TypeError, "dtype: "),
        (lambda: rotary(np.ones((2, 3)), [0, 1]), ValueError, "x: shape .2, 3.; .*even number"),
        (lambda: rotary(np.ones(4), [0]), ValueError, "x: shape .4,.; "),
        (lambda: rotary(np.ones((2, 4), complex), [0, 1]), TypeError, "x: dtype complex128"),
        (lambda: rotary(np.ones((2, 4)), [0, 1, 2]), ValueError, "positions: shape .3,.; .* .2,."),
        (lambda: rotary(np.ones((2, 4)), [[0, 1]]), ValueError, "positions: shape .1, 2."),
        (lambda: rotary(np.ones((2, 4)), [0, np.nan]), ValueError, "positions: some are NaN or infinite"),
        (lambda: rotary(np.ones((2, 4)), [0, 1], base=0), ValueError, "base: 0 "),
        (lambda: rotary(np.ones((2, 4)), [0, 1], base=math.inf), ValueError, "base: inf"),
        (lambda: rotary(np.ones((2, 4)), [0, 1], base=10**400), ValueError, "base: 1000.* positive finite"),
        (lambda: rotary(np.ones((2, 4)), [0, 1], base="10"), TypeError, "base: '10'"),
        (lambda: rotary(np.ones((2, 4)), [0, 1], interleaved=1), TypeError, "interleaved: 1"),
        (lambda: rotary(np.ones((2, 4)), [0, 1], rotary_dim=3), ValueError, "rotary_dim: 3; expected an even number"),
        (lambda: rotary(np.ones((2, 4)), [0, 1], rotary_dim=6), ValueError, "rotary_dim: 6; expected .* up to 4"),
        (lambda: rotary(np.ones((2, 4)), [0, 1], rotary_dim=2.0), TypeError, "rotary_dim: 2.0"),
        (lambda: rotary(np.ones((2, 4))), TypeError, "positions: None without angles"),
        (lambda: rotary(np.ones((2, 4)), [0, 1], angles=np.ones((2, 2))), ValueError, "angles: given together"),
        (lambda: rotary(np.ones((2, 4)), angles=np.ones((2, 3))), ValueError, "angles: shape .2, 3.; .* up to 2"),
        (lambda: rotary(np.ones((2, 4)), angles=np.ones((3, 2))), ValueError, "angles: shape .3, 2."),
        (lambda: rotary(np.ones((2, 8)), angles=np.ones((2, 3)), rotary_dim=4), ValueError, "angles: shape .2, 3."),
        (lambda: rotary(np.ones((2, 4)), angles=(np.ones((2, 2)), np.ones((3, 2)))), ValueError, r"angles.1.: shape"),
        (lambda: rotary(np.ones((2, 4)), angles=[[np.inf, 0]]), ValueError, "angles: some are NaN or infinite"),
        (lambda: rotary(np.ones((2, 4)), angles=np.ones((2, 2), complex)), TypeError, "angles: dtype complex128"),
    ],
)
def test_bad_positions_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
