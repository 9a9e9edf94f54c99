"""The scores of Luong's attention, forward and backward: dot, general and concat.

A score is split into what depends on the queries alone, what depends on the keys alone, and an attention to both.
"""

from __future__ import annotations

import numpy as np

from fastattn.call.problem import Array, Mask
from fastattn.call.score_options import FurtherOptions
from fastattn.layers import one_head
from fastattn.layers.backward import weight_gradient
from fastattn.layers.base import linear

__all__ = ["Concat", "Dot", "General"]


class Dot:
    """The score h · s of a target state h and a source state s.

    Attributes
    ----------
    gradients : dict of str to ndarray
        Those of the parameters of the score: what calls of its backward methods have found, added up.
    vector : ndarray, shape (hidden_dim,), or None
        What the tanh of a sum of both is multiplied by, where that is the score.
    """

    vector: Array | None = None

    def __init__(self) -> None:
        self.gradients: dict[str, Array] = {}

    def project_query(self, query: Array) -> Array:
        """Return what stands for the queries, (..., query_dim), in the score."""
        return query

    def project_query_backward(self, grad: Array, query: Array) -> Array:
        """Return the gradient of the queries, given that of what stands for them."""
        return grad

    def project_key(self, key: Array) -> Array:
        """Return what stands for the keys, (..., key_dim), in the score."""
        return key

    def project_key_backward(self, grad: Array, key: Array) -> Array:
        """Return the gradient of the keys, given that of what stands for them."""
        return grad

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Mask,
        options: FurtherOptions,
        return_weights: bool = False,
    ) -> tuple[Array, Array, Array | None]:
        """Return result, log-sum-exp and, if asked for, weights of what stands for queries and keys."""
        return one_head.attend(query, key, value, self._vector(query), mask, options, return_weights)

    def attend_backward(
        self,
        grad_out: Array,
        query: Array,
        key: Array,
        value: Array,
        out: Array,
        lse: Array,
        mask: Mask,
        options: FurtherOptions,
    ) -> tuple[Array, ...]:
        """Return the gradients of what stands for queries and keys, and of the values."""
        vector = self._vector(query)
        found = one_head.attend_backward(grad_out, query, key, value, vector, out, lse, mask, options)
        if vector is not None:
            self._add("score_vector", found[3])
        return found[:3]

    def _vector(self, query: Array) -> Array | None:
        return None if self.vector is None else self.vector.astype(query.dtype, copy=False)

    def _add(self, name: str, gradient: Array) -> None:
        known = self.gradients.get(name)
        self.gradients[name] = gradient if known is None else known + gradient


class General(Dot):
    """The score hᵀ W s, with a matrix of shape (query_dim, key_dim)."""

    def __init__(self, weight: Array) -> None:
        super().__init__()
        self.weight = weight

    def project_query(self, query: Array) -> Array:
        """Return h W."""
        return linear(query, self.weight.T)

    def project_query_backward(self, grad: Array, query: Array) -> Array:
        """Return the gradient of h."""
        self._add("score_weight", weight_gradient(grad, query).T)
        return linear(grad, self.weight)


class Concat(Dot):
    """The score v · tanh(W [h; s]): a vector (hidden_dim,), and a matrix (hidden_dim, query_dim + key_dim)."""

    def __init__(self, weight: Array, vector: Array, query_dim: int) -> None:
        super().__init__()
        self.of_query, self.of_key = weight[:, :query_dim], weight[:, query_dim:]
        self.vector = vector

    def project_query(self, query: Array) -> Array:
        """Return the queries' part inside of the tanh."""
        return linear(query, self.of_query)

    def project_query_backward(self, grad: Array, query: Array) -> Array:
        """Return the gradient of h."""
        own = weight_gradient(grad, query)
        self._add("score_weight", np.concatenate([own, np.zeros(self.of_key.shape, own.dtype)], axis=1))
        return linear(grad, self.of_query.T)

    def project_key(self, key: Array) -> Array:
        """Return the keys' part inside of the tanh."""
        return linear(key, self.of_key)

    def project_key_backward(self, grad: Array, key: Array) -> Array:
        """Return the gradient of s."""
        own = weight_gradient(grad, key)
        self._add("score_weight", np.concatenate([np.zeros(self.of_query.shape, own.dtype), own], axis=1))
        return linear(grad, self.of_key.T)
