"""Is attention faster than every other library's? The cases of ``python -m fastattn bench``, one by one.

They are taken as they are there; ``-k "backward and PyTorch"`` chooses.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastattn.bench.cases import CASES, Case
from fastattn.bench.measure import Effort, schedule
from fastattn.bench.peers import ENGINES, Engine, Unavailable, cores, prepare


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(benchmark: Any, request: pytest.FixtureRequest, case: Case, engine: Engine) -> None:
    """Time one engine's call of a case, in the group of that case, for about ``--benchmark-max-time``."""
    try:
        call = prepare(engine, case, cores())
    except Unavailable as reason:
        pytest.skip(f"{engine.name}: {reason}")
    benchmark.group = case.name
    benchmark.extra_info.update(case=case.name, engine=engine.name, version=engine.version, flops=case.flops)
    rounds = Effort().rounds if case.pace == "tight" else 1  # else each call has a time of its own
    plan = schedule(call.run, case.pace, float(request.config.getoption("benchmark_max_time")) / rounds)
    setup = plan.rest if plan.pause else None  # with which pytest-benchmark refuses several calls at a time
    benchmark.pedantic(call.run, setup=setup, rounds=rounds * plan.times, iterations=plan.calls)
    if case.unit == "GF/s" and benchmark.stats is not None:
        benchmark.extra_info["gflops"] = case.figure(benchmark.stats.stats.median)
