"""Interpreters that fastattn refuses to be imported in, with a sentence: not the main one, or without the lock."""

from __future__ import annotations

import importlib.util
import sys

import processes
import pytest

from fastattn.machine import interpreter

INSIDE = """
import warnings
warnings.simplefilter("ignore")  # NumPy's, which wants to be in the main interpreter as well
try:
    import fastattn
except ImportError as error:
    print(error)
"""
# by the module that this version of Python has for it; one that shares the lock of the main interpreter, as in a server
START = {
    "_xxsubinterpreters": "from _xxsubinterpreters import *\nrun_string(create(isolated=False), INSIDE)",
    "_interpreters": "from _interpreters import *\nassert run_string(create('legacy'), INSIDE) is None",
}


def test_this_interpreter_is_the_usual_one() -> None:
    assert interpreter.refusal() == ""


def test_a_subinterpreter_is_refused() -> None:
    module = next((name for name in START if importlib.util.find_spec(name)), None)
    if module is None:
        pytest.skip("this Python starts no interpreters")
    printed = processes.run(f"INSIDE = {INSIDE!r}\n{START[module]}")
    assert printed.startswith("fastattn runs in the main interpreter of a process alone, and this is another one: use ")


def test_python_without_its_lock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    assert interpreter.refusal() == ""
    code = "import sys\nsys._is_gil_enabled = lambda: False\n" + INSIDE
    assert processes.run(code).startswith("fastattn relies on Python's global lock, without which this free-threaded ")
