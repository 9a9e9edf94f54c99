"""The folder benchmarks/: what pytest makes of it, and the script that writes the README's table."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest

from fastattn.bench import measure, report
from fastattn.bench.host import this_host
from fastattn.bench.peers import ENGINES, OURS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only ourselves and NumPy take part: quick on any machine."""
    monkeypatch.setattr(measure, "ENGINES", [engine for engine in ENGINES if engine.name in (OURS.name, "NumPy")])


@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed")
def test_the_option_that_people_type_is_the_plugins() -> None:
    def collected(option: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", option, "--collect-only", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            command, cwd=ROOT, env=processes.environment(), text=True, capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [line for line in done.stdout.splitlines() if "::" in line]

    found = collected("--benchmark")
    assert found == collected("--benchmark-only")
    assert {name.partition("::")[0] for name in found} == {
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/bench_*.py")
    }


@pytest.fixture(scope="module")
def readme_table() -> Any:
    """Return the script that writes the README's table."""
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.usefixtures("few")
def test_the_script_that_writes_the_readme(readme_table: Any, tmp_path: Path) -> None:
    readme, docs = tmp_path / "README.md", tmp_path / "benchmarks.md"
    readme.write_text("# fastattn\n<!-- table:begin -->\n<!-- table:end -->\nwords\n")
    docs.write_text(report.with_section("# Benchmarks\n", "Another machine", "its table"))
    paths = ["--readme", str(readme), "--docs", str(docs)]
    assert readme_table.main([*paths, "--rounds", "1", "--case", "(1,1,16,64)"]) == 0
    assert "| tiny, in a loop (1,1,16,64) | **" in readme.read_text()
    assert readme.read_text().endswith("-->\nwords\n")
    assert "its table" in docs.read_text()
    assert f"## {this_host().name}" in docs.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--case", "nothing"], "no case is called 'nothing'"),
        (["--readme", "no-markers.md"], "the text has no <!-- table:begin -->"),
        (["--readme", "missing.md"], "No such file"),
        (["--docs", "missing/benchmarks.md"], "is not a folder"),
    ],
)
def test_the_script_refuses_before_it_measures(
    readme_table: Any,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no-markers.md").write_text("# fastattn\n")
    monkeypatch.setattr(readme_table, "measure", None)
    with pytest.raises(SystemExit) as stopped:
        readme_table.main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
