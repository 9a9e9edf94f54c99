"""`links`: two columns of tokens, and a line from each query to each key, as opaque as its weight is large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.problem import Array
from fastattn.plot.colours import HEAD_COLOURS
from fastattn.plot.tokens import as_tokens, pair_of_tokens
from fastattn.plot.weights import Head, Summary, as_weights, check_query, check_vmax

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["links"]

#: A line fainter than this, of the strongest, is not drawn: nobody sees it, and there are many.
FAINTEST = 0.01
#: Height of a token, and of the whole, in inches.
TOKEN, TALLEST = 0.22, 12.0
#: How much of a token's height its lines take, and how wide they are, in points.
SPREAD, THINNEST_LINE, WIDEST_LINE = 0.6, 0.6, 2.0
NAN_LINK = "0.35"


def links(
    weights: ArrayLike | Summary,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    *,
    query: int | None = None,
    head: Head = None,
    names: Sequence[str] | None = None,
    vmax: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw lines from queries, at the left, to keys, at the right: the head view of BertViz [1]_.

    Parameters
    ----------
    weights : array_like, shape (..., H, Lq, Lk) or (Lq, Lk), or AttentionSummary
        Each of up to seven heads has its own colour. More cannot be told apart: of more heads, their mean is drawn.
    queries : sequence of str, length Lq, optional
        The tokens that look. Where they are too many, they are written smaller, then only every few of them. Numbers
        unless given.
    keys : sequence of str, length Lk, optional
        The tokens that are looked at. The same as `queries` unless given, if there are as many.
    query : int, optional
        The only query whose lines to draw.
    head : int or tuple of int, optional
        Which part of a stack: an index of the first axis before the last two, or of the first few. Axes of length 1
        count only if each axis has an index. Needed if there are more than that of the heads that are longer than 1.
    names : sequence of str, length H, optional
        What to call the heads in the legend, "head 0" and so on unless given.
    vmax : float, optional
        The weight of an opaque line, the largest that is drawn unless given. The opacity is in proportion.
    ax : matplotlib.axes.Axes, optional
        Where to draw, on a new figure of pyplot unless given.

    Returns
    -------
    matplotlib.axes.Axes
        Token i is at y = i on both sides; queries are at x = 0, and keys at x = 1. Lines of several heads are side by
        side there, in the order of the heads.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    TypeError
        If an argument is of a kind that has no meaning here.
    ValueError
        If shapes and numbers of tokens do not go together, or if a weight is negative or infinite.

    Notes
    -----
    Lines of less than a hundredth of `vmax` are not drawn. Those of NaN are dotted. Weaker lines lie below stronger
    ones. Of an AttentionSummary only the weights that it has are drawn; in a mean of heads, the others count as 0.

    References
    ----------
    .. [1] Vig, "A multiscale visualization of attention in the Transformer model", 2019, arXiv 1906.05714.

    Examples
    --------
    >>> from fastattn import plot
    >>> ax = plot.links([[0.9, 0.1], [0.0, 1.0]], ["le", "chat"], ["the", "cat"])
    >>> len(ax.collections[0].get_segments())
    3
    """
    from fastattn.plot import canvas, room

    stack = as_weights(weights).head(head, rank=1)
    rows, columns = pair_of_tokens(queries, keys, (stack.queries, stack.keys))
    only = None if query is None else check_query(query, stack.queries)
    drawn = [stack.at(place) for place in range(stack.lead[0])] if stack.lead else [stack]
    called = as_tokens("names", names, len(drawn), "head")
    if called is None:
        called = [f"head {place}" for place in range(len(drawn))] if len(drawn) > 1 else []
    if len(drawn) > len(HEAD_COLOURS):
        called, drawn = [f"mean of {len(drawn)} heads"], [stack.mean()]
    shown = drawn if only is None else [each.only(only) for each in drawn]
    top = check_vmax(vmax, max(each.largest() for each in shown))
    found = [each.pairs(FAINTEST * top) for each in shown]

    longest = max(stack.queries, stack.keys)
    inches = min(TOKEN, TALLEST / longest)
    if ax is None:
        drawn_on = canvas.new_axes(max(1.6, min(4.0, 0.5 * longest * inches)), longest * inches)
    else:
        drawn_on = canvas.as_axes(ax)
        inches = canvas.size_of(drawn_on)[1] / longest

    _draw_lines(drawn_on, found, only or 0, top, inches)
    drawn_on.set(xlim=(0, 1), ylim=(longest - 0.5, -0.5))
    right = drawn_on.secondary_yaxis("right")
    canvas.name_tokens(drawn_on.yaxis, rows, stack.queries, inches)
    canvas.name_tokens(right.yaxis, columns, stack.keys, inches)
    for axes in (drawn_on, right):
        axes.spines[:].set_visible(False)
    drawn_on.xaxis.tick_top()
    drawn_on.set_xticks([0, 1], ["queries", "keys"], fontsize=8, color="0.35")
    drawn_on.tick_params(axis="x", length=0, pad=3)
    for title, side in zip(drawn_on.get_xticklabels(), ("right", "left"), strict=True):
        title.set_horizontalalignment(side)
    _draw_legend(drawn_on, called, any(np.isnan(each[2]).any() for each in found))
    canvas.fit(drawn_on) if ax is None else room.make_room(drawn_on)
    return drawn_on


def _draw_lines(ax: Any, found: Sequence[tuple[Array, Array, Array]], first: int, top: float, inches: float) -> None:
    """Draw the lines of each head, as (queries, keys, weights), in its colour; queries are counted from `first`.

    Those of several heads lie side by side at a token, within the part of its height that is `SPREAD`.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    heads = len(found)
    width = min(WIDEST_LINE, max(THINNEST_LINE, SPREAD * inches * 72 / heads))
    offsets = SPREAD * ((np.arange(heads) + 0.5) / heads - 0.5)
    ends = np.concatenate(
        [
            np.stack([rows + first, columns], axis=1) + offset
            for (rows, columns, _), offset in zip(found, offsets, strict=True)
        ]
    )
    weights = np.concatenate([each for _, _, each in found])
    colours = np.repeat([to_rgb(c) for c in HEAD_COLOURS[:heads]], [len(each) for _, _, each in found], axis=0)
    lost = np.isnan(weights)
    order = np.argsort(weights, kind="stable")[: np.count_nonzero(~lost)]  # the strongest on top; NaN come last
    opacity = np.minimum(weights[order] / top, 1)
    rgba = np.column_stack([colours[order], opacity])
    ax.add_collection(LineCollection(_segments(ends[order]), colors=rgba, linewidths=width, capstyle="butt"))
    if lost.any():
        segments = _segments(ends[lost])
        ax.add_collection(LineCollection(segments, colors=NAN_LINK, linewidths=THINNEST_LINE, linestyles="dotted"))


def _segments(ends: Array) -> Array:
    """The corners of lines, shape (lines, 2, 2), from their heights at the left and at the right."""
    corners = np.empty((len(ends), 2, 2))
    corners[..., 0] = (0, 1)
    corners[..., 1] = ends
    return corners


def _draw_legend(ax: Any, names: Sequence[str], nan: bool) -> None:
    """Say below the lines whose they are."""
    from matplotlib.lines import Line2D

    from fastattn.plot import canvas, fonts

    texts, families = fonts.drawable(names)
    handles = [
        Line2D([], [], color=colour, linewidth=2, label=canvas.verbatim(text) or " ")
        for colour, text in zip(HEAD_COLOURS, texts, strict=False)
    ]
    if nan:
        handles.append(Line2D([], [], color=NAN_LINK, linewidth=1, linestyle="dotted", label="NaN"))
    if handles:
        ax.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            frameon=False,
            prop={"size": 8, "family": families},
            ncols=2 if len(handles) > 1 else 1,
            handlelength=1.2,
            columnspacing=1.0,
        )
