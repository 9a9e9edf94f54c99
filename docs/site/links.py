"""Whether every link of the finished site leads somewhere on it, pictures and other files included."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from sphinx.application import Sphinx


class Page(HTMLParser):
    """What a page links to, and the places in it to which links may lead."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value and name in ("href", "src"):
                self.links.add(value)
            elif value and name in ("id", "name"):
                self.places.add(value)


def broken(folder: Path) -> list[str]:
    """Return what leads nowhere, as sentences."""
    site = {path: Page(path) for path in folder.rglob("*.html") if "_static" not in path.parts}
    found = []
    for path, page in site.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            if not target.is_file() or (place and target in site and place not in site[target].places):
                found.append(f"{path.relative_to(folder)}: {link} leads nowhere")
    return found


def check(app: Sphinx, error: Exception | None) -> None:
    """Warn of each such link."""
    from sphinx.util import logging

    if error is None and app.builder.format == "html":
        for sentence in broken(Path(app.outdir)):
            logging.getLogger(__name__).warning(sentence)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", check, priority=900)
    return {"parallel_read_safe": True}
