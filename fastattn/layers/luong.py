"""Luong's attention: three scores, three alignments."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn.additive import additive_attention
from fastattn.api import attention
from fastattn.layers.base import Layer, as_inputs, check_choice, check_shape_fits, check_size, common_batch, linear
from fastattn.layers.masks import as_mask, combine
from fastattn.layers.windows import attend_windows, find_windows
from fastattn.problem import FLOAT64, MAX_RANK, Array, Shape, _as_array, check_flag

__all__ = ["LuongAttention"]

SCORES = ("dot", "general", "concat")
ALIGNMENTS = ("global", "local-m", "local-p")
#: Parameters start uniform within ± this: section 4.1 of the paper.
INITIAL = 0.1


class LuongAttention(Layer):
    """Luong's attention [1]_, whole: scores dot, general and concat; alignments global, local-m and local-p.

    Parameters
    ----------
    query_dim, key_dim : int
        Features of a target state h_t and of a source state h_s.
    score : {"general", "dot", "concat"}
        h_t · h_s, for which the dimensions must agree; h_tᵀ W h_s; or v · tanh(W [h_t; h_s]).
    align : {"global", "local-m", "local-p"}
        A target looks at the whole source; at the sources j with \\|j - p\\| <= window, where p is its own position
        (monotonic); or at those around a predicted position p = S · sigmoid(v_p · tanh(W_p h_t)), with softmaxed
        weights times exp(-(j - p)² / (2σ²)), σ = window / 2 (predictive).
    window : int
        D in the paper.
    value_dim : int, optional
        Features of a value, `key_dim` unless given.
    hidden_dim : int, optional
        Features inside the tanh of the score, of the predicted position and of `attentional`; `query_dim` unless given.
    rng : int, numpy.random.Generator or None
        What the parameters are drawn from, uniformly within ±0.1 as in the paper.
    dtype : dtype_like
        float32 or float64.

    Attributes
    ----------
    score_weight : ndarray or None
        W: (query_dim, key_dim) for general, (hidden_dim, query_dim + key_dim) for concat, None for dot.
    score_vector : ndarray, shape (hidden_dim,), or None
        v, for concat.
    position_weight, position_vector : ndarray, shapes (hidden_dim, query_dim), (hidden_dim,), or None
        W_p and v_p, for local-p.
    combine_weight : ndarray, shape (hidden_dim, value_dim + query_dim)
        W_c, see `attentional`.

    References
    ----------
    .. [1] Luong, Pham and Manning, "Effective approaches to attention-based neural machine translation", 2015,
       arXiv 1508.04025.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import LuongAttention
    >>> layer = LuongAttention(query_dim=8, key_dim=6, align="local-p", window=2, rng=0)
    >>> layer
    LuongAttention(query_dim=8, key_dim=6, score='general', align='local-p', window=2, value_dim=6, hidden_dim=8,
                   dtype=float32)
      score_weight: (8, 6)
      position_weight: (8, 8)
      position_vector: (8,)
      combine_weight: (8, 14)
    >>> target, source = (np.random.default_rng(0).standard_normal((2, n, d), dtype="f") for n, d in ((3, 8), (20, 6)))
    >>> context, weights = layer(target, source, key_lengths=[20, 9], return_weights=True)
    >>> context.shape, weights.shape, int((weights > 0).sum(-1).max())
    ((2, 3, 6), (2, 3, 20), 4)
    >>> layer.attentional(context, target).shape
    (2, 3, 8)
    """

    arguments = ("query_dim", "key_dim", "score", "align", "window", "value_dim", "hidden_dim")

    score_weight: Any = None
    score_vector: Any = None
    position_weight: Any = None
    position_vector: Any = None
    combine_weight: Array

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        score: Literal["general", "dot", "concat"] = "general",
        align: Literal["global", "local-m", "local-p"] = "global",
        *,
        window: int = 10,
        value_dim: int | None = None,
        hidden_dim: int | None = None,
        rng: int | np.random.Generator | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.query_dim = check_size("query_dim", query_dim)
        self.key_dim = check_size("key_dim", key_dim)
        self.score = check_choice("score", score, SCORES)
        self.align = check_choice("align", align, ALIGNMENTS)
        self.window = check_size("window", window)
        self.value_dim = self.key_dim if value_dim is None else check_size("value_dim", value_dim)
        self.hidden_dim = self.query_dim if hidden_dim is None else check_size("hidden_dim", hidden_dim)
        if score == "dot" and self.query_dim != self.key_dim:
            raise ValueError(f"key_dim: {key_dim}; expected {query_dim}, as query_dim, where the score is 'dot'")
        self.start(rng, dtype)

    def parameter_shapes(self) -> dict[str, Shape]:
        """Return the name and the shape of each parameter that the variant has."""
        shapes: dict[str, Shape] = {}
        if self.score == "general":
            shapes["score_weight"] = (self.query_dim, self.key_dim)
        if self.score == "concat":
            shapes["score_weight"] = (self.hidden_dim, self.query_dim + self.key_dim)
            shapes["score_vector"] = (self.hidden_dim,)
        if self.align == "local-p":
            shapes["position_weight"] = (self.hidden_dim, self.query_dim)
            shapes["position_vector"] = (self.hidden_dim,)
        shapes["combine_weight"] = (self.hidden_dim, self.value_dim + self.query_dim)
        return shapes

    def initial(self, name: str, shape: Shape, generator: np.random.Generator) -> Array:
        """Return what a parameter is before it has been trained."""
        return generator.uniform(-INITIAL, INITIAL, shape)

    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike | None = None,
        attn_mask: ArrayLike | None = None,
        *,
        key_lengths: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        return_weights: bool = False,
    ) -> Any:
        """Attend.

        Parameters
        ----------
        query : array_like, shape (B, Lq, query_dim)
            Target states. There may be any number of axes on the left, also none; they broadcast.
        key : array_like, shape (B, Lk, key_dim)
            Source states.
        value : array_like, shape (B, Lk, value_dim), optional
            The key unless given.
        attn_mask : array_like, broadcasting to (B, Lq, Lk), optional
            Boolean, where True takes part, or floating, added to the scores.
        key_lengths : array_like of int, shape (B,), optional
            S, the length of each source, Lk unless given. What stands behind it takes no part.
        positions : array_like, shape (Lq,) or (B, Lq), optional
            The positions p for local-m, 0 to Lq - 1 unless given.
        return_weights : bool
            Return the weights as well.

        Returns
        -------
        context : ndarray, shape (B, Lq, value_dim)
            In the common dtype of the arguments and the parameters. A query without a key gives 0: where the source is
            empty, everything is masked, or the window lies outside of the sentence.
        weights : ndarray, shape (B, Lq, Lk)
            If `return_weights`; 0 outside of the window. Those of local-p do not sum to 1.

        Raises
        ------
        TypeError
            If an argument is of a kind or dtype that has no meaning here.
        ValueError
            If shapes do not go together, a length is not in [0, Lk], or positions are not finite, or given where they
            have no meaning.

        Notes
        -----
        With a local alignment, time and memory grow with the window, and not with Lk, except for what `return_weights`
        asks for. Predicted positions are computed in float64. A query with NaN has a position of NaN, and gives NaN.
        """
        value = key if value is None else value
        arrays = as_inputs(self.dtype, query=query, key=key, value=value)
        batch = common_batch(arrays, (self.query_dim, self.key_dim, self.value_dim))
        q, k, v = arrays
        queries, keys = q.shape[-2], k.shape[-2]
        mask = as_mask(attn_mask, (*batch, queries, keys))
        lengths = None if key_lengths is None else _as_lengths(key_lengths, batch, keys)
        return_weights = check_flag("return_weights", return_weights)
        if positions is not None and self.align != "local-m":
            raise ValueError(f"positions: given, but align is {self.align!r}; expected None unless it is 'local-m'")

        if self.align == "global":
            key_mask = None if lengths is None else np.arange(keys) < lengths[..., None, None]
            both = combine(key_mask, mask)
            out, _, weights = self._attend(self._project_query(q), self._project_key(k), v, both, return_weights)
        else:
            sources = np.broadcast_to(keys if lengths is None else lengths, batch)[..., None]
            if self.align == "local-p":
                center = self._predict(q, sources)
            else:
                center = _as_positions(positions, (*batch, queries))
            center = np.broadcast_to(center, (*batch, queries))
            out, weights = self._local(q, k, v, mask, sources, center, return_weights)
        return (out, weights) if return_weights else out

    def attentional(self, context: ArrayLike, query: ArrayLike) -> NDArray[Any]:
        """Return the attentional state tanh(W_c [c; h]), which the paper predicts the next word from.

        Parameters
        ----------
        context : array_like, shape (..., value_dim)
            What a call returned.
        query : array_like, shape (..., query_dim)
            The target states that it was called with.

        Returns
        -------
        ndarray, shape (..., hidden_dim)

        Raises
        ------
        TypeError
            If an argument is of a dtype that has no meaning here.
        ValueError
            If the features are not those of the layer, or the other axes do not broadcast.
        """
        c, h = as_inputs(self.dtype, context=context, query=query)
        for name, array, features in (("context", c, self.value_dim), ("query", h, self.query_dim)):
            if not 1 <= array.ndim <= MAX_RANK or array.shape[-1] != features:
                raise ValueError(f"{name}: shape {array.shape}; expected (..., {features})")
        try:
            np.broadcast_shapes(c.shape[:-1], h.shape[:-1])
        except ValueError:
            raise ValueError(
                f"context, query: shapes {c.shape}, {h.shape}; expected the axes before the last to broadcast"
            ) from None
        weight = self.combine_weight
        with np.errstate(all="ignore"):
            state: Array = np.tanh(linear(c, weight[:, : self.value_dim]) + linear(h, weight[:, self.value_dim :]))
        return state

    # -- scores --------------------------------------------------------------------------------------------------------

    def _project_query(self, query: Array) -> Array:
        """Return what stands for the queries in a score: as much of it as depends on them alone."""
        if self.score == "general":
            return linear(query, self.score_weight.T)
        return linear(query, self.score_weight[:, : self.query_dim]) if self.score == "concat" else query

    def _project_key(self, key: Array) -> Array:
        """Return what stands for the keys in a score."""
        return linear(key, self.score_weight[:, self.query_dim :]) if self.score == "concat" else key

    def _attend(
        self, query: Array, key: Array, value: Array, mask: Array | None, return_weights: bool
    ) -> tuple[Array, Array, Array | None]:
        """Return result, log-sum-exp and weights of projected queries and keys."""
        options: dict[str, Any] = {"return_lse": True, "return_weights": return_weights}
        if self.score == "concat":
            vector = self.score_vector.astype(query.dtype, copy=False)
            results = additive_attention(query, key, value, vector, mask, **options)
        else:
            results = attention(query, key, value, mask, scale=1.0, **options)
        return results if return_weights else (*results, None)

    # -- local alignment -----------------------------------------------------------------------------------------------

    def _predict(self, query: Array, sources: Array) -> Array:
        """Return the predicted positions S · sigmoid(v_p · tanh(W_p h)), shape (*batch, Lq), in float64."""
        with np.errstate(all="ignore"):
            hidden = linear(query, self.position_weight.astype(FLOAT64))
            np.tanh(hidden, out=hidden)
            # no matrix product: it would wake BLAS's threads for next to nothing
            drive = np.einsum("...h,h->...", hidden, self.position_vector.astype(FLOAT64))
            center: Array = sources / (1 + np.exp(-drive))
        return center

    def _local(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None,
        sources: Array,
        center: Array,
        return_weights: bool,
    ) -> tuple[Array, Array | None]:
        """Attend to the windows around `center`, shape (*batch, Lq), of sources of lengths `sources`, (*batch, 1)."""
        *batch, queries = center.shape
        keys = key.shape[-2]
        scored, key_rows = (np.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (self._project_query(query), key))
        out, weights = attend_windows(
            self._attend,
            self._project_key,
            scored,
            key_rows,
            key_rows if value is key else np.broadcast_to(value, (*batch, *value.shape[-2:])),
            find_windows(center, self.window, sources),
            None if mask is None else np.broadcast_to(mask, (*batch, queries, keys)),
            self.window / 2 if self.align == "local-p" else None,
            return_weights,
        )
        # nobody knows where these look, if there is a key that they may look at
        lost = np.isnan(center) & (sources > 0)
        if mask is not None and lost.any():
            own = np.broadcast_to(mask, (*batch, queries, keys))[lost]
            within = np.arange(keys) < np.broadcast_to(sources, center.shape)[lost][:, None]
            lost[lost] = (combine(within, own) if own.dtype.kind == "b" else within & (own != -np.inf)).any(axis=-1)
        out[lost] = np.nan
        if weights is not None:
            weights[lost[..., None] & (np.arange(keys) < sources[..., None])] = np.nan
        return out, weights


def _as_lengths(given: ArrayLike, batch: Shape, keys: int) -> Array:
    """Return the lengths of the sources as int64."""
    lengths = _as_array("key_lengths", given)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"key_lengths: dtype {lengths.dtype}; expected integers")
    check_shape_fits("key_lengths", lengths.shape, batch)
    if lengths.size and not (lengths.min() >= 0 and lengths.max() <= keys):
        raise ValueError(f"key_lengths: {lengths.min()} to {lengths.max()}; expected 0 to {keys}, the length of key")
    return lengths.astype(np.int64)


def _as_positions(given: ArrayLike | None, rows: Shape) -> Array:
    """Return the positions of the queries as float64."""
    if given is None:
        return np.arange(rows[-1], dtype=np.float64)
    (positions,) = as_inputs(FLOAT64, positions=given)
    check_shape_fits("positions", positions.shape, rows)
    if not np.isfinite(positions).all():
        raise ValueError("positions: some are NaN or infinite; expected finite numbers")
    return positions
