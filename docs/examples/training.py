"""How the examples are trained: a loss, Adam, and a step in two threads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformer import Array, Part, rows

import fastattn


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


def warm_then_cosine(step: int, steps: int, rate: float, warm: int = 50) -> float:
    """Return the learning rate of a step, counted from 1: up to `rate` in `warm` steps, then down to a tenth of it."""
    if step < warm:
        return rate * step / warm
    return float(rate * (0.55 + 0.45 * np.cos(np.pi * (step - warm) / max(1, steps - warm))))


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
        models = [[parameter for _, parameter in each.parameters()] for each in copies]
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


class Trainer:
    """Trains a model: `model(inputs)` gives scores of classes, `model.backward(grad)` takes their gradient.

    Half of each batch goes through the model in one thread, half in another. Both cores then work on NumPy's many
    small passes as well, which no library shares out, and two pools of threads do not compete for them: BLAS is to have
    one thread (OPENBLAS_NUM_THREADS=1 before NumPy is imported). The result does not depend on who is faster.
    """

    def __init__(self, model: Any, threads: int = 2) -> None:
        self.copies = [model, *(copy.deepcopy(model) for _ in range(threads - 1))]
        self.adam = Adam(self.copies)
        self.pool = ThreadPoolExecutor(threads)

    def step(self, inputs: Array, targets: NDArray[np.integer[Any]], rate: float) -> float:
        """Take a step on a batch, whose parts are of one size, and return its loss."""
        parts = len(self.copies)
        losses = self.pool.map(self._part, self.copies, np.split(inputs, parts), np.split(targets, parts))
        loss = float(np.mean(list(losses)))
        self.adam.step(rate)
        return loss

    @staticmethod
    def _part(model: Any, inputs: Array, targets: NDArray[np.integer[Any]]) -> float:
        with fastattn.num_threads(1):
            loss, grad = cross_entropy(model(inputs), targets)
            model.backward(grad)
        return loss
