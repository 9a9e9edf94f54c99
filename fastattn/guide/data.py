"""What the pages read: a real model, and a real text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

import numpy as np

from fastattn.demo.cli import load_model
from fastattn.demo.minilm import Floats, MiniLM

__all__ = ["fables", "hidden_after", "model", "sentences"]


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
