"""The instructions that kernels on tensor cores are made of: PTX on a GPU, NumPy in the simulator.

What stands for them in the simulator is no part of this package: `emulated_ptx` is in the folder of its tests.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from fastattn.cuda.available import EMULATION, NO_EMULATION, SIMULATED

if SIMULATED and find_spec(EMULATION) is None:
    raise ModuleNotFoundError(NO_EMULATION, name=EMULATION)

_INSTRUCTIONS = importlib.import_module(EMULATION if SIMULATED else "fastattn.cuda.kernels.ptx")


def __getattr__(name: str) -> Any:
    return getattr(_INSTRUCTIONS, name)
