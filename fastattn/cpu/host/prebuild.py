"""Kernels for a wheel, compiled ahead of all calls: ``python -m fastattn.cpu.host.prebuild FOLDER`` writes them.

They are those of all rows of the table of machines that are of this machine's architecture, whether it executes them or
not, but for rows that have to be named. `fastattn.machine.prebuilt` finds them where the wheel was installed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from fastattn.console.terminal import Progress
from fastattn.cpu.host.kernels import FUNCTION, STEPS, compile_kernel, describe, every_kernel
from fastattn.cpu.host.threads import get_num_threads
from fastattn.cpu.kernels.exports import EXPORTS
from fastattn.machine.kernel import PLAIN, Kernel
from fastattn.machine.libraries import prebuilt_name
from fastattn.machine.prebuilt import SUMS, written_sums
from fastattn.machine.table import TABLE, Isa, of_this_architecture

__all__ = ["compiled", "compiled_as", "of_a_wheel", "write"]

DTYPES = ("float32", "float64", "float16", "bfloat16")
#: The dtypes of queries and of keys in pages: what a `KVCache` is asked for most.
IN_PAGES = (
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("float32", "int8"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
)


#: A row like another that multiplies no bfloat16.
PLAIN_PRODUCTS: dict[str, Any] = {"pairs": False, "matrix": False, "only_named": False}


def of_a_wheel(row: Isa) -> Iterator[Kernel]:
    """The kernels for a row of the table that a wheel has: those of `warmup`, for functions, and of caches."""
    yield from every_kernel(row, DTYPES)
    for dtype in DTYPES:
        yield from _for_functions(row, dtype)
    yield Kernel("longest", row)
    for queries, pages in IN_PAGES:
        kept: dict[str, Any] = {"storage": pages, "values": pages, "queries": queries, "pages": pages}
        yield describe("decode", row.wide_tile("float32"), row, steps=PLAIN, **kept)
        for tile in (row.tile("float32"), row.tall_tile("float32")):
            yield describe("forward", tile, row, steps=PLAIN, **kept)
        if queries != pages:
            yield Kernel("convert", row, row.wide_tile("float32"), storage=queries, queries=pages)


def _for_functions(row: Isa, storage: str) -> Iterator[Kernel]:
    """Those that give scores to functions of the user's, of which each is then compiled by itself."""
    real = "float64" if storage == "float64" else "float32"
    for tile in (row.tile(real), row.tall_tile(real)):
        yield describe("forward", tile, row, steps=FUNCTION, storage=storage)
    yield describe("decode", row.wide_tile(real), row, steps=(*STEPS, "softcap", *FUNCTION), storage=storage)
    yield describe("backward", row.tile(real), row, steps=FUNCTION, storage=storage)


def write(folder: Path, codes: Mapping[Kernel, bytes]) -> None:
    """Write the object code of kernels into a folder, where they will be looked for, and the digests of all."""
    files = {prebuilt_name(kernel): code for kernel, code in codes.items()}
    for name, code in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(code)
    (folder / SUMS).write_text(written_sums(files), newline="\n")


def compiled(kernel: Kernel) -> bytes:
    """The object code of a kernel: the same bytes wherever these sources are compiled by the same Numba and Python."""
    return compile_kernel(kernel, EXPORTS[kernel.work])


def compiled_as(kernel: Kernel) -> Kernel:
    """The kernel whose object code this one has: where it multiplies no bfloat16, that of a row that does not."""
    for row in TABLE:
        plain = replace(kernel.row, name=row.name, needs=row.needs, features=(), processors=(), **PLAIN_PRODUCTS)
        if not kernel.of_bfloat16 and plain == row:
            return replace(kernel, row=row)
    return kernel


def main() -> None:
    """Write all that a wheel has into the folder of the command line, compiled by a process on each CPU."""
    import multiprocessing  # what `python -m fastattn` asks of this module wants neither
    from concurrent.futures import ProcessPoolExecutor

    (folder,) = map(Path, sys.argv[1:])
    start = time.perf_counter()
    kernels = list(chain.from_iterable(map(of_a_wheel, (row for row in of_this_architecture() if not row.only_named))))
    distinct = list(dict.fromkeys(map(compiled_as, kernels)))
    codes: dict[Kernel, bytes] = {}
    with (
        Progress("compiling") as progress,
        ProcessPoolExecutor(get_num_threads(), multiprocessing.get_context("spawn")) as processes,
    ):
        for kernel, code in zip(distinct, processes.map(compiled, distinct), strict=True):
            codes[kernel] = code
            progress(len(codes), len(distinct), kernel.label)
    written = {kernel: codes[compiled_as(kernel)] for kernel in kernels}
    write(folder, written)
    size = sum(map(len, written.values())) / 1e6
    print(f"{len(written)} kernels, {size:.1f} MB, compiled in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
