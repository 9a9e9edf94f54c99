"""Whose files are run: object code is read from what nobody else could have written.

Whoever writes a kernel's file decides what the processes do that load it. So its folder, and the file itself, belong to
the user whose process it is or to the system's (root), and neither the group nor others may write them. On Windows the
user's folders are closed to others by lists of their own, which are not looked at here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["made", "objection"]


def made(folder: Path) -> bool:
    """Make a folder for the user alone, if it is not there; whether what is in it may be run.

    Raises
    ------
    OSError
        If it is not there, and cannot be made.
    """
    for each in (*reversed(folder.parents), folder):
        each.mkdir(mode=0o700, exist_ok=True)
    return not objection(folder.stat())


def objection(status: os.stat_result) -> str:
    """Why what is in a file or a folder is not to be run, "" where nothing speaks against it."""
    if not hasattr(os, "geteuid"):
        return ""
    if status.st_uid not in (0, os.geteuid()):
        return "belongs to another user"
    if stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return ""
