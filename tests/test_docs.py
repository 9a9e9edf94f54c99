"""The documentation: its code runs, its links lead somewhere, and what it names exists."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import fastattn
from fastattn.__main__ import main
from fastattn.machine import table as isa

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Return the Python code in a page, each piece with the number of lines above it."""
    text = page.read_text("utf-8")
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(text) if m[1] == "python"]


def anchors(page: Path) -> set[str]:
    """Return what links into a page may name: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_code_runs(page: Path) -> None:
    """The pieces of a page run in order, in one namespace; an error points at the line of the page.

    A piece that imports what is not installed is left out.
    """
    namespace: dict[str, object] = {}
    for above, code in python_blocks(page):
        libraries = set(re.findall(r"^(?:import|from) (?:fastattn\.integrations\.)?(\w+)", code, re.MULTILINE))
        if all(importlib.util.find_spec(name) for name in libraries):
            exec(compile("\n" * above + code, str(page), "exec"), namespace)


def test_there_is_code() -> None:
    assert {"README.md", "start.md", "semantics.md", "api.md"} <= {page.name for page in PAGES if python_blocks(page)}


# -- links -------------------------------------------------------------------------------------------------------------


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} does not exist"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: {target.name} has no such heading"


def test_the_contents_list_every_page() -> None:
    links = LINK.findall(read("docs/index.md"))
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"} <= set(links)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fastattn.__all__)
def test_every_public_name_is_described(name: str) -> None:
    assert re.search(rf"fastattn\.{name}\b", read("docs/api.md"))


@pytest.mark.parametrize("name", fastattn.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert f"\n   {name}\n" in read("docs/reference.md")


def test_the_signature_is_the_real_one() -> None:
    parameters = list(inspect.signature(fastattn.attention).parameters.values())
    first = next(p for p in parameters if p.kind is p.KEYWORD_ONLY)
    text = ["*, " * (p is first) + str(p.replace(annotation=p.empty)) for p in parameters]
    written = re.search(r"fastattn\.attention\((query, key, value, attn_mask=[^)]*)\)", read("docs/api.md"))
    assert written is not None
    assert " ".join(written[1].split()) == ", ".join(text)


@pytest.mark.parametrize("name", list(inspect.signature(fastattn.attention).parameters))
def test_every_argument_is_described(name: str) -> None:
    assert f"\n| `{name}` | " in read("docs/api.md")


def test_environment_variables_are_those_that_are_read() -> None:
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "fastattn").rglob("*.py"))
    pattern = r"\b(?:FASTATTN_[A-Z_]+|NO_COLOR)\b"
    assert set(re.findall(rf"\n\| `({pattern})` \|", read("docs/api.md"))) == set(re.findall(pattern, sources))


def test_the_machines_are_those_of_the_table() -> None:
    page = read("docs/how-it-works.md")
    for row in isa.TABLE:
        figures = f"{row.vector_bytes} | {row.rows} × {row.vectors} | {row.tall_rows} × 1 | {row.key_block}"
        assert re.search(rf"\n\| `{row.name}` \| [^|]* \| {figures} \|", page), row.name


def test_the_changelog_has_this_version() -> None:
    assert f"\n## [{fastattn.__version__}]" in read("CHANGELOG.md")


def test_the_lowest_versions_are_those_of_the_package() -> None:
    package = read("pyproject.toml")
    for name, pattern in (
        ("Python", r'requires-python = ">=([\d.]+)"'),
        ("NumPy", r'"numpy>=([\d.]+)"'),
        ("Numba", r'"numba>=([\d.]+)"'),
    ):
        found = re.search(pattern, package)
        assert found is not None
        assert f"{name} ≥ {found[1]}" in read("README.md")


# -- commands ----------------------------------------------------------------------------------------------------------


@every_page
def test_make_has_the_targets(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text("utf-8"), re.MULTILINE))
    assert named <= targets
    if page.name == "README.md":
        assert {"demo", "test"} <= named


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_takes_the_commands_of_the_readme() -> None:
    commands = [
        line for language, block in FENCE.findall(read("README.md")) if language == "sh" for line in block.splitlines()
    ]
    assert len(commands) == 4
    for command in commands:
        assert command.startswith("make ")
        planned = subprocess.run(
            ["make", "--dry-run", *shlex.split(command, comments=True)[1:]], cwd=ROOT, capture_output=True, check=False
        )
        assert planned.returncode == 0, planned.stderr


@every_page
def test_the_command_line_has_the_commands(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, rest in re.findall(
        r"python -m fastattn ([a-z]+(?: search| listen| chat)?)\b([^`\n#]*)", page.read_text("utf-8")
    ):
        with pytest.raises(SystemExit) as end:
            main([*command.split(), "--help"])
        assert end.value.code == 0, f"{page.name}: {command}"
        assert set(re.findall(r"--[a-z]+", rest)) <= set(re.findall(r"--[a-z]+", capsys.readouterr().out))
