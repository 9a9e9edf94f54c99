"""Which fonts have the characters of tokens: the user's first, then others that are installed.

matplotlib draws each character with the first of several families that has it. What none has becomes □, and a warning
says once what to install.
"""

from __future__ import annotations

import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import matplotlib
from matplotlib import font_manager

__all__ = ["drawable", "widths_of"]

#: Fonts that have what most lack, of Chinese, Japanese and Korean writing and of symbols, on Linux, macOS and Windows.
FALLBACKS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic",
    "Arial Unicode MS", "Noto Sans", "Noto Emoji", "Segoe UI Emoji", "Segoe UI Symbol", "Noto Sans Symbols2", "Symbola",
    "Unifont", "DejaVu Sans",
)  # fmt: skip
#: Fonts that have a box for every character, and TeX's, which have others in their places.
UNFIT = re.compile(r"\.?Last ?Resort|cm[a-z]+10$")


class _Missing(NamedTuple):
    """A font that may be missing: its name, and where it comes from."""

    name: str
    source: str


CJK = _Missing("Noto Sans CJK", "fonts-noto-cjk on Debian and Ubuntu")
SYMBOLS = _Missing("Symbola", "fonts-symbola on Debian and Ubuntu")
EMOJI = _Missing("Noto Emoji", "from fonts.google.com")  # matplotlib draws no fonts of coloured pictures
OTHERS = _Missing("Noto Sans of that script", "fonts-noto-core on Debian and Ubuntu")
FINER = 16  # how much finer than points a width is measured: there, hinting changes little
MOST_NAMED = 8  # characters, in a warning
_named: set[_Missing] = set()  # of which a warning has been given


def drawable(labels: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return labels that can be drawn without missing glyphs, and the font families to draw them with.

    The families of the user's settings come first, then installed ones that have what these lack. What none has becomes
    □, and what would have changed its look alone, such as the joiners of emoji, is left out.

    Warns
    -----
    UserWarning
        With the name of a font that would have what none has; once for each such font.
    """
    labels = list(labels)
    families = list(matplotlib.rcParams["font.family"])
    wanted = frozenset[str]().union(*labels)
    for family in families:
        wanted -= _covered(family, wanted)
    for family in _others(families) if any(map(_means_something, wanted)) else ():
        if covered := _covered(family, wanted):
            families.append(family)
            wanted -= covered
        if not any(map(_means_something, wanted)):
            break
    _warn(wanted)
    instead = {ord(c): None if unicodedata.category(c) in ("Cf", "Mn", "Me", "Sk") else "□" for c in wanted}
    return [text.translate(instead) for text in labels], families


def widths_of(texts: Iterable[str], families: Iterable[str], size: float) -> list[float]:
    """Return the widths of texts, in points, in a font of this size."""
    paths = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in families]
    font = font_manager.get_font(paths)
    font.set_size(size, 72 * FINER)
    widths = []
    for text in texts:
        font.set_text(text)
        widths.append(font.get_width_height()[0] / (64 * FINER))
    return widths


def _others(families: list[str]) -> Iterator[str]:
    """Yield installed families that are none of these: first those that are known to have much."""
    fonts = font_manager.fontManager.ttflist
    upright = {font.name for font in fonts if font.style == "normal" and font.weight in (400, "normal", "regular")}
    rest = sorted(family for family in upright.difference(FALLBACKS) if not UNFIT.match(family))
    yield from (family for family in (*FALLBACKS, *rest) if family in upright and family not in families)


def _means_something(character: str) -> bool:
    """Whether a character means the same in every font that has it, and is to be seen."""
    return unicodedata.category(character) not in ("Cf", "Mn", "Me", "Sk", "Cn", "Co", "Cs", "Cc")


def _covered(family: str, characters: frozenset[str]) -> frozenset[str]:
    """Return those of the characters that the font of a family has, as the settings are now."""
    return _glyphs(font_manager.findfont(font_manager.FontProperties(family=[family])), characters)


@lru_cache(maxsize=1024)
def _glyphs(path: str, characters: frozenset[str]) -> frozenset[str]:
    try:
        font = font_manager.get_font(path)
    except (OSError, RuntimeError):  # it has been taken away since
        return frozenset()
    return frozenset(c for c in characters if font.get_char_index(ord(c)))


def _warn(missing: Iterable[str]) -> None:
    """Say what to install for characters that no font has, unless that has been said."""
    of_font: dict[_Missing, list[str]] = {}
    for character in sorted(filter(_means_something, missing)):
        if (font := _font_for(character)) not in _named:
            of_font.setdefault(font, []).append(character)
    _named.update(of_font)
    if of_font:
        for_each = (
            f"for {' '.join(characters[:MOST_NAMED])}{' …' if len(characters) > MOST_NAMED else ''} install "
            f"{font.name} ({font.source})"
            for font, characters in of_font.items()
        )
        warnings.warn(
            f"what no installed font has is drawn as □: {', '.join(for_each)}; then remove matplotlib's list of fonts, "
            f"{matplotlib.get_cachedir()}/fontlist*.json",
            UserWarning,
            stacklevel=_depth_of_caller(),
        )


def _font_for(character: str) -> _Missing:
    """Return the font to install for a character."""
    if unicodedata.east_asian_width(character) in "WF" and unicodedata.category(character) != "So":
        return CJK
    if unicodedata.category(character)[0] != "S":
        return OTHERS
    return EMOJI if any(font.name == SYMBOLS.name for font in font_manager.fontManager.ttflist) else SYMBOLS


def _depth_of_caller() -> int:
    """Return for `_warn` how far up the first function is that is none of fastattn's."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "fastattn":
        depth, frame = depth + 1, frame.f_back
    return depth
