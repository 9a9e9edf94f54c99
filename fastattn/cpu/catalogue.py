"""What can be compiled: from the name of a library to the functions in it."""

from fastattn import build as compiler
from fastattn.cpu import claim
from fastattn.cpu.forward import forward_task
from fastattn.isa import Isa
from fastattn.simd import TileShape, jit

TASKS = {"forward": forward_task}


def build(name: str, row: Isa, entries: dict[str, int]) -> bytes:
    """Object code of the library `name`: "schedule", or kind-dtype-ROWSxVECTORS."""
    kind, *parameters = name.split("-")
    if kind == "schedule":
        functions = {entry: getattr(claim, entry) for entry in entries}
    else:
        dtype, tile = parameters
        rows, vectors = map(int, tile.split("x"))
        lanes = row.vector_bytes // (4 if dtype == "float32" else 8)
        task = jit(TASKS[kind](TileShape(dtype, lanes, rows, vectors, row.scalef)))
        functions = {"task": task.py_func, "alone": _alone(task)}
    return compiler.emit({entry: (function, entries[entry]) for entry, function in functions.items()}, row)


def _alone(task):
    """Run the tasks [first, last) in the calling thread."""

    def alone(call, first, last):
        for number in range(first, last):
            task(call, 0, number)

    return alone
