"""All kernels, ahead of their first use."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from fastattn.cpu.host.builtin import in_default_mode
from fastattn.cpu.host.kernels import every_kernel, load
from fastattn.machine.table import host
from fastattn.machine.tile import ITEMSIZE

Storage: TypeAlias = Literal["float16", "bfloat16", "float32", "float64"]


@in_default_mode
def warmup(
    progress: Callable[[int, int, str], object] | None = None, dtypes: Sequence[Storage] = ("float32", "float64")
) -> None:
    """Compile every kernel for this machine, or load it from the cache, so that no later call waits.

    Those for softcaps, and functions of one's own, are compiled when they are used.

    Parameters
    ----------
    progress : callable, optional
        Called as ``progress(done, total, label)`` before each kernel, and once at the end.
    dtypes : sequence of str
        Those of arrays: "float16", "bfloat16", "float32", "float64".

    Raises
    ------
    ValueError
        If there are no kernels for one of them.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.warmup()  # doctest: +SKIP
    """
    for dtype in dtypes:
        if dtype not in ITEMSIZE:
            raise ValueError(f"dtypes: {dtype!r} among them; expected names of {', '.join(ITEMSIZE)}")
    kernels = list(every_kernel(host(), dtypes))
    for done, kernel in enumerate(kernels):
        if progress is not None:
            progress(done, len(kernels), kernel.label)
        load(kernel)
    if progress is not None:
        progress(len(kernels), len(kernels), "")
