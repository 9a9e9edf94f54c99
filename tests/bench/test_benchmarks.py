"""The folder benchmarks/: what pytest makes of it, and the script that writes the tables and draws them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest

from fastattn.bench import chart, measure, report
from fastattn.bench.host import this_host
from fastattn.bench.peers import ENGINES, OURS

ROOT = Path(__file__).parents[2]
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib, which draws the picture, is not installed"
)


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
    """Return the script that measures, and writes what the README and docs/benchmarks.md show."""
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Make the two pages with which the script begins, and return its arguments."""
    (tmp_path / "README.md").write_text("# fastattn\n<!-- overview:begin -->\n<!-- overview:end -->\nwords\n")
    its_table = report.with_section("# Benchmarks\n", "Another machine", "its table; 2000-01-01.")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text(its_table)
    places = {"--readme": "README.md", "--docs": "docs/benchmarks.md", "--figures": "docs/figures"}
    return [word for option, place in places.items() for word in (option, str(tmp_path / place))]


@needs_matplotlib
@pytest.mark.usefixtures("few")
def test_the_script_writes_the_tables_and_what_the_readme_shows(
    readme_table: Any, paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert readme_table.main([*paths, "--rounds", "1", "--case", "(1,1,16,64)"]) == 0
    docs, readme = (tmp_path / name for name in ("docs/benchmarks.md", "README.md"))
    assert "its table" in docs.read_text()
    assert f"## {this_host().name}" in docs.read_text()
    assert "| tiny, in a loop (1,1,16,64) | **" in docs.read_text()
    shown = readme.read_text()
    assert shown.endswith("-->\nwords\n")
    assert 'src="docs/figures/speed.svg"' in shown
    assert "](docs/benchmarks.md#machines). Measured on " in shown
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(written) == 4

    monkeypatch.setattr(readme_table, "measure_all", None)
    for path in (readme, *tmp_path.glob("docs/figures/*")):
        path.write_text("<!-- overview:begin --><!-- overview:end -->\nwords\n")
    readme_table.main([*paths, "--redraw"])
    for path in written:
        assert path == readme or path.read_bytes() == written[path]
    assert shown.removeprefix("# fastattn\n") == readme.read_text()


@pytest.mark.usefixtures("few")
def test_another_machine_leaves_the_readme_alone(readme_table: Any, paths: list[str], tmp_path: Path) -> None:
    before = (tmp_path / "README.md").read_text()
    assert readme_table.main([*paths, "--no-readme", "--rounds", "1", "--case", "(1,1,16,64)"]) == 0
    assert (tmp_path / "README.md").read_text() == before
    assert f"## {this_host().name}" in (tmp_path / "docs" / "benchmarks.md").read_text()
    assert not (tmp_path / "docs" / "figures").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--case", "nothing"], "no case is called 'nothing'"),
        (["--readme", "no-markers.md"], "the text has no <!-- overview:begin -->"),
        (["--readme", "missing.md"], "No such file"),
        (["--docs", "missing/benchmarks.md"], "is not a folder"),
        (["--docs", "no-markers.md", "--redraw"], "the text has no section of a machine"),
        (["--no-readme", "--redraw"], "not allowed with"),
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
    monkeypatch.setattr(readme_table, "measure_all", None)
    with pytest.raises(SystemExit) as stopped:
        readme_table.main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


# -- what is committed -------------------------------------------------------------------------------------------------


def test_the_readme_shows_the_tables_that_were_written_last() -> None:
    _, table = report.latest((ROOT / "docs" / "benchmarks.md").read_text("utf-8"))
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = report.overview(table, "docs/benchmarks.md", "docs/figures")
    assert report.with_overview(readme, shown) == readme, "run benchmarks/readme_table.py --redraw"


@needs_matplotlib
@pytest.mark.parametrize(("name", "dark"), [("speed.svg", False), ("speed-dark.svg", True)])
def test_the_picture_is_that_of_the_tables(tmp_path: Path, name: str, dark: bool) -> None:
    """Its words and its bars; fonts may differ."""
    machine, table = report.latest((ROOT / "docs" / "benchmarks.md").read_text("utf-8"))
    chart.save_overview(report.speeds_in(table), machine, tmp_path / name, dark=dark)
    made, committed = (
        re.findall(r">([^<]+)</text>|(fill: #\w+)", (folder / name).read_text("utf-8"))
        for folder in (tmp_path, ROOT / "docs" / "figures")
    )
    assert made == committed, "run benchmarks/readme_table.py --redraw"
    assert (machine, "") in committed
