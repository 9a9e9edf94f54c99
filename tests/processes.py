"""Python processes of their own, for tests of what a whole process does."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fastattn

PACKAGE = Path(fastattn.__file__).parent
TESTS = Path(__file__).parent


def environment(root: Path = PACKAGE.parent, **changes: str | None) -> dict[str, str]:
    """Return this process's environment with the package in `root`, and `changes`; None removes a variable."""
    merged: dict[str, str | None] = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(TESTS))), **changes}
    return {name: text for name, text in merged.items() if text is not None}


def start(code: str, root: Path = PACKAGE.parent, **changes: str | None) -> subprocess.Popen[str]:
    """Start Python on some code."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root if root.is_dir() else root.parent,  # where -c looks first; a zip file is no folder
        env=environment(root, **changes),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> str:
    """Return what a process prints, if it ends well and says nothing on stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, f"status {process.returncode}\n{out}\n{err}"
    assert err == ""
    return out


def run(code: str, root: Path = PACKAGE.parent, timeout: float = 120, **changes: str | None) -> str:
    """Run some Python code in a new process and return what it prints."""
    return finish(start(code, root, **changes), timeout)


def compiled(package: Path, place: Path, optimize: int = 0) -> Path:
    """Return a folder with a package compiled to .pyc files, and no sources."""
    copy = shutil.copytree(package, place / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(copy, quiet=1, legacy=True, optimize=optimize)
    for path in copy.rglob("*.py"):
        path.unlink()
    return place
