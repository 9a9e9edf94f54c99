"""Whisper's tokens: pieces of text, and the marks that say what is to be done, and when something was said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastattn.demo.spelling import BYTES

__all__ = ["Vocabulary"]

#: Seconds from one mark of time to the next.
TICK = 0.02
#: Languages that are written without spaces between words.
WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my"})


class Vocabulary:
    """The tokens by their numbers.

    Parameters
    ----------
    tokens : sequence of str
        As they stand in the file: text as bytes, each written as a character, then marks such as <|en|>.
    config : mapping
        What the package says of the model.

    Attributes
    ----------
    end, start, transcribe, translate, no_speech : int
        Marks: the end of a text, which is also where the numbers of text end; its start; what is to be written, what
        is said or its translation to English; that nobody speaks.
    first_time : int
        The mark of the first moment; the marks from there on are `TICK` seconds apart.
    languages : dict of str to int
        The marks of languages, by their codes.
    never : list of int
        Tokens that are never written, such as marks of music and of who speaks.
    alignment_heads : list of (layer, head)
        The heads of the decoder that look at the moment at which a word is said.
    """

    def __init__(self, tokens: Sequence[str], config: Mapping[str, Any]) -> None:
        numbers = {token: number for number, token in enumerate(tokens)}
        self.end, self.start = numbers["<|endoftext|>"], numbers["<|startoftranscript|>"]
        self.transcribe, self.translate = numbers["<|transcribe|>"], numbers["<|translate|>"]
        self.no_speech = numbers["<|nocaptions|>"]
        self.first_time = numbers["<|0.00|>"]
        self.languages = {tokens[number].strip("<|>"): number for number in config["lang_ids"]}
        self.never = [*config["suppress_ids"], numbers["<|notimestamps|>"]]
        self.alignment_heads = [(int(layer), int(head)) for layer, head in config["alignment_heads"]]
        self._pieces = [bytes(BYTES[character] for character in token) for token in tokens[: self.end]]

    def prompt(self, language: str, translate: bool) -> list[int]:
        """The marks that a text begins with."""
        return [self.start, self.languages[language], self.translate if translate else self.transcribe]

    def is_time(self, token: int) -> bool:
        """Whether a token is the mark of a moment."""
        return token >= self.first_time

    def seconds(self, token: int) -> float:
        """The moment of such a mark, in seconds from the beginning of what is heard."""
        return (token - self.first_time) * TICK

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without marks; a character whose bytes are not complete is �."""
        return b"".join(self._pieces[token] for token in tokens if token < self.end).decode(errors="replace")

    def words(self, tokens: Sequence[int], language: str) -> list[tuple[str, range]]:
        """Cut tokens of text into words, each with the places of its tokens.

        A word begins with a space; in a language without spaces each character that is complete is one. Punctuation
        belongs to the word before it, but its tokens are not among those of the word: they look at the pause.
        """
        words: list[tuple[str, range]] = []
        begin = 0
        for end in range(1, len(tokens) + 1):
            piece = self.text(tokens[begin:end])
            if piece.endswith("�") and end < len(tokens):
                continue  # of a character whose other bytes are in the next token
            spoken = any(character.isalnum() for character in piece)
            if words and not piece.startswith(" ") and not (spoken and language in WITHOUT_SPACES):
                text, places = words[-1]
                words[-1] = (text + piece, range(places.start, end if spoken else places.stop))
            else:
                words.append((piece, range(begin, end)))
            begin = end
        return [(text.strip(), places) for text, places in words]
