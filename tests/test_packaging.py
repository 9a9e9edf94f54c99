"""A wheel and an sdist, each installed into an empty environment and used there; an application frozen from one.

And a wheel that has kernels compiled, for one platform.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from marks import takes_long

import fastattn
from fastattn.machine import table as isa

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in the source tree"),
    pytest.mark.skipif(
        importlib.util.find_spec("build") is None, reason="what builds wheels is not installed: pip install build"
    ),
]


USE = """
import numpy as np, fastattn
from pathlib import Path

query, key, value = np.random.default_rng(0).standard_normal((3, 2, 4, 33, 16), dtype=np.float32)
result = fastattn.attention(query, key, value, is_causal=True)
expected = fastattn.attention(query, key, value, is_causal=True, backend="reference")
np.testing.assert_allclose(result, expected, atol=1e-5)
assert (Path(fastattn.__file__).parent / "py.typed").exists()
print(fastattn.__version__, fastattn.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside of the source tree's reach, and return what it prints."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build the sdist, and the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_what_they_contain(distributions: dict[str, Path]) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        installed = set(wheel.namelist())
    assert {
        "fastattn/__init__.py",
        "fastattn/__main__.py",
        "fastattn/py.typed",
        "fastattn/cpu/__init__.py",
    } <= installed
    information = f"fastattn-{fastattn.__version__}.dist-info/"
    assert {name.split("/")[0] + "/" for name in installed} == {"fastattn/", information}
    assert f"{information}licenses/LICENSE" in installed
    assert not [name for name in installed if name.startswith(("fastattn/prebuilt", "fastattn/__hatch"))]

    with tarfile.open(distributions["sdist"]) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    expected = [
        "fastattn/py.typed",
        "fastattn/__hatch/hook.py",
        "tests/test_packaging.py",
        "benchmarks/conftest.py",
        "docs/start.md",
        "README.md",
        "LICENSE",
        "Makefile",
    ]
    assert set(expected) <= packed
    assert not [name for name in packed if "__pycache__" in name or name.startswith((".venv", ".git/"))]


def test_what_an_index_shows_has_no_links_that_lead_nowhere(distributions: dict[str, Path]) -> None:
    """An index knows nothing of the repository: what README.md links there is plain text."""
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        metadata = wheel.read(f"fastattn-{fastattn.__version__}.dist-info/METADATA").decode()
    with tarfile.open(distributions["sdist"]) as sdist:
        packed = sdist.extractfile(f"fastattn-{fastattn.__version__}/PKG-INFO")
        assert packed is not None
        assert packed.read().decode() == metadata
    fields, _, shown = metadata.partition("\n\n")
    assert "\nDescription-Content-Type: text/markdown" in fields
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]*)\)", shown))
    readme = (ROOT / "README.md").read_text("utf-8")
    headings = re.findall(r"^#.*$|^```.*$|^\|.*$", readme, re.MULTILINE)
    assert re.findall(r"^#.*$|^```.*$|^\|.*$", shown, re.MULTILINE) == headings
    assert "see Getting started." in " ".join(shown.split())
    assert '*Picture: Whom "it" looks at.*' in shown
    assert "*Picture: How fast attention is: bars for fastattn and for the other libraries.*" in shown
    assert "<picture>" not in shown
    assert "in the source distribution" in shown


# the wheel is that of the sdist, so that the sdist by itself says little more
@pytest.mark.parametrize("kind", ["wheel", pytest.param("sdist", marks=takes_long)])
def test_it_runs_from_an_empty_environment(kind: str, distributions: dict[str, Path], tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(python, "-m", "pip", "install", "--quiet", distributions[kind], cwd=tmp_path)
    version, place = run(python, "-W", "error", "-c", USE, cwd=tmp_path).split()
    assert version == fastattn.__version__
    assert Path(place).is_relative_to(tmp_path / "venv")
    for command in ([python.with_name("fastattn")], [python, "-m", "fastattn"]):
        assert run(*command, "--version", cwd=tmp_path) == f"fastattn {fastattn.__version__}\n"
    assert run(python.with_name("fastattn"), "--help", cwd=tmp_path).startswith("usage: fastattn ")


FIRST_CALL = """
import sys, time
import numpy as np
start = time.process_time()
import fastattn
from fastattn.machine.libraries import cache_folder
for dtype in (np.float32, np.float64, np.float16):
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 4, 33, 16)).astype(dtype)
    for queries in (1, 5, 33):
        fastattn.attention(query[..., :queries, :], key, value)
        fastattn.attention(query[..., :queries, :], key, value, np.ones((queries, 33), bool))
    print(time.process_time() - start, "numba" in sys.modules, cache_folder(), len(list(cache_folder().iterdir())))
"""

FUNCTION = """
import numpy as np, fastattn
from fastattn.machine.libraries import cache_folder

def shifted(score, batch, head, query, key):
    return score - 0.1 * abs(query - key)

query, key, value = np.random.default_rng(0).standard_normal((3, 2, 4, 33, 16), dtype=np.float32)
result = fastattn.attention(query, key, value, score_mod=shifted)
expected = fastattn.attention(query, key, value, score_mod=shifted, backend="reference")
np.testing.assert_allclose(result, expected, atol=1e-5)
print(*(path.name.partition("-")[0] for path in cache_folder().iterdir()))
"""


@takes_long
def test_a_wheel_for_a_platform_has_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all machines of an architecture: those of which this one is are tried."""
    monkeypatch.setenv("HATCH_BUILD_HOOK_ENABLE_CUSTOM", "true")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (path,) = (tmp_path / "dist").iterdir()
    assert re.fullmatch(rf"fastattn-{fastattn.__version__}-py3-none-(?!any)\w+\.whl", path.name)
    assert path.stat().st_size < 15e6
    folder = "fastattn/prebuilt/"
    with zipfile.ZipFile(path) as wheel:
        listed = dict(reversed(line.split("  ")) for line in wheel.read(folder + "SHA256SUMS").decode().splitlines())
        assert {folder + name for name in listed} == {name for name in wheel.namelist() if name.endswith(".o")}
        for name, digest in listed.items():
            assert hashlib.sha256(wheel.read(folder + name)).hexdigest() == digest
    rows = [row for row in isa.of_this_architecture() if not row.only_named]
    assert {name.partition("/")[0] for name in listed} == {row.name for row in rows}

    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(python, "-m", "pip", "install", "--quiet", path, cwd=tmp_path)
    for row in filter(isa.runs_here, rows):
        monkeypatch.setenv("FASTATTN_ISA", row.name)
        monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / row.name))
        printed = run(python, "-W", "error", "-c", FIRST_CALL, cwd=tmp_path).splitlines()
        assert float(printed[0].split()[0]) < 0.5
        assert {line.partition(" ")[2] for line in printed} == {f"False {tmp_path / row.name} 0"}
        assert run(python, "-W", "error", "-c", FUNCTION, cwd=tmp_path) == "score_function\n"
        told = run(python, "-m", "fastattn", "info", cwd=tmp_path)
        assert re.search(rf"^kernels +(\d+) of \1 for {row.name} came", told, re.MULTILINE)


APPLICATION = """
import sys
import numpy as np
import fastattn
from fastattn.__main__ import main

if len(sys.argv) > 1:
    sys.exit(main())
query, key, value = np.random.default_rng(0).standard_normal((3, 2, 4, 33, 16), dtype=np.float32)
result = fastattn.attention(query, key, value, is_causal=True)
expected = fastattn.attention(query, key, value, is_causal=True, backend="reference")
np.testing.assert_allclose(result, expected, atol=1e-5)
print(sys.frozen, "numba" in sys.modules)
"""


@takes_long
def test_pyinstaller_freezes_it(
    distributions: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an application of no source files computes and compiles, keeps, and finds again."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    binaries = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    run(binaries / "python", "-m", "pip", "install", "--quiet", distributions["wheel"], "pyinstaller", cwd=tmp_path)
    (tmp_path / "application.py").write_text(APPLICATION)
    run(binaries / "pyinstaller", "--log-level", "ERROR", "application.py", cwd=tmp_path)
    application = tmp_path / "dist" / "application" / "application"
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    assert run(application, cwd=tmp_path).split() == ["True", "True"]
    compiled = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(compiled) == 2
    assert run(application, cwd=tmp_path).split() == ["True", "False"], "Numba is not imported for a cached kernel"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == compiled
    assert run(application, "--version", cwd=tmp_path) == f"fastattn {fastattn.__version__}\n"
    assert "missing" not in run(application, "info", cwd=tmp_path)
    assert "History and reading" in run(application, "guide", "history", cwd=tmp_path)
