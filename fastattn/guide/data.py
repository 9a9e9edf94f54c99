"""What the pages read: a real model, and a real text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from fastattn.demo.cli import load_model
from fastattn.demo.minilm import Floats, MiniLM, batches, recording_attention
from fastattn.demo.words import Word, in_words, join_pieces

__all__ = ["fables", "hidden_after", "model", "sentences", "word_weights"]


@lru_cache(maxsize=1)
def model() -> MiniLM:
    """The sentence encoder of the demo, all-MiniLM-L6-v2."""
    return load_model()


@lru_cache(maxsize=1)
def fables() -> tuple[tuple[str, ...], ...]:
    """Nine fables by Aesop, each a tuple of sentences; translated by V. S. Vernon Jones, 1912, public domain.

    Examples
    --------
    >>> len(fables()), fables()[2][1]
    (9, 'At last she hit upon a clever plan.')
    """
    text = resources.files("fastattn.guide").joinpath("fables.txt").read_text("utf-8")
    return tuple(tuple(fable.splitlines()) for fable in text.strip().split("\n\n"))


def sentences() -> list[str]:
    """All sentences of the fables, in order."""
    return [sentence for fable in fables() for sentence in fable]


def hidden_after(layers: int, ids: Sequence[int]) -> Floats:
    """The vectors of a sentence's word pieces after so many layers of the model, [piece][384]."""
    below = copy.copy(model())
    below.layers = below.layers[:layers]
    row = np.asarray(ids)[None]
    hidden: Floats = below.hidden(row, np.ones(row.shape, bool))[0]
    return hidden


def word_weights(texts: Sequence[str]) -> list[tuple[list[Word], NDArray[np.float64]]]:
    """The words of each text, and the weights between them in all heads, [layer][head][who looks][at what]."""
    encodings = [model().encode(text) for text in texts]
    found: dict[int, tuple[list[Word], NDArray[np.float64]]] = {}
    for batch in batches([len(encoding.ids) for encoding in encodings], 16):
        longest = max(len(encodings[index].ids) for index in batch)
        ids = np.array([encodings[index].ids + [0] * (longest - len(encodings[index].ids)) for index in batch])
        mask = np.array([np.arange(longest) < len(encodings[index].ids) for index in batch])
        layers: list[Floats] = []
        model().hidden(ids, mask, recording_attention(layers))
        for row, index in enumerate(batch):
            pieces = len(encodings[index].ids)
            words = join_pieces(texts[index], encodings[index])
            found[index] = words, in_words(np.stack([layer[row, :, :pieces, :pieces] for layer in layers]), words)
    return [found[index] for index in range(len(texts))]
