"""What the backward passes of all layers share: what they are given, products, and the shapes of what they return.

A layer's backward pass goes through its forward pass in reverse: the attention in it by `fastattn.attention_backward`
or `fastattn.additive_attention_backward`, a projection y = x Wᵀ + b by the products

    dx = dy W          dW = dyᵀ x          db = Σ dy over the rows
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.advice import said
from fastattn.call.halves import cast
from fastattn.call.problem import Array, Mask
from fastattn.call.upstream import Names, bias_of, captured_by_function, own_dtype, wanted_gradients

__all__ = [
    "Saved",
    "as_arguments",
    "bias_gradient",
    "delivered",
    "given_arguments",
    "named_besides",
    "recalled",
    "times",
    "weight_gradient",
]


@dataclass(eq=False, repr=False)
class Saved:
    """What a call with ``return_saved=True`` keeps for `backward`, which then computes none of it again.

    Arguments and parameters are not copied: between the two calls they must stay as they are.

    Attributes
    ----------
    layer : Layer
        Which was called.
    inputs : tuple of array_like or None
        What it was called with: query, key and value, as far as they were given.
    weights : ndarray or None
        If they were asked for; `backward` has no need of them.
    storage : numpy.dtype
        Of the results.
    """

    layer: Any
    inputs: tuple[Any, ...]
    weights: Array | None
    storage: np.dtype[Any]

    @property
    def has_value(self) -> bool:
        """Whether the value was given, and is not the key."""
        return len(self.inputs) > 2 and self.inputs[2] is not None

    def results(self, out: Array, return_weights: bool, return_saved: bool) -> Any:
        """Return what a call returns: its result, or a tuple of this and of what else was asked for."""
        found = (out, self.weights) if return_weights else (out,)
        results: tuple[Any, ...] = tuple(None if each is None else cast(each, self.storage) for each in found)
        if return_saved:
            results = (*results, replace(self, weights=None))
        return results if len(results) > 1 else results[0]


def given_arguments(*arguments: ArrayLike | None) -> tuple[Any, ...]:
    """Return the arguments up to the last one that was given."""
    given = list(arguments)
    while given and given[-1] is None:
        given.pop()
    return tuple(given)


def as_arguments(inputs: object, names: tuple[str, ...], least: int) -> tuple[Any, ...]:
    """Return the `inputs` of a backward pass.

    Parameters
    ----------
    inputs : tuple
        At least the first `least` of the arguments with these names; those that a call may be made without may be None.
    names : tuple of str
    least : int

    Raises
    ------
    TypeError
        If it is no tuple, or one that a call needs is None.
    ValueError
        If it has another length.
    """
    wanted = f"a tuple ({', '.join(names[:least])}" + "".join(f"[, {name}]" for name in names[least:]) + ")"
    if not isinstance(inputs, tuple):
        raise TypeError(f"inputs: {said(inputs)}; expected {wanted}")
    if not least <= len(inputs) <= len(names):
        raise ValueError(f"inputs: a tuple of length {len(inputs)}; expected {wanted}")
    for name, argument in zip(names[:least], inputs, strict=False):
        if argument is None:
            raise TypeError(f"inputs: None for {name}; expected {wanted}")
    return inputs


def recalled(layer: Any, inputs: object, least: int, options: Mapping[str, object], **called: object) -> Any:
    """Return what a call of the layer has saved, if that is given as `inputs` of its backward pass, or attend again.

    Parameters
    ----------
    layer : Layer
    inputs : Saved or tuple
        What the call has saved, or at least so many of the arguments query, key and value.
    least : int
    options : mapping of str to object
    **called
        What else it was called with: nothing of both where it has saved it.

    Raises
    ------
    TypeError
        If options are given besides.
    ValueError
        If it is another layer's.
    """
    if not isinstance(inputs, Saved):
        given = as_arguments(inputs, ("query", "key", "value"), least)
        return layer._attend(given, **called, options=options, return_weights=False)
    if inputs.layer is not layer:
        raise ValueError("inputs: what a call of another layer has saved; expected that of a call of this one")
    for name, option in {**called, **options}.items():
        if option is not None and option is not False:
            raise TypeError(f"{name}: given besides what a call has saved, which says it already; expected none")
    return inputs


def named_besides(grads: Names, mask: Mask, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of what a call was given besides its inputs, those whose gradients are wanted.

    Parameters
    ----------
    grads
        As the user gave them; None for none.
    mask : ndarray, pair of them, or None
    options : mapping of str

    Raises
    ------
    TypeError, ValueError
        As `fastattn.call.upstream.wanted_gradients`.
    """
    if grads is None:
        return ()
    sources = {"attn_mask": bias_of(mask), "alibi_slopes": options.get("alibi_slopes"), "sinks": options.get("sinks")}
    return wanted_gradients(grads, sources | captured_by_function(options.get("score_mod")), mask=mask)


def weight_gradient(grad: Array, x: Array) -> Array:
    """Return the gradient of the matrix, shape (m, n), of ``linear(x, matrix)``.

    Parameters
    ----------
    grad : ndarray, shape (..., m)
        The gradient of the result. A row of zeros takes no part, whatever `x` is there: nobody has looked at what was
        made of it.
    x : ndarray, shape (..., n)
    """
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    grads = np.ascontiguousarray(grad).reshape(-1, grad.shape[-1])
    with np.errstate(all="ignore"):
        product: Array = grads.T @ rows
        if not np.isfinite(product).all():  # 0 · NaN may be among the terms
            taken = grads.any(axis=-1)
            product = grads[taken].T @ rows[taken]
    return product


def bias_gradient(grad: Array) -> Array:
    """Return the gradient of a bias: the sum of the rows of `grad`, shape (..., m), as a product of BLAS."""
    rows = np.ascontiguousarray(grad).reshape(-1, grad.shape[-1])
    with np.errstate(all="ignore"):
        sums: Array = np.ones(len(rows), grad.dtype) @ rows
    return sums


def times(gradient: Array, derivative: Array) -> Array:
    """Return their product, where a gradient of 0 stays 0 whatever the derivative is."""
    return np.where(gradient == 0, 0, gradient * derivative)


def delivered(gradients: Iterable[Array | None], inputs: Iterable[ArrayLike | None]) -> tuple[Array | None, ...]:
    """Return gradients, each in the dtype of the input that it belongs to."""
    return tuple(
        None if own is None or given is None else own_dtype(own, given, own.dtype)
        for own, given in zip(gradients, inputs, strict=True)
    )
