"""Python's garbage collector, while kernels are compiled."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """No garbage collection meanwhile: it takes a tenth of the time, to find that what a compiler makes is in use.

    What has become garbage is collected at the end, in this thread. llvmlite's objects take a lock when they go, which
    the main thread, where signals interrupt, might keep.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.collect(0)  # the youngest are all that have been made meanwhile
            gc.enable()
