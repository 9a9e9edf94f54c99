"""Kernels that come with the package: used as they came and nowhere else, and never in the place of other ones."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
from marks import takes_long

import fastattn
from fastattn.cpu.host import kernels, prebuild, session
from fastattn.cpu.host.kernels import PLAIN, compile_kernel, describe
from fastattn.cpu.kernels.exports import EXPORTS
from fastattn.machine import libraries, prebuilt
from fastattn.machine import table as isa
from fastattn.machine.kernel import Kernel

CALL = """
import sys
import numpy as np
import fastattn
arrays = np.random.default_rng(0).standard_normal((3, 1, 2, 40, 16), dtype=np.float32)
right = np.allclose(fastattn.attention(*arrays), fastattn.attention(*arrays, backend="reference"), atol=1e-5)
print("right" if right else "wrong", "numba" in sys.modules)
"""
SMALL_CALL = """
import sys
from fastattn.cpu.host.kernels import load
from fastattn.machine.kernel import Kernel
from fastattn.machine.table import host
load(Kernel("schedule", host()))
print("numba" in sys.modules)
"""
ROW = isa.host()
ROWS = {row.name: row for row in isa.TABLE}
SMALLEST = Kernel("schedule", ROW)
OF_A_CALL = (Kernel("signature", ROW), describe("forward", ROW.tile("float32"), ROW, steps=PLAIN))


def code_of(*kernels: Kernel) -> dict[Kernel, bytes]:
    """Return the object code of kernels, which other tests may have compiled."""
    return {kernel: libraries._code(kernel, EXPORTS[kernel.work], compile_kernel) for kernel in kernels}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package as a wheel installs it, with the kernels of a small call, and the smallest."""
    root = tmp_path_factory.mktemp("installed")
    shutil.copytree(processes.PACKAGE, root / "fastattn", ignore=shutil.ignore_patterns("__pycache__"))
    prebuild.write(root / "fastattn" / "prebuilt", code_of(*OF_A_CALL, SMALLEST))
    return root


@pytest.fixture
def copy(installed: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, to do something to."""
    return shutil.copytree(installed, tmp_path / "copy")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the smallest kernel, where this process looks for kernels that came with the package."""
    prebuild.write(tmp_path, code_of(SMALLEST))
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path)
    monkeypatch.setattr(prebuilt, "sums", prebuilt.sums.__wrapped__)
    return tmp_path


def call(root: Path, cache: Path) -> str:
    return processes.run(CALL, root, FASTATTN_CACHE_DIR=str(cache))


# -- what is used ------------------------------------------------------------------------------------------------------


def test_a_first_call_does_without_numba(installed: Path, tmp_path: Path) -> None:
    """And makes no cache, nor says that it cannot be made."""
    assert call(installed, tmp_path / "cache") == "right False\n"
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").write_text("")
    assert call(installed, tmp_path / "file" / "below") == "right False\n"


def test_a_zip_file_has_them_too(installed: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "package"), "zip", installed)
    assert call(Path(archive), tmp_path / "cache") == "right False\n"


def test_a_kernel_that_did_not_come_is_compiled_and_kept(copy: Path, tmp_path: Path) -> None:
    prebuild.write(copy / "fastattn" / "prebuilt", code_of(*OF_A_CALL))  # the smallest is there, but not listed
    for numba in (True, False):
        assert processes.run(SMALL_CALL, copy, FASTATTN_CACHE_DIR=str(tmp_path / "cache")) == f"{numba}\n"


def test_a_file_that_nothing_lists_is_not_looked_at(folder: Path) -> None:
    (folder / prebuilt.SUMS).write_text("")
    assert prebuilt.object_code(libraries.prebuilt_name(SMALLEST)) is None


@pytest.mark.parametrize("content", [b"", b"\n\n", b"nonsense\n", b"\xff\xfe\0", b"a  b  c\n"])
def test_a_list_that_is_none_lists_nothing(folder: Path, content: bytes) -> None:
    (folder / prebuilt.SUMS).write_bytes(content)
    assert prebuilt.object_code(libraries.prebuilt_name(SMALLEST)) is None


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:99] + b"!" + b[100:], None]
)
def test_a_file_of_another_content_is_refused(folder: Path, damage: object) -> None:
    """So is one that is missing."""
    name = libraries.prebuilt_name(SMALLEST)
    path = folder / name
    assert prebuilt.object_code(name) == path.read_bytes()
    if callable(damage):
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(str(path))} is missing, or not the file that was installed"):
        assert prebuilt.object_code(name) is None
    assert prebuilt.intact(name) is None


def test_a_kernel_that_is_refused_is_compiled(copy: Path, tmp_path: Path) -> None:
    (path,) = (copy / "fastattn" / "prebuilt").rglob("schedule-*.o")
    path.write_bytes(path.read_bytes().replace(b"\xc3", b"\xcc"))  # x86's return becomes a breakpoint
    process = processes.start(SMALL_CALL, copy, FASTATTN_CACHE_DIR=str(tmp_path / "cache"))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "True\n")
    assert err.count("Warning") == 1
    assert f"RuntimeWarning: {path} is missing" in err


def test_an_edited_kernel_is_compiled(copy: Path, tmp_path: Path) -> None:
    """So is any other that the edited module takes part in, or could."""
    softmax = copy / "fastattn" / "cpu" / "kernels" / "softmax.py"
    softmax.write_text(softmax.read_text() + "# nothing else\n")
    assert processes.run(SMALL_CALL, copy, FASTATTN_CACHE_DIR=str(tmp_path / "cache")) == "True\n"


# -- names, and what is in the files -----------------------------------------------------------------------------------


def test_versions_of_what_compiles_are_not_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Object code runs on any Python, but where objects begin otherwise; the cache has one for each version."""

    def names() -> tuple[str, str]:
        return libraries.prebuilt_name(SMALLEST), libraries._source_digest.__wrapped__().hex()

    prebuilt_name, digest = names()
    monkeypatch.setattr(libraries, "version", lambda package: "0.1")
    monkeypatch.setattr(libraries.platform, "python_version", lambda: "3.99.0")
    assert names()[0] == prebuilt_name
    assert names()[1] != digest
    interface = libraries._interface()
    others = [(*interface[:place], "other", *interface[place + 1 :]) for place in range(len(interface))]
    for other in others:
        monkeypatch.setattr(libraries, "_interface", lambda other=other: other)
        assert names()[0] != prebuilt_name


def test_a_kernel_is_the_same_bytes_in_every_process() -> None:
    """Whatever else has been compiled there, and whatever the machine's own row is."""
    code = """
from fastattn.cpu.host.prebuild import compiled
from fastattn.machine.kernel import Kernel
from fastattn.machine.table import TABLE
compiled(Kernel("own_heads", TABLE[0]))
print(compiled(Kernel("schedule", TABLE[0])).hex())
"""
    there = bytes.fromhex(processes.run(code, FASTATTN_ISA="generic"))
    assert prebuild.compiled(Kernel("schedule", isa.TABLE[0])) == there


@pytest.mark.parametrize("work", ["schedule", "convert", pytest.param("decode", marks=takes_long)])
def test_rows_that_differ_in_what_a_kernel_does_not_use_share_its_code(work: str) -> None:
    """Zen 4 multiplies pairs of bfloat16; all else is compiled once for it and for AVX-512, to the same bytes."""
    zen4, avx512 = ROWS["zen4"], ROWS["avx512"]
    kernel = Kernel("schedule", zen4)
    if work == "convert":
        kernel = Kernel(work, zen4, zen4.wide_tile("float32"), storage="float32", queries="bfloat16")
    elif work == "decode":
        kernel = describe(work, zen4.wide_tile("float32"), zen4, steps=PLAIN, storage="float16")
    assert prebuild.compiled_as(kernel) == replace(kernel, row=avx512)
    if {zen4, avx512} <= set(isa.of_this_architecture()):
        assert prebuild.compiled(kernel) == prebuild.compiled(replace(kernel, row=avx512))


def test_pairs_are_compiled_for_the_row_that_multiplies_them() -> None:
    zen4, avx512, avx2 = ROWS["zen4"], ROWS["avx512"], ROWS["avx2"]
    pairs = describe("forward", zen4.tile("float32"), zen4, storage="bfloat16")
    assert prebuild.compiled_as(pairs) == pairs
    for row in (avx512, avx2, isa.TABLE[-1]):
        kernels_of_row = list(prebuild.of_a_wheel(row))
        assert list(map(prebuild.compiled_as, kernels_of_row)) == kernels_of_row


def test_a_wheel_has_the_rows_of_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that the machine that builds it does not execute."""
    rows = isa.of_this_architecture()
    assert ROW in rows
    assert isa.TABLE[-1] in rows
    if ROW.name in ("zen5", "zen4", "avx512", "avx2"):
        monkeypatch.setattr(isa, "host_features", frozenset)
        assert isa.of_this_architecture() == rows


def test_first_calls_need_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with dot products, of the usual kinds: what they load is in a wheel."""
    asked = set()

    def noted(kernel: Kernel, *rest: object) -> libraries.Library:
        asked.add(kernel)
        return library(kernel, *rest)  # type: ignore[arg-type]

    library = libraries.library
    monkeypatch.setattr(kernels, "library", noted)
    monkeypatch.setattr(session, "current", session.Session())
    random = np.random.default_rng(0)
    for dtype in (np.float16, np.float32, np.float64):
        for queries in (1, 12, 70):
            query, key, value = random.standard_normal((3, 1, 2, 70, 16)).astype(dtype)
            query = query[..., :queries, :]
            fastattn.attention(query, key, value, is_causal="bottom-right", return_lse=True)
            fastattn.attention(query, key, value, random.random((queries, 70)) < 0.5, key_lengths=np.array([60]))
    for dtype, kept in (("float32", "bfloat16"), ("float32", "int8"), ("float32", "float32"), ("float16", "float16")):
        cache = fastattn.KVCache(1, kv_heads=2, head_dim=16, dtype=kept)
        for queries in (70, 1, 12):
            rows = random.standard_normal((1, 2, queries, 16)).astype(dtype)
            cache.append(rows, rows)
            cache.attention(rows)
    lengths = np.array([0, 20, 70])
    fastattn.attention_varlen(*random.standard_normal((3, 70, 2, 16), dtype=np.float32), lengths)
    assert len(asked) > 20
    assert asked <= set(prebuild.of_a_wheel(ROW))


class Loading(Exception):
    """A kernel of many seconds of work has been asked for: the test wants to know no more."""


def shifted(score: float, batch: int, head: int, query: int, key: int) -> float:
    return score - 0.1 * (query - key)


def earlier(batch: int, head: int, query: int, key: int) -> bool:
    return key <= query


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_first_call_with_a_function_compiles_the_function_alone(
    dtype: type[np.floating], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels that give their scores to functions, forward, decoding and backward, are in a wheel."""
    asked = set()

    def noted(kernel: Kernel, *rest: object) -> libraries.Library:
        if kernel.work in ("forward", "decode", "backward"):
            asked.add(kernel)
            raise Loading
        return library(kernel, *rest)  # type: ignore[arg-type]

    library = libraries.library
    monkeypatch.setattr(kernels, "library", noted)
    monkeypatch.setattr(session, "current", session.Session())
    for queries in (1, 6, 12, 70):
        query, key, value = np.random.default_rng(0).standard_normal((3, 1, 2, 70, 16)).astype(dtype)
        query = query[..., :queries, :]
        for functions in ({"score_mod": shifted}, {"mask_mod": earlier}, {"score_mod": shifted, "mask_mod": earlier}):
            with pytest.raises(Loading):
                fastattn.attention(query, key, value, is_causal="bottom-right", **functions)
    out, lse = fastattn.attention(query, key, value, return_lse=True, backend="reference")
    with pytest.raises(Loading):
        fastattn.attention_backward(out, query, key, value, out, lse, score_mod=shifted)
    assert {kernel.work for kernel in asked} == {"forward", "decode", "backward"}
    assert asked <= set(prebuild.of_a_wheel(ROW))
