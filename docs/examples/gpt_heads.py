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
    otherwise : float
        The part that would go there anyway. For a kind that is a distance, if the head looked at all characters alike;
        for others, if it knew of each character only how far away it is: by its mean weight at each distance.
    untrained : float
        The part that went there before training.
    """

    kind: str
    layer: int
    head: int
    weight: float
    otherwise: float
    untrained: float


#: The kinds that are distances. Of the others, most lie near: a head that only looks near meets them as well.
DISTANCES = ("the character itself", "the character before", "the two before that")


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


def habits(weights: Array, texts: list[str]) -> dict[str, tuple[Array, Array]]:
    """Return for each kind of place the part of the weight that goes there, and that which would anyway (see `Habit`).

    Parameters
    ----------
    weights : ndarray, shape (layers, texts, heads, L, L)
    texts : list of str, of length L

    Returns
    -------
    dict of str to two ndarrays, shape (layers, heads)
    """
    layers, _, heads, length, _ = weights.shape
    even = np.broadcast_to(np.tril(1 / np.arange(1.0, length + 1)[:, None]), (layers, heads, length, length))
    mean = weights.mean(axis=1, dtype=np.float64)
    by_distance = np.zeros_like(mean)
    for distance in range(length):
        near = mean.diagonal(-distance, 2, 3).mean(axis=-1)
        by_distance[..., np.arange(distance, length), np.arange(length - distance)] = near[..., None]
    sums: dict[str, Array] = {}
    for index, text in enumerate(texts):
        for kind, places in kinds_of_places(text).items():
            some = places.any(axis=1)
            otherwise = even if kind in DISTANCES else by_distance
            parts = [
                np.einsum("nhij,ij->nh", each[:, :, some], places[some]) for each in (weights[:, index], otherwise)
            ]
            sums[kind] = sums.get(kind, 0) + np.stack([*parts, np.full((layers, heads), some.sum())])
    return {kind: (given / asked, otherwise / asked) for kind, (given, otherwise, asked) in sums.items() if asked.all()}


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
    """Return for each kind of place the head that gives it most weight beyond what it would anyway."""
    before = habits(untrained, texts)
    found = []
    for kind, (given, otherwise) in habits(trained, texts).items():
        place = np.unravel_index((given - otherwise).argmax(), given.shape)
        layer, head = map(int, place)
        found.append(Habit(kind, layer, head, *(float(each[place]) for each in (given, otherwise, before[kind][0]))))
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
