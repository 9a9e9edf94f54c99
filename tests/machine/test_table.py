"""The ISA table: which row a process uses, and that the row's instructions are really the ones in the kernels."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import broad
import numpy as np
import processes
import pytest
from marks import takes_long

from fastattn.cpu.host import pool
from fastattn.cpu.host.kernels import PLAIN, describe
from fastattn.cpu.kernels import catalogue
from fastattn.machine import building as build
from fastattn.machine import libraries as kernels
from fastattn.machine import loading as machine
from fastattn.machine import table as isa
from fastattn.machine.features import HOST, may_use_matrix_unit

ROWS = {row.name: row for row in isa.TABLE}
on_x86 = pytest.mark.skipif(HOST != "x86-64", reason="these are x86 instructions")
X86_ROWS = ("zen5", "zen4", "avx512", "avx2", "generic")  # arm64's: test_neon.py
PRINT_HOST = "from fastattn.machine.table import host; print(host().name)"


# -- which row ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _host_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "host", isa.host.__wrapped__)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("row", isa.TABLE, ids=lambda row: row.name)
def test_a_tile_has_no_more_rows_than_columns(row: isa.Isa, dtype: str) -> None:
    """Gradients of queries are added up a tile's width of them at a time, by tiles that have them as rows."""
    tile = row.tile(dtype)
    assert tile.width % tile.rows == 0
    assert tile.rows * tile.vectors == row.rows * row.vectors


def test_the_first_row_that_runs_here_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_ISA", raising=False)
    processor = isa.llvm.get_host_cpu_name()
    assert isa.host() is next(row for row in isa.TABLE if isa.runs_here(row) and isa.is_meant_for(row, processor))
    monkeypatch.setattr(isa, "may_use_matrix_unit", lambda: True)
    for row in isa.TABLE:
        if row.only_named:
            continue
        monkeypatch.setattr(isa, "host_features", lambda features=frozenset(row.needs): features)
        monkeypatch.setattr(isa.llvm, "get_host_cpu_name", lambda names=row.processors: names[0] if names else "other")
        assert isa.host() is row


def test_pairs_are_multiplied_only_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intel's processors have AVX512_BF16 too, at half the rate of the multiply-adds."""
    monkeypatch.delenv("FASTATTN_ISA", raising=False)
    monkeypatch.setattr(isa, "host_features", lambda: frozenset(ROWS["zen4"].needs))
    for processor in ("znver4", "znver5", "cooperlake", "graniterapids"):
        monkeypatch.setattr(isa.llvm, "get_host_cpu_name", lambda processor=processor: processor)
        assert isa.host().name == {"znver4": "zen4", "znver5": "zen5"}.get(processor, "avx512")
    monkeypatch.setenv("FASTATTN_ISA", "zen4")
    assert isa.host().name == "zen4"


def test_a_matrix_unit_is_used_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where the system lets it be used, which is asked for nowhere else."""
    asked = []
    monkeypatch.delenv("FASTATTN_ISA", raising=False)
    monkeypatch.setattr(isa, "host_features", lambda: frozenset(ROWS["amx"].needs))
    monkeypatch.setattr(isa, "may_use_matrix_unit", lambda: bool(asked.append(1)))
    monkeypatch.setattr(isa.llvm, "get_host_cpu_name", lambda: "sapphirerapids")
    assert isa.host().name == "avx512"
    assert not asked
    monkeypatch.setenv("FASTATTN_ISA", "amx")
    with pytest.raises(
        ValueError, match="^FASTATTN_ISA=amx: this .* machine with LLVM .* lacks the system's leave to use amx-tile$"
    ):
        isa.host()
    monkeypatch.setattr(isa, "may_use_matrix_unit", lambda: True)
    assert isa.host().name == "amx"


def test_a_system_without_tiles_refuses() -> None:
    """On a processor that has none, and on a system that knows nothing of them, the answer is no."""
    if "amx-tile" not in isa.host_features():
        assert not may_use_matrix_unit()


@on_x86
def test_llvm_15_has_no_bfloat16_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of Numba 0.61. Kernels of pairs did not compile: where the row was named, and for wheels."""
    monkeypatch.setattr(isa.llvm, "get_host_cpu_features", lambda: dict.fromkeys(ROWS["amx"].needs, True))
    monkeypatch.setattr(isa, "host_features", isa.host_features.__wrapped__)
    for version, rows in (((15, 0, 7), set()), ((16, 0, 0), {"zen5", "zen4", "amx"})):
        monkeypatch.setattr(isa.llvm, "llvm_version_info", version)
        assert {row.name for row in isa.of_this_architecture()} & {"zen5", "zen4", "amx"} == rows
    monkeypatch.setattr(isa.llvm, "llvm_version_info", (15, 0, 7))
    monkeypatch.setenv("FASTATTN_ISA", "zen4")
    with pytest.raises(ValueError, match="^FASTATTN_ISA=zen4: this .* machine with LLVM 15 lacks avx512bf16$"):
        isa.host()


def test_a_machine_without_features_runs_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_ISA", raising=False)

    def unknown() -> None:
        raise RuntimeError

    monkeypatch.setattr(isa.llvm, "get_host_cpu_features", unknown)
    monkeypatch.setattr(isa, "host_features", isa.host_features.__wrapped__)
    assert isa.host().name == ("neon" if HOST == "arm64" else "generic")


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "avx2 ", "0"])
def test_an_unknown_row_is_refused_with_the_list(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FASTATTN_ISA", name)
    message = f"FASTATTN_ISA={name!r} is unknown, expected one of {', '.join(isa.NAMES)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        isa.host()


def test_a_row_that_does_not_run_here_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_ISA", "avx512")
    features = frozenset(ROWS["avx512"].needs) - {"avx512dq", "fma"}
    monkeypatch.setattr(isa, "host_features", lambda: features)
    with pytest.raises(ValueError, match="^FASTATTN_ISA=avx512: this .* machine with LLVM .* lacks avx512dq, fma$"):
        isa.host()


def test_a_call_is_refused_too() -> None:
    assert processes.run(
        """
import numpy as np, fastattn
try:
    fastattn.attention(*np.zeros((3, 2, 2), np.float32))
except ValueError as error:
    print(error)
""",
        FASTATTN_ISA="sse9",
    ).startswith("FASTATTN_ISA='sse9' is unknown")


@pytest.mark.parametrize("row", [row for row in isa.TABLE if isa.runs_here(row)], ids=lambda row: row.name)
def test_a_row_can_be_forced(row: isa.Isa) -> None:
    assert processes.run(PRINT_HOST, FASTATTN_ISA=row.name) == row.name + "\n"


def test_needs_cover_what_llvm_may_use() -> None:
    """A row needs every feature that its processor model lets LLVM use and that vector code could contain."""
    assert set(ROWS["avx2"].needs) <= set(ROWS["avx512"].needs)
    for row in ROWS.values():
        assert row.vector_bytes % 16 == 0
        for itemsize in (4, 8):
            lanes = row.vector_bytes // itemsize
            assert row.key_block % lanes == 0
            assert row.key_block % 4 == 0  # dropout draws for four keys at a time


# -- the instructions --------------------------------------------------------------------------------------------------


@cache
def assembly(name: str, storage: str = "float32", work: str = "forward") -> list[str]:
    """Return the lines of the forward pass's assembly for a row of the table, with LLVM's comments."""
    row = ROWS[name]
    tile = row.wide_tile("float32") if work == "decode" else row.tile("float32")

    def assembler(row: isa.Isa) -> Any:
        target = machine.target_machine(row)
        target.set_asm_verbosity(True)
        target.emit_object = lambda module: target.emit_assembly(module).encode()
        return target

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "target_machine", assembler)
        code = catalogue.build(describe(work, tile, row, steps=PLAIN, storage=storage), {"task": 3})
    return code.decode().splitlines()


def instructions(lines: list[str]) -> str:
    """Return the lines that are instructions, without comments."""
    return "\n".join(line.split("#")[0].rstrip() for line in lines if re.match(r"\t[a-z]", line))


def loops(lines: list[str]) -> list[list[str]]:
    """Return the lines of every innermost loop: from a label to a jump back to it, with no other label between."""
    found, start, label = [], 0, None
    for number, line in enumerate(lines):
        if match := re.match(r"(\.L\w+):", line):
            start, label = number, match[1]
        elif (match := re.match(r"\tj\w+\t(\.L\w+)", line)) and match[1] == label:
            found.append(lines[start + 1 : number + 1])
    return found


@on_x86
def test_avx512_is_avx512() -> None:
    code = instructions(assembly("avx512"))
    for mnemonic in ("vfmadd", "vscalefps", "vreduceps"):
        assert re.search(rf"\t{mnemonic}\w*\t.*%zmm", code), mnemonic


@on_x86
def test_avx2_is_avx2_and_no_more() -> None:
    code = instructions(assembly("avx2"))
    assert re.search(r"\tvfmadd\w+ps\t.*%ymm", code)
    assert "zmm" not in code
    assert not re.search(r"%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b|\{", code)


@on_x86
def test_generic_is_the_baseline() -> None:
    code = instructions(assembly("generic"))
    assert re.search(r"\tmulps\t.*%xmm", code)
    assert re.search(r"\taddps\t.*%xmm", code)
    assert not re.search(r"%[yz]mm", code)
    assert not re.search(r"\tv[a-z]", code)


@on_x86
@pytest.mark.parametrize("name", X86_ROWS)
def test_half_precision_is_widened_by_the_instructions_there_are(name: str) -> None:
    code = instructions(assembly(name, "float16"))
    assert bool(re.search(r"\tvcvtph2ps\t", code)) == bool(re.search(r"\tvcvtps2ph\t", code)) == (name != "generic")
    code = instructions(assembly(name, "bfloat16"))
    assert bool(re.search(r"\tvdpbf16ps\t.*%zmm", code)) == ROWS[name].pairs
    assert not re.search("__ext|__trunc", code)  # the compiler's own functions, which no kernel can call


@on_x86
@pytest.mark.parametrize("name", X86_ROWS)
def test_the_micro_kernel_stays_in_registers(name: str) -> None:
    """In the loops of the two products, those that broadcast and multiply-add, no vector goes to the stack."""
    row, storage = ROWS[name], "bfloat16" if ROWS[name].pairs else "float32"
    multiply, broadcast = r"\tvfmadd\w+ps\t", r"\tvbroadcastss\t[^.\n]*\(%r(?!ip)|\{1to16\}"  # not of constants
    if name == "generic":
        multiply, broadcast = r"\tmulps\t", r"\tshufps\t\$0,"
    if row.pairs:
        multiply = r"\tvdpbf16ps\t"
    found = 0
    for loop in loops(assembly(name, storage)):
        text = "\n".join(loop)
        if len(re.findall(multiply, text)) < row.rows * row.vectors or len(re.findall(broadcast, text)) < row.rows:
            continue
        found += 1
        assert not re.search(r"(16|32|64)-byte (Folded )?(Spill|Reload)", text), text
        assert not re.search(r"\(%rsp.*%[xyz]mm|%[xyz]mm.*\(%rsp", text), text
    assert found >= 2


@on_x86
def test_all_products_of_the_backward_pass_are_of_pairs() -> None:
    row = ROWS["zen4"]
    found = 0
    for loop in loops(assembly("zen4", "bfloat16", "backward")):
        text = "\n".join(loop)
        broadcasts = len(re.findall(r"\tvbroadcastss\t[^.\n]*\(%r(?!ip)|\{1to16\}", text))
        assert broadcasts < row.rows or "vfmadd" not in text, text
        if broadcasts >= row.rows and len(re.findall(r"\tvdpbf16ps\t.*%zmm", text)) >= row.rows * row.vectors:
            found += 1
            assert not re.search(r"(16|32|64)-byte (Folded )?(Spill|Reload)", text), text
    assert found >= 4  # those with features in the lanes, and with queries; gradients of keys and values are one


@on_x86
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["zen4", "avx512", "avx2"])
def test_few_queries_of_half_precision_are_widened_in_registers(name: str, storage: str) -> None:
    """In the loops of both products: one row, and four, of queries. What is widened goes to no memory.

    Keys in pairs of bfloat16 are multiplied as they are.
    """
    widen = r"\tvcvtph2ps\t" if storage == "float16" else r"\tvpslld\t\$16,"
    widened = multiplied = 0
    for loop in loops(assembly(name, storage, "decode")):
        text = "\n".join(loop)
        if len(re.findall(r"\tv(fmadd\w+|dpbf16)ps\t", text)) < 4 or ("vdpbf16ps" in text and "{%k" in text):
            continue  # none of them, or a rest of pairs
        widened, multiplied = widened + bool(re.search(widen, text)), multiplied + ("\tvdpbf16ps\t" in text)
        if re.search(widen, text) or "\tvdpbf16ps\t" in text:
            stored = set(re.findall(r"\tvmov[au]ps\t(%[yz]mm\d+), ", text))
            sums = set(re.findall(r"\tv(?:fmadd\w+|dpbf16)ps\t.*, (%[yz]mm\d+)", text))
            assert stored <= sums, text  # if anything
            assert not re.search(r"-byte (Folded )?Spill", text), text
    in_pairs = storage == "bfloat16" and ROWS[name].pairs
    assert widened >= (2 if in_pairs else 4)
    assert multiplied >= (2 if in_pairs else 0)


@on_x86
@pytest.mark.parametrize(
    ("work", "storage", "products"),
    [
        ("forward", "float32", 6),
        ("backward", "bfloat16", 1),
        pytest.param("forward", "bfloat16", 1, marks=takes_long),
        pytest.param("backward", "float32", 6, marks=takes_long),
        pytest.param("forward", "float16", 4, marks=takes_long),
        pytest.param("backward", "float16", 4, marks=takes_long),
    ],
)
def test_products_are_those_of_a_matrix_unit(work: str, storage: str, products: int) -> None:
    """In its loops nothing but tiles: for two of rows four products a pair of terms, of which one operand is loaded."""
    lines, pairs = assembly("amx", storage, work), set()
    for code in map(instructions, loops(lines)):
        if "tdpbf16ps" in code:
            assert not re.search(r"%[xyz]mm", code), code
            if "%tmm5" in code:
                pairs.add(code.count("tdpbf16ps") // 4)
                assert code.count("tileloadd") == code.count("tdpbf16ps") // 2 + 2
    code, of_weights = instructions(lines), 3 if storage == "float16" else products
    assert pairs == ({of_weights} if work == "forward" else {products, of_weights})
    # the forward pass makes weights in its loop of scores
    assert code.count("tdpbf16ps") >= 6 * (products + of_weights)
    assert code.count("ldtilecfg") == code.count("tilerelease") == 1
    assert not re.search(r"\tvdpbf16ps\t", code)  # slow on Intel's processors


@on_x86
def test_no_other_row_has_tiles() -> None:
    """Nor has what a matrix unit does not do."""
    for name in X86_ROWS:
        assert "tile" not in instructions(assembly(name))
    assert "tile" not in instructions(assembly("amx", "float32", "decode"))


# -- the results -------------------------------------------------------------------------------------------------------


def test_sixteen_lanes_on_any_machine(monkeypatch: pytest.MonkeyPatch, sixteen_lanes: isa.Isa) -> None:
    """AVX-512's lanes, tile and blocks, in whatever vectors this machine has."""
    for name in ("WORTH_SHARING", "WORTH_WAKING"):
        monkeypatch.setattr(pool, name, 0)
    assert broad.check((np.float32,)) == 16
    assert broad.check((np.float32,), of=broad.intervals) == 5
    assert any(kernel.row == sixteen_lanes for kernel in kernels._loaded)


@pytest.mark.parametrize("row", [row for row in isa.TABLE if isa.runs_here(row)], ids=lambda row: row.name)
def test_every_row_that_runs_here_is_right(row: isa.Isa) -> None:
    dtypes = "np.float32, np.float64" if row is isa.host() else "np.float32,"
    code = f"""
import numpy as np, broad
from fastattn.cpu.host import pool
pool.WORTH_SHARING = pool.WORTH_WAKING = 0
assert broad.check(({dtypes}), of=broad.intervals) >= 5
print(broad.check(({dtypes})))
"""
    assert int(processes.run(code, FASTATTN_ISA=row.name)) == 16 * dtypes.count("np.")
