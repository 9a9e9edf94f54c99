"""What do keys and values on disk cost, read block by block, against the same call on arrays in memory?

The file has been written a moment ago, and is in the system's cache: this is a disk that keeps up. The ratio is that of
the time in memory to ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.bench.peers import cores

#: Heads, queries, keys, features.
LARGE = ((8, 512, 65536, 64), (8, 64, 131072, 64), (8, 1, 262144, 64))
CASES = [(8, 64, 4096, 64), *(pytest.param(case, marks=pytest.mark.slow) for case in LARGE)]
ROUNDS = 11


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("read", ["mapped", "from a file"])
def test_keys_on_disk(benchmark: Any, alternate: Any, tmp_path: Path, case: tuple[int, ...], read: str) -> None:
    fastattn.set_num_threads(cores())
    heads, queries, keys, features = case
    rng = np.random.default_rng(0)
    query = rng.standard_normal((heads, queries, features), dtype=np.float32)
    arrays = [rng.standard_normal((heads, keys, features), dtype=np.float32) for _ in range(2)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    blocks = 16
    array_of_blocks = np.stack([array.reshape(heads, blocks, -1, features).swapaxes(0, 1) for array in arrays], 1)
    array_of_blocks.tofile(tmp_path / "blocks")
    size = array_of_blocks[0].size

    def from_file() -> Any:
        for i in range(blocks):
            block = np.fromfile(tmp_path / "blocks", np.float32, size, offset=4 * i * size)
            yield tuple(block.reshape(2, heads, -1, features))

    def on_disk() -> Any:
        if read == "mapped":
            given: Any = tuple(np.load(tmp_path / f"{i}.npy", mmap_mode="r") for i in range(2))
        else:
            given = from_file()
        return fastattn.attention_blocks(query, given)

    benchmark.group = f"keys on disk, {case}, {read}"
    alternate(on_disk, lambda: fastattn.attention(query, arrays[0], arrays[1]), "in memory", ROUNDS)
