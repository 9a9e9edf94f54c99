"""Multi-head attention: projections by NumPy's matrix product, everything between them by `fastattn.attention`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastattn.api import attention
from fastattn.layers.base import Layer, as_inputs, check_size, common_batch, linear
from fastattn.layers.masks import as_key_mask, as_mask, combine, per_head
from fastattn.problem import Array, Shape, check_flag

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(Layer):
    """Multi-head attention [1]_: self, cross and grouped [2]_, with the parameters of ``torch.nn.MultiheadAttention``.

    Parameters
    ----------
    embed_dim : int
        E, the features of a query and of the result; a multiple of `num_heads`.
    num_heads : int
        H, the heads of the queries, each of D = E / H features.
    num_kv_heads : int, optional
        Hk, the heads of keys and values, H unless given. H is a multiple of it; query head h reads head h // (H / Hk).
    kdim, vdim : int, optional
        Features of a key and of a value before they are projected, E unless given.
    bias : bool
        Whether the projections add a bias.
    rng : int, numpy.random.Generator or None
        What the parameters are drawn from; the same number gives the same layer.
    dtype : dtype_like
        float32 or float64.

    Attributes
    ----------
    in_proj_weight : ndarray, shape (3E, E)
        The projections of query, key and value, one below the other; None where there are three arrays instead.
    q_proj_weight, k_proj_weight, v_proj_weight : ndarray, shapes (E, E), (Hk·D, kdim), (Hk·D, vdim)
        The projections where `kdim` or `vdim` is not E, or Hk is not H; else None.
    in_proj_bias : ndarray, shape (E + 2·Hk·D,)
        The biases of query, key and value; None without bias.
    out_proj_weight, out_proj_bias : ndarray, shapes (E, E), (E,)
        The last projection: ``out_proj.weight`` and ``out_proj.bias`` of a state dict.

    Notes
    -----
    Parameters start as PyTorch's do: projections to heads uniform as Glorot and Bengio have it, the last one within
    ±1/√E, biases 0. `state_dict` and `load_state_dict` use PyTorch's names and shapes, so that a state dict of
    ``torch.nn.MultiheadAttention`` can be loaded as it is.

    Masks are those of `fastattn.attention`: True takes part. In PyTorch's layer True is left out.

    References
    ----------
    .. [1] Vaswani et al., "Attention is all you need", 2017, arXiv 1706.03762.
    .. [2] Ainslie et al., "GQA: training generalized multi-query transformer models from multi-head checkpoints", 2023,
       arXiv 2305.13245.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import MultiHeadAttention
    >>> layer = MultiHeadAttention(embed_dim=64, num_heads=4, rng=0)
    >>> layer
    MultiHeadAttention(embed_dim=64, num_heads=4, num_kv_heads=4, kdim=64, vdim=64, bias=True, dtype=float32)
      in_proj_weight: (192, 64)
      in_proj_bias: (192,)
      out_proj.weight: (64, 64)
      out_proj.bias: (64,)
    >>> x = np.random.default_rng(0).standard_normal((2, 10, 64), dtype=np.float32)
    >>> layer(x, is_causal=True).shape
    (2, 10, 64)
    >>> out, weights = layer(x, key_mask=np.arange(10) < [[7], [10]], return_weights=True)
    >>> weights.shape, bool(weights[0, ..., 7:].any())
    ((2, 4, 10, 10), False)
    """

    arguments = ("embed_dim", "num_heads", "num_kv_heads", "kdim", "vdim", "bias")

    in_proj_weight: Any = None
    q_proj_weight: Any = None
    k_proj_weight: Any = None
    v_proj_weight: Any = None
    in_proj_bias: Any = None
    out_proj_weight: Array
    out_proj_bias: Any = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        rng: int | np.random.Generator | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.embed_dim = check_size("embed_dim", embed_dim)
        self.num_heads = check_size("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else check_size("num_kv_heads", num_kv_heads)
        self.kdim = self.embed_dim if kdim is None else check_size("kdim", kdim)
        self.vdim = self.embed_dim if vdim is None else check_size("vdim", vdim)
        self.bias = check_flag("bias", bias)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim: {embed_dim}; expected a multiple of num_heads, which is {num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: {num_kv_heads}; expected a divisor of num_heads, which is {num_heads}")
        self.head_dim = self.embed_dim // self.num_heads
        self.start(rng, dtype)

    def parameter_shapes(self) -> dict[str, Shape]:
        """Return the name and the shape of each parameter, in PyTorch's order."""
        embed, kv = self.embed_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, Shape]
        if embed == kv == self.kdim == self.vdim:
            shapes = {"in_proj_weight": (3 * embed, embed)}
        else:
            shapes = {
                "q_proj_weight": (embed, embed),
                "k_proj_weight": (kv, self.kdim),
                "v_proj_weight": (kv, self.vdim),
            }
        if self.bias:
            shapes["in_proj_bias"] = (embed + 2 * kv,)
        shapes["out_proj.weight"] = (embed, embed)
        if self.bias:
            shapes["out_proj.bias"] = (embed,)
        return shapes

    def initial(self, name: str, shape: Shape, generator: np.random.Generator) -> Array:
        """Return what a parameter is before it has been trained."""
        if name.endswith("bias"):
            return np.zeros(shape)
        if name == "out_proj.weight":
            limit = 1 / math.sqrt(self.embed_dim)
        else:
            limit = math.sqrt(6 / sum(shape))
        return generator.uniform(-limit, limit, shape)

    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        attn_mask: ArrayLike | None = None,
        *,
        key_mask: ArrayLike | None = None,
        is_causal: bool | str = False,
        return_weights: bool = False,
    ) -> Any:
        """Attend.

        Parameters
        ----------
        query : array_like, shape (..., Lq, E)
            The axes on the left may be missing; those of query, key and value broadcast.
        key : array_like, shape (..., Lk, kdim), optional
            The query unless given: self-attention.
        value : array_like, shape (..., Lk, vdim), optional
            The key unless given.
        attn_mask : array_like, broadcasting to (..., H, Lq, Lk), optional
            Boolean, where True takes part, or floating, added to the scores. A mask for each element of a batch, but
            not for each head, is ``mask[:, None]``.
        key_mask : array_like of bool, broadcasting to (..., Lk), optional
            True for a key that takes part, False for padding.
        is_causal : bool or "bottom-right"
            As in `fastattn.attention`.
        return_weights : bool
            Return the weights of each head as well. Only then does a matrix of Lq x Lk exist, or where `attn_mask` and
            `key_mask` are both given, and combined.

        Returns
        -------
        out : ndarray, shape (..., Lq, E)
            In the common dtype of the arguments and the parameters. A query that may look at no key has context 0 in
            all heads: its result is `out_proj_bias`.
        weights : ndarray, shape (..., H, Lq, Lk)
            If `return_weights`.

        Raises
        ------
        TypeError
            If an argument is of a kind or dtype that has no meaning here.
        ValueError
            If shapes do not go together. The message names the argument.

        Notes
        -----
        The projections are matrix products of NumPy's BLAS, one for all elements of a batch. What the last bits of a
        product are depends on its shape there; so a batch and one element of it may differ in these.
        """
        if key is None:
            if value is not None:
                raise TypeError("value: given without key; expected key as well")
            key = query
        if value is None:
            value = key
        arrays = as_inputs(self.dtype, query=query, key=key, value=value)
        batch = common_batch(arrays, (self.embed_dim, self.kdim, self.vdim))
        queries, keys = arrays[0].shape[-2], arrays[1].shape[-2]
        mask = combine(
            per_head(as_key_mask(key_mask, (*batch, keys))),
            as_mask(attn_mask, (*batch, self.num_heads, queries, keys)),
        )
        return_weights = check_flag("return_weights", return_weights)

        q, k, v = self._project(*arrays)
        # The context has the heads next to each other, in memory as well: the last projection takes it as it lies
        context = np.empty((*batch, queries, self.num_heads, self.head_dim), q.dtype)
        results = attention(
            q,
            k,
            v,
            mask,
            is_causal=is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
            return_weights=return_weights,
            out=context.swapaxes(-2, -3),
        )
        out = linear(context.reshape(*batch, queries, self.embed_dim), self.out_proj_weight, self.out_proj_bias)
        return (out, results[1]) if return_weights else out

    def _project(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        """Return the heads of query, key and value, shape (..., heads, length, D): views of few products."""
        embed, kv = self.embed_dim, self.num_kv_heads * self.head_dim
        ends = (0, embed, embed + kv, embed + 2 * kv)

        def project(x: Array, first: int, last: int) -> list[Array]:
            """Return the heads of some of query (0), key (1) and value (2), which are projections of one array."""
            rows = slice(ends[first], ends[last + 1])
            if self.in_proj_weight is not None:
                weight = self.in_proj_weight[rows]
            else:
                weight = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[first]
            y = linear(x, weight, None if self.in_proj_bias is None else self.in_proj_bias[rows])
            parts = np.split(y, [end - ends[first] for end in ends[first + 1 : last + 1]], axis=-1)
            return [
                part.reshape(*part.shape[:-1], part.shape[-1] // self.head_dim, self.head_dim).swapaxes(-2, -3)
                for part in parts
            ]

        if self.in_proj_weight is None or (query is not key and key is not value):
            q, k, v = (project(x, i, i)[0] for i, x in enumerate((query, key, value)))
        elif query is key is value:
            q, k, v = project(query, 0, 2)
        elif key is value:
            (q,), (k, v) = project(query, 0, 0), project(key, 1, 2)
        else:
            (q, k), (v,) = project(query, 0, 1), project(value, 2, 2)
        return q, k, v
