"""What all pictures share of matplotlib: a figure of the right size, tokens along an axis, the scale beside it.

matplotlib is loaded with this module, and this module only when something is drawn.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from fastattn.plot.colours import NAN_COLOUR, RAMP
from fastattn.plot.tokens import label
from fastattn.problem import _said
from fastattn.terminal import display_width

try:
    import matplotlib
    from matplotlib import font_manager, ticker
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
    from matplotlib.patches import Patch
except ImportError as error:
    raise ImportError(
        'fastattn.plot draws with matplotlib, which is not installed here: pip install "fastattn[plot]"'
    ) from error

__all__ = [
    "as_axes",
    "as_colormap",
    "drawable",
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
CHARACTER = 0.6  # width of a character, of the font's size: a little more than most have
BAR_INCHES, BAR_GAP_INCHES = 0.12, 0.12
SHORTEST_BAR, LONGEST_BAR = 0.6, 4.0
SPACE, PAD = 3.0, 0.05  # around axes, in inches: while they are drawn, and then

#: Fonts that have what most lack, of Chinese, Japanese and Korean writing and of symbols, on Linux, macOS and Windows.
FALLBACKS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic",
    "Arial Unicode MS", "Noto Sans", "Noto Emoji", "Segoe UI Emoji", "Segoe UI Symbol", "Noto Sans Symbols2", "Symbola",
    "Unifont", "DejaVu Sans",
)  # fmt: skip


# -- figures and axes --------------------------------------------------------------------------------------------------


def as_axes(ax: object) -> Any:
    """Return the axes that a user wants to be drawn on.

    Raises
    ------
    TypeError
        If it is something else.
    """
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: {_said(ax)}; expected None or a matplotlib Axes")
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
        raise TypeError(f"cmap: {_said(given)}; expected None, a name or a matplotlib Colormap")
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
        ticks=ticker.MaxNLocator(max(1, min(5, int(place[3] * height / 0.3)))),
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


class _EveryFew(ticker.Locator):  # type: ignore[misc]
    """Ticks at every token if there is space for all their labels, else at every second, third, and so on.

    Decided whenever it is drawn, so that zooming in brings the other labels back.
    """

    def __init__(self, count: int, font_points: float) -> None:
        self.count, self.font_points = count, font_points

    def __call__(self) -> list[int]:
        low, high = sorted(self.axis.get_view_interval())
        return self.tick_values(low, high)

    def tick_values(self, low: float, high: float) -> list[int]:
        """Return the ticks between two places of the axis."""
        ax = self.axis.axes
        box = ax.get_window_extent()
        pixels = box.width if self.axis.axis_name == "x" else box.height
        points = pixels * 72 / ax.figure.dpi
        step = max(1, math.ceil((high - low) * LINE * self.font_points / max(points, 1e-9) - 1e-6))
        first, last = max(0, math.ceil(low)), min(self.count - 1, math.floor(high))
        return [place for place in range(0, last + 1, step) if place >= first]


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
    axis.set_major_locator(_EveryFew(count, font))
    axis.set_major_formatter(ticker.FuncFormatter(lambda place, _: written.get(place, "")))
    fits = max(map(display_width, labels)) * CHARACTER * font <= inches * 72
    axis.axes.tick_params(
        axis=axis.axis_name,
        length=0,
        labelsize=font,
        labelfontfamily=families,
        labelrotation=90 if axis.axis_name == "x" and not fits else 0,
    )


def name_numbers(axis: Any, count: int, inches: float) -> None:
    """Write numbers from 0 along an axis of `count` places: every one if there is space, or round ones."""
    axis.axes.tick_params(axis=axis.axis_name, length=0 if inches > 0.15 else 2, labelsize=8)
    space = int(count * inches / 0.25)
    most = count if count <= space else max(1, min(space, 8))
    axis.set_major_locator(ticker.MaxNLocator(most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


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


def drawable(labels: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return labels that can be drawn without missing glyphs, and the font families to draw them with.

    The families of the user's settings come first, then installed ones that have what these lack. What none has becomes
    □, and what would have changed its look alone, such as the joiners of emoji, is left out.
    """
    labels = list(labels)
    families = list(matplotlib.rcParams["font.family"])
    wanted = set().union(*labels)
    for family in families:
        wanted -= _covered(family, wanted)
    if wanted:
        installed = {font.name for font in font_manager.fontManager.ttflist}
        for family in FALLBACKS:
            if family in installed and (covered := _covered(family, wanted)):
                families.append(family)
                wanted -= covered
    instead = {ord(c): None if unicodedata.category(c) in ("Cf", "Mn", "Me", "Sk") else "□" for c in wanted}
    return [text.translate(instead) for text in labels], families


def _covered(family: str, characters: set[str]) -> set[str]:
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=[family])))
    return {c for c in characters if font.get_char_index(ord(c))}
