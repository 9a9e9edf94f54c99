"""The PTX of CUDA kernels, made without a GPU: for tests, and for benchmarks/cuda_kernels.py."""

from __future__ import annotations

import types as python_types
from typing import Any

import numpy as np
from numba import cuda, types

from fastattn.cuda.host.compile import python_kernel
from fastattn.cuda.kernels import (
    captured_gradient,
    decode,
    deltas,
    head_gradients,
    kinds,
    portable,
    portable_backward,
    tensor_cores,
    tensor_cores_backward,
)
from fastattn.cuda.kernels.elements import MASKS, STORAGE, real_of


def ptx(factory: Any, spec: Any, capability: tuple[int, int], **options: Any) -> str:
    """Return the PTX of a kernel for GPUs of a compute capability; `options` are those of `cuda.jit`.

    Device functions are compiled once in a process, so one process compiles for one capability.
    """
    import numba.cuda.dispatcher as numba_dispatcher

    asked = numba_dispatcher.get_current_device
    # the dispatchers of device functions ask for the current device, of which there need be none here
    numba_dispatcher.get_current_device = lambda: python_types.SimpleNamespace(compute_capability=capability)
    try:
        text, _ = cuda.compile(
            python_kernel(factory, spec),
            ARGUMENTS[factory](spec),
            device=False,
            abi="numba",
            cc=capability,
            output="ptx",
            **options,
        )
    finally:
        numba_dispatcher.get_current_device = asked
    return text.decode() if isinstance(text, bytes) else str(text)


# -- Numba's types of the arguments ------------------------------------------------------------------------------------


def array(kind: Any, rank: int = 1) -> Any:
    """The type of an array of a NumPy type."""
    return types.Array(getattr(types, np.dtype(kind).name), rank, "C")


TABLES = (array(np.int64, 2), array(np.int64, 2), array(np.int64))
SEED = (types.uint32, types.uint32)


def mask_of(mask: str) -> Any:
    """The type of a mask, also of what stands for it where there is none."""
    return array(MASKS["bool" if mask == "none" else mask])


def own_of(real: Any) -> tuple[Any, ...]:
    """Of what the portable kernels alone are given: a boolean mask beside a floating one, a table, and words."""
    return array(MASKS["bool"]), array(real, 2), array(np.int64)


def attention(spec: Any, real: Any, last: Any) -> tuple[Any, ...]:
    """Of kernels that write a matrix for each slice: the last array is of numbers of type `last`."""
    element = array(STORAGE[spec.storage])
    scale = array(real).dtype
    return (element, element, element, mask_of(spec.mask), element, array(last), *TABLES, scale, scale, *SEED)


def of_tensor_core_forward(spec: Any) -> tuple[Any, ...]:
    """Of the forward pass on tensor cores."""
    return attention(spec, real_of(spec.storage), real_of(spec.storage))


def of_forward(spec: Any) -> tuple[Any, ...]:
    """Of the portable forward pass."""
    real = real_of(spec.storage, spec.extreme)
    return (*attention(spec, real, real_of(spec.storage)), *own_of(real))


def of_weights(spec: Any) -> tuple[Any, ...]:
    """Of the matrix of weights."""
    real = real_of(spec.storage, spec.extreme)
    return (*attention(spec, real, real), *own_of(real))


def of_shifts(spec: Any) -> tuple[Any, ...]:
    """Of what weights are computed from."""
    element, kind = array(STORAGE[spec.storage]), real_of(spec.storage, spec.extreme)
    real, lse = array(kind), array(real_of(spec.storage))
    return (element, element, mask_of(spec.mask), lse, real, *TABLES, real.dtype, real.dtype, *own_of(kind))


def of_copy(spec: Any) -> tuple[Any, ...]:
    """Of what copies a result."""
    return (array(STORAGE[spec.storage]), array(STORAGE[spec.storage]), *TABLES)


def of_split(spec: Any) -> tuple[Any, ...]:
    """Of a part of the keys."""
    element, real = array(STORAGE[spec.storage]), array(real_of(spec.storage))
    numbers = (types.int64, real.dtype, real.dtype, *SEED)
    return (element, element, element, mask_of(spec.mask), real, real, *TABLES, *numbers)


def of_merge(spec: Any) -> tuple[Any, ...]:
    """Of what merges the parts."""
    element, real = array(STORAGE[spec.storage]), array(real_of(spec.storage))
    return (real, real, element, real, *TABLES)


def of_deltas(spec: Any) -> tuple[Any, ...]:
    """Of deltas."""
    element, lse = array(STORAGE[spec.storage]), array(real_of(spec.storage))
    return (element, element, lse, types.boolean, *TABLES, array(spec.real))


def of_gradients(spec: Any) -> tuple[Any, ...]:
    """What the portable kernels of gradients have in common."""
    element, real, members = array(STORAGE[spec.storage]), array(spec.real), array(np.int64, 2)
    arrays = (element, element, element, mask_of(spec.mask), element, real, *TABLES, members)
    return (*arrays, real.dtype, *SEED, real.dtype, *own_of(spec.real))


def of_query_gradients(spec: Any) -> tuple[Any, ...]:
    """Of the gradient of queries."""
    return (*of_gradients(spec), types.int64, array(STORAGE[spec.storage]))


def of_key_gradients(spec: Any) -> tuple[Any, ...]:
    """Of the gradients of keys and values."""
    return (*of_query_gradients(spec), array(STORAGE[spec.storage]))


def of_mask_gradient(spec: Any) -> tuple[Any, ...]:
    """Of the gradient of a mask."""
    return (*of_gradients(spec), types.int64, types.int64, array(MASKS[spec.mask]))


def of_slope_rows(spec: Any) -> tuple[Any, ...]:
    """Of what slopes get from each query."""
    return (*of_gradients(spec), array(spec.real))


def of_captured_parts(spec: Any) -> tuple[Any, ...]:
    """Of the parts of the gradient of a captured array."""
    return (*of_gradients(spec), types.int64, types.boolean, array(np.float64))


def of_sink_rows(spec: Any) -> tuple[Any, ...]:
    """Of what sinks get from each query."""
    real = real_of(spec.storage, spec.extreme)
    return (array(real), array(real, 2), array(np.int64), array(real))


def of_row_sums(spec: Any) -> tuple[Any, ...]:
    """Of the sums over rows, of float64 here."""
    return (array(np.float64), array(np.int64, 2), types.int64, array(STORAGE[spec.storage]))


def of_part_sums(spec: Any) -> tuple[Any, ...]:
    """Of the sums of the parts of a captured array."""
    return (array(np.float64), types.int64, types.int64, array(STORAGE[spec.storage]))


def of_kinds(spec: Any) -> tuple[Any, ...]:
    """Of what looks at blocks of keys."""
    numbers = (types.int64,) * 4
    return (array(np.uint8), array(np.int64), *numbers, array(np.int64), types.int64)


def of_tensor_core_gradients(spec: Any) -> tuple[Any, ...]:
    """Of gradients on tensor cores."""
    element, real = array(STORAGE[spec.shape.storage]), array(np.float32)
    arrays = (element, element, element, element, mask_of(spec.shape.mask), real, *TABLES, array(np.int64, 2))
    return (*arrays, real.dtype, real.dtype, element, element)


def of_tensor_core_shifts(spec: Any) -> tuple[Any, ...]:
    """Of what they are computed from."""
    element, real = array(STORAGE[spec.shape.storage]), array(np.float32)
    return (element, element, mask_of(spec.shape.mask), real, real, *TABLES, real.dtype, real.dtype)


#: By what makes a kernel: a function of its specification.
ARGUMENTS = {
    portable.forward: of_forward,
    portable.weights: of_weights,
    portable.find_shifts: of_shifts,
    portable.copy: of_copy,
    deltas.find_deltas: of_deltas,
    portable_backward.grad_queries: of_query_gradients,
    portable_backward.grad_keys: of_key_gradients,
    portable_backward.grad_mask: of_mask_gradient,
    portable_backward.slope_rows: of_slope_rows,
    portable_backward.captured_parts: of_captured_parts,
    head_gradients.sink_rows: of_sink_rows,
    head_gradients.sum_rows: of_row_sums,
    captured_gradient.sum_parts: of_part_sums,
    kinds.find_kinds: of_kinds,
    decode.split_keys: of_split,
    decode.merge_splits: of_merge,
    tensor_cores.forward: of_tensor_core_forward,
    tensor_cores_backward.gradients: of_tensor_core_gradients,
    tensor_cores_backward.find_shifts: of_tensor_core_shifts,
}
