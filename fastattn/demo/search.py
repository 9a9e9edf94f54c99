"""Semantic search in text files: sentences, and their order by meaning."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastattn.console.terminal import UserError, printable

__all__ = ["Sentence", "check_readable", "rank", "read_sentences", "read_text", "split_sentences"]

#: A sentence ends at . ! ? or …, perhaps with closing quotes or brackets, before a space and what may begin another.
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+(?=[\"'“‘«(\[¿¡—–-]*[^\W_a-z])|[。！？]+[」』）]*")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“‘])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|cf|e\.g|i\.e|Fig|Eq|No|Vol|pp?|ca|al|approx)\.$"
)
_HEADING = re.compile(r"\s*#{1,6}\s+(?=\S)")
#: A heading, an item of a list or a quotation begins a paragraph of its own.
_NEW_PARAGRAPH = re.compile(r"\s*(?:#{1,6}\s|[-*+•]\s|\d+[.)]\s|>\s|```|={3,}|-{3,})")


@dataclass(frozen=True)
class Sentence:
    """A sentence, and the file and line where it begins."""

    text: str
    file: str
    line: int


def split_sentences(text: str) -> Iterator[tuple[int, str]]:
    """Cut a text into sentences; yields the number of the line where each begins, from 1, and the sentence on one line.

    Examples
    --------
    >>> list(split_sentences("Dr. Who slept. It was\\nlate!\\n\\n# A heading"))
    [(1, 'Dr. Who slept.'), (1, 'It was late!'), (4, 'A heading')]
    """
    paragraph: list[str] = []
    first = 1
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if paragraph and (not line.strip() or _NEW_PARAGRAPH.match(line)):
            yield from _split_paragraph("\n".join(paragraph), first)
            paragraph = []
        heading = _HEADING.match(line)
        if heading:
            yield from _split_paragraph(line[heading.end() :], number)
        elif line.strip():
            if not paragraph:
                first = number
            paragraph.append(line)


def _split_paragraph(text: str, first_line: int) -> Iterator[tuple[int, str]]:
    start = 0
    ends = [match.end() for match in _END.finditer(text) if not _ABBREVIATION.search(text[: match.end()].rstrip())]
    for end in [*ends, len(text)]:
        sentence = printable(text[start:end])
        if any(c.isalnum() for c in sentence):
            begin = start + len(text[start:end]) - len(text[start:end].lstrip())
            yield first_line + text.count("\n", 0, begin), sentence
        start = end


def check_readable(files: Sequence[str]) -> None:
    """Refuse files that cannot be read, before any of them is.

    Raises
    ------
    UserError
        If there is no such file, or if it cannot be opened.
    """
    for path in (Path(file) for file in files if file != "-"):
        try:
            path.stat()
            if path.is_file() or path.is_dir():  # what is neither, such as a pipe, may be opened only once
                path.open("rb").close()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise _unreadable(str(path), error) from error


def _unreadable(file: str, error: OSError | ValueError) -> UserError:
    reason = (error.strerror if isinstance(error, OSError) else str(error)) or str(error)
    return UserError(f"cannot read {printable(file)}: {reason}")


def read_text(file: str) -> str:
    """Read a text file in UTF-8; "-" is standard input.

    Raises
    ------
    UserError
        If the file cannot be read, or is no text.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(file)} is not a text in UTF-8: byte {error.start} is no character") from error
    if "\0" in text:
        raise UserError(f"{printable(file)} is not a text: it has zero bytes")
    return text.replace("\r\n", "\n")


def read_sentences(files: Sequence[str]) -> list[Sentence]:
    """Read the sentences of text files, as `read_text` does.

    Raises
    ------
    UserError
        If a file cannot be read, is no text, or if there is no sentence in any of them.
    """
    sentences = []
    for file in files:
        sentences += [Sentence(sentence, file, line) for line, sentence in split_sentences(read_text(file))]
    if not sentences:
        raise UserError(f"there is no sentence in {', '.join(map(printable, files))}")
    return sentences


def rank(vectors: NDArray[np.float32], query: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
    """The `count` rows most similar to the query, as (row, cosine): all are unit vectors, so it is one product."""
    cosines = vectors @ query
    return [(int(index), float(cosines[index])) for index in np.argsort(-cosines, kind="stable")[:count]]
