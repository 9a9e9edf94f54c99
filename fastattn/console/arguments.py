"""The arguments of the command line: what is wrong with one is said in one line, before a command does anything."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

from fastattn.console.terminal import UserError, printable

__all__ = ["Parser", "folder_to_write", "next_command", "number", "output_file", "program", "real"]

Number = TypeVar("Number", int, float)


def program() -> str:
    """What the user has typed to get here: the command ``fastattn``, or else ``python -m fastattn``."""
    return "fastattn" if Path(sys.argv[0]).stem == "fastattn" else "python -m fastattn"


def next_command() -> str:
    """What the user can type to get here again: `program`, by the path of an environment that is not activated.

    make starts such a Python, and the shell's own would find neither NumPy nor fastattn.
    """
    activated = sys.prefix in (sys.base_prefix, os.environ.get("VIRTUAL_ENV"))
    if activated or Path(sys.argv[0]).name != "__main__.py":  # a notebook has been started by something else
        return program()
    path = Path(sys.executable)
    with suppress(ValueError):
        path = path.relative_to(Path.cwd())
    return f'"{path}" -m fastattn' if " " in str(path) else f"{path} -m fastattn"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def number(name: str, least: int = 0, most: float = math.inf) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`, of which there is perhaps none.

    Examples
    --------
    >>> number("layer", 0, 5)("3")
    3
    """
    return _bounded(int, name, least, most)


def real(name: str, least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number from `least` to `most`, of which there is perhaps none.

    Examples
    --------
    >>> real("probability", 0.0, 1.0)("0.9")
    0.9
    """
    return _bounded(float, name, least, most)


def _bounded(kind: Callable[[str], Number], name: str, least: float, most: float) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value: Number | None = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most or value == math.inf:
            allowed = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name} {allowed}")
        return value

    return parse


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """An argparse type: the path of a file that can be written, with one of some suffixes if there are any.

    An existing file is left as it is, until it is written.
    """

    def parse(text: str) -> Path:
        path = Path(text)
        if suffixes and path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{printable(text)!r} does not end in {' or '.join(suffixes)}")
        try:
            if not path.absolute().parent.is_dir():
                raise argparse.ArgumentTypeError(f"{printable(str(path.absolute().parent))} is not a folder")
            if path.is_file():
                open(path, "ab").close()
            elif path.is_dir():
                raise argparse.ArgumentTypeError(f"{printable(text)} is a folder")
            elif not path.exists():  # what is none of these, such as a pipe, may be opened only once
                open(path, "xb").close()
                path.unlink()
        except OSError as error:
            raise argparse.ArgumentTypeError(f"cannot write {printable(text)}: {error.strerror}") from error
        return path

    return parse


def folder_to_write(option: str, path: Path) -> None:
    """Make a folder, if it is not there, and refuse one in which no file can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: cannot make the folder {printable(str(path))}: {error.strerror}") from error
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{option}: cannot write to the folder {printable(str(path))}: {error.strerror}") from error
