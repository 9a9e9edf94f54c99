"""Kernels, compiled on demand, and what is compiled kept on disk.

A kernel comes from a function of a specification, a named tuple, which returns the kernel's Python function. What Numba
compiles of it is kept in a folder whose name is a hash of the content of every module that takes part and of the
versions of Python, NumPy, Numba and numba-cuda, under a name that tells the specification: so nothing stale is ever
looked at. Numba's own cache would look at the one file that a kernel stands in.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numba import cuda

from fastattn.cuda.available import SIMULATED
from fastattn.functions.function import Function
from fastattn.machine.digest import of_modules, version
from fastattn.machine.libraries import cache_folder, warn_not_kept
from fastattn.machine.os_threads import RLock
from fastattn.machine.trust import made

Factory = Callable[[Any], Any]

#: What takes part in compiling.
COMPILED = (
    "fastattn.call.broadcasting",
    "fastattn.call.halves",
    "fastattn.call.rounding",
    "fastattn.call.scores",
    "fastattn.cuda.kernels",
    "fastattn.functions",
    "fastattn.machine.digest",
    "fastattn.machine.features",
    "fastattn.machine.kernel",
    "fastattn.machine.objects",
    "fastattn.machine.table",
    "fastattn.machine.tile",
    "fastattn.simd.compiler",
    "fastattn.simd.static",
)

_lock = RLock()


@functools.cache
def source_digest() -> str:
    """A hash of the modules of kernels, of what they take from others, and of the versions of compilers.

    `fastattn.cuda.available` has no part in it, of which they ask whether they are compiled at all.
    """
    versions = [version(name) for name in ("numba", "numba-cuda", "numpy")]
    identity = repr((versions, platform.python_version(), platform.machine()))
    return hashlib.sha256(of_modules(*COMPILED) + identity.encode()).hexdigest()[:32]


def folder() -> Path | None:
    """Where compiled kernels are kept: in a folder of the cache of the CPU's kernels; None where there is none."""
    parent = cache_folder()
    if parent is None:
        return None
    where = parent / f"cuda-{source_digest()}"
    try:
        return where if made(where) else None
    except OSError:  # filled beforehand, with other kernels, and read-only
        return None


def name_of(factory: Factory, spec: Any) -> str:
    """A name for a kernel that tells its specification, fit for files and for profilers."""
    said = "_".join(str(part) for part in _flat(spec))
    return re.sub(r"\W+", "_", f"{factory.__module__.rpartition('.')[2]}_{factory.__name__}_{said}")


def _flat(spec: Any) -> Iterator[Any]:
    for part in spec:
        if isinstance(part, tuple):
            yield from _flat(part)
        elif isinstance(part, Function):
            yield part.identity
        elif part is not None:
            yield int(part) if isinstance(part, bool) else part


def python_kernel(factory: Factory, spec: Any) -> Any:
    """The Python function of a kernel, called as its specification says."""
    function = factory(spec)
    function.__name__ = function.__qualname__ = name_of(factory, spec)
    return function


@functools.cache
def kernel(factory: Factory, spec: Any, **options: Any) -> Any:
    """The kernel of a specification, to be compiled when it is first launched; `options` are those of `cuda.jit`."""
    function = python_kernel(factory, spec)
    if SIMULATED:
        return cuda.jit(function)
    dispatcher = cuda.jit(**options)(function)
    where = folder()
    if where is None:
        warn_not_kept()
    else:
        dispatcher._cache = kept_in(where, function)
    return dispatcher


def kept_in(where: Path, function: Any) -> Any:
    """Numba's cache of a kernel, in a folder that is for these sources alone."""
    from numba.cuda.core.caching import _CacheLocator
    from numba.cuda.dispatcher import CUDACache, CUDACacheImpl

    class Locator(_CacheLocator):  # type: ignore[misc, unused-ignore]
        def get_cache_path(self) -> str:
            return os.fspath(where)

        def get_source_stamp(self) -> str:
            return source_digest()

        def get_disambiguator(self) -> str:
            return "kernel"

        @classmethod
        def from_function(cls, py_func: Any, py_file: str) -> Any:
            return cls()

    class Impl(CUDACacheImpl):  # type: ignore[misc, unused-ignore]
        _locator_classes = (Locator,)

    class Kept(CUDACache):  # type: ignore[misc, unused-ignore]
        _impl_class = Impl

        def _index_key(self, sig: Any, codegen: Any) -> Any:
            return sig, codegen.magic_tuple()

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                return super().load_overload(sig, target_context)
            except Exception:  # a damaged file, whatever is wrong with it: the kernel is compiled anew
                return None

        def save_overload(self, sig: Any, data: Any) -> None:
            try:
                super().save_overload(sig, data)
            except OSError:  # a full or vanished disk: the kernel is in memory all the same
                warn_not_kept()

    return Kept(function)


@functools.lru_cache(maxsize=1024)
def configured(kernel: Any, grid: int, block: tuple[int, int], stream: Any) -> Any:
    """Numba's object for launches like this one, which warns, when it is made, of grids that are small."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kernel[grid, block, stream]


def launch(kernel: Any, grid: int, block: tuple[int, int], stream: Any, arguments: tuple[Any, ...]) -> None:
    """Run a kernel on `grid` blocks of threads; a specification's first launch compiles it."""
    if not SIMULATED:
        configured(kernel, grid, block, stream)(*arguments)
        return
    # the simulator runs one kernel at a time, and computes as NumPy does, warnings included
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel[grid, block](*arguments)


def table(array: Any, device: int) -> Any:
    """An array for kernels to read, on the current device; in the simulator one that is quick to read, if of int64."""
    if SIMULATED:  # of other types, elements are to be what they are in the array
        return array.data if array.size and array.dtype == np.int64 else array
    # calls on other streams may use the table as soon as this returns, which does not mean yet that it has arrived
    stream = stream_of_tables(device)
    made = cuda.to_device(array, stream=stream)
    stream.synchronize()
    return made


@functools.cache
def stream_of_tables(device: int) -> Any:
    """The stream on which tables are copied to a device, the current one: it waits for nothing that is queued there."""
    from cuda.bindings import driver

    status, handle = driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
    return cuda.stream() if int(status) else cuda.external_stream(int(handle))
