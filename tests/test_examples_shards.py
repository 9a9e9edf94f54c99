"""The examples of decoding over shards: what tokens see is what they see of the whole cache."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest

import fastattn

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="not in the source tree")


def load(name: str) -> Any:
    """Import an example, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_dask() -> None:
    dask = pytest.importorskip("dask", reason="Dask is not installed")
    da = pytest.importorskip("dask.array", reason="Dask is not installed")
    shards = load("shards_dask")
    kept = []

    def keep(array: Any, number: int) -> Any:
        kept.append(number)
        return array.persist()

    with dask.config.set(scheduler="synchronous"):
        cache = shards.ShardedCache(4, keep)
        first = [np.random.default_rng(number).standard_normal((2, 4, 8), dtype=np.float32) for number in range(2)]
        cache.add_shard(*(da.from_array(array, chunks=-1) for array in first))
        found = shards.decode(cache, 6, heads=4, kv_heads=2, features=8)
    assert kept == [0, 0, 1, 1]
    assert len(cache) == 10
    key, value = first
    rng = np.random.default_rng(0)
    for result in found:
        query = rng.standard_normal((4, 1, 8), dtype=np.float32)
        token = rng.standard_normal((2, 2, 1, 8), dtype=np.float32)
        key, value = (np.concatenate(each, axis=-2) for each in zip((key, value), token, strict=True))
        np.testing.assert_allclose(result, fastattn.attention(query, key, value, enable_gqa=True), atol=1e-6)


def test_dask_moves_results_and_no_shards() -> None:
    pytest.importorskip("distributed", reason="distributed is not installed")
    command = [sys.executable, FOLDER / "shards_dask.py", "--workers", "2", "--keys", "16384", "--tokens", "2"]
    done = subprocess.run(command, env=processes.environment(), text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "16386 tokens in 2 shards, 2 processes"
    assert lines[1] == "keys and values: 134 MB"
    assert float(lines[-1].split()[-2]) < 200  # kB
