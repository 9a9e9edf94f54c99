"""Whether CUDA can be used here, and if not, what is missing."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from importlib.util import find_spec
from typing import Any, NamedTuple

from numba import config

from fastattn.call.advice import to_install

__all__ = ["EMULATION", "NO_EMULATION", "SIMULATED", "Device", "device", "missing", "require"]

#: Whether kernels run in Numba's simulator, in Python threads: decided where Numba is first imported.
SIMULATED = bool(config.ENABLE_CUDASIM)

#: The module that stands for PTX in the simulator, and what is said where it is not to be found.
EMULATION = "emulated_ptx"
NO_EMULATION = f"Numba's simulator needs the module {EMULATION}; put the folder tests of the sources on PYTHONPATH"


class Device(NamedTuple):
    """A GPU: its number, its name, its compute capability, and the newest CUDA that its driver knows."""

    number: int
    name: str
    capability: tuple[int, int]
    driver: str


def missing() -> str | None:
    """Say what is missing for CUDA to work here, and how to get it; None if nothing is."""
    if not find_spec("numba_cuda"):
        return f"the package numba-cuda is not installed; {to_install('cuda')} installs it"
    if SIMULATED:
        return None if find_spec(EMULATION) else NO_EMULATION
    from numba import cuda
    from numba.cuda.cudadrv.driver import driver

    try:
        count = len(cuda.gpus)
    except Exception as error:  # whatever stops the driver is worth telling
        reason = " ".join(str(driver.initialization_error or error).split())
        return (
            f"the NVIDIA driver cannot be used ({reason}); a driver comes from https://www.nvidia.com/drivers, and a "
            "container has to be given the GPU"
        )
    if count == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if visible is None else f", CUDA_VISIBLE_DEVICES is {visible!r}"
        return f"the NVIDIA driver finds no GPU{why}"
    return None


_found: list[bool] = []  # that all is there has been seen; what is missing may come


def require() -> None:
    """Raise RuntimeError, which says what is missing, unless CUDA can be used."""
    if _found:
        return
    what = missing()
    if what is not None:
        raise RuntimeError(
            f"backend: 'cuda' cannot be used here: {what}. backend=None computes NumPy arrays on the CPU"
        )
    _found.append(True)


def device() -> Device:
    """The current device, where CUDA can be used."""
    from numba import cuda

    if SIMULATED:
        return Device(0, "Numba's simulator", (8, 0), "none")
    current: Any = cuda.get_current_device()
    name = current.name.decode() if isinstance(current.name, bytes) else str(current.name)
    from numba.cuda.cudadrv.driver import driver

    version = driver.get_version()
    major, minor = current.compute_capability
    return Device(int(current.id), name, (int(major), int(minor)), ".".join(map(str, version)))


@functools.cache
def capability_of(number: int) -> tuple[int, int]:
    """The compute capability of a device, which has to be the current one."""
    return device().capability


def versions() -> str:
    """The version of numba-cuda that is installed."""
    return f"numba-cuda {importlib.metadata.version('numba-cuda')}"
