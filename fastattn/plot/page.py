"""How `text` is drawn by matplotlib: words set in lines, each on a field of its shade."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.patches import Rectangle
from matplotlib.transforms import Affine2D, ScaledTranslation

from fastattn.plot import canvas, fonts
from fastattn.plot.colours import ink_on, shade

if TYPE_CHECKING:
    from fastattn.plot.shading import ShadedText

__all__ = ["draw"]

#: Width of a new figure, in inches; sizes of the font, in points.
WIDTH, FONT, SMALLEST_FONT = 6.5, 11.0, 6.0
#: Of the font's size: the distance of lines, the height of a field, a space.
LINE, FIELD, SPACE = 1.6, 1.3, 0.3
#: Fields of the scale below the text, and the size of its font, of that of the text.
STEPS, SCALE_FONT = 6, 0.75


class _Place(NamedTuple):
    """Where a word is: on which line, from where, and how long, in points."""

    line: int
    begin: float
    length: float


class _Pen:
    """Writes on axes, in points from their upper left corner: whatever becomes of them, words and fields stay together.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    families : list of str
    """

    def __init__(self, ax: Any, families: list[str]) -> None:
        self.ax = ax
        self.points = Affine2D().scale(1 / 72) + ax.figure.dpi_scale_trans + ScaledTranslation(0, 1, ax.transAxes)
        self.style = {"fontfamily": families, "parse_math": False, "usetex": False}
        self.length = lru_cache(maxsize=None)(self._length)

    def _length(self, text: str, size: float) -> float:
        """Length of a text in points."""
        drawn = self.ax.text(0, 0, text, fontsize=size, **self.style)
        length = drawn.get_window_extent().width * 72 / self.ax.figure.dpi
        drawn.remove()
        return float(length)

    def write(self, text: str, x: float, down: float, size: float, field: str | None, length: float) -> None:
        """Write a text with its upper left corner at a place, in the middle of a field of a colour if there is one."""
        colour = "black"
        if field is not None:
            colour = ink_on(field)
            corner, height = (x, -down - FIELD * size), FIELD * size
            style = {"facecolor": field, "linewidth": 0, "transform": self.points, "clip_on": False}
            self.ax.add_artist(Rectangle(corner, length, height, **style))
        where = (x + length / 2, -down - 0.97 * size)
        self.ax.text(*where, text, ha="center", fontsize=size, color=colour, transform=self.points, **self.style)


def draw(shaded: ShadedText, ax: Any) -> Any:
    """Draw shaded text on axes, or on a new figure that is as high as the text needs."""
    texts, families = fonts.drawable([shaded.about + ":", *(word for _, word, _ in shaded.words)])
    about, *texts = texts
    drawn = canvas.new_axes(WIDTH, 1.0) if ax is None else ax
    width, height = (72 * side for side in canvas.size_of(drawn))
    pen = _Pen(drawn, families)
    gaps = [gap for gap, _, _ in shaded.words]
    size = FONT
    places = _set(texts, gaps, pen, size, width)
    while ax is not None and size > SMALLEST_FONT and _height(places, size) > height:
        size = max(SMALLEST_FONT, size - 0.5)
        places = _set(texts, gaps, pen, size, width)

    drawn.axis("off")
    for (line, x, length), word, (_, _, weight) in zip(places, texts, shaded.words, strict=True):
        pen.write(word, x, line * LINE * size, size, shade(weight / shaded.vmax), length)
    small = SCALE_FONT * size
    down, x = _height(places, size) - LINE * small, pen.length(about, small)
    pen.write(about, 0, down, small, None, x)
    for step in range(STEPS):
        fraction = step / (STEPS - 1)
        pen.write(
            f"{shaded.vmax * fraction:.2g}", x + 3 * small * step + small, down, small, shade(fraction), 3 * small
        )
    if ax is None:
        canvas.resize(drawn, WIDTH, _height(places, size) / 72)
        canvas.fit(drawn)
    return drawn


def _height(places: list[_Place], size: float) -> float:
    """Height of lines and the scale below them, in points."""
    return (places[-1].line + 1.4 + SCALE_FONT) * LINE * size


def _set(words: list[str], gaps: list[str], pen: _Pen, size: float, width: float) -> list[_Place]:
    """Set words in lines of a width; what goes on without a gap stays together, if it fits on a line."""
    places: list[_Place] = []
    x, line, first = 0.0, 0, 0  # first: where the word begins that goes on
    for index, (word, gap) in enumerate(zip(words, gaps, strict=True)):
        length = pen.length(word, size)
        if gap:
            x, first = x + SPACE * size, index
        if x > 0 and x + length > width:
            begin = places[first].begin if first < index else x
            together = x - begin + length <= width and begin > 0
            line += 1
            if together:
                places[first:] = [_Place(line, each.begin - begin, each.length) for each in places[first:]]
                x -= begin
            else:
                x, first = 0.0, index
        places.append(_Place(line, x, length))
        x += length
    return places
