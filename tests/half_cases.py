"""Operands in halves for kernels on tensor cores, what comes of them, and how far that may be from the exact result.

With eps the spacing of halves at 1, beside what `tolerances` derives for arithmetic in float32:

- The weights are rounded to halves before they are multiplied by the values, each by up to eps/2 of itself, so their
  sum with the values by up to eps/2 · max|v|. In float16, where weights below 2^-14 are subnormal, each also by up to
  2^-25.
- The result is rounded to halves: eps/2 of itself.

Sums and the log-sum-exp are of weights that are not rounded, and stay float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from emulated_ptx import from_halves, to_halves
from numba import cuda
from numpy.typing import NDArray
from tolerances import Expected, check_lse, check_out, expected, largest

from fastattn.call.arrays import as_operands
from fastattn.call.shapes import describe
from fastattn.cuda.host.compile import kernel, launch
from fastattn.cuda.host.plan import make_table
from fastattn.cuda.host.tensor_cores import block_of, grid_of
from fastattn.cuda.host.tensor_cores import options as jit_options
from fastattn.cuda.kernels import tensor_cores
from fastattn.cuda.kernels.elements import LOG2_E
from fastattn.cuda.kernels.fragments import TileShape
from fastattn.cuda.kernels.plan import KEY, MASK, OUT, QUERY, VALUE

Array = NDArray[Any]

EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
SUBNORMAL = 2.0**-25


class Halves:
    """An array of halves: `bits`, as a kernel sees them, and `numbers`, the float32 numbers that they are."""

    def __init__(self, numbers: Array, storage: str) -> None:
        with np.errstate(all="ignore"):
            self.base = to_halves(np.asarray(numbers, np.float32), storage)
        self.storage = storage
        self.bits = self.base
        self.numbers = from_halves(self.base, storage)

    def __getitem__(self, index: Any) -> Halves:
        part = object.__new__(Halves)
        part.base, part.storage = self.base, self.storage
        part.bits, part.numbers = self.bits[index], self.numbers[index]
        return part

    @property
    def first(self) -> int:
        """Which element of the memory is the first of the array."""
        return (self.bits.__array_interface__["data"][0] - self.base.__array_interface__["data"][0]) // 2

    @property
    def memory(self) -> Any:
        """The array's memory, on the device."""
        flat = self.base.reshape(-1)
        return cuda.to_device(flat.view(np.float16) if self.storage == "float16" else flat)


def run(
    shape: TileShape, query: Halves, key: Halves, value: Halves, mask: Any = None, **options: Any
) -> tuple[Array, Array]:
    """Call the kernel: the result, as float32, and the log-sum-exp."""
    numbers = mask.numbers if isinstance(mask, Halves) else mask
    problem, operands = describe(*as_operands(query.numbers, key.numbers, value.numbers, numbers), **options)
    out = Halves(np.full((*problem.rows_shape, problem.queries, problem.value_dim), np.nan), shape.storage)
    lse = cuda.to_device(np.full(max(1, np.prod(problem.lse_shape, dtype=int)), 7, np.float32))
    views = [
        (QUERY, operands.query, query.first),
        (KEY, operands.key, key.first),
        (VALUE, operands.value, value.first),
        (OUT, out.numbers, 0),
    ]
    shown = np.zeros(1, np.uint8)
    if mask is not None:
        views.append((MASK, operands.bias if operands.keep is None else operands.keep, 0))
        shown = mask.base if isinstance(mask, Halves) else np.ascontiguousarray(mask)
        shown = shown.view(np.uint8 if shown.dtype == bool else np.float16 if shape.mask == "float16" else shown.dtype)
    tables = make_table(problem, views)
    unit = 1.0 if shape.floating else LOG2_E
    result = out.memory
    arguments = (
        *(operand.memory for operand in (query, key, value)),
        cuda.to_device(shown.reshape(-1)),
        result,
        lse,
        *(cuda.to_device(table) for table in tables),
        np.float32(problem.scores.scale * unit),
        np.float32(1),
        np.uint32(0),
        np.uint32(0),
    )
    made = kernel(tensor_cores.forward, shape, **jit_options(shape))
    launch(made, grid_of(shape, problem), block_of(shape), 0, arguments)
    bits = result.copy_to_host().view(np.uint16)
    count = int(np.prod(problem.lse_shape, dtype=int))
    return (
        from_halves(bits, shape.storage).reshape(problem.out_shape),
        lse.copy_to_host()[:count].reshape(problem.lse_shape),
    )


def bounds(shape: TileShape, query: Halves, key: Halves, value: Halves, mask: Any = None, **options: Any) -> Expected:
    """The exact results, and how far what is computed may be from them."""
    numbers = mask.numbers if isinstance(mask, Halves) else mask
    wanted = expected(query.numbers, key.numbers, value.numbers, numbers, **options)
    eps, most = EPS[shape.storage], largest(value.numbers)
    with np.errstate(all="ignore"):
        own = np.where(np.isfinite(wanted.out), np.abs(wanted.out), 0).astype(np.float64)
    rounding = eps / 2 * (most + own) + wanted.problem.keys * SUBNORMAL * most
    return replace(wanted, out_bound=wanted.out_bound + rounding, largest_out=wanted.largest_out * (1 + 2 * eps))


def check(shape: TileShape, *operands: Any, **options: Any) -> tuple[Array, Array]:
    """Call the kernel, assert that what comes of it is right, and return it."""
    out, lse = run(shape, *operands, **options)
    wanted = bounds(shape, *operands, **options)
    check_out(out, wanted)
    check_lse(lse, wanted)
    return out, lse
