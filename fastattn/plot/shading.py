"""`text`: running text, each token as dark as its weight: in a terminal, in a notebook, by matplotlib."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.arrays import as_array
from fastattn.call.problem import Array
from fastattn.console.terminal import Style, legend, shaded_text
from fastattn.plot.colours import ink_on, shade
from fastattn.plot.tokens import as_tokens, running_text, visible
from fastattn.plot.weights import Head, Summary, as_weights, check_query, check_vmax

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ShadedText", "text"]

#: Steps of the scale below a text.
STEPS = 5


@dataclass(frozen=True)
class ShadedText:
    """Tokens and their weights: what `text` returns.

    ``print`` shows it in a terminal, with colours where there may be (on a terminal, unless NO_COLOR is set), otherwise
    with the larger weights as numbers. A notebook shows it as HTML. `draw` draws it by matplotlib.

    Attributes
    ----------
    words : tuple of (str, str, float)
        Of each token the gap before it, a space or nothing, its text, and its weight.
    vmax : float
        The weight of the darkest shade.
    about : str
        What the weights are.
    """

    words: tuple[tuple[str, str, float], ...]
    vmax: float
    about: str

    def lines(self, style: Style) -> list[str]:
        """The text in a terminal of this style, and below it what the shades or the numbers mean.

        Parameters
        ----------
        style : fastattn.console.terminal.Style
            Whether there are colours and blocks, and how wide a line may be.
        """
        below = [f"{self.about}, shades from", *legend(style, self.vmax)] if style.colour else [self.about]
        return [*shaded_text(self.words, style, indent="", top=self.vmax), "", *below]

    def __str__(self) -> str:
        return "\n".join(self.lines(Style.of(sys.stdout)))

    def __repr__(self) -> str:
        return f"ShadedText({len(self.words)} tokens, {self.about}, vmax={self.vmax:.3g})"

    def _repr_html_(self) -> str:
        spans = []
        for gap, word, weight in self.words:
            colour = shade(weight / self.vmax)
            spans.append(
                f'{gap}<span style="background:{colour};color:{ink_on(colour)};padding:0.1em 0" '
                f'title="{weight:.4g}">{html.escape(word)}</span>'
            )
        scale = "".join(
            f'<span style="background:{shade(step / STEPS)};color:{ink_on(shade(step / STEPS))};padding:0.1em 0.5em">'
            f"{self.vmax * step / STEPS:.2g}</span>"
            for step in range(STEPS + 1)
        )
        return (
            '<div style="background:#fff;color:#000;padding:0.5em;line-height:1.7;max-width:50em">'
            f'<div style="overflow-wrap:anywhere">{"".join(spans)}</div>'
            f'<div style="font-size:75%;margin-top:0.5em">{html.escape(self.about)}: {scale}</div></div>'
        )

    def draw(self, ax: Axes | None = None) -> Axes:
        """Draw it by matplotlib.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw, on a new figure of pyplot unless given. The lines are as long as it is wide now, and the font
            is smaller if there is need.

        Returns
        -------
        matplotlib.axes.Axes
        """
        from fastattn.plot import canvas  # before what imports matplotlib: it says what to install

        given = None if ax is None else canvas.as_axes(ax)
        from fastattn.plot import page

        return page.draw(self, given)


@overload
def text(
    weights: ArrayLike | Summary,
    tokens: Sequence[str],
    *,
    query: int | None = ...,
    head: Head = ...,
    vmax: float | None = ...,
    ax: None = ...,
) -> ShadedText: ...


@overload
def text(
    weights: ArrayLike | Summary,
    tokens: Sequence[str],
    *,
    query: int | None = ...,
    head: Head = ...,
    vmax: float | None = ...,
    ax: Axes,
) -> Axes: ...


def text(
    weights: ArrayLike | Summary,
    tokens: Sequence[str],
    *,
    query: int | None = None,
    head: Head = None,
    vmax: float | None = None,
    ax: Axes | None = None,
) -> ShadedText | Axes:
    """Shade running text, each token as dark as its weight.

    Parameters
    ----------
    weights : array_like, shape (Lk,) or (..., Lq, Lk), or AttentionSummary
        A weight for each token, or those of queries and keys.
    tokens : sequence of str, length Lk
        The tokens that are looked at. Pieces of words are joined: "##ing" of WordPiece, and what does not begin
        with a space, "Ġ" or "▁" where those that begin a word do.
    query : int, optional
        Whose weights to show. What each token receives, summed over all queries, unless given.
    head : int or tuple of int, optional
        Which head of a stack: an index of each axis before the last two, or of those that are longer than 1, as in
        ``head=3`` of a batch of one. Needed if there is one that is.
    vmax : float, optional
        The weight of the darkest shade, the largest that is shown unless given.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    ShadedText or matplotlib.axes.Axes
        The Axes if `ax` was given. If not, something to print in a terminal, to end a notebook's cell with, or to
        `draw`: only that needs matplotlib.

    Raises
    ------
    TypeError
        If an argument is of a kind that has no meaning here.
    ValueError
        If shapes and the number of tokens do not go together, or if a weight is negative or infinite.

    Examples
    --------
    >>> from fastattn import plot
    >>> shaded = plot.text([0.05, 0.7, 0.05, 0.2], ["The", "cat", "sleep", "##s"])
    >>> shaded
    ShadedText(4 tokens, weight, vmax=0.7)
    >>> from fastattn.console.terminal import Style
    >>> print(shaded.lines(Style(colour=False))[0])
    The(.05) cat(.70) sleep(.05)s(.20)
    """
    values, about, number = _weights_of_tokens(weights, query, head)
    named = as_tokens("tokens", tokens, len(values), "key")
    if named is None:
        raise TypeError(f"tokens: None; expected a sequence of {len(values)} strings, one for each key")
    if number is not None:
        about = f"{about}, “{visible(named[number])}”"
    with np.errstate(all="ignore"):
        top = check_vmax(vmax, float(np.fmax.reduce(values, initial=0)))
    words = tuple((gap, word, float(w)) for (gap, word), w in zip(running_text(named), values, strict=True))
    shaded = ShadedText(words, top, about)
    return shaded if ax is None else shaded.draw(ax)


def _weights_of_tokens(given: Any, query: int | None, head: Head) -> tuple[Array, str, int | None]:
    """The weights to show, shape (Lk,), what they are, and which of the tokens looks, if it is one of them."""
    if not hasattr(given, "top_weights"):
        given = as_array("weights", given)
        if given.ndim == 1:
            if query is not None or head is not None:
                name = "head" if query is None else "query"
                raise ValueError(
                    f"{name}: given with weights of shape {given.shape}; expected None: there are no others"
                )
            return as_weights(given[None]).row(0), "weight", None
    one = as_weights(given).head(head)
    if query is None:
        return one.totals(), f"weight received from {one.queries} {'query' if one.queries == 1 else 'queries'}", None
    number = check_query(query, one.queries)
    return one.row(number), f"weight{one.known}, from query {number}", number if one.queries == one.keys else None
