"""MPI: what several processes compute together, by tests/mpi_checks.py, and what it takes to have it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import processes
import pytest
from marks import takes_long

from fastattn.call.advice import to_install

TESTS = Path(__file__).parents[1]
CHECKS = TESTS / "mpi_checks.py"
EXAMPLE = TESTS.parent / "docs" / "examples" / "decoding_mpi.py"
#: How it is started: that of the environment first, which the wheel of an MPI brings along.
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")

with_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or MPIEXEC is None, reason="mpi4py is not installed, or there is no mpiexec"
)


def start(ranks: int, *arguments: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Run a Python file on so many ranks, each with one thread."""
    assert MPIEXEC is not None
    version = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, check=False).stdout
    more = ["--oversubscribe", "--allow-run-as-root"] if "Open MPI" in version or "OpenRTE" in version else []
    settings = processes.environment(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1")
    command = [MPIEXEC, *more, "-n", str(ranks), sys.executable, *arguments]
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=timeout, check=False)


@with_mpi
@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=takes_long) for ranks in (1, 4))])
def test_ranks_together(ranks: int) -> None:
    """All checks in one start: the first call of each kind compiles, and a start takes longer than most checks."""
    ended = start(ranks, str(CHECKS))
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    failures = [f"{line['check']}: {failure}" for line in lines for failure in line["failures"]]
    assert not failures, "\n".join(failures)
    assert ended.stdout.splitlines()[-1:] == ["all checks have run"], f"after {lines[-1:]}\n{ended.stderr}"


def test_without_mpi4py_a_line_says_what_it_needs() -> None:
    code = """
import sys
sys.modules["mpi4py"] = None
try:
    import fastattn.integrations.mpi
except ImportError as error:
    print(error)
"""
    needed = f"fastattn.integrations.mpi needs mpi4py, and MPI: {to_install('mpi')} mpich\n"
    assert processes.run(code) == needed


@with_mpi
def test_the_example_decodes_over_shards() -> None:
    ended = start(3, str(EXAMPLE), "--keys", "500", "--tokens", "4")
    assert ended.returncode == 0, ended.stderr
    assert "3 ranks, 504 keys, 168 of them on the first" in ended.stdout
    assert float(ended.stdout.split()[-1]) < 1e-6


@with_mpi
def test_the_measurement_runs() -> None:
    ended = start(2, str(TESTS.parent / "benchmarks" / "ring.py"), "--length", "64", "--rounds", "1")
    assert ended.returncode == 0, ended.stderr
    assert "forward: 131072 bytes sent by a rank, 1.00 times its keys and values once around" in ended.stdout
    assert "backward: 262144 bytes sent by a rank, 2.00 times its keys and values once around" in ended.stdout
