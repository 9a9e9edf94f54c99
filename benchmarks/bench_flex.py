"""How fast are functions of scores, against PyTorch's flex_attention compiled by ``torch.compile``, which wants g++?

First calls are in processes of their own, whose caches are empty: there kernels are compiled as well as the function.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastattn
from fastattn.bench.peers import cores

# torch.compile takes its time, and warns of PyTorch's own
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SHAPE = (1, 8, 2048, 64)
ROUNDS = 7

FIRST = """
import sys, time
sys.path[:0] = {path!r}
import torch
from bench_flex import call_of
torch.set_num_threads({threads})
call = call_of({engine!r}, {name!r})
begin = time.perf_counter()
call()
print(time.perf_counter() - begin)
"""


def functions(name: str) -> tuple[Any, Any]:
    """Return a function of scores and one that hides keys, as PyTorch's users write them."""
    import torch

    torch.manual_seed(0)
    heads, length = SHAPE[1], SHAPE[2]
    table, document = torch.randn(heads, 2 * length), torch.arange(length) // (length // 8)
    score_mods = {
        "ALiBi": lambda score, batch, head, query, key: score + (key - query) * torch.exp2(-(head + 1) * 8.0 / heads),
        "relative bias": lambda score, batch, head, query, key: score + table[head, query - key + length],
        "softcap": lambda score, batch, head, query, key: 20 * torch.tanh(score / 20),
    }
    mask_mods = {
        "causal": lambda batch, head, query, key: query >= key,
        "documents": lambda batch, head, query, key: document[query] == document[key],
    }
    return score_mods.get(name), mask_mods.get(name)


def call_of(engine: str, name: str) -> Callable[[], object]:
    """Return the call of one of the two."""
    import torch
    from torch.nn.attention import flex_attention as theirs

    from fastattn.integrations.torch import flex_attention

    score_mod, mask_mod = functions(name)
    query, key, value = torch.randn(3, *SHAPE)
    block_mask = None
    if mask_mod is not None:
        block_mask = theirs.create_block_mask(mask_mod, None, None, SHAPE[2], SHAPE[2], device="cpu")
    attend: Any = flex_attention if engine == "fastattn" else torch.compile(theirs.flex_attention)

    def run() -> object:
        with torch.no_grad():
            return attend(query, key, value, score_mod, block_mask)

    return run


NAMES = ("ALiBi", "relative bias", "softcap", "causal", "documents")


def _needs_a_compiler() -> None:
    pytest.importorskip("torch")
    if shutil.which("g++") is None:
        pytest.skip("g++, which torch.compile wants, is not installed")


@pytest.mark.parametrize("name", NAMES)
def test_repeated(benchmark: Any, alternate: Any, name: str) -> None:
    """One call after the other, alternating with PyTorch's, whose share is the ratio in the extra info."""
    _needs_a_compiler()
    import torch

    torch.set_num_threads(cores())
    fastattn.set_num_threads(cores())
    theirs, ours = call_of("PyTorch", name), call_of("fastattn", name)
    benchmark.group = f"flex_attention, {name}, {SHAPE}"
    alternate(ours, theirs, "pytorch", ROUNDS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ["fastattn", "PyTorch"])
def test_first(benchmark: Any, engine: str, name: str) -> None:
    """The first call of a process, with nothing compiled before."""
    _needs_a_compiler()
    times: list[float] = []
    path = [str(Path(__file__).parent), *sys.path]
    code = FIRST.format(path=path, threads=cores(), engine=engine, name=name)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            caches = {"FASTATTN_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
            command = [sys.executable, "-W", "ignore", "-c", code]
            done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, check=True)
            times.append(float(done.stdout))

    benchmark.group = f"first flex_attention, {name}, {SHAPE}"
    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(seconds=statistics.median(times))
