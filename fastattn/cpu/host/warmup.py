"""All kernels, ahead of their first use."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

from fastattn.call.advice import said
from fastattn.cpu.host.builtin import in_default_mode
from fastattn.cpu.host.kernels import every_kernel, load
from fastattn.machine.table import host

Storage: TypeAlias = Literal["float16", "bfloat16", "float32", "float64"]


@in_default_mode
def warmup(
    progress: bool | Callable[[int, int, str], object] | None = None,
    dtypes: Sequence[Storage] = ("float32", "float64"),
) -> None:
    """Compile every kernel for this machine, or load it from the cache, so that no later call waits.

    Those for softcaps, and functions of one's own, are compiled when they are used.

    Parameters
    ----------
    progress : bool or callable, optional
        True shows a line of progress, on a terminal or in a notebook. A function is called as
        ``progress(done, total, label)`` before each kernel, and once at the end.
    dtypes : sequence of str
        Those of arrays: "float16", "bfloat16", "float32", "float64".

    Raises
    ------
    ValueError
        If there are no kernels for one of the dtypes.
    TypeError
        If `progress` is something else.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.warmup(progress=True)  # doctest: +SKIP
    """
    if progress is True:
        from fastattn.console.terminal import Progress

        with Progress("compiling") as shown:
            return warmup(shown, dtypes)
    if progress is None or progress is False:
        progress = lambda done, total, label: None  # noqa: E731
    if not callable(progress):
        raise TypeError(f"progress: {said(progress)}; expected True, False, a callable, or None")
    for dtype in dtypes:
        if dtype not in get_args(Storage):
            raise ValueError(f"dtypes: {dtype!r} among them; expected names of {', '.join(get_args(Storage))}")
    kernels = list(every_kernel(host(), dtypes))
    for done, kernel in enumerate(kernels):
        progress(done, len(kernels), kernel.label)
        load(kernel)
    progress(len(kernels), len(kernels), "")
