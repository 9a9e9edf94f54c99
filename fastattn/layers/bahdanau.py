"""Bahdanau's attention: additive scores of projected queries and keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn.additive import additive_attention
from fastattn.layers.base import Layer, as_inputs, check_size, common_batch, linear
from fastattn.problem import Array, Shape, check_flag

__all__ = ["BahdanauAttention"]


class BahdanauAttention(Layer):
    """Bahdanau's attention [1]_: the score of a query q and a key k is weight · tanh(W q + U k + bias).

    Parameters
    ----------
    query_dim, key_dim : int
        Features of a decoder's state and of a source's annotation.
    hidden_dim : int
        Features inside the tanh.
    rng : int, numpy.random.Generator or None
        What the parameters are drawn from, as in PyTorch's linear layers: uniformly within ±1/√n, n being the number of
        features that a parameter is summed over. (The paper starts with `weight` and `bias` 0 and the matrices within
        some ±0.001, from where only training leads anywhere: all keys weigh the same.)
    dtype : dtype_like
        float32 or float64.

    Attributes
    ----------
    query_weight : ndarray, shape (hidden_dim, query_dim)
        W, the paper's W_a.
    key_weight : ndarray, shape (hidden_dim, key_dim)
        U, the paper's U_a.
    bias : ndarray, shape (hidden_dim,)
    weight : ndarray, shape (hidden_dim,)
        The paper's v_a.

    References
    ----------
    .. [1] Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", 2014,
       arXiv 1409.0473.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import BahdanauAttention
    >>> layer = BahdanauAttention(query_dim=8, key_dim=6, hidden_dim=10, rng=0)
    >>> layer
    BahdanauAttention(query_dim=8, key_dim=6, hidden_dim=10, dtype=float32)
      query_weight: (10, 8)
      key_weight: (10, 6)
      bias: (10,)
      weight: (10,)
    >>> states, source = (np.random.default_rng(0).standard_normal((2, n, d), dtype="f") for n, d in ((3, 8), (20, 6)))
    >>> projected = layer.project_keys(source)  # once per sentence
    >>> for step in range(3):
    ...     context = layer(states[:, step : step + 1], source, projected_keys=projected)
    >>> context.shape
    (2, 1, 6)
    """

    arguments = ("query_dim", "key_dim", "hidden_dim")

    query_weight: Array
    key_weight: Array
    bias: Array
    weight: Array

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        *,
        rng: int | np.random.Generator | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.query_dim = check_size("query_dim", query_dim)
        self.key_dim = check_size("key_dim", key_dim)
        self.hidden_dim = check_size("hidden_dim", hidden_dim)
        self.start(rng, dtype)

    def parameter_shapes(self) -> dict[str, Shape]:
        """Return the name and the shape of each parameter."""
        return {
            "query_weight": (self.hidden_dim, self.query_dim),
            "key_weight": (self.hidden_dim, self.key_dim),
            "bias": (self.hidden_dim,),
            "weight": (self.hidden_dim,),
        }

    def initial(self, name: str, shape: Shape, generator: np.random.Generator) -> Array:
        """Return what a parameter is before it has been trained."""
        # the bias is that of the query's projection
        limit = 1 / math.sqrt(self.query_dim if name == "bias" else shape[-1])
        return generator.uniform(-limit, limit, shape)

    def project_keys(self, key: ArrayLike) -> NDArray[Any]:
        """Return the keys' part in the scores, key @ key_weight.T, for any number of calls with the same keys.

        Parameters
        ----------
        key : array_like, shape (..., key_dim)

        Returns
        -------
        ndarray, shape (..., hidden_dim)
            In the common dtype of the keys and the parameters.

        Raises
        ------
        TypeError
            If the dtype has no meaning here.
        ValueError
            If the keys have other features than the layer.
        """
        (array,) = as_inputs(self.dtype, key=key)
        if array.ndim < 1 or array.shape[-1] != self.key_dim:
            raise ValueError(f"key: shape {array.shape}; expected (..., {self.key_dim})")
        return linear(array, self.key_weight)

    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike | None = None,
        attn_mask: ArrayLike | None = None,
        *,
        projected_keys: ArrayLike | None = None,
        return_weights: bool = False,
    ) -> Any:
        """Attend.

        Parameters
        ----------
        query : array_like, shape (B, Lq, query_dim)
            Decoder states, one in each step, or all at once. There may be any number of axes on the left, also none;
            they broadcast.
        key : array_like, shape (B, Lk, key_dim)
            Annotations of the source.
        value : array_like, shape (B, Lk, Dv), optional
            The key unless given.
        attn_mask : array_like, broadcasting to (B, Lq, Lk), optional
            Boolean, where True takes part, or floating, added to the scores.
        projected_keys : array_like, shape (B, Lk, hidden_dim), optional
            What `project_keys` returned for these keys, which are then not projected again.
        return_weights : bool
            Return the weights as well.

        Returns
        -------
        context : ndarray, shape (B, Lq, Dv)
            In the common dtype of the arguments and the parameters. A query that may look at no key gives 0.
        weights : ndarray, shape (B, Lq, Lk)
            If `return_weights`.

        Raises
        ------
        TypeError
            If an argument is of a kind or dtype that has no meaning here.
        ValueError
            If shapes do not go together.
        """
        return_weights = check_flag("return_weights", return_weights)
        value = key if value is None else value
        given = {"query": query, "key": key, "value": value}
        if projected_keys is not None:
            given["projected_keys"] = projected_keys
        q, k, v, *projected = as_inputs(self.dtype, **given)
        common_batch([q, k, v], (self.query_dim, self.key_dim, v.shape[-1] if v.ndim else 0))
        if projected:
            hidden = projected[0]
            expected = (*k.shape[:-1], self.hidden_dim)
            if hidden.shape != expected:
                raise ValueError(
                    f"projected_keys: shape {hidden.shape}; expected {expected}, what project_keys returns for key of "
                    f"shape {k.shape}"
                )
        else:
            hidden = linear(k, self.key_weight)
        weight = self.weight.astype(q.dtype, copy=False)
        state = linear(q, self.query_weight, self.bias)
        return additive_attention(state, hidden, v, weight, attn_mask, return_weights=return_weights)
