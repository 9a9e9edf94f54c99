"""The words of a conversation, and where the model looked to write one of them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fastattn.console.terminal import Style, UserError, legend, printable, shaded_text, wrap
from fastattn.demo.chat.conversation import BEGIN, Conversation
from fastattn.demo.chat.tokenizer import Tokenizer
from fastattn.demo.words import Look, Word, bars

__all__ = ["drawn", "find_written", "looks_to_write", "sharpest", "words_of"]

#: So many words have bars, and so many before and behind the one most looked at are shown in their text.
MAX_BARS = 12
AROUND = 40


def words_of(ids: Sequence[int], tokenizer: Tokenizer) -> list[Word]:
    """Join tokens to words as they are written; the brackets of a turn are words, and so is the end of a line, ""."""
    begin, marks = tokenizer.marks[BEGIN], set(tokenizer.marks.values())
    words: list[Word] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    unfinished = apart = False  # whether a character is not whole yet, and whether there was a space before
    for index, number in enumerate(ids):
        piece = range(index, index + 1)
        text = decoder.decode(tokenizer.bytes_of(number))
        space = text.isspace() and "\n" not in text
        if number in marks:
            words.append(Word("[", piece) if number == begin else Word("]", piece, ""))
        elif words and (unfinished or space or (not apart and _goes_on(words[-1].text, text))):
            last = words[-1]
            words[-1] = replace(last, text=printable(last.text + text), pieces=range(last.pieces.start, index + 1))
        else:
            apart = apart or text[:1].isspace() or not words or not words[-1].text
            words.append(Word(printable(text), piece, " " if apart else ""))
        unfinished, apart = bool(decoder.getstate()[0]), space
    return words


def _goes_on(word: str, piece: str) -> bool:
    """Whether a piece of text goes on with a word: letters with letters, signs with signs, an ending with letters."""
    if not word or not piece.strip() or piece[0].isspace():
        return False
    inside = word[-1].isalnum()
    return piece[0].isalnum() == inside or (inside and piece[0] in "'’" and len(piece) > 1)


def find_written(words: Sequence[Word], written_from: int, wanted: str) -> int:
    """The number of a word of the last answer: the last one with a letter or a digit, unless one is named.

    Parameters
    ----------
    words : sequence of Word
    written_from : int
        The token with which the answer begins.
    wanted : str
        How the word is spelled, or "".

    Raises
    ------
    UserError
        If the answer has no such word.
    """
    answer = [index for index, word in enumerate(words) if word.pieces.start >= written_from and not word.is_mark]
    if not wanted.strip():
        found = answer[-1:]
    else:
        found = [index for index in answer if words[index].text.casefold() == wanted.strip().casefold()][:1]
    if not found:
        what = f'"{printable(wanted)}" is not a word' if wanted.strip() else "there is no word"
        raise UserError(f"{what} of the answer, so that nothing can be shown")
    return found[0]


def looks_to_write(conversation: Conversation, words: Sequence[Word], written: int) -> NDArray[np.float64]:
    """The weights with which the token before a word looked at all words up to there, of shape (layers, heads, words).

    The reader forgets what it has read from that token on, reads the token once more, and is watched.
    """
    reader, last = conversation.reader, words[written].pieces.start - 1
    reader.forget(last)
    weights = np.stack([layer[:, 0] for layer in reader.watch(conversation.ids[last])])  # (layers, heads, tokens)
    starts = [word.pieces.start for word in words[:written]]
    merged: NDArray[np.float64] = np.add.reduceat(weights.astype(np.float64), starts, axis=-1)
    return merged


def sharpest(weights: NDArray[np.float64], words: Sequence[Word]) -> list[Look]:
    """The head that looks most sharply at a word, and the one that looks most sharply at another word.

    Not counted are signs and the names of who speaks, where heads rest that find nothing, and the word that looks,
    which is the last one, wherever it stands.

    Parameters
    ----------
    weights : ndarray, shape (layers, heads, words)
    words : sequence of Word
    """
    looker = weights.shape[2] - 1
    spelled = np.array([word.text.casefold() for word in words[: looker + 1]])
    meaning = np.array([not word.is_mark for word in words[: looker + 1]])
    allowed = meaning & (np.roll(spelled, 1) != "[") & (spelled != spelled[looker])
    looks: list[Look] = []
    while allowed.any() and len(looks) < 2:
        considered = np.where(allowed, weights, -1.0)
        layer, head, target = map(int, np.unravel_index(int(considered.argmax()), considered.shape))
        looks.append(Look(layer, head, looker, target, float(weights[layer, head, target])))
        allowed &= spelled != spelled[target]
    return looks


def drawn(words: Sequence[Word], weights: NDArray[np.float64], looks: Sequence[Look], style: Style) -> list[str]:
    """Bars of the words most looked at, then the text around the one that the first head looks at.

    Parameters
    ----------
    words : sequence of Word
        Those that are looked at, and the word that is written then.
    weights : ndarray, shape (layers, heads, words)
    looks : sequence of Look
        The heads to draw.
    style : Style
    """
    names = [word.text or ("↵" if style.blocks else "\\n") for word in words]
    rows = [weights[look.layer, look.head] for look in looks]
    lines = bars(names, rows, looks, MAX_BARS, style)
    first = looks[0]
    shown = range(max(0, first.target - AROUND), min(len(rows[0]), first.target + AROUND))
    lines += ["", *wrap(f"Layer {first.layer}, head {first.head}, around what it looks at most:", style.width), ""]
    lines += shaded_text([(words[index].gap, names[index], float(rows[0][index])) for index in shown], style)
    return [*lines, "", *legend(style)]
