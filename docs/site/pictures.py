"""Pictures that GitHub shows in a light and a dark form: the site shows the one of its own theme.

On GitHub it is the system's, said by HTML of which Sphinx would know neither files nor theme.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DARK = re.compile(r'<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)"')
LIGHT = re.compile(r'<img src="([^"]+)" alt="([^"]*)"')


def replace(app: Sphinx, document: nodes.document) -> None:
    """Make two images of each such picture, with the theme's names for when they are shown."""
    for node in list(document.findall(nodes.raw)):
        dark, light = DARK.search(node.astext()), LIGHT.search(node.astext())
        if dark and light:
            forms = (("only-light", light[1]), ("only-dark", dark[1]))
            node.replace_self([nodes.image("", uri=uri, alt=light[2], classes=[form]) for form, uri in forms])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", replace, priority=400)  # before the files of images are collected
    return {"parallel_read_safe": True}
