"""What the compiler makes of the portable kernels, without a GPU: PTX, and machine code by ptxas.

A process of its own compiles, as this one has the simulator in place of the compiler where there is no GPU.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import processes
import pytest
from marks import SLOW

#: Architectures, and the compute capability that Numba makes PTX of for them. To save time most kernels are made for
#: the least alone, as nothing in them is special to an architecture; FASTATTN_SLOW=1 makes and assembles all for each.
ARCHITECTURES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_90a": (9, 0), "sm_100": (10, 0)}
LEAST, SAMPLE = (8, 0), ("float32",)
THREADS_REGISTERS = 255  # that a thread may have at most
STATIC_SHARED = 48 << 10  # bytes of shared memory that a block may have without asking for more

#: One of each kind, with what is most of work in them: names to (storage, mask, dropout, head and value size).
KERNELS = {
    "float32": ("float32", "none", False, 64, 64),
    "float16 and a boolean mask": ("float16", "bool", False, 64, 128),
    "bfloat16 and its own mask": ("bfloat16", "bfloat16", True, 128, 128),
    "float64": ("float64", "bool", True, 128, 128),
}
if SLOW:
    KERNELS["float32 and a float64 mask"] = ("float32", "float64", True, 128, 128)

#: Of kinds with a boolean mask beside their own and a softcap.
PAIRS = ("float32, two masks and a softcap",)
KERNELS |= dict.fromkeys(PAIRS, ("float32", "float32", False, 64, 64))

#: Kernels whose threads tell each other nothing, or at a barrier alone.
WITHOUT_SHARED = ("sum_parts", "find_kinds", "sink_rows")

#: Of a storage with an extreme scale, all portable kernels: arithmetic is in a wider type than the storage's.
EXTREME = ("bfloat16", "float64")  # storage and mask

COMPILE = """
import json
from dataclasses import replace
from cuda_ptx import ptx
from fastattn.cuda.host import backward, choice, plan
from fastattn.cuda.host import functions as host_functions
from fastattn.cuda.kernels import captured_gradient, deltas, head_gradients, kinds
from fastattn.cuda.kernels import portable_backward as gradients
from fastattn.cuda.kernels.backward_tiles import Backward
from fastattn.call.problem import Problem
from fastattn.call.scores import Scores
from fastattn.functions.function import described
import numpy as np

slopes, documents = np.ones(8, np.float32), np.zeros(9, np.int32)

def modified(score, batch, head, query, key):
    return score - slopes[head] * abs(query - key)

def seen(batch, head, query, key):
    return documents[query] == documents[key]

made = {}
for name, (storage, mask, dropout, head_dim, value_dim) in json.loads(KERNELS).items():
    dtype = np.dtype(np.float64 if storage == "float64" else np.float32)
    bias, pair = mask not in ("none", "bool"), name in PAIRS
    scores = Scores(softcap=30.0 if pair else None, bias=bias, keep=mask == "bool" or pair, right=0)
    problem = Problem(dtype, dtype, (), 1, 1, 9, 9, head_dim, value_dim, (1, 9, value_dim), 0.5 * dropout, scores)
    facts = choice.Facts(storage, mask, problem, plan.make_table(problem, []), (0,) * 4, (7, 5))
    for choose in (choice.choose_forward, *[choice.choose_weights] * (name == "float32" and CAPABILITY == (8, 0))):
        chosen = choose(facts)
        made[f"{chosen.factory.__name__} of {name}"] = ptx(chosen.factory, chosen.spec, CAPABILITY)
if CAPABILITY == (8, 0):
    (storage, mask), real = EXTREME, np.dtype(np.float32)
    scores = Scores(scale=1e39, bias=True, right=0)
    problem = Problem(real, real, (), 1, 1, 9, 9, 128, 128, (1, 9, 128), 0.5, scores)
    facts = choice.Facts(storage, mask, problem, plan.make_table(problem, []), (0,) * 4, CAPABILITY)
    work = [choice.choose_forward(facts), choice.choose_weights(facts)]
    work.append(choice.choose_shifts(storage, mask, problem, False))
    kernels = [(chosen.factory, chosen.spec) for chosen in work]
    spec = Backward(storage, mask, True, backward.tiling_for(storage, problem), extreme=True)
    for factory in (deltas.find_deltas, gradients.grad_queries, gradients.grad_keys, gradients.grad_mask):
        kernels.append((factory, spec))
    for factory, spec in kernels:
        made[f"{factory.__name__} of an extreme scale"] = ptx(factory, spec, CAPABILITY)
    functions = {"score_mod": described("score_mod", modified)[0], "mask_mod": described("mask_mod", seen)[0]}
    for name, function in functions.items():
        scores = Scores(**{name: function})
        problem = Problem(real, real, (), 1, 1, 9, 9, 64, 64, (1, 9, 64), 0.0, scores)
        facts = choice.Facts("float32", "none", problem, plan.make_table(problem, []), (0,) * 4, CAPABILITY)
        chosen, tiling = choice.choose_forward(facts), backward.tiling_for("float32", problem)
        spec = Backward("float32", "none", False, tiling, **choice.kind_of(problem))
        for factory, spec in ((chosen.factory, chosen.spec), (gradients.grad_keys, spec)):
            made[f"{factory.__name__} of {name}"] = ptx(factory, spec, CAPABILITY)
    both = choice.kind_of(replace(problem, scores=Scores(**functions)))
    spec = Backward("float32", "none", False, tiling, **both)
    looking = kinds.Looking(functions["mask_mod"], "float32", host_functions.THREADS)
    for factory, spec in (
        (gradients.captured_parts, backward.differentiating(spec, (0, 0))),
        (captured_gradient.sum_parts, captured_gradient.Parts("float16")),
        (kinds.find_kinds, looking),
        (gradients.slope_rows, Backward("float32", "none", False, tiling, own=("slope",))),
        (head_gradients.sink_rows, head_gradients.Rows("float32", False)),
        (head_gradients.sum_rows, head_gradients.Sums("float32", backward.SUM_THREADS)),
    ):
        made[factory.__name__] = ptx(factory, spec, CAPABILITY)
print(json.dumps(made))
"""


def ptxas() -> str | None:
    """Return the path of the assembler: of the package nvidia-cuda-nvcc, or of an installed CUDA."""
    found = find_spec("nvidia")
    for folder in [] if found is None else found.submodule_search_locations or ():
        for path in sorted(Path(folder).glob("cu*/bin/ptxas*")):
            return str(path)
    return shutil.which("ptxas")


@functools.cache
def compiled(capability: tuple[int, int]) -> dict[str, str]:
    """Return the PTX of kernels for a compute capability, by their names: for a later one than the least a sample."""
    kernels = {name: kernel for name, kernel in KERNELS.items() if capability == LEAST or name in SAMPLE or SLOW}
    given = f"{json.dumps(kernels)!r}, {PAIRS!r}, {EXTREME!r}, {capability!r}"
    code = f"KERNELS, PAIRS, EXTREME, CAPABILITY = {given}\n{COMPILE}"
    made: dict[str, str] = json.loads(processes.run(code, timeout=600, NUMBA_ENABLE_CUDASIM="0"))
    return made


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if SLOW or name != "sm_90"])
def test_kernels_compile_without_local_memory(architecture: str, tmp_path: Path) -> None:
    assembler = ptxas()
    if assembler is None:
        pytest.skip("ptxas is not installed: pip install nvidia-cuda-nvcc")
    for name, text in compiled(ARCHITECTURES[architecture]).items():
        assert ".local" not in text, f"{name}: an array is in local memory"
        source = tmp_path / "kernel.ptx"
        source.write_text(text)
        command = [assembler, f"-arch={architecture}", "-v", str(source), "-o", str(tmp_path / "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, f"{name}: {report}"
        registers, shared = re.search(r"Used (\d+) registers.*?(?:(\d+) bytes smem|$)", report, re.M).groups()
        assert int(registers) <= THREADS_REGISTERS, f"{name}: {report}"
        assert (0 if name in WITHOUT_SHARED else 1) <= int(shared or 0) <= STATIC_SHARED, f"{name}: {report}"


def test_float32_kernels_compute_in_float32() -> None:
    if ptxas() is None:
        pytest.skip("the compiler's package is not installed: pip install nvidia-cuda-nvcc")
    text = compiled(LEAST)
    names = ["forward of float32", "weights of float32", "forward of float16 and a boolean mask"]
    for name in (*names, *(f"forward of {pair}" for pair in PAIRS)):
        assert "fma.rn.f32" in text[name]
        # a number of Python's that is left in the arithmetic makes all of it float64
        assert ".f64" not in text[name], name


def test_functions_are_part_of_kernels() -> None:
    """Nothing is called, and nothing of them is float64."""
    if ptxas() is None:
        pytest.skip("the compiler's package is not installed: pip install nvidia-cuda-nvcc")
    made = {name: text for name, text in compiled(LEAST).items() if name.endswith("_mod")}
    assert len(made) == 4
    for name, text in made.items():
        assert "call" not in text, name
        assert ".f64" not in text, name


def test_an_extreme_scale_has_its_arithmetic_in_float64() -> None:
    if ptxas() is None:
        pytest.skip("the compiler's package is not installed: pip install nvidia-cuda-nvcc")
    extreme = {name: text for name, text in compiled(LEAST).items() if "extreme" in name}
    assert len(extreme) == 7
    for name, text in extreme.items():
        assert "fma.rn.f64" in text, name
        assert "fma.rn.f32" not in text, name
