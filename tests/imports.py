"""Which modules of the package a module imports: what takes part where it is compiled."""

from __future__ import annotations

import ast
from pathlib import Path

import processes


def imported_by(module: str, found: dict[str, Path]) -> dict[str, Path]:
    """Add the package's modules that a module imports, and that those do, to `found`, with their files."""
    place = Path(*module.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        source = processes.PACKAGE.parent / path
        if module in ("fastattn", *found) or not source.exists():
            continue
        found[module] = path
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastattn"):
                imported_by(node.module, found)
                for alias in node.names:
                    imported_by(f"{node.module}.{alias.name}", found)
    return found
