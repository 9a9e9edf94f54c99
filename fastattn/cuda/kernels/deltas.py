"""What gradients need of each query besides its log-sum-exp: delta, of which `portable_backward` says what it is."""

from __future__ import annotations

from typing import Any

from numba import cuda

from fastattn.cuda.kernels.backward_tiles import PADDING, Backward
from fastattn.cuda.kernels.elements import loader
from fastattn.cuda.kernels.plan import DELTA, GRAD_LSE, GRAD_OUT, NUMBERS, OUT, QUERIES, SLICES, VALUE_DIM

__all__ = ["find_deltas"]


def find_deltas(spec: Backward) -> Any:
    """The kernel of delta: `side` threads a row, and so many rows a block."""
    storage, side, real = spec.storage, spec.tiling.side, spec.real
    load, zero, width = loader(storage, real), real(0.0), side + PADDING

    def kernel(grad_out, out, grad_lse, with_lse, offsets, steps, sizes, numbers):
        partial = cuda.shared.array((side, width), real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        queries, features = sizes[QUERIES], sizes[VALUE_DIM]
        row = cuda.blockIdx.x * side + ty
        number, i = row // queries, row % queries
        here = row < sizes[SLICES] * queries
        total = zero
        if here:
            at = offsets[GRAD_OUT, number] + i * steps[GRAD_OUT, 0]
            out_at = offsets[OUT, number] + i * steps[OUT, 0]
            for f in range(tx, features, side):
                total += load(grad_out[at + f * steps[GRAD_OUT, 1]]) * load(out[out_at + f * steps[OUT, 1]])
        partial[ty, tx] = total
        cuda.syncthreads()
        if here and tx == 0:
            for other in range(1, side):
                total += partial[ty, other]
            if with_lse:
                total -= grad_lse[offsets[GRAD_LSE, number] + i * steps[GRAD_LSE, 0]]
            numbers[NUMBERS * row + DELTA] = total

    return kernel
