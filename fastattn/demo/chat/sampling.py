"""Choosing the next token from the scores of all."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastattn.demo.parts import Floats

__all__ = ["Sampling"]


@dataclass
class Sampling:
    """How to choose.

    Attributes
    ----------
    temperature : float
        0: always the token with the greatest score. The greater it is, the more often others are drawn.
    top_p : float
        Draw from the likeliest tokens only, from as few as are together this likely.
    rng : numpy.random.Generator
        What draws.

    Examples
    --------
    >>> scores = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    >>> Sampling().choose(scores)
    1
    >>> drawn = [Sampling(1.0, top_p=0.8, rng=np.random.default_rng(seed)).choose(scores) for seed in range(8)]
    >>> sorted(set(drawn))
    [1, 2]
    """

    temperature: float = 0.0
    top_p: float = 1.0
    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    def choose(self, logits: Floats) -> int:
        """The number of the next token."""
        if self.temperature == 0:
            return int(logits.argmax())
        scores = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # -inf gives 0, which is right
            scores = (scores - scores.max()) / self.temperature
        weights = np.exp(scores)
        order = np.argsort(-weights, kind="stable")
        sums = np.cumsum(weights[order])
        # A token is drawn from if those before it are not likely enough by themselves: the likeliest one always is
        drawn_from = int(np.searchsorted(sums, self.top_p * sums[-1])) + 1
        sums = sums[: min(drawn_from, len(sums))]
        place = int(np.searchsorted(sums, self.rng.random() * sums[-1], side="right"))
        return int(order[min(place, len(sums) - 1)])
