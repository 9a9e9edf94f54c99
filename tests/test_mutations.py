"""The tests bite: every way to break the kernels in `mutations` makes a test fail."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from marks import takes_long
from mutations import MUTATIONS, Mutation

from fastattn.machine.table import host

ROOT = processes.PACKAGE.parent
in_the_source_tree = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in the source tree")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_code_to_break_is_there(mutation: Mutation) -> None:
    assert (processes.PACKAGE / mutation.file).read_text().count(mutation.old) == 1


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_tests_that_must_notice_are_there(mutation: Mutation) -> None:
    file, expression = mutation.tests
    tests = re.findall(r"def (test_\w+)", (processes.TESTS / file).read_text("utf-8"))
    assert any(word in test for test in tests for word in re.findall(r"test_\w+", expression))


@in_the_source_tree
@pytest.mark.slow
@takes_long
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_broken_kernel_fails_a_test(mutation: Mutation, tmp_path: Path) -> None:
    if mutation.file.startswith("cuda/"):
        pytest.importorskip("numba_cuda", reason="CUDA's tests need numba-cuda")
    if mutation.file.startswith("integrations/"):
        pytest.importorskip("dask", reason="tests of chunks need Dask")
    if mutation.of_pairs and not host().pairs:
        pytest.skip("this machine does not multiply pairs of bfloat16")
    for folder in (processes.PACKAGE, processes.TESTS):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for settings in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / settings, tmp_path)
    target = tmp_path / processes.PACKAGE.name / mutation.file
    target.write_text(target.read_text().replace(mutation.old, mutation.new))
    file, expression = mutation.tests
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{file}", "-k", expression]
    environment = processes.environment(tmp_path, FASTATTN_CACHE_DIR=str(tmp_path / "cache"))
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return  # a thread waits for ever: that is a failure, too
    if done.returncode < 0:
        return  # a crash, as from writing where there is no array: that as well
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    for broken in ("numba.core.errors", "SyntaxError", "NameError", "ImportError", "error during collection"):
        assert broken not in done.stdout, done.stdout  # it failed because it does not compile, which shows nothing
