"""Reading tokens into caches, in pieces that can be interrupted, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastattn.demo.chat.caches import Cache, FastCache
from fastattn.demo.chat.model import SmolLM2
from fastattn.demo.parts import Floats

__all__ = ["Pace", "Reader"]

#: So many tokens of a long text are read at once: enough for the products of matrices, and soon interrupted.
AT_ONCE = 512


@dataclass
class Pace:
    """How many tokens were read, in how many seconds, and how many of these attention took."""

    tokens: int = 0
    seconds: float = 0.0
    attention: float = 0.0

    @property
    def per_second(self) -> float:
        """Tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def share(self) -> float:
        """The share of attention in the time."""
        return self.attention / max(self.seconds, 1e-9)


class Reader:
    """A model, and caches of what it has read.

    Parameters
    ----------
    model : SmolLM2
    kind : type
        Of the caches: whose attention it is.

    Attributes
    ----------
    length : int
        How many tokens it has read and not forgotten.
    prefill, decode : Pace
        Of texts, and of tokens one by one.
    """

    def __init__(self, model: SmolLM2, kind: type[Cache] = FastCache) -> None:
        self.model = model
        self.caches = model.caches(kind)
        self.length = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count time and tokens from 0."""
        self.prefill, self.decode = Pace(), Pace()

    def read(self, ids: Sequence[int], progress: Callable[[int, int], None] | None = None) -> Floats:
        """Read tokens, and score what may come behind the last of them; if interrupted, forget those of the last piece.

        Parameters
        ----------
        ids : sequence of int
            At least one.
        progress : callable, optional
            Called with the number of tokens that are read, and of all.

        Returns
        -------
        ndarray, shape (vocabulary,)
        """
        pace = self.decode if len(ids) == 1 else self.prefill
        for start in range(0, len(ids), AT_ONCE):
            piece = ids[start : start + AT_ONCE]
            began, before = time.perf_counter(), sum(cache.seconds for cache in self.caches)
            try:
                hidden = self.model.hidden(piece, self.caches)
                logits: Floats = self.model.logits(hidden[-1:])[0]
            except BaseException:  # Ctrl-C, too: some layers have more tokens now than others
                self.forget(self.length)
                raise
            self.length += len(piece)
            pace.tokens += len(piece)
            pace.seconds += time.perf_counter() - began
            pace.attention += sum(cache.seconds for cache in self.caches) - before
            if progress is not None:
                progress(start + len(piece), len(ids))
        return logits

    def forget(self, length: int) -> None:
        """Keep no more than the first tokens, so many."""
        self.length = min(self.length, length)
        for cache in self.caches:
            cache.truncate(min(cache.length, self.length))

    def watch(self, token: int) -> list[Floats]:
        """Read a token, and return the weights with which it looks: of each layer, (heads, 1, tokens)."""
        weights: list[Floats] = []
        for cache in self.caches:
            cache.record = weights
        try:
            self.read([token])
        finally:
            for cache in self.caches:
                cache.record = None
        return weights
