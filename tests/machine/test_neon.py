"""arm64's rows of the ISA table: the instructions of their kernels, looked at wherever LLVM compiles for arm64.

What they compute is tested on an arm64 machine, or by ``make test-arm64`` in an emulator.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
from arm64_code import assembly, loops

from fastattn.machine import features
from fastattn.machine import table as isa

ROWS = {row.name: row for row in isa.TABLE}
STEPS = 4  # of a round of the micro-kernel


def products(row: str, storage: str, work: str, multiply: str) -> list[str]:
    """Return the loops of products of whole tiles: of four steps, and of one."""
    tile = ROWS[row].rows * ROWS[row].vectors
    texts = ["\n".join(loop) for loop in loops(assembly(row, storage, work))]
    return [text for text in texts if len(re.findall(rf"\t{multiply}\t", text)) in (tile, STEPS * tile)]


@pytest.mark.parametrize(
    ("row", "storage", "work", "multiply"),
    [
        ("neon", "float16", "forward", "fmla"),  # whose blocks are float32
        ("neon", "float64", "peak", "fmla"),
        ("neon_bf16", "bfloat16", "forward", "bfdot"),
        ("neon_bf16", "float32", "backward", "fmla"),
        ("neon_bf16", "bfloat16", "backward", "bfdot"),
    ],
)
def test_the_micro_kernel_multiplies_by_elements_and_stays_in_registers(
    row: str, storage: str, work: str, multiply: str
) -> None:
    """Elements that lie next to each other are loaded together, and nothing else is done with them."""
    found, itemsize = products(row, storage, work, multiply), 8 if storage == "float64" else 4
    tile, vector_bytes = ROWS[row].tile("float64" if storage == "float64" else "float32"), ROWS[row].vector_bytes
    rounds = [text for text in found if len(re.findall(rf"\t{multiply}\t", text)) > tile.rows * tile.vectors]
    for text in rounds:
        by_element = re.findall(rf"\t{multiply}\tv\d+\.\w+, v\d+\.\w+, v\d+\.\w+\[\d\]", text)
        assert len(by_element) == STEPS * tile.rows * tile.vectors, text
        loaded = len(re.findall(r"\tldr\tq", text)) + 2 * len(re.findall(r"\tldp\tq", text))
        assert loaded == STEPS * (tile.rows * itemsize // vector_bytes + tile.vectors), text
        assert not re.search(r"\t(dup|ld1r|mov\tv|ldr\t[sd]|ext|zip)", text), text
    for text in found:
        assert not re.search(r"-byte (Folded )?(Spill|Reload)|\[sp", text), text
    assert len(rounds) >= (1 if work == "peak" else 2)
    assert len(found) >= 2 * len(rounds) or multiply == "bfdot"


def test_half_precision_is_widened_and_rounded_by_instructions() -> None:
    code = "\n".join(assembly("neon", "float16"))
    assert re.search(r"\tfcvtl2?\t", code)
    assert re.search(r"\tfcvtn2?\t", code)
    assert not re.search("__ext|__trunc|__gnu", code)  # the compiler's own functions, which no kernel can call
    assert not re.search(r"\t(bfdot|bfcvt)", code)
    code = "\n".join(assembly("neon_bf16", "bfloat16"))
    assert re.search(r"\tbfcvtn2?\t", code)
    assert not re.search("__ext|__trunc|__gnu", code)


# -- which row ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def arm64(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Have the machine be one of arm64 of which LLVM does not know anything."""

    def unknown() -> None:
        raise RuntimeError

    monkeypatch.delenv("FASTATTN_ISA", raising=False)
    monkeypatch.setattr(features, "HOST", "arm64")
    monkeypatch.setattr(features.llvm, "get_host_cpu_features", unknown)
    monkeypatch.setattr(isa, "host_features", features.host_features.__wrapped__)
    monkeypatch.setattr(isa, "host", isa.host.__wrapped__)
    return monkeypatch


class System:
    """A C library that answers as told."""

    def __init__(self, bfloat16: bool) -> None:
        self.bfloat16 = bfloat16
        self.getauxval: Any = lambda word: self._flags(word)
        self.sysctlbyname: Any = self._named

    def _flags(self, word: int) -> int:
        assert word == 26
        return 0xFFFF if self.bfloat16 else 0xBFFF

    def _named(self, name: bytes, number: Any, size: Any, new: Any, new_size: int) -> int:
        assert name == b"hw.optional.arm.FEAT_BF16"
        number._obj.value = int(self.bfloat16)
        return 0


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("bfloat16", [True, False])
def test_the_operating_system_says_what_is_multiplied(arm64: pytest.MonkeyPatch, platform: str, bfloat16: bool) -> None:
    arm64.setattr(features.sys, "platform", platform)
    arm64.setattr(ctypes, "CDLL", lambda name: System(bfloat16))
    assert isa.host().name == ("neon_bf16" if bfloat16 else "neon")


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_where_nobody_can_be_asked_there_is_neon(arm64: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def none(name: None) -> None:
        raise error

    arm64.setattr(ctypes, "CDLL", none)
    assert isa.host().name == "neon"
    arm64.setattr(ctypes, "CDLL", lambda name: object())
    assert isa.host().name == "neon"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("x86_64", "x86-64"),
        ("AMD64", "x86-64"),
        ("aarch64-unknown-linux-gnu", "arm64"),
        ("arm64-apple-darwin", "arm64"),
        ("riscv64", "riscv64"),
    ],
)
def test_one_architecture_has_several_names(name: str, wanted: str) -> None:
    assert features.architecture(name) == wanted
