"""What asv keeps the history of: cases of ``python -m fastattn bench``, measured as there, and how long a start takes.

`asv.conf.json` beside this says how asv is run; ``make history`` runs it. The cases and the measuring are those of the
commit that is measured.
"""

from __future__ import annotations

import subprocess
import sys

from fastattn.bench.cases import QUICK
from fastattn.bench.measure import sample
from fastattn.bench.peers import OURS, cores, prepare

SECONDS = 0.5  # of calls, for a sample
START = """
import time
import numpy as np
begin = time.perf_counter()
import fastattn
fastattn.attention(*np.zeros((3, 1, 2, 40, 16), np.float32))
print(time.perf_counter() - begin)
"""


class Calls:
    """A call of each kind: the first case of each group of the table."""

    params = tuple(case.name for case in QUICK)
    param_names = ("case",)
    unit = "s"
    timeout = 300

    def setup(self, name: str) -> None:
        """Make the inputs, compile, and compare the result with the reference."""
        (self.case,) = (case for case in QUICK if case.name == name)
        self.call = prepare(OURS, self.case, cores())

    def track_call(self, name: str) -> float:
        """Return the time of one call: the median of many."""
        return sample(self.call.run, self.case.pace, SECONDS)


class Start:
    """The first call of a process, importing fastattn included, NumPy not."""

    unit = "s"
    timeout = 300

    def setup(self) -> None:
        """Fill the cache of kernels."""
        self.track_start()

    def track_start(self) -> float:
        """Return the least of three."""
        return min(float(subprocess.check_output([sys.executable, "-c", START])) for _ in range(3))
