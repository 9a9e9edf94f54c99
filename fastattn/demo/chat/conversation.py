"""A conversation: turns of a user and of the model, in one text that the model reads once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastattn.demo.chat.model import SmolLM2
from fastattn.demo.chat.reader import Reader
from fastattn.demo.chat.sampling import Sampling

__all__ = ["SYSTEM", "ContextFull", "Conversation"]

#: What the model is told first, unless it is told something else: as in its training.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
BEGIN, END = "<|im_start|>", "<|im_end|>"


class ContextFull(Exception):
    """There is no room for a question and its answer behind what is there."""


class Conversation:
    """What has been said, and a reader of it.

    All that is said is one list of tokens. The reader has read the first of them, and reads the rest when it is to
    answer: so nothing is read twice, and an answer that is broken off is part of the conversation as far as it got.

    Parameters
    ----------
    model : SmolLM2
    system : str
        What the model is told first.
    sampling : Sampling, optional
        How to choose the next token; the likeliest one unless given.

    Attributes
    ----------
    ids : list of int
        The tokens of all that has been said.
    answered_from : int
        Where among them the last answer begins.
    reader : Reader
    """

    def __init__(self, model: SmolLM2, system: str = SYSTEM, sampling: Sampling | None = None) -> None:
        self.tokenizer = model.tokenizer
        self.context = model.context
        self.sampling = Sampling() if sampling is None else sampling
        self.reader = Reader(model)
        self._begin, self._end = self.tokenizer.marks[BEGIN], self.tokenizer.marks[END]
        self._newline = self.tokenizer.encode("\n")
        self._opening = [*self._turn("system", system), self._end]
        self.restart()

    def restart(self) -> None:
        """Forget all questions and answers."""
        self.ids = list(self._opening)
        self.answered_from = len(self.ids)
        self.reader.forget(len(self.ids))

    def read_opening(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read what the model is told first now, and not with the first question.

        Raises
        ------
        ContextFull
            If it leaves no room for questions.
        """
        if len(self._opening) >= self.context:
            raise ContextFull
        self.reader.read(self._opening[self.reader.length :], progress)

    def has_room(self, question: str) -> bool:
        """Whether a question fits behind what the model is told first, where nothing else has been said."""
        return len(self._opening) + len(self._asked(question)) < self.context

    def answer(self, question: str, limit: int, progress: Callable[[int, int], None] | None = None) -> Iterator[int]:
        """Yield the tokens of an answer as they come.

        Parameters
        ----------
        question : str
        limit : int
            The greatest number of tokens.
        progress : callable, optional
            Called with the number of tokens of the question that are read, and of all.

        Raises
        ------
        ContextFull
            If the question does not fit behind what has been said; then it has not been.
        """
        new = self._question(question)
        if len(self.ids) + len(new) >= self.context:
            raise ContextFull
        self.ids += new
        self.answered_from = len(self.ids)
        for _ in range(min(limit, self.context - len(self.ids))):
            logits = self.reader.read(self.ids[self.reader.length :], progress)
            progress = None
            token = self.sampling.choose(logits)
            self.ids.append(token)
            if token == self._end:
                return
            yield token

    def _question(self, text: str) -> list[int]:
        """The tokens from the end of what has been said to where the answer begins."""
        end = [] if self.ids[-1] == self._end else [self._end]  # of an answer that was broken off
        return [*end, *self._asked(text)]

    def _asked(self, text: str) -> list[int]:
        """The tokens of a question, from the end of the turn before it to where its answer begins."""
        asked = [*self._newline, *self._turn("user", text), self._end]
        return [*asked, *self._newline, *self._turn("assistant", "")]

    def _turn(self, who: str, text: str) -> list[int]:
        return [self._begin, *self.tokenizer.encode(f"{who}\n{text}")]
