"""What the sidebar lists: the pages that the tables of docs/index.md, the guide and the examples link to.

A page of contents on GitHub is a table, for Sphinx a toctree. The second is made of the first as a page is read.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

#: Pages that list others in tables, and which page's contents these are: README.md is the site's first.
LISTS = {
    "README": "docs/index",
    "docs/guide/README": "docs/guide/README",
    "docs/examples/README": "docs/examples/README",
}
SECTION = re.compile(r"^## ", re.MULTILINE)
ROW = re.compile(r"^\| (?:\d+ \| )?\[[^\]]*\]\(([^)#\s]+)\.md\)", re.MULTILINE)
NAME = re.compile(r"(?<=>)[\w.]+(?=<)")


def toctrees(text: str, page: str) -> str:
    """Return a hidden toctree for each section of a page that has tables of links, with its heading.

    >>> print(toctrees("# Contents\\n## Use\\n| [First](start.md) | how to begin |\\n", "docs/index"))
    ```{toctree}
    :hidden:
    :caption: Use
    <BLANKLINE>
    /docs/start
    ```
    """
    parts = []
    for number, section in enumerate(SECTION.split(text)):
        names = [posixpath.normpath(posixpath.join("/", posixpath.dirname(page), row)) for row in ROW.findall(section)]
        if names:
            caption = [":caption: " + section.splitlines()[0]] if number else []
            parts.append("\n".join(["```{toctree}", ":hidden:", *caption, "", *names, "```"]))
    return "\n\n".join(parts)


def breakable(html: object) -> str:
    """Allow a line to end within a name of functions: behind a dot, and before an underscore.

    >>> breakable('<a href="a.b_c.html">a.b_c</a>')
    '<a href="a.b_c.html">a.<wbr/>b<wbr/>_c</a>'
    """
    return NAME.sub(lambda match: match[0].replace(".", ".<wbr/>").replace("_", "<wbr/>_"), str(html))


def offer(app: Sphinx, name: str, template: str, context: dict[str, Any], document: object) -> None:
    """Tell the template of the sidebar how."""
    context["breakable"] = breakable


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """Give a page its toctrees, behind its text."""
    if name in LISTS:
        page = Path(app.srcdir, LISTS[name] + ".md")
        app.env.note_dependency(str(page), docname=name)
        source[0] += "\n\n" + toctrees(page.read_text("utf-8"), LISTS[name]) + "\n"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", add_contents)
    app.connect("html-page-context", offer)
    return {"parallel_read_safe": True}
