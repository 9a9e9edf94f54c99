"""All kernels, ahead of their first use."""

from fastattn.cpu.host.builtin import in_default_mode
from fastattn.machine.libraries import ATTENTION, BACKWARD, library
from fastattn.machine.table import host


@in_default_mode
def warmup(progress=None) -> None:
    """Compile every kernel for this machine, or load it from the cache, so that no later call waits.

    Parameters
    ----------
    progress : callable, optional
        Called as ``progress(done, total, label)`` before each kernel, and once at the end.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.warmup()  # doctest: +SKIP
    """
    row = host()
    sizes = ((row.rows, row.vectors), (row.tall_rows, 1))
    names = ["schedule", "signature"]
    for dtype in ("float32", "float64"):
        names += [f"{kind}-{dtype}-{rows}x{vectors}" for kind in ATTENTION for rows, vectors in sizes]
        names += [f"{kind}-{dtype}-{row.rows}x{row.vectors}" for kind in BACKWARD]
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names), name)
        library(name, row)
    if progress is not None:
        progress(len(names), len(names), "")
