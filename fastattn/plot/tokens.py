"""Tokens as people read them: labels of an axis, and running text out of the pieces of a tokenizer."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from fastattn.call.advice import said
from fastattn.console.terminal import cut, display_width, printable

__all__ = ["as_tokens", "label", "pair_of_tokens", "running_text"]

#: Columns of the longest label of an axis.
LONGEST_LABEL = 16

#: What tokenizers write for a space before a piece: SentencePiece, and the byte-level ones of GPT-2 and after.
_WRITTEN_SPACES = ("▁", "Ġ")
_SPACES = (*_WRITTEN_SPACES, " ")
#: What stands for no text: <s>, <|endoftext|>, [CLS].
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z][A-Z0-9_]*\]")
_ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t", "Ċ": "\\n", "Ġ": " ", "▁": " "})
_NO_SPACE_BEFORE = frozenset(".,;:!?)]}%'’…")
_NO_SPACE_AFTER = frozenset("([{'’")


def as_tokens(name: str, given: object, count: int, what: str) -> list[str] | None:
    """Return the tokens of `count` queries or keys as a list.

    Raises
    ------
    TypeError
        If they are not a sequence of strings.
    ValueError
        If there are not as many.
    """
    if given is None:
        return None
    listed: Any = given.tolist() if hasattr(given, "tolist") else given  # as arrays, and columns of tables, have
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Sequence):
        raise TypeError(f"{name}: {said(given)}; expected a sequence of {count} strings, one for each {what}")
    for place, token in enumerate(listed):
        if not isinstance(token, str):
            raise TypeError(f"{name}: {said(token)} at {place}; expected a sequence of strings")
    if len(listed) != count:
        raise ValueError(f"{name}: {len(listed)} strings; expected {count}, one for each {what}")
    return list(listed)


def pair_of_tokens(
    queries: Sequence[str] | None, keys: Sequence[str] | None, shape: tuple[int, int]
) -> tuple[list[str] | None, list[str] | None]:
    """Return the tokens of queries and keys; those of the queries serve for as many keys without their own."""
    rows = as_tokens("queries", queries, shape[0], "query")
    columns = as_tokens("keys", keys, shape[1], "key")
    return rows, rows if columns is None and shape[0] == shape[1] else columns


def label(token: str) -> str:
    r"""Return a token as the label of an axis: on one line, cut if it is long, and visible even if it is a space.

    Examples
    --------
    >>> from fastattn.plot.tokens import label
    >>> [label(token) for token in ("##ing", "Ġcat", "\n", " ", "incomprehensibilities")]
    ['##ing', 'cat', '\\n', '␣', 'incomprehensibi…']
    """
    text = visible(token)
    return text if display_width(text) <= LONGEST_LABEL else cut(text, LONGEST_LABEL - 1) + "…"


def visible(token: str) -> str:
    """Return a token without what its tokenizer marks a space with, and with something to see in any case."""
    return printable(token.translate(_ESCAPES)) or ("␣" if token else "∅")


def running_text(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Return (gap, text) for each token, where the gap, a space or nothing, stands before the text.

    Tokenizers that mark the pieces that begin a word, or go on with it, are believed: a piece without a mark goes on
    with the word before it, but special tokens, as "<s>", and the ends of lines stand apart. Other tokens are words,
    which punctuation follows without a space; so are those of a list in which the marks of a few are chance.

    Examples
    --------
    >>> from fastattn.plot.tokens import running_text
    >>> "".join(gap + text for gap, text in running_text(["a", "cat", "##ti", "##sh", "don", "'", "t", "."]))
    "a cattish don't."
    >>> "".join(gap + text for gap, text in running_text(["▁A", "▁cat", "fish", "."]))
    'A catfish.'
    """
    words: list[tuple[str, str]] = []
    marked = _are_marked(tokens)
    before, apart_before = "", False
    for token in tokens:
        goes_on = _goes_on(token) and bool(words)
        text, apart = visible(token[2:] if goes_on else token), _stands_apart(token)
        if not words or goes_on:
            gap = ""
        elif marked:
            gap = " " if token.startswith(_SPACES) or apart or apart_before else ""
        else:
            gap = "" if _close(before, text) else " "
        words.append((gap, text))
        before, apart_before = text, apart
    return words


def _are_marked(tokens: Sequence[str]) -> bool:
    """Whether a tokenizer has marked, in this list, the pieces that begin a word.

    It has if it marked the first, or if the pieces that would then go on with a word are no more than those that begin
    one. A list of words where a few have a mark by chance, as a space before them, would be one long word otherwise.
    """
    if any(map(_goes_on, tokens)):
        return False  # WordPiece's pieces are marked the other way round
    pieces = [token for token in tokens if not _stands_apart(token)]
    if pieces and pieces[0].startswith(_WRITTEN_SPACES):
        return True
    begin = sum(token.startswith(_SPACES) and bool(token.strip("▁Ġ ")) for token in pieces)
    go_on = sum(
        _has_letters(before) and _has_letters(token) and not token.startswith(_SPACES)
        for before, token in itertools.pairwise(tokens)
        if not (_stands_apart(before) or _stands_apart(token))
    )
    return begin > 0 and begin >= go_on


def _goes_on(token: str) -> bool:
    """Whether this is a piece of WordPiece's that goes on with a word."""
    return token.startswith("##") and len(token) > 2


def _stands_apart(token: str) -> bool:
    """Whether this is a special token, or the end of a line, which no piece of a word is joined to."""
    return _SPECIAL.fullmatch(token) is not None or "\n" in token or "Ċ" in token


def _has_letters(token: str) -> bool:
    return any(map(str.isalnum, token.strip("▁Ġ ")))


def _close(before: str, text: str) -> bool:
    """Whether a word or punctuation mark follows another without a space."""
    if all(c in _NO_SPACE_BEFORE for c in text) or all(c in _NO_SPACE_AFTER for c in before):
        return True
    return unicodedata.east_asian_width(before[-1]) == unicodedata.east_asian_width(text[0]) == "W"
