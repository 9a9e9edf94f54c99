"""Multi-head attention: projections by NumPy's matrix product, everything between them by `fastattn.attention`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import DTypeLike

from fastattn.api.attention import attention
from fastattn.api.backward import attention_backward
from fastattn.call.arrays import as_upstream
from fastattn.call.halves import cast, real_of
from fastattn.call.options import check_flag
from fastattn.call.problem import Array, Shape
from fastattn.call.score_options import FurtherOptions
from fastattn.call.seeds import Rng
from fastattn.call.types import Causal, MaskLike, NumberLike, Operand
from fastattn.call.upstream import Names
from fastattn.layers import extra_key
from fastattn.layers.backward import (
    Saved,
    bias_gradient,
    given_arguments,
    named_besides,
    recalled,
    weight_gradient,
)
from fastattn.layers.base import Layer, as_arrays, check_size, common_batch, linear
from fastattn.layers.masks import as_key_mask, combine, mask_of_scores
from fastattn.layers.projections import Attended, project, project_backward

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
    bias_kv : bool
        Whether there is one more key and value, both learned, behind those of the sequence, which every query looks at,
        whatever masks, positions and lengths say: PyTorch's ``add_bias_kv``.
    rng : int, numpy.random.Generator or RandomState, or None
        What the parameters are drawn from; the same number gives the same layer.
    dtype : dtype_like
        float16, bfloat16, float32 or float64. Half precision is computed with in float32, and results are rounded.

    Attributes
    ----------
    in_proj_weight : ndarray, shape (3E, E)
        The projections of query, key and value, one below the other; None where there are three arrays instead.
    q_proj_weight, k_proj_weight, v_proj_weight : ndarray, shapes (E, E), (Hk·D, kdim), (Hk·D, vdim)
        The projections where `kdim` or `vdim` is not E, or Hk is not H; else None.
    in_proj_bias : ndarray, shape (E + 2·Hk·D,)
        The biases of query, key and value; None without bias.
    bias_k, bias_v : ndarray, shape (1, 1, Hk·D)
        The key and the value that come on top, behind the projection; None without `bias_kv`.
    out_proj_weight, out_proj_bias : ndarray, shapes (E, E), (E,)
        The last projection: ``out_proj.weight`` and ``out_proj.bias`` of a state dict.

    Notes
    -----
    Parameters start as PyTorch's do: projections to heads uniform as Glorot and Bengio have it, the last one within
    ±1/√E, biases 0. `state_dict` and `load_state_dict` use PyTorch's names and shapes, so that a state dict of
    ``torch.nn.MultiheadAttention`` can be loaded as it is. It does not tell whether that layer has ``add_zero_attn``,
    which this one has not.

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

    arguments: tuple[str, ...] = ("embed_dim", "num_heads", "num_kv_heads", "kdim", "vdim", "bias")

    in_proj_weight: Any = None
    q_proj_weight: Any = None
    k_proj_weight: Any = None
    v_proj_weight: Any = None
    in_proj_bias: Any = None
    bias_k: Any = None
    bias_v: Any = None
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
        bias_kv: bool = False,
        rng: Rng | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.embed_dim = check_size("embed_dim", embed_dim)
        self.num_heads = check_size("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else check_size("num_kv_heads", num_kv_heads)
        self.kdim = self.embed_dim if kdim is None else check_size("kdim", kdim)
        self.vdim = self.embed_dim if vdim is None else check_size("vdim", vdim)
        self.bias = check_flag("bias", bias)
        self.bias_kv = check_flag("bias_kv", bias_kv)
        if self.bias_kv:  # of the others nothing is said
            self.arguments = (*self.arguments, "bias_kv")
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
        if self.bias_kv:
            shapes |= {"bias_k": (1, 1, kv), "bias_v": (1, 1, kv)}
        shapes["out_proj.weight"] = (embed, embed)
        if self.bias:
            shapes["out_proj.bias"] = (embed,)
        return shapes

    def initial(self, name: str, shape: Shape, generator: np.random.Generator) -> Array:
        """Return what a parameter is before it has been trained."""
        if name in ("bias_k", "bias_v"):
            return generator.normal(0.0, 1 / math.sqrt(shape[-1]), shape)
        if name.endswith("bias"):
            return np.zeros(shape)
        if name == "out_proj.weight":
            limit = 1 / math.sqrt(self.embed_dim)
        else:
            limit = math.sqrt(6 / sum(shape))
        return generator.uniform(-limit, limit, shape)

    # fmt: off
    @overload
    def __call__(
        self, query: Operand, key: Operand | None = ..., value: Operand | None = ..., attn_mask: MaskLike | None = ...,
        *, key_mask: NumberLike | None = ..., is_causal: Causal = ..., return_weights: Literal[False] = ...,
        return_saved: Literal[False] = ..., **options: Unpack[FurtherOptions],
    ) -> Array: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand | None = ..., value: Operand | None = ..., attn_mask: MaskLike | None = ...,
        *, key_mask: NumberLike | None = ..., is_causal: Causal = ..., return_weights: Literal[True],
        return_saved: Literal[False] = ..., **options: Unpack[FurtherOptions],
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand | None = ..., value: Operand | None = ..., attn_mask: MaskLike | None = ...,
        *, key_mask: NumberLike | None = ..., is_causal: Causal = ..., return_weights: Literal[False] = ...,
        return_saved: Literal[True], **options: Unpack[FurtherOptions],
    ) -> tuple[Array, Saved]: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand | None = ..., value: Operand | None = ..., attn_mask: MaskLike | None = ...,
        *, key_mask: NumberLike | None = ..., is_causal: Causal = ..., return_weights: Literal[True],
        return_saved: Literal[True], **options: Unpack[FurtherOptions],
    ) -> tuple[Array, Array, Saved]: ...
    @overload
    def __call__(
        self, query: Operand, key: Operand | None = ..., value: Operand | None = ..., attn_mask: MaskLike | None = ...,
        *, key_mask: NumberLike | None = ..., is_causal: Causal = ..., return_weights: bool = ...,
        return_saved: bool = ..., **options: Unpack[FurtherOptions],
    ) -> Array | tuple[Any, ...]: ...
    # fmt: on
    def __call__(
        self,
        query: Operand,
        key: Operand | None = None,
        value: Operand | None = None,
        attn_mask: MaskLike | None = None,
        *,
        key_mask: NumberLike | None = None,
        is_causal: Causal = False,
        return_weights: bool = False,
        return_saved: bool = False,
        **options: Unpack[FurtherOptions],
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
            Boolean, where True takes part, or floating, added to the scores; or one of each, as a tuple (bias, keep).
            A mask for each element of a batch, but not for each head, is ``mask[:, None]``.
        key_mask : array_like of bool, broadcasting to (..., Lk), optional
            True for a key that takes part, False for padding. Where that is all behind the last key, `key_lengths` says
            the same, and padding costs nothing.
        is_causal : bool or "bottom-right"
            As in `fastattn.attention`.
        window, query_offset, key_lengths, softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask : optional
            As in `fastattn.attention`.
        return_weights : bool
            Return the weights of each head as well. Only then does a matrix of Lq x Lk exist, or where `key_mask` is
            given with a boolean `attn_mask`, and combined.
        return_saved : bool
            Return what `backward` needs as well.

        Returns
        -------
        out : ndarray, shape (..., Lq, E)
            In the common dtype of the arguments and the parameters. A query that may look at no key has context 0 in
            all heads: its result is `out_proj_bias`.
        weights : ndarray, shape (..., H, Lq, Lk)
            If `return_weights`; with `bias_kv` (..., H, Lq, Lk + 1), that of the key on top last.
        saved : Saved
            If `return_saved`: see `backward`.

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
        return_weights = check_flag("return_weights", return_weights)
        return_saved = check_flag("return_saved", return_saved)
        given = given_arguments(query, key, value)
        attended = self._attend(given, attn_mask, key_mask, is_causal, options, return_weights)
        merged = attended.context.reshape(*attended.context.shape[:-2], self.embed_dim)
        out = linear(merged, self.out_proj_weight, self.out_proj_bias)
        return attended.results(out, return_weights, return_saved)

    # fmt: off
    @overload
    def backward(
        self, grad_out: Operand, inputs: tuple[Operand | None, ...] | Saved, attn_mask: MaskLike | None = ..., *,
        key_mask: NumberLike | None = ..., is_causal: Causal = ..., grads: None = ...,
        **options: Unpack[FurtherOptions],
    ) -> tuple[tuple[Array, ...], dict[str, Array]]: ...
    @overload
    def backward(
        self, grad_out: Operand, inputs: tuple[Operand | None, ...] | Saved, attn_mask: MaskLike | None = ..., *,
        key_mask: NumberLike | None = ..., is_causal: Causal = ..., grads: tuple[str, ...] | list[str],
        **options: Unpack[FurtherOptions],
    ) -> tuple[tuple[Array, ...], dict[str, Array], tuple[Array, ...]]: ...
    # fmt: on
    @np.errstate(all="ignore")
    def backward(
        self,
        grad_out: Operand,
        inputs: tuple[Operand | None, ...] | Saved,
        attn_mask: MaskLike | None = None,
        *,
        key_mask: NumberLike | None = None,
        is_causal: Causal = False,
        grads: Names = None,
        **options: Unpack[FurtherOptions],
    ) -> tuple[Any, ...]:
        """Return the gradients of a call's arguments, and of the parameters.

        Parameters
        ----------
        grad_out : array_like, shape (..., Lq, E)
            The gradient of a number, usually a loss, by the result of the call.
        inputs : tuple of array_like, or Saved
            What the layer was called with: ``(query,)``, ``(query, key)`` or ``(query, key, value)``. Or what the call
            returned with ``return_saved=True``: then nothing of it is computed again, and it says the options as well.
        attn_mask, key_mask, is_causal, **options
            As the call was given them.
        grads : sequence of str, optional
            Names of what else has gradients to return: of "attn_mask", "alibi_slopes" and "sinks" those that the call
            was given, and of the floating arrays that score_mod captures, as it calls them.

        Returns
        -------
        grad_inputs : tuple of ndarray
            As many as there are inputs, with their shapes and, if those are floating, their dtypes. An argument that
            was left out has no gradient of its own: that of ``(x,)`` is the sum of what x does as query, key and value.
        gradients : dict of str to ndarray
            Those of all parameters, by the names of `state_dict`.
        named : tuple of ndarray
            If `grads` is given: those that it names, in its order, each with the shape and the dtype of what it is of.

        Raises
        ------
        TypeError, ValueError
            As for a call, and for `grad_out` if it has not the shape of the result. The message names the argument.

        Examples
        --------
        >>> import numpy as np
        >>> from fastattn import MultiHeadAttention
        >>> layer = MultiHeadAttention(embed_dim=64, num_heads=4, rng=0)
        >>> x, wanted = np.random.default_rng(0).standard_normal((2, 2, 10, 64), dtype=np.float32)
        >>> out, saved = layer(x, is_causal=True, return_saved=True)
        >>> (grad_x,), gradients = layer.backward(out - wanted, saved)
        >>> grad_x.shape, {name: gradient.shape for name, gradient in gradients.items()}
        ((2, 10, 64),
         {'in_proj_weight': (192, 64), 'in_proj_bias': (192,), 'out_proj.weight': (64, 64), 'out_proj.bias': (64,)})

        The same without keeping anything:

        >>> (again,), _ = layer.backward(out - wanted, (x,), is_causal=True)
        >>> bool((again == grad_x).all())
        True
        """
        called = {"attn_mask": attn_mask, "key_mask": key_mask, "is_causal": is_causal}
        saved: Attended = recalled(self, inputs, 1, options, **called)
        context = saved.context.reshape(*saved.context.shape[:-2], self.embed_dim)
        grad = as_upstream("grad_out", grad_out, context.dtype, context.shape)
        gradients: dict[str, Array] = {}
        gradients["out_proj.weight"] = weight_gradient(grad, context)
        if self.bias:
            gradients["out_proj.bias"] = bias_gradient(grad)
        grad_context = linear(grad, self.out_proj_weight.T)
        mask: Any = saved.mask
        names = named_besides(grads, mask, saved.options)
        grad_result, result = grad_context.reshape(saved.context.shape).swapaxes(-2, -3), saved.context.swapaxes(-2, -3)
        call = (grad_result, *saved.heads, result, saved.lse, mask)
        found = attention_backward(*call, **saved.options, grads=("query", "key", "value", *names))
        grad_heads, named = found[:3], found[3:]
        if self.bias_kv:
            own = self._extra(saved.options)
            arguments = grad_result, saved.heads[0], *own[:2], result, saved.lse, *own[2:]
            grad_query, grad_key, grad_value = extra_key.attend_backward(*arguments)
            grad_heads = (grad_heads[0] + grad_query, *grad_heads[1:])
            gradients["bias_k"], gradients["bias_v"] = (
                grad.reshape(self.bias_k.shape) for grad in (grad_key, grad_value)
            )
        grad_inputs = project_backward(self, grad_heads, saved, gradients)
        return grad_inputs, self.as_gradients(gradients), *(() if grads is None else (named,))

    def _attend(
        self,
        given: tuple[Any, ...],
        attn_mask: MaskLike | None,
        key_mask: NumberLike | None,
        is_causal: Causal,
        options: FurtherOptions,
        return_weights: bool,
    ) -> Attended:
        """Project and attend."""
        query, key, value = (*given, None, None)[:3]
        if key is None:
            if value is not None:
                raise TypeError("value: given without key; expected key as well")
            key = query
        if value is None:
            value = key
        arrays, storage = as_arrays({"query": query, "key": key, "value": value}, self.dtype)
        batch = common_batch(arrays, (self.embed_dim, self.kdim, self.vdim))
        queries, keys = arrays[0].shape[-2], arrays[1].shape[-2]
        mask: Any = combine(
            as_key_mask(key_mask, (*batch, keys)),
            mask_of_scores(attn_mask, (*batch, self.num_heads, queries, keys)),
        )
        q, k, v = project(self, *arrays)
        # The context has the heads next to each other, in memory as well: the last projection takes it as it lies
        context = np.empty((*batch, queries, self.num_heads, self.head_dim), q.dtype)
        grouped = self.num_kv_heads != self.num_heads
        told: dict[str, Any] = {"is_causal": is_causal, **options}
        wanted: Any = {"return_lse": True, "return_weights": return_weights, "out": context.swapaxes(-2, -3)}
        told["enable_gqa"] = grouped
        _, lse, *found = attention(q, k, v, mask, **told, **wanted)
        weights = found[0] if found else None
        if self.bias_kv:
            own = self._extra(told)
            lse, weights = extra_key.attend(q, *own[:2], wanted["out"], lse, weights, *own[2:])
        return Attended(
            layer=self,
            inputs=given,
            arrays=arrays,
            heads=(q, k, v),
            mask=mask,
            options=told,
            context=context,
            lse=lse,
            weights=weights,
            storage=storage,
        )

    def _extra(self, told: dict[str, Any]) -> tuple[Array, Array, float | None, bool]:
        """Return the key and the value on top, shape (Hk, 1, D), and what attention to them is told."""
        both = (cast(each, real_of(each.dtype)) for each in (self.bias_k, self.bias_v))
        key, value = (each.reshape(self.num_kv_heads, 1, self.head_dim) for each in both)
        return key, value, told.get("softcap"), told["enable_gqa"]
