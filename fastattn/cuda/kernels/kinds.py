"""Of which kind blocks of keys are for a function that says which keys are seen: the kernel that asks it of all."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from fastattn.cuda.kernels.functions import calling
from fastattn.functions.function import Function
from fastattn.functions.kinds import EMPTY, FULL, KIND_KEYS, KIND_QUERIES, PARTIAL

__all__ = ["Looking", "find_kinds"]


class Looking(NamedTuple):
    """What the kernel is compiled for: the function, the dtype that it computes in, and the threads of a block."""

    mask_mod: Function
    dtype: str
    threads: int


def find_kinds(spec: Looking) -> Any:
    """The kernel: a block of threads for each block of queries and keys, of so many heads of each row of the batch."""
    look, threads = calling(spec.mask_mod, spec.dtype), spec.threads

    def kernel(kinds, starts, first_row, heads, queries, keys, captured, place):
        key_blocks = (keys + KIND_KEYS - 1) // KIND_KEYS
        query_blocks = (queries + KIND_QUERIES - 1) // KIND_QUERIES
        column, row = cuda.blockIdx.x % key_blocks, cuda.blockIdx.x // key_blocks
        slice_, row = row // query_blocks, row % query_blocks
        batch, head = slice_ // heads, slice_ % heads
        some, every = False, True
        for e in range(cuda.threadIdx.x, KIND_QUERIES * KIND_KEYS, threads):
            query, key = row * KIND_QUERIES + e // KIND_KEYS, column * KIND_KEYS + e % KIND_KEYS
            if query < queries and key < keys:
                answer, valid = look((first_row + batch, head, starts[batch] + query, key), captured, place)
                # whether an index that is out of range matters depends on what else hides the key
                some = some or answer != 0 or valid == 0
                every = every and answer != 0 and valid != 0
        some, partly = cuda.syncthreads_or(np.int32(some)), cuda.syncthreads_or(np.int32(not every))
        if cuda.threadIdx.x == 0:
            kinds[cuda.blockIdx.x] = (PARTIAL if partly else FULL) if some else EMPTY

    return kernel
