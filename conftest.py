"""What pytest leaves out, modules for libraries that are not installed, and where the tests of CUDA run."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec

import numba

NEEDS = {
    "eager": ["torch"],
    "masks": ["torch"],
    "model_code": ["torch", "transformers"],
    "operators": ["torch"],
    "torch": ["torch"],
    "transformers": ["torch", "transformers"],
    "jax": ["jax"],
}
collect_ignore = [
    f"fastattn/integrations/{module}.py"
    for module, libraries in NEEDS.items()
    if any(find_spec(library) is None for library in libraries)
]
collect_ignore_glob = [] if find_spec("numba_cuda") else ["fastattn/cuda/*"]


def has_gpu() -> bool:
    """Whether there is a GPU, asked of the driver itself: to ask Numba would be to decide against its simulator."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


# Numba decides between GPU and simulator where numba.cuda is first imported, so this has to come before all tests
if not has_gpu():
    numba.config.ENABLE_CUDASIM = 1
