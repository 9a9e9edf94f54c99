"""Text that is written as it comes, word by word, in lines that fit the terminal."""

from __future__ import annotations

import re
import unicodedata
from typing import TextIO

from fastattn.console.terminal import cut, display_width

__all__ = ["Flow"]

#: Whitespace, or a word.
_PARTS = re.compile(r"\s+|\S+")


class Flow:
    """Writes text as it comes, each word once it is whole.

    Parameters
    ----------
    stream : TextIO
        Where to.
    width : int
        Columns of a line; longer words are broken.

    Examples
    --------
    >>> import io
    >>> stream = io.StringIO()
    >>> flow = Flow(stream, 16)
    >>> for text in ("It comes in pie", "ces, and", " is wrapped"):
    ...     flow.add(text)
    >>> flow.end()
    >>> stream.getvalue()
    'It comes in\\npieces, and is\\nwrapped\\n'
    """

    def __init__(self, stream: TextIO, width: int) -> None:
        self.stream, self.width = stream, width
        self._gap = self._word = ""
        self._column = 0
        self._begun = False

    def add(self, text: str) -> None:
        """Go on with this text."""
        for part in _PARTS.findall(_harmless(text)):
            if part.isspace():
                self._write_word()
                self._gap += part
            else:
                self._word += part
        self.stream.flush()

    def end(self) -> None:
        """Write what is left, and end the line."""
        self._write_word()
        self.stream.write("\n" * self._begun)
        self.stream.flush()

    def _write_word(self) -> None:
        if not self._word:
            return
        lines, gap = self._gap.count("\n"), self._gap.rpartition("\n")[2]
        if not lines and self._column + display_width(gap + self._word) > self.width:
            lines, gap = 1, ""
        if self._begun and lines:
            self.stream.write("\n" * min(lines, 2))
            self._column = 0
        text = (gap if self._begun else "") + self._word
        while self._column + display_width(text) > self.width:
            piece = cut(text, self.width - self._column)
            self.stream.write(piece + "\n")
            text, self._column = text[len(piece) :], 0
        self.stream.write(text)
        self._column += display_width(text)
        self._gap = self._word = ""
        self._begun = True


def _harmless(text: str) -> str:
    """Text without control characters but for ends of lines: what comes from a model must not control the terminal."""
    text = text.replace("\t", "    ")
    return "".join(c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else " " for c in text)
