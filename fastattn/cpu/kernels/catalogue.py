"""What can be compiled: from the name of a library to the functions in it."""

import numpy as np

from fastattn.cpu.kernels import additive_backward, backward, mask_gradient
from fastattn.cpu.kernels import schedule as claim
from fastattn.cpu.kernels.entry import in_default_mode, quick_function, shared, signature
from fastattn.cpu.kernels.forward import forward_group
from fastattn.cpu.kernels.received import receive_group
from fastattn.cpu.kernels.summary import choose_group, summarise_group
from fastattn.cpu.kernels.tasks import task_function
from fastattn.cpu.kernels.tiles import unrolled_product
from fastattn.cpu.kernels.weights import weigh_group
from fastattn.machine import building as compiler
from fastattn.machine.libraries import BACKWARD
from fastattn.machine.table import Isa
from fastattn.simd import TileShape, jit, tile_fill, tile_store

# What is compiled for attention and what is asked of its weights. The forward pass without a mask or dropout is a
# kernel of its own: one for all of it would make a first call wait for what it does not use.
WORK = {
    "forward": forward_group,
    "masked": forward_group,
    "weights": weigh_group,
    "summary": summarise_group,
    "received": receive_group,
    "chosen": choose_group,
    "additive": forward_group,
    "additive_weights": weigh_group,
}
BACKWARD_MODULES = {
    "backward": backward,
    "backward_masked": backward,
    "mask_gradient": mask_gradient,
    "additive_backward": additive_backward,
}
IN_PLACE = ("weights", "chosen", "additive_weights")  # take blocks of queries one by one: too few to pack keys for


def build(name: str, row: Isa, entries: dict[str, int]) -> bytes:
    """Object code of the library `name`: "schedule", "signature", or kind-dtype-ROWSxVECTORS."""
    kind, *parameters = name.split("-")
    if kind == "schedule":
        functions = {entry: getattr(claim, entry) for entry in entries}
    elif kind == "signature":
        functions = {"signature": signature, "in_default_mode": in_default_mode}
    else:
        dtype, size = parameters
        rows, vectors = map(int, size.split("x"))
        by_groups = kind not in IN_PLACE and vectors > 1  # a tall tile is for few queries
        packed, dense = by_groups and row.panels, by_groups and not row.panels
        lanes = row.vector_bytes // np.dtype(dtype).itemsize
        masked, additive = kind not in ("forward", "backward"), kind.startswith("additive")
        tile = TileShape(dtype, lanes, rows, vectors, row.scalef, packed, masked, additive, dense)
        if kind == "peak":
            functions = {"run": _peak(tile)}
        elif kind in BACKWARD:
            task = BACKWARD_MODULES[kind].task_function(tile)
            functions = {"task": task, "alone": _alone(task)}
        else:
            functions = _attention(task_function(tile, WORK[kind], by_keys=kind == "received"))
    return compiler.emit({entry: (functions[entry], count) for entry, count in entries.items()}, row)


def _peak(tile):
    """The micro-kernel alone, over and over."""

    @jit
    def run(a, b, out, count, repeats):
        for _ in range(repeats):
            acc = unrolled_product(tile, tile_fill(tile, 0.0), a, tile.itemsize, tile.rows * tile.itemsize, b, count)
            tile_store(acc, out, tile.row_bytes)

    return run


def _attention(task):
    """A task function, and the ways to run it in the calling thread."""
    return {"task": task, "alone": _alone(task), "quick": quick_function(task), "shared": shared}


def _alone(task):
    """Run the tasks [first, last) in the calling thread."""

    @jit
    def alone(call, first, last):
        for number in range(first, last):
            task(call, 0, number)

    return alone
