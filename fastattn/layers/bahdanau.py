"""Bahdanau's attention: additive scores of projected queries and keys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastattn.call.arrays import as_upstream
from fastattn.call.halves import cast
from fastattn.call.options import check_flag
from fastattn.call.problem import Array, Shape
from fastattn.call.score_options import FurtherOptions
from fastattn.call.seeds import Rng
from fastattn.call.types import MaskLike, Operand
from fastattn.call.upstream import Names
from fastattn.layers.alignment import Attended, Interval, read_inputs
from fastattn.layers.backward import Saved, as_arguments, delivered, given_arguments, recalled, weight_gradient
from fastattn.layers.base import Layer, as_arrays, check_size, linear
from fastattn.layers.scores import Additive

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BahdanauAttention"]


class _Projected(Additive):
    """The score of keys that were projected before: an input of their own, in place of what the keys would give."""

    def __init__(self, *parameters: Array, hidden: Array) -> None:
        super().__init__(*parameters)
        self.hidden = hidden

    def project_key(self, key: Array) -> Array:
        """Return them."""
        return self.hidden

    def project_key_backward(self, grad: Array, key: Array) -> Array:
        """Keep their gradient, and return that of the keys, which have no part in the score."""
        self.grad_hidden = grad
        return np.zeros_like(key)


class BahdanauAttention(Layer):
    """Bahdanau's attention [1]_: the score of a query q and a key k is weight · tanh(W q + U k + bias).

    Parameters
    ----------
    query_dim, key_dim : int
        Features of a decoder's state and of a source's annotation.
    hidden_dim : int
        Features inside the tanh.
    rng : int, numpy.random.Generator or RandomState, or None
        What the parameters are drawn from, as in PyTorch's linear layers: uniformly within ±1/√n, n being the number of
        features that a parameter is summed over. The paper starts with `weight` and `bias` 0 and the matrices within
        some ±0.001, from where only training leads anywhere: all keys weigh the same.
    dtype : dtype_like
        float16, bfloat16, float32 or float64. Half precision is computed with in float32, and results are rounded.

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
        rng: Rng | None = None,
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

    def project_keys(self, key: Operand) -> NDArray[Any]:
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
        array, storage = self._as_keys(key)
        return cast(linear(array, self.key_weight), storage)

    def project_keys_backward(self, grad_projected: Operand, inputs: tuple[Operand]) -> tuple[Any, dict[str, Array]]:
        """Return the gradients of the keys, and of their matrix, through `project_keys`.

        Parameters
        ----------
        grad_projected : array_like, shape (..., hidden_dim)
            The gradient of what `project_keys` returned: where it went into several calls, the sum of what their
            `backward` returned for it.
        inputs : tuple of one array_like
            ``(key,)``.

        Returns
        -------
        grad_inputs : tuple of one ndarray
        gradients : dict of str to ndarray
            ``key_weight`` alone.

        Raises
        ------
        TypeError, ValueError
            As `project_keys`, and for a gradient that has not the shape of its result.
        """
        (key,) = as_arguments(inputs, ("key",), 1)
        array, _ = self._as_keys(key)
        grad = as_upstream("grad_projected", grad_projected, array.dtype, (*array.shape[:-1], self.hidden_dim))
        grad_weight = cast(weight_gradient(grad, array), self.dtype)
        return delivered([linear(grad, self.key_weight.T)], inputs), {"key_weight": grad_weight}

    def _as_keys(self, key: Operand) -> tuple[Array, np.dtype[Any]]:
        """Return an array of keys, in the dtype that is computed in, and the dtype of results."""
        (array,), storage = as_arrays({"key": key}, self.dtype)
        if array.ndim < 1 or array.shape[-1] != self.key_dim:
            raise ValueError(f"key: shape {array.shape}; expected (..., {self.key_dim})")
        return array, storage

    # fmt: off
    @overload
    def __call__(
        self, query: Operand, key: Operand, value: Operand | None = ..., attn_mask: MaskLike | None = ..., *,
        projected_keys: Operand | None = ..., return_weights: Literal[False] = ..., return_saved: Literal[False] = ...,
        **options: Unpack[FurtherOptions],
    ) -> NDArray[Any]: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand, value: Operand | None = ..., attn_mask: MaskLike | None = ..., *,
        projected_keys: Operand | None = ..., return_weights: Literal[True], return_saved: Literal[False] = ...,
        **options: Unpack[FurtherOptions],
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand, value: Operand | None = ..., attn_mask: MaskLike | None = ..., *,
        projected_keys: Operand | None = ..., return_weights: Literal[False] = ..., return_saved: Literal[True],
        **options: Unpack[FurtherOptions],
    ) -> tuple[NDArray[Any], Saved]: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand, value: Operand | None = ..., attn_mask: MaskLike | None = ..., *,
        projected_keys: Operand | None = ..., return_weights: Literal[True], return_saved: Literal[True],
        **options: Unpack[FurtherOptions],
    ) -> tuple[NDArray[Any], NDArray[Any], Saved]: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand, value: Operand | None = ..., attn_mask: MaskLike | None = ..., *,
        projected_keys: Operand | None = ..., return_weights: bool = ..., return_saved: bool = ...,
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
        projected_keys: Operand | None = None,
        return_weights: bool = False,
        return_saved: bool = False,
        **options: Unpack[FurtherOptions],
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
            Boolean, where True takes part, or floating, added to the scores; or one of each, as a tuple (bias, keep).
        projected_keys : array_like, shape (B, Lk, hidden_dim), optional
            What `project_keys` returned for these keys, which are then not projected again.
        window, query_offset, key_lengths, softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask : optional
            As in `fastattn.attention`. Lengths of sources are `key_lengths`, shape (B,).
        return_weights : bool
            Return the weights as well.
        return_saved : bool
            Return what `backward` needs as well.

        Returns
        -------
        context : ndarray, shape (B, Lq, Dv)
            In the common dtype of the arguments and the parameters. A query that may look at no key gives 0.
        weights : ndarray, shape (B, Lq, Lk)
            If `return_weights`.
        saved : Saved
            If `return_saved`: see `backward`.

        Raises
        ------
        TypeError
            If an argument is of a kind or dtype that has no meaning here.
        ValueError
            If shapes do not go together.
        """
        return_weights = check_flag("return_weights", return_weights)
        return_saved = check_flag("return_saved", return_saved)
        given = given_arguments(query, key, value)
        attended = self._attend(given, attn_mask, projected_keys, options, return_weights)
        return attended.results(attended.out, return_weights, return_saved)

    # fmt: off
    @overload
    def backward(
        self, grad_out: Operand, inputs: tuple[Operand | None, ...] | Saved, attn_mask: MaskLike | None = ..., *,
        projected_keys: Operand | None = ..., grads: None = ..., **options: Unpack[FurtherOptions],
    ) -> tuple[tuple[NDArray[Any], ...], dict[str, NDArray[Any]]]: ...
    @overload
    def backward(
        self, grad_out: Operand, inputs: tuple[Operand | None, ...] | Saved, attn_mask: MaskLike | None = ..., *,
        projected_keys: Operand | None = ..., grads: tuple[str, ...] | list[str], **options: Unpack[FurtherOptions],
    ) -> tuple[tuple[NDArray[Any], ...], dict[str, NDArray[Any]], tuple[NDArray[Any], ...]]: ...
    # fmt: on
    @np.errstate(all="ignore")
    def backward(
        self,
        grad_out: Operand,
        inputs: tuple[Operand | None, ...] | Saved,
        attn_mask: MaskLike | None = None,
        *,
        projected_keys: Operand | None = None,
        grads: Names = None,
        **options: Unpack[FurtherOptions],
    ) -> tuple[Any, ...]:
        """Return the gradients of a call's arguments, and of the parameters.

        Parameters
        ----------
        grad_out : array_like, shape (B, Lq, Dv)
            The gradient of a number, usually a loss, by the result of the call.
        inputs : tuple of array_like, or Saved
            What the layer was called with: ``(query, key)`` or ``(query, key, value)``. Or what the call returned with
            ``return_saved=True``: then nothing of it is computed again, and it says the options as well.
        attn_mask, projected_keys, **options
            As the call was given them.
        grads : sequence of str, optional
            Names of what else has gradients to return, as in `MultiHeadAttention.backward`.

        Returns
        -------
        grad_inputs : tuple of ndarray
            As many as there are inputs, with their shapes and, if those are floating, their dtypes. That of a key which
            is the value as well is the sum of both. With `projected_keys` there is one more, theirs: they count as an
            input of their own, so that neither the key nor `key_weight` has a part in the scores. See
            `project_keys_backward`.
        gradients : dict of str to ndarray
            Those of all parameters, by the names of `state_dict`.
        named : tuple of ndarray
            If `grads` is given: those that it names, in its order.

        Raises
        ------
        TypeError, ValueError
            As for a call, and for `grad_out` if it has not the shape of the result. The message names the argument.

        Examples
        --------
        >>> import numpy as np
        >>> from fastattn import BahdanauAttention
        >>> layer = BahdanauAttention(query_dim=8, key_dim=6, hidden_dim=10, rng=0)
        >>> rng = np.random.default_rng(0)
        >>> states, source = (rng.standard_normal((2, n, d), dtype="f") for n, d in ((3, 8), (20, 6)))
        >>> context = layer(states, source)
        >>> (grad_states, grad_source), gradients = layer.backward(context, (states, source))  # of Σ context² / 2
        >>> grad_states.shape, grad_source.shape, list(gradients)
        ((2, 3, 8), (2, 20, 6), ['query_weight', 'key_weight', 'bias', 'weight'])

        One step after the other, with the keys projected once:

        >>> projected = layer.project_keys(source)
        >>> grad_projected, grad_values = np.zeros_like(projected), np.zeros_like(source)
        >>> for step in reversed(range(3)):
        ...     inputs, grad_out = (states[:, step : step + 1], source), context[:, step : step + 1]
        ...     (_, own, through), _ = layer.backward(grad_out, inputs, projected_keys=projected)
        ...     grad_values += own
        ...     grad_projected += through
        >>> (grad_keys,), gradients = layer.project_keys_backward(grad_projected, (source,))
        >>> bool(np.allclose(grad_keys + grad_values, grad_source, atol=1e-6))
        True
        """
        saved: Attended = recalled(self, inputs, 2, options, attn_mask=attn_mask, projected_keys=projected_keys)
        score = self._score(None if saved.projected_keys is None else saved.projected)
        score.grads = grads
        found, _ = saved.differentiate(score, grad_out)
        given = saved.inputs
        if isinstance(score, _Projected):
            given, found = (*given, saved.projected_keys), [*found, score.grad_hidden]
        return delivered(found, given), self.as_gradients(score.gradients), *score.besides()

    def _score(self, hidden: Array | None) -> Additive:
        """Return the score, with the parameters as they are now, and the keys' part in it, if that is known."""
        parameters = (self.query_weight, self.key_weight, self.weight, self.bias)
        return Additive(*parameters) if hidden is None else _Projected(*parameters, hidden=hidden)

    def _attend(
        self,
        given: tuple[Any, ...],
        attn_mask: MaskLike | None,
        projected_keys: Operand | None,
        options: FurtherOptions,
        return_weights: bool,
    ) -> Attended:
        """Project and attend."""
        more: Any = {} if projected_keys is None else {"projected_keys": projected_keys}
        (q, k, v, *projected), storage, _, mask = read_inputs(self, given, attn_mask, **more)
        hidden = projected[0] if projected else None
        expected = (*k.shape[:-1], self.hidden_dim)
        if hidden is not None and hidden.shape != expected:
            raise ValueError(
                f"projected_keys: shape {hidden.shape}; expected {expected}, what project_keys returns for key of "
                f"shape {k.shape}"
            )
        alignment = Interval(0, k.shape[-2], options)
        score = self._score(hidden)
        return alignment.attended(self, given, [q, k, v], storage, mask, score, return_weights, projected_keys)
