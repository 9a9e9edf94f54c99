"""The recipes and the guide as notebooks to download, made of their Markdown and written beside their pages."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jupytext

if TYPE_CHECKING:
    from sphinx.application import Sphinx

NAME = re.compile(r"docs/recipes|docs/guide/(?!README)([\w-]+)")  # of a page that is one; its name in the guide
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+\.png)\)")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?://)[^)]*\)")

#: What stands before and behind a page of the guide: its code uses names of its module, which also computes the page.
FIRST = """\
```python
from fastattn.guide.{module} import *  # the names that the code of this page uses
```

"""
LAST = """
The page in text, with all numbers computed anew:

```python
from fastattn.__main__ import main

main(["guide", "{name}"]);
```
"""


def notebook(page: Path, name_in_guide: str | None) -> str:
    """Return a page as a notebook, whose cells are its Python code.

    Pictures are part of it, and links into the repository, which lead nowhere from there, are plain words.
    """
    text = LINK.sub(r"\1", page.read_text("utf-8"))
    text = PICTURE.sub(lambda match: f"![{match[1]}]({embedded(page.parent / match[2])})", text)
    if name_in_guide is not None:
        text = FIRST.format(module=name_in_guide.replace("-", "_")) + text + LAST.format(name=name_in_guide)
    return jupytext.writes(jupytext.reads(text, fmt="md"), fmt="ipynb")


def embedded(picture: Path) -> str:
    """Return a picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")


def offer(app: Sphinx, name: str, template: str, context: dict[str, Any], document: object) -> None:
    """Tell the template of a page whether there is a notebook to link to."""
    context["notebook"] = NAME.fullmatch(name) is not None


def write(app: Sphinx, error: Exception | None) -> None:
    """Write all notebooks."""
    if error is None and app.builder.format == "html":
        for name in sorted(app.env.found_docs):
            if match := NAME.fullmatch(name):
                text = notebook(Path(app.env.doc2path(name)), match[1])
                Path(app.outdir, f"{name}.ipynb").write_text(text, "utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", offer)
    app.connect("build-finished", write, priority=400)  # before links are checked
    return {"parallel_read_safe": True}
