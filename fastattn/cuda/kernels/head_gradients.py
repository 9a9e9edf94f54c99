"""The gradients of what query heads have of their own: sums over rows, and over the slices that share a number.

A sink is one more key of each row, whose value is 0: with the numbers of a row (`fastattn.cuda.kernels.plan`), its part
is -exp(sink - SHIFT - REST) · DELTA. Slopes get theirs from `fastattn.cuda.kernels.portable_backward.slope_rows`. What
is summed has one order, in float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from fastattn.cuda.kernels.elements import real_of, storer
from fastattn.cuda.kernels.plan import DELTA, NUMBERS, QUERIES, REST, SHIFT, SLICES
from fastattn.cuda.kernels.scores import SINK

__all__ = ["Rows", "Sums", "sink_rows", "sum_rows"]


class Rows(NamedTuple):
    """What a kernel of the parts of rows is compiled for, as in `fastattn.cuda.kernels.portable_backward.Backward`."""

    storage: str
    extreme: bool


class Sums(NamedTuple):
    """What a kernel of their sums is compiled for: the storage of the gradient, and the threads of a block."""

    storage: str
    threads: int


def sink_rows(spec: Rows) -> Any:
    """The kernel of what sinks get from each query: a thread for each."""
    real = real_of(spec.storage, spec.extreme)
    zero, lowest = real(0.0), real(-math.inf)

    def kernel(numbers, own, sizes, rows):
        row, queries = cuda.grid(1), sizes[QUERIES]
        if row < sizes[SLICES] * queries:
            sink, shift = own[row // queries, SINK], numbers[NUMBERS * row + SHIFT]
            part = zero
            if sink != lowest and shift != lowest:
                exponent = (sink - shift) - numbers[NUMBERS * row + REST]
                if exponent > zero:  # no weight is above 1
                    exponent = zero
                part = -real(math.exp(exponent)) * numbers[NUMBERS * row + DELTA]
            rows[row] = part

    return kernel


def sum_rows(spec: Sums) -> Any:
    """The kernel of sums over the rows of all slices that share a number: a block of threads for each number."""
    threads, store = spec.threads, storer(spec.storage)

    def kernel(rows, members, queries, result):
        partial = cuda.shared.array(threads, np.float64)
        owner, thread = cuda.blockIdx.x, cuda.threadIdx.x
        total = np.float64(0.0)
        for member in range(members.shape[1]):
            at = members[owner, member] * queries
            for i in range(thread, queries, threads):
                total += np.float64(rows[at + i])
        partial[thread] = total
        cuda.syncthreads()
        if thread == 0:
            for other in range(1, threads):
                total += partial[other]
            result[owner] = store(total)

    return kernel
