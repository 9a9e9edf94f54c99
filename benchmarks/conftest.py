"""Benchmarks run where they are asked for: ``pytest --benchmark``, or this folder named on the command line."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastattn.bench.measure import settle

WARM_CALLS = 3  # before calls that are timed
SAMPLE_SECONDS = 1e-3  # of short calls as many are timed together as take so long
LEAST_SECONDS = 0.1

collect_ignore = ["ring.py"]  # for mpiexec, which finds beside it what it imports


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the benchmarks out of a plain ``pytest``."""
    asked = config.getoption("benchmark_only", default=False) or config.args_source is pytest.Config.ArgsSource.ARGS
    return None if asked else True


@pytest.fixture
def alternate(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Time a call, alternating with a peer's. The extra info has the ratio of theirs to ours, and the times of a call.

    Of short calls, so many are timed together, which is what the table of pytest-benchmark shows.

    Each is warmed up when the other's threads have come to rest: PyTorch's spin for 8 ms after a call, on the cores
    that the next one wants. One call is not enough for that: workers come late to it, and find nothing in their caches.
    They alternate once where ``--benchmark-max-time`` leaves no time for more.
    """
    is_short = float(request.config.getoption("benchmark_max_time")) < LEAST_SECONDS

    def run(
        ours: Callable[[], object], theirs: Callable[[], object], peer: str, rounds: int, work: float = 1.0
    ) -> None:
        times: dict[str, list[float]] = {"ours": [], peer: []}

        def warm_up(call: Callable[[], object]) -> None:
            settle()
            for _ in range(WARM_CALLS):
                call()

        def repeat(call: Callable[[], object], calls: int) -> float:
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - begin) / calls

        def setup() -> None:
            warm_up(theirs)
            times[peer].append(repeat(theirs, calls))
            warm_up(ours)

        def timed() -> None:
            times["ours"].append(repeat(ours, calls))

        theirs()
        ours()
        calls = 1 if is_short else max(1, int(SAMPLE_SECONDS / repeat(ours, 1)))
        benchmark.pedantic(timed, setup=setup, rounds=1 if is_short else rounds)
        ratios = [work * other / own for own, other in zip(times["ours"], times[peer], strict=True)]
        benchmark.extra_info.update({name: statistics.median(seconds) for name, seconds in times.items()})
        benchmark.extra_info.update({"calls": calls, "ratio": statistics.median(ratios)})

    return run
