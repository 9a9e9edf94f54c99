"""The scores of the layers of one head, forward and backward: dot, general, additive and concat.

A score is split into what depends on the queries alone, what depends on the keys alone, and an attention to both.

`fastattn.attention` takes the axis before the last two for that of the heads. What it is told of each row of a batch,
such as `key_lengths`, has the axes before that one. In these layers there is one head, and all of those axes are the
batch's: arrays are (..., length, features), get an axis of length 1 here, and results lose it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastattn.api.additive import additive_attention
from fastattn.api.attention import attention
from fastattn.api.backward import additive_attention_backward, attention_backward
from fastattn.call.halves import cast
from fastattn.call.problem import Array, Mask
from fastattn.call.score_options import FurtherOptions
from fastattn.call.upstream import Names
from fastattn.layers.backward import bias_gradient, named_besides, weight_gradient
from fastattn.layers.base import linear
from fastattn.layers.masks import changed

__all__ = ["Additive", "Concat", "Dot", "General", "one_head"]


def one_head(array: Array) -> Array:
    """Return an array, or a mask, with an axis of one head before its last two; a mask may lack these."""
    return array if array.ndim < 2 else array[..., None, :, :]


class Dot:
    """The score h · s of a target state h and a source state s.

    Attributes
    ----------
    vector : ndarray, shape (hidden_dim,), or None
        What the tanh of a sum of both is multiplied by, where that is the score.
    grads : sequence of str or None
        Names of what a call was given besides its inputs, whose gradients are wanted.
    named : dict of str to ndarray
        These gradients, once they are known.
    """

    vector: Array | None = None
    grads: Names = None

    def __init__(self) -> None:
        self.named: dict[str, Array] = {}
        self._found: dict[str, Array] = {}

    @property
    def gradients(self) -> dict[str, Array]:
        """Those of the parameters: what calls of backward methods have found, added up."""
        return self._found

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
        """Attend.

        Parameters
        ----------
        query, key : ndarray, shapes (..., Lq, D), (..., Lk, D)
            What stands for them in the score.
        value : ndarray, shape (..., Lk, Dv)
        mask : ndarray, pair of them, or None
            Broadcasting to (..., Lq, Lk).
        options : FurtherOptions
        return_weights : bool

        Returns
        -------
        out : ndarray, shape (..., Lq, Dv)
        lse : ndarray, shape (..., Lq)
        weights : ndarray, shape (..., Lq, Lk), or None
        """
        wanted: Any = {"return_lse": True, "return_weights": return_weights, **options}
        q, k, v = map(one_head, (query, key, value))
        attn_mask: Any = changed(mask, one_head)
        if self.vector is None:
            out, lse, *weights = attention(q, k, v, attn_mask, scale=1.0, **wanted)
        else:
            out, lse, *weights = additive_attention(q, k, v, self._vector(query), attn_mask, **wanted)
        return out[..., 0, :, :], lse[..., 0, :], weights[0][..., 0, :, :] if weights else None

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
        """Return the gradients of what stands for queries and keys, and of the values; keep those that are named.

        Parameters
        ----------
        grad_out : ndarray, shape (..., Lq, Dv)
        query, key, value, mask, options
            What `attend` was given.
        out, lse : ndarray
            What it returned.
        """
        grad, q, k, v, result = map(one_head, (grad_out, query, key, value, out))
        attn_mask: Any = changed(mask, one_head)
        results, names = (result, lse[..., None, :], attn_mask), named_besides(self.grads, mask, options)
        if self.vector is None:
            usual: tuple[str, ...] = ("query", "key", "value")
            found = attention_backward(grad, q, k, v, *results, scale=1.0, **options, grads=(*usual, *names))
        else:
            usual, call = ("query", "key", "value", "weight"), (grad, q, k, v, self._vector(query), *results)
            found = additive_attention_backward(*call, **options, grads=(*usual, *names))
            self._add("weight", found[3])
        self.named = dict(zip(names, found[len(usual) :], strict=True))
        if "attn_mask" in names and self.named["attn_mask"].ndim > 1:
            self.named["attn_mask"] = self.named["attn_mask"][..., 0, :, :]
        return tuple(gradient[..., 0, :, :] for gradient in found[:3])

    def besides(self) -> tuple[tuple[Array, ...], ...]:
        """Return what stands behind the other results of a backward pass: gradients that are named, if any are."""
        return () if self.grads is None else (tuple(self.named[name] for name in self.grads),)

    def _vector(self, query: Array) -> Array:
        assert self.vector is not None
        return cast(self.vector, query.dtype)

    def _add(self, name: str, gradient: Array) -> None:
        known = self._found.get(name)
        self._found[name] = gradient if known is None else known + gradient


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


class Additive(Dot):
    """The score v · tanh(W q + U k + b), of matrices (hidden_dim, query_dim) and (hidden_dim, key_dim)."""

    def __init__(self, of_query: Array, of_key: Array, vector: Array, bias: Array | None = None) -> None:
        super().__init__()
        self.of_query, self.of_key, self.vector, self.bias = of_query, of_key, vector, bias

    def project_query(self, query: Array) -> Array:
        """Return the queries' part inside of the tanh."""
        return linear(query, self.of_query, self.bias)

    def project_query_backward(self, grad: Array, query: Array) -> Array:
        """Return the gradient of the queries."""
        self._add("query_weight", weight_gradient(grad, query))
        if self.bias is not None:
            self._add("bias", bias_gradient(grad))
        return linear(grad, self.of_query.T)

    def project_key(self, key: Array) -> Array:
        """Return the keys' part inside of the tanh."""
        return linear(key, self.of_key)

    def project_key_backward(self, grad: Array, key: Array) -> Array:
        """Return the gradient of the keys."""
        self._add("key_weight", weight_gradient(grad, key))
        return linear(grad, self.of_key.T)


class Concat(Additive):
    """The score v · tanh(W [h; s]): a vector (hidden_dim,), and a matrix (hidden_dim, query_dim + key_dim)."""

    def __init__(self, weight: Array, vector: Array, query_dim: int) -> None:
        super().__init__(weight[:, :query_dim], weight[:, query_dim:], vector)

    @property
    def gradients(self) -> dict[str, Array]:
        """Those of the matrix and the vector."""
        parts = {"query_weight": self.of_query, "key_weight": self.of_key, "weight": self.vector}
        of_query, of_key, of_vector = (self._found.get(name, np.zeros_like(part)) for name, part in parts.items())
        return {"score_weight": np.concatenate([of_query, of_key], axis=1), "score_vector": of_vector}
