"""Systems without what Linux has: no affinity, no fork, no owners of files; the name is another. Imitated here."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest

# What the system offers goes when all is loaded that was installed for this one.
IMITATION = """
import os, sys
import multiprocessing
import numba.core.codegen
import numpy as np
for name in {missing}:
    vars(os).pop(name, None)
sys.platform = {system!r}
"""
CALLS = """
import fastattn
from fastattn.__main__ import _cache, _cores, _machine
from fastattn.cpu.host import pool, processors, session
from fastattn.machine.libraries import cache_folder
pool.WORTH_SHARING = pool.WORTH_WAKING = 0
assert processors.affinity() == frozenset()
assert fastattn.get_num_threads() == processors.limit()
fastattn.set_num_threads(2)
arrays = np.random.default_rng(0).standard_normal((3, 1, 4, 40, 16), dtype=np.float32)
wanted = fastattn.attention(*arrays, backend="reference")
for _ in range(20):
    assert abs(fastattn.attention(*arrays) - wanted).max() < 1e-5
assert session.current.pool.staff == 1
print(cache_folder(), sorted({path.name.split("-")[0] for path in cache_folder().iterdir()}))
print(_machine(), _cores(), _cache())
"""
MISSING = {
    "win32": ("fork", "register_at_fork", "geteuid", "sched_getaffinity", "sched_setaffinity"),
    "darwin": ("sched_getaffinity", "sched_setaffinity"),
}


@pytest.mark.parametrize("system", MISSING)
def test_calls_by_two_threads_and_the_cache(tmp_path: Path, system: str) -> None:
    places = dict.fromkeys(("HOME", "LOCALAPPDATA", "XDG_CACHE_HOME"), str(tmp_path))
    code = IMITATION.format(system=system, missing=MISSING[system]) + CALLS
    printed = processes.run(code, FASTATTN_CACHE_DIR=None, FASTATTN_NUM_THREADS=None, timeout=300, **places)
    folder = tmp_path / ("Library/Caches/fastattn" if system == "darwin" else "fastattn")
    assert printed.startswith(f"{folder} ['forward', 'schedule', 'signature']\n")
    assert f"{folder} (3 kernels" in printed
