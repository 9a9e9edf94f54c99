"""The PTX of the forward kernel on tensor cores, run by a machine in NumPy: what is emitted is what was meant."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import processes
import ptx_machine
import pytest
from half_cases import Halves, bounds
from tolerances import check_lse, check_out

from fastattn.cuda import tensor_cores
from fastattn.cuda.elements import LOG2_E
from fastattn.cuda.emulated import from_halves
from fastattn.cuda.fragments import TileShape
from fastattn.cuda.plan import KEY, MASK, OUT, QUERY, VALUE, make_table
from fastattn.problem import as_operands, describe

SHAPES = {
    "plain": TileShape("bfloat16", "none", width=64, warps=2, rows=32, keys=32, blocks=1),
    "wide": TileShape("float16", "none", width=128, warps=1, rows=16, keys=16, blocks=1),
    "bool": TileShape("bfloat16", "bool", width=64, warps=1, rows=16, keys=16, blocks=1),
    "float": TileShape("float16", "float32", width=64, warps=1, rows=16, keys=16, blocks=1),
}
COMPILE = """
import json
from fastattn.cuda import portable, tensor_cores
from fastattn.cuda.compile import ptx
from fastattn.cuda.fragments import TileShape
print(json.dumps({
    name: ptx(tensor_cores.forward, TileShape(*spec), portable.argument_types(TileShape(*spec)), (8, 0))
    for name, spec in SHAPES.items()
}))
"""


@pytest.fixture(scope="module")
def texts() -> Any:
    """Return PTX by the names of the shapes."""
    specs = {name: tuple(shape) for name, shape in SHAPES.items()}
    return json.loads(processes.run(f"SHAPES = {specs!r}\n{COMPILE}", timeout=120, NUMBA_ENABLE_CUDASIM="0"))


def run(text: str, shape: TileShape, query: Halves, key: Halves, value: Halves, mask: Any, **options: Any) -> Any:
    problem, operands = describe(*as_operands(query.numbers, key.numbers, value.numbers, mask), **options)
    out = Halves(np.full((*problem.rows_shape, problem.queries, problem.value_dim), np.nan), shape.storage)
    views = [
        (QUERY, operands.query, 0),
        (KEY, operands.key, 0),
        (VALUE, operands.value, 0),
        (OUT, out.numbers, 0),
        *(() if mask is None else ((MASK, operands.mask, 0),)),
    ]
    lse = np.zeros(problem.lse_shape, np.float32)
    shown = np.zeros(1, np.uint8) if mask is None else mask
    arrays = [query.base, key.base, value.base, shown, out.base, lse, *make_table(problem, views)]
    memory = ptx_machine.Memory(*arrays)
    parameters: list[Any] = []
    for number, array in enumerate(arrays):
        flat = array if number in (6, 7) else array.reshape(-1)
        parameters += [0, 0, flat.size, flat.itemsize, memory.address(number), *flat.shape, *flat.strides]
    parameters += [np.float32(problem.scale * (1.0 if shape.floating else LOG2_E)), np.float32(1), 0, 0]
    ptx_machine.launch(text, tensor_cores.grid_of(shape, problem), shape.warps, memory, parameters)
    bits = memory.array(4, out.base)
    return from_halves(bits, shape.storage).reshape(problem.out_shape), memory.array(5, lse)


@pytest.mark.parametrize("causal", [False, "bottom-right"])
@pytest.mark.parametrize("name", SHAPES)
def test_ptx_computes_attention(texts: Any, name: str, causal: bool | str) -> None:
    rng = np.random.default_rng(0)
    shape = SHAPES[name]
    queries, keys, features = shape.queries + 5, 2 * shape.keys + 9, shape.width - 8
    sizes = ((2, queries, features), (1, keys, features), (1, keys, features))
    query, key, value = (Halves(rng.normal(size=size), shape.storage) for size in sizes)
    mask: Any = None
    if shape.mask != "none":
        mask = rng.random((queries, keys)) < 0.7
        mask[3] = False
    if shape.floating:
        mask = np.where(mask, rng.normal(size=mask.shape), -np.inf).astype(np.float32)
    # a value that is not finite, which not all queries see
    bits = Halves(np.float32([np.inf]), shape.storage).bits[0]
    value.bits[0, keys - 3, 5], value.numbers[0, keys - 3, 5] = bits, np.inf
    options = {"is_causal": causal, "enable_gqa": True}
    out, lse = run(texts[name], shape, query, key, value, mask, **options)
    wanted = bounds(shape, query, key, value, mask, **options)
    check_out(out, wanted)
    check_lse(lse, wanted)


def test_a_wrong_instruction_shows(texts: Any) -> None:
    """Were two operands of one instruction exchanged, the result would not be right."""
    rng = np.random.default_rng(1)
    shape, text = SHAPES["wide"], texts["wide"]
    operands = [Halves(rng.normal(size=(20, 128)), shape.storage) for _ in range(3)]
    right, _ = run(text, shape, *operands, None)
    for old, new in (
        ("ldmatrix.sync.aligned.m8n8.x4.trans.", "ldmatrix.sync.aligned.m8n8.x4."),
        (".bfly.b32", ".idx.b32"),
        ("cp.async.wait_group 0", "cp.async.wait_group 1"),
        ("max.f32", "add.f32"),
    ):
        assert old in text
        wrong, _ = run(text.replace(old, new), shape, *operands, None)
        assert not np.array_equal(wrong, right), old
