"""What is left out unless it is asked for."""

from __future__ import annotations

import os

import pytest

takes_long = pytest.mark.skipif("FASTATTN_SLOW" not in os.environ, reason="takes long; FASTATTN_SLOW=1 runs it")
