"""All kernels, ahead of their first use."""

from fastattn.cpu.host.builtin import in_default_mode
from fastattn.cpu.host.kernels import every_kernel, load
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
    kernels = list(every_kernel(host()))
    for done, kernel in enumerate(kernels):
        if progress is not None:
            progress(done, len(kernels), kernel.label)
        load(kernel)
    if progress is not None:
        progress(len(kernels), len(kernels), "")
