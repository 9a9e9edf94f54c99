"""What all pictures share of matplotlib: a figure of the right size, tokens along an axis, the scale beside it.

matplotlib is loaded with this module, and this module only when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastattn.call.advice import said, to_install
from fastattn.call.problem import Array
from fastattn.plot.colours import NAN_COLOUR, RAMP
from fastattn.plot.tokens import label

try:
    import matplotlib
    from matplotlib import ticker
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
    from matplotlib.patches import Patch
except ImportError as error:
    raise ImportError(
        f"fastattn.plot draws with matplotlib, which is not installed here: {to_install('plot')}"
    ) from error

from fastattn.plot.fonts import drawable, widths_of  # which imports matplotlib, too

__all__ = [
    "PAD",
    "EveryFew",
    "as_axes",
    "as_colormap",
    "fit",
    "name_numbers",
    "name_tokens",
    "new_axes",
    "resize",
    "scale_beside",
    "size_of",
    "verbatim",
]

SMALLEST_FONT, LARGEST_FONT = 6.0, 10.0
LINE = 1.2  # height of a line of text, of the font's size
CLOSEST_LINE = 1.05  # the same where axes have become smaller since
GAP = 0.3  # between texts on a line, of the font's size
BAR_INCHES, BAR_GAP_INCHES = 0.12, 0.12
SHORTEST_BAR, LONGEST_BAR = 0.6, 4.0
SPACE, PAD = 3.0, 0.05  # around axes, in inches: while they are drawn, and then


# -- figures and axes --------------------------------------------------------------------------------------------------


def as_axes(ax: object) -> Any:
    """Return the axes that a user wants to be drawn on.

    Raises
    ------
    TypeError
        If it is something else.
    """
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: {said(ax)}; expected None or a matplotlib Axes")
    return ax


def new_axes(width: float, height: float) -> Any:
    """Return axes of this size, in inches, on a new figure of pyplot, which becomes its current one.

    There is space around them for what will be drawn there; `fit` takes away what was not needed.
    """
    from matplotlib import pyplot

    ax = pyplot.figure(layout="none").add_subplot()
    resize(ax, width, height)
    return ax


def resize(ax: Any, width: float, height: float) -> None:
    """Give axes of `new_axes` another size, in inches."""
    ax.figure.set_size_inches(width + 2 * SPACE, height + 2 * SPACE)
    _put(ax.figure, width, height, SPACE, SPACE, SPACE, SPACE)


def fit(ax: Any) -> None:
    """Make the figure of `new_axes` as large as its axes and what is around them, and leave the layout to matplotlib.

    So a title that is added later finds its place.
    """
    figure = ax.figure
    width, height = size_of(ax)
    inches = figure.dpi_scale_trans.inverted()
    inner, outer = ax.get_window_extent().transformed(inches), ax.get_tightbbox().transformed(inches)
    sides = (inner.x0 - outer.x0, inner.y0 - outer.y0, outer.x1 - inner.x1, outer.y1 - inner.y1)
    left, bottom, right, top = (max(side, 0) + PAD for side in sides)
    figure.set_size_inches(width + left + right, height + bottom + top)
    _put(figure, width, height, left, bottom, right, top)
    # "constrained" does not reckon with axes whose aspect is fixed
    figure.set_layout_engine("compressed", w_pad=PAD, h_pad=PAD)


def _put(figure: Any, width: float, height: float, left: float, bottom: float, right: float, top: float) -> None:
    across, down = left + width + right, bottom + height + top
    figure.subplots_adjust(left / across, bottom / down, (left + width) / across, (bottom + height) / down)


def size_of(ax: Any) -> tuple[float, float]:
    """Return width and height of axes in inches, as they are now."""
    box = ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted())
    return float(box.width), float(box.height)


def as_colormap(given: object) -> Any:
    """Return a colour map that shows NaN: `RAMP` unless given, by matplotlib's name or as a Colormap.

    Raises
    ------
    ValueError
        If matplotlib knows no map of that name.
    TypeError
        If it is something else.
    """
    if given is None:
        colormap = LinearSegmentedColormap.from_list("fastattn", RAMP)
    elif isinstance(given, Colormap):
        colormap = given
    elif isinstance(given, str):
        if given not in matplotlib.colormaps:
            raise ValueError(f"cmap: {given!r}; expected None or one of matplotlib's colour maps, such as 'cividis'")
        colormap = matplotlib.colormaps[given]
    else:
        raise TypeError(f"cmap: {said(given)}; expected None, a name or a matplotlib Colormap")
    return colormap.with_extremes(bad=NAN_COLOUR)


def scale_beside(ax: Any, colormap: Any, vmax: float, remark: str, overflow: bool, nan: bool) -> Any:
    """Draw the colours of the weights from 0 to `vmax` at the right of axes, and that of NaN if there is one.

    The bar is placed relative to the axes, and so is as high as they are, whatever the layout.
    """
    width, height = size_of(ax)
    place = [1 + BAR_GAP_INCHES / width, 0, BAR_INCHES / width, 1]
    if not SHORTEST_BAR <= height <= LONGEST_BAR:  # from the upper edge downwards
        place[3] = min(max(height, SHORTEST_BAR), LONGEST_BAR) / height
        place[1] = 1 - place[3]
    inset = ax.inset_axes(place)
    bar = ax.figure.colorbar(
        ScalarMappable(Normalize(0, vmax), colormap),
        cax=inset,
        extend="max" if overflow else "neither",
        ticks=_AsManyAsFit(5, 5, 0.3),
    )
    bar.set_label(f"weight{remark}", fontsize=8)
    bar.ax.tick_params(labelsize=8, width=0.6, length=2)
    bar.outline.set_linewidth(0.6)
    if nan:
        patch = Patch(facecolor=NAN_COLOUR, label="NaN")
        # its upper right corner below that of the bar
        corner = (place[0] + place[2], place[1] - 0.06 / height)
        inset.legend(
            handles=[patch], loc="upper left", bbox_to_anchor=corner, bbox_transform=ax.transAxes,
            frameon=False, fontsize=8, borderpad=0, borderaxespad=0.2, handlelength=0.8, handletextpad=0.4,
        )  # fmt: skip
    return bar


# -- tokens along an axis ----------------------------------------------------------------------------------------------


class EveryFew(ticker.Locator):  # type: ignore[misc]
    """Ticks at every token if there is space for all their labels, else at every second, third, and so on.

    Decided whenever it is drawn, so that zooming in brings the other labels back.

    Parameters
    ----------
    sizes : ndarray, shape (tokens,)
        What each label takes along the axis, in points.
    widest : int
        The token with the widest label.

    Attributes
    ----------
    only_widest : bool
        Whether there is but one tick, at the widest label, as while a place for whichever labels is looked for.
    """

    def __init__(self, sizes: Array, widest: int) -> None:
        self.sizes, self.widest = sizes, widest
        self.only_widest = False

    def __call__(self) -> list[int]:
        low, high = sorted(self.axis.get_view_interval())
        return self.tick_values(low, high)

    def tick_values(self, low: float, high: float) -> list[int]:
        """Return the ticks between two places of the axis."""
        if self.only_widest:
            return [self.widest]
        step = fitting_step(self.sizes, _length_in_points(self.axis) / (high - low))
        first, last = max(0, math.ceil(low)), min(len(self.sizes) - 1, math.floor(high))
        return [place for place in range(0, last + 1, step) if place >= first]


def fitting_step(sizes: Array, each: float) -> int:
    """Return which every token can have its label, where a label is as long as `sizes` says and a token as `each`."""
    count = len(sizes)
    for step in range(max(1, int(sizes.min() / max(each, 1e-9))), count):
        if ((sizes[:-step] + sizes[step:]) / 2).max() <= step * each + 1e-6:
            return step
    return count


class _AsManyAsFit(ticker.MaxNLocator):  # type: ignore[misc]
    """Ticks at round numbers, as many as there is space for whenever it is drawn.

    Parameters
    ----------
    count : int
        How many there are, if they are tokens: all have a tick if there is space.
    most : int
        How many ticks there are at most if not.
    inches : float
        The space of a tick.
    **params
        Of matplotlib's MaxNLocator.
    """

    def __init__(self, count: int, most: int, inches: float, **params: Any) -> None:
        super().__init__(most, **params)
        self.count, self.most, self.inches = count, most, inches

    def __call__(self) -> Any:
        space = int(_length_in_points(self.axis) / 72 / self.inches + 1e-6)
        self.set_params(nbins=self.count if self.count <= space else max(1, min(space, self.most)))
        return super().__call__()


def _length_in_points(axis: Any) -> float:
    box = axis.axes.get_window_extent()
    return float((box.width if axis.axis_name == "x" else box.height) * 72 / axis.axes.figure.dpi)


def name_tokens(axis: Any, tokens: Sequence[str] | None, count: int, inches: float) -> None:
    """Write tokens along an axis, as large as there is space for, or the numbers of tokens that have no names.

    Parameters
    ----------
    axis : matplotlib.axis.Axis
    tokens : sequence of str or None
    count : int
        How many there are.
    inches : float
        The space of one.
    """
    if tokens is None:
        name_numbers(axis, count, inches)
        return
    font = font_points(inches)
    labels, families = drawable(map(label, tokens))
    written = dict(enumerate(map(verbatim, labels)))
    widths = np.array(widths_of(labels, families, font))
    lying = axis.axis_name == "x" and fitting_step(widths + GAP * font, inches * 72) == 1
    sizes = widths + GAP * font if lying else np.full(count, CLOSEST_LINE * font)
    axis.set_major_locator(EveryFew(sizes, int(widths.argmax())))
    axis.set_major_formatter(ticker.FuncFormatter(lambda place, _: written.get(place, "")))
    axis.axes.tick_params(
        axis=axis.axis_name,
        length=0,
        labelsize=font,
        labelfontfamily=families,
        labelrotation=90 if axis.axis_name == "x" and not lying else 0,
    )


def name_numbers(axis: Any, count: int, inches: float) -> None:
    """Write numbers from 0 along an axis of `count` places: every one if there is space, or round ones."""
    axis.axes.tick_params(axis=axis.axis_name, length=0 if inches > 0.15 else 2, labelsize=8)
    axis.set_major_locator(_AsManyAsFit(count, 8, 0.25, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def font_points(inches: float) -> float:
    """Return the size of a font whose lines are this far apart, within what is legible and what is becoming."""
    return min(max(inches * 72 / LINE, SMALLEST_FONT), LARGEST_FONT)


def verbatim(text: str) -> str:
    r"""Return what makes matplotlib draw a text as it is: a dollar sign does not begin a formula.

    Examples
    --------
    >>> from fastattn.plot.canvas import verbatim
    >>> verbatim("$5 and $6")
    '\\$5 and \\$6'
    """
    if matplotlib.rcParams["text.usetex"]:
        return text.translate(_TEX)
    return text.replace("$", r"\$")


_TEX = str.maketrans(
    {c: "\\" + c for c in "#$%&_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)
