"""From word pieces to words: which pieces make a word, what a head's weights are in words, which heads look sharply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.console.terminal import Style, UserError, bar_table, printable, wrap

__all__ = ["Look", "Word", "bars", "find_word", "in_words", "join_pieces", "sharpest"]

APOSTROPHES = "'’-"


@dataclass(frozen=True)
class Word:
    """A word of a text, as the model sees it.

    Attributes
    ----------
    text : str
        As it is written in the text; "[CLS]" and "[SEP]" for the marks that the model puts around it.
    pieces : range
        Its word pieces.
    gap : str
        What stands between it and the word before: a space or nothing.
    """

    text: str
    pieces: range
    gap: str = " "

    @property
    def is_mark(self) -> bool:
        """Whether it is a mark of the model, or punctuation: nothing that has a meaning of its own."""
        return self.text in ("[CLS]", "[SEP]") or not any(c.isalnum() for c in self.text)


@dataclass(frozen=True)
class Look:
    """Where a head looks from a word: at `target`, with `weight`. Words are numbers in the sentence."""

    layer: int
    head: int
    word: int
    target: int
    weight: float


def join_pieces(text: str, encoding: Any) -> list[Word]:
    """Join the pieces of each word, and what an apostrophe or a hyphen holds together: did, ##n, ', t is didn't.

    Parameters
    ----------
    text : str
    encoding : tokenizers.Encoding
        Of this text: its ``tokens``, ``offsets`` and ``special_tokens_mask`` are used.
    """
    words: list[Word] = []
    spans: list[tuple[int, int]] = []  # of each word in the text
    end = 0
    for piece, (token, (start, stop), special) in enumerate(
        zip(encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True)
    ):
        if special and token != "[UNK]":
            words.append(Word(token, range(piece, piece + 1)))
            spans.append((-1, -1))
            continue
        begin, last = spans[-1] if spans else (-1, -1)
        joined = begin >= 0 and start <= last and (token.startswith("##") or _holds_together(text, begin, start))
        if joined:
            spans[-1] = (begin, max(last, stop))
            pieces = range(words[-1].pieces.start, piece + 1)
            words[-1] = Word(printable(text[slice(*spans[-1])]), pieces, words[-1].gap)
        else:
            gap = " " if start > end or end == 0 else ""
            words.append(Word(printable(text[start:stop]) or token, range(piece, piece + 1), gap))
            spans.append((start, stop))
        end = max(end, stop)
    return words


def _holds_together(text: str, begin: int, at: int) -> bool:
    """Whether the character at `at`, or the one before it, is an apostrophe or hyphen between letters of one word."""

    def inside(index: int) -> bool:
        return (
            begin < index < len(text) - 1
            and text[index] in APOSTROPHES
            and text[index - 1].isalnum()
            and text[index + 1].isalnum()
        )

    return inside(at) or inside(at - 1)


def in_words(weights: NDArray[np.floating[Any]], words: Sequence[Word]) -> NDArray[np.float64]:
    """Weights between words, from those between pieces, (..., pieces, pieces) to (..., words, words).

    What is looked at adds up over the pieces of a word; who looks is their mean. So each row still adds up to 1.
    """
    starts = [word.pieces.start for word in words]
    counts = np.array([len(word.pieces) for word in words])
    columns = np.add.reduceat(weights.astype(np.float64), starts, axis=-1)
    merged: NDArray[np.float64] = np.add.reduceat(columns, starts, axis=-2) / counts[:, None]
    return merged


def find_word(words: Sequence[Word], wanted: str) -> int:
    """The number of the first word that is spelled like this, or of the second for "word:2" and so on.

    Raises
    ------
    UserError
        If there is none: it lists those that there are.
    """
    name, colon, number = wanted.rpartition(":")
    requests = [(wanted, 1)]
    if colon and number.isdecimal():
        requests.append((name, int(number)))
    for text, occurrence in requests:
        for fold in (str, str.casefold):  # as it is written first, then in any case
            found = [index for index, word in enumerate(words) if fold(word.text) == fold(text.strip())]
            if 1 <= occurrence <= len(found):
                return found[occurrence - 1]
    known = list(dict.fromkeys(word.text for word in words if not word.is_mark))
    listing = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    raise UserError(f'"{printable(wanted)}" is not a word of the text; its words are: {listing or "none"}')


def sharpest(
    weights: NDArray[np.float64],
    words: Sequence[Word],
    word: int | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    count: int = 2,
) -> list[Look]:
    """Find the heads that look most sharply from a word, or, if none is given, the word with the sharpest look.

    A look is as sharp as the largest weight that one other word gets. Not counted is a look at the same word
    elsewhere, at punctuation, at the marks [CLS] and [SEP], where heads rest that find nothing, and at the word next
    door, which many heads look at whatever it says. Where a text is too short for that, the neighbours count, and at
    last everything.

    Parameters
    ----------
    weights : ndarray, shape (layers, heads, words, words)
    words : sequence of Word
    word : int, optional
    layers, heads : sequence of int, optional
        The only ones to consider.
    count : int
        How many heads to find.

    Returns
    -------
    list of Look
        The sharpest first, all from the same word.
    """
    spelled = np.array([each.text.casefold() for each in words])
    plain = np.array([not each.is_mark for each in words])
    place = np.arange(len(words))
    who = (plain if word is None else place == word)[:, None]
    other = who & plain & (spelled[:, None] != spelled)
    apart = other & (np.abs(place[:, None] - place) > 1)
    allowed = next((choice for choice in (apart, other, who & np.ones_like(apart)) if choice.any()), ~apart)

    at = np.ix_(
        np.arange(weights.shape[0]) if layers is None else np.asarray(layers),
        np.arange(weights.shape[1]) if heads is None else np.asarray(heads),
    )
    considered = np.full(weights.shape, -1.0)
    considered[at] = np.where(allowed, weights[at], -1.0)
    best = considered.max(axis=-1)  # (layers, heads, words)
    if word is None:
        word = int(best.max(axis=(0, 1)).argmax())
    order = np.argsort(-best[:, :, word], axis=None, kind="stable")
    looks = []
    for flat in order[:count]:
        layer, head = divmod(int(flat), weights.shape[1])
        if best[layer, head, word] >= 0:
            target = int(considered[layer, head, word].argmax())
            looks.append(Look(layer, head, word, target, float(weights[layer, head, word, target])))
    return looks


def bars(
    names: Sequence[str], rows: Sequence[NDArray[np.float64]], looks: Sequence[Look], count: int, style: Style
) -> list[str]:
    """Bars of the words most looked at, and of the one that looks, side by side for some heads.

    Parameters
    ----------
    names : sequence of str
        What the words are called.
    rows : sequence of ndarray, shape (words,)
        The weights with which the word looks, in each head.
    looks : sequence of Look
        The heads.
    count : int
        How many words have a bar.
    style : Style
    """
    looker = looks[0].word
    most = np.max(rows, axis=0)
    most[looker] = 1.0  # the word that looks is always there
    kept = sorted(np.argsort(-most, kind="stable")[:count].tolist())
    columns = [
        (f"layer {look.layer}, head {look.head}", row[kept].tolist()) for look, row in zip(looks, rows, strict=True)
    ]
    lines = bar_table([names[index] for index in kept], columns, style, kept.index(looker))
    if len(kept) < len(most):
        rest = ", ".join(f"{1 - sum(row[kept]):.2f}" for row in rows)
        less = f"and {len(most) - len(kept)} words less looked at, together {rest}"
        lines += map(style.dim, wrap(less, style.width, "  "))
    return lines
