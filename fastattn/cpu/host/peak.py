"""What the machine's arithmetic allows: the register tiles of the ISA table, in a loop, with all operands in L1."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np

from fastattn.cpu.host.kernels import load
from fastattn.machine.kernel import TERMS, Kernel
from fastattn.machine.objects import address_of
from fastattn.machine.table import host
from fastattn.machine.tile import MATRIX_ROWS

LENGTH = 128  # of the sums: operands of a few KiB


def measure(dtype: str = "float32", threads: int = 1, seconds: float = 0.1) -> float:
    """Measure the rate of the micro-kernel alone.

    Parameters
    ----------
    dtype : {"bfloat16", "float16", "float32", "float64"}
        What lies in memory. Half precision is computed with in float32, or where the machine does it, in pairs; all
        but float64 by a matrix unit, where the row in use has one.
    threads : int
        How many threads run it at once, each on operands of its own.
    seconds : float
        Roughly how long to measure.

    Returns
    -------
    float
        10^9 floating-point operations per second, of all threads together: the best tile's best of several runs.
    """
    row = host()
    tile = row.tile("float64" if dtype == "float64" else "float32")
    wider = replace(tile, vectors=tile.vectors + 1)
    if row.matrix and dtype in TERMS:
        return _rate(Kernel("peak", row, tile, storage=dtype, reads="matrix"), threads, seconds)
    reads = "pairs" if dtype == "bfloat16" and row.pairs else "strided"
    return max(_rate(Kernel("peak", row, each, reads=reads), threads, seconds / 2) for each in (tile, wider))


def _rate(kernel: Kernel, threads: int, seconds: float) -> float:
    run, tile = load(kernel).run, kernel.tile
    rows, width = (2 * MATRIX_ROWS if kernel.reads == "matrix" else tile.rows), tile.width
    flops = (4.0 if kernel.reads == "pairs" else 2.0) * rows * width * LENGTH
    repeats = max(1, int(2e6 / flops) * 10)
    memory = [np.ones((rows + 2 * width) * LENGTH * 2, tile.dtype) for _ in range(threads)]
    best = [np.inf] * threads
    go = threading.Event()

    def loop(index: int) -> None:
        a = address_of(memory[index])
        b = a + 2 * rows * LENGTH * memory[index].itemsize  # as much as three terms of bfloat16 want, and more
        out = b + 2 * width * LENGTH * memory[index].itemsize
        go.wait()
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            run(a, b, out, LENGTH, repeats)
            best[index] = min(best[index], time.perf_counter() - start)

    others: list[threading.Thread] = []
    try:
        for index in range(1, threads):
            thread = threading.Thread(target=loop, args=(index,))
            thread.start()
            others.append(thread)
    except (RuntimeError, MemoryError):  # the system gives no more threads: those there are show what they can do
        pass
    finally:
        go.set()
    loop(0)
    for thread in others:
        thread.join()
    return sum(flops * repeats / elapsed for elapsed in best) / 1e9
