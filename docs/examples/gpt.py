"""A character GPT, trained on Python's own reference manual: ``python docs/examples/gpt.py``.

A Transformer that guesses the next character (Radford et al. 2018), in NumPy on `fastattn.attention` and
`fastattn.attention_backward`. Its parts are in transformer.py. It prints how many bits a character of held-out text
costs it, what it writes itself, and what its heads look at. See gpt.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported: see training.Trainer

import lzma
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pydoc_data.topics import topics
from textwrap import indent
from typing import Any, NamedTuple

import numpy as np
from gpt_heads import Habit, cost_without_each, strongest, weights_of
from numpy.typing import DTypeLike, NDArray
from saving import options, save_figure, save_result
from training import Trainer, cross_entropy, warm_then_cosine
from transformer import Array, Block, CausalSelfAttention, LayerNorm, Linear, Parameter, Part, rows

from fastattn.console.terminal import Progress

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """The size of the model and of its training."""

    length: int = 128  # characters that it sees
    embed: int = 128
    heads: int = 4
    layers: int = 3
    batch: int = 8
    steps: int = 1500
    rate: float = 2e-3
    seed: int = 0


QUICK = Settings(length=64, embed=48, heads=2, layers=2, batch=8, steps=150, rate=1e-2)
PROMPT = "If an object"
#: Kinds of places (gpt_heads.py) whose heads are drawn large.
SHOWN = ("the character before", "the two before that", "the start of its word", "what came after the same pair")

# -- the text ----------------------------------------------------------------------------------------------------------


def corpus() -> tuple[str, str]:
    """Return the text to train on, and the held-out text: every eighth topic, about a tenth of all characters.

    The chapters of the manual stand in it whole and again section by section. A paragraph is kept once, in the
    longest topic that has it: else much of the held-out text would be known.
    """
    seen: set[str] = set()
    texts: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        fresh = []
        for paragraph in topics[name].strip("\n").split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                fresh.append(paragraph)
        texts[name] = "\n\n".join(fresh)
    names = sorted(name for name in texts if len(texts[name]) > 300)  # of others only a heading is left
    held_out = names[3::8]
    return tuple("\n\n\n".join(texts[n] for n in names if (n in held_out) == held) for held in (False, True))


class Alphabet:
    """The characters of a text, and their numbers."""

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text))
        self.numbers = {character: number for number, character in enumerate(self.characters)}

    def encode(self, text: str) -> Ids:
        return np.array([self.numbers[character] for character in text], np.int64)

    def decode(self, ids: Ids) -> str:
        return "".join(self.characters[number] for number in ids)


# -- the model ---------------------------------------------------------------------------------------------------------


class GPT(Part):
    """Characters to vectors, blocks, and the scores of each next character."""

    def __init__(self, characters: int, settings: Settings, dtype: DTypeLike = np.float32) -> None:
        rng = np.random.default_rng(settings.seed)
        embed, gain = settings.embed, 1 / np.sqrt(2 * settings.layers)  # the sum of all blocks stays of size 1
        self.length = settings.length
        self.characters = Parameter((0.5 * rng.standard_normal((characters, embed))).astype(dtype))
        self.blocks = []
        for _ in range(settings.layers):
            attention = CausalSelfAttention(embed, settings.heads, rng, dtype, gain)
            self.blocks.append(Block(attention, embed, 4 * embed, rng, dtype, gain))
        self.norm = LayerNorm(embed, dtype)
        self.scores = Linear(embed, characters, rng, dtype, gain=0.1)

    def __call__(self, ids: Ids) -> Array:
        """Return the scores of all characters after each of (B, L): (B, L, characters)."""
        self.ids = ids
        x = self.characters.value[ids]
        for block in self.blocks:
            x = block(x)
        return self.scores(self.norm(x))

    def backward(self, grad: Array) -> None:
        grad = self.norm.backward(self.scores.backward(grad))
        for block in reversed(self.blocks):
            grad = block.backward(grad)
        self.characters.grad[...] = 0
        np.add.at(self.characters.grad, self.ids.ravel(), rows(grad))


# -- training ----------------------------------------------------------------------------------------------------------


def windows(ids: Ids, starts: Ids, length: int) -> tuple[Ids, Ids]:
    """Return pieces of a text, (B, L), and for each character the next one."""
    places = starts[:, None] + np.arange(length)
    return ids[places], ids[places + 1]


class Trained(NamedTuple):
    """A model that has been trained, and what was measured on the way."""

    model: GPT
    before: GPT  # untrained
    alphabet: Alphabet
    held: Ids  # the held-out text
    curve: dict[str, list[float]]  # bits per character, by steps
    seconds: float


def train(settings: Settings, train_text: str, held_text: str) -> Trained:
    """Train a model on random pieces of a text, and look at some of the held-out text now and then."""
    alphabet = Alphabet(train_text + held_text)
    text, held = alphabet.encode(train_text), alphabet.encode(held_text)
    model, before = (GPT(len(alphabet.characters), settings) for _ in range(2))
    trainer, rng = Trainer(model), np.random.default_rng(settings.seed + 1)
    curve: dict[str, list[float]] = {"step": [], "training text": [], "held-out text": []}
    recent: deque[float] = deque(maxlen=20)
    started = time.perf_counter()
    with Progress("training") as progress:
        for step in range(1, settings.steps + 1):
            starts = rng.integers(0, len(text) - settings.length, settings.batch)
            rate = warm_then_cosine(step, settings.steps, settings.rate)
            recent.append(trainer.step(*windows(text, starts, settings.length), rate) / np.log(2))
            progress(step, settings.steps, f"{np.mean(recent):.2f} bits per character")
            if step % max(1, settings.steps // 30) == 0:
                curve["step"].append(step)
                curve["training text"].append(float(np.mean(recent)))
                curve["held-out text"].append(bits_per_character(model, held, most=64))
    return Trained(model, before, alphabet, held, curve, time.perf_counter() - started)


def bits_per_character(model: GPT, text: Ids, most: int | None = None) -> float:
    """Return what a character of a text costs: −log2 of the probability that the model gave it, in the mean.

    Pieces overlap by half: each character but the first few is guessed from at least half a length of others. With
    `most`, so many pieces all over the text are looked at.
    """
    half = model.length // 2
    starts = np.arange(0, len(text) - model.length, half)
    if most is not None:
        starts = starts[np.linspace(0, len(starts) - 1, most).astype(int)]
    bits = []
    for first in range(0, len(starts), 16):
        ids, targets = windows(text, starts[first : first + 16], model.length)
        scores = model(ids)
        if first == 0:
            bits.append((cross_entropy(scores[:1, :half], targets[:1, :half])[0], half))
        bits.append((cross_entropy(scores[:, half:], targets[:, half:])[0], len(ids) * half))
    values, weights = zip(*bits, strict=True)
    return float(np.average(values, weights=weights) / np.log(2))


def baselines(train_text: str, held_text: str) -> dict[str, float]:
    """Return what a character of the held-out text costs without a network, in bits.

    Characters and pairs are counted in the training text, each count from 1 up, so that nothing is impossible.
    """
    alphabet = Alphabet(train_text + held_text)
    known, text = alphabet.encode(train_text), alphabet.encode(held_text)
    single = np.ones(len(alphabet.characters))
    pairs = np.ones((len(single), len(single)))
    np.add.at(single, known, 1)
    np.add.at(pairs, (known[:-1], known[1:]), 1)

    def packed(compress: Callable[[bytes], bytes], *texts: str) -> int:
        return 8 * len(compress("".join(texts).encode()))

    def xz(data: bytes) -> bytes:
        return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)

    return {
        "characters by frequency": -float(np.log2(single / single.sum())[text].mean()),
        "pairs by frequency": -float(np.log2(pairs / pairs.sum(axis=1, keepdims=True))[text[:-1], text[1:]].mean()),
        "gzip": packed(lambda data: zlib.compress(data, 9), held_text) / len(text),
        "xz": packed(xz, held_text) / len(text),
        "xz after the training text": (packed(xz, train_text, held_text) - packed(xz, train_text)) / len(text),
    }


def write(model: GPT, alphabet: Alphabet, prompt: str, count: int, seed: int, temperature: float = 0.7) -> str:
    """Return `count` characters that go on after the prompt, each drawn from what the model expects."""
    rng = np.random.default_rng(seed)
    ids = list(alphabet.encode(prompt))
    for _ in range(count):
        scores = model(np.array([ids[-model.length :]]))[0, -1] / temperature
        ids.append(int((scores + rng.gumbel(size=scores.shape)).argmax()))  # a draw from softmax(scores)
    return alphabet.decode(np.array(ids[len(prompt) :]))


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw(trained: Trained, costs: dict[str, float], found: list[Habit]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the figure of each picture."""
    from matplotlib.figure import Figure

    from fastattn import plot
    from fastattn.plot.colours import HEAD_COLOURS

    figure = Figure((6.4, 3.6))
    axes = figure.add_subplot()
    for (name, bits), colour in zip(list(trained.curve.items())[1:], HEAD_COLOURS, strict=False):
        axes.plot(trained.curve["step"], bits, color=colour, label=name)
    for index, (name, bits) in enumerate(costs.items()):
        if name != "this model":
            axes.axhline(bits, color="0.6", linewidth=0.8, linestyle="dashed")
            at = trained.curve["step"][-1] * (0.8 if index % 2 else 1.0)  # gzip and xz are too near for one column
            axes.text(at, bits, name, fontsize=8, color="0.35", ha="right", va="bottom")
    axes.set(xlabel="step", ylabel="bits per character", ylim=(1, 5), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.91))
    yield "gpt-loss", figure

    length = min(32, trained.model.length)
    ids = trained.held[None, 200 : 200 + length]
    text = trained.alphabet.decode(ids[0])
    weights = weights_of(trained.model, ids)[:, 0]
    figure = Figure((1.4 * weights.shape[1] + 1.2, 1.4 * weights.shape[0] + 0.6))
    plot.heads(weights, ax=figure.add_subplot())
    yield "gpt-heads", figure

    shown: dict[tuple[int, int], list[str]] = {}
    for habit in found:
        if habit.kind in SHOWN:
            shown.setdefault((habit.layer, habit.head), []).append(habit.kind)
    figure = Figure((5 * len(shown), 5.2))
    for (head, kinds), axes in zip(shown.items(), figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        plot.heatmap(weights[head], list(text), colorbar=False, ax=axes)
        axes.set_title("layer {}, head {}: {}".format(*head, ", ".join(kinds)), fontsize=10)
    figure.tight_layout()
    yield "gpt-places", figure


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Train, print what was learned, and keep it if asked to."""
    asked = options(__doc__)
    settings = replace(QUICK if asked.quick else Settings(), seed=asked.seed)
    train_text, held_text = corpus()
    print(f"Python's manual: {len(train_text):,} characters to train on, {len(held_text):,} held out")
    costs = baselines(train_text, held_text)
    trained = train(settings, train_text, held_text)
    parameters = sum(parameter.value.size for _, parameter in trained.model.parameters())
    costs["this model"] = bits_per_character(trained.model, trained.held)
    print(f"{parameters:,} parameters, {settings.steps} steps, {trained.seconds:.0f} s\n")
    print("bits per character of the held-out text")
    for name, bits in sorted(costs.items(), key=lambda item: -item[1]):
        print(f"  {bits:.2f}  {name}")

    sample = write(trained.model, trained.alphabet, PROMPT, 100 if asked.quick else 600, settings.seed)
    print(f"\nwhat it writes after {PROMPT!r}\n\n{indent(PROMPT + sample, '    ')}\n")
    ids = windows(trained.held, np.arange(16) * settings.length, settings.length)[0]
    texts = [trained.alphabet.decode(row) for row in ids]
    found = strongest(weights_of(trained.model, ids), weights_of(trained.before, ids), texts)
    print("the head that looks there: part of its weight (what would be there anyway; before training)")
    for habit in found:
        parts = f"{habit.weight:4.0%} ({habit.otherwise:.0%}; {habit.untrained:.0%})"
        print(f"  {habit.kind:32} layer {habit.layer}, head {habit.head}  {parts}")
    print("\nbits per character more without the head")
    lost = cost_without_each(trained.model, lambda: bits_per_character(trained.model, trained.held, most=128))
    for layer, each in enumerate(lost):
        print(f"  layer {layer}  " + "  ".join(f"{bits:5.2f}" for bits in each))

    if asked.save:
        result = {
            "settings": asdict(settings),
            "characters": {"training": len(train_text), "held out": len(held_text)},
            "parameters": parameters,
            "seconds": round(trained.seconds),
            "bits per character": costs,
            "curve": trained.curve,
            "sample": PROMPT + sample,
            "heads": [habit._asdict() for habit in found],
            "bits per character more without the head": lost,
        }
        print(f"\n{save_result('gpt', result)}")
        for name, figure in draw(trained, costs, found):
            print(save_figure(name, figure))


if __name__ == "__main__":
    main()
