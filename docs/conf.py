"""Settings of the site, which ``make docs`` makes of README.md, the pages of this folder, and the docstrings.

Sphinx reads the repository from its top, so that every page is where it is and a link is right on GitHub and here; the
address of a page is the path of its file. What GitHub does not need is made on the way, by the modules in `site/`: the
contents, from the tables of the pages that list others; pages of the source files to which links lead; notebooks;
pictures for both themes.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fastattn

if TYPE_CHECKING:
    from sphinx.application import Sphinx

SITE = Path(__file__).parent / "site"
sys.path.insert(0, str(SITE))

project = "fastattn"
version = release = fastattn.__version__
html_title = "fastattn"
html_show_copyright = False

extensions = [
    "myst_parser",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_copybutton",
    "contents",
    "pictures",
    "sources",
    "notebooks",
    "links",
]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "docs/reference/*.rst"]
exclude_patterns = [".*", "build", "dist", "fastattn", "tests", "benchmarks"]
suppress_warnings = ["toc.not_included"]  # pages that no table lists are found by the links to them
nitpicky = True
nitpick_ignore_regex = [  # names in backticks that are no pages here: arguments, other libraries, what is internal
    ("py:obj", r"(?!fastattn\.).*"),
    ("py:obj", r"fastattn\.call\b.*"),
]

# -- Markdown ----------------------------------------------------------------------------------------------------------

myst_heading_anchors = 6  # as GitHub has them

# -- docstrings --------------------------------------------------------------------------------------------------------

autosummary_generate = True
autosummary_imported_members = True
# other libraries need not be here: what is documented does not depend on them
autodoc_mock_imports = ["dask", "jax", "mpi4py", "onnx", "torch", "transformers"]
autodoc_typehints = "none"  # a docstring says it in words, with shapes
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
default_role = "autolink"  # `name` leads to the page of that name, if there is one
smartquotes = False
numpydoc_class_members_toctree = False
numpydoc_show_class_members = False
numpydoc_validation_checks = {
    "all",  # but
    *("SA01", "ES01", "EX01"),  # see also, more than a summary, examples: where there is something to say
    *("PR03", "PR04", "PR07"),  # arguments with one meaning are described together, at times by their shapes alone
    "PR08",  # a description may begin with the name of a dtype
    *("RT01", "RT02", "RT03", "YD01"),  # a summary that says what is returned is enough, and a result may have a name
    "SS05",  # "gradients" is no verb
}
numpydoc_validation_exclude = {
    r"\.reference\.",  # takes the arguments of functions that are documented
    r"\.(AttentionSummary|BlockMask|ShadedText)$",  # are made by functions, not by their constructors,
    r"\.onnx\.",  # and these by ONNX
    r"\.__call__$",  # describes each of its options, and takes them as `**options`
}


def skip_fields(app: object, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out the fields of named tuples: the docstring of the class describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


# -- looks -------------------------------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_static_path = ["site/static"]
templates_path = [str(SITE / "templates")]
html_css_files = ["site.css"]
html_use_index = False
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"**": ["contents.html"]}
html_theme_options = {
    "logo": {"text": "fastattn"},
    "navbar_center": [],
    "navbar_align": "right",
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc", "notebook"],
    "footer_start": [],
    "footer_end": [],
    "show_toc_level": 2,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Make the first page the one that a server shows of a folder, too."""
    if error is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("build-finished", add_index, priority=400)  # before links are checked
