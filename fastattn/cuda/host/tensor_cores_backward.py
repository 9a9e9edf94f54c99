"""The host side of the backward pass on tensor cores: which calls have it, and with which tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastattn.call.problem import Problem
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.host import tensor_cores
from fastattn.cuda.host.plan import Table
from fastattn.cuda.kernels.fragments import HALF, TileShape
from fastattn.cuda.kernels.gradient_fragments import Gradients
from fastattn.cuda.kernels.plan import GRAD_OUT, KEY, QUERY, VALUE

# Bytes of a slice of a gradient, which are counted in 32 bits, and those of some rows more. So are the numbers of its
# queries, which have fewer bytes.
LARGEST = 2**31 - 2**20


def spec_for(storage: str, mask: str, width: int, of_keys: bool) -> Gradients:
    """The kernel for rows of up to `width` elements."""
    # the sums of 16 keys and values are a quarter of the registers of a thread, or half of them: then tiles are small,
    # and where addresses of a mask come in addition, the own rows have to stay in shared memory
    masked = mask != "none"
    if width <= 64:
        shape = TileShape(storage, mask, width=64, warps=4, rows=16, keys=32, blocks=2 if masked else 3)
        return Gradients(shape, of_keys)
    tile = 16 if of_keys or masked else 32
    return Gradients(TileShape(storage, mask, width=128, warps=4, rows=16, keys=tile, blocks=2), of_keys, apart=masked)


def options(spec: Gradients) -> dict[str, Any]:
    """The options of `cuda.jit` for this kernel: how many registers a thread may have follows from them."""
    return {} if SIMULATED else {"launch_bounds": (spec.shape.threads, spec.shape.blocks)}


def against(
    storage: str, mask: str, problem: Problem, table: Table, addresses: Sequence[int], capability: tuple[int, int]
) -> str | None:
    """Say why a call cannot have these kernels; None if it can. The arguments are those of the forward kernel's."""
    size = max(problem.queries, problem.keys) * max(problem.head_dim, problem.value_dim) * HALF
    if size > LARGEST:
        return f"a gradient of {size} bytes for a slice is not below 2 GiB"
    return tensor_cores.against(storage, mask, problem, table, addresses, capability, (QUERY, KEY, VALUE, GRAD_OUT))
