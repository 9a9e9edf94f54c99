"""What pytest leaves out, modules for libraries that are not installed, and where the tests of CUDA run."""

from __future__ import annotations

import ctypes
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numba
import pytest

from fastattn.call.advice import to_install

ROOT = Path(__file__).parent
LIBRARIES = ("dask", "jax", "mpi4py", "onnx", "torch", "transformers")  # of which the integrations need some


def needed_by(module: Path) -> set[str]:
    """Return which libraries a module imports."""
    return set(re.findall(rf"^ *(?:import|from) ({'|'.join(LIBRARIES)})\b", module.read_text("utf-8"), re.MULTILINE))


missing = {library for library in LIBRARIES if find_spec(library) is None}
INTEGRATIONS = ROOT / "fastattn" / "integrations"
collect_ignore = [str(module) for module in INTEGRATIONS.glob("*.py") if needed_by(module) & missing]
collect_ignore += [str(module.parent) for module in INTEGRATIONS.glob("*/__init__.py") if needed_by(module) & missing]
collect_ignore_glob = ["fastattn/__hatch/*", "fastattn/__pyinstaller/hook-*"]
collect_ignore_glob += [] if find_spec("numba_cuda") else ["fastattn/cuda/*"]


def has_gpu() -> bool:
    """Whether there is a GPU, asked of the driver itself: to ask Numba would be to decide against its simulator."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


# the modules that tests share, of which Numba's simulator needs one: pytest's importlib mode leaves sys.path alone
sys.path.insert(0, str(ROOT / "tests"))

# Numba decides between GPU and simulator where numba.cuda is first imported, so this has to come before all tests
if not has_gpu():
    numba.config.ENABLE_CUDASIM = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take ``--benchmark``, which people type, for pytest-benchmark's ``--benchmark-only``."""
    only = "run the benchmarks, and no tests: --benchmark-only"
    parser.addoption("--benchmark", action="store_true", dest="benchmark_only", default=False, help=only)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run benchmarks without what measures them."""
    if config.getoption("benchmark_only") and not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(f"--benchmark needs pytest-benchmark: {to_install('bench')}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Look for no tests where benchmarks alone are run: all of them would be reported as skipped."""
    tests = any(collection_path.is_relative_to(ROOT / folder) for folder in ("fastattn", "tests"))
    return True if tests and config.getoption("benchmark_only") else None
