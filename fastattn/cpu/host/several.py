"""Several calls, run as one: nobody waits for the end of each, and Python has nothing to do in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastattn.call.problem import FLOAT32, Array
from fastattn.cpu.host import session
from fastattn.cpu.host.calls import Plan, calls_of, number_of, packed
from fastattn.cpu.host.kernels import load
from fastattn.cpu.host.pool import concurrency, tasks_at_a_time
from fastattn.cpu.kernels.records import RECORD_BYTES, RUN, SCHEDULE
from fastattn.machine.kernel import Kernel
from fastattn.machine.objects import address_of

__all__ = ["Alike", "alike", "run"]

RUN_FLOPS = 1e6  # tasks of one call that are less than this are run together
SCRATCH_BYTES_AT = SCHEDULE.fields["scratch_bytes"][1]  # type: ignore[index]


class Alike(NamedTuple):
    """Calls that have one plan.

    Attributes
    ----------
    plan : Plan
    records : ndarray of uint64
        A row for each call: its record, from the plan and the working memory on, which are still to be written.
    objects : object
        What has to live until they have been run.
    """

    plan: Plan
    records: Array
    objects: Any


def alike(plan: Plan, objects: Mapping[str, Any], names: Sequence[str], moves: Array) -> Alike:
    """Describe calls that have one plan.

    Parameters
    ----------
    plan : Plan
    objects : mapping of str to (ndarray, int or None)
        What the record of the first has, by its names.
    names : sequence of str
        Those of the record behind the plan and the working memory.
    moves : ndarray of int64, shape (calls, len(names))
        What is added to the numbers of the first.
    """
    records = np.zeros((len(moves), 2 + len(names)), np.uint64)
    first = np.array([number_of(objects.get(name)) for name in names], np.uint64)
    np.add(first, moves.view(np.uint64), out=records[:, 2:])  # modulo 2**64
    return Alike(plan, records, objects)


def run(calls: Sequence[Alike], threads: int) -> None:
    """Run all these calls, none of which reads what another writes; those with the longest tasks come first."""
    calls = [each for each in calls if each.plan.tasks]
    if not calls:
        return
    scratch_bytes = max((each.plan.memory_bytes - RECORD_BYTES) // each.plan.threads for each in calls)
    plans, runs, longest = [], [], 0.0  # the plans have to live
    for each in sorted(calls, key=lambda each: -each.plan.flops / each.plan.tasks):
        plan = each.plan.record.copy()
        plan[SCRATCH_BYTES_AT : SCRATCH_BYTES_AT + 8].view(np.int64)[0] = scratch_bytes
        plans.append(plan)
        each.records[:, 0] = address_of(plan)
        runs.append(_runs(each))
        longest = max(longest, each.plan.flops / runs[-1].shape[1])
    table = np.concatenate([rows.reshape(-1, len(RUN)) for rows in runs])
    flops = sum(each.plan.flops * len(each.records) for each in calls)
    threads, turn = concurrency(len(table), flops, threads), tasks_at_a_time(1, longest)
    fields = {"tasks": len(table), "workers": threads - 1, "turn": turn, "scratch_bytes": scratch_bytes}
    whole = Plan(
        out_shape=(),
        storage=FLOAT32,
        real=FLOAT32,
        has_bias=False,
        drops=False,
        calls=calls_of(load(Kernel("several", session.current.row))),
        record=packed(SCHEDULE, fields, []),
        tasks=len(table),
        turn=turn,
        flops=flops,
        threads=threads,
        memory_bytes=RECORD_BYTES + threads * scratch_bytes,
        is_small=False,
    )
    session.current.run(whole, (table,))


def _runs(calls: Alike) -> Array:
    """Return the tasks of calls, shape (calls, runs of one, `RUN`)."""
    plan, records = calls.plan, calls.records
    together = max(1, int(RUN_FLOPS * plan.tasks / max(1.0, plan.flops)))
    first = np.arange(0, plan.tasks, together)
    runs = np.empty((len(records), len(first), len(RUN)), np.int64)
    runs[..., RUN.index("task")] = plan.calls.kernel.addresses["task"]
    runs[..., RUN.index("call")] = (address_of(records) + records.strides[0] * np.arange(len(records)))[:, None]
    runs[..., RUN.index("first")], runs[..., RUN.index("end")] = first, np.minimum(first + together, plan.tasks)
    return runs
