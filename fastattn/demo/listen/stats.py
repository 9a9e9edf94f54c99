"""How long Whisper takes, and how much of it is attention: fastattn and plain NumPy in the same model, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastattn.demo.listen.attention import Attention, PlainAttention, TimedAttention
from fastattn.demo.listen.decoding import LONGEST
from fastattn.demo.listen.mel import log_mel
from fastattn.demo.listen.model import Whisper
from fastattn.demo.parts import Floats

__all__ = ["Part", "Stats", "measure"]

ROUNDS = 5


@dataclass(frozen=True)
class Part:
    """Seconds that a part of the model takes, and how many of them attention does; medians of the rounds."""

    seconds: float
    attention: float


@dataclass(frozen=True)
class Stats:
    """What hearing a window, and writing about it, takes with one attention.

    Attributes
    ----------
    name : str
        Whose attention it is.
    hear, write : Part
        The encoder, and the decoder with all tokens, one at a time.
    """

    name: str
    hear: Part
    write: Part

    @property
    def seconds(self) -> float:
        """Both parts together."""
        return self.hear.seconds + self.write.seconds


def measure(
    model: Whisper,
    samples: Floats,
    prompt: Sequence[int],
    tokens: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Stats]:
    """Hear and write the same again, in rounds in which fastattn and plain NumPy take turns.

    Parameters
    ----------
    model : Whisper
    samples : ndarray
        Up to 30 seconds of sound.
    prompt, tokens : sequence of int
        What is written about it.
    progress : callable, optional
        Called with the number of rounds done, and of all.
    """
    kinds: dict[str, type[Attention]] = {"fastattn": Attention, "NumPy": PlainAttention}
    taken: dict[str, list[tuple[Part, Part]]] = {name: [] for name in kinds}
    for done in range(ROUNDS):
        for name, kind in kinds.items():
            taken[name].append(_once(model, samples, prompt, tokens, kind()))
        progress(done + 1, ROUNDS)
    return [Stats(name, *(_median(parts) for parts in zip(*rounds, strict=True))) for name, rounds in taken.items()]


def _once(
    model: Whisper, samples: Floats, prompt: Sequence[int], tokens: Sequence[int], attention: Attention
) -> tuple[Part, Part]:
    timed = TimedAttention(attention)
    start = time.perf_counter()
    sound = model.keys_and_values(model.hear(log_mel(samples), timed))
    heard = Part(time.perf_counter() - start, timed.seconds)

    timed.seconds = 0.0
    start = time.perf_counter()
    caches = model.caches(timed, len(prompt) + LONGEST)
    vectors = model.read(prompt, sound, caches, timed)
    for token in tokens:
        model.logits(vectors[-1])
        vectors = model.read([token], sound, caches, timed)
    return heard, Part(time.perf_counter() - start, timed.seconds)


def _median(parts: Sequence[Part]) -> Part:
    return Part(
        statistics.median(part.seconds for part in parts),
        statistics.median(part.attention for part in parts),
    )
