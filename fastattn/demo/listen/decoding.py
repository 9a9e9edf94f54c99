"""What the decoder writes about 30 seconds of sound: which tokens may follow, which is chosen, when another try is due.

The rules are those with which Whisper was published [1]_.

References
----------
.. [1] A. Radford, J. W. Kim, T. Xu, G. Brockman, C. McLeavey, I. Sutskever, "Robust speech recognition via large-scale
   weak supervision", 2022, section 4.5.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastattn.demo.listen.attention import Attention
from fastattn.demo.listen.model import Pair, Whisper
from fastattn.demo.listen.vocabulary import Vocabulary
from fastattn.demo.parts import Floats

__all__ = ["Text", "best_text", "detect_language", "restrict", "write"]

#: Tokens that 30 seconds may have.
LONGEST = 224
#: Marks of time after which a text does not begin: a second.
LATEST_START = 50
#: How much chance there is in the choice of a token: 0, none, and then the tries after a text that is not good enough.
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
#: A text that compresses better than this repeats itself; one that the model finds less likely than this is a guess.
COMPRESSION, LIKELY = 2.4, -1.0
#: From this probability on nobody speaks, if the text is a guess as well.
SILENCE = 0.6


@dataclass(frozen=True)
class Text:
    """What was written, and how sure of it the model is.

    Attributes
    ----------
    tokens : list of int
        Text and marks of time, without what it begins and ends with.
    likely : float
        The mean of the logarithms of the tokens' probabilities.
    silence : float
        The probability that nobody speaks.
    """

    tokens: list[int]
    likely: float
    silence: float

    @property
    def is_silence(self) -> bool:
        """Whether nobody speaks."""
        return self.silence > SILENCE and self.likely < LIKELY


def detect_language(
    model: Whisper, vocabulary: Vocabulary, sound: list[Pair], attention: Attention
) -> tuple[str, float]:
    """The language that is spoken, and its probability among all that the model knows."""
    vectors = model.read([vocabulary.start], sound, model.caches(attention, 1), attention)
    logits = model.logits(vectors[0])[list(vocabulary.languages.values())]
    best = int(logits.argmax())
    return list(vocabulary.languages)[best], float(1 / np.exp(logits - logits[best]).sum())


def restrict(logits: Floats, written: Sequence[int], vocabulary: Vocabulary) -> None:
    """Set to -inf what must not follow `written`.

    Text stands between two marks of time, those of its beginning and its end; marks do not go back in time. Where all
    marks together are likelier than any token of text, it is a mark.
    """
    times, end = vocabulary.first_time, vocabulary.end
    logits[vocabulary.never] = -np.inf
    if not written:
        logits[:times] = -np.inf
        logits[times + LATEST_START + 1 :] = -np.inf
        return
    closes = False  # whether the last token is a mark that ends a text
    if vocabulary.is_time(written[-1]):
        closes = len(written) > 1 and not vocabulary.is_time(written[-2])
        if closes:  # the mark at which the next text begins, or the end
            logits[:end] = -np.inf
        else:
            logits[times:] = -np.inf
    latest = max(filter(vocabulary.is_time, written))
    logits[times : latest if closes else latest + 1] = -np.inf
    marks = logits[times:]
    top = logits[:times].max()
    if np.exp(marks - max(top, marks.max())).sum() > np.exp(top - max(top, marks.max())):
        logits[:times] = -np.inf


def write(
    model: Whisper,
    vocabulary: Vocabulary,
    sound: list[Pair],
    prompt: Sequence[int],
    attention: Attention,
    temperature: float = 0.0,
    said: Callable[[list[int]], None] = lambda tokens: None,
) -> Text:
    """Write what is said in a sound, token by token.

    Parameters
    ----------
    model, vocabulary, sound, prompt, attention
        What listens, to what, and what the text begins with.
    temperature : float
        0: the likeliest token always; otherwise drawn, with probabilities to the power of 1 / temperature.
    said : callable
        Called with the tokens so far, as each comes.
    """
    rng = np.random.default_rng(0)
    caches = model.caches(attention, len(prompt) + LONGEST)
    vectors = model.read(prompt, sound, caches, attention)
    silence = float(_log_softmax(model.logits(vectors[0]))[vocabulary.no_speech])
    tokens: list[int] = []
    likely = 0.0
    while len(tokens) < LONGEST:
        logits = model.logits(vectors[-1])
        restrict(logits, tokens, vocabulary)
        token = int(logits.argmax()) if temperature == 0 else _drawn(logits, temperature, rng)
        likely += float(_log_softmax(logits)[token])
        if token == vocabulary.end:
            break
        tokens.append(token)
        said(tokens)
        vectors = model.read([token], sound, caches, attention)
    return Text(tokens, likely / (len(tokens) + 1), float(np.exp(silence)))


def best_text(
    model: Whisper,
    vocabulary: Vocabulary,
    sound: list[Pair],
    prompt: Sequence[int],
    attention: Attention,
    said: Callable[[list[int]], None] = lambda tokens: None,
) -> Text:
    """Write with more and more chance, until a text neither repeats itself nor is a guess; arguments as of `write`."""
    for temperature in TEMPERATURES:
        text = write(model, vocabulary, sound, prompt, attention, temperature, said)
        plain = vocabulary.text(text.tokens).encode()
        repeats = len(plain) / len(zlib.compress(plain)) > COMPRESSION
        if text.is_silence or not (repeats or text.likely < LIKELY):
            break
    return text


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max()
    result: Floats = shifted - np.log(np.exp(shifted).sum())
    return result


def _drawn(logits: Floats, temperature: float, rng: np.random.Generator) -> int:
    """A token drawn from its probability: the largest sum of a logit and Gumbel's noise."""
    return int((logits / temperature + rng.gumbel(size=logits.shape)).argmax())
