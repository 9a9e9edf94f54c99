"""Tokens as people read them: labels of an axis, and running text out of the pieces of a tokenizer."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from fastattn.problem import _said
from fastattn.terminal import cut, display_width, printable

__all__ = ["as_tokens", "label", "pair_of_tokens", "running_text"]

#: Columns of the longest label of an axis.
LONGEST_LABEL = 16

#: What tokenizers write for a space before a piece: SentencePiece, and the byte-level ones of GPT-2 and after.
_SPACES = ("▁", "Ġ", " ")
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
    listed: object = given.tolist() if isinstance(given, np.ndarray) else given
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Sequence):
        raise TypeError(f"{name}: {_said(given)}; expected a sequence of {count} strings, one for each {what}")
    for place, token in enumerate(listed):
        if not isinstance(token, str):
            raise TypeError(f"{name}: {_said(token)} at {place}; expected a sequence of strings")
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

    Tokenizers that mark the pieces that begin a word, or go on with it, are believed. Other tokens are words, which
    punctuation follows without a space.

    Examples
    --------
    >>> from fastattn.plot.tokens import running_text
    >>> "".join(gap + text for gap, text in running_text(["a", "cat", "##ti", "##sh", "don", "'", "t", "."]))
    "a cattish don't."
    >>> "".join(gap + text for gap, text in running_text(["▁A", "▁cat", "fish", "."]))
    'A catfish.'
    """
    words: list[tuple[str, str]] = []
    marked = any(token.startswith(_SPACES) and token.strip() for token in tokens)
    before = ""
    for token in tokens:
        goes_on = token.startswith("##") and len(token) > 2 and bool(words)
        text = visible(token[2:] if goes_on else token)
        if not words or goes_on:
            gap = ""
        elif marked:
            gap = " " if token.startswith(_SPACES) else ""
        else:
            gap = "" if _close(before, text) else " "
        words.append((gap, text))
        before = text
    return words


def _close(before: str, text: str) -> bool:
    """Whether a word or punctuation mark follows another without a space."""
    if all(c in _NO_SPACE_BEFORE for c in text) or all(c in _NO_SPACE_AFTER for c in before):
        return True
    return unicodedata.east_asian_width(before[-1]) == unicodedata.east_asian_width(text[0]) == "W"
