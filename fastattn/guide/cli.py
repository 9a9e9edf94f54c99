"""A page in the terminal, and the command ``guide``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fastattn.console.arguments import folder_to_write, next_command
from fastattn.console.terminal import Style, UserError, display_width, pad, printable, wrap
from fastattn.guide import PAGES, find, load
from fastattn.guide.markdown import need_matplotlib, save
from fastattn.guide.page import Listing, Picture, Step, Table

__all__ = ["add_parser", "guide", "show"]

#: Lines of prose longer than this are hard to read, however wide the terminal.
PROSE_WIDTH = 88
_LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")
_MARKS = re.compile(r"\*\*?|`")
_INLINE = re.compile(r"(`[^`]*`)")


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``guide``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="name or number of a page (default: list them)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the page's pictures there too, as PNG")
    parser.set_defaults(run=guide)


def guide(args: argparse.Namespace) -> int:
    """List the pages, or run one."""
    style = Style.of(sys.stdout)
    if args.name is None:
        if args.save is not None:
            raise UserError("--save needs the NAME of a page: its pictures are written")
        print(*_contents(style), sep="\n")
        return 0
    name = find(args.name)
    if name is None:
        raise UserError(f'"{printable(args.name)}" is not a page of the guide; the pages are: {", ".join(PAGES)}')
    page = load(name)
    if args.save is not None:
        need_matplotlib()
    if page.model:
        from fastattn.guide.data import model

        model()  # says what is missing before the page has begun
    if args.save is not None:
        folder_to_write("--save", args.save)
    print(style.bold(f"{page.number}. {page.title}"))
    for step in page.steps():
        print("", *show(step, style), sep="\n", flush=True)
        if args.save is not None and isinstance(step, Picture):
            print(style.dim(f"  written to {save(step, args.save)}"))
    if page.number < len(PAGES):
        print("", *wrap(f"Next: {next_command()} guide {PAGES[page.number]}", style.width), sep="\n")
    return 0


def _contents(style: Style) -> Iterator[str]:
    yield from wrap("The guide: what attention is, measured on real weights and real text.", style.width)
    yield ""
    for page in map(load, PAGES):
        name = f"  {page.number}  {style.bold(pad(page.name, 16))} "
        if 22 + len(page.title) <= style.width:
            yield name + page.title
        else:  # below its name
            yield from (name.rstrip(), *wrap(page.title, style.width, " " * 5))
    yield ""
    yield from wrap(f"{next_command()} guide NAME shows a page.", style.width)


def show(step: Step, style: Style) -> list[str]:
    """The lines of a step."""
    width = min(style.width, PROSE_WIDTH)
    if isinstance(step, str) and step.startswith("#"):
        return [style.bold(line) for line in wrap(step.lstrip("# "), width)]
    if isinstance(step, str | Listing) and style.colour and (lines := _coloured(step, width)):
        return lines
    if isinstance(step, str):
        return wrap(_plain(step), width)
    if isinstance(step, Listing):
        return [style.dim("  " + line).rstrip() for line in step.text.splitlines()]
    if isinstance(step, Table):
        return _table(step, style)
    return [*step.lines(style), "", *(style.dim(line) for line in wrap(_plain(step.caption), width, "  "))]


def _coloured(step: str | Listing, width: int) -> list[str]:
    """Prose or code as rich draws it; nothing where rich is not installed."""
    try:
        from rich.console import Console
        from rich.markdown import Markdown
        from rich.padding import Padding
        from rich.syntax import Syntax
        from rich.theme import Theme
    except ImportError:
        return []
    theme = Theme({"markdown.code": "cyan", "markdown.link_url": "underline"})
    console = Console(width=width, force_terminal=True, force_jupyter=False, color_system="256", theme=theme)
    with console.capture() as capture:
        if isinstance(step, Listing):
            console.print(Padding(Syntax(step.text, step.language, theme="ansi_dark", word_wrap=True), (0, 0, 0, 2)))
        else:
            console.print(Markdown(_without_pages(step), hyperlinks=False))
    return [line.rstrip() for line in capture.get().splitlines()]


def _without_pages(text: str) -> str:
    """Links to other pages, which lead nowhere from a terminal, as plain words; those into the web are left."""
    return _LINK.sub(lambda match: match[0] if match[2].startswith("http") else match[1], text)


def _plain(text: str) -> str:
    """Markdown's inline marks, taken off; what stands between backticks is left as it is."""
    text = _LINK.sub(r"\1 <\2>", _without_pages(text))
    return "".join(part[1:-1] if part.startswith("`") else _MARKS.sub("", part) for part in _INLINE.split(text))


def _table(table: Table, style: Style) -> list[str]:
    rows = [[_plain(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(display_width(row[column]) for row in rows) for column in range(len(table.header))]
    if sum(widths) + 2 * len(widths) > style.width:  # too wide: one cell below another
        blocks = (
            line
            for row in rows[1:]
            for line in [
                *wrap(row[0], style.width, "  "),
                *(
                    line
                    for title, cell in zip(rows[0][1:], row[1:], strict=True)
                    for line in wrap(f"{title}: {cell}" if title else cell, style.width, "    ")
                ),
            ]
        )
        return list(blocks)
    lines = []
    for number, row in enumerate(rows):
        line = "  " + "  ".join(
            pad(cell, width, right=column > 0 and not table.left)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(style.bold(line.rstrip()) if number == 0 else line.rstrip())
    return lines
