"""What a page is made of: paragraphs, code, tables, pictures; and claims, which must hold."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastattn.console.terminal import Style

__all__ = ["ClaimError", "Listing", "Picture", "Step", "Table", "claim", "duration"]


class ClaimError(AssertionError):
    """What a page says turned out not to be so."""


def claim(holds: Any, text: str) -> str:
    """The text, if it is true.

    Raises
    ------
    ClaimError
        If it is not: a page never says what it has not just measured.

    Examples
    --------
    >>> claim(1 + 1 == 2, "One and one is two.")
    'One and one is two.'
    """
    if not holds:
        raise ClaimError(f"measured otherwise: {text}")
    return text


@dataclass(frozen=True)
class Listing:
    """Code or a formula, shown as it is.

    Attributes
    ----------
    text : str
    language : str
        "python", "pycon" for what an interpreter shows, or "text" for a formula.
    """

    text: str
    language: str = "text"

    @classmethod
    def of(cls, *functions: Callable[..., Any]) -> Listing:
        """The source of functions that the page runs itself: what is read is what was measured."""
        try:
            sources = [textwrap.dedent(inspect.getsource(function)).strip() for function in functions]
        except OSError:  # an application without source files runs them all the same
            names = ", ".join(function.__name__ for function in functions)
            return cls(f"(the code of {names} is not shown: there are no source files here)")
        return cls("\n\n\n".join(sources), "python")


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column is flush left, the others flush right unless `left`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture, drawn twice from the same values.

    Attributes
    ----------
    name : str
        Of its file.
    caption : str
        What it shows, in a sentence or two.
    lines : callable
        Draws it in a terminal: from a `Style` to lines of text.
    draw : callable
        Draws it on an empty matplotlib figure.
    size : tuple of float
        Width and height of the figure, in inches.
    timed : bool
        Whether it shows times, which are other ones at every run.
    """

    name: str
    caption: str
    lines: Callable[[Style], list[str]]
    draw: Callable[[Any], None]
    size: tuple[float, float] = (7.0, 3.2)
    timed: bool = False


#: A step of a page. A string is a paragraph, in which *…*, `…` and [text](link) mean what they do in Markdown.
Step: TypeAlias = str | Listing | Table | Picture


def duration(seconds: float) -> str:
    """A time with its unit.

    Examples
    --------
    >>> duration(0.0123), duration(2.5), duration(4e-5)
    ('12.3 ms', '2.5 s', '40.0 µs')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 1e-6:.1f} µs"
