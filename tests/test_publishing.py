"""What is said of the package outside of it: to PyPI, conda, GitHub and those who cite it. All of it agrees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="not in a clone")


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def found(pattern: str, text: str) -> str:
    """Return the only thing in a text that is like this."""
    (one,) = re.findall(pattern, text, re.MULTILINE)
    assert isinstance(one, str)
    return one


def test_the_version() -> None:
    assert found(r'^version: "?([\d.]+)"?$', read("CITATION.cff")) == fastattn.__version__
    assert found(r'^  version: "([\d.]+)"$', read("docs/conda/recipe.yaml")) == fastattn.__version__


def test_the_repository_is_one() -> None:
    repository = found(r'^Repository = "(.*)"$', read("pyproject.toml"))
    owner, name = repository.removeprefix("https://github.com/").split("/")
    assert found(r'^Documentation = "(.*)"$', read("pyproject.toml")) == f"https://{owner}.github.io/{name}/"
    for page in ("CITATION.cff", "docs/conda/recipe.yaml", "benchmarks/history/asv.conf.json", "pyproject.toml"):
        for place in re.findall(r"https://github\.com/[\w-]+/[\w-]+|https://[\w-]+\.github\.io/[\w-]+", read(page)):
            assert place in (repository, f"https://{owner}.github.io/{name}"), page
    assert found("(https://github.com/.*)/security", read(".github/ISSUE_TEMPLATE/config.yml")) == repository


def test_the_pythons_are_those_that_are_tested() -> None:
    package, tests = read("pyproject.toml"), read(".github/workflows/tests.yml")
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", package)
    assert re.findall(r"3\.\d+", found(r"python: \[(.*)\]", tests)) == named
    assert found(r'^requires-python = ">=(.*)"$', package) == named[0]


def test_conda_asks_for_what_pip_asks_for() -> None:
    package, recipe = read("pyproject.toml"), read("docs/conda/recipe.yaml")
    python = ("python", found(r'^requires-python = ">=(.*)"$', package))
    host, run = (
        set(re.findall(r"^    - ([\w-]+) >=([\d.]+)$", part, re.MULTILINE))
        for part in recipe.partition("  host:")[2].partition("\ntests:")[0].split("  run:")
    )
    for asked, pattern in ((host, r"^requires = \[(.*)\]$"), (run, r"^dependencies = \[(.*)\]$")):
        assert asked == {python, *re.findall(r'"([\w-]+)>=([\d.]+)"', found(pattern, package))}
