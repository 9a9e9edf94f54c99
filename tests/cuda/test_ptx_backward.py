"""The PTX of the kernels of gradients on tensor cores, run by a machine in NumPy: what is emitted is what was meant."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import processes
import ptx_machine
import pytest
from half_cases import Halves
from half_gradients import Work, check, operands

from fastattn.cuda.emulated import from_halves
from fastattn.cuda.fragments import TileShape

#: Shapes, and whether the own rows stay in shared memory.
SHAPES = {
    "plain": (TileShape("bfloat16", "none", width=64, warps=2, rows=16, keys=32, blocks=1), False),
    "wide": (TileShape("float16", "none", width=128, warps=1, rows=16, keys=16, blocks=1), False),
    "bool": (TileShape("bfloat16", "bool", width=64, warps=1, rows=16, keys=16, blocks=1), True),
    "float": (TileShape("float16", "float32", width=64, warps=1, rows=16, keys=16, blocks=1), False),
}
COMPILE = """
import json
from fastattn.cuda import tensor_cores_backward as backward
from fastattn.cuda.compile import ptx
from fastattn.cuda.fragments import TileShape

made = {}
for name, (shape, apart) in SHAPES.items():
    for of_keys in (False, True):
        spec = backward.Gradients(TileShape(*shape), of_keys, apart)
        made[f"{name} {of_keys}"] = ptx(backward.gradients, spec, backward.argument_types(spec), (8, 0))
print(json.dumps(made))
"""


@pytest.fixture(scope="module")
def texts() -> Any:
    """Return PTX by the names of the shapes and whether it is for keys."""
    specs = {name: (tuple(shape), apart) for name, (shape, apart) in SHAPES.items()}
    return json.loads(processes.run(f"SHAPES = {specs!r}\n{COMPILE}", timeout=120, NUMBA_ENABLE_CUDASIM="0"))


def emitted(text: str, work: Work) -> list[Any]:
    """Run the PTX of a kernel, and return the gradients as float32."""
    arrays = [argument.base if isinstance(argument, Halves) else argument for argument in work.arguments]
    numbers = [i for i, array in enumerate(arrays) if isinstance(array, np.ndarray)]
    memory = ptx_machine.Memory(*(arrays[i] for i in numbers))
    parameters: list[Any] = []
    for i, (argument, array) in enumerate(zip(work.arguments, arrays, strict=True)):
        if i in numbers:
            flat = array.reshape(-1) if isinstance(argument, Halves) else array
            at = memory.address(numbers.index(i))
            parameters += [0, 0, flat.size, flat.itemsize, at, *flat.shape, *flat.strides]
        else:
            parameters.append(array)
    ptx_machine.launch(text, work.grid, work.spec.shape.warps, memory, parameters)
    found = []
    for result in work.results:
        place = next(i for i, argument in enumerate(work.arguments) if argument is result)
        bits = memory.array(numbers.index(place), result.base)
        found.append(from_halves(bits, work.spec.shape.storage).reshape(result.numbers.shape))
    return found


@pytest.mark.parametrize("causal", [False, "bottom-right"])
@pytest.mark.parametrize("name", SHAPES)
def test_ptx_computes_gradients(texts: Any, name: str, causal: bool | str) -> None:
    rng = np.random.default_rng(0)
    shape, apart = SHAPES[name]
    queries, keys, features = shape.queries + 5, shape.queries + 9, shape.width - 8
    given = operands(rng, shape.storage, (2, queries, features), (1, keys, features))
    mask: Any = None
    if shape.mask != "none":
        mask = rng.random((queries, keys)) < 0.7
        mask[3] = False
    if shape.floating:
        mask = np.where(mask, rng.normal(size=mask.shape), -np.inf).astype(np.float32)
    # something in dO that is not finite, which not all keys get to see
    bits = Halves(np.float32([np.inf]), shape.storage).bits[0]
    given[0].bits[0, 2, 5], given[0].numbers[0, 2, 5] = bits, np.inf

    def how(work: Work) -> list[Any]:
        return emitted(texts[f"{name} {work.spec.of_keys}"], work)

    check(shape, given, mask, apart, how, is_causal=causal, enable_gqa=True)
