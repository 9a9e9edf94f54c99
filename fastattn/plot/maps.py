"""`heatmap`, a matrix of weights, and `heads`, the matrices of all layers and heads side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.call.options import check_flag
from fastattn.plot.tokens import pair_of_tokens
from fastattn.plot.weights import Head, Summary, Weights, as_weights, check_vmax

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

__all__ = ["cells", "heads", "heatmap"]

#: The largest cell, and the longest side of a map, in inches.
CELL, LONGEST = 0.3, 7.0
SHORTEST = 1.2
#: The distance of small maps, in inches, and how far each reaches from its centre, of that distance.
HEAD_SIDE, HALF = 0.7, 0.45
#: Fields along a side, however small the map.
FEWEST_FIELDS = 8
FRAME = "0.6"
#: What an index of the axis after that of the layers chooses, in messages.
BATCH = "the first of a batch, or another index"


def heatmap(
    weights: ArrayLike | Summary,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    *,
    head: Head = None,
    vmax: float | None = None,
    cmap: str | Colormap | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the weights of one head as a map: a row for each query, a column for each key.

    Parameters
    ----------
    weights : array_like, shape (..., Lq, Lk), or AttentionSummary
        What ``attention(..., return_weights=True)`` returns, or for lengths whose matrix would be too large, what
        `attention_summary` does: its weights are drawn, and all others left white. NaN is drawn in a colour of its own.
    queries : sequence of str, length Lq, optional
        The tokens that look, at the left. Where they are too many, they are written smaller, then only every few of
        them; zooming in brings the others back. Numbers unless given.
    keys : sequence of str, length Lk, optional
        The tokens that are looked at, along the top. The same as `queries` unless given, if there are as many.
    head : int or tuple of int, optional
        Which head of a stack: an index of each axis before the last two, or of those that are longer than 1, as in
        ``head=3`` of a batch of one. Needed if there is one that is.
    vmax : float, optional
        The weight of the darkest colour, the largest of the map unless given; the scale begins at 0. Give it to make
        pictures comparable.
    cmap : str or matplotlib.colors.Colormap, optional
        By default white to dark blue, in even steps of lightness.
    colorbar : bool
        Whether to draw the scale at the right.
    ax : matplotlib.axes.Axes, optional
        Where to draw, on a new figure of pyplot unless given.

    Returns
    -------
    matplotlib.axes.Axes
        Query i is centred at y = i, key j at x = j.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    TypeError
        If an argument is of a kind that has no meaning here.
    ValueError
        If shapes and numbers of tokens do not go together, if there is more than one head and none is chosen, or if a
        weight is negative or infinite.

    Notes
    -----
    Where there are more cells than the map has points (1/72 inch), it is drawn in fields of several cells, each as dark
    as the largest weight in it, so that a single large weight does not disappear. The scale then says so.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn import plot
    >>> x = np.random.default_rng(0).standard_normal((3, 8))
    >>> _, weights = fastattn.attention(x, x, x, return_weights=True)
    >>> ax = plot.heatmap(weights, ["a", "cat", "sleeps"])
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['a', 'cat', 'sleeps']
    """
    from fastattn.plot import canvas, room

    one = as_weights(weights).head(head)
    rows, columns = pair_of_tokens(queries, keys, (one.queries, one.keys))
    top = check_vmax(vmax, one.largest())
    colormap = canvas.as_colormap(cmap)
    check_flag("colorbar", colorbar)

    square, cell_x, cell_y = cells(one.queries, one.keys)
    if ax is None:
        drawn = canvas.new_axes(one.keys * cell_x, one.queries * cell_y)
    else:
        drawn = canvas.as_axes(ax)
        width, height = canvas.size_of(drawn)
        cell_x, cell_y = width / one.keys, height / one.queries
        square = square and 0.4 < cell_x / cell_y < 2.5
        if square:
            cell_x = cell_y = min(cell_x, cell_y)

    fields = _draw_map(drawn, one, colormap, top, (one.keys * cell_x, one.queries * cell_y))
    drawn.set(xlim=(-0.5, one.keys - 0.5), ylim=(one.queries - 0.5, -0.5), xlabel="keys", ylabel="queries")
    drawn.set_aspect("equal" if square else "auto")
    drawn.xaxis.set_label_position("top")
    drawn.xaxis.tick_top()
    canvas.name_tokens(drawn.xaxis, columns, one.keys, cell_x)
    canvas.name_tokens(drawn.yaxis, rows, one.queries, cell_y)
    drawn.spines[:].set(edgecolor=FRAME, linewidth=0.6)
    if colorbar:
        canvas.scale_beside(drawn, colormap, top, _remark(one, {fields}), one.largest() > top, one.has_nan())
    canvas.fit(drawn) if ax is None else room.make_room(drawn)
    return drawn


def heads(
    weights: ArrayLike | Summary | Sequence[ArrayLike | Summary],
    *,
    vmax: float | None = None,
    cmap: str | Colormap | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the weights of all layers and heads as small maps: a row for each layer, a column for each head.

    Parameters
    ----------
    weights : array_like, shape (layers, H, Lq, Lk) or (H, Lq, Lk), or AttentionSummary, or a sequence of either
        Of a sequence, each element is a layer, (H, Lq, Lk); lengths and numbers of heads may differ from layer to
        layer. Further axes are allowed if their length is 1, such as a batch of one.
    vmax : float, optional
        The weight of the darkest colour in all maps, the largest of them all unless given.
    cmap : str or matplotlib.colors.Colormap, optional
        By default white to dark blue, in even steps of lightness.
    colorbar : bool
        Whether to draw the scale at the right.
    ax : matplotlib.axes.Axes, optional
        Where to draw, on a new figure of pyplot unless given.

    Returns
    -------
    matplotlib.axes.Axes
        One for all maps: that of head h in layer l is centred at x = h, y = l, and reaches 0.45 to each side. So
        ``ax.add_patch(Rectangle((h - 0.5, l - 0.5), 1, 1, fill=False))`` draws a frame around it.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    TypeError
        If an argument is of a kind that has no meaning here.
    ValueError
        If there are other axes than those of layers and heads, or if a weight is negative or infinite.

    Notes
    -----
    All maps have one scale, so that heads can be compared. A map with more cells than points (1/72 inch) is drawn in
    fields of several cells, each as dark as the largest weight in it.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import plot
    >>> weights = np.random.default_rng(0).dirichlet(np.ones(5), size=(6, 12, 5))  # layers, heads, queries
    >>> ax = plot.heads(weights)
    >>> len(ax.images)
    72
    """
    from fastattn.plot import canvas, room

    layers = _layers(weights)
    widest = max(layer.lead[0] for layer in layers)
    top = check_vmax(vmax, max(layer.largest() for layer in layers))
    colormap = canvas.as_colormap(cmap)
    check_flag("colorbar", colorbar)

    side = min(HEAD_SIDE, LONGEST / widest, LONGEST / len(layers))
    if ax is None:
        drawn = canvas.new_axes(widest * side, len(layers) * side)
    else:
        drawn = canvas.as_axes(ax)
        width, height = canvas.size_of(drawn)
        side = min(width / widest, height / len(layers))

    size = (2 * HALF * side, 2 * HALF * side)
    fields = {
        _draw_map(drawn, layer.at(x), colormap, top, size, (x, y))
        for y, layer in enumerate(layers)
        for x in range(layer.lead[0])
    }
    drawn.set(xlim=(-0.5, widest - 0.5), ylim=(len(layers) - 0.5, -0.5), aspect="equal", xlabel="head", ylabel="layer")
    drawn.xaxis.set_label_position("top")
    drawn.xaxis.tick_top()
    canvas.name_numbers(drawn.xaxis, widest, side)
    canvas.name_numbers(drawn.yaxis, len(layers), side)
    if len(layers) == 1:  # or no layers, but heads
        drawn.set(yticks=[], ylabel="")
    drawn.spines[:].set_visible(False)
    if colorbar:
        largest, nan = max(layer.largest() for layer in layers), any(layer.has_nan() for layer in layers)
        canvas.scale_beside(drawn, colormap, top, _remark(layers[0], fields), largest > top, nan)
    canvas.fit(drawn) if ax is None else room.make_room(drawn)
    return drawn


def _remark(weights: Weights, fields: set[tuple[int, int]]) -> str:
    """What to say beside the scale: which weights are known, and how many cells a field is the largest of."""
    if fields == {(1, 1)}:
        return weights.known
    cells = "{} × {} cells".format(*min(fields)) if len(fields) == 1 else "several cells"
    return f"{weights.known}\n(fields: the largest of {cells})"


def _layers(given: Any) -> list[Weights]:
    """The layers of a model, each a stack of heads."""
    apart = isinstance(given, (list, tuple)) and not hasattr(given, "top_weights")
    if apart and given and all(hasattr(each, "shape") or hasattr(each, "top_weights") for each in given):
        layers = []
        for place, each in enumerate(given):
            try:
                layers.append(as_weights(each).without_ones(1, f"[layer[0] for layer in weights], {BATCH}"))
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {place} of {error}") from error
    else:
        stack = as_weights(given).without_ones(2, f"weights[:, 0], {BATCH}")
        layers = [stack.at(place) for place in range(stack.lead[0])] if len(stack.lead) == 2 else [stack]
    return [layer if layer.lead else layer.at((np.newaxis, ...)) for layer in layers]


def cells(queries: int, keys: int) -> tuple[bool, float, float]:
    """Whether cells are square, and their width and height in inches, so that a figure is neither tiny nor huge."""
    width, height = min(CELL, LONGEST / keys), min(CELL, LONGEST / queries)
    cell = min(width, height)
    if width == height or min(queries, keys) * cell >= SHORTEST:
        return True, cell, cell
    return False, width, height


def _draw_map(
    ax: Any,
    weights: Weights,
    colormap: Any,
    vmax: float,
    size: tuple[float, float],
    place: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Draw one head's map in the cells' own coordinates, or, small and framed, around `place`.

    It has no more fields than points, 1/72 inch, in its width and height, `size` in inches: so a screen has a pixel at
    least for each field, and none is lost.

    Returns
    -------
    height, width : int
        Of a field, in cells.
    """
    from matplotlib.colors import Normalize
    from matplotlib.image import AxesImage
    from matplotlib.patches import Rectangle

    fields, height, width = weights.pooled(*(max(FEWEST_FIELDS, int(72 * side + 1e-6)) for side in reversed(size)))
    if place is None:
        left, right, lower, upper = -0.5, weights.keys - 0.5, weights.queries - 0.5, -0.5
    else:
        x, y = place
        left, right, lower, upper = x - HALF, x + HALF, y + HALF, y - HALF
    # imshow does the same, and looks at the limits of the axes each time
    image = AxesImage(
        ax,
        cmap=colormap,
        norm=Normalize(0, vmax),
        interpolation="nearest",
        origin="upper",
        extent=(left, right, lower, upper),
    )
    image.set_data(np.asarray(fields, dtype=np.float64))
    ax.add_image(image)
    image.set_clip_path(ax.patch)
    if place is not None:
        corner, side = (left, upper), 2 * HALF
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=FRAME, linewidth=0.5))
    return height, width
