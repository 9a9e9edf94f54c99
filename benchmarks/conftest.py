"""Benchmarks run where they are asked for: ``pytest --benchmark``, or this folder named on the command line."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastattn.bench.measure import settle

WARM_CALLS = 3  # before a call that is timed
LEAST_SECONDS = 0.1

collect_ignore = ["ring.py"]  # for mpiexec, which finds beside it what it imports


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the benchmarks out of a plain ``pytest``."""
    asked = config.getoption("benchmark_only", default=False) or config.args_source is pytest.Config.ArgsSource.ARGS
    return None if asked else True


@pytest.fixture
def alternate(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Time a call, alternating with a peer's, whose share is the ratio in the extra info, beside the peer's time.

    Each is warmed up when the other's threads have come to rest: PyTorch's spin for 8 ms after a call, on the cores
    that the next one wants. One call is not enough for that: workers come late to it, and find nothing in their caches.
    They alternate once where ``--benchmark-max-time`` leaves no time for more.
    """
    is_short = float(request.config.getoption("benchmark_max_time")) < LEAST_SECONDS

    def run(
        ours: Callable[[], object], theirs: Callable[[], object], peer: str, rounds: int, work: float = 1.0
    ) -> None:
        before: list[float] = []
        ratios: list[float] = []

        def warm_up(call: Callable[[], object]) -> None:
            settle()
            for _ in range(WARM_CALLS):
                call()

        def setup() -> None:
            warm_up(theirs)
            begin = time.perf_counter()
            theirs()
            before.append(time.perf_counter() - begin)
            warm_up(ours)

        def timed() -> None:
            begin = time.perf_counter()
            ours()
            ratios.append(work * before[-1] / (time.perf_counter() - begin))

        theirs()
        ours()
        benchmark.pedantic(timed, setup=setup, rounds=1 if is_short else rounds)
        benchmark.extra_info.update({"ratio": statistics.median(ratios), peer: statistics.median(before)})

    return run
