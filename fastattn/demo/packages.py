"""Files of installed packages, which are read and never imported: that would want what the demos do without."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

__all__ = ["file_of"]


def file_of(package: str, name: str) -> Path | None:
    """The path of a file in an installed package; None if there is no such package."""
    spec = importlib.util.find_spec(package)
    places: Iterable[str] = (spec and spec.submodule_search_locations) or ()
    return next((Path(place) / name for place in places), None)
