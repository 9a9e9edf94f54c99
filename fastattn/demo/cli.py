"""The commands ``demo`` and ``demo search``; ``demo chat`` and ``demo listen`` are in packages of their own."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastattn.console.arguments import next_command, number, program
from fastattn.console.terminal import (
    Progress,
    Style,
    UserError,
    bar,
    heat_map,
    legend,
    pad,
    printable,
    shaded_text,
    wrap,
)
from fastattn.demo.chat import cli as chat
from fastattn.demo.listen import cli as listen
from fastattn.demo.words import Look, Word, bars, find_word, in_words, join_pieces, sharpest

if TYPE_CHECKING:
    from fastattn.demo.minilm import MiniLM

__all__ = ["add_parsers", "demo", "search"]

TEXT = "The animal didn't cross the street because it was too tired."
WORD = "it"
#: The heads that find out what "it" is, as (layer, head).
SHOWCASE = ((3, 1), (5, 11))
#: Bars of a longer text are drawn for its most looked-at words only.
MAX_BARS = 24


def add_parsers(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``demo`` and of what is below it."""
    parser.add_argument("--text", help=f"the sentence to read (default: {TEXT!r})")
    parser.add_argument("--word", help='the word that looks; "the:2" is the second "the" (default: the sharpest look)')
    parser.add_argument(
        "--layer", type=number("layer", 0, 5), help="layer, 0 to 5 (default: where it looks most sharply)"
    )
    parser.add_argument("--head", type=number("head", 0, 11), help="head, 0 to 11 (default: which looks most sharply)")
    parser.set_defaults(run=demo)
    commands = parser.add_subparsers(title="and", metavar="COMMAND", dest="more")
    listener = commands.add_parser(
        "listen",
        help="write down what is said in a wav file",
        description="Write down what is said in a wav file, or its translation, with Whisper base, a real model of "
        "speech that runs in NumPy with every attention by fastattn, and draw which moment each word listened to.",
        epilog=f"example: {program()} demo listen talk.wav --translate",
    )
    listen.add_arguments(listener)
    listener.set_defaults(run=alone("listen", listen.listen))
    finder = commands.add_parser(
        "search",
        help="rank the sentences of text files by their meaning",
        description="Rank the sentences of text files by how near their meaning is to the query's.",
        epilog=f'example: {program()} demo search "how is memory saved?" README.md docs/*.md',
    )
    finder.add_argument("query", help="what to look for: a question or a few words")
    finder.add_argument("files", nargs="+", metavar="FILE", help="text files in UTF-8; - is standard input")
    finder.add_argument("--top", type=number("number of sentences", 1), default=5, help="how many to show (5)")
    finder.set_defaults(run=alone("search", search))
    talker = commands.add_parser(
        "chat",
        help="talk with a real language model",
        description="Talk with SmolLM2-135M-Instruct, a real language model that runs in NumPy with every attention by "
        "fastattn. Questions are read from the terminal, or line by line from a pipe.",
        epilog=f'example: {program()} demo chat --prompt "What is the capital of France?" --show',
    )
    chat.add_arguments(talker)
    talker.set_defaults(run=alone("chat", chat.chat))


def alone(name: str, command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command that refuses the arguments of ``demo`` itself, which say what is drawn."""

    def run(args: argparse.Namespace) -> int:
        given = [f"--{option}" for option in ("text", "word", "layer", "head") if getattr(args, option) is not None]
        if given:
            raise UserError(f"{name} draws no head, and has no use for {', '.join(given)}")
        return command(args)

    return run


def demo(args: argparse.Namespace) -> int:
    """Show where a word of a sentence looks, in the heads that look most sharply."""
    style = Style.of(sys.stdout)
    text = printable(TEXT if args.text is None else args.text)
    if not any(c.isalnum() for c in text):
        raise UserError("--text has no word in it")
    model = load_model()
    encoding = model.encode(text)
    words = join_pieces(text, encoding)
    name = WORD if text == TEXT and args.word is None else args.word
    word = None if name is None else find_word(words, name)

    with Progress("running the model (a first time compiles)"):
        weights = in_words(model.attention_weights(encoding.ids), words)
        seconds = statistics.median(_run_times(model, encoding.ids))
    found = text == TEXT and name == WORD and args.layer is None and args.head is None
    if word is not None and found:
        looks = [_look_at_most(weights, word, layer, head) for layer, head in SHOWCASE]
    else:
        layers = None if args.layer is None else [args.layer]
        heads = None if args.head is None else [args.head]
        looks = sharpest(weights, words, word, layers, heads)
        if layers and heads:  # asked for: where it looks, whatever that is
            looks = [_look_at_most(weights, looks[0].word, args.layer, args.head)]

    def say(message: str) -> None:
        print(*wrap(message, style.width), sep="\n")

    cross = "×" if style.blocks else "x"
    say(
        f"all-MiniLM-L6-v2 read this with every attention by fastattn: {len(encoding.ids)} word pieces, "
        f"{len(weights)} layers {cross} {weights.shape[1]} heads, {1e3 * seconds:.1f} ms."
    )
    if encoding.overflowing:
        say("(It reads no more than its first words: the text is too long for it.)")
    print()
    shown = [(each.gap, each.text, 0.0) for each in words if each.text not in ("[CLS]", "[SEP]")]
    print(*map(style.bold, shaded_text(shown, style)), sep="\n")
    print()
    say("Each head lets every word look at all words, with weights that add up to 1.")
    if found:
        say('What is "it"? These two heads were never told, and have found out: the animal.')
    else:
        say(_sentence_about(words, looks, args))
    print()
    print(*picture(words, weights, looks, style), sep="\n")
    print()
    if found:
        say('Next: --layer 5 --head 11 draws the other head, --text "..." reads a sentence of yours, and')
    else:
        say("Next: --word, --layer and --head look elsewhere, and")
    say(f'{next_command()} demo search "query" FILE... searches by meaning.')
    say(f"{next_command()} demo listen FILE.wav writes down what is said.")
    say(f"{next_command()} demo chat talks with a language model.")
    return 0


def _run_times(model: MiniLM, ids: Sequence[int], runs: int = 5) -> list[float]:
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        model.embed_batch([ids])
        times.append(time.perf_counter() - start)
    return times[1:]


def _look_at_most(weights: NDArray[np.float64], word: int, layer: int, head: int) -> Look:
    row = weights[layer, head, word]
    return Look(layer, head, word, int(row.argmax()), float(row.max()))


def _sentence_about(words: Sequence[Word], looks: Sequence[Look], args: argparse.Namespace) -> str:
    """What was looked for, and what was found."""
    parts = [
        f'at "{words[look.target].text}" in layer {look.layer}, head {look.head} (weight {look.weight:.2f})'
        for look in looks
    ]
    how = "looks" if args.layer is not None and args.head is not None else "looks most sharply"
    return f'"{words[looks[0].word].text}" {how} {" and ".join(parts)}.'


def picture(words: Sequence[Word], weights: NDArray[np.float64], looks: Sequence[Look], style: Style) -> list[str]:
    """Bars for the row of a word in each head, then the heat map of the first head.

    Parameters
    ----------
    words : sequence of Word
    weights : ndarray, shape (layers, heads, words, words)
    looks : sequence of Look
        The heads to draw, all from one word.
    style : Style
    """
    word = looks[0].word
    rows = [weights[look.layer, look.head, word] for look in looks]
    lines = bars([each.text for each in words], rows, looks, MAX_BARS, style)
    first = looks[0]
    title = f"Layer {first.layer}, head {first.head}"
    lines.append("")
    square = heat_map([each.text for each in words], weights[first.layer, first.head].tolist(), style, word)
    if square is None:  # too many words for a square: the row alone
        lines += [f"{title}, the row alone:", ""]
        lines += shaded_text([(w.gap, w.text, float(x)) for w, x in zip(words, rows[0], strict=True)], style)
    else:
        lines += wrap(f"{title}, all words: who looks (row) at what (column)", style.width)
        lines += square
    lines += ["", *legend(style)]
    return lines


def search(args: argparse.Namespace) -> int:
    """Rank sentences by meaning."""
    from fastattn.demo.search import check_readable, rank, read_sentences

    style = Style.of(sys.stdout)
    query = printable(args.query)
    if not query:
        raise UserError("the query is empty")
    check_readable(args.files)
    model = load_model()
    sentences = read_sentences(args.files)
    texts = [sentence.text for sentence in sentences]
    with Progress("reading sentences") as progress:
        vectors = model.embed(texts, progress=progress)
    ranked = rank(vectors, model.embed([query])[0], args.top)

    print(*wrap(f'Nearest in meaning to "{query}", of {len(texts)} sentences:', style.width), sep="\n")
    for place, (index, cosine) in enumerate(ranked, start=1):
        sentence = sentences[index]
        drawn = style.accent(pad(bar(cosine, 10, style.blocks), 10))
        where = f"{printable(sentence.file)}:{sentence.line}"
        where = style.dim(where[max(0, len(where) - (style.width - 20)) :])  # its end says more
        print(f"\n{place:2}  {style.bold(f'{cosine:.2f}')} {drawn} {where}")
        print(*wrap(sentence.text, style.width, "    "), sep="\n")
    return 0


def load_model() -> MiniLM:
    """Load the encoder; there is a word about it while it loads."""
    with Progress("reading the model"):
        from fastattn.demo.minilm import MiniLM

        return MiniLM.load()
