"""A page as Markdown, with its pictures as PNG files: what docs/guide/ is made of."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastattn.call.advice import to_install
from fastattn.console.terminal import UserError
from fastattn.guide import PAGES, Page, load
from fastattn.guide.page import Listing, Picture, Step, Table

__all__ = ["contents", "need_matplotlib", "render", "save", "write"]

FIGURES = "figures"
DPI = 110


def need_matplotlib() -> None:
    """Refuse in one line where matplotlib, which draws the pictures, is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"pictures need matplotlib, not installed here: {to_install('plot')}")


def render(picture: Picture) -> Any:
    """Draw a picture on a matplotlib figure of its own; no global state of matplotlib changes."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=picture.size, dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    picture.draw(figure)
    return figure


def save(picture: Picture, folder: Path) -> Path:
    """Write a picture to a folder, and return the path of its file."""
    path = folder / f"{picture.name}.png"
    try:
        render(picture).savefig(path, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return path


def write(page: Page, steps: Iterable[Step], folder: Path) -> list[Path]:
    """Write a page and its pictures below a folder, and return the paths of what was written."""
    figures = folder / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    steps = list(steps)
    path = folder / f"{page.name}.md"
    path.write_text(text(page, steps), "utf-8")
    return [path, *(save(step, figures) for step in steps if isinstance(step, Picture))]


def text(page: Page, steps: Iterable[Step]) -> str:
    """The Markdown of a page."""
    parts = [f"# {page.number}. {page.title}", *map(_step, steps), _links(page)]
    return "\n\n".join(parts) + "\n"


def contents() -> str:
    """The Markdown of the guide's first page."""
    rows = [f"| {page.number} | [{page.title}]({page.name}.md) | {page.question} |" for page in map(load, PAGES)]
    return "\n".join(
        [
            "# The guide",
            "",
            "What attention is, from the beginning. Each page takes one idea, and measures what it says: on the "
            "weights of a real sentence encoder, on real text, on this library. The pages and their pictures are made "
            "by a script, [build.py](build.py), which computes every number; where a statement did not hold, it "
            "would stop.",
            "",
            "| | page | what it answers |",
            "|---|---|---|",
            *rows,
            "",
            "Each page also runs in a terminal, with the same numbers: `python -m fastattn guide` lists them.",
            "",
            "Most pages read the model of the [demo](../start.md#the-demo), all-MiniLM-L6-v2: 6 layers of 12 heads, "
            "trained so that sentences of like meaning get like vectors. The text they read are nine fables by Aesop, "
            "in the translation of V. S. Vernon Jones (1912), which is in the public domain.",
            "",
        ]
    )


def _step(step: Step) -> str:
    if isinstance(step, str):
        return step
    if isinstance(step, Listing):
        return f"```{step.language}\n{step.text}\n```"
    if isinstance(step, Table):
        rule = ["---"] + ["---" if step.left else "---:"] * (len(step.header) - 1)
        return "\n".join("| " + " | ".join(row) + " |" for row in (step.header, rule, *step.rows))
    return f"![{step.caption}]({FIGURES}/{step.name}.png)\n\n*{step.caption}*"


def _links(page: Page) -> str:
    links = ["[Contents](README.md)"]
    if page.number > 1:
        links.append(f"back: [{load(PAGES[page.number - 2]).title}]({PAGES[page.number - 2]}.md)")
    if page.number < len(PAGES):
        links.append(f"next: [{load(PAGES[page.number]).title}]({PAGES[page.number]}.md)")
    return "---\n\n" + " · ".join(links) + f" · in a terminal: `python -m fastattn guide {page.name}`"
