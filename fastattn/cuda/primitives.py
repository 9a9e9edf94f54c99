"""The instructions that kernels on tensor cores are made of: PTX on a GPU, NumPy in the simulator."""

from __future__ import annotations

from fastattn.cuda.available import SIMULATED

if SIMULATED:
    from fastattn.cuda.emulated import *  # noqa: F403
else:
    from fastattn.cuda.ptx import *  # noqa: F403
