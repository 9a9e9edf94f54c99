"""Text to tokens and back: byte-pair encoding, as GPT-2 has it and SmolLM2 uses it.

Text is cut into words, each with the space before it, and the UTF-8 bytes of a word are joined, pair by pair, in the
order in which the pairs were found when the vocabulary was made: most frequent first. What is not in the vocabulary as
a whole falls into pieces, at last into bytes. Some rare bytes it lacks: they are left out, as in the model's training.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence

from fastattn.demo.spelling import BYTES, SPELLED

__all__ = ["Tokenizer"]

#: Words between digits: an ending after an apostrophe; letters, or signs, perhaps with a space before them; and spaces,
#: of which the last one is left to a word behind them. Four control characters that Python takes for spaces are signs.
_WORD = re.compile(
    r"'(?:[sdmt]|ll|ve|re)"
    r"| ?[^\W_]+"
    r"| ?(?:[^\s\w]|[_\x1c-\x1f])+"
    r"|[^\S\x1c-\x1f]+(?![\S\x1c-\x1f])"
    r"|[^\S\x1c-\x1f]+"
)
#: The kind of a token that is a mark for the model and never part of a text, such as the end of a turn.
_MARK = 3


class Tokenizer:
    """Cuts text into tokens.

    Parameters
    ----------
    tokens : sequence of str
        The vocabulary: a token's number is its place in it.
    kinds : sequence of int
        Of each token; 3 is a mark, which no text is read as.
    merges : sequence of str
        Which two pieces become one, as "left right", the first to be joined first.

    Raises
    ------
    ValueError
        If there is a kind for no token, a token is spelled in other characters, or pieces become no token.

    Examples
    --------
    >>> tokenizer = Tokenizer(["<end>", "a", "b", "ab", "Ġ", "Ġab"], [3, 1, 1, 1, 1, 1], ["a b", "Ġ ab"])
    >>> tokenizer.encode("ab ab"), tokenizer.marks
    ([3, 5], {'<end>': 0})
    >>> tokenizer.bytes_of(5)
    b' ab'
    """

    def __init__(self, tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str]) -> None:
        self._tokens = tokens
        self._numbers = {token: number for number, token in enumerate(tokens)}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        #: The marks, by name.
        self.marks = {
            token: number for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _MARK
        }
        self._marked = frozenset(self.marks.values())
        self._check()
        self._pieces = functools.lru_cache(maxsize=1 << 14)(self._join)

    def _check(self) -> None:
        """Refuse a vocabulary that would fail at some text."""
        wrong = [
            number
            for number, token in enumerate(self._tokens)
            if number not in self._marked and not BYTES.keys() >= set(token)
        ]
        if wrong:
            raise ValueError(f"its token {wrong[0]}, {self._tokens[wrong[0]]!r:.40}, is spelled in other characters")
        lost = [pair for pair in self._ranks if "".join(pair) not in self._numbers]
        if lost:
            raise ValueError(f"its pieces {lost[0]!r:.60} become no token")

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Marks that are spelled out in it are text like any other."""
        return [number for word in _words(text) for number in self._pieces(word)]

    def bytes_of(self, number: int) -> bytes:
        """The bytes that a token stands for, of a mark none. A character may begin in one token and end in the next."""
        if number in self._marked:
            return b""
        return bytes(BYTES[char] for char in self._tokens[number])

    def _join(self, word: str) -> tuple[int, ...]:
        """The tokens of one word."""
        pieces = [SPELLED[byte] for byte in word.encode("utf-8", "replace") if SPELLED[byte] in self._numbers]
        last = len(self._ranks)
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            first = min(pairs, key=lambda pair: self._ranks.get(pair, last))
            if first not in self._ranks:
                break
            joined: list[str] = []
            for piece in pieces:
                if joined and (joined[-1], piece) == first:
                    joined[-1] += piece
                else:
                    joined.append(piece)
            pieces = joined
        return tuple(self._numbers[piece] for piece in pieces)


def _words(text: str) -> Iterator[str]:
    """Cut a text into words, which together are the text; each digit is one."""
    start = 0
    for at, char in enumerate(text):
        if unicodedata.category(char)[0] == "N":
            yield from _WORD.findall(text[start:at])
            yield char
            start = at + 1
    yield from _WORD.findall(text[start:])
