"""The parts of a Transformer in NumPy, each with its backward pass; attention is fastattn's.

A part is called with an array and keeps what its backward pass needs. `part.backward(grad)` takes the gradient of the
loss by what the call returned, writes those of its parameters to their `grad`, and returns that by the call's argument.
Shapes: B sequences of L positions, each a vector of E numbers; H heads of D = E / H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

import fastattn

Array: TypeAlias = NDArray[Any]


class Parameter:
    """An array that is trained, and the gradient of the loss by it."""

    def __init__(self, value: Array) -> None:
        self.value = value
        self.grad = np.zeros_like(value)


class Part:
    """What has parameters: as attributes, in dicts, or in other parts and lists of them."""

    def parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Yield the name and the parameter, of all in this part."""
        for name, attribute in vars(self).items():
            if isinstance(attribute, Parameter):
                yield prefix + name, attribute
            elif isinstance(attribute, Part):
                yield from attribute.parameters(f"{prefix}{name}.")
            elif isinstance(attribute, list):
                for index, part in enumerate(attribute):
                    yield from part.parameters(f"{prefix}{name}.{index}.")
            elif isinstance(attribute, dict):
                yield from ((f"{prefix}{name}.{key}", parameter) for key, parameter in attribute.items())


def rows(x: Array) -> Array:
    """Return an array (..., N) as a matrix of rows, (-1, N)."""
    return x.reshape(-1, x.shape[-1])


class Linear(Part):
    """x W + b, over the last axis."""

    def __init__(
        self, inputs: int, outputs: int, rng: np.random.Generator, dtype: DTypeLike, gain: float = 1.0
    ) -> None:
        self.weight = Parameter((rng.standard_normal((inputs, outputs)) * gain / np.sqrt(inputs)).astype(dtype))
        self.bias = Parameter(np.zeros(outputs, dtype))

    def __call__(self, x: Array) -> Array:
        self.x = rows(x)
        y = self.x @ self.weight.value
        y += self.bias.value
        return y.reshape(*x.shape[:-1], -1)

    def backward(self, grad: Array) -> Array:
        flat = rows(grad)
        np.matmul(self.x.T, flat, out=self.weight.grad)
        np.matmul(np.ones(len(flat), flat.dtype), flat, out=self.bias.grad)
        return (flat @ self.weight.value.T).reshape(*grad.shape[:-1], -1)


class LayerNorm(Part):
    """(x − mean) / deviation · gain + bias, over the last axis."""

    EPS = 1e-5

    def __init__(self, features: int, dtype: DTypeLike) -> None:
        self.gain = Parameter(np.ones(features, dtype))
        self.bias = Parameter(np.zeros(features, dtype))

    def __call__(self, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.einsum("...e,...e->...", centred, centred)[..., None] / x.shape[-1]
        self.inverse = 1 / np.sqrt(variance + self.EPS)
        self.normal = np.multiply(centred, self.inverse, out=centred)
        y = self.normal * self.gain.value
        y += self.bias.value
        return y

    def backward(self, grad: Array) -> Array:
        np.einsum("re,re->e", rows(grad), rows(self.normal), out=self.gain.grad)
        np.sum(rows(grad), axis=0, out=self.bias.grad)
        # what mean and deviation take away: the parts of the gradient along the constant vector and along `normal`
        result = grad * self.gain.value
        along = np.einsum("...e,...e->...", result, self.normal)[..., None] / grad.shape[-1]
        result -= result.mean(axis=-1, keepdims=True)
        result -= self.normal * along
        result *= self.inverse
        return result


class SquaredReLU(Part):
    """max(x, 0)² (So et al. 2021, "Primer"): as good as GELU here, and three cheap passes of NumPy."""

    def __call__(self, x: Array) -> Array:
        self.positive = np.maximum(x, 0)
        return self.positive * self.positive

    def backward(self, grad: Array) -> Array:
        result = grad * self.positive
        result *= 2
        return result


class CausalSelfAttention(Part):
    """Causal multi-head attention: `fastattn.attention` and `fastattn.attention_backward` between two products.

    Queries and keys are turned by their place (`fastattn.rotary`), so that a head can tell how far away a key is.
    `heads_off` are heads that give 0, to see what they are good for. With `keep_weights`, a call keeps its `weights`,
    (B, H, L, L).
    """

    def __init__(self, embed: int, heads: int, rng: np.random.Generator, dtype: DTypeLike, gain: float = 1.0) -> None:
        self.heads = heads
        self.project = Linear(embed, 3 * embed, rng, dtype)
        self.combine = Linear(embed, embed, rng, dtype, gain)
        self.heads_off: Sequence[int] = ()
        self.keep_weights = False
        self.weights: Array | None = None

    def __call__(self, x: Array) -> Array:
        batch, length, embed = x.shape
        projected = self.project(x).reshape(batch, length, 3, self.heads, embed // self.heads)
        heads = np.moveaxis(projected, (2, 3), (0, 2))  # query, key and value, each (B, H, L, D)
        self.query, self.key = fastattn.rotary(heads[:2], np.arange(length))
        self.value = heads[2]
        context = np.empty((batch, length, self.heads, embed // self.heads), x.dtype)
        self.out = context.swapaxes(1, 2)  # attention writes where the last product reads
        operands = self.query, self.key, self.value
        options: dict[str, Any] = {"is_causal": True, "return_lse": True, "out": self.out}
        _, self.lse, *rest = fastattn.attention(*operands, **options, return_weights=self.keep_weights)
        self.weights = rest[0] if rest else None
        context[:, :, self.heads_off] = 0
        return self.combine(context.reshape(x.shape))

    def backward(self, grad: Array) -> Array:
        batch, length, embed = grad.shape
        grad_out = self.combine.backward(grad).reshape(batch, length, self.heads, -1).swapaxes(1, 2)
        operands = self.query, self.key, self.value
        heads = fastattn.attention_backward(grad_out, *operands, self.out, self.lse, is_causal=True)
        projected = np.empty((batch, length, 3, self.heads, embed // self.heads), grad.dtype)
        to = np.moveaxis(projected, (2, 3), (0, 2))
        to[0], to[1] = (fastattn.rotary(each, -np.arange(length)) for each in heads[:2])  # turned back
        to[2] = heads[2]
        return self.project.backward(projected.reshape(batch, length, 3 * embed))


class Block(Part):
    """x + attention(norm(x)), then x + mlp(norm(x)): the Transformer's layer, with the norms first."""

    def __init__(
        self, attention: Any, embed: int, hidden: int, rng: np.random.Generator, dtype: DTypeLike, gain: float = 1.0
    ) -> None:
        self.norm1, self.attention = LayerNorm(embed, dtype), attention
        self.norm2, self.widen = LayerNorm(embed, dtype), Linear(embed, hidden, rng, dtype)
        self.activation = SquaredReLU()
        self.narrow = Linear(hidden, embed, rng, dtype, gain)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norm1(x))
        x += self.narrow(self.activation(self.widen(self.norm2(x))))
        return x

    def backward(self, grad: Array) -> Array:
        grad = grad + self.norm2.backward(self.widen.backward(self.activation.backward(self.narrow.backward(grad))))
        grad += self.norm1.backward(self.attention.backward(grad))
        return grad
