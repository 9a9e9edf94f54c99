"""What becomes of the kernels on tensor cores: everything in registers, and as many blocks at a time as are meant."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from marks import SLOW

from fastattn.cuda.host.tensor_cores import shape_for

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "cuda_kernels.py"
#: Architectures, and the compute capability that Numba makes PTX of for them; that for 8.0 is assembled for both.
CAPABILITIES = {"sm_80": (8, 0), "sm_90a": (8, 0), "sm_100": (10, 0)}
FORWARD = {
    "tensor cores, bfloat16, 64": shape_for("bfloat16", "none", 64),
    "tensor cores, bfloat16, 128": shape_for("bfloat16", "none", 128),
    "tensor cores, bfloat16, 64, mask bool": shape_for("bfloat16", "bool", 64),
}
#: Kernels that are asked for neither their shared memory nor how often they multiply.
OTHERS = [
    "tensor cores, gradients of queries, bfloat16, 64",
    "tensor cores, gradients of keys, values, bfloat16, 128",
    "tensor cores, gradients of queries, bfloat16, 128, mask bool",
    "tensor cores, shifts, bfloat16, 64",
    "few queries, bfloat16, 128, 8 rows",
    "few queries, merge, bfloat16, 128, 8 rows",
    "portable gradients of keys, values, float32, 128",
]
#: More like these, with FASTATTN_SLOW=1, as compiling takes seconds.
MORE = [
    "tensor cores, gradients of keys, values, bfloat16, 64",
    "tensor cores, gradients of queries, bfloat16, 128",
    "tensor cores, gradients of keys, values, bfloat16, 64, mask float32",
    "tensor cores, gradients of keys, values, bfloat16, 128, mask bool",
    "tensor cores, shifts, bfloat16, 128, mask float32",
    "portable shifts, float32, 128",
    "portable gradients of queries, float32, 128",
]
#: Those that are looked at for later architectures as well, as registers are short in them; FASTATTN_SLOW=1: all are.
SHORT = {
    "tensor cores, bfloat16, 64",
    "tensor cores, gradients of queries, bfloat16, 64",
    "tensor cores, gradients of queries, bfloat16, 128, mask bool",
}
PAIRS = [
    (architecture, name)
    for architecture in CAPABILITIES
    for name in (*FORWARD, *OTHERS, *(MORE if SLOW else ()))
    if architecture == "sm_80" or name in SHORT or SLOW
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return benchmarks/cuda_kernels.py."""
    spec = importlib.util.spec_from_file_location("cuda_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("ptxas", "nvdisasm"):
        if module.tool(name) is None:
            pytest.skip(f"{name} is not installed: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")
    return module


@pytest.fixture(scope="module")
def kernels(script: ModuleType) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Return kernels, and the reports on them, by architecture and name; two processes work at a time."""
    names: dict[tuple[int, int], list[str]] = {}
    for architecture, name in PAIRS:
        names.setdefault(CAPABILITIES[architecture], []).append(name)
    with ThreadPoolExecutor(2) as pool:
        texts = dict(zip(names, pool.map(lambda at: script.compile_apart(names[at], at), names), strict=True))
        made = [texts[CAPABILITIES[architecture]][name] for architecture, name in PAIRS]
        reports = pool.map(lambda pair, kernel: script.inspect(kernel["ptx"], pair[0], kernel["threads"]), PAIRS, made)
        return dict(zip(PAIRS, zip(made, reports, strict=True), strict=True))


@pytest.mark.parametrize(("architecture", "name"), PAIRS)
def test_everything_is_in_registers(kernels: Any, architecture: str, name: str) -> None:
    kernel, report = kernels[architecture, name]
    assert ".local" not in kernel["ptx"]
    assert report.spilled == report.stack == 0
    assert report.resident >= kernel["blocks"]
    assert (report.multiplications > 0) == name.startswith("tensor cores")
    if name in FORWARD:
        shape = FORWARD[name]
        assert report.shared == shape.shared_bytes
        # 16 · 8 · 16 multiplications an instruction: of queries and keys, of weights and values, and of finite values
        assert report.multiplications == 3 * (shape.rows * shape.keys * shape.width) // (16 * 8 * 16)


def test_residents(script: ModuleType) -> None:
    """Registers come by 256 to a warp, and each of the 4 schedulers has 16384 of them."""
    assert script.residents("sm_80", 255, 32 << 10, 128) == 2
    assert script.residents("sm_80", 168, 32 << 10, 128) == 3
    assert script.residents("sm_80", 169, 32 << 10, 128) == 2
    assert script.residents("sm_80", 32, 80 << 10, 128) == 2
    assert script.residents("sm_80", 32, 0, 256) == 8
    assert script.residents("sm_80", 16, 0, 32) == 32


def test_the_busiest_loop(script: ModuleType) -> None:
    code = """
    .L_x_0:
            /*0000*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
    .L_x_1:
            /*0010*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
            /*0020*/               @P0 LDSM.16.M88.4 R4, [R8] ;
            /*0030*/              @!P0 BRA `(.L_x_1) ;
            /*0040*/                   BRA `(.L_x_2) ;
            /*0050*/              @!P0 BRA `(.L_x_0) ;
    .L_x_2:
            /*0060*/                   EXIT ;
    """
    assert script.busiest_loop(code) == (2, 6)
    assert script.busiest_loop("") == (0, 0)
