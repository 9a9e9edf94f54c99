"""Object code for other systems than this one: which format it has, and that LLVM's loader takes it."""

from __future__ import annotations

import platform

import pytest
from llvmlite import binding as llvm

from fastattn.machine import loading
from fastattn.machine.libraries import Library
from fastattn.machine.table import host

is_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="triples are those of x86-64")
ANSWER = "define i64 @answer() {\n    ret i64 42\n}"  # needs no convention of calls


@is_x86
@pytest.mark.parametrize(
    ("system", "name", "begins"),
    [
        ("linux", "x86_64-unknown-linux-gnu", b"\x7fELF"),
        ("win32", "x86_64-pc-windows-msvc", b"\x7fELF"),
        ("darwin", "x86_64-apple-darwin24.0.0", b"\xcf\xfa\xed\xfe"),
    ],
)
def test_the_format_is_one_that_the_loader_takes(
    monkeypatch: pytest.MonkeyPatch, system: str, name: str, begins: bytes
) -> None:
    """Of Windows, ELF: COFF, which the system itself has, is what LLVM's loader does not know there."""
    monkeypatch.setattr(loading.sys, "platform", system)
    monkeypatch.setattr(llvm, "get_process_triple", lambda: name)
    code = loading.target_machine(host()).emit_object(llvm.parse_assembly(ANSWER))
    assert code.startswith(begins)
    assert Library(code, host(), {"answer": 0}).answer() == 42
