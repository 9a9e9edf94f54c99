"""The floating-point mode: results do not depend on it, and whoever calls keeps his own."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import floating_modes
import numpy as np
import processes
import pytest
from floating_modes import CALLS, MODES, WORDS, is_x86, needs_modes, register, thread_in
from llvmlite import binding as llvm
from llvmlite import ir
from numpy.typing import NDArray
from rows import on_other_rows

import fastattn
from fastattn.cpu.host import pool
from fastattn.cpu.host.builtin import in_default_mode
from fastattn.cpu.host.kernels import load
from fastattn.machine import building as build
from fastattn.machine import table as isa
from fastattn.machine.kernel import Kernel
from fastattn.machine.libraries import Library
from fastattn.machine.mode import with_default_mode
from fastattn.machine.table import host
from fastattn.simd import jit, load_f32, store_f32

Array = NDArray[Any]
DTYPES = (np.float32, np.float64)
on_x86 = pytest.mark.skipif(not is_x86, reason="this is about a register of x86-64")


@pytest.fixture
def _any_work_is_worth_waking(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORTH_SHARING", "WORTH_WAKING"):
        monkeypatch.setattr(pool, name, 0)
    floating_modes.forget_plans()


def inputs() -> Array:
    return np.random.default_rng(0).standard_normal((3, 2, 150, 24)).astype(np.float32)


# -- the same bits -----------------------------------------------------------------------------------------------------


@needs_modes
def test_the_modes_do_what_they_are_called() -> None:
    """Otherwise nothing of this would be a test."""
    small, third = np.full(8, 1e-40, np.float32), np.float32(1 / 3)
    results = {}
    for mode in WORDS:
        with thread_in(mode):
            results[mode] = (small * np.float32(1.0), np.full(8, 1.0, np.float32) / np.float32(3.0))
    assert [mode for mode in WORDS if not results[mode][0].any()] == ["flush"]
    assert [mode for mode in WORDS if (results[mode][1] < third).any()] == ["toward zero"]
    with thread_in("up"):
        assert float(len(results)) + 2.0**-60 > len(results)


@needs_modes
@pytest.mark.usefixtures("_any_work_is_worth_waking")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_in_any_mode(name: str, dtype: Any, threads: int) -> None:
    with fastattn.num_threads(threads):
        assert floating_modes.check(dtype, names=[name]) == len(MODES)


@needs_modes
@on_other_rows
def test_the_same_bits_in_any_mode_on_other_rows(row: isa.Isa) -> None:
    code = """
import numpy as np, fastattn, floating_modes
from fastattn.cpu.host import pool
pool.WORTH_SHARING = pool.WORTH_WAKING = 0
with fastattn.num_threads(2):
    print(floating_modes.check(np.float32, names=["attention", "dropout", "summary"]))
"""
    assert processes.run(code, timeout=300, FASTATTN_ISA=row.name) == f"{3 * len(MODES)}\n"


@needs_modes
def test_the_micro_kernel_alone() -> None:
    row = host()
    run = load(Kernel("peak", row, row.tile("float32"))).run
    width = row.vectors * row.vector_bytes // 4
    a, b = np.full(4 * row.rows, 1 / 3, np.float32), np.full(4 * width, 1e-39, np.float32)

    def product() -> Array:
        out = np.zeros((row.rows, width), np.float32)
        run(a.ctypes.data, b.ctypes.data, out.ctypes.data, 4, 1)
        return out

    wanted = product().tobytes()
    for mode in MODES:
        with thread_in(mode):
            found = product()
        assert found.tobytes() == wanted, mode


def test_under_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from fastattn.integrations.torch import scaled_dot_product_attention

    torch.manual_seed(0)
    given = torch.randn(2, 64, 24), torch.randn(2, 64, 24), torch.randn(2, 64, 24) * 1e-38

    def bits() -> list[bytes]:
        query, key, value = (tensor.clone().requires_grad_() for tensor in given)
        out = scaled_dot_product_attention(query, key, value)
        out.backward(torch.ones_like(out))
        return [tensor.detach().numpy().tobytes() for tensor in (out, query.grad, key.grad, value.grad)]

    def small(tensor: Any) -> Any:
        return tensor * 1.0

    wanted = bits()
    if not torch.set_flush_denormal(True):
        pytest.skip("PyTorch cannot flush on this machine")
    try:
        found = bits()
        assert not small(torch.full((8,), 1e-40)).any()
    finally:
        torch.set_flush_denormal(False)
    assert found == wanted


@needs_modes
@pytest.mark.slow
def test_what_is_compiled_in_another_mode_is_the_same(tmp_path: Path) -> None:
    """Also what is imported in it, from bytecode: a wrong constant would stay in the cache for ever."""
    code = """
import ctypes
from llvmlite import binding as llvm
llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(jit=True)
engine = llvm.create_mcjit_compiler(llvm.parse_assembly('''FUNCTIONS'''), machine)
ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("set"))(MODE)
import numpy, fastattn
fastattn.attention(*numpy.ones((3, 4, 16)), [[1.0] * 4] * 4)
""".replace("FUNCTIONS", floating_modes.FUNCTIONS)
    bytecode = {"PYTHONDONTWRITEBYTECODE": None, "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}
    kernels = []
    for mode in ("default", "up"):
        folder = tmp_path / mode
        processes.run(code.replace("MODE", str(WORDS[mode])), timeout=300, FASTATTN_CACHE_DIR=str(folder), **bytecode)
        kernels.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(kernels[0]) == 2
    assert kernels[0] == kernels[1]


# -- workers -----------------------------------------------------------------------------------------------------------

TASKS = 64
FACTORS, PRODUCTS, SLOTS = 0, 64, 64 + 4 * TASKS  # offsets in a call's memory


@needs_modes
@pytest.mark.parametrize("mode", MODES)
def test_workers_that_were_born_in_another_mode(mode: str) -> None:
    """A thread begins in the mode of the one that started it."""

    @jit
    def task(call, slot, number):  # type: ignore[no-untyped-def]
        product = load_f32(call + FACTORS) * load_f32(call + FACTORS + 4)
        for _ in range(20000):
            product = product * load_f32(call + FACTORS + 8)
        store_f32(call + PRODUCTS + 4 * number, product)
        store_f32(call + SLOTS + 4 * number, float(slot))

    slow = Library(build.emit({"task": (task, 3)}, host()), host(), {"task": 3})
    memory = np.zeros(SLOTS // 4 + TASKS, np.float32)
    memory[:3] = 1e-38, 1 / 3, 1.0
    workers, took_part = pool.Pool(), False
    end = time.monotonic() + 20
    while not took_part and time.monotonic() < end:
        with thread_in(mode) as is_still:
            assert workers.run(slow, memory.ctypes.data, TASKS, TASKS, 2)
            assert is_still()
        products, slots = memory[PRODUCTS // 4 :][:TASKS], memory[SLOTS // 4 :]
        assert (products == np.float32(1e-38) * np.float32(1 / 3)).all()
        took_part = bool(slots.any())
    assert took_part


# -- whoever calls keeps his own ---------------------------------------------------------------------------------------


@needs_modes
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_outlives_an_exception(mode: str) -> None:
    query, key, value = inputs()
    with thread_in(mode) as is_still:
        with pytest.raises(ValueError, match="key"):
            fastattn.attention(query, key[..., :5], value)
        with pytest.raises(ValueError, match="out"):
            fastattn.attention_backward(value, query, key, value, value[0], value[0], scale=0.3)
        assert is_still()


@needs_modes
@pytest.mark.usefixtures("_any_work_is_worth_waking")
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_outlives_ctrl_c(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs()
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    calls: list[Callable[[], Any]] = [
        lambda: fastattn.attention(query, key, value),
        lambda: fastattn.attention(query, key, value, scale=0.3),
        lambda: fastattn.attention_backward(out, query, key, value, out, lse),
    ]

    def interrupted(*args: object) -> int:
        raise KeyboardInterrupt

    def until_interrupted(call: Callable[[], Any]) -> None:
        while True:  # a call that is done at once has nothing to finish
            call()

    monkeypatch.setattr(pool.Pool, "finish", interrupted)
    with fastattn.num_threads(2):
        for call in calls:
            with thread_in(mode) as is_still:
                with pytest.raises(KeyboardInterrupt):
                    until_interrupted(call)
                assert is_still()


@needs_modes
def test_a_function_of_pythons_in_the_default_mode() -> None:
    assert register is not None

    @in_default_mode
    def function(a: int, *more: int, b: int = 2, **named: int) -> Any:
        """What it does."""
        assert register.get() == WORDS["default"]
        if b == 0:
            raise ZeroDivisionError
        return a, more, b, named

    assert (function.__name__, function.__doc__) == ("function", "What it does.")
    with thread_in("up") as is_still:
        assert function(1) == (1, (), 2, {})
        assert function(1, 4, b=3, c=5) == (1, (4,), 3, {"c": 5})
        with pytest.raises(ZeroDivisionError):
            function(1, b=0)
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            function()
        assert is_still()


@on_x86
def test_exceptions_that_a_call_raises_are_its_own() -> None:
    """The flags of C's fetestexcept, and traps that somebody has set for them."""
    assert register is not None
    query, key, value = inputs()
    query[0, 0, 0] = key[0, 0, 0] = np.inf
    value[1, 0] = np.nan
    invalid, overflow, inexact = 0x1, 0x8, 0x20
    fastattn.attention(query, key, value)
    try:
        for raised in (0, overflow, inexact):
            register.set(WORDS["default"] | raised)
            fastattn.attention(query, key, value)
            assert register.get() == WORDS["default"] | raised
        register.set(WORDS["default"] & ~(invalid << 7 | overflow << 7))  # traps: without the mask, SIGFPE ends all
        out, lse = fastattn.attention(query, key, value, return_lse=True)
        fastattn.attention_backward(out, query, key, value, out, lse)
    finally:
        register.set(WORDS["default"])


# -- machine code ------------------------------------------------------------------------------------------------------


def assembly(triple: str) -> str:
    """Return the assembly of a function that calls another in the default mode."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module("mode")
    module.triple = triple
    fnty = ir.FunctionType(ir.VoidType(), [])
    called, function = (ir.Function(module, fnty, name) for name in ("called", "function"))
    builder = ir.IRBuilder(function.append_basic_block())
    with_default_mode(builder, lambda: builder.call(called, []))
    builder.ret_void()
    try:
        target = llvm.Target.from_triple(triple).create_target_machine()
    except RuntimeError as error:
        pytest.skip(str(error))
    return str(target.emit_assembly(llvm.parse_assembly(str(module))))


@pytest.mark.parametrize(
    ("triple", "pattern"),
    [
        ("x86_64-unknown-linux-gnu", r"\tstmxcsr.*\tcallq\t.*\tldmxcsr"),
        ("x86_64-pc-windows-msvc", r"\tstmxcsr.*\tcallq\t.*\tldmxcsr"),
        ("aarch64-unknown-linux-gnu", r"\tmrs\t(x\d+), FPCR.*\tmsr\tFPCR, xzr.*\tblr?\t.*\tmsr\tFPCR, \1"),
        ("arm64-apple-darwin", r"\tmrs\t(x\d+), FPCR.*\tmsr\tFPCR, xzr.*\tblr?\t.*\tmsr\tFPCR, \1"),
    ],
)
def test_the_mode_is_read_and_given_back_around_a_call(triple: str, pattern: str) -> None:
    assert re.search(pattern, assembly(triple), re.DOTALL)


def test_a_machine_that_is_not_known_is_left_alone() -> None:
    assert "fsrm" not in assembly("riscv64-unknown-linux-gnu")
