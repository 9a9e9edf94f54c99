"""A wheel and an sdist, each installed into an empty environment and used there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in the source tree"),
    pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="the package build is not installed"),
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

    with tarfile.open(distributions["sdist"]) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    expected = [
        "fastattn/py.typed",
        "tests/test_packaging.py",
        "benchmarks/conftest.py",
        "README.md",
        "LICENSE",
        "Makefile",
    ]
    assert set(expected) <= packed
    assert not [name for name in packed if "__pycache__" in name or name.startswith((".venv", ".git/"))]


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_runs_from_an_empty_environment(kind: str, distributions: dict[str, Path], tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(python, "-m", "pip", "install", "--quiet", distributions[kind], cwd=tmp_path)
    version, place = run(python, "-W", "error", "-c", USE, cwd=tmp_path).split()
    assert version == fastattn.__version__
    assert Path(place).is_relative_to(tmp_path / "venv")
