"""Benchmarks run where they are asked for: ``pytest --benchmark``, or this folder named on the command line."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastattn.bench.cases import Case
from fastattn.bench.measure import PACE_S, settle
from fastattn.bench.peers import Engine, Unavailable, cores, prepare

WARM_CALLS = 3  # before a call that is timed

collect_ignore = ["ring.py"]  # for mpiexec, which finds beside it what it imports


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the benchmarks out of a plain ``pytest``."""
    asked = config.getoption("benchmark_only", default=False) or config.args_source is pytest.Config.ArgsSource.ARGS
    return None if asked else True


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case, Engine], None]:
    """Time one engine's call of a case, in the group of that case, for about ``--benchmark-max-time``."""
    seconds = float(request.config.getoption("benchmark_max_time"))

    def run(case: Case, engine: Engine) -> None:
        try:
            call = prepare(engine, case, cores())
        except Unavailable as reason:
            pytest.skip(f"{engine.name}: {reason}")
        benchmark.group = case.name
        benchmark.extra_info.update(case=case.name, engine=engine.name, version=engine.version, flops=case.flops)
        settle()
        begin = time.perf_counter()
        call.run()
        estimate = time.perf_counter() - begin
        if case.pace == "tight":
            iterations = max(1, math.ceil(seconds / 20 / estimate))
            benchmark.pedantic(call.run, rounds=20, iterations=iterations, warmup_rounds=1)
        elif case.pace == "paced":
            rounds = max(3, math.ceil(seconds / PACE_S))
            benchmark.pedantic(call.run, setup=lambda: time.sleep(PACE_S), rounds=rounds, warmup_rounds=1)
        else:
            benchmark.pedantic(call.run, rounds=math.ceil(seconds / estimate))
        if case.unit == "GF/s" and benchmark.stats is not None:
            benchmark.extra_info["gflops"] = case.flops / benchmark.stats.stats.median / 1e9

    return run


@pytest.fixture
def alternate(benchmark: Any) -> Callable[..., None]:
    """Time a call, alternating with a peer's, whose share is the ratio in the extra info, beside the peer's time.

    Each is warmed up when the other's threads have come to rest: PyTorch's spin for 8 ms after a call, on the cores
    that the next one wants. A call is not enough for that: its workers came late, and what they read is in the caches of
    others.
    """

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
        benchmark.pedantic(timed, setup=setup, rounds=rounds)
        benchmark.extra_info.update({"ratio": statistics.median(ratios), peer: statistics.median(before)})

    return run
