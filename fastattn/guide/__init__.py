"""What attention is, from the beginning: pages that measure what they say, in a terminal and as docs/guide/.

A page is a module of this package, whose ``steps`` yields paragraphs, pieces of code, tables and pictures, and computes
every number in them. The same steps become a page in the terminal (`cli.py`) and one in Markdown with pictures by
matplotlib (`markdown.py`), so that the two cannot disagree.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from fastattn.guide.page import Step

__all__ = ["CONTENTS", "PAGES", "Page", "find", "load"]


@dataclass(frozen=True)
class Page:
    """A page of the guide.

    Attributes
    ----------
    name, title, question : str
        What the command line calls it, its heading, and what it answers, in one sentence.
    model : bool
        Whether it reads the model of the demo, whose packages it needs.
    """

    name: str
    title: str
    question: str
    model: bool = True

    @property
    def number(self) -> int:
        """Its place in the guide, from 1."""
        return PAGES.index(self.name) + 1

    def steps(self) -> Iterator[Step]:
        """Compute the page, step by step."""
        module = importlib.import_module(f"{__name__}.{self.name.replace('-', '_')}")
        steps: Iterator[Step] = module.steps()
        return steps


#: The pages in the order in which they are meant to be read; a name is also that of the module, with _ for -.
CONTENTS = (
    Page(
        "bottleneck",
        "The bottleneck, and what attention does",
        "Why is one vector not enough for a sentence, and what can be read from many?",
    ),
    Page(
        "lookup",
        "Queries, keys, values: a dictionary that answers softly",
        "What are a query, a key and a value, and what does attention compute from them?",
    ),
    Page(
        "formula",
        "The formula, and why it divides by √d",
        "What does each part of softmax(QKᵀ/√d)V do, and what happens without the root?",
    ),
    Page(
        "self-attention",
        "Self-attention: a sentence looks at itself",
        'Where does "it" look in "The animal didn\'t cross the street because it was too tired", and who told it?',
    ),
    Page(
        "heads",
        "Heads: what 72 of them look at",
        "Does a head have a job? We measure all 72 of MiniLM on Aesop's fables.",
    ),
    Page(
        "cross-attention",
        "Cross-attention: one sentence looks at another",
        "How do the words of one sentence find their partners in another, where all stands in another order?",
    ),
    Page(
        "bahdanau-luong",
        "Bahdanau and Luong: other scores, and windows",
        "How were queries and keys compared before the scaled dot product, and what if a query looks at a window only?",
    ),
    Page(
        "tiles",
        "From the formula to online softmax to tiles",
        "How is attention computed without its matrix, and why is that faster, too?",
        model=False,
    ),
    Page("history", "History and reading", "Who had which idea, and where is it written?", model=False),
    Page(
        "language-model",
        "How a language model writes",
        "How is a text written by a model that scores one token, and why does it keep keys and values?",
        model=False,
    ),
)
PAGES = tuple(page.name for page in CONTENTS)


def load(name: str) -> Page:
    """The page of this name, one of `PAGES`."""
    return CONTENTS[PAGES.index(name)]


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
