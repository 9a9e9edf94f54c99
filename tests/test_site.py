"""What `make docs` makes of the pages: contents, notebooks; and that it finds links that lead nowhere."""

from __future__ import annotations

import doctest
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "docs" / "site").exists(), reason="not in the source tree")


def load(name: str) -> ModuleType:
    """Import a module of docs/site/, which Sphinx finds by its own path."""
    if name == "notebooks":
        pytest.importorskip("jupytext", reason="jupytext is not installed")
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_has_its_place_in_the_sidebar() -> None:
    contents = load("contents")
    listed = "".join(
        contents.toctrees((ROOT / f"{page}.md").read_text("utf-8"), page) for page in contents.LISTS.values()
    )
    folders = [ROOT / "docs" / name for name in (".", "guide", "examples")]
    pages = {path.relative_to(ROOT).with_suffix("") for folder in folders for path in folder.glob("*.md")}
    assert {f"/{page.as_posix()}" for page in pages} - set(listed.split()) == {"/docs/index"}
    assert {"/CONTRIBUTING", "/CHANGELOG"} <= set(listed.split())


def test_a_toctree_has_the_heading_of_its_table_and_long_names_end_lines_between_words() -> None:
    results = doctest.testmod(load("contents"))
    assert (results.attempted, results.failed) == (2, 0)


def test_code_that_runs_is_a_cell_and_pictures_are_in_the_notebook() -> None:
    notebooks = load("notebooks")
    cells = json.loads(notebooks.notebook(ROOT / "docs" / "guide" / "lookup.md", "lookup"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert code[0].startswith("from fastattn.guide.lookup import *")
    assert code[1].startswith("def soft_lookup(")
    assert code[2].endswith('main(["guide", "lookup"]);')
    assert len(code) == 3
    assert "](data:image/png;base64," in text
    assert ".md)" not in text


@pytest.mark.parametrize(
    ("link", "found"),
    [
        ("other.html", []),
        ("other.html#here", []),
        ("#place", []),
        ("https://example.org/nothing", []),
        ("other.html#nowhere", ["index.html: other.html#nowhere leads nowhere"]),
        ("missing.png", ["index.html: missing.png leads nowhere"]),
        ("#elsewhere", ["index.html: #elsewhere leads nowhere"]),
    ],
)
def test_links_that_lead_nowhere_are_found(tmp_path: Path, link: str, found: list[str]) -> None:
    (tmp_path / "index.html").write_text(f'<p id="place"><a href="{link}">somewhere</a></p>')
    (tmp_path / "other.html").write_text('<p id="here"><img src="index.html"></p>')
    assert load("links").broken(tmp_path) == found
