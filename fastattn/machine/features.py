"""What kind of processor this machine has, and what it can do: names of features as LLVM has them.

Of arm64 processors LLVM finds out little, and nothing on some systems. What every one of them has is known, and the
rest the operating system says.
"""

import ctypes
import platform
import sys
from functools import cache

from llvmlite import binding as llvm

_ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "arm64", "arm64": "arm64"}


def architecture(name: str) -> str:
    """The kind of processor that a system's name of one means, or an LLVM triple, which begins with such a name."""
    first = name.lower().partition("-")[0]
    return _ARCHITECTURES.get(first, first)


HOST = architecture(platform.machine())

# Linux: the word of flags that holds it (AT_HWCAP2 of <linux/auxvec.h>), and the flag (HWCAP2_BF16).
_LINUX_WORD, _LINUX_BF16 = 26, 1 << 14
# Linux on x86-64: the number of the system call, what is asked for, and of what (<asm/prctl.h>, XFEATURE_XTILE_DATA).
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILES = 158, 0x1023, 18
_MACOS_BF16 = b"hw.optional.arm.FEAT_BF16"

# LLVM's version from which on registers of x86 have bfloat16. Before, instructions take whole numbers for it.
_BFLOAT16_SINCE = (16,)


def known_features() -> dict[str, bool]:
    """The names of the CPU features that LLVM generates code for here, and whether it finds them on this machine.

    Raises
    ------
    RuntimeError
        If LLVM cannot tell on this platform.
    """
    found = dict(llvm.get_host_cpu_features())
    if llvm.llvm_version_info < _BFLOAT16_SINCE:
        found.pop("avx512bf16", None)
    return found


@cache
def host_features() -> frozenset[str]:
    """The names of the CPU features that are found on this machine."""
    try:
        found = {name for name, present in known_features().items() if present}
    except RuntimeError:  # LLVM cannot tell on this platform: only the baseline is safe
        found = set()
    if HOST == "arm64":
        found.add("neon")
        if _multiplies_bfloat16():
            found.add("bf16")
    return frozenset(found)


@cache
def may_use_matrix_unit() -> bool:
    """Ask Linux to let this process use the tiles of AMX, once for all of its threads; elsewhere there is no asking.

    It refuses where it is too old, or where a thread's stack for signals is too small for what it would save there.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return ctypes.CDLL(None).syscall(*map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILES))) == 0
    except (AttributeError, OSError):
        return False


def _multiplies_bfloat16() -> bool:
    """Whether an arm64 processor has the instructions on pairs of bfloat16, as its operating system says."""
    try:
        system = ctypes.CDLL(None)
        if sys.platform == "darwin":
            number, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
            failed = system.sysctlbyname(_MACOS_BF16, ctypes.byref(number), ctypes.byref(size), None, 0)
            return not failed and number.value != 0
        system.getauxval.restype, system.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        return bool(system.getauxval(_LINUX_WORD) & _LINUX_BF16)
    except (AttributeError, OSError, TypeError):  # another system: there is no such function, or no library to ask
        return False
