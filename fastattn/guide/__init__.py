"""What attention is, from the beginning: pages that measure what they say, in a terminal and as docs/guide/.

A page is a module of this package. The first line of its docstring is its title, the rest what it answers; its
``steps`` yields paragraphs, pieces of code, tables and pictures, and computes every number in them. The same steps
become a page in the terminal (`cli.py`) and one in Markdown with pictures by matplotlib (`markdown.py`), so that
the two cannot disagree.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastattn.guide.page import Step

__all__ = ["PAGES", "Page", "find", "load"]

#: The pages in the order in which they are meant to be read; a name is also that of the module, with _ for -.
PAGES = (
    "bottleneck",
    "lookup",
    "formula",
    "self-attention",
    "heads",
    "cross-attention",
    "bahdanau-luong",
    "tiles",
    "history",
)


@dataclass(frozen=True)
class Page:
    """A page of the guide.

    Attributes
    ----------
    number : int
        Its place in the guide, from 1.
    name, title, question : str
        What the command line calls it, its heading, and what it answers, in one sentence.
    steps : callable
        Computes the page, step by step.
    """

    number: int
    name: str
    title: str
    question: str
    steps: Callable[[], Iterator[Step]]


def load(name: str) -> Page:
    """The page of this name, one of `PAGES`."""
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    title, _, question = (module.__doc__ or "").partition("\n\n")
    return Page(PAGES.index(name) + 1, name, title.strip().rstrip("."), " ".join(question.split()), module.steps)


def find(wanted: str) -> str | None:
    """The name of the page that is called this, or has this number; None if there is none.

    Examples
    --------
    >>> find("3"), find("Heads"), find("nonsense")
    ('formula', 'heads', None)
    """
    numbered = {str(number): name for number, name in enumerate(PAGES, start=1)}
    key = wanted.strip().casefold().replace("_", "-")
    return numbered.get(key, key if key in PAGES else None)
