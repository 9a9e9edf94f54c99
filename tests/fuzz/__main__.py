"""Random calls of everything, for as long as one likes: `make fuzz`.

Each case is what its seed says, and is run by one of some processes. What ends a process, or keeps it busy for minutes,
is a failure of that seed, as is a wrong result. `--seed` runs a seed alone. What was done is kept in a file, with which
the next run goes on, and `--pairs` says which things hardly ever stood in one call.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzz import cases, readers

STATE = Path(__file__).parents[2] / ".fuzz" / "progress.json"
WORKER = [sys.executable, "-u", "-m", "fuzz", "--worker"]
HANGS, LOOKS = 600.0, 5.0  # seconds: a first call compiles; and how often is looked
SAVED = 20.0  # seconds from one time to the next
FEW = 100  # a pair that stood in fewer calls says little


class Progress:
    """What was done so far, in a file."""

    def __init__(self, path: Path, first: int = 0) -> None:
        self.path = path
        self.next, self.cases, self.calls, self.left_out, self.seconds = first, 0, 0, 0, 0.0
        self.unfinished: list[int] = []  # seeds that were under way at the end
        self.failures: list[dict[str, Any]] = []
        self.pairs: Counter[str] = Counter()
        if path.exists():
            vars(self).update(json.loads(path.read_text("utf-8")))
            self.pairs = Counter(self.pairs)

    def following(self) -> int:
        """Return the next seed."""
        if self.unfinished:
            return self.unfinished.pop()
        self.next += 1
        return self.next - 1

    def save(self, running: list[int]) -> None:
        """Write it; what is running is begun with, the next time."""
        said = {name: value for name, value in vars(self).items() if name != "path"}
        said["unfinished"] = self.unfinished + running
        self.path.parent.mkdir(parents=True, exist_ok=True)
        other = self.path.with_suffix(".tmp")
        other.write_text(json.dumps(said), "utf-8")
        os.replace(other, self.path)

    def add(self, outcome: dict[str, Any]) -> None:
        """Count a case; note what is wrong."""
        if not outcome["traits"] and not outcome["failure"]:
            self.left_out += 1
            return
        self.cases += 1
        self.calls += outcome["calls"]
        self.pairs.update(cases.pairs(outcome["traits"]))
        if outcome["failure"]:
            self.failures.append({"seed": outcome["seed"], "failure": outcome["failure"]})
            print(f"seed {outcome['seed']}: {outcome['failure']}", flush=True)

    def __str__(self) -> str:
        rare = sum(count < FEW for count in self.pairs.values())
        return (
            f"{self.cases:,} cases, {self.calls:,} calls, {len(self.failures)} failures; {len(self.pairs):,} pairs, "
            f"{rare:,} of them in fewer than {FEW} calls; next is seed {self.next}"
        )


class Worker:
    """A process that runs seeds which it is told, and says what came of each."""

    def __init__(self, options: Sequence[str]) -> None:
        self.process = subprocess.Popen([*WORKER, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seed, self.since = -1, 0.0

    def begin(self, seed: int) -> None:
        """Have it run a seed."""
        self.seed, self.since = seed, time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as reading will say
            self.process.stdin.write(f"{seed}\n")
            self.process.stdin.flush()

    def outcome(self) -> dict[str, Any] | None:
        """Return what came of the seed, None if the process has ended without a word."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def stop(self) -> int:
        """End the process, and return its status."""
        with contextlib.suppress(BrokenPipeError), self.process:
            self.process.kill()
        return self.process.wait()


def worked(seed: int) -> dict[str, Any]:
    """Run a seed, and return what came of it."""
    said: dict[str, Any] = {"seed": seed, "calls": 0, "traits": [], "failure": ""}
    try:
        said["calls"], said["traits"] = cases.run(seed)
    except cases.NotCompiledError:
        pass
    except Exception as error:
        cause = error.__cause__ or error
        last = traceback.extract_tb(cause.__traceback__)[-1]
        said["failure"] = (
            f"{type(cause).__name__}: {str(cause)[:300]} ({Path(last.filename).name}:{last.lineno}); {error}"[:1500]
        )
    return said


def work() -> None:
    """Run the seeds that are read."""
    faulthandler.enable()
    warnings.simplefilter("error")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    for line in sys.stdin:
        answers.write(json.dumps(worked(int(line))) + "\n")
        answers.flush()


def fuzz(progress: Progress, processes: int, minutes: float, most: int, options: Sequence[str] = ()) -> None:
    """Run seeds until the time is over, or so many have been; `options` are those of workers."""
    begin = saved = time.monotonic()
    before, until = progress.seconds, begin + 60 * minutes
    found = selectors.DefaultSelector()
    busy: dict[Any, Worker] = {}

    def start() -> None:
        worker = Worker(options)
        busy[worker.process.stdout] = worker
        found.register(worker.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
        following(worker)

    def following(worker: Worker) -> None:
        worker.begin(progress.following())

    def ended(worker: Worker, why: str) -> None:
        found.unregister(worker.process.stdout)  # type: ignore[arg-type]
        del busy[worker.process.stdout]
        status = worker.stop()
        said = {"seed": worker.seed, "calls": 0, "traits": [], "failure": why or f"the process ended, status {status}"}
        progress.add(said)
        start()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for _ in range(processes):
            start()
        while (now := time.monotonic()) < until and progress.cases < most:
            for key, _ in found.select(timeout=LOOKS):
                worker = busy[key.fileobj]
                outcome = worker.outcome()
                if outcome is None:
                    ended(worker, "")
                else:
                    progress.add(outcome)
                    following(worker)
            for worker in [one for one in busy.values() if now - one.since > HANGS]:
                ended(worker, f"no result within {HANGS} s")
            if now - saved > SAVED:
                saved, progress.seconds = now, before + now - begin
                progress.save([one.seed for one in busy.values()])
    finally:
        progress.seconds = before + time.monotonic() - begin
        progress.save([one.seed for one in busy.values()])
        for worker in busy.values():
            worker.stop()


def main() -> int:
    """Do what the command line says."""
    if sys.argv[1:2] == ["readers"]:
        return readers.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long, %(default)s unless given")
    parser.add_argument(
        "--cases", type=int, default=sys.maxsize, help="how many in all, those of earlier runs included"
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed, where nothing has been done yet")
    parser.add_argument("--compiled", action="store_true", help="leave out what would have to be compiled")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="how many at once")
    parser.add_argument("--state", type=Path, default=STATE, help="the file with what was done")
    parser.add_argument("--seed", type=int, help="run the case of a seed, and say why it fails")
    parser.add_argument("--pairs", action="store_true", help="what hardly ever stood in one call")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compiled:
        cases.compile_nothing()
    if given.worker:
        work()
        return 0
    if given.seed is not None:
        print(cases.run(given.seed))
        return 0
    progress = Progress(given.state, given.first)
    if given.pairs:
        for pair, count in reversed(progress.pairs.most_common()):
            print(f"{count:8,}  {pair}")
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        fuzz(progress, given.processes, given.minutes, given.cases, ["--compiled"] * given.compiled)
    print(progress)
    return bool(progress.failures)


if __name__ == "__main__":
    sys.exit(main())
