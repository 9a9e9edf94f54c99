"""Semantic search in text files: sentences, their order by meaning, and how long a sentence takes."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastattn.demo.minilm import Attend, Floats, MiniLM, batches, fast_attention, plain_attention
from fastattn.terminal import UserError, printable

__all__ = ["Sentence", "Timing", "compare", "read_sentences", "split_sentences"]

FEWEST_ROUNDS, MOST_ROUNDS = 3, 25
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


@dataclass(frozen=True)
class Timing:
    """Medians in seconds for one sentence: of the whole model, and of its attention alone."""

    sentences: int
    fast: float
    plain: float
    fast_attention: float
    plain_attention: float


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


def read_sentences(files: Sequence[str]) -> list[Sentence]:
    """Read the sentences of text files in UTF-8; "-" is standard input.

    Raises
    ------
    UserError
        If a file cannot be read, is no text, or if there is no sentence in any of them.
    """
    sentences = []
    for file in files:
        try:
            data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            reason = (error.strerror if isinstance(error, OSError) else str(error)) or str(error)
            raise UserError(f"cannot read {printable(file)}: {reason}") from error
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{printable(file)} is not a text in UTF-8: byte {error.start} is no character") from error
        if "\0" in text:
            raise UserError(f"{printable(file)} is not a text: it has zero bytes")
        sentences += [Sentence(sentence, file, line) for line, sentence in split_sentences(text.replace("\r\n", "\n"))]
    if not sentences:
        raise UserError(f"there is no sentence in {', '.join(map(printable, files))}")
    return sentences


def rank(vectors: NDArray[np.float32], query: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
    """The `count` rows most similar to the query, as (row, cosine): all are unit vectors, so it is one product."""
    cosines = vectors @ query
    return [(int(index), float(cosines[index])) for index in np.argsort(-cosines, kind="stable")[:count]]


def compare(
    model: MiniLM,
    sentences: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
    sample: int = 128,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time the model on fastattn and on plain NumPy attention, alternately, on the same batches of sentences.

    At most `sample` sentences are taken, evenly from all. Each batch is run by both in turn, and who is first
    alternates; after `seconds`, but three rounds at least, the medians of the rounds are taken.
    """
    chosen = np.unique(np.linspace(0, len(sentences) - 1, min(sample, len(sentences))).astype(int))
    encoded = [encoding.ids for encoding in model.tokenizer.encode_batch([sentences[index] for index in chosen])]
    work = [[encoded[index] for index in batch] for batch in batches([len(ids) for ids in encoded])]
    watches = (_Stopwatch(fast_attention, clock), _Stopwatch(plain_attention, clock))

    def run_all(turn: int) -> None:
        for number, batch in enumerate(work):
            for watch in watches if (turn + number) % 2 else reversed(watches):
                watch.run(model, batch)

    run_all(0)  # warms up
    for watch in watches:
        watch.new_round(keep=False)
    began, elapsed, done = clock(), 0.0, 0
    while done < FEWEST_ROUNDS or (done < MOST_ROUNDS and elapsed < seconds):
        done += 1
        run_all(done)
        for watch in watches:
            watch.new_round()
        elapsed = clock() - began
        if progress is not None:
            progress(done, max(done, FEWEST_ROUNDS, min(MOST_ROUNDS, int(done * seconds / max(elapsed, 1e-9)))))
    (fast, fast_inside), (plain, plain_inside) = (watch.medians(len(encoded)) for watch in watches)
    return Timing(len(encoded), fast, plain, fast_inside, plain_inside)


class _Stopwatch:
    """Times the model on one attention, and the attention in it."""

    def __init__(self, attend: Attend, clock: Callable[[], float]) -> None:
        self.attend, self.clock = attend, clock
        self.whole: list[float] = []  # of each round
        self.inside: list[float] = []
        self.whole_sum = self.inside_sum = 0.0

    def new_round(self, keep: bool = True) -> None:
        """Keep the sums of the round that ends, or forget them."""
        if keep:
            self.whole.append(self.whole_sum)
            self.inside.append(self.inside_sum)
        self.whole_sum = self.inside_sum = 0.0

    def run(self, model: MiniLM, batch: Sequence[Sequence[int]]) -> None:
        """Run the model on a batch."""
        start = self.clock()
        model.embed_batch(batch, self._timed)
        self.whole_sum += self.clock() - start

    def _timed(self, query: Floats, key: Floats, value: Floats, attn_mask: NDArray[np.bool_] | None) -> Floats:
        start = self.clock()
        out = self.attend(query, key, value, attn_mask)
        self.inside_sum += self.clock() - start
        return out

    def medians(self, sentences: int) -> tuple[float, float]:
        """Seconds for one sentence, in the whole model and in the attention."""
        return statistics.median(self.whole) / sentences, statistics.median(self.inside) / sentences
