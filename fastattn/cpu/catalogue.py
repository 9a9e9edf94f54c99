"""What can be compiled: from the name of a library to the functions in it."""

import numpy as np

from fastattn import build as compiler
from fastattn.cpu import claim
from fastattn.cpu.forward import call_view, forward_task, plan_view
from fastattn.cpu.layout import CALL
from fastattn.cpu.tiles import product
from fastattn.cpu.weights import weights_task
from fastattn.isa import Isa
from fastattn.simd import TileShape, jit, load_i64, stack_memory, tile_fill, tile_store

OBJECT_HEADER = object.__basicsize__
call_memory = stack_memory(CALL.itemsize)

TASKS = {"forward": forward_task, "weights": weights_task}


def build(name: str, row: Isa, entries: dict[str, int]) -> bytes:
    """Object code of the library `name`: "schedule", or kind-dtype-ROWSxVECTORS."""
    kind, *parameters = name.split("-")
    if kind == "schedule":
        functions = {entry: getattr(claim, entry) for entry in entries}
    else:
        dtype, size = parameters
        rows, vectors = map(int, size.split("x"))
        tile = TileShape(dtype, row.vector_bytes // np.dtype(dtype).itemsize, rows, vectors, row.scalef)
        functions = {"run": _peak(tile)} if kind == "peak" else _attention(TASKS[kind](tile), entries)
    return compiler.emit({entry: (function, entries[entry]) for entry, function in functions.items()}, row)


def _peak(tile):
    """The micro-kernel alone, over and over."""

    def run(a, b, out, count, repeats):
        for _ in range(repeats):
            acc = product(tile_fill(tile, 0.0), a, count * tile.itemsize, tile.itemsize, b, tile.row_bytes, count)
            tile_store(acc, out, tile.row_bytes)

    return run


def _attention(function, entries):
    """A task function, and the ways to run it in the calling thread."""
    task = jit(function)
    functions = {"task": function, "alone": _alone(task), "quick": _quick(task)}
    return {entry: functions[entry] for entry in entries}


def _alone(task):
    """Run the tasks [first, last) in the calling thread."""

    def alone(call, first, last):
        for number in range(first, last):
            task(call, 0, number)

    return alone


def _quick(task):
    """Run a whole call in the calling thread, given the Python objects of its arrays instead of a call record."""

    def quick(plan, query, key, value, mask, out, lse, scratch, seed):
        memory = call_memory()
        call = call_view(memory)
        call.plan = plan
        call.query = data_address(query)
        call.key = data_address(key)
        call.value = data_address(value)
        call.mask = data_address(mask)
        call.out = data_address(out)
        call.lse = data_address(lse)
        call.weights = 0
        call.seed = seed
        call.scratch = scratch
        call.scratch_bytes = 0
        for number in range(plan_view(plan).tasks):
            task(memory, 0, number)

    return quick


@jit
def data_address(array):
    """Where the elements of a NumPy array object begin, given the object's own address; 0 for no object.

    NumPy's C API fixes that the pointer follows the object header; `fastattn.cpu.attention` checks it once.
    """
    return load_i64(array + OBJECT_HEADER) if array != 0 else 0
