"""Compile the CUDA kernels, without a GPU, and write what the assembler says of them to docs/cuda-kernels.md.

Run it as ``python benchmarks/cuda_kernels.py``. It needs numba-cuda, and ptxas and nvdisasm of the packages
nvidia-cuda-nvcc and nvidia-cuda-nvdisasm, or of an installed CUDA. Nothing here is measured: registers, shared memory
and instructions are facts about machine code, from which follows how many blocks of threads a multiprocessor can have
at a time, and nothing about time.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastattn.call.problem import Problem
from fastattn.call.scores import Scores

ROOT = Path(__file__).parents[1]

#: Architectures, and the compute capability that Numba makes PTX of for them.
ARCHITECTURES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_90a": (9, 0), "sm_100": (10, 0)}

# What a multiprocessor has, from the CUDA C++ Programming Guide, "Compute Capabilities".
REGISTERS, REGISTER_UNIT, WARPS, BLOCKS = 65536, 256, 64, 32
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_90a": 228 << 10, "sm_100": 228 << 10}
SHARED_OF_SYSTEM, SHARED_UNIT = 1 << 10, 128  # of each block
SCHEDULERS = 4  # among which the warps of a multiprocessor, and its registers, are divided


class Kernel(NamedTuple):
    """A kernel to compile.

    Attributes
    ----------
    name : str
    factory, spec : object
        As `fastattn.cuda.host.compile.kernel` takes them.
    options : dict
        Of `cuda.jit`.
    threads : int
        Of a block.
    blocks : int
        That are meant to be on a multiprocessor at a time.
    """

    name: str
    factory: Any
    spec: Any
    options: dict[str, Any]
    threads: int
    blocks: int


class Report(NamedTuple):
    """What the assembler and the disassembler say of a kernel.

    Attributes
    ----------
    registers : int
        Of a thread.
    shared : int
        Bytes of a block.
    spilled, stack : int
        Bytes of registers that are stored and loaded again, and of local memory.
    multiplications, instructions : int
        Of tensor cores, and of all kinds, in the innermost loop that has most of the former.
    resident : int
        Blocks that a multiprocessor can have at a time.
    """

    registers: int
    shared: int
    spilled: int
    stack: int
    multiplications: int
    instructions: int
    resident: int


def kernels() -> dict[str, Kernel]:
    """All kernels that are looked at, by name."""
    found = [*on_tensor_cores(), *for_few_queries(), *portable_ones(), *with_functions()]
    return {kernel.name: kernel for kernel in found}


def on_tensor_cores() -> Iterator[Kernel]:
    """The kernels of halves, forward and backward."""
    from fastattn.cuda.host import tensor_cores as host
    from fastattn.cuda.host import tensor_cores_backward as host_backward
    from fastattn.cuda.kernels import tensor_cores
    from fastattn.cuda.kernels import tensor_cores_backward as backward

    kinds = (("bfloat16", "none"), ("float16", "none"), ("bfloat16", "bool"), ("bfloat16", "float32"))
    for (storage, mask), width in itertools.product(kinds, (64, 128)):
        kind = f"{storage}, {width}" if mask == "none" else f"{storage}, {width}, mask {mask}"
        shape = host.shape_for(storage, mask, width)
        options = host.options(shape)
        name = f"tensor cores, {kind}"
        yield Kernel(name, tensor_cores.forward, shape, options, shape.threads, shape.blocks)
        for of_keys in (False, True):
            spec = host_backward.spec_for(storage, mask, width, of_keys)
            options, shape = host_backward.options(spec), spec.shape
            name = f"tensor cores, gradients of {'keys, values' if of_keys else 'queries'}, {kind}"
            yield Kernel(name, backward.gradients, spec, options, shape.threads, shape.blocks)
        spec = host_backward.spec_for(storage, mask, width, of_keys=False)
        options, shape = host_backward.options(spec), spec.shape
        yield Kernel(f"tensor cores, shifts, {kind}", backward.find_shifts, spec, options, shape.threads, shape.blocks)


def for_few_queries() -> Iterator[Kernel]:
    """The kernels that share the keys of few queries among blocks."""
    from fastattn.cuda.host.decode import decode_for
    from fastattn.cuda.kernels import decode

    for storage, rows, features in (("bfloat16", 1, 128), ("bfloat16", 8, 128), ("float32", 1, 64)):
        spec = decode_for(storage, "none", False, True, rows, 16384, features)
        if spec is not None:
            kind = f"{storage}, {features}, {rows} rows" if rows > 1 else f"{storage}, {features}, 1 row"
            yield Kernel(f"few queries, {kind}", decode.split_keys, spec, {}, spec.threads, 1)
            yield Kernel(f"few queries, merge, {kind}", decode.merge_splits, spec, {}, spec.threads, 1)


def portable_ones() -> Iterator[Kernel]:
    """The kernels of any storage type for any GPU."""
    from fastattn.cuda.host import backward, choice
    from fastattn.cuda.kernels import portable, portable_backward
    from fastattn.cuda.kernels.backward_tiles import Backward

    for storage, width in (("float32", 64), ("float32", 128), ("bfloat16", 64), ("float64", 64)):
        real = np.dtype(np.float64 if storage == "float64" else np.float32)
        problem = Problem(real, real, (), 1, 1, 9, 9, width, width, (1, 9, width), 0.0, Scores())
        tiles = choice.tiles_for(storage, problem)
        both: Any = ((portable.forward, portable.Forward), (portable.weights, portable.Weights))
        for factory, kind in both:
            spec: Any = kind(storage, "none", False, tiles)
            name = f"portable {factory.__name__}, {storage}, {width}"
            yield Kernel(name, factory, spec, {}, tiles.threads, 1)
        shifts = choice.choose_shifts(storage, "none", problem, base_2=False).spec
        yield Kernel(f"portable shifts, {storage}, {width}", portable.find_shifts, shifts, {}, tiles.threads, 1)
        tiling = backward.tiling_for(storage, problem)
        spec = Backward(storage, "none", False, tiling)
        for what, factory in (
            ("gradients of keys, values", portable_backward.grad_keys),
            ("gradients of queries", portable_backward.grad_queries),
        ):
            yield Kernel(f"portable {what}, {storage}, {width}", factory, spec, {}, tiling.threads, 1)


def with_functions() -> Iterator[Kernel]:
    """The portable kernels with functions of the user's: a bias by distance from a table, and documents."""
    from fastattn.cuda.host import backward, choice
    from fastattn.cuda.host import functions as host_functions
    from fastattn.cuda.kernels import kinds, portable, portable_backward
    from fastattn.cuda.kernels.backward_tiles import Backward
    from fastattn.functions.function import described

    table, documents, real = np.zeros((8, 127), np.float32), np.zeros(64, np.int32), np.dtype(np.float32)

    def relative(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[head, query - key]

    def same(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return documents[query] == documents[key]

    for name, function in (("score_mod", relative), ("mask_mod", same)):
        functions: Any = {name: described(name, function)[0]}
        problem = Problem(real, real, (), 1, 1, 9, 9, 64, 64, (1, 9, 64), 0.0, Scores(**functions))
        tiles, kind = choice.tiles_for("float32", problem), choice.kind_of(problem)
        tiling = backward.tiling_for("float32", problem)
        spec: Any = portable.Forward("float32", "none", False, tiles, **kind)
        yield Kernel(f"portable forward, float32, 64, {name}", portable.forward, spec, {}, tiles.threads, 1)
        spec = Backward("float32", "none", False, tiling, **kind)
        for what, factory in (
            ("gradients of keys, values", portable_backward.grad_keys),
            ("gradients of queries", portable_backward.grad_queries),
        ):
            yield Kernel(f"portable {what}, float32, 64, {name}", factory, spec, {}, tiling.threads, 1)
        if name == "score_mod":
            what, spec = "gradient of a captured array", backward.differentiating(spec, (0, 0))
            yield Kernel(f"portable {what}, float32, 64", portable_backward.captured_parts, spec, {}, tiling.threads, 1)
        else:
            spec = kinds.Looking(functions[name], "float32", host_functions.THREADS)
            yield Kernel("portable, kinds of blocks", kinds.find_kinds, spec, {}, spec.threads, 1)


# -- tools -------------------------------------------------------------------------------------------------------------


def tool(name: str) -> str | None:
    """The path of a tool of CUDA: of NVIDIA's packages, or of an installed CUDA; None if there is none."""
    found = find_spec("nvidia")
    for folder in [] if found is None else found.submodule_search_locations or ():
        for path in sorted(Path(folder).glob(f"cu*/bin/{name}*")):
            return str(path)
    return shutil.which(name)


def compile_here(names: Sequence[str], capability: tuple[int, int]) -> dict[str, Any]:
    """The PTX of kernels, and what of them is needed besides; a process compiles for one capability."""
    sys.path.append(str(ROOT / "tests"))
    ptx = importlib.import_module("cuda_ptx").ptx
    made = {}
    for name, kernel in kernels().items():
        if name in names or not names:
            text = ptx(kernel.factory, kernel.spec, capability, **kernel.options)
            made[name] = {"ptx": text, "threads": kernel.threads, "blocks": kernel.blocks}
    return made


def compile_apart(names: Sequence[str], capability: tuple[int, int]) -> dict[str, Any]:
    """The same in a process of its own, where Numba compiles whatever it does in this one."""
    command = [sys.executable, __file__, "--ptx", json.dumps(capability), *(f"--kernel={name}" for name in names)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"no kernels for compute capability {capability}: {done.stderr}")
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def inspect(text: str, architecture: str, threads: int) -> Report:
    """Assemble PTX, and read what the tools say."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        command = [str(tool("ptxas")), f"-arch={architecture}", "-v", str(source), "-o", str(binary)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        code = subprocess.run([str(tool("nvdisasm")), "-c", str(binary)], capture_output=True, text=True, check=True)
    stack, stores, loads = (int(x) for x in _figures(r"(\d+) bytes stack frame, (\d+) .*, (\d+) bytes spill", said))
    (registers,) = (int(x) for x in _figures(r"Used (\d+) registers", said))
    shared = re.search(r"(\d+) bytes smem", said)
    size = int(shared[1]) if shared else 0
    multiplications, instructions = busiest_loop(code.stdout)
    resident = residents(architecture, registers, size, threads)
    return Report(registers, size, stores + loads, stack, multiplications, instructions, resident)


def _figures(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas says something else than expected: {text}")
    return found.groups()


def busiest_loop(code: str) -> tuple[int, int]:
    """How many instructions of tensor cores, and of all kinds, the loop with most of the former has.

    A loop is what stands between a branch and a label before it. Of loops in each other with equally many it is the
    shorter one.
    """
    labels: dict[str, int] = {}
    kinds: list[str] = []
    jumps: list[tuple[int, str]] = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(kinds)
        found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line)
        if found:
            kinds.append(found[1])
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            if target:
                jumps.append((len(kinds), target[1]))
    loops = [kinds[labels[label] : end] for end, label in jumps if labels.get(label, end) < end]
    counts = [(sum(kind.endswith("MMA") for kind in loop), -len(loop)) for loop in loops]
    multiplications, length = max(counts, default=(0, 0))
    return multiplications, -length


def residents(architecture: str, registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor can have at a time."""
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // SCHEDULERS // of_warp * SCHEDULERS // warps
    of_block = -(-(shared + SHARED_OF_SYSTEM) // SHARED_UNIT) * SHARED_UNIT
    return min(by_registers, SHARED[architecture] // of_block, WARPS // warps, BLOCKS)


# -- the page ----------------------------------------------------------------------------------------------------------

PAGE = """# What the compiler makes of the CUDA kernels

Made by `python benchmarks/cuda_kernels.py` with numba-cuda {numba} and ptxas {ptxas}, without a GPU. These are facts
about machine code; how fast it is they do not say. *Blocks* is how many blocks of threads a multiprocessor can have at
a time, which follows from registers and shared memory. *MMA* are the instructions of tensor cores in the loop over
keys, in which the last product stands twice: the second time for rows that are not finite. *Loop* is all instructions
of that loop. *Spilled* are registers that are stored and loaded again.

| kernel | | registers | shared memory | spilled | threads | blocks | MMA | loop |
|---|---|--:|--:|--:|--:|--:|--:|--:|
{rows}
"""


def page(reports: dict[tuple[str, str], tuple[Report, int]]) -> str:
    """The page of reports, which are by kernel and architecture, with the threads of a block."""
    alike: dict[tuple[str, Report, int], list[str]] = {}
    for (name, architecture), (report, threads) in reports.items():
        alike.setdefault((name, report, threads), []).append(architecture)
    rows = []
    for (name, report, threads), architectures in alike.items():
        spilled = f"{report.spilled} B" if report.spilled or report.stack else "–"
        loop = f"{report.multiplications} | {report.instructions}" if report.multiplications else "– | –"
        rows.append(
            f"| {name} | {', '.join(architectures)} | {report.registers} | {report.shared / 1024:.1f} KB | {spilled} "
            f"| {threads} | {report.resident} | {loop} |"
        )
    said = subprocess.run([str(tool("ptxas")), "--version"], capture_output=True, text=True, check=True).stdout
    (ptxas,) = _figures(r"release ([\d.]+)", said)
    return PAGE.format(numba=version("numba-cuda"), ptxas=ptxas, rows="\n".join(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "cuda-kernels.md")
    parser.add_argument("--kernel", action="append", default=[], help="only this one, and write nothing")
    parser.add_argument("--ptx", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.ptx:
        print(json.dumps(compile_here(args.kernel, tuple(args.ptx))))
        return 0
    for name in ("ptxas", "nvdisasm"):
        if tool(name) is None:
            parser.error(f"{name} is not installed: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")
    reports = {}
    made = {capability: compile_apart(args.kernel, capability) for capability in sorted(set(ARCHITECTURES.values()))}
    for name in made[8, 0]:
        for architecture, capability in ARCHITECTURES.items():
            kernel = made[capability][name]
            reports[name, architecture] = inspect(kernel["ptx"], architecture, kernel["threads"]), kernel["threads"]
            print(name, architecture, *reports[name, architecture], flush=True)
    if not args.kernel:
        args.docs.write_text(page(reports), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
