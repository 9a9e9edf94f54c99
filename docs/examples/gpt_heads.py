"""What the heads of the character GPT look at, measured on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformer import Array

Flags = NDArray[np.bool_]


class Habit(NamedTuple):
    """How much weight a head gives to places of one kind.

    Attributes
    ----------
    kind : str
        The kind, a key of `kinds_of_places`.
    layer, head : int
    weight : float
        Of all its weight, the part that goes there, in the mean over the characters that have such a place.
    even : float
        The part that went there if it looked at all characters alike.
    untrained : float
        The part that went there before training.
    """

    kind: str
    layer: int
    head: int
    weight: float
    even: float
    untrained: float


def kinds_of_places(text: str) -> dict[str, Flags]:
    """Return for each kind of place which characters j are one for the character i: an array [i][j].

    Kinds exclude the character itself and the one before, which have kinds of their own, so that a head that looks at
    these is not taken for one that looks at words or lines.
    """
    length = len(text)
    i, j = np.indices((length, length))
    letter = np.array([character.isalnum() or character == "_" for character in text])
    begins_word = letter & ~np.roll(letter, 1)
    begins_word[0] = letter[0]
    word = np.cumsum(begins_word)  # the number of the word that i is in, or that was before
    begins_line = np.roll([character == "\n" for character in text], 1)
    begins_line[0] = True
    line = np.cumsum(begins_line)
    ids = np.array([ord(character) for character in text])
    pair = ids[1:] * 0x110000 + ids[:-1]  # a character and the one before it
    same_pair = np.zeros((length, length), bool)
    same_pair[1:, 1:] = pair[:, None] == pair
    after_pair = np.zeros((length, length), bool)
    after_pair[:, 1:] = same_pair[:, :-1]
    far = j < i - 1
    return {
        "the character itself": i == j,
        "the character before": j == i - 1,
        "the two before that": (j == i - 2) | (j == i - 3),
        "the start of its word": far & letter[:, None] & (begins_word & (word[:, None] == word)),
        "the start of the word before": far & (begins_word & (word[:, None] == word + 1)),
        "the start of its line": far & (begins_line & (line[:, None] == line)),
        "the same character, earlier": far & (ids[:, None] == ids),
        "what came after the same pair": far & after_pair,
    }


def habits(weights: Array, texts: list[str]) -> dict[str, tuple[NDArray[np.float64], float]]:
    """Return for each kind the part of the weight that goes there, [layer][head], and what an even head gives.

    Parameters
    ----------
    weights : ndarray, shape (layers, texts, heads, L, L)
    texts : list of str, of length L
    """
    layers, _, heads, length, _ = weights.shape
    everywhere = np.tril(np.ones((length, length)) / np.arange(1, length + 1)[:, None])
    given: dict[str, NDArray[np.float64]] = {}
    even: dict[str, float] = {}
    asked: dict[str, int] = {}
    for index, text in enumerate(texts):
        for kind, places in kinds_of_places(text).items():
            some = places.any(axis=1)
            part = np.einsum("nhij,ij->nh", weights[:, index][:, :, some], places[some], dtype=np.float64)
            given[kind] = given.get(kind, np.zeros((layers, heads))) + part
            even[kind] = even.get(kind, 0.0) + float(everywhere[some][places[some]].sum())
            asked[kind] = asked.get(kind, 0) + int(some.sum())
    return {kind: (given[kind] / max(1, asked[kind]), even[kind] / max(1, asked[kind])) for kind in given}


def weights_of(model: Any, ids: NDArray[np.int64]) -> Array:
    """Return the weights of all heads, (layers, B, H, L, L)."""
    for block in model.blocks:
        block.attention.keep_weights = True
    model(ids)
    found = np.stack([block.attention.weights for block in model.blocks])
    for block in model.blocks:
        block.attention.keep_weights, block.attention.weights = False, None
    return found


def strongest(trained: Array, untrained: Array, texts: list[str]) -> list[Habit]:
    """Return for each kind of place the head that gives it the most weight."""
    before = habits(untrained, texts)
    found = []
    for kind, (given, even) in habits(trained, texts).items():
        layer, head = (int(index) for index in np.unravel_index(given.argmax(), given.shape))
        was = float(before[kind][0][layer, head])
        found.append(Habit(kind, layer, head, float(given[layer, head]), even, was))
    return found


def cost_without_each(model: Any, cost: Callable[[], float]) -> list[list[float]]:
    """Return by how much a cost rises while a head gives nothing, [layer][head]."""
    whole = cost()
    found = []
    for block in model.blocks:
        found.append([])
        for head in range(block.attention.heads):
            block.attention.heads_off = [head]
            found[-1].append(cost() - whole)
        block.attention.heads_off = ()
    return found
