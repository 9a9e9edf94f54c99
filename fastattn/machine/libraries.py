"""Compiled kernels, on demand: found in memory, in the cache on disk, or built.

A kernel's file is named by a hash of everything its code depends on: the kernel's description, with the row of the ISA
table, the versions of Python, Numba and llvmlite, and the content of every module that takes part. So a stale file is
never looked at. Files appear by an atomic rename, and begin with a checksum of the rest; where no folder can be
written, kernels are built anew in every process.
"""

import ctypes
import hashlib
import logging  # noqa: F401  # whose lock compilers take: a fork has to take it after the one here
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from sys import is_finalizing
from typing import TYPE_CHECKING, TypeAlias

from fastattn.machine import loading
from fastattn.machine.digest import of_modules, version
from fastattn.machine.kernel import Kernel
from fastattn.machine.os_threads import RLock, allocate_lock
from fastattn.machine.table import Isa

# The functions that a kernel exports, and how many integers each takes.
Exports: TypeAlias = Mapping[str, int]


class Library:
    """Compiled functions, as attributes that Python calls with integers, without the GIL.

    ``addresses`` has the address of each, for compiled code to call.
    """

    def __init__(self, code: bytes, row: Isa, exports: Exports):
        self.addresses, self._engine = loading.load(code, row, exports)
        for name, arguments in exports.items():
            signature = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)
            setattr(self, name, signature(self.addresses[name]))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., int]: ...


_loaded: dict[Kernel, Library] = {}
_lock = RLock()
# A fork waits for a compilation to end: a child could never finish it. What was registered last is taken first, so
# modules with such locks that compilers use have been imported above.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept: ``FASTATTN_CACHE_DIR``, or fastattn/ in the user's cache folder.

    None where that folder can neither be written nor has kernels in it: one filled beforehand may be read-only.
    """
    try:
        folder = _chosen_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(folder.glob("*.o")):
            tempfile.TemporaryFile(dir=folder).close()
        return folder
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None


def _chosen_folder() -> Path:
    named = os.environ.get("FASTATTN_CACHE_DIR")
    if named:
        folder = Path(named)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fastattn"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "fastattn"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn"
    return folder.absolute()  # the program may go elsewhere


_warned = allocate_lock()  # taken for good by the one warning of a process


def warn_not_kept() -> None:
    """Say, once in a process, that a kernel cannot be kept in the folder that the user has named.

    Nothing is said of a folder that nobody has asked for, nor of a read-only one in which every kernel is found.
    """
    named = os.environ.get("FASTATTN_CACHE_DIR")
    if named and _warned.acquire(blocking=False):
        warnings.warn(
            f"FASTATTN_CACHE_DIR={named!r} cannot be written: kernels are compiled anew in each process",
            RuntimeWarning,
            stacklevel=2,
        )


@cache
def _source_digest() -> bytes:
    call = (f"fastattn.call.{name}" for name in ("broadcasting", "halves", "rounding", "scores"))
    modules = of_modules("fastattn.machine", "fastattn.simd", "fastattn.functions", "fastattn.cpu.kernels", *call)
    versions = [version(name) for name in ("numba", "llvmlite")]
    identity = (versions, platform.python_version(), platform.machine(), sys.platform, object.__basicsize__)
    return hashlib.sha256(modules + repr(identity).encode()).digest()


def _path(kernel: Kernel) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    digest = hashlib.sha256(_source_digest() + repr(kernel).encode()).hexdigest()
    return folder / f"{kernel.label}-{digest[:32]}.o"


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == checksum else None


def _write(path: Path, code: bytes) -> bool:
    """Whether the file could be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(code).digest() + code)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError:  # a full or vanished disk: the kernel is in memory all the same
        return False
    return True


def library(kernel: Kernel, exports: Exports, compile: Callable[[Kernel, Exports], bytes]) -> Library:
    """A kernel's functions. `compile` makes its object code, where it is neither loaded nor on disk."""
    found = _loaded.get(kernel)
    if found is None:
        with _one_at_a_time():
            found = _loaded.get(kernel)
            if found is None:
                found = _loaded[kernel] = _load(kernel, exports, compile)
    return found


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Hold the lock. As the interpreter ends nobody else needs it, but a thread may have gone that held it."""
    held = _lock.acquire(blocking=not is_finalizing())
    try:
        yield
    finally:
        if held:
            _lock.release()


def _load(kernel: Kernel, exports: Exports, compile: Callable[[Kernel, Exports], bytes]) -> Library:
    try:
        return Library(_code(kernel, exports, compile), kernel.row, exports)
    except Exception as error:
        if not is_finalizing():
            raise
        raise RuntimeError(
            f"the kernel {kernel.label} has not been used before, and cannot be made while Python ends: "
            "a call to fastattn.warmup, earlier, makes all kernels"
        ) from error


def _code(kernel: Kernel, exports: Exports, compile: Callable[[Kernel, Exports], bytes]) -> bytes:
    path = _path(kernel)
    code = _read(path) if path else None
    if code is None:
        code = compile(kernel, exports)
        if path is None or not _write(path, code):
            warn_not_kept()
    return code
