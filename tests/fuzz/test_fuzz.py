"""What draws random calls, runs them and counts them: a few of them, and that what is wrong is found and said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from fuzz import __main__ as loop
from fuzz import cases, readers, soak
from fuzz.draws import Draws
from hypothesis import strategies as st

import fastattn

COUNT = len(cases.PATHS)


@pytest.mark.parametrize("seed", range(2 * COUNT), ids=lambda seed: f"{seed} {cases.path_of(seed)}")
def test_the_first_seeds(seed: int) -> None:
    outcome = cases.run(seed)
    assert outcome.calls
    assert f"path {cases.path_of(seed)}" in outcome.traits


def test_strategies_are_drawn_from_without_hypothesis() -> None:
    of_all = st.tuples(
        st.integers(3, 5),
        st.sampled_from("ab"),
        st.booleans(),
        st.one_of(st.none(), st.just(1)),
        st.floats(-1, 1),
        st.lists(st.integers(0, 9), min_size=1, max_size=3),
        st.sets(st.sampled_from((1, 2, 3)), min_size=2),
        st.integers(0, 1).map(str),
    )
    found = [Draws(seed)(of_all) for seed in range(200)]
    assert {each[0] for each in found} == {3, 4, 5}
    assert {each[1] for each in found} == {"a", "b"}
    assert {each[2:4] for each in found} == {(one, other) for one in (False, True) for other in (None, 1)}
    assert all(-1 <= each[4] <= 1 and 1 <= len(each[5]) <= 3 and len(each[6]) >= 2 for each in found)
    assert {each[7] for each in found} == {"0", "1"}
    assert found == [Draws(seed)(of_all) for seed in range(200)]


def test_a_wrong_result_is_found_and_its_seed_finds_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastattn.attention

    def wrong(*args: Any, **options: Any) -> Any:
        out = right(*args, **options)
        return tuple(np.nextafter(array, 7) + 1 for array in out) if isinstance(out, tuple) else out + 1

    monkeypatch.setattr(fastattn, "attention", wrong)
    found = [loop.worked(seed)["failure"] for seed in (0, COUNT, 0)]
    assert found[0].startswith("AssertionError: out: ")
    assert "attention: <call (" in found[0]
    assert found[0] == found[2]


def test_what_was_done_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    outcomes = {"calls": 2, "traits": ["a", "b", "c"], "failure": ""}
    code = (
        f"import json, sys\nfor line in sys.stdin: print(json.dumps({outcomes!r} | {{'seed': int(line)}}), flush=True)"
    )
    path = tmp_path / "state" / "progress.json"
    monkeypatch.setattr(loop, "WORKER", [sys.executable, "-c", code])
    for count in (5, 12):
        loop.fuzz(loop.Progress(path), 2, 1, count)
        found = loop.Progress(path)
        assert found.cases >= count
        assert found.calls == 2 * found.cases
        assert found.pairs == dict.fromkeys(("a & b", "a & c", "b & c"), found.cases)
        assert found.next == found.cases + len(found.unfinished)
        assert len(found.unfinished) == 2
    assert capsys.readouterr().out == ""


def test_a_process_that_ends_is_a_failure_of_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WORKER", [sys.executable, "-c", "import os; input(); os._exit(3)"])
    progress = loop.Progress(tmp_path / "progress.json")
    loop.fuzz(progress, 1, 1, 3)
    assert [each["seed"] for each in progress.failures] == [0, 1, 2]
    assert progress.failures[0]["failure"] == "the process ended, status 3"


def test_a_process_that_hangs_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WORKER", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(loop, "HANGS", 0.1)
    monkeypatch.setattr(loop, "LOOKS", 0.1)
    progress = loop.Progress(tmp_path / "progress.json")
    loop.fuzz(progress, 1, 1, 2)
    assert [each["failure"] for each in progress.failures] == ["no result within 0.1 s"] * 2


@pytest.mark.parametrize("name", readers.READERS)
def test_broken_files_are_refused_in_words(name: str, tmp_path: Path) -> None:
    if name == "layer":
        pytest.importorskip("safetensors")
    assert readers.tried(name, 0, tmp_path)
    read = [readers.tried(name, seed, tmp_path) for seed in range(1, 30)]
    assert not all(read)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_a_short_soak(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from fuzz import soak
soak.SHAPES = 12
print(soak.soak(0.1, 2, Path({str(tmp_path / "log")!r})))
"""
    process = processes.start(code, PYTHONWARNINGS="ignore")
    out, err = process.communicate(timeout=900)  # what is interrupted in a destructor is written to stderr
    assert (process.returncode, out) == (0, "[]\n"), err
    last = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert last["in a thread"]


def test_what_grows_in_a_soak_is_said() -> None:
    samples = [{"seconds": i, "MiB": 100 + 10 * i, "threads": 9, "files": 5 + i, "plans": 3000} for i in range(30)]
    assert soak.grown(samples) == [
        "memory grew from 290 to 390 MiB",
        "34 files; expected 13 at most",
        f"3000 plans; expected {soak.PLANS} at most",
    ]
