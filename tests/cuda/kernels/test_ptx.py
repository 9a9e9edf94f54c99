"""The PTX of kernels on tensor cores, run by a machine in NumPy: what is emitted is what was meant."""

from __future__ import annotations

import json
import pickle
from base64 import b64encode
from collections.abc import Callable
from functools import cache
from typing import Any

import half_cases
import half_gradients
import numpy as np
import processes
import ptx_machine
import pytest
from half_cases import Halves, check

import fastattn
from fastattn.cuda.available import SIMULATED, Device
from fastattn.cuda.host import attention, backward
from fastattn.cuda.host.tensor_cores import shape_for
from fastattn.cuda.host.tensor_cores_backward import spec_for
from fastattn.cuda.kernels import tensor_cores, tensor_cores_backward
from fastattn.cuda.kernels.fragments import TileShape
from fastattn.cuda.kernels.plan import REST, SHIFT
from fastattn.cuda.kernels.tensor_cores_backward import Gradients

pytestmark = pytest.mark.skipif(not SIMULATED, reason="a GPU runs the kernels themselves")

SHAPES = {
    "plain": TileShape("bfloat16", "none", width=64, warps=2, rows=32, keys=32, blocks=1),
    "wide": TileShape("float16", "none", width=128, warps=1, rows=16, keys=16, blocks=1),
    "bool": TileShape("bfloat16", "bool", width=64, warps=1, rows=16, keys=16, blocks=1),
    "float": TileShape("float16", "float32", width=64, warps=1, rows=16, keys=16, blocks=1),
}
#: Of gradients, and whether the own rows stay in shared memory.
GRADIENT_SHAPES = {
    "plain": (TileShape("bfloat16", "none", width=64, warps=2, rows=16, keys=32, blocks=1), False),
    "bool": (TileShape("bfloat16", "bool", width=128, warps=1, rows=16, keys=16, blocks=1), True),
    "float": (TileShape("float16", "float32", width=64, warps=1, rows=16, keys=16, blocks=1), False),
}
#: Each shape, with a causal limit or without; the plain one both ways, as it has a path of its own for whole tiles.
CASES = [("plain", False), ("plain", "bottom-right"), ("wide", False), ("bool", "bottom-right"), ("float", False)]
CALL = ("float16", "none", 128)  # storage, mask and width of a whole call
GRADIENTS = [
    *(Gradients(shape, of_keys, apart) for shape, apart in GRADIENT_SHAPES.values() for of_keys in (False, True)),
    *(spec_for(*CALL, of_keys) for of_keys in (False, True)),
]
#: Kernels, by the names of what makes them and their specifications.
KERNELS = [
    *(("forward", shape) for shape in (*SHAPES.values(), shape_for(*CALL))),
    *(("gradients", spec) for spec in GRADIENTS),
    *(("find_shifts", spec._replace(apart=False)) for spec in GRADIENTS if not spec.of_keys),
]
COMPILE = """
import json, pickle
from base64 import b64decode
from cuda_ptx import ptx
from fastattn.cuda.kernels import tensor_cores, tensor_cores_backward

factories = tensor_cores.forward, tensor_cores_backward.gradients, tensor_cores_backward.find_shifts
by_name = {factory.__name__: factory for factory in factories}
print(json.dumps([ptx(by_name[name], spec, (8, 0)) for name, spec in pickle.loads(b64decode(KERNELS))]))
"""


@cache
def texts() -> dict[Any, str]:
    """The PTX of all kernels."""
    code = f"KERNELS = {b64encode(pickle.dumps(KERNELS))!r}\n{COMPILE}"
    made = json.loads(processes.run(code, timeout=300, NUMBA_ENABLE_CUDASIM="0"))
    return dict(zip(KERNELS, made, strict=True))


@pytest.fixture
def on_ptx(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what has the kernels on tensor cores that are launched run as PTX, after a change of it."""
    ran: list[str] = []

    def use(change: Callable[[str], str] = str) -> list[str]:
        for module in (half_cases, half_gradients, attention, backward):
            made, launched = (getattr(module, name) for name in ("kernel", "launch"))
            made, launched = (getattr(function, "usual", function) for function in (made, launched))

            def kernel(factory: Any, spec: Any, _usual: Any = made, **options: Any) -> Any:
                if factory.__module__ in (tensor_cores.__name__, tensor_cores_backward.__name__):
                    return change(texts()[factory.__name__, spec])
                return _usual(factory, spec, **options)

            def launch(kernel: Any, grid: int, block: Any, stream: Any, arguments: Any, _usual: Any = launched) -> None:
                if isinstance(kernel, str):
                    ran.append(kernel)
                    ptx_machine.call(kernel, grid, block[0], arguments)
                else:
                    _usual(kernel, grid, block, stream, arguments)

            kernel.usual, launch.usual = made, launched  # type: ignore[attr-defined]
            monkeypatch.setattr(module, "kernel", kernel)
            monkeypatch.setattr(module, "launch", launch)
        monkeypatch.setattr(attention, "_plans", {})
        return ran

    return use


def mask_for(rng: Any, shape: TileShape, queries: int, keys: int) -> Any:
    """Return a mask that hides everything from query 3, if the kernel takes one."""
    if shape.mask == "none":
        return None
    mask = rng.random((queries, keys)) < 0.7
    mask[3] = False
    return np.where(mask, rng.normal(size=mask.shape), -np.inf).astype(np.float32) if shape.floating else mask


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_ptx_computes_attention(on_ptx: Any, name: str, causal: bool | str) -> None:
    rng = np.random.default_rng(0)
    shape = SHAPES[name]
    queries, keys, features = shape.queries + 5, 2 * shape.keys + 9, shape.width - 8
    sizes = ((2, queries, features), (1, keys, features), (1, keys, features))
    query, key, value = (Halves(rng.normal(size=size), shape.storage) for size in sizes)
    mask = mask_for(rng, shape, queries, keys)
    # a value that is not finite, which not all queries see
    bits = Halves(np.float32([np.inf]), shape.storage).bits[0]
    value.bits[0, keys - 3, 5], value.numbers[0, keys - 3, 5] = bits, np.inf
    ran = on_ptx()
    check(shape, query, key, value, mask, is_causal=causal, enable_gqa=True)
    assert ran


@pytest.mark.parametrize(("name", "causal"), [case for case in CASES if case[0] in GRADIENT_SHAPES])
def test_ptx_computes_gradients(on_ptx: Any, name: str, causal: bool | str) -> None:
    rng = np.random.default_rng(0)
    shape, apart = GRADIENT_SHAPES[name]
    queries, keys, features = shape.queries + 5, shape.queries + 9, shape.width - 8
    given = half_gradients.operands(rng, shape.storage, (2, queries, features), (1, keys, features))
    mask = mask_for(rng, shape, queries, keys)
    # something in dO that is not finite, which not all keys get to see
    bits = Halves(np.float32([np.inf]), shape.storage).bits[0]
    given[0].bits[0, 2, 5], given[0].numbers[0, 2, 5] = bits, np.inf
    ran = on_ptx()
    half_gradients.check(shape, given, mask, apart, is_causal=causal, enable_gqa=True)
    assert len(ran) == 3


@pytest.mark.parametrize("name", GRADIENT_SHAPES)
def test_ptx_finds_shifts(on_ptx: Any, name: str) -> None:
    """Scores so large that the block goes over the keys once more, beside others; the same numbers as in NumPy."""
    rng = np.random.default_rng(0)
    shape, _ = GRADIENT_SHAPES[name]
    queries, keys = shape.queries + 5, 2 * shape.keys + 9
    numbers = [rng.normal(size=(count, 64)) for count in (queries, queries, keys, keys)]
    numbers[1][::3, 0], numbers[2][:, 0] = 128, 16
    mask = mask_for(rng, shape, queries, keys)
    given: Any = (shape, [Halves(array, shape.storage) for array in numbers], mask, False)
    wanted = half_gradients.prepare(*given, is_causal="bottom-right")[0][0].numbers
    ran = on_ptx()
    found = half_gradients.prepare(*given, is_causal="bottom-right")[0][0].numbers
    assert len(ran) == 1
    seen = np.isfinite(wanted[:, SHIFT])
    np.testing.assert_array_equal((wanted[:, REST] != 0)[seen], (np.arange(queries) % 3 == 0)[seen])
    np.testing.assert_allclose(found[:, SHIFT], wanted[:, SHIFT], rtol=1e-6)
    np.testing.assert_allclose(found[:, REST], wanted[:, REST], rtol=1e-3, atol=1e-3)


def test_a_wrong_instruction_shows(on_ptx: Any) -> None:
    """Were one kind of instruction another, the result would not be right."""
    rng = np.random.default_rng(1)
    shape = SHAPES["wide"]
    operands = [Halves(rng.normal(size=(20, 128)), shape.storage) for _ in range(3)]
    for old, new in (
        ("ldmatrix.sync.aligned.m8n8.x4.trans.", "ldmatrix.sync.aligned.m8n8.x4."),
        (".bfly.b32", ".idx.b32"),
        ("cp.async.wait_group \t0", "cp.async.wait_group \t1"),
        ("max.f32", "add.f32"),
    ):
        old, new = (" ".join(text.split()) for text in (old, new))
        assert old in texts()["forward", shape]
        on_ptx(lambda text, old=old, new=new: text.replace(old, new))
        with pytest.raises(AssertionError):
            check(shape, *operands)


def test_calls_compute_what_the_simulator_does(on_ptx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and its gradients, with everything around the kernels; sums may be rounded in another order."""
    for module in (attention, backward):
        monkeypatch.setattr(module, "_plans", {})
    monkeypatch.setattr(attention, "capability_of", lambda number: (8, 0))
    monkeypatch.setattr(backward, "device", lambda: Device(0, "one that is not there", (8, 0), "none"))
    rng = np.random.default_rng(96)
    query, grad_out = (rng.normal(size=(2, 40, 96)).astype(np.float16) for _ in range(2))
    key, value = (rng.normal(size=(1, 70, 96)).astype(np.float16) for _ in range(2))
    options: Any = {"is_causal": True, "enable_gqa": True, "backend": "cuda"}

    def results() -> list[Any]:
        out, lse = fastattn.attention(query, key, value, return_lse=True, **options)
        return [out, lse, *fastattn.attention_backward(grad_out, query, key, value, out, lse, **options)]

    wanted = results()
    ran = on_ptx()
    found = results()
    assert len(ran) == 4
    for one, other in zip(found, wanted, strict=True):
        most = float(np.abs(other).max())
        np.testing.assert_allclose(
            one.astype(np.float64), other.astype(np.float64), atol=2 * half_cases.EPS["float16"] * most
        )
