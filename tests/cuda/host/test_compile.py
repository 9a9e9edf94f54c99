"""What is compiled is kept on disk, and never used for other sources than those that it was made of."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import processes
import pytest
from imports import imported_by

import fastattn
from fastattn.cuda.host import choice, compile
from fastattn.cuda.kernels import portable

# Without a GPU, Numba is told of one, and does all but load what it has compiled.
A_GPU = """
from types import SimpleNamespace
from numba.cuda import codegen, dispatcher, types

device = SimpleNamespace(compute_capability=(8, 0))
dispatcher.get_current_device = lambda: device
codegen.devices.get_context = lambda *args: SimpleNamespace(device=device)
codegen.JITCUDACodegen.magic_tuple = lambda self: ("none", (8, 0))
dispatcher._Kernel.bind = lambda self: self._codelibrary.get_cubin(cc=(8, 0))

from fastattn.cuda.host import compile
from fastattn.cuda.kernels import portable
"""
STATISTICS = "print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))"
COMPILE = f"""{A_GPU}
kernel = compile.kernel(portable.copy, portable.Copy("float16"))
vector, table = types.float16[::1], types.int64[:, ::1]
kernel.compile((vector, vector, table, table, types.int64[::1]))
{STATISTICS}
"""
COMPILE_FUNCTION = f"""{A_GPU}
import numpy as np
from cuda_ptx import ARGUMENTS
from fastattn.cuda.kernels.tiles import Tiles
from fastattn.functions.function import described

table, number = np.ones(LENGTH, np.float32), NUMBER

def modified(score, batch, head, query, key):
    return SOURCE

tiles = Tiles(threads_y=2, threads_x=2, rows=2, columns=2, values=2, features=4, value_rows=4)
function = described("score_mod", modified)[0]
spec = portable.Shifts("float32", "none", tiles, base_2=False, adds=True, score_mod=function)
kernel = compile.kernel(portable.find_shifts, spec)
kernel.compile(ARGUMENTS[portable.find_shifts](spec))
{STATISTICS}
"""
FOUND, COMPILED = "1 0", "0 1"


def test_a_changed_source_is_compiled_anew(tmp_path: Path) -> None:
    package = Path(fastattn.__file__).parent
    copied = shutil.copytree(package, tmp_path / "fastattn", ignore=shutil.ignore_patterns("__pycache__"))
    cache = tmp_path / "cache"

    def outcome() -> str:
        changes = {"FASTATTN_CACHE_DIR": str(cache), "NUMBA_ENABLE_CUDASIM": "0"}
        return processes.run(COMPILE, root=tmp_path, **changes).strip()

    assert outcome() == COMPILED
    assert outcome() == FOUND
    # Numba's own cache knows the file that a kernel stands in: this is one of device functions that it calls
    with open(copied / "cuda" / "kernels" / "elements.py", "a") as file:
        file.write("# changed\n")
    assert outcome() == COMPILED
    for damaged in cache.glob("cuda-*/*.nbc"):
        damaged.write_bytes(b"not a kernel")
    assert outcome() == COMPILED
    assert outcome() == FOUND


def test_functions_are_kept_by_their_code_and_not_by_what_they_capture(tmp_path: Path) -> None:
    def outcome(length: int, number: float, source: str) -> str:
        changes = {"FASTATTN_CACHE_DIR": str(tmp_path / "cache"), "NUMBA_ENABLE_CUDASIM": "0"}
        code = COMPILE_FUNCTION.replace("LENGTH", str(length)).replace("NUMBER", str(number)).replace("SOURCE", source)
        return processes.run(code, **changes).strip()

    assert outcome(3, 0.5, "score + table[key] * number") == COMPILED
    assert outcome(4, 0.25, "score + table[key] * number") == FOUND
    assert outcome(3, 0.5, "score - table[key] * number") == COMPILED


def test_every_module_that_takes_part_is_in_the_name(tmp_path: Path) -> None:
    """All that kernels import, except what says whether they are compiled, and in which thread."""
    modules: dict[str, Path] = {}
    for name in ("decode", "portable", "portable_backward", "ptx", "tensor_cores", "tensor_cores_backward"):
        imported_by(f"fastattn.cuda.kernels.{name}", modules)
    del modules["fastattn.cuda.available"], modules["fastattn.call.advice"], modules["fastattn.machine"]
    for name in ("uninterrupted", "os_threads", "interpreter"):
        del modules[f"fastattn.machine.{name}"]
    assert {"fastattn.call.rounding", "fastattn.cuda.kernels.plan", "fastattn.cuda.kernels.registers"} <= set(modules)
    assert not any("host" in name for name in modules)
    shutil.copytree(processes.PACKAGE, tmp_path / "fastattn", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
from pathlib import Path
from fastattn.cuda.host.compile import source_digest
digests = [source_digest.__wrapped__()]
for path in {[str(path) for path in modules.values()]}:
    path = Path({str(tmp_path)!r}, path)
    path.write_bytes(path.read_bytes() + b"#")
    digests.append(source_digest.__wrapped__())
print(len(digests) == len(set(digests)))
before = digests[-1]
for path in Path({str(tmp_path)!r}, "fastattn", "cuda", "host").glob("*.py"):
    path.write_bytes(path.read_bytes() + b"#")
print(source_digest.__wrapped__() == before)
"""
    assert processes.run(code, tmp_path, NUMBA_ENABLE_CUDASIM="0") == "True\nTrue\n"


def test_a_tree_of_pyc_files_has_a_folder_of_its_own(tmp_path: Path) -> None:
    def outcome(root: Path) -> str:
        changes = {"FASTATTN_CACHE_DIR": str(tmp_path / "cache"), "NUMBA_ENABLE_CUDASIM": "0"}
        return processes.run(COMPILE, root, **changes).strip()

    package = processes.PACKAGE
    one, other = (processes.compiled(package, tmp_path / name) for name in ("one", "other"))
    assert [outcome(root) for root in (one, other, package.parent)] == [COMPILED, FOUND, COMPILED]


def test_a_named_folder_that_cannot_be_written_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = processes.start(COMPILE, FASTATTN_CACHE_DIR=str(tmp_path / "file" / "below"), NUMBA_ENABLE_CUDASIM="0")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, f"{COMPILED}\n"), err
    assert err.count("RuntimeWarning: FASTATTN_CACHE_DIR=") == 1


def test_no_launch_warns_of_a_small_grid() -> None:
    code = """
import warnings
warnings.simplefilter("error")
from fastattn.cuda.host import compile
from fastattn.cuda.kernels import portable
compile.configured(compile.kernel(portable.copy, portable.Copy("float16")), 1, (32, 1), 0)
"""
    assert processes.run(code, NUMBA_ENABLE_CUDASIM="0") == ""


def test_kernels_have_names_that_tell_them_apart() -> None:
    specs = [
        portable.Forward(storage, mask, dropout, tiles)
        for storage in ("float32", "float16")
        for mask in ("none", "bool")
        for dropout in (False, True)
        for tiles in (choice.SMALL, choice.SMALL._replace(rows=4))
    ]
    names = {compile.name_of(portable.forward, spec) for spec in specs}
    assert len(names) == len(specs)
    assert all(name.isidentifier() for name in names)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no such owners here")
def test_the_folder_is_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba unpickles what is in it. One that others can write is not used."""
    monkeypatch.setattr(compile, "cache_folder", lambda: tmp_path)
    before = os.umask(0)
    try:
        folder = compile.folder()
    finally:
        os.umask(before)
    assert folder is not None
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert compile.folder() is None
    monkeypatch.setattr(compile, "cache_folder", lambda: None)
    assert compile.folder() is None
