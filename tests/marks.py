"""What is left out unless it is asked for."""

from __future__ import annotations

import os

import pytest

SLOW = "FASTATTN_SLOW" in os.environ
takes_long = pytest.mark.skipif(not SLOW, reason="takes long; FASTATTN_SLOW=1 runs it")
