"""Random numbers: what a user gives as rng, and the seed or the generator that comes of it.

It may be whatever `numpy.random.default_rng` takes, but for sequences of ints, and what came before that:
a RandomState, or the module numpy.random, whose functions draw from a RandomState of their own.
"""

from __future__ import annotations

import os
from typing import TypeAlias

import numpy as np

from fastattn.call.advice import said

__all__ = ["Rng", "generator_from", "seed_from"]

#: What has the numbers of a generator, or makes one; the module numpy.random is taken as well, and None is chance.
Rng: TypeAlias = (
    int
    | np.random.Generator
    | np.random.RandomState
    | np.random.BitGenerator
    | np.random.SeedSequence  # a seed: it does not move on
)
EXPECTED = (
    "expected None, a non-negative int or a numpy.random.Generator, RandomState, BitGenerator or SeedSequence: a "
    "sequence of ints makes a SeedSequence"
)


def seed_from(rng: object, draw: bool = True) -> int:
    """Return the 64-bit seed that decides which weights dropout keeps.

    Parameters
    ----------
    rng : None, int, or Generator, RandomState, BitGenerator or SeedSequence of numpy.random
        An int below 2**64 is the seed itself; a larger one is folded, its 64-bit words combined by exclusive or. A
        Generator gives one 64-bit draw, and so moves on; so do a RandomState, and a BitGenerator as a Generator of it
        would. The module numpy.random stands for the RandomState that it seeds by ``numpy.random.seed``. A
        SeedSequence gives the first 64-bit word of its state, the same each time. None takes 64 bits from the operating
        system.
    draw : bool
        False where no weight is dropped: `rng` is checked, but left where it stands, and 0 returned.

    Returns
    -------
    int
        In [0, 2**64).

    Raises
    ------
    TypeError
        If `rng` is anything else, True and False included.
    ValueError
        If it is a negative int.
    """
    if rng is None:
        return int.from_bytes(os.urandom(8), "little") if draw else 0
    if isinstance(rng, np.random.BitGenerator):
        rng = np.random.Generator(rng)
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(0, 2**64 - 1, dtype=np.uint64, endpoint=True)) if draw else 0
    if isinstance(rng, np.random.RandomState) or rng is np.random:
        return int(rng.randint(0, 2**64, dtype=np.uint64)) if draw else 0
    if isinstance(rng, np.random.SeedSequence):
        return int(rng.generate_state(1, np.uint64)[0]) if draw else 0
    if isinstance(rng, bool) or not isinstance(rng, (int, np.integer)):
        raise TypeError(f"rng: {said(rng)}; {EXPECTED}")
    rest = int(rng)
    if rest < 0:
        raise ValueError(f"rng: {said(rng)}; {EXPECTED}")
    seed = 0
    while rest:
        seed ^= rest & (2**64 - 1)
        rest >>= 64
    return seed


def generator_from(rng: object) -> np.random.Generator:
    """Return a generator of random numbers.

    Parameters
    ----------
    rng : None, int, or Generator, RandomState, BitGenerator or SeedSequence of numpy.random
        What `numpy.random.default_rng` makes of it: a Generator is used, and so moves on. A RandomState, and the module
        numpy.random, give a seed, as they do in `seed_from`.

    Raises
    ------
    TypeError, ValueError
        As `seed_from`.
    """
    seed_from(rng, draw=False)  # for what is no such thing
    if isinstance(rng, (int, np.integer, np.random.RandomState)) or rng is np.random:
        rng = int(rng) if isinstance(rng, (int, np.integer)) else seed_from(rng)
    generator: np.random.Generator = np.random.default_rng(rng)  # type: ignore[arg-type]
    return generator
