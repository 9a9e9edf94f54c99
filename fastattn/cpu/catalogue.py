"""What can be compiled: from the name of a library to the functions in it."""

import numpy as np

from fastattn import build as compiler
from fastattn.cpu import additive_backward, backward, claim, mask_gradient
from fastattn.cpu.forward import forward_group
from fastattn.cpu.kernels import BACKWARD
from fastattn.cpu.atomics import call_compiled
from fastattn.cpu.layout import OBJECT_HEADER, RECORD_BYTES, START
from fastattn.cpu.received import receive_group
from fastattn.cpu.summary import choose_group, summarise_group
from fastattn.cpu.tasks import call_view, plan_view, task_function
from fastattn.cpu.tiles import packed_product
from fastattn.cpu.weights import weigh_group
from fastattn.isa import Isa
from fastattn.simd import TileShape, jit, load_i64, tile_fill, tile_store

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
    """Object code of the library `name`: "schedule", or kind-dtype-ROWSxVECTORS."""
    kind, *parameters = name.split("-")
    if kind == "schedule":
        functions = {entry: getattr(claim, entry) for entry in entries}
    else:
        dtype, size = parameters
        rows, vectors = map(int, size.split("x"))
        packed = kind not in IN_PLACE and vectors > 1  # a tall tile is for few queries
        lanes = row.vector_bytes // np.dtype(dtype).itemsize
        masked, additive = kind not in ("forward", "backward"), kind.startswith("additive")
        tile = TileShape(dtype, lanes, rows, vectors, row.scalef, packed, masked, additive, row.reach)
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
            acc = packed_product(tile, tile_fill(tile, 0.0), a, b, count)
            tile_store(acc, out, tile.row_bytes)

    return run


def _attention(task):
    """A task function, and the ways to run it in the calling thread."""
    return {"task": task, "alone": _alone(task), "quick": _quick(task), "shared": shared, "fill": fill}


def _alone(task):
    """Run the tasks [first, last) in the calling thread."""

    @jit
    def alone(call, first, last):
        for number in range(first, last):
            task(call, 0, number)

    return alone


def _quick(task):
    """Run a whole call in the calling thread; takes what `fill` takes, but for how much memory other threads have."""

    @jit
    def quick(at, plan, seed, objects):
        fill(at, plan, 0, seed, objects)
        for number in range(plan_view(plan).tasks):
            task(at, 0, number)

    return quick


@jit
def shared(at, plan, scratch_bytes, seed, objects, pool, task, limit, most, spins):
    """Write a call's record and run its tasks, with others: `fill`, then `start` of `fastattn.cpu.claim`."""
    fill(at, plan, scratch_bytes, seed, objects)
    return call_compiled(load_i64(pool + START), (pool, task, at, plan_view(plan).tasks, limit, most, spins))


@jit
def fill(at, plan, scratch_bytes, seed, objects):
    """Write a call's record, with its working memory behind it.

    `objects` says for each array, in the record's order, where the object is; None stands for no array. Reading a tuple
    here costs nothing; each further argument of a call from Python costs a tenth of a microsecond.
    """
    call, none = call_view(at), plan_view(plan).none
    call.plan = plan
    call.scratch = at + RECORD_BYTES
    call.scratch_bytes = scratch_bytes
    call.seed = seed
    call.query = address_of(load_i64(objects), none)
    call.key = address_of(load_i64(objects + 8), none)
    call.value = address_of(load_i64(objects + 16), none)
    call.mask = address_of(load_i64(objects + 24), none)
    call.out = address_of(load_i64(objects + 32), none)
    call.lse = address_of(load_i64(objects + 40), none)
    call.weights = address_of(load_i64(objects + 48), none)
    call.weight = address_of(load_i64(objects + 56), none)


@jit
def address_of(array, none):
    """The address of an array's first element, which stands behind the object's header; 0 for None."""
    return load_i64(array + OBJECT_HEADER) if array != none else 0
