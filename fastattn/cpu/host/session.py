"""The state of a process: plans of calls, working memory, and the pool of workers. Nothing else is global."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from fastattn.cpu.host import processors
from fastattn.cpu.host.calls import Memory, Plan
from fastattn.cpu.host.pool import Pool
from fastattn.machine.table import Isa, host

T = TypeVar("T")

REMEMBERED = 1024  # plans that are found again at once, and as many that have not been asked for since


class Plans(dict[Hashable, Any]):
    """Plans of calls, by what they depend on. Those that have not been asked for in a long while are forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.older: dict[Hashable, Any] = {}

    def keep(self, key: Hashable, plan: Any) -> None:
        """Remember a plan; with too many of them, the others are about to be forgotten."""
        if len(self) >= REMEMBERED:
            self.older = dict(self)
            self.clear()
        self[key] = plan

    def of(self, key: Hashable, make: Callable[[], T]) -> T:
        """The plan of that key, which is made if it is not there."""
        plan: T | None = self.get(key)
        if plan is None:
            plan = self.older.get(key)
            plan = make() if plan is None else plan
            self.keep(key, plan)
        return plan


class Session:
    """What calls have in common. Tests make one of their own."""

    def __init__(self, row: Isa | None = None) -> None:
        self._row = row
        self.plans = Plans()
        self.memory = Memory()
        self.pool = Pool()

    @property
    def row(self) -> Isa:
        """The row of the table of machines that calls are planned for."""
        return self._row or host()

    def run(self, plan: Plan, objects: tuple[Any, ...]) -> None:
        """Run a call: `objects` are what its record has, in that order, arrays, integers and None."""
        if plan.threads > 1:
            self.pool.serve(plan, self.memory, objects)
        elif plan.turn < plan.tasks:
            processors.look_if_old()
            taken = self.memory.take(plan.memory_bytes)
            plan.calls.in_turns(taken[1], plan, objects)
            self.memory.held = taken
        elif plan.tasks:
            if not plan.is_small:
                processors.look_if_old()
            plan.calls.quick(self.memory.of(plan.memory_bytes)[1], plan.record, *objects)


current = Session()


def forget() -> None:
    """Begin with no workers: a forked child has none, and nobody to give locks back."""
    current.pool = Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
