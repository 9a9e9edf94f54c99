"""Compiling ahead: what is compiled, and who is told how far it is."""

from __future__ import annotations

import io
from typing import Any

import pytest

import fastattn
from fastattn.cpu.host import warmup as module
from fastattn.cpu.host.kernels import every_kernel
from fastattn.machine.table import host


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        """Return True."""
        return True


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have kernels be put down, and not be compiled."""
    kernels: list[Any] = []
    monkeypatch.setattr(module, "load", kernels.append)
    return kernels


def test_a_function_is_told_of_each_kernel_and_of_the_end(loaded: list[Any]) -> None:
    told: list[tuple[int, int, str]] = []
    fastattn.warmup(lambda *step: told.append(step), ["float32"])
    assert loaded == list(every_kernel(host(), ["float32"]))
    count = len(loaded)
    assert told == [*((done, count, kernel.label) for done, kernel in enumerate(loaded)), (count, count, "")]


@pytest.mark.parametrize("progress", [True, False, None])
def test_a_line_of_progress_is_shown_to_who_asks(
    progress: bool | None, loaded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    fastattn.warmup(progress, ["float32"])
    assert loaded
    assert ("compiling" in screen.getvalue()) == bool(progress)
    assert (f" {len(loaded)}/{len(loaded)}" in screen.getvalue()) == bool(progress)
    assert screen.getvalue().endswith("\r\x1b[K" if progress else "")


@pytest.mark.parametrize("progress", ["yes", 1, [print]])
def test_other_progress_is_refused(progress: Any, loaded: list[Any]) -> None:
    with pytest.raises(TypeError, match="progress: .*; expected True, False, a callable, or None"):
        fastattn.warmup(progress)
    assert not loaded


@pytest.mark.parametrize("dtype", ["float128", "int8"])
def test_other_dtypes_are_refused(loaded: list[Any], dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"dtypes: '{dtype}' among them; expected names of float16, bfloat16, "):
        fastattn.warmup(True, ["float32", dtype])
    assert not loaded
