"""The three attentions of Whisper by fastattn, and the same in plain NumPy, to compare with.

Shapes in the comments: H = 8 heads, D = 64 dimensions of a head, M = 1500 moments of a sound, L tokens at once.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.demo.parts import Floats

__all__ = ["Attention", "PlainAttention", "RecordingAttention", "TimedAttention"]


class Attention:
    """Every attention that Whisper computes, by fastattn; all arrays are (H, length, D)."""

    def cache(self, heads: int, dimensions: int, capacity: int) -> Any:
        """Make what a layer keeps of the tokens so far, their keys and values."""
        return fastattn.KVCache(1, heads, dimensions, dtype="float32", capacity=capacity)

    def of_sound(self, query: Floats, key: Floats, value: Floats) -> Floats:
        """In the encoder: every moment looks at all moments."""
        out: Floats = fastattn.attention(query, key, value)
        return out

    def of_text(self, query: Floats, key: Floats, value: Floats, cache: Any) -> Floats:
        """In the decoder: L new tokens look at what has been written up to each; the cache has them from now on."""
        cache.append(key[None], value[None])
        out: Floats = cache.attention(query[None])[0]
        return out

    def to_sound(self, query: Floats, key: Floats, value: Floats) -> Floats:
        """In the decoder, cross-attention: L tokens look at the moments of the sound."""
        out: Floats = fastattn.attention(query, key, value)
        return out


class RecordingAttention(Attention):
    """The same, which keeps the weights with which tokens look at the sound.

    Attributes
    ----------
    weights : list of ndarray, shape (H, L, M)
        Of one layer after another.
    """

    def __init__(self) -> None:
        self.weights: list[Floats] = []

    def to_sound(self, query: Floats, key: Floats, value: Floats) -> Floats:
        """Cross-attention that returns the weights as well."""
        out: Floats
        out, weights = fastattn.attention(query, key, value, return_weights=True)
        self.weights.append(weights)
        return out


class PlainCache:
    """Keys and values in memory for as many tokens as there may be; `lengths` as of a `fastattn.KVCache`."""

    def __init__(self, heads: int, dimensions: int, capacity: int) -> None:
        self._key, self._value = np.empty((2, heads, capacity, dimensions), np.float32)
        self.lengths = np.zeros(1, np.int64)

    def append(self, key: Floats, value: Floats) -> tuple[Floats, Floats]:
        """Add those of L more tokens, (H, L, D), and return all that there are."""
        new = slice(self.lengths[0], self.lengths[0] + key.shape[1])
        self._key[:, new], self._value[:, new] = key, value
        self.lengths[0] = new.stop
        return self._key[:, : new.stop], self._value[:, : new.stop]


class PlainAttention(Attention):
    """The same as one writes it in NumPy."""

    def cache(self, heads: int, dimensions: int, capacity: int) -> PlainCache:
        """Make what a layer keeps of the tokens so far."""
        return PlainCache(heads, dimensions, capacity)

    def of_sound(self, query: Floats, key: Floats, value: Floats) -> Floats:
        """In the encoder."""
        return _plain(query, key, value)

    def of_text(self, query: Floats, key: Floats, value: Floats, cache: PlainCache) -> Floats:
        """In the decoder."""
        key, value = cache.append(key, value)
        count, length = query.shape[1], key.shape[1]
        hidden = None if count == 1 else ~np.tri(count, length, length - count, dtype=bool)
        return _plain(query, key, value, hidden)

    def to_sound(self, query: Floats, key: Floats, value: Floats) -> Floats:
        """Cross-attention."""
        return _plain(query, key, value)


def _plain(query: Floats, key: Floats, value: Floats, hidden: NDArray[np.bool_] | None = None) -> Floats:
    weights: Floats = query @ key.swapaxes(-1, -2)
    weights *= 1 / math.sqrt(query.shape[-1])
    if hidden is not None:
        np.copyto(weights, -np.inf, where=hidden)
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    out: Floats = weights @ value
    return out


class TimedAttention(Attention):
    """Another attention, and how many seconds are spent in it."""

    def __init__(self, inner: Attention) -> None:
        self.inner = inner
        self.seconds = 0.0

    def of_sound(self, query: Floats, key: Floats, value: Floats) -> Floats:
        """In the encoder."""
        start = time.perf_counter()
        out = self.inner.of_sound(query, key, value)
        self.seconds += time.perf_counter() - start
        return out

    def cache(self, heads: int, dimensions: int, capacity: int) -> Any:
        """Make what a layer keeps of the tokens so far."""
        return self.inner.cache(heads, dimensions, capacity)

    def of_text(self, query: Floats, key: Floats, value: Floats, cache: Any) -> Floats:
        """In the decoder."""
        start = time.perf_counter()
        out = self.inner.of_text(query, key, value, cache)
        self.seconds += time.perf_counter() - start
        return out

    def to_sound(self, query: Floats, key: Floats, value: Floats) -> Floats:
        """Cross-attention."""
        start = time.perf_counter()
        out = self.inner.to_sound(query, key, value)
        self.seconds += time.perf_counter() - start
        return out
