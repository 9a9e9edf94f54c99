"""What PyInstaller has to be told of this package, to put all of it into a frozen application.

It asks for this folder, by the entry point in pyproject.toml, and runs each hook-*.py of it where the module of that
name takes part.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["hook_folders"]


def hook_folders() -> list[str]:
    """Where the hooks lie."""
    return [str(Path(__file__).parent)]
