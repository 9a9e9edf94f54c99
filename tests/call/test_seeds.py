"""What may be given as rng, and the seed or the generator that comes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.call.seeds import generator_from, seed_from


@pytest.mark.parametrize(
    ("given_", "seed"),
    [(0, 0), (7, 7), (np.int32(7), 7), (2**64 - 1, 2**64 - 1), (2**64, 1), (2**64 + 5, 4), ((3 << 128) + (1 << 64), 2)],
)
def test_int_seeds(given_: Any, seed: int) -> None:
    assert seed_from(given_) == seed


def test_a_generator_gives_one_draw() -> None:
    rng, same = np.random.default_rng(1), np.random.default_rng(1)
    drawn = [seed_from(rng), seed_from(rng)]
    assert drawn == [int(same.integers(0, 2**64, dtype=np.uint64)) for _ in range(2)]
    assert all(type(seed) is int and 0 <= seed < 2**64 for seed in drawn)


def test_without_dropout_a_generator_is_left_alone() -> None:
    rng, same = np.random.default_rng(1), np.random.default_rng(1)
    assert seed_from(rng, draw=False) == 0
    assert rng.integers(100) == same.integers(100)


def test_no_seed_is_another_each_time() -> None:
    seeds = {seed_from(None) for _ in range(20)}
    assert len(seeds) == 20
    assert max(seeds) >= 2**56
    assert seed_from(None, draw=False) == 0


@pytest.mark.parametrize(
    ("given_", "kind"),
    [
        (-1, ValueError),
        (True, TypeError),
        (np.False_, TypeError),
        (1.0, TypeError),
        ("1", TypeError),
        ([1, 2], TypeError),
        (np.array(1), TypeError),
        (np.random.default_rng, TypeError),
    ],
)
@pytest.mark.parametrize("draw", [True, False])
def test_seeds_that_are_refused(given_: Any, kind: type[Exception], draw: bool) -> None:
    message = "(?s)rng: .*expected None, a non-negative int or a numpy.random.Generator, RandomState, BitGenerator or "
    with pytest.raises(kind, match=message):
        seed_from(given_, draw)
    with pytest.raises(kind, match=message):
        generator_from(given_)


def legacy(seed: int) -> tuple[Any, Any]:
    """Return a RandomState, and another one in the same state."""
    return np.random.RandomState(seed), np.random.RandomState(seed)


def test_a_random_state_gives_one_draw() -> None:
    rng, same = legacy(1)
    assert seed_from(rng, draw=False) == 0
    drawn = [seed_from(rng), seed_from(rng)]
    assert drawn == [int(same.randint(0, 2**64, dtype=np.uint64)) for _ in range(2)]


def test_the_module_is_its_own_random_state() -> None:
    """As in SciPy and scikit-learn: what np.random.seed has seeded."""
    before = np.random.get_state()  # noqa: NPY002
    try:
        np.random.seed(1)  # noqa: NPY002
        drawn = [seed_from(np.random), seed_from(np.random, draw=False), seed_from(np.random)]
    finally:
        np.random.set_state(before)  # noqa: NPY002
    rng = np.random.RandomState(1)
    assert drawn == [seed_from(rng), 0, seed_from(rng)]


def test_a_bit_generator_is_what_its_generator_would_be() -> None:
    rng, same = np.random.PCG64(1), np.random.default_rng(np.random.PCG64(1))
    assert [seed_from(rng, draw=False), seed_from(rng), seed_from(rng)] == [0, seed_from(same), seed_from(same)]


def test_a_seed_sequence_is_a_seed_and_does_not_move_on() -> None:
    seeds = np.random.SeedSequence(1)
    assert seed_from(seeds) == seed_from(np.random.SeedSequence(1)) == int(seeds.generate_state(1, np.uint64)[0])
    one, other = np.random.SeedSequence(1).spawn(2)
    assert len({seed_from(seeds), seed_from(one), seed_from(other)}) == 3


def test_generators() -> None:
    """What NumPy makes of them, but that a RandomState is left to its owner, and gives a seed."""
    rng = np.random.default_rng(1)
    assert generator_from(rng) is rng
    drawn = np.random.default_rng(3).integers(2**62)
    for given_ in (3, np.int8(3), np.random.SeedSequence(3), np.random.PCG64(3)):
        assert generator_from(given_).integers(2**62) == drawn
    rng, same = legacy(3)
    assert generator_from(rng).integers(2**62) == np.random.default_rng(seed_from(same)).integers(2**62)
    assert generator_from(None).integers(2**62) != generator_from(None).integers(2**62)


@pytest.mark.parametrize("make", [np.random.RandomState, np.random.PCG64, np.random.SeedSequence])
def test_dropout_and_its_gradient_take_it(make: Any, backend: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 9, 4), dtype=np.float32)
    seed = seed_from(make(7))
    options: Any = {"dropout_p": 0.5, "backend": backend}
    out, lse = fastattn.attention(x, x, x, rng=make(7), return_lse=True, **options)
    assert (out == fastattn.attention(x, x, x, rng=seed, **options)).all()
    given_ = fastattn.attention_backward(out, x, x, x, out, lse, rng=make(7), **options)
    wanted = fastattn.attention_backward(out, x, x, x, out, lse, rng=seed, **options)
    assert all((one == other).all() for one, other in zip(given_, wanted, strict=True))


def test_layers_take_it() -> None:
    rng = np.random.RandomState(3)
    one, next_one = (fastattn.BahdanauAttention(4, 4, 4, rng=rng) for _ in range(2))
    again = fastattn.BahdanauAttention(4, 4, 4, rng=np.random.RandomState(3))
    assert (one.query_weight == again.query_weight).all()
    assert (one.query_weight != next_one.query_weight).any()
