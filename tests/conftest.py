"""Fixtures of all tests: which backend, and how hard Hypothesis tries."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import fastattn

# the modules that tests share, strategies and tolerances: pytest's importlib mode leaves sys.path alone
sys.path.insert(0, str(Path(__file__).parent))

BACKENDS = ("reference", "cpu")

# A first call compiles, which no deadline should count. The default profile tries the same examples every time, so that
# a failure is somebody's change; the thorough one, FASTATTN_TEST_PROFILE=thorough, looks for new ones.
_usual: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=60, derandomize=True, database=None, **_usual)
settings.register_profile("thorough", max_examples=2000, **_usual)
settings.load_profile(os.environ.get("FASTATTN_TEST_PROFILE", "default"))


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Return the name of each backend in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def attention(backend: str) -> Callable[..., Any]:
    """Return `fastattn.attention` on each backend in turn."""
    return partial(fastattn.attention, backend=backend)


@pytest.fixture(scope="session")
def cpu_attention() -> Callable[..., Any]:
    """Return `fastattn.attention` on the CPU backend, for what only it promises."""
    return partial(fastattn.attention, backend="cpu")
