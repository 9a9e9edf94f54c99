"""The projections of multi-head attention, forward and backward: as few matrix products as there may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.call.problem import Array, Mask
from fastattn.layers.backward import Saved, bias_gradient, delivered, weight_gradient
from fastattn.layers.base import linear

if TYPE_CHECKING:
    from fastattn.layers.multihead import MultiHeadAttention

__all__ = ["Attended", "project", "project_backward"]


@dataclass(eq=False, repr=False)
class Attended(Saved):
    """What the attention between the projections was made of.

    Attributes
    ----------
    arrays : list of ndarray
        query, key and value in one dtype.
    heads : tuple of ndarray
        Their projections, shape (..., heads, length, D).
    mask : ndarray, pair of them, or None
    options : dict
        What attention was told besides.
    context : ndarray, shape (..., Lq, H, D)
    lse : ndarray, shape (..., H, Lq)
    """

    arrays: list[Array]
    heads: tuple[Array, Array, Array]
    mask: Mask
    options: dict[str, Any]
    context: Array
    lse: Array


def _ends(layer: MultiHeadAttention) -> tuple[int, int, int, int]:
    """Return where the features of the heads of query, key and value begin and end, one after the other."""
    embed, kv = layer.embed_dim, layer.num_kv_heads * layer.head_dim
    return 0, embed, embed + kv, embed + 2 * kv


def _products(layer: MultiHeadAttention, arrays: Sequence[Array]) -> list[tuple[list[int], Array]]:
    """Say which of query (0), key (1) and value (2) go through one product, and with which matrix.

    Those do that are one array, where there is one matrix for all.
    """
    ends, packed = _ends(layer), layer.in_proj_weight
    if packed is None:
        matrices = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        return [([i], matrix) for i, matrix in enumerate(matrices)]
    runs = [[0]]
    for i in (1, 2):
        if arrays[i] is arrays[i - 1]:
            runs[-1].append(i)
        else:
            runs.append([i])
    return [(run, packed[ends[run[0]] : ends[run[-1] + 1]]) for run in runs]


def project(layer: MultiHeadAttention, *arrays: Array) -> list[Array]:
    """Return the heads of query, key and value, shape (..., heads, length, D): views of few products."""
    ends, heads = _ends(layer), []
    for members, matrix in _products(layer, arrays):
        begin = ends[members[0]]
        bias = None if layer.in_proj_bias is None else layer.in_proj_bias[begin : begin + len(matrix)]
        y = linear(arrays[members[0]], matrix, bias)
        for part in np.split(y, [ends[i] - begin for i in members[1:]], axis=-1):
            split = part.reshape(*part.shape[:-1], part.shape[-1] // layer.head_dim, layer.head_dim)
            heads.append(split.swapaxes(-2, -3))
    return heads


def project_backward(
    layer: MultiHeadAttention, grad_heads: tuple[Array, ...], attended: Attended, gradients: dict[str, Array]
) -> tuple[Array | None, ...]:
    """Return the gradients of the inputs, given those of the heads, and put those of parameters in `gradients`."""
    ends, inputs = _ends(layer), attended.inputs
    # query, key and value are which input? One that was left out is the one before it
    owners = [max(i for i, x in enumerate(inputs[: own + 1]) if x is not None) for own in range(3)]
    grad_inputs: list[Array | None] = [None] * len(inputs)
    grad_matrices, grad_biases = [], []
    for members, matrix in _products(layer, attended.arrays):
        x, begin = attended.arrays[members[0]], ends[members[0]]
        # as the heads lie in what was projected: side by side
        grad = np.concatenate([grad_heads[i].swapaxes(-2, -3) for i in members], axis=-2)
        grad = grad.reshape(*x.shape[:-1], len(matrix))
        grad_matrices.append(weight_gradient(grad, x))
        if layer.bias:
            grad_biases.append(bias_gradient(grad))
        for owner, run in groupby(members, key=owners.__getitem__):
            of_owner = list(run)
            rows = slice(ends[of_owner[0]] - begin, ends[of_owner[-1] + 1] - begin)
            own, known = linear(grad[..., rows], matrix[rows].T), grad_inputs[owner]
            grad_inputs[owner] = own if known is None else known + own
    if layer.in_proj_weight is None:
        gradients.update(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), grad_matrices, strict=True))
    else:
        gradients["in_proj_weight"] = np.concatenate(grad_matrices)
    if layer.bias:
        gradients["in_proj_bias"] = np.concatenate(grad_biases)
    return delivered(grad_inputs, inputs)
