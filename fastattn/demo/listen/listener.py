"""Whisper on a sound of any length: window by window, segment by segment, and where each word looked in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fastattn.demo.listen.attention import Attention
from fastattn.demo.listen.decoding import best_text, detect_language
from fastattn.demo.listen.mel import WINDOW, log_mel
from fastattn.demo.listen.model import Pair, Whisper
from fastattn.demo.listen.sound import RATE
from fastattn.demo.listen.vocabulary import TICK, Vocabulary
from fastattn.demo.parts import Floats

__all__ = ["Listener", "Segment", "Window"]


@dataclass(frozen=True)
class Window:
    """A part of a sound, of up to 30 seconds, that is heard at once.

    Attributes
    ----------
    start, length : float
        In seconds.
    prompt, tokens : list of int
        What is written about it: the marks before, and then text and marks of time.
    """

    start: float
    length: float
    prompt: list[int]
    tokens: list[int]

    @property
    def moments(self) -> int:
        """How many moments, each `TICK` seconds after the one before, it has."""
        return round(self.length / TICK)


@dataclass(frozen=True)
class Segment:
    """What is said between two moments.

    Attributes
    ----------
    start, end : float
        The moments, in seconds from the beginning of the sound.
    text : str
    words : list of str
    window : Window
        What it is a part of.
    looks : ndarray, shape (words, moments)
        How much each word looked at each moment of the window, in the heads that look at the moment at which a word is
        said.
    """

    start: float
    end: float
    text: str
    words: list[str]
    window: Window
    looks: Floats


class Listener:
    """Listens to sounds.

    Parameters
    ----------
    model : Whisper
    vocabulary : Vocabulary
    language : str, optional
        The code of the language that is spoken; found out from the first 30 seconds unless given.
    translate : bool
        Write a translation to English.
    attention : Attention, optional
        What computes attention: fastattn unless given.
    """

    def __init__(
        self,
        model: Whisper,
        vocabulary: Vocabulary,
        language: str | None = None,
        translate: bool = False,
        attention: Attention | None = None,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.language = language
        #: How sure it is of the language, between 0 and 1.
        self.sureness = 1.0
        self.translate = translate
        self.attention = attention or Attention()

    def hear(self, samples: Floats) -> list[Pair]:
        """Up to 30 seconds of sound as the decoder looks at it."""
        return self.model.keys_and_values(self.model.hear(log_mel(samples), self.attention))

    def segments(
        self, samples: Floats, said: Callable[[float, str], None] = lambda seconds, text: None
    ) -> Iterator[Segment]:
        """Write down what is said in a sound.

        A window of 30 seconds is heard at a time. The next begins where the last segment that is complete in it ends.

        Parameters
        ----------
        samples : ndarray, shape (n,)
            Of one channel, `RATE` a second.
        said : callable
            Called with the beginning of the window and the text so far in it, as words come.
        """
        at = 0
        while at < len(samples):
            part = samples[at : at + WINDOW]
            sound = self.hear(part)
            if self.language is None:
                self.language, self.sureness = detect_language(self.model, self.vocabulary, sound, self.attention)
            prompt = self.vocabulary.prompt(self.language, self.translate)
            start, length = at / RATE, len(part) / RATE
            text = best_text(
                self.model, self.vocabulary, sound, prompt, self.attention, partial(self._tell, said, start)
            )
            if text.is_silence:
                at += WINDOW
                continue
            pieces, end = cut(text.tokens, self.vocabulary, length)
            yield from self._with_words(Window(start, length, prompt, text.tokens), pieces, sound)
            at += max(round(end * RATE), RATE)  # it never stands still

    def _tell(self, said: Callable[[float, str], None], start: float, tokens: list[int]) -> None:
        said(start, self.vocabulary.text(tokens))

    def _with_words(
        self, window: Window, pieces: Sequence[tuple[float, float, range]], sound: list[Pair]
    ) -> Iterator[Segment]:
        """The segments of a window, each with where its words looked."""
        language = "en" if self.translate else self.language or "en"
        layers = self.model.looks([*window.prompt, *window.tokens], sound)
        heads = np.mean([layers[layer, head] for layer, head in self.vocabulary.alignment_heads], axis=0)
        # A token is written by what stands before it: there it has looked
        looks = heads[len(window.prompt) - 1 : -1, : window.moments]
        for start, end, places in pieces:
            written = [place for place in places if window.tokens[place] < self.vocabulary.end]
            words = self.vocabulary.words([window.tokens[place] for place in written], language)
            if words:
                yield Segment(
                    window.start + start,
                    window.start + end,
                    self.vocabulary.text([window.tokens[place] for place in written]).strip(),
                    [word for word, _ in words],
                    window,
                    np.array([looks[[written[index] for index in indices]].mean(axis=0) for _, indices in words]),
                )


def cut(
    tokens: Sequence[int], vocabulary: Vocabulary, seconds: float
) -> tuple[list[tuple[float, float, range]], float]:
    """Cut what was written about a window at its marks of time.

    Returns
    -------
    segments : list of (start, end, places)
        Each with its moments, in seconds from the beginning of the window, and the places of its tokens.
    end : float
        How far the window has been understood: to its end, or, where a text has begun that is not complete in it, to
        where that begins.
    """
    segments = []
    begin = 0
    for place in range(1, len(tokens)):
        if vocabulary.is_time(tokens[place - 1]) and vocabulary.is_time(tokens[place]):
            segments.append(_segment(tokens, vocabulary, begin, place, seconds))
            begin = place
    rest = tokens[begin:]
    complete = len(rest) > 1 and vocabulary.is_time(rest[-1])
    if rest and (complete or not segments):
        segments.append(_segment(tokens, vocabulary, begin, len(tokens), seconds))
    return segments, seconds if complete or begin == 0 else segments[-1][1]


def _segment(
    tokens: Sequence[int], vocabulary: Vocabulary, begin: int, end: int, seconds: float
) -> tuple[float, float, range]:
    """One segment: where its marks say it begins and ends, as far as it has them."""
    first, last = tokens[begin], tokens[end - 1]
    start = vocabulary.seconds(first) if vocabulary.is_time(first) else 0.0
    stop = vocabulary.seconds(last) if vocabulary.is_time(last) and end - begin > 1 else seconds
    return start, min(stop, seconds), range(begin, end)
