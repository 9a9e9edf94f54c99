"""Kernels that came with the package: a wheel for a platform has the object code of most, compiled when it was built.

It lies in ``fastattn/prebuilt``, in a folder for each row of the table of machines. ``SHA256SUMS`` there says what each
file holds, as the command sha256sum does: a file that is not listed is not looked at, and one that holds something else
is not run. Clones, and the wheel for all platforms, have none of this; their kernels are compiled.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "SUMS", "intact", "object_code", "sums", "written_sums"]

FOLDER = Path(__file__).parents[1] / "prebuilt"
SUMS = "SHA256SUMS"
BETWEEN = "  "  # a digest and the name of its file


def _content(name: str) -> bytes | None:
    """What is in a file, read by what has loaded the package: it may lie in a zip file."""
    loader: Any = __spec__.loader
    try:
        content: bytes = loader.get_data(str(FOLDER / name))
    except OSError:
        return None
    return content


@cache
def sums() -> dict[str, str]:
    """The digest of each file, by its name."""
    lines = (_content(SUMS) or b"").decode("ascii", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition(BETWEEN) for line in lines)}


def written_sums(codes: Mapping[str, bytes]) -> str:
    """The content of ``SHA256SUMS`` for object code, by the names of its files."""
    return "".join(f"{hashlib.sha256(code).hexdigest()}{BETWEEN}{name}\n" for name, code in sorted(codes.items()))


def intact(name: str) -> bytes | None:
    """A kernel that came with the package and is as it came, or None."""
    digest = sums().get(name)
    code = None if digest is None else _content(name)
    return None if code is None or hashlib.sha256(code).hexdigest() != digest else code


def object_code(name: str) -> bytes | None:
    """The same for a kernel that is wanted: of one that is not as it came there is a warning."""
    code = intact(name)
    if code is None and name in sums():
        warnings.warn(
            f"{FOLDER / name} is missing, or not the file that was installed: the kernel is compiled instead. "
            "To install fastattn again brings it back",
            RuntimeWarning,
            stacklevel=2,
        )
    return code
