"""Several calls as one, whose tasks are runs of theirs: calls of any kernels, each with a record of its own.

All have the same working memory, in pieces that are large enough for any of them: that of whom runs the task.
"""

import numpy as np

from fastattn.cpu.kernels.records import CALL, RUN, SEVERAL
from fastattn.simd import call_compiled, jit, record_view, store_i64

RUN_RECORD = np.dtype([(name, np.int64) for name in RUN])
several_view, run_view = record_view(SEVERAL), record_view(RUN_RECORD)
RUN_BYTES = RUN_RECORD.itemsize
SCRATCH_AT = CALL.fields["scratch"][1]  # type: ignore[index]


@jit
def task(call_at, slot, number):
    """Run some tasks of one of the calls."""
    several = several_view(call_at)
    run = run_view(several.runs + number * RUN_BYTES)
    store_i64(run.call + SCRATCH_AT, several.scratch)  # the same for whoever writes it
    for own in range(run.first, run.end):
        call_compiled(run.task, (run.call, slot, own))
