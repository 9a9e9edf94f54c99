"""What all tests of plots begin and end with."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def close() -> Any:
    """Close all figures."""
    yield
    from matplotlib import pyplot

    pyplot.close("all")
