"""Luong's attention: three scores, three alignments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn.call.arrays import as_upstream
from fastattn.call.halves import cast
from fastattn.call.options import check_flag
from fastattn.call.problem import FLOAT64, Array, Mask, Shape
from fastattn.call.score_options import FurtherOptions, check_window
from fastattn.call.seeds import Rng
from fastattn.call.shapes import MAX_RANK
from fastattn.call.types import MaskLike, NumberLike, Operand
from fastattn.call.upstream import Names, summed_to
from fastattn.layers.alignment import Alignment, Attended, find_interval, read_inputs
from fastattn.layers.backward import Saved, as_arguments, delivered, given_arguments, recalled, times, weight_gradient
from fastattn.layers.base import Layer, as_arrays, check_choice, check_size, linear
from fastattn.layers.local import Local, find_local, find_sight
from fastattn.layers.positions import as_positions
from fastattn.layers.scores import Concat, Dot, General

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
    rng : int, numpy.random.Generator or RandomState, or None
        What the parameters are drawn from, uniformly within ±0.1 as in the paper.
    dtype : dtype_like
        float16, bfloat16, float32 or float64. Half precision is computed with in float32, and results are rounded.

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
        rng: Rng | None = None,
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

    # fmt: off
    @overload
    def __call__(
        self, query: Operand, key: Operand, value: Operand | None = ..., attn_mask: MaskLike | None = ..., *,
        positions: NumberLike | None = ..., return_weights: Literal[False] = ..., return_saved: Literal[False] = ...,
        **options: Unpack[FurtherOptions],
    ) -> NDArray[Any]: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand, value: Operand | None = ..., attn_mask: MaskLike | None = ..., *,
        positions: NumberLike | None = ..., return_weights: Literal[True], return_saved: Literal[False] = ...,
        **options: Unpack[FurtherOptions],
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand, value: Operand | None = ..., attn_mask: MaskLike | None = ..., *,
        positions: NumberLike | None = ..., return_weights: Literal[False] = ..., return_saved: Literal[True],
        **options: Unpack[FurtherOptions],
    ) -> tuple[NDArray[Any], Saved]: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand, value: Operand | None = ..., attn_mask: MaskLike | None = ..., *,
        positions: NumberLike | None = ..., return_weights: Literal[True], return_saved: Literal[True],
        **options: Unpack[FurtherOptions],
    ) -> tuple[NDArray[Any], NDArray[Any], Saved]: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand, value: Operand | None = ..., attn_mask: MaskLike | None = ..., *,
        positions: NumberLike | None = ..., return_weights: bool = ..., return_saved: bool = ...,
        **options: Unpack[FurtherOptions],
    ) -> NDArray[Any] | tuple[Any, ...]: ...
    # fmt: on
    def __call__(
        self,
        query: Operand,
        key: Operand,
        value: Operand | None = None,
        attn_mask: MaskLike | None = None,
        *,
        positions: NumberLike | None = None,
        return_weights: bool = False,
        return_saved: bool = False,
        **options: Unpack[FurtherOptions],
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
            Boolean, where True takes part, or floating, added to the scores; or one of each, as a tuple (bias, keep).
        positions : array_like, shape (Lq,) or (B, Lq), optional
            The positions p for local-m, the positions of the targets themselves unless given.
        key_lengths : array_like of int, shape (B,), optional
            S, the length of each source, Lk unless given. What stands behind it takes no part.
        query_offset : int or array_like of int, shape (B,), optional
            The position of target 0, 0 unless given: in a decoder that goes step by step, the number of the step.
        window, softcap : optional
            As in `fastattn.attention`; a source has to be in this window as well as in that of the layer.
        return_weights : bool
            Return the weights as well.
        return_saved : bool
            Return what `backward` needs as well.

        Returns
        -------
        context : ndarray, shape (B, Lq, value_dim)
            In the common dtype of the arguments and the parameters. A query without a key gives 0: where the source is
            empty, everything is masked, or the window lies outside of the sentence.
        weights : ndarray, shape (B, Lq, Lk)
            If `return_weights`; 0 outside of the window. Those of local-p do not sum to 1.
        saved : Saved
            If `return_saved`: see `backward`.

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
        asks for, and where offsets of targets differ: concat then takes all sources up to the last one that is looked
        at. Predicted positions are computed in float64. A query with NaN has a position of NaN, and gives NaN.
        """
        return_weights = check_flag("return_weights", return_weights)
        return_saved = check_flag("return_saved", return_saved)
        given = given_arguments(query, key, value)
        attended = self._attend(given, attn_mask, positions, options, return_weights)
        return attended.results(attended.out, return_weights, return_saved)

    # fmt: off
    @overload
    def backward(
        self, grad_out: Operand, inputs: tuple[Operand | None, ...] | Saved, attn_mask: MaskLike | None = ..., *,
        positions: NumberLike | None = ..., grads: None = ..., **options: Unpack[FurtherOptions],
    ) -> tuple[tuple[NDArray[Any], ...], dict[str, NDArray[Any]]]: ...
    @overload
    def backward(
        self, grad_out: Operand, inputs: tuple[Operand | None, ...] | Saved, attn_mask: MaskLike | None = ..., *,
        positions: NumberLike | None = ..., grads: tuple[str, ...] | list[str], **options: Unpack[FurtherOptions],
    ) -> tuple[tuple[NDArray[Any], ...], dict[str, NDArray[Any]], tuple[NDArray[Any], ...]]: ...
    # fmt: on
    @np.errstate(all="ignore")
    def backward(
        self,
        grad_out: Operand,
        inputs: tuple[Operand | None, ...] | Saved,
        attn_mask: MaskLike | None = None,
        *,
        positions: NumberLike | None = None,
        grads: Names = None,
        **options: Unpack[FurtherOptions],
    ) -> tuple[Any, ...]:
        """Return the gradients of a call's arguments, and of the parameters.

        Parameters
        ----------
        grad_out : array_like, shape (B, Lq, value_dim)
            The gradient of a number, usually a loss, by the result of the call.
        inputs : tuple of array_like, or Saved
            What the layer was called with: ``(query, key)`` or ``(query, key, value)``. Or what the call returned with
            ``return_saved=True``: then nothing of it is computed again, and it says the options as well.
        attn_mask, positions, **options
            As the call was given them.
        grads : sequence of str, optional
            Names of what else has gradients to return, as in `MultiHeadAttention.backward`. None with positions, given
            or predicted.

        Returns
        -------
        grad_inputs : tuple of ndarray
            As many as there are inputs, with their shapes and, if those are floating, their dtypes. That of a key which
            is the value as well is the sum of both.
        gradients : dict of str to ndarray
            Those of all parameters, by the names of `state_dict`. That of `combine_weight` is 0: it has a part in
            `attentional` alone, see `attentional_backward`.
        named : tuple of ndarray
            If `grads` is given: those that it names, in its order.

        Raises
        ------
        TypeError, ValueError
            As for a call, and for `grad_out` if it has not the shape of the result. The message names the argument.

        Notes
        -----
        A predicted position has its gradient through the Gaussian. Which keys are in its window changes by jumps, which
        have no gradient: as in the paper, there is none through the window's ends. A query with NaN, whose position
        nobody knows, has gradients of NaN, and so have the parameters; the keys do not get to know of it.

        Examples
        --------
        >>> import numpy as np
        >>> from fastattn import LuongAttention
        >>> layer = LuongAttention(query_dim=8, key_dim=6, align="local-p", window=2, rng=0)
        >>> rng = np.random.default_rng(0)
        >>> target, source = (rng.standard_normal((2, n, d), dtype="f") for n, d in ((3, 8), (20, 6)))
        >>> context, saved = layer(target, source, key_lengths=[20, 9], return_saved=True)
        >>> (grad_target, grad_source), gradients = layer.backward(context, saved)  # of Σ context² / 2
        >>> grad_target.shape, grad_source.shape, {name: gradient.shape for name, gradient in gradients.items()}
        ((2, 3, 8), (2, 20, 6),
         {'score_weight': (8, 6), 'position_weight': (8, 8), 'position_vector': (8,), 'combine_weight': (8, 14)})
        """
        saved: Attended = recalled(self, inputs, 2, options, attn_mask=attn_mask, positions=positions)
        score, alignment = self._score(), saved.alignment
        score.grads = grads
        found, to_center = saved.differentiate(score, grad_out)
        gradients = score.gradients
        if to_center is not None and isinstance(alignment, Local):
            through, of_position = self._predict_backward(to_center, saved.query, alignment.sight.lengths)
            found[0] = (found[0] + through).astype(found[0].dtype, copy=False)
            gradients = {**gradients, **of_position}
        return delivered(found, saved.inputs), self.as_gradients(gradients), *score.besides()

    def attentional(self, context: Operand, query: Operand) -> NDArray[Any]:
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
        c, h, storage, _ = self._as_combined(context, query)
        weight = self.combine_weight
        with np.errstate(all="ignore"):
            state: Array = np.tanh(linear(c, weight[:, : self.value_dim]) + linear(h, weight[:, self.value_dim :]))
        return cast(state, storage)

    @np.errstate(all="ignore")
    def attentional_backward(
        self, grad_state: Operand, inputs: tuple[ArrayLike, ArrayLike], *, state: ArrayLike | None = None
    ) -> tuple[Any, dict[str, Array]]:
        """Return the gradients of the arguments of `attentional`, and of its matrix.

        Parameters
        ----------
        grad_state : array_like, shape (..., hidden_dim)
            The gradient of a number, usually a loss, by what `attentional` returned.
        inputs : tuple of array_like
            ``(context, query)``.
        state : array_like, shape (..., hidden_dim), optional
            What `attentional` returned, which is then not computed again.

        Returns
        -------
        grad_inputs : tuple of ndarray
            Those of context and query.
        gradients : dict of str to ndarray
            ``combine_weight`` alone.

        Raises
        ------
        TypeError, ValueError
            As `attentional`, and for a gradient or a state that has not the shape of its result.
        """
        context, query = as_arguments(inputs, ("context", "query"), 2)
        c, h, _, rows = self._as_combined(context, query)
        shape = (*rows, self.hidden_dim)
        grad = as_upstream("grad_state", grad_state, c.dtype, shape)
        state = self.attentional(c, h) if state is None else state
        known = as_upstream("state", state, c.dtype, shape)
        inside = times(grad, 1 - known * known)
        grads, weights, of_context = [], [], self.value_dim
        for array, weight in ((c, self.combine_weight[:, :of_context]), (h, self.combine_weight[:, of_context:])):
            own = summed_to(inside, (*array.shape[:-1], self.hidden_dim))
            grads.append(linear(own, weight.T))
            weights.append(weight_gradient(own, array))
        combined = cast(np.concatenate(weights, axis=1), self.dtype)
        return delivered(grads, inputs), {"combine_weight": combined}

    def _as_combined(self, context: Operand, query: Operand) -> tuple[Array, Array, np.dtype[Any], Shape]:
        """Return arrays of context and query, the dtype of results, and the axes that both have before the last."""
        (c, h), storage = as_arrays({"context": context, "query": query}, self.dtype)
        for name, array, features in (("context", c, self.value_dim), ("query", h, self.query_dim)):
            if not 1 <= array.ndim <= MAX_RANK or array.shape[-1] != features:
                raise ValueError(f"{name}: shape {array.shape}; expected (..., {features})")
        try:
            return c, h, storage, np.broadcast_shapes(c.shape[:-1], h.shape[:-1])
        except ValueError:
            raise ValueError(
                f"context, query: shapes {c.shape}, {h.shape}; expected the axes before the last to broadcast"
            ) from None

    def _score(self) -> Dot:
        """Return the score, with the parameters as they are now."""
        if self.score == "general":
            return General(self.score_weight)
        if self.score == "concat":
            return Concat(self.score_weight, self.score_vector, self.query_dim)
        return Dot()

    def _attend(
        self,
        given: tuple[Any, ...],
        attn_mask: MaskLike | None,
        positions: NumberLike | None,
        options: FurtherOptions,
        return_weights: bool,
    ) -> Attended:
        """Attend, and keep what `backward` wants."""
        arrays, storage, batch, mask = read_inputs(self, given, attn_mask, self.value_dim)
        alignment = self._alignment(arrays[0], arrays[1].shape[-2], batch, mask, positions, options)
        return alignment.attended(self, given, arrays, storage, mask, self._score(), return_weights)

    def _alignment(
        self,
        query: Array,
        keys: int,
        batch: Shape,
        mask: Mask,
        positions: NumberLike | None,
        options: FurtherOptions,
    ) -> Alignment:
        """Return which keys the queries look at."""
        queries = query.shape[-2]
        if positions is not None and self.align != "local-m":
            raise ValueError(f"positions: given, but align is {self.align!r}; expected None unless it is 'local-m'")
        if self.align == "global":
            return find_interval(options, batch, queries, keys)
        if self.align == "local-m" and positions is None:
            given = check_window(options.get("window"))
            left, right = (self.window if reach is None else min(reach, self.window) for reach in given)
            return find_interval({**options, "window": (left, right)}, batch, queries, keys)
        sight = find_sight(options, batch, queries, keys)
        if positions is not None:
            return find_local(as_positions(positions, (*batch, queries)), self.window, sight, mask, None)
        return find_local(self._predict(query, sight.lengths), self.window, sight, mask, self.window / 2)

    # -- predicted positions -------------------------------------------------------------------------------------------

    def _predict(self, query: Array, sources: Array) -> Array:
        """Return the predicted positions S · sigmoid(v_p · tanh(W_p h)), shape (*batch, Lq), in float64."""
        with np.errstate(all="ignore"):
            hidden = linear(query, cast(self.position_weight, FLOAT64))
            np.tanh(hidden, out=hidden)
            # no matrix product: it would wake BLAS's threads for next to nothing
            drive = np.einsum("...h,h->...", hidden, cast(self.position_vector, FLOAT64))
            center: Array = sources / (1 + np.exp(-drive))
        return center

    def _predict_backward(self, grad: Array, query: Array, sources: Array) -> tuple[Array, dict[str, Array]]:
        """Return the gradient of the queries, given that of their positions, and those of the parameters in between."""
        weight, vector = cast(self.position_weight, FLOAT64), cast(self.position_vector, FLOAT64)
        hidden = np.tanh(linear(query, weight))
        sigmoid = 1 / (1 + np.exp(-np.einsum("...h,h->...", hidden, vector)))
        drive = summed_to(grad * sources, sigmoid.shape)
        drive = times(drive, sigmoid * (1 - sigmoid))
        inside = times(drive[..., None], vector * (1 - hidden * hidden))
        of_vector, of_weight = weight_gradient(drive[..., None], hidden)[0], weight_gradient(inside, query)
        return linear(inside, weight.T), {"position_vector": of_vector, "position_weight": of_weight}
