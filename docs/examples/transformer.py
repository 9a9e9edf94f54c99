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
    """What has parameters: as attributes, or in other parts and lists of them."""

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


def rows(x: Array) -> Array:
    """Return an array (..., N) as a matrix of rows, (-1, N)."""
    return x.reshape(-1, x.shape[-1])


class Linear(Part):
    """x W + b, over the last axis."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, dtype: DTypeLike, gain: float = 1.0) -> None:
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
    `heads_off` are heads that give 0, to see what they are good for; with `keep_weights`, `weights` are kept, (B, H, L, L).
    """

    def __init__(
        self, embed: int, heads: int, rng: np.random.Generator, dtype: DTypeLike, gain: float = 1.0
    ) -> None:
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


def cross_entropy(logits: Array, targets: NDArray[np.integer[Any]]) -> tuple[float, Array]:
    """Return the mean of −ln p(target) over all rows of `logits`, (..., classes), and the gradient by `logits`."""
    flat, wanted = rows(logits), targets.ravel()
    probabilities = np.exp(flat - flat.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    each = np.arange(len(flat))
    loss = -float(np.log(probabilities[each, wanted]).mean(dtype=np.float64))
    probabilities[each, wanted] -= 1
    probabilities /= len(flat)
    return loss, probabilities.reshape(logits.shape)


class Adam:
    """Adam (Kingma and Ba 2014), with clipping, and decay of matrices apart from it (Loshchilov and Hutter 2017).

    `copies` is a model as often as there are threads that compute its gradients, each from a part of a batch: they get
    the same parameters, and a step takes the mean of their gradients. All parameters become views of one long vector,
    and the gradients of a copy views of another: a step is a few passes over these.
    """

    def __init__(
        self,
        copies: Sequence[Part],
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        decay: float = 0.1,
        clip: float = 1.0,
    ) -> None:
        self.betas, self.decay, self.clip, self.steps = betas, decay, clip, 0
        models = [[parameter for _, parameter in copy.parameters()] for copy in copies]
        for parameters in models:
            parameters.sort(key=lambda parameter: parameter.value.ndim < 2)  # matrices first
        self.decays = sum(parameter.value.size for parameter in models[0] if parameter.value.ndim > 1)
        self.value = np.concatenate([parameter.value.ravel() for parameter in models[0]])
        self.grads = [np.zeros_like(self.value) for _ in copies]
        self.mean, self.square, self.scratch = (np.zeros_like(self.value) for _ in range(3))
        for parameters, grad in zip(models, self.grads, strict=True):
            end = 0
            for each in parameters:
                start, end = end, end + each.value.size
                each.value, each.grad = (flat[start:end].reshape(each.value.shape) for flat in (self.value, grad))

    def step(self, rate: float) -> None:
        """Move all parameters against their gradients, by about `rate`."""
        self.steps += 1
        beta1, beta2 = self.betas
        grad, scratch = self.grads[0], self.scratch
        for other in self.grads[1:]:
            grad += other
        size = float(np.sqrt(grad @ grad)) / len(self.grads)
        grad *= min(1.0, self.clip / max(size, 1e-12)) / len(self.grads)
        self.mean *= beta1
        self.mean += np.multiply(grad, 1 - beta1, out=scratch)
        self.square *= beta2
        self.square += np.multiply(np.square(grad, out=grad), 1 - beta2, out=scratch)
        np.sqrt(self.square, out=scratch)
        scratch += 1e-8
        np.divide(self.mean, scratch, out=scratch)
        scratch *= rate * np.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)  # both means began at 0
        self.value[: self.decays] *= 1 - rate * self.decay
        self.value -= scratch


def warm_then_cosine(step: int, steps: int, rate: float, warm: int) -> float:
    """Return the learning rate of a step: up to `rate` in `warm` steps, then down to a tenth along a cosine."""
    if step < warm:
        return rate * (step + 1) / warm
    return float(rate * (0.55 + 0.45 * np.cos(np.pi * (step - warm) / max(1, steps - warm))))
