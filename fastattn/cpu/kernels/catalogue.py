"""What can be compiled: from the description of a kernel to the functions in it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastattn.cpu.kernels import (
    additive_backward,
    additive_score_gradients,
    backward,
    captured_gradient,
    convert,
    decode,
    mask_gradient,
    matrix_products,
    schedule,
    several,
)
from fastattn.cpu.kernels.entry import in_default_mode, longest, note, overlaps, quick_function, shared, signature
from fastattn.cpu.kernels.forward import forward_group
from fastattn.cpu.kernels.key_weights import sum_weights
from fastattn.cpu.kernels.lanes import captured_functions, score_functions, seen_functions
from fastattn.cpu.kernels.own import own_heads
from fastattn.cpu.kernels.summary import summarise_group, weigh_known_group
from fastattn.cpu.kernels.tasks import task_function
from fastattn.cpu.kernels.tiles import pairs_across, product_across
from fastattn.cpu.kernels.weights import weigh_group
from fastattn.machine import building
from fastattn.machine.kernel import Kernel
from fastattn.simd import jit, tile_fill, tile_store


def build(kernel: Kernel, exports: Mapping[str, int]) -> bytes:
    """Object code of a kernel, with some of its functions or all, and the number of integers that each takes."""
    functions = FUNCTIONS[kernel.work](kernel)
    symbols = {name: (functions[name], count) for name, count in exports.items()}
    return building.emit(symbols, kernel.row, vectorise=kernel.function is not None)


def _alone(task):
    """Run the tasks [first, last) in the calling thread."""

    @jit
    def alone(call, first, last):
        for number in range(first, last):
            task(call, 0, number)

    return alone


def _tasks(task):
    """A task function, and the ways to run it."""
    return {"task": task, "alone": _alone(task), "note": note, "quick": quick_function(task), "shared": shared}


def _attention(work, kernel, on_keys=None):
    """Work on tasks that are some blocks of one head."""
    return _tasks(task_function(kernel, work, on_keys))


def _of_module(module, kernel):
    """A module's own tasks."""
    return _tasks(module.task_function(kernel))


def _peak(kernel):
    """The micro-kernel alone, over and over."""
    if kernel.reads == "matrix":
        return {"run": matrix_products.peak(kernel)}
    tile = kernel.tile
    product = pairs_across if kernel.reads == "pairs" else product_across

    @jit
    def run(a, b, out, count, repeats):
        for _ in range(repeats):
            acc = product(tile, tile_fill(tile, 0.0), a, tile.itemsize, tile.rows * tile.itemsize, b, count)
            tile_store(acc, out, tile.row_bytes)

    return {"run": run}


# From a kernel's work to its functions by name.
FUNCTIONS: dict[str, Callable[[Kernel], dict[str, Any]]] = {
    "forward": partial(_attention, forward_group),
    "decode": partial(_of_module, decode),
    "weights": partial(_attention, weigh_group),
    "known_weights": partial(_attention, weigh_known_group),
    "summary": partial(_attention, summarise_group, on_keys=sum_weights),
    "backward": partial(_of_module, backward),
    "mask_gradient": partial(_of_module, mask_gradient),
    "captured_gradient": partial(_of_module, captured_gradient),
    "additive_backward": partial(_of_module, additive_backward),
    "additive_mask_gradient": partial(_of_module, additive_score_gradients),
    "additive_captured_gradient": partial(_of_module, additive_score_gradients),
    "score_function": score_functions,
    "captured_function": captured_functions,
    "seen_function": seen_functions,
    "several": lambda kernel: _tasks(several.task),
    "peak": _peak,
    "schedule": lambda kernel: vars(schedule),
    "signature": lambda kernel: {"signature": signature, "in_default_mode": in_default_mode},
    "overlaps": lambda kernel: {"overlaps": overlaps},
    "own_heads": lambda kernel: {"own_heads": own_heads},
    "longest": lambda kernel: {"longest": longest},
    "convert": lambda kernel: {"convert": convert.function(kernel)},
}
