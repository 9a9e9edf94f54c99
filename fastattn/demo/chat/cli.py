"""The command ``demo chat``."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import itertools
import sys
from collections.abc import Iterator

import numpy as np

from fastattn.console.arguments import number, real
from fastattn.console.terminal import Progress, Style, UserError, wrap
from fastattn.demo.chat.conversation import SYSTEM, ContextFull, Conversation
from fastattn.demo.chat.flow import Flow
from fastattn.demo.chat.model import SmolLM2
from fastattn.demo.chat.sampling import Sampling
from fastattn.demo.chat.spoken import drawn, find_written, looks_to_write, sharpest, words_of
from fastattn.demo.chat.stats import Comparison, pace_in_words
from fastattn.demo.search import read_text

__all__ = ["add_arguments", "chat"]

#: What the model is told before texts, unless it is told something else.
ABOUT = "Answer questions about this text in one short sentence."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``demo chat``."""
    parser.add_argument("--prompt", metavar="TEXT", help="a question: it is answered, and that is all")
    parser.add_argument("--system", metavar="TEXT", help=f"what the model is told first (default: {SYSTEM!r})")
    parser.add_argument(
        "--file", nargs="+", metavar="FILE", help="texts in UTF-8 to read first, which questions are about"
    )
    parser.add_argument(
        "--temperature",
        type=real("temperature", 0.0),
        default=0.0,
        help="0 writes the likeliest word each time, 1 draws words as likely as they are (0)",
    )
    parser.add_argument(
        "--top-p",
        type=real("probability", 0.0, 1.0),
        default=1.0,
        metavar="P",
        help="draw only from the likeliest words, as few as are together this likely (1)",
    )
    parser.add_argument("--seed", type=number("seed"), help="draw the same words each time")
    parser.add_argument("--tokens", type=number("number of tokens", 1), default=512, help="the longest answer (512)")
    parser.add_argument(
        "--stats", action="store_true", help="how fast it was, against the same model with attention in plain NumPy"
    )
    parser.add_argument(
        "--show",
        nargs="?",
        const="",
        metavar="WORD",
        help="draw where the model looked to write this word of the answer (default: its last one)",
    )


def chat(args: argparse.Namespace) -> int:
    """Answer one question, or one after the other until there are no more."""
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt has no word in it")
    texts = [read_text(file).strip() for file in args.file or ()]
    if args.file and not any(texts):
        raise UserError("--file has no word in it")
    system = args.system if args.system is not None else ABOUT if texts else SYSTEM
    with Progress("reading the model (a first time compiles)"):
        model = SmolLM2.load()
        model.compile()
    sampling = Sampling(args.temperature, args.top_p, np.random.default_rng(args.seed))
    conversation = Conversation(model, "\n\n".join([system, *texts]), sampling)
    if not conversation.has_room(""):
        option = "--file" if texts else "--system"
        raise UserError(f"{option} is too long for the {model.context:,} tokens that the model can read")
    talk = Talk(conversation, args)
    if texts:
        talk.read_texts()
    if args.prompt is not None:
        talk.turn(args.prompt)
        return 0
    talk.greet()
    for question in talk.questions():
        talk.turn_or_not(question)
    return 0


class Talk:
    """A conversation in a terminal, or between pipes."""

    def __init__(self, conversation: Conversation, args: argparse.Namespace) -> None:
        self.conversation = conversation
        self.args = args
        self.style = Style.of(sys.stdout)
        self.asks = sys.stdin.isatty() and sys.stdout.isatty()
        self.comparison = Comparison(conversation) if args.stats else None

    def say(self, text: str) -> None:
        """Print a remark that is not the model's."""
        print(*map(self.style.dim, wrap(text, self.style.width)), sep="\n", flush=True)

    def greet(self) -> None:
        """Say who is there, to whom is there."""
        if self.asks:
            model = self.conversation.reader.model
            self.say(
                f"SmolLM2-135M-Instruct, with all attention of its {len(model.layers)} layers by fastattn. "
                "Ctrl-C stops an answer, Ctrl-D ends."
            )

    def read_texts(self) -> None:
        """Read the texts that questions are about, and say how long that took."""
        with Progress("reading") as progress:
            self.conversation.read_opening(progress)
        self.say(f"Read {pace_in_words(self.conversation.reader.prefill)}")
        self.compare()
        print(flush=True)

    def questions(self) -> Iterator[str]:
        """Lines that are not empty, until there are no more."""
        if not self.asks:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")
            yield from filter(str.strip, sys.stdin)
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # a line can be edited, and former ones be had again
        while True:
            try:
                line = input("\n> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # came too late for the answer
                print()
                continue
            if line.strip():
                yield line

    def turn_or_not(self, question: str) -> None:
        """Answer a question; Ctrl-C stops the answer, and what cannot be is said."""
        try:
            with contextlib.suppress(KeyboardInterrupt):
                self.turn(question)
        except UserError as error:
            self.say(str(error))
        if not self.asks:
            print(flush=True)

    def turn(self, question: str) -> None:
        """Answer a question, as it comes, and show what is to be shown."""
        self.conversation.reader.restart_clock()
        try:
            written = self.write(question)
        except ContextFull:
            if not self.conversation.has_room(question):
                raise UserError("the question is too long for it") from None
            self.conversation.restart()
            self.say(
                f"(The {self.conversation.context:,} tokens that it can read are full: the conversation begins anew.)"
            )
            written = self.write(question)
        if written == self.args.tokens:
            tokens = f"{written} token" + "s" * (written != 1)
            self.say(f"(Stopped after {tokens}: --tokens allows more.)")
        self.compare()
        if self.args.show is not None:
            self.show()

    def write(self, question: str) -> int:
        """Write an answer, and return of how many tokens it is."""
        bytes_of = self.conversation.tokenizer.bytes_of
        with Progress("reading the question") as progress:
            answer = self.conversation.answer(question.strip(), self.args.tokens, progress)
            first = list(itertools.islice(answer, 1))  # when this comes, the question has been read
        written = 0
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps a character back until it is whole
        flow = Flow(sys.stdout, self.style.width)
        try:
            for token in itertools.chain(first, answer):
                flow.add(decoder.decode(bytes_of(token)))
                written += 1
        finally:
            flow.add(decoder.decode(b"", final=True))
            flow.end()
        return written

    def compare(self) -> None:
        """Read the same with plain attention, and say how fast both were."""
        if self.comparison is not None:
            with Progress("reading the same with attention in plain NumPy") as progress:
                self.comparison.catch_up(progress)
            print("", *self.comparison.lines(self.style), sep="\n", flush=True)

    def show(self) -> None:
        """Draw where the model looked to write a word."""
        conversation, style = self.conversation, self.style
        words = words_of(conversation.ids, conversation.tokenizer)
        written = find_written(words, conversation.answered_from, self.args.show)
        weights = looks_to_write(conversation, words, written)
        looks = sharpest(weights, words)
        if not looks:
            raise UserError("there is no word that it could have looked at")
        places = " and ".join(f'"{words[look.target].text}" ({look.weight:.2f})' for look in looks)
        print()
        print(*wrap(f'To write "{words[written].text}", it looked at {places} most sharply.', style.width), sep="\n")
        print("", *drawn(words, weights, looks, style), sep="\n", flush=True)
