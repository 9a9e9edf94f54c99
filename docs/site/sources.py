"""Links from pages to files of the repository that are no pages: each of these gets one, with its text in colours."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx import addnodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

LINKS = (addnodes.download_reference, addnodes.pending_xref)  # what Markdown's links are to files, and to all else
BODY = '<div class="site-source"><h1>{path}</h1>{text}</div>'


def find(app: Sphinx, document: nodes.document) -> None:
    """Make references of a page's links to files and folders, and remember where they lead."""
    name = app.env.docname
    found = set()
    for node in list(document.findall(lambda node: isinstance(node, LINKS))):
        path = Path(app.env.relfn2path(node["reftarget"], name)[1])
        ours = node.get("reftype") == "myst" and node.get("refdomain") is None
        if ours and path.exists() and path.is_relative_to(app.srcdir):
            target = path.relative_to(app.srcdir).as_posix()
            found.add(target)
            about = {"refdomain": None, "reftype": "source", "reftarget": target, "refdoc": name}
            node.replace_self(addnodes.pending_xref("", *node.children, **about))
    app.env.metadata[name]["sources"] = sorted(found)


def resolve(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.Node) -> nodes.Node | None:
    """Make links of such references."""
    if node["reftype"] != "source":
        return None
    return nodes.reference("", "", text, refuri=app.builder.get_relative_uri(node["refdoc"], node["reftarget"]))


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the pages of all files and folders to which links lead, and of the files in these folders."""
    linked = {Path(app.srcdir, path) for about in app.env.metadata.values() for path in about.get("sources", ())}
    folders = {path: sorted(path.glob("*.py")) for path in linked if path.is_dir()}
    texts = {path: listing(path, files) for path, files in folders.items()}
    texts |= {path: in_colours(app, path) for path in linked.union(*folders.values()).difference(folders)}
    for path, text in texts.items():
        name = path.relative_to(app.srcdir).as_posix()
        yield name, {"title": name, "body": BODY.format(path=escape(name), text=text)}, "page.html"


def listing(folder: Path, files: list[Path]) -> str:
    """Return links to the files of a folder, in HTML."""
    rows = "".join(f'<li><a href="{folder.name}/{file.name}.html">{file.name}</a></li>' for file in files)
    return f"<ul>{rows}</ul>"


def in_colours(app: Sphinx, path: Path) -> str:
    """Return the text of a file, in HTML."""
    language = "python" if path.suffix == ".py" else "text"
    return app.builder.highlighter.highlight_block(path.read_text("utf-8"), language, linenos="inline")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", find, priority=400)  # before files to download are copied
    app.connect("missing-reference", resolve)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True}
