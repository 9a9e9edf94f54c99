"""Pictures in a terminal: bars, heat maps, shaded text, progress; and when there may be colours.

All that draws is a pure function from values and a `Style` to lines of text.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

__all__ = [
    "Progress",
    "Style",
    "UserError",
    "bar",
    "bar_table",
    "cut",
    "display_width",
    "heat_map",
    "legend",
    "pad",
    "printable",
    "shaded_text",
    "short_number",
    "wrap",
]


class UserError(Exception):
    """What the command line tells its user in one line, before it exits with status 2."""


@dataclass(frozen=True)
class Style:
    """What the terminal can show.

    Attributes
    ----------
    colour : bool
        Whether there may be colours and bold type.
    blocks : bool
        Whether the encoding has block characters; if not, pictures are made of ASCII.
    width : int
        Columns.
    """

    colour: bool = False
    blocks: bool = True
    width: int = 80

    @classmethod
    def of(cls, stream: TextIO, environ: Mapping[str, str] = os.environ) -> Style:
        """Colours on a terminal only, and never under a non-empty ``NO_COLOR``; ``COLUMNS`` overrides the width."""
        colour = is_terminal(stream, environ) and not environ.get("NO_COLOR")
        try:
            "▏█░·×µ…▸".encode(stream.encoding or "ascii")
            blocks = True
        except (UnicodeEncodeError, LookupError):
            blocks = False
        return cls(colour, blocks, max(24, min(shutil.get_terminal_size((80, 24)).columns, 120)))

    def bold(self, text: str) -> str:
        """Text in bold type."""
        return self._sgr("1", text)

    def dim(self, text: str) -> str:
        """Text that stands back."""
        return self._sgr("2", text)

    def accent(self, text: str) -> str:
        """Text in the colour of the bars."""
        return self._sgr("38;5;209", text)

    def shade(self, weight: float, text: str) -> str:
        """Text on a background that says the weight; unchanged without colours."""
        level = _level(weight)
        if level == 0:
            return text
        background, foreground = _RAMP[level - 1]
        return self._sgr(f"48;5;{background};38;5;{foreground}", text)

    def _sgr(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and text else text


#: Weights from which a picture takes the next level of shade.
LEVELS = (0.05, 0.10, 0.20, 0.35, 0.50, 0.75)
# Of each level: background, and a foreground that is legible on it, in the 256-colour palette; dark violet to yellow
_RAMP = ((53, 231), (90, 231), (126, 231), (203, 16), (215, 16), (227, 16))
_BLOCK_SHADES = " ·░▒▓██"
_ASCII_SHADES = " .:+x##"
_EIGHTHS = " ▏▎▍▌▋▊▉"


def _level(weight: float) -> int:
    return sum(weight >= limit for limit in LEVELS)


def is_terminal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether somebody is looking, on something that understands escape sequences."""
    return stream.isatty() and environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Text on one line, without control characters: what comes from a file must not control the terminal."""
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text).split())


def display_width(text: str) -> int:
    """How many columns a text takes: two for a wide character, none for a combining one."""
    return sum(
        0 if unicodedata.combining(c) or c == "\ufe0f" else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def cut(text: str, width: int) -> str:
    """The beginning of a text that fits `width` columns.

    Examples
    --------
    >>> cut("because", 4)
    'beca'
    """
    while display_width(text) > width:
        text = text[:-1]
    return text


def pad(text: str, width: int, right: bool = False) -> str:
    """A text cut or filled to exactly `width` columns, flush left or right."""
    text = cut(text, width)
    space = " " * (width - display_width(text))
    return space + text if right else text + space


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Break a text into lines of at most `width` columns, each beginning with `indent`; long words are broken."""
    lines, line = [], indent
    for word in text.split():
        while True:
            candidate = word if line == indent else " " + word
            if display_width(line + candidate) <= width:
                line += candidate
                break
            if line != indent:
                lines.append(line)
                line = indent
            else:
                piece = cut(word, max(2, width - display_width(indent)))
                lines.append(indent + piece)
                word = word[len(piece) :]
    return [*lines, line] if line != indent else lines


def bar(fraction: float, width: int, blocks: bool = True) -> str:
    """A bar of `fraction` of `width` columns, to an eighth of a column where there are block characters.

    Examples
    --------
    >>> bar(0.55, 10)
    '█████▌'
    >>> bar(0.55, 10, blocks=False)
    '######'
    """
    fraction = min(max(fraction, 0.0), 1.0)
    if not blocks:
        return "#" * int(fraction * width + 0.5)
    full, eighths = divmod(int(fraction * width * 8 + 0.5), 8)
    return "█" * full + _EIGHTHS[eighths].strip()


def bar_table(
    labels: Sequence[str],
    columns: Sequence[tuple[str, Sequence[float]]],
    style: Style,
    mark: int | None = None,
    top: float | None = None,
) -> list[str]:
    """Bar charts of weights over the same labels, side by side where they fit, one below another where not.

    Parameters
    ----------
    labels : sequence of str
    columns : sequence of (title, weights)
    style : Style
    mark : int, optional
        The label to set off: whose row it is.
    top : float, optional
        The weight of the longest bar, the largest of all unless given.

    Returns
    -------
    list of str
    """
    if top is None:
        top = max((max(weights, default=0.0) for _, weights in columns), default=0.0)
    label_width = min(max(map(display_width, labels), default=0), max(8, style.width // 4))
    column_width = (style.width - label_width - 2) // len(columns)
    if column_width < 28 and len(columns) > 1:
        lines: list[str] = []
        for column in columns:
            lines += [*([""] if lines else []), *bar_table(labels, [column], style, mark, top)]
        return lines
    bar_width = min(40, column_width - 7)  # two spaces, 0.00, a space
    titles = [style.bold(pad(title, column_width - 2)) for title, _ in columns]
    lines = ["  ".join([" " * (label_width + 2), *titles]).rstrip()]
    for row, label in enumerate(labels):
        line = ("▸ " if style.blocks else "> ") if row == mark else "  "
        line += style.bold(pad(label, label_width)) if row == mark else pad(label, label_width)
        space = ""
        for _, weights in columns:
            weight = weights[row]
            drawn = bar(weight / max(top, 1e-9), bar_width, style.blocks)
            number = f"{weight:.2f}"
            best = weight == max(weights)
            line += space + "  " + (style.bold(number) if best else style.dim(number) if weight < LEVELS[0] else number)
            line += " " + style.accent(drawn) if drawn else ""
            space = " " * (column_width - 6 - (len(drawn) + 1 if drawn else 0))
        lines.append(line)
    return lines


def heat_map(
    labels: Sequence[str],
    weights: Sequence[Sequence[float]],
    style: Style,
    mark: int | None = None,
    columns: Sequence[str] | None = None,
) -> list[str] | None:
    """A field of cells, each row a word that looks, each column a word that is looked at.

    Parameters
    ----------
    labels : sequence of str, length n
    weights : n sequences of m floats between 0 and 1
    style : Style
    mark : int, optional
        The row to set off.
    columns : sequence of str, length m, optional
        The words that are looked at, `labels` unless given.

    Returns
    -------
    list of str, or None where it does not fit the terminal
    """
    columns = labels if columns is None else columns
    label_width = min(max(map(display_width, labels), default=0), max(6, style.width // 5))
    cell = min(6, (style.width - label_width - 3) // max(1, len(columns)))
    if cell < 1 or len(columns) > 40:
        return None
    margin = " " * (label_width + 3)
    if cell >= 4:
        lines = [margin + "".join(pad(cut(label.strip("[]") or label, cell - 1), cell) for label in columns).rstrip()]
    else:  # columns too narrow for a word across: written downwards, to end at the cells
        names = [cut(label.strip("[]") or label, 8) for label in columns]
        height = max(map(len, names))
        lines = [
            (margin + "".join(pad(name.rjust(height)[line], cell) for name in names)).rstrip() for line in range(height)
        ]
    for row, label in enumerate(labels):
        name = pad(label, label_width)
        line = ("▸ " if style.blocks else "> ") if row == mark else "  "
        line += (style.bold(name) if row == mark else name) + " "
        lines.append((line + "".join(_cell(weight, cell, style) for weight in weights[row])).rstrip())
    return lines


def _cell(weight: float, width: int, style: Style) -> str:
    """A cell of a heat map: a coloured field, with the weight on it where there is space, or a character's shade."""
    if style.colour:
        number = f"{weight:.2f}".removeprefix("0")[:3] if width >= 4 and weight >= LEVELS[0] else ""
        return style.shade(weight, pad(" " * ((width - len(number)) // 2) + number, width))
    shade = (_BLOCK_SHADES if style.blocks else _ASCII_SHADES)[_level(weight)]
    return shade * (width - 1) + " " if width >= 4 else shade * width


def short_number(weight: float) -> str:
    """A weight in few characters: two decimals, of a small one two digits.

    Examples
    --------
    >>> short_number(0.683), short_number(1.0), short_number(0.0012), short_number(float("nan"))
    ('.68', '1.00', '.0012', 'nan')
    """
    return (f"{weight:.2g}" if 0 < weight < 0.045 else f"{weight:.2f}").removeprefix("0")


def legend(style: Style, top: float = 1.0) -> list[str]:
    """What the shades mean: from which weight each begins, where the scale ends at `top`."""
    marks = [short_number(limit * top) for limit in LEVELS]
    longest = max(map(len, marks))
    if style.colour:
        entries = [style.shade(limit, f" {mark.ljust(longest)} ") for limit, mark in zip(LEVELS, marks, strict=True)]
        gap, width = "", longest + 2
    else:
        shades = _BLOCK_SHADES if style.blocks else _ASCII_SHADES
        levels = [level for level in range(1, len(shades)) if shades[level] != shades[level - 1]]
        entries = [f"{shades[level] * 2} {marks[level - 1]}" for level in levels]
        gap, width = "  ", longest + 5
    each = max(1, (style.width - 2 + len(gap)) // width)  # on a line
    return ["  " + gap.join(entries[start : start + each]) for start in range(0, len(entries), each)]


def shaded_text(
    words: Sequence[tuple[str, str, float]], style: Style, indent: str = "  ", top: float = 1.0
) -> list[str]:
    """Text on a background that says the words' weights; without colours, the larger weights are written.

    Parameters
    ----------
    words : sequence of (gap, text, weight)
        The gap is what stands between the word and the one before: a space or nothing.
    style : Style
    indent : str
        What each line begins with.
    top : float
        The weight of the strongest shade.
    """
    pieces: list[tuple[str, str, float]] = []
    for gap, text, weight in words:
        text = cut(text, style.width - len(indent))
        written = weight != weight or (not style.colour and weight >= LEVELS[0] * top)
        pieces.append((gap, text + f"({short_number(weight)})" if written else text, weight))
    lengths = [display_width(text) for _, text, _ in pieces]
    lines, line, used = [], indent, len(indent)
    for index, (gap, text, weight) in enumerate(pieces):
        length = lengths[index]
        if gap:  # what goes on without a gap stays on the line, if there is space on any
            end = next((i for i in range(index + 1, len(pieces)) if pieces[i][0]), len(pieces))
            whole = sum(lengths[index:end])
            length = whole if whole <= style.width - len(indent) else length
        if used > len(indent) and used + len(gap) + length > style.width:
            lines.append(line)
            line, used, gap = indent, len(indent), ""
        if used == len(indent):
            gap = ""
        line += gap + style.shade(weight / top, text)
        used += len(gap) + lengths[index]
    return [*lines, line]


class Progress:
    """One line about long work, on a terminal or in a notebook only, which is gone when the work is done.

    Parameters
    ----------
    label : str
        What is being done.
    stream : TextIO, optional
        Where to, standard error unless given.
    clock : callable
        Tells the time in seconds.

    Examples
    --------
    >>> with Progress("reading") as progress:  # no terminal here: nothing is printed
    ...     for done in range(3):
    ...         progress(done + 1, 3)
    """

    def __init__(
        self,
        label: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.shown = is_terminal(self.stream, environ)
        self.place: Any = None  # in a notebook, where standard error is no terminal
        if stream is None and "ipykernel" in sys.modules:
            from IPython.display import display

            self.place = display({"text/plain": ""}, raw=True, display_id=True)
        self.style = Style.of(self.stream, environ)
        self.clock = clock
        self.label = label
        self.started = self.last = clock()

    def __enter__(self) -> Progress:
        self._write(self.label + " …" if self.style.blocks else self.label + " ...")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def clear(self) -> None:
        """Take the line away, so that something else can be printed; the next word about the work brings it back."""
        self._write("")

    def __call__(self, done: int, total: int, label: Any = None) -> None:
        """Say that `done` of `total` parts are done, at most ten times a second."""
        now = self.clock()
        if now - self.last < 0.1 and done < total:
            return
        self.last = now
        elapsed = now - self.started
        left = elapsed / done * (total - done) if done else 0.0
        length = max(4, min(20, self.style.width // 8))
        drawn = pad(bar(done / max(total, 1), length, self.style.blocks), length)
        track = f"{drawn}{'▏' if self.style.blocks else '|'}"
        rest = f", {_duration(left)} left" if done and left >= 1 else ""
        detail = f"  {printable(str(label))}" if label else ""
        self._write(f"{self.label}  {track} {done}/{total}{rest}{detail}")

    def _write(self, text: str) -> None:
        if self.place is not None:
            self.place.update({"text/plain": text}, raw=True)
        elif self.shown:
            self.stream.write("\r\x1b[K" + cut(text, self.style.width - 1))
            self.stream.flush()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
