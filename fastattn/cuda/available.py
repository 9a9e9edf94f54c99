"""Whether CUDA can be used here, and if not, what is missing."""

from __future__ import annotations

import os

from numba import config

#: Whether kernels run in Numba's simulator, in Python threads: decided where Numba is first imported.
SIMULATED = bool(config.ENABLE_CUDASIM) or os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
