"""How fast it is, against the same model with attention as one writes it in NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from fastattn.console.terminal import Style, wrap
from fastattn.demo.chat.caches import PlainCache
from fastattn.demo.chat.conversation import Conversation
from fastattn.demo.chat.reader import Pace, Reader

__all__ = ["Comparison", "pace_in_words"]

NAMES = ("fastattn", "plain NumPy")


def pace_in_words(pace: Pace) -> str:
    """What was read, how fast, and what attention took of the time."""
    tokens = f"{pace.tokens:,} token" + "s" * (pace.tokens != 1)
    return f"{tokens} in {pace.seconds:.1f} s: {_figure(pace)} a second, attention is {pace.share:.0%} of the time."


def rate(pace: Pace) -> str:
    """Tokens a second, and the share of attention, in few characters."""
    return f"{_figure(pace)} /s, {pace.share:.0%}"


def _figure(pace: Pace) -> str:
    """Tokens a second, in three digits or more."""
    return f"{pace.per_second:,.0f}" if pace.per_second >= 100 else f"{pace.per_second:.3g}"


class Comparison:
    """A second reader, which reads all that the first one reads, with plain attention.

    Parameters
    ----------
    conversation : Conversation
    """

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.plain = Reader(conversation.reader.model, PlainCache)
        self._heard: list[int] = []

    def catch_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read what the conversation's reader has read since the last time: text at once, an answer token by token."""
        said = self.conversation.ids[: self.conversation.reader.length]
        self.plain.restart_clock()
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._heard, said, strict=False))
        self.plain.forget(len(list(alike)))  # a conversation may have begun anew
        self._heard = said
        if new := said[self.plain.length : self.conversation.answered_from]:
            self.plain.read(new, progress)
        for token in said[self.plain.length :]:
            self.plain.read([token])

    def lines(self, style: Style) -> Iterator[str]:
        """The table."""
        fast = self.conversation.reader
        pairs = [
            ("read (prefill)", fast.prefill, self.plain.prefill),
            ("written (decode)", fast.decode, self.plain.decode),
        ]
        rows = [(f"{ours.tokens:,} {what}", rate(ours), rate(theirs)) for what, ours, theirs in pairs if ours.tokens]
        width = max(len(name) for name, *_ in rows)
        wide = [f"{name:{width}}  {ours:>14}  {theirs:>14}" for name, ours, theirs in (("tokens", *NAMES), *rows)]
        if len(wide[0]) <= style.width:
            yield style.bold(wide[0])
            yield from wide[1:]
        else:  # one below another
            for name, *cells in rows:
                yield style.bold(name)
                for what, cell in zip(NAMES, cells, strict=True):
                    yield from wrap(f"{what}: {cell}", style.width, "  ")
        yield from map(style.dim, wrap("Tokens a second, and the share of attention in the time.", style.width))
