"""`blocks`: which blocks of a mask are skipped, looked at key by key, or taken whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.call.advice import said
from fastattn.call.blocks import Blocks
from fastattn.call.options import check_flag
from fastattn.call.problem import Array
from fastattn.functions.kinds import KIND_KEYS, KIND_QUERIES
from fastattn.plot.colours import RAMP
from fastattn.plot.maps import FEWEST_FIELDS, FRAME, cells
from fastattn.plot.weights import Head, Weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["blocks"]

#: What the kinds of blocks are called, and their colours: the fuller the darker.
KINDS = ("empty", "partial", "full")
COLOURS = (RAMP[0], RAMP[2], RAMP[6])
LEGEND_GAP = 0.1  # from the map to what its colours mean, in inches


def blocks(block_mask: Blocks, *, head: Head = None, legend: bool = True, ax: Axes | None = None) -> Axes:
    """Draw of which kind each block of a `fastattn.BlockMask` is: what a call skips, and where it asks a function.

    Parameters
    ----------
    block_mask : BlockMask
    head : int or tuple of int, optional
        Which head of which row of the batch: (row, head), or an index of that axis which is longer than 1. Needed if
        there is one that is.
    legend : bool
        Whether to say at the right what the colours mean, and which share of the blocks each has.
    ax : matplotlib.axes.Axes, optional
        Where to draw, on a new figure of pyplot unless given.

    Returns
    -------
    matplotlib.axes.Axes
        Query i is centred at y = i, key j at x = j, as in `heatmap`.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    TypeError
        If an argument is of a kind that has no meaning here.
    ValueError
        If the mask has no query or no key, or several heads of which none is chosen.

    Notes
    -----
    A map of more blocks than it has points (1/72 inch) is drawn in fields of several, each as dark as the fullest.

    Examples
    --------
    >>> import fastattn
    >>> from fastattn import plot
    >>> mask = fastattn.BlockMask.from_function(lambda batch, head, query, key: query >= key, 512, 512)
    >>> ax = plot.blocks(mask)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['full 44%', 'partial 12%', 'empty 44%']
    """
    from fastattn.plot import canvas, room

    kinds, queries, keys = _chosen(block_mask, head)
    check_flag("legend", legend)
    wide, high = keys / KIND_KEYS, queries / KIND_QUERIES  # in blocks, of which the last may be cut
    square, cell_x, cell_y = cells(kinds.shape[0], kinds.shape[1])
    if ax is None:
        drawn = canvas.new_axes(wide * cell_x, high * cell_y)
    else:
        drawn = canvas.as_axes(ax)
        width, height = canvas.size_of(drawn)
        cell_x, cell_y = width / wide, height / high
        square = square and 0.4 < cell_x / cell_y < 2.5
        if square:
            cell_x = cell_y = min(cell_x, cell_y)

    _draw_kinds(drawn, kinds, (cell_x, cell_y))
    drawn.set(xlim=(-0.5, keys - 0.5), ylim=(queries - 0.5, -0.5), xlabel="keys", ylabel="queries")
    drawn.set_aspect("equal" if square else "auto")
    drawn.xaxis.set_label_position("top")
    drawn.xaxis.tick_top()
    canvas.name_numbers(drawn.xaxis, keys, cell_x / KIND_KEYS)
    canvas.name_numbers(drawn.yaxis, queries, cell_y / KIND_QUERIES)
    drawn.spines[:].set(edgecolor=FRAME, linewidth=0.6)
    if legend:
        _say_kinds(drawn, kinds, wide * cell_x)
    canvas.fit(drawn) if ax is None else room.make_room(drawn)
    return drawn


def _chosen(given: object, head: Head) -> tuple[Array, int, int]:
    """Return the kinds of the blocks of one head, and how many queries and keys there are."""
    if not isinstance(given, Blocks):
        raise TypeError(f"block_mask: {said(given)}; expected a fastattn.BlockMask")
    queries, keys = given.shape[2:]
    if 0 in given.shape:
        raise ValueError(f"block_mask: shape {given.shape}; expected at least one query and one key")
    if head is None and max(given.shape[:2]) > 1:
        raise ValueError(
            f"block_mask: shape {given.shape}, rows, heads, queries and keys; expected one head: choose with "
            f"head={(0, 0) if min(given.shape[:2]) > 1 else 0}"
        )
    return Weights(given.kinds, None, None, given.kinds.shape[-1]).head(head).values, queries, keys


def _draw_kinds(ax: Any, kinds: Array, cell: tuple[float, float]) -> None:
    """Draw the blocks, `cell` inches wide and high each, in the coordinates of keys and queries."""
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.image import AxesImage

    rows, columns = kinds.shape
    most = (max(FEWEST_FIELDS, int(72 * count * side + 1e-6)) for count, side in ((rows, cell[1]), (columns, cell[0])))
    fields = Weights(kinds, None, None, columns).pooled(*most)[0]
    right, lower = columns * KIND_KEYS - 0.5, rows * KIND_QUERIES - 0.5
    image = AxesImage(
        ax,
        cmap=ListedColormap(COLOURS),
        norm=Normalize(0, len(KINDS) - 1),
        interpolation="nearest",
        origin="upper",
        extent=(-0.5, right, lower, -0.5),
    )
    image.set_data(np.asarray(fields, dtype=np.float64))
    ax.add_image(image)
    image.set_clip_path(ax.patch)


def _say_kinds(ax: Any, kinds: Array, width: float) -> None:
    """Say at the right of axes of this width what the colours mean."""
    from matplotlib.patches import Patch

    shares = [100 * float((kinds == kind).mean()) for kind in range(len(KINDS))]
    patches = [
        Patch(facecolor=COLOURS[kind], edgecolor=FRAME, linewidth=0.6, label=f"{KINDS[kind]} {shares[kind]:.0f}%")
        for kind in reversed(range(len(KINDS)))
    ]
    ax.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=(1 + LEGEND_GAP / width, 1),
        frameon=False,
        fontsize=8,
        borderpad=0,
        borderaxespad=0,
        handlelength=1,
        handletextpad=0.5,
    )
