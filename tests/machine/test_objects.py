"""Arrays as objects in memory, and what NumPy imports to answer a question about them."""

from __future__ import annotations

import processes


def test_whether_an_array_is_masked_imports_nothing() -> None:
    """A child of a fork would wait for ever for an import that another thread is in."""
    code = """
import sys
import numpy as np
import fastattn
assert "numpy.ma" not in sys.modules
sys.modules["numpy.ma"] = None  # an import of it would fail
class Kind(np.ndarray): pass
array = np.ones((1, 2, 3, 4), np.float32)
of_a_kind, table = array.view(Kind), np.arange(3.0)
options = {"score_mod": lambda score, batch, head, query, key: score + table[key], "backend": "reference"}
print(fastattn.attention(of_a_kind, array, array, **options).shape)
print(fastattn.BlockMask.from_intervals(np.zeros(3, int), np.ones(3, int), 3).shape)
"""
    assert processes.run(code) == "(1, 2, 3, 4)\n(1, 1, 3, 3)\n"
