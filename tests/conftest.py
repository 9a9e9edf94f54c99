"""Fixtures of all tests: which backend, and how hard Hypothesis tries."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import emulated_amx
import processes
import pytest
from hypothesis import HealthCheck, settings
from numba import config

import fastattn
from fastattn.cpu.host import session
from fastattn.machine import table as isa

# CUDA where there is a GPU; the simulator, which takes its time, is for tests/cuda
HAS_CUDA = find_spec("numba_cuda") is not None and not config.ENABLE_CUDASIM
BACKENDS = ("reference", "cpu", *(["cuda"] if HAS_CUDA else []))

# A first call compiles, which no deadline should count. The default profile tries the same examples every time, so that
# a failure is somebody's change; the thorough one, FASTATTN_TEST_PROFILE=thorough, looks for new ones.
_usual: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=25, derandomize=True, database=None, **_usual)
settings.register_profile("thorough", max_examples=2000, **_usual)
settings.load_profile(os.environ.get("FASTATTN_TEST_PROFILE", "default"))


WHOLE_SUITE = 6000  # tests: fewer, such as those beside, do not want most of the kernels
_warmup: list[subprocess.Popen[str]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let it be asked for that calls on the CPU use a matrix unit."""
    parser.addoption(
        "--matrix-unit", action="store_true", help="compute in-process calls on a matrix unit, or emulate one"
    )


def pytest_configure() -> None:
    """Have Ctrl-C interrupt, here and in what tests start: shells have what they start with an ``&`` ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Have calls on the CPU use a matrix unit, if asked to: now that pytest has set its own handlers of signals."""
    if session.config.getoption("--matrix-unit"):
        emulated_amx.use_everywhere()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Have all kernels compiled on another core meanwhile: tests would wait for that a fifth of the time."""
    if len(session.items) > WHOLE_SUITE and not session.config.option.collectonly:
        _warmup.append(processes.start("import fastattn; fastattn.warmup()"))


def pytest_unconfigure() -> None:
    """Leave nothing running."""
    while _warmup:
        process = _warmup.pop()
        process.kill()
        process.communicate()


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Return the name of each backend in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def attention(backend: str) -> Callable[..., Any]:
    """Return `fastattn.attention` on each backend in turn."""
    return partial(fastattn.attention, backend=backend)


@pytest.fixture
def sixteen_lanes(monkeypatch: pytest.MonkeyPatch) -> isa.Isa:
    """Have calls use the lanes, tile and blocks of AVX-512, in whatever vectors this machine has; return the row."""
    here = isa.host()
    wide = next(row for row in isa.TABLE if row.name == "avx512")
    row = replace(wide, name="wide", cpu=here.cpu, needs=here.needs, scalef=here.scalef, halves=here.halves)
    if here.vector_bytes == wide.vector_bytes:
        row = here  # whose kernels are compiled already
    monkeypatch.setattr(session.current, "_row", row)
    monkeypatch.setattr(session.current, "plans", session.Plans())
    return row


@pytest.fixture(scope="session")
def amx() -> isa.Isa:
    """Return the row of machines with a matrix unit, whose instructions are emulated if this one has none."""
    row = emulated_amx.row()
    if row is None:
        pytest.skip("a matrix unit is emulated on a processor that has all else that its row needs")
    return row


@pytest.fixture(scope="session")
def cpu_attention() -> Callable[..., Any]:
    """Return `fastattn.attention` on the CPU backend, for what only it promises."""
    return partial(fastattn.attention, backend="cpu")
