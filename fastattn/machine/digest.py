"""What compiled code was made of: a hash of modules, wherever they lie, and the versions of packages.

A module is its source or, where there is none, its code: a tree of .pyc files, a zip file and a frozen application have
only that. Modules are found and read by the import system, which knows all of these places.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Iterator
from importlib.util import find_spec
from types import CodeType
from typing import Any

__all__ = ["of_modules", "version", "written"]

# What Python runs of a code object. Left out is what says where it was read, which differs from place to place.
_CODE = (
    "co_name",
    "co_flags",
    "co_argcount",
    "co_posonlyargcount",
    "co_kwonlyargcount",
    "co_varnames",
    "co_cellvars",
    "co_freevars",
    "co_names",
    "co_consts",
    "co_code",
    "co_exceptiontable",  # since Python 3.11
)


def of_modules(*names: str) -> bytes:
    """A hash of modules, of packages with all that is in them: the same wherever they lie, another after an edit.

    Examples
    --------
    >>> from fastattn.machine.digest import of_modules
    >>> of_modules("fastattn.simd") == of_modules("fastattn.simd", "fastattn.machine.table")
    False
    """
    digest = hashlib.sha256()
    for spec in (module for name in sorted(names) for module in _walk(find_spec(name))):
        digest.update(f"{spec.name}\0{_content(spec)}\0".encode())
    return digest.digest()


def _walk(spec: Any) -> Iterator[Any]:
    """The specification of a module and of all modules in it; none of them is imported."""
    yield spec
    places = spec.submodule_search_locations
    for module in sorted(pkgutil.iter_modules(places, f"{spec.name}."), key=lambda each: each.name) if places else ():
        finder: Any = module.module_finder
        yield from _walk(finder.find_spec(module.name))


def _content(spec: Any) -> str:
    """The source of a module, or its code in words."""
    source: str | None = spec.loader.get_source(spec.name)
    return written(spec.loader.get_code(spec.name)) if source is None else source


def written(value: Any) -> str:
    """A code object or one of its constants, written as it is in every process: `marshal` does not promise that."""
    if isinstance(value, CodeType):
        return written(tuple(getattr(value, name, None) for name in _CODE))
    if isinstance(value, tuple):
        return f"({','.join(map(written, value))})"
    if isinstance(value, frozenset):  # its order is that of hashes, which are other ones in each process
        return f"{{{','.join(sorted(map(written, value)))}}}"
    return repr(value)


def version(package: str) -> str:
    """The version of an installed package; a frozen application need not have brought its metadata."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module(package.replace("-", "_")).__version__)
