"""The cache of compiled kernels: never stale, shared by processes, done without where it cannot be; what it saves."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import processes
import pytest
from imports import imported_by

from fastattn.cpu.host.kernels import PLAIN, STEPS, compile_kernel, describe
from fastattn.cpu.kernels.exports import EXPORTS
from fastattn.machine import digest
from fastattn.machine import libraries as kernels
from fastattn.machine import table as isa
from fastattn.machine.kernel import Kernel

CALL = """
import sys
import numpy as np
import fastattn
arrays = np.random.default_rng(0).standard_normal((3, 1, 2, 40, 16), dtype=np.float32)
right = np.allclose(fastattn.attention(*arrays), fastattn.attention(*arrays, backend="reference"), atol=1e-5)
print("right" if right else "wrong")
"""
SCHEDULER = """
from fastattn.cpu.host.kernels import load
from fastattn.machine.kernel import Kernel
from fastattn.machine.table import host
load(Kernel("schedule", host()))  # the smallest kernel
print("loaded")
"""
NO_NUMBA = """
assert "numba" not in sys.modules
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache folder that one small call has filled."""
    folder = tmp_path_factory.mktemp("cache") / "made" / "on demand"
    assert processes.run(CALL, FASTATTN_CACHE_DIR=str(folder)) == "right\n"
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder, used in this process."""
    monkeypatch.setattr(kernels, "cache_folder", lambda: tmp_path)
    return tmp_path


def schedule() -> bytes:
    """Return the object code of the smallest kernel."""
    return kernels._code(Kernel("schedule", isa.host()), EXPORTS["schedule"], compile_kernel)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- what is compiled, and what a call loads ---------------------------------------------------------------------------


def test_a_small_call_compiles_one_kernel(filled: Path) -> None:
    """And what tells calls apart."""
    kernel, signature = names(filled)
    assert kernel.startswith(f"forward-float32-{isa.host().rows}x{isa.host().vectors}-{isa.host().name}-")
    assert signature.startswith("signature-")


def test_threads_add_the_scheduler(filled: Path) -> None:
    code = "from fastattn.cpu.host import pool\npool.WORTH_SHARING = pool.WORTH_WAKING = 0\n" + CALL
    assert processes.run(code, FASTATTN_CACHE_DIR=str(filled), FASTATTN_NUM_THREADS="2") == "right\n"
    assert [name.partition("-")[0] for name in names(filled)] == ["forward", "schedule", "signature"]


def test_a_cached_call_does_without_numba(filled: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in filled.iterdir()}
    assert processes.run(CALL + NO_NUMBA, FASTATTN_CACHE_DIR=str(filled)) == "right\n"
    assert {path: path.stat().st_mtime_ns for path in filled.iterdir()} == before


def test_import_and_first_call_are_quick(filled: Path) -> None:
    """In seconds of CPU time, which other processes do not change much; the best of three."""
    code = """
import time, numpy as np
start = time.process_time()
import fastattn
imported = time.process_time()
arrays = np.zeros((3, 1, 2, 40, 16), np.float32)
fastattn.attention(*arrays)
print(imported - start, time.process_time() - imported)
"""
    runs = [processes.run(code, FASTATTN_CACHE_DIR=str(filled)).split() for _ in range(3)]
    imports, calls = (min(map(float, column)) for column in zip(*runs, strict=True))
    assert imports <= 0.3
    assert calls <= 0.5


def test_import_loads_little() -> None:
    assert (
        processes.run("import sys, fastattn\nprint({'numba', 'torch', 'matplotlib'} & set(sys.modules))") == "set()\n"
    )


# -- never stale -------------------------------------------------------------------------------------------------------


def test_an_edited_kernel_is_compiled_again(filled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "fastattn"
    shutil.copytree(processes.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = names(filled)
    assert processes.run(CALL + NO_NUMBA, tmp_path, FASTATTN_CACHE_DIR=str(filled)) == "right\n"
    assert names(filled) == before, "the same sources elsewhere are the same kernels"
    softmax = copy / "cpu" / "kernels" / "softmax.py"
    text = softmax.read_text()
    # a constant of the module, which Numba by itself does not watch
    softmax.write_text(text + "\nNEAREST_32 = DOWN_32 = (1.0, 0.0)\n")
    assert processes.run(CALL, tmp_path, FASTATTN_CACHE_DIR=str(filled)) == "wrong\n"
    assert len(names(filled)) == len(before) + 2
    softmax.write_text(text)
    assert processes.run(CALL + NO_NUMBA, tmp_path, FASTATTN_CACHE_DIR=str(filled)) == "right\n"


def test_every_module_that_takes_part_is_in_the_name(tmp_path: Path) -> None:
    """All that compiling imports, except the ISA table, of which the row is in the name."""
    modules = imported_by("fastattn.cpu.kernels.catalogue", {})
    del modules["fastattn.machine.table"]
    assert {
        "fastattn.simd",
        "fastattn.machine.building",
        "fastattn.cpu.kernels.softmax",
        "fastattn.cpu.kernels.schedule",
    } <= set(modules)
    shutil.copytree(processes.PACKAGE, tmp_path / "fastattn", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
from pathlib import Path
from fastattn.machine.libraries import _modules_digest
digests = [_modules_digest.__wrapped__()]
for path in {[str(path) for path in modules.values()]}:
    path = Path({str(tmp_path)!r}, path)
    path.write_bytes(path.read_bytes() + b"#")
    digests.append(_modules_digest.__wrapped__())
print(len(digests) == len(set(digests)))
"""
    assert processes.run(code, tmp_path) == "True\n"


def test_the_row_and_the_kernel_are_in_the_name(folder: Path) -> None:
    row = isa.host()
    kernel = describe("forward", row.tile("float32"), row, steps=PLAIN)
    changed = [
        kernel,
        describe("forward", row.tile("float64"), row, steps=PLAIN),
        describe("forward", row.tall_tile("float32"), row, steps=PLAIN),
        *(replace(kernel, **each) for each in ({"storage": "float64"}, {"score": "additive"}, {"steps": STEPS})),
        *(replace(kernel, reads=reads) for reads in {"strided", "rows", "panels"} - {kernel.reads}),
        replace(kernel, row=replace(row, cpu="other")),
        replace(kernel, row=replace(row, scalef=not row.scalef)),
        replace(kernel, row=replace(row, key_block=row.key_block + 1)),
    ]
    assert len({kernels._path(each) for each in changed}) == len(changed)


@pytest.mark.parametrize("package", ["numba", "llvmlite"])
def test_versions_are_in_the_name(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    digest = kernels._source_digest.__wrapped__
    before = digest()
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == package else version(name))
    assert digest() != before


def test_the_same_kernels_without_assertions() -> None:
    """`python -O` finds what `python` has compiled: what is compiled has no assertion that only one of them keeps."""
    for path in imported_by("fastattn.cpu.kernels.catalogue", {}).values():
        for node in ast.walk(ast.parse((processes.PACKAGE.parent / path).read_text())):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}"
            assert not (isinstance(node, ast.Name) and node.id == "__debug__"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("level", ["1", "2"])
def test_optimised_python_finds_them(filled: Path, level: str) -> None:
    code = CALL + NO_NUMBA + "print(__debug__, fastattn.attention.__doc__ is None)"
    printed = processes.run(code, FASTATTN_CACHE_DIR=str(filled), PYTHONOPTIMIZE=level)
    assert printed == f"right\nFalse {level == '2'}\n"


# -- no source files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a copy of the package, all of it sources."""
    copy = tmp_path / "sources" / "fastattn"
    return shutil.copytree(processes.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))


def test_a_tree_of_pyc_files_is_never_stale(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    tree = processes.compiled(sources, tmp_path / "tree")
    assert processes.run(CALL, tree, FASTATTN_CACHE_DIR=str(cache)) == "right\n"
    before = names(cache)
    archive = shutil.make_archive(str(tmp_path / "tree"), "zip", processes.compiled(sources, tmp_path / "elsewhere"))
    assert processes.run(CALL + NO_NUMBA, Path(archive), FASTATTN_CACHE_DIR=str(cache)) == "right\n"
    assert names(cache) == before, "the same code elsewhere is the same kernels"
    softmax = sources / "cpu" / "kernels" / "softmax.py"
    softmax.write_text(softmax.read_text() + "\nNEAREST_32 = DOWN_32 = (1.0, 0.0)\n")
    edited = processes.compiled(sources, tmp_path / "edited")
    assert processes.run(CALL, edited, FASTATTN_CACHE_DIR=str(cache)) == "wrong\n"
    assert len(names(cache)) == len(before) + 2
    assert processes.run(CALL + NO_NUMBA, tree, FASTATTN_CACHE_DIR=str(cache)) == "right\n"


def test_a_zip_file_has_the_kernels_of_its_sources(sources: Path, filled: Path, tmp_path: Path) -> None:
    before = names(filled)
    archive = shutil.make_archive(str(tmp_path / "sources"), "zip", sources.parent)
    code = CALL + NO_NUMBA + "print('.zip' in fastattn.__file__)"
    assert processes.run(code, Path(archive), FASTATTN_CACHE_DIR=str(filled)) == "right\nTrue\n"
    assert names(filled) == before


def test_code_has_the_same_name_in_every_process(sources: Path, tmp_path: Path) -> None:
    """Whatever Python's hashes and its optimisation are; and another one than its sources."""
    tree = processes.compiled(sources, tmp_path / "tree", optimize=2)
    archive = Path(shutil.make_archive(str(tmp_path / "code"), "zip", tree))
    code = "from fastattn.machine import libraries\nprint(libraries._source_digest().hex())"
    found = {
        processes.run(code, root, PYTHONHASHSEED=seed, PYTHONOPTIMIZE=level)
        for root, seed, level in [(tree, "1", None), (tree, "2", "2"), (archive, "3", None)]
    }
    assert len(found) == 1
    assert found != {processes.run(code)}


def test_code_is_known_by_what_it_does() -> None:
    def written(source: str, name: str = "a.py") -> str:
        return digest.written(compile(source, name, "exec", dont_inherit=True))

    source = "def f(x, y=-0.0):\n    return x in {'a', 'b', 'c'} and (1, 2.0, None, b'z', x[1:2])\n"
    assert written(source) == written("\n\n" + source, "elsewhere.py")
    others = [
        ("-0.0", "0.0"),
        ("'c'", "'d'"),
        ("2.0", "2"),
        ("None", "..."),
        ("b'z'", "'z'"),
        ("y", "z"),
        ("and", "or"),
    ]
    found = {written(source.replace(*change)) for change in [("", ""), *others]}
    assert len(found) == 1 + len(others)
    code = f"from fastattn.machine import digest\nprint(digest.written(compile({source!r}, 'b.py', 'exec')))"
    assert {processes.run(code, PYTHONHASHSEED=seed) for seed in "123"} == {written(source) + "\n"}


def test_a_version_without_metadata_is_asked_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digest.version("numba")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert digest.version("numba") == expected


# -- shared, and damaged -----------------------------------------------------------------------------------------------


def test_processes_fill_it_at_once(tmp_path: Path) -> None:
    code = """
import sys
from fastattn.cpu.host.kernels import load
from fastattn.cpu.kernels import catalogue
from fastattn.machine.kernel import Kernel
from fastattn.machine.table import host
print("ready", flush=True)
sys.stdin.readline()
load(Kernel("schedule", host()))
"""
    started = [processes.start(code, FASTATTN_CACHE_DIR=str(tmp_path)) for _ in range(3)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        processes.finish(process)
    (name,) = names(tmp_path)
    assert name.startswith("schedule-")


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:20], lambda b: b[:-1], lambda b: b[:99] + b"!" + b[100:]]
)
def test_a_damaged_file_is_replaced(folder: Path, damage: object) -> None:
    code = schedule()
    (path,) = folder.iterdir()
    content = path.read_bytes()
    assert callable(damage)
    path.write_bytes(damage(content))
    assert kernels._read(path) is None
    schedule()
    assert names(folder) == [path.name]
    assert len(path.read_bytes()) == len(content)
    again = kernels._read(path)
    assert again is not None
    assert len(again) == len(code)


def test_a_read_only_folder_is_read(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(kernels.os, "environ", {"FASTATTN_CACHE_DIR": str(filled)})
    monkeypatch.setattr(kernels.tempfile, "TemporaryFile", refused)
    assert kernels.cache_folder.__wrapped__() == filled
    code = "import tempfile\ntempfile.TemporaryFile = tempfile.NamedTemporaryFile = None\n" + CALL + NO_NUMBA
    assert processes.run(code, FASTATTN_CACHE_DIR=str(filled)) == "right\n"


def test_a_relative_folder_stays_where_it_was(filled: Path) -> None:
    relative = os.path.relpath(filled, processes.PACKAGE.parent)
    code = CALL.replace("arrays =", "fastattn.machine.libraries.cache_folder()\nos.chdir('/')\narrays =", 1)
    code = "import os\n" + code.replace("import fastattn", "import fastattn.machine.libraries", 1)
    assert processes.run(code + NO_NUMBA, FASTATTN_CACHE_DIR=relative) == "right\n"


# -- nowhere to write --------------------------------------------------------------------------------------------------


def test_without_a_named_folder_it_works_uncached_and_says_so_once(tmp_path: Path) -> None:
    """Two kernels are compiled, and there is one warning."""
    file = tmp_path / "file"
    file.write_text("")
    process = processes.start(CALL, FASTATTN_CACHE_DIR=str(file / "below"))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "right\n")
    assert err.count("Warning") == 1
    assert f"RuntimeWarning: FASTATTN_CACHE_DIR='{file / 'below'}' cannot be written" in err
    assert file.read_text() == ""


def test_without_a_folder_that_nobody_named_nothing_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"), str(file / "below"))
    assert processes.run(SCHEDULER, FASTATTN_CACHE_DIR=None, **places) == "loaded\n"


def test_a_named_folder_that_is_full_is_warned_of_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some kernels are in it; where all are, nothing is written and nothing is said."""

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernels, "_warned", threading.Lock())
    monkeypatch.setattr(kernels.tempfile, "NamedTemporaryFile", full)
    monkeypatch.setattr(kernels.os, "environ", {})
    schedule()
    monkeypatch.setattr(kernels.os, "environ", {"FASTATTN_CACHE_DIR": str(folder)})
    with pytest.warns(RuntimeWarning, match="FASTATTN_CACHE_DIR=.* cannot be written"):
        schedule()
    schedule()  # a second warning would be an error here


@pytest.mark.parametrize("place", ["/proc/fastattn", "/dev/null", "x" * 5000])
def test_a_folder_that_cannot_be(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(kernels.os, "environ", {"FASTATTN_CACHE_DIR": place})
    assert kernels.cache_folder.__wrapped__() is None


def test_a_folder_that_vanishes(folder: Path) -> None:
    path = folder / "gone" / "schedule.o"
    kernels._write(path, b"code")
    assert kernels._read(path) is None


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernels.os, "replace", full)
    kernels._write(folder / "schedule.o", b"code")
    assert names(folder) == []


def test_a_file_that_another_process_holds_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows a file that is being read cannot be replaced: it is another process's, and the same."""

    def held(*args: object) -> None:
        raise PermissionError(13, "Access is denied")

    path = folder / "schedule.o"
    kernels._write(path, b"code")
    monkeypatch.setattr(kernels.os, "replace", held)
    assert kernels._write(path, b"code")
    assert names(folder) == [path.name]
    assert not kernels._write(folder / "another.o", b"code")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no HOME, the user's entry in the password file says; where there is neither, nothing is cached."""
    code = "from fastattn.machine.libraries import cache_folder\nprint(cache_folder())"
    printed = processes.run(code, HOME=None, XDG_CACHE_HOME=None, FASTATTN_CACHE_DIR=None)
    assert printed.strip().endswith("fastattn") or printed == "None\n"

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kernels.os, "environ", {})
    monkeypatch.setattr(Path, "home", unknown)
    assert kernels.cache_folder.__wrapped__() is None


def test_the_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.sys, "platform", "linux")
    monkeypatch.setattr(kernels.os, "environ", {"XDG_CACHE_HOME": str(tmp_path)})
    assert kernels.cache_folder.__wrapped__() == tmp_path / "fastattn"
    monkeypatch.setattr(
        kernels.os, "environ", {"XDG_CACHE_HOME": str(tmp_path), "FASTATTN_CACHE_DIR": str(tmp_path / "x")}
    )
    assert kernels.cache_folder.__wrapped__() == tmp_path / "x"
