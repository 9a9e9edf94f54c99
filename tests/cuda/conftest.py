"""Where the tests of CUDA run: on the GPU if there is one, else in Numba's simulator (see conftest.py above)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from numba import config

import fastattn

if find_spec("numba_cuda") is None:
    collect_ignore_glob = ["*/test_*.py"]
elif config.ENABLE_CUDASIM:
    from numba.cuda.simulator import kernel as simulator

    def run(self: Any, block: Any, *args: Any) -> None:
        """Run the threads of a block, which wait for each other at a barrier.

        The simulator's own way is to look again and again whether all threads wait, which takes most of the time.
        """

        def target() -> None:
            try:
                self._f(*args)
            except BaseException:
                self.barrier.abort()
                raise

        places = list(np.ndindex(*self._block_dim))
        self.barrier = threading.Barrier(len(places))
        threads = [simulator.BlockThread(target, self, block, place, self._debug) for place in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failures = [thread.exception for thread in threads if thread.exception]
        for error, traceback in failures:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error.with_traceback(traceback)
        assert not failures

    simulator.BlockManager.run = run
    simulator.BlockThread.syncthreads = lambda self: self._manager.barrier.wait()


@pytest.fixture(scope="session")
def cuda_attention() -> Callable[..., Any]:
    """Return `fastattn.attention` on the CUDA backend."""
    return partial(fastattn.attention, backend="cuda")
