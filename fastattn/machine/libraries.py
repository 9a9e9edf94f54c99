"""Compiled kernels, on demand: found in memory, among those that came with the package, in the cache on disk, or built.

A kernel's file is named by a hash of everything its code depends on: the kernel's description, with the row of the ISA
table, the content of every module that takes part and, in the cache, the versions of Python, Numba and llvmlite. So a
stale file is never looked at. Files of the cache appear by an atomic rename, and begin with a checksum of the rest;
where no folder can be written, kernels are built anew in every process.
"""

import ctypes
import hashlib
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from sys import is_finalizing
from typing import TYPE_CHECKING, TypeAlias

from fastattn.machine import loading, prebuilt
from fastattn.machine.digest import of_modules, version
from fastattn.machine.kernel import Kernel
from fastattn.machine.os_threads import allocate_lock
from fastattn.machine.table import Isa
from fastattn.machine.trust import made, objection
from fastattn.machine.uninterrupted import uninterrupted

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


@cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept: ``FASTATTN_CACHE_DIR``, or fastattn/ in the user's cache folder.

    None where that folder can neither be written nor has kernels in it: one filled beforehand may be read-only. None
    as well where others than the user and the system may write it: kernels are run.
    """
    try:
        folder = _chosen_folder()
        if not made(folder):
            return None
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


def why_not_kept() -> str:
    """What is wrong with the folder in which kernels cannot be kept, as the end of a sentence."""
    try:
        found = objection(_chosen_folder().stat())
    except (OSError, RuntimeError):
        found = ""
    return f"{found}, and kernels are run" if found else "cannot be written"


def warn_not_kept() -> None:
    """Say, once in a process, that a kernel cannot be kept in the folder that the user has named.

    Nothing is said of a folder that nobody has asked for, nor of a read-only one in which every kernel is found.
    """
    named = os.environ.get("FASTATTN_CACHE_DIR")
    if named and _warned.acquire(blocking=False):
        warnings.warn(
            f"FASTATTN_CACHE_DIR={named!r} {why_not_kept()}: kernels are compiled anew in each process",
            RuntimeWarning,
            stacklevel=2,
        )


@cache
def _modules_digest() -> bytes:
    call = (f"fastattn.call.{name}" for name in ("broadcasting", "halves", "rounding", "scores"))
    return of_modules("fastattn.machine", "fastattn.simd", "fastattn.functions", "fastattn.cpu.kernels", *call)


def _interface() -> tuple[object, ...]:
    """What compiled code knows of where it runs: how functions are called, and where Python's objects begin."""
    return platform.machine(), sys.platform, object.__basicsize__


@cache
def _source_digest() -> bytes:
    versions = [version(name) for name in ("numba", "llvmlite")]
    identity = (versions, platform.python_version(), *_interface())
    return hashlib.sha256(_modules_digest() + repr(identity).encode()).digest()


def _name(kernel: Kernel, made_of: bytes) -> str:
    digest = hashlib.sha256(made_of + repr(kernel).encode()).hexdigest()
    return f"{kernel.label}-{digest[:32]}.o"


def prebuilt_name(kernel: Kernel) -> str:
    """The file of a kernel that comes with the package: whatever has compiled it, it runs on any Python and NumPy."""
    return f"{kernel.row.name}/{_name(kernel, _modules_digest() + repr(_interface()).encode())}"


def _path(kernel: Kernel) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / _name(kernel, _source_digest())


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            if objection(os.fstat(file.fileno())):  # of the file that is open, whatever has its name by now
                return None
            content = file.read()
    except OSError:
        return None
    checksum, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == checksum else None


def _write(path: Path, code: bytes) -> bool:
    """Whether the file is there now."""
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
        return _read(path) is not None  # on Windows, a file that another process has just made and reads stays as it is
    return True


def library(kernel: Kernel, exports: Exports, compile: Callable[[Kernel, Exports], bytes]) -> Library:
    """A kernel's functions. `compile` makes its object code, where it is neither loaded nor in a file."""
    found = _loaded.get(kernel)
    return uninterrupted(kernel, lambda: _made(kernel, exports, compile)) if found is None else found


def _made(kernel: Kernel, exports: Exports, compile: Callable[[Kernel, Exports], bytes]) -> Library:
    """The same for one that was not in memory a moment ago."""
    found = _loaded.get(kernel)
    if found is None:
        found = _loaded[kernel] = _load(kernel, exports, compile)
    return found


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
    code = prebuilt.object_code(prebuilt_name(kernel))
    if code is not None:
        return code
    path = _path(kernel)
    code = _read(path) if path else None
    if code is None:
        code = compile(kernel, exports)
        if path is None or not _write(path, code):
            warn_not_kept()
    return code
