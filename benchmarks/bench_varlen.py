"""What do sequences of different lengths cost, packed, against one dense batch of equal lengths that is as much work?

The dense batch lies in memory as packed sequences do, (B, L, H, D): what is compared is what packing costs. The extra
info has the ratio of operations in a second, 1 where it costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.bench.peers import cores

HEADS, FEATURES = 8, 64
ROUNDS = 9
#: Lengths of 32 sequences of 16 to 1024, and of 2000 short ones.
LENGTHS = {
    "32 of 16 to 1024": np.random.default_rng(0).permutation(np.linspace(16, 1024, 32).astype(int)),
    "2000 of 1 to 32": np.random.default_rng(0).integers(1, 33, 2000),
}


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("work", ["forward", "backward"])
@pytest.mark.parametrize("which", LENGTHS)
def test_packed(benchmark: Any, alternate: Any, which: str, work: str, is_causal: bool) -> None:
    """Packed sequences, alternating with a dense batch of as many, of equal lengths."""
    fastattn.set_num_threads(cores())
    lengths = LENGTHS[which].astype(float)
    equal = round(float(np.sqrt((lengths**2).mean())))
    share = float((lengths**2).sum()) / (len(lengths) * equal**2)  # of the dense batch's work
    rng = np.random.default_rng(0)
    cu_seqlens: Any = np.concatenate([[0], np.cumsum(LENGTHS[which])])
    packed: list[Any] = [rng.standard_normal((cu_seqlens[-1], HEADS, FEATURES), dtype=np.float32) for _ in range(3)]
    shape = (len(lengths), equal, HEADS, FEATURES)
    dense: Any = [rng.standard_normal(shape, dtype=np.float32).swapaxes(1, 2) for _ in range(3)]
    options: Any = {"is_causal": is_causal}
    of_packed = fastattn.attention_varlen(packed[0], packed[1], packed[2], cu_seqlens, **options, return_lse=True)
    of_dense = fastattn.attention(*dense, **options, return_lse=True)

    def ours() -> None:
        if work == "forward":
            fastattn.attention_varlen(packed[0], packed[1], packed[2], cu_seqlens, **options)
        else:
            given = (packed[0], *packed, *of_packed, cu_seqlens)
            fastattn.attention_varlen_backward(*given, **options)

    def theirs() -> None:
        if work == "forward":
            fastattn.attention(*dense, **options)
        else:
            fastattn.attention_backward(dense[0], *dense, *of_dense, **options)

    benchmark.group = f"{which}, {work}"
    alternate(ours, theirs, "dense", ROUNDS, share)
