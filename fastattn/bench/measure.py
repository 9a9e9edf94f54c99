"""How it is measured: all engines alternate in one process, several rounds, and medians are compared.

A round takes one sample of each engine, and of the machine's peak, in a random order; a machine that grows slower or
faster in the meantime does so for all of them, so that the ratios *within* a round mean more than those of the totals.
The table has the median time of an engine, and the median over the rounds of the ratio of two engines.

Thread pools do not stop when a call returns. Their workers spin, for the sake of the next call, and whoever is measured
next shares the cores with them. On 2 cores, (1, 8, 512, 64) in float32, milliseconds a call, after another engine has
worked and a pause was made:

==================  ====  ====  ====  =====  =====
PyTorch, after      none  1 ms  10 ms 50 ms  alone
==================  ====  ====  ====  =====  =====
ONNX Runtime        11.7  16.0  12.2  5.9    5.6
NumPy (OpenBLAS)    15.2  12.0  16.0  10.5   5.6
OpenVINO            5.7   5.6   5.7   5.3    5.6
==================  ====  ====  ====  =====  =====

ONNX Runtime is slowed down by PyTorch's workers likewise, for some milliseconds. A subprocess for each engine would
change nothing, since the cores are the same, and forbidding the engines to spin would make them slower. So each sample
first waits until this process burns no CPU time any more (`settle`), and then warms the engine up, since a pool
that has gone to sleep is late for its first call.

Other processes, and other guests of the same host, take the cores at times, which Linux counts. A sample during which
they took a good part of a core is taken again, whosever it is (`undisturbed`).
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import fastattn
from fastattn.bench.cases import Case, Pace
from fastattn.bench.peers import ENGINES, OURS, Call, Engine, Unavailable, cores, prepare
from fastattn.cpu.host import peak

__all__ = ["PACE_S", "Effort", "Result", "measure", "others_seconds", "sample", "schedule", "settle", "undisturbed"]

PACE_S = 0.020
"""The pause between two calls of a "paced" case."""
_PACED_CALLS = 25  # of a sample: the first ones still feel what was before, in caches, clocks and threads
_DISTURBED = 0.25  # cores that others take; less cannot be told from the clock ticks in which Linux counts
_ATTEMPTS = 3


@dataclass(frozen=True)
class Effort:
    """How much time is spent: `rounds` rounds, in each about `seconds` on each engine."""

    rounds: int = 9
    seconds: float = 0.08

    @classmethod
    def quick(cls) -> Effort:
        """Return what is enough to see whether all of it runs, and roughly how fast."""
        return cls(rounds=3, seconds=0.03)


class Measured(Protocol):
    """What is asked of a case once it has been measured."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def unit(self) -> str:
        """What tables show."""

    @property
    def flops(self) -> int:
        """Operations of a call."""

    def figure(self, seconds: float) -> float:
        """Return what tables show of a call that takes so long."""


@dataclass
class Result:
    """What was measured of one case.

    Attributes
    ----------
    case : Case or fastattn.bench.gpu.DeviceCase
        The case.
    times : dict of str to list of float
        Seconds a call, one number per round, for each engine that took part.
    peaks : list of float
        GF/s of the register tile, one number per round; empty where that is unknown.
    absent : dict of str to str
        Why an engine did not take part.
    others : list of float
        How many cores other processes took, one number for each of all the samples.

    Examples
    --------
    >>> from fastattn.bench.cases import Case
    >>> from fastattn.bench.measure import Result
    >>> times = {"fastattn": [1.0, 2.0, 1.0], "PyTorch": [1.5, 3.0, 1.4], "NumPy": [9.0, 9.0, 9.0]}
    >>> result = Result(Case("float32", 1, 1, 1000, 250), times, peaks=[2.0, 1.0, 2.0])
    >>> result.seconds("PyTorch"), result.best_peer, result.ratio("PyTorch"), result.of_peak
    (1.5, 'PyTorch', 1.5, 0.5)
    """

    case: Measured
    times: dict[str, list[float]] = field(default_factory=dict)
    peaks: list[float] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)

    def seconds(self, engine: str) -> float:
        """Return the median time of a call."""
        return median(self.times[engine])

    def figure(self, engine: str) -> float:
        """Return what the table shows of an engine, in the case's `unit`."""
        return self.case.figure(self.seconds(engine))

    @property
    def best_peer(self) -> str | None:
        """The fastest engine that is neither fastattn nor NumPy, or NumPy if it is alone."""
        others = [name for name in self.times if name != OURS.name]
        libraries = [name for name in others if name != "NumPy"] or others
        return min(libraries, key=self.seconds, default=None)

    def ratio(self, engine: str) -> float | None:
        """Return how many times faster than this engine fastattn is, or None if one of them did not take part."""
        if OURS.name not in self.times or engine not in self.times:
            return None
        return median(other / own for own, other in zip(self.times[OURS.name], self.times[engine], strict=True))

    @property
    def of_peak(self) -> float | None:
        """What part of the peak fastattn reaches."""
        if OURS.name not in self.times or not self.peaks:
            return None
        rates = (self.case.flops / seconds / 1e9 for seconds in self.times[OURS.name])
        return median(rate / peak for rate, peak in zip(rates, self.peaks, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in the types of JSON."""
        return {
            "case": self.case.name,
            "unit": self.case.unit,
            "flops": self.case.flops,
            "seconds": self.times,
            "peak_gflops": self.peaks,
            "figures": {name: self.figure(name) for name in self.times},
            "best_peer": self.best_peer,
            "ratio": {name: self.ratio(name) for name in self.times if name != OURS.name},
            "of_peak": self.of_peak,
            "absent": self.absent,
            "others_cores": self.others,
        }


def settle(limit: float = 1.0) -> None:
    """Wait until no thread of this process burns CPU time any more, at most `limit` seconds."""
    quiet = 0
    deadline = time.perf_counter() + limit
    while quiet < 2 and time.perf_counter() < deadline:
        wall, used = time.perf_counter(), time.process_time()
        time.sleep(0.005)
        burnt = (time.process_time() - used) / (time.perf_counter() - wall)
        quiet = quiet + 1 if burnt < 0.1 else 0  # once may only mean that the spinning thread was not scheduled


@dataclass(frozen=True)
class Schedule:
    """How a sample is taken: so many times, of so many calls each, after a pause of so many seconds."""

    times: int
    calls: int = 1
    pause: float = 0.0

    def rest(self) -> None:
        """Pause, where there is a pause, before one of the times."""
        if self.pause:
            time.sleep(self.pause)


def schedule(run: Callable[[], Any], pace: Pace, seconds: float) -> Schedule:
    """Warm up a call, and return how it is sampled in about `seconds`.

    Parameters
    ----------
    run : callable
        Makes the call.
    pace : str
        How the calls follow each other, see `Case`.
    seconds : float
        For how long the calls are made.
    """
    settle()
    # the first calls after a pause wait for threads to wake up
    begin = time.perf_counter()
    calls = 0
    while not calls or time.perf_counter() - begin < seconds / 4:
        run()
        calls += 1
    fitting = math.ceil(seconds * calls / (time.perf_counter() - begin))
    if pace == "tight":
        return Schedule(1, max(10, fitting))
    return Schedule(_PACED_CALLS, pause=PACE_S) if pace == "paced" else Schedule(fitting)


def sample(run: Callable[[], Any], pace: Pace, seconds: float) -> float:
    """Return the time of one call in seconds, the median of those that `schedule` has taken."""
    clock = time.perf_counter
    plan = schedule(run, pace, seconds)
    times = []
    for _ in range(plan.times):
        plan.rest()
        begin = clock()
        for _ in range(plan.calls):
            run()
        times.append((clock() - begin) / plan.calls)
    return median(times)


def others_seconds() -> float:
    """Return the CPU time that has been used so far by all but this process, other guests of the host included.

    Only Linux says; elsewhere it is always 0.
    """
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) for word in words[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def undisturbed(take: Callable[[], float]) -> tuple[float, float]:
    """Take a sample, and take it again if others took the cores meanwhile, a few times at most.

    Returns
    -------
    value : float
        The least disturbed sample.
    cores : float
        How many cores the others took meanwhile.
    """
    samples: list[tuple[float, float]] = []
    while len(samples) < _ATTEMPTS:
        begin, before = time.perf_counter(), others_seconds()
        value = take()
        used = (others_seconds() - before) / (time.perf_counter() - begin)
        samples.append((max(0.0, used), value))
        if used < _DISTURBED:
            break
    used, value = min(samples, key=lambda one: one[0])
    return value, used


def measure(
    case: Case,
    effort: Effort | None = None,
    engines: Sequence[Engine] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Result:
    """Measure one case: every engine that can do it, in alternation.

    Parameters
    ----------
    case : Case
        What to call.
    effort : Effort, optional
        How much time to spend.
    engines : sequence of Engine, optional
        Whom to measure, all of them unless given.
    threads : int, optional
        How many threads each of them gets, all cores unless given.
    progress : callable
        Is told how many steps are done, of how many, and what is being done.
    """
    effort = effort or Effort()
    threads = threads or cores()
    threads_before = fastattn.get_num_threads()
    try:
        return _measure(case, effort, ENGINES if engines is None else engines, threads, progress)
    finally:
        fastattn.set_num_threads(threads_before)


def _peak(case: Case, threads: int, seconds: float) -> float:
    settle()
    return peak.measure(case.dtype, threads, seconds)


def _measure(
    case: Case, effort: Effort, engines: Sequence[Engine], threads: int, progress: Callable[[int, int, str], None]
) -> Result:
    result = Result(case)
    calls: dict[str, Call] = {}
    takes: dict[str, Callable[[], float]]
    for engine in engines:
        progress(0, effort.rounds, f"preparing {engine.name}")
        try:
            calls[engine.name] = prepare(engine, case, threads)
            result.times[engine.name] = []
        except Unavailable as reason:
            result.absent[engine.name] = str(reason)

    takes = {name: partial(sample, call.run, case.pace, effort.seconds) for name, call in calls.items()}
    if case.unit == "GF/s":
        takes["peak"] = partial(_peak, case, threads, effort.seconds)
    names = list(takes)
    order = random.Random(0)
    for number in range(effort.rounds):
        order.shuffle(names)
        for name in names:
            progress(number, effort.rounds, name)
            value, used = undisturbed(takes[name])
            (result.peaks if name == "peak" else result.times[name]).append(value)
            result.others.append(used)
    return result
