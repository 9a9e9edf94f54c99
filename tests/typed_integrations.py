"""Calls of other libraries' arrays, and the types of what they return: for type checkers (test_types.py)."""

from __future__ import annotations

import sys
from typing import Any

import dask.array
import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from fastattn import attention as of_arrays
from fastattn.integrations import dask as chunked
from fastattn.integrations import mpi
from fastattn.integrations.torch import attention_varlen, attention_with_lse, flex_attention
from fastattn.integrations.torch import scaled_dot_product_attention as attention

if sys.version_info >= (3, 11):
    from typing import assert_type
else:
    from typing_extensions import assert_type

flag = bool(np.ones(1)[0])


def of_torch(x: torch.Tensor, ends: torch.Tensor) -> None:
    assert_type(attention(x, x, x, is_causal="bottom-right"), torch.Tensor)
    assert_type(attention_with_lse(x, x, x), tuple[torch.Tensor, torch.Tensor])
    assert_type(flex_attention(x, x, x), torch.Tensor)
    assert_type(flex_attention(x, x, x, return_lse=True), tuple[torch.Tensor, torch.Tensor])
    out: torch.Tensor = of_arrays(x, x, x)  # which may be on a GPU, and so may this
    lse: NDArray[np.float32] = of_arrays(x, x, x, return_lse=True)[1]
    assert_type((out, lse), tuple[torch.Tensor, NDArray[np.float32]])
    assert_type(attention_varlen(x, x, x, ends)[0], torch.Tensor)
    attention(x, x, x, is_causal="bottom-left")  # wrong
    attention(x, x, x, window=3)  # wrong


def of_dask(x: dask.array.Array) -> None:
    assert_type(chunked.attention(x, x, x), dask.array.Array)
    assert_type(chunked.attention(x, x, x, return_lse=True), tuple[dask.array.Array, dask.array.Array])
    chunked.attention(x, x, x, is_causal="bottom-left")  # wrong


def of_mpi(comm: MPI.Intracomm, x: NDArray[np.float32]) -> None:
    assert_type(mpi.ring_attention(comm, x, x, x), NDArray[np.float32])
    assert_type(mpi.ring_attention(comm, x, x, x, return_lse=True), tuple[NDArray[np.float32], NDArray[Any]])
    mpi.ring_attention(comm, x, x, x, layout="striped")  # wrong
    mpi.ring_attention(comm, "x", x, x)  # wrong
