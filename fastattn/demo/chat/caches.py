"""What a layer keeps of the tokens that it has read: their keys and values.

A new token looks at the keys of all tokens before it, which do not change any more. So they are kept, and reading a
token takes one query in each head, not as many as there are tokens.

Shapes in the comments: L new tokens, n tokens in all, H query heads, G of which share one of Hk heads of keys and
values, D dimensions of a head.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

import fastattn
from fastattn.demo.parts import Floats

__all__ = ["Cache", "FastCache", "PlainCache"]


class Cache(ABC):
    """The keys and values of one layer, and attention to them.

    Attributes
    ----------
    length : int
        How many tokens are in it.
    seconds : float
        How long all of its attention has taken.
    record : list of ndarray, optional
        Where the weights of each call go, of shape (H, L, n).
    """

    def __init__(self, kv_heads: int, head_dim: int, capacity: int) -> None:
        self.length = 0
        self.seconds = 0.0
        self.record: list[Floats] | None = None

    def attention(self, query: Floats, key: Floats, value: Floats) -> Floats:
        """Keep the keys and values of new tokens, and look at all that there are.

        Parameters
        ----------
        query : ndarray, shape (1, H, L, D)
        key, value : ndarray, shape (1, Hk, L, D)

        Returns
        -------
        ndarray, shape (1, H, L, D)
        """
        start = time.perf_counter()
        self._append(key, value)
        self.length += key.shape[2]
        out = self._attend(query)
        self.seconds += time.perf_counter() - start
        return out

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget all but the first tokens, so many."""

    @abstractmethod
    def _append(self, key: Floats, value: Floats) -> None: ...

    @abstractmethod
    def _attend(self, query: Floats) -> Floats: ...


class FastCache(Cache):
    """Attention by fastattn: what this demo is about."""

    def __init__(self, kv_heads: int, head_dim: int, capacity: int) -> None:
        super().__init__(kv_heads, head_dim, capacity)
        self._kept = fastattn.KVCache(1, kv_heads, head_dim, dtype="float32", capacity=capacity)

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens, so many."""
        self._kept.truncate([length])
        self.length = length

    def _append(self, key: Floats, value: Floats) -> None:
        self._kept.append(key, value)

    def _attend(self, query: Floats) -> Floats:
        if self.record is None:
            out: Floats = self._kept.attention(query)
        else:
            out, weights = self._kept.attention(query, return_weights=True)
            self.record.append(weights[0])
        return out


class PlainCache(Cache):
    """Attention as one writes it in NumPy."""

    def __init__(self, kv_heads: int, head_dim: int, capacity: int) -> None:
        super().__init__(kv_heads, head_dim, capacity)
        self._key, self._value = np.empty((2, kv_heads, capacity, head_dim), np.float32)

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens, so many."""
        self.length = length

    def _append(self, key: Floats, value: Floats) -> None:
        new = slice(self.length, self.length + key.shape[2])
        self._key[:, new], self._value[:, new] = key[0], value[0]

    def _attend(self, query: Floats) -> Floats:
        key, value = self._key[:, : self.length], self._value[:, : self.length]
        # The heads that share keys are rows of one product: (Hk, G · L, D) · (Hk, D, n)
        rows: Any = query.reshape(len(key), -1, query.shape[3]) * np.float32(1 / math.sqrt(query.shape[3]))
        weights = (rows @ key.swapaxes(1, 2)).reshape(*query.shape[1:3], self.length)  # (H, L, n)
        first = self.length - query.shape[2]  # the new tokens see themselves and what is before them
        hidden = np.arange(first, self.length) > np.arange(first, self.length)[:, None]
        np.copyto(weights[..., first:], -np.inf, where=hidden)
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        weights *= 1 / weights.sum(axis=-1, keepdims=True)
        if self.record is not None:
            self.record.append(weights)
        out: Floats = (weights.reshape(len(key), -1, self.length) @ value).reshape(query.shape)
        return out
