"""Files that are broken, for all that reads files: `make fuzz ARGS=readers`, or `ARGS="readers gguf"`.

What is read is what a file says, or there is an error that says what is wrong with it: never another one, nor seconds,
nor memory that the size of the file does not explain. Files are whole ones with some bytes changed. Where atheris is
installed (`pip install atheris`, for Linux), it finds out which changes lead to other lines of the readers.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gguf_files
import numpy as np

import fastattn
from fastattn.console.terminal import UserError
from fastattn.demo.chat.gguf import GGUF
from fastattn.demo.chat.model import SmolLM2
from fastattn.demo.listen.ctranslate2 import read_variables
from fastattn.demo.listen.sound import read_wav
from fastattn.kv_cache import files
from fastattn.machine import libraries

SECONDS, MEMORY, TIMES = 10.0, 64 << 20, 100  # what a reader may take at most: so much, and so many bytes for each byte
#: What a file may say that its reader does not expect.
ODD = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


class Reader(NamedTuple):
    """What reads files of some kind: whole ones, the function, and whether its errors name the file."""

    whole: Callable[[Path], list[Path]]
    read: Callable[[Path], object]
    names: bool


def caches(folder: Path) -> list[Path]:
    """Write caches of keys and values."""
    rng = np.random.default_rng(0)
    paths = []
    for dtype in ("float32", "int8"):
        cache = fastattn.KVCache(2, 1, 3, 2, dtype=dtype, window=(4, 0))
        key, value = (rng.standard_normal((2, 1, 5, size), np.float32) for size in (3, 2))
        cache.append(key, value, [5, 2])
        paths.append(folder / dtype)
        cache.save(paths[-1])
    return paths


def layers(folder: Path) -> list[Path]:
    """Write layers."""
    paths = [folder / "heads"]
    fastattn.MultiHeadAttention(8, 2, rng=0).save(paths[0])
    return paths


def models(folder: Path) -> list[Path]:
    """Write a language model."""
    return [gguf_files.small_model(folder / "model", layers=1)]


def sounds(folder: Path) -> list[Path]:
    """Write wav files."""
    paths = []
    for code, bits, channels, rate in ((1, 16, 1, 44100), (3, 32, 2, 16000), (1, 8, 1, 8000), (1, 24, 2, 48000)):
        frame = channels * bits // 8
        data = bytes(range(1, 1 + 6 * frame))
        header = struct.pack("<HHIIHH", code, channels, rate, rate * frame, frame, bits)
        parts = b"WAVEfmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(data)) + data
        paths.append(folder / f"{code}.{bits}.wav")
        paths[-1].write_bytes(b"RIFF" + struct.pack("<I", len(parts)) + parts)
    return paths


def variables(folder: Path) -> list[Path]:
    """Write variables as CTranslate2 has them."""

    def text(word: bytes) -> bytes:
        return struct.pack("<H", len(word) + 1) + word + b"\0"

    body = struct.pack("<I", 6) + text(b"WhisperSpec") + struct.pack("<II", 3, 2)
    for name, array in ((b"a", np.ones((2, 3), "<f4")), (b"b", np.ones(4, "<i1"))):
        axes = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        body += text(name) + axes + struct.pack("<BI", 0 if name == b"a" else 1, array.nbytes) + array.tobytes()
    path = folder / "model.bin"
    path.write_bytes(body + struct.pack("<I", 1) + text(b"c") + text(b"a"))
    return [path]


def kernels(folder: Path) -> list[Path]:
    """Write what the cache of kernels has on disk."""
    path = folder / "kernel.o"
    assert libraries._write(path, b"\x7fELF" + bytes(range(64)))
    return [path]


def kernel(path: Path) -> None:
    """Read a kernel from the cache, which is compiled anew where the file has not its own digest."""
    if libraries._read(path) is None:
        raise ValueError("another digest")


def all_tensors(path: Path) -> None:
    """Read all of a GGUF file, and the model in it, if there is one."""
    file = GGUF(path)
    for name in file._tensors:
        file.tensor(name)


READERS = {
    "cache": Reader(caches, fastattn.KVCache.load, True),
    "safetensors": Reader(caches, files.read, True),
    "layer": Reader(layers, fastattn.MultiHeadAttention.load, True),
    "gguf": Reader(models, all_tensors, False),
    "model": Reader(models, SmolLM2.load, True),
    "wav": Reader(sounds, lambda path: read_wav(path.read_bytes()), False),
    "ctranslate2": Reader(variables, lambda path: read_variables(path.read_bytes()), False),
    "kernel": Reader(kernels, kernel, False),
}


#: The modules that read.
OF_READERS = [
    "fastattn.api.cache",
    "fastattn.kv_cache.files",
    "fastattn.kv_cache.stored",
    "fastattn.layers.base",
    "fastattn.machine.libraries",
    "fastattn.demo.chat.gguf",
    "fastattn.demo.chat.model",
    "fastattn.demo.chat.tokenizer",
    "fastattn.demo.listen.ctranslate2",
    "fastattn.demo.listen.sound",
]


def changed(rng: random.Random, data: bytes) -> bytes:
    """Return a file that is broken somewhere: a byte, a number, a piece that is missing or there twice."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1) if rng.random() < 0.3 else rng.randrange(min(len(found), 400) + 1)
        kind = rng.randrange(7)
        if kind == 0:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            size = rng.choice((1, 2, 4, 8))
            found[at : at + size] = (rng.choice(ODD) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif kind == 2:
            del found[at : rng.choice((at + 1, at + 4, at + 8, at + 40, len(found)))]
        elif kind == 3:
            end = at + rng.choice((1, 4, 12, 100))
            found[at:at] = found[at:end] * rng.choice((1, 2, 300))
        elif kind == 4:
            found[at:at] = rng.randbytes(rng.choice((1, 3, 8)))
        elif kind == 5:  # numbers in the JSON of a header
            digits = [i for i in range(min(len(found), 2000)) if found[i] in b"0123456789"]
            if digits:
                at = rng.choice(digits)
                found[at : at + 1] = rng.choice(
                    (b"-1", b"1e9", b"99999999999999999999", b"null", b'"a"', b"[]", b"0.5", b"0")
                )
        else:
            found[at : at + 1] = bytes([found[at % len(found)] ^ 1 << rng.randrange(8)]) if found else b""
    return bytes(found)


def check(reader: Reader, path: Path) -> bool:
    """Read a file, and say whether it could be: else what was wrong with it has to be said, in time and in memory."""
    size, begin, said = path.stat().st_size, time.monotonic(), ""
    tracemalloc.start()
    try:
        reader.read(path)
    except (ValueError, OSError, UserError) as error:
        said = str(error) or "nothing"
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert not said or (str(path) in said if reader.names else said != "nothing"), f"the file is not named: {said}"
    assert time.monotonic() - begin < SECONDS, f"{time.monotonic() - begin:.0f} s for {size} bytes"
    assert most < MEMORY + TIMES * size, f"{most >> 20} MiB for {size} bytes"
    return not said


def tried(name: str, seed: int, folder: Path) -> bool:
    """Check what a reader makes of the file of a seed, 0 of a whole one."""
    reader, rng = READERS[name], random.Random(seed)
    data = rng.choice(reader.whole(folder)).read_bytes()
    path = folder / "broken"
    path.write_bytes(changed(rng, data) if seed else data)
    return check(reader, path)


def guided(name: str, options: list[str]) -> None:
    """Have atheris choose what is changed."""
    import atheris

    folder = Path(tempfile.mkdtemp())
    corpus = folder / "corpus"
    corpus.mkdir()
    for path in READERS[name].whole(folder):
        (corpus / path.name).write_bytes(path.read_bytes())
    for module in OF_READERS:
        for each in vars(sys.modules[module]).values():
            if getattr(each, "__module__", None) == module:
                for function in vars(each).values() if isinstance(each, type) else [each]:
                    if hasattr(function, "__code__"):
                        atheris.instrument_func(function)
    path = folder / "broken"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        check(READERS[name], path)

    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="make fuzz ARGS=readers", description=__doc__)
    parser.add_argument("readers", nargs="*", help=f"some of {', '.join(READERS)}; all, unless given")
    parser.add_argument("--files", type=int, default=1000, help="how many, of each kind")
    parser.add_argument("--seed", type=int, help="one alone")
    parser.add_argument(
        "--guided", action="store_true", help="by atheris, of one reader; what follows -- is libFuzzer's"
    )
    given, options = parser.parse_known_args(arguments)
    warnings.simplefilter("error")
    names = given.readers or list(READERS)
    if given.guided:
        guided(names[0], [option for option in options if option != "--"])
        return 0
    failures = 0
    for name in names:
        read = 0
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(given.files) if given.seed is None else [given.seed]:
                try:
                    read += tried(name, seed, Path(folder))
                except Exception as error:
                    failures += 1
                    print(f"{name}, seed {seed}: {type(error).__name__}: {error}", flush=True)
                    if given.seed is not None:
                        raise
        print(json.dumps({"reader": name, "files": given.files, "read": read, "failures": failures}), flush=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
