"""The guide: every page runs, says what docs/guide/ says, and claims nothing that does not hold."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest

import fastattn
from fastattn import guide
from fastattn.__main__ import main
from fastattn.console import arguments
from fastattn.console.terminal import Style, display_width
from fastattn.demo import minilm
from fastattn.guide import (
    bahdanau_luong,
    bottleneck,
    cli,
    cross_attention,
    data,
    formula,
    heads,
    language_model,
    lookup,
    markdown,
    tiles,
)
from fastattn.guide.page import ClaimError, Listing, Picture, Step, Table, claim, duration

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "guide"
MODULES = ("safetensors", "tokenizers", minilm.PACKAGE)
needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in MODULES),
    reason=f"the guide's packages are not all installed: {minilm.INSTALL}",
)
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
needs_docs = pytest.mark.skipif(not FOLDER.exists(), reason="not in the source tree")
every_page = pytest.mark.parametrize("name", guide.PAGES)

PLAIN = Style(colour=False, blocks=True, width=80)
COLOUR = Style(colour=True, blocks=True, width=80)
NARROW = Style(colour=False, blocks=False, width=40)
#: Times, which are other ones at every run.
TIME = re.compile(r"\d+\.\d (?:s|ms|µs)\b")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
#: How far a printed number may be from the committed one, in units of its last digit: kernels of other machines and
#: other matrix libraries round otherwise.
UNITS = 3
#: Of 255, how far the mean of a picture's fields may be from the committed one: fonts differ by less.
SHADES = 6


def lack_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the packages that the model needs be missing, and the model not be loaded."""
    data.model.cache_clear()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in MODULES else found(name))


@cache
def steps_of(name: str) -> tuple[Step, ...]:
    """Return the steps of a page, computed once for all tests; of a page that needs no model, without its packages."""
    page = guide.load(name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not page.model:
            lack_packages(monkeypatch)
        return tuple(page.steps())


def differences(ours: str, committed: str) -> list[str]:
    """Return what differs between two texts but for times, and for numbers that agree."""
    ours, committed = TIME.sub("TIME", ours), TIME.sub("TIME", committed)
    if NUMBER.sub("N", ours) != NUMBER.sub("N", committed):
        lines = zip(NUMBER.sub("N", ours).splitlines(), NUMBER.sub("N", committed).splitlines(), strict=False)
        return [f"{mine!r} is not {theirs!r}" for mine, theirs in lines if mine != theirs] or ["one text is longer"]
    pairs = zip(NUMBER.findall(ours), NUMBER.findall(committed), strict=True)
    return [f"{mine} is not {theirs}" for mine, theirs in pairs if not agree(mine, theirs)]


def agree(ours: str, committed: str) -> bool:
    """Whether two printed numbers are the same but for rounding; powers of ten but for a factor of ten."""
    if "e" in ours + committed:
        return 0.1 <= float(ours) / float(committed) <= 10
    decimals = len(committed.partition(".")[2])
    return abs(float(ours) - float(committed)) <= UNITS * 10**-decimals * (decimals > 0)


# -- the pages ---------------------------------------------------------------------------------------------------------


@needs_model
@every_page
def test_a_page_runs_and_fits_the_terminal(name: str) -> None:
    steps = steps_of(name)  # every claim in it has been checked now
    assert any(isinstance(step, Picture) for step in steps)
    for style in (PLAIN, COLOUR, NARROW):
        for step in steps:
            lines = cli.show(step, style)
            assert lines
            assert ("\x1b" in "".join(lines)) <= style.colour
            if not isinstance(step, Listing) and style is not COLOUR:
                assert max(map(display_width, lines)) <= style.width, step


@needs_model
@needs_docs
@every_page
def test_the_committed_page_is_the_one_that_is_made(name: str) -> None:
    committed = (FOLDER / f"{name}.md").read_text("utf-8")
    assert differences(markdown.text(guide.load(name), steps_of(name)), committed) == [], "run docs/guide/build.py"


@needs_docs
def test_the_committed_contents_are_those_that_are_made() -> None:
    assert (FOLDER / "README.md").read_text("utf-8") == markdown.contents()


def thumbnail(image: Any) -> Any:
    """Return the mean colours of 12 × 20 fields of an image, [row][column][rgb]."""
    pixels = np.asarray(image, dtype=np.float64)[..., :3]
    rows, columns = (
        np.linspace(0, size, count + 1).astype(int) for size, count in zip(pixels.shape[:2], (12, 20), strict=True)
    )
    sums = np.add.reduceat(np.add.reduceat(pixels, rows[:-1], axis=0), columns[:-1], axis=1)
    return sums / (np.diff(rows)[:, None, None] * np.diff(columns)[None, :, None])


@needs_model
@needs_matplotlib
@needs_docs
@every_page
def test_the_committed_pictures_are_those_that_are_made(name: str) -> None:
    from matplotlib.image import imread

    for picture in steps_of(name):
        if not isinstance(picture, Picture):
            continue
        path = FOLDER / markdown.FIGURES / f"{picture.name}.png"
        assert path.stat().st_size < 120_000
        canvas = markdown.render(picture).canvas
        canvas.draw()
        ours, committed = np.asarray(canvas.buffer_rgba()), imread(path) * 255
        assert ours.shape[:2] == committed.shape[:2]
        if not picture.timed:
            assert np.abs(thumbnail(ours) - thumbnail(committed)).max() < SHADES, (
                f"{path.name}: run docs/guide/build.py"
            )


@needs_model
@needs_matplotlib
def test_another_picture_would_be_noticed() -> None:
    (picture,) = (step for step in steps_of("lookup") if isinstance(step, Picture))
    key, query = data.model().embed(list(lookup.LEGS)), data.model().embed(list(lookup.ASKED))
    _, weights = lookup.soft_lookup(query, key, np.zeros((6, 1), np.float32), 5.0)
    other = lookup.weight_map("", "", list(lookup.ASKED), list(lookup.LEGS), weights, size=picture.size)
    images = []
    for each in (picture, other):
        canvas = markdown.render(each).canvas
        canvas.draw()
        images.append(thumbnail(canvas.buffer_rgba()))
    assert np.abs(images[0] - images[1]).max() > 3 * SHADES


@needs_docs
@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL))
    assert found
    for link in found:
        if not link.startswith("https://"):
            target, _, anchor = link.partition("#")
            path = (page.parent / target).resolve()
            assert path.exists(), link
            headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, link


@needs_docs
def test_no_picture_is_left_over() -> None:
    named = set(re.findall(r"figures/([\w-]+\.png)", "".join(page.read_text("utf-8") for page in FOLDER.glob("*.md"))))
    assert named == {path.name for path in (FOLDER / markdown.FIGURES).iterdir()}


def test_differences_are_found() -> None:
    same = "It is 0.68 at 16 words, 1e-07 off, in 12.3 ms."
    assert differences("It is 0.70 at 16 words, 5e-07 off, in 99.9 µs.", same) == []
    for other in (
        "0.75 at 16 words, 1e-07",
        "0.68 at 17 words, 1e-07",
        "0.68 at 16 words, 1e-05",
        "0.68 at 16 books, 1e-07",
    ):
        assert differences(f"It is {other} off, in 12.3 ms.", same) != []
    assert differences(same + "\nMore.", same) != []


# -- what the pages are made of ----------------------------------------------------------------------------------------


def test_a_claim_that_does_not_hold_stops_the_page() -> None:
    assert claim(np.bool_(True), "so") == "so"
    with pytest.raises(ClaimError, match="measured otherwise: not so"):
        claim(np.bool_(False), "not so")


def test_a_listing_is_the_source_of_what_runs() -> None:
    listing = Listing.of(tiles.tiles, tiles.two_at_once)
    assert listing.language == "python"
    assert listing.text.startswith("def tiles(")
    assert "\n\n\ndef two_at_once(" in listing.text


def test_a_duration_has_its_unit_and_is_taken_for_a_time() -> None:
    for seconds, text in ((75.0, "75.0 s"), (0.25, "250.0 ms"), (3e-6, "3.0 µs"), (0.0, "0.0 µs")):
        assert duration(seconds) == text
        assert TIME.fullmatch(text)


def test_a_table_in_both_forms() -> None:
    table = Table(["name", "count"], [["one *two*", "3"], ["four", "25"]])
    assert cli.show(table, PLAIN) == ["  name     count", "  one two      3", "  four        25"]
    page = guide.Page("bottleneck", "Title", "Why?")
    assert "| name | count |\n| --- | ---: |\n| one *two* | 3 |\n| four | 25 |" in markdown.text(page, [table])


def test_marks_of_markdown_are_not_shown_in_the_terminal() -> None:
    lines = cli.show("See *this*, `a * b * c` and [page 2](lookup.md), [a paper](https://arxiv.org/abs/1).", PLAIN)
    assert " ".join(lines) == "See this, a * b * c and page 2, a paper <https://arxiv.org/abs/1>."
    assert cli.show("## Head", COLOUR) == ["\x1b[1mHead\x1b[0m"]


def test_prose_and_code_have_the_colours_of_rich_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich, which draws prose and code, is not installed")
    style = Style(colour=True, blocks=True, width=40)
    prose = "See *this*, `a * b * c` and [page 2](lookup.md), [a paper](https://arxiv.org/abs/1). " * 2
    for step in (prose, Listing.of(tiles.tiles), Listing("softmax(QKᵀ/√d)V")):
        drawn = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in cli.show(step, style)]
        assert max(map(display_width, drawn)) <= style.width
        with monkeypatch.context() as context:
            context.setitem(sys.modules, "rich.console", None)
            plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in cli.show(step, style)]
        said = ["".join("".join(lines).split()) for lines in (drawn, plain)]
        assert said[0] == said[1].replace("<http", "(http").replace("/1>", "/1)")
    assert "\x1b[3mthis" in cli.show(prose, style)[0]
    assert cli.show(Listing.of(tiles.tiles), style)[0].startswith("  \x1b")


# -- the functions that pages show -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*tiles.FORMS.values(), formula.attention])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (300, 700), (513, 256)])
def test_every_form_is_attention(form: Callable[..., Any], queries: int, keys: int) -> None:
    rng = np.random.default_rng(queries)
    query, key = (rng.standard_normal((n, 16), dtype=np.float32) * 3 for n in (queries, keys))
    value = rng.standard_normal((keys, 5), dtype=np.float32)
    expected = fastattn.attention(query, key, value, backend="reference")
    np.testing.assert_allclose(form(query, key, value), expected, rtol=0, atol=1e-5)


def test_online_softmax_keeps_up_with_rising_scores() -> None:
    key = np.arange(2 * tiles.BLOCK, dtype=np.float32)[:, None]  # every block has greater scores than all before
    query, value = np.full((3, 1), 10.0, np.float32), key.copy()
    np.testing.assert_allclose(tiles.blocks_of_keys(query, key, value), key[-1, 0], rtol=1e-6)


def test_additive_scores_are_those_of_fastattn() -> None:
    rng = np.random.default_rng(0)
    query, key, weight = (rng.standard_normal(shape) for shape in ((7, 12), (9, 12), 12))
    _, weights = bahdanau_luong.softmax_rows(bahdanau_luong.additive_scores(query, key, weight))
    _, ours = fastattn.additive_attention(query, key, key, weight, return_weights=True)
    np.testing.assert_allclose(ours, weights, rtol=0, atol=1e-12)


def test_both_ways_of_reading_read_one_word() -> None:
    rng = np.random.default_rng(0)
    places, words = rng.choice(np.array([-1, 1], np.float32), (1, 64)), rng.standard_normal((1, 64), dtype=np.float32)
    for read in (bottleneck.in_one_vector, bottleneck.by_attention):
        np.testing.assert_allclose(read(places, words), words, rtol=1e-6)


class TestRelations:
    WORDS = ("[CLS]", *["the", "crow", "saw", "a", "fox", ",", "and", "the", "fox", "saw", "her", "."], "[SEP]")

    def pairs(self, name: str) -> set[tuple[int, int]]:
        (relation,) = (each for each in heads.RELATIONS if each.name == name)
        return {(int(i), int(j)) for i, j in np.argwhere(relation.pairs(self.WORDS))}

    def test_relations_are_the_pairs_that_they_say(self) -> None:
        assert self.pairs("determiner to noun") == {(1, 2), (4, 5), (8, 9), (11, 12)}
        assert self.pairs("verb to object") == {(3, 5), (10, 12)}
        assert self.pairs("the same word again") == {(3, 10), (10, 3), (5, 9), (9, 5)}
        assert self.pairs("pronoun to an actor") == {(11, 2), (11, 5), (11, 9)}
        assert {(j - i) for i, j in self.pairs("the word before")} == {-1}
        assert {j for _, j in self.pairs("[CLS], at the start")} == {0}

    def test_controls_have_no_pair_of_the_relation(self) -> None:
        for relation in heads.RELATIONS[-3:]:
            assert not (relation.pairs(self.WORDS) & relation.control(self.WORDS)).any()

    def test_a_head_with_a_job_is_found_on_the_other_half(self) -> None:
        rng = np.random.default_rng(0)
        texts = []
        for length in (5, 8, 6, 9):
            weights = rng.dirichlet(np.ones(length), (heads.LAYERS, heads.HEADS, length))
            weights[4, 7] = 0.9 * np.eye(length, k=-1) + 0.1 / length
            texts.append(([f"w{i}" for i in range(length)], weights))
        found = heads.cross_checked(heads.RELATIONS[0], (texts[::2], texts[1::2]))
        assert found.heads == ["4.7"]
        assert found.weight == pytest.approx(0.9 + 0.1 * np.mean([1 / n for n in (5, 8, 6, 9)]), abs=0.01)
        assert found.pairs == sum(n - 2 for n in (5, 8, 6, 9))


@needs_model
@pytest.mark.parametrize("pair", cross_attention.PAIRS)
def test_partners_are_words_of_the_sentences(pair: tuple[str, str, str]) -> None:
    rows, columns = (cross_attention.word_vectors(text, 0)[0] for text in pair[:2])
    for partners in pair[2].split():
        one, other = partners.split(":")
        assert one in [word.text for word in rows]
        assert other in [word.text for word in columns]


def test_the_fables_are_whole() -> None:
    assert [len(fable) for fable in data.fables()] == [2, 6, 4, 6, 7, 5, 3, 13, 8]
    assert all(sentence == sentence.strip() and sentence[-1] in '.!?"' for sentence in data.sentences())


@needs_docs
def test_without_its_model_a_page_says_what_was_measured() -> None:
    page, steps = guide.load("language-model"), tuple(language_model.told(language_model.kept()))
    committed = (FOLDER / "language-model.md").read_text("utf-8")
    assert differences(markdown.text(page, steps), committed) == [], "run docs/guide/build.py"


def test_a_page_that_keeps_what_was_measured_does_without_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == language_model.PACKAGE else found(name)
    )
    steps = tuple(guide.load("language-model").steps())
    assert any(isinstance(step, Picture) for step in steps)
    for style in (PLAIN, NARROW):
        for step in steps:
            if not isinstance(step, Listing):
                assert max(map(display_width, cli.show(step, style))) <= style.width, step


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs ``guide``: status, output, errors."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["guide", *arguments])
        except SystemExit as error:
            status = int(error.code or 0)
        return status, *capsys.readouterr()

    return run


def test_without_a_name_it_lists_the_pages(run: Any) -> None:
    status, out, err = run()
    assert (status, err) == (0, "")
    for number, name in enumerate(guide.PAGES, start=1):
        assert re.search(rf"^  {number}  {name} +\S", out, re.MULTILINE)


def test_the_list_fits_a_narrow_terminal(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = run()
    assert max(map(len, out.splitlines())) <= 40
    assert all(page.title in " ".join(out.split()) for page in guide.CONTENTS)


def test_help(run: Any) -> None:
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: python -m fastattn guide")
    assert "--save" in out


@pytest.mark.parametrize("name", ["history", "9", "History"])
def test_a_page_is_found_by_name_or_number(run: Any, name: str) -> None:
    status, out, err = run(name)
    assert (status, err) == (0, "")
    assert out.startswith("9. History and reading\n")
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], '"nonsense" is not a page of the guide; the pages are: bottleneck, '),
        (["0"], '"0" is not a page'),
        (["\x1b[31m"], "is not a page"),
        (["--save", "folder"], "--save needs the NAME of a page"),
        (["history", "more"], "more"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(run: Any, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert message in err


@pytest.mark.parametrize("arguments", [["lookup"], ["history", "--save", "folder"]])
def test_missing_packages_are_one_line_and_status_2(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data.model.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = run(*arguments)
    data.model.cache_clear()
    assert status == 2
    assert err.count("\n") == 1
    assert "pip install" in err
    assert not list(tmp_path.iterdir())


@every_page
def test_a_page_that_lacks_a_package_says_so_before_it_begins(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lack_packages(monkeypatch)
    monkeypatch.setattr(guide.Page, "steps", lambda page: iter(steps_of(page.name)))
    status, out, err = run(name, *(["--save", "folder"] if importlib.util.find_spec("matplotlib") else []))
    data.model.cache_clear()
    page = guide.load(name)
    if page.model:
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert "pip install" in err
        assert not list(tmp_path.iterdir())
    else:
        assert (status, err) == (0, "")


def test_titles_do_not_come_from_docstrings() -> None:
    """Which `python -OO` leaves out."""
    code = "import sys\nfrom fastattn.__main__ import main\nmain(['guide'])"
    assert processes.run(code, PYTHONOPTIMIZE="2", COLUMNS="80") == processes.run(code, COLUMNS="80")


def test_without_source_files_a_page_runs_but_for_the_code(tmp_path: Path) -> None:
    tree = processes.compiled(processes.PACKAGE, tmp_path / "tree")
    code = "from fastattn.guide import data, tiles\nprint(len(data.fables()), next(iter(tiles.steps()))[:0])\n"
    code += "from fastattn.guide.page import Listing\nprint(Listing.of(tiles.tiles, tiles.formula).text)"
    printed = processes.run(code, tree)
    assert printed == "9 \n(the code of tiles, formula is not shown: there are no source files here)\n"


@needs_matplotlib
def test_pictures_are_saved(run: Any, tmp_path: Path) -> None:
    status, out, err = run("history", "--save", str(tmp_path / "new" / "folder"))
    assert (status, err) == (0, "")
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in "".join(out.split())


@needs_matplotlib
def test_a_folder_that_cannot_be_is_one_line(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, out, err = run("history", "--save", str(tmp_path / "file"))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "cannot make the folder" in err


@needs_matplotlib
def test_a_folder_that_cannot_be_written_is_one_line(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(arguments.tempfile, "TemporaryFile", refused)
    status, out, err = run("history", "--save", str(tmp_path))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "cannot write to the folder" in err
