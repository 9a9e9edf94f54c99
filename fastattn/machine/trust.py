"""Whose files are run: object code is read from what nobody else could have written.

Whoever writes a kernel's file decides what the processes do that load it. So its folder, and the file itself, belong to
the user whose process it is or to the system's (root), and neither the group nor others may write them. On Windows the
user's folders are closed to others by lists of their own, which are not looked at here.
"""

from __future__ import annotations

import os
import stat

__all__ = ["objection"]


def objection(status: os.stat_result) -> str:
    """Why what is in a file or a folder is not to be run, "" where nothing speaks against it."""
    if not hasattr(os, "geteuid"):
        return ""
    if status.st_uid not in (0, os.geteuid()):
        return "belongs to another user"
    if stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return ""
