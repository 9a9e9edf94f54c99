"""The instructions that kernels on tensor cores are made of: PTX on a GPU, NumPy in the simulator."""

from __future__ import annotations

import importlib
from typing import Any

from fastattn.cuda.available import SIMULATED

_INSTRUCTIONS = importlib.import_module("fastattn.cuda.emulated" if SIMULATED else "fastattn.cuda.kernels.ptx")


def __getattr__(name: str) -> Any:
    return getattr(_INSTRUCTIONS, name)
