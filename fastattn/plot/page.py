"""How `text` is drawn by matplotlib: words set in lines, each on a field of its shade."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Affine2D, ScaledTranslation

from fastattn.plot import canvas
from fastattn.plot.colours import ink_on, shade

if TYPE_CHECKING:
    from fastattn.plot.shading import ShadedText

__all__ = ["draw"]

#: Width of a new figure, in inches; sizes of the font, in points.
WIDTH, FONT, SMALLEST_FONT = 6.5, 11.0, 6.0
#: Distance of lines and height of a field, of the font's size.
LINE, FIELD = 1.6, 1.3
#: Fields of the scale below the text.
STEPS = 6


def draw(shaded: ShadedText, ax: Any) -> Any:
    """Draw shaded text on axes, or on a new figure that is as high as the text needs."""
    texts, families = canvas.drawable([word for _, word, _ in shaded.words])
    gaps = [gap for gap, _, _ in shaded.words]
    size = FONT
    if ax is None:
        width = WIDTH * 72
        lines = _set(texts, gaps, families, size, width)
        ax = canvas.new_axes(WIDTH + 0.1, ((lines[-1][1] + 2.2) * LINE * size) / 72 + 0.1)
    else:
        ax = canvas.as_axes(ax)
        width, height = (72 * side for side in canvas.size_of(ax))
        while True:
            lines = _set(texts, gaps, families, size, width)
            if (lines[-1][1] + 2.2) * LINE * size <= height or size <= SMALLEST_FONT:
                break
            size = max(SMALLEST_FONT, size - 0.5)
    ax.axis("off")
    # Points, from the upper left corner of the axes: whatever becomes of them, the words stay together
    figure = ax.figure
    points = Affine2D().scale(1 / 72) + figure.dpi_scale_trans + ScaledTranslation(0, 1, ax.transAxes)
    for (x, line, length), word, (_, _, weight) in zip(lines, texts, shaded.words, strict=True):
        _write(ax, points, x, line * LINE * size, length, word, shade(weight / shaded.vmax), size, families)
    down = (lines[-1][1] + 1.4) * LINE * size
    small = 0.75 * size
    about, _ = canvas.drawable([shaded.about + ":"])
    x = _width(about[0] + " ", families, small)
    _write(ax, points, 0, down, x, about[0], None, small, families)
    for step in range(STEPS):
        fraction = step / (STEPS - 1)
        _write(ax, points, x, down, 3 * small, f"{shaded.vmax * fraction:.2g}", shade(fraction), small, families, True)
        x += 3 * small
    return ax


def _set(
    words: list[str], gaps: list[str], families: list[str], size: float, width: float
) -> list[tuple[float, int, float]]:
    """Set words in lines of a width: of each word where it begins, on which line, and how long it is, in points.

    A word that goes on without a gap stays with the one before, if the two fit on a line.
    """
    places: list[tuple[float, int, float]] = []
    space = _width(" ", families, size)
    x, line, begin = 0.0, 0, 0  # begin: the first piece of the word
    for index, (word, gap) in enumerate(zip(words, gaps, strict=True)):
        length = _width(word, families, size)
        if gap:
            x, begin = x + space, index
        if x + length > width and x > 0:
            moved = [each for each in places[begin:] if each[1] == line]
            first = moved[0][0] if moved else x
            if moved and (first == 0 or x - first + length > width):  # longer than a line: broken where it is
                moved, first = [], x
            line += 1
            places[len(places) - len(moved) :] = [(at - first, line, each) for at, _, each in moved]
            x -= first
        places.append((x, line, length))
        x += length
    return places


def _width(text: str, families: list[str], size: float) -> float:
    """Width of a text in points; a space has that of a hyphen, since spaces at an end do not count."""
    if text == " ":
        return 0.3 * size
    font = FontProperties(family=families, size=size)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def _write(
    ax: Any, points: Any, x: float, down: float, length: float, word: str, colour: str | None, size: float,
    families: list[str], middle: bool = False,
) -> None:  # fmt: skip
    """Write a word, at `x` and `down` from the upper left corner in points, on a field of a colour."""
    if colour is not None:
        field = Rectangle(
            (x, -down - FIELD * size),
            length,
            FIELD * size,
            facecolor=colour,
            linewidth=0,
            transform=points,
            clip_on=False,
        )
        ax.add_artist(field)
    ax.text(
        x + (length / 2 if middle else 0),
        -down - 0.97 * size,
        word,
        transform=points,
        ha="center" if middle else "left",
        va="baseline",
        fontsize=size,
        fontfamily=families,
        color="black" if colour is None else ink_on(colour),
        parse_math=False,
        usetex=False,
    )
