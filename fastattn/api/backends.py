"""Which backend a call runs on."""

from __future__ import annotations

from fastattn.call.options import check_backend
from fastattn.call.types import Backend, DeviceBackend
from fastattn.cuda.detect import any_on_device

BACKENDS: tuple[Backend, ...] = ("cpu", "reference")  # of everything
ATTENTION_BACKENDS: tuple[DeviceBackend, ...] = ("cpu", "cuda", "reference")  # of attention, which CUDA has kernels for


def backend_of_attention(given: object, *arrays: object) -> DeviceBackend | None:
    """Return the backend that is asked for, or the one for where the arrays are: "cuda", or None for the CPU.

    Raises
    ------
    ValueError, TypeError
        If no backend has that name.
    RuntimeError
        If it is "cuda", and something is missing for that.
    """
    backend = check_backend(given, ATTENTION_BACKENDS)
    if backend is None and any_on_device(*arrays):
        backend = "cuda"
    if backend == "cuda":
        from fastattn.cuda.available import require  # imports Numba, which a cached kernel of the CPU does not need

        require()
    return backend
