"""What becomes of the kernels on tensor cores: everything in registers, and as many blocks at a time as are meant."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastattn.cuda.tensor_cores import shape_for

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cuda_kernels.py"
NAMES = {
    "tensor cores, bfloat16, 64": shape_for("bfloat16", "none", 64),
    "tensor cores, bfloat16, 128": shape_for("bfloat16", "none", 128),
    "tensor cores, bfloat16, 64, mask bool": shape_for("bfloat16", "bool", 64),
}
#: Kernels without a multiprocessor's share to keep to, and those with more than one product to count.
OTHERS = [
    "tensor cores, gradients of keys, values, bfloat16, 64",
    "tensor cores, gradients of queries, bfloat16, 64",
    "tensor cores, gradients of keys, values, bfloat16, 128",
    "tensor cores, gradients of queries, bfloat16, 128",
    "tensor cores, gradients of keys, values, bfloat16, 64, mask float32",
    "few queries, bfloat16, 128, 8 rows",
    "few queries, merge, bfloat16, 128, 8 rows",
    "portable gradients of keys, values, float32, 128",
    "portable gradients of queries, float32, 128",
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
def made(script: ModuleType) -> dict[str, Any]:
    """Return the PTX of the kernels, by architecture and name."""
    for_least, for_last = (script.compile_apart([*NAMES, *OTHERS], capability) for capability in ((8, 0), (10, 0)))
    return {"sm_80": for_least, "sm_90a": for_least, "sm_100": for_last}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_everything_is_in_registers(script: ModuleType, made: Any, architecture: str, name: str) -> None:
    kernel, shape = made[architecture][name], NAMES[name]
    assert ".local" not in kernel["ptx"]
    report = script.inspect(kernel["ptx"], architecture, kernel["threads"])
    assert report.spilled == report.stack == 0
    assert report.resident >= shape.blocks
    assert report.shared == shape.shared_bytes
    # 16 · 8 · 16 multiplications an instruction: of queries and keys, of weights and values, and of finite values
    assert report.multiplications == 3 * (shape.rows * shape.keys * shape.width) // (16 * 8 * 16)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_nothing_is_spilled(script: ModuleType, made: Any, architecture: str, name: str) -> None:
    kernel = made[architecture][name]
    assert ".local" not in kernel["ptx"]
    report = script.inspect(kernel["ptx"], architecture, kernel["threads"])
    assert report.spilled == report.stack == 0
    assert report.resident >= kernel["blocks"]
    assert (report.multiplications > 0) == name.startswith("tensor cores")


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
