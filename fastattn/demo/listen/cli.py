"""The command ``demo listen``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastattn.call.advice import to_install
from fastattn.console.arguments import output_file
from fastattn.console.terminal import Progress, Style, UserError, printable, wrap
from fastattn.demo.search import check_readable

if TYPE_CHECKING:
    from fastattn.demo.listen.listener import Listener, Segment, Window
    from fastattn.demo.parts import Floats

__all__ = ["add_arguments", "listen"]

#: A package whose wav file is listened to where none is named, the file, and how to get it.
EXAMPLE = ("moonshine_onnx", "assets/beckett.wav", "pip install --no-deps useful-moonshine-onnx==20251121")
PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``demo listen``."""
    parser.add_argument(
        "file", nargs="?", metavar="FILE.wav", help="a wav file, - is standard input (default: the example's)"
    )
    parser.add_argument("--translate", action="store_true", help="write what is said in English")
    parser.add_argument("--language", metavar="CODE", help="what is spoken, such as en or fr (default: it finds out)")
    parser.add_argument(
        "--show", action="store_true", help="draw where the words of all segments listened, not the first"
    )
    parser.add_argument(
        "--plot",
        type=output_file(*PICTURES),
        metavar="FILE",
        help=f"draw the first half minute into a file ({', '.join(PICTURES)}; needs matplotlib)",
    )
    parser.add_argument("--stats", action="store_true", help="how long it takes, with fastattn and with plain NumPy")


def listen(args: argparse.Namespace) -> int:
    """Write down what is said in a wav file, and draw which moment each word listened to."""
    from fastattn.demo.listen.picture import draw, pages, picture

    style = Style.of(sys.stdout)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--plot needs matplotlib, not installed here: {to_install('plot')}")
    samples = read_sound(args.file)
    listener = load_listener(args)
    segments = write_down(listener, samples, style)

    shown = list(pages(segments))[: None if args.show else 1]
    for page in shown:
        print()
        print(*picture(page, style), sep="\n")
    if args.plot is not None and segments:
        draw(segments, args.plot)
    if args.stats and segments:
        print()
        print(*statistics(listener, samples, segments[0].window, style), sep="\n")
    if not (args.show or args.stats or args.translate or args.plot):
        print()
        message = (
            "Next: --translate writes English, --show draws all of it, --plot FILE.svg in fine detail, and --stats"
        )
        print(*wrap(f"{message} says how long attention takes.", style.width), sep="\n")
    return 0


def read_sound(file: str | None) -> Floats:
    """The sound of a wav file, of standard input for "-", or of the example where no file is named."""
    from fastattn.demo.listen.package import file_of
    from fastattn.demo.listen.sound import read_wav

    if file is None:
        package, name, install = EXAMPLE
        path = file_of(package, name)
        if path is None:
            raise UserError(f"no FILE.wav is named, and the example's package is not installed here: {install}")
        file = str(path)
    check_readable([file])
    try:
        return read_wav(sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes())
    except ValueError as error:
        raise UserError(f"{printable(file)} is not a wav file that can be read: {error}") from error


def load_listener(args: argparse.Namespace) -> Listener:
    """The model, told what is spoken; there is a word about it while it loads."""
    from fastattn.demo.listen.listener import Listener
    from fastattn.demo.listen.package import load

    with Progress("reading the model"):
        model, vocabulary = load()
    if args.language is not None and args.language not in vocabulary.languages:
        known = ", ".join(vocabulary.languages)
        raise UserError(f"--language: {printable(args.language)!r} is not one of {known}")
    return Listener(model, vocabulary, args.language, args.translate)


def write_down(listener: Listener, samples: Floats, style: Style) -> list[Segment]:
    """Print each segment when it is complete; until then its words come on the line of progress."""
    from fastattn.demo.listen.picture import clock
    from fastattn.demo.listen.sound import RATE

    length = len(samples) / RATE
    print(*wrap(f"Whisper base hears {clock(length)}, with every attention by fastattn.", style.width), sep="\n")
    begin = time.perf_counter()
    segments: list[Segment] = []
    with Progress("listening") as progress:

        def said(seconds: float, text: str) -> None:
            progress(int(seconds), int(length) + 1, text[4 - progress.style.width // 2 :])

        for segment in listener.segments(samples, said):
            progress.clear()
            if not segments:
                print(*wrap(_about_language(listener), style.width), sep="\n")
                print()
            at = f"{clock(segment.start)} "
            first, *rest = wrap(printable(segment.text), style.width, " " * len(at))
            print(style.dim(at) + first.lstrip(), *rest, sep="\n", flush=True)
            segments.append(segment)
    if not segments:
        print("Nobody speaks.")
    seconds = time.perf_counter() - begin
    print()
    print(
        *wrap(f"That took {seconds:.1f} s, {seconds / length:.2f} times as long as the sound.", style.width), sep="\n"
    )
    return segments


def _about_language(listener: Listener) -> str:
    """What is spoken, and what is written."""
    known = "" if listener.sureness == 1 else f" ({listener.sureness:.2f})"
    return f"It hears the language {listener.language}{known}" + (
        ", and writes English:" if listener.translate else ":"
    )


def statistics(listener: Listener, samples: Floats, window: Window, style: Style) -> list[str]:
    """How long the first window takes, with fastattn and with plain NumPy."""
    from fastattn.demo.listen.sound import RATE
    from fastattn.demo.listen.stats import ROUNDS, measure

    start = round(window.start * RATE)
    part = samples[start : start + round(window.length * RATE)]
    with Progress("measuring") as progress:
        measured = measure(listener.model, part, window.prompt, window.tokens, progress)
    lines = wrap(
        f"The first {window.length:.1f} s again, {ROUNDS} times, in turns with attention in plain NumPy; medians:",
        style.width,
    )
    for each in measured:
        written = 1e3 * each.write.seconds / len(window.tokens)
        said = (
            f"{each.name}: hearing {each.hear.seconds:.2f} s, {each.hear.attention / each.hear.seconds:.0%} of it "
            f"attention; writing {written:.1f} ms a token, {each.write.attention / each.write.seconds:.0%} of it "
            f"attention; all in all {each.seconds / window.length:.3f} times as long as the sound"
        )
        lines += wrap(said, style.width, "  ")
    return lines
